"""Attention ``softmax(s(q k^T)) v`` and its relevance, flash-style: no matrix of queries by keys is held.

Notation: B samples, H query heads, H' heads of keys and values (H a multiple of H'), N queries, M keys, head
sizes D of q and k and E of v, K coefficients. q ``[B, H, N, D]``, k ``[B, H', M, D]``, v ``[B, H', M, E]``,
out ``[B, H, N, E]``, lse ``[B, H, N]`` in float32 (float64 for float64), natural logarithm. A mask is boolean
(True = seen) or added to the scores, and broadcasts to ``[B, H, N, M]`` (strides of 0 are read as such).
``sinks`` ``[H]`` are one more logit for each head whose value is 0. A row in which every key is masked gives
0, and lse = -inf; where its mask is finite (the least float), out is what PyTorch gives, and relevance takes
such a row (lse < -1e29) for masked.

Scores: see :class:`fxlrp.kernels.attention.scoring.Scoring`. What is measured: nothing yet.

Predicted on an H200 (dense bf16, 790 TFLOP/s; products of 2 N M D operations each; causal: half of all):

- ``attention_forward``: 2 products; reads q, k, v, writes out and lse. Nothing else grows but with N.
- ``attention_relevance``: 7 products, against 5 of a fused backward that adds to q's gradient atomically
  (FlashAttention-2): the price of results that do not change from run to run. With ``epsilon`` one more
  pass over out and G (3 N E values), with ``score_epsilon`` one division for each score.
- ``attention_frozen_relevance``: 2 products, so 2.5 times fewer than that backward.
- K coefficients: scores and probabilities are computed once for each C of them (the table in ``tiles.py``).
  A pass of exponentials costs a product at D = 128 and two at D = 64. The kernel over keys for queries'
  coefficients takes ``2 C + 1`` products and one such pass, that for keys and values ``3 C + 1`` and one:
  0.66 of as many calls at D = 64 (C = 4 and 2), 0.89 at D = 128 (2 and 1, for want of registers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op

from .. import launch
from ..rows import alike, fits
from . import reference
from .scoring import Scoring

#: The largest head size by bytes of an element: float32 fits no registers above. Others are padded inside.
LARGEST_HEAD = {2: 256, 4: 128}


@triton_op("fxlrp::attention_forward", mutates_args={})
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    epsilon: float = 0.0,
    score_epsilon: float = 0.0,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(softmax(s) v, logsumexp(s))``; shapes above.

    Its derivative is AttnLRP's pullback: :func:`attention_relevance` with half for v and half for those of q
    and k that need it (all for one side that is alone), or with ``frozen`` the values' alone. The last three
    parameters mean nothing for the forward.

    Source: Dao et al. 2022 (FlashAttention); sinks: Xiao et al. 2023.
    """
    scoring = Scoring.of(q.shape[-1], scale, causal, offset, window, soft_cap)
    if _runs(q, k, v, mask, sinks):
        from . import kernel

        return kernel.forward(q, k, v, mask, sinks, scoring)
    return reference.forward(q, k, v, mask, sinks, scoring)


