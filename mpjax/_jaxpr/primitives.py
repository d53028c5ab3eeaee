"""Facts about JAX's primitives: the one table in the library.

Facts are looked up by `primitive.name`. Each primitive stands in one line of the table,
and one test (tests/jaxpr/test_primitives.py) checks all lines against the installed
JAX: every name is real, every fact that can be observed is observed on a traced
example, and a primitive that JAX adds fails the test until it has a line.

Which precision a primitive runs in under autocast (`Kind`) follows NVIDIA's recipe as
PyTorch and TensorFlow adopted it: matmuls and convolutions in half, reductions and
exponentials in float32 ("Mixed Precision Training", arXiv:1710.03740, section 3.3).
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np


class Kind(enum.Enum):
    """What autocast does with a primitive."""

    HALF = "half"
    """Operands and output in half precision: what tensor cores run."""

    FLOAT32 = "float32"
    """Float32: loses too much, or overflows, in half precision."""

    PROMOTE = "promote"
    """The widest dtype of its operands."""

    CALL = "call"
    """A call: rewritten inside, dtypes pass through."""

    CALL_AS_TRACED = "call as traced"
    """A call: rewritten inside, inputs and outputs as traced."""

    COND = "cond"
    """A conditional: rewritten inside, inputs pass through, outputs as traced."""

    LOOP = "loop"
    """A loop: rewritten inside, inputs and outputs as traced."""

    CUSTOM = "custom"
    """A function with a custom derivative: both are rewritten, lazily."""

    OPAQUE = "opaque"
    """As traced: unknown, or not to be touched."""


class Flops(enum.Enum):
    """How to count the floating-point operations of a primitive without a formula."""

    NONE = "none"
    """It moves or compares numbers."""

    PER_OUTPUT = "per output"
    """One for each element of the result."""

    PER_INPUT = "per input"
    """One for each element of the first operand: a reduction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about one primitive.

    Attributes:
      kind: what autocast does with it.
      is_known: whether it stands in the table on purpose; `autocast_report` lists any
        other as not understood.
      flops: how its floating-point operations are counted.
      is_matmul: whether it is a matmul or a convolution.
      is_activation: whether it is a saturating activation function. If a matmul and its
        own derivative take its result, it runs in half precision; otherwise the result
        would be saved for the backward pass in float32.
      is_exact: whether each number of the result is a number of an operand, or its
        negative: exact in any dtype, and the same whether rounded before or after.
        (The gradient of a pooling adds up where windows overlap, a few numbers at
        most.)
      shrinks: whether it is exact with a result smaller than its operand, so that a
        cast belongs after it.
      repeats: whether it is exact with a result that may hold a number of its operand
        several times, so that its derivative is a sum and a cast belongs after it.
      moves_data: whether its results hold numbers of its first operand, unchanged, and
        no others: a constant array stays constant. (If it has as many results as
        operands, like `optimization_barrier`, each result holds the numbers of its own
        operand.)
      keeps_constant: whether autocast follows a constant through it, so as not to round
        it: what JAX puts between a number and the operation that takes it.
      is_view: whether XLA does it without touching memory.
      is_slice: whether it reads only as much of its first operand as it returns.
      is_cheap: whether it is arithmetic or a slice: cheaper to rematerialize than to
        store for the backward pass.
      compares_order: whether it is >=, >, <= or <. With zero on one side it is the
        derivative of relu. If every other consumer takes the value in half precision,
        so does the comparison; otherwise a float32 copy would be saved for the
        backward pass.
      is_call: whether its results are those of its one inner jaxpr on its operands, so
        that evaluating the jaxpr evaluates it. (Not `shard_map`, whose inner values are
        those of one device.)
      reduces_by_jaxpr: whether its inner jaxpr combines two scalars, and is not called
        on its operands.
      is_addition: whether it adds or subtracts two operands.
      is_sum: whether it adds two operands.
      sums_axes: whether it adds up, or multiplies, all elements along some axes.
      accumulates: whether it adds up, or multiplies, along one axis, keeping every
        partial result.
      adds_up: whether it adds up many numbers of its operand: along axes, in windows,
        or where indices meet.
      adds_devices: whether it adds up what devices hold.
      is_sensitive: whether its relative error is many times that of its operand, or it
        overflows early, so that half precision harms it.
      is_proportional: whether its result is proportional to each of its operands, or to
        the inverse of one.
      tests_equality: whether it is == or !=.
      ranks: whether it ranks the numbers of its operand: its results, or the order of
        its other operands, depend on which of two is larger.
      float16_limit: the argument beyond which it overflows in float16, as text.
      is_logarithm: whether it is a logarithm.
      pole: index of the operand that makes an Inf, and at which value; None if none.
      outside_domain: `(operand) -> bool array`, true where it has no real value.
    """

    kind: Kind = Kind.OPAQUE
    is_known: bool = True
    flops: Flops = Flops.PER_OUTPUT
    is_matmul: bool = False
    is_activation: bool = False
    is_exact: bool = False
    shrinks: bool = False
    repeats: bool = False
    moves_data: bool = False
    is_view: bool = False
    keeps_constant: bool = False
    is_slice: bool = False
    is_cheap: bool = False
    compares_order: bool = False
    is_call: bool = False
    reduces_by_jaxpr: bool = False
    is_addition: bool = False
    is_sum: bool = False
    sums_axes: bool = False
    accumulates: bool = False
    adds_up: bool = False
    adds_devices: bool = False
    is_sensitive: bool = False
    is_proportional: bool = False
    tests_equality: bool = False
    ranks: bool = False
    float16_limit: str = ""
    is_logarithm: bool = False
    pole: tuple[int, float] | None = None
    outside_domain: Callable[[np.ndarray], np.ndarray] | None = None


UNKNOWN = Facts(is_known=False)
_table: dict[str, Facts] = {}


def _define(names: str, **facts: Any) -> None:
    for name in names.split():
        assert name not in _table, name
        _table[name] = Facts(**facts)


# Matmuls.
_define(
    "dot_general conv_general_dilated ragged_dot_general",
    kind=Kind.HALF,
    is_matmul=True,
)

# Functions that lose too much, or overflow, in half precision.
_define("exp expm1", kind=Kind.FLOAT32, is_sensitive=True, float16_limit="11")
_define("exp2", kind=Kind.FLOAT32, is_sensitive=True, float16_limit="16")
_define("sinh cosh", kind=Kind.FLOAT32, is_sensitive=True, float16_limit="11")
_define(
    "log log2",
    kind=Kind.FLOAT32,
    is_sensitive=True,
    is_logarithm=True,
    pole=(0, 0.0),
    outside_domain=lambda x: x < 0,
)
_define(
    "log1p",
    kind=Kind.FLOAT32,
    is_sensitive=True,
    is_logarithm=True,
    pole=(0, -1.0),
    outside_domain=lambda x: x < -1,
)
_define(
    "pow",
    kind=Kind.FLOAT32,
    is_sensitive=True,
    float16_limit="65504",
    pole=(0, 0.0),
    outside_domain=lambda x: x < 0,
)
_define("lgamma digamma", kind=Kind.FLOAT32, is_sensitive=True)
_define("integer_pow", kind=Kind.FLOAT32, is_cheap=True, pole=(0, 0.0))
_define("square", kind=Kind.FLOAT32, is_cheap=True)
_define("sqrt", kind=Kind.FLOAT32, outside_domain=lambda x: x < 0)
_define("rsqrt", kind=Kind.FLOAT32, pole=(0, 0.0), outside_domain=lambda x: x < 0)
_define(
    "asin acos atanh erf_inv",
    kind=Kind.FLOAT32,
    outside_domain=lambda x: np.abs(x) > 1,
)
_define("acosh", kind=Kind.FLOAT32, outside_domain=lambda x: x < 1)
_define(
    """
    polynomial cbrt sin cos tan atan atan2 asinh
    igamma igammac igamma_grad_a polygamma zeta
    bessel_i0e bessel_i1e regularized_incomplete_beta
    """,
    kind=Kind.FLOAT32,
)

# Sums, also those over devices. A gather is here because its gradient is a sum.
_define(
    "reduce_sum",
    kind=Kind.FLOAT32,
    flops=Flops.PER_INPUT,
    sums_axes=True,
    adds_up=True,
)
_define("reduce_prod", kind=Kind.FLOAT32, flops=Flops.PER_INPUT, sums_axes=True)
_define(
    "cumsum",
    kind=Kind.FLOAT32,
    flops=Flops.PER_INPUT,
    accumulates=True,
    adds_up=True,
)
_define(
    "cumprod cumlogsumexp", kind=Kind.FLOAT32, flops=Flops.PER_INPUT, accumulates=True
)
_define("reduce_window_sum", kind=Kind.FLOAT32, flops=Flops.PER_INPUT, adds_up=True)
_define("reduce_scatter", kind=Kind.FLOAT32, flops=Flops.PER_INPUT, adds_devices=True)
_define("psum psum_invariant", kind=Kind.FLOAT32, adds_devices=True)
_define("gather", kind=Kind.FLOAT32, flops=Flops.NONE, is_slice=True)

# Arithmetic: rounds its result, or depends on its operand's last bit.
_define("add add_any", kind=Kind.PROMOTE, is_addition=True, is_sum=True, is_cheap=True)
_define("sub", kind=Kind.PROMOTE, is_addition=True, is_cheap=True)
_define("mul", kind=Kind.PROMOTE, is_cheap=True, is_proportional=True)
_define("one_minus_square sign", kind=Kind.PROMOTE, is_cheap=True)
_define("div", kind=Kind.PROMOTE, is_cheap=True, is_proportional=True, pole=(1, 0.0))
_define("logistic tanh erf erfc", kind=Kind.PROMOTE, is_activation=True)

# Exact: the numbers of the operands, chosen, negated or moved.
_define("neg", kind=Kind.PROMOTE, is_exact=True, is_cheap=True, is_proportional=True)
_define("abs max min clamp", kind=Kind.PROMOTE, is_exact=True, is_cheap=True)
_define("select_n", kind=Kind.PROMOTE, is_exact=True, is_cheap=True, flops=Flops.NONE)
_define(
    "reshape squeeze copy pvary stop_gradient",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    moves_data=True,
    is_view=True,
    keeps_constant=True,
    is_cheap=True,
)
_define(
    "name",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    moves_data=True,
    is_view=True,
    is_cheap=True,
)
_define(
    "sharding_constraint optimization_barrier",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    moves_data=True,
    is_view=True,
)
_define(
    "broadcast_in_dim",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    repeats=True,
    moves_data=True,
    keeps_constant=True,
    is_cheap=True,
)
_define(
    "tile",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    repeats=True,
    moves_data=True,
)
_define(
    "transpose rev reshard all_gather all_gather_invariant all_to_all",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    moves_data=True,
)
_define(
    "slice",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    shrinks=True,
    moves_data=True,
    is_slice=True,
    is_cheap=True,
)
_define(
    "dynamic_slice",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    shrinks=True,
    moves_data=True,
    is_slice=True,
)
_define(
    "split",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    shrinks=True,
    moves_data=True,
    is_cheap=True,
)
_define(
    "unstack",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    shrinks=True,
    moves_data=True,
)
_define(
    "concatenate pad stack dynamic_update_slice ppermute",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
)
_define(
    "reduce_max reduce_min",
    kind=Kind.PROMOTE,
    flops=Flops.PER_INPUT,
    is_exact=True,
    shrinks=True,
)
_define(
    "cummax cummin reduce_window_max reduce_window_min",
    kind=Kind.PROMOTE,
    flops=Flops.PER_INPUT,
    is_exact=True,
)
_define("select_and_scatter_add", kind=Kind.PROMOTE, is_exact=True)
_define(
    "convert_element_type",
    kind=Kind.PROMOTE,
    flops=Flops.NONE,
    is_exact=True,
    keeps_constant=True,
    is_cheap=True,
)
_define("reduce_precision", kind=Kind.PROMOTE, is_exact=True, is_cheap=True)

# Functions inside functions.
_define("jit remat2 closed_call eval_jaxpr", kind=Kind.CALL, is_call=True)
_define("shard_map", kind=Kind.CALL)
# With a rule of its own for vmap or transposition, which expects the traced dtypes.
_define("custom_vmap_call linear_call", kind=Kind.CALL_AS_TRACED, is_call=True)
_define("cond", kind=Kind.COND)
_define("scan while", kind=Kind.LOOP)
_define("custom_jvp_call custom_vjp_call", kind=Kind.CUSTOM, is_call=True)

# As traced on purpose: comparisons and integers, bits, indices and sentinels, linear
# algebra, random numbers.
_define("ge gt le lt", compares_order=True, is_cheap=True)
_define("eq ne", is_cheap=True, tests_equality=True)
_define("and or xor not is_finite", is_cheap=True)
_define("argmax argmin", flops=Flops.PER_INPUT, ranks=True)
_define("sort top_k approx_top_k", ranks=True)
_define("reduce_and reduce_or reduce_xor", flops=Flops.PER_INPUT)
_define("rem", pole=(1, 0.0))
_define(
    "bitcast_convert_type iota device_put random_bits random_seed random_split"
    " random_wrap random_unwrap",
    flops=Flops.NONE,
)
_define(
    "scatter scatter-mul scatter-min scatter-max scatter-sub",
    reduces_by_jaxpr=True,
)
_define("scatter-add", reduces_by_jaxpr=True, adds_up=True)
_define(
    """
    shift_left shift_right_logical shift_right_arithmetic population_count clz mulhi
    nextafter floor ceil round
    select_and_gather_add fft cholesky eig eigh lu qr svd schur
    triangular_solve tridiagonal_solve hessenberg householder_product tridiagonal
    lu_pivots_to_permutation custom_linear_solve
    cholesky_update symmetric_product real imag complex conj empty empty2
    axis_index pmax pmin pbroadcast platform_index
    debug_callback debug_print pure_callback io_callback
    random_clone random_fold_in random_gamma rng_bit_generator rng_uniform threefry2x32
    """
)
# Reductions by a function of the user's, and kernels.
_define("reduce reduce_window", reduces_by_jaxpr=True)
_define("pallas_call")

# Not understood: it runs as traced, and `autocast_report` lists it.
_define("select_and_scatter", is_known=False, reduces_by_jaxpr=True)

PRIMITIVES: Mapping[str, Facts] = MappingProxyType(_table)
"""The facts of each primitive by name."""

MATMULS = frozenset(name for name, facts in PRIMITIVES.items() if facts.is_matmul)


def facts_of(eqn: Any) -> Facts:
    """Returns the facts about an equation's primitive; `UNKNOWN` if it has none."""
    return PRIMITIVES.get(eqn.primitive.name, UNKNOWN)
