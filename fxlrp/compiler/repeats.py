"""Repeats: where a sequence of equal or different things says the same several times in a row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: How many different periods are tried.
_PERIODS = 64


@dataclass(frozen=True)
class Run:
    """``count`` times ``period`` items from ``start`` on, each time the same ones."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The first position behind it."""
        return self.start + self.period * self.count

    def parts(self) -> Iterator[range]:
        """The positions of each repetition."""
        for first in range(self.start, self.stop, self.period):
            yield range(first, first + self.period)


def runs(
    items: Sequence[Hashable], width: Callable[[int, int], Sequence[int]], *, times: int, size: int
) -> list[Run]:
    """Disjoint runs, in order: in each stretch the one that saves most, then the same left and right of it.

    A sequence of period p stays one wherever its repetitions are cut. ``width(start, p)`` says for each of
    the p places behind ``start`` how much would cross a cut there; the narrowest is taken.

    Args:
        items: what is compared.
        width: what crosses a cut.
        times: how often something must be repeated at least.
        size: how many items it must have at least.
    """
    numbers: dict[Hashable, int] = {}
    ids = torch.tensor([numbers.setdefault(item, len(numbers)) for item in items], dtype=torch.long)
    found: list[Run] = []
    stretches = [(0, len(items))]
    while stretches:
        first, last = stretches.pop()
        stretch = _longest(ids[first:last], times, size)
        if stretch is None:
            continue
        offset, period, length = stretch
        run = _cut(first + offset, period, length, width(first + offset, period), times)
        found.append(run)
        stretches += [(first, run.start), (run.stop, last)]
    return sorted(found, key=lambda run: run.start)


def _longest(ids: Tensor, times: int, size: int) -> tuple[int, int, int] | None:
    """Start, period and length of the periodic stretch that saves most."""
    best, saved = None, 0
    for period in _periods(ids, times, size):
        differs = (ids[:-period] != ids[period:]).nonzero().flatten()
        ends = torch.cat([differs, differs.new_tensor([len(ids) - period])])
        starts = torch.cat([differs.new_tensor([0]), differs + 1])
        place = int((ends - starts).argmax())
        length = int(ends[place] - starts[place]) + period
        gain = (length // period - 1) * period
        if length // period >= times and gain > saved:
            best, saved = (int(starts[place]), period, length), gain
    return best


def _periods(ids: Tensor, times: int, size: int) -> list[int]:
    """Distances between an item and the next equal one, those that cover most first; of equals the short."""
    order = torch.argsort(ids, stable=True)
    equal = ids[order[1:]] == ids[order[:-1]]
    distances, counts = (order[1:] - order[:-1])[equal].unique(return_counts=True)
    fits = (distances >= size) & (distances * times <= len(ids)) & (counts >= times - 1)
    covered = sorted(zip((distances * counts)[fits].tolist(), distances[fits].tolist(), strict=True))
    return sorted(distance for _, distance in covered[-_PERIODS:])


def _cut(start: int, period: int, length: int, width: Sequence[int], times: int) -> Run:
    """The narrowest cut that costs at most one repetition; of equals the first that costs none."""
    least = max(times, length // period - 1)
    places = [shift for shift in range(period) if (length - shift) // period >= least]
    shift = min(places, key=lambda s: (width[s], -((length - s) // period), s))
    return Run(start + shift, period, (length - shift) // period)
