"""Hand-patched Gradient x Input for ``T5ForConditionalGeneration``, with ReLU (T5) or gated GELU
(Flan-T5)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gxi
from .gxi import COMPOSITES


class Seq2SeqExplained(NamedTuple):
    """Relevance [B, S] by input name, the explained scalar [B], and the decoder's logits."""

    relevance: dict[str, Tensor]
    value: Tensor
    logits: Tensor


def relative_buckets(queries: int, keys: int, bidirectional: bool, buckets: int, furthest: int) -> Tensor:
    r"""[queries, keys]: T5's bucket of every distance (Raffel et al. 2020, sec. 2.1).

    The first half of the buckets counts distances exactly, the second half logarithmically up to
    ``furthest``: :math:`m + \lfloor \frac{\log(d/m)}{\log(\text{furthest}/m)} (n - m) \rfloor` with n buckets
    and m = n/2, at most n - 1. Bidirectional, keys on the right have buckets of their own; causal, they share
    bucket 0. In float32, as HF.
    """
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    if bidirectional:
        buckets //= 2
        offset, distance = torch.where(ahead > 0, buckets, 0), ahead.abs()
    else:
        offset, distance = torch.zeros_like(ahead), (-ahead).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).to(torch.float32) / exact) / math.log(furthest / exact)
    far = (exact + (ratio * (buckets - exact)).to(torch.long)).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def explain(
    model: Any,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    target: Tensor | None = None,
    composite: str = "attnlrp",
    float32_norms: bool = False,
    explained: tuple[str, ...] = ("input_ids", "decoder_input_ids"),
) -> Seq2SeqExplained:
    """Relevance of both token sequences for the next token's logit after the decoder's last unpadded
    position.

    ``target`` is a LongTensor [B] of token ids, None the predicted ones. ``explained`` says which lookups
    carry relevance: what depends on none of them is a constant, and a product with one active factor gives it
    everything, so under attnlrp the encoder's relevance depends on whether the decoder's input is explained
    too. The relative position bias is a constant of the scores. ``float32_norms`` rounds in the norms as HF
    does.
    """
    comp, config = COMPOSITES[composite], model.config
    float32 = "t5" if float32_norms else ""
    (batch, length), steps = input_ids.shape, decoder_input_ids.shape[1]

    def project(x: Tensor, layer: Any) -> Tensor:
        return gxi.linear(x, layer.weight, None)

    def norm(x: Tensor, layer: Any) -> Tensor:
        return gxi.rms_norm(x, layer.weight, config.layer_norm_epsilon, comp, float32)

    def attend(x: Tensor, memory: Tensor, layer: Any, mask: Tensor, bias: Tensor | None) -> Tensor:
        q = gxi.heads(project(x, layer.q), config.d_kv)
        k, v = (
            gxi.heads(project(memory, layer.k), config.d_kv),
            gxi.heads(project(memory, layer.v), config.d_kv),
        )
        return project(gxi.merge(gxi.attention(q, k, v, mask, 1.0, comp, bias)), layer.o)

    def feed_forward(x: Tensor, layer: Any) -> Tensor:
        h, mlp = norm(x, layer.layer_norm), layer.DenseReluDense
        if config.is_gated_act:
            gate = gxi.activation(config.dense_act_fn, project(h, mlp.wi_0), comp)
            return project(gxi.gated(gate, project(h, mlp.wi_1), comp), mlp.wo)
        return project(gxi.activation(config.dense_act_fn, project(h, mlp.wi), comp), mlp.wo)

    def position_bias(stack: Any, size: int, bidirectional: bool) -> Tensor:
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach()
        count, furthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        bias: Tensor = table[relative_buckets(size, size, bidirectional, count, furthest)].permute(2, 0, 1)[
            None
        ]
        return bias

    def lookup(ids: Tensor, name: str) -> Tensor:
        embedding: Tensor = model.shared.weight.detach()[ids]
        return embedding.requires_grad_(name in explained)

    source, source_mask = lookup(input_ids, "input_ids"), gxi.key_mask(attention_mask, batch, length)
    bias, memory = position_bias(model.encoder, length, True), source
    for block in model.encoder.block:
        h = norm(memory, block.layer[0].layer_norm)
        memory = memory + attend(h, h, block.layer[0].SelfAttention, source_mask, bias)
        memory = memory + feed_forward(memory, block.layer[1])
    memory = norm(memory, model.encoder.final_layer_norm)

    produced = lookup(decoder_input_ids, "decoder_input_ids")
    mask, bias, x = (
        gxi.causal_mask(decoder_attention_mask, batch, steps),
        position_bias(model.decoder, steps, False),
        produced,
    )
    for block in model.decoder.block:
        h = norm(x, block.layer[0].layer_norm)
        x = x + attend(h, h, block.layer[0].SelfAttention, mask, bias)
        h = norm(x, block.layer[1].layer_norm)
        x = x + attend(h, memory, block.layer[1].EncDecAttention, source_mask, None)
        x = x + feed_forward(x, block.layer[2])
    x = norm(x, model.decoder.final_layer_norm)
    logits = project(x * config.d_model**-0.5 if config.scale_decoder_outputs else x, model.lm_head)

    last = gxi.last_unpadded(decoder_attention_mask, batch, steps)
    value = gxi.pick(logits[torch.arange(batch), last], target)
    lookups = {"input_ids": source, "decoder_input_ids": produced}
    leaves = [lookups[name] for name in explained]
    grads = gxi.gradient(value, leaves)
    relevance = {n: gxi.token_relevance(e, g) for n, e, g in zip(explained, leaves, grads, strict=True)}
    return Seq2SeqExplained(relevance, value.detach(), logits.detach())
