"""Assign: graph + composite -> plan: which node gets which rule, and why."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
from torch import fx

from ..errors import NoPathError, UncoveredOpError, place
from ..rules import (
    MULTILINEAR,
    Composite,
    Freeze,
    FrozenAttention,
    Gradient,
    Identity,
    NormRule,
    Rule,
    Taylor,
    Uniform,
    kind_of,
)
from ..rules.activation import op_name
from ..rules.composites import Choice, Rulebook
from ..rules.registry import qualified_name
from ..rules.selectors import Nodes
from .activity import Source, carries, float_edges, reachable
from .fit import refuse_later_layers, refuse_misfit
from .graphs import contents, is_float, is_op, leaves, without_casts
from .locate import idle_entries, located, site_of
from .patterns import scan_parameters
from .plan import Assignment, Plan
from .provenance import module_path, source_line

#: Kinds through which an operand is the same factor of a product as what it is made of.
_TRANSPARENT = frozenset({"structural", "add"})
_ACTIVATIONS = frozenset({"activation"})
_GATES = _ACTIVATIONS | {"gate", "softmax"}


def assign(
    module: fx.GraphModule,
    sources: Sequence[Source],
    targets: Sequence[fx.Node],
    composite: Composite,
    *,
    strict: bool = True,
) -> Plan:
    """Give every node between the sources and the targets its rule.

    Frozen nodes are found first, since a product with a frozen factor is linear in the others; then the rules
    are given from the targets back, so that only what really carries relevance needs one.

    Raises:
        UncoveredOpError: a nonlinear op carries relevance, no row of the table covers it, and ``strict``.
        NoPathError: nothing differentiable leads from an input to the target.
        CompositeError: a rule cannot serve a node that the composite gives it to.
    """
    starts = {s.node for s in sources}
    reached = reachable(module, starts)
    steps = [n for n in module.graph.nodes if n in reached and _is_call(n) and n not in starts]
    sites = {n: site_of(n, _kind(n, leaves(n), _active(n, reached), reached)) for n in steps}
    rulebook = located(composite.rulebook(), sites)
    fixed = scan_parameters(module.graph, reached) if rulebook.preset.freezes_scans else {}
    frozen = _frozen(steps, reached, rulebook, fixed)
    if rulebook.preset.freezes_gated:
        rulebook = _with_ways(module, starts, targets, frozen, rulebook, len(composite.entries))
        frozen = _frozen(steps, reached, rulebook, fixed)
    active = reachable(module, starts, frozen)
    carrying = {t for t in targets if t in active}
    rows: dict[fx.Node, Assignment] = {}
    for node in reversed(module.graph.nodes):
        if node not in carrying or node.op != "call_function" or node in starts:
            continue
        if node.target is operator.getitem:  # an element of a tuple is part of the op that made it
            carrying.add(node.args[0])
            continue
        row = _assignment(node, active, rulebook, fixed, strict=strict)
        refuse_misfit(node, row)
        rows[node] = row
        operands = leaves(node)
        carrying.update(operands[i] for i in row.active)
    kept = tuple(s for s in sources if s.node in carrying)
    if not kept:
        names = ", ".join(sorted({s.input.name for s in sources})) or "any input"
        where = [f"'{n.name}' ({row.reason})" for n, row in frozen.items()][:3]
        raise NoPathError(
            f"No differentiable path leads from {names} to the target"
            + (f"; frozen on the way: {', '.join(where)}" if where else "")
            + ". Integer inputs must reach an embedding lookup, float inputs must not be detached on the way."
        )
    refuse_later_layers(rows, starts)
    read = {leaf for node in rows for leaf in leaves(node) if isinstance(leaf, fx.Node)}
    rows.update({node: row for node, row in frozen.items() if node in read})
    ordered = {n: rows[n] for n in module.graph.nodes if n in rows}
    given = {row.entry for row in (*frozen.values(), *rows.values())}
    idle = idle_entries(rulebook, len(composite.entries), given, sites.values())
    if rulebook.preset.freezes_scans and not fixed:
        idle += (f"{composite.title}: no selective scan was found whose B and C could be held fixed",)
    return Plan(tuple(ordered.values()), kept, idle=idle)


def _frozen(
    steps: Sequence[fx.Node],
    reached: set[fx.Node],
    rulebook: Rulebook,
    fixed: Mapping[fx.Node, frozenset[int]],
) -> dict[fx.Node, Assignment]:
    rows = {node: _assignment(node, reached, rulebook, fixed, strict=False) for node in steps}
    return {node: row for node, row in rows.items() if row.rule.freezes}


def _with_ways(
    module: fx.GraphModule,
    starts: set[fx.Node],
    targets: Sequence[fx.Node],
    frozen: Mapping[fx.Node, Assignment],
    rulebook: Rulebook,
    own: int,
) -> Rulebook:
    """Rules for activations that every way to the target leads through (poolers, soft caps of logits): to
    freeze them would leave nothing; only what a residual connection goes round is skipped.
    """
    edges = float_edges(module.graph)
    names = set()
    for node, row in frozen.items():
        if row.entry is None and row.kind in ("activation", "product"):
            there = edges.subgraph(set(edges) - {node})
            ends = [t for t in targets if t in there]
            round_it = set().union(*(nx.descendants(there, s) | {s} for s in starts if s in there))
            if round_it.isdisjoint(ends):
                names.add(node.name)
    reason = f"{rulebook.preset.title}: no way round"
    ways = [(Nodes(frozenset(names)), rule, reason) for rule in (Identity(), Gradient())]
    return dataclasses.replace(rulebook, entries=(*rulebook.entries[:own], *ways, *rulebook.entries[own:]))


def _active(node: fx.Node, active: set[fx.Node]) -> tuple[int, ...]:
    """Which leaves of a node carry relevance."""
    return tuple(
        i
        for i, leaf in enumerate(contents(node))
        if isinstance(leaf, fx.Node) and leaf in active and is_float(leaf)
    )


def _assignment(
    node: fx.Node,
    active: set[fx.Node],
    rulebook: Rulebook,
    fixed: Mapping[fx.Node, frozenset[int]],
    *,
    strict: bool,
) -> Assignment:
    """The row of a node; ``fixed`` are operands that count as constants though they are active."""
    operands = leaves(node)
    positions = tuple(i for i in _active(node, active) if i not in fixed.get(node, ()))
    kind = _kind(node, operands, positions, active)
    choice = rulebook.choose(site_of(node, kind))
    if choice is None:
        if rulebook.preset.allows_any_op:
            reason = f"{rulebook.preset.title}: no rules"
            return _row(node, "gradient", positions, Choice(Gradient(), reason))
        if strict:
            path, name = module_path(node), op_name(node.target)
            raise UncoveredOpError(
                f"No rule covers '{name}' ({node.target}) in {place(path, source_line(node))}, and relevance "
                "flows through it. Give it one, for example:\n"
                "    from fxlrp.rules import Taylor  # or a rule of your own: see docs/rules.md\n"
                f"    fxlrp.register_rule('{qualified_name(node.target)}', Taylor())\n"
                "    explainer = fxlrp.lrp_compile(model)\n"
                "or pass strict=False for a first-order Taylor step whose remainder the ledger shows."
            )
        step = Choice(Taylor(), "no rule covers it: first-order Taylor (strict=False)")
        return _row(node, "uncovered", positions, step)
    if kind is None:
        return _row(node, "uncovered", positions, choice)
    if kind in ("product", "matmul"):
        return _product(node, operands, positions, choice, kind, rulebook, active)
    if isinstance(choice.rule, (NormRule, Identity)) or kind in ("division", "attention"):
        positions = _kept(kind, choice.rule, positions, node)
    if isinstance(choice.rule, FrozenAttention):
        positions = tuple(i for i in positions if i == 2)
        if not positions:  # constant values weighted by constant weights
            choice = dataclasses.replace(choice, rule=Freeze())
    return _row(node, kind, positions, choice)


def _kept(kind: str, rule: Rule, positions: tuple[int, ...], node: fx.Node) -> tuple[int, ...]:
    """Operands that a rule hands relevance to; the others count as constants."""
    if isinstance(rule, Gradient):
        return positions
    if kind == "attention":  # the mask is no operand of the rules; one that is computed is written out before
        return tuple(i for i in positions if i < 3)
    if kind in ("division", "norm", "activation"):
        return tuple(i for i in positions if i == 0)
    return positions


def _product(
    node: fx.Node,
    operands: list[Any],
    positions: tuple[int, ...],
    choice: Choice,
    kind: str,
    rulebook: Rulebook,
    active: set[fx.Node],
) -> Assignment:
    """Products and matrix products: gates taken out where they are frozen, shares by number of factors."""
    by_preset = choice.entry is None
    if by_preset and rulebook.preset.freezes_gated and kind == "product":
        gates = tuple(i for i in positions if _is_gate(operands[i], active, _ACTIVATIONS))
        if gates:
            reason = f"{rulebook.preset.title}: gated by an activation"
            return _row(node, kind, positions, Choice(Freeze(), reason))
    if by_preset and rulebook.preset.freezes_gates and kind == "product":
        gates = tuple(i for i in positions if _is_gate(operands[i], active))
        if gates and len(gates) < len(positions):
            positions = tuple(i for i in positions if i not in gates)
            names = ", ".join(f"'{operands[i].name}'" for i in gates)
            choice = dataclasses.replace(choice, reason=f"{choice.reason}, gate {names} frozen")
            if len(positions) == 1:
                linear = rulebook.preset.rules["structural"]
                return _row(node, kind, positions, dataclasses.replace(choice, rule=linear))
    if isinstance(choice.rule, Uniform):
        counts = [_factors(operands[i], active) for i in positions]
        if any(count != counts[0] for count in counts):
            rule = dataclasses.replace(choice.rule, shares=tuple(count / sum(counts) for count in counts))
            choice = dataclasses.replace(choice, rule=rule, reason=f"{choice.reason}, {sum(counts)} factors")
    return _row(node, kind, positions, choice)


def _row(node: fx.Node, kind: str, active: tuple[int, ...], choice: Choice) -> Assignment:
    return Assignment(
        node.name,
        op_name(node.target),
        kind,
        choice.rule,
        () if choice.rule.freezes else active,
        choice.reason,
        module_path(node),
        source_line(node),
        choice.entry,
    )


def _kind(node: fx.Node, operands: list[Any], positions: tuple[int, ...], active: set[fx.Node]) -> str | None:
    """The kind of a node, given which of its operands are active."""
    kind = kind_of(node.target)
    count = len(positions)
    if kind in ("linear", "conv") and count > 1:
        # addmm and its like add their first operand to the others' product: affine in it, bilinear in them.
        if 0 in positions and op_name(node.target) in ("addmm", "baddbmm", "addmv", "addbmm"):
            return None
        if 2 in positions:  # a computed bias: affine in input and bias together, in weight and bias it is not
            return kind if positions == (0, 2) else None
        kind = "matmul"
    if kind in ("product", "matmul") and count < 2:
        return "structural" if kind == "product" else "linear"
    if kind == "solve" and positions == (1,):
        return "linear"
    if kind == "division":
        if node.kwargs.get("rounding_mode") is not None:
            return None
        if count == 1:
            return "structural" if positions == (0,) else _gate_kind(node, active)
    if kind == "softmax" and _weighs_values(node, active):
        return "attention_weights"
    if kind == "activation" and op_name(node.target) == "pow" and not _is_power(node):
        return _gate_kind(node, active)
    if is_op(node, "scatter_reduce", "index_reduce"):
        return {"sum": "structural", "mean": "structural", "prod": None}.get(_reduction(node), "selection")
    if kind == "activation" and op_name(node.target) == "hardtanh" and not _contains_zero(node):
        return "selection"
    if kind == "gate":
        return _gate_kind(node, active)
    return kind


def _reduction(node: fx.Node) -> str:
    return str(node.args[4] if len(node.args) > 4 else node.kwargs.get("reduce"))


def _is_power(node: fx.Node) -> bool:
    exponent = node.args[1] if len(node.args) > 1 else None
    return isinstance(exponent, (int, float)) and exponent >= 1


def _contains_zero(node: fx.Node) -> bool:
    given: Any = node.args[1:3]
    low, high = (*given, *(-1.0, 1.0)[len(node.args) - 1 :])[:2]
    return bool(low <= 0 <= high)


def _gate_kind(node: fx.Node, active: set[fx.Node]) -> str:
    """A gate where all it does is multiply or divide something active; else a nonlinear step of its own."""
    return "gate" if _only_multiplies(node, active) else "nonlinear"


def _only_multiplies(node: fx.Node, active: set[fx.Node]) -> bool:
    users = [user for user in node.users if node in contents(user)]
    for user in users:
        if not carries(user):
            continue
        kind = kind_of(user.target) if user.op == "call_function" else None
        others = [x for x in contents(user) if isinstance(x, fx.Node) and x is not node and x in active]
        if kind in MULTILINEAR | {"division"} and others:
            continue
        if (
            kind in ("structural", "product", "division", "gate")
            and not others
            and _only_multiplies(user, active)
        ):
            continue
        if kind == "add" and not others and _only_multiplies(user, active):
            continue
        return False
    return bool(users)


def _weighs_values(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether a softmax's output goes into matrix products with something active, and nowhere else."""
    users = [u for u in node.users if carries(u) and node in contents(u)]
    return bool(users) and all(
        (
            kind_of(u.target) == "matmul"
            and any(isinstance(x, fx.Node) and x is not node and x in active for x in contents(u))
        )
        or (u.op == "call_function" and kind_of(u.target) == "structural" and _weighs_values(u, active))
        for u in users
    )


