"""``lrp_compile``: a model goes in, an explainer comes out."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)

from . import artifact
from .bundle import Bundle
from .compiler.budget import Budget, Memory, checked_budget
from .compiler.canonicalize import canonicalize
from .compiler.capture import TRACE, capture, identifier
from .compiler.faithful import call_model, compare, run_model
from .compiler.fused import REFERENCE, chosen
from .compiler.graphs import placeholders, value
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
from .compiler.liveness import Sizes, sizes_at
from .compiler.lower import Runner, lower
from .compiler.parameters import named
from .compiler.pipeline import Program, build
from .compiler.plan import Plan
from .compiler.template import is_symbol
from .compiler.verify import verify_functional
from .errors import CaptureError, CompositeWarning, FxlrpError, InputError, TargetError, first_line
from .explanation import Explanation, one_or_many
from .finite import refuse_nonfinite
from .ledger import Ledger
from .maps import JVP, VJP, LinearMap, Vectors, linear_map, mapped, names_of
from .memory import advised, in_chunks
from .rules import Composite, Selector, as_composite
from .seeding import bundle_of, operands_of, seed_of
from .targets import Function, Target, as_target, is_several, operand_tensors
from .traces import Call, Compiled, Trace


def lrp_compile(
    model: nn.Module,
    composite: str | Composite = "attnlrp",
    backend: str = "auto",
    dynamic: bool = True,
    strict: bool = True,
    latents: tuple[str | Selector, ...] = (),
    inputs: tuple[str, ...] = (),
    chunk: int | None = None,
    parameters: tuple[str, ...] = (),
    kernels: str | tuple[str, ...] = "auto",
    memory_budget: Budget = None,
) -> Explainer:
    """Compile a model into its layer-wise relevance propagation.

    Tracing happens at the first call, with that call's inputs. The model is left as it is: no patches, no
    hooks, no copies of its weights.

    Args:
        model: any module that maps tensors to tensors.
        composite: a preset's name (``fxlrp.composites``) or a :class:`fxlrp.Composite`.
        backend: ``"eager"``, ``"inductor"`` (layers that are alike compile once), ``"cudagraphs"`` (the same,
            recorded once for each shape of inputs and replayed; on a GPU only), or ``"auto"``: inductor where
            there is a GPU, eager else (on a CPU, compiling takes longer than many explanations do).
        dynamic: trace once for all batch sizes and lengths; where that does not generalise, or on False, once
            a shape.
        strict: refuse nonlinear ops without a rule; False takes a first-order Taylor step and says so in the
            plan.
        latents: where else relevance and coefficients are returned: module paths (a module's output) or names
            of nodes of ``rule_graph``, with wildcards, or selectors: ``fxlrp.op("attention")``.
        inputs: names of the inputs to explain, as the model's ``forward`` has them; the others count as
            constants. By default float inputs and ids that are looked up are explained, except masks of
            attention, and except ids whose embeddings are only added to those of a larger table (positions,
            token types).
        chunk: how many of several targets are explained in one pass at most; None for all. Where memory runs
            out, as many as fit are.
        parameters: names of parameters whose relevance ``w * G_w`` is returned too, as
            ``model.named_parameters()`` has them, with wildcards.
        kernels: names of Triton kernels to use wherever they apply (docs/kernels.md); ``"auto"``: those that
            run on the model's device and were measured to be faster there; ``"reference"``: none, nor oneDNN
            for linear maps. The plan's notes say which are used, and why others are not.
        memory_budget: how much memory an explanation may take beside weights and inputs: None computes again
            only what is next to free; a float in (0, 1] is a share of what that takes, an int is bytes.
            Estimated; a share counts at the first call's sizes. ``explainer.memory`` has the figures. The
            less, the more of the forward runs twice, at most all of it.

    Returns:
        An explainer to call as the model itself, with ``target=`` on top.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"lrp_compile takes a torch.nn.Module, not {type(model).__name__}.")
    latents = (latents,) if isinstance(latents, (str, Selector)) else tuple(latents)
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise InputError(f"chunk is a number of targets, an int of 1 or more, or None; got {chunk!r}.")
    parameters = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    return Explainer(
        model,
        as_composite(composite),
        backend,
        dynamic,
        strict,
        latents,
        inputs,
        chunk,
        parameters,
        chosen(kernels),
        checked_budget(memory_budget),
    )


