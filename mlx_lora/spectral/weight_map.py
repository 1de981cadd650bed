"""`weights.json` and `weights.png`: how large the frozen matrices are, blocks × kinds of module."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.adapter.weights import CUT, PEAK, WeightStats
from mlx_lora.runlog import RunLog, atomically
from mlx_lora.spectral.canvas import HEADLINE, INK, QUIET, STYLE, blank, inches, png
from mlx_lora.spectral.spectrum import kinds, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON, PICTURE = "weights.json", "weights.png"
LEFT, BELOW, GAP, RIGHT = 0.55, 0.75, 0.55, 0.15  # inches
CELL, ROW, LEAST = 0.62, 0.24, 2.6  # inches: width and height of a cell, width of a map at least
Stats = Mapping[str, WeightStats]


def write(stats: Stats, folder: Path) -> None:
    """Both files, each whole or not there."""
    RunLog(folder).write_json(JSON, to_json(stats))
    with atomically(folder / PICTURE) as part:
        part.write_bytes(draw(stats))


def to_json(stats: Stats) -> dict[str, Any]:
    return {
        "cut": CUT,
        "outlying": outlying(stats),
        "matrices": {name: asdict(s) | {"peak": s.peak} for name, s in stats.items()},
    }


def outlying(stats: Stats) -> list[str]:
    """Matrices whose largest weight is more than PEAK times their size, the worst first."""
    worst = sorted(stats, key=lambda name: -stats[name].peak)
    return [name for name in worst if stats[name].peak > PEAK]


def draw(stats: Stats) -> bytes:
    """Two maps side by side: the size of each matrix, and how far its largest weight sticks out."""
    import matplotlib

    where = places(stats)
    columns = kinds(where)
    rows = sorted({block for block, _ in where.values()}, key=lambda b: (b is None, b))
    across, down = max(CELL * len(columns), LEAST), max(ROW * len(rows), 0.5)
    width, height = LEFT + 2 * across + GAP + RIGHT, down + BELOW + HEADLINE + 0.35
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(width, height, headline(stats))
        maps = {
            "rms, outliers cut": ({n: s.rms_robust for n, s in stats.items()}, "Blues", math.inf),
            "largest weight / rms": ({n: s.peak for n, s in stats.items()}, "Oranges", PEAK),
        }
        for at, (title, (values, colours, limit)) in enumerate(maps.items()):
            axes = inches(figure, LEFT + at * (across + GAP), BELOW, across, down)
            grid = gridded(values, where, rows, columns)
            heat(axes, grid, colours, limit)
            axes.set_title(title, loc="left", color=QUIET)
            axes.set_xticks(range(len(columns)), [kind.replace(".", ".\n") for kind in columns])
            axes.set_yticks(range(len(rows)), ["none" if r is None else str(r) for r in rows])
            axes.tick_params(length=0)
            for label in axes.get_xticklabels():
                label.set(rotation=35, ha="right", rotation_mode="anchor")
        figure.axes[0].set_ylabel("block")
        return png(figure)


def gridded(
    values: Mapping[str, float],
    where: Mapping[str, tuple[int | None, str]],
    rows: list[int | None],
    columns: list[str],
) -> np.ndarray:
    """The values as [rows, columns]; NaN where a block has no such matrix."""
    found = np.full((len(rows), len(columns)), np.nan)
    for name, value in values.items():
        block, kind = where[name]
        found[rows.index(block), columns.index(kind)] = value
    return found


def heat(axes: "Axes", grid: np.ndarray, colours: str, limit: float = math.inf) -> None:
    """Cells shaded by the logarithm, each with its number; those above `limit` in bold.

    The shades span a factor of four at least, with a limit from 3 to twice that, so that what is
    alike looks so.
    """
    real = grid[np.isfinite(grid) & (grid > 0)]
    low, high = (float(real.min()), float(real.max())) if real.size else (1.0, 1.0)
    middle, wide = math.sqrt(low * high), max(2.0, math.sqrt(high / low))
    ends = (middle / wide, middle * wide) if limit == math.inf else (3.0, max(2 * limit, high))
    place = np.log(np.where(grid > 0, grid, np.nan) / ends[0]) / math.log(ends[1] / ends[0])
    axes.imshow(place, aspect="auto", cmap=colours, vmin=-0.1, vmax=1.25)
    axes.set_facecolor("#f4f4f4")
    for (y, x), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        text = f"{value:.1f}" if 1 <= value < 10 else f"{value:.3g}"
        look: dict[str, Any] = {"color": "white" if place[y, x] > 0.75 else INK}
        look["weight"] = "bold" if value > limit else "normal"
        axes.text(x, y, text, ha="center", va="center", size=7.5, **look)


def headline(stats: Stats) -> str:
    """Whether some matrices stick out.

    >>> one = WeightStats((2, 2), 1.0, 1.0, 0.6, 2.0, 3.0, 3.0, 0.0)
    >>> headline({"a": one, "b": one})
    'No matrix has weights beyond 50 times its size'
    """
    names = outlying(stats)
    if not names:
        return f"No matrix has weights beyond {PEAK:g} times its size"
    worst = names[0]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"Outliers in {worst.removeprefix('model.')} ({stats[worst].peak:.0f} × its rms){more}"
