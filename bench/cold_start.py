"""Cold start: seconds to the first explanation in a fresh process, by depth.

    python -m bench.cold_start [--layers 4 32] [--backend inductor] [--out results.json]

Layers that are alike compile once, so that a model of 32 layers should take at most 1.5 times what one of 4
does.
Each depth runs in a process of its own with an empty compile cache ("cold"), and again with what the
first one left there ("warm"). Tracing counts; loading PyTorch and making the model do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fxlrp

from .timing import save, versions
from .workloads import first_use, ids, make

#: What 32 layers may take over 4.
LIMIT = 1.5


def first_explanation(layers: int, backend: str) -> dict[str, Any]:
    """Seconds of the first explanation here, of that up to the relevance graph, and of the second one."""
    model = make(
        "CausalLM",
        "LlamaConfig",
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    inputs = ids(1000, 2, 16)
    first_use()
    explainer = fxlrp.lrp_compile(model, backend=backend)
    start = time.perf_counter()
    explainer(**inputs)
    first = time.perf_counter() - start
    start = time.perf_counter()
    found = explainer(**inputs).relevance
    second = time.perf_counter() - start
    compiled = torch._dynamo.utils.counters["inductor"]
    start = time.perf_counter()
    expected = fxlrp.lrp_compile(model, backend="eager")(**inputs).relevance
    traced = time.perf_counter() - start
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    return {
        "seconds": first,
        "again": second,
        "traced": traced,
        "compiled": compiled["fxgraph_cache_miss"],
        "from cache": compiled["fxgraph_cache_hit"],
    }


def fresh(layers: int, backend: str, cache: str) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "bench.cold_start", "--here", str(layers), "--backend", backend]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| layers | cache | first explanation, s | over fewest layers | of it tracing, s | compiled | "
        "from cache | second explanation, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        base = next(b for b in results if b["cache"] == r["cache"])
        lines.append(
            f"| {r['layers']} | {r['cache']} | {r['seconds']:.1f} | {r['seconds'] / base['seconds']:.2f} | "
            f"{r['traced']:.1f} | {r['compiled']} | {r['from cache']} | {1e3 * r['again']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--quick", action="store_true", help="2 and 4 layers")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(first_explanation(options.here, options.backend)))
        return
    results = []
    for layers in (2, 4) if options.quick else sorted(options.layers):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                print(f"{layers} layers, {state} …", file=sys.stderr, flush=True)
                results.append({"layers": layers, "cache": state, **fresh(layers, options.backend, cache)})
    measured = versions()
    print(table(results))
    print(f"\nLimit for 32 layers over 4, cold: {LIMIT}")
    print(", ".join(f"{k} {v}" for k, v in measured.items()))
    if options.out:
        save(options.out, {"versions": measured, "limit": LIMIT, "results": results})


if __name__ == "__main__":
    main()
