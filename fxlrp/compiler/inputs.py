"""A call's inputs by the names of the model's signature, and what tells one traced program from another."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Bound:
    """The inputs of one call, bound to the model's signature.

    Attributes:
        names: one name per tensor, as the model's signature calls it (``input_ids``; ``batch.0`` inside
            containers).
        tensors: the tensor inputs, contiguous, in the order of the names.
        key: what a traced program is specialised on besides shapes: names, dtypes, devices, all other values.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    key: tuple[Any, ...]
    _leaves: tuple[Any, ...]
    _spec: Any

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's ``(args, kwargs)`` with other tensors in place of its own."""
        replacement = iter(tensors)
        leaves = [next(replacement) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(zip(self.names, self.tensors, strict=True))


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound:
    """Bind a call's arguments to the signature of ``model.forward``.

    Raises:
        InputError: the arguments do not fit the signature, or there is no tensor among them.
    """
    return bind_to(inspect.signature(model.forward), type(model).__name__, args, kwargs)


def bind_to(
    signature: inspect.Signature, model: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Bound:
    """:func:`bind` for the signature of a model of this name.

    Raises:
        InputError: the arguments do not fit the signature, or there is no tensor among them.
    """
    paths, spec = pytree.tree_flatten_with_path((args, dict(kwargs)))
    parameters = list(signature.parameters.values())
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"These arguments do not fit {model}.forward: {error}.") from error
    leaves = tuple(leaf for _, leaf in paths)
    names = tuple(_name(path, parameters) for path, leaf in paths if isinstance(leaf, Tensor))
    # Tensors made in inference mode cannot be differentiated even later.
    tensors = tuple(
        leaf.clone() if leaf.is_inference() else leaf.contiguous()
        for leaf in leaves
        if isinstance(leaf, Tensor)
    )
    if not tensors:
        raise InputError(
            "No tensor among the inputs. Call the explainer as the model itself: explainer(input_ids, …)."
        )
    constants = tuple(_constant(leaf) for leaf in leaves)
    kinds = tuple((t.dtype, t.device, t.dim()) for t in tensors)
    return Bound(names, tensors, (names, kinds, constants, str(spec)), leaves, spec)


def constants_of(bound: Bound, signature: inspect.Signature) -> dict[str, Any]:
    """A call's arguments that are no tensors, by name."""
    paths, _ = pytree.tree_flatten_with_path(bound.rebuild(bound.tensors))
    parameters = list(signature.parameters.values())
    return {_name(path, parameters): leaf for path, leaf in paths if not isinstance(leaf, Tensor)}


def refuse_empty(bound: Bound) -> None:
    """Refuse an empty batch.

    Raises:
        InputError: an input has no elements.
    """
    for name, tensor in bound.by_name.items():
        if 0 in tensor.shape:
            raise InputError(
                f"Input '{name}' of shape {tuple(tensor.shape)} is empty: there is nothing to explain."
            )


def refuse_unknown(bound: Bound, names: Collection[str]) -> None:
    """Refuse names of inputs that this call does not have.

    Raises:
        InputError: with the names that it has.
    """
    unknown = [name for name in names if name not in bound.by_name]
    if unknown:
        raise InputError(
            f"There is no tensor input '{unknown[0]}' to explain in this call; it has "
            f"{', '.join(repr(name) for name in bound.names)}."
        )


def refuse_elsewhere(bound: Bound, model: nn.Module) -> None:
    """Refuse inputs that are not where the weights are.

    Raises:
        InputError: an input on a device that holds no weight.
    """
    weights = _devices(model)
    for name, tensor in bound.by_name.items():
        if weights and tensor.device not in weights:
            raise InputError(
                f"Input '{name}' is on {tensor.device}, the model's weights are on "
                f"{', '.join(sorted(map(str, weights)))}. "
                f"Move it there: {name}.to('{min(map(str, weights))}')."
            )


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What must not change for a trace to stay valid: modules, weights, flags and modes."""
    parts = [
        (
            id(m),
            len(m._forward_hooks) + len(m._forward_pre_hooks),
            _settings(m),
            id(m.__dict__.get("forward")),
            *((id(t), t.data_ptr(), t.dtype) for t in m._parameters.values() if t is not None),
            *((id(t), t.data_ptr(), t.dtype) for t in m._buffers.values() if t is not None),
        )
        for m in _modules(model)
    ]
    return (tuple(parts), ambient_autocast(model))


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules; ``model.modules()`` takes longer, which counts on every call."""
    found = {id(model): model}
    stack = [model]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def _devices(model: nn.Module) -> set[torch.device]:
    return {
        t.device
        for m in _modules(model)
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None
    }


_PLAIN = frozenset({bool, int, float, str})


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """A module's plain attributes: its mode, sizes, flags, factors."""
    return tuple([v for v in module.__dict__.values() if type(v) in _PLAIN])


def ambient_autocast(model: nn.Module) -> tuple[str, torch.dtype] | None:
    """The autocast region around the call, as (device type, dtype), or None."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return None
    for device_type in sorted({device.type for device in _devices(model)}):
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return device_type, torch.get_autocast_dtype(device_type)
    return None


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Without garbage collection: tracing makes millions of small objects that live on, and each pass of the
    collector walks all of them, which costs a quarter of the time on a deep model.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextlib.contextmanager
def plain_region() -> Iterator[None]:
    """Outside the caller's autocast, inference or autograd regions: captured graphs hold their effects."""
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def _name(path: tuple[Any, ...], parameters: list[inspect.Parameter]) -> str:
    outer, first, *rest = path
    if isinstance(outer, pytree.SequenceKey) and outer.idx == 0:  # positional: named by the signature
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        head = positional[first.idx].name if first.idx < len(positional) else f"args.{first.idx}"
    else:
        head = str(first.key)
    return ".".join([head, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in rest)])


def _constant(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return Tensor
    if _holds_tensors(leaf):
        raise InputError(
            f"An argument of type {type(leaf).__name__} holds tensors that cannot be traced (a cache?). Leave"
            " it out, or pass its tensors in tuples, lists or dicts."
        )
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return type(leaf), leaf


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, (type, nn.Module)) or callable(value):
        return False
    parts = [*getattr(value, "__dict__", {}).values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        parts += list(value)
    elif isinstance(value, Mapping):
        parts += list(value.values())
    return any(_holds_tensors(part, depth - 1) for part in parts)
