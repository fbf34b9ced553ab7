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
    """

    score: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    outputs: tuple[int, ...]
    operand_names: tuple[str, ...]
    batch: Any
    device: torch.device

    def reads(self, outputs: Sequence[Any]) -> list[fx.Node]:
        """The output nodes that the score reads."""
        return [outputs[i] for i in self.outputs]

    def operand_values(self, mode: Any) -> list[Tensor]:
        """Fake operands."""
        with mode:
            return [torch.zeros(self.batch, dtype=torch.long, device=self.device) for _ in self.operand_names]

    def joint(self, *arguments: Tensor) -> tuple[Any, ...]:
        """F and its gradient with respect to each read output (None where F does not depend on it)."""
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


def tensor_outputs(outputs: Sequence[Any]) -> tuple[int, ...]:
    """Indices of outputs that a target function may read."""
    return tuple(i for i, node in enumerate(outputs) if isinstance(value(node), Tensor))
