"""Gamma, alpha-beta and z+ against the dense textbook forms, on every op of the table, and inside models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import dense, models
from test_rules import TOLERANCE, close, error, randn, step
from torch import Tensor, nn

import fxlrp
from bench.models import case
from fxlrp.compiler.graphs import is_op
from fxlrp.rules import AlphaBeta, Epsilon, Gamma, Rule, ZPlus, affine
from fxlrp.rules.base import Call

aten = torch.ops.aten


def layers(biased: bool) -> dict[str, tuple[Any, tuple[Any, ...], int]]:
    """An op, its operands, and which one is active; weights and inputs of both signs."""
    b4, b6 = (randn(n, seed=9) if biased else None for n in (4, 6))
    image, eye = randn(2, 4, 5, 6), [1, 1]
    mean, variance = randn(4, seed=2), randn(4, seed=3).abs() + 0.1
    frozen = (mean, variance, False, 0.1, 1e-3, False)
    rows, W = randn(2, 3, 5), randn(4, 5, seed=1)

    def weights(*shape: int) -> Tensor:
        return randn(*shape, seed=1)

    return {
        "linear": (aten.linear.default, (rows, W, b4), 0),
        "linear, weights": (aten.linear.default, (rows[0], W, b4), 1),
        "linear, vector": (aten.linear.default, (rows[0], W[0]), 0),
        "conv1d": (aten.conv1d.default, (randn(2, 4, 7), weights(6, 2, 3), b6, [2], [1], [2], 2), 0),
        "conv2d": (aten.conv2d.default, (image, weights(6, 4, 3, 2), b6, [2, 1], [1, 0], eye, 1), 0),
        "conv2d, deep": (aten.conv2d.default, (image, weights(4, 1, 2, 2), b4, eye, eye, [2, 2], 4), 0),
        "conv2d, one image": (aten.conv2d.default, (image[0], weights(6, 4, 3, 2), b6), 0),
        "conv2d, same": (aten.conv2d.padding, (image, weights(6, 4, 3, 3), b6, eye, "same"), 0),
        "conv3d": (aten.conv3d.default, (randn(1, 2, 3, 4, 3), weights(4, 2, 2, 2, 2), b4), 0),
        "transposed 1d": (
            aten.conv_transpose1d.default,
            (randn(2, 4, 4), weights(4, 3, 3), b6, [2], [1], [1], 2),
            0,
        ),
        "transposed 2d": (
            aten.conv_transpose2d.input,
            (image[:, :, :3, :3], weights(4, 6, 2, 3), b6, [2, 1]),
            0,
        ),
        "batch_norm": (aten.batch_norm.default, (image, weights(4), b4, *frozen), 0),
        "batch_norm, plain": (aten.batch_norm.default, (image, None, b4, *frozen), 0),
    }


def products() -> dict[str, tuple[Any, tuple[Any, ...], int]]:
    """The same for ops whose bias is another operand, or none."""
    A, B, C = randn(2, 3, 4), randn(2, 4, 5, seed=1), randn(3, 5, seed=2)
    return {
        "matmul": (aten.matmul.default, (A, B), 0),
        "matmul, right": (aten.matmul.default, (A, B), 1),
        "matmul, broadcast": (aten.matmul.default, (A, B[0]), 0),
        "mm": (aten.mm.default, (A[0], B[0]), 0),
        "bmm": (aten.bmm.default, (A, B), 1),
        "mv": (aten.mv.default, (A[0], B[0, :, 0]), 1),
        "dot": (aten.dot.default, (A[0, 0], B[0, :, 0]), 0),
        "outer": (aten.outer.default, (A[0, 0], C[0]), 1),
        "inner": (aten.inner.default, (A, B[0].mT), 0),
        "kron": (aten.kron.default, (A[0], C), 0),
        "tensordot": (aten.tensordot.default, (A, B, [2], [1]), 0),
        "einsum": (aten.einsum.default, ("bij,bjk->bik", [A, B]), 1),
        "einsum, implicit": (aten.einsum.default, ("ij,jk", [A[0], B[0]]), 2),
        "einsum, three": (aten.einsum.default, ("bij,bjk,ij->bik", [A, B, randn(3, 4, seed=3)]), 1),
        "addmm": (aten.addmm.default, (C, A[0], B[0]), 1),
        "addmm, scaled": (aten.addmm.default, (C, A[0], B[0]), 2),
        "addbmm": (aten.addbmm.default, (C, A, B), 1),
        "addmv": (aten.addmv.default, (C[:, 0], A[0], B[0, :, 0]), 1),
    }


RULES: dict[str, tuple[Rule, Callable[..., dense.Shared], tuple[float, ...]]] = {
    "gamma": (Gamma(0.25), dense.gamma, (0.25,)),
    "gamma, stabilised": (Gamma(3.0, 0.1), dense.gamma, (3.0, 0.1)),
    "alpha 2, beta 1": (AlphaBeta(2, 1), dense.alpha_beta, (2, 1)),
    "alpha 1.5, beta 0.5, stabilised": (AlphaBeta(1.5, 0.5, 0.1), dense.alpha_beta, (1.5, 0.5, 0.1)),
    "z+": (ZPlus(), dense.alpha_beta, (1, 0)),
    "z+, stabilised": (ZPlus(0.1), dense.alpha_beta, (1, 0, 0.1)),
}
BY_NAME = pytest.mark.parametrize("name", RULES)


def compare(name: str, op: Any, args: tuple[Any, ...], active: int, **options: Any) -> None:
    """Relevance and every cause as the oracle has them; the forward is the op's own, bit for bit."""
    rule, oracle, parameters = RULES[name]
    call = Call(op, args, options, (active,))
    assert rule.refusal(call) is None
    (x,) = call.operands()
    G = randn(*call.run().shape, seed=7)
    found = step(rule, op, args, (active,), G=G, **options)
    assert torch.equal(found.z, call.run())
    expected = oracle(lambda t: call.with_active([t]).run(), x, found.z * G, *parameters)
    assert error(found.R[0], expected.R_x) < TOLERANCE
    booked = {"bias": expected.R_bias, "epsilon": expected.R_eps, "empty": expected.R_empty}
    for cause, amount in booked.items():
        close(found.absorbed.get(cause, torch.zeros(())), amount, found.z * G)
    close(found.R[0].sum() + sum(found.absorbed.values()), (found.z * G).sum(), found.z * G)


