"""A PNG of an image beside the heatmap of each method."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fxlrp.report._values import Scale, image_values, limits, number, pixels, rgb

# Inches: at the edges, between panels, for the names above the panels, for the title, for a colour bar.
EDGE, GAP, NAME, TITLE, BAR = 0.2, 0.3, 0.35, 0.4, 0.85


def save_image(
    path: str | Path,
    image: Tensor,
    relevance: Mapping[str, Tensor],
    *,
    scale: Scale = "shared",
    title: str | None = None,
    panel: float = 2.4,
    dpi: int = 150,
) -> Path:
    """Write a PNG of the image [H, W] or [C, H, W] and each method's relevance, of the same H and W.

    Relevance [C, H, W] is summed over channels. Red is positive, blue negative, 0 white; the colour bar is
    symmetric. Panels are `panel` inches wide and keep the image's aspect. Returns the path. Raises ValueError
    where sizes differ or a value is not finite, ImportError where matplotlib is missing.
    """
    maps = image_values(relevance, image)
    peaks = limits(maps, scale)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a PNG needs matplotlib: pip install fxlrp[report]") from error

    picture = pixels(image)
    height = panel * picture.shape[0] / picture.shape[1]
    last = list(maps)[-1]
    bars = {name: BAR if scale == "method" or name == last else 0.0 for name in maps}
    width = EDGE + panel + sum(GAP + panel + bars[name] for name in maps) + EDGE
    total = EDGE + height + NAME + (0.0 if title is None else TITLE)

    figure = Figure(figsize=(width, total), dpi=dpi, facecolor="white")
    # The Agg canvas of its own, not pyplot: no global state and no display needed.
    FigureCanvasAgg(figure)
    colors = LinearSegmentedColormap.from_list(
        "relevance", [tuple(c / 255 for c in rgb(step / 64 - 1)) for step in range(129)], N=257
    )
    if title is not None:
        figure.suptitle(title, y=1 - (EDGE + 0.05) / total, fontsize=12, fontweight="bold", va="center")

    def box(left: float, wide: float) -> tuple[float, float, float, float]:
        return left / width, EDGE / total, wide / width, height / total

    axes = figure.add_axes(box(EDGE, panel), title="input", xticks=[], yticks=[])
    axes.imshow(picture.numpy(), interpolation="nearest")
    left = EDGE + panel
    for name, grid in maps.items():
        label = f"{name}  (sum {number(grid.sum().item())})"
        axes = figure.add_axes(box(left + GAP, panel), title=label, xticks=[], yticks=[])
        shown = axes.imshow(
            grid.numpy(), cmap=colors, vmin=-peaks[name], vmax=peaks[name], interpolation="nearest"
        )
        left += GAP + panel
        if bars[name]:
            figure.colorbar(shown, cax=figure.add_axes(box(left + 0.12, 0.12))).ax.tick_params(labelsize=8)
            left += bars[name]
    for axes in figure.axes:
        axes.title.set_fontsize(10)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        figure.savefig(file, format="png", dpi=dpi)
    return target
