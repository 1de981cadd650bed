"""The look that the pictures share. Sizes are inches: matplotlib's layout engines take seconds."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

DPI = 110
HEADLINE = 0.45  # inches at the top of a picture: two lines of the least legible size
LEGIBLE = 9  # points, bold
INK, QUIET, UNUSED, USED, WARNING = "#222222", "#6b6b6b", "#dcdcdc", "#2171b5", "#c2410c"
COLOURS = (  # told apart by most colour-blind readers
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a4fb3", "#222222",
)  # fmt: skip
MARKERS = "osD^v<>P"
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
CARDS = {  # what a picture says where there is nothing to draw
    "untrained": (
        "There is no spectrum, no rank and no dominance to show.",
        "BA = 0 is how every harmless start looks before its first step: outputs equal the base's.",
        "After a training it means that no gradient reached it, or that another one was saved.",
    ),
    "non_finite": (
        "A factor that holds NaN or infinity has no spectrum, no rank and no dominance.",
        "Every output that passes through it is lost.",
        "Go back to the last good checkpoint; lower the learning rate or clip gradients.",
    ),
    "magnitudes": (
        "The lengths of the weight's rows were trained, and no direction was: BA = 0.",
        "That has no spectrum and no rank; magnitude_change says how far the lengths went.",
        "Run `mlx-lora check` on it to see what it does to the outputs.",
    ),
    "unjudged": (
        "BA = 0, so that there is no spectrum; but DoRA also trains lengths of the weight's rows.",
        "They change the outputs unless they are still the base's, which an adapter does not hold.",
        "Name the base model to see it:  mlx-lora spectrum ADAPTER --model MODEL",
    ),
    "switched_off": (
        "A scale of 0 multiplies every update by nothing: outputs equal the base's.",
        "A scale schedule that starts at 0 saves this before its first steps.",
        "B and A get no gradient there either: start from a small scale instead.",
    ),
    "no base": (
        "Dominance is σ_max(scale·BA) / σ_max(W): how loud the adapter is beside its base.",
        "An adapter's files do not hold W.",
        "Name the base model to see it:  mlx-lora spectrum ADAPTER --model MODEL",
    ),
}


def blank(width: float, height: float, headline: str) -> "Figure":
    """A figure with its finding on top, in two lines where one would be too small to read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    room = 72 * (width - 0.3) / 0.62  # a bold letter is 0.62 of its size
    if room / len(headline) < LEGIBLE:
        headline = textwrap.fill(headline, int(room / LEGIBLE), break_long_words=False)
    size = min(12, room / max(map(len, headline.splitlines())))
    size = size if "\n" not in headline else min(size, LEGIBLE)
    figure.text(0.15 / width, 1 - 0.12 / height, headline, va="top", size=size, weight="bold")
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
    """A log axis from low to high, plain numbers at `extra`, the decades, and within short ones."""
    from matplotlib.ticker import NullLocator

    axis.set_yscale("log")
    within = (1, 2, 5) if high < 100 * low and not extra else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (*(m * 10.0**e for e in exponents for m in within), *(extra or ()))
    ticks = [t for t in marks if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)


def whole_numbers(axis: "Axis", most: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most, min_n_ticks=1))


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
