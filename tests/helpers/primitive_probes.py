"""One small function per primitive, and helpers that read a rewritten jaxpr.

The trace of each function contains the primitive of the same name. It takes
a (4, 4) float32 array of numbers between 0 and 1. Functions for primitives that
autocast runs in half or in float32 return arrays of such numbers, too.
"""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback, pallas
from jax.lax import linalg
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax import autocast, sharding
from mpjax._jaxpr.core import check_jaxpr, dtype_of, is_inexact_aval, open_jaxpr, walk

ROWS = P("i")
VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])

# The first version of jax that makes a primitive, and the first that no longer does.
SINCE = {
    "empty2": (0, 10, 2),
    "eval_jaxpr": (0, 11),
    "log2": (0, 11),
    "mulhi": (0, 10, 2),
    "one_minus_square": (0, 11),
    "polynomial": (0, 12),
    "stack": (0, 10, 1),
    "unstack": (0, 10, 1),
}
UNTIL = {"closed_call": (0, 11)}


def exists(name: str) -> bool:
    """Whether the installed jax has a primitive."""
    return SINCE.get(name, VERSION) <= VERSION < UNTIL.get(name, (99,))


def sharded(fn, out_specs=ROWS, **kwargs):
    """Returns `fn` on two devices, each with half of the rows."""

    def run(x):
        mesh = sharding.auto_mesh(jax.make_mesh((2,), ("i",)))
        options = {"in_specs": ROWS, "out_specs": out_specs} | kwargs
        return jax.shard_map(fn, mesh=mesh, **options)(x)

    return run


def ints(x):
    return (x * 8).astype(jnp.int32)


def key(_=None):
    return jax.random.key(0)


def binary(fn):
    return lambda x: fn(x, x)


def reduce_window(op, init):
    return lambda x: lax.reduce_window(x, init, op, (2, 2), (2, 2), "VALID")


pool = reduce_window(lax.max, -np.inf)


def constraint(x):
    mesh = sharding.auto_mesh(jax.make_mesh((2,), ("i",)))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P("i")))


def reshard(x):
    mesh = jax.make_mesh((1,), ("i",))
    split = jax.sharding.reshard(x, NamedSharding(mesh, ROWS))
    return jax.sharding.reshard(split, NamedSharding(mesh, P()))


def scan(x):
    return lax.scan(lambda c, y: (c @ y, None), x, jnp.stack([x, x]))[0]


def remembered_scan(x):
    """A scan whose constants are computed before it, by a call."""
    keep = jax.checkpoint_policies.dots_saveable
    step = lambda c, y: (c @ jnp.sin(x) + y, None)
    loss = lambda x: lax.scan(step, x, x[None])[0].sum()
    return jax.grad(jax.checkpoint(loss, policy=keep))(x)


@jax.custom_vjp
def with_own_vjp(x):
    return x @ x


with_own_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

RAGGED_SIZES = np.array([2, 2], np.int32)

HALF = {
    "dot_general": lambda x: x @ (x + 1),
    "conv_general_dilated": lambda x: lax.conv(
        x[None, None], x[None, None, :2, :2], (1, 1), "SAME"
    ),
    "ragged_dot_general": lambda x: lax.ragged_dot(x, jnp.stack([x, x]), RAGGED_SIZES),
}

FLOAT32 = {
    "exp": lax.exp,
    "exp2": lax.exp2,
    "expm1": lax.expm1,
    "log": lax.log,
    "log2": lambda x: lax.log2(x),
    "log1p": lax.log1p,
    "pow": binary(lax.pow),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "square": lax.square,
    "polynomial": lambda x: lax.polynomial(x, [1.0, 0.5]),
    "sqrt": lax.sqrt,
    "rsqrt": lax.rsqrt,
    "cbrt": lax.cbrt,
    "sin": lax.sin,
    "cos": lax.cos,
    "tan": lax.tan,
    "sinh": lax.sinh,
    "cosh": lax.cosh,
    "asin": lax.asin,
    "acos": lax.acos,
    "atan": lax.atan,
    "atan2": binary(lax.atan2),
    "asinh": lax.asinh,
    "acosh": lambda x: lax.acosh(x + 2),
    "atanh": lax.atanh,
    "erf_inv": lax.erf_inv,
    "lgamma": lax.lgamma,
    "digamma": lax.digamma,
    "igamma": binary(lax.igamma),
    "igammac": binary(lax.igammac),
    "igamma_grad_a": binary(lax.igamma_grad_a),
    "polygamma": lambda x: lax.polygamma(jnp.ones_like(x), x + 1),
    "zeta": lambda x: lax.zeta(x + 2, x + 1),
    "bessel_i0e": lax.bessel_i0e,
    "bessel_i1e": lax.bessel_i1e,
    "regularized_incomplete_beta": lambda x: lax.betainc(x, x, x),
    "reduce_sum": lambda x: x.sum(0),
    "reduce_prod": lambda x: x.prod(0),
    "cumsum": lambda x: lax.cumsum(x),
    "cumprod": lambda x: lax.cumprod(x),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x),
    "reduce_window_sum": reduce_window(lax.add, 0.0),
    "psum": sharded(lambda x: lax.psum(x, "i"), P(), check_vma=False),
    "psum_invariant": sharded(lambda x: lax.psum(x, "i"), P()),
    "reduce_scatter": sharded(lambda x: lax.psum_scatter(x, "i", tiled=True)),
    "gather": lambda x: x[jnp.array([0, 2])],
}

