"""Relevance of parameters: each weight's part of what is explained, under the rules of a composite."""

from __future__ import annotations

import pytest
import torch
from oracles import models
from oracles.papers import TinyLlama, rotary
from test_presets import LLAMA, ids_of, model_of
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import Gamma


@pytest.mark.parametrize("title", ["attnlrp", "gradient", "libra", "ali"])
def test_parameters_equal_gradient_times_weight_of_the_treated_model(title: str) -> None:
    """Every parameter of a Llama, embeddings and norms too; breaks if a weight misses one of its uses."""
    model, ids = model_of(TinyLlama), ids_of()
    names, weights = zip(*model.named_parameters(), strict=True)
    logits = model.run(model.embed(ids), [rotary(ids.shape[1], model.size)] * 2, LLAMA[title])
    gradients = torch.autograd.grad(logits[:, -1].max(-1).values.sum(), weights, allow_unused=True)
    found = fxlrp.lrp_compile(model, title, parameters=("*",))(ids).parameters
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        if gradient is None or not bool(gradient.any()):
            assert name not in found or not bool(found[name].any())
        else:
            torch.testing.assert_close(found[name], weight * gradient, atol=1e-12, rtol=1e-9)


class Tied(nn.Module):
    """A weight that is used three times: as it is, transposed, and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) @ (2 * self.first.weight.T)


def test_a_tied_weight_is_the_sum_of_its_uses_under_all_its_names() -> None:
    """Breaks if steps on the way to a weight are lost, or tied names are unknown."""
    model = Tied().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = fxlrp.lrp_compile(model, "gradient", parameters=("*.weight",))(x, target=1).parameters
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), [model.first.weight])
    assert set(found) == {"first.weight", "second.weight"}
    for relevance in found.values():
        torch.testing.assert_close(relevance, model.first.weight.detach() * gradient)


class Stacked(nn.Module):
    """Weights of several layers in one tensor, taken apart in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = nn.functional.linear(x, weight).tanh()
        return x


def test_weights_that_are_taken_apart() -> None:
    """Breaks if the parts of a tuple do not find their way back to the tensor that they are of."""
    model = Stacked().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = fxlrp.lrp_compile(model, "gradient", parameters="weights")(x, target=2).parameters["weights"]
    (gradient,) = torch.autograd.grad(model(x)[:, 2].sum(), [model.weights])
    torch.testing.assert_close(found, model.weights.detach() * gradient)


def test_a_layers_weights_share_what_its_input_gets() -> None:
    """Under the epsilon rule weights and inputs of a layer hold the same relevance."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    composite = fxlrp.Composite([(fxlrp.op("linear"), fxlrp.rules.Epsilon(0.3))])
    found = fxlrp.lrp_compile(model, composite, parameters="0.weight")(torch.randn(2, 4).double())
    torch.testing.assert_close(found.parameters["0.weight"].sum(), found.relevance.sum())


def test_parameters_do_not_change_the_explanation() -> None:
    """And are given for the explained target only."""
    model, ids = models.tiny_llama(), ids_of()
    plain = fxlrp.lrp_compile(model)(ids, target=3)
    found = fxlrp.lrp_compile(model, parameters=("model.layers.0.*",))(ids, target=3)
    torch.testing.assert_close(found.relevance, plain.relevance)
    assert plain.parameters == {} and "model.layers.0.mlp.up_proj.weight" in found.parameters
    assert found.ledger.residual < 1e-6


def test_what_has_no_relevance_of_parameters_is_refused() -> None:
    """Names that no parameter has, rules that are not linear in weights, several targets."""
    model, ids = models.tiny_llama(), ids_of()
    with pytest.raises(fxlrp.InputError, match=r"Did you mean 'model.layers.0.mlp.up_proj.weight'"):
        fxlrp.lrp_compile(model, parameters="model.layers.0.mlp.up_project.weight")(ids)
    gamma = fxlrp.Composite([(fxlrp.op("linear"), Gamma())])
    with pytest.raises(fxlrp.InputError, match=r"Gamma\(\) at .* is not linear in its weights"):
        fxlrp.lrp_compile(model, gamma, parameters="*.up_proj.weight")(ids)
    with pytest.raises(fxlrp.InputError, match="one target a call"):
        fxlrp.lrp_compile(model, parameters="*.up_proj.weight")(ids, target=[3, 4])
