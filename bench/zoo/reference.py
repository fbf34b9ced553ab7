"""Gradient x Input by autograd for any model of the zoo: what the ``gradient`` composite must equal.

As :mod:`bench.reference`, but lookups are found wherever they are made, by modules or functions, on ids that
were shifted, padded or transposed on the way: by the ids' values, which :mod:`.inputs` makes different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from ..reference import logits_of, predicted

#: The ends of names of inputs that label patches: where they are, how their image is cut.
_LABELS = ("_position_ids", "_ratio_ids")
#: A function of the output, or None for the predicted class at the last unpadded position.
Target = Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Largest:
    """The largest entry of a field of the output, for models without ``logits`` for each sample.

    Of several rows for each sample, which follow each other, the largest of all.
    """

    name: str
    rows: int = 1

    def __call__(self, output: Any) -> Tensor:
        found = getattr(output, self.name).flatten(1).amax(-1)
        largest: Tensor = found.unflatten(0, (-1, self.rows)).amax(-1) if self.rows > 1 else found
        return largest


def target_of(output: Any, batch: int) -> Target:
    """What to explain of the output for a batch of this size.

    Raises:
        ValueError: there is no floating point tensor to explain.
    """
    if isinstance(output, Tensor):
        return None
    if isinstance(getattr(output, "logits", None), Tensor):
        if output.logits.shape[0] != batch:  # several streams of tokens for each sample
            return Largest("logits", len(output.logits) // batch)
        return None if output.logits.dim() in (2, 3) else Largest("logits")
    for name, value in output.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return Largest(name)
    raise ValueError(f"{type(output).__name__} holds no tensor to explain")


def scalar_of(output: Any, target: Target, inputs: Mapping[str, Any]) -> Tensor:
    """The explained scalars ``[batch]``."""
    if target is not None:
        return target(output)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return predicted(logits_of(output), tensors)


@dataclass(eq=False)
class Reference:
    """Gradient x Input of one call.

    Attributes:
        value: the explained scalars ``[batch]``.
        relevance: by input name, for ids summed over the hidden size.
        compared: which elements of it count: ids that occur once in their input.
        scale: by input name the largest relevance of a place, its parts taken without sign: behind a
            normalisation those of an embedding sum to nothing but rounding.
    """

    value: Tensor
    relevance: dict[str, Tensor]
    compared: dict[str, Tensor]
    scale: dict[str, float]

    def error(self, name: str, found: Tensor) -> float:
        """The largest difference from an input's relevance, relative to :attr:`scale`."""
        where, expected = self.compared[name], self.relevance[name]
        if found.shape != expected.shape:
            return float("inf")
        return float((found - expected)[where].abs().max()) / max(self.scale[name], 1e-30)


def gradient_times_input(model: nn.Module, inputs: Mapping[str, Any], target: Target) -> Reference:
    """Autograd's Gradient x Input of a call, at float inputs and at the lookups of ids."""
    floats = {
        name: x.clone().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    ids = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and _are_ids(name, x)}
    labels = {name: x for name, x in inputs.items() if name.endswith(_LABELS)}
    lookups = _Lookups(ids, _hashes(model, inputs, ids), labels)
    # Handed on as copies: some models write into their inputs.
    with torch.enable_grad(), lookups:
        output = model(**{**inputs, **{name: x.clone() for name, x in floats.items()}})
    with torch.enable_grad():
        scalar = scalar_of(output, target, inputs)
        leaves = [*floats.values(), *(lookup.output for lookup in lookups.found)]
        # Ids that are hashed before they are looked up leave nothing to differentiate by.
        gradients = torch.autograd.grad(scalar.sum(), leaves, allow_unused=True) if leaves else ()
    products = [
        torch.zeros_like(x) if g is None else (x * g).detach() for x, g in zip(leaves, gradients, strict=True)
    ]
    relevance = dict(zip(floats, products, strict=False))
    scale = {name: float(x.abs().max()) for name, x in relevance.items()}
    for lookup, product in zip(lookups.found, products[len(floats) :], strict=True):
        scale[lookup.name] = max(scale.get(lookup.name, 0.0), float(product.abs().sum(-1).max()))
        placed = lookup.placed(inputs[lookup.name], product.sum(-1))
        relevance[lookup.name] = relevance.get(lookup.name, torch.zeros_like(placed)) + placed
    compared = {name: _once(ids[name]) if name in ids else slice(None) for name in relevance}
    return Reference(scalar.detach(), relevance, compared, scale)  # type: ignore[arg-type]


def _are_ids(name: str, x: Tensor) -> bool:
    return x.dtype == torch.long and (name.endswith("input_ids") or name == "inputs")


