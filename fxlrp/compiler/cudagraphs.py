"""CUDA graphs: a runner recorded once for each shape of inputs, then replayed by one launch.

For small inputs a GPU waits for the host to launch kernels. A recording holds all launches with fixed
addresses: inputs are copied to where they were when it was recorded, results are copied out, since the next
replay writes over them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FxlrpError, InputError, first_line

#: Runs before a recording: kernels compile, libraries make their work spaces, allocators grow.
_WARM_UP = 3
#: Recordings that are kept; each holds the memory of a whole run.
_KEPT = 16


class Recorder(Protocol):
    """What records: CUDA, or a stand-in where there is none."""

    def turn(self) -> AbstractContextManager[None]:
        """In which one run is copied in, replayed and copied out, after all before it."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run beside what is recorded later."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the run, and the results that a replay writes into."""


@dataclass(eq=False)
class CudaRecorder:
    """Records on one CUDA device; recordings share their memory, as one runs at a time."""

    device: torch.device
    pool: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: Any = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For one thread at a time; a stream waits for what the last turn's has still to do."""
        with self.lock, torch.cuda.device(self.device):
            if self.done is not None:
                torch.cuda.current_stream().wait_event(self.done)
            yield
            self.done = torch.cuda.Event()
            self.done.record()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """On a stream of its own, as recording asks for."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As a graph that is replayed on the current stream."""
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                results = run()
        return graph.replay, results


@dataclass(eq=False)
class Replayed:
    """A runner by replay.

    Attributes:
        run: what is recorded.
        recorder: what records.
        known: inputs, replay and results by shapes.
    """

    run: Callable[..., Any]
    recorder: Recorder
    known: dict[Any, tuple[list[Tensor], Callable[[], None], Any]] = field(default_factory=dict)

    def __call__(self, *args: Tensor) -> Any:
        """Results that no later call writes over.

        Raises:
            InputError: the runner waits for values on the host, which cannot be recorded.
        """
        shapes = tuple([a.shape for a in args])
        with self.recorder.turn():
            if shapes not in self.known:
                recorded = self._recorded(args)
                if len(self.known) >= _KEPT:
                    del self.known[next(iter(self.known))]
                self.known[shapes] = recorded
            inputs, replay, results = self.known[shapes]
            for mine, given in zip(inputs, args, strict=True):
                mine.copy_(given)
            replay()
            return pytree.tree_map_only(Tensor, torch.clone, results)

    def _recorded(self, args: tuple[Tensor, ...]) -> tuple[list[Tensor], Callable[[], None], Any]:
        inputs = [a.clone() for a in args]
        self.recorder.warm_up(lambda: self.run(*inputs))
        try:
            return inputs, *self.recorder.record(lambda: self.run(*inputs))
        except torch.OutOfMemoryError:
            raise
        except FxlrpError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"This explanation cannot be recorded as a CUDA graph: {first_line(error)}. "
                "Use backend='inductor'."
            ) from error
