"""Tensors of an artifact: each piece of memory once, behind a safetensors header, mapped and not read.

A constant of a graph is a view (dtype, shape, stride, offset) of a piece, so tied weights and slices of one
tensor share it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ArtifactError, first_line
from .graph import DTYPES
from .strict import check, fields, refuse, sizes

#: What PyTorch aligns memory to. Kernels may round differently on other addresses.
_ALIGNMENT = 64
#: Number types as every version of safetensors names them; others are stored as bytes.
_STORED = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_CHUNK = 2**24
#: Bytes of a view that no memory holds.
_MOST = 1 << 48


@dataclass(frozen=True)
class View:
    """A constant: where it lies in which piece."""

    piece: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "piece": self.piece,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "stride": list(self.stride),
            "offset": self.offset,
        }

    @staticmethod
    def from_data(data: Any, where: str) -> View:
        """What :meth:`to_data` gave, checked.

        Raises:
            ArtifactError: anything else.
        """
        piece, dtype, shape, stride, offset = fields(
            data, where, piece=str, dtype=str, shape=list, stride=list, offset=int
        )
        if dtype not in DTYPES:
            refuse(where, f"has the dtype {dtype[:40]!r}")
        found = View(
            piece, DTYPES[dtype], sizes(shape, f"{where}.shape"), sizes(stride, f"{where}.stride"), offset
        )
        if len(found.shape) != len(found.stride) or offset < 0:
            refuse(where, "has no stride for each size, or a negative offset")
        return found

    @property
    def stop(self) -> int:
        """Behind the last element that it reads."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def of(self, piece: Tensor, where: str) -> Tensor:
        """The constant, of its piece as it is stored.

        Raises:
            ArtifactError: the piece has another dtype or is too short.
        """
        stored = self.dtype if self.dtype in _STORED else torch.uint8
        if piece.dtype is not stored:
            refuse(where, f"is {self.dtype}, but its tensor is {piece.dtype}")
        flat = piece.reshape(-1)
        if stored is not self.dtype:
            if flat.numel() % self.dtype.itemsize:
                refuse(where, f"has {flat.numel()} bytes for {self.dtype}")
            flat = flat.view(self.dtype)
        if self.stop > flat.numel():
            refuse(where, f"reads {self.stop} elements of a tensor of {flat.numel()}")
        if math.prod(self.shape) * self.dtype.itemsize > _MOST:  # of the same memory, by strides of 0
            refuse(where, f"has {math.prod(self.shape)} elements")
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(eq=False)
class Pieces:
    """Constants of several graphs while they are collected: views, and the memory that they lie in."""

    tensors: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    known: dict[Any, int] = field(default_factory=dict)

    def add(self, name: str, tensor: Any) -> int:
        """The number of a constant; the same for the same view of the same memory.

        Raises:
            ArtifactError: not a plain dense tensor.
        """
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ArtifactError(
                f"Weight '{name}' is a {type(tensor).__name__}, not a plain tensor: such weights cannot be "
                "saved."
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise ArtifactError(f"Weight '{name}' ({tensor.layout}, {tensor.device}) cannot be saved.")
        if tensor.dtype not in DTYPES.values():
            raise ArtifactError(f"Weight '{name}' is {tensor.dtype}, which no artifact may hold.")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        place = _place(tensor) if tensor.numel() else name
        if place not in self.known:
            self.known[place] = len(self.tensors)
            self.tensors.append(tensor)
            self.names.append(name)
        return self.known[place]

    def packed(self) -> tuple[list[View], dict[str, Tensor]]:
        """A view for each constant, and the pieces by name: contiguous, without overlap."""
        views: list[View | None] = [None] * len(self.tensors)
        pieces: dict[str, Tensor] = {}
        for group in _overlapping(self.tensors):
            start = min(int(self.tensors[i].storage_offset()) for i in group)
            stop = max(_reach(self.tensors[i]) for i in group)
            name = _free(self.names[group[0]], pieces)
            first = self.tensors[group[0]]
            if len(group) == 1 and first.is_contiguous():
                pieces[name] = first
            else:
                pieces[name] = first.as_strided((stop - start,), (1,), start)
            for i in group:
                tensor = self.tensors[i]
                views[i] = View(
                    name,
                    tensor.dtype,
                    tuple(tensor.shape),
                    tuple(tensor.stride()),
                    int(tensor.storage_offset()) - start,
                )
        return [view for view in views if view is not None], pieces


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.untyped_storage()._cdata,
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.storage_offset(),
    )


