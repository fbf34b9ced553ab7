"""End to end: an explanation's time and memory over a forward pass and over eager Gradient x Input.

    python -m bench.end_to_end [--quick] [--out results.json]

Contenders of a model run interleaved in one process, after a correctness gate; reported are medians of ratios
of neighbouring runs. Peak memory is that of a fresh process for each contender, above what loading the model
takes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxlrp

from .reference import gradient_times_input
from .timing import interleaved, ratio, versions
from .workloads import Built, ids, llama, make, vision

CONTENDERS = ("forward", "gradient x input", "fxlrp eager", "fxlrp inductor")


@dataclass(frozen=True)
class Workload:
    """A model and its inputs, with the limits that its ratios over Gradient x Input should keep."""

    name: str
    build: Callable[[], Built]
    eager_limit: float = 1.15
    inductor_limit: float = 1.0


def _encoder() -> Built:
    model = make(
        "SequenceClassification",
        "BertConfig",
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        vocab_size=30522,
    )
    return model, ids(30522, 4, 128)


def _seq2seq() -> Built:
    model = make(
        "Seq2SeqLM",
        "T5Config",
        d_model=256,
        d_ff=1024,
        num_layers=4,
        num_heads=8,
        d_kv=32,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return model, {**ids(32128, 2, 128), "decoder_input_ids": ids(32128, 2, 32)["input_ids"]}


def _decoder() -> Built:
    model = make(
        "CausalLM",
        "GPT2Config",
        n_embd=384,
        n_layer=6,
        n_head=6,
        vocab_size=50257,
        bos_token_id=0,
        eos_token_id=0,
    )
    return model, ids(50257, 2, 128)


WORKLOADS = (
    Workload("Llama 8x512, vocabulary 32,000, 1x256", functools.partial(llama, 256), inductor_limit=0.75),
    Workload("GPT-2 6x384, 2x128", _decoder),
    Workload("BERT classifier 6x384, 4x128", _encoder),
    Workload("ViT 6x384, 2x224 px", functools.partial(vision, 2)),
    Workload("Flan-T5 4+4x256, 2x(128+32)", _seq2seq),
)


def runners(
    model: nn.Module, inputs: dict[str, Tensor], names: tuple[str, ...]
) -> dict[str, Callable[[], Any]]:
    """What each contender does for one explanation; parameters need no gradient for any of them."""
    model.requires_grad_(False)
    eager = fxlrp.lrp_compile(model, backend="eager")
    inductor = fxlrp.lrp_compile(model, backend="inductor")

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    made: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "gradient x input": lambda: gradient_times_input(model, inputs),
        "fxlrp eager": lambda: eager(**inputs),
        "fxlrp inductor": lambda: inductor(**inputs),
    }
    return {name: made[name] for name in names}


def gate(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Correctness first: the gradient composite equals autograd, the ledger closes, both backends agree."""
    _, expected = gradient_times_input(model, inputs)
    gradient = fxlrp.lrp_compile(model, "gradient", backend="eager")
    found = gradient(**inputs).relevance
    found = found if isinstance(found, dict) else dict.fromkeys(expected, found)
    for name, reference in expected.items():
        scale = float(reference.abs().max())
        torch.testing.assert_close(found[name], reference, rtol=0, atol=1e-4 * scale)
    explanation = gradient.with_composite("attnlrp")(**inputs)
    if explanation.ledger.residual > 1e-4:
        raise AssertionError(f"the ledger does not close: {explanation.ledger.residual:.1e}")


def measure(workload: Workload, rounds: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Medians of interleaved runs, in seconds, and of ratios within a round."""
    model, inputs = workload.build()
    gate(model, inputs)
    run = runners(model, inputs, names)
    for function in run.values():
        function()
        function()
    times = interleaved(run, rounds)
    return {
        "workload": workload.name,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "over forward": {name: ratio(t, times["forward"]) for name, t in times.items()},
        "over gradient x input": {name: ratio(t, times["gradient x input"]) for name, t in times.items()},
    }


def peak(index: int, contender: str) -> float:
    """Peak memory in MiB of one contender above the loaded model, in a fresh process."""
    command = [sys.executable, "-m", "bench.end_to_end", "--peak", str(index), contender]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    )


def _peak_here(index: int, contender: str) -> float:
    model, inputs = WORKLOADS[index].build()
    run = runners(model, inputs, (contender,))[contender]
    run()  # traces and compiles; what that takes is not part of an explanation
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what tracing freed must not serve the explanation unseen
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text()
    high = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    return high - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


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
    fxlrp.lrp_compile(nn.Linear(2, 2).eval(), backend="eager")(
        torch.randn(2, 2)
    )  # torch's own first-use imports
    start = time.perf_counter()
    fxlrp.lrp_compile(model, backend="eager")(**inputs)
    return time.perf_counter() - start


def table(results: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | contender | over forward | over Gradient x Input | limit | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        workload = next(w for w in WORKLOADS if w.name == result["workload"])
        for name in names:
            limit = {"fxlrp eager": workload.eager_limit, "fxlrp inductor": workload.inductor_limit}.get(name)
            memory = result.get("peak MiB", {}).get(name)
            lines.append(
                f"| {result['workload']} | {name} | {result['over forward'][name]:.2f} | "
                f"{result['over gradient x input'][name]:.2f} | {'' if limit is None else f'≤ {limit}'} | "
                f"{'' if memory is None else f'{memory:.0f}'} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no memory, eager backend only")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", type=int, nargs="*", help="indices of workloads")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(_peak_here(int(options.peak[0]), options.peak[1]))
        return
    names = CONTENDERS[:3] if options.quick else CONTENDERS
    chosen = options.only if options.only is not None else range(len(WORKLOADS))
    results = []
    for i in chosen:
        print(f"{WORKLOADS[i].name} …", file=sys.stderr, flush=True)
        result = measure(WORKLOADS[i], 5 if options.quick else options.rounds, names)
        if not options.quick:
            result["peak MiB"] = {name: peak(i, name) for name in names}
        results.append(result)
    seconds = tracing()
    measured = versions()
    print(table(results, names))
    print(f"\nTracing and rewriting a 32-layer Llama: {seconds:.1f} s (limit 15 s)")
    print(", ".join(f"{k} {v}" for k, v in measured.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"versions": measured, "tracing 32 layers": seconds, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