ARITHMETIC = {
    "sign": lax.sign,
    "add": binary(lax.add),
    "sub": lambda x: lax.sub(x, x.T),
    "mul": binary(lax.mul),
    "div": lambda x: lax.div(x, x.T),
    "add_any": lambda x: jax.vjp(lambda a: (a, a), x)[1]((x, x.T))[0],
    "one_minus_square": lambda x: lax.one_minus_square(x),
    "logistic": lax.logistic,
    "tanh": lax.tanh,
    "erf": lax.erf,
    "erfc": lax.erfc,
}

EXACT = {
    "neg": lax.neg,
    "abs": lax.abs,
    "max": lambda x: lax.max(x, x.T),
    "min": lambda x: lax.min(x, x.T),
    "select_n": lambda x: lax.select(x > 0.5, x, x.T),
    "clamp": lambda x: lax.clamp(x.dtype.type(0.25), x, x.dtype.type(0.75)),
    "broadcast_in_dim": lambda x: lax.broadcast(x, (2,)),
    "reshape": lambda x: x.reshape(2, 8),
    "transpose": lambda x: x.reshape(2, 2, 4).transpose(1, 2, 0),
    "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
    "slice": lambda x: x[1:3],
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (jnp.int32(1), 0), (2, 2)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(
        x, x[:1], (jnp.int32(2), 0)
    ),
    "concatenate": lambda x: jnp.concatenate([x, x.T]),
    "pad": lambda x: lax.pad(x, x.dtype.type(0), ((1, 0, 0), (0, 1, 0))),
    "rev": lambda x: x[::-1],
    "split": lambda x: lax.split(x, (1, 3)),
    "tile": lambda x: lax.tile(x, (2, 1)),
    "stack": lambda x: lax.stack([x, x.T]),
    "unstack": lambda x: lax.unstack(x),
    "copy": lambda x: jnp.copy(x),
    "name": lambda x: checkpoint_name(x, "rows"),
    "stop_gradient": lax.stop_gradient,
    "reduce_max": lambda x: x.max(0),
    "reduce_min": lambda x: x.min(0),
    "cummax": lambda x: lax.cummax(x),
    "cummin": lambda x: lax.cummin(x),
    "reduce_window_max": pool,
    "reduce_window_min": reduce_window(lax.min, np.inf),
    "select_and_scatter_add": lambda x: jax.vjp(pool, x)[1](x[1:3, 1:3])[0],
    "sharding_constraint": constraint,
    "reshard": reshard,
    "all_gather": sharded(lambda x: lax.all_gather(x, "i", tiled=True)),
    "all_gather_invariant": sharded(
        lambda x: lax.all_gather(x, "i", tiled=True, to="invarying"), P()
    ),
    "ppermute": sharded(lambda x: lax.ppermute(x, "i", [(0, 1), (1, 0)])),
    "all_to_all": sharded(lambda x: lax.all_to_all(x, "i", 1, 0, tiled=True)),
    "pvary": sharded(lambda x: lax.pcast(x, "i", to="varying"), in_specs=P()),
    "convert_element_type": lambda x: lax.convert_element_type_p.bind(
        x, new_dtype=np.dtype(np.float32), weak_type=True, sharding=None
    ),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
    "optimization_barrier": lambda x: lax.optimization_barrier(x),
}

