"""The oracles against each other, against autograd, and against the HF models they re-implement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from oracles import bert, engine, gpt2, gxi, llama, models, rules, t5, vit
from oracles.engine import EngineRules, Step
from torch import Tensor

EPSILONS = [0.0, 1e-3, 0.5]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


class Damp(torch.autograd.Function):
    """The stabiliser in coefficient form: z as it is, its coefficient times |z| / (|z| + eps)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.eps = eps
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grads[0] * z.abs() / (z.abs() + ctx.eps) if ctx.eps else grads[0], None


def damp(z: Tensor, eps: float) -> Tensor:
    out: Tensor = Damp.apply(z, eps)  # type: ignore[no-untyped-call]
    return out


def coefficient_form(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], G: Tensor, active: Sequence[bool] | None = None
) -> list[Tensor]:
    """Value times coefficient, with the coefficient by autograd through ``function``'s modified gradients."""
    flags = [True] * len(inputs) if active is None else active
    leaves = [x.clone().requires_grad_(flag) for x, flag in zip(inputs, flags, strict=True)]
    out = function(*leaves)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = iter(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], G, allow_unused=True))
    found = [next(grads) if flag else None for flag in flags]
    return [torch.zeros_like(x) if g is None else x * g for x, g in zip(inputs, found, strict=True)]


# ----------------------------------------------------------------------------------------------------
# A: the rules


