"""Which operands of an affine op are its factors and which are added: for rules that look at single weights.

An op of the table computes ``z_j = sum_i x_i w_ij + b_j``, where each ``x_i w_ij`` is one product of an
entry of the active operand with one entry of a constant one. So ``op(|x|, |W|, |b|)`` is the sum of the
absolute values of all contributions, in one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .activation import op_name
from .base import Call

_LAYERS = """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    batch_norm"""
#: Op name -> its operands that are multiplied, its operands that are added; by the names of its schema.
_ROWS: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(_LAYERS.split(), ("input weight", "bias")),
    **dict.fromkeys(("matmul", "inner", "kron", "tensordot"), ("self other", "")),
    **dict.fromkeys(("mm", "bmm"), ("self mat2", "")),
    **dict.fromkeys(("outer", "ger"), ("self vec2", "")),
    "mv": ("self vec", ""),
    "dot": ("self tensor", ""),
    "einsum": ("tensors", ""),
    "addmm": ("mat1 mat2 alpha", "self beta"),
    "addbmm": ("batch1 batch2 alpha", "self beta"),
    "addmv": ("mat vec alpha", "self beta"),
    "grouped_mm": ("self mat2", "bias"),
    "grouped_mm_fallback": ("input weight", ""),
}

#: What becomes of a tensor or a number.
Change = Callable[[Any], Any]


def refusal(call: Call) -> str | None:
    """Why contributions of single weights cannot be told apart in a call, or None."""
    name = op_name(call.op)
    if name not in _ROWS or not hasattr(call.op, "_schema"):
        return f"it needs an op's weights and bias, and fxlrp/rules/affine.py has no row for '{name}'"
    if len(call.active) != 1:
        return "several of the op's operands carry relevance"
    if _owners(call)[call.active[0]] not in _ROWS[name][0].split():
        return "what carries relevance is added by the op and not multiplied with weights"
    if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in call.leaves()):
        return "complex numbers have no sign"
    if name == "batch_norm" and call.args[5]:
        return "a batch norm in training mode is not affine; call model.eval()"
    if name == "einsum" and _sums_constants(call):
        return "the einsum sums over an index that only constants have, so that weights are sums themselves"
    return None


def magnitude(call: Call) -> Call:
    """``op(|x|, |W|, |b|)``."""
    return changed(call, abs, abs, abs)


def changed(call: Call, active: Change, weights: Change, added: Change) -> Call:
    """The same op on changed operands.

    Args:
        call: a call that :func:`refusal` has nothing against.
        active: what becomes of the active operand.
        weights: what becomes of what it is multiplied with, numbers such as ``alpha`` included.
        added: what becomes of what is added.
    """
    if op_name(call.op) == "batch_norm":
        call = _centred(call)
    factors, addends = (names.split() for names in _ROWS[op_name(call.op)])
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    for i, (leaf, owner) in enumerate(zip(leaves, _owners(call), strict=True)):
        if leaf is None:
            continue
        if i in call.active:
            leaves[i] = active(leaf)
        elif owner in factors:
            leaves[i] = weights(leaf)
        elif owner in addends:
            leaves[i] = added(leaf)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return Call(call.op, args, kwargs, call.active)


def same(leaf: Any) -> Any:
    """Unchanged."""
    return leaf


def square(leaf: Any) -> Any:
    """Squared."""
    return leaf * leaf


def ones(leaf: Any) -> Any:
    """Ones in place of a tensor's elements; numbers cancel where ones are used, and stay."""
    return torch.ones_like(leaf) if isinstance(leaf, Tensor) else leaf


def zeros(leaf: Any) -> Any:
    """Zeros in place of a tensor's elements; numbers multiply those."""
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def _owners(call: Call) -> list[str]:
    """The argument that each leaf belongs to, by the name that the op's schema has for it."""
    names = [argument.name for argument in call.op._schema.arguments]  # type: ignore[attr-defined]
    given = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return [name for name, operand in given for _ in pytree.tree_leaves(operand)]


def _centred(call: Call) -> Call:
    """A batch norm with its running mean taken into its bias, so that what it adds is one operand."""
    x, weight, bias, mean, variance, *rest = call.args
    weight = torch.ones_like(variance) if weight is None else weight
    shift = mean * weight * torch.rsqrt(variance + rest[2])
    bias = -shift if bias is None else bias - shift
    return Call(call.op, (x, weight, bias, torch.zeros_like(mean), variance, *rest), call.kwargs, call.active)


def _sums_constants(call: Call) -> bool:
    """Whether an einsum sums over an index of constants that the active operand does not have."""
    equation = call.args[0].replace(" ", "").replace("...", ".")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation:
        right = "".join(i for i, n in Counter(left.replace(",", "")).items() if n == 1 or i == ".")
    kept = set(right) | set(terms[call.active[0] - 1])
    return any(set(term) - kept for term in terms)
