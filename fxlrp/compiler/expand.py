"""Ops that are short for others are written out, so that each part has its own rule."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.activation import op_name
from .activity import Dependence
from .graphs import fake_mode, tree, value
from .provenance import inherit
from .template import Templates


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first * torch.sigmoid(second)


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    result: Tensor = start + weight * (end - start)
    return result


def _addcmul(x: Tensor, first: Tensor, second: Tensor, *, value: Any = 1) -> Tensor:
    result: Tensor = x + value * (first * second)
    return result


def _addcdiv(x: Tensor, first: Tensor, second: Tensor, *, value: Any = 1) -> Tensor:
    result: Tensor = x + value * (first / second)
    return result


def _baddbmm(x: Tensor, first: Tensor, second: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = torch.bmm(first, second)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else (x if beta == 1 else x * beta) + product


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    own = x.dtype
    x = x.float() if own in (torch.float16, torch.bfloat16) else x
    if use_input_stats:
        dims = tuple(range(2, x.dim()))
        centred = x - x.mean(dims, keepdim=True)
        result = centred * torch.rsqrt(centred.pow(2).mean(dims, keepdim=True) + eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        result = (x - running_mean.view(shape)) * torch.rsqrt(running_var.view(shape) + eps)
    result = result if weight is None else result * weight.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(own)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    mask, x = torch.broadcast_tensors(mask, x)
    place = (mask.reshape(-1).long().cumsum(0) - 1).clamp_min(0)
    return torch.where(mask, source.reshape(-1)[place].reshape(x.shape), x)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    return torch.softmax(scores + attn_mask, -1).to(value.dtype) @ value


def _cosine_similarity(first: Tensor, second: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    first, second = torch.broadcast_tensors(first, second)
    first = first / first.norm(dim=dim, keepdim=True).clamp_min(eps)
    second = second / second.norm(dim=dim, keepdim=True).clamp_min(eps)
    return (first * second).sum(dim)


#: What each op is short for.
EXPANSIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "glu": _glu,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "baddbmm": _baddbmm,
    "instance_norm": _instance_norm,
    "masked_scatter": _masked_scatter,
    "scaled_dot_product_attention": _attention,
    "cosine_similarity": _cosine_similarity,
}


def expand(module: fx.GraphModule, inputs: Collection[str] = ()) -> None:
    """Write out the ops of the table that depend on an input. Edits a graph that nobody else holds.

    ``inputs`` names those that are explained whatever they are used for, masks of attention included.
    """
    dependence = Dependence.of(module, inputs)
    wanted = [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and op_name(node.target) in EXPANSIONS
        and dependence.sources_of(node)
        and (op_name(node.target) != "scaled_dot_product_attention" or _is_biased(node, dependence))
    ]
    if not wanted:
        return
    templates = Templates(fake_mode(module.graph))
    for node in wanted:
        _replace(node, templates)


def _is_biased(node: fx.Node, dependence: Dependence) -> bool:
    """Whether attention's mask has relevance of its own."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    operands = [x for x in node.args[:3] if isinstance(x, fx.Node)]
    return isinstance(mask, fx.Node) and any(dependence.entangled(mask, x) for x in operands)


def _replace(node: fx.Node, templates: Templates) -> None:
    flat, spec = tree(node)
    operands = [leaf for leaf in flat if isinstance(leaf, fx.Node)]
    function = EXPANSIONS[op_name(node.target)]

    def written_out(*given: Any) -> tuple[Tensor]:
        following = iter(given)
        leaves = [next(following) if isinstance(leaf, fx.Node) else leaf for leaf in flat]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return (function(*args, **kwargs),)

    constants = tuple(None if isinstance(leaf, fx.Node) else str(leaf) for leaf in flat)
    template = templates.get((node.target, str(spec), constants), written_out, [value(n) for n in operands])
    known: dict[fx.Node, Any] = {}
    with node.graph.inserting_before(node):
        (result,) = template.inline(node.graph, operands, [0], known)
    for new in known.values():
        if isinstance(new, fx.Node) and new not in operands:
            found = value(new)
            inherit(new, node, f"expand: {op_name(node.target)}").meta["val"] = found
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
