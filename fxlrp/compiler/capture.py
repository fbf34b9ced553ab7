"""Capture: model and inputs to one functional ATen graph that shares the model's weights.

The ladder: ``torch.export`` with dynamic sizes, ``torch.export`` for these sizes, a ``make_fx`` trace of this
very input. Each step must reproduce the model's own output on the inputs at hand, else the next one is tried.

Models may ask ``torch.compiler.is_exporting()`` and write kernels out as loops for runtimes that lack them.
An explanation runs where the model runs, so each step is tried first as if under ``torch.compile``, where the
answer is no, and then without: an export as one, a trace as the model runs by itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CaptureError, StochasticModelError, is_out_of_memory, place
from .causes import Failure, report
from .control_flow import AsTheDataLead, depends_on_data
from .faithful import compare, compare_gradients, run_model
from .functional import functionalize, rewrite
from .inputs import Bound, ambient_autocast
from .outputs import Outputs, flatten_output
from .provenance import module_path, source_line
from .shapes import Shapes
from .verify import verify_functional

#: Loggers that write tracebacks and graphs where an export fails.
_TALKATIVE = (
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "torch._export.non_strict_utils",
)
DYNAMIC, STATIC, TRACE = "dynamic export", "static export", "trace of this input"


#: What a model runs in while it is traced.
_Region = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured model.

    Attributes:
        graph: placeholders are the input tensors by name, ``get_attr`` nodes the model's own weights, the
            output a flat tuple of the model's output tensors; purely functional ATen.
        outputs: how the model's output is rebuilt from that tuple.
        shapes: for which input sizes the graph is valid.
        method: the step of the ladder that captured it.
        notes: what a report should say about it.
    """

    graph: fx.GraphModule
    outputs: Outputs
    shapes: Shapes
    method: str
    notes: tuple[str, ...]


def capture(model: nn.Module, bound: Bound, *, dynamic: bool = True, exported: bool = True) -> Captured:
    """Capture the model as it runs on these inputs: for other sizes too if ``dynamic``, and for other values
    if ``exported``.

    Raises:
        InputError: the model itself fails on these inputs.
        StochasticModelError: dropout is active.
        CaptureError: no step of the ladder reproduces the model.
    """
    _refuse_dropout(model)
    expected = run_model(model, bound)
    failures: list[Failure] = []
    steps: list[tuple[str, Callable[[], Captured]]] = [
        (DYNAMIC, lambda: _export(model, bound, _as_under_compile, dynamic=True)),
        (DYNAMIC, lambda: _export(model, bound, contextlib.nullcontext, dynamic=True)),
        (STATIC, lambda: _export(model, bound, _as_under_compile, dynamic=False)),
        (STATIC, lambda: _export(model, bound, contextlib.nullcontext, dynamic=False)),
        (TRACE, lambda: _trace(model, bound, _as_under_compile)),
        (TRACE, lambda: _trace(model, bound, contextlib.nullcontext)),
    ]
    first = 0 if dynamic and exported else 2 if exported else 4
    for method, step in steps[first:]:
        try:
            with _quiet():
                captured = step()
                verify_functional(captured.graph)
                difference = compare(captured.graph, bound, expected) or compare_gradients(
                    captured.graph, model, bound
                )
        except StochasticModelError:
            raise
        except Exception as error:  # whatever the tracer raises, the next step may still succeed
            if is_out_of_memory(error):
                raise
            failures.append(Failure.of(method, error))
            continue
        if difference is None:
            return Captured(
                captured.graph,
                captured.outputs,
                captured.shapes,
                captured.method,
                (*captured.notes, *dict.fromkeys(f"not captured by {failure}" for failure in failures)),
            )
        failures.append(Failure.because(method, difference))
    raise CaptureError(report(type(model).__name__, failures))


