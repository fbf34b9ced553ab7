"""Attention's relevance against the backward pass of PyTorch's own fused attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxlrp.kernels import attention

from .cases import Case, Line, Setup, double, nbytes, normal

_SHARES = [0.25, 0.25, 0.5]


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, targets: int = 0
) -> list[Tensor]:
    """q, k, v, G; G with a leading number of targets where there are several."""
    lead = (targets,) if targets else ()
    return [*(normal(shape, dtype, device) for _ in range(3)), normal((*lead, *shape), dtype, device)]


def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, epsilon: float = 0.0) -> tuple[Tensor, ...]:
    """PyTorch's backward of causal attention times the rule's shares, of G damped beforehand."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _pulled(out, (q, k, v), g, epsilon)


def _pulled(out: Tensor, qkv: tuple[Tensor, ...], g: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    if epsilon:
        size = out.detach().abs()
        g = g * (size / (size + epsilon))
    found = torch.autograd.grad(out, qkv, g, retain_graph=True)
    return tuple(share * t for share, t in zip(_SHARES, found, strict=True))


def _products(shape: tuple[int, ...], number: int, targets: int = 1) -> int:
    """Operations of so many causal products of queries by keys."""
    batch, heads, length, size = shape
    return number * targets * batch * heads * length * length * size


def _relevance(epsilon: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    q, k, v, g = _inputs(shape, dtype, device)
    out, lse = attention.attention_forward(q, k, v, causal=True)
    leaves = tuple(t.detach().clone().requires_grad_() for t in (q, k, v))
    kept = F.scaled_dot_product_attention(*leaves, is_causal=True)

    def call() -> Any:
        return attention.attention_relevance(q, k, v, out, lse, g, _SHARES, causal=True, epsilon=epsilon)

    return Setup(
        {
            "kernel": call,
            "eager": lambda: _pulled(kept, leaves, g, epsilon),
            "SDPA backward": lambda: torch.autograd.grad(kept, leaves, g, retain_graph=True),
        },
        lambda: _backward(*map(double, (q, k, v, g)), epsilon),
        nbytes([q, k, v, out, g, q, k, v]),
        _products(shape, 5),
        frozenset({"eager", "SDPA backward"}),
    )


def _frozen(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    q, k, v, g = _inputs(shape, dtype, device)
    _, lse = attention.attention_forward(q, k, v, causal=True)
    leaves = tuple(t.detach().clone().requires_grad_() for t in (q, k, v))
    kept = F.scaled_dot_product_attention(*leaves, is_causal=True)

    def of_values(*inputs: Tensor) -> Tensor:
        return 2 * _backward(*inputs)[2]

    return Setup(
        {
            "kernel": lambda: attention.attention_frozen_relevance(q, k, lse, g, causal=True),
            "eager": lambda: of_values(q, k, v, g),
            "SDPA backward": lambda: torch.autograd.grad(kept, leaves, g, retain_graph=True),
        },
        lambda: of_values(*map(double, (q, k, v, g))),
        nbytes([q, k, g, v]),
        _products(shape, 2),
        frozenset({"eager", "SDPA backward"}),
    )


def _forward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    q, k, v, _ = _inputs(shape, dtype, device)
    plain = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    return Setup(
        {
            "kernel": lambda: attention.attention_forward(q, k, v, causal=True)[0],
            "eager": lambda: plain(q, k, v),
        },
        lambda: plain(*map(double, (q, k, v))),
        nbytes([q, k, v, q]),
        _products(shape, 2),
    )


def _targets(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    q, k, v, g = _inputs(shape, dtype, device, count)
    out, lse = attention.attention_forward(q, k, v, causal=True)

    def call(of: Tensor) -> Any:
        return attention.attention_relevance(q, k, v, out, lse, of, _SHARES, causal=True)

    def backward(*inputs: Tensor) -> list[Tensor]:
        q, k, v, g = inputs
        return [torch.stack(found) for found in zip(*(_backward(q, k, v, one) for one in g), strict=True)]

    return Setup(
        {
            "kernel": lambda: call(g),
            f"{count} calls": lambda: [call(one) for one in g],
            "eager": lambda: backward(q, k, v, g),
        },
        lambda: backward(*map(double, (q, k, v, g))),
        nbytes([q, k, v, out, g, g, g, g]),
        _products(shape, 5, count),
        frozenset({"eager"}),
    )


def _shapes(*full: int) -> dict[str, tuple[int, ...]]:
    return {"tiny": (1, 2, 20, 16), "gate": (1, 4, 300, full[-1]), "full": full}


def peaks(lengths: tuple[int, ...], device: torch.device) -> list[int]:
    """Bytes that the relevance of one layer takes at its peak, inputs included, by number of positions."""
    found = []
    for length in lengths:
        q, k, v, g = _inputs((1, 8, length, 128), torch.bfloat16, device)
        out, lse = attention.attention_forward(q, k, v, causal=True)
        torch.cuda.reset_peak_memory_stats(device)
        attention.attention_relevance(q, k, v, out, lse, g, _SHARES, causal=True)
        found.append(torch.cuda.max_memory_allocated(device))
        del q, k, v, g, out, lse
    return found


def _of_backward(at_least: float) -> tuple[Line, ...]:
    return (Line("SDPA backward", at_least=at_least),)


#: The forward belongs to each of them.
_EVERY = ("attention", "attention_epsilon", "attention_frozen")

CASES = (
    *(
        case
        for shape in (_shapes(4, 32, 4096, 128), _shapes(4, 32, 4096, 64))
        for case in (
            Case("attention", "relevance", functools.partial(_relevance, 0.0), shape, _of_backward(0.8)),
            Case(
                "attention",
                "relevance, epsilon",
                functools.partial(_relevance, 1e-3),
                shape,
                _of_backward(0.7),
                cases=("attention_epsilon",),
            ),
            Case(
                "attention",
                "frozen relevance",
                _frozen,
                shape,
                _of_backward(1.6),
                cases=("attention_frozen",),
            ),
        )
    ),
    Case("attention", "forward", _forward, _shapes(4, 32, 4096, 128), cases=_EVERY),
    Case(
        "attention",
        "eight targets",
        functools.partial(_targets, 8),
        _shapes(1, 16, 4096, 128),
        (Line("8 calls", at_most=0.7),),
        cases=("attention", "attention_epsilon"),
    ),
)
