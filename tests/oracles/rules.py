r"""LRP rules as the papers print them: relevance in, relevance out, divisions and all.

Everything is float64 and written for reading: contributions :math:`z_{ij}` are materialised, shared out and
summed. Nothing here is fast and nothing here is meant to be.

Conventions
-----------
``R`` has the shape of the operation's output. Every function returns the relevance of its active operands
and, where the rule loses some, what was absorbed, so that *operands + absorbed = R* in sum.

Stabiliser (Bach 2015, eq. 58 with sign(0) = +1): :math:`z \mapsto z + \varepsilon\,\mathrm{sign}(z)`.

Zeros. The relevance form divides by outputs. Where an output is exactly 0 its relevance is 0 as well (R = z
G), and the quotient is read as 0. That is right when all its contributions vanish (a ReLU that is off, a
query row that is masked everywhere), and wrong when non-zero contributions cancel exactly: there only the
coefficient form has an answer. Draw inputs from continuous distributions and it does not happen.

Sources
-------
Bach 2015
    Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
    Propagation, PLoS ONE 10(7), 2015.
Ali 2022
    Ali et al., XAI for Transformers: Better Explanations through Conservative Propagation, ICML 2022.
AttnLRP
    Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Probs = Literal["attnlrp", "frozen"]


# ----------------------------------------------------------------------------------------------------
# helpers


def sign(z: Tensor) -> Tensor:
    """Sign with sign(0) = +1 (and sign(-0.0) = +1)."""
    return torch.where(z >= 0, torch.ones_like(z), -torch.ones_like(z))


def stabilise(z: Tensor, eps: float) -> Tensor:
    r"""Sign-aware stabiliser :math:`z + \varepsilon\,\mathrm{sign}(z)` (Bach 2015, eq. 58)."""
    return z + eps * sign(z)


def share(R: Tensor, denominator: Tensor) -> Tensor:
    """R / denominator, and 0 where R is 0 (see *Zeros* above)."""
    return torch.where(R == 0, torch.zeros_like(R), R / torch.where(R == 0, torch.ones_like(R), denominator))


def sum_to(R: Tensor, shape: Sequence[int]) -> Tensor:
    """Add relevance up over the dimensions along which an operand of ``shape`` was broadcast."""
    while R.dim() > len(shape):
        R = R.sum(0)
    for dim, size in enumerate(shape):
        if size == 1 and R.shape[dim] != 1:
            R = R.sum(dim, keepdim=True)
    return R


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float64:
            raise TypeError(f"oracles compute in float64, got {tensor.dtype}")


# ----------------------------------------------------------------------------------------------------
# linear, convolution, addition: the epsilon rule


class LinearRelevance(NamedTuple):
    """Relevance of the input, and what the bias and the stabiliser absorbed (both shaped like the output)."""

    R_x: Tensor
    R_bias: Tensor
    R_eps: Tensor


def epsilon_linear(x: Tensor, W: Tensor, b: Tensor | None, R: Tensor, eps: float = 0.0) -> LinearRelevance:
    r"""Epsilon rule of :math:`z_j = \sum_i x_i w_{ji} + b_j` (Bach 2015, eq. 58; AttnLRP, eq. 8).

    .. math::
        R_i = \sum_j \frac{x_i w_{ji}}{z_j + \varepsilon\,\mathrm{sign}(z_j)} R_j, \qquad
        R^{b}_j = \frac{b_j}{z_j + \varepsilon\,\mathrm{sign}(z_j)} R_j, \qquad
        R^{\varepsilon}_j = \frac{\varepsilon\,\mathrm{sign}(z_j)}{z_j + \varepsilon\,\mathrm{sign}(z_j)} R_j

    ``x`` is [..., I], ``W`` [J, I], ``b`` [J] and ``R`` [..., J].
    """
    _check(x, W, b, R)
    z_ij = torch.einsum("...i,ji->...ji", x, W)
    bias = torch.zeros_like(R) if b is None else b.expand(R.shape)
    z = z_ij.sum(-1) + bias
    share_j = share(R, stabilise(z, eps))
    R_ij = z_ij * share_j.unsqueeze(-1)
    return LinearRelevance(R_ij.sum(-2), bias * share_j, eps * sign(z) * share_j)


def _pair(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def conv_matrix(
    W: Tensor,
    spatial: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, tuple[int, ...]]:
    """The dense matrix [O * prod(out), C * prod(spatial)] of a convolution, entry by entry, and its output
    size.

    Row (o, p), column (c, q): the weight ``W[o, c', k]`` with q = p * stride - padding + k * dilation, where
    c' is c's place in the group of o. Zero padding has no column: it carries no relevance.
    """
    n = W.dim() - 2
    stride_, padding_, dilation_ = _pair(stride, n), _pair(padding, n), _pair(dilation, n)
    out_channels, in_group, kernel = W.shape[0], W.shape[1], tuple(W.shape[2:])
    size = tuple(
        (spatial[d] + 2 * padding_[d] - dilation_[d] * (kernel[d] - 1) - 1) // stride_[d] + 1
        for d in range(n)
    )
    M = torch.zeros((out_channels, *size, in_group * groups, *spatial), dtype=W.dtype)
    for o in range(out_channels):
        first = (o // (out_channels // groups)) * in_group
        for p in product(*(range(s) for s in size)):
            for k in product(*(range(s) for s in kernel)):
                q = tuple(p[d] * stride_[d] - padding_[d] + k[d] * dilation_[d] for d in range(n))
                if all(0 <= q[d] < spatial[d] for d in range(n)):
                    for c in range(in_group):
                        M[(o, *p, first + c, *q)] = W[(o, c, *k)]
    return M.reshape(out_channels * math.prod(size), in_group * groups * math.prod(spatial)), size


def _epsilon_conv(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    R: Tensor,
    eps: float,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> LinearRelevance:
    M, size = conv_matrix(W, x.shape[2:], stride, padding, dilation, groups)
    if R.shape[2:] != size:
        raise ValueError(f"relevance has spatial size {tuple(R.shape[2:])}, the convolution gives {size}")
    bias = None if b is None else b.repeat_interleave(math.prod(size))
    R_x, R_bias, R_eps = epsilon_linear(x.flatten(1), M, bias, R.flatten(1), eps)
    return LinearRelevance(R_x.reshape(x.shape), R_bias.reshape(R.shape), R_eps.reshape(R.shape))


def epsilon_conv2d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    R: Tensor,
    eps: float = 0.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> LinearRelevance:
    """Epsilon rule of a 2d convolution, through its dense matrix. ``x`` is [B, C, H, W], ``W`` [O, C/groups,
    h, w]."""
    _check(x, W, b, R)
    return _epsilon_conv(x, W, b, R, eps, stride, padding, dilation, groups)


def epsilon_conv1d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    R: Tensor,
    eps: float = 0.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> LinearRelevance:
    """Epsilon rule of a 1d convolution, through its dense matrix. ``x`` is [B, C, L], ``W`` [O, C/groups,
    l]."""
    _check(x, W, b, R)
    return _epsilon_conv(x, W, b, R, eps, stride, padding, dilation, groups)


class AddRelevance(NamedTuple):
    """Relevance of both summands (in their own shapes) and what the stabiliser absorbed (output's shape)."""

    R_a: Tensor
    R_b: Tensor
    R_eps: Tensor


def epsilon_add(a: Tensor, b: Tensor, R: Tensor, eps: float = 0.0) -> AddRelevance:
    r"""Epsilon rule of z = a + b: :math:`R_a = \frac{a}{z + \varepsilon\,\mathrm{sign}(z)} R`, b likewise
    (AttnLRP, eq. 8).

    Operands may broadcast. If one is a constant, its share is what the constant absorbs.
    """
    _check(a, b, R)
    z = a + b
    part = share(R, stabilise(z, eps))
    return AddRelevance(sum_to(a * part, a.shape), sum_to(b * part, b.shape), eps * sign(z) * part)


# ----------------------------------------------------------------------------------------------------
# products


def uniform_product(factors: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    r"""Uniform rule of :math:`z = \prod_{k=1}^{n} x_k`, all active: each factor gets R / n (AttnLRP, Prop.
    3.2).

    Shapley values of a product with a zero baseline. Factors may broadcast: relevance adds up over what was
    broadcast.
    """
    _check(*factors, R)
    n = len(factors)
    return [sum_to(R / n, x.shape) for x in factors]


def substitution(A: Tensor, B: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    r"""Forward substitution :math:`x_i = (b_i - \sum_{j<i} A_{ij} x_j) / a_{ii}`, from the last row back.

    A ``[n, n]``, B, R ``[n, k]``. Relevance of :math:`x_i` goes to :math:`b_i` and to every product in
    proportion to its part of the sum (epsilon rule), half of a product's to each factor (uniform rule).

    Returns:
        R_A, R_B.
    """
    n, k = B.shape
    X = torch.linalg.solve_triangular(A, B, upper=False)
    R_A, R_B, R_X = torch.zeros_like(A), torch.zeros_like(B), R.clone()
    for i in reversed(range(n)):
        for c in range(k):
            per_part = R_X[i, c] / (X[i, c] * A[i, i])
            R_B[i, c] = B[i, c] * per_part
            for j in range(i):
                term = -A[i, j] * X[j, c] * per_part
                R_A[i, j] += term / 2
                R_X[j, c] += term / 2
    return R_A, R_B


class MatmulRelevance(NamedTuple):
    """Relevance of both operands (zero for an inactive one) and what the stabiliser absorbed (output's
    shape)."""

    R_A: Tensor
    R_B: Tensor
    R_eps: Tensor


def matmul_uniform(
    A: Tensor, B: Tensor, R: Tensor, eps: float = 0.0, active: tuple[bool, bool] = (True, True)
) -> MatmulRelevance:
    r"""Epsilon and uniform rule of :math:`O_{jp} = \sum_i A_{ji} B_{ip}` (AttnLRP, Prop. 3.3).

    .. math::
        R_{A,ji} = \sum_p \frac{A_{ji} B_{ip}}{2\,(O_{jp} + \varepsilon\,\mathrm{sign}(O_{jp}))} R_{jp},
        \qquad R_{B,ip} = \sum_j \frac{A_{ji} B_{ip}}{2\,(O_{jp} + \varepsilon\,\mathrm{sign}(O_{jp}))} R_{jp}

    The paper prints the denominator as :math:`2 O_{jp} + \varepsilon`: its epsilon is twice this one. Here
    it is DESIGN.md's: half of :math:`A \odot ((\sigma_\varepsilon(O)\,R/O)\,B^\top)`.

    With one active operand the 2 becomes a 1: the epsilon rule of a linear map whose weights are the other
    operand. ``A`` is [..., J, I], ``B`` [..., I, P], ``R`` [..., J, P]; leading dimensions may broadcast.
    """
    _check(A, B, R)
    n = sum(active)
    if n == 0:
        raise ValueError("matmul without an active operand has no relevance to share out")
    z_jip = torch.einsum("...ji,...ip->...jip", A, B)
    O_jp = z_jip.sum(-2)
    part = share(R, stabilise(O_jp, eps))
    R_jip = z_jip * part.unsqueeze(-2) / n
    R_A = sum_to(R_jip.sum(-1), A.shape) if active[0] else torch.zeros_like(A)
    R_B = sum_to(R_jip.sum(-3), B.shape) if active[1] else torch.zeros_like(B)
    return MatmulRelevance(R_A, R_B, eps * sign(O_jp) * part)


def divide_all_to_numerator(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """a / b with b frozen: linear in a, so a gets everything and b nothing."""
    _check(a, b, R)
    return sum_to(R, a.shape), torch.zeros_like(b)


# ----------------------------------------------------------------------------------------------------
# nonlinearities


def identity(R: Tensor) -> Tensor:
    """Elementwise activation with f(0) = 0: relevance passes unchanged (AttnLRP, eq. 9)."""
    _check(R)
    return R.clone()


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax by its definition; a row that is -inf throughout gives zeros, as SDPA does."""
    top = x.amax(dim, keepdim=True)
    e = torch.exp(x - torch.where(torch.isinf(top), torch.zeros_like(top), top))
    total = e.sum(dim, keepdim=True)
    return torch.where(
        total > 0, e / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(e)
    )


class SoftmaxRelevance(NamedTuple):
    """Relevance of the logits and what the Taylor bias absorbed (summed over ``dim``, which is kept as 1)."""

    R_x: Tensor
    R_bias: Tensor


def softmax_taylor(x: Tensor, R_s: Tensor, dim: int = -1) -> SoftmaxRelevance:
    r"""Taylor rule with bias of the softmax :math:`s = \mathrm{softmax}(x)` (AttnLRP, Prop. 3.1).

    .. math:: R_i = x_i \Bigl( R_{s,i} - s_i \sum_j R_{s,j} \Bigr)

    A masked logit (-inf) gets 0: its probability is constantly 0, so is its relevance. Not conservative, and
    not invariant to a shift of all logits: what is missing belongs to the Taylor bias.
    """
    _check(x, R_s)
    s = softmax(x, dim)
    bracket = R_s - s * R_s.sum(dim, keepdim=True)
    masked = torch.isinf(x) & (x < 0)
    R_x = torch.where(masked, torch.zeros_like(x), torch.where(masked, torch.zeros_like(x), x) * bracket)
    return SoftmaxRelevance(R_x, R_s.sum(dim, keepdim=True) - R_x.sum(dim, keepdim=True))


def winner_takes_all_max(x: Tensor, R: Tensor, dim: int = -1) -> Tensor:
    """max over ``dim`` (removed): the winner gets all, which is what its gradient does. Among equals the
    first wins."""
    _check(x, R)
    rows = x.movedim(dim, -1)
    R_rows = torch.zeros_like(rows)
    for where in product(*(range(s) for s in rows.shape[:-1])):
        row = rows[where].tolist()
        R_rows[(*where, row.index(max(row)))] = R[where]
    return R_rows.movedim(-1, dim)


def winner_takes_all_topk(x: Tensor, R: Tensor, k: int, dim: int = -1) -> Tensor:
    """top-k values over ``dim`` (descending): the n-th value's relevance goes to the element that it is."""
    _check(x, R)
    rows, R_out = x.movedim(dim, -1), R.movedim(dim, -1)
    R_rows = torch.zeros_like(rows)
    for where in product(*(range(s) for s in rows.shape[:-1])):
        row = rows[where].tolist()
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        for n, i in enumerate(order):
            R_rows[(*where, i)] += R_out[(*where, n)]
    return R_rows.movedim(-1, dim)


def gradient_times_input(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], R: Tensor | None = None
) -> list[Tensor]:
    r"""Gradient x Input of any function, by autograd: the linear term of a Taylor step towards 0 (Ali 2022).

    .. math:: R_{x} = x \odot J^\top \frac{R}{f(x)}

    Without ``R`` the output explains itself (R = f(x)), which for a scalar function is x times its gradient.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    z = function(*leaves)
    cotangent = torch.ones_like(z) if R is None else share(R, z.detach())
    grads = torch.autograd.grad(z, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(x) if g is None else x.detach() * g for x, g in zip(leaves, grads, strict=True)]


# ----------------------------------------------------------------------------------------------------
# normalisation


class NormRelevance(NamedTuple):
    """Relevance of the input and what the bias absorbed (output's shape)."""

    R_x: Tensor
    R_bias: Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, R: Tensor, norm_eps: float = 1e-5, eps: float = 0.0
) -> NormRelevance:
    r"""LN-rule: the standard deviation is a constant, the mean is not (Ali 2022, LN-rule; AttnLRP, Prop.
    3.4).

    Then :math:`y_j = \sum_i x_i\,(\delta_{ij} - \tfrac1N)\,\frac{w_j}{\mathrm{std}} + b_j` is linear in x,
    and

    .. math:: R_i = \sum_j \frac{x_i\,(\delta_{ij} - \frac1N)\,w_j/\mathrm{std}}{y_j} R_j,
              \qquad R^b_j = \frac{b_j}{y_j} R_j

    over the last dimension. A stabiliser is possible (``eps``), DESIGN.md has none here.
    """
    _check(x, weight, bias, R)
    n = x.shape[-1]
    w = torch.ones(n, dtype=x.dtype) if weight is None else weight
    mean = x.sum(-1, keepdim=True) / n
    std = torch.sqrt(((x - mean) ** 2).sum(-1, keepdim=True) / n + norm_eps)
    centre = torch.eye(n, dtype=x.dtype) - 1.0 / n
    z_ij = torch.einsum("...i,ji,j->...ji", x, centre, w) / std.unsqueeze(-1)
    b = torch.zeros_like(R) if bias is None else bias.expand(R.shape)
    part = share(R, stabilise(z_ij.sum(-1) + b, eps))
    return NormRelevance((z_ij * part.unsqueeze(-1)).sum(-2), b * part)


def rms_norm(x: Tensor, weight: Tensor | None, R: Tensor, norm_eps: float = 1e-6) -> Tensor:
    r"""LN-rule of :math:`y_j = x_j w_j / \mathrm{rms}(x)` with rms constant (Ali 2022, LN-rule; AttnLRP,
    Prop. 3.4).

    .. math:: R_i = \sum_j \frac{x_i\,\delta_{ij}\,w_j/\mathrm{rms}}{y_j} R_j = R_i

    One contribution an output: the identity. Written out nevertheless.
    """
    _check(x, weight, R)
    n = x.shape[-1]
    w = torch.ones(n, dtype=x.dtype) if weight is None else weight
    rms = torch.sqrt((x**2).sum(-1, keepdim=True) / n + norm_eps)
    z_ij = torch.einsum("...i,ji,j->...ji", x, torch.eye(n, dtype=x.dtype), w) / rms.unsqueeze(-1)
    part = share(R, z_ij.sum(-1))
    return (z_ij * part.unsqueeze(-1)).sum(-2)


# ----------------------------------------------------------------------------------------------------
# attention


class AttentionRelevance(NamedTuple):
    """Relevance of query, key and value, and sums of what was absorbed by what, [B, H] each."""

    R_q: Tensor
    R_k: Tensor
    R_v: Tensor
    absorbed: dict[str, Tensor]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention, head by head. Shapes as in :func:`attention`."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    for n, h in product(range(q.shape[0]), range(q.shape[1])):
        scores = (q[n, h] @ k[n, h // groups].T) * scale
        out[n, h] = softmax(_masked(scores, mask, bias, n, h, q)) @ v[n, h // groups]
    return out


def _masked(scores: Tensor, mask: Tensor | None, bias: Tensor | None, n: int, h: int, q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[1], *scores.shape)
    if bias is not None:
        scores = scores + bias.expand(shape)[n, h]
    if mask is not None:
        scores = torch.where(mask.expand(shape)[n, h], scores, torch.full_like(scores, -math.inf))
    return scores


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    R: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    probs: Probs = "attnlrp",
    active: tuple[bool, bool, bool] = (True, True, True),
) -> AttentionRelevance:
    r"""Attention as the composition it is, one head at a time.

    .. math:: S = QK^\top, \quad L = cS + b + \text{mask}, \quad P = \mathrm{softmax}(L), \quad O = PV

    ``attnlrp``: matmul (AttnLRP, Prop. 3.3), softmax Taylor rule (Prop. 3.1), bias as constant summand of the
    epsilon rule with epsilon 0, scale moves relevance with its element, matmul again. ``frozen``: P is a
    constant (Ali 2022, AH-rule), so all of it goes to V by the epsilon rule.

    ``q`` is [B, H, S, D], ``k`` [B, Hk, T, D] and ``v`` [B, Hk, T, E] with H a multiple of Hk (query head h
    reads key head h // (H // Hk); relevance adds up over the query heads of a group). ``mask`` is boolean,
    True = attend, ``bias`` an additive constant; both broadcast to [B, H, S, T]. ``active`` says which of q,
    k, v carry relevance: a matmul with one active operand gives it the full share. A row that is masked
    everywhere has output 0.
    """
    _check(q, k, v, R, bias)
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    R_q, R_k, R_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    names = ("eps_scores", "position_bias", "softmax", "eps_output")
    absorbed = {name: torch.zeros(q.shape[:2], dtype=q.dtype) for name in names}
    flow_probs = probs == "attnlrp" and (active[0] or active[1])
    for n, h in product(range(q.shape[0]), range(q.shape[1])):
        Q, K, V = q[n, h], k[n, h // groups], v[n, h // groups]
        S = Q @ K.T
        L = _masked(S * scale, mask, bias, n, h, q)
        P = softmax(L)
        if not flow_probs and not active[2]:
            absorbed["softmax"][n, h] += R[n, h].sum()
            continue
        R_P, R_V, lost = matmul_uniform(P, V, R[n, h], eps, (flow_probs, active[2]))
        absorbed["eps_output"][n, h] += lost.sum()
        R_v[n, h // groups] += R_V
        if not flow_probs:
            continue
        R_L, lost = softmax_taylor(L, R_P)
        absorbed["softmax"][n, h] += lost.sum()
        R_scaled = R_L
        if bias is not None:
            constant = bias.expand(q.shape[0], q.shape[1], *S.shape)[n, h]
            R_scaled, R_constant, _ = epsilon_add(S * scale, constant, R_L, 0.0)
            absorbed["position_bias"][n, h] += R_constant.sum()
        R_Q, R_KT, lost = matmul_uniform(Q, K.T, R_scaled, eps, active[:2])
        absorbed["eps_scores"][n, h] += lost.sum()
        R_q[n, h] += R_Q
        R_k[n, h // groups] += R_KT.T
    return AttentionRelevance(R_q, R_k, R_v, absorbed)
