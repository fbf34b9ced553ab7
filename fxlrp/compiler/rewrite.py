"""Rewrite: graph + plan -> rule graph: the same forward, with rule nodes in place of ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from ..rules import Rule
from ..rules.activation import op_name
from ..rules.base import Call
from .plan import Plan


@dataclass(frozen=True)
class RuleOp:
    """An op with its rule: calls as the op, prints as both.

    Attributes:
        op: what is computed.
        rule: how relevance goes back.
        active: which leaves of ``(args, kwargs)`` get relevance.
    """

    op: Callable[..., Any]
    rule: Rule
    active: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The op applied to operands, as rules take it."""
        return Call(self.op, args, kwargs, self.active)

    def __post_init__(self) -> None:
        # What fx prints and generates code with.
        object.__setattr__(self, "__name__", f"{self.rule.name}_{op_name(self.op)}")
        object.__setattr__(self, "__module__", "fxlrp.rules")


def rewrite(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Every node of the plan as a :class:`RuleOp`; structural ones too, so the graph says what carries."""
    rows = {row.node: row for row in plan}
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        row = rows.get(node.name)
        target = node.target if row is None else RuleOp(node.target, row.rule, row.active)
        env[node] = graph.create_node(node.op, target, args, kwargs, name=node.name, type_expr=node.type)
        env[node].meta = dict(node.meta)
        if row is not None:
            env[node].meta["made_by"] = f"rewrite: {row.reason}"
    graph.lint()
    return fx.GraphModule(module, graph, "RuleGraph")


def is_rule(node: Any) -> bool:
    """Whether a node is a rule node."""
    return isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, RuleOp)


def rule_op(node: fx.Node) -> RuleOp:
    """The op and the rule of a rule node."""
    return cast(RuleOp, node.target)
