r"""Gradient x Input with modified gradients: detach and scaled-gradient tricks, and nothing else.

Relevance is value times coefficient, :math:`R_x = x \odot G_x`, and the coefficient obeys a modified chain
rule. Here the modification is made in the forward pass, so that plain autograd computes G:

* ``detach`` freezes a factor (its coefficient is 0);
* ``c x + ((1-c) x).detach()`` keeps the value of x and scales its coefficient by c.

What is active is what requires grad: callers detach every weight, and mark what they explain.

Composites
----------
============  =======================  =============  ==============  ================  ===================
name          attention                norm           activation      act(g) * u        source
============  =======================  =============  ==============  ================  ===================
``attnlrp``   both matmuls 1/2 each    1/std frozen   f(x)/x frozen   1/2 each          AttnLRP (2024)
``cp``        probabilities frozen     1/std frozen   f(x)/x frozen   act(g) frozen     Ali 2022, extended
``ali``       probabilities frozen     1/std frozen   gradient        gradient          Ali 2022 (AH + LN)
``gradient``  gradient                 gradient       gradient        gradient          Gradient x Input
============  =======================  =============  ==============  ================  ===================

The stabiliser is 0 throughout, so linear layers and sums keep their plain gradient and biases absorb.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Composite:
    """Which gradients are modified."""

    halve_products: bool
    freeze_probs: bool
    freeze_std: bool
    identity: bool
    gate: Literal["half", "freeze", "gradient"]


COMPOSITES: dict[str, Composite] = {
    "attnlrp": Composite(
        halve_products=True, freeze_probs=False, freeze_std=True, identity=True, gate="half"
    ),
    "cp": Composite(halve_products=False, freeze_probs=True, freeze_std=True, identity=True, gate="freeze"),
    "ali": Composite(
        halve_products=False, freeze_probs=True, freeze_std=True, identity=False, gate="gradient"
    ),
    "gradient": Composite(
        halve_products=False, freeze_probs=False, freeze_std=False, identity=False, gate="gradient"
    ),
}


class Explained(NamedTuple):
    """Relevance ([B, S], or the pixels' shape), the explained scalar [B], and the model's logits."""

    relevance: Tensor
    value: Tensor
    logits: Tensor


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times ``factor``."""
    return factor * x + ((1.0 - factor) * x).detach()


def both(a: Tensor, b: Tensor, comp: Composite) -> tuple[Tensor, Tensor]:
    """Operands of a bilinear operation: half the gradient each where both are active (AttnLRP, Prop. 3.2 and
    3.3)."""
    if comp.halve_products and a.requires_grad and b.requires_grad:
        return scale_gradient(a, 0.5), scale_gradient(b, 0.5)
    return a, b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b with constant weights."""
    y = x @ weight.detach().T
    return y if bias is None else y + bias.detach()


# ----------------------------------------------------------------------------------------------------
# activations


def _gelu_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_tanh_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _tanh_ratio(x: Tensor) -> Tensor:
    """tanh(x)/x, by its series 1 - x^2/3 + 2x^4/15 where x is tiny."""
    small = x.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1.0 - x**2 / 3.0 + 2.0 * x**4 / 15.0, torch.tanh(safe) / safe)


_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu_ratio,
    "gelu_python": _gelu_ratio,
    "gelu_new": _gelu_tanh_ratio,
    "gelu_pytorch_tanh": _gelu_tanh_ratio,
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
    "relu": lambda x: (x > 0).to(x.dtype),
    "tanh": _tanh_ratio,
}


def activation(name: str, x: Tensor, comp: Composite) -> Tensor:
    r"""f(x) written as :math:`x \cdot r(x)` with r = f(x)/x; the identity rule freezes r (AttnLRP, eq. 9)."""
    if name == "tanh" and not comp.identity:
        return torch.tanh(x)
    ratio = _RATIOS[name](x)
    return x * (ratio.detach() if comp.identity else ratio)


def gated(a: Tensor, u: Tensor, comp: Composite) -> Tensor:
    """a * u, where a is the activated gate and u the up projection."""
    if comp.gate == "freeze":
        return a.detach() * u
    if comp.gate == "half" and a.requires_grad and u.requires_grad:
        return scale_gradient(a, 0.5) * scale_gradient(u, 0.5)
    return a * u


# ----------------------------------------------------------------------------------------------------
# norms


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, comp: Composite) -> Tensor:
    """LayerNorm over the last dimension; the LN-rule freezes 1/std and keeps the mean (Ali 2022, LN-rule)."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = 1.0 / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    y = centred * (rstd.detach() if comp.freeze_std else rstd) * weight.detach()
    return y if bias is None else y + bias.detach()


def rms_norm(x: Tensor, weight: Tensor, eps: float, comp: Composite, float32: str = "") -> Tensor:
    """RMSNorm over the last dimension; the LN-rule freezes 1/rms (Ali 2022, LN-rule).

    ``float32`` rounds where the HF model rounds whatever its dtype: "llama" normalises in float32, "t5"
    computes the mean square in float32. The default computes in x's own dtype.
    """
    y = x.to(torch.float32) if float32 == "llama" else x
    square = x.to(torch.float32) if float32 else x
    rstd = torch.rsqrt((square**2).mean(-1, keepdim=True) + eps)
    y = y * (rstd.detach() if comp.freeze_std else rstd)
    return weight.detach() * y.to(x.dtype)


# ----------------------------------------------------------------------------------------------------
# attention


def heads(x: Tensor, dim: int) -> Tensor:
    """[B, S, H * dim] -> [B, H, S, dim]."""
    return x.reshape(x.shape[0], x.shape[1], -1, dim).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, H, S, dim] -> [B, S, H * dim]."""
    return x.transpose(1, 2).flatten(2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, comp: Composite, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k' + bias) v with a boolean mask (True = attend). Rows without a key give 0.

    attnlrp: half at each matmul, and the ordinary VJP of the softmax, so q and k get 1/4 and v 1/2.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k = both(q, k, comp)
    scores = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.detach()
    mask = mask.expand(scores.shape)
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    probs = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    if comp.freeze_probs:
        probs = probs.detach()
    probs, v = both(probs, v, comp)
    return probs @ v


def key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor:
    """[B, 1, 1, T]: which keys are no padding."""
    if attention_mask is None:
        return torch.ones(batch, 1, 1, length, dtype=torch.bool)
    return attention_mask.bool()[:, None, None, :]


def causal_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor:
    """[B, 1, S, S]: keys that are neither padding nor in the future."""
    past = torch.arange(length)[:, None] >= torch.arange(length)[None, :]
    return key_mask(attention_mask, batch, length) & past


# ----------------------------------------------------------------------------------------------------
# targets


def last_unpadded(attention_mask: Tensor | None, batch: int, length: int) -> Tensor:
    """[B]: position of the last token that is no padding, wherever the padding is."""
    if attention_mask is None:
        return torch.full((batch,), length - 1)
    positions = torch.arange(length).expand(batch, length)
    return torch.where(attention_mask.bool(), positions, -1).amax(-1)


def pick(logits: Tensor, target: Tensor | None) -> Tensor:
    """[B]: the target's logit out of [B, C]; None is the largest."""
    target = logits.detach().argmax(-1) if target is None else target
    return logits.gather(-1, target[:, None]).squeeze(-1)


def gradient(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of every sample's value for its own inputs (samples do not interact), zeros where there is no
    path."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def token_relevance(embedding: Tensor, grad: Tensor) -> Tensor:
    """[B, S]: embedding times gradient, summed over the hidden size."""
    return (embedding * grad).sum(-1).detach()
