"""What depends on data in a trace of one input: the branches taken, how often a loop ran, which places a
comparison found. For that input they are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.activation import op_name

_COND = torch.ops.higher_order.cond
_WHILE = torch.ops.higher_order.while_loop
#: Ops that give integers whose number depends on data.
_FINDERS = (
    *("nonzero", "nonzero_numpy", "unique", "unique2", "unique_dim", "unique_consecutive", "argwhere"),
    *("unique_dim_consecutive", "bincount", "nonzero_static", "combinations"),
)


def depends_on_data(module: fx.GraphModule) -> bool:
    """Whether a graph branches, loops, or has sizes that depend on data."""
    return any(
        node.op == "call_function" and (node.target in (_COND, _WHILE) or _finds(node.target, node.args))
        for node in module.graph.nodes
    )


class AsTheDataLead(fx.Interpreter):
    """Runs a graph along the branches and loops that its data lead to, with found places as constants.

    A trace of such a run has neither regions nor sizes that depend on data.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node; regions within the taken region are resolved as well."""
        if target is _COND:
            predicate, then, otherwise, operands = args
            return AsTheDataLead(then if bool(predicate) else otherwise).run(*operands)
        if target is _WHILE:
            condition, body, carried, constants = args
            while bool(AsTheDataLead(condition).run(*carried, *constants)):
                carried = AsTheDataLead(body).run(*carried, *constants)
            return carried
        if op_name(target) == "masked_select" and len(args) == 2:
            x, mask = torch.broadcast_tensors(*args)
            return super().call_function(torch.ops.aten.index.Tensor, (x, _places(mask)), {})
        if _finds(target, args):
            if op_name(target) in ("index", "index_put"):
                indices = [place for index in args[1] for place in _expanded(index)]
                return super().call_function(target, (args[0], indices, *args[2:]), kwargs)
            found = super().call_function(target, args, kwargs)
            return pytree.tree_map_only(Tensor, _constant, found)
        return super().call_function(target, args, kwargs)


def _finds(target: Any, args: Any) -> bool:
    """Whether an op's sizes depend on its operands' values."""
    name = op_name(target)
    if name in _FINDERS or name == "masked_select":
        return True
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        return len(args) < 2 or not isinstance(args[1], int)
    if name in ("index", "index_put"):
        return any(_is_mask(index) for index in args[1])
    return False


def _is_mask(index: Any) -> bool:
    index = index.meta.get("val") if isinstance(index, fx.Node) else index
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _expanded(index: Any) -> list[Any]:
    return _places(index) if _is_mask(index) else [index]


def _places(mask: Tensor) -> list[Tensor]:
    """Where a mask is true, one constant index tensor a dimension."""
    return [_constant(place) for place in torch.nonzero(mask, as_tuple=True)]


def _constant(found: Tensor) -> Tensor:
    """A tensor that a tracer takes for a constant."""
    if found.is_floating_point():
        return found
    return torch.tensor(found.tolist(), dtype=found.dtype, device=found.device).reshape(found.shape)