@triton_op("fxlrp::attention_relevance", mutates_args={})
def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    shares: Sequence[float],
    mask: Tensor | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    cap_gradient: bool = False,
    epsilon: float = 0.0,
    score_epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of q, k and v from that of out, ``[B, H, N, E]`` or ``[K, B, H, N, E]``; as many of each.

    With probabilities P from lse, ``G' = sigma(out) G`` and ``t`` the slope of the cap (1 without one):
    ``dS = P (G' v^T - sum(out G')) t sigma'(q k^T)``, they are ``G_q = shares[0] scale dS k``,
    ``G_k = shares[1] scale dS^T q`` and ``G_v = shares[2] P^T G'``, where
    ``sigma(z) = |z| / (|z| + epsilon)`` and sigma' has ``score_epsilon``. Shares of 1/4, 1/4 and 1/2 without
    stabilisers are AttnLRP's attention, shares of 1 the gradient. An operand whose share is 0 costs nothing,
    and its place is taken by an empty tensor of shape ``[0]``.

    Deterministic: sums run in one order, keys' and values' over the group's heads and queries, queries' over
    keys.

    Source: AttnLRP, Prop. 3.1 and 3.3; Dao et al. 2022, appendix B.2, for ``sum(P dP) = sum(out G')``.
    """
    scoring = Scoring.of(q.shape[-1], scale, causal, offset, window, soft_cap, cap_gradient)
    share_q, share_k, share_v = shares
    if _runs(q, k, v, mask, out=out, lse=lse, g=g):
        from . import kernel

        return kernel.relevance(
            q, k, v, out, lse, g, mask, scoring, epsilon, score_epsilon, (share_q, share_k, share_v)
        )
    return reference.relevance(
        q, k, v, out, lse, g, mask, scoring, epsilon, score_epsilon, (share_q, share_k, share_v)
    )


@triton_op("fxlrp::attention_frozen_relevance", mutates_args={})
def attention_frozen_relevance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    g: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """``G_v = P^T G``: attention weights as constants; g ``[B, H, N, E]`` or ``[K, B, H, N, E]``.

    Source: Ali et al. 2022 (AH-rule); CP-LRP in AttnLRP, section 2.
    """
    scoring = Scoring.of(q.shape[-1], scale, causal, offset, window, soft_cap)
    if _runs(q, k, None, mask, lse=lse, g=g):
        from . import kernel

        return kernel.frozen_relevance(q, k, lse, g, mask, scoring)
    return reference.frozen_relevance(q, k, lse, g, mask, scoring)


def _runs(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    g: Tensor | None = None,
) -> bool:
    """Whether kernels run: on what they do not take the reference does, or fails by itself, as on sizes that
    do not belong together.
    """
    given = [x for x in (q, k, v, mask, sinks, out, lse, g) if x is not None]
    if not launch.runs_triton(*given) or launch.unavailable(q.device, q.dtype):
        return False
    # Of values that are not there, their coefficients' sizes: the frozen rule reads none.
    values = k[..., :1].expand(*k.shape[:-1], g.shape[-1]) if v is None and g is not None else v
    assert values is not None
    if _unfit(q, k, values, mask, sinks):
        return False
    whole = (*q.shape[:-1], values.shape[-1])
    return (
        (out is None or alike(whole, out.shape))
        and (lse is None or alike(q.shape[:-1], lse.shape))
        and (g is None or (fits(g.shape, whole) and g.dtype == q.dtype))
    )


def _like(x: Tensor, *shape: Any) -> Tensor:
    """An empty tensor of shape ``[..., heads, positions, size]``, heads side by side in memory."""
    *lead, heads, positions, size = shape
    return x.new_empty((*lead, positions, heads, size)).transpose(-3, -2)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like(q, *q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide)


def _fake_relevance(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, g: Tensor, shares: Sequence[float], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lead = g.shape[:-4]
    of_q, of_k, of_v = (
        _like(x, *lead, *x.shape) if share else x.new_empty(0)
        for x, share in zip((q, k, v), shares, strict=True)
    )
    return of_q, of_k, of_v


def _fake_frozen_relevance(q: Tensor, k: Tensor, lse: Tensor, g: Tensor, *rest: Any) -> Tensor:
    return _like(q, *g.shape[:-4], *k.shape[:-1], g.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, _, *ctx.scoring, ctx.epsilon, ctx.score_epsilon, ctx.frozen = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _pull(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    found: list[Tensor | None] = [None, None, None]
    if ctx.frozen:
        if needs_v:
            found[2] = attention_frozen_relevance(q, k, lse, g, mask, *ctx.scoring)
    elif needs_q or needs_k or needs_v:
        outer = 0.5 if needs_v and (needs_q or needs_k) else 1.0
        inner = outer * (0.5 if needs_q and needs_k else 1.0)
        shares = [inner * needs_q, inner * needs_k, outer * needs_v]
        coefficients = attention_relevance(
            q, k, v, out, lse, g, shares, mask, *ctx.scoring, False, ctx.epsilon, ctx.score_epsilon
        )
        found = [x if share else None for x, share in zip(coefficients, shares, strict=True)]
    return (*found, *[None] * 10)


attention_forward.register_fake(_fake_forward)
attention_relevance.register_fake(_fake_relevance)
attention_frozen_relevance.register_fake(_fake_frozen_relevance)
attention_forward.register_autograd(_pull, setup_context=_save)


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[bool, str]:
    """Whether the kernels take such (fake) tensors, and if not why. Symbolic sizes are not decided on."""
    reason = launch.unavailable(q.device, q.dtype, k.dtype, v.dtype) or _unfit(q, k, v, mask, sinks)
    if not reason and temperature != 1.0:
        reason = "a softmax with a temperature of its own for relevance is computed by the reference"
    return not reason, reason


def _unfit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> str:
    """What is wrong with shapes and dtypes; empty where nothing is."""
    if any(x.dim() != 4 for x in (q, k, v)):
        return "q, k and v must be [batch, heads, positions, size]"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    sizes = (q.shape[-1], v.shape[-1], q.shape[1], k.shape[1])
    if not all(isinstance(size, int) for size in sizes):
        return "head sizes and numbers of heads must be static"
    if max(sizes[:2]) > LARGEST_HEAD[q.dtype.itemsize] or min(sizes) < 1:
        return f"head sizes must be 1 to {LARGEST_HEAD[q.dtype.itemsize]}, not {sizes[0]} and {sizes[1]}"
    if sizes[2] % sizes[3]:
        return f"{sizes[2]} query heads are no multiple of {sizes[3]} key heads"
    pairs = [(q.shape[0], k.shape[0]), (q.shape[0], v.shape[0]), (k.shape[1], v.shape[1])]
    pairs += [(q.shape[3], k.shape[3]), (k.shape[2], v.shape[2])]
    if not all(statically_known_true(a == b) for a, b in pairs):
        return "q, k and v must agree in their batch, k and v in heads and positions, q and k in their size"
    if mask is not None:
        if mask.dim() > 4 or not (mask.dtype == torch.bool or mask.dtype in launch.DTYPES):
            return f"a mask must be boolean or added, with at most 4 dimensions, not {mask.dtype}"
        whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fits = zip(reversed(mask.shape), reversed(whole), strict=False)
        if not all(statically_known_true(a == 1) or statically_known_true(a == b) for a, b in fits):
            return "the mask must broadcast to [batch, heads, queries, keys]"
    if sinks is not None and (sinks.dim() != 1 or not statically_known_true(sinks.shape[0] == sizes[2])):
        return "sinks must be one logit for each query head"
    return ""
