"""The pipeline: one linear function, a named stage a line; each takes a value and returns a new one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..rules import Composite, preset
from .activity import explained, refuse_missing
from .assign import assign
from .budget import Budget, Memory, rematerialise
from .canonicalize import Canonical
from .causal import skip_beyond
from .demand import only_outputs, only_rows
from .fused import AUTO, REFERENCE, fuse
from .graphs import outputs
from .liveness import Sizes
from .plan import Plan
from .positions import PositionLeaf, with_position_leaves
from .products import chosen_here
from .rewrite import rewrite
from .seed import Seed
from .slicing import demanded
from .transpose import Relevance, transpose
from .verify import verify_relevance, verify_rules


@dataclass(frozen=True)
class Rows:
    """Which rows of a sequence output the target reads.

    Attributes:
        output: which of the graph's outputs.
        positions: name of the input or padding mask that positions come from; None for the last position.
        given: whether positions are an input of their own.
        padding: whether the mask is true where there is padding.
    """

    output: int
    positions: str | None
    given: bool
    padding: bool = False


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled explanation of one model for one kind of target.

    Attributes:
        plan: which node has which rule.
        rule_graph: the forward with rule nodes; it returns what the seed reads.
        relevance: the relevance graph.
        seed: the explained scalar.
        memory: what it is estimated to take, and could.
    """

    plan: Plan
    rule_graph: fx.GraphModule
    relevance: Relevance
    seed: Seed
    memory: Memory


def build(
    canonical: Canonical,
    composite: Composite,
    seed: Seed,
    rows: Rows | None,
    *,
    strict: bool,
    inputs: Collection[str] = (),
    latents: Mapping[str, str] | None = None,
    parameters: Mapping[str, str] | None = None,
    budget: Budget = None,
    sizes: Sizes | None = None,
    notes: tuple[str, ...] = (),
    kernels: tuple[str, ...] = (AUTO,),
    demand: bool = True,
) -> Program:
    """From a canonical graph to its relevance graph.

    ``demand``: whether choices of positions move up to where positions mix; the same function either way.
    """
    if rows is None:
        graph = only_outputs(canonical.graph, seed.outputs)
    else:
        lead = seed.lead if seed.rows else None
        graph = only_rows(
            canonical.graph, rows.output, rows.positions, given=rows.given, padding=rows.padding, lead=lead
        )
    leaves: tuple[PositionLeaf, ...] = ()
    idle: tuple[str, ...] = ()
    if preset(composite.base).positional:
        sources = explained(graph, seed.reads(outputs(graph.graph)), inputs)
        graph, leaves = with_position_leaves(graph, sources)
        if not leaves:
            idle = (f"{composite.title}: no table of positions was found, so that none is explained",)
    if demand:
        graph = demanded(graph, {*(latents or {}).values(), *(leaf.node.name for leaf in leaves)})
    targets = seed.reads(outputs(graph.graph))
    nodes = {node.name: node for node in graph.graph.nodes}
    sources = (*explained(graph, targets, inputs), *(leaf.moved(nodes) for leaf in leaves))
    plan = assign(graph, sources, targets, composite, strict=strict)
    refuse_missing(plan.sources, inputs)
    rule_graph = verify_rules(rewrite(graph, plan), plan)
    nodes = {node.name: node for node in rule_graph.graph.nodes}
    moved = [s.moved(nodes) for s in plan.sources]
    wanted = {*(latents or {}).values(), *(s.node.name for s in moved)}
    fusion = fuse(rule_graph, kernels, wanted)
    fused = {node.name: node for node in fusion.graph.graph.nodes}
    relevance = transpose(
        fusion.graph,
        [s.moved(fused) for s in moved],
        seed,
        latents=dict(latents or {}),
        templates=canonical.templates,
        parameters=dict(parameters or {}),
    )
    skip_beyond(relevance.graph.graph)
    relevance.graph.recompile()
    graph, memory = rematerialise(relevance.graph, budget, sizes or Sizes())
    relevance = replace(relevance, graph=verify_relevance(graph))
    notes = (*notes, *canonical.misses, *fusion.notes)
    here = () if kernels == (REFERENCE,) else chosen_here(relevance.graph)
    plan = Plan(plan.rows, tuple(moved), notes, (*plan.idle, *idle), here)
    return Program(plan, rule_graph, relevance, seed, memory)
