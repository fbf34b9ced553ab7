"""Whether a captured graph does what the model does: its output and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import InputError, first_line, is_out_of_memory
from .activity import candidates
from .graphs import arg, is_float, placeholders
from .inputs import Bound, plain_region
from .outputs import flatten_output

#: How far a graph's gradient may be from the model's, relative to its largest entry; by the dtype's bits.
_GRADIENT_TOLERANCE = {16: 0.1, 32: 1e-3, 64: 1e-6}

#: Elements that are compared at a time.
_PIECE = 1 << 24


def run_model(model: nn.Module, bound: Bound) -> tuple[Tensor, ...]:
    """The model's own output tensors; see :func:`call_model`."""
    return flatten_output(call_model(model, bound))[0]


def call_model(model: nn.Module, bound: Bound) -> Any:
    """The model's own output without autograd, on copies of what it may write into: inputs and buffers.

    Raises:
        InputError: the model itself fails on these inputs.
    """
    try:
        with torch.no_grad():
            return _call(model, bound, tuple(t.clone() for t in bound.tensors), {})
    except Exception as error:
        if is_out_of_memory(error):
            raise
        dtypes = ", ".join(f"{name}: {t.dtype} {tuple(t.shape)}" for name, t in bound.by_name.items())
        hint = ""
        if "indices" in str(error) and any(t.is_floating_point() for t in bound.tensors):
            hint = (
                " A float tensor was given where the model looks up integer ids; "
                "embeddings go to another argument."
            )
        elif "dtype" in str(error):
            hint = (
                " Check the inputs' dtypes: ids are integers, pixels and embeddings have the weights' dtype."
            )
        raise InputError(
            f"{type(model).__name__} itself fails on these inputs ({dtypes}): {first_line(error)}.{hint}"
        ) from error


