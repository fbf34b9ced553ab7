"""Inductor for graphs that are traced already: no Dynamo, no guards, weights and sizes as inputs.

A graph compiles for symbolic sizes and the strides that its inputs come in. Sizes of 1 are fixed, as Inductor
fixes them elsewhere. What else its kernels rely on (indices that fit into 32 bits, say) are conditions on the
sizes; other sizes than they allow for compile again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .graphs import placeholders, value


@dataclass(frozen=True, eq=False)
class Kernel:
    """What a graph was compiled to, and for which sizes.

    Attributes:
        run: takes the graph's inputs.
        env: where the compiler noted what it relied on.
        guards: that, as an expression of sizes.
    """

    run: Callable[..., Any]
    env: ShapeEnv
    guards: str | None

    def admits(self, sizes: Sequence[int]) -> bool:
        """Whether it holds for the sizes that its symbols stand for."""
        return not self.guards or bool(self.env.evaluate_guards_expression(self.guards, sizes))


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory, whatever its sizes.

    Attributes:
        order: its dimensions from the outermost to the innermost, each as far apart as the ones behind it are
            large; those left out are expanded. None: as it was traced.
    """

    order: tuple[int, ...] | None

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        """The layout of a dense tensor; of any other one the traced one."""
        wide = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d) > 0]
        order = sorted(wide, key=tensor.stride, reverse=True)
        expected = 1
        for d in reversed(order):
            if tensor.stride(d) != expected and tensor.numel():
                return Layout(None)
            expected *= tensor.shape[d]
        narrow = [d for d in range(tensor.dim()) if tensor.shape[d] <= 1]
        return Layout(tuple(sorted(wide + narrow)) if order == wide else (*narrow, *order))

    def strides(self, shape: Sequence[Any]) -> list[Any]:
        """The strides of a tensor of this shape; it is known how the tensor lies."""
        assert self.order is not None
        strides: list[Any] = [0] * len(shape)
        step: Any = 1
        for d in reversed(self.order):
            strides[d] = step
            step = step * (shape[d] or 1) if isinstance(shape[d], int) else step * shape[d]
        return strides


@dataclass(eq=False)
class Compilable:
    """A graph of tensors and sizes, whose inputs hold fake values, compiled as calls need it.

    Attributes:
        graph: without ``get_attr``: weights are inputs.
        kernels: what was compiled, by sizes of 1 and layouts.
    """

    graph: fx.GraphModule
    kernels: dict[Any, list[Kernel]] = field(default_factory=dict)
    given: tuple[Any, ...] = ()
    places: dict[Any, tuple[int, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given = tuple(value(node) for node in placeholders(self.graph.graph))
        for i, fake in enumerate(self.given):
            for dim, size in enumerate(fake.shape) if isinstance(fake, Tensor) else ((None, fake),):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.places.setdefault(size.node.expr, (i, dim))

    @property
    def is_complete(self) -> bool:
        """Whether all symbols that its inputs' sizes are expressions in can be read off them."""
        sizes = [s for v in self.given for s in ((*v.shape, *v.stride()) if isinstance(v, Tensor) else (v,))]
        free = [s.node.expr.free_symbols for s in sizes if isinstance(s, torch.SymInt)]
        return set().union(*free) <= self.places.keys()

    def kernel(self, args: Sequence[Any]) -> Callable[..., Any]:
        """What to call for inputs of these sizes and strides."""
        sizes = {s: args[i] if dim is None else args[i].shape[dim] for s, (i, dim) in self.places.items()}
        layouts: list[Layout | None] = []
        astray = []
        for i, (arg, fake) in enumerate(zip(args, self.given, strict=True)):
            layout = Layout.of(arg) if isinstance(arg, Tensor) else None
            if layout == Layout(None) and arg.stride() != tuple(_at(s, sizes) for s in fake.stride()):
                layout = Layout(tuple(range(arg.dim())))
                astray.append(i)
            layouts.append(layout)
        small = {symbol: size for symbol, size in sizes.items() if size <= 1}
        others = {symbol: size for symbol, size in sizes.items() if size > 1}
        known = self.kernels.setdefault((tuple(small.items()), tuple(layouts)), [])
        fitting = [kernel for kernel in known if kernel.admits(list(others.values()))]
        if not fitting:
            fitting = [self._compile(small, others, layouts)]
            known += fitting
        return functools.partial(_dense, fitting[0].run, astray) if astray else fitting[0].run

    def _compile(
        self, small: Mapping[Any, int], sizes: Mapping[Any, int], layouts: Sequence[Layout | None]
    ) -> Kernel:
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        symbols = {symbol: _symbol(mode, f"size{i}", n) for i, (symbol, n) in enumerate(sizes.items())}
        exprs = {symbol: sympy.Integer(size) for symbol, size in small.items()}
        exprs |= {symbol: s.node.expr for symbol, s in symbols.items()}

        def moved(size: Any) -> Any:
            """A size of the trace as one of this compilation."""
            if isinstance(size, int):
                return size
            expr = size.node.expr.xreplace(exprs)
            hint = _at(size, {**small, **sizes})
            return int(expr) if expr.is_Integer else env.create_symintnode(expr, hint=hint)

        inputs = []
        for fake, layout in zip(self.given, layouts, strict=True):
            if layout is None:
                inputs.append(moved(fake))
                continue
            shape = [moved(size) for size in fake.shape]
            strides = layout.strides(shape) if layout.order is not None else [moved(s) for s in fake.stride()]
            with mode:
                inputs.append(torch.empty_strided(shape, strides, dtype=fake.dtype, device=fake.device))
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        for node in graph.nodes:
            node.meta.clear()
        with torch.no_grad():
            run = torch._inductor.compile(fx.GraphModule({}, graph, "Block"), inputs)
        return Kernel(run, env, env.produce_guards_expression(tuple(symbols.values())))


def _dense(run: Callable[..., Any], astray: Sequence[int], *args: Any) -> Any:
    """Inputs that lie as nobody expected are copied."""
    return run(*(arg.contiguous() if i in astray else arg for i, arg in enumerate(args)))


def _at(size: Any, sizes: Mapping[Any, int]) -> int:
    """A size of the trace as a number."""
    return (
        size
        if isinstance(size, int)
        else int(size.node.expr.xreplace({k: sympy.Integer(v) for k, v in sizes.items()}))
    )


def _symbol(mode: FakeTensorMode, name: str, size: int) -> Any:
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    like = torch.empty(size, dtype=torch.uint8)
    return mode.from_tensor(like, symbolic_context=context, source=ConstantSource(name)).shape[0]
