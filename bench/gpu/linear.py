"""Linear maps: the epsilon rule's product, and both products of rules that split by sign, against cuBLAS."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fxlrp.kernels.linear_epsilon import linear_epsilon_relevance
from fxlrp.kernels.linear_split import linear_split, linear_split_relevance

from .cases import Calls, Case, Line, Setup, normal, pair

_EPSILON, _GAMMA = 1e-3, 0.25


def _damped_product(g: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return (g * (z.abs() / (z.abs() + _EPSILON))) @ weight


def _epsilon(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    rows, columns, depth = shape
    g, z = normal((rows, depth), dtype, device), normal((rows, depth), dtype, device)
    weight = normal((depth, columns), dtype, device, depth**-0.5)
    call = functools.partial(linear_epsilon_relevance, epsilon=_EPSILON)
    setup = pair(call, _damped_product, (g, z, weight), 2 * rows * columns * depth)
    return _with(setup, {"cuBLAS alone": lambda: g @ weight})


def _both(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs())


def _gamma(g: Tensor, z: Tensor, absolute: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    strength = _GAMMA / (2 + _GAMMA)
    h = z / (z.abs() + strength * absolute + 2 * _EPSILON / (2 + _GAMMA))
    return (h.abs() * g) @ weight + strength * x.sign() * ((h * g) @ weight.abs())


def _split_forward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    rows, columns, depth = shape
    x, bias = normal((rows, depth), dtype, device), normal((columns,), dtype, device)
    weight = normal((columns, depth), dtype, device, depth**-0.5)
    kept = weight.abs()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_split(x, weight, bias, "gamma", [_GAMMA], _EPSILON)

    def keeping() -> tuple[Tensor, Tensor]:
        return F.linear(x, weight, bias), F.linear(x.abs(), kept, bias.abs())

    setup = pair(call, _both, (x, weight, bias), 4 * rows * columns * depth)
    return _with(setup, {"eager with |W| kept": keeping})


def _split_relevance(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    rows, columns, depth = shape
    x = normal((rows, columns), dtype, device)
    weight = normal((depth, columns), dtype, device, columns**-0.5)
    z, absolute = F.linear(x, weight), F.linear(x.abs(), weight.abs())
    g = normal((rows, depth), dtype, device)
    kept, strength = weight.abs(), _GAMMA / (2 + _GAMMA)

    def call(*inputs: Tensor) -> Tensor:
        return linear_split_relevance(*inputs, "gamma", [_GAMMA], _EPSILON)

    def keeping() -> Tensor:
        h = z / (z.abs() + strength * absolute + 2 * _EPSILON / (2 + _GAMMA))
        return (h.abs() * g) @ weight + strength * x.sign() * ((h * g) @ kept)

    setup = pair(call, _gamma, (g, z, absolute, x, weight), 4 * rows * columns * depth)
    return _with(setup, {"eager with |W| kept": keeping})


def _with(setup: Setup, calls: Calls) -> Setup:
    return Setup({**setup.calls, **calls}, setup.exact, setup.traffic, setup.flops)


def _shapes(rows: int, size: int = 4096) -> dict[str, tuple[int, ...]]:
    return {"tiny": (3, 20, 40), "gate": (min(rows, 300), 520, 1000), "full": (rows, size, size)}


_PAIR, _BARE = Line("eager", at_least=1.0), Line("cuBLAS alone", at_least=0.85)
_FEW, _MANY = (Line("eager", at_least=1.5),), (Line("eager", at_least=0.9),)

CASES = (
    Case("linear_epsilon", "relevance", _epsilon, _shapes(4096), (_PAIR, _BARE)),
    Case("linear_epsilon", "relevance", _epsilon, _shapes(512), (_PAIR,)),
    Case("linear_epsilon", "relevance", _epsilon, _shapes(16), (_PAIR,)),
    *(
        Case("linear_split", name, setup, _shapes(rows), _FEW if rows <= 64 else _MANY)
        for name, setup in (("forward", _split_forward), ("relevance, gamma", _split_relevance))
        for rows in (1, 16, 64, 4096)
    ),
)
