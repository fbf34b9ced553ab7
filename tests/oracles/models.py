"""Tiny random HF models, from configs alone, in float64, with every bias and norm weight made non-trivial.

HF's RMSNorm computes in float32 whatever the model's dtype, so a float64 Llama or T5 is exact to 1e-7 only.
``exact_norms`` replaces it in one model instance by the same formula in the input's dtype.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class ExactRMSNorm(nn.Module):
    """RMSNorm in the input's own dtype: w * x * rsqrt(mean(x^2) + eps)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def exact_norms(model: nn.Module) -> nn.Module:
    """Replace every ``*RMSNorm`` and ``T5LayerNorm`` of this instance by :class:`ExactRMSNorm`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind != "ExactRMSNorm" and (kind.endswith("RMSNorm") or kind == "T5LayerNorm"):
                trained = any(p.requires_grad for p in child.parameters())
                exact = ExactRMSNorm(child.weight, child.variance_epsilon)  # type: ignore[arg-type]
                setattr(parent, name, exact.requires_grad_(trained))
    return model


def _randomise(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Weights of order ``std``, norm weights around 1, biases around 0, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1.0 + 0.5 * noise)
            else:
                parameter.copy_(std * noise)
    return model.eval().requires_grad_(False)


def _build(kind: str, config: Any, seed: int, std: float, attention: str = "sdpa") -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config._attn_implementation = attention
        model = getattr(transformers, kind)(config).double()
    return _randomise(model, seed, std)


def tiny_llama(seed: int = 0, exact: bool = True, attention: str = "sdpa", **overrides: Any) -> Any:
    """LlamaForCausalLM: 2 layers, 4 query heads on 2 key heads, head size 6, biases everywhere."""
    from transformers import LlamaConfig

    options: dict[str, Any] = {
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-5,
    }
    model = _build("LlamaForCausalLM", LlamaConfig(**(options | overrides)), seed, 0.3, attention)
    return exact_norms(model) if exact else model


def tiny_bert(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> Any:
    """BertForSequenceClassification: 2 layers, 4 heads, 3 classes."""
    from transformers import BertConfig

    options: dict[str, Any] = {
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "num_labels": 3,
    }
    return _build("BertForSequenceClassification", BertConfig(**(options | overrides)), seed, 0.3, attention)


def tiny_gpt2(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> Any:
    """GPT2LMHeadModel: 2 layers, 4 heads, tanh-GELU."""
    from transformers import GPT2Config

    options: dict[str, Any] = {
        "vocab_size": 41,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _build("GPT2LMHeadModel", GPT2Config(**(options | overrides)), seed, 0.3, attention)


def tiny_t5(
    seed: int = 0, gated: bool = True, exact: bool = True, attention: str = "sdpa", **overrides: Any
) -> Any:
    """T5ForConditionalGeneration: 2 + 2 layers; gated (Flan: gated-gelu, unscaled head) or not (T5: relu,
    scaled)."""
    from transformers import T5Config

    options: dict[str, Any] = {
        "vocab_size": 41,
        "d_model": 16,
        "d_kv": 5,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
        "decoder_start_token_id": 0,
    }
    model = _build("T5ForConditionalGeneration", T5Config(**(options | overrides)), seed, 0.3, attention)
    return exact_norms(model) if exact else model


def tiny_vit(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> Any:
    """ViTForImageClassification: 3 x 12 x 12 pixels in 9 patches, 2 layers, 4 heads, 3 classes."""
    from transformers import ViTConfig

    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "num_channels": 3,
        "num_labels": 3,
    }
    return _build("ViTForImageClassification", ViTConfig(**(options | overrides)), seed, 0.3, attention)


def token_batch(
    seed: int = 0, lengths: tuple[int, ...] = (9, 6, 1), side: str = "right", vocab: int = 41
) -> tuple[Tensor, Tensor]:
    """Random token ids [B, S] and the 2d attention mask of rows of these lengths, padded right or left."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    ids = torch.randint(1, vocab, (len(lengths), size), generator=generator)
    mask = torch.zeros(len(lengths), size, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(0, n) if side == "right" else slice(size - n, size)] = 1
    return ids.masked_fill(mask == 0, 0), mask


class GatedBlock(nn.Module):
    """Attention with grouped keys, a gated MLP, norms of both kinds; a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(16), nn.RMSNorm(16)
        self.queries, self.keys, self.values = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.gate, self.up, self.down = (nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16))
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.queries, self.keys, self.values)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        h = self.second(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        x = x + nn.functional.softmax(self.mix(x), -1) * x
        return self.head(nn.functional.gelu(x).mean(1))
