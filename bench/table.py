"""The README's table: every model of the list with its checks and its time, as Markdown.

    python -m bench.table [--only NAME …] [--write README.md]

For each model, fp32 unless said otherwise: the largest relative error of ``gradient`` against autograd, the
largest ledger residual over all composites in fp32 and fp64, the largest relative difference between eager
and fused attention, and an attnlrp explanation's time (eager backend) over Gradient x Input, median of
interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxlrp

from .models import CASES, Case
from .reference import gradient_times_input

_RESULTS = Path(__file__).parent / "results" / "models_cpu.json"
_BEGIN, _END = "<!-- table of models: python -m bench.table --write README.md -->", "<!-- end of table -->"


def row(case: Case) -> dict[str, Any]:
    """One model's figures."""
    inputs = case.example()
    residual, error, difference = 0.0, 0.0, 0.0
    first: dict[str, dict[str, Tensor]] = {}
    for attention in case.attentions:
        model = case.model(attention)
        explainer = fxlrp.lrp_compile(model, "gradient", backend="eager")
        _, expected = gradient_times_input(model, inputs)
        found = _named(explainer(**inputs).relevance, expected)
        error = max(error, *(_error(found[name], expected[name]) for name in expected))
        for composite in fxlrp.composites:
            explanation = explainer.with_composite(composite)(**inputs)
            residual = max(residual, explanation.ledger.residual)
            relevance = _named(explanation.relevance, expected)
            reference = first.setdefault(composite, relevance)
            difference = max(difference, *(_error(relevance[name], reference[name]) for name in expected))
    return {
        "model": case.name,
        "gradient": error,
        "ledger": residual,
        "ledger64": _double(case),
        "eager": difference if len(case.attentions) > 1 else None,
    }


def _double(case: Case) -> float | None:
    model, inputs = case.model(dtype=torch.float64), case.example(torch.float64)
    try:
        explainer = fxlrp.lrp_compile(model, backend="eager")
        return max(explainer.with_composite(c)(**inputs).ledger.residual for c in fxlrp.composites)
    except fxlrp.InputError:  # the model itself does not run in float64
        return None


def _time(case: Case, rounds: int = 25) -> float:
    model, inputs = case.model().requires_grad_(False), case.example(batch=4, length=64)
    explainer = fxlrp.lrp_compile(model, backend="eager")
    ratios = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        gradient_times_input(model, inputs)
        middle = time.perf_counter()
        explainer(**inputs)
        if i >= 3:
            ratios.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(ratios)


def _named(relevance: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return relevance if isinstance(relevance, dict) else dict.fromkeys(expected, relevance)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| model | gradient vs autograd | ledger fp32 | ledger fp64 | eager vs SDPA "
        "| time / Gradient×Input |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["gradient"], r["ledger"], r["ledger64"], r["eager"]]
        lines.append(
            f"| {r['model']} | "
            + " | ".join("–" if c is None else f"{c:.0e}" for c in cells)
            + (f" | {r['time']:.2f} |" if "time" in r else " | – |")
        )
    versions = (
        f"torch {torch.__version__}, fxlrp {fxlrp.__version__}, CPU with {torch.get_num_threads()} threads"
    )
    try:
        import transformers

        versions += f", transformers {transformers.__version__}"
    except ImportError:
        pass
    return "\n".join(
        [*lines, "", f"Measured with {versions}; tiny models with random weights, biases included."]
    )


def main() -> None:
    """Print the table, or put it into a file between its markers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    parser.add_argument("--checks", action="store_true", help="checks only; timings need a quiet machine")
    parser.add_argument(
        "--time", action="store_true", help="timings only, beside checks that were run before"
    )
    options = parser.parse_args()
    known: dict[str, dict[str, Any]] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    cases = [c for c in CASES if not options.only or c.name in options.only]
    rows = []
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        if not options.time:
            known[case.name] = {**known.get(case.name, {}), **row(case)}
        if not options.checks:
            known[case.name] = {**known.get(case.name, {}), "time": _time(case)}
        _RESULTS.write_text(json.dumps(known, indent=1))
        rows.append(known[case.name])
    text = markdown(rows)
    print(text)
    if options.write:
        whole = options.write.read_text()
        head, rest = whole.split(_BEGIN)
        options.write.write_text(f"{head}{_BEGIN}\n{text}\n{_END}{rest.split(_END)[1]}")


if __name__ == "__main__":
    main()
