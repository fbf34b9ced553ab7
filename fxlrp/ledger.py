"""The ledger that users read: where the relevance went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .compiler.ledger import Entry


@dataclass(frozen=True, eq=False)
class Ledger:
    """Inputs + absorbed = the explained scalar, per sample; prints as a table.

    Of K targets every tensor is ``[batch, K]`` in place of ``[batch]``.

    Where an input has no batch dimension (patches of all images packed in one row), samples cannot be told
    apart in it: the ledger then has one row, the sum over all samples.

    Attributes:
        value: the explained scalars ``[batch]``, float64.
        inputs: relevance of each explained input, ``[batch]`` each.
        entries: what each node absorbed, and why: ``bias``, ``epsilon``, ``empty`` where no contribution of
            the sign that a rule asks for was there to take it, ``frozen`` operands, ``constant`` inputs
            (position embeddings, class tokens), ``remainder`` of Taylor steps, ``target`` for what a
            nonlinear target function leaves over.
    """

    value: Tensor
    inputs: Mapping[str, Tensor]
    entries: tuple[Entry, ...]

    @cached_property
    def absorbed(self) -> Tensor:
        """All that was absorbed, ``[batch]``."""
        return sum((entry.amount for entry in self.entries), start=torch.zeros_like(self.value))

    @cached_property
    def gap(self) -> Tensor:
        """``value - inputs - absorbed``, ``[batch]``: 0 up to rounding."""
        return self.value - sum(self.inputs.values(), start=torch.zeros_like(self.value)) - self.absorbed

    @cached_property
    def residual(self) -> float:
        """The largest ``|gap| / |value|`` of the batch."""
        return float((self.gap.abs() / self.value.abs().clamp_min(torch.finfo(torch.float64).tiny)).max())

    def by_cause(self) -> dict[str, Tensor]:
        """What was absorbed for each cause, ``[batch]`` each."""
        return self._grouped(lambda entry: entry.cause)

    def by_module(self) -> dict[str, Tensor]:
        """What each module absorbed, ``[batch]`` each."""
        return self._grouped(lambda entry: entry.module or "(model)")

    def _grouped(self, key: object) -> dict[str, Tensor]:
        groups: dict[str, Tensor] = {}
        for entry in self.entries:
            name = key(entry)  # type: ignore[operator]
            groups[name] = groups.get(name, torch.zeros_like(self.value)) + entry.amount
        return dict(sorted(groups.items(), key=lambda item: -float(item[1].abs().sum())))

    def of(self, index: int) -> Ledger:
        """The ledger of one of several targets."""
        entries = tuple(replace(entry, amount=entry.amount[:, index]) for entry in self.entries)
        inputs = {name: amount[:, index] for name, amount in self.inputs.items()}
        return Ledger(self.value[:, index], inputs, entries)

    def rows(self, sample: int = 0, top: int = 8) -> list[tuple[str, str, float, float]]:
        """``(where, cause, relevance, share)`` for one sample: inputs, then the largest absorptions.

        Of several targets the first; ``ledger.of(j)`` has the others.
        """
        if self.value.dim() > 1:
            return self.of(0).rows(sample, top)
        value = float(self.value[sample])

        def share(amount: float) -> float:
            return amount / value if value else float("nan")

        found = [
            (name, "input", float(t[sample]), share(float(t[sample]))) for name, t in self.inputs.items()
        ]
        groups: dict[tuple[str, str], float] = {}
        for entry in self.entries:
            place = (entry.module or entry.node, entry.cause)
            groups[place] = groups.get(place, 0.0) + float(entry.amount[sample])
        ordered = sorted(groups.items(), key=lambda item: -abs(item[1]))
        found += [(where, cause, amount, share(amount)) for (where, cause), amount in ordered[:top]]
        rest = sum(amount for _, amount in ordered[top:])
        if ordered[top:]:
            found.append((f"{len(ordered) - top} more places", "absorbed", rest, share(rest)))
        found.append(("explained value", "", value, share(value)))
        found.append(("gap", "", float(self.gap[sample]), share(float(self.gap[sample]))))
        return found

    def table(self, sample: int = 0, top: int = 8) -> str:
        """The ledger of one sample as text."""
        rows = self.rows(sample, top)
        width = max(len(where) for where, *_ in rows)
        lines = [f"{'where':<{width}}  {'cause':<10} {'relevance':>12}  {'share':>8}"]
        lines += [
            f"{where:<{width}}  {cause:<10} {amount:>12.5g}  {share:>8.2%}"
            for where, cause, amount, share in rows
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        notes = [f"sample 0 of {len(self.value)}; ledger.table(i) shows others"] * (len(self.value) > 1)
        if self.value.dim() > 1:
            notes.append(f"target 0 of {self.value.shape[1]}; ledger.of(j) has others")
        return self.table() + "".join(f"\n({note})" for note in notes)

    def __repr__(self) -> str:
        return (
            f"<fxlrp.Ledger of {len(self.value)} samples, {len(self.entries)} entries, "
            f"residual {self.residual:.1e}>"
        )
