"""``lrp_compile``: a model goes in, an explainer comes out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .compiler.canonicalize import Canonical, canonicalize
from .compiler.capture import TRACE, Captured, capture, identifier
from .compiler.faithful import call_model, compare, run_model
from .compiler.graphs import outputs, placeholders, value
from .compiler.inputs import (
    Bound,
    bind,
    collection_paused,
    fingerprint,
    plain_region,
    refuse_elsewhere,
    refuse_empty,
    refuse_unknown,
)
from .compiler.latents import find
from .compiler.ledger import account
from .compiler.lower import Runner, lower
from .compiler.pipeline import Program, Rows, build
from .compiler.plan import Plan
from .compiler.provenance import module_path, source_line
from .compiler.seed import Seed, tensor_outputs
from .compiler.shapes import Shapes
from .compiler.verify import verify_functional
from .errors import (
    CaptureError,
    CompositeWarning,
    FxlrpError,
    InputError,
    NonFiniteError,
    TargetError,
    first_line,
    place,
)
from .explanation import Explanation, one_or_many
from .ledger import Ledger
from .rules import Composite, as_composite
from .targets import Function, Target, as_target, operand_tensors, resolve

#: Inputs that say which positions are padding, by the names that libraries use; for a decoder's output its
#: own first.
_MASKS = ("decoder_attention_mask", "attention_mask")
#: The end of names of masks that are True where there is padding, as in PyTorch's own Transformer.
_PADDING = "key_padding_mask"


def lrp_compile(
    model: nn.Module,
    composite: str | Composite = "attnlrp",
    backend: str = "auto",
    dynamic: bool = True,
    strict: bool = True,
    latents: tuple[str, ...] = (),
    inputs: tuple[str, ...] = (),
) -> Explainer:
    """Compile a model into its layer-wise relevance propagation.

    Tracing happens at the first call, with that call's inputs. The model is left as it is: no patches, no
    hooks, no copies of its weights.

    Args:
        model: any module that maps tensors to tensors.
        composite: ``"attnlrp"``, ``"cp"``, ``"ali"``, ``"gradient"``, or a :class:`fxlrp.Composite`.
        backend: ``"eager"``, ``"inductor"``, or ``"auto"``: inductor where there is a GPU, eager else (on a
            CPU, compiling takes longer than many explanations do).
        dynamic: trace once for all batch sizes and lengths; where that does not generalise, or on False, once
            a shape.
        strict: refuse nonlinear ops without a rule; False takes a first-order Taylor step and says so in the
            plan.
        latents: module paths (wildcards allowed) whose outputs' relevance is returned too.
        inputs: names of the inputs to explain, as the model's ``forward`` has them; the others count as
            constants. By default float inputs and ids that are looked up are explained, except masks of
            attention, and except ids whose embeddings are only added to those of a larger table (positions,
            token types).

    Returns:
        An explainer to call as the model itself, with ``target=`` on top.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"lrp_compile takes a torch.nn.Module, not {type(model).__name__}.")
    latents = (latents,) if isinstance(latents, str) else tuple(latents)
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    return Explainer(model, as_composite(composite), backend, dynamic, strict, latents, inputs)


