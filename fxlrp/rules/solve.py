"""The rule of triangular systems, as in chunked linear attention with the delta rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Call, Cotangent, Linearization, Rule, dot


@dataclass(frozen=True)
class Substitution(Rule):
    """``A X = B`` with a triangular A, as the substitution that solves it row by row.

    With ``A = D + N``, D its diagonal, row i of the solution is ``x_i = (b_i - sum_j N_ij x_j) / d_i``: a
    sum, divided by what counts as a constant, in which every product ``N_ij x_j`` hands half of its relevance
    to either factor (AttnLRP, Prop. 3.2), and so on down to the first row. In closed form, with the system
    ``(D + N/2)^T H = G``: the coefficients are ``G_B = H`` and ``G_N = -1/2 H X^T`` on A's strict triangle,
    0 on its diagonal. Nothing is absorbed where A and B are both active; constant ones keep their part
    (``bias``).

    Shapes: A ``[..., n, n]``, B, X, G ``[..., n, k]`` (``[..., k, n]`` for ``X A = B``).

    Source: AttnLRP's uniform and epsilon rules (Achtibat et al. 2024, eq. 8, Prop. 3.2), applied to the
    recurrence. A model that writes the substitution out as a loop gets the same relevance where B is active
    and A's entries are one factor each: written out, products of several factors share by their number, and
    a constant right-hand side leaves the first products to A alone.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"solve"})

    def linearize(self, call: Call) -> Linearization:
        matrix, right = call.args[:2]
        left = bool(call.kwargs.get("left", True))
        upper = bool(call.kwargs["upper"])
        unitriangular = bool(call.kwargs.get("unitriangular", False))
        solution = call.run()

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            halved = _halved(matrix, unitriangular)
            adjoint = torch.linalg.solve_triangular(
                halved.mH, cotangent, upper=not upper, left=left, unitriangular=unitriangular
            )
            product = adjoint @ solution.mH if left else solution.mH @ adjoint
            strict = product.triu(1) if upper else product.tril(-1)
            # An operand that was broadcast gets the sum of what its copies get.
            found = ((-0.5 * strict).sum_to_size(matrix.shape), adjoint.sum_to_size(right.shape))
            return tuple(found[i] for i in call.active)

        return Linearization(solution, pullback)

    def absorbed(
        self, call: Call, output: Tensor, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        if 1 in call.active:
            return {}
        _, constant = self.linearize(Call(call.op, call.args, call.kwargs, (0, 1))).pullback(cotangent)
        return {"bias": dot(call.args[1], constant)}


def _halved(matrix: Tensor, unitriangular: bool) -> Tensor:
    """Half of everything but the diagonal."""
    if unitriangular:  # the diagonal is not read
        return 0.5 * matrix
    return 0.5 * matrix + 0.5 * torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
