"""A comparison as one picture: ranks and sizes of each adapter, overlap and change by module."""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mlx_lora.report.compare import Between, Comparison, PairOf
from mlx_lora.report.compare_show import cosine, ends
from mlx_lora.spectral.canvas import COLOURS, STYLE, WARNING, blank, inches, png
from mlx_lora.spectral.names import kinds, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = Callable[[Between], float | None]
MAPS: tuple[tuple[str, str, Value], ...] = (
    ("overlap of the spaces read", "Blues", lambda row: row.overlap_inputs),
    ("overlap of the spaces written", "Blues", lambda row: row.overlap_outputs),
    ("share of the change", "Oranges", lambda row: row.change_share),
)
ROW, COLUMN = 0.26, 0.62  # inches of a cell


def draw(found: Comparison) -> bytes:
    """The picture as a PNG."""
    from matplotlib import rc_context

    with rc_context(STYLE):  # type: ignore[arg-type]
        return png(picture(found))


def picture(found: Comparison) -> "Figure":
    """Bars of every adapter by kind of module on top, heat maps of first against last below."""
    where, pair = places(found.modules), ends(found)
    columns = kinds(where)
    rows = sorted({layer for layer, _ in where.values()}, key=lambda i: (i is None, i))
    across, down = max(COLUMN * len(columns), 2.8), ROW * len(rows)
    width, lower = 3 * (across + 0.75) + 0.35, down + 0.95
    height = lower + 2.35
    figure = blank(width, height, headline(pair))
    half = (width - 1.75) / 2
    for i, (key, label) in enumerate((("effective_rank", "rank used"), ("size", "‖scale·BA‖"))):
        axis = inches(figure, 0.7 + i * (half + 0.75), lower + 0.35, half, 1.1)
        bars(axis, found, key, columns, where)
        axis.set_title(f"{label}, mean over blocks", loc="left")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="upper left", bbox_to_anchor=(0.3 / width, 1 - 0.36 / height), frameon=False,
        ncols=max(1, min(len(found.names), int(width * 12 // (max(map(len, found.names)) + 5)))),
    )  # fmt: skip
    for i, (title, colours, value) in enumerate(MAPS):
        axis = inches(figure, 0.7 + i * (across + 0.75), 0.55, across, down)
        heat(axis, pair, where, rows, columns, value, colours)
        axis.set_title(title, loc="left")
        if i == 0:
            axis.set_ylabel("block")
    figure.text(0.7 / width, 0.12 / height, footnote(pair))
    return figure


def footnote(pair: PairOf) -> str:
    """What the heat maps are of, and what chance gives."""
    said = f"heat maps: {pair.a} to {pair.b}, directions that hold 90 % of the energy"
    if pair.chance_inputs is None or pair.chance_outputs is None:
        return said
    return f"{said}; chance gives {pair.chance_inputs:.0%} and {pair.chance_outputs:.0%} overlap"


def bars(axis, found: Comparison, key: str, columns: list[str], where) -> None:
    """A group of bars a kind of module, a bar an adapter."""
    wide = 0.8 / len(found.names)
    for i, name in enumerate(found.names):
        values = defaultdict(list)
        for module, numbers in found.modules.items():
            if (number := numbers[key][i]) is not None:
                values[where[module][1]].append(number)
        heights = [float(np.mean(values[kind])) if values[kind] else 0.0 for kind in columns]
        xs = np.arange(len(columns)) - 0.4 + wide * (i + 0.5)
        axis.bar(xs, heights, width=wide * 0.92, color=COLOURS[i % 8], label=name)
    axis.set_xticks(range(len(columns)), [kind.removesuffix("_proj") for kind in columns])
    axis.tick_params(axis="x", length=0)


def heat(axis, pair: PairOf, where, rows, columns, value: Value, colours: str) -> None:
    """Blocks down, kinds across; experts of one kind by their mean, changes by their sum."""
    cells = defaultdict(list)
    for row in pair.modules:
        if (number := value(row)) is not None:
            cells[where[row.module]].append(number)
    together = np.sum if colours == "Oranges" else np.mean
    grid = np.full((len(rows), len(columns)), np.nan)
    for (y, x), _ in np.ndenumerate(grid):
        if some := cells[rows[y], columns[x]]:
            grid[y, x] = together(some)
    top = 1.0 if colours == "Blues" else max(float(np.nanmax(grid, initial=0.0)), 1e-9)
    axis.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=top)
    for (y, x), number in np.ndenumerate(grid):
        text = "–" if np.isnan(number) else f"{number:.0%}" if number >= 0.0095 else "<1%"
        ink = "white" if number > 0.6 * top else "#222222"
        axis.text(x, y, text, ha="center", va="center", color=ink)
    axis.set_facecolor("#f4f4f4")
    axis.set_yticks(range(len(rows)), ["none" if r is None else str(r) for r in rows])
    axis.set_xticks(range(len(columns)), [kind.removesuffix("_proj") for kind in columns])
    axis.tick_params(length=0)
    if together is np.sum and pair.change == 0:
        axis.set_xlabel("nothing changed", color=WARNING)


def headline(pair: PairOf) -> str:
    """What lies between the first and the last, in a line."""
    if pair.cosine is None:
        return f"{pair.a} and {pair.b}: one of them holds no update"
    most = pair.modules[0]
    name, share = most.module.removeprefix("model.layers."), most.change_share or 0.0
    ends = f"{pair.a} to {pair.b}: cosine {cosine(pair.cosine)}"
    return f"{ends}; {share:.0%} of the change in {name}"
