"""Relevance with every optimisation of the graph off and on, over a part of the transformers library."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, fx

pytest.importorskip("transformers")

import fxlrp
from bench.zoo.check import Case, case_of
from bench.zoo.rows import Row
from fxlrp.compiler.pipeline import build
from fxlrp.compiler.products import is_faster
from fxlrp.compiler.remat import MADE_BY
from fxlrp.kernels import measured
from fxlrp.rules.base import vjp

ROWS = [
    *(Row("causal_lm", m) for m in ("llama", "gpt2", "gpt_neox", "bloom", "gemma2", "qwen3", "phi", "opt")),
    *(Row("causal_lm", m) for m in ("mixtral", "olmo2")),
    *(Row("masked_lm", m) for m in ("bert", "modernbert", "deberta-v2")),
    *(Row("seq_cls", m) for m in ("distilbert", "albert", "qwen2")),
    *(Row("seq2seq", m) for m in ("bart", "t5")),
    *(Row("image_cls", m) for m in ("vit", "swin", "convnext")),
    Row("audio_cls", "wav2vec2"),
]
CASES = list(zip(ROWS, itertools.cycle(("attnlrp", "cp"))))  # cp has the frozen attention


@pytest.fixture(autouse=True)
def any_processor() -> Iterator[None]:
    """Linear maps are oneDNN's for weights of any size, on any processor."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("LEAST_WEIGHT", "LEAST_SIDE", "LEAST_ROWS"):
            patch.setattr(f"fxlrp.kernels.onednn.{limit}", 1)
        patch.setattr("fxlrp.kernels.measured.MEASURED", {measured.processor(): {"onednn": True}})
        yield


@pytest.fixture
def unoptimised(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A compiler that moves no choice up, simplifies nothing, keeps every value and its order, hands frozen
    attention to the ordinary backward, linear maps to PyTorch and factors to ops of their own.
    """
    from fxlrp.compiler import pipeline

    rematerialise = pipeline.rematerialise

    def kept(graph: fx.GraphModule, *given: Any) -> Any:
        return graph, rematerialise(graph, *given)[1]

    monkeypatch.setattr("fxlrp.explainer.build", functools.partial(build, demand=False))
    monkeypatch.setattr("fxlrp.compiler.pipeline.rematerialise", kept)
    monkeypatch.setattr("fxlrp.rules.attention.attention_of_values", vjp)
    monkeypatch.setattr("fxlrp.compiler.lower.is_faster", lambda: False)
    monkeypatch.setattr("fxlrp.compiler.lower.merged", lambda graph: graph)
    for step in ("_simplify", "_fold_matmul", "_fold_slices", "_deduplicate"):
        monkeypatch.setattr(f"fxlrp.compiler.cleanup.{step}", lambda *_: None)
    return monkeypatch


def explained(case: Case, composite: str, budget: float | None = None) -> tuple[fxlrp.Explainer, Any]:
    explainer = fxlrp.lrp_compile(case.model, composite, backend="eager", memory_budget=budget)
    found = explainer(**case.example.inputs, target=case.target).relevance
    return explainer, found if isinstance(found, dict) else {"": found}


@pytest.mark.parametrize(("row", "composite"), CASES, ids=str)
def test_relevance_is_that_of_the_plain_graph(
    row: Row, composite: str, unoptimised: pytest.MonkeyPatch
) -> None:
    """Breaks if an optimisation changes relevance beyond rounding, in the default or in the least memory."""
    case = case_of(row)
    plain, expected = explained(case, composite)
    unoptimised.undo()
    default, found = explained(case, composite)
    least, thrifty = explained(case, composite, default.memory.least_share)
    assert nodes(default) < nodes(plain)
    assert default.plan.here or not is_faster()
    assert default.memory.least_share > 0.99 or MADE_BY in made_by(least)
    assert MADE_BY not in made_by(plain)
    for relevance in (found, thrifty):
        assert relevance.keys() == expected.keys()
        for name, reference in expected.items():
            assert error(relevance[name], reference) <= 1e-5


def nodes(explainer: fxlrp.Explainer) -> int:
    return sum(n.op == "call_function" for n in explainer.relevance_graph.graph.nodes)


def made_by(explainer: fxlrp.Explainer) -> set[str]:
    return {n.meta.get("made_by", "") for n in explainer.relevance_graph.graph.nodes}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
