"""The picture of advice: how far halves of the data agree, kind by kind, and the ranks by block."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.spectral.advice_show import headline, silence
from mlx_lora.spectral.canvas import (
    HEADLINE,
    INK,
    QUIET,
    STYLE,
    UNUSED,
    blank,
    card,
    inches,
    png,
    shades,
    whole_numbers,
)
from mlx_lora.spectral.names import kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.26  # inches of a block in the map
PANEL, BETWEEN = 1.55, 0.5  # inches of a panel of curves, and below it
LOW = -0.3  # of agreement, below which nothing is drawn


def draw(document: Mapping[str, Any]) -> bytes:
    """As PNG. Without advice it says why."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        if not document["blocks"]:
            title, *lines = silence(document)
            return png(card(title, lines))
        return png(picture(document))


def picture(document: Mapping[str, Any]) -> "Figure":
    """The curves above, where a gradient was measured, and the map of ranks below."""
    modules = document["modules"]
    columns = kinds({n: (m["block"], m["kind"]) for n, m in modules.items()})
    blocks = sorted({m["block"] for m in modules.values()}, key=lambda b: (b is None, b))
    before = document["kind"] == "before_training"
    across = min(4, len(columns))
    rows = math.ceil(len(columns) / across)
    width = max(7.4, 2.1 * across + 1.2)
    down = CELL * len(blocks)
    height = HEADLINE + down + 1.0 + (rows * (PANEL + BETWEEN) + 0.35 if before else 0.0)
    figure = blank(width, height, headline(document))
    if before:
        found = defaultdict(list)
        for m in modules.values():
            if "agreement" in m:
                found[m["kind"]].append(m)
        depth = max((b for b in blocks if b is not None), default=0)
        wide = (width - 1.5) / across
        for i, kind in enumerate(columns):
            left = 0.7 + wide * (i % across)
            top = height - HEADLINE - 0.2 - (PANEL + BETWEEN) * (i // across)
            axis = inches(figure, left, top - PANEL, wide - 0.12, PANEL)
            panel(axis, kind, found[kind], depth)
            axis.tick_params(labelleft=i % across == 0)
            if i % across == 0:
                axis.set_ylabel("agreement")
        note = "direction, strongest first   (a line per block; grey: what noise reaches)"
        figure.text(0.7 / width, (down + 1.12) / height, note, color=QUIET)
        if depth:
            box = inches(figure, width - 0.6, height - HEADLINE - 0.2 - PANEL, 0.12, PANEL)
            whole_numbers(figure.colorbar(shades(depth), cax=box, label="block").ax.yaxis)
    grid(inches(figure, 0.7, 0.5, width - 1.5, down), document, columns, blocks)
    said = "directions found" if before else "directions in use"
    figure.text(0.7 / width, (down + 0.58) / height, f"{said}, of the rank now", weight="bold")
    return figure


def panel(axis: "Axes", kind: str, some: list[Mapping[str, Any]], depth: int) -> None:
    """The agreement of each block's directions, over the band that noise reaches."""
    axis.set_title(kind, loc="left")
    axis.set_ylim(LOW, 1.0)
    if not some:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=QUIET)
        return
    shade, longest = shades(depth), max(len(m["agreement"]) for m in some)
    noise = float(np.mean([m["threshold"] for m in some]))
    axis.axhspan(LOW, noise, color=UNUSED, lw=0, alpha=0.6)
    for m in some:
        colour = INK if m["block"] is None else shade.to_rgba(m["block"])
        axis.plot(range(1, len(m["agreement"]) + 1), m["agreement"], color=colour, lw=1.2)
    axis.set_xlim(0.6, longest + 0.4)
    whole_numbers(axis.xaxis, 5)
    mean = float(np.mean([m["predicted_rank"] for m in some]))
    axis.set_title(f"{mean:.1f} agree", loc="right", color=QUIET)


def grid(axis: "Axes", document: Mapping[str, Any], columns: list[str], blocks: list) -> None:
    """Blocks × kinds: the text of each need, coloured by its share of the rank there is."""
    share = np.full((len(blocks), len(columns)), np.nan)
    for m in document["modules"].values():
        y, x = blocks.index(m["block"]), columns.index(m["kind"])
        if m["predicted_rank"] is not None:
            share[y, x] = min(1.0, m["predicted_rank"] / m["rank_now"])
        ink = "white" if share[y, x] > 0.6 else INK
        text = f"{m['predicted_rank_text']} of {m['rank_now']}"
        axis.text(x, y, text, ha="center", va="center", color=ink)
    axis.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axis.set_facecolor("#f4f4f4")
    axis.set_yticks(range(len(blocks)), ["none" if b is None else str(b) for b in blocks])
    axis.set_xticks(range(len(columns)), [kind.replace(".", ".\n") for kind in columns])
    axis.set_ylabel("block")
    axis.tick_params(length=0)
