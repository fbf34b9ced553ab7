"""Benchmarks that need a GPU run without one as far as they can, and say what they would do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bench.gpu import report
from bench.gpu.cases import Line
from bench.gpu.parts import CASES, PARTS

REPOSITORY = Path(__file__).parents[2]


def _bench(*args):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", *args]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_gate_of_every_benchmark_passes_in_the_interpreter():
    """Would break if a benchmark could not run, or compared the kernel with something else."""
    result = _bench("--dry-run")
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(row["what"], row["error"]) for row in rows if "error" in row] == []
    assert result.returncode == 0, result.stderr
    assert len(rows) > sum(map(len, CASES.values()))
    assert {row["kernel"] for row in rows if "kernel" in row} == {
        case.kernel for cases in CASES.values() for case in cases
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_it_would_run_and_what_to_do():
    """Would break if a run without a device looked like one that measured something."""
    result = _bench("--out", "nowhere")
    assert result.returncode == 2
    assert "python -m bench.gpu --out DIR" in result.stderr
    for part in PARTS:
        assert all(line in result.stdout for line in part.plan)
    assert not (REPOSITORY / "nowhere").exists()


def test_all_parts_fit_into_eight_minutes():
    """Would break if a part's limit were raised without another's being lowered."""
    assert sum(part.limit for part in PARTS) <= 480


def test_lines_are_met_from_their_bound_on():
    """Would break if a verdict were the wrong way round."""
    seconds = {"kernel": 2.0, "eager": 3.0}
    faster, slower = Line("eager", at_least=1.5), Line("eager", at_least=1.6)
    assert faster.met(faster.figure(seconds, 0, 1.0)) and not slower.met(slower.figure(seconds, 0, 1.0))
    short, long = Line("eager", at_most=0.6), Line("eager", at_most=0.7)
    assert not short.met(short.figure(seconds, 0, 1.0)) and long.met(long.figure(seconds, 0, 1.0))
    copy = Line("copy", at_least=0.85)
    assert copy.figure(seconds, 170, 100.0) == 0.85
    assert copy.met(0.85) and not copy.met(0.84)


def _results():
    def row(kernel, ours, theirs, **others):
        seconds = {"kernel": ours, "eager": theirs, "inductor": 1.0}
        line = {"line": "≥ 1 × speed of inductor", "figure": 1.0 / ours, "met": ours <= 1.0}
        return {
            "what": f"{kernel}, {ours}",
            "kernel": kernel,
            "decides": (kernel,),
            "seconds": seconds,
            "bytes": 8,
            "flops": 0,
            "lines": [line],
            **others,
        }

    return {
        "about": {"device": "GPU", "torch": "2"},
        "parts": {
            "rows": {
                "rows": [
                    row("softmax", 0.5, 2.0),
                    row("norm", 0.5, 2.0),
                    row("norm", 1.5, 2.0),
                    {"what": "gate", "kernel": "gate", "decides": ("gate",), "error": "GateError: off"},
                    row("softmax", 1.5, 2.0, decides=()),
                    row("attention", 0.5, 2.0, decides=("attention", "attention_frozen")),
                    row("attention", 1.5, 2.0, decides=("attention",)),
                ],
                "ended": "ended after 70 s",
            }
        },
    }


FASTER = {"softmax": True, "norm": False, "gate": False, "attention": False, "attention_frozen": True}


def test_a_kernel_is_faster_only_where_it_is_in_all_its_benchmarks():
    """Would break if a kernel that lost or failed somewhere were chosen."""
    assert report.faster(_results()) == FASTER


def test_the_table_of_measured_kernels_is_python():
    """Would break if what a run writes could not be put into measured.py."""
    from types import MappingProxyType
    from typing import Final

    text = report.table("GPU", report.faster(_results()), {"other": {"softmax": False}})
    scope = {"MappingProxyType": MappingProxyType, "Final": Final, "Mapping": dict}
    exec(text, scope)
    assert scope["MEASURED"] == {
        "other": {"softmax": False},
        "GPU": FASTER,
    }


def test_the_report_shows_verdicts_and_failures():
    """Would break if a missed line or a part that was ended were not in the page."""
    text = report.markdown(_results())
    assert "**missed**" in text and "reached" in text
    assert "GateError: off" in text and "ended after 70 s" in text
