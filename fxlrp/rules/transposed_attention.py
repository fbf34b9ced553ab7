"""The pullback of attention's values alone: attention with queries and keys exchanged."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from .base import Call, Cotangent, Linearization, vjp
from .ops import attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_of_values(call: Call) -> Linearization:
    """``O = A V`` and ``G_V = A^T G`` with ``A = softmax(S)``, ``S = scale * Q K^T + mask``.

    With the forward's ``l_i = log sum_j exp(S_ij)``, the rows of ``A^T`` are a softmax over the queries but
    for their sums: ``A_ij = exp(S_ij - l_i) = Z_j softmax_i(S_ij - l_i)`` with ``Z_j = sum_i A_ij``, which
    that softmax's own log-sum-exp is the logarithm of. So the fused forward kernel does it: keys ask, queries
    answer, ``-l_i`` comes in as one more feature beside a 1, and causal positions count from the end. Two
    matrix products and no N x N matrix per head; the fused backward takes five products and drops three.

    Elsewhere than on a CPU in float32 and float64, or where a mask is added or operands broadcast, it is the
    ordinary vector-Jacobian product.

    Shapes: q ``[batch, heads, queries, d]``, k and v ``[batch, heads, keys, d]``, G like q.
    """
    if call.op is not attention:
        return vjp(call)
    given = inspect.signature(attention).bind(*call.args, **call.kwargs)
    given.apply_defaults()
    query, key, value, keep, causal, scale, grouped = given.arguments.values()
    if scale == 0 or not _serves(query, key, value, keep, causal, grouped):
        return vjp(call)
    groups = query.shape[1] // key.shape[1] if grouped else 1
    key, value = _repeated(key, groups), _repeated(value, groups)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, sums = _flash(query, key, value, 0.0, causal, attn_mask=_added(keep, query), scale=scale)

    def pullback(cotangent: Cotangent) -> tuple[Tensor]:
        # Rows in which every key is masked: the mask alone takes them out.
        left = sums.masked_fill(sums == -math.inf, 0.0) * (-1.0 / scale)
        asked = torch.cat([query, left.unsqueeze(-1)], -1)
        asking = torch.cat([key, torch.ones_like(key[..., :1])], -1)
        arrived = torch.cat([cotangent, torch.zeros_like(cotangent[..., :1])], -1)
        if causal:  # key j is seen by queries i >= j; counted from the end, by those up to its own
            asked, asking, arrived = (x.flip(-2) for x in (asked, asking, arrived))
        seen = None if keep is None else _added(keep.transpose(-1, -2), query)
        shares, totals = _flash(asking, asked, arrived, 0.0, causal, attn_mask=seen, scale=scale)
        found = shares[..., :-1] * totals.exp().unsqueeze(-1)
        found = found.flip(-2) if causal else found
        return (found if groups == 1 else found.unflatten(1, (-1, groups)).sum(2),)

    return Linearization(output, pullback)


def _serves(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, causal: bool, grouped: bool
) -> bool:
    """Whether the kernel takes such operands; sizes are compared as they print, which fixes none."""
    operands = (query, key, value)
    if any(x.device.type != "cpu" or x.dim() != 4 or x.stride(-1) != 1 for x in operands):
        return False
    if query.dtype not in (torch.float32, torch.float64) or any(x.dtype is not query.dtype for x in operands):
        return False
    if keep is not None and (keep.dtype is not torch.bool or keep.dim() not in (2, 4) or causal):
        return False
    heads, samples, features = ([str(x.shape[d]) for x in operands] for d in (1, 0, 3))
    lengths = (str(query.shape[2]), str(key.shape[2]))
    return (
        len(set(features)) == len(set(samples)) == 1
        and heads[1] == heads[2]
        and (heads[0] == heads[1] or (grouped and heads[0].isdigit() and heads[1].isdigit()))
        and not (causal and lengths[0] != lengths[1])
    )


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each head as often as queries share it."""
    if groups == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _added(keep: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of what is kept as one that is added, laid out anew."""
    if keep is None:
        return None
    added = torch.zeros(keep.shape, dtype=like.dtype, device=like.device).masked_fill(~keep, -math.inf)
    return added if added.dim() == 4 else added.reshape(1, 1, *added.shape)
