"""Targets: which scalar of the model's output is explained."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import TargetError

Index = int | Tensor


@dataclass(frozen=True, eq=False)
class Target(abc.ABC):
    """A scalar per sample of logits ``[batch, classes]`` or, at one position, ``[batch, sequence, vocab]``.

    Indices and positions may be LongTensors ``[batch, K]``: K targets per sample, which share one forward and
    one backward pass.

    Attributes:
        position: for sequence outputs, the position whose logits are read: an int (negative counts from the
            end) or a LongTensor ``[batch]``; None for the last one that is not padding.
    """

    #: Fields that hold class indices, in the order in which ``score`` takes them.
    indices: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> Any:
        """What a relevance graph is specialised on; indices and positions are its inputs."""
        return type(self).__name__, getattr(self, "position", None) is not None

    @abc.abstractmethod
    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        """Explained scalars ``[batch]`` of logits ``[batch, classes]``, indices LongTensors ``[batch]``."""

    def score_many(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        """Scalars ``[batch, K]`` of logits ``[batch, K, classes]`` and indices ``[batch, K]``."""
        count = logits.shape[0] * logits.shape[1]
        flat = logits.reshape(count, logits.shape[-1])
        return self.score(flat, [i.reshape(count) for i in indices]).reshape(logits.shape[:2])


@dataclass(frozen=True, eq=False)
class Predicted(Target):
    """The predicted class: the largest logit at the given or last unpadded position. The default target."""

    position: Index | None = None

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        return logits.gather(-1, logits.detach().argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class Logit(Target):
    """The logit of a class or token.

    Attributes:
        index: class or token: an int for all samples, or a LongTensor ``[batch]``.
        position: see :class:`Target`.
    """

    index: Index
    position: Index | None = None
    indices: ClassVar[tuple[str, ...]] = ("index",)

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        return logits.gather(-1, indices[0].unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class LogProb(Logit):
    """The log-probability ``z_c - log(sum_j exp(z_j))`` of class c.

    The explanation starts at its gradient ``1[j = c] - softmax(z)_j`` in the logits. It is no linear function
    of them: what its first-order step leaves over, ``F - sum(z * dF/dz)``, is booked as ``target``.
    """

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        return super().score(logits.log_softmax(-1), indices)


@dataclass(frozen=True, eq=False)
class LogitDifference(Target):
    """Contrastive: the logit of ``index`` minus that of ``other``, why this and not that."""

    index: Index
    other: Index
    position: Index | None = None
    indices: ClassVar[tuple[str, ...]] = ("index", "other")

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        first, second = (logits.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in indices)
        return first - second


@dataclass(frozen=True, eq=False)
class TopK(Target):
    """The k largest logits of each sample, the largest first; of equal ones the lower class first.

    Attributes:
        k: how many.
        position: see :class:`Target`.
    """

    k: int
    position: Index | None = None

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise TargetError(f"TopK(k): k is an int of 1 or more, not {_kind(self.k)}.")

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        return logits.gather(-1, _ranked(logits).gather(-1, indices[0].unsqueeze(-1))).squeeze(-1)

    def score_many(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        # All k read the same row: it is sorted once.
        classes = _ranked(logits[:, 0]).gather(-1, indices[0])
        return logits.gather(-1, classes.unsqueeze(-1)).squeeze(-1)


def _ranked(logits: Tensor) -> Tensor:
    return logits.detach().sort(dim=-1, descending=True, stable=True).indices


@dataclass(frozen=True, eq=False)
class Span(Target):
    """Every token of the positions start, ..., end - 1 of a causal language model's own input ids.

    Target j explains the logit of ``ids[start + j]`` at position ``start + j - 1``, which predicts it
    (teacher forcing). All share one forward and one backward pass.

    Attributes:
        start: the first token, 1 or more: nothing predicts the token at 0.
        end: behind the last token.
        log_prob: explain log-probabilities in place of logits.
    """

    start: int
    end: int
    log_prob: bool = False

    def __post_init__(self) -> None:
        if type(self.start) is not int or type(self.end) is not int:
            raise TargetError(f"Span(start, end) takes ints, not {_kind(self.start)} and {_kind(self.end)}.")
        if self.start < 1:
            raise TargetError(
                f"Span({self.start}, {self.end}) starts too early: no position predicts the token at 0, so "
                "start is 1 or more (negative positions are not counted from the end)."
            )
        if self.end <= self.start:
            raise TargetError(
                f"Span({self.start}, {self.end}) is empty: end, which is not part of it, must be at least "
                f"start + 1 = {self.start + 1}."
            )

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError("a span becomes logits of the tokens in it")


@dataclass(frozen=True, eq=False)
class Function(Target):
    """Any function of the model's own output to one scalar per sample.

    It is traced into the relevance graph and differentiated as it is: what a nonlinear function leaves over
    (``F`` minus the sum of output times gradient) shows in the ledger as ``target``.
    """

    function: Callable[[Any], Tensor]

    @property
    def key(self) -> Any:
        return "Function", self.function, _read_by(self.function)

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError("a function of the whole output reads no logits")


@dataclass(frozen=True, eq=False)
class Several(Target):
    """What a list of targets becomes: each explained by itself, of one forward and one backward pass.

    Attributes:
        targets: one target per sample each, of kinds that read logits; they may differ in kind and position.
    """

    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        if not self.targets:
            raise TargetError("The list of targets is empty: name at least one, or leave target out.")
        for target in self.targets:
            if isinstance(target, Function) or is_several(target):
                raise TargetError(
                    "A list of targets takes classes and target objects of one scalar per sample (Logit, "
                    f"LogitDifference, LogProb, Predicted); got {_kind(target)}. Explain functions, Span, "
                    "TopK and LongTensors [batch, K] by themselves."
                )

    def score(self, logits: Tensor, indices: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError("each of several targets has its own score")


def is_several(target: Target) -> bool:
    """Whether a target asks for several scalars per sample."""
    if isinstance(target, (Several, Span, TopK)):
        return True
    names = (*target.indices, "position")
    return any(isinstance(v := getattr(target, n, None), Tensor) and v.dim() > 1 for n in names)


def as_target(target: Any) -> Target:
    """A target of what users write: None, an int, a LongTensor of classes, a Target, a function of outputs,
    or a list of several targets.

    Raises:
        TargetError: anything else.
    """
    if target is None:
        return Predicted()
    if isinstance(target, Target):
        return target
    if isinstance(target, bool) or (
        isinstance(target, Tensor)
        and (target.is_floating_point() or target.is_complex() or target.dtype is torch.bool)
    ):
        raise TargetError(
            f"A target's class is an int or a LongTensor [batch] or [batch, K], not {_kind(target)}."
        )
    if isinstance(target, (int, Tensor)):
        return Logit(target)
    if isinstance(target, (list, tuple)):
        return Several(tuple(map(as_target, target)))
    if callable(target):
        return Function(target)
    raise TargetError(
        "A target is None (the predicted class), an int, a LongTensor [batch] or [batch, K], a target object "
        f"as fxlrp.Logit, a list of these, or a function of the model's output; got {_kind(target)}."
    )


def resolve(
    target: Target, shape: Sequence[int], device: torch.device, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Position and indices of a target as LongTensors ``[batch]``, checked against logits of this shape.

    In the order in which the relevance graph takes them: the position, which chooses rows, comes first.

    Args:
        target: the target.
        shape: ``[batch, classes]`` or ``[batch, sequence, classes]``.
        device: where the tensors go.
        mask: ``[batch, sequence]``, nonzero where there is no padding, or None.

    Raises:
        TargetError: out of range, of the wrong shape, or on a padded position.
    """
    batch, classes = shape[0], shape[-1]
    values = [
        checked(name, getattr(target, name), batch, classes, "classes", device) for name in target.indices
    ]
    position = getattr(target, "position", None)
    if position is not None:
        if len(shape) < 3:
            raise TargetError(
                f"The output has shape {tuple(shape)}: it has no positions, so position={position!r} "
                "does not apply."
            )
        chosen = checked("position", position, batch, shape[1], "positions", device)
        values.insert(0, chosen)
        if mask is not None and mask.shape == (batch, shape[1]):
            refuse_padding(chosen, mask.to(device))
    return tuple(values)


