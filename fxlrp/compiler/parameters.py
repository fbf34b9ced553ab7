"""Relevance of parameters: a parameter times the coefficient that a rule's linear map gives it."""

from __future__ import annotations

import difflib
import fnmatch
import operator
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx, nn

from ..errors import InputError
from ..rules import (
    AttentionRule,
    Epsilon,
    FrozenAttention,
    Gradient,
    GradientAttention,
    Identity,
    NormRule,
    Rule,
)
from ..rules.serial import rule_text
from .graphs import is_float, leaves
from .rewrite import is_rule, rule_op


def named(module: fx.GraphModule, model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """The parameters that patterns mean, and what the graph calls each; tied ones have several names.

    Raises:
        InputError: a pattern matches no parameter that the graph reads.
    """
    targets = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    held = {_memory(operator.attrgetter(target)(module)): target for target in targets}
    known = model.named_parameters(remove_duplicate=False)
    read = {name: held[_memory(p)] for name, p in known if _memory(p) in held}
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = {name: at for name, at in read.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, read, 4, cutoff=0.5)
            raise InputError(
                f"No parameter on the way to the target matches {pattern!r}."
                + (f" Did you mean {', '.join(map(repr, near))}?" if near else "")
            )
        found.update(matched)
    return found


def dependents(graph: fx.Graph, targets: Mapping[str, str], data: Collection[fx.Node]) -> set[fx.Node]:
    """The parameters' nodes and what is computed of parameters alone: transposed, cast, normalised weights,
    looked up rows.

    What comes of data as well is none of these: where no relevance is handed on through it, it is frozen.
    ``data`` are the nodes where the explained inputs enter.
    """
    names = set(targets.values())
    found: set[fx.Node] = set()
    of_data: set[fx.Node] = set()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node in data or node.op == "placeholder" or any(x in of_data for x in read):
            if is_float(node):
                of_data.add(node)
        elif node.op == "get_attr":
            found.update([node] if str(node.target) in names else [])
        elif node.op == "call_function" and is_float(node) and any(x in found for x in read):
            found.add(node)
    return found


def positions(node: fx.Node, of_parameters: set[fx.Node]) -> tuple[int, ...]:
    """Which leaves of a node are made of parameters."""
    active = rule_op(node).active if is_rule(node) else ()
    return tuple(
        i
        for i, leaf in enumerate(leaves(node))
        if isinstance(leaf, fx.Node) and leaf in of_parameters and i not in active
    )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What tells tensors apart that share no memory, whatever object holds them."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def weight_rule(node: fx.Node) -> Rule | None:
    """How a node's coefficient goes back to its weights; None where none does, as to attention's mask.

    Raises:
        InputError: the node's rule is not linear in them.
    """
    if not is_rule(node):
        return Gradient()
    rule = rule_op(node).rule
    if isinstance(rule, Epsilon):
        return Epsilon(rule.epsilon, relative=rule.relative)
    if type(rule) in (NormRule, Gradient, GradientAttention):
        return Gradient()
    if isinstance(rule, (AttentionRule, FrozenAttention, Identity)):
        return None
    raise InputError(
        f"{rule_text(rule)} at '{node.name}' is not linear in its weights, so they have no relevance. Take a "
        "composite whose rules for layers with these parameters are Epsilon(…)."
    )


def relevance_of(parameter: Tensor, coefficient: Tensor) -> Tensor:
    """``w * G_w``, in the parameter's shape."""
    return parameter * coefficient
