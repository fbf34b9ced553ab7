"""The papers' own models at full size, random weights from their configs, explained with one copy of them.

    python -m bench.papers [--only vit-b-16 flan-t5-xl llama-2-7b mixtral-8x7b] [--tokens 32] [--out FILE]

Each model runs in a fresh process: it is built, explained twice with ``attnlrp`` and accounted for. Printed
are the weights' size, the process's peak memory at each stage, and the seconds of the first explanation
(capture, checks against the model's output and gradient, rewriting) and of the second. A model that does not
fit into the memory at hand is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
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

from .timing import save

_GIB = 2**30


@dataclass(frozen=True)
class Paper:
    """A model of the papers' evaluations, and the memory that explaining it wants."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    gib: float


def _model(task: str, config: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """A model without the library's own initialisation, which takes minutes for billions of weights."""
    import transformers
    from transformers import initialization

    made = getattr(transformers, config)(**settings)
    with initialization.no_init_weights():
        model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(made, dtype=dtype)
    _fill(model)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module) -> None:
    """Random weights by copies of one random block, as large as keeps activations of size 1."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**22 + 7, generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = weight.view(-1)
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1
            scaled = (block * scale).to(weight.dtype)
            for start in range(0, flat.numel(), scaled.numel()):
                part = flat[start : start + scaled.numel()]
                part.copy_(scaled[: part.numel()])
            if weight.dim() == 1 and name.endswith("weight"):  # a norm's
                flat.add_(1.0)


def _ids(vocabulary: int, tokens: int) -> Tensor:
    return torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def _vit() -> nn.Module:
    return _model("ImageClassification", "ViTConfig", torch.float32, num_labels=1000)


def _flan_t5() -> nn.Module:
    return _model(
        "Seq2SeqLM",
        "T5Config",
        torch.bfloat16,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def _llama() -> nn.Module:
    return _model(
        "CausalLM",
        "LlamaConfig",
        torch.bfloat16,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    )


def _mixtral() -> nn.Module:
    return _model("CausalLM", "MixtralConfig", torch.bfloat16, num_local_experts=8, num_experts_per_tok=2)


PAPERS = (
    Paper(
        "vit-b-16",
        _vit,
        lambda tokens: {
            "pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        },
        4,
    ),
    Paper(
        "flan-t5-xl",
        _flan_t5,
        lambda tokens: {
            "input_ids": _ids(32128, tokens),
            "decoder_input_ids": _ids(32128, max(2, tokens // 4)),
        },
        12,
    ),
    Paper("llama-2-7b", _llama, lambda tokens: {"input_ids": _ids(32000, tokens)}, 20),
    Paper("mixtral-8x7b", _mixtral, lambda tokens: {"input_ids": _ids(32000, tokens)}, 100),
)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def explain(paper: Paper, tokens: int) -> dict[str, Any]:
    """Build and explain one model in this process."""
    model = paper.build()
    inputs = paper.inputs(tokens)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / _GIB
    result: dict[str, Any] = {"model": paper.name, "weights": weights, "peak built": _peak()}
    print(f"{paper.name}: {weights:.1f} GiB of weights, built", file=sys.stderr, flush=True)
    explainer = fxlrp.lrp_compile(model, backend="eager")
    for which in ("first", "second"):
        start = time.perf_counter()
        explanation = explainer(**inputs)
        result[which] = time.perf_counter() - start
        result[f"peak {which}"] = _peak()
        print(f"{paper.name}: {which} explanation {result[which]:.0f} s", file=sys.stderr, flush=True)
    result["capture"] = explainer.plan.notes[0].removeprefix("captured by ")
    result["residual"] = explanation.ledger.residual
    result["peak ledger"] = _peak()
    result["tokens"] = tokens
    return result


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table; memory in GiB."""
    lines = [
        "| model | weights | peak: built | explained | with ledger | first / s | second / s | residual |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "skipped" in r:
            lines.append(f"| {r['model']} | {r['skipped']} | | | | | | |")
            continue
        memory = (r["weights"], r["peak built"], r["peak second"], r["peak ledger"])
        cells = [*(f"{x:.1f}" for x in memory), f"{r['first']:.0f}", f"{r['second']:.1f}"]
        lines.append(f"| {r['model']} | {' | '.join(cells)} | {r['residual']:.0e} |")
    about = (
        f"torch {torch.__version__}, fxlrp {fxlrp.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {_memory():.0f} GiB of memory; sizes in GiB"
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    """Run the models one after another, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [paper.name for paper in PAPERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", type=int, default=32, help="length of the input (default: 32)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [paper for paper in PAPERS if paper.name in options.only]
    if options.here:
        print(json.dumps(explain(chosen[0], options.tokens)))
        return
    results = []
    for paper in chosen:
        if paper.gib > _memory():
            results.append({"model": paper.name, "skipped": f"needs {paper.gib:.0f} GiB of memory"})
            continue
        command = [sys.executable, "-m", "bench.papers", "--here", "--only", paper.name]
        done = subprocess.run(
            [*command, "--tokens", str(options.tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print(markdown(results))
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