class TestRules:
    def test_sign_of_zero_is_plus_one(self) -> None:
        z = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=torch.float64)
        assert rules.sign(z).tolist() == [-1, 1, 1, 1]
        assert rules.stabilise(z, 0.25).tolist() == [-2.25, 0.25, 0.25, 3.25]

    def test_epsilon_linear_by_hand(self) -> None:
        x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        W = torch.tensor([[3.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
        b = torch.tensor([0.0, 1.0], dtype=torch.float64)  # z = (-1, 4)
        R = torch.tensor([6.0, 10.0], dtype=torch.float64)
        R_x, R_bias, R_eps = rules.epsilon_linear(x, W, b, R, eps=1.0)  # denominators -2 and 5
        assert R_x.tolist() == [3 / -2 * 6 + 1 / 5 * 10, -4 / -2 * 6 + 2 / 5 * 10]
        assert R_bias.tolist() == [0, 2]
        assert R_eps.tolist() == [3, 2]

    @pytest.mark.parametrize("eps", EPSILONS)
    @pytest.mark.parametrize("biased", [True, False])
    def test_epsilon_linear(self, eps: float, biased: bool) -> None:
        x, W, G = randn(2, 3, 5), randn(4, 5, seed=1), randn(2, 3, 4, seed=2)
        b = randn(4, seed=3) if biased else None
        z = torch.nn.functional.linear(x, W, b)
        R_x, R_bias, R_eps = rules.epsilon_linear(x, W, b, z * G, eps)
        (expected,) = coefficient_form(lambda t: damp(torch.nn.functional.linear(t, W, b), eps), [x], G)
        assert error(R_x, expected) < 1e-11
        assert error(R_x.sum(-1) + R_bias.sum(-1) + R_eps.sum(-1), (z * G).sum(-1)) < 1e-12
        assert biased or not R_bias.any()

    @pytest.mark.parametrize("eps", EPSILONS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "padding": 1},
            {"dilation": 2, "groups": 2},
            {"stride": (2, 1), "padding": (0, 2)},
        ],
    )
    def test_epsilon_conv2d(self, eps: float, options: dict[str, Any]) -> None:
        x, W, b = randn(2, 4, 6, 5), randn(6, 4 // options.get("groups", 1), 3, 2, seed=1), randn(6, seed=2)
        z = torch.nn.functional.conv2d(x, W, b, **options)
        G = randn(*z.shape, seed=3)
        found = rules.epsilon_conv2d(x, W, b, z * G, eps, **options)
        (expected,) = coefficient_form(
            lambda t: damp(torch.nn.functional.conv2d(t, W, b, **options), eps), [x], G
        )
        assert error(found.R_x, expected) < 1e-9
        assert error(found.R_x.sum() + found.R_bias.sum() + found.R_eps.sum(), (z * G).sum()) < 1e-10

    @pytest.mark.parametrize("eps", EPSILONS)
    def test_epsilon_conv1d(self, eps: float) -> None:
        x, W, options = randn(2, 4, 9), randn(6, 2, 3, seed=1), {"stride": 2, "padding": 2, "groups": 2}
        z = torch.nn.functional.conv1d(x, W, None, 2, 2, 1, 2)
        G = randn(*z.shape, seed=3)
        found = rules.epsilon_conv1d(x, W, None, z * G, eps, **options)
        (expected,) = coefficient_form(
            lambda t: damp(torch.nn.functional.conv1d(t, W, None, 2, 2, 1, 2), eps), [x], G
        )
        assert error(found.R_x, expected) < 1e-9

    @pytest.mark.parametrize("eps", EPSILONS)
    @pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (4,)])
    def test_epsilon_add(self, eps: float, shape: tuple[int, ...]) -> None:
        a, b, G = randn(2, 3, 4), randn(*shape, seed=1), randn(2, 3, 4, seed=2)
        R = (a + b) * G
        R_a, R_b, R_eps = rules.epsilon_add(a, b, R, eps)
        expected = coefficient_form(lambda s, t: damp(s + t, eps), [a, b], G)
        assert error(R_a, expected[0]) < 1e-11
        assert error(R_b, expected[1]) < 1e-11
        assert error(R_a.sum() + R_b.sum() + R_eps.sum(), R.sum()) < 1e-12

    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_uniform_product(self, n: int) -> None:
        factors = [randn(2, 3, seed=k) if k else randn(3) for k in range(n)]
        G = randn(2, 3, seed=9)

        def product(*xs: Tensor) -> Tensor:
            out = gxi.scale_gradient(xs[0], 1 / n)
            for x in xs[1:]:
                out = out * gxi.scale_gradient(x, 1 / n)
            return out

        R = product(*factors) * G
        for found, expected in zip(
            rules.uniform_product(factors, R), coefficient_form(product, factors, G), strict=True
        ):
            assert error(found, expected) < 1e-12

    @pytest.mark.parametrize("eps", EPSILONS)
    @pytest.mark.parametrize("active", [(True, True), (True, False), (False, True)])
    def test_matmul_uniform(self, eps: float, active: tuple[bool, bool]) -> None:
        A, B, G = randn(2, 3, 4, 5), randn(2, 1, 5, 2, seed=1), randn(2, 3, 4, 2, seed=2)
        share = 1 / sum(active)
        R = (A @ B) * G
        found = rules.matmul_uniform(A, B, R, eps, active)

        def forward(a: Tensor, b: Tensor) -> Tensor:
            a = gxi.scale_gradient(a, share) if active[0] else a.detach()
            b = gxi.scale_gradient(b, share) if active[1] else b.detach()
            return damp(a @ b, eps)

        expected = coefficient_form(forward, [A, B], G)
        for one, other, flag in zip(found[:2], expected, active, strict=True):
            assert error(one, other) < 1e-10 if flag else not one.any()
        assert error(found.R_A.sum() + found.R_B.sum() + found.R_eps.sum(), R.sum()) < 1e-10

    def test_matmul_of_design(self) -> None:
        """DESIGN.md: half of A * ((sigma(O) R / O) B')."""
        A, B, eps = randn(3, 4), randn(4, 2, seed=1), 0.3
        R = randn(3, 2, seed=2)
        z = A @ B
        sigma = z.abs() / (z.abs() + eps)
        found = rules.matmul_uniform(A, B, R, eps)
        assert error(found.R_A, 0.5 * A * ((sigma * R / z) @ B.T)) < 1e-12
        assert error(found.R_B, 0.5 * B * (A.T @ (sigma * R / z))) < 1e-12

    @pytest.mark.parametrize("dim", [-1, 1])
    def test_softmax_taylor(self, dim: int) -> None:
        x, G = randn(2, 3, 4), randn(2, 3, 4, seed=1)
        x[0, 1, 2] = x[1, 0, 0] = -math.inf
        s = torch.softmax(x, dim)
        assert error(rules.softmax(x, dim), s) < 1e-14
        found = rules.softmax_taylor(x, s * G, dim)
        vjp = s * (G - (s * G).sum(dim, keepdim=True))
        assert error(found.R_x, torch.where(torch.isinf(x), 0.0, x) * vjp) < 1e-12
        assert found.R_x[0, 1, 2] == 0 and found.R_x[1, 0, 0] == 0
        assert error(found.R_x.sum(dim, keepdim=True) + found.R_bias, (s * G).sum(dim, keepdim=True)) < 1e-12

    def test_softmax_of_an_empty_row(self) -> None:
        x = torch.full((2, 3), -math.inf, dtype=torch.float64)
        assert not rules.softmax(x).any()
        assert not rules.softmax_taylor(x, torch.zeros_like(x)).R_x.any()

    def test_layer_norm(self) -> None:
        x, w, b, G = randn(2, 3, 6), randn(6, seed=1), randn(6, seed=2), randn(2, 3, 6, seed=3)
        y = torch.nn.functional.layer_norm(x, (6,), w, b)
        found = rules.layer_norm(x, w, b, y * G)
        rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        wG = w * G
        assert error(found.R_x, x * (wG - wG.mean(-1, keepdim=True)) * rstd) < 1e-10  # C(wG) rstd
        assert error(found.R_bias, b * G) < 1e-10
        assert error(found.R_x.sum(-1) + found.R_bias.sum(-1), (y * G).sum(-1)) < 1e-10

    def test_rms_norm_is_the_identity(self) -> None:
        x, w, G = randn(2, 3, 6), randn(6, seed=1), randn(2, 3, 6, seed=3)
        rstd = torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)
        R = x * rstd * w * G
        assert error(rules.rms_norm(x, w, R), x * (w * G) * rstd) < 1e-12
        assert error(rules.rms_norm(x, w, R), R) < 1e-12

    @pytest.mark.parametrize("probs", ["attnlrp", "frozen"])
    @pytest.mark.parametrize("active", [(True, True, True), (False, True, True), (True, False, False)])
    @pytest.mark.parametrize("biased", [True, False])
    def test_attention(self, probs: rules.Probs, active: tuple[bool, bool, bool], biased: bool) -> None:
        """Grouped heads, a mask with one empty row, partial activity; q and k get 1/4 and v 1/2 where all are
        active."""
        q, k, v = randn(2, 4, 3, 5), randn(2, 2, 6, 5, seed=1), randn(2, 2, 6, 4, seed=2)
        G, bias = randn(2, 4, 3, 4, seed=3), randn(1, 4, 3, 6, seed=4) if biased else None
        mask = torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(5)) < 0.7
        mask[1, 0, 1] = False
        comp = gxi.COMPOSITES["attnlrp" if probs == "attnlrp" else "cp"]
        if probs == "frozen" and not active[2]:
            pytest.skip("nothing is active")

        def forward(*qkv: Tensor) -> Tensor:
            used = [t if flag else t.detach() for t, flag in zip(qkv, active, strict=True)]
            return gxi.attention(used[0], used[1], used[2], mask, 0.7, comp, bias)

        out = forward(q, k, v)
        assert error(rules.attention_forward(q, k, v, 0.7, mask, bias), out) < 1e-13
        found = rules.attention(q, k, v, out * G, 0.7, mask, bias, 0.0, probs, active)
        for one, other in zip(found[:3], coefficient_form(forward, [q, k, v], G), strict=True):
            assert error(one, other) < 1e-10 if other.any() else not one.any()
        parts = [*found[:3], *found.absorbed.values()]
        total = torch.stack([part.sum() for part in parts]).sum()
        assert error(total, (out * G).sum()) < 1e-11

    def test_attention_is_a_scaled_fused_backward(self) -> None:
        """DESIGN.md: ordinary SDPA backward, with q and k times 1/4 and v times 1/2."""
        q, k, v, G = (randn(1, 2, 3, 4, seed=n) for n in range(4))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        found = rules.attention(q, k, v, out * G)
        expected = coefficient_form(torch.nn.functional.scaled_dot_product_attention, [q, k, v], G)
        for one, other, factor in zip(found[:3], expected, (0.25, 0.25, 0.5), strict=True):
            assert error(one, factor * other) < 1e-10

    def test_division(self) -> None:
        a, b, G = randn(2, 3), randn(2, 1, seed=1), randn(2, 3, seed=2)
        R_a, R_b = rules.divide_all_to_numerator(a, b, a / b * G)
        assert error(R_a, a * (G / b)) < 1e-13
        assert R_b.shape == b.shape and not R_b.any()

    def test_winner_takes_all(self) -> None:
        x, G = randn(3, 5, 2), randn(3, 2, seed=1)
        found = rules.winner_takes_all_max(x, x.amax(1) * G, 1)
        assert error(found, coefficient_form(lambda t: t.amax(1), [x], G)[0]) < 1e-14
        G = randn(3, 2, 2, seed=1)
        found = rules.winner_takes_all_topk(x, x.topk(2, 1).values * G, 2, 1)
        assert error(found, coefficient_form(lambda t: t.topk(2, 1).values, [x], G)[0]) < 1e-14

    def test_gradient_times_input(self) -> None:
        x, W = randn(4), randn(3, 4, seed=1)
        (alone,) = rules.gradient_times_input(lambda t: torch.tanh(W @ t).sum(), [x])
        assert error(alone, x * (W.T @ (1 - torch.tanh(W @ x) ** 2))) < 1e-13
        z, G = torch.tanh(W @ x), randn(3, seed=2)
        (inner,) = rules.gradient_times_input(lambda t: torch.tanh(W @ t), [x], z * G)
        assert error(inner, x * (W.T @ (G * (1 - z**2)))) < 1e-12

    def test_float64_only(self) -> None:
        with pytest.raises(TypeError, match="float64"):
            rules.identity(torch.ones(2))


