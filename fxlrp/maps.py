"""Linear maps between named nodes: what ``explainer.vjp`` and ``explainer.jvp`` take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .compiler.between import Stretch, pull, push, stretch
from .compiler.graphs import is_float, outputs, value
from .compiler.inputs import Bound
from .compiler.lower import Runner
from .compiler.template import is_symbol
from .errors import CaptureError, FxlrpError, InputError, first_line
from .rules import Composite
from .traces import Trace

#: What one calls a node's vectors: one tensor where one node is named, one for each of several.
Vectors = Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class VJP:
    """Coefficients at nodes, for K coefficients at others.

    Attributes:
        coefficients: ``[K, *shape]`` by name, of the nodes that were asked for.
        values: ``[*shape]`` by name, of these and of the nodes that coefficients were given for: relevance is
            ``values[name] * coefficients[name]``.
    """

    coefficients: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.coefficients[name]


@dataclass(frozen=True, eq=False)
class JVP:
    """Tangents at nodes, for K tangents at others.

    Attributes:
        tangents: ``[K, *shape]`` by name, of the nodes that were asked for.
        values: ``[*shape]`` by name, of these and of the nodes that tangents were given for.
    """

    tangents: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tangents[name]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A compiled map between nodes.

    Attributes:
        found: the nodes and their rules.
        graph: from the model's inputs and the vectors to ``(vectors, values)``.
        runner: takes the model's inputs and the vectors, returns vectors and values.
    """

    found: Stretch
    graph: fx.GraphModule
    runner: Runner


def linear_map(
    trace: Trace,
    composite: Composite,
    given: Sequence[str],
    wanted: Sequence[str],
    lower: Callable[[fx.GraphModule], Runner],
    *,
    forward: bool,
    strict: bool,
    inputs: frozenset[str],
    count: int | None,
) -> LinearMap:
    """Compile the map for any number of vectors, or for ``count`` of them.

    Raises:
        CaptureError: an op's pullback cannot be transposed.
    """
    flat = outputs(trace.canonical.graph.graph)
    index = trace.captured.outputs.logits()
    read = [i for i, n in enumerate(flat) if is_float(n)] if index is None else [index]
    found = stretch(
        trace.canonical,
        composite,
        read,
        index,
        given,
        wanted,
        forward=forward,
        strict=strict,
        inputs=inputs,
    )
    lead = trace.canonical.templates.lead() if count is None else count
    try:
        graph = (push if forward else pull)(found, trace.canonical, lead)
    except FxlrpError:
        raise
    except Exception as error:
        if count is None:
            raise
        raise CaptureError(
            f"The rules between these nodes have no {'transpose' if forward else 'pullback'} of several "
            f"vectors: {first_line(error)}."
        ) from error
    return LinearMap(found, graph, lower(graph))


def names_of(names: str | Sequence[str], what: str) -> tuple[str, ...]:
    """One name or several as a tuple.

    Raises:
        InputError: none, or something else.
    """
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found or not all(isinstance(name, str) for name in found):
        raise InputError(f"{what} takes a name or several of module paths, nodes or inputs; got {names!r}.")
    return found


def mapped(
    trace: Trace,
    bound: Bound,
    vectors: Vectors | None,
    built: Callable[[int | None], LinearMap],
    key: tuple[bool, tuple[str, ...], tuple[str, ...]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Vectors of the wanted nodes, and values of these and the given ones, by name.

    Args:
        trace: the captured model.
        bound: its inputs.
        vectors: of the given nodes.
        built: the map for any number of vectors (None), or for so many.
        key: the direction, the given and the wanted names.
    """
    chosen = _for_any_number(trace, built, key) or built(1)
    given = chosen.found.given
    tensors = _checked(vectors, given, trace, bound, "tangents" if key[0] else "cotangents")
    if key in trace.fixed_counts:
        chosen = built(len(tensors[0]))
    results, values = chosen.runner(*bound.tensors, *tensors)
    of_values = zip((*chosen.found.wanted, *given), values, strict=True)
    return dict(zip(chosen.found.wanted, results, strict=True)), dict(of_values)


def _for_any_number(trace: Trace, built: Callable[[int | None], LinearMap], key: Any) -> LinearMap | None:
    """The map that takes any number of vectors, or None where what it is made of fixes their number."""
    lead = trace.canonical.templates.lead()
    if key in trace.fixed_counts or not is_symbol(lead):
        trace.fixed_counts.setdefault(key, "the trace fixes all sizes")
        return None
    try:
        chosen = built(None)
    except FxlrpError:
        raise
    except Exception as error:  # some ops take no symbol for the number of vectors
        trace.fixed_counts[key] = first_line(error)
        return None
    if is_symbol(lead):
        return chosen
    trace.fixed_counts[key] = "the trace fixes all sizes"
    return None


def _checked(
    vectors: Vectors | None, given: Mapping[str, fx.Node], trace: Trace, bound: Bound, what: str
) -> tuple[Tensor, ...]:
    """The vectors of each node, checked: ``[K, *shape]`` each, of the node's dtype and device.

    None stands for zeros.

    Raises:
        InputError: too few or many, or of another shape.
    """
    if vectors is None:
        vectors = [
            torch.zeros(1, *trace.shapes.evaluate(value(node).shape, bound.tensors))
            for node in given.values()
        ]
    found = (vectors,) if isinstance(vectors, Tensor) else tuple(vectors)
    if len(found) != len(given):
        raise InputError(
            f"{what}: {len(given)} nodes are named ({', '.join(given)}), and {len(found)} tensors given."
        )
    for (name, node), tensor in zip(given.items(), found, strict=True):
        shape = trace.shapes.evaluate(value(node).shape, bound.tensors)
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tuple(tensor.shape[1:]) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = ", ".join(map(str, ("K", *shape)))
            raise InputError(f"{what}: '{name}' has shape {shape}, so its tensor is [{wanted}]; got {got}.")
        if len(tensor) != len(found[0]) or not len(tensor):
            raise InputError(
                f"{what}: '{name}' has {len(tensor)} vectors and '{next(iter(given))}' {len(found[0])}; the "
                "first dimension is K, 1 or more, for all."
            )
    return tuple(
        tensor.detach().to(value(node).dtype).to(bound.tensors[0].device)
        for node, tensor in zip(given.values(), found, strict=True)
    )
