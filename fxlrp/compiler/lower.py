"""Lower: a relevance graph to something that runs it."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import InputError
from .inputs import plain_region

#: Takes the relevance graph's inputs, returns its outputs.
Runner = Callable[..., Any]
BACKENDS = ("auto", "eager", "inductor")


def lower(graph: fx.GraphModule | None, backend: str, device: torch.device) -> Runner:
    """A callable for the relevance graph.

    Raises:
        InputError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise InputError(f"There is no backend {backend!r}. Backends: {', '.join(BACKENDS)}.")
    chosen = ("inductor" if device.type == "cuda" else "eager") if backend == "auto" else backend
    if graph is None:
        return _nothing
    if chosen == "eager":
        return _Eager(graph)
    return _Inductor(graph)


def _nothing(*args: Any) -> Any:
    raise AssertionError("nothing was lowered")


class _Eager:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.run = _direct(graph)

    def __call__(self, *args: Any) -> Any:
        with plain_region():
            return self.run(*args)


class _Inductor(_Eager):
    """The same, compiled; outside inference and autocast regions, whose effects the graph holds already."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.run = torch.compile(graph, fullgraph=True, dynamic=True)


def _direct(module: fx.GraphModule) -> Runner:
    """The graph's code over the ops' entries in the dispatcher and the weights themselves.

    For small tensors, looking up an op by its path, the Python frame of ``OpOverload.__call__`` and fetching
    weights module by module take as long as the ops do.
    """
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    weights = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            weights.append(operator.attrgetter(node.target)(module))
            known[node] = graph.placeholder(f"weight_{len(weights)}_")
    graph.output(graph.graph_copy(module.graph, known))
    code = graph.python_code("self")
    entries: dict[str, Any] = {}

    def entry(found: re.Match[str]) -> str:
        op = operator.attrgetter(found[1])(torch.ops)
        if not isinstance(op, torch._ops.OpOverload):
            return found[0]
        name = "op_" + found[1].replace(".", "_")
        entries[name] = op._op
        return f"{name}("

    source = re.sub(r"torch\.ops\.(\w+\.\w+\.\w+)\(", entry, code.src)
    names = {**code.globals, **entries}
    exec(compile(source, "<relevance graph>", "exec"), names)
    return functools.partial(names["forward"], None, *weights)
