"""End to end: an explanation's time and memory over a forward pass and over eager Gradient x Input.

    python -m bench.end_to_end [--quick] [--only I ...] [--out results.json]

Contenders of a model run interleaved in one process, after a correctness gate; reported are medians of ratios
of neighbouring runs. ``products`` is the distance to the limit: the matrix products of fxlrp's own graph
alone, replayed. First explanation and peak memory are those of a fresh process for each contender, the latter
above the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxlrp
from fxlrp.compiler.products import by_onednn, is_faster

from .peak import peak_above
from .products import replay
from .reference import gradient_times_input
from .subjects import SUBJECTS, Subject
from .timing import interleaved, ratio, save, versions
from .workloads import first_use, ids, make

FORWARD, GRADIENT, PRODUCTS = "forward", "gradient x input", "products"
EAGER, CP, INDUCTOR = "fxlrp eager", "fxlrp eager, cp", "fxlrp inductor"
CONTENDERS = (FORWARD, GRADIENT, PRODUCTS, EAGER, CP, INDUCTOR)
#: What an eager explanation may take over the graph's matrix products.
PRODUCTS_LIMIT = 1.2
#: What cp may take over attnlrp, which computes coefficients of queries and keys too.
CP_LIMIT = 0.88
#: Seconds that the rounds of one cell take; at least five rounds are run.
BUDGET = 25.0


class Contenders:
    """What each contender does for one explanation; parameters need no gradient for any of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.eager = fxlrp.lrp_compile(model, backend="eager")
        self.cp = fxlrp.lrp_compile(model, "cp", backend="eager")
        self.inductor = fxlrp.lrp_compile(model, backend="inductor")

    def runs(self, inputs: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
        """By name, ready to be timed."""

        def forward() -> Any:
            with torch.no_grad():
                return self.model(**inputs)

        made: dict[str, Callable[[], Any]] = {
            FORWARD: forward,
            GRADIENT: lambda: gradient_times_input(self.model, inputs),
            EAGER: lambda: self.eager(**inputs),
            CP: lambda: self.cp(**inputs),
            INDUCTOR: lambda: self.inductor(**inputs),
        }
        if PRODUCTS in names:
            self.eager(**inputs)
            names_of_inputs = [
                n.name for n in self.eager.relevance_graph.graph.nodes if n.op == "placeholder"
            ]
            graph = self.eager.relevance_graph
            graph = by_onednn(graph) if is_faster() else graph  # as it is when it runs
            made[PRODUCTS] = replay(graph, [inputs[n] for n in names_of_inputs])
        return {name: made[name] for name in names}


def gate(contenders: Contenders, inputs: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Correctness first: the gradient composite equals autograd, ledgers close, and backends agree.

    Raises:
        AssertionError: one of it does not hold.
    """
    model = contenders.model
    _, expected = gradient_times_input(model, inputs)
    gradient = fxlrp.lrp_compile(model, "gradient", backend="eager")
    found = gradient(**inputs).relevance
    found = found if isinstance(found, dict) else dict.fromkeys(expected, found)
    for name, reference in expected.items():
        scale = float(reference.abs().max())
        torch.testing.assert_close(found[name], reference, rtol=0, atol=1e-4 * scale)
    explanation = contenders.eager(**inputs)
    for checked in (explanation, contenders.cp(**inputs)):
        if checked.ledger.residual > 1e-4:
            raise AssertionError(f"the ledger does not close: {checked.ledger.residual:.1e}")
    if INDUCTOR in names:
        by_inductor = tree_leaves(contenders.inductor(**inputs).relevance)
        for compiled, eager in zip(by_inductor, tree_leaves(explanation.relevance), strict=True):
            torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4 * float(eager.abs().max()))


def measure(subject: Subject, names: tuple[str, ...], quick: bool) -> list[dict[str, Any]]:
    """Medians of interleaved runs, in seconds, and of ratios within a round, for each batch and length."""
    contenders = Contenders(subject.build())
    results = []
    for batch, length in subject.cells[:1] if quick else subject.cells:
        print(f"{subject.name}, {batch}x{length} ...", file=sys.stderr, flush=True)
        inputs = subject.inputs(batch, length)
        gate(contenders, inputs, names)
        run = contenders.runs(inputs, names)
        for function in run.values():
            function()
        once = sum(times[0] for times in interleaved(run, 1).values())
        times = interleaved(run, 5 if quick else round(min(15, max(5, BUDGET / once))))
        results.append(
            {
                "subject": subject.name,
                "batch": batch,
                "length": length,
                "rounds": len(times[FORWARD]),
                "seconds": {name: statistics.median(t) for name, t in times.items()},
                **{
                    f"over {other}": {name: ratio(t, times[other]) for name, t in times.items()}
                    for other in (FORWARD, GRADIENT, PRODUCTS, EAGER)
                },
            }
        )
    return results


def limits(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The figures of a cell that have a limit: what was found, and the limit."""
    subject = next(s for s in SUBJECTS if s.name == result["subject"])
    found = {
        f"{name} over {GRADIENT}": (result[f"over {GRADIENT}"][name], limit)
        for name, limit in subject.limits.items()
        if name in result["seconds"]
    }
    if PRODUCTS in result["seconds"]:
        found[f"{EAGER} over {PRODUCTS}"] = (result[f"over {PRODUCTS}"][EAGER], PRODUCTS_LIMIT)
    if CP in result["seconds"] and "Llama" in subject.name:
        found[f"{CP} over attnlrp"] = (result[f"over {EAGER}"][CP], CP_LIMIT)
    return found


def alone(index: int, contender: str) -> dict[str, float]:
    """One contender in a fresh process with an empty compile cache: seconds of its first explanation, which
    traces and compiles, and peak MiB of a later one above the loaded model.
    """
    command = [sys.executable, "-m", "bench.end_to_end", "--alone", str(index), contender]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _alone_here(index: int, contender: str) -> dict[str, float]:
    subject = SUBJECTS[index]
    inputs = subject.inputs(*subject.cells[0])
    first_use()
    run = Contenders(subject.build()).runs(inputs, (contender,))[contender]
    start = time.perf_counter()
    run()
    return {"first s": time.perf_counter() - start, "peak MiB": peak_above(run)}


def tracing() -> float:
    """Seconds for tracing and rewriting a 32-layer Llama, before any backend compiles."""
    model = make(
        "CausalLM",
        "LlamaConfig",
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    inputs = ids(1000, 2, 16)
    first_use()
    start = time.perf_counter()
    fxlrp.lrp_compile(model, backend="eager")(**inputs)
    return time.perf_counter() - start


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table: times over Gradient x Input, over the products, and limits."""
    names = [n for n in CONTENDERS if n in results[0]["seconds"]]
    lines = [
        f"| model | batch x length | {' | '.join(f'{n}' for n in names)} | eager over products | limits |",
        f"|---|---|{'---|' * len(names)}---|---|",
    ]
    for result in results:
        cells = [f"{result[f'over {GRADIENT}'][n]:.2f}" for n in names]
        missed = [
            f"{what} {found:.2f} > {limit}"
            for what, (found, limit) in limits(result).items()
            if found > limit
        ]
        lines.append(
            f"| {result['subject']} | {result['batch']}x{result['length']} | {' | '.join(cells)} | "
            f"{result[f'over {PRODUCTS}'][EAGER]:.2f} | {'; '.join(missed) or 'kept'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="first cells, five rounds, no memory, eager only"
    )
    parser.add_argument("--only", type=int, nargs="*", help="indices of models")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(_alone_here(int(options.alone[0]), options.alone[1])))
        return
    names = CONTENDERS[:-1] if options.quick else CONTENDERS
    measured, results = versions(), []
    seconds = tracing()
    for i in options.only if options.only is not None else range(len(SUBJECTS)):
        found = measure(SUBJECTS[i], names, options.quick)
        if not options.quick:
            by_name = {name: alone(i, name) for name in names if name != PRODUCTS}
            for what in ("first s", "peak MiB"):
                found[0][what] = {name: figures[what] for name, figures in by_name.items()}
        results += found
        if options.out:  # after each model, so that a run cut short leaves what it measured
            save(options.out, {"versions": measured, "tracing 32 layers": seconds, "results": results})
    print(f"Times over eager Gradient x Input:\n\n{table(results)}")
    print(f"\nTracing and rewriting a 32-layer Llama: {seconds:.1f} s (limit 15 s)")
    print(", ".join(f"{k} {v}" for k, v in measured.items()))


if __name__ == "__main__":
    main()