def _is_gate(node: fx.Node, active: set[fx.Node], kinds: frozenset[str] = _GATES) -> bool:
    """Whether a factor comes straight from an activation, a gate or a softmax, or another of these kinds."""
    while is_op(node) or node.op == "call_function":
        kind = kind_of(node.target)
        if kind in kinds:
            return True
        nodes = [x for x in contents(node) if isinstance(x, fx.Node) and x in active]
        if kind not in _TRANSPARENT | {"selection", "division", "product"} or len(set(nodes)) != 1:
            return False
        node = nodes[0]
    return False


def _is_weights(node: fx.Node) -> bool:
    """Whether an operand is a softmax, reshaped or not."""
    while (
        node.op == "call_function" and kind_of(node.target) == "structural" and len(node.all_input_nodes) == 1
    ):
        node = node.all_input_nodes[0]
    return node.op == "call_function" and kind_of(node.target) == "softmax"


def _factors(node: fx.Node, active: set[fx.Node]) -> int:
    """How many relevance-carrying factors an operand of a product is made of."""
    node = without_casts(node)
    if node.op != "call_function":
        return 1
    kind = kind_of(node.target)
    nodes = [x for x in contents(node) if isinstance(x, fx.Node) and x in active and is_float(x)]
    if kind == "matmul" and any(_is_weights(x) for x in nodes):
        return 1  # eager attention is one factor, as the attention op is
    if kind in ("product", "matmul") and len(nodes) > 1:
        return sum(_factors(x, active) for x in nodes)
    if len(nodes) == 1 and (
        kind == "structural" or (kind in ("product", "division") and nodes[0] in leaves(node))
    ):
        return _factors(nodes[0], active)
    return 1


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem
