"""Ops that are short for others: the same forward and gradient, with a rule for each part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp

Step = Callable[[Tensor, Tensor], Tensor]


class Stepped(nn.Module):
    """A step between two linear layers, with a constant that the step may use."""

    def __init__(self, step: Step, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.first, self.head = step, nn.Linear(6, 6), nn.Linear(width, 3)
        self.constant = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.first(x), self.constant).flatten(1))


STEPS: dict[str, tuple[Step, int, str]] = {
    "glu": (lambda x, c: F.glu(x), 12, "sigmoid"),
    "lerp": (lambda x, c: torch.lerp(x, c, 0.3), 24, "sub"),
    "lerp between activations": (lambda x, c: torch.lerp(x, 2 * x.tanh(), c), 24, "sub"),
    "addcmul": (lambda x, c: torch.addcmul(c, x, x.tanh(), value=2), 24, "mul"),
    "addcdiv": (lambda x, c: torch.addcdiv(x, x.tanh(), c + 3), 24, "div"),
    "baddbmm": (
        lambda x, c: torch.baddbmm(x, x, x.transpose(1, 2) @ x, beta=2, alpha=0.5),
        24,
        "bmm",
    ),
    "instance_norm": (lambda x, c: F.instance_norm(x, weight=c[:, 0], bias=c[:, 1]), 24, "normalize"),
    "cosine_similarity": (lambda x, c: F.cosine_similarity(x, x.tanh() + c, -1), 4, "normalize_divide"),
}


@pytest.mark.parametrize("name", list(STEPS))
def test_each_part_has_its_rule(name: str) -> None:
    """Would break: another value or gradient than the op's own, or an op left without a rule."""
    step, width, part = STEPS[name]
    model, x = Stepped(step, width).eval().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    scores = model(leaf).max(-1).values
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    explainer = fxlrp.lrp_compile(model, "gradient")
    found = explainer(x)
    torch.testing.assert_close(found.value, scores.detach())
    torch.testing.assert_close(found.relevance, x * gradient)
    for composite in ("attnlrp", "cp", "ali"):
        other = explainer.with_composite(composite)
        assert other(x).ledger.residual < 1e-9
        assert part in {row.op for row in other.plan}


def test_what_no_input_reaches_stays_as_it_is() -> None:
    """Would break: a table that is computed from weights alone is written out for nothing."""
    model = Stepped(lambda x, c: x + torch.lerp(c, 2 * c, 0.3)).eval()
    explainer = fxlrp.lrp_compile(model)
    explainer(torch.randn(2, 4, 6))
    assert any("lerp" in str(node.target) for node in explainer.rule_graph.graph.nodes)


class Biased(nn.Module):
    """Attention whose bias is computed from what it attends to, fused or by hand."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.qkv, self.bias, self.head = nn.Linear(8, 24), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        bias = self.bias(x).transpose(1, 2).unsqueeze(1).expand(-1, 1, x.shape[1], -1)
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            attended = torch.softmax((q * 8**-0.5) @ k.mT + bias, -1) @ v
        return self.head(attended.squeeze(1).mean(1))


@pytest.mark.parametrize("composite", ["gradient", "attnlrp", "cp", "ali"])
def test_a_bias_computed_from_the_input_is_part_of_attention(composite: str) -> None:
    """Would break: a mask taken for constant although the input moves it: a gradient with a part missing."""
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = {}
    for fused in (True, False):
        model = Biased(fused).eval().double()
        explanation = fxlrp.lrp_compile(model, composite)(x)
        assert explanation.ledger.residual < 1e-9
        found[fused] = explanation.relevance
    torch.testing.assert_close(found[True], found[False])
    if composite == "gradient":
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)
        torch.testing.assert_close(found[True], x * gradient)


def test_a_mask_given_as_an_input_explains_nothing() -> None:
    """Would break: from the second layer on, such a mask is taken for computed, and -inf becomes NaN."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)

    def score(output: Tensor) -> Tensor:
        return output[:, -1].square().sum(-1)

    explainer = fxlrp.lrp_compile(model, "gradient")
    found = explainer(x, mask=mask, target=score)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(model(leaf, mask=mask)).sum(), leaf)
    torch.testing.assert_close(found.relevance, x * gradient, rtol=1e-4, atol=1e-5)
    attnlrp = explainer.with_composite("attnlrp")
    assert attnlrp(x, mask=mask, target=score).ledger.residual < 1e-4
    assert [row.op for row in attnlrp.plan].count("attention") == 2


def test_cosine_similarity_of_other_ranks() -> None:
    model = Stepped(lambda x, c: F.cosine_similarity(c[0], x, dim=2), 4).eval()
    x = torch.randn(2, 4, 6)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)
    torch.testing.assert_close(fxlrp.lrp_compile(model, "gradient")(x).relevance, x * gradient)