def refuse_padding(positions: Tensor, mask: Tensor) -> None:
    """Refuse positions ``[batch]`` or ``[batch, K]`` where the mask ``[batch, sequence]`` is 0.

    Raises:
        TargetError: with the first of them.
    """
    chosen = positions.reshape(len(positions), -1)
    padded = mask.gather(1, chosen) == 0
    if bool(padded.any()):
        row, column = padded.nonzero()[0].tolist()
        raise TargetError(
            f"Position {chosen[row, column].item()} of row {row} is padding; choose one where "
            "attention_mask is 1."
        )


def operand_tensors(target: Target, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """:func:`resolve` without its checks, for use inside ``torch.compile``; negative indices not allowed."""
    names = (("position",) if getattr(target, "position", None) is not None else ()) + target.indices
    values = [getattr(target, name) for name in names]
    return tuple(
        value if isinstance(value, Tensor) else torch.full((batch,), value, device=device) for value in values
    )


def checked(
    name: str,
    value: Index,
    batch: int,
    size: int,
    what: str,
    device: torch.device,
    count: int | None = None,
) -> Tensor:
    """A target's index or position as a LongTensor ``[batch]`` or ``[batch, count]``, counted from the start.

    Raises:
        TargetError: no integers, another shape, or out of range.
    """
    tensor = torch.as_tensor(value, device=device)
    if tensor.is_floating_point() or tensor.dtype is torch.bool or tensor.is_complex():
        raise TargetError(f"The target's {name} must be an int or a LongTensor [batch], not {tensor.dtype}.")
    shape = (batch,) if count is None else (batch, count)
    if tensor.dim() == 0:
        tensor = tensor.expand(shape)
    elif tensor.shape == (batch,) and count is not None:
        tensor = tensor.unsqueeze(1).expand(shape)
    if tensor.shape != shape:
        raise TargetError(
            f"The target's {name} has shape {tuple(tensor.shape)}; it is one per sample, so an int or shape "
            f"({batch},), or ({batch}, {'K' if count is None else count}) for several targets per sample."
        )
    if bool(((tensor < -size) | (tensor >= size)).any()):
        wrong = tensor[(tensor < -size) | (tensor >= size)][0].item()
        raise TargetError(f"The target's {name} {wrong} is out of range: the output has {size} {what}.")
    return torch.where(tensor < 0, tensor + size, tensor).long()


def _read_by(function: Any) -> tuple[Any, ...]:
    """What a function closes over and has as defaults: a traced function keeps what it read."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    read = [*cells, *(getattr(function, "__defaults__", None) or ())]
    return tuple((id(v), v._version) if isinstance(v, Tensor) else repr(v) for v in read)


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
