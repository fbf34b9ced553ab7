"""What lies between ``q k^T`` and the softmax: scale, soft cap, and which keys a query sees."""

from __future__ import annotations

from dataclasses import dataclass

#: Natural logarithm of a softmax's denominator below which a row counts as masked altogether: every key of it
#: is masked by infinity, or by a finite number that stands for it.
MASKED = -1e29


@dataclass(frozen=True)
class Scoring:
    """From raw scores ``r = q k^T`` to ``s = c tanh(r scale / c)``, ``r scale`` without a cap c; plus masks.

    The query in row i stands at place ``p = i + offset`` of the keys. With ``causal`` it sees keys j <= p,
    with a window of w those with ``|p - j| < w``.

    Attributes:
        scale: of the raw scores.
        causal: whether keys behind a query's place are masked.
        offset: the place of the first query; ``keys - queries`` aligns the last query with the last key.
        window: how many keys to one side are seen, the query's own place counted in; None for all.
        soft_cap: bound of the scaled scores; None for none.
        cap_gradient: whether relevance passes a cap by its derivative ``1 - tanh^2(x)``, ``x = r scale / c``,
            and not by the identity rule's ``tanh(x) / x``.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: int | None = None
    soft_cap: float | None = None
    cap_gradient: bool = False

    @staticmethod
    def of(
        head_size: int,
        scale: float | None,
        causal: bool,
        offset: int,
        window: int | None,
        soft_cap: float | None,
        cap_gradient: bool = False,
    ) -> Scoring:
        """With the default scale, ``1 / sqrt(head size)``, where there is none."""
        return Scoring(
            head_size**-0.5 if scale is None else scale, causal, offset, window, soft_cap, cap_gradient
        )
