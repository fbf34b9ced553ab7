"""Memory of an explanation over that of Gradient x Input by autograd, and what lower budgets cost in time.

    python -m bench.memory [--layers 8] [--length 2048] [--out results.json]

A Llama-like decoder of width 512. Each contender's peak is that of a fresh process, above the loaded model,
after one explanation that traces; times are of interleaved explanations in one process, after a check that
relevance is equal with every budget. Autograd keeps what any eager implementation of LRP on top of it keeps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxlrp

from .peak import peak_above
from .reference import gradient_times_input
from .timing import interleaved, ratio, save, versions
from .workloads import Built, ids, make

AUTOGRAD = "gradient x input"
#: Shares of the default that are measured between it and the least.
_SHARES = (0.75, 0.5)
#: What the default and the least budget should take of autograd's memory, and of the default's time.
LIMITS = {"default": (0.7, 1.0), "least": (0.3, 1.4)}


def model(layers: int, length: int, width: int = 512, vocabulary: int = 32000) -> Built:
    """A Llama-like decoder and one text."""
    made = make(
        "CausalLM",
        "LlamaConfig",
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
    )
    return made.requires_grad_(False), ids(vocabulary, 1, length)


def budgets(explainer: fxlrp.Explainer) -> dict[str, float | None]:
    """Names and budgets of what is measured, from an explainer that has been called."""
    least = explainer.memory.least_share
    return {"default": None, **{f"{s}": s for s in _SHARES if s > least}, "least": least}


def peak_here(layers: int, length: int, budget: str) -> float:
    """Peak MiB of one explanation in this process above what it held before."""
    net, inputs = model(layers, length)
    run: Callable[[], Any]
    if budget == AUTOGRAD:
        run = lambda: gradient_times_input(net, inputs)  # noqa: E731
    else:
        share = None if budget == "None" else float(budget)
        explainer = fxlrp.lrp_compile(net, backend="eager", memory_budget=share)
        run = lambda: explainer(**inputs)  # noqa: E731
    return peak_above(run)


def measure(layers: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    net, inputs = model(layers, length)
    default = fxlrp.lrp_compile(net, backend="eager")
    expected = default(**inputs).relevance
    chosen = budgets(default)
    explainers = {
        name: default if b is None else fxlrp.lrp_compile(net, backend="eager", memory_budget=b)
        for name, b in chosen.items()
    }
    for name, explainer in explainers.items():
        if not torch.equal(explainer(**inputs).relevance, expected):
            raise AssertionError(f"relevance differs with the budget {name}")
    run: dict[str, Callable[[], Any]] = {AUTOGRAD: lambda: gradient_times_input(net, inputs)}
    run |= {name: (lambda e=e: e(**inputs)) for name, e in explainers.items()}
    times = interleaved(run, rounds)
    rows = []
    for name in run:
        command = [sys.executable, "-m", "bench.memory", "--layers", str(layers), "--length", str(length)]
        command += ["--peak", name if name == AUTOGRAD else str(chosen[name])]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        estimate = explainers[name].memory.chosen.peak / 2**20 if name in explainers else None
        rows.append(
            {
                "contender": name,
                "budget": chosen.get(name),
                "peak MiB": float(said.strip().splitlines()[-1]),
                "estimated MiB": estimate,
                "seconds": statistics.median(times[name]),
                "time over default": ratio(times[name], times["default"]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    autograd = next(r["peak MiB"] for r in rows if r["contender"] == AUTOGRAD)
    lines = [
        "| contender | budget | peak MiB | over autograd | limit | estimated | over default's time | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        most, slow = LIMITS.get(r["contender"], (None, None))
        estimate = "" if r["estimated MiB"] is None else f"{r['estimated MiB']:.0f}"
        lines.append(
            f"| {r['contender']} | {r['budget'] or ''} | {r['peak MiB']:.0f} "
            f"| {r['peak MiB'] / autograd:.2f} | "
            f"{'' if most is None else f'≤ {most}'} | {estimate} | {r['time over default']:.2f} | "
            f"{'' if slow is None else f'≤ {slow}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write JSON here, and the table beside it")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="2 layers, 128 tokens, 3 rounds")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.length, options.rounds = 2, 128, 3
    if options.peak:
        print(peak_here(options.layers, options.length, options.peak))
        return
    measured = {**versions(), "layers": options.layers, "length": options.length}
    rows = measure(options.layers, options.length, options.rounds)
    text = f"{table(rows)}\n\n{', '.join(f'{k} {v}' for k, v in measured.items())}"
    print(text)
    if options.out:
        save(options.out, {"versions": measured, "rows": rows})
        options.out.with_suffix(".md").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
