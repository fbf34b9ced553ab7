"""Several targets at once, as a relevance graph takes them: tensors with K behind the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .compiler.demand import last_unpadded
from .errors import TargetError
from .targets import (
    Logit,
    LogitDifference,
    LogProb,
    Predicted,
    Several,
    Span,
    Target,
    TopK,
    checked,
    refuse_padding,
)

#: Kinds of targets that are all that their indices say: one of a kind scores for all of that kind.
_ALIKE = (Predicted, Logit, LogitDifference, LogProb, TopK)


@dataclass(frozen=True, eq=False)
class Bundle:
    """K targets per sample.

    Attributes:
        kinds: what scores them: one target for all, or one for each.
        position: LongTensor ``[batch, K]``, or ``[batch]`` where all read the same row; None for the last
            that is not padding.
        fields: their indices, LongTensors ``[batch, K]`` (zeros where a kind has fewer than others), one at
            least.
    """

    kinds: tuple[Target, ...]
    position: Tensor | None
    fields: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """K."""
        return int(self.fields[0].shape[1])

    @property
    def own_rows(self) -> bool:
        """Whether each target reads a row of its own."""
        return self.position is not None and self.position.dim() > 1

    @property
    def is_mixed(self) -> bool:
        """Whether the targets differ in kind, so that a program serves this number of them only."""
        return len(self.kinds) > 1

    @property
    def key(self) -> Any:
        """What a relevance graph is specialised on."""
        rows = None if self.position is None else self.position.dim()
        return "many", tuple(type(kind).__name__ for kind in self.kinds), len(self.fields), rows

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What the relevance graph takes: the position, which chooses rows, comes first."""
        return (*(() if self.position is None else (self.position,)), *self.fields)

    def part(self, start: int, stop: int) -> Bundle:
        """Those from ``start`` to ``stop``, which is left out."""
        if (start, stop) == (0, self.count):
            return self
        position = self.position
        if position is not None and self.own_rows:
            position = position[:, start:stop]
        return replace(
            self,
            kinds=self.kinds[start:stop] if self.is_mixed else self.kinds,
            position=position,
            fields=tuple(field[:, start:stop] for field in self.fields),
        )

    def score(self, logits: Tensor, fields: Sequence[Tensor]) -> Tensor:
        """Explained scalars ``[batch, K]`` of logits ``[batch, K, classes]``."""
        if not self.is_mixed:
            return self.kinds[0].score_many(logits, fields)
        scores = [
            kind.score(logits[:, j], [field[:, j] for field in fields[: len(kind.indices)]])
            for j, kind in enumerate(self.kinds)
        ]
        return torch.stack(scores, 1)


def bundle(
    target: Target, shape: Sequence[int], device: torch.device, mask: Tensor | None, ids: Tensor | None
) -> Bundle:
    """Several targets, checked against logits of this shape.

    Args:
        target: what asks for several.
        shape: ``[batch, classes]`` or ``[batch, sequence, classes]``.
        device: where the tensors go.
        mask: ``[batch, sequence]``, nonzero where there is no padding, or None.
        ids: ``[batch, sequence]``, the tokens that a span names, or None where there are none.

    Raises:
        TargetError: out of range, of the wrong shape, or on a padded position.
    """
    batch, classes = shape[0], shape[-1]
    if isinstance(target, Span):
        target = _of_span(target, shape, mask, ids)
    members = target.targets if isinstance(target, Several) else (target,)
    count = len(members) if isinstance(target, Several) else _count(target)
    alike = all(type(m) is type(members[0]) for m in members) and isinstance(members[0], _ALIKE)
    if isinstance(target, TopK):
        if target.k > classes:
            raise TargetError(f"TopK({target.k}): the output has {classes} classes.")
        fields = [torch.arange(target.k, device=device).expand(batch, -1)]
    elif isinstance(target, Several):
        fields = _side_by_side(members, batch, classes, device)
    else:
        fields = [
            checked(name, getattr(target, name), batch, classes, "classes", device, count)
            for name in target.indices
        ] or [torch.zeros(batch, count, dtype=torch.long, device=device)]
    position = _positions(members, shape, device, mask, count)
    if position is not None and mask is not None and mask.shape == (batch, shape[1]):
        refuse_padding(position, mask.to(device))
    return Bundle(members[:1] if alike or len(members) == 1 else members, position, tuple(fields))


def _count(target: Target) -> int:
    if isinstance(target, TopK):
        return target.k
    given = [getattr(target, name, None) for name in (*target.indices, "position")]
    return next(int(v.shape[1]) for v in given if isinstance(v, Tensor) and v.dim() > 1)


def _side_by_side(members: Sequence[Target], batch: int, classes: int, device: torch.device) -> list[Tensor]:
    """The members' indices as columns, zeros where one has fewer of them than another."""
    none = torch.zeros(batch, dtype=torch.long, device=device)
    columns = [
        [checked(name, getattr(m, name), batch, classes, "classes", device) for name in m.indices]
        for m in members
    ]
    width = max(1, *map(len, columns))
    return [torch.stack([c[i] if i < len(c) else none for c in columns], 1) for i in range(width)]


def _positions(
    members: Sequence[Target], shape: Sequence[int], device: torch.device, mask: Tensor | None, count: int
) -> Tensor | None:
    """Where the targets read, ``[batch, K]``; ``[batch]`` where it is one row, None for the last."""
    given = [getattr(member, "position", None) for member in members]
    if all(position is None for position in given):
        return None  # the graph finds the last row itself
    if len(shape) < 3:
        raise TargetError(
            f"The output has shape {tuple(shape)}: it has no positions, so position= does not apply."
        )
    batch, length = shape[:2]
    if len(members) == 1:
        position: Any = given[0]
        if not (isinstance(position, Tensor) and position.dim() > 1):
            return checked("position", position, batch, length, "positions", device)
        found = checked("position", position, batch, length, "positions", device, count)
    else:
        last = torch.full((batch,), length - 1, device=device)
        if mask is not None and mask.shape == (batch, length):
            last = last_unpadded(mask.to(device))
        found = torch.stack(
            [
                last if p is None else checked("position", p, batch, length, "positions", device)
                for p in given
            ],
            1,
        )
    return found[:, 0] if bool((found == found[:, :1]).all()) else found


def _of_span(span: Span, shape: Sequence[int], mask: Tensor | None, ids: Tensor | None) -> Target:
    """The tokens of a span as classes at the positions that predict them."""
    if len(shape) < 3:
        raise TargetError(f"The output has shape {tuple(shape)}: a span needs [batch, sequence, vocabulary].")
    if ids is None:
        raise TargetError(
            "A span names tokens of the input ids, and no ids that are looked up have the output's length "
            f"{shape[1]}. Name them yourself: Logit(LongTensor [batch, K], position=LongTensor [batch, K])."
        )
    if span.end > shape[1]:
        raise TargetError(
            f"Span({span.start}, {span.end}) ends behind the input: it has {shape[1]} positions, so end is "
            f"{shape[1]} at most."
        )
    tokens = torch.arange(span.start, span.end, device=ids.device).expand(len(ids), -1)
    if mask is not None and mask.shape == tuple(shape[:2]):
        refuse_padding(tokens, mask.to(ids.device))
    kind = LogProb if span.log_prob else Logit
    return kind(ids.gather(1, tokens), position=tokens - 1)
