"""Weights and vocabularies that travel inside the package."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import torch
from torch import Tensor


def read_text(name: str) -> str:
    """Return the text of the shipped file `name`."""
    return _folder().joinpath(name).read_text(encoding="utf-8")


def read_weights(name: str) -> dict[str, Tensor]:
    """Return the tensors of the shipped safetensors file `name`, as float32.

    Raises ImportError where safetensors is missing.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError("the demo weights need safetensors: pip install fxlrp[demo]") from error
    # Stored as float16 to halve the package; the models compute in float32.
    tensors = load(_folder().joinpath(name).read_bytes())
    return {key: value.float() for key, value in tensors.items()}


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write `state` to `path` as float16 safetensors."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {key: value.detach().to(torch.float16).contiguous() for key, value in state.items()}
    # By bytes: the library's own writer gives the file to its owner alone.
    path.write_bytes(save(halves))


def _folder() -> Traversable:
    return resources.files("fxlrp.demo").joinpath("weights")
