"""Precision policies: names, jmp strings and rules, each of them a `jmp.Policy`.

A `jmp.Policy` names the dtypes of parameters, of computation and of outputs. The mixed
presets follow "Mixed Precision Training" (arXiv:1710.03740, section 3.1): a float32
master copy of the weights, half compute.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jmp

from mpjax._rules import PathRules
from mpjax._tree import path_name


@dataclasses.dataclass(frozen=True, repr=False)
class Float8Policy(jmp.Policy):
    """Matmuls in float8, everything else as `mixed_bfloat16`: `mixed_float8`.

    It is a `jmp.Policy` that computes in bfloat16, with float32 parameters and outputs.
    Only `autocast` knows how to multiply in float8.

    Attributes:
      value_dtype: the dtype of matmuls' operands, with three bits of fraction.
      cotangent_dtype: the dtype of the cotangents among them, with more range and two
        bits of fraction.
      all_sizes: whether small and narrow matmuls run in float8, too, which does not
        pay. It is for studies of float8's accuracy: `mixed_float8:all`.
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.bfloat16
    output_dtype: Any = jnp.float32
    value_dtype: ClassVar[Any] = jnp.float8_e4m3fn
    cotangent_dtype: ClassVar[Any] = jnp.float8_e5m2
    all_sizes: bool = False

    def __str__(self) -> str:
        name = "mixed_float8:all" if self.all_sizes else "mixed_float8"
        is_preset = self == Float8Policy(all_sizes=self.all_sizes)
        return name if is_preset else f"{name}({super().__str__()})"

    def __repr__(self) -> str:
        return f"Float8Policy({str(self)!r})"


PRESETS: Mapping[str, str | jmp.Policy] = MappingProxyType(
    {
        "float32": "p=f32,c=f32,o=f32",
        "float64": "p=f64,c=f64,o=f64",
        "mixed_float16": "p=f32,c=f16,o=f32",
        "mixed_bfloat16": "p=f32,c=bf16,o=f32",
        "mixed_float8": Float8Policy(),
        "mixed_float8:all": Float8Policy(all_sizes=True),
        "float16": "p=f16,c=f16,o=f16",
        "bfloat16": "p=bf16,c=bf16,o=bf16",
    }
)

PolicyLike = str | jmp.Policy

# What other libraries call the presets.
_ELSEWHERE = {
    "fp16": "mixed_float16",
    "16-mixed": "mixed_float16",
    "amp": "mixed_float16",
    "bf16-mixed": "mixed_bfloat16",
    "fp8": "mixed_float8",
    "fp32": "float32",
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def get_policy(spec: PolicyLike) -> jmp.Policy:
    """Returns the policy for a name or a jmp string.

    Args:
      spec: a `jmp.Policy` (returned as it is), one of the presets `float32`,
        `float64`, `mixed_float16`, `mixed_bfloat16` (float32 parameters and outputs,
        half compute), `mixed_float8` (likewise, with matmuls in float8 where that
        pays), `mixed_float8:all` (whatever their size, to study accuracy on small
        models), `float16`, `bfloat16` (all half, for ablations), or a string that
        `jmp.get_policy` understands, with or without spaces.

    Returns:
      The policy.

    Raises:
      ValueError: if the string names no policy; the message lists what exists.
      TypeError: if `spec` is neither a string nor a `jmp.Policy`.

    >>> str(get_policy("mixed_float16"))
    'p=full,c=f16,o=full'
    >>> str(get_policy("p=f32, c=bf16"))
    'p=full,c=bf16,o=bf16'
    >>> get_policy("mixed_float8")
    Float8Policy('mixed_float8')
    """
    if isinstance(spec, jmp.Policy):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            "a policy must be a name such as 'mixed_float16', a jmp string or a "
            f"jmp.Policy, got {spec!r}."
        )
    text = re.sub(r"\s+", "", spec)
    preset = PRESETS.get(text, text)
    if isinstance(preset, jmp.Policy):
        return preset
    try:
        return jmp.get_policy(preset)
    except ValueError as error:
        close = [_ELSEWHERE[text]] if text in _ELSEWHERE else []
        close = close or difflib.get_close_matches(text, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown policy {spec!r}.{hint} Expected one of {', '.join(PRESETS)}, "
            "or a jmp string such as 'p=f32,c=f16,o=f32' "
            "(p: parameters, c: compute, o: output; f16, bf16, f32 or f64)."
        ) from error


