"""Conditional relevance: the part of an explanation that passes chosen units of a latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.activity import Source, input_name
from ..compiler.capture import identifier
from ..compiler.graphs import is_op
from ..errors import InputError
from ..explainer import Explainer
from ..explanation import Explanation, Relevance, one_or_many
from ..maps import VJP
from ..memory import in_chunks

#: Steps between an input's ids and their lookup that leave every id in its place.
_IN_PLACE = ("to", "to_copy", "type_as", "long", "clone", "contiguous", "alias", "detach", "lift_fresh_copy")


@dataclass(frozen=True, eq=False)
class ConditionalExplanation:
    """Relevance of the inputs through chosen units of a latent.

    Of K targets, and then of each unit by itself, tensors have K and the number of units behind the batch:
    ``[batch, K, units, sequence]``.

    Attributes:
        relevance: as that of :class:`fxlrp.Explanation`.
        value: the relevance of the chosen units, ``[batch]``: what ``relevance`` sums to, less what is
            absorbed between the latent and the inputs.
        explanation: the explanation that this is a part of.
    """

    relevance: Relevance
    value: Tensor
    explanation: Explanation


def conditional(
    explainer: Explainer,
    latent: str,
    units: int | Sequence[int],
    *args: Any,
    target: Any = None,
    each: bool = False,
    dim: int = -1,
    **kwargs: Any,
) -> ConditionalExplanation:
    """Relevance of the inputs through chosen units of a latent only.

    With G the coefficient of the latent a and M the mask of the units, ``G_x = P(M * G)``, where P hands
    coefficients at the latent back to the inputs by the plan's rules: what goes round the latent (a residual
    connection beside it) is left out. P is linear, so the relevance of all units is the sum over units, and
    for a latent that all relevance passes it is the whole explanation.

    Args:
        explainer: compiled with the latent among its ``latents``.
        latent: a module path.
        units: indices in the latent's last dimension; negative ones count from the end.
        *args: the model's own.
        target: see :class:`fxlrp.Explainer`; may be several.
        each: explain each of the units by itself, all in one batched backward pass, in place of their sum.
        dim: the dimension of the latent, as in ``[batch, ...]``, that units are counted in: -1 for tokens, 1
            for the channels of a convolution.
        **kwargs: the model's own.

    Raises:
        InputError: the explainer does not know the latent, no relevance reaches it, or it has no such unit;
            the composite explains positions or has rules for the first layer.

    Source: Achtibat et al. 2023, From attribution maps to human-understandable explanations through Concept
    Relevance Propagation, with one condition.
    """
    if not explainer.latents:
        raise InputError(f"Name the latent when compiling: lrp_compile(model, latents=({latent!r},)).")
    explanation = explainer(*args, target=target, **kwargs)
    if explanation.positions:
        raise InputError(
            f"The composite '{explainer.composite.title}' explains positions beside the inputs; conditional "
            "relevance is for composites that explain inputs alone."
        )
    coefficient = latent_of(explanation.latent_coefficients, latent)
    several = explanation.value.dim() > 1
    rank = coefficient.dim() - several
    masks = _masks(units, coefficient, unit_dimension(dim, rank, latent) + several, each=each)
    masked = [coefficient * mask for mask in masks]
    lead = [explanation.value.shape[1:], masks.shape[:1] if each else ()]
    # One vector for each target and each unit, in this order.
    vectors = torch.stack(masked, 1 + several).flatten(1, 1 + several)
    sources = explainer.plan.sources
    _refuse_moved(sources)

    def run(start: int, stop: int) -> tuple[Tensor, ...]:
        found = explainer.vjp(
            latent,
            vectors[:, start:stop].transpose(0, 1),
            *args,
            wrt=[source.node.name for source in sources],
            **kwargs,
        )
        return tuple(_relevance(found, sources).values())

    relevance = in_chunks(run, vectors.shape[1], explainer.chunk)
    names = tuple(dict.fromkeys(input_name(source.input) for source in sources))
    own = (
        {} if isinstance(explanation.relevance, Tensor) else {identifier(n): n for n in explanation.relevance}
    )
    chosen = torch.stack([explanation.latents[latent] * mask for mask in masks], 1 + several)
    shape = (len(coefficient), *(size for part in lead for size in part))
    return ConditionalExplanation(
        one_or_many(
            tuple(own.get(name, name) for name in names),
            tuple(r.reshape(*shape, *r.shape[2:]) for r in relevance),
        ),
        chosen.reshape(*shape, -1).sum(-1),
        explanation,
    )


def latent_of(tensors: Mapping[str, Tensor], latent: str) -> Tensor:
    """The latent's own of an explanation's tensors by module path.

    Raises:
        InputError: it is not among them.
    """
    if latent not in tensors:
        raise InputError(
            f"The explanation has no latent {latent!r}: it is not among lrp_compile's latents=, or no "
            f"relevance reaches it. There are: {', '.join(map(repr, tensors)) or 'none'}."
        )
    return tensors[latent]


def unit_dimension(dim: int, rank: int, latent: str) -> int:
    """A dimension of a latent ``[batch, ...]`` counted from the start.

    Raises:
        InputError: there is no such dimension, or it is the batch.
    """
    if not -rank < dim < rank or dim == 0:
        raise InputError(
            f"dim={dim} holds no units of {latent!r}: it has {rank} dimensions, the first of them the batch."
        )
    return dim % rank


def unit_indices(units: int | Sequence[int], size: int) -> Tensor:
    """Indices of units as a LongTensor, counted from the start.

    Raises:
        InputError: none, no integers, or out of range.
    """
    found = [units] if isinstance(units, int) else list(units)
    if not found or not all(type(unit) is int and -size <= unit < size for unit in found):
        raise InputError(f"units are ints from 0 to {size - 1}, one at least; got {units!r}.")
    return torch.tensor([unit % size for unit in found])


def _masks(units: int | Sequence[int], like: Tensor, dim: int, *, each: bool) -> Tensor:
    """One mask for each unit, or one for all of them, that broadcasts to ``like``: ``[masks, 1, ..., 1]``."""
    index = unit_indices(units, like.shape[dim]).to(like.device)
    rows = torch.nn.functional.one_hot(index, like.shape[dim]).to(like.dtype)
    if not each:
        rows = rows.amax(0, keepdim=True)
    shape = [1] * like.dim()
    shape[dim] = like.shape[dim]
    return rows.reshape(len(rows), *shape)


def _relevance(found: VJP, sources: Sequence[Source]) -> dict[str, Tensor]:
    """Relevance ``[batch, vectors, ...]`` by input; several lookups of one input add up."""
    relevance: dict[str, Tensor] = {}
    for source in sources:
        at, name = source.node.name, input_name(source.input)
        product = (found.values[at] * found.coefficients[at]).transpose(0, 1)
        product = product.sum(-1) if source.is_lookup else product
        relevance[name] = relevance[name] + product if name in relevance else product
    return relevance


def _refuse_moved(sources: Sequence[Source]) -> None:
    for source in sources:
        if not all(is_op(step, *_IN_PLACE) for step in source.path):
            raise InputError(
                f"The model moves or computes with the ids in '{input_name(source.input)}' before it looks "
                "them up; conditional relevance is not sent back through that. Give embeddings as input."
            )
