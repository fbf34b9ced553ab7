"""Rows in parallel, each in a process of its own with a limit on its time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from .rows import Row

_GIGABYTE = 1 << 30


def run(rows: Sequence[Row], *, jobs: int, timeout: float, gigabytes: float) -> Iterator[dict[str, Any]]:
    """Results of the rows as they come; see :func:`bench.zoo.check.check`.

    Args:
        rows: what to check.
        jobs: how many at a time.
        timeout: seconds for each.
        gigabytes: address space of each process.
    """
    # One thread each: set before the server starts, whose children inherit it.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    waiting, running = list(reversed(rows)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Running.start(context, waiting.pop(), gigabytes))
            deadline = min(r.started for r in running) + timeout
            wait([r.receiver for r in running], max(0.0, deadline - time.monotonic()))
            for r in list(running):
                result = r.result(timeout)
                if result is not None:
                    running.remove(r)
                    yield result
    finally:
        for r in running:
            r.process.kill()


@dataclass(eq=False)
class _Running:
    """A row's process."""

    row: Row
    process: ForkServerProcess
    receiver: Connection
    started: float

    @staticmethod
    def start(context: ForkServerContext, row: Row, gigabytes: float) -> _Running:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(row, sender, gigabytes), daemon=True)
        process.start()
        sender.close()  # so that the receiver sees the end of a process that dies
        return _Running(row, process, receiver, time.monotonic())

    def result(self, timeout: float) -> dict[str, Any] | None:
        """The row's result, None while it is still at work."""
        elapsed = time.monotonic() - self.started
        if self.receiver.poll():
            try:
                found: dict[str, Any] | None = self.receiver.recv()
            except EOFError:
                self.process.join()
                found = self._ended("crashed", f"the process died with code {self.process.exitcode}")
        elif elapsed > timeout:
            found = self._ended("timeout", f"not done after {timeout:.0f} s")
        else:
            return None
        self.process.kill()
        self.process.join()
        self.receiver.close()
        return found

    def _ended(self, status: str, reason: str) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 2)
        named = {"task": self.row.task, "model": self.row.model}
        return {**named, "status": status, "reason": reason, "seconds_total": seconds}


def _child(row: Row, sender: Connection, gigabytes: float) -> None:
    """Check one row, quietly."""
    from .check import check

    limit = int(gigabytes * _GIGABYTE)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sender.send(check(row))
    sender.close()
