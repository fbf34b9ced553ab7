"""Patterns fire on usual spellings, not on near misses, say why not, and leave the forward as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxlrp.compiler.canonicalize import Canonical, canonicalize
from fxlrp.compiler.capture import capture
from fxlrp.compiler.inputs import bind
from fxlrp.rules.activation import op_name

NORM, GATE, ATTENTION = "normalisation", "activation x * g(x)", "attention"
BATCH, HEADS, LENGTH, DIM, WIDTH = 2, 4, 5, 6, 8
Spelling = Callable[..., Any]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Spelled(nn.Module):
    """A spelling as a module, with the constants that it may need."""

    def __init__(self, spelling: Spelling, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spelling = spelling
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("w", 1 + 0.3 * randn(WIDTH, seed=1).to(dtype))
        self.register_buffer("b", randn(WIDTH, seed=2).to(dtype))
        self.register_buffer("weight", randn(WIDTH, WIDTH, seed=3).to(dtype))
        self.register_buffer("tall", randn(3, 1, 1, 1, seed=5).to(dtype))
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        self.register_buffer("keep", causal)
        self.register_buffer("mask", torch.zeros(LENGTH, LENGTH).masked_fill(~causal, -math.inf).to(dtype))
        self.register_buffer("position_bias", randn(1, HEADS, LENGTH, LENGTH, seed=4).to(dtype))

    def forward(self, *inputs: Tensor) -> Any:
        return self.spelling(self, *inputs)


def canonical(spelling: Spelling, *inputs: Tensor) -> Canonical:
    """The canonical graph of a spelling, after a look at whether it computes what the module computes."""
    dtype = inputs[0].dtype
    model = Spelled(spelling, dtype).eval()
    bound = bind(model, inputs, {})
    found = canonicalize(capture(model, bound).graph)
    with torch.no_grad():
        expected = model(*inputs)
        actual = found.graph(*bound.tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        scale = float(e.double().abs().max())
        assert float((a.double() - e.double()).abs().max()) <= 8 * torch.finfo(e.dtype).eps * scale
    return found


# ----------------------------------------------------------------------------------------------------
# normalisation


def power(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True) + 1e-5


def cast_and_multiply(s: Any, x: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return s.w * h.to(x.dtype)


def one_plus_weight(s: Any, x: Tensor) -> Tensor:
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + s.w.float())).type_as(x)


def var_mean(s: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * s.w + s.b


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def mean_of_square(s: Any, x: Tensor) -> Tensor:
    c = centred(x)
    return s.w * (c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)) + s.b


def scaled_before(s: Any, x: Tensor) -> Tensor:
    h = s.b * x
    return s.w * (h * torch.rsqrt(power(h)))


NORMS: dict[str, Spelling] = {
    "cast and multiply": cast_and_multiply,
    "1 + w": one_plus_weight,
    "weightless": lambda s, x: x * torch.rsqrt(power(x)),
    "factor first": lambda s, x: torch.rsqrt(power(x)) * x,
    "sqrt and division": lambda s, x: s.w * (x / torch.sqrt(power(x))),
    "reciprocal": lambda s, x: x * torch.sqrt(power(x)).reciprocal(),
    "pow(-0.5)": lambda s, x: x * torch.pow(power(x), -0.5),
    "pow(0.5)": lambda s, x: x / power(x) ** 0.5,
    "square()": lambda s, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    "x * x": lambda s, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5),
    "sum over size": lambda s, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / WIDTH + 1e-5),
    "epsilon first": lambda s, x: x * torch.rsqrt(1e-5 + x.pow(2).mean(-1, keepdim=True)),
    "clamped": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(1e-5)),
    "without epsilon": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "layer norm by var": lambda s, x: (
        s.w * (centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)) + s.b
    ),
    "layer norm by std": lambda s, x: s.w * (centred(x) / (x.std(-1, keepdim=True) + 1e-5)) + s.b,
    "layer norm by mean of square": mean_of_square,
    "layer norm by var_mean": var_mean,
    "deviation without keepdim": lambda s, x: x / x.pow(2).mean(-1).add(1e-5).sqrt().unsqueeze(-1),
    "of a scaled vector": scaled_before,
    "L2": lambda s, x: F.normalize(x, dim=-1),
    "L2 by norm": lambda s, x: x / x.norm(dim=-1, keepdim=True),
    "L2 by linalg": lambda s, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6),
    "L2 by rsqrt": lambda s, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
}


HALF = ("cast and multiply", "1 + w", "layer norm by var")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NORMS), *((name, torch.bfloat16) for name in HALF)],
)
def test_norm(name: str, dtype: torch.dtype) -> None:
    """Breaks if a spelling is left as a chain of products and gates, or is counted twice."""
    found = canonical(lambda s, x: NORMS[name](s, x @ s.weight), randn(BATCH, LENGTH, WIDTH).to(dtype))
    assert found.hits == {NORM: 1}, found.misses
    assert not found.misses


NEAR_NORMS: dict[str, tuple[Spelling, str | None]] = {
    "statistic of another tensor": (
        lambda s, x, y: x * torch.rsqrt(power(y)),
        "the statistic is taken of 'args_1', the product is with 'args_0'",
    ),
    "division by another's": (lambda s, x, y: x / torch.sqrt(power(y)), "the statistic is taken of 'args_1'"),
    "statistic of what was before": (
        lambda s, x, y: (x @ s.weight) * torch.rsqrt(power(x)),
        "the statistic is taken of 'args_0'",
    ),
    "cube": (lambda s, x, y: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True)), None),
    "inverse power": (lambda s, x, y: x * power(x).pow(-0.4), None),
    "product with the deviation": (lambda s, x, y: x * torch.sqrt(power(x)), None),
    "L1": (lambda s, x, y: x / torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True), None),
}


@pytest.mark.parametrize("name", list(NEAR_NORMS))
def test_almost_a_norm(name: str) -> None:
    """Breaks if the standard deviation of something else is frozen, which it must not be."""
    spelling, reason = NEAR_NORMS[name]
    found = canonical(spelling, randn(BATCH, LENGTH, WIDTH), randn(BATCH, LENGTH, WIDTH, seed=9))
    assert NORM not in found.hits
    assert reason is None or any(reason in miss and "a normalisation" in miss for miss in found.misses)


# ----------------------------------------------------------------------------------------------------
# activations

GATES: dict[str, Spelling] = {
    "silu": lambda s, x: x * torch.sigmoid(x),
    "silu, gate first": lambda s, x: torch.sigmoid(x) * x,
    "silu in float32": lambda s, x: x * torch.sigmoid(x.float()).to(x.dtype),
    "quick gelu": lambda s, x: x * torch.sigmoid(1.702 * x),
    "tanh gelu": lambda s, x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "tanh gelu, fast": lambda s, x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "erf gelu": lambda s, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf gelu, scaled last": lambda s, x: 0.5 * (x * (1.0 + torch.erf(x * 0.5**0.5))),
    "mish": lambda s, x: x * torch.tanh(F.softplus(x)),
    "mish by log": lambda s, x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "hardswish": lambda s, x: x * F.relu6(x + 3) / 6,
    "hardswish by clamp": lambda s, x: x * (torch.clamp(x + 3, 0, 6) / 6),
    "hardswish by hardsigmoid": lambda s, x: x * F.hardsigmoid(x),
    "swish with a learnt slope": lambda s, x: x * torch.sigmoid(s.w * x),
    "negated": lambda s, x: -x * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", list(GATES))
def test_self_gate(name: str) -> None:
    """Breaks if a hand-written activation is taken for a product of two factors."""
    found = canonical(lambda s, x: GATES[name](s, x @ s.weight), randn(BATCH, LENGTH, WIDTH))
    assert found.hits.pop(GATE, 0) >= 1 and not found.hits
    gates = [n for n in found.graph.graph.nodes if getattr(n.target, "__name__", "") == "self_gate"]
    outermost = [n for n in gates if all(user.op == "output" or len(user.users) == 1 for user in n.users)]
    assert outermost


NEAR_GATES: dict[str, tuple[Spelling, str | None]] = {
    "gate of another tensor": (lambda s, x, y: x * torch.sigmoid(y), None),
    "gate of both": (lambda s, x, y: x * torch.sigmoid(x + y), None),
    "gate of a projection": (lambda s, x, y: x * torch.sigmoid(x @ s.weight), None),
    "gate of the mean": (lambda s, x, y: x * torch.sigmoid(x.mean(-1, keepdim=True)), None),
    "gate of a neighbour": (lambda s, x, y: x * torch.sigmoid(x.roll(1, -1)), None),
    "gate is broadcast": (
        lambda s, x, y: x * torch.sigmoid(x + s.tall),
        "the gate is broadcast",
    ),
    "softmax": (lambda s, x, y: x * torch.softmax(x, -1), None),
    "square": (lambda s, x, y: x * x, None),
}


@pytest.mark.parametrize("name", list(NEAR_GATES))
def test_almost_a_self_gate(name: str) -> None:
    """Breaks if a product of two factors loses one of them, and with it half of its relevance."""
    spelling, reason = NEAR_GATES[name]
    found = canonical(spelling, randn(BATCH, LENGTH, WIDTH), randn(BATCH, LENGTH, WIDTH, seed=9))
    assert GATE not in found.hits
    assert reason is None or any(reason in miss and "x * g(x)" in miss for miss in found.misses)


# ----------------------------------------------------------------------------------------------------
# attention


def qkv(dtype: torch.dtype = torch.float32, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(BATCH, h, LENGTH, DIM, seed=n).to(dtype) for n, h in enumerate((HEADS, heads, heads)))  # type: ignore[return-value]


def soft(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def turned(k: Tensor) -> Tensor:
    return k.transpose(-1, -2)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


def in_float32(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ turned(k) * 0.3 + s.mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return s.dropout(weights) @ v


def in_place(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ turned(k)
    scores *= 0.3
    scores += s.mask
    return soft(scores, v)


ATTENTIONS: dict[str, Spelling] = {
    "bare": lambda s, q, k, v: soft(q @ turned(k), v),
    "scale by mul": lambda s, q, k, v: soft(q @ turned(k) * 0.3, v),
    "scale by div": lambda s, q, k, v: soft(torch.matmul(q, turned(k)) / math.sqrt(DIM), v),
    "scale by number times": lambda s, q, k, v: soft(0.3 * (q @ turned(k)), v),
    "scale on q": lambda s, q, k, v: soft((q * 0.3) @ turned(k), v),
    "scale on q and k": lambda s, q, k, v: soft((q * 0.5) @ turned(k * 0.6), v),
    "scale, mask": lambda s, q, k, v: soft(q @ turned(k) * 0.3 + s.mask, v),
    "scale on q, mask": lambda s, q, k, v: soft((q / 3) @ turned(k) + s.mask, v),
    "scale twice, mask": lambda s, q, k, v: soft((q @ turned(k) * 0.3) / 2 + s.mask, v),
    "masked_fill": lambda s, q, k, v: soft((q @ turned(k) * 0.3).masked_fill(~s.keep, -math.inf), v),
    "masked_fill, scale": lambda s, q, k, v: soft((q @ turned(k)).masked_fill(~s.keep, -math.inf) * 0.3, v),
    "masked_fill by comparison": lambda s, q, k, v: soft(
        (q @ turned(k)).masked_fill(s.keep == 0, float("-inf")), v
    ),
    "two masks": lambda s, q, k, v: soft(q @ turned(k) * 0.3 + s.position_bias + s.mask, v),
    "bias, then scale of nothing": lambda s, q, k, v: soft((q @ turned(k) + s.position_bias) * 1.0, v),
    "dropout that is off": lambda s, q, k, v: s.dropout(torch.softmax(q @ turned(k) * 0.3, -1)) @ v,
    "functional dropout": lambda s, q, k, v: (
        F.dropout(torch.softmax(q @ turned(k), -1), 0.1, training=s.training) @ v
    ),
    "softmax in float32": in_float32,
    "in place": in_place,
    "key stored transposed": lambda s, q, k, v: soft(q @ k.permute(0, 1, 3, 2) * 0.3, v),
    "permuted from a layer": lambda s, q, k, v: soft(
        q @ k.transpose(1, 2).contiguous().permute(0, 2, 3, 1) * 0.3, v
    ),
    "softmax over dim 3": lambda s, q, k, v: torch.softmax(q @ turned(k), 3) @ v,
    "native": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "native, causal, scaled": lambda s, q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3
    ),
    "native, boolean mask": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=s.keep),
    "native, additive mask": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.position_bias),
}


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_attention(name: str) -> None:
    """Breaks if a spelling is left in pieces, or its scale, mask or causality gets lost on the way."""
    found = canonical(ATTENTIONS[name], *qkv())
    assert found.hits == {ATTENTION: 1}, found.misses
    assert not found.misses


def test_attention_in_half_precision() -> None:
    """Casts between the steps are no obstacle."""
    assert canonical(in_float32, *qkv(torch.bfloat16)).hits == {ATTENTION: 1}


@pytest.mark.parametrize("native", [True, False])
def test_grouped_heads(native: bool) -> None:
    """Repeated key and value heads, or SDPA's own option for them."""

    def repeated(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        return soft(q @ k.transpose(2, 3) * 0.3 + s.mask, v)

    def grouped(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert canonical(grouped if native else repeated, *qkv(heads=2)).hits == {ATTENTION: 1}


def used_elsewhere(s: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ turned(k), -1)
    return weights @ v, weights


def scores_used_elsewhere(s: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ turned(k) * 0.3
    return soft(scores + s.mask, v), scores


NEAR_ATTENTIONS: dict[str, tuple[Spelling, str]] = {
    "weights used elsewhere": (used_elsewhere, "are used elsewhere"),
    "scores used elsewhere": (scores_used_elsewhere, "is used elsewhere"),
    "softmax over the queries": (
        lambda s, q, k, v: torch.softmax(q @ turned(k), -2) @ v,
        "the softmax does not run over the keys",
    ),
    "soft cap": (
        lambda s, q, k, v: soft(torch.tanh(q @ turned(k) / 5) * 5 + s.mask, v),
        "stands between the product of query and key and the softmax",
    ),
    "weights of no product": (lambda s, q, k, v: soft(q[..., :LENGTH], v), "stands between"),
    "mask of what is explained": (
        lambda s, q, k, v: soft(q @ turned(k) * 0.3 + k.mean(-1)[:, :, None], v),
        "its mask is computed from what is explained",
    ),
    "mask of the values": (
        lambda s, q, k, v: soft(q @ turned(k) * 0.3 + v.mean(-1)[:, :, None], v),
        "its mask is computed from what is explained",
    ),
    "mask scaled with the scores": (
        lambda s, q, k, v: soft((q @ turned(k) + s.position_bias) * 0.3, v),
        "the mask is scaled together with the scores",
    ),
    "finite fill": (
        lambda s, q, k, v: soft((q @ turned(k)).masked_fill(~s.keep, -1e4), v),
        "stands between",
    ),
    "three dimensions": (lambda s, q, k, v: soft(q[0] @ turned(k[0]), v[0]), "3-dimensional scores"),
}


@pytest.mark.parametrize("name", list(NEAR_ATTENTIONS))
def test_almost_attention(name: str) -> None:
    """Breaks if a step between the matrix products is swallowed, or the reason is not told."""
    spelling, reason = NEAR_ATTENTIONS[name]
    found = canonical(spelling, *qkv())
    assert ATTENTION not in found.hits
    assert any(reason in miss and "is almost attention" in miss for miss in found.misses), found.misses


def test_native_attention_with_a_mask_of_what_is_explained() -> None:
    """SDPA with such a mask is written out: scores, mask and values have rules of their own."""

    def spelling(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=q.mean(-1)[:, :, None] * 0.1)

    found = canonical(spelling, *qkv())
    assert ATTENTION not in found.hits
    names = {op_name(node.target) for node in found.graph.graph.nodes if node.op == "call_function"}
    assert "scaled_dot_product_attention" not in names
    assert {"softmax", "bmm"} <= names


def test_other_matrix_products_are_no_misses() -> None:
    """A product without a softmax does not look like attention at all."""
    found = canonical(lambda s, q, k, v: q @ turned(k) @ v, *qkv())
    assert not found.hits and not found.misses


def test_patterns_without_explained_inputs_are_no_misses() -> None:
    """What is computed of constants alone concerns nobody."""
    found = canonical(lambda s, x: x + s.w * torch.rsqrt(power(s.b)), randn(BATCH, LENGTH, WIDTH))
    assert not found.misses


# ----------------------------------------------------------------------------------------------------
# what does nothing goes


def test_stripping() -> None:
    """Casts to the same type, slices of everything and dropout that is off leave no node."""

    def spelling(s: Any, x: Tensor) -> Tensor:
        return s.dropout((x.to(x.dtype)[:, :] @ s.weight).float())

    found = canonical(spelling, randn(BATCH, LENGTH, WIDTH))
    assert sum(n.op == "call_function" for n in found.graph.graph.nodes) == 1


def test_narrowing_casts_of_a_float64_model_go() -> None:
    """A norm that casts to float32 is computed in float64 in a float64 model, and stays exact."""
    x = randn(BATCH, LENGTH, WIDTH).double()
    model = Spelled(cast_and_multiply, torch.float64).eval()
    found = canonicalize(capture(model, bind(model, (x,), {})).graph)
    (actual,) = found.graph(x)
    exact = model.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    assert float((actual - exact).abs().max()) < 1e-14
    assert found.hits == {NORM: 1}


def test_the_captured_graph_is_left_alone() -> None:
    """Stages return new graphs: canonicalising edits nothing that it was given."""
    model = Spelled(ATTENTIONS["two masks"])
    captured = capture(model.eval(), bind(model, qkv(), {})).graph
    before = str(captured.graph)
    canonicalize(captured)
    assert str(captured.graph) == before