CALLS = {
    "jit": jax.jit(lambda x: x @ x),
    "remat2": jax.checkpoint(lambda x: x @ x),
    "closed_call": remembered_scan,
    "eval_jaxpr": remembered_scan,
    "shard_map": sharded(lambda x: x @ x.T, check_vma=False),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x, jnp.sin, x),
    "scan": scan,
    "while": lambda x: lax.while_loop(lambda c: c[0, 0] > 1, lambda c: c @ c, x),
    "custom_jvp_call": jax.nn.relu,
    "custom_vjp_call": with_own_vjp,
    "custom_vmap_call": lambda x: with_own_vmap(x),
    "linear_call": lambda x: jax.custom_derivatives.linear_call(
        lambda r, v: r @ v, lambda r, v: r.T @ v, x, x
    ),
}


@jax.custom_batching.custom_vmap
def with_own_vmap(x):
    return x @ x


@with_own_vmap.def_vmap
def _(axis_size, in_batched, x):
    return x @ x, True


def kernel(x):
    def add_one(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(add_one, out_shape=out, interpret=True)(x)


def cond_gradient(x):
    loss = lambda x: lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x).sum(), jnp.sum, x)
    return jax.grad(loss)(x)


def _on_ints():
    fns = {
        name: lambda x, name=name: getattr(lax, name)(ints(x))
        for name in ("population_count", "clz", "bitwise_not")
    }
    pairs = (
        "bitwise_and bitwise_or bitwise_xor mulhi shift_left shift_right_logical "
        "shift_right_arithmetic"
    )
    fns |= {
        name: lambda x, name=name: getattr(lax, name)(ints(x), ints(x))
        for name in pairs.split()
    }
    return {name.removeprefix("bitwise_"): fn for name, fn in fns.items()}


def _scatters():
    at = lambda x: x.at[jnp.array([0, 2])]
    return {
        "scatter": lambda x: at(x).set(x[0]),
        "scatter-add": lambda x: at(x).add(x[0]),
        "scatter-sub": lambda x: at(x).subtract(x[0]),
        "scatter-mul": lambda x: at(x).multiply(x[0]),
        "scatter-min": lambda x: at(x).min(x[0]),
        "scatter-max": lambda x: at(x).max(x[0]),
    }


