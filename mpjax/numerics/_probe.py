"""Histograms of the outputs of a function's operations, counted beside the function."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Literal, eval_jaxpr, inner_jaxprs, open_jaxpr
from mpjax._jaxpr.flatten import (
    FlatFunction,
    Static,
    flatten,
    refuse_modules,
    unflatten,
)
from mpjax._jaxpr.loops import Scan, While
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import is_float8_matmul
from mpjax._tree import is_floating
from mpjax._xla_cpu.convolutions import put_channels_last
from mpjax.numerics._eqn_context import EqnContext
from mpjax.numerics._histogram import ExponentHistogram, exponent_histogram
from mpjax.numerics._tap import (
    COTANGENT,
    VALUE,
    Names,
    matched_names,
    operation_name,
)


class OpHistograms(NamedTuple):
    """Histograms of one operation, over all its runs.

    Attributes:
      values: histogram of its output; None if only cotangents were counted.
      cotangents: histogram of the gradient with respect to its output; None unless
        `tap` marked the operation and the backward pass went through it.
      operands: histograms of the two operands of a matmul or convolution, if they were
        asked for.
    """

    values: ExponentHistogram | None
    cotangents: ExponentHistogram | None
    operands: tuple[ExponentHistogram, ...] = ()


def probe(
    fn: Callable[..., Any],
    *,
    ops: Collection[str] = (),
    operands: bool = False,
    lo: int = -60,
    hi: int = 16,
) -> "Probe":
    """Makes a function return a histogram of every matmul's and convolution's output.

    It takes the function and returns a function:
    `outputs, histograms = probe(fn)(*args)`. The histograms are the data of figures 2b
    and 3 of "Mixed Precision Training" (arXiv:1710.03740).

    The function is traced, and operations are counted inside jit, scan, while, cond,
    remat and functions with custom derivatives, not inside shard_map or kernels.
    Counting runs beside the function and computes what it counts a second time, so
    outputs are bitwise unchanged; a side effect such as `jax.debug.print` may happen
    twice. Put `probe` around everything: a gradient, an `autocast`, a whole train step.

    A histogram has the name of its operation, name scope and primitive:
    `encoder/dot_general`; `encoder/dot_general#2` for the second one in that scope;
    `encoder/dot_general (backward)` for a matmul of the backward pass, whose output is
    the gradient with respect to activations or weights. A value that
    `jax.ad_checkpoint.checkpoint_name` names appears under that name. The runs of
    a loop add up. `tap` around the function that is differentiated adds the cotangents
    of each operation.

    Args:
      fn: any function of pytrees, under the contract of `jax.jit`.
      ops: names of further primitives to count, such as "tanh".
      operands: whether to count the operands of matmuls and convolutions, too; of
        a float8 matmul as they were before they were rounded to float8.
      lo: smallest exponent with a bin of its own.
      hi: largest exponent with a bin of its own.

    Returns:
      A jitted function with the arguments of `fn` that returns
      `(outputs, histograms)`; the histograms are a dict of `OpHistograms`. Its method
      `when(pred, *args)` counts in some of the steps only.

    Raises:
      TypeError: if `ops` is a string; when the returned function is called with an NNX
        module, or differentiated.
      ValueError: when the returned function is called, if lo > hi.

    >>> from mpjax.numerics import tap
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> probed = probe(jax.value_and_grad(tap(loss)))
    >>> (value, grad), histograms = probed(jnp.ones((8, 2)), jnp.ones((4, 8)))
    >>> list(histograms)
    ['dot_general', 'dot_general (backward)']
    >>> found = histograms["dot_general"]
    >>> print(found.values)
         2^3             8  100.00%  ########################################
    >>> print(found.cotangents)
         2^1             8  100.00%  ########################################
    """
    return Probe(fn, matched_names(ops), operands, lo, hi)


class Probe:
    """A function that returns histograms beside its outputs, made by `probe`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        matched: frozenset[str],
        has_operands: bool,
        lo: int,
        hi: int,
    ):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._matched = matched
        self._has_operands = has_operands
        self._count = functools.partial(exponent_histogram, lo=lo, hi=hi)
        self._jitted = jax.jit(self._evaluate, static_argnums=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns `(outputs, histograms)` of the function."""
        return self._call(False, None, args, kwargs)

    def when(self, pred: Any, *args: Any, **kwargs: Any) -> Any:
        """Counts only if `pred` is true: `probed.when(step % 100 == 0, ...)`.

        Where it is false, all counts are 0, and the function runs at full speed.

        Args:
          pred: boolean scalar.
          *args: arguments of the function.
          **kwargs: keyword arguments of the function.

        Returns:
          `(outputs, histograms)`.
        """
        return self._call(True, jnp.asarray(pred, bool), args, kwargs)

    def _call(self, is_sampled: bool, pred: Any, args: Any, kwargs: Any) -> Any:
        refuse_modules(self._fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        with jax.disable_jit(False):
            outputs, out_spec, found = self._jitted(is_sampled, spec, pred, arrays)
        names, histograms = found  # A dict would come out of jit sorted.
        return unflatten(outputs, out_spec), dict(
            zip(names.value, histograms, strict=True)
        )

    def _evaluate(self, is_sampled: bool, spec: Static, pred: Any, arrays: list) -> Any:
        flat = FlatFunction(self._fn, spec)
        closed = jax.make_jaxpr(flat)(*arrays)
        body = _jaxpr.consts_as_inputs(closed)
        interpreter = _Interpreter(self._matched, self._has_operands, self._count)
        # XLA:CPU runs other convolutions many times slower inside a conditional.
        adds_transposes = is_sampled and "transpose" not in self._matched
        counted_body = put_channels_last(body) if adds_transposes else body

        def counted(*args):
            call, labels = interpreter.make(counted_body, EqnContext())
            _, counts = call(*args)
            return _collect(labels, counts)

        def run(*args):
            # Counting computes its own values: another reader of the function's values
            # could change how XLA compiles the function, and so its last bits. Barriers
            # separate the two, and put the function last, so that it may overwrite
            # donated arguments.
            if is_sampled:
                nothing = _zeros_like(counted, *args)
                inputs = lax.optimization_barrier(args)
                found = lax.cond(pred, counted, lambda *_: nothing, *inputs)
            else:
                found = counted(*lax.optimization_barrier(args))
            args, found = lax.optimization_barrier((args, found))
            return eval_jaxpr(body, (), *args), found

        run = jax.custom_jvp(run)
        run.defjvp(_refuse_derivatives)
        outputs, found = run(*closed.consts, *arrays)
        return outputs, flat.out_spec, found


class _Label(NamedTuple):
    """The operation that a histogram belongs to, and its field in `OpHistograms`."""

    name: str
    slot: str
    is_mark: bool


class _Counts(NamedTuple):
    """Histograms of the output of an operation, and of its operands if wanted."""

    output: Any
    operands: tuple[Any, ...] = ()


class _Interpreter:
    """Evaluates a jaxpr, and counts the outputs of its operations."""

    def __init__(
        self, matched: frozenset[str], has_operands: bool, count: Callable[[Any], Any]
    ):
        self.matched = matched
        self.has_operands = has_operands
        self.count = count

    def make(
        self, jaxpr: Any, context: EqnContext
    ) -> tuple[Callable[..., Any], list[_Label]]:
        """Returns a function that returns `(outputs, counts)`, and the counts' labels.

        The list of labels is filled when the function is traced.
        """
        labels: list[_Label] = []

        def call(*args):
            labels.clear()
            return self._run(jaxpr, args, context, labels)

        return call, labels

    def _run(
        self, jaxpr: Any, args: Sequence[Any], context: EqnContext, labels: list[_Label]
    ) -> tuple[list[Any], list[Any]]:
        body = open_jaxpr(jaxpr)
        consts = getattr(jaxpr, "consts", ())
        env = dict(zip((*body.constvars, *body.invars), (*consts, *args), strict=True))
        read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
        marked = {e.invars[0] for e in body.eqns if _mark(e).startswith(VALUE)}
        counts = []
        for eqn in body.eqns:
            inner = context.enter(eqn)
            values = [read(x) for x in eqn.invars]
            with _jaxpr.context_of(eqn):
                outputs, found, found_labels = self._equation(eqn, values, inner)
            env.update(zip(eqn.outvars, outputs, strict=True))
            counts += found
            labels += found_labels
            for v, x in zip(eqn.outvars, outputs, strict=True):
                label = self._label(eqn, inner)
                if label and v not in marked and is_floating(x):
                    counts.append(_Counts(self.count(x), self._operands(eqn, values)))
                    labels.append(label)
        return [read(x) for x in body.outvars], counts

    def _label(self, eqn: Any, context: EqnContext) -> _Label | None:
        """Returns the label of an equation's output; None if it is not counted."""
        if context.is_rematerialized:
            return None
        mark = _mark(eqn)
        for prefix, slot in ((VALUE, "values"), (COTANGENT, "cotangents")):
            if mark.startswith(prefix):
                return _Label(mark.removeprefix(prefix), slot, is_mark=True)
        if mark or self._is_matched(eqn):
            name = mark or operation_name(context.scope, eqn)
            name += " (backward)" if context.is_backward else ""
            return _Label(name, "values", is_mark=False)
        return None

    def _is_matched(self, eqn: Any) -> bool:
        return eqn.primitive.name in self.matched or is_float8_matmul(eqn)

    def _operands(self, eqn: Any, values: list[Any]) -> tuple[Any, ...]:
        is_matmul = facts_of(eqn).is_matmul or is_float8_matmul(eqn)
        counts = self.has_operands and is_matmul
        return tuple(map(self.count, values[:2])) if counts else ()

    def _equation(self, eqn: Any, values: list[Any], context: EqnContext) -> Any:
        has_inner = any(map(self._is_of_interest, inner_jaxprs(eqn)))
        if has_inner and not is_float8_matmul(eqn):
            facts = facts_of(eqn)
            if facts.is_call:
                return self._call(eqn, values, context)
            branch = _jaxpr.default_branch(eqn)
            if branch is not None:
                call, labels = self.make(branch, context)
                return *call(*values[1:]), labels
            if facts.kind is Kind.COND:
                return self._cond(eqn, values, context)
            if facts.kind is Kind.LOOP:
                loop = self._scan if eqn.primitive.name == "scan" else self._while
                return loop(eqn, values, context)
        return _jaxpr.bind(eqn, *values), [], []

    def _is_of_interest(self, jaxpr: Any) -> bool:
        return any(
            eqn.primitive.name in self.matched or _mark(eqn)
            for eqn, _, _ in _jaxpr.walk(jaxpr)
        )

    def _call(self, eqn: Any, values: list[Any], context: EqnContext) -> Any:
        call, labels = self.make(inner_jaxprs(eqn)[0], context)
        if eqn.primitive.name == "jit":
            # Autocast knows some functions by their names.
            call.__name__ = call.__qualname__ = eqn.params["name"]
            return *jax.jit(call)(*values), labels
        if eqn.primitive.name != "remat2":
            return *call(*values), labels
        # Stays a remat2 equation, so that the backward pass still rematerializes.
        flat, treedef = None, None

        def flattened(*args):
            nonlocal flat, treedef
            flat, treedef = jax.tree.flatten(call(*args))
            return flat

        closed = jax.make_jaxpr(flattened)(*values)
        jaxpr = _jaxpr.consts_as_inputs(closed)
        params = {**eqn.params, "jaxpr": jaxpr}
        outputs = eqn.primitive.bind(*closed.consts, *values, **params)
        return *jax.tree.unflatten(treedef, outputs), labels

    def _cond(self, eqn: Any, values: list[Any], context: EqnContext) -> Any:
        index, *operands = values
        made = [self.make(branch, context) for branch in eqn.params["branches"]]
        zeros = [_zeros_like(call, *operands)[1] for call, _ in made]

        def padded(i):
            def branch(*args):
                outputs, counts = made[i][0](*args)
                return outputs, [counts if i == j else z for j, z in enumerate(zeros)]

            return branch

        branches = [padded(i) for i in range(len(made))]
        outputs, counts = lax.switch(index, branches, *operands)
        labels = [label for _, labels in made for label in labels]
        return outputs, [n for found in counts for n in found], labels

    def _scan(self, eqn: Any, values: list[Any], context: EqnContext) -> Any:
        scan = Scan(eqn)
        consts, init, xs = scan.split_operands(values)
        call, labels = self.make(scan.jaxpr, context)

        def step(carry, xs):
            outputs, counts = call(*consts, *carry, *xs)
            carry, ys = scan.split_results(outputs)
            return carry, (ys, counts)

        carry, (ys, counts) = lax.scan(
            step,
            init,
            xs,
            length=scan.length,
            reverse=scan.is_reverse,
            unroll=eqn.params["unroll"],
        )
        return [*carry, *ys], jax.tree.map(lambda n: n.sum(0, n.dtype), counts), labels

    def _while(self, eqn: Any, values: list[Any], context: EqnContext) -> Any:
        loop = While(eqn)
        cond_consts, body_consts, init = loop.split_operands(values)
        goes_on, _ = self.make(loop.cond, context)
        call, labels = self.make(loop.body, context)

        def step(state):
            outputs, counts = call(*body_consts, *state[0])
            return outputs, jax.tree.map(jnp.add, state[1], counts)

        outputs, counts = lax.while_loop(
            lambda state: goes_on(*cond_consts, *state[0])[0][0],
            step,
            (init, _zeros_like(call, *body_consts, *init)[1]),
        )
        return outputs, counts, labels


def _collect(labels: list[_Label], counts: list[Any]) -> tuple[Static, list[Any]]:
    """Returns the names of the operations, and the `OpHistograms` of each.

    Counts with the same mark are added up.
    """
    names = Names()
    slots: dict[str, dict[str, Any]] = {}
    for label, count in zip(labels, counts, strict=True):
        name = label.name if label.is_mark else names.new(label.name)
        own = slots.setdefault(name, {"operands": count.operands})
        added = label.slot in own
        own[label.slot] = own[label.slot] + count.output if added else count.output
    histograms = [
        OpHistograms(own.get("values"), own.get("cotangents"), own["operands"])
        for own in slots.values()
    ]
    return Static(tuple(slots)), histograms


def _mark(eqn: Any) -> str:
    """Returns the name that `checkpoint_name` gave, or an empty string."""
    return eqn.params["name"] if eqn.primitive.name == "name" else ""


def _zeros_like(fn: Callable[..., Any], *args: Any) -> Any:
    shapes = jax.eval_shape(fn, *args)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _refuse_derivatives(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "probe(fn) has no derivative; differentiate inside, probe(jax.grad(fn)), so "
        "that the backward pass is counted too."
    )
