"""What an artifact says about its programs: inputs, targets, the order of results."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from .expressions import Sizes
from .expressions import from_data as expression_from
from .graph import DTYPES
from .strict import check, fields, items, refuse, unique

_KINDS = {str(kind.name): kind for kind in inspect._ParameterKind}
#: Arguments that are no tensors and are kept as they are; of others only the type.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Inputs:
    """What the programs of an artifact take.

    Attributes:
        model: the model's class, to read.
        parameters: of the model's ``forward``: name, kind, whether there is a default.
        names: of the tensor inputs, in the order of the programs.
        dtypes: of the tensor inputs.
        device: where the programs were traced.
        sizes: for which sizes they are valid.
        constants: other arguments by name: the value, or ``{"type": name}`` of one that is not plain.
    """

    model: str
    parameters: tuple[tuple[str, str, bool], ...]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str
    sizes: Sizes
    constants: Mapping[str, Any]

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "model": self.model,
            "parameters": [list(p) for p in self.parameters],
            "names": list(self.names),
            "dtypes": list(self.dtypes),
            "device": self.device,
            "sizes": self.sizes.to_data(),
            "constants": dict(self.constants),
        }

    @staticmethod
    def from_data(data: Any) -> Inputs:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        model, parameters, names, dtypes, device, sizes, constants = fields(
            data,
            "inputs",
            model=str,
            parameters=list,
            names=list,
            dtypes=list,
            device=str,
            sizes=dict,
            constants=dict,
        )
        listed = [check(p, list, "inputs.parameters") for p in parameters]
        if any([type(x) for x in p] != [str, str, bool] or p[1] not in _KINDS for p in listed):
            refuse("inputs.parameters", "is no list of name, kind, default")
        found = Inputs(
            model,
            tuple((p[0], p[1], p[2]) for p in listed),
            tuple(items(names, str, "inputs.names")),
            tuple(items(dtypes, str, "inputs.dtypes")),
            device,
            Sizes.from_data(sizes, "inputs.sizes"),
            constants,
        )
        unique(found.names, "inputs.names")
        if not found.names or not len(found.names) == len(found.dtypes) == len(found.sizes.shapes):
            refuse("inputs", "does not have a name, a dtype and a shape for each tensor")
        if not set(found.dtypes) <= DTYPES.keys():
            refuse("inputs.dtypes", f"has one that is none: {found.dtypes}")
        for name, value in constants.items():
            if type(value) is dict:
                fields(value, f"inputs.constants.{name}", type=str)
            else:
                check(value, PLAIN, f"inputs.constants.{name}")
        _ = found.signature
        return found

    @property
    def signature(self) -> inspect.Signature:
        """The model's, with None for each default.

        Raises:
            ArtifactError: the parameters make no signature.
        """
        try:
            return inspect.Signature(
                [
                    inspect.Parameter(
                        name, _KINDS[kind], default=None if default else inspect.Parameter.empty
                    )
                    for name, kind, default in self.parameters
                ]
            )
        except ValueError as error:
            raise ArtifactError(f"The artifact is damaged: inputs.parameters: {error}.") from error


@dataclass(frozen=True)
class Logits:
    """Where targets are read.

    Attributes:
        shape: of the logits, as expressions.
        mask: the input that tells padding, or None.
        is_padding: whether it is true where there is padding.
        ids: the input whose tokens a span names, or None.
    """

    shape: tuple[Any, ...]
    mask: str | None
    is_padding: bool
    ids: str | None

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "shape": list(self.shape),
            "mask": self.mask,
            "is_padding": self.is_padding,
            "ids": self.ids,
        }

    @staticmethod
    def from_data(data: Any, inputs: Inputs) -> Logits:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        text = (str, type(None))
        shape, mask, is_padding, ids = fields(
            data, "logits", shape=list, mask=text, is_padding=bool, ids=text
        )
        for name in (mask, ids):
            if name is not None and name not in inputs.names:
                refuse("logits", f"names {name!r}, which is no input")
        if len(shape) not in (1, 2, 3):
            refuse("logits.shape", f"has {len(shape)} dimensions")
        symbols = inputs.sizes.symbols
        return Logits(
            tuple(expression_from(s, "logits.shape", symbols) for s in shape), mask, is_padding, ids
        )


@dataclass(frozen=True)
class Kind:
    """A kind of targets that a program explains.

    Attributes:
        names: the classes of the targets: one; or of several targets in one call one for all or one for each.
        position: of one target: whether it says its position. Of several: how many dimensions their positions
            have, 0 where they say none.
        fields: how many tensors of indices several targets have; None for one target.
        count: the number of targets that the program is for; None for any, and for one target.
    """

    names: tuple[str, ...]
    position: int
    fields: int | None
    count: int | None

    @staticmethod
    def of(key: Any, count: int | None) -> Kind:
        """From what a relevance graph is specialised on (``Target.key``, ``Bundle.key``)."""
        if key[0] == "many":
            _, names, number, rows = key
            return Kind(tuple(names), rows or 0, number, count)
        position = key[1] if len(key) == 2 else False
        return Kind((key[0],), int(position), None, None)

    def __str__(self) -> str:
        where = " at positions" if self.position else ""
        if self.fields is None:
            return f"{self.names[0]}{where}"
        return f"{self.count or 'several'} of {', '.join(self.names)}{where}"

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "names": list(self.names),
            "position": self.position,
            "fields": self.fields,
            "count": self.count,
        }

    @staticmethod
    def from_data(data: Any, where: str) -> Kind:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        number = (int, type(None))
        names, position, many, count = fields(
            data, where, names=list, position=int, fields=number, count=number
        )
        if not names or (many is None and len(names) != 1):
            refuse(where, "names no kind of target")
        return Kind(tuple(items(names, str, f"{where}.names")), position, many, count)


@dataclass(frozen=True)
class Results:
    """What a program returns, by name: see :class:`fxlrp.compiler.transpose.Relevance`."""

    names: tuple[str, ...]
    positions: tuple[str, ...]
    latents: tuple[str, ...]
    parameters: tuple[str, ...]

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "names": list(self.names),
            "positions": list(self.positions),
            "latents": list(self.latents),
            "parameters": list(self.parameters),
        }

    @staticmethod
    def from_data(data: Any, where: str) -> Results:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        listed = fields(data, where, names=list, positions=list, latents=list, parameters=list)
        found = Results(*(tuple(items(names, str, where)) for names in listed))
        for names in (found.names + found.positions, found.latents, found.parameters):
            unique(names, where)
        if not found.names and not found.positions:
            refuse(where, "names no explained input")
        return found

    def fits(self, output: Any) -> bool:
        """Whether a graph's output has these parts."""
        parts = 5 if self.parameters else 4
        if type(output) is not tuple or len(output) not in {parts, 5}:
            return False
        lengths = (
            len(self.names) + len(self.positions),
            None,
            len(self.names),
            len(self.latents),
            len(self.parameters),
        )
        for part, length in zip(output, lengths, strict=False):
            if length is not None and (type(part) is not tuple or len(part) != length):
                return False
        return all(type(pair) is tuple and len(pair) == 2 for pair in output[3])
