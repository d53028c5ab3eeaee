"""Recurrent cells and layers, the loops over them, and how these are evaluated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from mpjax._autocast.api import make_settings
from mpjax._autocast.pipeline import rewrite_in_half
from mpjax._jaxpr.core import bind, inner_jaxprs, open_jaxpr, walk
from mpjax._jaxpr.loops import Scan

LENGTH, BATCH, WIDTH = 5, 3, 4
rng = np.random.default_rng(0)
W = rng.normal(size=(2, WIDTH, 2 * WIDTH)).astype(np.float32)
X = rng.normal(size=(LENGTH, BATCH, WIDTH)).astype(np.float32)


def evaluate(closed, *args):
    """Evaluates op by op, loops unrolled: every rounding is where it is traced."""

    def run(jaxpr, consts, args):
        body = open_jaxpr(jaxpr)
        env = dict(zip((*body.constvars, *body.invars), (*consts, *args), strict=True))
        read = lambda x: env[x] if is_var(x) else x.val
        for eqn in body.eqns:
            values = [read(x) for x in eqn.invars]
            inner = inner_jaxprs(eqn)
            if eqn.primitive.name == "scan":
                results = loop(eqn, inner[0], values)
            elif eqn.primitive.name in ("jit", "remat2", "checkpoint"):
                results = run(inner[0], getattr(inner[0], "consts", ()), values)
            else:
                results = bind(eqn, *values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(x) for x in body.outvars]

    def loop(eqn, jaxpr, values):
        num_consts, num_carry = Scan(eqn).num_consts, Scan(eqn).num_carry
        consts, values = values[:num_consts], values[num_consts:]
        carry, xs = values[:num_carry], values[num_carry:]
        steps = range(eqn.params["length"])
        ys = {}
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            outs = run(jaxpr, (), [*consts, *carry, *(x[i] for x in xs)])
            carry, ys[i] = outs[:num_carry], outs[num_carry:]
        stacks = [
            jnp.stack(pieces) for pieces in zip(*(ys[i] for i in steps), strict=True)
        ]
        return [*carry, *stacks]

    return run(closed, closed.consts, jax.tree.leaves(args))


def is_var(x):
    return not hasattr(x, "val")


def scans(closed):
    return [eqn for eqn, _, _ in walk(closed) if eqn.primitive.name == "scan"]


def stacked(closed):
    """Returns the sorted types of stacked results, per scan that has any."""
    found = [eqn.outvars[Scan(eqn).num_carry :] for eqn in scans(closed)]
    return [sorted(v.aval.str_short() for v in outs) for outs in found if outs]


def num_stacked_bytes(closed):
    outs = [v.aval for eqn in scans(closed) for v in eqn.outvars[Scan(eqn).num_carry :]]
    return sum(aval.size * aval.dtype.itemsize for aval in outs)


def in_half(closed, policy):
    """Returns a jaxpr rewritten by a policy: the first pass of autocast alone."""
    if policy == "float32":
        return closed
    return rewrite_in_half(closed, make_settings(policy, (), ()))


# --- Loops as people write them: each is a loss of weights and a sequence.


ZEROS = jnp.zeros((BATCH, WIDTH))


def over(step, state=ZEROS):
    def loss(w, x):
        last, ys = lax.scan(functools.partial(step, w), state, x)
        return sum(jnp.mean(y**2) for y in jax.tree.leaves((last, ys)))

    return loss


def gated(w, h, x):
    z, g = jnp.split(x @ w[0] + h @ w[1], 2, -1)
    z = nn.sigmoid(z)
    return z * h + (1 - z) * jnp.tanh(g), None


def lstm(w, state, x):
    h, c = state
    i, f = jnp.split(nn.sigmoid(x @ w[0] + h @ w[1]), 2, -1)
    c = f * c + i * jnp.tanh(x)
    return (f * jnp.tanh(c), c), h


def layer(w, x, gain):
    """Applies one layer, as in a transformer that scans over its layers."""
    y = x - x.mean(-1, keepdims=True)
    y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * gain
    return x + nn.gelu(y @ w[0]) @ w[1].T, None


def masked(w, h, x):
    z = jnp.where(jnp.arange(WIDTH) > 1, h @ w[0][:, :WIDTH], -1.0)
    return jnp.where(x > 0, nn.relu(z) + x, h), jnp.argmax(z, -1).astype(jnp.float32)


def nested(w, h, x):
    inner = lambda h, i: (nn.sigmoid(h @ w[0][:, :WIDTH]) * h + x * i, None)
    h, _ = lax.scan(inner, h, jnp.arange(3.0))
    return h * nn.silu(x), None


def normalized(w, h, x):
    p = nn.softmax(h @ w[0][:, :WIDTH] + x)
    return p * h, {"p": p, "entropy": p * jnp.log(p + 1e-3)}


CELLS = {
    "gated": over(gated),
    "lstm": over(lstm, (ZEROS, ZEROS)),
    "layers": lambda w, x: over(layer, jnp.asarray(x[0]))(w, x[:, :1]),
    "masked": over(masked),
    "nested": over(nested),
    "normalized": over(normalized),
    "reversed": lambda w, x: over(gated)(w, x[::-1]) + over(lstm, (x[0], x[1]))(w, x),
    "jit": jax.jit(over(gated)),
    "checkpointed": over(jax.checkpoint(gated)),
    "saving matmuls": over(
        jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable), X[0]
    ),
    "vmap": lambda w, x: jax.vmap(over(gated, jnp.zeros(WIDTH)), (None, 1))(w, x).sum(),
    "unrolled in part": lambda w, x: lax.scan(
        functools.partial(gated, w), x[0], x, unroll=2
    )[0].sum(),
}
