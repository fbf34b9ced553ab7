"""Fused: rule nodes that a kernel serves compute their output and coefficients by it.

The plan and the rule graph stay as they are; :func:`fuse` gives the transposition a copy of the rule graph in
which such nodes carry the same rule with another way to compute it. What a rule keeps back does not change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import KernelError, place
from ..kernels import measured
from ..rules import Rule
from ..rules.base import Call, Cotangent, Linearization
from .graphs import copy_graph, value
from .pairs import call_of, pair_at
from .provenance import module_path, source_line
from .rewrite import RuleOp, is_rule, rule_op
from .served import SERVED, Served

#: What ``kernels=`` of ``lrp_compile`` may name.
KERNELS: Final = tuple(sorted({served.kernel for served in SERVED}))
AUTO, REFERENCE = "auto", "reference"


@dataclass(frozen=True)
class Fused(Rule):
    """A rule of the plan, computed by a kernel."""

    rule: Rule
    served: Served

    @property
    def name(self) -> str:
        return f"{self.rule.name}_by_{self.served.kernel}"

    def linearize(self, call: Call) -> Linearization:
        return self.served.linearize(self.rule, call)

    def linearize_many(self, call: Call) -> Linearization:
        return self.served.linearize(self.rule, call)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        return self.rule.absorbed(call, output, cotangent, coefficients)


@dataclass(frozen=True)
class Fusion:
    """A rule graph with kernels, and which serves how many nodes, or why none does."""

    graph: fx.GraphModule
    notes: tuple[str, ...]


def chosen(kernels: str | Sequence[str]) -> tuple[str, ...]:
    """What ``kernels=`` names: kernels, or ``"auto"`` or ``"reference"`` alone.

    Raises:
        KernelError: there is no such kernel.
    """
    names = (kernels,) if isinstance(kernels, str) else tuple(kernels)
    if names in ((AUTO,), (REFERENCE,)) or (names and all(name in KERNELS for name in names)):
        return names
    raise KernelError(
        f"kernels={kernels!r}: give 'auto', 'reference', or some of {', '.join(map(repr, KERNELS))}."
    )


def fuse(module: fx.GraphModule, kernels: tuple[str, ...], keep: Collection[str] = ()) -> Fusion:
    """Give nodes that a kernel serves that kernel.

    Args:
        module: the rule graph.
        kernels: the names of those to use wherever they apply; ``"auto"`` for those that run here and were
            measured to be faster; ``"reference"`` for none.
        keep: names of nodes that stay by themselves, since their relevance is asked for.

    Raises:
        KernelError: a kernel that was named cannot run on a node that it is for.
    """
    if kernels == (REFERENCE,):
        return Fusion(module, ())
    graph = copy_graph(module, "FusedGraph")
    choice = _Choice(kernels)
    for node in _rule_nodes(graph):  # pairs first: afterwards each of the two has a kernel of its own
        pair = pair_at(node)
        named = pair is None or {pair.inner.name, *((pair.outer.name,) if pair.keeps else ())} & set(keep)
        # Where the two cannot be one, each may still be served by itself, and the second loop says so.
        if pair is not None and not named and not pair.refusal and choice.falls(pair.kernel, node, ""):
            pair.join(graph.graph)
    graph.graph.eliminate_dead_code()
    for node in _rule_nodes(graph):
        step = rule_op(node)
        row = next((served for served in SERVED if served.takes(step.rule, step.op)), None)
        if row is not None and choice.falls(
            row.kernel, node, row.refusal(step.rule, call_of(node)), row.measured_as(step.rule)
        ):
            node.target = RuleOp(step.op, Fused(step.rule, row), step.active)
    graph.recompile()
    return Fusion(graph, choice.notes())


@dataclass(eq=False)
class _Choice:
    """Which kernels are taken, and what was decided so far."""

    kernels: tuple[str, ...]
    used: Counter[str] = field(default_factory=Counter)
    missed: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def falls(self, kernel: str, node: fx.Node, refusal: str, case: str = "") -> bool:
        """Whether the choice falls on a kernel for a node, given why it cannot run there, if so.

        ``case``: what measurements call it there; the kernel's own name by default.
        """
        if self.kernels == (AUTO,):
            refusal = refusal or _slower(case or kernel, _device(node))
        elif kernel not in self.kernels:
            return False
        elif refusal:
            at = place(module_path(node), source_line(node))
            raise KernelError(
                f"Kernel '{kernel}' cannot run at node '{node.name}' ({at}): {refusal}. With kernels='auto' "
                "such a node is computed by the reference."
            )
        if refusal:
            self.missed[kernel][refusal] += 1
        else:
            self.used[kernel] += 1
        return not refusal

    def notes(self) -> tuple[str, ...]:
        """The decisions, a line each; one line where no kernel is used for one and the same reason."""
        reasons = {why for counts in self.missed.values() for why in counts}
        if not self.used and len(reasons) == 1:
            return (f"kernels: references, since {reasons.pop()}",)
        limits = {row.kernel: f", {row.limit}; with more, the reference" for row in SERVED if row.limit}
        taken = [
            f"kernel {name}: {count} nodes{limits.get(name, '')}" for name, count in sorted(self.used.items())
        ]
        return (
            *taken,
            *(
                f"kernel {name}: reference at {count} nodes, since {why}"
                for name, counts in sorted(self.missed.items())
                for why, count in counts.items()
            ),
        )


def _slower(kernel: str, device: torch.device) -> str:
    """Why a kernel that could run is not chosen by itself; empty where it is."""
    if device.type != "cuda":
        return f"on a {device.type} Triton only interprets kernels"
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "this device"
    return {
        True: "",
        False: f"they were measured to be slower on {name}",
        None: f"nothing was measured on {name}",
    }[measured.faster(kernel, name)]


def _rule_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if is_rule(node)]


def _device(node: fx.Node) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_leaves(value(node)) if isinstance(leaf, Tensor))
