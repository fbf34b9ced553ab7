"""Relative stabilisers, those of attention and of the identity norm, and the softmax's temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import models
from oracles import rules as oracle
from test_rules import ACTIVE, TOLERANCE, attention_case, close, error, randn, step
from torch import Tensor, nn

import fxlrp
from fxlrp.rules import (
    AttentionRule,
    Epsilon,
    IdentityNorm,
    NormRule,
    Rule,
    SoftmaxTaylor,
    Structural,
    Uniform,
    ops,
)

aten = torch.ops.aten


class TestRelative:
    """Breaks if the deviation is that of the batch, of other rows, or of padding."""

    def test_linear(self) -> None:
        x, W, b, G = randn(2, 3, 5), randn(4, 5, seed=1), randn(4, seed=2), randn(2, 3, 4, seed=3)
        found = step(Epsilon(0.5, relative=True), aten.linear.default, (x, W, b), (0,), G=G)
        kept = torch.zeros((), dtype=torch.float64)
        for i in range(2):
            for j in range(3):
                z = found.z[i, j]
                epsilon = 0.5 * math.sqrt(float(((z - z.mean()) ** 2).mean()))
                expected = oracle.epsilon_linear(x[i, j : j + 1], W, b, (z * G[i, j])[None], epsilon)
                assert error(found.R[0][i, j], expected.R_x[0]) < TOLERANCE
                kept = kept + expected.R_eps.sum()
        close(found.absorbed["epsilon"], kept, found.z * G)

    def test_conv2d(self) -> None:
        x, W, b = randn(2, 3, 5, 5), randn(4, 3, 3, 3, seed=1), randn(4, seed=2)
        G = randn(2, 4, 3, 3, seed=3)
        found = step(Epsilon(0.5, relative=True), aten.conv2d.default, (x, W, b), (0,), G=G)
        for i in range(2):
            epsilon = 0.5 * float(found.z[i].flatten().std(correction=0))
            expected = oracle.epsilon_conv2d(x[i : i + 1], W, b, (found.z * G)[i : i + 1], epsilon)
            assert error(found.R[0][i : i + 1], expected.R_x) < TOLERANCE

    @pytest.mark.parametrize("rule", [Structural(0.5, relative=True), Uniform(0.5, relative=True)])
    def test_the_rules_that_inherit_it(self, rule: Rule) -> None:
        """Row by row, each with the epsilon that its own deviation gives."""
        op = aten.add.Tensor if isinstance(rule, Structural) else aten.mul.Tensor
        a, b, G = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2)
        found = step(rule, op, (a, b), (0, 1), G=G)
        for i in range(3):
            epsilon = 0.5 * float(found.z[i].std(correction=0))
            alone = step(type(rule)(epsilon), op, (a[i], b[i]), (0, 1), G=G[i])
            for one, other in zip(found.R, alone.R, strict=True):
                assert error(one[i], other) < TOLERANCE

    def test_rows_without_deviation(self) -> None:
        """A row of zeros passes nothing and is no NaN; one number alone has no deviation and passes all."""
        x, G = torch.zeros(2, 3).double(), randn(2, 4)
        found = step(Epsilon(0.5, relative=True), aten.linear.default, (x, randn(4, 3)), (0,), G=G)
        assert not found.coefficients[0].any()
        x, W, G = randn(2, 3), randn(1, 3, seed=1), randn(2, 1, seed=2)
        found = step(Epsilon(0.5, relative=True), aten.linear.default, (x, W), (0,), G=G)
        assert error(found.coefficients[0], G @ W) < TOLERANCE

    def test_padding_and_other_samples_do_not_matter(self) -> None:
        """In a model: one text explained alone is what it is in a batch with a longer one."""
        model = models.tiny_bert(0)
        rule = Epsilon(0.1, relative=True)
        composite = fxlrp.Composite([(fxlrp.op("linear"), rule), (fxlrp.op("add"), rule)])
        explainer = fxlrp.lrp_compile(model, composite, backend="eager")
        ids, mask = models.token_batch(1, (7, 4), "right")
        both = explainer(input_ids=ids, attention_mask=mask, target=1)
        alone = explainer(input_ids=ids[1:, :4], attention_mask=mask[1:, :4], target=1)
        assert error(both.relevance[1:, :4], alone.relevance) < TOLERANCE
        assert both.ledger.residual < TOLERANCE
        assert both.ledger.by_cause()["epsilon"].abs().min() > 0

    def test_lengths_that_change(self) -> None:
        """Breaks if the number of elements that a deviation is over becomes a constant of the graph."""

        class Turned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

            def forward(self, ids: Tensor) -> Tensor:
                return self.head((self.table(ids).transpose(1, 2) * 2.0).mean(-1))

        model = Turned().double().eval()
        composite = fxlrp.Composite([(fxlrp.op("structural"), Structural(0.5, relative=True))])
        explainer = fxlrp.lrp_compile(model, composite, backend="eager")
        explainer(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        graph, ids = explainer.relevance_graph, torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
        found = explainer(ids)
        assert explainer.relevance_graph is graph
        fixed = fxlrp.lrp_compile(model, composite, backend="eager", dynamic=False)(ids)
        assert error(found.relevance, fixed.relevance) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ratios_are_taken_in_float32(dtype: torch.dtype) -> None:
    """In float16 an epsilon of 1e-9 is 0, and 0/0 follows; in bfloat16 the quotient would lose a bit more."""
    x, W, G = randn(8, 32).to(dtype), randn(16, 32, seed=1).to(dtype), randn(8, 16, seed=2).to(dtype)
    x[0] = 0
    for epsilon in (1e-9, 0.7):
        found = step(Epsilon(epsilon), aten.linear.default, (x, W), (0,), G=G)
        z = found.z.float()
        damped = (G.float() * (z.abs() / (z.abs() + epsilon)).nan_to_num()).to(dtype)
        assert torch.equal(found.coefficients[0], torch.mm(damped, W))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Epsilon(-1e-9), "epsilon must be 0 or more"),
        (lambda: Uniform(math.nan), "epsilon must be 0 or more"),
        (lambda: SoftmaxTaylor(0.0), "temperature must be above 0"),
        (lambda: AttentionRule(temperature=-1.0), "temperature must be above 0"),
        (lambda: AttentionRule(-1.0), "stabilisers must be 0 or more"),
        (lambda: IdentityNorm(0.0), "epsilon must be above 0"),
    ],
)
def test_parameters_that_are_refused(make: Callable[[], Rule], says: str) -> None:
    """One kind of error for all rules, and with what is allowed."""
    with pytest.raises(fxlrp.CompositeError, match=says):
        make()


# ----------------------------------------------------------------------------------------------------
# softmax and attention


def softened(x: Tensor, G: Tensor, temperature: float) -> Tensor:
    """The coefficient ``s (G - sum(s G)) / T`` with ``s = softmax(x / T)``, entry by entry."""
    s = oracle.softmax(x / temperature)
    return (
        torch.stack([s[..., i] * (G[..., i] - (s * G).sum(-1)) for i in range(x.shape[-1])], -1) / temperature
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature: float) -> None:
    """Breaks if 1/T is forgotten, or the forward is softened too."""
    x, G = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    x[0, 1, 2] = -math.inf
    found = step(SoftmaxTaylor(temperature), aten.softmax.int, (x, -1), (0,), G=G)
    assert torch.equal(found.z, torch.softmax(x, -1))
    assert error(found.coefficients[0], softened(x, G, temperature)) < TOLERANCE
    close(found.R[0].sum() + found.absorbed["remainder"], (found.z * G).sum(), found.z * G)


def attention_by_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor,
    scale: float,
    eps: tuple[float, float],
    temperature: float,
    active: tuple[bool, ...],
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Eager attention under the three rules one after the other: relevance of q, k, v, and what is kept."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(groups, 1) for t in (k, v))
    products = q @ wide_k.mT
    scores = products * scale + (0.0 if bias is None else bias)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    A = oracle.softmax(scores)
    scored = active[0] or active[1]
    mixed = oracle.matmul_uniform(A, wide_v, (A @ wide_v) * G, eps[0], (scored, active[2]))
    kept = {"epsilon": mixed.R_eps.sum(), "remainder": torch.zeros((), dtype=A.dtype)}
    R_q, R_k = torch.zeros_like(q), torch.zeros_like(wide_k)
    if scored:
        of_weights = torch.where(A > 0, mixed.R_A / torch.where(A > 0, A, 1.0), 0.0)
        of_products = softened(scores, of_weights, temperature) * scale
        R = products * of_products
        kept["remainder"] = mixed.R_A.sum() - R.sum()
        back = oracle.matmul_uniform(q, wide_k.mT, R, eps[1], active[:2])
        kept["epsilon"] = kept["epsilon"] + back.R_eps.sum()
        R_q, R_k = back.R_A, back.R_B.mT
    heads = [t.unflatten(1, (k.shape[1], groups)).sum(2) for t in (R_k, mixed.R_B)]
    return [R_q, *heads], kept


@pytest.mark.parametrize("settings", [(0.1, 0.0, 1.0), (0.0, 0.2, 1.0), (0.0, 0.0, 2.0), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("masked", ["none", "boolean", "additive", "minus infinity", "causal"])
def test_stabilised_attention(
    masked: str, heads: int, active: tuple[int, ...], settings: tuple[float, float, float]
) -> None:
    """Breaks if a stabiliser sits elsewhere, a group of heads is not summed, or causes are mixed up."""
    (q, k, v), rest, options = attention_case(masked, heads)
    G = randn(2, 4, 3, 4, seed=3)
    found = step(AttentionRule(*settings), ops.attention, (q, k, v, *rest), active, G=G)
    assert torch.equal(found.z, ops.attention(q, k, v, *rest))
    flags = (0 in active, 1 in active, 2 in active)
    expected, kept = attention_by_steps(q, k, v, G, 0.7, settings[:2], settings[2], flags, **options)
    for i, R in zip(active, found.R, strict=True):
        assert error(R, expected[i]) < TOLERANCE
    for cause, amount in kept.items():
        close(found.absorbed.get(cause, torch.zeros(())), amount, found.z * G)


def test_attention_without_stabilisers_is_the_fused_one() -> None:
    """The limit of small stabilisers is what the fused path gives."""
    (q, k, v), rest, _ = attention_case("additive", 2)
    G = randn(2, 4, 3, 4, seed=3)
    fused = step(AttentionRule(), ops.attention, (q, k, v, *rest), (0, 1, 2), G=G)
    near = step(AttentionRule(1e-14, 1e-14), ops.attention, (q, k, v, *rest), (0, 1, 2), G=G)
    for one, other in zip(fused.R, near.R, strict=True):
        assert error(one, other) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stabilised_attention_in_half_precision(dtype: torch.dtype) -> None:
    """Breaks if the softmax or a quotient is taken in half precision."""
    q, k, v, G = (randn(2, 3, 16, 32, seed=n).to(dtype) for n in range(4))
    rule = AttentionRule(0.1, 0.1, 1.5)
    found = step(rule, ops.attention, (q, k, v), (0, 1, 2), G=G)
    exact = step(rule, ops.attention, (q.double(), k.double(), v.double()), (0, 1, 2), G=G.double())
    for one, other in zip(found.R, exact.R, strict=True):
        assert error(one.double(), other) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stabilised_attention_in_a_model(attention: str) -> None:
    """Breaks if a mask or a batch size of the first call ends up in the graph, or the ledger stays open."""
    model = models.tiny_llama(0, attention=attention)
    rule = AttentionRule(0.05, 0.05, 1.5)
    explainer = fxlrp.lrp_compile(model, fxlrp.Composite([(fxlrp.op("attention"), rule)]), backend="eager")
    ids, mask = models.token_batch(1, (7, 4), "right")
    first = explainer(input_ids=ids, attention_mask=mask)
    graph = explainer.relevance_graph
    ids, mask = models.token_batch(5, (6, 9, 3), "right")
    second = explainer(input_ids=ids, attention_mask=mask)
    assert explainer.relevance_graph is graph
    for explanation in (first, second):
        assert explanation.ledger.residual < TOLERANCE
        assert explanation.ledger.by_cause()["epsilon"].abs().min() > 0
    alone = explainer(input_ids=ids[2:, :3], attention_mask=mask[2:, :3])
    assert error(second.relevance[2:, :3], alone.relevance) < TOLERANCE


# ----------------------------------------------------------------------------------------------------
# identity norm


NORMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "layer_norm": (aten.layer_norm.default, ([6], randn(6, seed=1), randn(6, seed=2), 1e-3)),
    "layer_norm, plain": (aten.layer_norm.default, ([3, 6],)),
    "rms_norm": (aten.rms_norm.default, ([6], randn(6, seed=1), 1e-3)),
    "group_norm": (aten.group_norm.default, (3, randn(3, seed=1), randn(3, seed=2), 1e-3)),
    "normalize": (ops.normalize, (randn(2, 3, 1, seed=1),)),
    "normalize_divide": (ops.normalize_divide, (randn(2, 3, 1, seed=1),)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_identity_norm(norm: str) -> None:
    """R_x = R_z |x| / (|x| + epsilon) and not a bit to bias or mean; an input of 0 is no NaN."""
    op, rest = NORMS[norm]
    x, G = randn(2, 3, 6), randn(2, 3, 6, seed=3)
    x[0, 0, 0] = 0.0
    found = step(IdentityNorm(0.01), op, (x, *rest), (0,), G=G)
    assert torch.equal(found.z, op(x, *rest))
    R_z = found.z * G
    assert error(found.R[0], R_z * x / oracle.stabilise(x, 0.01)) < TOLERANCE
    close(found.absorbed["epsilon"], (R_z - found.R[0]).sum(), R_z)


@pytest.mark.parametrize("op", [ops.normalize, ops.normalize_divide])
def test_identity_of_a_core_is_the_plain_rule(op: Any) -> None:
    """x * factor has no bias and no mean: up to the stabiliser both rules are one."""
    x, statistic, G = randn(2, 6), randn(2, 1, seed=1).abs(), randn(2, 6, seed=2)
    one = step(IdentityNorm(1e-12), op, (x, statistic), (0,), G=G)
    other = step(NormRule(), op, (x, statistic), (0,), G=G)
    assert error(one.R[0], other.R[0]) < TOLERANCE


def test_identity_norm_in_a_model() -> None:
    """Breaks if the factor of a norm that is written out gets relevance, or half precision is divided in."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.head(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    torch.manual_seed(0)
    model, x = Normed().double().eval(), randn(4, 16)
    composite = fxlrp.Composite([(fxlrp.op("norm"), IdentityNorm())])
    explainer = fxlrp.lrp_compile(model, composite, backend="eager")
    explanation = explainer(x)
    assert {row.op for row in explainer.plan if row.rule == IdentityNorm()} == {"layer_norm", "normalize"}
    assert explanation.ledger.residual < TOLERANCE
    kept = explanation.ledger.by_cause()
    total = explanation.relevance.sum(-1) + kept["epsilon"] + kept["bias"]
    assert error(total, explanation.value) < TOLERANCE
    half = fxlrp.lrp_compile(model.to(torch.bfloat16), composite, backend="eager")(x.bfloat16())
    assert half.relevance.dtype == torch.bfloat16
    assert half.ledger.residual < 0.05
