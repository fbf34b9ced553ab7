"""Every configuration of attention's kernels that a launch can choose, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..launch import Variant
from . import tiles
from .forward import attend
from .relevance import of_keys, of_queries, prepare

_WIDTHS = {2: ("bf16", "fp16"), 4: ("fp32",)}
_KERNELS = {"forward": attend, "of_queries": of_queries, "of_keys": of_keys, "frozen": of_keys}
_PLAIN = {"MASK": "none", "PER_KEY": True, "CAUSAL": True, "WINDOW": False, "CAP": "none"}
#: What a call may ask for beside the plain one, which is causal.
_FEATURES: dict[str, dict[str, Any]] = {
    "padded": {"CAUSAL": False, "MASK": "keep"},
    "biased": {"CAUSAL": False, "MASK": "add", "PER_KEY": False},
    "windowed": {"WINDOW": True},
    "capped": {"CAP": "identity"},
    "damped": {"DAMP": True},
}


def variants(precisions: Mapping[str, str]) -> Iterator[Variant]:
    """Each row of the tables in each dtype, plain, for one and for most targets, and with each feature."""
    for name, kind, width, size, cut in tiles.rows():
        shapes = {"D": size, "E": size, "DP": size, "EP": size, "QUERIES": cut.queries, "KEYS": cut.keys}
        common = {**_PLAIN, **shapes, "PRECISION": precisions[kind]}
        counts = [1 << i for i in range(cut.targets.bit_length())]
        for dtype in _WIDTHS[width]:
            for label, features, targets in [
                *(("plain", {}, count) for count in counts),
                *((label, given, counts[-1]) for label, given in _FEATURES.items()),
            ]:
                constants = {**common, **_own(name, targets), **features}
                if set(features) <= set(_KERNELS[name].arg_names) and not (name == "frozen" and label == "damped"):
                    yield _variant(_KERNELS[name], name, label, dtype, size, constants, cut, tiles.TARGETS[kind])
    for dtype in ("bf16", "fp16", "fp32"):
        for size in (64, 128, 256):
            for damp in (False, True):
                constants = {"E": size, "EP": size, "QUERIES": tiles.PREPARED.queries, "DAMP": damp}
                label = "damped" if damp else "plain"
                yield _variant(prepare, "prepare", label, dtype, size, constants, tiles.PREPARED)


def _own(name: str, targets: int) -> dict[str, Any]:
    """Constants of one kernel alone."""
    if name == "forward":
        return {"SINKS": False}
    if name == "of_queries":
        return {"TARGETS": targets, "DAMP": False}
    return {"TARGETS": targets, "DAMP": False, "GROUP": 4, "OF_K": name == "of_keys", "OF_V": True}


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
    numbers = dict.fromkeys(("inner", "outer", "epsilon", "score_epsilon", "factor", "factor_k", "factor_v"), "fp32")
    signature = {
        n: kinds.get(n, f"*{dtype}") if n.endswith("_ptr") else numbers.get(n, "i32")
        for n in kernel.arg_names
        if n not in constants
    }
    title = f"{name}, {dtype}, head size {size}, {label}{many}, for {'/'.join(targets)}"
    return Variant(title, kernel, signature, constants, cut.warps, cut.stages, targets=targets)
