"""A sample of the transformers library's architectures, each checked as ``python -m bench.zoo`` does it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import fxlrp
from bench.zoo.check import case_of, check
from bench.zoo.report import totals
from bench.zoo.rows import Row, rows, sample
from fxlrp.rules import PRESETS

SAMPLE = sample()
#: Models that have both implementations of attention.
BOTH = [
    *(
        Row("causal_lm", model)
        for model in ("llama", "gpt2", "gpt_neox", "phi3", "qwen3", "mistral", "olmo2", "phi", "opt")
    ),
    *(Row("masked_lm", model) for model in ("bert", "roberta", "electra", "modernbert")),
    *(Row("seq_cls", model) for model in ("distilbert", "albert", "qwen2")),
    *(Row("seq2seq", model) for model in ("bart", "t5", "marian")),
    *(Row("image_cls", model) for model in ("vit", "deit", "siglip")),
    *(Row("audio_cls", model) for model in ("wav2vec2", "hubert")),
]


@pytest.mark.parametrize("row", SAMPLE, ids=str)
def test_explained(row: Row) -> None:
    """Breaks if an op of the architecture loses its rule, the value, the gradient or the ledger is off."""
    result = check(row)
    assert result["status"] == "explained", result["reason"]
    missing = set(SAMPLE[row]) - set(result["rules"])
    assert not missing, f"the sample lists rules that no node of the model has: {missing}"


def test_the_sample_covers_every_rule() -> None:
    """Breaks if a rule is added to the default preset and no architecture of the sample uses it."""
    wanted = {rule.name for rule in PRESETS["attnlrp"].rules.values()}
    shown = {rule for rules in SAMPLE.values() for rule in rules}
    assert shown >= wanted, wanted - shown
    assert len({row.model for row in SAMPLE}) >= 40


def test_rows_exist() -> None:
    """Breaks if the library renames what the sample names; the error then says which."""
    assert set(SAMPLE) <= set(rows())
    assert len(rows()) > 700


@pytest.mark.parametrize("row", BOTH, ids=str)
def test_attention_implementations(row: Row) -> None:
    """Breaks if eager attention, many ops in the graph, is explained other than the fused one."""
    fused, eager = case_of(row, ["sdpa"]), case_of(row, ["eager"])
    implementations = [c.model.config._attn_implementation for c in (fused, eager)]
    assert implementations == ["sdpa", "eager"]
    first, second = (
        _relevance(fxlrp.lrp_compile(c.model, backend="eager")(**fused.example.inputs, target=fused.target))
        for c in (fused, eager)
    )
    assert first.keys() == second.keys()
    for name, relevance in first.items():
        error = (relevance - second[name]).abs().max() / relevance.abs().max()
        assert error <= 1e-4, f"{name}: {error:.1e}"


def _relevance(explanation: fxlrp.Explanation) -> dict[str, torch.Tensor]:
    found = explanation.relevance
    return {"": found} if isinstance(found, torch.Tensor) else dict(found)


def test_totals_count_what_was_built() -> None:
    """A row that was not built is no failure; one explained for one size only does not generalise."""
    common = {"reason": "", "notes": []}
    results = [
        {
            **common,
            "task": "causal_lm",
            "model": "a",
            "status": "explained",
            "seconds": 1.0,
            "generalises": True,
        },
        {
            **common,
            "task": "causal_lm",
            "model": "b",
            "status": "explained",
            "seconds": 3.0,
            "generalises": False,
        },
        {**common, "task": "itt_img", "model": "c", "status": "uncovered"},
        {**common, "task": "causal_lm", "model": "d", "status": "not_built"},
    ]
    lines = totals(results)
    assert "2 of 2 (100.0%)" in lines[0]
    assert "0 of 1 (0.0%)" in lines[1]
    assert "1 of 2 (50.0%)" in lines[2]
    assert "2.0 s" in lines[3]
