"""Reference samples: the inputs of a data set that a latent's units respond to most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..explainer import Explainer
from ..progress import progress
from .conditional import latent_of, unit_dimension, unit_indices

_FORMAT = "fxlrp references 1"


@dataclass(frozen=True, eq=False)
class References:
    """The k samples with the largest scores for each unit of a latent; prints as a table.

    Of K targets the tensors have K in front: ``[K, units, k]``.

    Attributes:
        latent: the latent's module path.
        by: ``"activation"`` or ``"relevance"``.
        pool: how a unit's score in a sample came from its positions: their ``"max"`` or ``"sum"``.
        samples: how many samples there were.
        units: LongTensor ``[units]``, indices in the latent.
        indices: LongTensor ``[units, k]``, places of the samples in the data, the largest score first; of
            equal ones the earlier sample first. With fewer samples than asked for, k is their number.
        scores: ``[units, k]``.
        positions: LongTensor ``[units, k]``, where in the sample the unit has its maximum.
    """

    latent: str
    by: str
    pool: str
    samples: int
    units: Tensor
    indices: Tensor
    scores: Tensor
    positions: Tensor

    def table(self, units: int = 10, samples: int = 5, target: int = 0) -> str:
        """The units with the largest scores as text: each sample as ``index@position score``."""
        indices, positions, scores = (
            t if t.dim() == 2 else t[target] for t in (self.indices, self.positions, self.scores)
        )
        shown = scores[:, 0].argsort(descending=True, stable=True)[:units]
        cells = [["unit"] + [""] * min(samples, indices.shape[-1])]
        for row in shown.tolist():
            columns = (t[row, :samples].tolist() for t in (indices, positions, scores))
            cells.append(
                [str(int(self.units[row])), *(f"{i}@{p} {s:+.3g}" for i, p, s in zip(*columns, strict=True))]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells[1:]]
        return "\n".join(
            [
                f"{self.latent}: samples by {self.by}, {self.pool} over positions ({self.samples} samples)",
                "unit".ljust(widths[0]) + "  sample@position score",
                *lines,
                *([f"{len(self.units) - len(lines)} more units"] if len(self.units) > len(lines) else []),
            ]
        )

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return (
            f"<fxlrp.concepts.References of {len(self.units)} units of {self.latent!r} by {self.by}, "
            f"{self.indices.shape[-1]} of {self.samples} samples each>"
        )

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; :meth:`load` reads the same numbers back."""
        tensors = {name: getattr(self, name).tolist() for name in _TENSORS}
        scalars = {name: getattr(self, name) for name in _SCALARS}
        written = {"format": _FORMAT, "dtype": str(self.scores.dtype), **scalars, **tensors}
        target = Path(path)
        target.write_text(json.dumps(written) + "\n", encoding="utf-8")
        return target

    @staticmethod
    def load(path: str | Path) -> References:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file holds something else.
        """
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
            if read["format"] != _FORMAT:
                raise KeyError("format")
            fields: dict[str, Any] = {name: read[name] for name in _SCALARS}
            for name in _TENSORS:
                dtype = _DTYPES[read["dtype"]] if name == "scores" else torch.long
                fields[name] = torch.tensor(read[name], dtype=dtype)
            return References(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no reference samples as this version writes them ({error!r}); compute and "
                "save them again."
            ) from error


_SCALARS = ("latent", "by", "pool", "samples")
_TENSORS = ("units", "indices", "scores", "positions")
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def _activation(explainer: Explainer, latent: str, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
    del kwargs["target"]
    return latent_of(explainer.values(latent, *args, **kwargs), latent), False


def _relevance(explainer: Explainer, latent: str, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
    explanation = explainer(*args, **kwargs)
    return latent_of(explanation.latents, latent), explanation.value.dim() > 1


#: By what samples are ranked: the latent's ``[batch, *shape]``, or for several targets ``[batch, K, *shape]``
#: and True.
_BY: Mapping[str, Callable[[Explainer, str, Any, dict[str, Any]], tuple[Tensor, bool]]] = MappingProxyType(
    {"activation": _activation, "relevance": _relevance}
)
#: How positions become a sample's score.
_POOLS = ("max", "sum")


def reference_samples(
    explainer: Explainer,
    latent: str,
    data: Iterable[Any],
    *,
    by: str = "relevance",
    k: int = 8,
    units: Sequence[int] | None = None,
    pool: str = "max",
    target: Any = None,
    mask: str = "attention_mask",
    dim: int = -1,
    progress_bar: bool = True,
) -> References:
    """The k samples of a data set in which each unit of a latent is most active, or most relevant.

    ActMax: ``s_u(x) = max_p a_pu(x)``, with a the latent and p its positions. RelMax: ``s_u(x) = max_p
    R_pu(x)``, with R = a * G its relevance for the target, which shows what a unit is *used* for. With
    ``pool="sum"`` the sum over positions takes the maximum's place.

    The data are read once, batch by batch; memory is that of a batch and of units x k scores.

    Args:
        explainer: of the model; for relevance compiled with the latent among its ``latents``.
        latent: a module path.
        data: batches: dicts of the model's arguments by name, tuples of positional ones, or tensors. A dict
            may bring the target of its rows along as ``"target"`` (their labels, say).
        by: ``"relevance"`` (RelMax) or ``"activation"`` (ActMax).
        k: how many samples of each unit.
        units: which; None for all.
        pool: ``"max"`` or ``"sum"`` over positions.
        target: what relevance is for; several give tables of each.
        mask: the argument ``[batch, positions]`` that is 0 at padding, which counts for nothing.
        dim: see :func:`conditional`.
        progress_bar: show one on stderr where it takes more than a second.

    Raises:
        InputError: unknown names, no data, k below 1; and as an explainer's call.

    Source: Achtibat et al. 2023, From attribution maps to human-understandable explanations through Concept
    Relevance Propagation, on relevance maximisation beside activation maximisation.
    """
    for what, value, known in (("by", by, _BY), ("pool", pool, _POOLS)):
        if value not in known:
            raise InputError(f"{what} is one of {', '.join(map(repr, known))}; got {value!r}.")
    if type(k) is not int or k < 1:
        raise InputError(f"k is a number of samples, an int of 1 or more; got {k!r}.")
    top: _Columns | None = None
    count, index = 0, torch.empty(0, dtype=torch.long)
    for batch in progress(data, f"reference samples of {latent}", shown=progress_bar):
        args, kwargs = _arguments(batch)
        values, several = _BY[by](explainer, latent, args, {"target": target, **kwargs})
        values = values.movedim(unit_dimension(dim, values.dim() - several, latent) + several, -1)
        index = unit_indices(range(values.shape[-1]) if units is None else units, values.shape[-1])
        values = values[..., index.to(values.device)].flatten(1 + several, -2)
        scores, positions = _scored(values, kwargs.get(mask), pool)
        places = torch.arange(count, count + len(values), device=values.device).expand(scores.shape)
        top = _largest(top, (scores, places, positions), k)
        count += len(values)
    if top is None:
        raise InputError("There are no data: no batch came. An iterator that was read before is empty.")
    scores, places, positions = (tensor.cpu() for tensor in top)
    return References(latent, by, pool, count, index, places, scores, positions)


#: Scores, places and positions of samples, ``[units, samples]`` or ``[K, units, samples]`` each.
_Columns = tuple[Tensor, Tensor, Tensor]


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise InputError(
        "A batch is a dict of the model's arguments by name, a tuple of them or a tensor; got "
        f"{type(batch).__name__}."
    )


def _scored(values: Tensor, mask: Any, pool: str) -> tuple[Tensor, Tensor]:
    """Scores and positions ``[units, batch]`` of ``[batch, positions, units]``.

    Of several targets ``[K, units, batch]`` of ``[batch, K, positions, units]``.
    """
    padding = torch.zeros((), dtype=torch.bool, device=values.device)
    if isinstance(mask, Tensor) and mask.shape == (len(values), values.shape[-2]):
        padding = (mask == 0).reshape(len(values), *[1] * (values.dim() - 3), -1, 1).to(values.device)
    scores, positions = values.masked_fill(padding, -float("inf")).max(-2)
    if pool == "sum":
        scores = values.masked_fill(padding, 0).sum(-2)
    return scores.movedim(0, -1), positions.movedim(0, -1)


def _largest(top: _Columns | None, new: _Columns, k: int) -> _Columns:
    """The columns with the k largest scores, those of earlier samples first where scores are equal."""
    if top is not None and top[0].shape[:-1] != new[0].shape[:-1]:
        raise InputError("The batches differ in their number of targets: no table holds both.")
    columns = new if top is None else tuple(torch.cat(pair, -1) for pair in zip(top, new, strict=True))
    order = columns[0].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    scores, places, positions = (column.gather(-1, order) for column in columns)
    return scores, places, positions