#: What tracing raises where a size is data.
_OF_DATA = (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound)
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
    latents: tuple[str | Selector, ...]
    inputs: tuple[str, ...] = ()
    chunk: int | None = None
    parameters: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ("auto",)
    memory_budget: Budget = None
    _traces: dict[Any, list[Trace]] = field(default_factory=dict, repr=False)
    _programs: dict[Any, Compiled] = field(default_factory=dict, repr=False)
    _maps: dict[Any, LinearMap] = field(default_factory=dict, repr=False)
    _function_traces: dict[Any, Trace] = field(default_factory=dict, repr=False)
    _last: Call | None = field(default=None, repr=False)
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
                target object (:class:`fxlrp.Logit`, :class:`fxlrp.LogitDifference`, :class:`fxlrp.LogProb`),
                or a function of the model's output. Several targets, which share one forward and one backward
                pass, are a list of these (but functions), a LongTensor ``[batch, K]`` of classes,
                :class:`fxlrp.TopK` or :class:`fxlrp.Span`; the explanation then has K behind the batch.
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
        built: list[Compiled] = []
        with advised(lambda: built[-1].program.memory if built else None):
            return self._explained_by(built, args, kwargs, target)

    def _explained_by(
        self, built: list[Compiled], args: tuple[Any, ...], kwargs: dict[str, Any], target: Any
    ) -> Explanation:
        """An explanation; the programs that run for it are added to `built`."""
        wanted = as_target(target)
        bound = bind(self.model, args, kwargs)
        refuse_empty(bound)
        refuse_unknown(bound, self.inputs)
        trace = self._trace(bound)
        if self.parameters and is_several(wanted):
            raise InputError("Relevance of parameters is for one target a call; explain one after the other.")
        several = bundle_of(trace, bound, wanted) if is_several(wanted) else None
        if several is None:
            operands = operands_of(trace, bound, wanted)
            built.append(self._program(trace, bound, wanted))
            self._remember(built[-1], bound, args, kwargs, wanted.key)
            relevance, scalar, coefficients, latents, *weights = built[-1].runner(*bound.tensors, *operands)
        else:

            def run(start: int, stop: int) -> Any:
                part = several.part(start, stop)
                built.append(self._program(trace, bound, part))
                self._remember(built[-1], bound, args, kwargs, part.key)
                return built[-1].runner(*bound.tensors, *part.operands)

            operands = several.operands
            relevance, scalar, coefficients, latents, *weights = in_chunks(run, several.count, self.chunk)
        program = built[-1].program
        if not any(t.dim() > 0 and t.shape[0] == scalar.shape[0] for t in bound.tensors):
            raise TargetError(
                f"The target gives {scalar.shape[0]} scalars for inputs of shapes "
                f"{', '.join(str(tuple(t.shape)) for t in bound.tensors)}; it must give one per sample."
            )
        refuse_nonfinite(bound, program, relevance, scalar)
        names = tuple(self._names(bound)[n] for n in program.relevance.names)
        positions = program.relevance.positions
        return Explanation(
            one_or_many(names, relevance[: len(names)]),
            scalar,
            one_or_many(names, coefficients),
            {name: r for name, (r, _) in zip(program.relevance.latents, latents, strict=True)},
            dict(zip(positions, relevance[len(names) :], strict=True)),
            {name: c for name, (_, c) in zip(program.relevance.latents, latents, strict=True)},
            dict(zip(program.relevance.parameters, *weights, strict=True)) if weights else {},
            lambda: self._run_model(bound),
            lambda: self._account(
                # Of all targets at once, where the last program was one of some.
                program if several is None else self._program(trace, bound, several).program,
                bound,
                operands,
                dict(zip((*names, *positions), relevance, strict=True)),
            ),
        )

    def _remember(
        self, compiled: Compiled, bound: Bound, args: Sequence[Any], kwargs: Mapping[str, Any], key: Any
    ) -> None:
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        constants = {name: v for name, v in given.items() if not isinstance(v, Tensor)}
        self._last = Call(
            compiled.program, bound.names, constants, key, compiled.serves_others, compiled.trace, bound
        )

    def vjp(
        self,
        outputs: str | Sequence[str],
        cotangents: Vectors,
        *args: Any,
        wrt: str | Sequence[str],
        **kwargs: Any,
    ) -> VJP:
        """Coefficients of nodes for K coefficients of other nodes: one forward and one batched backward pass.

        ``G_wrt = sum_o P_o(G_o)`` with P the composition of the rules' pullbacks between the nodes, as the
        plan has them: nothing passes what is frozen, and a node that nothing reaches gets 0. For the output
        and a coefficient that is 1 at one logit this is the coefficient that explains that logit.

        Args:
            outputs: where the coefficients start: module paths (a module's output), names of nodes of
                ``rule_graph``, inputs, or ``"output"`` for the logits.
            cotangents: ``[K, *shape]``, one for each of the outputs.
            *args: the model's own.
            wrt: nodes whose coefficients are wanted, named likewise; paths may have wildcards. Token ids mean
                their embeddings.
            **kwargs: the model's own.

        Raises:
            InputError: a name is unknown or a shape does not fit; and as for a call.
        """
        return VJP(*self._mapped(outputs, cotangents, wrt, args, kwargs, forward=False))

    def jvp(
        self,
        inputs: str | Sequence[str],
        tangents: Vectors,
        *args: Any,
        outputs: str | Sequence[str],
        **kwargs: Any,
    ) -> JVP:
        """Tangents of nodes for K tangents of other nodes, pushed forward through the rule-linearised graph.

        The transpose of :meth:`vjp`: ``<vjp(G), T> = <G, jvp(T)>`` for all coefficients G of the outputs and
        tangents T of the inputs. With ``composite="gradient"`` it is the model's directional derivative.

        Args:
            inputs: where the tangents start, named as for :meth:`vjp`.
            tangents: ``[K, *shape]``, one for each of the inputs.
            *args: the model's own.
            outputs: nodes whose tangents are wanted.
            **kwargs: the model's own.

        Raises:
            InputError: a name is unknown or a shape does not fit; and as for a call.
        """
        return JVP(*self._mapped(inputs, tangents, outputs, args, kwargs, forward=True))

    def values(self, names: str | Sequence[str], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Values of nodes, by one forward pass up to them; no rule is asked for.

        Args:
            names: which, named as for :meth:`vjp`; paths may have wildcards.
            *args: the model's own.
            **kwargs: the model's own.

        Raises:
            InputError: a name is unknown; and as for a call.
        """
        return self._mapped(names, None, names, args, kwargs, forward=False)[1]

    def _mapped(
        self,
        given: str | Sequence[str],
        vectors: Vectors | None,
        wanted: str | Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        forward: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Vectors of the wanted nodes, and values of these and the given ones, by name.

        Without vectors the values are what counts.
        """
        starts = names_of(given, "inputs" if forward else "outputs")
        stops = names_of(wanted, "outputs" if forward else "wrt")
        with torch.inference_mode(False):
            bound = bind(self.model, args, kwargs)
            refuse_empty(bound)
            refuse_unknown(bound, self.inputs)
            trace = self._trace(bound)

            def built(count: int | None) -> LinearMap:
                key = (trace, forward, starts, stops, count, vectors is None)
                if key not in self._maps:
                    trace.admitted.clear()  # what is built may rely on further conditions on the sizes
                    _keep_last(self._maps, _KEPT_TRACES - 1, lambda k: True)
                    with collection_paused(), plain_region():
                        self._maps[key] = linear_map(
                            trace,
                            self.composite if vectors is not None else as_composite("gradient"),
                            starts,
                            stops,
                            lambda graph: self._lowered(graph, bound),
                            forward=forward,
                            strict=self.strict,
                            inputs=self._explained,
                            count=count,
                        )
                return self._maps[key]

            return mapped(trace, bound, vectors, built, (forward, starts, stops))

    def with_composite(self, composite: str | Composite) -> Explainer:
        """An explainer of the same model by other rules; what was traced already is not traced again."""
        return replace(
            self, composite=as_composite(composite), _programs={}, _maps={}, _function_traces={}, _last=None
        )

    # -- what a call has compiled ----------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Which node has which rule, and why; of the last call."""
        return self._of_last_call().program.plan

    @property
    def memory(self) -> Memory:
        """What an explanation is estimated to take beside weights and inputs, and the least it could; of the
        last call's program.
        """
        return self._of_last_call().program.memory

    @property
    def rule_graph(self) -> fx.GraphModule:
        """The model's forward with rule nodes in place of ops; of the last call. Takes its tensor inputs."""
        return self._of_last_call().program.rule_graph

    @property
    def relevance_graph(self) -> fx.GraphModule:
        """From tensor inputs (and target indices) to ``(relevance, value, coefficients, latents)``."""
        return self._of_last_call().program.relevance.graph

    def save(self, path: str | os.PathLike[str], aot: bool = False) -> None:
        """Write what was compiled for inputs like the last call's into one file, for :func:`fxlrp.load`.

        Of the last call's trace all programs are saved, so one for each kind of target that was explained;
        of functions of the output only the last call's.

        Args:
            path: of the file, a safetensors file whose metadata hold the programs.
            aot: put native code for the last call's program beside it, which ``load(aot=True)`` runs.

        Raises:
            ArtifactError: a program calls or holds what no artifact may.
            CaptureError: nothing is compiled yet.
        """
        last = self._of_last_call()
        found: list[tuple[Any, int | None, Program]] = []
        for (trace, key, _, count), compiled in self._programs.items():
            if compiled.program is last.program:
                found.insert(0, (key, count, compiled.program))
            elif trace is last.trace and key[0] != "Function":
                found.append((key, count, compiled.program))
        artifact.save(path, self.model, self.composite, last, found, aot=aot)

    def _of_last_call(self) -> Call:
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

    def _trace(self, bound: Bound) -> Trace:
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
        for cache in (self._programs, self._maps):
            for known in [k for k in cache if id(k[0]) not in alive]:
                del cache[known]
        return trace

    def _capture(self, bound: Bound, *, dynamic: bool, exported: bool = True) -> Trace:
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
        return Trace(captured, canonical, {_ones(bound)}, values)

    def _verified(self, trace: Trace, bound: Bound) -> bool:
        """A dynamic trace takes sizes for 2 or more; on the first inputs with other sizes of 1 it is compared
        with the model.
        """
        ones = _ones(bound)
        if ones not in trace.verified:
            if compare(trace.captured.graph, bound, run_model(self.model, bound)) is not None:
                return False
            trace.verified.add(ones)
        return True

    def _program(self, trace: Trace, bound: Bound, target: Target | Bundle) -> Compiled:
        if isinstance(target, Function) and trace.captured.shapes.is_dynamic:
            trace = self._trace_for_function(trace, bound, target)
        try:
            return self._built(trace, bound, target)
        except FxlrpError:
            raise
        except Exception as error:  # some derivatives of PyTorch's take no symbolic sizes
            if trace.captured.shapes.is_dynamic:
                fixed = self._replaced(trace, bound, f"not built for all sizes: {first_line(error)}")
            elif isinstance(error, _OF_DATA) and trace.values is None:
                fixed = self._replaced(
                    trace, bound, f"not built for all values: {first_line(error)}", exported=False
                )
            else:
                raise
        return self._program(fixed, bound, target)

    def _replaced(self, trace: Trace, bound: Bound, note: str, *, exported: bool = True) -> Trace:
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

    def _built(self, trace: Trace, bound: Bound, target: Target | Bundle) -> Compiled:
        if not isinstance(target, Bundle):
            return self._compiled_for(trace, bound, target)
        if not target.is_mixed and target.key not in trace.fixed_counts:
            lead = trace.canonical.templates.lead()
            try:
                if is_symbol(lead):
                    compiled = self._compiled_for(trace, bound, target, lead)
                    if is_symbol(lead):
                        return compiled
                trace.fixed_counts[target.key] = "the trace fixes all sizes"
            except FxlrpError:
                raise
            except Exception as error:  # some ops take no symbol for the number of coefficients
                trace.fixed_counts[target.key] = first_line(error)
        return self._compiled_for(trace, bound, target, target.count)

    def _compiled_for(
        self, trace: Trace, bound: Bound, target: Target | Bundle, lead: Any = None
    ) -> Compiled:
        rows, seed = seed_of(trace, bound, target, lead)
        key = (trace, target.key, rows, lead if isinstance(lead, int) else None)
        sizes = _sizes(trace, bound, target, lead)
        known = self._programs.get(key)
        if known is None or not known.program.memory.fits(sizes):
            notes = (f"captured by {trace.captured.method}", *trace.captured.notes)
            if target.key in trace.fixed_counts:
                notes += (f"one program for each number of targets: {trace.fixed_counts[target.key]}",)
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
                    parameters=named(trace.canonical.graph, self.model, self.parameters),
                    budget=self.memory_budget,
                    sizes=sizes,
                    notes=notes,
                    kernels=self.kernels,
                )
            for line in program.plan.idle:
                warnings.warn(line, CompositeWarning, stacklevel=6)
            if isinstance(target, Function):
                _keep_last(self._programs, _KEPT_FUNCTIONS - 1, lambda k: k[1][0] == "Function")
            runner = self._lowered(program.relevance.graph, bound)
            self._programs[key] = Compiled(program, runner, trace.values is None, trace)
        return self._programs[key]

    def _lowered(self, graph: fx.GraphModule, bound: Bound) -> Runner:
        """What runs a graph where the inputs are."""
        device = bound.tensors[0].device
        return lower(graph, self.backend, device, onednn=self.kernels != (REFERENCE,))

    def _trace_for_function(self, trace: Trace, bound: Bound, target: Function) -> Trace:
        """The dynamic trace where the user's function holds on it for these sizes, else one of these sizes.

        A function may read tensors of this batch's size, or branch on sizes: its value is compared with
        that of the model's own output once for each size.
        """
        place = (trace, target.key, tuple(t.shape for t in bound.tensors))
        if place not in self._function_traces:
            holds = self._function_holds(trace, bound, target)
            if trace.is_spoilt():  # sizes became constants while the function was traced
                self._programs.pop((trace, target.key, None, None), None)
                for key, traces in self._traces.items():
                    self._traces[key] = [t for t in traces if t is not trace]
            _keep_last(self._function_traces, 4 * _KEPT_FUNCTIONS, lambda k: True)
            self._function_traces[place] = trace if holds else self._capture(bound, dynamic=False)
        return self._function_traces[place]

    def _function_holds(self, trace: Trace, bound: Bound, target: Function) -> bool:
        try:
            found = self._built(trace, bound, target).runner(*bound.tensors)[1]
            expected = target.function(self._run_model(bound))
        except Exception:  # a trace of these sizes will tell whether it is the function's fault
            return False
        return not trace.is_spoilt() and torch.allclose(
            found.double(), expected.reshape(-1).double(), rtol=1e-2, atol=1e-6
        )

    @property
    def _explained(self) -> frozenset[str]:
        return frozenset(map(identifier, self.inputs))

    def _names(self, bound: Bound) -> dict[str, str]:
        return {identifier(name): name for name in bound.names}

    def _latent_nodes(self, trace: Trace) -> Mapping[str, str]:
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
        if is_several(wanted):
            raise TargetError(
                "Inside torch.compile one target is explained per call. For several, explain outside, or "
                "compile explainer.relevance_graph."
            )
        operands = operand_tensors(wanted, tensors[0].shape[0], tensors[0].device)
        if wanted.key != last.target:
            raise TargetError(
                "Explain once outside of torch.compile with the same kind of target, so that it is traced."
            )
        relevance, scalar, coefficients, *_ = program.relevance.graph(*tensors, *operands)
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
            shape = found.value.shape
            if all(r.dim() and r.shape[0] == shape[0] for r in relevance.values()):
                returned = {
                    name: r.double().cpu().reshape(*shape, -1).sum(-1) for name, r in relevance.items()
                }
                return Ledger(found.value, returned, found.entries)
            # Packed inputs (patches of all images in one row) have no batch: one account for all samples.
            others = (1, *shape[1:])
            totals = {
                name: r.double().cpu().reshape(len(r), *shape[1:], -1).sum((0, -1)).reshape(others)
                for name, r in relevance.items()
            }
            entries = tuple(replace(e, amount=e.amount.sum(0, keepdim=True)) for e in found.entries)
            return Ledger(found.value.sum(0, keepdim=True), totals, entries)


def _keep_last(cache: dict[Any, Any], count: int, counts: Callable[[Any], bool]) -> None:
    """Forget the oldest of those entries that count, until there are at most so many."""
    counted = [key for key in cache if counts(key)]
    for key in counted[: max(0, len(counted) - count)]:
        del cache[key]


def _sizes(trace: Trace, bound: Bound, target: Target | Bundle, lead: Any) -> Sizes:
    """What the symbols of a trace stand for in this call."""
    fakes = [value(node) for node in placeholders(trace.canonical.graph.graph)]
    counts = [(lead, target.count)] if isinstance(target, Bundle) else []
    return sizes_at(fakes, bound.tensors, counts)


def _ones(bound: Bound) -> tuple[bool, ...]:
    return tuple(size == 1 for t in bound.tensors for size in t.shape)
