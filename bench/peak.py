"""Peak memory of a function in this process, above what the process holds before."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_above(run: Callable[[], Any]) -> float:
    """MiB that a second run takes at its highest, above what is resident after the first.

    The first traces and compiles, which is not part of an explanation; what it freed is handed back, so that
    it does not serve the second unseen.
    """
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text()
    high = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    return high - before
