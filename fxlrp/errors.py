"""The error catalogue: a class and a message template each, with the place, the likely cause and the fix."""

from __future__ import annotations

import torch


class FxlrpError(Exception):
    """Base class of every error that fxlrp raises on purpose."""


class InputError(FxlrpError, ValueError):
    """The inputs of a call cannot be explained as they are."""


class TargetError(FxlrpError, ValueError):
    """The target does not fit the model's output."""


class CaptureError(FxlrpError, RuntimeError):
    """The model could not be turned into a graph that computes what the model computes."""


class UncoveredOpError(FxlrpError, NotImplementedError):
    """A nonlinear op carries relevance and no rule covers it."""


class NoPathError(FxlrpError, ValueError):
    """Nothing differentiable leads from an input to the target."""


class StochasticModelError(FxlrpError, RuntimeError):
    """The model draws random numbers on the way to the target, so an explanation would not repeat."""


class NonFiniteError(FxlrpError, FloatingPointError):
    """NaN or infinity in the input, the explained value or the relevance."""


class CompositeError(FxlrpError, ValueError):
    """A composite that does not exist or cannot be read."""


class CompositeWarning(UserWarning):
    """An entry of a composite that decides nothing on this model."""


class KernelError(FxlrpError, RuntimeError):
    """A kernel that was asked for by name does not exist, or cannot run on what it is for."""


class ArtifactError(FxlrpError, RuntimeError):
    """A saved explainer cannot be written or read, or does not hold what is asked of it."""


class GraphError(FxlrpError, AssertionError):
    """A stage of the compiler produced a graph that breaks its dialect; always a bug of fxlrp."""


def place(module_path: str, source: str) -> str:
    """Where a node comes from, as far as the trace knows: ``module path (file:line)``."""
    known = [part for part in (module_path and f"module '{module_path}'", source) if part]
    return ", ".join(known) or "an unknown place"


#: What PyTorch's allocators for the CPU say, whose error has no class of its own.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch's, or of Python's, is that there is no memory left."""
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(t in said for t in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """An error as one line: its class and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
