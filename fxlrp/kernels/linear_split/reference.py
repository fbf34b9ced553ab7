"""Rules that split contributions by sign, for a linear map, in plain PyTorch and any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Share of A up to which a sum of one sign counts as rounding, in units of the dtype's eps; as in the rules.
ROUNDING = 4


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z = x W^T + b`` and ``A = |x| |W|^T + |b|``."""
    return F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())


def factors(
    z: Tensor, absolute: Tensor, rule: str, strengths: Sequence[float], epsilon: float
) -> tuple[Tensor, Tensor, float]:
    """``f, h, l`` in ``C = (f G) W + l sign(x) ((h G) |W|)``, in float32 at least."""
    rounding = ROUNDING * torch.finfo(z.dtype).eps
    z, size = _wide(z), _wide(absolute)
    if rule == "gamma":
        (gamma,) = strengths
        weight = gamma / (2 + gamma)
        floor = max(2 * epsilon / (2 + gamma), torch.finfo(z.dtype).tiny)
        # Not add(..., alpha=l): Inductor makes addmm of it with the product before, and loses alpha (2.13).
        fraction = z / (z.abs() + weight * size + floor)
        return fraction.abs(), fraction, weight
    alpha, beta = strengths
    positive = _share(alpha * z, size + z, rounding * size, epsilon)
    if beta == 0:
        return positive, positive, 1.0
    negative = _share(beta * z, size - z, rounding * size, epsilon)
    return positive + negative, positive - negative, 1.0


def relevance(
    g: Tensor,
    z: Tensor,
    absolute: Tensor,
    x: Tensor,
    weight: Tensor,
    rule: str,
    strengths: Sequence[float],
    epsilon: float,
    times_x: bool,
) -> Tensor:
    """``(f G) W + l sign(x) ((h G) |W|)``, times x if asked for."""
    f, h, share = factors(z, absolute, rule, strengths, epsilon)
    signed = torch.matmul((g * f).to(g.dtype), weight)
    unsigned = torch.matmul((g * h).to(g.dtype), weight.abs())
    coefficient = torch.addcmul(signed, unsigned, x.sign(), value=share)
    return coefficient * x if times_x else coefficient


def transposed(
    c: Tensor,
    z: Tensor,
    absolute: Tensor,
    x: Tensor,
    weight: Tensor,
    rule: str,
    strengths: Sequence[float],
    epsilon: float,
    times_x: bool,
) -> Tensor:
    """The transpose of :func:`relevance` as a linear map of g."""
    f, h, share = factors(z, absolute, rule, strengths, epsilon)
    c = c * x if times_x else c
    signed, unsigned = F.linear(c, weight), F.linear(c * x.sign(), weight.abs())
    return (f * signed + share * h * unsigned).to(c.dtype)


def _share(arrived: Tensor, part: Tensor, rounding: Tensor, epsilon: float) -> Tensor:
    return torch.where(part > rounding, arrived / (part + 2 * epsilon), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
