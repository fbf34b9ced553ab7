"""A relevance graph as plain data, and a graph of plain data, node by node.

Nodes are ``{"name", "input"}`` (the number of the input), ``{"name", "constant"}`` (the number of the tensor)
or ``{"name", "op", "args", "kwargs"}``. An argument is null, a bool, an integer, a finite float, text, a list
of arguments, or an object with one key that says what it is (``_TAGS``).
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.graphs import output_node
from ..errors import ArtifactError
from .ops import argument_names, name_of, resolve
from .strict import check, fields, identifier, refuse

_DEPTH = 8
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
#: Number types by name.
DTYPES = {
    str(d).removeprefix("torch."): d
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if (d := getattr(torch, name, None)) is not None
}


def to_data(graph: fx.Graph, constant: Callable[[fx.Node], int]) -> dict[str, Any]:
    """A relevance graph as plain data.

    Args:
        graph: the graph.
        constant: the number of the tensor that a ``get_attr`` node fetches.

    Raises:
        ArtifactError: a node that calls something, or takes something, that no artifact may hold.
    """
    nodes: list[dict[str, Any]] = []
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            nodes.append({"name": node.name, "input": inputs})
            inputs += 1
        elif node.op == "get_attr":
            nodes.append({"name": node.name, "constant": constant(node)})
        elif node.op == "call_function":
            call = {"op": name_of(node.target), "args": [_encode(a) for a in node.args]}
            nodes.append(
                {"name": node.name, **call, "kwargs": {k: _encode(v) for k, v in node.kwargs.items()}}
            )
        elif node.op != "output":
            raise ArtifactError(
                f"The relevance graph has a node of kind {node.op}, which no artifact may hold."
            )
    return {"nodes": nodes, "output": _encode(output_node(graph).args[0])}


def from_data(
    data: Any, where: str, inputs: int, tensors: Sequence[Tensor], devices: Callable[[str], torch.device]
) -> fx.GraphModule:
    """The graph that plain data describe, which calls nothing that is not on the list of :mod:`.ops`.

    Args:
        data: what :func:`to_data` gave.
        where: what to call it in errors.
        inputs: how many it takes.
        tensors: what its constants are, by number.
        devices: what a device's name stands for.

    Raises:
        ArtifactError: anything else than what :func:`to_data` gives.
    """
    listed, result = fields(data, where, nodes=list, output=dict)
    return _Reader(where, inputs, tensors, devices).run(listed, result)


class _Reader:
    def __init__(
        self, where: str, inputs: int, tensors: Sequence[Tensor], devices: Callable[[str], torch.device]
    ) -> None:
        self.where, self.inputs, self.tensors, self.devices = where, inputs, tensors, devices
        self.graph = fx.Graph()
        self.known: dict[str, fx.Node] = {}
        self.attributes: dict[str, Any] = {}

    def run(self, listed: list[Any], result: Any) -> fx.GraphModule:
        taken = 0
        for i, item in enumerate(listed):
            place = f"{self.where}.nodes[{i}]"
            data = check(item, dict, place)
            name = identifier(data.get("name"), f"{place}.name")
            if name in self.known or name == "self" or keyword.iskeyword(name):
                refuse(place, f"has the name {name!r}, which is taken")
            if "input" in data:
                _, number = fields(data, place, name=str, input=int)
                if number != taken or taken >= self.inputs:
                    refuse(place, f"is input {number}, where {taken} of {self.inputs} should come")
                self.known[name] = self.graph.create_node("placeholder", name, name=name)
                taken += 1
            elif "constant" in data:
                _, number = fields(data, place, name=str, constant=int)
                if not 0 <= number < len(self.tensors):
                    refuse(place, f"is constant {number} of {len(self.tensors)}")
                self.attributes[f"constant_{number}"] = self.tensors[number]
                self.known[name] = self.graph.create_node("get_attr", f"constant_{number}", name=name)
            else:
                self.known[name] = self._call(name, data, place)
        if taken != self.inputs:
            refuse(self.where, f"has {taken} of {self.inputs} inputs")
        self.graph.output(self._decode(result, f"{self.where}.output"))
        self.graph.lint()
        return fx.GraphModule(self.attributes, self.graph, "RelevanceGraph")

    def _call(self, name: str, data: Any, place: str) -> fx.Node:
        _, op, args, kwargs = fields(data, place, name=str, op=str, args=list, kwargs=dict)
        target = resolve(op)
        named, positional = argument_names(target)
        if len(args) > positional or not kwargs.keys() <= set(named):
            refuse(place, f"gives {op} arguments that it does not take")
        given = tuple(self._decode(a, f"{place}.args") for a in args)
        by_name = {k: self._decode(v, f"{place}.kwargs") for k, v in kwargs.items()}
        return self.graph.create_node("call_function", target, given, by_name, name)

    def _decode(self, data: Any, place: str, depth: int = 0) -> Any:
        if data is None or type(data) in (bool, int, float, str):
            return data
        if depth > _DEPTH:
            refuse(place, "is nested too deeply")
        if type(data) is list:
            return [self._decode(item, place, depth + 1) for item in data]
        if type(data) is not dict or len(data) != 1:
            refuse(place, "is no argument")
        ((tag, value),) = data.items()
        if tag == "node":
            if type(value) is not str or value not in self.known:
                refuse(place, f"names the node {value!r}, which does not come before it")
            return self.known[value]
        if tag in ("tuple", "slice", "complex"):
            parts = [self._decode(item, place, depth + 1) for item in check(value, list, place)]
            return _assembled(tag, parts, place)
        if tag == "device":
            return self.devices(check(value, str, place))
        if tag not in _TAGS or type(value) is not str or value not in _TAGS[tag]:
            refuse(place, f"is no argument: {tag[:40]!r}")
        return _TAGS[tag][value]


#: What is known by a name: the kinds of objects, beside nodes, tuples, slices, complex numbers and devices.
_TAGS: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "layout": _LAYOUTS,
    "memory_format": _FORMATS,
    "float": _FLOATS,
}


def _assembled(tag: str, parts: list[Any], place: str) -> Any:
    if tag == "tuple":
        return tuple(parts)
    if tag == "slice" and len(parts) == 3:
        return slice(*parts)
    if tag == "complex" and len(parts) == 2 and all(type(p) is float for p in parts):
        return complex(*parts)
    refuse(place, f"is no {tag}")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is complex:
        return {"complex": [_encode(value.real), _encode(value.imag)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, tag in (
        (torch.dtype, "dtype"),
        (torch.layout, "layout"),
        (torch.memory_format, "memory_format"),
    ):
        name = str(value).removeprefix("torch.")
        if isinstance(value, kind) and name in _TAGS[tag]:
            return {tag: name}
    raise ArtifactError(
        f"The relevance graph takes {value!r} of type {type(value).__name__}, which no artifact may hold. "
        "Please report it."
    )
