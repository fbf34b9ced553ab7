"""Eight targets in one call over eight calls.

    python -m bench.targets [--quick] [--count K] [--out results.json]

One explanation of K classes per sample and K explanations of one class run interleaved in one process, after
a correctness gate; reported are medians of times and of ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxlrp

from .timing import interleaved, ratio, save, versions
from .workloads import Built, ids, llama, make, vision


def _bert() -> Built:
    model = make("SequenceClassification", "BertConfig", num_labels=16)
    return model, ids(30522, 1, 128)


#: Name, model and inputs, classes to choose from, and whether its targets are a span of its own tokens.
WORKLOADS: tuple[tuple[str, Callable[[], Built], int, bool], ...] = (
    ("Llama-like: 8 layers of 512, 128 tokens, 8 classes", functools.partial(llama, 128), 32000, False),
    ("Llama-like: 8 layers of 512, 128 tokens, a span of 8", functools.partial(llama, 128), 32000, True),
    ("BERT-base-like: 12 layers of 768, 128 tokens, 8 classes", _bert, 16, False),
    ("ViT-small-like: 6 layers of 384, 197 patches, 8 classes", functools.partial(vision, 1), 1000, False),
)
#: Time of one call of eight targets over eight calls that no workload should exceed.
LIMIT = 0.6


def measure(index: int, count: int, rounds: int) -> dict[str, Any]:
    """Medians of interleaved runs, in seconds, and of their ratio within a round."""
    name, build, classes, spans = WORKLOADS[index]
    model, inputs = build()
    explainer = fxlrp.lrp_compile(model.requires_grad_(False), backend="eager")
    singles: list[Any]
    if spans:
        text = inputs["input_ids"]
        together: Any = fxlrp.Span(100, 100 + count)
        singles = [fxlrp.Logit(text[:, p], position=p - 1) for p in range(100, 100 + count)]
    else:
        singles = list(range(3, min(3 + count, classes)))
        together = list(singles)

    def at_once() -> Tensor:
        found: Tensor = explainer(**inputs, target=together).relevance  # type: ignore[assignment]
        return found

    def one_by_one() -> list[Tensor]:
        return [explainer(**inputs, target=t).relevance for t in singles]  # type: ignore[misc]

    expected = torch.stack(one_by_one(), 1)
    torch.testing.assert_close(at_once(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    runs: dict[str, Callable[[], Any]] = {"one call": at_once, "a call each": one_by_one}
    times = interleaved(runs, rounds)
    return {
        "workload": name,
        "targets": len(singles),
        "seconds": {run: statistics.median(t) for run, t in times.items()},
        "ratio": ratio(times["one call"], times["a call each"]),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | targets | one call, ms | a call each, ms | ratio | limit |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds = result["seconds"]
        lines.append(
            f"| {result['workload']} | {result['targets']} | {seconds['one call'] * 1e3:.0f} | "
            f"{seconds['a call each'] * 1e3:.0f} | {result['ratio']:.2f} | ≤ {LIMIT} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=8, help="how many targets")
    parser.add_argument("--only", type=int, nargs="*", help="indices of workloads")
    parser.add_argument("--out", type=Path, help="write JSON here, and the table beside it")
    options = parser.parse_args()
    chosen = options.only if options.only is not None else range(len(WORKLOADS))
    measured = versions()
    results = [measure(i, options.count, 3 if options.quick else options.rounds) for i in chosen]
    said = ", ".join(f"{k} {v}" for k, v in measured.items())
    print(f"{table(results)}\n\n{said}")
    if options.out:
        save(options.out, {"versions": measured, "results": results})
        options.out.with_suffix(".md").write_text(f"{table(results)}\n\n{said}\n")


if __name__ == "__main__":
    main()
