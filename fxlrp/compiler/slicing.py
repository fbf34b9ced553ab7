"""Demand slicing: only the positions that the target reads are computed.

A target reads one position of a sequence output, a classifier its class token, a pooler the last token. That
choice moves up through every step that treats positions alike (a head, norms, the MLP, residual sums, the
heads' views, the queries of attention) until a step mixes positions or somebody else reads them all. It is
exact: the same function, op by op. :mod:`fxlrp.compiler.commute` says which op a choice moves past.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .activity import candidates
from .choice import CHOICE, ROW, TARGETS, Choice, Reading, reading
from .commute import Places, attention_operands, places, same, sized, tensor_of
from .demand import called, without_dead
from .graphs import arg, computing, copy_graph, fake_mode, is_float, is_op, leaves, tree, value

aten = torch.ops.aten


def demanded(module: fx.GraphModule, whole: Collection[str] = ()) -> fx.GraphModule:
    """A graph in which choices of positions stand as early as they can.

    Args:
        module: a canonical graph.
        whole: names of nodes of which every position is wanted.
    """
    new = copy_graph(module, "Demanded")
    kept = {*whole, *(source.node.name for source in candidates(new.graph))}
    _Demand(new.graph, fake_mode(new.graph), frozenset(kept)).run()
    return without_dead(new)


@dataclass(eq=False)
class _Demand:
    """One run of :func:`demanded`, which edits its own copy: the last node first, each once."""

    graph: fx.Graph
    mode: Any
    whole: frozenset[str]
    computed: set[fx.Node] = field(default_factory=set)
    known: dict[fx.Node, Reading | None] = field(default_factory=dict)

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder" or not self.computed.isdisjoint(node.all_input_nodes):
                self.computed.add(node)
        for node in reversed(list(self.graph.nodes)):
            self.merge(node)
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if not node.users:
                self.graph.erase_node(node)
                continue
            found = self.demand(node)
            if found is not None and node.name not in self.whole:
                self.move(node, found)

    # -- who reads what --------------------------------------------------------------------------------------

    def reading(self, node: fx.Node) -> Reading | None:
        if node not in self.known:
            self.known[node] = reading(node)
        return self.known[node]

    def merge(self, node: fx.Node) -> None:
        """One node for equal choices of a node's positions."""
        first: dict[Reading, fx.Node] = {}
        for user in sorted(node.users):
            found = self.reading(user) if user.args and user.args[0] is node else None
            if found is not None and user.meta.get("made_by") == "demand":
                kept = first.setdefault(found, user)
                if kept is not user:
                    user.replace_all_uses_with(kept)
                    self.graph.erase_node(user)

    def demand(self, node: fx.Node) -> Reading | None:
        """The choice that all readers of a node make, or None: the whole is read, or by several choices."""
        choices = set()
        for result in _results(node):
            if result.name in self.whole or not result.users:
                return None
            for user in result.users:
                found = self.reading(user)
                if found is None or result is not user.args[0] or result in found.choice.nodes:
                    return None
                choices.add((found.choice, found.dim))
        if len(choices) != 1 or not _results(node):
            return None
        ((choice, dim),) = choices
        if choice.mark == ROW or same(tensor_of(node).shape[dim], 1):
            return None
        return None if any(self.depends(x, node) for x in choice.nodes) else Reading(choice, dim)

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether a node is computed of another one."""
        seen, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current is on:
                return True
            new = [x for x in current.all_input_nodes if x not in seen and not x < on]
            seen.update(new)
            stack.extend(new)
        return False

    # -- moving ----------------------------------------------------------------------------------------------

    def move(self, node: fx.Node, found: Reading) -> None:
        """The op applied to chosen operands, in place of a choice of its output."""
        choice, dim = found.choice, found.dim
        if is_op(node, "reshape") and is_op(node.args[0], "mm", "addmm") and self.move_rows(node, found):
            return
        where = places(node, dim)
        samples = (places(node, 0) or {}) if choice.is_per_sample else {}
        if where is None or (choice.is_per_sample and not samples):
            return
        if any(i in samples and (samples[i] != 0 or at == 0) for i, at in where.items()):
            return
        mark = self.mark(node, found, where)
        for x in choice.nodes:
            self.hoist(x, node)
        flat, spec = tree(node)
        made: dict[tuple[fx.Node, int], fx.Node] = {}
        inner = replace(choice, mark=CHOICE if mark == ROW else None)
        rank = tensor_of(node).dim()
        with self.graph.inserting_before(node):
            for i, at in where.items():
                x = flat[i]
                if (x, at) not in made:
                    missing = choice.is_per_sample and i not in samples
                    made[x, at] = self.chosen(x, at, inner, rank if missing else None)
                flat[i] = made[x, at]
            args, kwargs = pytree.tree_unflatten(flat, spec)
            if sized(node) is not None:
                sizes = list(args[1])
                sizes[dim] = self.size(next(iter(made.values())), next(iter(where.values())))
                args = (args[0], sizes, *args[2:])
            if is_op(node, "attention") and dim == rank - 2:
                args, kwargs = self.visible(node, args, kwargs, choice)
        node.args, node.kwargs = args, kwargs
        self.compute(node)
        if mark is not None:
            node.meta[TARGETS] = mark
        self.hand_over(node, dim)

    def mark(self, node: fx.Node, found: Reading, where: Places) -> str | None:
        """What a node's coefficient is: of rows that each have a target of their own it is that target's
        alone, as long as they stay rows behind the batch and share nothing.
        """
        if found.choice.mark != CHOICE:
            return None
        shared = [
            x
            for i, x in enumerate(leaves(node))
            if i not in where and isinstance(x, fx.Node) and is_float(x) and x in self.computed
        ]
        return ROW if set(where.values()) == {1} == {found.dim} and not shared else CHOICE

    def chosen(self, x: fx.Node, dim: int, choice: Choice, rank: int | None) -> fx.Node:
        """Positions of an operand; ``rank``: of the output, for an operand that has no samples, which are
        added in front.
        """
        near = x
        if rank is not None:
            (positions,) = choice.nodes
            ahead = rank - value(x).dim()
            for _ in range(ahead):
                x = called(self.mode, self.graph, aten.unsqueeze.default, (x, 0), near)
            samples = self.size(positions, 0)
            sizes = [samples, *[-1] * (rank - 1)]
            x = called(self.mode, self.graph, aten.expand.default, (x, sizes), near)
            dim += ahead
        node = called(self.mode, self.graph, choice.op, (x, dim, *choice.operands), near)
        if choice.mark is not None:
            node.meta[TARGETS] = choice.mark
        return node

    def compute(self, node: fx.Node) -> None:
        """A node's value, anew."""
        with computing(self.mode):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
            op: Any = node.target
            node.meta["val"] = op(*args, **kwargs)

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size, as a number or a node."""
        size = value(node).shape[dim]
        if isinstance(size, int):
            return size
        return called(self.mode, self.graph, aten.sym_size.int, (node, dim))

    def visible(
        self, node: fx.Node, args: Any, kwargs: dict[str, Any], choice: Choice
    ) -> tuple[Any, dict[str, Any]]:
        """Attention of chosen queries: what was causal becomes a mask; the last one sees all keys."""
        _, key, _, _, causal, _, _ = attention_operands(node)
        if not causal:
            return args, kwargs
        mask = None
        if not choice.is_last:
            keys = called(self.mode, self.graph, counted, (key,), node)
            if choice.is_per_sample:
                rows, seen = choice.nodes[0], seen_from_each
            else:
                rows = called(self.mode, self.graph, choice.op, (keys, 0, *choice.operands), node)
                seen = seen_from
            mask = called(self.mode, self.graph, seen, (rows, keys), node)
        return (*args[:3], mask), {**{k: v for k, v in kwargs.items() if k != "mask"}, "is_causal": False}

    def move_rows(self, node: fx.Node, found: Reading) -> bool:
        """Past ``reshape(addmm(b, reshape(x, [-1, n]), w), [..., m])``, a product of rows that are flattened
        for it and put back: none of these three steps has the rows' dimension by itself.
        """
        product = arg(node, 0)
        first = 1 if is_op(product, "addmm") else 0
        rows, bias = arg(product, first), arg(product, 0) if first else None
        if len(product.users) > 1 or product.name in self.whole or not is_op(rows, "reshape"):
            return False
        x, dim, choice = arg(rows, 0), found.dim, found.choice
        old, new = value(x).shape, value(node).shape
        in_place = len(old) == len(new) and all(map(same, old[:-1], new[:-1])) and dim < len(old) - 1
        if not in_place or not same(old[-1], value(rows).shape[-1]) or (choice.is_per_sample and dim == 0):
            return False
        shared = self.computed.intersection((bias, arg(product, first + 1)))
        if (bias is not None and value(bias).dim() > 1) or (shared and choice.mark is not None):
            return False
        mark = self.mark(node, found, {0: dim})
        for needed in choice.nodes:
            self.hoist(needed, product)
        with self.graph.inserting_before(product):
            inner = replace(choice, mark=CHOICE if mark == ROW else None)
            chosen = self.chosen(x, dim, inner, None)
            flat = called(self.mode, self.graph, aten.reshape.default, (chosen, [-1, arg(rows, 1)[-1]]), rows)
            sizes = list(arg(node, 1))
            sizes[dim] = self.size(chosen, dim)
        product.args = (*product.args[:first], flat, *product.args[first + 1 :])
        node.args = (product, sizes)
        for step in (product, node):
            self.compute(step)
        if mark is not None:
            for step in (flat, product, node):
                step.meta[TARGETS] = mark if step is node else ROW if mark == ROW else None
        self.hand_over(node, dim)
        return True

    def hoist(self, node: fx.Node, before: fx.Node) -> None:
        """Bring a node and what it is computed of in front of another one."""
        if not node < before:
            for x in node.all_input_nodes:
                self.hoist(x, before)
            before.prepend(node)

    def hand_over(self, node: fx.Node, dim: int) -> None:
        """The readers of a node that holds chosen positions by now."""
        for result in _results(node):
            if result is not node:
                result.meta["val"] = value(node)[arg(result, 1)]
                if TARGETS in node.meta:
                    result.meta[TARGETS] = node.meta[TARGETS]
            for user in list(result.users):
                found = self.reading(user)
                if found is not None and (found.drops or user.name in self.whole):
                    user.target, user.args = (
                        (aten.squeeze.dim, (result, dim)) if found.drops else (aten.alias.default, (result,))
                    )
                    self.known[user] = None
                else:
                    user.replace_all_uses_with(result)
                    self.graph.erase_node(user)


def _results(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node computes: itself, or elements of its tuple; nothing where it is read whole."""
    if isinstance(value(node), Tensor):
        return [node]
    elements = list(node.users)
    return elements if all(x.target is operator.getitem for x in elements) else []


def counted(x: Tensor) -> Tensor:
    """Positions of keys ``[..., n, d]``: ``[n]``."""
    return torch.arange(x.shape[-2], device=x.device)


def seen_from(rows: Tensor, keys: Tensor) -> Tensor:
    """Which keys rows of causal attention see: their own position and those before.

    Shapes: rows ``[m]``, keys ``[n]`` -> ``[m, n]``; rows ``[batch]`` or ``[batch, m]`` of each sample ->
    ``[batch, 1, m, n]``. Rows below 0 count from the end.
    """
    return keys <= rows.remainder(keys.shape[0]).unsqueeze(-1)


def seen_from_each(rows: Tensor, keys: Tensor) -> Tensor:
    """:func:`seen_from` rows of each sample."""
    rows = rows.unsqueeze(-1) if rows.dim() == 1 else rows
    return seen_from(rows, keys).unsqueeze(1)
