"""Models of useful size with random weights, and inputs, that several benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxlrp

Built = tuple[nn.Module, dict[str, Tensor]]


def first_use() -> None:
    """PyTorch's own imports on the first trace of a process, which are no part of a cold start."""
    fxlrp.lrp_compile(nn.Linear(2, 2).eval(), backend="eager")(torch.randn(2, 2))


def ids(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    """Random token ids without padding."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(3, vocabulary, (batch, length), generator=generator)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def make(task: str, config: str, **settings: Any) -> nn.Module:
    """A transformers model for a task from its configuration."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(
        made, attn_implementation="sdpa"
    )
    return model.eval()


def llama(length: int) -> Built:
    """A Llama of 8 layers of 512 and one text."""
    model = make(
        "CausalLM",
        "LlamaConfig",
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    return model, ids(32000, 1, length)


def vision(images: int) -> Built:
    """A ViT of 6 layers of 384 and images of 224 pixels."""
    model = make(
        "ImageClassification",
        "ViTConfig",
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_labels=1000,
    )
    generator = torch.Generator().manual_seed(0)
    return model, {"pixel_values": torch.randn(images, 3, 224, 224, generator=generator)}
