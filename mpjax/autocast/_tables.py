"""Which primitive runs in which precision. Matched by `primitive.name`.

The lists follow NVIDIA's recipe as PyTorch and TensorFlow adopted it (matmuls and
convolutions in half, reductions and exponentials in float32) and "Mixed Precision
Training" (arXiv:1710.03740, section 3.3).
"""

import enum
from collections.abc import Collection


class Kind(enum.Enum):
    """What autocast does with a primitive."""

    LOW = "low"
    """Operands and output in half: what tensor cores run."""

    HIGH = "high"
    """Float32: loses too much, or overflows, in half."""

    FOLLOW = "follow"
    """The widest dtype of its operands."""

    FREE = "free"
    """A call: rewritten inside, dtypes pass through."""

    BRANCH = "branch"
    """A conditional: rewritten inside, inputs pass through, outputs as traced."""

    FIXED = "fixed"
    """A loop: rewritten inside, inputs and outputs as traced."""

    CUSTOM = "custom"
    """A function with a derivative of its own: both are rewritten, lazily."""

    OPAQUE = "opaque"
    """As traced: not known, or not to be touched."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOW = _names("dot_general conv_general_dilated ragged_dot_general")

# What loses too much, or overflows, in half; a gather as its gradient adds up.
HIGH = _names(
    """
    exp exp2 expm1 log log2 log1p pow integer_pow square polynomial
    sqrt rsqrt cbrt sin cos tan sinh cosh asin acos atan atan2 asinh acosh atanh
    erf_inv erfc lgamma digamma igamma igammac igamma_grad_a polygamma zeta
    bessel_i0e bessel_i1e regularized_incomplete_beta
    reduce_sum reduce_prod cumsum cumprod cumlogsumexp reduce_window_sum
    psum psum_invariant reduce_scatter
    gather
    """
)

# Saturating activation functions. One that goes on to a matmul, and to its own
# derivative, runs in half: else it would be saved for the backward pass in float32.
ACTIVATION = _names("logistic tanh erf")

# Rounds its result, or hangs on its operand's last bit: better in float32.
ARITHMETIC = _names("add sub mul div add_any one_minus_square sign") | ACTIVATION

# The result is one of the operands' numbers, or its negative: exact in any dtype, and
# rounding before is rounding after. (The gradient of a pooling adds up where windows
# overlap, a few numbers at most.)
EXACT = _names(
    """
    neg abs max min select_n clamp
    broadcast_in_dim reshape transpose squeeze slice dynamic_slice dynamic_update_slice
    concatenate pad rev split tile stack unstack copy name stop_gradient
    reduce_max reduce_min cummax cummin reduce_window_max reduce_window_min
    sharding_constraint reshard all_gather all_gather_invariant ppermute all_to_all
    pvary convert_element_type optimization_barrier select_and_scatter_add
    reduce_precision
    """
)

# Exact, but with a result smaller than the operand: the cast belongs after it.
SHRINKING = _names("slice dynamic_slice split unstack reduce_max reduce_min")

# With zero on one side: the derivative of relu. On a value that goes on only in half,
# it is asked of the half, or a float32 copy would be saved for the backward pass.
SIGN_TEST = _names("ge gt le lt")

# Arithmetic and pieces: cheaper to do again than to store for the backward pass.
RECOMPUTED = _names(
    """
    add sub mul div add_any one_minus_square neg abs sign max min clamp
    integer_pow square select_n eq ne lt le gt ge and or xor not is_finite
    broadcast_in_dim reshape squeeze slice split convert_element_type copy pvary
    stop_gradient name reduce_precision
    """
)

FREE = _names("jit remat2 closed_call eval_jaxpr shard_map")
BRANCH = _names("cond")
FIXED = _names("scan while")
CUSTOM = _names("custom_jvp_call custom_vjp_call")

# As traced on purpose: comparisons and integers, bits, indices and sentinels, linear
# algebra, random numbers. `autocast_report` lists any other as not understood.
KNOWN_OPAQUE = SIGN_TEST | _names(
    """
    eq ne and or xor not is_finite argmax argmin
    shift_left shift_right_logical shift_right_arithmetic population_count clz mulhi
    bitcast_convert_type nextafter floor ceil round rem iota
    sort top_k approx_top_k reduce_and reduce_or reduce_xor
    scatter scatter-add scatter-mul scatter-min scatter-max scatter-sub
    select_and_gather_add fft cholesky eig eigh lu qr svd schur
    triangular_solve tridiagonal_solve hessenberg householder_product tridiagonal
    lu_pivots_to_permutation
    cholesky_update symmetric_product real imag complex conj empty
    axis_index pmax pmin pbroadcast device_put platform_index
    debug_callback debug_print pure_callback io_callback
    random_bits random_clone random_fold_in random_gamma random_seed random_split
    random_wrap random_unwrap rng_bit_generator rng_uniform threefry2x32
    """
)

_KINDS = {
    **dict.fromkeys(LOW, Kind.LOW),
    **dict.fromkeys(HIGH, Kind.HIGH),
    **dict.fromkeys(ARITHMETIC | EXACT, Kind.FOLLOW),
    **dict.fromkeys(FREE, Kind.FREE),
    **dict.fromkeys(BRANCH, Kind.BRANCH),
    **dict.fromkeys(FIXED, Kind.FIXED),
    **dict.fromkeys(CUSTOM, Kind.CUSTOM),
}
_CALLS = FREE | BRANCH | FIXED | CUSTOM


def make_table(low: Collection[str], high: Collection[str]) -> dict[str, Kind]:
    """Returns the kind of each primitive, the user's own lists first.

    Raises:
      TypeError: if a list is a string.
      ValueError: for a name in both lists, or a call or loop in `low`.
    """
    for name, names in (("low", low), ("high", high)):
        if isinstance(names, str):
            raise TypeError(
                f"{name}={names!r} must be a list of primitives' names: [{names!r}]."
            )
    both = sorted(set(low) & set(high))
    if both:
        raise ValueError(f"{', '.join(both)}: in both low= and high=; drop it in one.")
    calls = sorted(set(low) & _CALLS)
    if calls:
        raise ValueError(
            f"low={calls}: a call or loop has no dtype of its own; name the primitives "
            "inside it."
        )
    # A call that is to stay in float32 is left alone whole.
    opaque = {name: Kind.OPAQUE for name in high if name in _CALLS}
    return (
        _KINDS | dict.fromkeys(low, Kind.LOW) | dict.fromkeys(high, Kind.HIGH) | opaque
    )
