"""Explanations of whole models on the device, against eager Gradient x Input and a forward pass."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import fxlrp

from ..reference import gradient_times_input
from ..timing import interleaved
from ..workloads import Built, ids, make, vision

#: Kernels that ``lrp_compile`` knows.
KERNELS = ("attention", "gate", "linear_epsilon", "norm", "softmax")

#: How ``lrp_compile`` is asked, by contender.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fxlrp eager": {"backend": "eager"},
    "fxlrp inductor": {"backend": "inductor", "kernels": "reference"},
    "fxlrp kernels": {"backend": "inductor", "kernels": KERNELS},
}


@dataclass(frozen=True)
class Workload:
    """A model and its inputs, full for a device and tiny for the check that all of it runs."""

    name: str
    full: Callable[[], Built]
    tiny: Callable[[], Built]
    rounds: int = 10


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, words: int, length: int) -> Built:
    model = make(
        "CausalLM",
        "LlamaConfig",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=words,
        max_position_embeddings=max(length, 64),
    )
    return model, ids(words, 1, length)


WORKLOADS = (
    Workload(
        "Llama-like, 1B: 16 layers of 2048, 1×512",
        lambda: _llama(2048, 8192, 16, 32, 8, 128256, 512),
        lambda: _llama(32, 48, 2, 4, 2, 50, 7),
    ),
    Workload(
        "Llama-like, 1B: 16 layers of 2048, 1×4096",
        lambda: _llama(2048, 8192, 16, 32, 8, 128256, 4096),
        lambda: _llama(32, 48, 2, 4, 2, 50, 9),
        rounds=5,
    ),
    Workload("ViT 6×384, 32 images of 224 px", lambda: vision(32), lambda: vision(1)),
)


def measured(workload: Workload, device: torch.device, size: str = "full") -> Iterator[dict[str, Any]]:
    """A row as each way to explain is added: seconds, and the ratio to Gradient x Input of the same round.

    The gate: with the composite ``gradient`` the explanation is Gradient x Input, in float32.
    """
    _gate(workload, device)
    full = size == "full"
    dtype = torch.bfloat16 if full else torch.float32
    model, inputs = workload.full() if full else workload.tiny()
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
    model = model.to(device, dtype).requires_grad_(False)
    run: dict[str, Callable[[], Any]] = {
        "forward": lambda: _forward(model, inputs),
        "gradient × input": lambda: gradient_times_input(model, inputs),
    }
    failed: dict[str, str] = {}
    for name, settings in SETTINGS.items():
        if not full and settings["backend"] != "eager":
            continue
        try:
            explainer = fxlrp.lrp_compile(model, **settings)
            explainer(**inputs)  # compiles
        except Exception as error:  # one way's failure leaves the others' figures
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            run[name] = functools.partial(explainer, **inputs)
        times = interleaved(run, workload.rounds if full else 1)
        base = times["gradient × input"]
        ratios = {k: [a / b for a, b in zip(v, base, strict=True)] for k, v in times.items()}
        yield {
            "seconds": {k: statistics.median(v) for k, v in times.items()},
            "over gradient × input": {k: round(statistics.median(v), 3) for k, v in ratios.items()},
            "peak bytes": {k: _peak(call, device) for k, call in run.items()},
            **({"failed": failed} if failed else {}),
        }


def _gate(workload: Workload, device: torch.device) -> None:
    model, inputs = workload.tiny()
    model = model.to(device).requires_grad_(False)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    _, expected = gradient_times_input(model, inputs)
    found = fxlrp.lrp_compile(model, "gradient", backend="eager")(**inputs).relevance
    (wanted,) = expected.values()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def _forward(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