class _Flat(nn.Module):
    """The model as a function of its input tensors only, with its output as a flat tuple of tensors."""

    def __init__(self, model: nn.Module, bound: Bound, found: list[Outputs], region: _Region) -> None:
        super().__init__()
        self.model = model
        self.bound = bound
        self.found = found
        self.region = region
        self.autocast = ambient_autocast(model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.bound.rebuild(tensors)
        autocast = (
            torch.autocast(self.autocast[0], self.autocast[1]) if self.autocast else contextlib.nullcontext()
        )
        with autocast, self.region():
            flat, outputs = flatten_output(self.model(*args, **kwargs))
        self.found.append(outputs)
        return flat


def _export(model: nn.Module, bound: Bound, region: _Region, *, dynamic: bool) -> Captured:
    found: list[Outputs] = []
    tensors = bound.tensors
    sizes: Any = None
    if dynamic:
        tensors = _widened(tensors)
        auto = torch.export.Dim.AUTO
        sizes = {"tensors": tuple(dict.fromkeys(_dynamic_dims(t), auto) for t in tensors)}
    flat = _Flat(model, bound, found, region)
    with torch.enable_grad(), _without_autocast(model):
        program = torch.export.export(flat, tensors, dynamic_shapes=sizes, strict=False)
    _refuse_random(program.graph_module)
    program = functionalize(program)
    graph = _unlift(program, bound.names)
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return Captured(graph, found[-1], Shapes.of(placeholders), DYNAMIC if dynamic else STATIC, ())


def _trace(model: nn.Module, bound: Bound, region: _Region) -> Captured:
    """The model as it runs on this very input: branches on data as they fall, then exported as usual."""
    found: list[Outputs] = []
    flat = _Flat(model, bound, found, region)
    with torch.enable_grad(), _without_autocast(model):
        traced = _trace_values(flat, bound.tensors)
        if depends_on_data(traced):
            with fx.traceback.preserve_node_meta():
                traced = _trace_values(AsTheDataLead(traced).run, bound.tensors)
        _refuse_random(traced)
        program = torch.export.export(_Positional(traced), bound.tensors, strict=False)
    graph = _unlift(functionalize(program), bound.names)
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return Captured(
        graph,
        found[-1],
        Shapes.of(placeholders),
        TRACE,
        (
            "the model branches on its input's values: this graph is a trace of one input, "
            "others are traced anew",
        ),
    )


def _trace_values(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> fx.GraphModule:
    traced: fx.GraphModule = make_fx(
        function,
        tracing_mode="real",
        pre_dispatch=True,
        record_module_stack=isinstance(function, nn.Module),
        record_stack_traces=True,
        _error_on_data_dependent_ops=False,
    )(*tensors)
    return traced


class _Positional(nn.Module):
    """A traced graph with its output as a flat tuple."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with fx.traceback.preserve_node_meta():  # module paths and source lines go along
            return tuple(fx.Interpreter(self.model).run(*tensors))


def _widened(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of a batch of one, twice: torch.export takes a size of 1 for a constant."""
    if all(t.dim() > 0 and t.shape[0] == 1 for t in tensors):
        return tuple(t.expand(2, *t.shape[1:]).contiguous() for t in tensors)
    return tensors


def _dynamic_dims(tensor: Tensor) -> tuple[int, ...]:
    """The first two sizes of ids, masks and embeddings, all of a 4-d mask and of ids of pairs, the batch of
    images.
    """
    if tensor.dtype is torch.bool and tensor.dim() == 4:
        return (0, 2, 3)
    if not tensor.is_floating_point() and tensor.dim() == 3:
        return (0, 1, 2)
    return tuple(range(tensor.dim()))[
        : 1 if tensor.dim() > 3 or (tensor.is_floating_point() and tensor.dim() < 3) else 2
    ]


def _unlift(program: torch.export.ExportedProgram, names: tuple[str, ...]) -> fx.GraphModule:
    """The program's graph with its weights as attributes: the model's own tensors, not copies."""
    signature = program.graph_signature
    attributes: dict[str, Any] = {}
    tensors = {**program.constants, **program.state_dict}
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    mutated = len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)
    graph, env = fx.Graph(), {}
    inputs = iter(names)
    for node in program.graph.nodes:  # inputs first, so that no weight of the same name takes theirs
        if node.op == "placeholder" and node.name not in lifted:
            env[node] = graph.placeholder(identifier(next(inputs)))
            env[node].meta = node.meta
    for node in program.graph.nodes:
        if node in env:
            continue
        if node.op == "placeholder":
            target = lifted[node.name].removeprefix("model.")
            attributes[target] = tensors[lifted[node.name]]
            env[node] = graph.get_attr(target)
            env[node].meta = node.meta
        elif node.op == "output":
            # Buffers that the forward would update come first; the explanation leaves them alone.
            graph.output(tuple(env[out] for out in node.args[0][mutated:]))
        elif node.op == "get_attr":
            attributes[node.target] = attrgetter(node.target)(program.graph_module)
            env[node] = graph.node_copy(node, env.__getitem__)
        elif _is_assertion(node):
            continue
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    rewrite(graph, program.graph_module)
    graph.eliminate_dead_code()
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    module = fx.GraphModule({k: v for k, v in attributes.items() if k in used}, graph, "Captured")
    return module


def identifier(name: str) -> str:
    """An input's name as a Python identifier."""
    return re.sub(r"\W", "_", name)


def _is_assertion(node: fx.Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and any(
        part in name for part in ("_assert", "sym_constrain", "_guards_fn", "profiler._record", "_check")
    )


def _refuse_dropout(model: nn.Module) -> None:
    active = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    if active:
        raise StochasticModelError(
            f"Dropout is active in {len(active)} modules (first: '{active[0]}'), so the model's output is "
            "random. Call model.eval() first."
        )


def _refuse_random(graph: fx.GraphModule) -> None:
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_function" and _draws(node):
                raise StochasticModelError(
                    f"'{node.name}' ({node.target}) draws random numbers in "
                    f"{place(module_path(node), source_line(node))}. "
                    "Call model.eval() first, or switch it off."
                )


def _draws(node: fx.Node) -> bool:
    name = str(node.target)
    if "dropout" in name:
        return len(node.args) > 2 and bool(node.args[1]) and bool(node.args[2])
    if "scaled_dot_product_attention" in name:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate)
    if any(word in name for word in ("rrelu",)):
        return bool(node.args[3]) if len(node.args) > 3 else False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Outside the caller's autocast region: it is entered inside the trace, which records the casts."""
    ambient = ambient_autocast(model)
    with torch.autocast(ambient[0], enabled=False) if ambient else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _as_under_compile() -> Iterator[None]:
    """While a model is traced: ``is_compiling()`` says yes, ``is_exporting()`` says no."""
    compiling, exporting = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = True, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = compiling, exporting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch logs, warns and prints about attempts that fail: the report tells of them."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
