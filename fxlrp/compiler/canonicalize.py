"""Canonicalise: different spellings of one step become one op before rules are assigned."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .activity import Dependence
from .expand import expand
from .graphs import copy_graph, fake_mode, is_float, is_op, outputs, propagate, value
from .patterns import Match, Miss, is_gate_of, match_attention, match_norm, match_self_gate
from .provenance import inherit
from .template import Templates


@dataclass(frozen=True, eq=False)
class Canonical:
    """A canonical graph with what its patterns found.

    Attributes:
        graph: the graph.
        hits: how often each pattern fired.
        misses: what almost matched, and why it did not.
        widened: whether steps that the model takes in float32 are taken in its own float64.
        templates: what was traced for its nodes so far, which composites and targets share.
    """

    graph: fx.GraphModule
    hits: dict[str, int]
    misses: tuple[str, ...]
    widened: bool
    templates: Templates


def canonicalize(module: fx.GraphModule, inputs: Collection[str] = ()) -> Canonical:
    """Write out what is short for several ops; norms, attention, hand-written activations become one op.

    ``inputs`` are those that are explained by name; see :func:`expand`.
    """
    new = copy_graph(module, "Canonical")
    _strip(new.graph)
    wide = _widen(new)
    widened, new = wide is not new, wide
    expand(new, inputs)
    _reassociate(new.graph)
    dependence = Dependence.of(new, inputs)
    hits: dict[str, int] = {}
    misses: list[str] = []
    for node in list(new.graph.nodes):
        if node.op != "call_function" or (not node.users and not is_op(node, "output")):
            continue
        found = match_norm(node) or match_self_gate(node) or match_attention(node, dependence.entangled)
        if isinstance(found, Miss):
            if dependence.sources_of(node):
                misses.append(str(found))
        elif isinstance(found, Match):
            _replace(found)
            hits[found.pattern] = hits.get(found.pattern, 0) + 1
    new.graph.eliminate_dead_code()
    new.graph.lint()
    new.recompile()
    return Canonical(new, hits, tuple(misses), widened, Templates(fake_mode(new.graph)))


def _strip(graph: fx.Graph) -> None:
    """Take out what does nothing: casts to the same dtype, slices of everything, dropout switched off.

    A cast may have laid its operand out anew for a view that follows: views become reshapes, which copy
    where they must.
    """
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _does_nothing(node: fx.Node) -> bool:
    operand = value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    result = value(node)
    if not (isinstance(operand, Tensor) and isinstance(result, Tensor)):
        return False
    if is_op(node, "to", "to_copy", "type_as", "float"):
        moved = operand.dtype is not result.dtype or operand.device != result.device
        return not moved and _layout(operand) == _layout(result)  # a view of the result may need its strides
    if is_op(node, "dropout", "feature_dropout", "alpha_dropout"):
        return True  # active dropout was refused at capture
    if is_op(node, "slice"):
        start, stop, step = (*node.args[2:5], *(None, None, None)[len(node.args) - 2 :])[:3]
        return (
            start in (None, 0)
            and step in (None, 1)
            and isinstance(stop, (int, type(None)))
            and (stop is None or stop >= 2**62)
        )
    return is_op(node, "alias", "view_as") and list(map(str, operand.shape)) == list(map(str, result.shape))


def _layout(tensor: Tensor) -> list[str] | None:
    return list(map(str, tensor.stride())) if tensor.layout is torch.strided else None


def _widen(module: fx.GraphModule) -> fx.GraphModule:
    """Compute a float64 model in float64 throughout.

    Models cast norms and softmax to float32 as a step up from half precision; for a float64 model that is a
    step down, and its rounding would be all that is left in the ledger. Where the wider graph does not
    type-check, the model's own precision stays.
    """
    results = [value(node) for node in outputs(module.graph) if is_float(node)]
    if any(result.dtype is not torch.float64 for result in results):
        return module  # a model in another precision that takes single steps in float64
    wide = copy_graph(module, "Canonical")
    dependence = Dependence.of(wide)
    changed = False
    for node in list(wide.graph.nodes):
        if not (node.op == "call_function" and dependence.sources_of(node) and _narrows(node)):
            continue
        changed = True
        if is_op(node, "softmax", "log_softmax"):
            node.args, node.kwargs = node.args[:2], {}
        else:
            node.replace_all_uses_with(node.args[0])
            wide.graph.erase_node(node)
    if not changed:
        return module
    try:
        propagate(wide.graph)
    except (RuntimeError, TypeError, ValueError):
        return module
    _strip(wide.graph)
    return wide


def _reassociate(graph: fx.Graph) -> None:
    """``x * (g(x) * y)`` as ``(x * g(x)) * y``, to find an activation whatever it is multiplied with."""
    for node in list(graph.nodes):
        if not is_op(node, "mul", "multiply"):
            continue
        for x, product in (node.args[:2], node.args[1::-1]):
            if not (is_op(product, "mul", "multiply") and isinstance(x, fx.Node) and len(product.users) == 1):
                continue
            for gate, rest in (product.args[:2], product.args[1::-1]):
                if is_gate_of(x, gate) and isinstance(rest, fx.Node) and not is_gate_of(gate, rest):
                    with graph.inserting_before(node):
                        inner = graph.call_function(torch.ops.aten.mul.Tensor, (x, gate))
                    inner.meta = {**product.meta, "val": value(x)}
                    node.args = (inner, rest)
                    graph.erase_node(product)
                    break
            else:
                continue
            break


def _narrows(node: fx.Node) -> bool:
    if not is_op(node, "to", "to_copy", "float", "type_as", "softmax", "log_softmax"):
        return False
    return value(node.args[0]).dtype is torch.float64 and value(node).dtype is torch.float32


def _replace(match: Match) -> None:
    graph = match.node.graph
    with graph.inserting_before(match.node):
        node = graph.call_function(match.op, match.args, match.kwargs)
    inherit(node, match.node, f"canonicalize: {match.pattern}")
    match.node.replace_all_uses_with(node)
    graph.erase_node(match.node)
