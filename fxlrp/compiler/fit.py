"""Whether rules fit the nodes that a composite gives them to: what only the graph can tell."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CompositeError, place
from ..rules.base import Call
from ..rules.carry import carries_elements
from .graphs import arg, leaves, tree, value
from .plan import Assignment


def refuse_misfit(node: fx.Node, row: Assignment) -> None:
    """Refuse a rule that cannot serve its node.

    Raises:
        CompositeError: with the rule's reason.
    """
    flat, spec = tree(node)
    args, kwargs = pytree.tree_unflatten([value(leaf) for leaf in flat], spec)
    op: Any = node.target
    reason = row.rule.refusal(Call(op, args, kwargs, row.active))
    if reason is not None:
        raise CompositeError(
            f"{row.rule!r} ({row.reason}) cannot serve '{row.node}' ({row.op}, kind {row.kind!r}) in "
            f"{place(row.module, row.source)}: {reason}. Give this node another rule, such as Epsilon(), by "
            "an entry before this one."
        )


def refuse_later_layers(rows: Mapping[fx.Node, Assignment], starts: set[fx.Node]) -> None:
    """Refuse rules for the first layer where more than moved and rescaled elements lies before them.

    Raises:
        CompositeError: with the first step in between that is more.
    """
    for node, row in rows.items():
        if not row.rule.direct:
            continue
        stack, seen = _active(node, row), set()
        while stack:
            before = stack.pop()
            if before in seen or before in starts:
                continue
            seen.add(before)
            if before.target is operator.getitem:
                stack.append(arg(before, 0))
                continue
            step = rows[before]
            if not carries_elements(before.target, len(step.active)):
                raise CompositeError(
                    f"{row.rule!r} is a rule for the first layer, but '{row.node}' in "
                    f"{place(row.module, row.source)} reads the result of '{step.node}' ({step.op}, kind "
                    f"{step.kind!r}) in {place(step.module, step.source)}, and its relevance cannot be "
                    "carried back through that to the input. Select only the layer that reads the input, as "
                    "fxlrp.name('…') with its module path."
                )
            stack.extend(_active(before, step))


def _active(node: fx.Node, row: Assignment) -> list[fx.Node]:
    operands = leaves(node)
    return [operands[i] for i in row.active]
