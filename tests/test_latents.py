"""Relevance inside the model: which nodes names and selectors mean, heads, neurons."""

from __future__ import annotations

import pytest
import torch
from oracles import models
from torch import Tensor, nn

import fxlrp

IDS = torch.tensor([[3, 5, 7, 2, 11], [1, 4, 9, 8, 6]])


@pytest.fixture(scope="module")
def explainer() -> fxlrp.Explainer:
    return fxlrp.lrp_compile(
        models.tiny_llama(),
        latents=(fxlrp.op("attention"), "model.layers.*.self_attn", "model.layers.*.mlp.act_fn"),
    )


@pytest.fixture(scope="module")
def explanation(explainer: fxlrp.Explainer) -> fxlrp.Explanation:
    return explainer(IDS)


def test_selectors_mean_nodes_before_the_module_ends(explanation: fxlrp.Explanation) -> None:
    """Breaks if a selector's latent is its module's output, or two names mean one node."""
    own = explanation.latents["model.layers.0.self_attn:attention"]
    output = explanation.latents["model.layers.0.self_attn"]
    assert own.dim() == 4 and output.dim() == 3 and own.shape[0] == output.shape[0] == 2
    # Between the two lies o_proj, whose bias keeps its part.
    kept = explanation.ledger.by_module()["model.layers.0.self_attn.o_proj"]
    torch.testing.assert_close(own.flatten(1).sum(1) + kept, output.flatten(1).sum(1))


def test_latents_are_value_times_coefficient(explainer: fxlrp.Explainer) -> None:
    """The coefficients that come with latents are those that vjp gives from the logits."""
    found = explainer(IDS, target=7)
    name = "model.layers.1.self_attn"
    start = torch.zeros(1, 2, 5, 41, dtype=torch.float64)
    start[:, :, -1, 7] = 1
    ways = explainer.vjp("output", start, IDS, wrt=name)
    torch.testing.assert_close(found.latent_coefficients[name], ways.coefficients[name][0])
    torch.testing.assert_close(found.latents[name], ways.values[name] * ways.coefficients[name][0])


def test_heads(explanation: fxlrp.Explanation) -> None:
    """Breaks if heads are mixed: each is the sum of its own slice, also where they lie side by side."""
    name = "model.layers.0.self_attn:attention"
    relevance = explanation.latents[name]
    heads = explanation.heads(name)
    assert heads.shape == relevance.shape[:2]
    for i in range(relevance.shape[1]):
        torch.testing.assert_close(heads[:, i], relevance[:, i].sum((-1, -2)))
    side = explanation.heads("model.layers.0.self_attn", count=4)
    output = explanation.latents["model.layers.0.self_attn"]
    torch.testing.assert_close(
        side[:, 1], output[..., output.shape[-1] // 4 : output.shape[-1] // 2].sum((1, 2))
    )


def test_neurons(explanation: fxlrp.Explanation) -> None:
    """A unit's relevance is the sum over positions."""
    name = "model.layers.1.mlp.act_fn"
    torch.testing.assert_close(explanation.neurons(name), explanation.latents[name].sum(1))


def test_several_targets_have_heads_and_neurons_each(explainer: fxlrp.Explainer) -> None:
    """Breaks if the targets' dimension is taken for heads or summed over."""
    several = explainer(IDS, target=[3, 7])
    name, units = "model.layers.0.self_attn:attention", "model.layers.1.mlp.act_fn"
    for j, target in enumerate((3, 7)):
        single = explainer(IDS, target=target)
        torch.testing.assert_close(several.heads(name)[:, j], single.heads(name))
        torch.testing.assert_close(several.neurons(units)[:, j], single.neurons(units))
        torch.testing.assert_close(
            several.of(j).latent_coefficients[units], single.latent_coefficients[units]
        )


def test_nodes_by_name() -> None:
    """Names are those of the rule graph's nodes."""
    model = models.tiny_llama()
    plain = fxlrp.lrp_compile(model)
    plain(IDS)
    node = next(row.node for row in plain.plan if row.kind == "norm")
    found = fxlrp.lrp_compile(model, latents=node)(IDS)
    assert list(found.latents) == [node]


@pytest.mark.parametrize(
    ("latents", "says"),
    [
        (
            "model.layer.0.mlp",
            r"'model.layer.0.mlp'. Did you mean 'model.layers.0.mlp'",
        ),
        ("nowhere.*", r"no module and no node matches 'nowhere.*Modules: model"),
        (fxlrp.op("conv"), r"no node matches op\('conv'\)"),
    ],
)
def test_what_matches_nothing_is_told_with_what_is_near(
    latents: str | fxlrp.rules.Selector, says: str
) -> None:
    """Breaks if a misspelt latent goes unnoticed."""
    with pytest.raises(fxlrp.InputError, match=says):
        fxlrp.lrp_compile(models.tiny_llama(), latents=(latents,))(IDS)


def test_views_refuse_what_they_cannot_show(explanation: fxlrp.Explanation) -> None:
    """A latent that was not asked for, one without heads, a number of heads that does not divide."""
    with pytest.raises(fxlrp.InputError, match=r"no latent .*; near: model.layers.0.mlp.act_fn"):
        explanation.neurons("model.layers.0.mlp.act")
    with pytest.raises(fxlrp.InputError, match=r"not \[batch, heads, positions, features\]"):
        explanation.heads("model.layers.0.self_attn")
    with pytest.raises(fxlrp.InputError, match="which is not 5 heads"):
        explanation.heads("model.layers.0.self_attn", count=5)


def test_latents_beside_the_targets_path_are_left_out() -> None:
    """Breaks if a latent that nothing of the target is computed from is looked for in the sliced graph."""

    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.beside = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.own(x), self.beside(x)

    explained = fxlrp.lrp_compile(TwoOutputs().eval(), latents=("own", "beside"))
    assert explained(torch.randn(2, 4), target=1).latents.keys() == {"own"}
