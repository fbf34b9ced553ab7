"""Linear maps: the epsilon rule's product, and both products of rules that split by sign, against cuBLAS.

With more rows than a kernel is launched for, "kernel" is the op as explanations run it there: compiled,
which makes it PyTorch's steps. How the kernel would do is measured beside it, with tiles made for such sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxlrp.kernels.linear_epsilon import MOST_ROWS, linear_epsilon_relevance
from fxlrp.kernels.linear_split import MOST_ROWS as MOST_SPLIT_ROWS
from fxlrp.kernels.linear_split import linear_split, linear_split_relevance

from .cases import Calls, Case, Line, Setup, compiled, normal, pair

_EPSILON, _GAMMA = 1e-3, 0.25


def _damped_product(g: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return (g * (z.abs() / (z.abs() + _EPSILON))) @ weight


def _damped_by_kernel(g: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = linear_epsilon_relevance(g, z, weight, _EPSILON, tf32=_is_float32(g))
    return found


def _both_by_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    z, absolute = linear_split(x, weight, bias, "gamma", [_GAMMA], _EPSILON, _is_float32(x))
    return z, absolute


def _gamma_by_kernel(*inputs: Tensor) -> Tensor:
    found: Tensor = linear_split_relevance(*inputs, "gamma", [_GAMMA], _EPSILON, tf32=_is_float32(inputs[0]))
    return found


def _is_float32(x: Tensor) -> bool:
    """As in the interpreter, where without TensorFloat-32 no kernel of products would be launched."""
    return x.dtype == torch.float32


def _as_run(op: Callable[..., Any], is_launched: bool, device: torch.device) -> Callable[..., Any]:
    return op if is_launched or device.type != "cuda" else compiled(op)


def _epsilon(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    rows, columns, depth = shape
    g, z = normal((rows, depth), dtype, device), normal((rows, depth), dtype, device)
    weight = normal((depth, columns), dtype, device, depth**-0.5)
    is_launched = rows <= MOST_ROWS
    call = _as_run(_damped_by_kernel, is_launched, device)
    setup = pair(call, _damped_product, (g, z, weight), 2 * rows * columns * depth)
    alone: Calls = {"cuBLAS alone": lambda: g @ weight}
    if is_launched or device.type != "cuda":
        return _with(setup, alone)
    from fxlrp.kernels.linear_epsilon import kernel

    def tuned(tiles: Any) -> Callable[[], Tensor]:
        return lambda: kernel.relevance(g, z, weight, _EPSILON, None, None, False, (tiles, 1))

    return _with(setup, {**alone, **{f"tiles {t}": tuned(t) for t in kernel.table(dtype, False).tuned}})


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
    call = _as_run(_both_by_kernel, rows <= MOST_SPLIT_ROWS[dtype.itemsize], device)

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

    call = _as_run(_gamma_by_kernel, rows <= MOST_SPLIT_ROWS[dtype.itemsize], device)

    def keeping() -> Tensor:
        h = z / (z.abs() + strength * absolute + 2 * _EPSILON / (2 + _GAMMA))
        return (h.abs() * g) @ weight + strength * x.sign() * ((h * g) @ kept)

    setup = pair(call, _gamma, (g, z, absolute, x, weight), 4 * rows * columns * depth)
    return _with(setup, {"eager with |W| kept": keeping})


def _with(setup: Setup, calls: Calls) -> Setup:
    return Setup({**setup.calls, **calls}, setup.exact, setup.traffic, setup.flops)


def _shapes(rows: int, size: int = 4096) -> dict[str, tuple[int, ...]]:
    return {"tiny": (3, 20, 40), "gate": (min(rows, 300), 520, 1000), "full": (rows, size, size)}


def _epsilon_case(rows: int, *lines: Line) -> Case:
    return Case("linear_epsilon", "relevance", _epsilon, _shapes(rows), lines, decides=rows <= MOST_ROWS)


_PAIR, _BARE = Line("eager", at_least=1.0), Line("cuBLAS alone", at_least=0.85)
_FEW, _MANY = (Line("eager", at_least=1.5),), (Line("eager", at_least=0.9),)

CASES = (
    _epsilon_case(4096, _PAIR, _BARE),
    _epsilon_case(512, _PAIR),
    _epsilon_case(16, _PAIR),
    *(
        Case("linear_split", name, setup, _shapes(rows), _FEW if rows <= 64 else _MANY, decides=rows <= 64)
        for name, setup in (("forward", _split_forward), ("relevance, gamma", _split_relevance))
        for rows in (1, 16, 64, 4096)
    ),
)
