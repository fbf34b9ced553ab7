"""The ordinary pullback of K coefficients at once, with sizes that may stay symbols.

``torch.vmap`` over a pullback does this for most ops. Some batching rules of PyTorch's for *derivatives* read
sizes as integers, which would fix every size of a trace; for these ops K copies of the operands (views, not
memory) go through the op itself, and autograd gives the pullback of that. Their forward values are not used,
so nothing but the pullback is computed when the graph runs, except derivatives that depend on the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .activation import op_name
from .base import Call, Cotangent, Linearization, many, pulled, vjp

#: The op on operands ``[K, *shape]`` in place of the active ones.
_Stacked = Callable[..., Any]


def vjp_many(call: Call) -> Linearization:
    """The ordinary vector-Jacobian product of an op for K coefficients, ``[K, *shape]`` in and out."""
    form = _FORMS.get(op_name(call.op))
    stacked = None if form is None else form(call)
    if stacked is None:
        step = vjp(call)
        return Linearization(step.output, many(step.pullback))

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        count = next(g.shape[0] for g in pytree.tree_leaves(cotangent) if isinstance(g, Tensor))
        # Laid out anew, since an expanded view of odd strides asks for conditions on sizes.
        rows = [x.clone(memory_format=torch.contiguous_format) for x in call.operands()]
        copies = [x.expand(count, *x.shape).detach().requires_grad_(True) for x in rows]
        with torch.enable_grad():
            outputs = pytree.tree_leaves(stacked(*copies))
        return pulled(outputs, copies, cotangent)

    return Linearization(call.run(), pullback)


def _vmapped(call: Call) -> _Stacked:
    """For ops whose derivative's batching rule reads sizes, and whose own does not."""
    return torch.vmap(lambda *operands: call.with_active(operands).run())


def _as_it_is(call: Call) -> _Stacked:
    """For ops that take any number of leading dimensions."""
    return lambda *operands: call.with_active(operands).run()


def _folded(call: Call) -> _Stacked | None:
    """For ops of a batch of independent samples: K times as many of them."""
    name, x = op_name(call.op), call.leaves()[0]
    if call.active != (0,) or (name[-2:] in _SPATIAL and x.dim() != _SPATIAL[name[-2:]]):
        return None

    def run(copies: Tensor) -> Tensor:
        folded: Tensor = call.with_active([copies.flatten(0, 1)]).run()
        result: Tensor = folded.unflatten(0, copies.shape[:2])
        return result

    return run


def _indexed(call: Call) -> _Stacked | None:
    """For indexing: the same indices behind a first dimension that is kept whole."""
    indices = list(call.args[1])
    given = [i for i, index in enumerate(indices) if index is not None]
    if call.active != (0,) or given != list(range(given[0], given[-1] + 1)):
        return None  # indices that lie apart put what they choose first
    return lambda copies: call.op(copies, [None, *indices])


def _grouped(call: Call) -> _Stacked | None:
    """For matrix products of rows in groups, one matrix each: K rows in place of each row."""
    if call.active != (0,) or len(call.args) != 3 or call.args[0].dim() != 2 or call.args[1].dim() != 3:
        return None
    _, matrices, ends = call.args

    def run(copies: Tensor) -> Tensor:
        count = copies.shape[0]
        rows: Tensor = call.op(copies.transpose(0, 1).flatten(0, 1), matrices, ends * count, **call.kwargs)
        result: Tensor = rows.unflatten(0, (-1, count)).transpose(0, 1)
        return result

    return run


def _along(*places: int) -> Callable[[Call], _Stacked | None]:
    """For ops along the dimension that is their second operand; ``places``: of operands to be copied."""

    def form(call: Call) -> _Stacked | None:
        if not set(call.active) <= set(places) or not isinstance(call.args[1], int):
            return None

        def run(*operands: Tensor) -> Any:
            given = dict(zip(call.active, operands, strict=True))
            count = operands[0].shape[0]
            args = list(call.args)
            args[1] = args[1] + 1 if args[1] >= 0 else args[1]
            for i in places:
                if isinstance(args[i], Tensor):
                    args[i] = given[i] if i in given else args[i].expand(count, *args[i].shape)
            return call.op(*args, **call.kwargs)

        return run

    return form


#: Dimensions of an operand with a batch, by the end of an op's name.
_SPATIAL = {"1d": 3, "2d": 4, "3d": 5}

_VIEWS = "slice select narrow chunk split split_with_sizes tensor_split diagonal unfold"
_CHOICES = "max min topk sort median kthvalue cummax cummin"
_LEADING = "gelu mish layer_norm rms_norm"
_BATCHES = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution group_norm
    batch_norm native_batch_norm_legit_no_training cudnn_batch_norm avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d"""

#: How K coefficients go through ops whose derivative cannot be batched for symbolic sizes.
_FORMS: dict[str, Callable[[Call], _Stacked | None]] = {
    **dict.fromkeys((*_VIEWS.split(), *_CHOICES.split()), _vmapped),
    **dict.fromkeys(_LEADING.split(), _as_it_is),
    **dict.fromkeys(_BATCHES.split(), _folded),
    **dict.fromkeys(("grouped_mm", "grouped_mm_fallback"), _grouped),
    "index": _indexed,
    "gather": _along(0, 2),
    "take_along_dim": _along(0, 2),
    "index_select": _along(0),
    "select_index": _along(0),
    "scatter": _along(0, 2, 3),
    "scatter_add": _along(0, 2, 3),
    "index_add": _along(0, 3),
    "index_copy": _along(0, 3),
}
