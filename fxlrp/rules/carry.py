"""How relevance itself, not a coefficient, goes back through steps between the input and its first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .activation import op_name
from .base import Call, Cotangent, Linearization, Rule, vjp
from .stacked import vjp_many

_COPYING = """view reshape unsafe_view view_as reshape_as transpose permute t swapaxes movedim moveaxis
    unsqueeze squeeze expand expand_as broadcast_to contiguous clone alias slice select narrow split
    split_with_sizes chunk tensor_split unbind cat concat concatenate stack hstack vstack dstack flatten
    unflatten ravel repeat repeat_interleave tile roll flip rot90 gather index index_select take
    take_along_dim diagonal pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d masked_fill where tril triu dropout feature_dropout unfold im2col pixel_shuffle
    pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d select_index
    select_rows lift_fresh_copy positive numpy_T mT atleast_1d atleast_2d atleast_3d getitem"""
_SCALING = """add sub rsub subtract mul multiply div divide true_divide neg negative to to_copy type_as
    rad2deg"""
#: Steps whose outputs are copies of inputs' elements, or constants.
_MOVES: Final = frozenset(_COPYING.split())
#: Steps that shift or rescale each element of one operand by itself.
_RESCALES: Final = frozenset(_SCALING.split())


def carries_elements(op: Any, active: int) -> bool:
    """Whether each element of an op's output is one of its active operands', of which there are so many."""
    return op_name(op) in _MOVES or (op_name(op) in _RESCALES and active == 1)


@dataclass(frozen=True)
class Carry(Rule):
    """Relevance moves with its element; shifting or rescaling an element does not change its relevance.

    The pullback takes and returns relevance. For a step that moves elements it is the vector-Jacobian
    product of the step applied to the relevance itself; constants that the step mixes in (padding) keep
    theirs (``constant``). An operand that was broadcast gets the sum of its copies'.
    """

    direct: ClassVar[bool] = True

    def linearize(self, call: Call) -> Linearization:
        if op_name(call.op) in _MOVES:
            return vjp(call)
        (x,) = call.operands()
        return Linearization(call.run(), lambda relevance: (relevance.sum_to_size(x.shape).to(x.dtype),))

    def linearize_many(self, call: Call) -> Linearization:
        if op_name(call.op) in _MOVES:
            return vjp_many(call)
        (x,) = call.operands()

        def pullback(relevance: Cotangent) -> tuple[Tensor]:
            repeated = relevance.dim() - 1 - x.dim()
            summed = relevance.sum(tuple(range(1, 1 + repeated))) if repeated else relevance
            return (summed.sum_to_size((relevance.shape[0], *x.shape)).to(x.dtype),)

        return Linearization(call.run(), pullback)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        if op_name(call.op) not in _MOVES:
            return {}
        moved = call.with_active([torch.ones_like(x) for x in call.operands()]).run()
        fixed = call.with_active([torch.zeros_like(x) for x in call.operands()]).run()
        amount = torch.zeros((), dtype=torch.float64)
        for one, other, relevance in zip(
            *(pytree.tree_leaves(tree) for tree in (moved, fixed)),
            pytree.tree_leaves(cotangent, is_leaf=lambda leaf: leaf is None),
            strict=True,
        ):
            if relevance is not None:
                kept = torch.where(one - other == 0, relevance, 0.0).double().sum()
                amount = amount + kept.to(amount.device)
        return {"constant": amount}
