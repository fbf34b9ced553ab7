"""Same function, same relevance: different spellings of one model are explained alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import models
from torch import Tensor, nn
from torch.nn import functional as F

import fxlrp

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-9}
WIDTH, LENGTH, CLASSES = 8, 5, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(relevance: Any) -> list[Tensor]:
    return [relevance] if isinstance(relevance, Tensor) else list(relevance.values())


def error(found: Any, expected: Any) -> float:
    pairs = list(zip(flat(found), flat(expected), strict=True))
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def explain(
    model: nn.Module, *inputs: Tensor, composite: str = "attnlrp", **options: Any
) -> fxlrp.Explanation:
    named = options.pop("named", {})
    return fxlrp.lrp_compile(model, composite=composite, **options)(*inputs, **named)


SHAPES = {
    **dict.fromkeys(("w1", "w2", "w3"), (WIDTH, WIDTH)),
    **dict.fromkeys(("norm", "shift", "bias"), (WIDTH,)),
    "qkv": (3 * WIDTH, WIDTH),
    "head": (CLASSES, WIDTH),
}


class Function(nn.Module):
    """A spelling: a function of shared weights and the inputs, and a head, so that G is no constant."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        for n, (name, shape) in enumerate(SHAPES.items()):
            self.register_buffer(name, randn(*shape, seed=n).mul(0.5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.function(self, x).mean(1), self.head)


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, WIDTH // 2).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def parts(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ s.w1.T, x @ s.w2.T, x @ s.w3.T


def three(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tanh(F.linear(x, s.w1)), F.linear(x, s.w2, s.bias), F.linear(x, s.w3)


def layer_norm_by_hand(s: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5) * s.norm + s.shift


def layer_norm_by_var(s: Any, x: Tensor) -> Tensor:
    return (
        s.norm * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5))
        + s.shift
    )


