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


def as_target(target: Any) -> Target:
    """A target of what users write: None, an int, a LongTensor of classes, a Target, a function of outputs.

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
        raise TargetError(f"A target's class is an int or a LongTensor [batch], not {_kind(target)}.")
    if isinstance(target, (int, Tensor)):
        return Logit(target)
    if isinstance(target, (list, tuple)) and target and all(type(t) is int for t in target):
        return Logit(torch.tensor(target))
    if callable(target):
        return Function(target)
    raise TargetError(
        f"A target is None (the predicted class), an int, a LongTensor [batch], a target object as "
        f"fxlrp.Logit, or a function of the model's output; got {_kind(target)}."
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
        _checked(name, getattr(target, name), batch, classes, "classes", device) for name in target.indices
    ]
    position = getattr(target, "position", None)
    if position is not None:
        if len(shape) < 3:
            raise TargetError(
                f"The output has shape {tuple(shape)}: it has no positions, so position={position!r} "
                "does not apply."
            )
        chosen = _checked("position", position, batch, shape[1], "positions", device)
        values.insert(0, chosen)
        if mask is not None and mask.shape == (batch, shape[1]):
            padded = (mask.to(device).gather(1, chosen.unsqueeze(1)) == 0).squeeze(1)
            if bool(padded.any()):
                rows = padded.nonzero().flatten().tolist()
                raise TargetError(
                    f"Position {chosen[rows[0]].item()} of row {rows[0]} is padding; choose one where "
                    "attention_mask is 1."
                )
    return tuple(values)


def operand_tensors(target: Target, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """:func:`resolve` without its checks, for use inside ``torch.compile``; negative indices not allowed."""
    names = (("position",) if getattr(target, "position", None) is not None else ()) + target.indices
    values = [getattr(target, name) for name in names]
    return tuple(
        value if isinstance(value, Tensor) else torch.full((batch,), value, device=device) for value in values
    )


def _checked(name: str, value: Index, batch: int, size: int, what: str, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(value, device=device)
    if tensor.is_floating_point() or tensor.dtype is torch.bool or tensor.is_complex():
        raise TargetError(f"The target's {name} must be an int or a LongTensor [batch], not {tensor.dtype}.")
    if tensor.dim() == 0:
        tensor = tensor.expand(batch)
    if tensor.shape != (batch,):
        raise TargetError(
            f"The target's {name} has shape {tuple(tensor.shape)}; it is one per sample, so an int or "
            f"shape ({batch},)."
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