class PolicyRules(PathRules[jmp.Policy]):
    """Policies by name: ordered rules, the first match wins.

    A rule is a regular expression and a policy. The expression is searched
    (`re.search`) in the path of a parameter (`params/Dense_2/kernel`), the path of an
    input (`batch/image`) or the name scope of an op. "The last layer in float32" is one
    line:

    >>> rules = PolicyRules([("Dense_2", "float32")], default="mixed_float16")
    >>> str(rules.policy_for("params/Dense_2/kernel"))
    'p=full,c=full,o=full'
    >>> str(rules.policy_for("params/Dense_0/kernel"))
    'p=full,c=f16,o=full'
    >>> rules.unused_rules()
    ()
    """

    def __init__(self, rules: Sequence[tuple[str, PolicyLike]], *, default: PolicyLike):
        """Compiles the rules.

        Args:
          rules: pairs of a regular expression and anything `get_policy` takes.
          default: the policy where no rule matches.

        Raises:
          ValueError: for a pattern that is not a regular expression, or an unknown
            policy.
          TypeError: for rules that are not pairs.
        """
        super().__init__(rules, get_policy, kind="policy")
        self.default = get_policy(default)

    def policy_for(self, path: str) -> jmp.Policy:
        """Returns the policy of the first rule found in `path`, or the default."""
        policy = self._find(path)
        return self.default if policy is None else policy

    def has_rule_for(self, path: str) -> bool:
        """Whether some rule is found in `path`, so that the default does not count."""
        return any(pattern.search(path) for pattern, _ in self._rules)

    def policies(self) -> tuple[jmp.Policy, ...]:
        """Returns the policies of all rules, in their order, then the default."""
        return (*(policy for _, policy in self._rules), self.default)

    def has_float8(self) -> bool:
        """Whether some policy multiplies in float8."""
        return any(isinstance(policy, Float8Policy) for policy in self.policies())

    def __repr__(self) -> str:
        rules = [(pattern.pattern, str(policy)) for pattern, policy in self._rules]
        return f"PolicyRules({rules}, default={str(self.default)!r})"


def resolve(policy: PolicyLike | PolicyRules) -> PolicyRules:
    """Returns `policy` as rules; a single policy is the default of an empty list.

    Raises:
      ValueError: for an unknown policy, one with float64 while JAX has it disabled, or
        one with a dtype that nothing here computes in.
    """
    is_rules = isinstance(policy, PolicyRules)
    rules = policy if is_rules else PolicyRules([], default=policy)
    for each in rules.policies():
        dtypes = (each.param_dtype, each.compute_dtype, each.output_dtype)
        unknown = [x for x in map(jnp.dtype, dtypes) if x.name not in _DTYPES]
        if unknown:
            raise ValueError(
                f"a policy cannot keep or compute in {unknown[0].name}: expected "
                f"{', '.join(_DTYPES)}. Float8 needs a scale per tensor, which "
                "'mixed_float8' gives to matmuls, with float32 parameters."
            )
        if any(jax.dtypes.canonicalize_dtype(dtype) != dtype for dtype in dtypes):
            raise ValueError(
                f"the policy {str(each)!r} needs float64, which JAX would replace by "
                "float32 without a word: set JAX_ENABLE_X64=1, or call jax.config."
                "update('jax_enable_x64', True) before the first array is made."
            )
    return rules


def casts_by_hand(rules: PolicyRules, autocast: bool) -> bool:
    """Whether a step casts parameters and inputs, and its operations stay as they are.

    Args:
      rules: the policies of the step.
      autocast: what the user asked for.

    Raises:
      ValueError: for casts with a float8 policy.
    """
    if autocast and can_autocast(rules):
        return False
    if rules.has_float8():
        others = "" if autocast else ", with autocast=True"
        raise ValueError(
            "'mixed_float8' scales the operands of each matmul, which casts of "
            "parameters and inputs cannot do: combine it only with policies of float32 "
            f"parameters{others}; or take 'mixed_bfloat16'."
        )
    return True


def can_autocast(rules: PolicyRules) -> bool:
    """Whether every policy keeps its parameters in float32 and computes in no more.

    Half parameters are meant to be computed with as they are, and autocast never
    touches float64.
    """
    return all(
        jnp.dtype(policy.param_dtype) == jnp.float32
        and jnp.dtype(policy.compute_dtype).itemsize <= 4
        for policy in rules.policies()
    )


def cast_to_compute(
    rules: PolicyRules, tree: Any, *, root: str, no_cast: str = ""
) -> Any:
    """Casts the floating arrays of a tree to the compute dtype that the rules give.

    Integer, boolean and PRNG-key leaves, and leaves that are not arrays, pass through.

    Args:
      rules: the policy of each path.
      tree: any pytree.
      root: first part of the paths, `params` or `batch`.
      no_cast: regular expression; leaves whose path below the root contains a match
        stay as they are. An empty string matches none.

    Returns:
      The tree, cast.
    """

    def cast(key_path, leaf):
        path = path_name(key_path)
        if no_cast and re.search(no_cast, path):
            # Weakly typed, a label would take the dtype of the half it meets.
            weak = getattr(leaf, "weak_type", False)
            return jnp.array(leaf, leaf.dtype) if weak else leaf
        return rules.policy_for(f"{root}/{path}").cast_to_compute(leaf)

    return jax.tree_util.tree_map_with_path(cast, tree)