OPAQUE = {
    **_on_ints(),
    **_scatters(),
    "eq": binary(lax.eq),
    "ne": binary(lax.ne),
    "ge": binary(lax.ge),
    "gt": binary(lax.gt),
    "le": binary(lax.le),
    "lt": binary(lax.lt),
    "is_finite": lax.is_finite,
    "argmax": lambda x: x.argmax(0),
    "argmin": lambda x: x.argmin(0),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.int32),
    "nextafter": binary(lax.nextafter),
    "floor": lax.floor,
    "ceil": lax.ceil,
    "round": lambda x: lax.round(x),
    "rem": binary(lax.rem),
    "iota": lambda x: x + jnp.arange(4),
    "sort": lambda x: lax.sort(x),
    "top_k": lambda x: lax.top_k(x, 2),
    "approx_top_k": lambda x: lax.approx_max_k(x, 2),
    "reduce_and": lambda x: (x > 0).all(),
    "reduce_or": lambda x: (x > 0).any(),
    "reduce_xor": lambda x: lax.reduce_xor(ints(x), (0,)),
    "select_and_gather_add": lambda x: jax.jvp(pool, (x,), (x,)),
    "fft": jnp.fft.rfft,
    "cholesky": linalg.cholesky,
    "cholesky_update": lambda x: linalg.cholesky_update(x, x[0]),
    "symmetric_product": binary(linalg.symmetric_product),
    "eig": lambda x: linalg.eig(x),
    "eigh": lambda x: linalg.eigh(x),
    "lu": linalg.lu,
    "lu_pivots_to_permutation": lambda x: linalg.lu_pivots_to_permutation(
        ints(x)[0], 4
    ),
    "qr": lambda x: linalg.qr(x),
    "svd": lambda x: linalg.svd(x),
    "schur": lambda x: linalg.schur(x),
    "triangular_solve": binary(linalg.triangular_solve),
    "tridiagonal_solve": lambda x: linalg.tridiagonal_solve(x[0], x[1], x[2], x),
    "hessenberg": linalg.hessenberg,
    "householder_product": lambda x: linalg.householder_product(x, x[0]),
    "tridiagonal": lambda x: linalg.tridiagonal(x),
    "custom_linear_solve": binary(jnp.linalg.solve),
    "reduce": lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + b, (0,)),
    "reduce_window": reduce_window(lambda a, b: a * b + b, 1.0),
    "pallas_call": kernel,
    "complex": binary(lax.complex),
    "real": lambda x: lax.real(lax.complex(x, x)),
    "imag": lambda x: lax.imag(lax.complex(x, x)),
    "conj": lambda x: lax.conj(lax.complex(x, x)),
    "axis_index": sharded(lambda x: x * lax.axis_index("i")),
    "pmax": sharded(lambda x: lax.pmax(x, "i"), P()),
    "pmin": sharded(lambda x: lax.pmin(x, "i"), P()),
    "pbroadcast": sharded(lambda x: lax.pbroadcast(x, "i", 0)),
    "device_put": lambda x: jax.device_put(x),
    "empty": lambda x: lax.empty((4,), x.dtype),
    "empty2": cond_gradient,
    "platform_index": lambda x: lax.platform_dependent(x, cpu=lax.sin, default=lax.cos),
    "debug_callback": lambda x: jax.debug.callback(print, x),
    "debug_print": lambda x: jax.debug.print("{}", x),
    "pure_callback": lambda x: jax.pure_callback(lambda x: x, x, x),
    "io_callback": lambda x: io_callback(lambda x: x, x, x),
    "random_bits": lambda x: jax.random.bits(key()),
    "random_clone": lambda x: jax.random.clone(key()),
    "random_fold_in": lambda x: jax.random.fold_in(key(), 1),
    "random_gamma": lambda x: jax.random.gamma(key(), x),
    "random_seed": key,
    "random_split": lambda x: jax.random.split(key()),
    "random_wrap": lambda x: jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)),
    "random_unwrap": lambda x: jax.random.key_data(key()),
    "rng_bit_generator": lambda x: lax.rng_bit_generator(
        jnp.zeros(4, jnp.uint32), (4,)
    ),
    "rng_uniform": lambda x: lax.rng_uniform(0.0, x[0, 0], (4,)),
    "threefry2x32": lambda x: jax.extend.random.threefry_2x32(
        jnp.zeros(2, jnp.uint32), jnp.zeros(4, jnp.uint32)
    ),
}

# --- Reading the jaxpr of a function under autocast.

BF16, F16, F32 = map(np.dtype, (jnp.bfloat16, jnp.float16, jnp.float32))
POLICIES = {"mixed_bfloat16": BF16, "mixed_float16": F16}


def integers(seed, *shape, high=5):
    rng = np.random.default_rng(seed)
    return rng.integers(-high, high + 1, shape).astype(np.float32)


X, W = integers(0, 8, 8), integers(1, 8, 8)
H = X @ W
EYE = np.eye(8, dtype=np.float32)


def rewrite(fn, *args, policy="mixed_bfloat16", **kwargs):
    """Returns the jaxpr of a function under autocast, checked."""
    closed = jax.make_jaxpr(autocast(fn, policy, **kwargs))(*args)
    check_jaxpr(open_jaxpr(closed))
    return closed


def body(closed):
    """Returns the jaxpr inside the jits of autocast and of the function itself."""
    (call,) = closed.eqns
    (call,) = open_jaxpr(call.params["jaxpr"]).eqns
    return open_jaxpr(call.params["jaxpr"])


def by_ops(closed, *args):
    """Evaluates op by op: compiled for a CPU, roundings to half may be left out."""
    with jax.disable_jit():
        return jax.core.eval_jaxpr(open_jaxpr(closed), closed.consts, *args)


def eqns(closed, *names):
    return [e for e, _, _ in walk(closed) if e.primitive.name in names]


def outputs(closed, *names):
    """Returns the output dtypes of the equations of these names, in order."""
    return [dtype_of(v) for e in eqns(closed, *names) for v in e.outvars]


def floats(eqn):
    """Returns the floating dtypes of an equation."""
    atoms = (*eqn.invars, *eqn.outvars)
    return {dtype_of(v) for v in atoms if is_inexact_aval(v.aval)}


def assert_dots(closed, dtype, num):
    found = eqns(closed, "dot_general", "conv_general_dilated")
    assert [floats(e) for e in found] == [{dtype}] * num


def rounded(x, dtype):
    return np.asarray(x, np.float32).astype(dtype).astype(np.float32)
