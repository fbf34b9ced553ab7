"""Canonical ops: what different spellings of the same step become before rules are assigned.

Each is a plain function whose forward equals the model's own step; the compiler's patterns put them in place.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v``; q ``[batch, heads, n, d]``; mask additive, or True = keep."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def normalize(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` where factor is 1/std or 1/rms of x: the core of a decomposed LayerNorm or RMSNorm."""
    return x * factor


def normalize_divide(x: Tensor, deviation: Tensor) -> Tensor:
    """``x / deviation`` where deviation is the std, rms or length of x."""
    return x / deviation


def self_gate(x: Tensor, gate: Tensor) -> Tensor:
    """``x * g(x)`` with ``gate = g(x)`` elementwise: SiLU, GELU and their hand-written variants."""
    return x * gate
