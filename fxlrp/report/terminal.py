"""Heatmaps on the terminal: tokens on coloured grounds, images in half blocks, numbers without colour."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TextIO

from torch import Tensor

from fxlrp.report._values import (
    Color,
    Scale,
    aligned,
    image_values,
    is_dark,
    limits,
    number,
    pieces,
    pixels,
    rgb,
    token_values,
)

RESET = "\x1b[0m"
BOLD = "\x1b[1m"


def print_tokens(
    tokens: Sequence[str],
    relevance: Mapping[str, Tensor],
    *,
    scale: Scale = "shared",
    title: str | None = None,
    file: TextIO | None = None,
) -> None:
    """Print `render_tokens`, in colour where the stream is a terminal and NO_COLOR is unset or empty."""
    stream = sys.stdout if file is None else file
    width = shutil.get_terminal_size((100, 24)).columns
    color = wants_color(stream)
    print(render_tokens(tokens, relevance, scale=scale, title=title, color=color, width=width), file=stream)


def print_image(
    relevance: Mapping[str, Tensor],
    *,
    image: Tensor | None = None,
    scale: Scale = "shared",
    title: str | None = None,
    zoom: int = 2,
    file: TextIO | None = None,
) -> None:
    """Print `render_image`, in colour where the stream is a terminal and NO_COLOR is unset or empty."""
    stream = sys.stdout if file is None else file
    color = wants_color(stream)
    print(render_image(relevance, image=image, scale=scale, title=title, zoom=zoom, color=color), file=stream)


def wants_color(stream: TextIO) -> bool:
    """Whether the stream is a terminal and the user has not set NO_COLOR (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and stream.isatty()


def render_tokens(
    tokens: Sequence[str],
    relevance: Mapping[str, Tensor],
    *,
    scale: Scale = "shared",
    title: str | None = None,
    color: bool = True,
    width: int = 100,
) -> str:
    """Return S tokens with each method's relevance [S] as text for a terminal of `width` columns.

    In colour: the sentence once per method, one below the other, each with its sum, and a legend. Without: a
    table of numbers, a line per token. Raises ValueError where a method's shape is not [S] or a value is not
    finite.
    """
    values = token_values(tokens, relevance)
    peaks = limits(values, scale)
    shown = pieces(tokens)
    if not color:
        return _join(title, _number_table(shown, values, peaks), color)
    sides = {name: (_safe(name), f"sum {number(sum(row))}") for name, row in values.items()}
    indent = 2 + max(_columns(text) for side in sides.values() for text in side)
    lines: list[str] = []
    for name, row in values.items():
        cells = [(piece, rgb(value / peaks[name])) for piece, value in zip(shown, row, strict=True)]
        body = _wrap(cells, max(width - indent, 20))
        if scale == "method":
            body.append(_legend(peaks[name]))
        # The name and the sum stand to the left of the first two lines.
        lines += [_pad(left, indent) + line for left, line in zip_longest(sides[name], body, fillvalue="")]
        lines.append("")
    lines = [line.rstrip() for line in lines]
    if scale == "shared":
        lines.append(" " * indent + _legend(next(iter(peaks.values()))))
    else:
        lines.pop()
    return _join(title, lines, color)


def render_image(
    relevance: Mapping[str, Tensor],
    *,
    image: Tensor | None = None,
    scale: Scale = "shared",
    title: str | None = None,
    zoom: int = 2,
    color: bool = True,
) -> str:
    """Return heatmaps side by side, each of relevance [H, W] or [C, H, W] (summed over channels).

    A pixel takes `zoom` columns and half as many lines. The image, [H, W] or [C, H, W], is shown first if
    given. Without colour: a grid of numbers per method. Raises ValueError where sizes differ or a value is
    not finite.
    """
    maps = image_values(relevance, image)
    peaks = limits(maps, scale)
    if not color:
        return _join(
            title,
            [line for name, grid in maps.items() for line in _number_grid(name, grid, peaks[name])],
            color,
        )
    panels = {} if image is None else {"input": _gray(image)}
    for name, grid in maps.items():
        panels[_safe(name)] = [[rgb(value / peaks[name]) for value in row] for row in grid.tolist()]
    blocks = [_panel(name, colors, zoom) for name, colors in panels.items()]
    lines = ["  ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    legends = [_legend(next(iter(peaks.values())))]
    if scale == "method":
        legends = [f"{_legend(peak)}   {_safe(name)}" for name, peak in peaks.items()]
    return _join(title, [*lines, "", *legends], color)


def _join(title: str | None, lines: Iterable[str], color: bool) -> str:
    head = [] if title is None else [f"{BOLD}{_safe(title)}{RESET}" if color else _safe(title), ""]
    return "\n".join([*head, *lines])


def _paint(text: str, color: Color) -> str:
    ink = (255, 255, 255) if is_dark(color) else (0, 0, 0)
    return f"\x1b[38;2;{_code(ink)};48;2;{_code(color)}m{text}{RESET}"


def _code(color: Color) -> str:
    return ";".join(map(str, color))


def _wrap(cells: Sequence[tuple[str, Color]], width: int) -> list[str]:
    """Break painted pieces into lines, at word starts only."""
    words: list[list[tuple[str, Color]]] = []
    for piece, color in cells:
        if piece.startswith(" ") or not words:
            words.append([])
        words[-1].append((piece, color))
    lines, used = [""], 0
    for word in words:
        length = sum(_columns(piece) for piece, _ in word)
        if used and used + length > width:
            # The space before the word falls to the line break.
            first, color = word[0]
            word = [(first.removeprefix(" "), color), *word[1:]]
            lines.append("")
            length, used = sum(_columns(piece) for piece, _ in word), 0
        lines[-1] += "".join(_paint(piece, color) for piece, color in word)
        used += length
    return lines


def _legend(peak: float, steps: int = 25) -> str:
    bar = "".join(_paint(" ", rgb(2 * step / (steps - 1) - 1)) for step in range(steps))
    return f"{number(-peak)} {bar} {number(peak)}"


def _panel(name: str, colors: Sequence[Sequence[Color]], zoom: int) -> list[str]:
    rows = [[color for color in row for _ in range(zoom)] for row in colors for _ in range(zoom)]
    if len(rows) % 2:
        rows.append(rows[-1])
    lines = [
        "".join(_half_block(*pair) for pair in zip(top, bottom, strict=True)) + RESET
        for top, bottom in zip(rows[::2], rows[1::2], strict=True)
    ]
    width = len(rows[0])
    # A name longer than its panel widens it.
    gap = " " * max(0, _columns(name) - width)
    return [_pad(name, width), *(line + gap for line in lines)]


def _half_block(upper: Color, lower: Color) -> str:
    # One character shows two pixels: its ink is the upper one, its ground the lower.
    return f"\x1b[38;2;{_code(upper)};48;2;{_code(lower)}m▀"


def _gray(image: Tensor) -> list[list[Color]]:
    return [
        [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in row]
        for row in pixels(image).tolist()
    ]


def _number_table(
    shown: Sequence[str], values: Mapping[str, Sequence[float]], peaks: Mapping[str, float]
) -> list[str]:
    columns = [["token", *(piece.strip() for piece in shown), "sum"]]
    columns += [[_safe(name), *aligned([*row, sum(row)], peaks[name])] for name, row in values.items()]
    for place, column in enumerate(columns):
        width = max(map(_columns, column))
        # Words to the left, numbers to the right.
        columns[place] = [_pad(cell, width, right=place > 0) for cell in column]
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def _number_grid(name: str, grid: Tensor, peak: float) -> list[str]:
    rows = [aligned(row, peak) for row in grid.tolist()]
    width = max(len(cell) for row in rows for cell in row)
    head = f"{_safe(name)} (sum {number(grid.sum().item())})"
    return [head, *(" ".join(cell.rjust(width) for cell in row) for row in rows), ""]


def _columns(text: str) -> int:
    """Terminal columns of a text: two for wide characters, none for combining ones."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _pad(text: str, width: int, right: bool = False) -> str:
    space = " " * max(0, width - _columns(text))
    return space + text if right else text + space


def _safe(text: str) -> str:
    return pieces([text])[0] if text else text
