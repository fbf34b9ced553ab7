"""A loaded explainer: checks a call's inputs and target, and runs the program for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from ..bundle import Bundle, bundle
from ..compiler.inputs import Bound, bind_to, constants_of, refuse_empty
from ..compiler.lower import Runner
from ..errors import ArtifactError, FxlrpError, InputError, TargetError, first_line, is_out_of_memory
from ..explanation import Explanation, one_or_many
from ..finite import refuse_nonfinite
from ..memory import in_chunks
from ..targets import Predicted, Span, Target, as_target, is_several, resolve
from .expressions import evaluate
from .header import Header, SavedPlan, SavedProgram
from .spec import Kind, Logits


@dataclass(frozen=True, eq=False)
class LoadedProgram:
    """A program with its graph and what runs it."""

    saved: SavedProgram
    graph: fx.GraphModule
    runner: Runner


@dataclass(frozen=True, eq=False)
class LoadedExplainer:
    """An explainer from a file; made by :func:`fxlrp.load`. Call it as the explainer that was saved.

    Attributes:
        header: what the file says.
        device: where the weights are, and the inputs must be.
        chunk: how many of several targets are explained in one pass at most; None for all.
    """

    header: Header
    programs: tuple[LoadedProgram, ...] = field(repr=False)
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
                    f"This artifact was saved without input '{name}'; it takes {', '.join(inputs.names)}. "
                    "Leave it out, or explain with it and save again."
                )
        for name, dtype in zip(inputs.names, inputs.dtypes, strict=True):
            if str(given[name].dtype) != f"torch.{dtype}":
                raise InputError(
                    f"Input '{name}' is {given[name].dtype}; this artifact takes torch.{dtype}: "
                    f"{name}.to(torch.{dtype})."
                )
            if (given[name].device != self.device and self.device.index is not None) or (
                given[name].device.type != self.device.type
            ):
                raise InputError(
                    f"Input '{name}' is on {given[name].device}, the artifact's weights are on "
                    f"{self.device}. Move it there: {name}.to('{self.device}')."
                )
        self._check_constants(constants_of(bound, signature))
        return replace(bound, names=inputs.names, tensors=tuple(given[name] for name in inputs.names))

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        saved = self.header.inputs.constants
        for name, value in given.items():
            if name not in saved:
                raise InputError(
                    f"This artifact was saved without argument '{name}', which is part of the graph: leave "
                    "it out, or explain with it and save again."
                )
            if isinstance(saved[name], dict):
                raise InputError(
                    f"Argument '{name}', a {saved[name]['type']}, is part of the artifact's graph: leave "
                    "it out."
                )
            if type(value) is not type(saved[name]) or value != saved[name]:
                raise InputError(
                    f"This artifact was saved for {name}={saved[name]!r}, which is part of its graph, not "
                    f"for {value!r}."
                )

    # -- targets ---------------------------------------------------------------------------------------------

    def _wanted(
        self, target: Any, bound: Bound, symbols: Mapping[str, int]
    ) -> tuple[LoadedProgram, tuple[Tensor, ...] | Bundle, int | None]:
        first = self.programs[0]
        if first.saved.target.names == ("Function",) and target is None:
            return first, (), None
        wanted = as_target(target)
        if wanted.key[0] == "Function":
            raise TargetError(
                "A function of the output is part of an artifact's graph: leave the target out for the one "
                f"that it was saved with. It was saved for {self._kinds()}."
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

    def _program(self, kind: Kind, wanted: Target) -> LoadedProgram:
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
        self, program: LoadedProgram, bound: Bound, operands: tuple[Tensor, ...] | Bundle, count: int | None
    ) -> Any:
        try:
            if not isinstance(operands, Bundle):
                return program.runner(*bound.tensors, *operands)
            several = operands

            def run(start: int, stop: int) -> Any:
                return program.runner(*bound.tensors, *several.part(start, stop).operands)

            chunk = None if several.is_mixed or program.saved.target.count is not None else self.chunk
            return in_chunks(run, several.count, chunk)
        except FxlrpError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                error.add_note("fxlrp: save it with a smaller lrp_compile(..., memory_budget=...).")
                raise
            raise ArtifactError(
                f"The artifact's program failed on inputs that it says it takes: {first_line(error)}. The "
                f"file is damaged, or this PyTorch ({torch.__version__}) differs from the one that it was "
                f"saved with ({self.header.torch})."
            ) from error


def _no_output() -> NoReturn:
    raise ArtifactError(
        "A loaded explainer holds no model, so there is no output: its graph skips what no target needs. "
        "Call the model, or explain where the model is."
    )


def _no_ledger() -> NoReturn:
    raise ArtifactError(
        "A loaded explainer holds no rule graph, so there is no ledger. Read it where the model is: "
        "lrp_compile(model)(…).ledger."
    )
