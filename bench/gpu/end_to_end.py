"""Explanations of whole models on the device, against eager Gradient x Input and a forward pass."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fxlrp

from ..reference import gradient_times_input
from ..timing import interleaved, ratio
from ..workloads import Built, ids, make

#: Kernels that ``lrp_compile`` knows.
KERNELS = ("attention", "gate", "linear_epsilon", "linear_split", "norm", "softmax")

#: How ``lrp_compile`` is asked, by contender.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fxlrp eager": {"backend": "eager"},
    "fxlrp inductor": {"backend": "inductor", "kernels": "reference"},
    "fxlrp kernels": {"backend": "inductor", "kernels": KERNELS},
    "fxlrp cudagraphs": {"backend": "cudagraphs", "kernels": "reference"},
}


@dataclass(frozen=True)
class Workload:
    """A model and its inputs, full for a device and tiny for the check that all of it runs.

    Attributes:
        name: of the model and its inputs.
        full: makes both.
        tiny: the same for a CPU.
        rounds: of interleaved runs.
        limits: what a way to explain may take over Gradient x Input.
    """

    name: str
    full: Callable[[], Built]
    tiny: Callable[[], Built]
    rounds: int = 10
    limits: Mapping[str, float] = field(default_factory=dict)


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


def _bert(batch: int, length: int, **sizes: int) -> Built:
    model = make("SequenceClassification", "BertConfig", **sizes)
    return model, ids(model.config.vocab_size, batch, length)


def _images(batch: int, **sizes: int) -> Built:
    model = make("ImageClassification", "ViTConfig", num_labels=1000, **sizes)
    generator = torch.Generator().manual_seed(0)
    return model, {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator)}


_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

WORKLOADS = (
    Workload(
        "Llama-3.2-1B shape, 1×128",
        lambda: _llama(2048, 8192, 16, 32, 8, 128256, 128),
        lambda: _llama(32, 48, 2, 4, 2, 50, 7),
        limits={"fxlrp cudagraphs": 0.35},
    ),
    Workload(
        "Llama-3.2-1B shape, 1×2048",
        lambda: _llama(2048, 8192, 16, 32, 8, 128256, 2048),
        lambda: _llama(32, 48, 2, 4, 2, 50, 9),
        rounds=5,
        limits={"fxlrp inductor": 0.9},
    ),
    Workload("BERT-base, 8×128", lambda: _bert(8, 128), lambda: _bert(2, 7, **_TINY)),
    Workload("ViT-B/16, 8 images", lambda: _images(8), lambda: _images(1, **_TINY)),
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
        medians = {k: round(ratio(v, base), 3) for k, v in times.items()}
        yield {
            "seconds": {k: statistics.median(v) for k, v in times.items()},
            "over gradient × input": medians,
            "lines": [_line(medians.get(name), name, most) for name, most in workload.limits.items()],
            "peak bytes": {k: _peak(call, device) for k, call in run.items()},
            **({"failed": failed} if failed else {}),
        }


def _line(figure: float | None, name: str, most: float) -> dict[str, Any]:
    line = f"{name} ≤ {most:g} × time of gradient × input"
    return {"line": line, "figure": figure, "met": figure is not None and figure <= most}


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