SPELLINGS: dict[str, list[Callable[[Any, Tensor], Tensor]]] = {
    "attention": [
        lambda s, x: joined(F.scaled_dot_product_attention(*map(heads, parts(s, x)))),
        lambda s, x: joined(eager(*map(heads, parts(s, x)))),
        lambda s, x: joined(eager(heads(x @ s.w1.T) * 3, heads(x @ s.w2.T) / 3, heads(x @ s.w3.T))),
    ],
    "attention of one head": [
        lambda s, x: F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in parts(s, x))).squeeze(1),
        lambda s, x: eager(*(t.unsqueeze(1) for t in parts(s, x))).squeeze(1),
    ],
    "a mask cast and sized like what it masks": [
        lambda s, x: x @ s.w1.T * (s.norm > 0),
        lambda s, x: (lambda h: h * (s.norm > 0).type_as(h))(x @ s.w1.T),
        lambda s, x: (lambda h: h * (s.norm > 0).to(h))(x @ s.w1.T),
        lambda s, x: (lambda h: h * (s.norm > 0).to(s.norm.dtype).expand_as(h))(x @ s.w1.T),
    ],
    "a gate like which a mask is cast": [
        lambda s, x: torch.sigmoid(x @ s.w1.T) * (x @ s.w2.T) + (s.norm > 0).to(s.norm.dtype),
        lambda s, x: (lambda g: g * (x @ s.w2.T) + (s.norm > 0).type_as(g))(torch.sigmoid(x @ s.w1.T)),
    ],
    "gated unit, fused or not": [
        lambda s, x: F.silu(F.linear(x, s.qkv[:WIDTH])) * F.linear(x, s.qkv[WIDTH : 2 * WIDTH]),
        lambda s, x: (lambda a, b: F.silu(a) * b)(*F.linear(x, s.qkv[: 2 * WIDTH]).chunk(2, -1)),
        lambda s, x: (lambda a, b: b * F.silu(a))(*F.linear(x, s.qkv[: 2 * WIDTH]).split(WIDTH, -1)),
        lambda s, x: (lambda h: F.silu(h[..., :WIDTH]) * h[..., WIDTH:])(F.linear(x, s.qkv[: 2 * WIDTH])),
    ],
    "layer norm": [
        lambda s, x: F.layer_norm(x, (WIDTH,), s.norm, s.shift, 1e-5),
        layer_norm_by_hand,
        layer_norm_by_var,
    ],
    "rms norm": [
        lambda s, x: F.rms_norm(x, (WIDTH,), s.norm, 1e-5),
        lambda s, x: s.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
        lambda s, x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * s.norm,
        lambda s, x: (1 + (s.norm - 1)) * (x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-5, -0.5)),
    ],
    "silu": [
        lambda s, x: F.silu(F.linear(x, s.w1)),
        lambda s, x: (lambda h: h * torch.sigmoid(h))(F.linear(x, s.w1)),
        lambda s, x: (lambda h: torch.sigmoid(h) * h)(F.linear(x, s.w1)),
        lambda s, x: (lambda h: h / (1 + torch.exp(-h)))(F.linear(x, s.w1)),
    ],
    "gelu": [
        lambda s, x: F.gelu(F.linear(x, s.w1)),
        lambda s, x: (lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))(F.linear(x, s.w1)),
        lambda s, x: (lambda h: 0.5 * (h * (1 + torch.erf(h * 0.5**0.5))))(F.linear(x, s.w1)),
    ],
    "tanh gelu": [
        lambda s, x: F.gelu(F.linear(x, s.w1), approximate="tanh"),
        lambda s, x: (lambda h: 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h**3))))(
            F.linear(x, s.w1)
        ),
    ],
    "product of three": [
        lambda s, x: (lambda a, b, c: (a * b) * c)(*three(s, x)),
        lambda s, x: (lambda a, b, c: a * (b * c))(*three(s, x)),
        lambda s, x: (lambda a, b, c: (c * a) * b)(*three(s, x)),
        lambda s, x: (lambda a, b, c: (a * b * 2.0) * (0.5 * c))(*three(s, x)),
        lambda s, x: (lambda a, b, c: a * ((b * c) * s.norm.abs() / s.norm.abs()))(*three(s, x)),
        lambda s, x: (lambda a, b, c: ((a * b).flatten(0, 1) * c.flatten(0, 1)).view(x.shape))(*three(s, x)),
        lambda s, x: (lambda a, b, c: a * (b * c).transpose(1, 2).contiguous().transpose(1, 2))(*three(s, x)),
        lambda s, x: (lambda a, b, c: (a * b).float().to(x.dtype) * c)(*three(s, x)),
    ],
    "einsum": [
        lambda s, x: torch.matmul(torch.matmul(x @ s.w1.T, (x @ s.w2.T).transpose(1, 2)), x @ s.w3.T),
        lambda s, x: torch.einsum(
            "bqk,bkd->bqd", torch.einsum("bqd,bkd->bqk", x @ s.w1.T, x @ s.w2.T), x @ s.w3.T
        ),
        lambda s, x: torch.bmm(torch.bmm(x @ s.w1.T, (x @ s.w2.T).transpose(1, 2)), x @ s.w3.T),
    ],
    "fused qkv": [
        lambda s, x: joined(F.scaled_dot_product_attention(*(heads(F.linear(x, w)) for w in s.qkv.chunk(3)))),
        lambda s, x: joined(F.scaled_dot_product_attention(*map(heads, F.linear(x, s.qkv).chunk(3, -1)))),
        lambda s, x: joined(F.scaled_dot_product_attention(*map(heads, F.linear(x, s.qkv).split(WIDTH, -1)))),
        lambda s, x: joined(
            F.scaled_dot_product_attention(
                *F.linear(x, s.qkv).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
            )
        ),
    ],
    "linear": [
        lambda s, x: F.linear(x, s.w1, s.bias),
        lambda s, x: torch.addmm(s.bias, x.view(-1, WIDTH), s.w1.T).view(x.shape),
        lambda s, x: x @ s.w1.T + s.bias,
        lambda s, x: torch.einsum("bld,od->blo", x, s.w1) + s.bias,
        lambda s, x: s.bias + torch.matmul(s.w1, x.transpose(1, 2)).transpose(1, 2),
        lambda s, x: F.conv1d(x.transpose(1, 2), s.w1.unsqueeze(-1), s.bias).transpose(1, 2),
    ],
}  # fmt: skip


