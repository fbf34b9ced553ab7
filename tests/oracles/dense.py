"""Rules of affine layers as the papers write them, on one dense matrix, output by output, in float64.

Any op that is affine in x is ``z = M x + b``: M is its Jacobian, b its value at 0. Each formula is taken
literally: relevance in, relevance out, divisions and all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """``z = M x + b``: M ``[outputs, inputs]``, b ``[outputs]``."""

    M: Tensor
    b: Tensor


class Shared(NamedTuple):
    """Relevance of the input; what the bias, the stabiliser and outputs that no input can take keep."""

    R_x: Tensor
    R_bias: Tensor
    R_eps: Tensor
    R_empty: Tensor


def dense(op: Callable[[Tensor], Tensor], x: Tensor) -> Dense:
    """An affine op as a matrix, column by column."""
    b = op(torch.zeros_like(x)).reshape(-1)
    columns = []
    for i in range(x.numel()):
        unit = torch.zeros(x.numel(), dtype=x.dtype)
        unit[i] = 1.0
        columns.append(op(unit.reshape(x.shape)).reshape(-1) - b)
    return Dense(torch.stack(columns, 1), b)


def _positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, 0.0)


def _negative(t: Tensor) -> Tensor:
    return torch.where(t < 0, t, 0.0)


def _by_output(
    op: Callable[[Tensor], Tensor],
    x: Tensor,
    R: Tensor,
    parts: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, float, float]],
) -> Shared:
    """Sum over outputs of ``parts(x, w, b, R)``: for inputs, bias and stabiliser, and what is lost."""
    M, b = dense(op, x)
    R_x = torch.zeros(x.numel(), dtype=x.dtype)
    kept = torch.zeros(3, dtype=x.dtype)
    for row, constant, relevance in zip(M, b, R.reshape(-1).tolist(), strict=True):
        to_x, *others = parts(x.reshape(-1), row, constant, relevance)
        R_x = R_x + to_x
        kept = kept + torch.stack([torch.as_tensor(o, dtype=x.dtype) for o in others])
    return Shared(R_x.reshape(x.shape), *kept)


def gamma(op: Callable[[Tensor], Tensor], x: Tensor, R: Tensor, gamma: float, eps: float = 0.0) -> Shared:
    """Contributions of the output's sign count 1 + gamma times (Montavon et al. 2019; MambaLRP)."""

    def parts(x: Tensor, w: Tensor, b: Tensor, R: float) -> tuple[Tensor, Tensor, float, float]:
        contributions = x * w
        z = contributions.sum() + b
        of_sign, stabiliser = (_positive, eps) if z >= 0 else (_negative, -eps)
        numerators = contributions + gamma * of_sign(contributions)
        constant = b + gamma * of_sign(b)
        denominator = numerators.sum() + constant + stabiliser
        if z == 0 or denominator == 0:
            return torch.zeros_like(x), torch.zeros_like(b), R, 0.0
        return numerators / denominator * R, constant / denominator * R, stabiliser / denominator * R, 0.0

    return _by_output(op, x, R, parts)


def alpha_beta(
    op: Callable[[Tensor], Tensor], x: Tensor, R: Tensor, alpha: float, beta: float, eps: float = 0.0
) -> Shared:
    """Positive contributions share alpha R, negative ones -beta R (Bach et al. 2015, eq. 60)."""

    def parts(x: Tensor, w: Tensor, b: Tensor, R: float) -> tuple[Tensor, Tensor, float, float]:
        to_x, to_b, to_eps, lost = torch.zeros_like(x), torch.zeros_like(b), 0.0, 0.0
        for of_sign, weight, stabiliser in ((_positive, alpha, eps), (_negative, -beta, -eps)):
            numerators, constant = of_sign(x * w), of_sign(b)
            if numerators.sum() + constant == 0:
                lost += weight * R
                continue
            denominator = numerators.sum() + constant + stabiliser
            to_x = to_x + weight * numerators / denominator * R
            to_b = to_b + weight * constant / denominator * R
            to_eps = to_eps + weight * stabiliser / denominator * R
        return to_x, to_b, to_eps, lost

    return _by_output(op, x, R, parts)


def _shares(numerators: Tensor, R: float) -> tuple[Tensor, Tensor, float, float]:
    total, nothing = numerators.sum(), torch.zeros((), dtype=numerators.dtype)
    if total == 0:
        return torch.zeros_like(numerators), nothing, 0.0, R
    return numerators / total * R, nothing, 0.0, 0.0


def box(op: Callable[[Tensor], Tensor], x: Tensor, R: Tensor, low: Tensor, high: Tensor) -> Shared:
    """The z^B rule (Montavon et al. 2017); low and high broadcast against x."""
    lows, highs = (torch.as_tensor(t, dtype=x.dtype).expand_as(x).reshape(-1) for t in (low, high))
    return _by_output(
        op, x, R, lambda x, w, b, R: _shares(x * w - lows * _positive(w) - highs * _negative(w), R)
    )


def flat(reach: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Shared:
    """R / N to each of the N inputs that reach an output; ``reach`` is the op with weights that are not 0."""
    return _by_output(reach, x, R, lambda x, w, b, R: _shares((w != 0).to(x.dtype), R))


def w_square(op: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Shared:
    """The w^2 rule (Montavon et al. 2017)."""
    return _by_output(op, x, R, lambda x, w, b, R: _shares(w * w, R))
