"""From a target and a model's output to a relevance graph's seed: which rows, scalar, operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .bundle import Bundle, bundle
from .compiler.activity import Source, candidates
from .compiler.capture import Captured, identifier
from .compiler.graphs import arg, outputs, value
from .compiler.inputs import Bound
from .compiler.pipeline import Rows
from .compiler.seed import Seed, tensor_outputs
from .errors import TargetError
from .targets import Function, Span, Target, resolve
from .traces import Trace

#: Inputs that say which positions are padding, by the names that libraries use; for a decoder's output its
#: own first.
_MASKS = ("decoder_attention_mask", "attention_mask")
#: The end of names of masks that are True where there is padding, as in PyTorch's own Transformer.
_PADDING = "key_padding_mask"
#: How names of a decoder's inputs begin.
_DECODER = "decoder_"


def seed_of(
    trace: Trace, bound: Bound, target: Target | Bundle, lead: Any = None
) -> tuple[Rows | None, Seed]:
    """The rows that a target reads, the scalar that it explains; ``lead``: how many, of several targets."""
    flat = outputs(trace.canonical.graph.graph)
    if isinstance(target, Function):
        indices = tensor_outputs(flat)
        return None, Seed(
            _FunctionScore(target, trace.captured, indices), indices, (), None, bound.tensors[0].device
        )
    index = logits_of(trace)
    logits = value(flat[index])
    batch, device = logits.shape[0], logits.device
    names = _operand_names(target)
    if logits.dim() == 3:
        given = getattr(target, "position", None) is not None
        mask = None if given else _mask(trace, bound, index)
        rows = Rows(
            index, "target_position" if given else mask, given, bool(mask and mask.endswith(_PADDING))
        )
        if isinstance(target, Bundle):
            return rows, Seed(_ManyScore(target), (0,), names, batch, device, lead, target.own_rows)
        return rows, Seed(_RowScore(target), (0,), names, batch, device)
    score = _ManyScore(target) if isinstance(target, Bundle) else _ClassScore(target)
    return None, Seed(score, (index,), names, batch, device, lead)


def operands_of(trace: Trace, bound: Bound, target: Target) -> tuple[Tensor, ...]:
    """What the relevance graph of one target takes besides the model's inputs, checked."""
    return () if isinstance(target, Function) else resolve(target, *_read(trace, bound))


def bundle_of(trace: Trace, bound: Bound, target: Target) -> Bundle:
    """Several targets as their relevance graph takes them, checked."""
    ids = _ids(trace, bound) if isinstance(target, Span) else None
    return bundle(target, *_read(trace, bound), ids)


@dataclass(frozen=True)
class Reading:
    """Where targets are read.

    Attributes:
        shape: of the logits, in the trace's symbols.
        mask: the input that tells padding, by name, or None.
        is_padding: whether it is true where there is padding.
        ids: the input whose tokens a span names, or None.
    """

    shape: tuple[Any, ...]
    mask: str | None
    is_padding: bool
    ids: str | None


def reading_of(trace: Trace, bound: Bound) -> Reading | None:
    """Where targets of such inputs are read; None where the model has no logits."""
    try:
        index = logits_of(trace)
    except TargetError:
        return None
    shape = tuple(value(outputs(trace.canonical.graph.graph)[index]).shape)
    mask = _mask(trace, bound, index) if len(shape) == 3 else None
    ids = _ids(trace, bound) if len(shape) == 3 else None
    names = {identifier(name): name for name in bound.names}
    own = next((n for n, tensor in bound.by_name.items() if tensor is ids), None)
    return Reading(shape, mask and names[mask], bool(mask and mask.endswith(_PADDING)), own)


def logits_of(trace: Trace) -> int:
    """Which of the graph's outputs the logits are.

    Raises:
        TargetError: there are none.
    """
    index = trace.captured.outputs.logits()
    if index is None:
        raise TargetError(
            f"The model returns {trace.captured.outputs.describe()}: no logits to explain. "
            "Say what to explain with a function of the output: "
            "explainer(…, target=lambda output: output.…[:, 0])."
        )
    logits = value(outputs(trace.canonical.graph.graph)[index])
    if not logits.is_floating_point() or logits.dim() not in (1, 2, 3):
        raise TargetError(
            f"The output has shape {tuple(logits.shape)} and dtype {logits.dtype}; classes are read off "
            "[batch, classes] or [batch, sequence, classes]. "
            "Say what to explain with a function of the output."
        )
    return index


