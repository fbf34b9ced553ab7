"""Which ops a choice of positions moves past: a table op -> where the operands are chosen instead.

A row says, for a dimension d of an op's output, along which dimensions of which operands the same positions
have to be chosen so that ``op(x)[chosen along d] = op(x[chosen])``. Operands that it leaves out are read
whole, or do not have the dimension. No row, or None: the op mixes positions of d, and the choice stays behind
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.activation import RATIOS, op_name
from .graphs import arg, leaves, value

#: Leaf of ``(args, kwargs)`` -> the dimension of that operand to choose along.
Places = dict[int, int]
Row = Callable[[fx.Node, int], "Places | None"]

_POINTWISE = """add sub rsub mul multiply div divide true_divide neg negative pow sqrt rsqrt reciprocal square
    abs sign exp exp2 log log2 sigmoid softplus tanh cos sin clamp clamp_min clamp_max maximum minimum where
    masked_fill to to_copy type_as float dropout clone contiguous alias detach lift_fresh_copy nan_to_num
    eq ne lt le gt ge and or xor logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
    bitwise_xor bitwise_not normalize normalize_divide self_gate"""
#: Where these ops have the dimensions that they reduce.
_REDUCTIONS = {
    **dict.fromkeys(["mean", "sum", "amax", "amin", "logsumexp", "var", "std", "var_mean", "std_mean"], 1),
    "linalg_vector_norm": 2,
}
_CHOICES = "slice narrow index_select select_index"
_SPLITS = "split split_with_sizes chunk tensor_split"


def places(node: fx.Node, dim: int) -> Places | None:
    """Where a node's operands are chosen in place of dimension ``dim`` of its output; None for nowhere."""
    row = _ROWS.get(op_name(node.target))
    found = None if row is None else row(node, dim)
    return found or None  # what holds no positions of an operand is not worth a choice


def sized(node: fx.Node) -> int | None:
    """Which argument of a node lists the sizes of its output, if one does."""
    return 1 if op_name(node.target) in ("reshape", "view", "unsafe_view", "expand") else None


def tensor_of(node: Any) -> Tensor:
    """The fake tensor that a node computes; of several the first."""
    found: Tensor = next(x for x in pytree.tree_leaves(value(node)) if isinstance(x, Tensor))
    return found


def _rank(node: Any) -> int:
    return tensor_of(node).dim()


def same(first: Any, second: Any) -> bool:
    """Whether two sizes are the same, without asking, which would add conditions to the trace."""
    return str(first) == str(second)


def _broadcast(node: fx.Node, dim: int, among: Sequence[int] | None = None, to: int = 0) -> Places | None:
    """Operands that are aligned with the output from the last dimension on; ``to``: how many are left out
    there.
    """
    shape, found = tensor_of(node).shape, Places()
    for i, x in enumerate(leaves(node)):
        if not (isinstance(x, fx.Node) and isinstance(value(x), Tensor)) or (among and i not in among):
            continue
        place = dim - (len(shape) - _rank(x))
        if place < 0 or (same(value(x).shape[place], 1) and not same(shape[dim], 1)):
            continue
        if not same(value(x).shape[place], shape[dim]):
            return None
        found[i] = place
    return found


def _pointwise(node: fx.Node, dim: int) -> Places | None:
    return _broadcast(node, dim)


def _leading(node: fx.Node, dim: int) -> Places | None:
    """``linear``: all dimensions but the last."""
    return {0: dim} if dim < _rank(node) - 1 else None


def _normalized(node: fx.Node, dim: int) -> Places | None:
    return {0: dim} if dim < _rank(node) - len(arg(node, 1)) else None


def _matmul(node: fx.Node, dim: int) -> Places | None:
    """Rows of the first factor, columns of the second, matrices of both."""
    left, right = value(arg(node, 0)), value(arg(node, 1))
    rank = _rank(node)
    if left.dim() < 2 or right.dim() < 2:
        return None
    if dim == rank - 2:
        return {0: left.dim() - 2}
    return {1: right.dim() - 1} if dim == rank - 1 else _broadcast(node, dim)


def _addmm(node: fx.Node, dim: int) -> Places | None:
    summed = _broadcast(node, dim, among=(0,))
    return {**summed, 1: 0} if dim == 0 and summed is not None else None


