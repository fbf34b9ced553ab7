"""How benchmarks take times, interleaved in one process, and what they keep of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fxlrp
from fxlrp.kernels import measured


def interleaved(run: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, function in run.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of ratios within a round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def versions() -> dict[str, Any]:
    """What is measured on, and the load beforehand: ratios of a busy machine scatter."""
    is_gpu = torch.cuda.is_initialized()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fxlrp": fxlrp.__version__,
        "device": torch.cuda.get_device_name() if is_gpu else measured.processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def save(path: Path, results: Any) -> None:
    """Results as JSON, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
