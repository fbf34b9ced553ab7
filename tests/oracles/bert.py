"""Hand-patched Gradient x Input for ``BertForSequenceClassification``: post-norm LayerNorm, GELU, tanh
pooler."""

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
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    target: Tensor | None = None,
    composite: str = "attnlrp",
) -> Explained:
    """Relevance [B, S] of the word embeddings for a class logit. Position and segment embeddings are
    constants.

    ``target`` is a LongTensor [B] of classes, None the predicted ones.
    """
    comp = COMPOSITES[composite]
    embedding, x = encode(model.bert, input_ids, attention_mask, token_type_ids, position_ids, composite)
    pooler = model.bert.pooler.dense
    pooled = gxi.activation("tanh", gxi.linear(x[:, 0], pooler.weight, pooler.bias), comp)
    logits = gxi.linear(pooled, model.classifier.weight, model.classifier.bias)

    value = gxi.pick(logits, target)
    (grad,) = gxi.gradient(value, [embedding])
    return Explained(gxi.token_relevance(embedding, grad), value.detach(), logits.detach())


def encode(
    bert: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    composite: str = "attnlrp",
) -> tuple[Tensor, Tensor]:
    """Word embeddings, which are what is active, and the last hidden state as their hand-patched function."""
    comp, config = COMPOSITES[composite], bert.config
    batch, length = input_ids.shape
    head_dim = config.hidden_size // config.num_attention_heads
    mask = gxi.key_mask(attention_mask, batch, length)
    segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    positions = torch.arange(length).expand(batch, length) if position_ids is None else position_ids

    def project(x: Tensor, layer: Any) -> Tensor:
        return gxi.linear(x, layer.weight, layer.bias)

    def norm(x: Tensor, layer: Any) -> Tensor:
        return gxi.layer_norm(x, layer.weight, layer.bias, config.layer_norm_eps, comp)

    tables = bert.embeddings
    embedding = tables.word_embeddings.weight.detach()[input_ids].requires_grad_()
    x = embedding + tables.token_type_embeddings.weight.detach()[segments]
    x = norm(x + tables.position_embeddings.weight.detach()[positions], tables.LayerNorm)
    for layer in bert.encoder.layer:
        attn = layer.attention.self
        q, k, v = (gxi.heads(project(x, p), head_dim) for p in (attn.query, attn.key, attn.value))
        context = gxi.merge(gxi.attention(q, k, v, mask, head_dim**-0.5, comp))
        output = layer.attention.output
        x = norm(project(context, output.dense) + x, output.LayerNorm)
        h = gxi.activation(config.hidden_act, project(x, layer.intermediate.dense), comp)
        x = norm(project(h, layer.output.dense) + x, layer.output.LayerNorm)
    return embedding, x
