"""Memory budgets: the cheapest recomputation whose estimated peak fits."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from torch import fx

from ..errors import InputError
from .keep import Chooser, Policy
from .liveness import Sizes, peak
from .parts import Parts
from .remat import Schedule, schedule, written

#: A share of what the default takes, bytes, or None for the default.
Budget = float | int | None

#: Prices that plans are made for: up to products of layers, up to attention, everything.
_PRICES = (Fraction(1, 64), Fraction(1, 256), Fraction(1, 2**20))
#: Cuts between the beginnings of segments; longer ones than these do not pay for any depth in use.
_SPANS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
#: How much more than the least the longest segments that are tried take.
_ENOUGH = 1.25
_MIB = 2**20


def checked_budget(budget: Budget) -> Budget:
    """A budget that could be one.

    Raises:
        InputError: it is neither None, nor a float in (0, 1], nor an int of bytes above 0.
    """
    is_share = type(budget) is float and 0 < budget <= 1
    if budget is not None and not is_share and not (type(budget) is int and budget > 0):
        raise InputError(
            "memory_budget is a share of what the default takes, a float in (0, 1], or a number of bytes "
            f"above the weights, an int above 0, or None; got {budget!r}."
        )
    return budget


@dataclass(frozen=True, eq=False)
class Memory:
    """Estimated memory of an explanation above weights and inputs, at the sizes of the first call.

    What kernels take for themselves is not counted, and allocators keep more than is in use.

    Attributes:
        chooser: decides what is kept.
        budget: what was asked for.
    """

    chooser: Chooser
    budget: Budget = None

    @cached_property
    def default(self) -> Schedule:
        """Only what is next to free is recomputed."""
        return schedule(self.chooser, Policy())

    @cached_property
    def least(self) -> Schedule:
        """As little memory as can be."""
        return min(self._others, key=lambda s: (s.peak, s.cost))

    @cached_property
    def chosen(self) -> Schedule:
        """The cheapest that fits the budget.

        Raises:
            InputError: there is none; with the least that can be.
        """
        if self.budget is None or self.default.peak <= self.limit:
            return self.default
        fitting = [s for s in self._others if s.peak <= self.limit]
        if not fitting:
            raise InputError(
                f"memory_budget={self.budget!r} is {self.limit / _MIB:.1f} MiB, but the least that this "
                f"explanation can take at these sizes is {self.least.peak / _MIB:.1f} MiB above the weights: "
                f"memory_budget={self.least_share}, of the default's {self.default.peak / _MIB:.1f} MiB. For "
                "less, give shorter inputs, smaller batches, or a smaller chunk of targets."
            )
        return min(fitting, key=lambda s: (s.cost, s.peak))

    def fits(self, sizes: Sizes) -> bool:
        """Whether what was chosen keeps to a budget in bytes at other sizes; a share is one of any size."""
        return not isinstance(self.budget, int) or peak(self.chosen.steps, sizes) <= self.budget

    @property
    def limit(self) -> float:
        """The budget in bytes."""
        if isinstance(self.budget, int):
            return self.budget
        return self.default.peak * (1.0 if self.budget is None else self.budget)

    @property
    def least_share(self) -> float:
        """The smallest budget that can be met, as a share of the default."""
        share = self.least.peak / max(1, self.default.peak)
        return min(1.0, (int(share * 1000) + 1) / 1000)

    @cached_property
    def _others(self) -> tuple[Schedule, ...]:
        found = [self.default]
        for span in _SPANS:
            if span > max(1, len(self.chooser.parts.cuts)):
                break
            made = [schedule(self.chooser, Policy(price, span, products=True)) for price in _PRICES]
            if span > 1 and min(s.peak for s in made) > _ENOUGH * min(s.peak for s in found):
                break  # a segment by itself takes more than its neighbours' beginnings
            found += made
        return tuple(found)

    def describe(self) -> str:
        """One line with the figures."""
        again = sum(s.again for s in self.chosen.steps)
        return (
            f"memory above weights and inputs, estimated: {self.chosen.peak / _MIB:.1f} MiB (by default "
            f"{self.default.peak / _MIB:.1f} MiB), {again} nodes computed again"
        )


def rematerialise(module: fx.GraphModule, budget: Budget, sizes: Sizes) -> tuple[fx.GraphModule, Memory]:
    """A relevance graph that keeps what fits a budget and computes the rest again.

    Args:
        module: the relevance graph; what it returns second is what the forward is for.
        budget: see :func:`fxlrp.lrp_compile`.
        sizes: of the example that figures are for.

    Raises:
        InputError: the budget cannot be met.
    """
    memory = Memory(Chooser(Parts(module.graph, sizes)), budget)
    return written(module, memory.chosen.steps), memory
