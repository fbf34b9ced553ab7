"""Spellings that are one function explain alike; and steps that once were refused or changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp
from fxlrp.compiler.lower import lower
from fxlrp.rules import Call, Epsilon, Linearization, Taylor

WIDTH = 8
Step = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """Queries, keys, values and a fourth factor of one input, mixed by a step."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.q, self.k, self.v, self.y = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head, self.step = nn.Linear(WIDTH, 3), step
        self.register_buffer("bias", torch.randn(1, 1, 5, 5))
        self.register_buffer("keep", torch.rand(1, 1, 5, 5) > 0.3)
        self.register_buffer("constant", torch.randn(1, 2, 5, WIDTH // 2))
        self.keep[..., 0] = True

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 5, 2, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self, x).flatten(2).mean(1))


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def qkv(m: Parts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return m.heads(m.q(x)), m.heads(m.k(x)), m.heads(m.v(x))


def eager(m: Parts, x: Tensor, mask: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    q, k, v = qkv(m, x)
    return merged(mask(q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v)


def fused(m: Parts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=mask, scale=0.5))


def einsum(m: Parts, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.5).softmax(-1)
    return merged(torch.einsum("bhqk,bhkd->bhqd", weights, v))


INF = float("-inf")
PAIRS: dict[str, tuple[Step, Step]] = {
    "bias then fill": (
        lambda m, x: eager(m, x, lambda s: (s + m.bias).masked_fill(~m.keep, INF)),
        lambda m, x: fused(m, x, m.bias.masked_fill(~m.keep, INF)),
    ),
    "fill then bias": (
        lambda m, x: eager(m, x, lambda s: s.masked_fill(~m.keep, INF) + m.bias),
        lambda m, x: fused(m, x, m.bias.masked_fill(~m.keep, INF)),
    ),
    "two fills": (
        lambda m, x: eager(m, x, lambda s: s.masked_fill(~m.keep, INF).masked_fill(~m.keep.flip(-2), INF)),
        lambda m, x: fused(m, x, m.keep & m.keep.flip(-2)),
    ),
    "mask first": (lambda m, x: eager(m, x, lambda s: m.bias + s), lambda m, x: fused(m, x, m.bias)),
    "attention in a product": (lambda m, x: eager(m, x) * m.y(x), lambda m, x: fused(m, x) * m.y(x)),
    "einsum in a product": (lambda m, x: einsum(m, x) * m.y(x), lambda m, x: fused(m, x) * m.y(x)),
    "tanh gate": (
        lambda m, x: (lambda a: (a * torch.tanh(a)) * m.y(x))(m.q(x)),
        lambda m, x: (lambda a: a * (torch.tanh(a) * m.y(x)))(m.q(x)),
    ),
    "swish by parts": (
        lambda m, x: (lambda a: (a * torch.sigmoid(a)) * m.y(x))(m.q(x)),
        lambda m, x: (lambda a: a * (m.y(x) * torch.sigmoid(a)))(m.q(x)),
    ),
    "weight before the norm": (
        lambda m, x: m.v.bias * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3),
        lambda m, x: m.v.bias * ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3)),
    ),
    "one over the root": (
        lambda m, x: x * (1.0 / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    ),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cp", "ali"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_two_spellings_explain_alike(name: str, composite: str) -> None:
    torch.manual_seed(0)
    first, second = (Parts(step).double().eval() for step in PAIRS[name])
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    a, b = (fxlrp.lrp_compile(m, composite)(x) for m in (first, second))
    torch.testing.assert_close(a.relevance, b.relevance, rtol=1e-9, atol=1e-9)
    assert a.ledger.residual < 1e-9
    assert b.ledger.residual < 1e-9


def test_single_steps_in_float64_stay_as_the_model_has_them() -> None:
    """Would break: a cast back to float32 taken out of a float32 model."""
    model = Parts(lambda m, x: m.k(x).double().softmax(-1).to(x.dtype) * m.y(x)).eval()
    explanation = fxlrp.lrp_compile(model)(torch.randn(2, 5, WIDTH))
    assert explanation.relevance.dtype is torch.float32
    assert explanation.ledger.residual < 1e-4


def test_frozen_attention_over_constants_is_a_frozen_factor() -> None:
    """Would break: constant values weighted by frozen weights taking a share of a product."""

    def step(m: Parts, x: Tensor) -> Tensor:
        q, k, _ = qkv(m, x)
        return merged(F.scaled_dot_product_attention(q, k, m.constant.expand(x.shape[0], -1, -1, -1))) * m.y(
            x
        )

    model, x = Parts(step).double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    ledger = fxlrp.lrp_compile(model, "cp")(x).ledger
    assert set(ledger.by_cause()) == {"bias"}
    assert ledger.residual < 1e-9


def test_the_fix_that_an_uncovered_op_suggests_works() -> None:
    model = Parts(lambda m, x: torch.sinc(m.q(x))).eval()
    with pytest.raises(fxlrp.UncoveredOpError, match="sinc"):
        fxlrp.lrp_compile(model)(torch.randn(2, 5, WIDTH))
    composite = fxlrp.Composite([(fxlrp.name("*"), Taylor())])
    explanation = fxlrp.lrp_compile(model, composite)(torch.randn(2, 5, WIDTH))
    assert explanation.ledger.residual < 1e-4


class Pooled(nn.Module):
    """Steps whose derivatives write through views or want contiguous coefficients."""

    def __init__(self, step: Callable[[Pooled, Tensor], Tensor]) -> None:
        super().__init__()
        self.lift, self.head, self.step = nn.Linear(6, 6), nn.Linear(6, 3), step
        self.pool, self.group, self.conv = (
            nn.AdaptiveAvgPool1d(1),
            nn.GroupNorm(2, 6),
            nn.Conv1d(6, 6, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self, self.lift(x)))


@pytest.mark.parametrize(
    "step",
    [
        lambda m, h: m.pool(h.transpose(1, 2)).squeeze(-1),
        lambda m, h: m.group(m.conv(h.transpose(1, 2))).flatten(2).transpose(1, 2).mean(1),
        lambda m, h: h.as_strided((h.shape[0], 6), (h.stride(0), 1)),
        lambda m, h: torch.fft.rfft(h, dim=1).real[:, 1],
        lambda m, h: F.max_pool1d(h.transpose(1, 2), 5).squeeze(-1),
    ],
    ids=["pool", "group norm", "as_strided", "fft", "max pool"],
)
def test_the_relevance_graph_is_as_right_as_the_ledger(step: Callable[[Pooled, Tensor], Tensor]) -> None:
    """Would break: a write through a view lost when a derivative is made functional (relevance of zeros)."""
    model, x = Pooled(step).eval(), torch.randn(2, 5, 6)
    explanation = fxlrp.lrp_compile(model, "gradient", dynamic=False)(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)[0] * x
    torch.testing.assert_close(explanation.relevance, expected, rtol=1e-4, atol=1e-6)
    assert explanation.ledger.residual < 1e-4
    assert fxlrp.lrp_compile(model, dynamic=False)(x).ledger.residual < 1e-4


def test_a_ledger_does_not_close_over_wrong_relevance() -> None:
    """The ledger stands beside the relevance that was returned, not beside its own."""
    model, x = Pooled(lambda m, h: h.mean(1)).eval(), torch.randn(2, 5, 6)
    explainer = fxlrp.lrp_compile(model)
    explainer(x)
    node = next(n for n in reversed(explainer.relevance_graph.graph.nodes) if "mul" in n.name)
    node.args = (node.args[0], 0.5)
    explainer._programs = {
        key: replace(compiled, runner=lower(compiled.program.relevance.graph, "eager", x.device))
        for key, compiled in explainer._programs.items()
    }
    assert explainer(x).ledger.residual > 1e-2


def test_composites_share_templates_but_not_rules() -> None:
    """Would break: nothing is shared, or a rule that compares equal to another is taken for it."""

    class Scaled(Epsilon):  # no dataclass of its own: compares by epsilon alone
        def __init__(self, factor: float) -> None:
            super().__init__()
            object.__setattr__(self, "factor", factor)

        def linearize(self, call: Call) -> Linearization:
            step = super().linearize(call)
            scale = torch.tensor(self.factor)  # a tensor of the rule's own
            return Linearization(step.output, lambda g: tuple(scale * x for x in step.pullback(g)))

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).eval()
    x = torch.rand(2, 4)
    explainer = fxlrp.lrp_compile(model)
    plain = explainer(x, target=0)
    ((trace,),) = explainer._traces.values()
    known = len(trace.canonical.templates)
    assert known > 0
    explainer.with_composite("cp")(x, target=0)
    assert len(trace.canonical.templates) == known  # the same rules in this model
    for factor in (2.0, 3.0):
        scaled = fxlrp.Composite([(fxlrp.op("linear"), Scaled(factor))])
        found = explainer.with_composite(scaled)(x, target=0)
        torch.testing.assert_close(found.relevance, plain.relevance * factor**2)
