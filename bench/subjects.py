"""What ``bench.end_to_end`` measures: models of known shapes with random weights, and batches and lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .workloads import ids, make

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model with what it is given.

    Attributes:
        name: how tables call it.
        build: makes the model.
        inputs: of a batch and a length, the model's inputs.
        cells: batches and lengths.
        limits: what a contender's time over Gradient x Input should not exceed, in every cell.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    cells: tuple[tuple[int, int], ...]
    limits: Mapping[str, float] = field(default_factory=dict)


def _text(vocabulary: int, batch: int, length: int) -> Inputs:
    return ids(vocabulary, batch, length)


def _text_and_decoder(vocabulary: int, batch: int, length: int) -> Inputs:
    decoder = ids(vocabulary, batch, max(1, length // 4))["input_ids"]
    return {**ids(vocabulary, batch, length), "decoder_input_ids": decoder}


def _images(batch: int, patches: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator)}


SUBJECTS = (
    Subject(
        "Llama 8x512, vocabulary 32,000",
        functools.partial(
            make,
            "CausalLM",
            "LlamaConfig",
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=32000,
            max_position_embeddings=8192,
        ),
        functools.partial(_text, 32000),
        ((1, 256), (1, 128), (8, 128), (1, 2048), (1, 4096)),
        {"fxlrp eager": 0.75, "fxlrp inductor": 0.75},
    ),
    Subject(
        "BERT-base classifier",
        functools.partial(make, "SequenceClassification", "BertConfig"),
        functools.partial(_text, 30522),
        ((1, 128), (8, 128), (1, 512)),
        {"fxlrp eager": 0.95, "fxlrp inductor": 0.95},
    ),
    Subject(
        "ViT-B/16 classifier",
        functools.partial(make, "ImageClassification", "ViTConfig", num_labels=1000),
        _images,
        ((1, 197), (8, 197)),
        {"fxlrp eager": 0.95, "fxlrp inductor": 0.95},
    ),
    Subject(
        "Flan-T5-small",
        functools.partial(
            make,
            "Seq2SeqLM",
            "T5Config",
            d_model=512,
            d_ff=1024,
            num_layers=8,
            num_heads=6,
            d_kv=64,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
        functools.partial(_text_and_decoder, 32128),
        ((1, 128), (8, 128)),
    ),
    Subject(
        "Mixtral 4x256, 8 experts",
        functools.partial(
            make,
            "CausalLM",
            "MixtralConfig",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
            vocab_size=8000,
        ),
        functools.partial(_text, 8000),
        ((1, 128), (8, 128)),
    ),
)
