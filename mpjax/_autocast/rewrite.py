"""The rewrite: a jaxpr in, the same computation in mixed precision out.

Equations are reused (`eqn.replace`), so that source lines, name scopes and shardings
survive. Casts are made per use, as late as possible, and never shared: the cotangents
of a weight that is used many times then accumulate in float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._autocast import custom, tracing
from mpjax._autocast.choices import choose_by_scope
from mpjax._autocast.demand import MUST_KEEP, Demand, DemandAnalysis
from mpjax._autocast.eligibility import is_reduced_precision, why_not_half
from mpjax._autocast.jaxpr_rewriter import JaxprRewriter
from mpjax._jaxpr.core import dtype_of, eval_jaxpr, open_jaxpr
from mpjax._jaxpr.primitives import Kind
from mpjax._jaxpr.provenance import is_reserved, join_scope
from mpjax.policy import Float8Policy, PolicyRules


class Settings(NamedTuple):
    """The settings of one `autocast`.

    Attributes:
      rules: the policy by name scope; matmuls run in its compute dtype.
      kinds: the kind of each primitive by name; any other is opaque.
    """

    rules: PolicyRules
    kinds: Mapping[str, Kind]


class Rewriter:
    """Rewrites jaxprs under one set of rules.

    Args:
      settings: the rules, and the kinds of primitives.
      run_pipeline: `(jaxpr, settings, scope) -> jaxpr`, every pass in its order; it
        rewrites custom derivative rules.
      log: called with `(eqn, scope, times, dtype, reason)` for every decision about an
        equation, or None. A function that is traced once is logged at every call.
    """

    def __init__(
        self, settings: Settings, run_pipeline: Callable[..., Any], log: Any = None
    ):
        self.settings = settings
        self.log = log
        config: Any = jax.config
        self._ambient_precision = config.jax_default_matmul_precision
        self.demand = DemandAnalysis(self.kind_of, self.half_dtype)
        self._run_pipeline = run_pipeline
        self._done: dict[Any, Any] = {}
        self._customs: dict[Any, Any] = {}
        self._half_dtypes: dict[Any, Any] = {}

    def kind_of(self, eqn: Any) -> Kind:
        """Returns the kind of an equation: what to do with it."""
        kind = self.settings.kinds.get(eqn.primitive.name, Kind.OPAQUE)
        if kind is Kind.PROMOTE and is_reduced_precision(eqn):
            return Kind.OPAQUE
        if kind is Kind.CALL and is_reserved(eqn):
            return Kind.OPAQUE
        return kind

    def half_dtype(self, eqn: Any, scope: str) -> Any:
        """Returns the half dtype in which a matmul runs, or None for float32."""
        cache_key = (id(eqn), scope)
        if cache_key not in self._half_dtypes:
            self._half_dtypes[cache_key] = (eqn, self._find_half_dtype(eqn, scope))
        return self._half_dtypes[cache_key][1]

    def _find_half_dtype(self, eqn: Any, scope: str) -> Any:
        if why_not_half(eqn, self._ambient_precision):
            return None
        policy = self.settings.rules.policy_for(join_scope(scope, eqn))
        dtype = jnp.dtype(policy.compute_dtype)
        return dtype if dtype.itemsize < 4 else None

    def why_not_half(self, eqn: Any, scope: str) -> str:
        """Returns why a matmul stays in float32."""
        reason = why_not_half(eqn, self._ambient_precision)
        if reason:
            return reason
        has_rule = self.settings.rules.has_rule_for(join_scope(scope, eqn))
        return "a rule says float32" if has_rule else "the default says float32"

    def float8_policy(self, eqn: Any, scope: str) -> Float8Policy | None:
        """Returns the policy of a matmul if it asks for float8."""
        policy = self.settings.rules.policy_for(join_scope(scope, eqn))
        return policy if isinstance(policy, Float8Policy) else None

    def rewrite(self, jaxpr: Any, scope: str = "") -> Any:
        """Rewrites a jaxpr and all inside it; inputs and outputs stay as traced.

        Args:
          jaxpr: closed or open.
          scope: its name scope.

        Returns:
          The jaxpr; the same object if nothing changed.
        """
        chosen = choose_by_scope(jaxpr, self.settings.rules, scope)
        return self.rewrite_inner(chosen, scope=scope)[0]

    def rewrite_inner(
        self,
        jaxpr: Any,
        *,
        in_dtypes: tuple[Any, ...] | None = None,
        in_values: tuple[float | None, ...] | None = None,
        out_demands: tuple[Demand, ...] | None = None,
        out_dtypes: tuple[Any, ...] | None = None,
        scope: str = "",
        in_backward: bool = False,
        times: int = 1,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Rewrites one jaxpr and all inside it.

        Args:
          jaxpr: closed or open.
          in_dtypes: actual dtype of each input; as traced if None.
          in_values: the value of each input that is a known scalar.
          out_demands: the demand on each output; outputs then have the dtypes
            that the rewrite gives them.
          out_dtypes: the dtype that each output is cast to; None for an output that
            keeps the dtype of the rewrite. Without this and `out_demands` outputs have
            the dtypes as traced.
          scope: its name scope.
          in_backward: whether it belongs to a backward pass.
          times: how often it runs.

        Returns:
          The jaxpr (the same object if nothing changed) and its outputs' dtypes.
        """
        body = open_jaxpr(jaxpr)
        traced = tuple(map(dtype_of, body.invars))
        in_dtypes = in_dtypes or traced
        in_values = in_values or (None,) * len(body.invars)
        can_change = self.demand.can_change(jaxpr)
        outputs = tuple(map(dtype_of, body.outvars))
        if out_dtypes is None:
            out_dtypes = (None,) * len(outputs) if out_demands else outputs
        is_wanted = any(demand.halves for demand in out_demands or ()) or any(
            new not in (None, old) for new, old in zip(out_dtypes, outputs, strict=True)
        )
        if in_dtypes == traced and not (can_change or is_wanted or self.log):
            return jaxpr, outputs
        cache_key = (
            id(jaxpr),
            in_dtypes,
            in_values,
            out_demands,
            out_dtypes,
            scope if can_change else "",
            in_backward,
        )
        if self.log is None and cache_key in self._done:
            return self._done[cache_key][1]
        out_demands = out_demands or (MUST_KEEP,) * len(outputs)
        demands, _ = self.demand.demands(jaxpr, out_demands, scope, in_backward)
        rewriter = JaxprRewriter(self, demands, scope, times, in_backward)
        result = rewriter.run(jaxpr, in_dtypes, in_values, out_dtypes)
        self._done[cache_key] = (jaxpr, result)
        return result

    def silent(self) -> "Rewriter":
        """Returns a rewriter under the same rules that logs nothing."""
        return self if self.log is None else Rewriter(self.settings, self._run_pipeline)

    def trace_custom(self, eqn: Any, scope: str) -> Any:
        """Returns a jaxpr for a call with a custom derivative, or None."""
        cache_key = (id(eqn), scope)
        if cache_key not in self._customs:
            inner_scope = join_scope(scope, eqn)

            def evaluate(jaxpr, consts, *args):
                new = self._run_pipeline(jaxpr, self.settings, inner_scope)
                return eval_jaxpr(open_jaxpr(new), consts, *args)

            make_jaxpr = functools.partial(
                tracing.make_jaxpr, rules=self.settings.rules
            )
            self._customs[cache_key] = (eqn, custom.trace(eqn, evaluate, make_jaxpr))
        return self._customs[cache_key][1]
