"""Load: a saved explainer without the model, its code or pickle. Nothing in the file is run as code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from ..bundle import Bundle, bundle
from ..compiler.graphs import output_node
from ..compiler.inputs import Bound, bind_to, constants_of, refuse_empty
from ..compiler.lower import Runner, lower
from ..compiler.plan import layout
from ..errors import ArtifactError, FxlrpError, InputError, TargetError, first_line
from ..explanation import Explanation, one_or_many
from ..finite import refuse_nonfinite
from ..memory import in_chunks
from ..targets import Predicted, Span, Target, as_target, is_several, resolve
from . import graph as graphs
from . import weights
from .expressions import evaluate
from .ops import resolve as op_of
from .save import FORMAT, MANIFEST, PROGRAM
from .spec import Inputs, Kind, Logits, Results
from .strict import check, fields, items, parse, refuse


@dataclass(frozen=True)
class SavedRow:
    """One row of a saved plan: which node had which rule, and why; see :class:`fxlrp.compiler.plan.Assignment`."""

    node: str
    op: str
    kind: str
    rule_name: str
    rule: str
    reason: str
    module: str
    source: str


@dataclass(frozen=True)
class SavedPlan:
    """A saved plan; prints as a table."""

    rows: tuple[SavedRow, ...]
    notes: tuple[str, ...]

    def table(self, *, structural: bool = False) -> str:
        """The plan as text; structural nodes, whose relevance moves with its elements, on request."""
        rows = [
            (r.kind, r.rule_name, (r.node, r.op, r.rule, r.reason, r.module, r.source)) for r in self.rows
        ]
        return layout(rows, self.notes, structural=structural)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True, eq=False)
class SavedProgram:
    """A program of an artifact: for which targets, what it returns, its plan, its graph as plain data."""

    target: Kind
    results: Results
    plan: SavedPlan
    data: Any


@dataclass(frozen=True, eq=False)
class Header:
    """What an artifact says without its tensors.

    Attributes:
        fxlrp: the version that wrote it.
        torch: PyTorch's at that time.
        inputs: what its programs take.
        logits: where targets are read; None for a function of the output.
        composite: the title of its rules.
        composite_json: the rules as JSON; None where some are no plain data.
        constants: views of the tensors.
        programs: by kind of target, the last call's first.
        digests: SHA-256 of each tensor.
    """

    fxlrp: str
    torch: str
    inputs: Inputs
    logits: Logits | None
    composite: str
    composite_json: str | None
    constants: tuple[weights.View, ...]
    programs: tuple[SavedProgram, ...]
    digests: Mapping[str, str]


def inspect(path: str | os.PathLike[str]) -> Header:
    """What an artifact holds; its tensors are not read.

    Raises:
        ArtifactError: it is none, or it is damaged.
    """
    return _header(weights.read(Path(path)))


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | torch.device | None = None,
    *,
    verify: bool = True,
    aot: bool = False,
    chunk: int | None = None,
) -> LoadedExplainer:
    """Load what ``Explainer.save`` wrote.

    The model's code is not needed, and nothing in the file is run as code: its graph is built node by node of a
    fixed list of ops. On a CPU, weights are mapped from the file, which must stay as it is.

    Args:
        path: of the file.
        backend: see :func:`fxlrp.lrp_compile`.
        device: where the weights go; None for where the explainer was. The kernels that a graph calls can be a
            device's own: what was saved on a CPU may not run on a GPU.
        verify: compare the weights with their checksums, which reads all of them.
        aot: run the native code that ``save(aot=True)`` put in. This is code from the file: only for files that
            you would run.
        chunk: how many of several targets are explained in one pass at most.

    Raises:
        ArtifactError: it is no artifact, of another format, damaged, or needs ops that are not there.
        ImportError: the package safetensors is missing.
    """
    stored = weights.read(Path(path))
    header = _header(stored)
    if verify:
        weights.refuse_changed(stored, header.digests)
    saved, place = _device(header.inputs.device), torch.device(device or header.inputs.device)
    lower(None, backend, place)  # refuses an unknown backend
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"The artifact is for {place}, and PyTorch sees no GPU here; give device=….")
    if place.type != saved.type:
        _refuse_bound_ops(header, place)
    pieces = {v.piece: stored.aligned(v.piece).to(place) for v in header.constants}
    constants = tuple(v.of(pieces[v.piece], f"constants[{i}]") for i, v in enumerate(header.constants))

    def moved(name: str) -> torch.device:
        found = _device(name)
        return place if found == saved else found

    native = None
    if aot:
        from .aot import native_runner

        native = native_runner(stored)
    programs = []
    for i, program in enumerate(header.programs):
        count = len(header.inputs.names) + _operands(program, header)
        module = graphs.from_data(program.data, f"programs[{i}].graph", count, constants, moved)
        if not program.results.fits(output_node(module.graph).args[0]):
            refuse(f"programs[{i}].graph.output", "does not have the parts that results names")
        runner = native if native is not None and i == 0 else lower(module, backend, place)
        programs.append(_Loaded(program, module, runner))
    return LoadedExplainer(header, tuple(programs), place, chunk)


@dataclass(frozen=True, eq=False)
class _Loaded:
    saved: SavedProgram
    graph: fx.GraphModule
    runner: Runner


@dataclass(frozen=True, eq=False)
class LoadedExplainer:
    """An explainer from a file; made by :func:`fxlrp.load`. Call it as the explainer: ``loaded(*args, target=…)``.

    Attributes:
        header: what the file says.
        device: where the weights are, and the inputs must be.
        chunk: how many of several targets are explained in one pass at most; None for all.
    """

    header: Header
    programs: tuple[_Loaded, ...] = field(repr=False)
    device: torch.device
    chunk: int | None = None

    def __call__(self, *args: Any, target: Any = None, **kwargs: Any) -> Explanation:
        """Explain one call; arguments and targets are those of :class:`fxlrp.Explainer`.

        Raises:
            InputError: the inputs are not like those that it was saved for.
            TargetError: it was saved for other kinds of targets, or the target does not fit the output.
            NonFiniteError: NaN or infinity in the input, the explained value or relevance.
            ArtifactError: the program fails on inputs that it says it takes: the file is damaged.
        """
        with torch.inference_mode(False):
            bound = self._bound(args, kwargs)
            symbols = self.header.inputs.sizes.read(bound.names, bound.tensors)
            program, operands, count = self._wanted(target, bound, symbols)
            outcome = self._run(program, bound, operands, count)
        relevance, scalar, coefficients, latents, *parameters = outcome
        results = program.saved.results
        refuse_nonfinite(bound, None, relevance, scalar)
        names = results.names
        return Explanation(
            one_or_many(names, relevance[: len(names)]),
            scalar,
            one_or_many(names, coefficients),
            {name: r for name, (r, _) in zip(results.latents, latents, strict=True)},
            dict(zip(results.positions, relevance[len(names) :], strict=True)),
            {name: c for name, (_, c) in zip(results.latents, latents, strict=True)},
            dict(zip(results.parameters, *parameters, strict=True)) if parameters else {},
            _no_output,
            _no_ledger,
        )

    @property
    def plan(self) -> SavedPlan:
        """Which node has which rule, and why; of the last call before saving."""
        return self.programs[0].saved.plan

    @property
    def relevance_graph(self) -> fx.GraphModule:
        """From tensor inputs (and target indices) to ``(relevance, value, coefficients, latents)``."""
        return self.programs[0].graph

    def __repr__(self) -> str:
        targets = "; ".join(str(p.saved.target) for p in self.programs)
        return (
            f"<fxlrp.LoadedExplainer of {self.header.inputs.model}: {self.header.composite}, "
            f"targets {targets}, {self.device}>"
        )

    # -- inputs ----------------------------------------------------------------------------------------------

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound:
        inputs = self.header.inputs
        signature = inputs.signature
        bound = bind_to(signature, inputs.model, args, kwargs)
        refuse_empty(bound)
        given = bound.by_name
        for name in inputs.names:
            if name not in given:
                raise InputError(f"Input '{name}' is missing; this artifact takes {', '.join(inputs.names)}.")
        for name in given:
            if name not in inputs.names:
                raise InputError(
                    f"This artifact was saved without input '{name}'; it takes {', '.join(inputs.names)}. Leave "
                    "it out, or explain with it and save again."
                )
        for name, dtype in zip(inputs.names, inputs.dtypes, strict=True):
            if str(given[name].dtype) != f"torch.{dtype}":
                raise InputError(
                    f"Input '{name}' is {given[name].dtype}; this artifact takes torch.{dtype}: "
                    f"{name}.to(torch.{dtype})."
                )
            if given[name].device != self.device and self.device.index is not None or (
                given[name].device.type != self.device.type
            ):
                raise InputError(
                    f"Input '{name}' is on {given[name].device}, the artifact's weights are on {self.device}. "
                    f"Move it there: {name}.to('{self.device}')."
                )
        self._check_constants(constants_of(bound, signature))
        return replace(bound, names=inputs.names, tensors=tuple(given[name] for name in inputs.names))

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        saved = self.header.inputs.constants
        for name, value in given.items():
            if name not in saved:
                raise InputError(
                    f"This artifact was saved without argument '{name}', which is part of the graph: leave it "
                    "out, or explain with it and save again."
                )
            if isinstance(saved[name], dict):
                raise InputError(
                    f"Argument '{name}', a {saved[name]['type']}, is part of the artifact's graph: leave it out."
                )
            if type(value) is not type(saved[name]) or value != saved[name]:
                raise InputError(
                    f"This artifact was saved for {name}={saved[name]!r}, which is part of its graph, not for "
                    f"{value!r}."
                )

    # -- targets ---------------------------------------------------------------------------------------------

    def _wanted(
        self, target: Any, bound: Bound, symbols: Mapping[str, int]
    ) -> tuple[_Loaded, tuple[Tensor, ...] | Bundle, int | None]:
        first = self.programs[0]
        if first.saved.target.names == ("Function",) and target is None:
            return first, (), None
        wanted = as_target(target)
        if wanted.key[0] == "Function":
            raise TargetError(
                "A function of the output is part of an artifact's graph: leave the target out for the one that it "
                f"was saved with. It was saved for {self._kinds()}."
            )
        logits = self.header.logits
        if logits is None:
            raise TargetError(f"This artifact was saved for {self._kinds()}: leave the target out.")
        shape, mask, ids = self._read(logits, bound, symbols)
        if is_several(wanted):
            several = bundle(wanted, shape, self.device, mask, ids)
            kind = Kind.of(several.key, several.count)
            return self._program(kind, wanted), several, several.count
        found = self._program(Kind.of(wanted.key, None), wanted)
        return found, resolve(wanted, shape, self.device, mask), None

    def _read(
        self, logits: Logits, bound: Bound, symbols: Mapping[str, int]
    ) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
        """Shape and padding mask of the logits, and the tokens that a span names."""
        shape = tuple(int(evaluate(size, symbols)) for size in logits.shape)
        inputs = bound.by_name
        mask = inputs.get(logits.mask or "")
        if mask is not None and logits.is_padding:
            mask = ~mask.bool()
        return shape if len(shape) > 1 else (*shape, 1), mask, inputs.get(logits.ids or "")

    def _program(self, kind: Kind, wanted: Target) -> _Loaded:
        for program in self.programs:
            if program.saved.target in (kind, replace(kind, count=None)):
                return program
        what = "the predicted class" if isinstance(wanted, Predicted) else str(kind)
        if isinstance(wanted, Span):
            what = f"a span ({kind})"
        raise TargetError(
            f"This artifact was saved for {self._kinds()}, not for {what}. Explain once with such a target "
            "before explainer.save(…)."
        )

    def _kinds(self) -> str:
        return "; ".join(str(p.saved.target) for p in self.programs)

    # -- running ---------------------------------------------------------------------------------------------

    def _run(
        self, program: _Loaded, bound: Bound, operands: tuple[Tensor, ...] | Bundle, count: int | None
    ) -> Any:
        try:
            if not isinstance(operands, Bundle):
                return program.runner(*bound.tensors, *operands)
            several = operands

            def run(start: int, stop: int) -> Any:
                return program.runner(*bound.tensors, *several.part(start, stop).operands)

            chunk = None if several.is_mixed or program.saved.target.count is not None else self.chunk
            return in_chunks(run, several.count, chunk)
        except (FxlrpError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ArtifactError(
                f"The artifact's program failed on inputs that it says it takes: {first_line(error)}. The file "
                f"is damaged, or this PyTorch ({torch.__version__}) differs from the one that it was saved with "
                f"({self.header.torch})."
            ) from error


def _no_output() -> NoReturn:
    raise ArtifactError(
        "A loaded explainer holds no model, so there is no output: its graph skips what no target needs. Call the "
        "model, or explain where the model is."
    )


def _no_ledger() -> NoReturn:
    raise ArtifactError(
        "A loaded explainer holds no rule graph, so there is no ledger. Read it where the model is: "
        "lrp_compile(model)(…).ledger."
    )


# -- reading ---------------------------------------------------------------------------------------------------


def _header(stored: weights.Stored) -> Header:
    metadata = stored.metadata
    if MANIFEST not in metadata or PROGRAM not in metadata:
        raise ArtifactError(
            f"{stored.path} is a safetensors file but no artifact: explainer.save(…) writes one."
        )
    if metadata.keys() != {MANIFEST, PROGRAM}:
        refuse("metadata", f"has the keys {sorted(metadata)}")
    manifest = check(parse(metadata[MANIFEST], "manifest"), dict, "manifest")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{stored.path} has format {str(manifest.get('format'))[:20]} (written by fxlrp "
            f"{str(manifest.get('fxlrp'))[:20]}); this fxlrp reads format {FORMAT}. Save it again."
        )
    _, version, pytorch, program_digest, digests = fields(
        manifest, "manifest", format=int, fxlrp=str, torch=str, program=str, tensors=dict
    )
    text = metadata[PROGRAM]
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != program_digest:
        raise ArtifactError(
            f"The program of {stored.path} is not what was saved: the file was changed or damaged. Copy it anew, "
            "or save it again."
        )
    if digests.keys() != set(stored.names):
        refuse("manifest.tensors", f"does not name the file's tensors ({len(stored.names)})")
    data = parse(text, "program")
    given, logits, composite, constants, programs = fields(
        data,
        "program",
        inputs=dict,
        logits=(dict, type(None)),
        composite=dict,
        constants=list,
        programs=list,
    )
    inputs = Inputs.from_data(given)
    _device(inputs.device)
    title, rules = fields(composite, "composite", title=str, json=(str, type(None)))
    views = tuple(weights.View.from_data(v, f"constants[{i}]") for i, v in enumerate(constants))
    for view in views:
        if view.piece not in digests:
            refuse("constants", f"names the tensor {view.piece[:80]!r}, which is not there")
    found = tuple(_program(p, f"programs[{i}]") for i, p in enumerate(programs))
    if not found:
        refuse("programs", "is empty")
    return Header(
        version,
        pytorch,
        inputs,
        None if logits is None else Logits.from_data(logits, inputs),
        title,
        rules,
        views,
        found,
        digests,
    )


def _program(data: Any, where: str) -> SavedProgram:
    target, results, graph, plan = fields(data, where, target=dict, results=dict, graph=dict, plan=dict)
    rows, notes = fields(plan, f"{where}.plan", rows=list, notes=list)
    listed = [items(row, str, f"{where}.plan.rows") for row in rows]
    if any(len(row) != 8 for row in listed):
        refuse(f"{where}.plan.rows", "has a row that is not of eight texts")
    saved = SavedPlan(tuple(SavedRow(*row) for row in listed), tuple(items(notes, str, f"{where}.plan.notes")))
    kind = Kind.from_data(target, f"{where}.target")
    return SavedProgram(kind, Results.from_data(results, f"{where}.results"), saved, graph)


def _operands(program: SavedProgram, header: Header) -> int:
    """How many tensors a program takes besides the inputs."""
    known = program.target.operands
    if known is not None:
        return known
    nodes = check(check(program.data, dict, "graph").get("nodes"), list, "graph.nodes")
    inputs = sum(1 for node in nodes if type(node) is dict and "input" in node)
    return max(0, inputs - len(header.inputs.names))


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        refuse("device", f"{name[:40]!r} is none")


def _refuse_bound_ops(header: Header, place: torch.device) -> None:
    """Refuse a graph with ops that have no kernel on a device.

    Raises:
        ArtifactError: with the first of them.
    """
    key = {"cuda": "CUDA", "cpu": "CPU"}.get(place.type, place.type.upper())
    has: Callable[[str, str], bool] = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for i, program in enumerate(header.programs):
        (nodes, _) = fields(program.data, f"programs[{i}].graph", nodes=list, output=dict)
        for node in nodes:
            op = node.get("op") if type(node) is dict else None
            if type(op) is str and isinstance(target := op_of(op), torch._ops.OpOverload):
                try:
                    runs = has(target.name(), key)
                except RuntimeError:
                    runs = False
                if not runs:
                    raise ArtifactError(
                        f"The artifact was saved on {header.inputs.device} and calls {op}, which has no kernel for "
                        f"{place.type}: PyTorch chose it for that device. Explain and save on {place.type}."
                    )