# ----------------------------------------------------------------------------------------------------
# C: the tricks


class TestTricks:
    @pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "relu", "tanh", "quick_gelu"])
    def test_activation(self, name: str) -> None:
        """Values and gradients are torch's; under the identity rule the coefficient is f(x)/x."""
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": torch.nn.functional.gelu,
            "gelu_new": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
            "silu": torch.nn.functional.silu,
            "relu": torch.relu,
            "tanh": torch.tanh,
            "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        }
        f = functions[name]
        tiny = torch.tensor([1e-12, -1e-7, 9e-4, -9.99e-4, 1.001e-3], dtype=torch.float64)
        x = torch.cat([randn(50) * 3, tiny])
        leaf = x.clone().requires_grad_()
        for composite in ("attnlrp", "gradient"):
            y = gxi.activation(name, leaf, gxi.COMPOSITES[composite])
            assert error(y.detach(), f(x)) < 1e-14
            (G,) = torch.autograd.grad(y.sum(), leaf)
            slope = torch.autograd.grad(f(leaf).sum(), leaf)[0]
            assert error(G, f(x) / x if composite == "attnlrp" else slope) < 1e-13
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        (G,) = torch.autograd.grad(gxi.activation(name, zero, gxi.COMPOSITES["attnlrp"]), zero)
        assert float(G) == {"relu": 0.0, "tanh": 1.0}.get(name, 0.5)

    def test_last_unpadded(self) -> None:
        mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
        assert gxi.last_unpadded(mask, 4, 4).tolist() == [1, 3, 3, 2]
        assert gxi.last_unpadded(None, 2, 4).tolist() == [3, 3]


# ----------------------------------------------------------------------------------------------------
# B: the engine against modified gradients


