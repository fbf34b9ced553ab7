"""The models that fxlrp is checked on: unmodified library models from configs, tiny, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, VOCABULARY, LENGTH = 64, 100, 9


@dataclass(frozen=True)
class Case:
    """A model to check.

    Attributes:
        name: how tables call it.
        build: makes the model for an attention implementation.
        inputs: which inputs it takes: ``ids``, ``encoder_decoder``, ``pixels`` or ``floats``.
        attentions: attention implementations that the model has.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: str = "ids"
    attentions: tuple[str, ...] = ("sdpa", "eager")

    def model(
        self, attention: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> nn.Module:
        """The model in eval mode; biases and norm weights are random, since zeros and ones hide mistakes."""
        torch.manual_seed(seed)
        model = self.build(attention or self.attentions[0])
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() <= 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype).eval()

    def example(
        self, dtype: torch.dtype = torch.float32, batch: int = 2, length: int = LENGTH, seed: int = 2
    ) -> dict[str, Tensor]:
        """Inputs by name; ids come with a right-padded last row."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs == "pixels":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
        if self.inputs == "floats":
            return {"x": torch.randn(batch, length, WIDTH, generator=generator).to(dtype)}
        ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        if self.inputs == "plain_ids":
            return {"ids": ids}
        mask = torch.ones_like(ids)
        mask[-1, length - 3 :] = 0
        if self.inputs == "encoder_decoder":
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 5), generator=generator),
            }
        return {"input_ids": ids, "attention_mask": mask}


class CharacterModel(nn.Module):
    """A hand-written decoder as teaching code has it: fused qkv, split heads, tied head, logits and loss."""

    def __init__(self, attention: str, width: int = WIDTH, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(256, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer(
            "causal", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256), persistent=False
        )

    def _mix(self, x: Tensor, i: int) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv[i](x).split(width, dim=2)
        )
        if self.attention == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.causal[:, :, :length, :length] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.out[i](y.transpose(1, 2).contiguous().view(batch, length, width))

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for i in range(len(self.qkv)):
            x = x + self._mix(self.norms[2 * i](x), i)
            h = self.up[i](self.norms[2 * i + 1](x))
            x = x + self.down[i](
                0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))
            )
        return self.head(self.norms[-1](x)[:, [-1], :]), None


class Encoder(nn.Module):
    """PyTorch's own Transformer encoder with a head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(h[:, 0])


class Attention(nn.Module):
    """PyTorch's own multi-head attention, self and cross, on float inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.own(x, x, x, need_weights=False)
        h = h + x
        pooled, _ = self.cross(self.queries.expand(x.shape[0], -1, -1), h, h, need_weights=True)
        return self.head(pooled.mean(1))


def _library(task: str, config: str, **settings: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(
            made, attn_implementation=attention
        )
        return model

    return build


_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "head_dim": 16,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
_SEQ2SEQ = {
    "d_model": WIDTH,
    "d_ff": 2 * WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 16,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}


def _decoder(config: str, **settings: Any) -> Callable[[str], nn.Module]:
    return _library("CausalLM", config, **{**_DECODER, **settings})


CASES: tuple[Case, ...] = (
    Case("Llama", _decoder("LlamaConfig")),
    Case("Mistral", _decoder("MistralConfig", sliding_window=4)),
    Case("Qwen2", _decoder("Qwen2Config")),
    Case("Qwen3", _decoder("Qwen3Config")),
    Case("Gemma 2", _decoder("Gemma2Config", sliding_window=4), attentions=("eager",)),
    Case("Gemma 3", _decoder("Gemma3TextConfig", sliding_window=4)),
    Case(
        "GPT-2",
        _library(
            "CausalLM",
            "GPT2Config",
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    Case("GPT-NeoX", _library("CausalLM", "GPTNeoXConfig", **_ENCODER)),
    Case("OLMo 2", _decoder("Olmo2Config")),
    Case(
        "Granite",
        _decoder(
            "GraniteConfig",
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
        ),
    ),
    Case("Mixtral", _decoder("MixtralConfig", num_local_experts=4, **_EXPERTS)),
    Case("Qwen3-MoE", _decoder("Qwen3MoeConfig", num_experts=4, moe_intermediate_size=32, **_EXPERTS)),
    Case("BERT classifier", _library("SequenceClassification", "BertConfig", **_ENCODER, num_labels=3)),
    Case(
        "RoBERTa classifier", _library("SequenceClassification", "RobertaConfig", **_ENCODER, pad_token_id=1)
    ),
    Case("T5", _library("Seq2SeqLM", "T5Config", **_SEQ2SEQ), "encoder_decoder"),
    Case(
        "Flan-T5",
        _library(
            "Seq2SeqLM", "T5Config", **_SEQ2SEQ, feed_forward_proj="gated-gelu", tie_word_embeddings=False
        ),
        "encoder_decoder",
    ),
    Case(
        "ViT",
        _library(
            "ImageClassification",
            "ViTConfig",
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_labels=5,
        ),
        "pixels",
    ),
    Case("nn.TransformerEncoder (post-norm)", lambda attention: Encoder(False), attentions=("sdpa",)),
    Case("nn.TransformerEncoder (pre-norm)", lambda attention: Encoder(True), attentions=("sdpa",)),
    Case("nn.MultiheadAttention", lambda attention: Attention(), "floats", ("sdpa",)),
    Case("hand-written GPT", CharacterModel, "plain_ids"),
)


def case(name: str) -> Case:
    """A case by name."""
    return next(c for c in CASES if c.name == name)
