"""Attention as one op: SDPA as it is, and eager attention (matmul, scale, mask, softmax, matmul)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...rules import ops
from ..graphs import arg, is_op, value, without_casts
from .match import Match, Miss

_NAME = "attention"
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

#: Whether the first node, a mask, has relevance of its own beside the second.
Entangled = Callable[[fx.Node, fx.Node], bool]


def match_attention(node: fx.Node, entangled: Entangled) -> Match | Miss | None:
    """SDPA, or the product of attention weights with values."""
    if is_op(node, "scaled_dot_product_attention"):
        return _match_sdpa(node, entangled)
    if is_op(node, "matmul", "bmm"):
        return _match_eager(node, entangled)
    return None


def _match_sdpa(node: fx.Node, entangled: Entangled) -> Match | Miss:
    given: dict[str, Any] = {**dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node) and any(entangled(mask, given[part]) for part in ("query", "key", "value")):
        return Miss(node, "attention with a constant mask", "its mask is computed from what is explained")
    return Match(
        node,
        ops.attention,
        (given["query"], given["key"], given["value"], mask),
        "attention",
        {
            "is_causal": given.get("is_causal", False),
            "scale": given.get("scale"),
            "enable_gqa": given.get("enable_gqa", False),
        },
    )


def _match_eager(node: fx.Node, entangled: Entangled) -> Match | Miss | None:
    weights, values = arg(node, 0), arg(node, 1)
    softmax = without_casts(weights)
    if not is_op(softmax, "softmax"):
        return None

    def miss(reason: str) -> Miss:
        return Miss(node, _NAME, reason)

    current: Any = weights
    while current is not softmax:
        if len(current.users) > 1:
            return miss(f"its weights '{current.name}' are used elsewhere")
        current = current.args[0]
    if len(softmax.users) > 1:
        return miss(f"its weights '{softmax.name}' are used elsewhere")
    scores = softmax.args[0]
    rank = value(scores).dim()
    if rank != 4 or value(values).dim() != 4:
        return miss(f"{rank}-dimensional scores, not [batch, heads, queries, keys]")
    if softmax.args[1] not in (-1, rank - 1):
        return miss("the softmax does not run over the keys")

    scores, scale = without_casts(scores), 1.0
    masks: list[tuple[Any, float]] = []
    kept: list[fx.Node] = []
    while not is_op(scores, "matmul", "bmm"):
        if is_op(scores, "add") and not scores.kwargs and isinstance(scores.args[1], fx.Node):
            first, second = scores.args
            scores, mask = (first, second) if _holds_product(first) else (second, first)
            if not value(mask).is_floating_point():
                return miss(f"what is added as a mask is {value(mask).dtype}")
            masks.append((mask, scale))
        elif is_op(scores, "masked_fill") and scores.args[2] == -math.inf:
            kept.append(_inverted(scores.args[1]))
            scores = scores.args[0]
        elif is_op(scores, "mul", "div") and isinstance(scores.args[1], (int, float)):
            scale = scale * scores.args[1] if is_op(scores, "mul") else scale / scores.args[1]
            scores = scores.args[0]
        else:
            return miss(f"'{scores}' stands between the product of query and key and the softmax")
        if len(scores.users) > 1:
            return miss(f"'{scores.name}' is used elsewhere")
        scores = without_casts(scores)
    query, key = scores.args[:2]
    parts = [part for part in (query, key, values) if isinstance(part, fx.Node)]
    if any(entangled(mask, part) for mask in (*(m for m, _ in masks), *kept) for part in parts):
        return miss("its mask is computed from what is explained")
    if any(outer != 1.0 for _, outer in masks):
        return miss("the mask is scaled together with the scores")
    mask = _combined(node, [m for m, _ in masks], kept)
    if (
        not (isinstance(query, fx.Node) and isinstance(key, fx.Node))
        or value(query).dim() != 4
        or value(key).dim() != 4
    ):
        return miss("query or key is not 4-dimensional")
    return Match(node, ops.attention, (query, _transposed(key), values, mask), "attention", {"scale": scale})


def _holds_product(node: Any) -> bool:
    """Whether a summand is the scores: below scaling and masking it is a matrix product."""
    node = without_casts(node)
    while is_op(node, "mul", "div", "masked_fill", "add"):
        if is_op(node, "add") and _holds_product(node.args[1]):
            return True
        node = without_casts(node.args[0])
    return is_op(node, "matmul", "bmm")


def _combined(user: fx.Node, added: list[Any], kept: list[fx.Node]) -> fx.Node | None:
    """All masks as one: additive ones summed, boolean ones (True = keep) joined, both together with -inf."""

    def compute(op: Any, *args: Any) -> fx.Node:
        with user.graph.inserting_before(user):
            made = user.graph.call_function(op, args)
        with value(user).fake_mode:
            made.meta = {**user.meta, "val": op(*(value(a) for a in args))}
        return made

    total = functools.reduce(functools.partial(compute, torch.ops.aten.add.Tensor), added) if added else None
    keep = (
        functools.reduce(functools.partial(compute, torch.ops.aten.logical_and.default), kept)
        if kept
        else None
    )
    if total is None or keep is None:
        return keep if total is None else total
    return compute(torch.ops.aten.where.ScalarOther, keep, total, -math.inf)


def _inverted(mask: Any) -> Any:
    """The mask of what is kept, from the mask of what is filled in."""
    with mask.graph.inserting_after(mask):
        kept = mask.graph.call_function(torch.ops.aten.logical_not.default, (mask,))
    with value(mask).fake_mode:
        kept.meta = {**mask.meta, "val": torch.logical_not(value(mask))}
    return kept


def _transposed(key: fx.Node) -> fx.Node:
    """The key with its last two dimensions swapped; a transposition that is already there is taken off."""
    dims: Any = key.args[1:]
    if is_op(key, "transpose") and {d % 4 for d in dims} == {2, 3}:
        untransposed: fx.Node = arg(key, 0)
        return untransposed
    with key.graph.inserting_after(key):
        swapped = key.graph.call_function(torch.ops.aten.transpose.int, (key, -1, -2))
    with value(key).fake_mode:
        swapped.meta = {**key.meta, "val": value(key).transpose(-1, -2)}
    return swapped
