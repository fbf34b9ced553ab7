"""Hand-patched Gradient x Input for ``ViTForImageClassification``: patch convolution, pre-norm LayerNorm,
GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gxi
from .gxi import COMPOSITES, Explained


def explain(
    model: Any, pixel_values: Tensor, target: Tensor | None = None, composite: str = "attnlrp"
) -> Explained:
    """Relevance [B, C, H, W] of the pixels for a class logit. Class token and position embeddings are
    constants.

    ``target`` is a LongTensor [B] of classes, None the predicted ones. The patch convolution is written as
    what it is, one linear map a patch.
    """
    comp, config, body = COMPOSITES[composite], model.config, model.vit
    head_dim = config.hidden_size // config.num_attention_heads

    def project(x: Tensor, layer: Any) -> Tensor:
        return gxi.linear(x, layer.weight, layer.bias)

    def norm(x: Tensor, layer: Any) -> Tensor:
        return gxi.layer_norm(x, layer.weight, layer.bias, config.layer_norm_eps, comp)

    pixels = pixel_values.detach().clone().requires_grad_()
    batch, channels, height, width = pixels.shape
    convolution = body.embeddings.patch_embeddings.projection
    down, across = convolution.kernel_size
    patches = pixels.reshape(batch, channels, height // down, down, width // across, across)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * down * across)
    x = gxi.linear(patches, convolution.weight.flatten(1), convolution.bias)
    x = torch.cat([body.embeddings.cls_token.detach().expand(batch, -1, -1), x], dim=1)
    x = x + body.embeddings.position_embeddings.detach()
    mask = gxi.key_mask(None, batch, x.shape[1])
    for layer in body.layers:
        h, attn = norm(x, layer.layernorm_before), layer.attention
        q, k, v = (gxi.heads(project(h, p), head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + project(gxi.merge(gxi.attention(q, k, v, mask, head_dim**-0.5, comp)), attn.o_proj)
        h = gxi.activation(config.hidden_act, project(norm(x, layer.layernorm_after), layer.mlp.fc1), comp)
        x = x + project(h, layer.mlp.fc2)
    logits = project(norm(x, body.layernorm)[:, 0], model.classifier)

    value = gxi.pick(logits, target)
    (grad,) = gxi.gradient(value, [pixels])
    return Explained((pixels * grad).detach(), value.detach(), logits.detach())
