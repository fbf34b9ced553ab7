"""Masks that let no query see a later key: fused attention on a CPU then skips what lies beyond.

A model that is given a padding mask combines it with the causal one, and what comes of both is a mask like
any other: the kernel computes every score. It also takes both, a mask and the word that keys end at the
query; then it leaves out half of the scores, and the result is exactly the same. That nothing lies
beyond is proven from how the mask is made: comparisons of positions that are counted from 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .graphs import arg, is_op, value

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
#: Where the word stands among the arguments, by op; dropout is before it.
_PLACES = {_FORWARD: 4, _BACKWARD: 7}
#: Ops that hand values on as they are.
_COPIES = ("to", "to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy")


def skip_beyond(graph: fx.Graph) -> int:
    """Tell fused attention where its mask ends at the query, in place; gives how often."""
    found = 0
    for node in graph.nodes:
        place = _PLACES.get(node.target) if node.op == "call_function" else None
        if place is None or not isinstance(node.kwargs.get("attn_mask"), fx.Node):
            continue
        given = [*node.args, *(0.0, False)[len(node.args) - place + 1 :]]
        if not given[place] and ends_at_query(node.kwargs["attn_mask"]):
            given[place] = True
            node.args = tuple(given)
            found += 1
    return found


def ends_at_query(mask: Any) -> bool:
    """Whether a mask ``[..., queries, keys]`` is proven to hide every key behind its query: False there, or,
    of a mask that is added, -inf.
    """
    if not isinstance(mask, fx.Node) or mask.op != "call_function" or not _is_matrix(mask):
        return False
    if is_op(mask, *_COPIES):
        kinds = {_is_bool(mask), _is_bool(arg(mask, 0))}
        return len(kinds) == 1 and ends_at_query(arg(mask, 0))
    if is_op(mask, "unsqueeze", "expand", "view", "reshape"):
        return _keeps_matrix(mask) and ends_at_query(arg(mask, 0))
    if is_op(mask, "slice"):  # from the first query and key on
        given: list[Any] = [*mask.args[2:], *(0, None, 1)[len(mask.args) - 2 :]]
        return given[0] in (0, None) and bool(given[2] == 1) and ends_at_query(arg(mask, 0))
    if is_op(mask, "and", "logical_and", "bitwise_and") or (is_op(mask, "mul") and _is_bool(mask)):
        return any(ends_at_query(term) for term in mask.args[:2])
    if is_op(mask, "tril"):
        diagonal = arg(mask, 1) if len(mask.args) > 1 else mask.kwargs.get("diagonal", 0)
        return _is_bool(mask) and isinstance(diagonal, int) and diagonal <= 0
    if is_op(mask, "le", "lt"):
        return _counts(arg(mask, 0), -1) and _counts(arg(mask, 1), -2)
    if is_op(mask, "ge", "gt"):
        return _counts(arg(mask, 1), -1) and _counts(arg(mask, 0), -2)
    if is_op(mask, "where"):
        return ends_at_query(arg(mask, 0)) and _is_minus_infinity(arg(mask, 2))
    if is_op(mask, "masked_fill"):
        hidden = arg(mask, 1)
        is_negation = is_op(hidden, "logical_not", "bitwise_not", "invert") and _is_bool(hidden)
        return is_negation and ends_at_query(arg(hidden, 0)) and _is_minus_infinity(arg(mask, 2))
    return False


def _is_matrix(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, Tensor) and found.dim() >= 2


def _is_bool(node: Any) -> bool:
    found = value(node)
    return isinstance(found, Tensor) and found.dtype is torch.bool


def _keeps_matrix(node: fx.Node) -> bool:
    """Whether the last two dimensions are those of the operand."""
    before, after = value(arg(node, 0)), value(node)
    return (
        isinstance(before, Tensor)
        and before.dim() >= 2
        and list(map(str, before.shape[-2:])) == list(map(str, after.shape[-2:]))
        and not (is_op(node, "unsqueeze") and arg(node, 1) % after.dim() >= after.dim() - 2)
    )


def _counts(node: Any, dim: int) -> bool:
    """Whether a tensor is 0, 1, 2 and so on along one dimension, and has no other."""
    found = value(node)
    if not isinstance(node, fx.Node) or not isinstance(found, Tensor) or found.dim() < 2:
        return False
    others = [size for i, size in enumerate(found.shape) if i != found.dim() + dim]
    return all(isinstance(size, int) and size == 1 for size in others) and _is_count(node)


def _is_count(node: Any) -> bool:
    """Whether a tensor's elements in order are 0, 1, 2 and so on."""
    if is_op(node, "arange"):
        start, step = (0, 1) if len(node.args) == 1 else (node.args[0], (*node.args, 1)[2])
        return start == 0 and step == 1 and not value(node).is_floating_point()
    if is_op(node, "unsqueeze", "view", "reshape", *_COPIES):
        kept = value(node).dtype in (torch.int32, torch.int64)
        return kept and _is_count(arg(node, 0))
    return is_op(node, "add") and not node.kwargs and arg(node, 1) == 0 and _is_count(arg(node, 0))


def _is_minus_infinity(node: Any) -> bool:
    is_made = is_op(node, "scalar_tensor", "full", "lift_fresh_copy")
    number = node.args[-1] if is_made else node
    return isinstance(number, float) and number == -math.inf
