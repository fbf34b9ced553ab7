"""Demand: the graph of what a target reads, its own outputs or rows of one, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from .choice import CHOICE, TARGETS, Choice, part, select_rows
from .graphs import computing, copy_graph, fake_mode, output_node, outputs, placeholders, value


def last_unpadded(mask: Tensor) -> Tensor:
    """The last unpadded position, for padding on either side: ``[batch, sequence]`` -> ``[batch]``."""
    return ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)


def last_before_padding(mask: Tensor) -> Tensor:
    """As :func:`last_unpadded`, for a mask that is true where there is padding."""
    return last_unpadded(mask == 0)


def only_outputs(module: fx.GraphModule, wanted: Collection[int]) -> fx.GraphModule:
    """The graph without what only other outputs need, or nothing at all; other outputs stand as None."""
    new = copy_graph(module, "Demanded")
    output = output_node(new.graph)
    output.args = (tuple(node if i in wanted else None for i, node in enumerate(outputs(new.graph))),)
    return without_dead(new)


def only_rows(
    module: fx.GraphModule, output: int, positions: str | None, *, given: bool, padding: bool, lead: Any
) -> fx.GraphModule:
    """A graph whose only output is the chosen rows ``[batch, 1, classes]`` of one sequence output.

    With ``lead`` these are ``[batch, K, classes]``, one row for each of K targets.

    Args:
        module: the canonical graph.
        output: which of its outputs.
        positions: where positions come from: a new input of this name if ``given``, the padding mask's name
            if not; None for the last position.
        given: see ``positions``.
        padding: whether the mask is true where there is padding, and not where there is none.
        lead: the number of positions of each sample, a size or a symbol; None for one.
    """
    new = copy_graph(module, "Demanded")
    graph, mode = new.graph, fake_mode(new.graph)
    target: fx.Node = outputs(graph)[output]
    *_, last = placeholders(graph)
    choice = part(-1)
    if positions is not None:
        with graph.inserting_after(last):
            if given:
                chosen = graph.placeholder(positions)
                with mode:
                    shape = value(target).shape[:1] if lead is None else (value(target).shape[0], lead)
                    chosen.meta = {"val": torch.zeros(shape, dtype=torch.long, device=value(target).device)}
            else:
                mask = next(n for n in placeholders(graph) if n.target == positions)
                chosen = called(mode, graph, last_before_padding if padding else last_unpadded, (mask,))
        choice = Choice(select_rows, (chosen,))
    with graph.inserting_before(output_node(graph)):
        rows = called(mode, graph, choice.op, (target, 1, *choice.operands), target)
    if lead is not None:
        rows.meta[TARGETS] = CHOICE
    output_node(graph).args = ((rows,),)
    return without_dead(new)


def without_dead(module: fx.GraphModule) -> fx.GraphModule:
    """Nothing but inputs and what the outputs are computed of; what checks values keeps nothing alive."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def called(
    mode: Any, graph: fx.Graph, op: Any, args: tuple[Any, ...], near: fx.Node | None = None
) -> fx.Node:
    """A new node where the graph inserts, with its value, and with the provenance of a node near it."""
    node = graph.call_function(op, args)
    node.meta = {k: near.meta[k] for k in ("nn_module_stack", "stack_trace") if near and k in near.meta}
    with computing(mode):
        node.meta.update({"val": op(*fx.map_arg(args, value)), "made_by": "demand"})
    return node