def _attention(node: fx.Node, dim: int) -> Places | None:
    """Queries and their rows of the mask, for all keys and values; or samples."""
    query, key, _, mask, causal, _, _grouped = attention_operands(node)
    shape = value(node).shape
    if causal and (mask is not None or not same(value(query).shape[-2], value(key).shape[-2])):
        return None
    if dim == len(shape) - 2:
        rows = _broadcast(node, dim, among=(3,))
        return None if rows is None else {0: _rank(query) - 2, **rows}
    return _broadcast(node, dim, among=(0, 1, 2, 3)) if dim == 0 and len(shape) == 4 else None


def attention_operands(node: fx.Node) -> tuple[Any, ...]:
    """Query, key, value, mask, is_causal, scale, enable_gqa of a node that calls the attention op."""
    names = ("query", "key", "value", "mask", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given.get(name, False if name in ("is_causal", "enable_gqa") else None) for name in names)


def _softmax(node: fx.Node, dim: int) -> Places | None:
    return {0: dim} if dim != arg(node, 1) % _rank(node) else None


def _reduction(node: fx.Node, dim: int) -> Places | None:
    """Every dimension that is not reduced."""
    at, rank = _REDUCTIONS[op_name(node.target)], _rank(arg(node, 0))
    dims: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
    if dims is None or dims == []:
        return None
    reduced = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else (dims,))}
    if _rank(node) == rank:
        return {0: dim} if dim not in reduced else None
    return {0: [d for d in range(rank) if d not in reduced][dim]}


def _transpose(node: fx.Node, dim: int) -> Places | None:
    rank = _rank(node)
    given: Any = node.args[1:3] if len(node.args) > 2 else (0, rank - 1)
    first, second = (d % rank for d in given)
    return {0: {first: second, second: first}.get(dim, dim)}


def _permute(node: fx.Node, dim: int) -> Places | None:
    return {0: arg(node, 1)[dim] % _rank(node)}


def _unsqueeze(node: fx.Node, dim: int) -> Places | None:
    new = arg(node, 1) % _rank(node)
    return None if dim == new else {0: dim - (dim > new)}


def _squeeze(node: fx.Node, dim: int) -> Places | None:
    rank = _rank(arg(node, 0))
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if dims is None or _rank(node) == rank:
        return None
    gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else (dims,))}
    return {0: [d for d in range(rank) if d not in gone][dim]} if len(gone) == rank - _rank(node) else None


def _reshape(node: fx.Node, dim: int) -> Places | None:
    """A dimension that stays as it is: the same size behind as many elements."""
    old, new = value(arg(node, 0)).shape, value(node).shape
    before = math.prod(new[:dim])
    for place, size in enumerate(old):
        if same(size, new[dim]) and same(math.prod(old[:place]), before):
            return {0: place}
    return None


def _expand(node: fx.Node, dim: int) -> Places | None:
    return _broadcast(node, dim, among=(0,))


def _sliced(node: fx.Node, dim: int) -> Places | None:
    """A slice or split along another dimension."""
    own: Any = node.args[1] if op_name(node.target) in _CHOICES.split() else None
    if op_name(node.target) in _SPLITS.split():
        own = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    elif own is None:
        own = 0
    return {0: dim} if dim != own % _rank(node) else None


def _select(node: fx.Node, dim: int) -> Places | None:
    own = arg(node, 1) % _rank(arg(node, 0))
    return {0: dim + (dim >= own)}


def _cat(node: fx.Node, dim: int) -> Places | None:
    own: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [x for x in arg(node, 0) if isinstance(x, fx.Node)]
    if dim == own % _rank(node) or any(_rank(x) != _rank(node) for x in parts):
        return None
    return dict.fromkeys(range(len(parts)), dim)


def _stack(node: fx.Node, dim: int) -> Places | None:
    given: Any = node.args[1] if len(node.args) > 1 else 0
    own = given % _rank(node)
    return None if dim == own else dict.fromkeys(range(len(arg(node, 0))), dim - (dim > own))


_ROWS: Final[dict[str, Row]] = {
    **dict.fromkeys((*(set(RATIOS) - {"prelu"}), *_POINTWISE.split()), _pointwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("softmax", "log_softmax", "safe_softmax", "cumsum"), _softmax),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("reshape", "view", "unsafe_view", "flatten"), _reshape),
    **dict.fromkeys((*_CHOICES.split(), *_SPLITS.split()), _sliced),
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    "addmm": _addmm,
    "attention": _attention,
    "cat": _cat,
    "expand": _expand,
    "linear": _leading,
    "permute": _permute,
    "select": _select,
    "squeeze": _squeeze,
    "stack": _stack,
    "unsqueeze": _unsqueeze,
}