class TestAgainstTheTextbook:
    """Breaks if a sign, a bias, a mean or a scalar of an op is treated as another, or is not at all."""

    @BY_NAME
    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.parametrize("layer", layers(True))
    def test_layer(self, layer: str, biased: bool, name: str) -> None:
        op, args, active = layers(biased)[layer]
        compare(name, op, args, active)

    @BY_NAME
    @pytest.mark.parametrize("product", products())
    def test_product(self, product: str, name: str) -> None:
        op, args, active = products()[product]
        options = {"beta": -0.5, "alpha": -2.0} if product == "addmm, scaled" else {}
        compare(name, op, args, active, **options)

    @BY_NAME
    @pytest.mark.parametrize("inputs", ["zero", "some zero", "positive", "negative"])
    @pytest.mark.parametrize("weights", ["zero", "some zero", "positive", "negative", "mixed"])
    def test_signs(self, inputs: str, weights: str, name: str) -> None:
        """Breaks if 0/0 turns up, or if an output without contributions of a sign is shared by rounding."""
        shape = {
            "zero": torch.zeros_like,
            "some zero": torch.relu,
            "positive": abs,
            "negative": lambda t: -t.abs(),
            "mixed": lambda t: t,
        }
        x, W = shape[inputs](randn(3, 40)), shape[weights](randn(6, 40, seed=1))
        for b in (None, torch.zeros(6).double(), randn(6, seed=2)):
            compare(name, aten.linear.default, (x, W, b), 0)

    @BY_NAME
    def test_nothing_contributes(self, name: str) -> None:
        """Breaks if a coefficient, however large, is divided by the least number there is."""
        x, W, b, G = torch.ones(2, 3), torch.zeros(4, 3), torch.zeros(4), torch.full((2, 4), 1e30)
        found = step(RULES[name][0], aten.linear.default, (x, W, b), (0,), G=G)
        assert not found.coefficients[0].any()
        assert not any(bool(amount) for amount in found.absorbed.values())

    def test_grouped_experts(self) -> None:
        """Breaks if an expert's weights are split with another's rows. The kernel takes float32 at most."""
        x, W = randn(6, 8).float(), randn(2, 8, 4, seed=1).float()
        ends = torch.tensor([2, 6], dtype=torch.int32)
        G = randn(6, 4, seed=2).float()
        for name in RULES:
            rule, oracle, parameters = RULES[name]
            found = step(rule, aten._grouped_mm.default, (x, W, ends), (0,), G=G)
            for rows, weights in ((slice(0, 2), W[0]), (slice(2, 6), W[1])):
                expected = oracle(
                    lambda t, w=weights: t @ w.double(),
                    x[rows].double(),
                    (found.z * G)[rows].double(),
                    *parameters,
                )
                assert error(found.R[0][rows].double(), expected.R_x) < 1e-5

    def test_relevance_of_one_sign_is_not_divided_by_rounding(self) -> None:
        """In float32 z and A need not cancel exactly; what they leave is nobody's relevance."""
        torch.manual_seed(0)
        x, W = torch.rand(8, 3000), -torch.rand(50, 3000)
        z = x @ W.T
        found = step(AlphaBeta(2, 1), aten.linear.default, (x, W), (0,), G=torch.ones_like(z))
        assert float(found.absorbed["empty"]) == pytest.approx(2 * float(z.sum()), rel=1e-5)
        assert float(found.R[0].abs().max()) <= 1.01 * float(z.abs().max())


