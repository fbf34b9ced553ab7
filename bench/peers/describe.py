"""Workloads as plain data, and their models and inputs; runs in the peers' environment too, without fxlrp."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Side of the patches that ViT cuts an image into.
_PATCH = 16


@dataclass(frozen=True)
class Workload:
    """A model by its sizes, and inputs by theirs.

    Attributes:
        shape: ``llama``, ``bert``, ``vit`` or ``mlp``.
        width: hidden size.
        inner: size of the MLP.
        layers: number of layers.
        heads: number of attention heads.
        vocabulary: number of tokens; classes of the MLP.
        batch: number of samples.
        length: tokens of a sample; side of an image; features of the MLP's input.
        seed: of weights and inputs.
        label: what tables call the model; by its sizes without one.
    """

    shape: str
    width: int
    inner: int
    layers: int
    heads: int = 1
    vocabulary: int = 1000
    batch: int = 1
    length: int = 64
    seed: int = 0
    label: str = ""

    @property
    def model(self) -> str:
        """What tables call the model."""
        return self.label or f"{self.shape} {self.layers}x{self.width}"

    @property
    def tokens(self) -> int:
        """Positions of a sample: of an image its patches and the class token; 1 of a vector."""
        if self.shape == "vit":
            return (self.length // _PATCH) ** 2 + 1
        return 1 if self.shape == "mlp" else self.length

    @property
    def name(self) -> str:
        """The model with its batch and length."""
        return f"{self.model}, {self.batch}x{self.tokens}"

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def model_of(workload: Workload) -> nn.Module:
    """The model in eval mode, without gradients for its weights; LXT's patches come before this."""
    torch.manual_seed(workload.seed)
    return _BUILD[workload.shape](workload).eval().requires_grad_(False)


def inputs_of(workload: Workload) -> dict[str, Tensor]:
    """Inputs by the name that the model has for them; no padding."""
    generator = torch.Generator().manual_seed(workload.seed)
    batch, length = workload.batch, workload.length
    if workload.shape == "mlp":
        return {"input": torch.randn(batch, length, generator=generator)}
    if workload.shape == "vit":
        return {"pixel_values": torch.randn(batch, 3, length, length, generator=generator)}
    return {"input_ids": torch.randint(3, workload.vocabulary, (batch, length), generator=generator)}


def logits_of(output: Any) -> Tensor:
    """Logits ``[batch, classes]`` of a model's output, at the last position of a sequence."""
    logits: Tensor = getattr(output, "logits", output)
    return logits[:, -1] if logits.dim() == 3 else logits


def _mlp(w: Workload) -> nn.Module:
    sizes = [w.length, *[w.width] * w.layers]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], w.vocabulary))


def _library(task: str, config: str, w: Workload, **settings: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(
        hidden_size=w.width,
        intermediate_size=w.inner,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        **settings,
    )
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(
        made, attn_implementation="sdpa"
    )
    return model


def _llama(w: Workload) -> nn.Module:
    return _library(
        "CausalLM",
        "LlamaConfig",
        w,
        vocab_size=w.vocabulary,
        num_key_value_heads=w.heads,
        max_position_embeddings=max(2048, w.length),
    )


def _bert(w: Workload) -> nn.Module:
    settings = {"vocab_size": w.vocabulary, "max_position_embeddings": max(512, w.length), "num_labels": 2}
    return _library("SequenceClassification", "BertConfig", w, **settings)


def _vit(w: Workload) -> nn.Module:
    return _library(
        "ImageClassification", "ViTConfig", w, image_size=w.length, patch_size=_PATCH, num_labels=w.vocabulary
    )


_BUILD: dict[str, Callable[[Workload], nn.Module]] = {
    "llama": _llama,
    "bert": _bert,
    "vit": _vit,
    "mlp": _mlp,
}
