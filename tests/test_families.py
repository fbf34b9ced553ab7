"""Parity with independent, hand-patched Gradient x Input oracles for five families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import bert, gpt2, llama, models, t5, vit
from torch import Tensor

import fxlrp

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
COMPOSITES = ("attnlrp", "cp", "ali", "gradient")


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[dtype], f"{what}: {error:.1e}"


def explain_all(model: torch.nn.Module, **inputs: Tensor) -> dict[str, fxlrp.Explanation]:
    explainer = fxlrp.lrp_compile(model)
    return {name: explainer.with_composite(name)(**inputs) for name in COMPOSITES}


@PRECISIONS
@ATTENTIONS
@pytest.mark.parametrize(
    ("make", "oracle", "side"),
    [
        (models.tiny_llama, llama, "left"),
        (models.tiny_llama, llama, "right"),
        (models.tiny_gpt2, gpt2, "right"),
        (models.tiny_bert, bert, "right"),
    ],
    ids=["llama-left", "llama-right", "gpt2", "bert"],
)
def test_token_models(make: Any, oracle: Any, side: str, attention: str, dtype: torch.dtype) -> None:
    """Would break: a wrong share, a rule on the wrong operand, a padded position that counts."""
    model = make(0, attention=attention).to(dtype)
    ids, mask = models.token_batch(1, (7, 4), side)
    for composite, explanation in explain_all(model, input_ids=ids, attention_mask=mask).items():
        expected = oracle.explain(model, ids, mask, composite=composite)
        assert_near(explanation.value, expected.value, dtype, f"{composite} value")
        assert_near(explanation.relevance, expected.relevance, dtype, composite)
        assert bool((explanation.relevance[mask == 0] == 0).all()), "padding carries relevance"


@PRECISIONS
@pytest.mark.parametrize("gated", [False, True], ids=["t5", "flan"])
def test_encoder_decoder(gated: bool, dtype: torch.dtype) -> None:
    """Two explained inputs: a dict by name, each as the oracle says."""
    model = models.tiny_t5(0, gated=gated).to(dtype)
    ids, mask = models.token_batch(1, (7, 4), "right")
    decoder_ids, _ = models.token_batch(2, (5, 5), "right")
    found = explain_all(model, input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
    for composite, explanation in found.items():
        expected = t5.explain(model, ids, decoder_ids, mask, composite=composite)
        assert set(explanation.relevance) == {"input_ids", "decoder_input_ids"}
        for name, relevance in expected.relevance.items():
            assert_near(explanation.relevance[name], relevance, dtype, f"{composite} {name}")


@PRECISIONS
@ATTENTIONS
def test_pixels(attention: str, dtype: torch.dtype) -> None:
    """Float inputs keep their shape."""
    model = models.tiny_vit(0, attention=attention).to(dtype)
    size = model.config.image_size
    pixels = torch.randn(2, model.config.num_channels, size, size, dtype=dtype)
    for composite, explanation in explain_all(model, pixel_values=pixels).items():
        assert explanation.relevance.shape == pixels.shape
        assert_near(
            explanation.relevance, vit.explain(model, pixels, composite=composite).relevance, dtype, composite
        )
