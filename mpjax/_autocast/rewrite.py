"""The rewrite: a jaxpr in, the same computation in mixed precision out.

Equations are reused (`eqn.replace`), so that source lines, name scopes and shardings
survive. Casts are made per use, as late as possible, and never shared: the cotangents
of a weight that is used many times then accumulate in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._autocast import custom as _custom
from mpjax._autocast.body import Body
from mpjax._autocast.decide import is_emulation, is_reserved, why_not_low
from mpjax._autocast.demand import EXACTLY, Demand, Wish
from mpjax._jaxpr.core import dtype_of, eval_jaxpr, join_scope, open_jaxpr
from mpjax._jaxpr.primitives import Kind
from mpjax.policy import PolicyRules


class Rewriter:
    """Rewrites jaxprs under one set of rules.

    Args:
      rules: the policy by name scope; its compute dtype is that of matmuls.
      table: the kind of each primitive.
      log: called with `(eqn, scope, times, dtype, reason)` for every equation decided
        on, or None; a log sees every call of a function that is traced once.
    """

    def __init__(self, rules: PolicyRules, table: dict[str, Kind], log: Any = None):
        self.rules = rules
        self.table = table
        self.log = log
        config: Any = jax.config
        self.ambient = config.jax_default_matmul_precision
        self.demand = Demand(self.kind_of, self.low_dtype)
        self._done: dict[Any, Any] = {}
        self._customs: dict[Any, Any] = {}
        self._low_dtypes: dict[Any, Any] = {}

    def kind_of(self, eqn: Any) -> Kind:
        """Returns what to do with an equation."""
        kind = self.table.get(eqn.primitive.name, Kind.OPAQUE)
        if kind is Kind.PROMOTE and is_emulation(eqn):
            return Kind.OPAQUE
        if kind is Kind.CALL and is_reserved(eqn):
            return Kind.OPAQUE
        return kind

    def low_dtype(self, eqn: Any, scope: str) -> Any:
        """Returns the half dtype in which a matmul runs, or None for float32."""
        cache_key = (id(eqn), scope)
        if cache_key not in self._low_dtypes:
            self._low_dtypes[cache_key] = (eqn, self._find_low_dtype(eqn, scope))
        return self._low_dtypes[cache_key][1]

    def _find_low_dtype(self, eqn: Any, scope: str) -> Any:
        if why_not_low(eqn, self.ambient):
            return None
        policy = self.rules.policy_for(join_scope(scope, eqn))
        dtype = jnp.dtype(policy.compute_dtype)
        return dtype if dtype.itemsize < 4 else None

    def why_not_low(self, eqn: Any, scope: str) -> str:
        """Returns why a matmul stays in float32."""
        return why_not_low(eqn, self.ambient) or "a rule says float32"

    def rewrite(
        self,
        jaxpr: Any,
        *,
        in_dtypes: tuple[Any, ...] | None = None,
        in_values: tuple[float | None, ...] | None = None,
        out_wishes: tuple[Wish, ...] | None = None,
        out_dtypes: tuple[Any, ...] | None = None,
        scope: str = "",
        times: int = 1,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Rewrites one jaxpr and all inside it.

        Args:
          jaxpr: closed or open.
          in_dtypes: actual dtype of each input; as traced if None.
          in_values: the value of each input that is a known scalar.
          out_wishes: what is wanted of each output, which then comes as it may; without
            it, to be as traced.
          out_dtypes: what each output is cast to, None for as it comes; as traced
            without it and `out_wishes`.
          scope: its name scope.
          times: how often it runs.

        Returns:
          The jaxpr (the very object if nothing changed) and its outputs' dtypes.
        """
        body = open_jaxpr(jaxpr)
        traced = tuple(dtype_of(v) for v in body.invars)
        in_dtypes = in_dtypes or traced
        in_values = in_values or (None,) * len(body.invars)
        has_low = self.demand.has_low(jaxpr)
        outputs = tuple(dtype_of(v) for v in body.outvars)
        if out_dtypes is None:
            out_dtypes = (None,) * len(outputs) if out_wishes else outputs
        wanted = any(wish.halves for wish in out_wishes or ()) or any(
            new not in (None, old) for new, old in zip(out_dtypes, outputs, strict=True)
        )
        if in_dtypes == traced and not (has_low or wanted or self.log):
            return jaxpr, outputs
        cache_key = (
            id(jaxpr),
            in_dtypes,
            in_values,
            out_wishes,
            out_dtypes,
            scope if has_low else "",
        )
        if self.log is None and cache_key in self._done:
            return self._done[cache_key][1]
        out_wishes = out_wishes or (EXACTLY,) * len(outputs)
        wishes, _ = self.demand.wishes(jaxpr, out_wishes, scope)
        rewritten = Body(self, wishes, scope, times)
        result = rewritten.run(jaxpr, in_dtypes, in_values, out_dtypes)
        self._done[cache_key] = (jaxpr, result)
        return result

    def silent(self) -> "Rewriter":
        """Returns a rewriter under the same rules that logs nothing."""
        return self if self.log is None else Rewriter(self.rules, self.table)

    def custom(self, eqn: Any, scope: str) -> Any:
        """Returns a jaxpr for a call with a derivative of its own, or None."""
        cache_key = (id(eqn), scope)
        if cache_key not in self._customs:

            def evaluate(jaxpr, consts, *args):
                fresh = Rewriter(self.rules, self.table)
                rewritten, _ = fresh.rewrite(jaxpr, scope=join_scope(scope, eqn))
                return eval_jaxpr(open_jaxpr(rewritten), consts, *args)

            self._customs[cache_key] = (eqn, _custom.trace(eqn, evaluate))
        return self._customs[cache_key][1]