def _call(model: nn.Module, bound: Bound, tensors: tuple[Tensor, ...], weights: Mapping[str, Tensor]) -> Any:
    args, kwargs = bound.rebuild(tensors)
    replaced = {**{name: b.clone() for name, b in model.named_buffers()}, **weights}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of torch's own encoder computes something else at padded positions.
        torch.backends.mha.set_fastpath_enabled(False)
        return (
            torch.func.functional_call(model, replaced, args, kwargs) if replaced else model(*args, **kwargs)
        )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def compare(
    graph: fx.GraphModule, bound: Bound, expected: tuple[Tensor, ...], floor: float = 0.0
) -> str | None:
    """Why the captured graph does not reproduce the model's output, or None where it does.

    ``floor`` is a relative difference that is let through whatever the dtype.
    """
    with plain_region():
        actual = graph(*bound.tensors)
    if len(actual) != len(expected):
        return f"{len(actual)} output tensors instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != e.shape:
            return f"output {i} has shape {tuple(a.shape)} instead of {tuple(e.shape)}"
        if not e.is_floating_point() or not e.numel():
            continue
        tolerance = max(floor, 1e3 * torch.finfo(e.dtype).eps)
        gap, scale = _difference(a, e)
        if gap > tolerance * max(scale, 1e-30):
            return f"output {i} differs from the model's own by {gap:.2g} (largest value {scale:.2g})"
    return None


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest entry, of what is finite; piece by piece, since logits in
    float64 can be larger than the model.
    """
    gap = scale = 0.0
    pieces = zip(actual.reshape(-1).split(_PIECE), expected.reshape(-1).split(_PIECE), strict=True)
    for a, e in ((a.double(), e.double()) for a, e in pieces):
        gap = max(gap, (a - e).nan_to_num_(0.0, 0.0, 0.0).abs_().max().item())
        scale = max(scale, e.nan_to_num(0.0, 0.0, 0.0).abs_().max().item())
    return gap, scale


def compare_gradients(graph: fx.GraphModule, model: nn.Module, bound: Bound) -> str | None:
    """Why the captured graph does not have the model's gradient, or None where it does.

    A graph with the right output can have another gradient: an ``autograd.Function`` with a backward of its
    own, a no-grad region that was lost. Compared are the gradients of a fixed mixture of all outputs with
    respect to float inputs and to the tables in which ids are looked up; nothing is said about a model that
    autograd itself cannot differentiate.
    """
    found = candidates(graph.graph)
    looked_up = [arg(s.node, 0) for s in found if s.is_lookup]
    names = {str(table.target) for table in looked_up if table.op == "get_attr"}
    own = {id(t): name for name, t in model.named_parameters()}
    tables = {name: own[id(t)] for name in names if id(t := attrgetter(name)(graph)) in own}
    floats = [i for i, node in enumerate(placeholders(graph.graph)) if is_float(node)]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            expected, functions = _model_gradient(model, bound, floats, list(tables.values()))
    except Exception:  # the model's own autograd fails: there is nothing to compare with
        return None
    with plain_region(), torch.enable_grad():
        actual = _graph_gradient(graph, bound, floats, list(tables))
    labels = [bound.names[i] for i in floats] + list(tables.values())
    for label, a, e in zip(labels, actual, expected, strict=True):
        gap, scale = float((a - e).abs().max()), float(e.abs().max())
        if gap > _GRADIENT_TOLERANCE[8 * e.dtype.itemsize if not e.is_complex() else 32] * max(scale, 1e-20):
            named = ", ".join(f"autograd.Function {name}" for name in functions)
            return (
                f"its gradient with respect to '{label}' differs from the model's own by {gap:.2g} "
                f"(largest value {scale:.2g})" + (f", which passes through {named}" if named else "")
            )
    return None


def _model_gradient(
    model: nn.Module, bound: Bound, floats: Sequence[int], tables: Sequence[str]
) -> tuple[list[Tensor], list[str]]:
    """The gradients, and the names of the ``autograd.Function`` classes that they pass through."""
    tensors, leaves = _leaves(bound, floats)
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if name in tables}
    result, _ = flatten_output(_call(model, bound, tensors, weights))
    functions = sorted({name for output in result for name in _functions(output.grad_fn)})
    return _gradient(result, [*leaves, *(weights[name] for name in tables)]), functions


def _functions(last: Any) -> set[str]:
    found, seen, stack = set(), set(), [last]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(next_node for next_node, _ in node.next_functions)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
    return found


def _graph_gradient(
    graph: fx.GraphModule, bound: Bound, floats: Sequence[int], tables: Sequence[str]
) -> list[Tensor]:
    tensors, leaves = _leaves(bound, floats)
    weights = {name: attrgetter(name)(graph).detach().requires_grad_() for name in tables}
    same = {id(attrgetter(name)(graph)): leaf for name, leaf in weights.items()}

    class Replaced(fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            held = super().get_attr(target, args, kwargs)
            return same.get(id(held), held)

    return _gradient(Replaced(graph).run(*tensors), [*leaves, *weights.values()])


def _leaves(bound: Bound, floats: Sequence[int]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The inputs, with gradients asked of those at the given places; copies, as a model may write there."""
    leaves = {i: bound.tensors[i].detach().clone().requires_grad_() for i in floats}
    tensors = tuple(leaves[i].clone() if i in leaves else t.clone() for i, t in enumerate(bound.tensors))
    return tensors, list(leaves.values())


def _gradient(result: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = []
    for output in result:
        if output.requires_grad:
            flat = output.reshape(-1)
            mixture = torch.arange(flat.numel(), device=flat.device, dtype=torch.float32).cos().to(flat.dtype)
            part = (flat.nan_to_num(0.0, 0.0, 0.0) * mixture).sum()
            parts.append(part.abs() if part.is_complex() else part)
    if not parts or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    total = torch.stack([part.double() for part in parts]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [g.detach().nan_to_num(0.0, 0.0, 0.0) for g in found]
