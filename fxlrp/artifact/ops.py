"""What an artifact may call: a closed table of functions, and PyTorch's ops that only compute.

An op is taken if it is functional (its schema writes to no operand) and all that it takes are tensors,
numbers, sizes, dtypes, devices, layouts and memory formats. Text is taken where it names a choice, such as
``rounding_mode``; so ``aten::from_file``, which takes a file's name, is none of them.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..compiler import choice, demand, slicing
from ..errors import ArtifactError
from ..rules import ops as canonical

#: Functions that are no ops of PyTorch's dispatcher, by the name that artifacts have for them.
FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{
            f"operator.{f.__name__}": f
            for f in (
                operator.getitem,
                operator.add,
                operator.sub,
                operator.mul,
                operator.floordiv,
                operator.truediv,
                operator.mod,
                operator.neg,
                operator.pos,
                operator.lt,
                operator.le,
                operator.gt,
                operator.ge,
                operator.eq,
                operator.ne,
                operator.and_,
                operator.or_,
                operator.not_,
            )
        },
        **{f"math.{f.__name__}": f for f in (math.floor, math.ceil, math.trunc, math.sqrt)},
        **{
            f"torch.{f.__name__}": f
            for f in (
                torch.sym_float,
                torch.sym_int,
                torch.sym_ite,
                torch.sym_max,
                torch.sym_min,
                torch.sym_not,
            )
        },
        **{
            f"fxlrp.{f.__name__}": f
            for f in (
                canonical.attention,
                canonical.normalize,
                canonical.normalize_divide,
                canonical.self_gate,
                choice.select_index,
                choice.select_rows,
                demand.last_unpadded,
                demand.last_before_padding,
                slicing.counted,
                slicing.seen_from,
                slicing.seen_from_each,
            )
        },
    }
)
_NAMES = {function: name for name, function in FUNCTIONS.items()}
#: Libraries of ops: PyTorch's own and ours.
_LIBRARIES = ("aten", "prims", "fxlrp")
_OP = re.compile(rf"({'|'.join(_LIBRARIES)})::([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)
#: What an op may take, by its schema's name, beside lists and options of these.
_TYPES = frozenset(("Tensor", "int", "float", "bool", "number", "Device", "SymInt", "complex"))
#: Arguments that are text, by name.
_CHOICES = frozenset(
    (
        "activation",
        "approximate",
        "equation",
        "indexing",
        "interpolation",
        "mode",
        "norm",
        "ord",
        "p",
        "pad_mode",
        "padding",
        "padding_mode",
        "reduce",
        "rounding_mode",
        "rule",
        "side",
        "UPLO",
    )
)
#: Arguments that are left out: an artifact can hold none.
_ABSENT = frozenset(("Generator",))


def name_of(target: Any) -> str:
    """What an artifact calls a function.

    Raises:
        ArtifactError: no artifact may call it.
    """
    if target in _NAMES:
        return _NAMES[target]
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
        if not _reason(target) and resolve(name) is target:
            return name
    raise ArtifactError(
        f"The relevance graph calls {target}, which no artifact may call: {_reason(target)}. Explain where "
        "the model is, or write the step with PyTorch's own ops."
    )


def resolve(name: str) -> Callable[..., Any]:
    """The function that an artifact's name means.

    Raises:
        ArtifactError: it is not on the list, or this PyTorch does not have it.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    found = _OP.fullmatch(name)
    if found is None:
        raise ArtifactError(f"The artifact calls {name[:80]!r}, which no artifact may call.")
    packet = getattr(getattr(torch.ops, found[1]), found[2], None)
    op = getattr(packet, found[3], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtifactError(
            f"The artifact calls {name[:80]!r}, which PyTorch {torch.__version__} does not have: load it "
            "with the version that it was saved with, or save it anew."
        )
    reason = _reason(op)
    if reason:
        raise ArtifactError(f"The artifact calls {name!r}, which no artifact may call: {reason}.")
    return op


def argument_names(target: Callable[..., Any]) -> tuple[list[str], int]:
    """A function's arguments that may be named, and how many may stand without a name."""
    if not isinstance(target, torch._ops.OpOverload):
        parameters = inspect.signature(target).parameters.values()
        named = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
        return named, len(parameters)
    arguments = target._schema.arguments
    return [a.name for a in arguments], sum(not a.kwarg_only for a in arguments)


def _reason(target: Any) -> str:
    """Why a function may not be called; '' if it may."""
    if not isinstance(target, torch._ops.OpOverload):
        return "it is no op of PyTorch's dispatcher and none of fxlrp's own steps"
    schema = target._schema
    if target.namespace not in _LIBRARIES:
        return f"'{target.namespace}' is another library, whose code would have to be there"
    if schema.is_mutable:
        return "it writes to an operand"
    for argument in schema.arguments:
        text = re.sub(r"List\[|Optional\[|\]", "", str(argument.type))
        allowed = argument.name in _CHOICES if text == "str" else text in _TYPES | _ABSENT
        if not allowed:
            return f"it takes '{argument.name}', a {text}"
    return ""