def test_gamma_of_0_is_epsilon() -> None:
    """The same numbers, not only close ones."""
    op, args, active = layers(True)["linear"]
    G = randn(2, 3, 4, seed=7)
    for epsilon in (0.0, 0.25):
        one = step(Gamma(0.0, epsilon), op, args, (active,), G=G)
        other = step(Epsilon(epsilon), op, args, (active,), G=G)
        assert torch.equal(one.R[0], other.R[0])
        assert one.absorbed == other.absorbed


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lambda: Gamma(-0.1), "gamma must be 0 or more"),
        (lambda: Gamma(float("inf")), "finite"),
        (lambda: Gamma(0.1, -1.0), "epsilon must be 0 or more"),
        (lambda: AlphaBeta(2, 2), "alpha - beta must be 1"),
        (lambda: AlphaBeta(0.5, -0.5), "beta 0 or more"),
        (lambda: AlphaBeta(2, 1, -1.0), "epsilon must be 0 or more"),
        (lambda: ZPlus(float("nan")), "epsilon must be 0 or more"),
    ],
)
def test_parameters_that_are_refused(rule: Callable[[], Rule], says: str) -> None:
    """When the rule is made, and with what is allowed."""
    with pytest.raises(fxlrp.CompositeError, match=says):
        rule()


@pytest.mark.parametrize(
    ("op", "args", "active", "says"),
    [
        (aten.linear.default, (randn(2, 3), randn(4, 3), randn(4)), (0, 2), "several"),
        (aten.linear.default, (randn(2, 3), randn(4, 3), randn(4)), (2,), "added by the op"),
        (aten.matmul.default, (randn(2, 3).cfloat(), randn(3, 4).cfloat()), (0,), "complex"),
        (aten.einsum.default, ("ij,jk->i", [randn(2, 3), randn(3, 4)]), (1,), "sums over an index"),
        (aten.einsum.default, ("ij,jk,k", [randn(2, 3), randn(3, 4), randn(4)]), (1,), "sums over an index"),
        (aten.bilinear.default, (randn(2, 3), randn(2, 3), randn(4, 3, 3)), (0,), "no row for 'bilinear'"),
        (
            aten.batch_norm.default,
            (randn(2, 3), None, None, randn(3), randn(3), True, 0.1, 1e-5, False),
            (0,),
            "training mode",
        ),
    ],
)
def test_calls_that_are_refused(op: Any, args: tuple[Any, ...], active: tuple[int, ...], says: str) -> None:
    """Where contributions are no products of one input with one weight, or have no sign."""
    reason = affine.refusal(Call(op, args, {}, active))
    assert reason is not None and says in reason
    assert Gamma().refusal(Call(op, args, {}, active)) == reason


# ----------------------------------------------------------------------------------------------------
# inside models


class Mixed(nn.Module):
    """A small convolutional net with batch norm and a head of dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, stride=2, groups=2),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape) + 0.1)
    return model.eval()


def everywhere(rule: Rule, **options: Any) -> fxlrp.Composite:
    return fxlrp.Composite([(fxlrp.op("linear") | fxlrp.op("conv"), rule)], **options)


def bert_case() -> tuple[nn.Module, dict[str, Tensor]]:
    ids, mask = models.token_batch(1, (7, 4), "right")
    return models.tiny_bert(0), {"input_ids": ids, "attention_mask": mask}


def vit_case() -> tuple[nn.Module, dict[str, Tensor]]:
    model = models.tiny_vit(0)
    size = model.config.image_size
    return model, {"pixel_values": randn(2, model.config.num_channels, size, size)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "convolutions": lambda: (mixed(), {"x": randn(2, 3, 6, 6)}),
    "ViT": vit_case,
    "BERT": bert_case,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_ledger_closes_and_gamma_0_is_epsilon(kind: str) -> None:
    """Breaks if an explainer's graph loses what the rule alone keeps."""
    model, inputs = MODELS[kind]()
    explainer = fxlrp.lrp_compile(model, everywhere(Gamma(0.0)), backend="eager")
    first = explainer(**inputs)
    plain = explainer.with_composite("attnlrp")(**inputs)
    assert torch.equal(first.relevance, plain.relevance)
    for rule in (Gamma(0.25), Gamma(0.25, 1e-6), AlphaBeta(2, 1), ZPlus()):
        explanation = explainer.with_composite(everywhere(rule))(**inputs)
        assert explanation.ledger.residual < 1e-9
        assert error(explanation.relevance, plain.relevance) > 1e-3


