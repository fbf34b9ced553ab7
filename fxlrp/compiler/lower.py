"""Lower: a relevance graph to something that runs it."""

from __future__ import annotations

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
    return _Inductor(torch.compile(graph, fullgraph=True, dynamic=True))


def _nothing(*args: Any) -> Any:
    raise AssertionError("nothing was lowered")


class _Eager:
    def __init__(self, graph: Runner) -> None:
        self.graph = graph

    def __call__(self, *args: Any) -> Any:
        with plain_region():
            return self.graph(*args)


class _Inductor(_Eager):
    """The same, compiled; outside inference and autocast regions, whose effects the graph holds already."""
