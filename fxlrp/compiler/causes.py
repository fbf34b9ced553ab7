"""Why a capture failed, in the model's own terms: its line, the class of the cause, what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import first_line

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
#: A part of an error's class or message, and the cause that it stands for.
_CAUSES = (
    ("DataDependent", "a branch or a size that depends on data"),
    ("data-dependent", "a branch or a size that depends on data"),
    ("autograd.Function", "an autograd.Function with a backward of its own"),
    ("UnsupportedOperator", "an op that PyTorch cannot trace"),
    ("Unsupported", "Python that PyTorch cannot trace"),
    ("fake", "an op that PyTorch cannot trace"),
    ("no kernel", "an op that PyTorch cannot trace"),
    ("functional", "an op that writes into a tensor"),
    ("differs from the model's own", "an output that is not the model's"),
)
_REMEDIES = {
    "a branch or a size that depends on data": "Take the branch out of forward, or pass its outcome as an "
    "argument that is no tensor.",
    "an autograd.Function with a backward of its own": "Its backward is not the derivative of its forward; "
    "replace it by what should be explained, in plain ops.",
    "an op that PyTorch cannot trace": "Register a fake implementation: torch.library.register_fake.",
    "Python that PyTorch cannot trace": "Move it out of forward, or write it in tensor ops.",
    "an op that writes into a tensor": "Write into a clone, or use the op that returns a new tensor.",
    "an output that is not the model's": "If the model draws random numbers or keeps state between calls, "
    "switch that off; if it asks whether it is being traced, make it do the same then.",
}
_UNKNOWN = "something that fxlrp does not know"


@dataclass(frozen=True)
class Failure:
    """One step of the capture ladder that failed.

    Attributes:
        step: its name.
        message: what went wrong, in one line.
        cause: the class of the cause.
        line: the line of the model's source where it arose, or ''.
    """

    step: str
    message: str
    cause: str
    line: str = ""

    @staticmethod
    def of(step: str, error: BaseException) -> Failure:
        """From what a tracer raised."""
        return Failure(step, first_line(error), _cause(error), _line(error))

    @staticmethod
    def because(step: str, difference: str) -> Failure:
        """From how a captured graph differs from the model."""
        cause = next((cause for part, cause in _CAUSES if part in difference), _UNKNOWN)
        return Failure(step, difference, cause)

    def __str__(self) -> str:
        return f"{self.step}: {self.message}"


def report(model: str, failures: list[Failure]) -> str:
    """The message of a capture that failed at every step."""
    steps = "\n".join(
        f"  {failure}" + (f"\n    at {failure.line}" if failure.line else "")
        for failure in dict.fromkeys(failures)
    )
    cause = next((f.cause for f in reversed(failures) if f.cause != _UNKNOWN), _UNKNOWN)
    remedy = _REMEDIES.get(cause, "Please report it, with the model.")
    return f"{model} could not be captured as a graph, because of {cause}:\n{steps}\n{remedy}"


def _cause(error: BaseException) -> str:
    text = " ".join(f"{type(e).__name__} {first_line(e)}" for e in _chain(error))
    return next((cause for part, cause in _CAUSES if part in text), _UNKNOWN)


def _line(error: BaseException) -> str:
    """The innermost line on the way to an error that is neither PyTorch's nor fxlrp's."""
    for found in _chain(error):
        frames = [f for f in traceback.extract_tb(found.__traceback__) if not f.filename.startswith(_OWN)]
        if frames and not frames[-1].filename.startswith("<"):
            frame = frames[-1]
            place = f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} in {frame.name}"
            return f"{place}: {frame.line}" if frame.line else place
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
