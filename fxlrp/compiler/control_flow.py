"""Control flow that a graph keeps as regions: which branch was taken, how often a loop ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_COND = torch.ops.higher_order.cond
_WHILE = torch.ops.higher_order.while_loop


def has_control_flow(module: fx.GraphModule) -> bool:
    """Whether a graph branches or loops by ``torch.cond`` or ``while_loop``."""
    return any(node.target in (_COND, _WHILE) for node in module.graph.nodes)


class TakenBranches(fx.Interpreter):
    """Runs a graph along the branches and loops that these values lead to; a trace of that has none."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node; regions within the taken region are resolved as well."""
        if target is _COND:
            predicate, then, otherwise, operands = args
            return TakenBranches(then if bool(predicate) else otherwise).run(*operands)
        if target is _WHILE:
            condition, body, carried, constants = args
            while bool(TakenBranches(condition).run(*carried, *constants)):
                carried = TakenBranches(body).run(*carried, *constants)
            return carried
        return super().call_function(target, args, kwargs)