def test_a_network_equals_the_textbook_layer_by_layer() -> None:
    """Breaks if relevance between layers is not that of the layer before."""
    model, x = mixed(), randn(2, 3, 6, 6)
    found = fxlrp.lrp_compile(model, everywhere(Gamma(0.25)), backend="eager")(x, target=1)
    steps = [*model.body, lambda t: t.mean((2, 3)), *model.head]
    values = [x]
    for layer in steps:
        values.append(layer(values[-1]).detach())
    R = torch.zeros_like(values[-1])
    R[:, 1] = values[-1][:, 1]
    for layer, value in zip(reversed(steps), reversed(values[:-1]), strict=True):
        if isinstance(layer, (nn.ReLU, nn.GELU)):
            continue
        weight = 0.25 if isinstance(layer, nn.Module) else 0.0
        R = dense.gamma(layer, value, R, weight).R_x.detach()
    assert error(found.relevance, R) < TOLERANCE


def test_one_more_product_forward_and_one_back() -> None:
    """Breaks if a rule recomputes a product, or z+ pays for the negative part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    counts = {}
    for rule in (Epsilon(), Gamma(), AlphaBeta(), ZPlus()):
        explainer = fxlrp.lrp_compile(model, everywhere(rule), backend="eager")
        explainer(torch.randn(4, 6))
        graph = explainer.relevance_graph
        counts[rule] = sum(is_op(node, "mm", "matmul", "linear", "addmm") for node in graph.graph.nodes)
        held = [t for t in (*graph.parameters(), *graph.buffers()) if t.dim() == 2]
        assert {t.data_ptr() for t in held} <= {p.data_ptr() for p in model.parameters()}
    assert counts[Epsilon()] == 4
    assert counts[Gamma()] == counts[AlphaBeta()] == counts[ZPlus()] == 8


def test_other_sizes_and_compilation() -> None:
    """Breaks if sizes or strides of the first call end up in the graph."""
    model = mixed().float()
    explainer = fxlrp.lrp_compile(model, everywhere(Gamma(0.25)), backend="eager")
    explainer(torch.randn(2, 3, 6, 6))
    graph = explainer.relevance_graph
    x = torch.randn(3, 3, 6, 6)
    explanation = explainer(x)
    assert explainer.relevance_graph is graph
    own = fxlrp.lrp_compile(model, everywhere(Gamma(0.25)), backend="eager", dynamic=False)(x)
    torch.testing.assert_close(explanation.relevance, own.relevance, rtol=1e-4, atol=1e-6)
    compiled = torch.compile(graph, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x)[0][0], explanation.relevance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [Gamma(0.25), AlphaBeta(2, 1), ZPlus()])
def test_half_precision(rule: Rule, dtype: torch.dtype) -> None:
    """Breaks if quotients are taken in half precision: the error must be that of the dtype's own products."""
    x, W, b, G = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(16, 256), (64, 256), (64,), (16, 64)]))
    found = step(rule, aten.linear.default, (x, W, b), (0,), G=G)
    exact = step(rule, aten.linear.default, (x.double(), W.double(), b.double()), (0,), G=G.double())
    assert found.coefficients[0].dtype == dtype
    assert error(found.R[0].double(), exact.R[0]) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_with_experts(dtype: torch.dtype, within: float) -> None:
    """Breaks if either of the ops that experts run as has no row."""
    experts = case("Mixtral")
    model, inputs = experts.model(dtype=dtype), experts.example(dtype)
    explainer = fxlrp.lrp_compile(model, everywhere(Gamma(0.25)), backend="eager")
    explanation = explainer(**inputs)
    assert any("grouped_mm" in row.op and row.rule == Gamma(0.25) for row in explainer.plan)
    assert explanation.ledger.residual < within


def test_a_rule_that_does_not_fit_is_refused_with_its_place() -> None:
    """At plan time, with node, module, rule and reason."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(4, 4, 3)
            self.register_buffer("other", torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x, self.other)

    explainer = fxlrp.lrp_compile(Pair().eval(), everywhere(Gamma()), backend="eager", dynamic=False)
    with pytest.raises(fxlrp.CompositeError) as caught:
        explainer(torch.randn(2, 4))
    for part in ("Gamma(gamma=0.25", "'bilinear'", "module 'pair'", "no row for 'bilinear'", "Epsilon()"):
        assert part in str(caught.value)
