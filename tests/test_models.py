"""Unmodified models: forward, Gradient x Input against autograd, ledger, eager against fused attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxlrp

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.models import CASES, Case
from bench.reference import gradient_times_input, logits_of

EVERY = [pytest.param(c, id=c.name) for c in CASES]


def as_dict(relevance: object, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return relevance if isinstance(relevance, dict) else {next(iter(inputs)): relevance}


@pytest.mark.parametrize("case", EVERY)
def test_gradient_equals_autograd_and_every_ledger_closes(case: Case) -> None:
    """fp32: forward 1e-5, gradient 1e-4, ledger 1e-4 for every composite; eager and SDPA explain alike."""
    inputs = case.example()
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for attention in case.attentions:
        model = case.model(attention)
        explainer = fxlrp.lrp_compile(model, "gradient")
        explanation = explainer(**inputs)
        value, expected = gradient_times_input(model, inputs)
        torch.testing.assert_close(explanation.value, value, rtol=1e-5, atol=1e-6)
        relevance = as_dict(explanation.relevance, inputs)
        assert relevance.keys() == expected.keys()
        for name, reference in expected.items():
            scale = float(reference.abs().max())
            torch.testing.assert_close(relevance[name], reference, rtol=0, atol=1e-4 * scale, msg=name)
        assert explanation.ledger.residual < 1e-4
        for composite in ("attnlrp", "cp", "ali"):
            explained = explainer.with_composite(composite)(**inputs)
            assert explained.ledger.residual < 1e-4, explained.ledger
            found[attention, composite] = as_dict(explained.relevance, inputs)
    for composite in ("attnlrp", "cp", "ali"):
        first, *others = [found[attention, composite] for attention in case.attentions]
        for other in others:
            for name in first:
                scale = float(first[name].abs().max())
                torch.testing.assert_close(other[name], first[name], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", EVERY)
def test_double_precision(case: Case) -> None:
    """fp64: ledger 1e-9 for the papers' composites and, in turn, one of the others, with the attention that
    the fp32 test trusts least.
    """
    model = case.model(case.attentions[-1], torch.float64)
    inputs = case.example(torch.float64)
    try:
        model(**inputs)
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run in float64: {error}")
    explainer = fxlrp.lrp_compile(model)
    other = ("attnlrp-gamma", "attribution-graph", "pa")[CASES.index(case) % 3]
    for composite in ("attnlrp", "cp", "ali", "gradient", other):
        explanation = explainer.with_composite(composite)(**inputs)
        assert explanation.ledger.residual < 1e-9, composite


@pytest.mark.parametrize("name", ["Llama", "BERT classifier", "ViT", "T5", "Mixtral"])
def test_half_precision(name: str) -> None:
    """bf16 is explained in bf16: finite, and near the float32 explanation of the same weights."""
    case = next(c for c in CASES if c.name == name)
    half = case.model(dtype=torch.bfloat16)
    full = case.model(dtype=torch.bfloat16).float()
    inputs, wide = case.example(torch.bfloat16), case.example(torch.bfloat16)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in wide.items()}
    logits = logits_of(full(**wide))
    index = (logits[:, -1] if logits.dim() == 3 else logits).argmax(-1)
    narrow = as_dict(fxlrp.lrp_compile(half, "cp")(**inputs, target=index).relevance, inputs)
    exact = as_dict(fxlrp.lrp_compile(full, "cp")(**wide, target=index).relevance, inputs)
    for key in exact:
        assert narrow[key].dtype is torch.bfloat16
        assert bool(torch.isfinite(narrow[key]).all())
        correlation = torch.corrcoef(torch.stack([narrow[key].float().flatten(), exact[key].flatten()]))[0, 1]
        assert correlation > 0.97


def test_models_are_built_with_nontrivial_biases_and_norms() -> None:
    """A zero bias hides mistakes: the checks above must not run on one."""
    for case in CASES:
        for name, parameter in case.model().named_parameters():
            if parameter.dim() == 1:
                assert float(parameter.std()) > 0.01, (case.name, name)


def test_a_model_may_be_explained_by_several_composites_from_one_trace() -> None:
    model: nn.Module = CASES[0].model()
    explainer = fxlrp.lrp_compile(model)
    explainer(**CASES[0].example())
    other = explainer.with_composite("cp")
    other(**CASES[0].example())
    assert other._traces is explainer._traces
    assert sum(map(len, explainer._traces.values())) == 1
