"""The seed: the explained scalar as a function of the model's outputs, and its gradient there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .graphs import value


@dataclass(frozen=True, eq=False)
class Seed:
    """The explained scalar.

    Attributes:
        score: maps the read outputs and the operands to F ``[batch]``.
        outputs: which of the graph's outputs it reads.
        operand_names: names of LongTensors ``[batch]`` that the relevance graph takes besides the model's
            inputs.
        batch: the batch size, symbolic or not.
        device: where the operands live.
        lead: how many targets there are, a size or a symbol; None for one. The score and the operands are
            then ``[batch, K]``.
        rows: whether each target reads a row of its own, of outputs ``[batch, K, classes]``; else all read
            the same, ``[batch, classes]`` or ``[batch, 1, classes]``.
    """

    score: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    outputs: tuple[int, ...]
    operand_names: tuple[str, ...]
    batch: Any
    device: torch.device
    lead: Any = None
    rows: bool = False

    def reads(self, outputs: Sequence[Any]) -> list[fx.Node]:
        """The output nodes that the score reads."""
        return [outputs[i] for i in self.outputs]

    def operand_values(self, mode: Any) -> list[Tensor]:
        """Fake operands."""
        shape = (self.batch,) if self.lead is None else (self.batch, self.lead)
        with mode:
            return [torch.zeros(shape, dtype=torch.long, device=self.device) for _ in self.operand_names]

    def joint(self, *arguments: Tensor) -> tuple[Any, ...]:
        """F and its gradient with respect to each read output (None where F does not depend on it).

        Of several targets, each one's gradient: ``[K, *shape]``, or that of each target's own row alone.
        """
        if self.lead is not None and not self.rows:
            return self._joint_of_many(*arguments)
        read = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments[: len(self.outputs)]]
        with torch.enable_grad():
            scalar = self.score(read, arguments[len(self.outputs) :])
            total = scalar.sum()
        floats = [x for x in read if x.requires_grad]
        grads = iter(
            torch.autograd.grad(total, floats, allow_unused=True)
            if scalar.requires_grad
            else [None] * len(floats)
        )
        return (scalar.detach(), *(next(grads) if x.requires_grad else None for x in read))

    def _joint_of_many(self, logits: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """As if each target read a row of its own, which is the same for all of them."""
        rows = logits if logits.dim() == 3 else logits.reshape(logits.shape[0], 1, -1)
        copies = rows.expand(-1, operands[0].shape[1], -1).detach().requires_grad_(True)
        with torch.enable_grad():
            scalars = self.score([copies], operands)
            total = scalars.sum()
        (gradient,) = torch.autograd.grad(total, copies)
        gradient = gradient.transpose(0, 1)
        return scalars.detach(), gradient.reshape(gradient.shape[0], *logits.shape)


def tensor_outputs(outputs: Sequence[Any]) -> tuple[int, ...]:
    """Indices of outputs that a target function may read."""
    return tuple(i for i, node in enumerate(outputs) if isinstance(value(node), Tensor))
