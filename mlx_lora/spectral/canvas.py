"""The look that the pictures share. Sizes are inches: matplotlib's layout engines take seconds."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

DPI = 110
HEADLINE = 0.45  # inches at the top of a picture
INK, QUIET, UNUSED, USED, WARNING = "#222222", "#6b6b6b", "#dcdcdc", "#2171b5", "#c2410c"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def blank(width: float, height: float, headline: str) -> "Figure":
    """A figure with its finding on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.12 / height, headline, va="top", size=12, weight="bold")
    return figure


def inches(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """New axes at a place given in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def shades(depth: int) -> "ScalarMappable":
    """The colour of each block, from yellow-green (first) to dark (last)."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    dark = ListedColormap(colormaps["viridis"](np.linspace(0.88, 0.0, 128)))
    return ScalarMappable(Normalize(0, max(depth, 1)), dark)


def logarithmic(axis: "Axes", low: float, high: float, extra: list[float] | None = None) -> None:
    """A log axis from low to high with plain numbers at the decades and at `extra`."""
    from matplotlib.ticker import NullLocator

    axis.set_yscale("log")
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = sorted({*(10.0**e for e in exponents), *(extra or [])})
    ticks = [t for t in ticks if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)


def whole_numbers(axis: "Axis", most: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most))


def card(headline: str, lines: Sequence[str]) -> "Figure":
    """A picture of words."""
    figure = blank(8.6, 1.7, headline)
    figure.text(0.035, 0.60, "\n".join(lines), va="top", linespacing=1.7)
    inches(figure, 0.15, 0.2, 0.04, 0.9).set(facecolor=WARNING, xticks=[], yticks=[])
    return figure


def png(figure: "Figure") -> bytes:
    """The picture as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