SINGLE = ("attention", "rms norm", "gelu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in SPELLINGS), *((name, torch.float32) for name in SINGLE)],
)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    """Breaks if a pattern is not recognised in one spelling, or factors are counted by their grouping."""
    x = randn(2, LENGTH, WIDTH, seed=5).to(dtype)
    first, *others = SPELLINGS[name]
    expected = explain(Function(first, dtype), x)
    for n, spelling in enumerate(others, start=1):
        model = Function(spelling, dtype)
        found = explain(model, x, dynamic=False)  # the library's models below have dynamic sizes
        assert error(found.value, expected.value) < DTYPES[dtype], f"spelling {n} is another function"
        assert error(found.relevance, expected.relevance) < DTYPES[dtype], f"spelling {n} of {name}"


@pytest.mark.parametrize(
    ("name", "composite"),
    [("gated unit, fused or not", "cp"), ("attention", "ali"), ("rms norm", "ali"), ("silu", "gradient")],
)
def test_spellings_under_other_composites(name: str, composite: str) -> None:
    """Breaks if a preset's row for the canonical op means something else than its rows for the parts."""
    x = randn(2, LENGTH, WIDTH, seed=5)
    first, *others = SPELLINGS[name]
    expected = explain(Function(first, torch.float64), x, composite=composite)
    for n, spelling in enumerate(others, start=1):
        found = explain(Function(spelling, torch.float64), x, composite=composite)
        assert error(found.relevance, expected.relevance) < 1e-9, f"spelling {n} of {name}"


MODELS: dict[str, Callable[..., Any]] = {
    "llama": functools.partial(models.tiny_llama, num_hidden_layers=1),
    "gpt2": functools.partial(models.tiny_gpt2, n_layer=1),
    "bert": functools.partial(models.tiny_bert, num_hidden_layers=1),
}
CASES = [*((name, torch.float64) for name in MODELS), ("bert", torch.float32)]


@functools.cache
def baseline(name: str, dtype: torch.dtype) -> fxlrp.Explainer:
    """One explainer of each library model with SDPA, traced once with dynamic sizes."""
    return fxlrp.lrp_compile(MODELS[name](attention="sdpa").to(dtype))


def tokens(name: str, *lengths: int) -> dict[str, Tensor]:
    ids, mask = models.token_batch(lengths=lengths, side="left" if name == "llama" else "right")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_eager_and_fused_attention(name: str, dtype: torch.dtype) -> None:
    """Breaks if eager attention with its padding mask is another op than SDPA, or either reads padding."""
    inputs = tokens(name, 7, 4)
    expected = baseline(name, dtype)(**inputs)
    found = explain(MODELS[name](attention="eager").to(dtype), named=inputs)
    assert error(found.value, expected.value) < DTYPES[dtype]
    assert error(found.relevance, expected.relevance) < DTYPES[dtype]
    assert not expected.relevance[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_dynamic_and_static_capture(name: str, dtype: torch.dtype) -> None:
    """Breaks if a symbolic size is read at the wrong place; other sizes run through the same graph."""
    dynamic = baseline(name, dtype)
    dynamic(**tokens(name, 7, 4))
    inputs = tokens(name, 3, 5, 9)
    static = explain(dynamic.model, named=inputs, dynamic=False)
    found = dynamic(**inputs)
    assert error(found.relevance, static.relevance) < DTYPES[dtype]
    assert error(found.coefficients, static.coefficients) < DTYPES[dtype]
    assert len(dynamic._traces) == 1


def test_library_norms_and_norms_by_hand() -> None:
    """The library's RMSNorm with its casts to float32, and the formula alone."""
    inputs = tokens("llama", 7, 4)
    expected = baseline("llama", torch.float64)(**inputs)
    library = MODELS["llama"](exact=False, attention="sdpa")
    assert error(explain(library, named=inputs, dynamic=False).relevance, expected.relevance) < 1e-9
    assert error(explain(library.float(), named=inputs, dynamic=False).relevance, expected.relevance) < 1e-5


def test_fused_gate_and_up_projection() -> None:
    """Breaks if a chunk of one projection counts as another kind of factor than a projection of its own."""

    class Fused(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.both = nn.Linear(16, 56).double()
            self.down_proj = mlp.down_proj
            with torch.no_grad():
                self.both.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
                self.both.bias.copy_(torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down_proj(up * F.silu(gate))

    inputs = tokens("llama", 7, 4)
    expected = baseline("llama", torch.float64)(**inputs)
    fused = MODELS["llama"]()
    for layer in fused.model.layers:
        layer.mlp = Fused(layer.mlp)
    found = explain(fused, named=inputs, dynamic=False)
    assert error(found.relevance, expected.relevance) < 1e-9