def modified_gradients(
    inputs: Sequence[Tensor],
    steps: Sequence[Step],
    how: EngineRules,
    G: Tensor,
    active: Sequence[bool] | None = None,
) -> list[Tensor]:
    """The same graph as Gradient x Input: a second, unrelated way to the engine's answer."""
    base = gxi.COMPOSITES["attnlrp"]
    comp = gxi.Composite(
        halve_products=True,
        freeze_probs=how.softmax == "frozen",
        freeze_std=how.norm == "ln",
        identity=how.activation == "identity",
        gate=base.gate,
    )

    def fused(q: Tensor, k: Tensor, v: Tensor, c: dict[str, Any]) -> Tensor:
        a, b = gxi.both(q, k.transpose(-1, -2), comp)
        scores = damp(a @ b, how.eps_attention) * q.shape[-1] ** -0.5
        scores = scores if c.get("mask") is None else scores.masked_fill(~c["mask"], -math.inf)
        probs = torch.softmax(scores, -1)
        probs, v = gxi.both(probs.detach() if comp.freeze_probs else probs, v, comp)
        return damp(probs @ v, how.eps_attention)

    def step_forward(step: Step, values: list[Tensor]) -> Tensor:
        x, c = [values[i] for i in step.operands], step.constants
        match step.op:
            case "linear" | "conv1d" | "conv2d":
                return damp(engine.apply(step, values), how.eps_linear)
            case "add" | "add_constant":
                return damp(engine.apply(step, values), how.eps_add)
            case "mul":
                share = 1 / max(1, sum(t.requires_grad for t in x))
                scaled = [gxi.scale_gradient(t, share) for t in x]
                return engine.apply(Step("mul", tuple(range(len(x)))), scaled)
            case "matmul":
                a, b = gxi.both(x[0], x[1], comp)
                return damp(a @ b, how.eps_matmul)
            case "softmax":
                probs = engine.apply(step, values)
                return probs.detach() if comp.freeze_probs else probs
            case "attention":
                return fused(x[0], x[1], x[2], c)
            case "layer_norm":
                return gxi.layer_norm(x[0], c["weight"], c["bias"], c["norm_eps"], comp)
            case "rms_norm":
                return gxi.rms_norm(x[0], c["weight"], c["norm_eps"], comp)
            case "gelu_tanh":
                return gxi.activation("gelu_new", x[0], comp)
            case name if name in engine.ACTIVATIONS:
                return gxi.activation(name, x[0], comp)
        return engine.apply(step, values)

    def forward(*xs: Tensor) -> Tensor:
        values = list(xs)
        for step in steps:
            values.append(step_forward(step, values))
        return values[-1]

    return coefficient_form(forward, inputs, G, active)


ENGINE_RULES = {
    "attnlrp": EngineRules(),
    "epsilon": EngineRules(eps_linear=1e-2, eps_add=1e-3, eps_matmul=1e-1, eps_attention=1e-2),
    "cp": EngineRules(softmax="frozen"),
    "ali": EngineRules(softmax="frozen", activation="gradient"),
    "plain-norm": EngineRules(norm="gradient", eps_linear=1e-3),
}


class TestEngine:
    @pytest.mark.parametrize("active", [(True, True), (False, True), (True, False)])
    @pytest.mark.parametrize("name", list(ENGINE_RULES))
    @pytest.mark.parametrize("seed", range(12))
    def test_random_graphs(self, seed: int, name: str, active: tuple[bool, bool]) -> None:
        inputs, steps = engine.random_graph(seed, size=9)
        how, G = ENGINE_RULES[name], randn(2, 3, seed=seed)
        found = engine.explain(inputs, steps, G, how, active)
        expected = modified_gradients(inputs, steps, how, G, active)
        for one, other in zip(found.relevance, expected, strict=True):
            if other.any() or one.any():
                assert error(one, other) < 1e-10
        books = sum(R.sum() for R in found.relevance) + found.total_absorbed()
        scale = max(float(R.abs().sum()) for R in found.latents)
        assert abs(float(books - found.value)) < 1e-10 * scale
        assert error(engine.StepModule(steps)(*inputs), found.output) < 1e-14

    def test_every_op_is_drawn(self) -> None:
        drawn = {step.op for seed in range(12) for step in engine.random_graph(seed, size=9)[1]}
        expected = {"linear", "add", "add_constant", "mul", "matmul", "softmax", "attention", "layer_norm"}
        expected |= {"rms_norm", "view", "transpose", "slice", "cat", "scale", *engine.ACTIVATIONS}
        assert drawn == expected

    def test_grouping_of_products(self) -> None:
        """You et al. 2025: (x1 x2) x3 shares 24 out as (6, 6, 12); as one ternary product it is (8, 8, 8)."""
        inputs = [torch.tensor([v], dtype=torch.float64) for v in (2.0, 3.0, 4.0)]
        steps = [Step("mul", (0, 1)), Step("mul", (3, 2))]
        assert [float(R) for R in engine.explain(inputs, steps).relevance] == [6, 6, 12]
        merged = engine.merge_products(steps, 3)
        assert [float(R) for R in engine.explain(inputs, merged).relevance] == [8, 8, 8]

    def test_inactive_inputs_and_frozen_factors(self) -> None:
        a, b = randn(3), randn(3, seed=1)
        steps = [Step("mul", (0, 1)), Step("add", (2, 1))]
        found = engine.explain([a, b], steps, active_inputs=[True, False])
        assert error(found.relevance[0], a * b) < 1e-12
        assert not found.relevance[1].any()
        assert error(found.absorbed[1]["constant"], b.sum()) < 1e-12
        frozen = engine.explain([a, b], [Step("mul", (0, 1), {"active": (False, True)})])
        assert not frozen.relevance[0].any()
        assert error(frozen.relevance[1], a * b) < 1e-12

    def test_behind_a_frozen_softmax_the_value_gets_all(self) -> None:
        """The fused op and its parts agree, under both treatments of the softmax."""
        qkv = [randn(1, 1, 3, 4, seed=n) for n in range(3)]
        turned = Step("transpose", (1,), {"dim0": 2, "dim1": 3})
        parts = [turned, Step("matmul", (0, 3)), Step("scale", (4,), {"c": 0.5}), Step("softmax", (5,))]
        parts.append(Step("matmul", (6, 2)))
        for how in (EngineRules(), EngineRules(softmax="frozen")):
            one = engine.explain(qkv, parts, None, how)
            other = engine.explain(qkv, [Step("attention", (0, 1, 2))], None, how)
            for a, b in zip(one.relevance, other.relevance, strict=True):
                assert error(a, b) < 1e-10 if b.any() else not a.any()
        assert error(one.relevance[2].sum(), one.value) < 1e-12

    def test_other_ops(self) -> None:
        x, W, b, W1 = randn(2, 3, 6, 6), randn(4, 3, 3, 3, seed=1), randn(4, seed=2), randn(5, 4, 2, seed=3)
        steps = [
            Step("conv2d", (0,), {"W": W, "b": b, "stride": 2, "padding": 1}),
            Step("relu", (1,)),
            Step("max", (2,), {"dim": 3}),
            Step("conv1d", (3,), {"W": W1}),
            Step("sum", (4,), {"dim": 2, "keepdim": True}),
            Step("div", (4, 5)),
            Step("topk", (6,), {"k": 1, "dim": 1}),
        ]
        G = randn(2, 1, 2, seed=4)
        found = engine.explain([x], steps, G)

        def forward(t: Tensor) -> Tensor:
            values = [t]
            for step in steps:
                if step.op == "div":
                    values[-1] = values[-1].detach()
                values.append(engine.apply(step, values))
            return values[-1]

        assert error(found.relevance[0], coefficient_form(forward, [x], G)[0]) < 1e-9
        assert error(found.relevance[0].sum() + found.total_absorbed(), found.value) < 1e-10


