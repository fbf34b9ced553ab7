"""Accuracy first, then time on the device: CUDA graphs over inputs that the cache does not hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Setup, double, nbytes, normal, outputs_of

_SECONDS = 0.15  # of measuring one contender
_LEAST, _MOST = 5, 200  # repetitions of it
_FULL_TOLERANCE = 0.05


class GateError(AssertionError):
    """A kernel that computes something else than it should is not timed."""


def gate(case: Case, size: str, device: torch.device) -> Setup:
    """Check against float64: the largest error is at most twice that of unfused PyTorch, plus an ulp.

    Raises:
        GateError: it is more.
    """
    torch.manual_seed(0)
    setup = case.setup(case.shapes[size], case.dtype, device)
    found, eager = outputs_of(setup.calls["kernel"]()), outputs_of(setup.calls["eager"]())
    for i, (ours, theirs, exact) in enumerate(zip(found, eager, outputs_of(setup.exact()), strict=True)):
        error, allowed = _distance(ours, exact), 2 * _distance(theirs, exact)
        floor = torch.finfo(ours.dtype).eps * float(exact.abs().max())
        if not error <= allowed + floor:
            raise GateError(
                f"output {i}: error {error:.2e}, PyTorch's own {allowed / 2:.2e}, an ulp {floor:.2e}"
            )
    return setup


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((double(found) - exact).abs().max())


def gate_full(setup: Setup) -> None:
    """Check the kernel at full size against unfused PyTorch of the same precision.

    Raises:
        GateError: they differ by more than a twentieth of the largest value.
    """
    found, eager = outputs_of(setup.calls["kernel"]()), outputs_of(setup.calls["eager"]())
    for i, (ours, theirs) in enumerate(zip(found, eager, strict=True)):
        off = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        if not off <= _FULL_TOLERANCE:
            raise GateError(f"output {i} at full size: off by {off:.2e} of the largest value")


def setups(case: Case, device: torch.device) -> list[Setup]:
    """The case at full size with inputs as often as three times the cache needs, at most 16 times."""
    first = case.setup(case.shapes["full"], case.dtype, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(16, max(1, math.ceil(3 * cache / first.traffic)))
    return [first, *(case.setup(case.shapes["full"], case.dtype, device) for _ in range(copies - 1))]


def seconds(calls: Sequence[Callable[[], Any]], captured: bool = True) -> float:
    """Median seconds of one call, over a graph of all calls, or of the calls as they are launched."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    run = _graph(calls) if captured else _loop(calls)
    run()
    once = _time(run)
    repeats = min(_MOST, max(_LEAST, int(_SECONDS / once)))
    return statistics.median(_time(run) for _ in range(repeats)) / len(calls)


def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _loop(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _time(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device does at best: bytes a second of a copy, operations a second of a bf16 product."""
    source = normal((1 << 29,), torch.bfloat16, device)
    target = torch.empty_like(source)
    copy = seconds([lambda: target.copy_(source)])
    found = {"copy": nbytes([source, target]) / copy}
    a, b = (normal((8192, 8192), torch.bfloat16, device) for _ in range(2))
    product = seconds([lambda: a @ b])
    return {**found, "bf16": 2 * 8192**3 / product}


def measured(case: Case, device: torch.device, copy: float) -> dict[str, Any]:
    """Times of all contenders and the case's lines; a contender that fails is left out with its message."""
    gate(case, "gate", device)
    prepared = setups(case, device)
    gate_full(prepared[0])
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in prepared[0].calls:
        try:
            captured = name not in prepared[0].uncaptured
            times[name] = seconds([setup.calls[name] for setup in prepared], captured)
        except Exception as error:  # one contender's failure leaves the others' figures
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    first = prepared[0]
    row: dict[str, Any] = {
        "seconds": times,
        "copies": len(prepared),
        "bytes": first.traffic,
        "flops": first.flops,
    }
    if failed:
        row["failed"] = failed
    row["lines"] = []
    for line in case.lines:
        contenders = {"kernel"} if line.against == "copy" else {"kernel", line.against}
        if contenders <= set(times):
            figure = line.figure(times, first.traffic, copy)
            row["lines"].append({"line": str(line), "figure": round(figure, 3), "met": line.met(figure)})
        else:
            row["lines"].append({"line": str(line), "figure": None, "met": False})
    return row
