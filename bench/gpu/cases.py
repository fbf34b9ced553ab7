"""A benchmark of one kernel: what runs against what, on which shapes, and which lines it must reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Calls by name: "kernel" is ours, "eager" the unfused PyTorch steps.
Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Line:
    """A figure that must be reached.

    Attributes:
        against: the contender, or ``"copy"``: the device's copy bandwidth.
        at_least: the kernel's speed over the contender's (its bandwidth over a copy's), or more.
        at_most: the kernel's time over the contender's, or less.
    """

    against: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.against == "copy":
            return f"≥ {self.at_least:.0%} of copy bandwidth"
        if self.at_least is not None:
            return f"≥ {self.at_least:g} × speed of {self.against}"
        return f"≤ {self.at_most:g} × time of {self.against}"

    def figure(self, seconds: Mapping[str, float], traffic: int, copy: float) -> float:
        """The figure that the line is about; `copy` in bytes a second."""
        if self.against == "copy":
            return traffic / seconds["kernel"] / copy
        ratio = seconds[self.against] / seconds["kernel"]
        return ratio if self.at_least is not None else 1 / ratio

    def met(self, figure: float) -> bool:
        """Whether a figure reaches the line."""
        return figure >= self.at_least if self.at_least is not None else figure <= self.at_most


@dataclass(frozen=True)
class Setup:
    """Inputs at hand: the calls on them, and what they must compute.

    Attributes:
        calls: see :data:`Calls`; each returns a tensor or several.
        exact: the result in float64.
        traffic: bytes that have to move: each input once, each output once.
        flops: of matrix products.
        uncaptured: calls that no CUDA graph can hold, because they go through autograd.
    """

    calls: Calls
    exact: Callable[[], Any]
    traffic: int
    flops: int = 0
    uncaptured: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        kernel: the folder of the kernel.
        name: what is computed.
        setup: makes inputs of a shape and dtype on a device, and the calls on them.
        shapes: ``tiny`` for the interpreter, ``gate`` for the check of accuracy, ``full`` for time.
        lines: what must be reached.
        dtype: of the inputs.
        decides: whether the kernel is launched for such a shape, so that its being faster there counts.
        cases: for which entries of ``fxlrp/kernels/measured.py`` it counts; the kernel's own by default.
    """

    kernel: str
    name: str
    setup: Callable[[tuple[int, ...], torch.dtype, torch.device], Setup]
    shapes: Mapping[str, tuple[int, ...]]
    lines: tuple[Line, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    notes: Mapping[str, str] = field(default_factory=dict)
    decides: bool = True
    cases: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Kernel, name, dtype and full shape."""
        size = "×".join(map(str, self.shapes["full"]))
        return f"{self.kernel}: {self.name}, {str(self.dtype).removeprefix('torch.')}, {size}"


def pair(
    kernel: Callable[..., Any], eager: Callable[..., Any], inputs: tuple[Any, ...], flops: int = 0
) -> Setup:
    """The kernel against unfused PyTorch, eager and compiled by Inductor; float64 PyTorch is exact."""
    device = next(t.device for t in inputs if isinstance(t, Tensor))
    calls = {"kernel": functools.partial(kernel, *inputs), "eager": functools.partial(eager, *inputs)}
    if device.type == "cuda":
        calls["inductor"] = functools.partial(compiled(eager), *inputs)
    exact = functools.partial(eager, *(double(t) for t in inputs))
    outputs = outputs_of(_shapes(eager, inputs))
    return Setup(calls, exact, nbytes([*inputs, *outputs]), flops)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled by Inductor for each of its shapes."""
    return torch.compile(function, dynamic=False)


def _shapes(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    return function(*(t.to("meta") if isinstance(t, Tensor) else t for t in inputs))


def double(value: Any) -> Any:
    """A floating tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs_of(value: Any) -> list[Tensor]:
    """What a call returned, as a list of tensors that hold something."""
    values = [value] if isinstance(value, Tensor) else list(value)
    return [v for v in values if isinstance(v, Tensor) and v.numel()]


def nbytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among values."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def normal(shape: Iterable[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Random normal numbers."""
    return (torch.randn(*shape, dtype=torch.float32, device=device) * scale).to(dtype)