def _once(ids: Tensor) -> Tensor:
    """Where the ids are that occur only once: ``[batch, length]`` of truth values."""
    values, counts = ids.unique(return_counts=True)
    return torch.isin(ids, values[counts == 1])


@dataclass(frozen=True, eq=False)
class _Lookup:
    """An embedding lookup of an input's ids: which share of each token is whose, and what came out."""

    name: str
    shares: Tensor
    output: Tensor

    def placed(self, ids: Tensor, relevance: Tensor) -> Tensor:
        """The lookup's relevance at the places that its ids have in the input."""
        return (self.shares.to(relevance) @ relevance.reshape(-1, 1)).view(ids.shape)


@dataclass(eq=False)
class _Lookups(TorchFunctionMode):
    """Catches lookups of the given ids in a table of weights.

    Attributes:
        ids: by input name.
        hashes: by the number of a lookup the input of which it reads hashes, and their shares.
        labels: of patches, which are read as they are or one coordinate at a time.
        found: what was caught.
        reads: what all lookups read, in their order.
    """

    ids: dict[str, Tensor]
    hashes: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    found: list[_Lookup] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = _read_ids(func, args, kwargs or {})
        if read is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        self.reads.append(read.clone())
        for name, shares in self._shares(read):
            leaf = output.detach().requires_grad_()
            self.found.append(_Lookup(name, shares, leaf))
            return leaf.clone()
        return output

    def _shares(self, read: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, ids in self.ids.items():
            if _moved(read, ids):
                yield name, ids.reshape(-1, 1) == read.reshape(1, -1)
        if len(self.reads) - 1 in self.hashes:
            yield self.hashes[len(self.reads) - 1]
        for name, label in self.labels.items():
            places = torch.arange(label.numel()).view(label.shape)
            for along, at in ((label, places), *zip(label.unbind(-1), places.unbind(-1), strict=True)):
                if torch.equal(along, read):
                    yield name, places.reshape(-1, 1) == at.reshape(1, -1)


def _moved(read: Tensor, ids: Tensor) -> bool:
    """Whether ids are read as they are, wherever: most of those that occur once are there."""
    once = ids[_once(ids)]
    return bool(len(once)) and float(torch.isin(once, read).float().mean()) >= 0.5


def _hashes(
    model: nn.Module, inputs: Mapping[str, Any], ids: Mapping[str, Tensor]
) -> dict[int, tuple[str, Tensor]]:
    """The lookups that read numbers computed of ids, and which share of each token is which place's.

    Found by trial: one place is given the other samples' ids, and what is read otherwise then depends on it.
    A hash of several ids is shared alike, also by the padding that stands where a text has no ids yet.
    """

    def reads(changed: Mapping[str, Tensor]) -> list[Tensor]:
        lookups = _Lookups({})
        with torch.no_grad(), lookups:
            model(**{**{name: _copied(x) for name, x in inputs.items()}, **changed})
        return lookups.reads

    usual = reads({}) if ids else []
    found: dict[int, tuple[str, Tensor]] = {}
    for name, own in ids.items():
        other = [n for n, read in enumerate(usual) if _may_be_hashes(read, own)]
        other = [n for n in other if not any(_moved(usual[n], x) for x in ids.values())]
        changed = reads({name: own.roll(1, 0)}) if other else usual
        other = [n for n in other if not torch.equal(changed[n], usual[n])]
        depends = {n: torch.zeros(*own.shape, own.shape[1], dtype=torch.bool) for n in other}
        for place in range(own.shape[1]) if other else ():
            trial = own.clone()
            trial[:, place] = own[:, place].roll(1)
            changed = reads({name: trial})
            for n in other:
                depends[n][..., place] = changed[n] != usual[n]
        for n, by_place in depends.items():
            shares = by_place.transpose(1, 2).float() / by_place.sum(-1).max()
            found[n] = (name, torch.block_diag(*shares))
    return found


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _may_be_hashes(read: Tensor, ids: Tensor) -> bool:
    """Whether numbers are read in the ids' places that differ between samples, as positions do not."""
    return read.shape == ids.shape and bool((read != read[:1]).any())


def _read_ids(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The ids that an op looks up in a table, None for all other ops."""
    if func is F.embedding:
        found = args[0] if args else kwargs["input"]
    elif resolve_name(func) == "torch.Tensor.__getitem__" and isinstance(args[0], nn.Parameter):
        found = args[1]
    elif func in (torch.index_select, torch.Tensor.index_select) and isinstance(args[0], nn.Parameter):
        found = kwargs.get("index", args[-1])
    else:
        return None
    integer = isinstance(found, Tensor) and found.dtype in (torch.long, torch.int)
    return found.contiguous() if integer else None
