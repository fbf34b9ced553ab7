"""A progress bar for long loops, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

#: Seconds before a bar shows at all, and between two of its updates: on a terminal, in a log file.
_DELAY, _TERMINAL, _LOG = 1.0, 0.1, 10.0
_WIDTH = 30


def progress(items: Iterable[T], title: str, *, shown: bool = True) -> Iterator[T]:
    """The items one by one, with a bar on stderr that shows once they have taken more than a second.

    On a terminal the bar is one line that moves; elsewhere it is a new line every ten seconds.
    """
    total = len(items) if isinstance(items, Sized) else None
    moves = sys.stderr.isatty()
    start = time.monotonic()
    due, drawn = start + (_DELAY if moves else _LOG), False
    for done, item in enumerate(items):
        now = time.monotonic()
        if shown and now >= due:
            due, drawn = now + (_TERMINAL if moves else _LOG), True
            _draw(title, done, total, now - start, moves)
        yield item
    if drawn and moves:
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)


def _draw(title: str, done: int, total: int | None, seconds: float, moves: bool) -> None:
    text = f"{title}: {done}"
    if total:
        filled = _WIDTH * done // total
        left = seconds / done * (total - done) if done else float("nan")
        text += f"/{total} [{'=' * filled}{' ' * (_WIDTH - filled)}] {left:.0f} s left"
    else:
        text += f", {seconds:.0f} s"
    print(f"\r{text[:79]:79}" if moves else text, end="" if moves else "\n", file=sys.stderr, flush=True)
