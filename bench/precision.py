"""Half precision: the error of relevance over that of Gradient x Input by autograd in the same precision.

    python -m bench.precision [--only NAME …] [--composite attnlrp] [--out results.json]

Each error is ``|R - R64| / |R64|`` (Euclidean) with R64 the same explanation of the same, rounded weights in
float64, of the class that each predicts. Models are tiny, with random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxlrp

from .models import CASES, Case
from .reference import gradient_times_input
from .timing import save, versions

DTYPES = (torch.bfloat16, torch.float16)
#: What the error may be over that of autograd.
LIMIT = 2.0


def errors(case: Case, dtype: torch.dtype, composite: str = "attnlrp") -> tuple[float, float]:
    """The relative error of a composite and of Gradient x Input by autograd."""
    half, full = _one_by_one(case.model(dtype=dtype)), _one_by_one(case.model(dtype=dtype)).double()
    narrow, wide = _inputs(case, dtype, dtype), _inputs(case, dtype, torch.float64)
    _, plain = gradient_times_input(half, narrow)
    _, exact = gradient_times_input(full, wide)
    found = fxlrp.lrp_compile(half, composite, backend="eager")(**narrow)
    reference = fxlrp.lrp_compile(full, composite, backend="eager")(**wide)
    return _error(_named(found.relevance), _named(reference.relevance)), _error(plain, exact)


def _one_by_one(model: nn.Module) -> nn.Module:
    """A model whose experts, if it has any, are products of their own: grouped ones take no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _inputs(case: Case, rounded: torch.dtype, dtype: torch.dtype) -> dict[str, Tensor]:
    given = case.example(rounded)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}


def _named(relevance: Any) -> dict[str, Tensor]:
    return relevance if isinstance(relevance, dict) else {"": relevance}


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    pairs = list(zip(found.values(), exact.values(), strict=True))
    difference = sum(float((f.double() - e.double()).square().sum()) for f, e in pairs)
    return float((difference / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5)


def measure(cases: list[Case], composite: str) -> list[dict[str, Any]]:
    """Errors of all models in all precisions."""
    found = []
    for case in cases:
        for dtype in DTYPES:
            ours, theirs = errors(case, dtype, composite)
            name = str(dtype).split(".")[-1]
            found.append({"model": case.name, "dtype": name, "error": ours, "autograd": theirs})
    return found


def table(results: list[dict[str, Any]], composite: str) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| model | dtype | {composite} | Gradient × Input, autograd | ratio | limit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['dtype']} | {r['error']:.1e} | {r['autograd']:.1e} "
        f"| {r['error'] / r['autograd']:.2f} | ≤ {LIMIT:g} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--composite", default="attnlrp")
    parser.add_argument("--quick", action="store_true", help="the first two models")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    cases = [c for c in CASES if not options.only or c.name in options.only]
    results = measure(cases[:2] if options.quick else cases, options.composite)
    print(table(results, options.composite))
    if options.out:
        data = {"versions": versions(), "composite": options.composite, "limit": LIMIT, "results": results}
        save(options.out, data)


if __name__ == "__main__":
    main()
