"""One row of the zoo to one dict: is it captured, planned, explained, and does the result hold?"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxlrp

from .build import ATTENTIONS, NotBuilt, build, calibrate, first_line
from .inputs import Example, examples
from .reference import Reference, Target, gradient_times_input, scalar_of, target_of
from .rows import Row

#: What a row can come to; the first means that everything below held.
STATUSES = (
    "explained",
    "uncovered",
    "capture_failed",
    "wrong_forward",
    "wrong_gradient",
    "ledger_open",
    "timeout",
    "crashed",
    "not_built",
)
COMPOSITES = ("attnlrp", "cp", "gradient")
#: Relative, in fp32.
FORWARD, GRADIENT, LEDGER = 1e-5, 1e-4, 1e-3
_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (fxlrp.UncoveredOpError, "uncovered"),
    (fxlrp.NoPathError, "uncovered"),
    (fxlrp.CaptureError, "capture_failed"),
    (fxlrp.StochasticModelError, "capture_failed"),
    (fxlrp.InputError, "capture_failed"),
)


@dataclass(frozen=True, eq=False)
class Case:
    """A model that runs, with its inputs and what autograd says."""

    model: nn.Module
    example: Example
    target: Target
    reference: Reference
    repeats: bool


class _Wrong(Exception):
    """A check that did not hold."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check(row: Row, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Build, explain and check one row.

    Args:
        row: the row.
        show: takes the plan and the ledgers as text.

    Returns:
        ``task``, ``model``, ``status`` and ``reason``; of what was reached: ``call`` (which inputs),
        ``capture``, ``rules`` (nodes by rule), ``forward`` and ``gradient`` (relative errors), ``ledger``
        (residual by composite), ``generalises``, ``notes``, ``seconds`` (capture, plan and rewrite) and
        ``seconds_total``.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"task": row.task, "model": row.model, "status": "explained", "reason": ""}
    try:
        _explain(row, case_of(row), result, show)
    except _Wrong as wrong:
        result.update(status=wrong.status, reason=str(wrong))
    except NotBuilt as error:
        result.update(status="not_built", reason=str(error))
    except Exception as error:  # every row has a result
        status = next((status for kind, status in _ERRORS if isinstance(error, kind)), "crashed")
        result.update(status=status, reason=_reason(error, status))
    result["seconds_total"] = round(time.perf_counter() - start, 2)
    return result


def _reason(error: Exception, status: str) -> str:
    """An error in one line: of a failed capture the last step's, of an unforeseen error where it arose."""
    message = first_line(error)
    if isinstance(error, fxlrp.CaptureError):
        steps = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
        message = steps[-1] if steps else message
    return f"{type(error).__name__}: {message}{_place(error) if status == 'crashed' else ''}"[:500]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(os.path.dirname(fxlrp.__file__))]
    return f" (at {os.path.basename(own[-1].filename)}:{own[-1].lineno} {own[-1].name})" if own else ""


def case_of(row: Row, attentions: Sequence[str] = ATTENTIONS) -> Case:
    """The row's model with the first of its example inputs that it runs on.

    Raises:
        NotBuilt: there is none, with what each attempt failed with.
    """
    model = build(row, attentions=attentions)
    reasons: list[str] = []
    for example in _attempts(examples(row, model, reasons), reasons):
        try:
            calibrate(model, example.inputs)
            with torch.no_grad():
                output = model(**example.inputs)
                target = target_of(output, _batch(example.inputs))
                value = scalar_of(output, target, example.inputs)
                again = scalar_of(model(**example.inputs), target, example.inputs)
            if not bool(torch.isfinite(value).all()):
                raise ValueError("the output is not finite")
            reference = gradient_times_input(model, example.inputs, target)
            missing = [name for name in _explained_inputs(row) if not _moves(reference, name)]
            if missing:
                raise ValueError(f"the gradient for {', '.join(missing)} is zero")
            return Case(model, example, target, reference, torch.equal(value, again))
        except Exception as error:  # the model's own, or ours above: the next inputs may do
            reasons.append(f"{example.name}: {type(error).__name__}: {first_line(error)}")
    raise NotBuilt(" | ".join(dict.fromkeys(reasons)) or "no inputs known")


