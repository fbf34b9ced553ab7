"""What it costs to compute a node once more, in bytes that are moved: decisions need orders of magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.activation import op_name
from .graphs import arg, is_op, value
from .liveness import Sizes

#: Arithmetic of matrix products that takes as long as moving one byte.
_FLOPS_PER_BYTE = 10
#: What starting an op takes, in bytes that are moved in that time.
_START = 2**16
#: An op that nothing is known of counts as so many pointwise ones.
_UNKNOWN = 100

#: Ops that only move elements or make tensors of constants; pointwise ones carry a tag that says so.
_MOVES = frozenset(
    [
        "cat",
        "stack",
        "reshape",
        "flatten",
        "unflatten",
        "contiguous",
        "clone",
        "to",
        "to_copy",
        "type_as",
        "expand_copy",
        "repeat",
        "roll",
        "flip",
        "embedding",
        "index",
        "index_select",
        "gather",
        "slice_scatter",
        "select_scatter",
        "constant_pad_nd",
        "pad",
        "arange",
        "full",
        "full_like",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "new_ones",
        "new_zeros",
        "new_full",
        "scalar_tensor",
        "lift_fresh_copy",
        "normalize",
        "normalize_divide",
        "self_gate",
        "silu",
        "gelu",
        "sigmoid",
        "tanh",
        "relu",
        "softplus",
        "where",
        "masked_fill",
        "tril",
        "triu",
        "masked_fill",
        "type_as",
        "one_hot",
    ]
)
#: Ops that add up rows as they read them.
_REDUCES = frozenset(
    ["sum", "mean", "amax", "amin", "var", "std", "linalg_vector_norm", "any", "all", "cumsum"]
)
_PRODUCTS = frozenset(["linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "inner", "einsum"])
_RANDOM = ("rand", "bernoulli", "dropout", "normal_", "multinomial", "empty", "rrelu", "poisson")


def may_repeat(node: fx.Node) -> bool:
    """Whether a node computes the same every time: neither random nor with effects of its own."""
    if node.op != "call_function" or op_name(node.target).startswith(_RANDOM) or is_op(node, "normal"):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _dropout(node) != 0:
        return False  # fused attention carries the tag for its dropout
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


def _dropout(node: fx.Node) -> Any:
    """An op's share of elements that it drops; None where it has no such argument."""
    op: Any = node.target
    for i, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p")
            return argument.default_value if given is None else given
    return None


def is_cheap(node: fx.Node) -> bool:
    """Whether a node only reads and writes its operands once: pointwise, a view, a copy, a cast."""
    name = op_name(node.target)
    tags: Any = getattr(node.target, "tags", ())
    return name in _MOVES or name in _REDUCES or torch.Tag.pointwise in tags or name == "getitem"


def cost(node: fx.Node, sizes: Sizes) -> int:
    """Bytes that could be moved while a node is computed."""
    if not isinstance(value(node), (Tensor, tuple, list)) or sizes.is_alias(node):
        return 0
    moved = sizes.bytes(node) + _START
    if op_name(node.target) not in ("embedding", "index", "index_select", "select_index", "gather"):
        moved += sum(map(sizes.bytes, node.all_input_nodes))
    if is_cheap(node):
        return moved
    arithmetic = _arithmetic(node, sizes)
    return moved * _UNKNOWN if arithmetic is None else moved + arithmetic // _FLOPS_PER_BYTE


def _arithmetic(node: fx.Node, sizes: Sizes) -> int | None:
    """Multiplications and additions of a product, a convolution or attention."""
    name = op_name(node.target)
    tensors = [v for v in map(value, node.all_input_nodes) if isinstance(v, Tensor) and v.dim()]
    results = [v for v in pytree.tree_leaves(value(node)) if isinstance(v, Tensor)]
    if not results:
        return None
    if name in _PRODUCTS and len(tensors) >= 2:
        left = tensors[1] if name in ("addmm", "baddbmm") else tensors[0]
        return 2 * sizes.elements(results[0]) * sizes.number(left.shape[-1])
    if name.startswith("conv") and len(tensors) >= 2:
        weight = value(arg(node, 1))
        return (
            2 * sizes.elements(results[0]) * sizes.elements(weight) // max(1, sizes.number(weight.shape[0]))
        )
    if "attention" in name and len(tensors) >= 2 and tensors[1].dim() >= 2:
        return 4 * sizes.elements(results[0]) * sizes.number(tensors[1].shape[-2])
    return None
