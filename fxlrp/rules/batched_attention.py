"""Attention written out: its ordinary pullback for K coefficients at once, from probabilities computed once.

The fused backward takes one coefficient and recomputes the probabilities for each; it has no derivative of
its own either, which pushing tangents forward needs. The forward stays fused.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .base import Call, Cotangent, Linearization, many, vjp, wide
from .ops import attention
from .written import masked


def attention_of_many(call: Call) -> Linearization:
    """The ordinary vector-Jacobian product of ``O = P V``, ``P = softmax(S)``, ``S = scale * Q K^T + mask``.

    For each of K coefficients G of O, with ``dP = G V^T`` and ``dS = P * (dP - sum(G * O))``:
    ``G_V = P^T G``, ``G_Q = scale * dS K``, ``G_K = scale * dS^T Q``. K is folded into the rows (for V the
    columns) of the matrix products, so that nothing is repeated K times that has no K in it.

    Shapes: the coefficients are ``[K, *shape]``; grouped heads and operands that broadcast get the sum of
    what their copies get.

    Source: Dao et al. 2022 (FlashAttention), appendix B.2, for ``sum(P * dP) = sum(G * O)``.
    """
    if call.op is not attention or not set(call.active) <= {0, 1, 2}:
        step = vjp(call)
        return Linearization(step.output, many(step.pullback))
    given = inspect.signature(attention).bind(*call.args, **call.kwargs)
    given.apply_defaults()
    output = call.run()

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        return _pull(call.active, output, cotangent, **given.arguments)

    return Linearization(output, pullback)


def _pull(
    active: tuple[int, ...],
    output: Tensor,
    cotangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, ...]:
    shapes = (query.shape, key.shape, value.shape)
    if enable_gqa:  # heads in groups, and a group's queries beside their one key and value
        groups = (key.shape[-3], query.shape[-3] // key.shape[-3])
        query, output, cotangent = (x.unflatten(-3, groups) for x in (query, output, cotangent))
        key, value = key.unsqueeze(-3), value.unsqueeze(-3)
        if mask is not None and mask.dim() > 2:
            alone = mask.shape[-3] == 1
            mask = mask.unsqueeze(-3) if alone else mask.unflatten(-3, groups)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = _weights(query, key, mask, is_causal, factor)
    count, rows = cotangent.shape[0], cotangent.shape[-2]
    g = cotangent.movedim(0, -3)  # [..., K, queries, e]
    found: dict[int, Tensor] = {}
    if 2 in active:
        columns = g.movedim(-3, -2).flatten(-2)  # [..., queries, K * e]
        found[2] = (weights.transpose(-1, -2) @ columns).unflatten(-1, (count, g.shape[-1])).movedim(-2, 0)
    if 0 in active or 1 in active:
        passed = (g.flatten(-3, -2) @ value.transpose(-1, -2)).unflatten(-2, (count, rows))
        kept = (g * output.unsqueeze(-3)).sum(-1, keepdim=True)
        scores = weights.unsqueeze(-3) * (passed - kept)  # [..., K, queries, keys]
        if 0 in active:
            folded = scores.flatten(-3, -2) @ key
            found[0] = (folded * factor).unflatten(-2, (count, rows)).movedim(-3, 0)
        if 1 in active:
            found[1] = (scores.transpose(-1, -2) @ (query * factor).unsqueeze(-3)).movedim(-3, 0)
    return tuple(_as(found[i], shapes[i], 0 if not enable_gqa else 1 if i == 0 else 2) for i in active)


def _as(coefficient: Tensor, shape: torch.Size, grouped: int) -> Tensor:
    """A coefficient in its operand's shape ``[K, *shape]``, summed over what the operand was repeated for.

    ``grouped``: 1 for heads that were split into groups, 2 for those that serve one.
    """
    if grouped:
        coefficient = coefficient.flatten(-4, -3) if grouped == 1 else coefficient.sum(-3)
    repeated = coefficient.dim() - 1 - len(shape)
    if repeated:
        coefficient = coefficient.sum(tuple(range(1, 1 + repeated)))
    return coefficient.sum_to_size((coefficient.shape[0], *shape))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, factor: float) -> Tensor:
    """``softmax(factor * q k^T + mask)``, 0 in rows in which every key is masked, as the fused op has it."""
    scores = masked(wide((query * factor) @ key.transpose(-1, -2)), mask, is_causal)
    weights: Tensor = torch.ops.aten._safe_softmax.default(scores, -1)
    return weights.to(query.dtype)
