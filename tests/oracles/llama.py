"""Hand-patched Gradient x Input for ``LlamaForCausalLM``: GQA, RoPE, RMSNorm, SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gxi
from .gxi import COMPOSITES, Explained


def rope(config: Any, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""cos and sin, [B, 1, S, D], of the angles :math:`p\,\theta^{-2i/D}` (RoFormer, Su et al. 2021, sec.
    3.2.2).

    HF computes the angles in float32 whatever the model's dtype; they are constants, so this does the same.
    """
    parameters = config.rope_parameters
    if parameters["rope_type"] != "default":
        raise NotImplementedError(f"rope type {parameters['rope_type']}")
    dim = config.head_dim
    frequencies = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = position_ids[:, None, :, None].to(torch.float32) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; HF pairs dimension i with i + D/2. Linear in x, with constant coefficients."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def explain(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    target: Tensor | None = None,
    composite: str = "attnlrp",
    float32_norms: bool = False,
) -> Explained:
    """Relevance [B, S] of the token embeddings for the next token's logit after the last unpadded position.

    ``target`` is a LongTensor [B] of token ids, None the predicted ones. ``position_ids`` default to 0, 1, 2,
    ... whatever the padding (that is HF's forward). ``float32_norms`` rounds in RMSNorm as HF does.
    """
    comp, config = COMPOSITES[composite], model.config
    float32 = "llama" if float32_norms else ""
    batch, length = input_ids.shape
    positions = torch.arange(length).expand(batch, length) if position_ids is None else position_ids
    mask = gxi.causal_mask(attention_mask, batch, length)

    def project(x: Tensor, layer: Any) -> Tensor:
        return gxi.linear(x, layer.weight, layer.bias)

    def norm(x: Tensor, layer: Any) -> Tensor:
        return gxi.rms_norm(x, layer.weight, config.rms_norm_eps, comp, float32)

    embedding = model.model.embed_tokens.weight.detach()[input_ids].requires_grad_()
    cos, sin = rope(config, positions, embedding.dtype)
    x = embedding
    for layer in model.model.layers:
        h, attn, mlp = norm(x, layer.input_layernorm), layer.self_attn, layer.mlp
        q = rotate(gxi.heads(project(h, attn.q_proj), config.head_dim), cos, sin)
        k = rotate(gxi.heads(project(h, attn.k_proj), config.head_dim), cos, sin)
        v = gxi.heads(project(h, attn.v_proj), config.head_dim)
        x = x + project(gxi.merge(gxi.attention(q, k, v, mask, config.head_dim**-0.5, comp)), attn.o_proj)
        h = norm(x, layer.post_attention_layernorm)
        gate = gxi.activation(config.hidden_act, project(h, mlp.gate_proj), comp)
        x = x + project(gxi.gated(gate, project(h, mlp.up_proj), comp), mlp.down_proj)
    logits = project(norm(x, model.model.norm), model.lm_head)

    last = gxi.last_unpadded(attention_mask, batch, length)
    value = gxi.pick(logits[torch.arange(batch), last], target)
    (grad,) = gxi.gradient(value, [embedding])
    return Explained(gxi.token_relevance(embedding, grad), value.detach(), logits.detach())