def _mask(trace: Trace, bound: Bound, index: int) -> str | None:
    """The padding mask that fits a sequence output, by name."""
    shape = _output_shape(trace, bound, index)
    decodes = any(name.startswith(_DECODER) for name in bound.names)
    names = [*_MASKS, *(name for name in bound.names if name.endswith(_PADDING))]
    for name in names:
        if name == "attention_mask" and decodes:
            continue
        tensor = bound.by_name.get(name)
        if tensor is not None and tensor.shape == shape[:2]:
            return identifier(name)
    return None


def _read(trace: Trace, bound: Bound) -> tuple[tuple[int, ...], Any, Tensor | None]:
    """Shape, device and padding mask of the logits."""
    index = logits_of(trace)
    shape = _output_shape(trace, bound, index)
    name = _mask(trace, bound, index) if len(shape) == 3 else None
    masks = {identifier(n): ~t.bool() if n.endswith(_PADDING) else t for n, t in bound.by_name.items()}
    return (
        shape if len(shape) > 1 else (*shape, 1),
        bound.tensors[0].device,
        None if name is None else masks[name],
    )


def _ids(trace: Trace, bound: Bound) -> Tensor | None:
    """The input whose ids are looked up in the largest table, of those as long as the logits; a decoder's own
    first.
    """
    shape = _output_shape(trace, bound, logits_of(trace))
    names = {identifier(name): name for name in bound.names}

    def rank(source: Source) -> tuple[bool, int]:
        table = value(arg(source.node, 0))
        return names[str(source.input.target)].startswith(_DECODER), int(table.numel())

    found = [
        source
        for source in candidates(trace.canonical.graph.graph)
        if source.is_lookup and bound.by_name[names[str(source.input.target)]].shape == shape[:2]
    ]
    return bound.by_name[names[str(max(found, key=rank).input.target)]] if found else None


def _operand_names(target: Target | Bundle) -> tuple[str, ...]:
    if isinstance(target, Bundle):
        return tuple(f"target_{i}" for i in range(len(target.fields)))
    return tuple(f"target_{name}" for name in target.indices)


def _output_shape(trace: Trace, bound: Bound, index: int) -> tuple[int, ...]:
    place = (index, *(t.shape for t in bound.tensors))
    if place not in trace.output_shapes:
        fake = value(outputs(trace.canonical.graph.graph)[index])
        trace.output_shapes[place] = trace.shapes.evaluate(fake.shape, bound.tensors)
    return trace.output_shapes[place]


@dataclass(frozen=True, eq=False)
class _ClassScore:
    target: Target

    def __call__(self, read: Any, operands: Any) -> Tensor:
        logits = read[0] if read[0].dim() > 1 else read[0].unsqueeze(-1)
        return self.target.score(logits, operands)


@dataclass(frozen=True, eq=False)
class _RowScore:
    target: Target

    def __call__(self, read: Any, operands: Any) -> Tensor:
        return self.target.score(read[0].squeeze(1), operands)


@dataclass(frozen=True, eq=False)
class _FunctionScore:
    target: Function
    captured: Captured
    indices: tuple[int, ...]

    def __call__(self, read: Any, operands: Any) -> Tensor:
        tensors = dict(zip(self.indices, read, strict=True))
        try:
            scalar = self.target.function(self.captured.outputs.rebuild(tensors))
        except Exception as error:
            raise TargetError(f"The target function failed on the model's output: {error}") from error
        if not isinstance(scalar, Tensor) or scalar.dim() > 1:
            shape = f"of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            raise TargetError(
                f"A target function returns one scalar per sample, [batch]; this one returned a result "
                f"{shape}."
            )
        return scalar if scalar.dim() else scalar.unsqueeze(0)


@dataclass(frozen=True, eq=False)
class _ManyScore:
    """Scalars ``[batch, K]`` of logits ``[batch]``, ``[batch, classes]`` or ``[batch, 1 or K, classes]``."""

    targets: Bundle

    def __call__(self, read: Any, operands: Any) -> Tensor:
        logits = read[0]
        rows = logits if logits.dim() == 3 else logits.reshape(logits.shape[0], 1, -1)
        return self.targets.score(rows.expand(-1, operands[0].shape[1], -1), operands)