# ----------------------------------------------------------------------------------------------------
# C: the families


@dataclass(frozen=True)
class Case:
    """One family: how to call the oracle and the HF model, and what is explained."""

    model: Any
    oracle: Callable[..., Any]
    inputs: dict[str, Tensor]
    output_mask: Tensor | None
    names: tuple[str, ...]


def make_case(name: str, exact: bool = True) -> Case:
    pytest.importorskip("transformers")
    ids, mask = models.token_batch(side="left" if name.endswith("left") else "right")
    text = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("llama"):
        return Case(models.tiny_llama(exact=exact), llama.explain, text, mask, ("input_ids",))
    if name.startswith("gpt2"):
        return Case(models.tiny_gpt2(), gpt2.explain, text, mask, ("input_ids",))
    if name == "bert":
        text["token_type_ids"] = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids).contiguous()
        return Case(models.tiny_bert(), bert.explain, text, None, ("input_ids",))
    if name == "vit":
        return Case(
            models.tiny_vit(), vit.explain, {"pixel_values": randn(3, 3, 12, 12)}, None, ("pixel_values",)
        )
    decoder_ids, decoder_mask = models.token_batch(seed=5, lengths=(4, 7, 3))
    text |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    both = ("input_ids", "decoder_input_ids")
    return Case(models.tiny_t5(gated=name == "flan", exact=exact), t5.explain, text, decoder_mask, both)


FAMILIES = ["llama", "llama-left", "bert", "gpt2", "gpt2-left", "t5", "flan", "vit"]