def _batch(inputs: Mapping[str, Any]) -> int:
    """The number of samples; patches of images may be packed into one row, so ids count first."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    first = next((x for name, x in inputs.items() if name.endswith("input_ids")), tensors[0])
    return int(first.shape[0])


def _attempts(made: Iterator[Example], reasons: list[str]) -> Iterator[Example]:
    """The examples, as long as they can be made."""
    try:
        yield from made
    except Exception as error:  # a config without a field that others have
        reasons.append(f"inputs: {type(error).__name__}: {first_line(error)}")


def _explained_inputs(row: Row) -> tuple[str, ...]:
    return ("pixel_values",) if row.inputs == "image-text" else ()


def _moves(reference: Reference, name: str) -> bool:
    return name in reference.relevance and bool(reference.relevance[name].any())


def _explain(row: Row, case: Case, result: dict[str, Any], show: Callable[[str], None] | None) -> None:
    explainer = fxlrp.lrp_compile(case.model, COMPOSITES[0], backend="eager")
    arguments = {**case.example.inputs, "target": case.target}
    result["call"] = case.example.name
    result["notes"] = [] if case.repeats else ["the model itself gives another output when it is run again"]
    if not any(bool(r.any()) for r in case.reference.relevance.values()):
        result["notes"].append("the gradient is zero")
    start = time.perf_counter()
    explanation = explainer(**arguments)
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["capture"] = explainer.plan.notes[0].removeprefix("captured by ").split()[0]
    result["rules"] = explainer.plan.counts()
    expected = case.reference.value
    gap = (explanation.value.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)
    result["forward"] = float(gap)
    result["ledger"] = {}
    for name in COMPOSITES:
        by_composite = explainer
        if name != COMPOSITES[0]:
            by_composite = explainer.with_composite(name)
            explanation = by_composite(**arguments)
        result["ledger"][name] = explanation.ledger.residual
        if show is not None:
            show(f"\n{name}\n{by_composite.plan if name == 'attnlrp' else ''}\n{explanation.ledger}")
        if name == "gradient":
            explainer = by_composite
            result["gradient"] = _gradient_error(case.reference, explanation, explainer)
    if row.inputs == "text":
        result["generalises"] = _generalises(row, case, explainer, result["notes"])
    _judge(result)


def _judge(result: dict[str, Any]) -> None:
    if not result["forward"] <= FORWARD:
        raise _Wrong("wrong_forward", f"the explained value is off by {result['forward']:.1e}")
    for name, error in result["gradient"].items():
        if not error <= GRADIENT:
            raise _Wrong("wrong_gradient", f"relevance of {name} is off by {error:.1e}")
    for composite, residual in result["ledger"].items():
        if not residual <= LEDGER:
            raise _Wrong("ledger_open", f"{composite} leaves {residual:.1e} of the value unaccounted for")


def _named(explanation: fxlrp.Explanation, explainer: fxlrp.Explainer) -> dict[str, Tensor]:
    if isinstance(explanation.relevance, Tensor):
        return {str(explainer.plan.sources[0].input.target): explanation.relevance}
    return dict(explanation.relevance)


def _gradient_error(
    reference: Reference, explanation: fxlrp.Explanation, explainer: fxlrp.Explainer
) -> dict[str, float]:
    """The relative error by explained input; infinite for an input that one side does not explain."""
    found = _named(explanation, explainer)
    moving = {name for name in reference.relevance if _moves(reference, name)}
    return {
        name: reference.error(name, found[name])
        if name in found and name in reference.relevance
        else float("inf")
        for name in sorted(moving | set(found))
    }


def _generalises(row: Row, case: Case, explainer: fxlrp.Explainer, notes: list[str]) -> bool | None:
    """Whether another batch size and length is answered by the same graph, and rightly; None if the model
    itself does not take them.
    """
    graph = explainer.relevance_graph
    try:
        other = next(e for e in examples(row, case.model, [], other=True) if e.name == case.example.name)
        reference = gradient_times_input(case.model, other.inputs, case.target)
    except Exception as error:  # the model's own
        notes.append(f"does not run on other sizes: {type(error).__name__}: {first_line(error)}")
        return None
    try:
        explanation = explainer(**other.inputs, target=case.target)
    except Exception as error:
        notes.append(f"other sizes: {type(error).__name__}: {first_line(error)}")
        return False
    worst = max(_gradient_error(reference, explanation, explainer).values(), default=float("inf"))
    if not worst <= GRADIENT:
        notes.append(f"other sizes: relevance is off by {worst:.1e}")
    return explainer.relevance_graph is graph and worst <= GRADIENT
