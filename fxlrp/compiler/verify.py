"""Verifiers: what must hold of each stage's graph. A broken one is a bug of fxlrp, found where it arose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import GraphError
from .graphs import is_float, leaves
from .plan import Plan
from .rewrite import RuleOp, is_rule


def verify_functional(module: fx.GraphModule) -> fx.GraphModule:
    """No mutation, no regions, fake values on every node."""
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_function":
            raise GraphError(f"'{node.name}' is a {node.op}, not a function call")
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise GraphError(f"'{node.name}' ({node.target}) mutates an operand")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise GraphError(f"'{node.name}' ({node.target}) is a region")
        if "val" not in node.meta and node.users:
            raise GraphError(f"'{node.name}' has no value")
    module.graph.lint()
    return module


def verify_rules(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Every row of the plan is a rule node and nothing else is; every active operand is floating point."""
    rows = {row.node: row for row in plan}
    rule_nodes = {node.name: node for node in module.graph.nodes if is_rule(node)}
    if rows.keys() != rule_nodes.keys():
        raise GraphError(f"rule nodes and plan differ in {sorted(rows.keys() ^ rule_nodes.keys())}")
    for name, node in rule_nodes.items():
        target: RuleOp = node.target
        if target.rule != rows[name].rule or target.active != rows[name].active:
            raise GraphError(f"'{name}' has another rule than the plan says")
        operands: list[Any] = leaves(node)
        for i in target.active:
            if not is_float(operands[i]):
                raise GraphError(f"operand {i} of '{name}' is to get relevance but is not floating point")
    return module


def verify_relevance(module: fx.GraphModule) -> fx.GraphModule:
    """Plain ATen and its functions: no rule nodes, autograd or mutation; relevance has its inputs' batch."""
    for node in module.graph.nodes:
        if is_rule(node):
            raise GraphError(f"'{node.name}' is still a rule node")
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise GraphError(f"'{node.name}' is a {node.op}, not a function call")
        named = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
        if node.op == "call_function" and (named.startswith("torch.autograd") or "requires_grad" in named):
            raise GraphError(f"'{node.name}' calls autograd")
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise GraphError(f"'{node.name}' ({node.target}) mutates an operand")
    output = next(n for n in module.graph.nodes if n.op == "output")
    for leaf in pytree.tree_leaves(output.args[0]):
        if isinstance(leaf, Tensor):
            raise GraphError("the relevance graph returns a constant")
    module.graph.lint()
    return module