def relevances(found: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    return found.relevance if isinstance(found.relevance, dict) else {names[0]: found.relevance}


def logit_of(case: Case, logits: Tensor, target: Tensor | None = None) -> Tensor:
    """[B]: the explained logit, found without the oracles' help."""
    rows = []
    for n, row in enumerate(logits):
        if row.dim() == 2:
            last = row.shape[0] - 1
            while case.output_mask is not None and not case.output_mask[n, last]:
                last -= 1
            row = row[last]
        rows.append(row[row.argmax() if target is None else target[n]])
    return torch.stack(rows)


def hf_gradient_times_input(case: Case, target: Tensor | None = None) -> dict[str, Tensor]:
    """Plain autograd through the HF model, at ``inputs_embeds`` or the pixels."""
    arguments = dict(case.inputs)
    leaves = []
    for name in case.names:
        value = arguments.pop(name)
        if name == "pixel_values":
            leaves.append(value.clone().requires_grad_())
            arguments[name] = leaves[-1]
        else:
            leaves.append(case.model.get_input_embeddings()(value).detach().requires_grad_())
            arguments[name.replace("input_ids", "inputs_embeds")] = leaves[-1]
    logits = case.model(**arguments).logits
    grads = torch.autograd.grad(logit_of(case, logits, target).sum(), leaves)
    products = [(leaf * g).detach() for leaf, g in zip(leaves, grads, strict=True)]
    return {n: p if n == "pixel_values" else p.sum(-1) for n, p in zip(case.names, products, strict=True)}


class TestFamilies:
    @pytest.mark.parametrize("composite", list(gxi.COMPOSITES))
    @pytest.mark.parametrize("name", FAMILIES)
    def test_forward(self, name: str, composite: str) -> None:
        case = make_case(name)
        found = case.oracle(case.model, **case.inputs, composite=composite)
        with torch.no_grad():
            logits = case.model(**case.inputs).logits
        kept = slice(None) if case.output_mask is None else case.output_mask.bool()
        assert error(found.logits[kept], logits[kept]) < 1e-12
        assert error(found.value, logit_of(case, logits)) < 1e-12
        for relevance in relevances(found, case.names).values():
            assert torch.isfinite(relevance).all() and relevance.any()

    @pytest.mark.parametrize("given", [False, True])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_gradient(self, name: str, given: bool) -> None:
        case = make_case(name)
        target = torch.tensor([2, 0, 1]) if given else None
        found = case.oracle(case.model, **case.inputs, target=target, composite="gradient")
        expected = hf_gradient_times_input(case, target)
        for key, relevance in relevances(found, case.names).items():
            assert error(relevance, expected[key]) < 1e-10

    @pytest.mark.parametrize("name", ["llama", "llama-left", "t5", "flan"])
    def test_float32_norms(self, name: str) -> None:
        """HF's own rounding in the norms, with the model as it is."""
        case = make_case(name, exact=False)
        found = case.oracle(case.model, **case.inputs, composite="gradient", float32_norms=True)
        plain = case.oracle(case.model, **case.inputs, composite="gradient")
        with torch.no_grad():
            logits = case.model(**case.inputs).logits
        assert case.output_mask is not None
        kept = case.output_mask.bool()
        assert error(found.logits[kept], logits[kept]) < 1e-9
        assert 1e-9 < error(plain.logits[kept], logits[kept]) < 1e-5
        expected = hf_gradient_times_input(case)
        for key, relevance in relevances(found, case.names).items():
            assert error(relevance, expected[key]) < 1e-6

    @pytest.mark.parametrize("composite", list(gxi.COMPOSITES))
    @pytest.mark.parametrize("name", [n for n in FAMILIES if n != "vit"])
    def test_padding(self, name: str, composite: str) -> None:
        """Padding gets exactly 0, and a row explains itself as it does alone and unpadded (same
        positions)."""
        case = make_case(name)
        found = relevances(case.oracle(case.model, **case.inputs, composite=composite), case.names)
        for key, relevance in found.items():
            mask = case.inputs[key.replace("input_ids", "attention_mask")].bool()
            assert not relevance[~mask].any()
        for n in range(3):
            alone: dict[str, Tensor] = {}
            for key, value in case.inputs.items():
                mask = case.inputs[
                    "decoder_attention_mask" if key.startswith("decoder") else "attention_mask"
                ]
                alone[key] = value[n][mask[n].bool()][None]
            if name.endswith("left"):  # absolute positions count the padding
                alone["position_ids"] = torch.nonzero(case.inputs["attention_mask"][n]).T
            single = relevances(case.oracle(case.model, **alone, composite=composite), case.names)
            for key, relevance in single.items():
                mask = case.inputs[key.replace("input_ids", "attention_mask")]
                assert error(found[key][n][mask[n].bool()][None], relevance) < 1e-10

    def test_activity_of_the_decoder_input(self) -> None:
        """Explaining one sequence only: the other is a constant, which under attnlrp shares a product out
        anew."""
        case = make_case("flan")
        for composite, same in {"attnlrp": False, "cp": True, "ali": True, "gradient": True}.items():
            whole = case.oracle(case.model, **case.inputs, composite=composite).relevance
            for key in case.names:
                part = case.oracle(case.model, **case.inputs, composite=composite, explained=(key,)).relevance
                assert list(part) == [key]
                assert (error(part[key], whole[key]) < 1e-10) == same

    @pytest.mark.parametrize("name", ["llama", "t5", "flan"])
    def test_conservation_without_biases(self, name: str) -> None:
        """cp without biases loses nothing: every rule left is linear, and relevance sums to the logit."""
        case = make_case(name)
        if name == "llama":
            case = replace(case, model=models.tiny_llama(attention_bias=False, mlp_bias=False))
        found = case.oracle(case.model, **case.inputs, composite="cp")
        total = torch.stack([R.sum(1) for R in relevances(found, case.names).values()]).sum(0)
        assert error(total, found.value) < 1e-12

    def test_relative_buckets(self) -> None:
        from transformers.models.t5.modeling_t5 import T5Attention

        for bidirectional in (True, False):
            for buckets, furthest in ((32, 128), (8, 12), (8, 20)):
                ahead = torch.arange(300)[None, :] - torch.arange(300)[:, None]
                bucket: Any = T5Attention._relative_position_bucket
                expected = bucket(ahead, bidirectional, buckets, furthest)
                assert torch.equal(t5.relative_buckets(300, 300, bidirectional, buckets, furthest), expected)


# ----------------------------------------------------------------------------------------------------
# C against B: whole models, relevance form against modified gradients


@dataclass
class Builder:
    """Collects steps; every method returns the number of the value it adds."""

    inputs: int = 1
    steps: list[Step] = field(default_factory=list)

    def __call__(self, op: str, *operands: int, **constants: Any) -> int:
        self.steps.append(Step(op, operands, constants))
        return self.inputs + len(self.steps) - 1

    def linear(self, x: int, layer: Any, transposed: bool = False) -> int:
        weight = layer.weight.detach()
        bias = getattr(layer, "bias", None)
        return self(
            "linear", x, W=weight.T if transposed else weight, b=None if bias is None else bias.detach()
        )

    def layer_norm(self, x: int, layer: Any) -> int:
        return self(
            "layer_norm", x, weight=layer.weight.detach(), bias=layer.bias.detach(), norm_eps=layer.eps
        )

    def rms_norm(self, x: int, layer: Any) -> int:
        return self("rms_norm", x, weight=layer.weight.detach(), norm_eps=layer.variance_epsilon)

    def heads(self, x: int, shape: tuple[int, int], dim: int) -> int:
        return self("transpose", self("view", x, shape=(*shape, -1, dim)), dim0=1, dim1=2)

    def merge(self, x: int, shape: tuple[int, int]) -> int:
        return self("view", self("transpose", x, dim0=1, dim1=2), shape=(*shape, -1))

    def rotate(self, x: int, cos: Tensor, sin: Tensor) -> int:
        half = cos.shape[-1] // 2
        first = self("slice", x, dim=3, start=0, stop=half)
        second = self("slice", x, dim=3, start=half, stop=2 * half)
        turned = self("cat", self("scale", second, c=-1.0), first, dim=3)
        return self("add", self("scale", x, c=cos), self("scale", turned, c=sin))


def gate(build: Builder, activated: int, up: int, composite: str) -> int:
    constants = {"active": (False, True)} if composite == "cp" else {}
    return build("mul", activated, up, **constants)


def llama_steps(case: Case, composite: str) -> tuple[list[Tensor], list[Step]]:
    model, config, ids, build = case.model, case.model.config, case.inputs["input_ids"], Builder()
    shape = (ids.shape[0], ids.shape[1])
    cos, sin = llama.rope(config, torch.arange(shape[1]).expand(shape), torch.float64)
    mask = gxi.causal_mask(case.inputs["attention_mask"], *shape)
    x = 0
    for layer in model.model.layers:
        h, attn, mlp = build.rms_norm(x, layer.input_layernorm), layer.self_attn, layer.mlp
        q, k, v = (
            build.heads(build.linear(h, p), shape, config.head_dim)
            for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = build.rotate(q, cos, sin), build.rotate(k, cos, sin)
        context = build.merge(build("attention", q, k, v, mask=mask), shape)
        x = build("add", x, build.linear(context, attn.o_proj))
        h = build.rms_norm(x, layer.post_attention_layernorm)
        activated = build("silu", build.linear(h, mlp.gate_proj))
        x = build(
            "add",
            x,
            build.linear(gate(build, activated, build.linear(h, mlp.up_proj), composite), mlp.down_proj),
        )
    build.linear(build.rms_norm(x, model.model.norm), model.lm_head)
    return [model.model.embed_tokens(ids)], build.steps


def bert_steps(case: Case, composite: str) -> tuple[list[Tensor], list[Step]]:
    model, ids, build = case.model.bert, case.inputs["input_ids"], Builder()
    shape, head_dim = (ids.shape[0], ids.shape[1]), 4
    mask = case.inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, shape[1], -1)
    x = build("add_constant", 0, c=model.embeddings.token_type_embeddings(case.inputs["token_type_ids"]))
    x = build("add_constant", x, c=model.embeddings.position_embeddings.weight[: shape[1]])
    x = build.layer_norm(x, model.embeddings.LayerNorm)
    for layer in model.encoder.layer:
        attn, output = layer.attention.self, layer.attention.output
        q, k, v = (
            build.heads(build.linear(x, p), shape, head_dim) for p in (attn.query, attn.key, attn.value)
        )
        context = build.merge(build("attention", q, k, v, mask=mask), shape)
        x = build.layer_norm(build("add", build.linear(context, output.dense), x), output.LayerNorm)
        h = build("gelu", build.linear(x, layer.intermediate.dense))
        x = build.layer_norm(build("add", build.linear(h, layer.output.dense), x), layer.output.LayerNorm)
    first = build("view", build("slice", x, dim=1, start=0, stop=1), shape=(shape[0], -1))
    build.linear(build("tanh", build.linear(first, model.pooler.dense)), case.model.classifier)
    return [model.embeddings.word_embeddings(ids)], build.steps


def gpt2_steps(case: Case, composite: str) -> tuple[list[Tensor], list[Step]]:
    body, ids, build = case.model.transformer, case.inputs["input_ids"], Builder()
    shape, width = (ids.shape[0], ids.shape[1]), 16
    mask = gxi.causal_mask(case.inputs["attention_mask"], *shape)
    x = build("add_constant", 0, c=body.wpe.weight[: shape[1]])
    for block in body.h:
        qkv = build.linear(build.layer_norm(x, block.ln_1), block.attn.c_attn, transposed=True)
        parts = [build("slice", qkv, dim=2, start=width * n, stop=width * (n + 1)) for n in range(3)]
        q, k, v = (build.heads(part, shape, 4) for part in parts)
        context = build.merge(build("attention", q, k, v, mask=mask), shape)
        x = build("add", x, build.linear(context, block.attn.c_proj, transposed=True))
        h = build("gelu_tanh", build.linear(build.layer_norm(x, block.ln_2), block.mlp.c_fc, transposed=True))
        x = build("add", x, build.linear(h, block.mlp.c_proj, transposed=True))
    build.linear(build.layer_norm(x, body.ln_f), case.model.lm_head)
    return [body.wte(ids)], build.steps


def t5_steps(case: Case, composite: str) -> tuple[list[Tensor], list[Step]]:
    model, config, build = case.model, case.model.config, Builder(inputs=2)
    ids, decoder_ids = case.inputs["input_ids"], case.inputs["decoder_input_ids"]
    shapes = [(t.shape[0], t.shape[1]) for t in (ids, decoder_ids)]

    def bias_of(stack: Any, size: int) -> Tensor:
        bias: Tensor = stack.block[0].layer[0].SelfAttention.compute_bias(size, size)
        return bias.detach()

    def attend(x: int, memory: int, attn: Any, into: int, of: int, mask: Tensor, bias: Tensor | None) -> int:
        q = build.heads(build.linear(x, attn.q), shapes[into], config.d_kv)
        k, v = (build.heads(build.linear(memory, p), shapes[of], config.d_kv) for p in (attn.k, attn.v))
        mask = mask.expand(mask.shape[0], config.num_heads, shapes[into][1], -1)
        out = build("attention", q, k, v, mask=mask, bias=bias, scale=1.0)
        return build.linear(build.merge(out, shapes[into]), attn.o)

    def feed_forward(x: int, layer: Any) -> int:
        h, mlp = build.rms_norm(x, layer.layer_norm), layer.DenseReluDense
        if config.is_gated_act:
            h = gate(
                build, build("gelu_tanh", build.linear(h, mlp.wi_0)), build.linear(h, mlp.wi_1), composite
            )
        else:
            h = build("relu", build.linear(h, mlp.wi))
        return build("add", x, build.linear(h, mlp.wo))

    source_mask = case.inputs["attention_mask"].bool()[:, None, None]
    mask, bias = (
        gxi.causal_mask(case.inputs["decoder_attention_mask"], *shapes[1]),
        bias_of(model.encoder, shapes[0][1]),
    )
    memory, x = 0, 1
    for block in model.encoder.block:
        h = build.rms_norm(memory, block.layer[0].layer_norm)
        memory = build("add", memory, attend(h, h, block.layer[0].SelfAttention, 0, 0, source_mask, bias))
        memory = feed_forward(memory, block.layer[1])
    memory, bias = (
        build.rms_norm(memory, model.encoder.final_layer_norm),
        bias_of(model.decoder, shapes[1][1]),
    )
    for block in model.decoder.block:
        h = build.rms_norm(x, block.layer[0].layer_norm)
        x = build("add", x, attend(h, h, block.layer[0].SelfAttention, 1, 1, mask, bias))
        h = build.rms_norm(x, block.layer[1].layer_norm)
        x = build("add", x, attend(h, memory, block.layer[1].EncDecAttention, 1, 0, source_mask, None))
        x = feed_forward(x, block.layer[2])
    x = build.rms_norm(x, model.decoder.final_layer_norm)
    build.linear(
        build("scale", x, c=config.d_model**-0.5) if config.scale_decoder_outputs else x, model.lm_head
    )
    return [model.shared(ids), model.shared(decoder_ids)], build.steps


def vit_steps(case: Case, composite: str) -> tuple[list[Tensor], list[Step]]:
    body, pixels, build = case.model.vit, case.inputs["pixel_values"], Builder()
    batch, patches, width = pixels.shape[0], 9, 16
    shape, convolution = (batch, patches + 1), body.embeddings.patch_embeddings.projection
    x = build("conv2d", 0, W=convolution.weight, b=convolution.bias, stride=4)
    x = build("transpose", build("view", x, shape=(batch, width, patches)), dim0=1, dim1=2)
    token, positions = body.embeddings.cls_token, body.embeddings.position_embeddings[0]
    # the class token joins as a constant: a zero row (the padding matrix), plus token and positions
    pad = torch.cat([torch.zeros(1, patches), torch.eye(patches)]).double()
    x = build("transpose", build("linear", build("transpose", x, dim0=1, dim1=2), W=pad), dim0=1, dim1=2)
    x = build("add_constant", x, c=positions + torch.cat([token[0], torch.zeros(patches, width)]))
    for layer in body.layers:
        h, attn = build.layer_norm(x, layer.layernorm_before), layer.attention
        q, k, v = (build.heads(build.linear(h, p), shape, 4) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = build("add", x, build.linear(build.merge(build("attention", q, k, v), shape), attn.o_proj))
        h = build("gelu", build.linear(build.layer_norm(x, layer.layernorm_after), layer.mlp.fc1))
        x = build("add", x, build.linear(h, layer.mlp.fc2))
    x = build.layer_norm(x, body.layernorm)
    first = build("view", build("slice", x, dim=1, start=0, stop=1), shape=(batch, width))
    build.linear(first, case.model.classifier)
    return [pixels], build.steps


STEPS = {
    "llama": llama_steps,
    "bert": bert_steps,
    "gpt2": gpt2_steps,
    "t5": t5_steps,
    "flan": t5_steps,
    "vit": vit_steps,
}
AS_ENGINE = {
    "attnlrp": EngineRules(),
    "cp": EngineRules(softmax="frozen"),
    "ali": EngineRules(softmax="frozen", activation="gradient", product="gradient"),
}


class TestFamiliesAgainstEngine:
    @pytest.mark.parametrize("composite", list(AS_ENGINE))
    @pytest.mark.parametrize("name", FAMILIES)
    def test_relevance_form(self, name: str, composite: str) -> None:
        """The relevance-domain walk through the whole model equals its hand-patched Gradient x Input."""
        case = make_case(name)
        inputs, steps = STEPS[name.split("-")[0]](case, composite)
        expected = case.oracle(case.model, **case.inputs, composite=composite)
        logits = engine.run(inputs, steps)[-1]
        seed = torch.zeros_like(logits)
        for n, row in enumerate(logits):
            if row.dim() == 1:
                seed[n, row.argmax()] = 1.0
            else:
                assert case.output_mask is not None
                last = int(torch.nonzero(case.output_mask[n]).max())
                seed[n, last, row[last].argmax()] = 1.0
        found = engine.explain(inputs, steps, seed, AS_ENGINE[composite])
        assert error(found.value, expected.value.sum()) < 1e-12
        for (key, wanted), R in zip(relevances(expected, case.names).items(), found.relevance, strict=True):
            assert error(R if key == "pixel_values" else R.sum(-1), wanted) < 1e-10
        books = sum(R.sum() for R in found.relevance) + found.total_absorbed()
        scale = max(float(R.abs().sum()) for R in found.latents)
        assert abs(float(books - found.value)) < 1e-10 * scale
