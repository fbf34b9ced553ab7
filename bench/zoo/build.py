"""A tiny model of a row, in eval mode, with random weights none of which is trivial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .config import PROFILES, parts, tiny_config
from .rows import TASKS, Row

#: Models that stay larger than this are not built.
_LARGEST = 110_000_000
#: Implementations of attention, the first that a model has is taken.
ATTENTIONS = ("sdpa", "eager")
#: How many times as many samples batch norms are calibrated on.
_COPIES = 8


class NotBuilt(Exception):
    """A row's model does not come out of its config, or does not run."""


def build(row: Row, seed: int = 0, attentions: Sequence[str] = ATTENTIONS) -> nn.Module:
    """The row's model, with the first of these implementations of attention that it has.

    Raises:
        NotBuilt: with what each attempt failed with.
    """
    reasons: list[str] = []
    for profile in PROFILES:
        for attention in attentions:
            try:
                return _model(row, profile, attention, seed)
            except Exception as error:  # whatever a config or a constructor raises, another one may do
                reasons.append(f"{type(error).__name__}: {first_line(error)}")
                if "atten" not in str(error).lower():
                    break
    raise NotBuilt(" | ".join(dict.fromkeys(reasons)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1]}"
    return (lines[0] if lines else "no message")[:300]


def _model(row: Row, profile: str, attention: str, seed: int) -> nn.Module:
    config = tiny_config(row, profile)
    for part in parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    kind: Any = model_class(row, config)
    own = getattr(kind, "config_class", None)
    if own is not None and not isinstance(config, own):  # the model of a part, of the text for instance
        config = next((part for part in parts(config) if isinstance(part, own)), config)
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in kind(config).parameters())
        except Exception:  # some constructors compute with their weights, which a meta device has not
            count = 0
    if count > _LARGEST:
        raise NotBuilt(f"too large: {count / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    with _marked_memory():
        model: nn.Module = kind._from_config(config, attn_implementation=attention)
    unsettle(model, seed + 1)
    return model.float().eval().requires_grad_(False)


def model_class(row: Row, config: PreTrainedConfig) -> type[nn.Module]:
    """The model that the task's auto-class finds; of several the first."""
    found = getattr(transformers, TASKS[row.task].auto)._model_mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[no-any-return]


def unsettle(model: nn.Module, seed: int) -> None:
    """Give every weight a random part: what is zero or one hides mistakes.

    Vectors (biases, norm weights) are moved by a tenth, zero matrices get small entries, and so does what a
    library leaves uninitialised, which :func:`_marked_memory` makes NaN. Where there are batch norms, weights
    get the size that keeps signals alive, as no norm does it here.
    """
    generator = torch.Generator().manual_seed(seed)
    if _batch_norms(model):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                nn.init.kaiming_normal_(module.weight, generator=generator)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            unset = ~torch.isfinite(parameter)
            if bool(unset.any()) or not bool(parameter.any()):
                parameter.copy_(torch.where(unset | (parameter == 0), noise(parameter, 0.02), parameter))
            if parameter.dim() <= 1:
                parameter.add_(noise(parameter, 0.1))


def calibrate(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Give batch norms the statistics of what reaches them on inputs like these, as training would have.

    With the means of 0 and variances of 1 that they start with, signals vanish in deep models. Statistics of
    the few inputs alone would blow up the differences between them: where two samples leave one number of a
    channel each, both become 1 or -1 whatever they were, and layer upon layer of this amplifies rounding
    until no digit of float32 is left. So noise joins the inputs. Channels that hardly vary all the same would
    be blown up too, so half the mean variance is the least.
    """

    def measure(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        module.running_mean.copy_(x.mean(1))
        variance = x.var(1)
        module.running_var.copy_(variance.clamp_min(float(variance.mean()) / 2).clamp_min(1e-3))

    handles = [m.register_forward_pre_hook(measure) for m in _batch_norms(model)]
    try:
        if handles:
            with torch.no_grad():
                model(**_with_noise(inputs))
    finally:
        for handle in handles:
            handle.remove()


def _with_noise(inputs: dict[str, Any], seed: int = 4) -> dict[str, Any]:
    """The inputs, and the same again some times with noise in place of the floating point ones."""
    generator = torch.Generator().manual_seed(seed)

    def more(name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point() or name.endswith("mask"):
            return torch.cat([x] * _COPIES)
        others = torch.randn((_COPIES - 1) * len(x), *x.shape[1:], generator=generator)
        return torch.cat([x, others.to(x)])

    return {name: more(name, x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in found if m.running_mean is not None]


@contextmanager
def _marked_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that weights that nobody initialises are the same in every run."""
    before = torch.are_deterministic_algorithms_enabled()
    # In this mode PyTorch fills new memory, see torch.utils.deterministic.fill_uninitialized_memory.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
