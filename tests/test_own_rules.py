"""An op of the user's own with a rule of the user's own, by the public interface alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import Call, Linearization, Rule, Taylor


@torch.library.custom_op("fxlrp_tests::squash", mutates_args=())
def squash(x: Tensor, slope: float) -> Tensor:
    """``x / (slope + |x|)``."""
    return x / (slope + x.abs())


@squash.register_fake
def _(x: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return gradient * ctx.slope / (ctx.slope + x.abs()) ** 2, None


def _keep(ctx, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.slope = inputs[1]
    ctx.save_for_backward(inputs[0])


squash.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class SquashRule(Rule):
    """``x * g(x)`` with ``g(x) = 1 / (slope + |x|)``: the coefficient is ``G * g(x)``."""

    def linearize(self, call: Call) -> Linearization:
        x, slope = call.args
        return Linearization(call.run(), lambda cotangent: (cotangent / (slope + x.abs()),))


class Squashed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(squash(self.first(x), 0.5))


def expected(model: Squashed, x: Tensor) -> Tensor:
    h = model.first(x)
    row = model.head.weight[model(x).argmax(-1)]
    return (x * ((row / (0.5 + h.abs())) @ model.first.weight)).detach()


def test_without_a_rule_the_error_shows_how_to_register_one() -> None:
    with pytest.raises(fxlrp.UncoveredOpError) as caught:
        fxlrp.lrp_compile(Squashed().eval())(torch.randn(4, 6))
    assert "fxlrp.register_rule('fxlrp_tests::squash', Taylor())" in str(caught.value)


def test_a_composites_rule_for_one_op() -> None:
    """Would break: an entry by op that does not match it, or matches others."""
    model, x = Squashed().eval(), torch.randn(4, 6)
    composite = fxlrp.Composite([(fxlrp.op("fxlrp_tests::squash"), SquashRule())])
    explainer = fxlrp.lrp_compile(model, composite)
    explanation = explainer(x)
    torch.testing.assert_close(explanation.relevance, expected(model, x))
    assert explanation.ledger.residual < 1e-5
    assert {row.op: row.rule for row in explainer.plan}["squash"] == SquashRule()
    doubled = fxlrp.Composite([(fxlrp.op("aten::linear"), fxlrp.rules.Epsilon(0.5))])
    assert (
        fxlrp.lrp_compile(nn.Sequential(model.first, model.head), doubled)(x)
        .ledger.by_cause()["epsilon"]
        .any()
    )


def test_a_registered_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break: a rule not found, used by a composite without rules, or before its entries."""
    monkeypatch.setattr("fxlrp.rules.registry._RULES", {})
    model, x = Squashed().eval(), torch.randn(4, 6)
    fxlrp.register_rule(torch.ops.fxlrp_tests.squash, SquashRule())
    explanation = fxlrp.lrp_compile(model)(x)
    torch.testing.assert_close(explanation.relevance, expected(model, x))
    assert explanation.ledger.residual < 1e-5
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)
    torch.testing.assert_close(fxlrp.lrp_compile(model, "gradient")(x).relevance, x * gradient)
    own = fxlrp.Composite([(fxlrp.name("*"), Taylor())])
    explainer = fxlrp.lrp_compile(model, own)
    explainer(x)
    assert {row.op: row.rule for row in explainer.plan}["squash"] == Taylor()


@pytest.mark.parametrize(
    ("op", "rule", "says"),
    [
        ("aten::linear", Taylor(), "composite's"),
        ("squash", Taylor(), "torch.library"),
        ("a::b", "taylor", "rule"),
    ],
)
def test_what_cannot_be_registered(op: str, rule: object, says: str) -> None:
    with pytest.raises(fxlrp.CompositeError, match=says):
        fxlrp.register_rule(op, rule)