@dataclass(frozen=True, eq=False)
class _Trace:
    """A captured model and the inputs it is valid for."""

    captured: Captured
    canonical: Canonical
    verified: set[tuple[bool, ...]]
    values: tuple[Tensor, ...] | None
    admitted: set[Any] = field(default_factory=set)
    output_shapes: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def is_spoilt(self) -> bool:
        """Whether what was built on the trace fixed sizes that it was captured as changeable."""
        now, then = self.shapes.sizes, self.captured.shapes.sizes
        return any(
            isinstance(size, int) and not isinstance(before, int)
            for sizes, earlier in zip(now, then, strict=True)
            for size, before in zip(sizes, earlier, strict=True)
        )

    @property
    def shapes(self) -> Shapes:
        """For which sizes the trace is valid; building on it may have added conditions."""
        return Shapes.of([value(node) for node in placeholders(self.captured.graph.graph)])

    def admits(self, bound: Bound) -> bool:
        """Whether the trace may be used for these inputs."""
        sizes = tuple(t.shape for t in bound.tensors)
        if sizes not in self.admitted:
            if not self.shapes.admit(bound.tensors):
                return False
            self.admitted.add(sizes)
        return self.values is None or all(map(torch.equal, self.values, bound.tensors))


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A program, how it is run, and whether it is more than a trace of one very input."""

    program: Program
    runner: Runner
    serves_others: bool


@dataclass(frozen=True, eq=False)
class _Call:
    """What a call used; a later one inside ``torch.compile`` uses the same.

    Attributes:
        program: what was compiled for it.
        names: of its tensor inputs, in the program's order.
        constants: its other arguments by name.
        target: the kind of its target.
        serves_others: whether the program is not a trace of that very input.
    """

    program: Program
    names: tuple[str, ...]
    constants: Mapping[str, Any]
    target: Any
    serves_others: bool


#: Programs of target functions that are kept; a function made anew for each call would fill the memory.
_KEPT_FUNCTIONS = 8
#: Traces that are kept where a model must be traced for each shape.
_KEPT_TRACES = 32


@dataclass(eq=False)
class Explainer:
    """Explains a model's outputs; made by :func:`lrp_compile`.

    Call it as the model itself: ``explainer(*args, target=None, **kwargs)``.
    """

    model: nn.Module
    composite: Composite
    backend: str
    dynamic: bool
    strict: bool
    latents: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    _traces: dict[Any, list[_Trace]] = field(default_factory=dict, repr=False)
    _programs: dict[Any, _Compiled] = field(default_factory=dict, repr=False)
    _function_traces: dict[Any, _Trace] = field(default_factory=dict, repr=False)
    _last: _Call | None = field(default=None, repr=False)
    _parameters: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self._parameters = tuple(inspect.signature(self.model.forward).parameters)
        lower(
            None, self.backend, torch.device("cpu")
        )  # refuses an unknown backend now and not at the first call

    def __call__(self, *args: Any, target: Any = None, **kwargs: Any) -> Explanation:
        """Explain one call.

        Args:
            *args: the model's own.
            target: what is explained: None for the predicted class (for a language model the predicted next
                token after the last unpadded position), an int or a LongTensor ``[batch]`` of classes, a
                target object (:class:`fxlrp.Logit`, :class:`fxlrp.LogitDifference`), or a function of the
                model's output.
            **kwargs: the model's own.

        Raises:
            InputError, TargetError, CaptureError, UncoveredOpError, NoPathError, StochasticModelError,
            NonFiniteError: see :mod:`fxlrp.errors`.
        """
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs, target)
        with torch.inference_mode(False):
            return self._explain(args, kwargs, target)

    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Explanation:
        wanted = as_target(target)
        bound = bind(self.model, args, kwargs)
        refuse_empty(bound)
        refuse_unknown(bound, self.inputs)
        trace = self._trace(bound)
        operands = self._operands(trace, bound, wanted)
        compiled = self._program(trace, bound, wanted)
        program = compiled.program
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        constants = {name: v for name, v in given.items() if not isinstance(v, Tensor)}
        self._last = _Call(program, bound.names, constants, wanted.key, compiled.serves_others)
        relevance, scalar, coefficients, latents = compiled.runner(*bound.tensors, *operands)
        if not any(t.dim() > 0 and t.shape[0] == scalar.shape[0] for t in bound.tensors):
            raise TargetError(
                f"The target gives {scalar.shape[0]} scalars for inputs of shapes "
                f"{', '.join(str(tuple(t.shape)) for t in bound.tensors)}; it must give one per sample."
            )
        self._refuse_nonfinite(bound, program, relevance, scalar)
        names = tuple(self._names(bound)[n] for n in program.relevance.names)
        inputs, positions = relevance[: len(names)], relevance[len(names) :]
        return Explanation(
            one_or_many(names, inputs),
            scalar,
            one_or_many(names, coefficients),
            {name: r for name, (r, _) in zip(program.relevance.latents, latents, strict=True)},
            dict(zip(program.relevance.positions, positions, strict=True)),
            lambda: self._run_model(bound),
            lambda: self._account(
                program,
                bound,
                operands,
                dict(zip((*names, *program.relevance.positions), relevance, strict=True)),
            ),
        )

    def with_composite(self, composite: str | Composite) -> Explainer:
        """An explainer of the same model by other rules; what was traced already is not traced again."""
        return replace(self, composite=as_composite(composite), _programs={}, _function_traces={}, _last=None)

    # -- what a call has compiled ----------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Which node has which rule, and why; of the last call."""
        return self._of_last_call().program.plan

    @property
    def rule_graph(self) -> fx.GraphModule:
        """The model's forward with rule nodes in place of ops; of the last call. Takes its tensor inputs."""
        return self._of_last_call().program.rule_graph

    @property
    def relevance_graph(self) -> fx.GraphModule:
        """From tensor inputs (and target indices) to ``(relevance, value, coefficients, latents)``."""
        return self._of_last_call().program.relevance.graph

    def _of_last_call(self) -> _Call:
        if self._last is None:
            raise CaptureError(
                "Nothing is compiled yet: tracing happens at the first call. Call the explainer once."
            )
        return self._last

    def __repr__(self) -> str:
        state = f"{len(self._programs)} programs" if self._programs else "not traced yet"
        return (
            f"<fxlrp.Explainer of {type(self.model).__name__}: {self.composite.title}, "
            f"backend {self.backend}, {state}>"
        )

    # -- stages ----------------------------------------------------------------------------------------------

    def _trace(self, bound: Bound) -> _Trace:
        key = (bound.key, fingerprint(self.model))
        traces = self._traces.setdefault(key, [])
        for trace in traces:
            if trace.admits(bound) and self._verified(trace, bound):
                return trace
        refuse_elsewhere(bound, self.model)
        trace = self._capture(bound, dynamic=self.dynamic)
        # A trace of one input serves that input only: one is enough.
        kept = [t for t in traces if t.values is None or trace.values is None][-_KEPT_TRACES:]
        # Weights that were replaced must not be kept alive by what was traced with them.
        if len(self._traces) > _KEPT_TRACES:
            self._traces.clear()
        self._traces[key] = [*kept, trace]
        alive = {id(t) for found in self._traces.values() for t in found}
        alive |= {id(t) for t in self._function_traces.values()}
        for known in [k for k in self._programs if id(k[0]) not in alive]:
            del self._programs[known]
        return trace

    def _capture(self, bound: Bound, *, dynamic: bool, exported: bool = True) -> _Trace:
        with collection_paused():
            captured = capture(self.model, bound, dynamic=dynamic, exported=exported)
            canonical = canonicalize(verify_functional(captured.graph), self._explained)
        difference = compare(
            canonical.graph,
            bound,
            run_model(self.model, bound),
            floor=1e-4 if canonical.widened else 1e-6,
        )
        if difference is not None:
            raise CaptureError(f"Canonicalisation changed the model: {difference}. This is a bug of fxlrp.")
        values = tuple(t.clone() for t in bound.tensors) if captured.method == TRACE else None
        return _Trace(captured, canonical, {_ones(bound)}, values)

    def _verified(self, trace: _Trace, bound: Bound) -> bool:
        """A dynamic trace takes sizes for 2 or more; on the first inputs with other sizes of 1 it is compared
        with the model.
        """
        ones = _ones(bound)
        if ones not in trace.verified:
            if compare(trace.captured.graph, bound, run_model(self.model, bound)) is not None:
                return False
            trace.verified.add(ones)
        return True

    def _program(self, trace: _Trace, bound: Bound, target: Target) -> _Compiled:
        if isinstance(target, Function) and trace.captured.shapes.is_dynamic:
            trace = self._trace_for_function(trace, bound, target)
        try:
            return self._built(trace, bound, target)
        except FxlrpError:
            raise
        except Exception as error:  # some derivatives of PyTorch's take no symbolic sizes
            if trace.captured.shapes.is_dynamic:
                fixed = self._replaced(trace, bound, f"not built for all sizes: {first_line(error)}")
            elif isinstance(error, GuardOnDataDependentSymNode) and trace.values is None:
                fixed = self._replaced(
                    trace, bound, f"not built for all values: {first_line(error)}", exported=False
                )
            else:
                raise
        return self._program(fixed, bound, target)

    def _replaced(self, trace: _Trace, bound: Bound, note: str, *, exported: bool = True) -> _Trace:
        """A trace of these sizes, or of this very input, in place of one that is valid for more."""
        fixed = self._capture(bound, dynamic=False, exported=exported)
        fixed = replace(fixed, captured=replace(fixed.captured, notes=(*fixed.captured.notes, note)))
        for key, traces in self._traces.items():
            if any(known is trace for known in traces):  # of traces of one input, one is enough
                self._traces[key] = [*(t for t in traces if t is not trace and t.values is None), fixed]
        for where, known in self._function_traces.items():
            if known is trace:
                self._function_traces[where] = fixed
        return fixed

    def _built(self, trace: _Trace, bound: Bound, target: Target) -> _Compiled:
        rows, seed = self._seed(trace, bound, target)
        key = (trace, target.key, rows)
        if key not in self._programs:
            notes = (f"captured by {trace.captured.method}", *trace.captured.notes)
            latents = self._latent_nodes(trace)
            trace.admitted.clear()  # what is built may rely on further conditions on the sizes
            with collection_paused(), plain_region():
                program = build(
                    trace.canonical,
                    self.composite,
                    seed,
                    rows,
                    strict=self.strict,
                    inputs=self._explained,
                    latents=latents,
                    notes=notes,
                )
            for line in program.plan.idle:
                warnings.warn(line, CompositeWarning, stacklevel=5)
            if isinstance(target, Function):
                _keep_last(self._programs, _KEPT_FUNCTIONS - 1, lambda k: k[1][0] == "Function")
            runner = lower(program.relevance.graph, self.backend, bound.tensors[0].device)
            self._programs[key] = _Compiled(program, runner, trace.values is None)
        return self._programs[key]

    def _trace_for_function(self, trace: _Trace, bound: Bound, target: Function) -> _Trace:
        """The dynamic trace where the user's function holds on it for these sizes, else one of these sizes.

        A function may read tensors of this batch's size, or branch on sizes: its value is compared with
        that of the model's own output once for each size.
        """
        place = (trace, target.key, tuple(t.shape for t in bound.tensors))
        if place not in self._function_traces:
            holds = self._function_holds(trace, bound, target)
            if trace.is_spoilt():  # sizes became constants while the function was traced
                self._programs.pop((trace, target.key, None), None)
                for key, traces in self._traces.items():
                    self._traces[key] = [t for t in traces if t is not trace]
            _keep_last(self._function_traces, 4 * _KEPT_FUNCTIONS, lambda k: True)
            self._function_traces[place] = trace if holds else self._capture(bound, dynamic=False)
        return self._function_traces[place]

    def _function_holds(self, trace: _Trace, bound: Bound, target: Function) -> bool:
        try:
            found = self._built(trace, bound, target).runner(*bound.tensors)[1]
            expected = target.function(self._run_model(bound))
        except Exception:  # a trace of these sizes will tell whether it is the function's fault
            return False
        return not trace.is_spoilt() and torch.allclose(
            found.double(), expected.reshape(-1).double(), rtol=1e-2, atol=1e-6
        )

    def _seed(self, trace: _Trace, bound: Bound, target: Target) -> tuple[Rows | None, Seed]:
        flat = outputs(trace.canonical.graph.graph)
        if isinstance(target, Function):
            indices = tensor_outputs(flat)
            return None, Seed(
                _FunctionScore(target, trace.captured, indices), indices, (), None, bound.tensors[0].device
            )
        index = self._logits(trace)
        logits = value(flat[index])
        names = tuple(f"target_{name}" for name in target.indices)
        if logits.dim() == 3:
            given = getattr(target, "position", None) is not None
            mask = None if given else self._mask(trace, bound, index)
            rows = Rows(
                index, "target_position" if given else mask, given, bool(mask and mask.endswith(_PADDING))
            )
            return rows, Seed(_RowScore(target), (0,), names, logits.shape[0], logits.device)
        return None, Seed(_ClassScore(target), (index,), names, logits.shape[0], logits.device)

    def _logits(self, trace: _Trace) -> int:
        index = trace.captured.outputs.logits()
        if index is None:
            raise TargetError(
                f"The model returns {trace.captured.outputs.describe()}: no logits to explain. "
                "Say what to explain with a function of the output: "
                "explainer(…, target=lambda output: output.…[:, 0])."
            )
        logits = value(outputs(trace.canonical.graph.graph)[index])
        if not logits.is_floating_point() or logits.dim() not in (1, 2, 3):
            raise TargetError(
                f"The output has shape {tuple(logits.shape)} and dtype {logits.dtype}; classes are read off "
                "[batch, classes] or [batch, sequence, classes]. "
                "Say what to explain with a function of the output."
            )
        return index

    def _mask(self, trace: _Trace, bound: Bound, index: int) -> str | None:
        """The padding mask that fits a sequence output, by name."""
        shape = self._output_shape(trace, bound, index)
        decodes = any(name.startswith("decoder_") for name in bound.names)
        names = [*_MASKS, *(name for name in bound.names if name.endswith(_PADDING))]
        for name in names:
            if name == "attention_mask" and decodes:
                continue
            tensor = bound.by_name.get(name)
            if tensor is not None and tensor.shape == shape[:2]:
                return identifier(name)
        return None

    def _operands(self, trace: _Trace, bound: Bound, target: Target) -> tuple[Tensor, ...]:
        if isinstance(target, Function):
            return ()
        index = self._logits(trace)
        shape = self._output_shape(trace, bound, index)
        mask_name = self._mask(trace, bound, index) if len(shape) == 3 else None
        by_identifier = {
            identifier(name): ~t.bool() if name.endswith(_PADDING) else t for name, t in bound.by_name.items()
        }
        return resolve(
            target,
            shape if len(shape) > 1 else (*shape, 1),
            bound.tensors[0].device,
            None if mask_name is None else by_identifier[mask_name],
        )

    def _output_shape(self, trace: _Trace, bound: Bound, index: int) -> tuple[int, ...]:
        place = (index, *(t.shape for t in bound.tensors))
        if place not in trace.output_shapes:
            fake = value(outputs(trace.canonical.graph.graph)[index])
            trace.output_shapes[place] = trace.shapes.evaluate(fake.shape, bound.tensors)
        return trace.output_shapes[place]

    @property
    def _explained(self) -> frozenset[str]:
        return frozenset(map(identifier, self.inputs))

    def _names(self, bound: Bound) -> dict[str, str]:
        return {identifier(name): name for name in bound.names}

    def _latent_nodes(self, trace: _Trace) -> Mapping[str, str]:
        return find(trace.canonical.graph, self.latents) if self.latents else {}

    # -- running ---------------------------------------------------------------------------------------------

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Explanation:
        """A call inside ``torch.compile``: the last call's relevance graph, inlined into the caller."""
        last = self._of_last_call()
        program = last.program
        if not last.serves_others:
            raise CaptureError(
                "The last call's graph is a trace of that very input; it cannot be compiled in."
            )
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tensors = [given.pop(name).detach() for name in last.names]
        if any(
            isinstance(left, Tensor) or last.constants.get(name, left) != left for name, left in given.items()
        ):
            raise InputError(
                "Inside torch.compile, call the explainer with the arguments of its last call outside."
            )
        wanted = as_target(target)
        operands = operand_tensors(wanted, tensors[0].shape[0], tensors[0].device)
        if wanted.key != last.target:
            raise TargetError(
                "Explain once outside of torch.compile with the same kind of target, so that it is traced."
            )
        relevance, scalar, coefficients, _ = program.relevance.graph(*tensors, *operands)
        names = program.relevance.names
        positions = dict(zip(program.relevance.positions, relevance[len(names) :], strict=True))
        return Explanation(
            one_or_many(names, relevance[: len(names)]),
            scalar,
            one_or_many(names, coefficients),
            positions=positions,
        )

    def _run_model(self, bound: Bound) -> Any:
        return call_model(self.model, bound)

    def _account(
        self, program: Program, bound: Bound, operands: tuple[Tensor, ...], relevance: dict[str, Tensor]
    ) -> Ledger:
        """What an independent pass over the rule graph absorbed, beside the relevance that was returned.

        A relevance graph that loses something does not close its ledger.
        """
        with plain_region():
            found = account(
                program.rule_graph, program.plan.sources, program.seed, (*bound.tensors, *operands)
            )
            batch = len(found.value)
            if all(r.dim() and r.shape[0] == batch for r in relevance.values()):
                returned = {name: r.double().cpu().flatten(1).sum(1) for name, r in relevance.items()}
                return Ledger(found.value, returned, found.entries)
            # Packed inputs (patches of all images in one row) have no batch: one account for all samples.
            totals = {name: r.double().cpu().sum().reshape(1) for name, r in relevance.items()}
            entries = tuple(replace(e, amount=e.amount.sum().reshape(1)) for e in found.entries)
            return Ledger(found.value.sum().reshape(1), totals, entries)

    def _refuse_nonfinite(
        self, bound: Bound, program: Program, relevance: tuple[Tensor, ...], scalar: Tensor
    ) -> None:
        total = sum(
            (r.detach().float().abs().sum() for r in relevance), start=scalar.detach().float().abs().sum()
        )
        if bool(torch.isfinite(total)):
            return
        for name, tensor in bound.by_name.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"Input '{name}' contains NaN or infinity.")
        if bool(torch.isfinite(scalar).all()):
            raise NonFiniteError(
                "The explained value is finite but relevance is not: a coefficient overflowed, as half "
                "precision and rules that are not conservative can do. "
                "Explain in bfloat16 or float32, or use composite='cp'."
            )
        raise NonFiniteError(
            f"The model's output is NaN or infinite on this input{_first_nonfinite(program, bound)}."
        )


