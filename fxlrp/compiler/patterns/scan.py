"""Selective scans: which factors of a recurrence are its own parameters, and which one is its input.

A scan is ``h_t = exp(D_t A) h_{t-1} + D_t B_t u_t`` with the readout ``y_t = C_t h_t``. Decay, step size D, B
and C are computed from the same data as the input u; with them held fixed the scan is linear in u.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import Tensor, fx

from ...rules import kind_of
from ..graphs import contents, is_float, is_op, value, without_casts

_PRODUCTS = ("mul", "multiply")
_READOUTS = (*_PRODUCTS, "matmul", "mm", "bmm", "mv")


def scan_parameters(graph: fx.Graph, active: Container[object]) -> dict[fx.Node, frozenset[int]]:
    """For every product inside a scan the positions of the operands that are parameters of the scan.

    ``active`` are the nodes that carry relevance: a first state is none of them.

    Of the input's product ``D B u``, in any grouping, u is the factor that is no step size and does not vary
    along the dimension that the readout sums over. Scans in another form (in chunks, by associative scan, by
    einsum) are not found.
    """
    states = _states(graph, active)
    found: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        if is_op(node, *_READOUTS) and (read := _readout(node, states)):
            state, parameters, dim = read
            found[node] = parameters
            for product in _inputs(state, states):
                found.update(_of_input(product, value(state), dim, active))
    return found


def _states(graph: fx.Graph, active: Container[object]) -> dict[fx.Node, fx.Node]:
    """Each state with the summand that enters it."""
    states: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not is_op(node, "add") or len(node.args) < 2:
            continue
        for decayed, entering in (node.args[:2], node.args[1::-1]):
            if isinstance(entering, fx.Node) and _is_decayed(decayed, states, active):
                states[node] = entering
    return states


def _is_decayed(node: object, states: dict[fx.Node, fx.Node], active: Container[object]) -> bool:
    node = _moved_from(node)
    if not is_op(node, *_PRODUCTS):
        return False
    factors = [_moved_from(x) for x in node.args[:2]]  # type: ignore[attr-defined]
    return any(
        is_op(decay, "exp") and (state in states or state not in active)
        for decay, state in (factors, factors[::-1])
    )


def _readout(node: fx.Node, states: dict[fx.Node, fx.Node]) -> tuple[fx.Node, frozenset[int], int] | None:
    """The state that a node reads, the places of the other factors, and the dimension that is summed over."""
    operands = [_moved_from(x) for x in node.args[:2]]
    for i, (state, other) in enumerate((operands, operands[::-1])):
        if state not in states or not is_float(other) or is_op(other, "exp"):
            continue
        if not is_op(node, *_PRODUCTS):
            return state, frozenset({1 - i}), -1 if i == 0 else -2
        sums = [u for u in node.users if is_op(u, "sum") and len(u.args) > 1]
        if len(sums) == len(node.users) == 1:
            (dim,) = (
                dims if isinstance(dims := sums[0].args[1], (list, tuple)) and len(dims) == 1 else (dims,)
            )
            if isinstance(dim, int):
                return state, frozenset({1 - i}), dim if dim < 0 else dim - value(node).dim()
    return None


def _inputs(state: fx.Node, states: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """The products that enter a state and those before it."""
    seen: set[fx.Node] = set()
    stack = [state]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        entering = _moved_from(states[node])
        if isinstance(entering, fx.Node) and is_op(entering, *_PRODUCTS):
            yield entering
        decayed = next((x for x in node.args[:2] if x is not states[node]), None)
        for factor in getattr(_moved_from(decayed), "args", ())[:2]:
            earlier = _moved_from(factor)
            if isinstance(earlier, fx.Node) and earlier in states:
                stack.append(earlier)


def _of_input(
    product: fx.Node, state: Tensor, dim: int, active: Container[object]
) -> dict[fx.Node, frozenset[int]]:
    """Of a product of step size, B and u, in any order, the factors beside u: what does not hold it."""
    if str(value(product).shape[dim]) != str(state.shape[dim]):
        return {}
    holds = [_holds_input(x, dim, active) for x in product.args[:2]]
    if sum(holds) != 1:
        return {}
    at = holds.index(True)
    inner = _moved_from(product.args[at])
    deeper = (
        _of_input(inner, state, dim, active)
        if isinstance(inner, fx.Node) and is_op(inner, *_PRODUCTS)
        else {}
    )
    return {product: frozenset({1 - at}), **deeper}


def _holds_input(operand: object, dim: int, active: Container[object]) -> bool:
    """Whether an operand is u or a product with it: active, no step size, alike along the dimension."""
    inner = _moved_from(operand)
    if isinstance(inner, fx.Node) and is_op(inner, *_PRODUCTS) and _size(inner, dim) != 1:
        return any(_holds_input(x, dim, active) for x in inner.args[:2])
    return inner in active and _size(operand, dim) == 1 and not _is_step(inner, active)


def _is_step(node: object, active: Container[object]) -> bool:
    """Whether a factor comes straight from a softplus, an exponential or a sigmoid."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_op(node, "softplus", "exp", "sigmoid"):
            return True
        if kind_of(node.target) not in ("structural", "selection", "add", "product"):
            return False
        sources = [x for x in contents(node) if x in active]
        if len(sources) != 1:
            return False
        node = sources[0]
    return False


def _size(node: object, dim: int) -> object:
    tensor = value(node)
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.dim() >= -dim else 1


def _moved_from(node: object) -> object:
    """The node behind steps that move or cast its elements only."""
    while isinstance(node, fx.Node):
        inner = without_casts(node)
        sources = [x for x in contents(inner) if is_float(x)] if isinstance(inner, fx.Node) else []
        moves = (
            isinstance(inner, fx.Node)
            and inner.op == "call_function"
            and kind_of(inner.target) == "structural"
            and len(sources) == 1
            and not is_op(inner, "sum", "mean", "cumsum", "neg", "negative")
        )
        if not moves:
            return inner
        node = sources[0]
    return node
