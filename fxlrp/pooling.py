"""From an encoder's output to one embedding per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .compiler.outputs import flatten_output
from .errors import InputError

#: What a pooling of one's own is: the encoder's output and the mask ``[batch, tokens]`` (None where there is
#: none) to embeddings ``[batch, size]``.
Pooling = Callable[[Any, Tensor | None], Tensor]


def _mean(kept: Tensor) -> Tensor:
    return kept / kept.sum(1, keepdim=True)


def _first(kept: Tensor) -> Tensor:
    return kept * (kept.cumsum(1) == 1)


def _last(kept: Tensor) -> Tensor:
    return _first(kept.flip(1)).flip(1)


#: Pooling by name: from a mask ``[batch, tokens]``, 0 at padding and 1 elsewhere, to the weight that each
#: token's vector has in the embedding. A weight depends on no token, so the pooling is linear.
POOLINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"mean": _mean, "cls": _first, "last": _last}
)


def as_pooling(pooling: Any) -> Pooling:
    """A pooling from its name or from itself.

    Raises:
        InputError: there is none of that name.
    """
    if callable(pooling):
        return pooling  # type: ignore[no-any-return]
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise InputError(
            f"There is no pooling {pooling!r}. There are {', '.join(POOLINGS)}, or a function of the "
            "encoder's output and the mask that returns [batch, size]."
        )
    return _Pool(POOLINGS[pooling])


class Projected(nn.Module):
    """Embedding and its product with a constant, ``[batch, size + 1]``: one graph explains both.

    The classes 0, ..., size - 1 are the embedding's components, the class ``size`` is the product.
    """

    def __init__(self, encoder: nn.Module, pool: Pooling, mask: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.mask = mask

    def embed(self, inputs: Mapping[str, Any]) -> Tensor:
        embedding = self.pool(self.encoder(**inputs), inputs.get(self.mask))
        if not isinstance(embedding, Tensor) or embedding.dim() != 2:
            got = tuple(embedding.shape) if isinstance(embedding, Tensor) else f"a {type(embedding).__name__}"
            raise InputError(f"A pooling returns embeddings [batch, size]; this one returned {got}.")
        return embedding

    def forward(self, direction: Tensor, **inputs: Any) -> Tensor:
        embedding = self.embed(inputs)
        product = (embedding * direction.detach()).sum(-1, keepdim=True)
        return torch.cat([embedding, product], -1)


@dataclass(frozen=True)
class _Pool:
    """A weighted sum of token vectors, with weights that are read off the mask alone."""

    weights: Callable[[Tensor], Tensor]

    def __call__(self, output: Any, mask: Tensor | None) -> Tensor:
        hidden = _sequence(output)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        if mask.shape != hidden.shape[:2]:
            raise InputError(
                f"The mask has shape {tuple(mask.shape)}, the encoder's vectors {tuple(hidden.shape)}: they "
                "do not fit. Give a pooling of your own, or name another mask=."
            )
        return torch.einsum("bt,bth->bh", self.weights((mask != 0).to(hidden.dtype)), hidden)


def _sequence(output: Any) -> Tensor:
    """The first floating point tensor ``[batch, tokens, size]`` of an output."""
    for tensor in flatten_output(output)[0]:
        if tensor.dim() == 3 and tensor.is_floating_point():
            return tensor
    raise InputError(
        f"The encoder's output ({type(output).__name__}) holds no vectors [batch, tokens, size] to pool. Say "
        "how it becomes an embedding: pooling=lambda output, mask: output.…"
    )