def _first_nonfinite(program: Program, bound: Bound) -> str:
    class Finder(fx.Interpreter):
        found: fx.Node | None = None

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if (
                self.found is None
                and n.op == "call_function"
                and isinstance(result, Tensor)
                and result.is_floating_point()
                and n in program_nodes
                and not bool(torch.isfinite(result).all())
            ):
                self.found = n
            return result

    rows = {row.node for row in program.plan}
    program_nodes = {n for n in program.rule_graph.graph.nodes if n.name in rows}
    finder = Finder(program.rule_graph)
    try:
        with torch.no_grad():
            finder.run(*bound.tensors)
    except FxlrpError:
        raise
    except Exception:  # the finder only improves a message
        return ""
    if finder.found is None:
        return ""
    return (
        f"; first at '{finder.found.name}' in {place(module_path(finder.found), source_line(finder.found))}"
    )


def _keep_last(cache: dict[Any, Any], count: int, counts: Callable[[Any], bool]) -> None:
    """Forget the oldest of those entries that count, until there are at most so many."""
    counted = [key for key in cache if counts(key)]
    for key in counted[: max(0, len(counted) - count)]:
        del cache[key]


def _ones(bound: Bound) -> tuple[bool, ...]:
    return tuple(size == 1 for t in bound.tensors for size in t.shape)


@dataclass(frozen=True, eq=False)
class _ClassScore:
    target: Target

    def __call__(self, read: Any, operands: Any) -> Tensor:
        logits = read[0] if read[0].dim() > 1 else read[0].unsqueeze(-1)
        return self.target.score(logits, operands)


@dataclass(frozen=True, eq=False)
class _RowScore:
    target: Target

    def __call__(self, read: Any, operands: Any) -> Tensor:
        return self.target.score(read[0].squeeze(1), operands)


@dataclass(frozen=True, eq=False)
class _FunctionScore:
    target: Function
    captured: Captured
    indices: tuple[int, ...]

    def __call__(self, read: Any, operands: Any) -> Tensor:
        tensors = dict(zip(self.indices, read, strict=True))
        try:
            scalar = self.target.function(self.captured.outputs.rebuild(tensors))
        except Exception as error:
            raise TargetError(f"The target function failed on the model's output: {error}") from error
        if not isinstance(scalar, Tensor) or scalar.dim() > 1:
            shape = f"of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            raise TargetError(
                f"A target function returns one scalar per sample, [batch]; this one returned a result "
                f"{shape}."
            )
        return scalar if scalar.dim() else scalar.unsqueeze(0)
