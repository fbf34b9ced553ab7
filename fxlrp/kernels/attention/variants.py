"""Every configuration of attention's kernels that a launch can choose, for the ahead-of-time tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..launch import Variant
from . import tiles
from .forward import attend
from .relevance import of_keys, of_queries, prepare

_WIDTHS = {2: ("bf16", "fp16"), 4: ("fp32",)}
_KERNELS = {"forward": attend, "of_queries": of_queries, "of_keys": of_keys, "frozen": of_keys}
#: Parameters in float32; all other numbers are integers.
_NUMBERS = ("inner", "outer", "epsilon", "score_epsilon", "factor", "factor_k", "factor_v")
_PLAIN = {"MASK": "none", "PER_KEY": True, "CAUSAL": True, "WINDOW": False, "CAP": "none"}
_PADDED = {"CAUSAL": False, "MASK": "keep"}
#: What makes a call laden.
_LADEN: dict[str, dict[str, Any]] = {
    "biased": {"CAUSAL": False, "MASK": "add", "PER_KEY": False},
    "windowed": {"WINDOW": True},
    "capped": {"CAP": "identity"},
    "damped": {"DAMP": True},
}


def variants(precisions: Mapping[str, str]) -> Iterator[Variant]:
    """Each row of the tables in each dtype: causal and padded, for one and for many targets; laden."""
    for (name, kind, width), table in tiles.TABLES.items():
        for size, row in table.items():
            chosen = [("causal", {}, row.one), ("padded", _PADDED, row.one)]
            chosen += [(label, given, row.laden) for label, given in _LADEN.items() if _takes(name, given)]
            if row.many is not None:
                counts = [1 << i for i in range(1, row.many.targets.bit_length())]
                chosen += [("causal", {}, replace(row.many, targets=count)) for count in counts]
            for dtype, (label, given, cut) in itertools.product(_WIDTHS[width], chosen):
                yield _tiled(name, label, dtype, size, cut, {"PRECISION": precisions[kind], **given}, kind)
    for dtype, size, damp in itertools.product(("bf16", "fp16", "fp32"), (64, 128, 256), (False, True)):
        constants = {"E": size, "EP": size, "QUERIES": tiles.PREPARED.queries, "DAMP": damp}
        label = "damped" if damp else "plain"
        yield _variant(prepare, "prepare", label, dtype, size, constants, tiles.PREPARED)


def _takes(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a kernel has a feature; frozen weights pass no relevance through scores."""
    return "DAMP" not in given or name in ("of_queries", "of_keys")


def _tiled(
    name: str, label: str, dtype: str, size: int, cut: tiles.Tiles, given: Mapping[str, Any], kind: str
) -> Variant:
    sizes = {"D": size, "E": size, "DP": size, "EP": size, "QUERIES": cut.queries, "KEYS": cut.keys}
    constants = {**_PLAIN, **sizes, **_own(name, cut.targets, size), **given}
    return _variant(_KERNELS[name], name, label, dtype, size, constants, cut, tiles.TARGETS[kind])


def _own(name: str, targets: int, size: int) -> dict[str, Any]:
    """Constants of one kernel alone."""
    if name == "forward":
        return {"SINKS": False}
    if name == "of_queries":
        return {"TARGETS": targets, "DAMP": False}
    return {"TARGETS": targets, "DAMP": False, "GROUP": 4, **_parts(name, size)}


def _parts(name: str, size: int) -> dict[str, bool]:
    """Which coefficients a launch over keys computes."""
    return {"OF_K": name == "of_keys", "OF_V": name == "frozen" or size <= tiles.TOGETHER}


def _variant(
    kernel: Any,
    name: str,
    label: str,
    dtype: str,
    size: int,
    constants: Mapping[str, Any],
    cut: tiles.Tiles,
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942"),
) -> Variant:
    many = f", {constants['TARGETS']} targets" if "TARGETS" in constants else ""
    mask = {"keep": "*u8", "add": "*fp32"}.get(constants.get("MASK", ""), f"*{dtype}")
    kinds = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "mask_ptr": mask}
    numbers = dict.fromkeys(_NUMBERS, "fp32")
    signature = {
        n: kinds.get(n, f"*{dtype}") if n.endswith("_ptr") else numbers.get(n, "i32")
        for n in kernel.arg_names
        if n not in constants
    }
    title = f"{name}, {dtype}, head size {size}, {label}{many}, for {'/'.join(targets)}"
    return Variant(title, kernel, signature, constants, cut.warps, cut.stages, targets=targets)
