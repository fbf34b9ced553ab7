"""The parts of a run, each in a process of its own and within a time of its own: tests, kernels, models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import attention, end_to_end, linear, measure, rows
from .cases import Case

REPOSITORY = Path(__file__).parents[2]
#: A row of results: what it is about, and figures, or ``error``.
Row = dict[str, Any]

CASES: Mapping[str, tuple[Case, ...]] = {
    "rows": rows.CASES,
    "linear": linear.CASES,
    "attention": attention.CASES,
}


@dataclass(frozen=True)
class Part:
    """One part: its time in seconds, what it yields, and what it would do, for those who have no device.

    Attributes:
        name: on the command line.
        limit: its seconds, and what earlier parts left of theirs; then it is ended, and its rows are kept.
        run: yields rows on a device.
        plan: a line for each thing that it does.
    """

    name: str
    limit: int
    run: Callable[[torch.device], Iterator[Row]]
    plan: tuple[str, ...]


def _tests(device: torch.device) -> Iterator[Row]:
    """The kernels' tests on the device; several processes, since compiling takes most of the time."""
    report = REPOSITORY / "out" / "gpu-tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", f"--junitxml={report}", "-q"]
    if _has("xdist"):
        command += ["-n", "8"]
    yield {"what": "tests on the device", **_pytest(command, report)}


def _memcheck(device: torch.device) -> Iterator[Row]:
    """Some tests of each kernel under compute-sanitizer, which sees every access out of bounds."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield {"what": "memcheck", "error": "no compute-sanitizer on the PATH"}
        return
    report = REPOSITORY / "out" / "gpu-memcheck.xml"
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "0"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "-m",
        "gpu",
        "-k",
        "layouts or strides or masked_rows",
    ]
    # Memory that PyTorch keeps in larger pieces hides what is read and written beside a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += ["-p", "no:xdist", "-q", f"--junitxml={report}"]
    yield {"what": "memcheck", **_pytest(command, report, uncached)}


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _pytest(command: list[str], report: Path, variables: Mapping[str, str] | None = None) -> Row:
    report.parent.mkdir(exist_ok=True)
    environment = {**os.environ, **(variables or {})}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    counts: Row = {"exit": result.returncode}
    if report.exists():
        suite = next(ET.parse(report).getroot().iter("testsuite"))
        counts |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if result.returncode:
        counts["error"] = (result.stdout + result.stderr)[-3000:]
    return counts


def _kernels(part: str, device: torch.device) -> Iterator[Row]:
    """Each case of a part: gate, times, lines."""
    ceilings = measure.ceilings(device)
    yield {"what": "ceilings", "ceilings": ceilings}
    for case in CASES[part]:
        row: Row = {"what": case.label, "kernel": case.kernel, "lines": _unreached(case)}
        row["decides"] = (case.cases or (case.kernel,)) if case.decides else ()
        row |= _tried(lambda case=case: measure.measured(case, device, ceilings["copy"]))
        torch.cuda.empty_cache()
        yield row
    if part == "attention":
        yield {"what": "attention: peak memory", "kernel": "attention"} | _tried(lambda: _memory(device))


def _unreached(case: Case) -> list[Row]:
    return [{"line": str(line), "figure": None, "met": False} for line in case.lines]


def _memory(device: torch.device) -> Row:
    lengths = (8192, 16384, 32768)
    found = attention.peaks(lengths, device)
    growth = found[2] / found[1]
    line = {"line": "≤ 2.1 × of half the positions, at 32,768", "figure": growth, "met": growth <= 2.1}
    return {"peaks": dict(zip(map(str, lengths), found, strict=True)), "lines": [line]}


def _models(device: torch.device) -> Iterator[Row]:
    for workload in end_to_end.WORKLOADS:
        row: Row = {"what": workload.name}
        try:
            for found in end_to_end.measured(workload, device):
                yield row | found
        except Exception as error:  # recorded; the other models go on
            yield row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        torch.cuda.empty_cache()


def _planned(part: str) -> tuple[str, ...]:
    return tuple(
        f"{case.label}: {', '.join(map(str, case.lines)) or 'for information'}" for case in CASES[part]
    )


PARTS = (
    Part("tests", 100, _tests, ("pytest tests/kernels -m gpu",)),
    Part("rows", 90, lambda device: _kernels("rows", device), _planned("rows")),
    Part("linear", 70, lambda device: _kernels("linear", device), _planned("linear")),
    Part("attention", 50, lambda device: _kernels("attention", device), _planned("attention")),
    Part("models", 130, _models, tuple(w.name for w in end_to_end.WORKLOADS)),
    Part("memcheck", 40, _memcheck, ("compute-sanitizer, memcheck, a test or two of each kernel",)),
)


def dry(device: torch.device) -> Iterator[Row]:
    """Every benchmark's gate at a tiny size: what can be run of them without a GPU.

    In float32, since Triton's interpreter holds bfloat16 as integers and multiplies those.
    """
    for case in (case for cases in CASES.values() for case in cases):
        row: Row = {"what": f"{case.kernel}: {case.name}", "kernel": case.kernel}
        yield row | _tried(lambda case=case: _tiny(case, device))
    for workload in end_to_end.WORKLOADS:
        row = {"what": workload.name}
        yield row | _tried(lambda of=workload: list(end_to_end.measured(of, device, "tiny"))[-1])


def _tiny(case: Case, device: torch.device) -> Row:
    setup = measure.gate(replace(case, dtype=torch.float32), "tiny", device)
    return {"contenders": sorted(setup.calls)}


def _tried(run: Callable[[], Row]) -> Row:
    """What it gives, or its error as a row: the others go on."""
    try:
        return run()
    except Exception as error:  # recorded
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
