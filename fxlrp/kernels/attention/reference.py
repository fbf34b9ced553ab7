"""Attention and its relevance in plain PyTorch, for any float dtype; holds N x N matrices.

Sums are in float32 for half precision, results in the operands' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scoring import MASKED, Scoring


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """``softmax(s) v`` and the logarithm of the softmax's denominators."""
    s = _Scores.of(q, k, mask, scoring).masked
    logits = s
    if sinks is not None:
        logits = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)], -1)
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    weights = torch.where(lse[..., None] == -math.inf, 0.0, torch.softmax(logits, -1)[..., : s.shape[-1]])
    out = weights @ _repeated(_wide(v), q)
    return heads_inside(out.to(q.dtype)), lse


def relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    epsilon: float,
    score_epsilon: float,
    shares: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of q, k and v; those with a share of 0 are empty."""
    scores = _Scores.of(q, k, mask, scoring)
    weights = scores.weights(lse)
    g, o = _wide(g), _wide(out)
    if epsilon:
        g = g * _sigma(o, epsilon)
    found = [q.new_zeros(0) for _ in shares]
    if shares[2]:
        found[2] = _summed(weights.mT @ g, k) * shares[2]
    if shares[0] or shares[1]:
        arrived = g @ _repeated(_wide(v), q).mT
        of_scores = weights * (arrived - (g * o).sum(-1, keepdim=True)) * scores.slope
        if score_epsilon:
            of_scores = of_scores * _sigma(scores.raw, score_epsilon)
        if shares[0]:
            found[0] = of_scores @ _repeated(_wide(k), q) * (shares[0] * scoring.scale)
        if shares[1]:
            found[1] = _summed(of_scores.mT @ _wide(q), k) * (shares[1] * scoring.scale)
    of_q, of_k, of_v = (heads_inside(x.to(q.dtype)) if x.dim() > 1 else x for x in found)
    return of_q, of_k, of_v


def frozen_relevance(
    q: Tensor, k: Tensor, lse: Tensor, g: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """``A^T G``."""
    weights = _Scores.of(q, k, mask, scoring).weights(lse)
    return heads_inside(_summed(weights.mT @ _wide(g), k).to(q.dtype))


def heads_inside(x: Tensor) -> Tensor:
    """The same with each position's heads side by side in memory, as projections want them."""
    return x.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Raw scores, capped and masked ones, and the factor with which relevance passes the cap."""

    raw: Tensor
    masked: Tensor
    slope: Tensor | float

    @staticmethod
    def of(q: Tensor, k: Tensor, mask: Tensor | None, scoring: Scoring) -> _Scores:
        raw = _wide(q) @ _repeated(_wide(k), q).mT
        s = raw * scoring.scale
        slope: Tensor | float = 1.0
        if scoring.soft_cap is not None:
            x = s / scoring.soft_cap
            capped = torch.tanh(x)
            s = capped * scoring.soft_cap
            small = x.abs() < 1e-4
            ratio = torch.where(small, 1 - x * x / 3, capped / torch.where(small, 1.0, x))
            slope = 1 - capped * capped if scoring.cap_gradient else ratio
        if mask is not None:
            s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
        if scoring.causal or scoring.window is not None:
            places = torch.arange(q.shape[-2], device=q.device)[:, None] + scoring.offset
            ahead = torch.arange(k.shape[-2], device=q.device) - places
            unseen = ahead > 0 if scoring.causal else torch.zeros_like(ahead, dtype=torch.bool)
            if scoring.window is not None:
                unseen = unseen | (ahead.abs() >= scoring.window)
            s = s.masked_fill(unseen, -math.inf)
        return _Scores(raw, s, slope)

    def weights(self, lse: Tensor) -> Tensor:
        """The probabilities; 0 in rows that are masked altogether."""
        lse = lse.to(self.masked.dtype)[..., None]
        return torch.exp(self.masked - torch.where(lse < MASKED, math.inf, lse))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _sigma(z: Tensor, epsilon: float) -> Tensor:
    magnitude = z.abs()
    return magnitude / (magnitude + max(epsilon, torch.finfo(z.dtype).tiny))


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for each query head of their group."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1) if q.shape[1] != x.shape[1] else x


def _summed(x: Tensor, k: Tensor) -> Tensor:
    """What the query heads of a group find, as one."""
    heads = k.shape[1]
    return x.unflatten(-3, (heads, x.shape[-3] // heads)).sum(-3) if x.shape[-3] != heads else x