def _reach(tensor: Tensor) -> int:
    view = View("", tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
    return view.stop


def _overlapping(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that lie over one another in memory, together; in the order of the first of each."""
    by_storage: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        key = (tensor.untyped_storage()._cdata, tensor.dtype) if tensor.numel() else i
        by_storage.setdefault(key, []).append(i)
    groups: list[list[int]] = []
    for members in by_storage.values():
        end = -1
        for i in sorted(members, key=lambda i: tensors[i].storage_offset()):
            if tensors[i].storage_offset() < end:
                groups[-1].append(i)
            else:
                groups.append([i])
            end = max(end, _reach(tensors[i])) if len(groups[-1]) > 1 else _reach(tensors[i])
    return sorted(groups, key=min)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken or name.startswith(("__", "fxlrp.")):
        name = f"tensor.{name}.{len(taken)}"
    return name


# -- the file --------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes."""
    found = hashlib.sha256()
    for block in blocks(tensor):
        found.update(block)
    return found.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor, in the place of what is there once it is complete.

    Tensors of whole multiples of 64 bytes come first, so that each starts at such a multiple, as PyTorch's
    own memory does.
    """
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % _ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        native = tensor.dtype in _STORED
        shape = list(tensor.shape) if native else [tensor.nbytes]
        header[name] = {
            "dtype": _STORED[tensor.dtype] if native else "U8",
            "shape": shape,
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                _write(file, tensors[name])
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write(file: IO[bytes], tensor: Tensor) -> None:
    for block in blocks(tensor):
        file.write(block)


def blocks(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, some megabytes at a time where it is on another device."""
    flat = tensor.reshape(-1)
    step = max(1, _CHUNK // tensor.dtype.itemsize)
    for start in range(0, flat.numel(), step):
        block = flat[start : start + step].cpu()
        yield memoryview((ctypes.c_ubyte * block.nbytes).from_address(block.data_ptr())).cast("B")


@dataclass(frozen=True, eq=False)
class Stored:
    """A safetensors file: its metadata, and its tensors on demand."""

    path: Path
    metadata: Mapping[str, str]
    names: tuple[str, ...]
    _file: Any

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from the file."""
        found: Tensor = self._file.get_tensor(name)
        return found

    def aligned(self, name: str) -> Tensor:
        """A tensor, mapped where it starts at a multiple of 64 bytes, as PyTorch's own do; else a copy."""
        tensor = self.tensor(name)
        return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def read(path: Path) -> Stored:
    """Open a safetensors file; its header is checked, its tensors are mapped and not read.

    Raises:
        ArtifactError: there is none, or it is no complete one.
        ImportError: the package safetensors is missing.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("Loading an artifact needs safetensors: pip install safetensors") from error
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        return Stored(path, dict(file.metadata() or {}), tuple(file.keys()), file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no artifact, or it was cut short or changed: {first_line(error)}."
        ) from error


def refuse_changed(stored: Stored, digests: Mapping[str, Any]) -> None:
    """Compare every tensor with its checksum.

    Raises:
        ArtifactError: with the first one that differs.
    """
    for name in stored.names:
        if digest(stored.tensor(name)) != check(digests[name], str, "manifest.tensors"):
            raise ArtifactError(
                f"Tensor '{name}' of {stored.path} is not what was saved: the file was changed or damaged. "
                "Copy it anew, or save it again."
            )
