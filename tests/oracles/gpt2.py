"""Hand-patched Gradient x Input for ``GPT2LMHeadModel``: pre-norm LayerNorm, Conv1D, tanh-GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gxi
from .gxi import COMPOSITES, Explained


def explain(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    target: Tensor | None = None,
    composite: str = "attnlrp",
) -> Explained:
    """Relevance [B, S] of the token embeddings for the next token's logit after the last unpadded position.

    ``target`` is a LongTensor [B] of token ids, None the predicted ones. ``position_ids`` default to 0, 1, 2,
    ... whatever the padding. The head is tied to the embedding; only the lookup is explained.
    """
    comp, config, body = COMPOSITES[composite], model.config, model.transformer
    batch, length = input_ids.shape
    head_dim = config.n_embd // config.n_head
    mask = gxi.causal_mask(attention_mask, batch, length)
    positions = torch.arange(length).expand(batch, length) if position_ids is None else position_ids

    def project(x: Tensor, layer: Any) -> Tensor:
        return gxi.linear(x, layer.weight.T, layer.bias)  # Conv1D stores [in, out]

    def norm(x: Tensor, layer: Any) -> Tensor:
        return gxi.layer_norm(x, layer.weight, layer.bias, config.layer_norm_epsilon, comp)

    embedding = body.wte.weight.detach()[input_ids].requires_grad_()
    x = embedding + body.wpe.weight.detach()[positions]
    for index, block in enumerate(body.h):
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        q, k, v = (
            gxi.heads(part, head_dim)
            for part in project(norm(x, block.ln_1), block.attn.c_attn).split(config.n_embd, dim=-1)
        )
        x = x + project(gxi.merge(gxi.attention(q, k, v, mask, scale, comp)), block.attn.c_proj)
        h = gxi.activation(config.activation_function, project(norm(x, block.ln_2), block.mlp.c_fc), comp)
        x = x + project(h, block.mlp.c_proj)
    logits = gxi.linear(norm(x, body.ln_f), model.lm_head.weight, None)

    last = gxi.last_unpadded(attention_mask, batch, length)
    value = gxi.pick(logits[torch.arange(batch), last], target)
    (grad,) = gxi.gradient(value, [embedding])
    return Explained(gxi.token_relevance(embedding, grad), value.detach(), logits.detach())
