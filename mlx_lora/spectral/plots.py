"""Three pictures of an adapter: its singular values, the ranks it uses, its weight on the base."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.spectral import splines
from mlx_lora.spectral.canvas import (
    CARDS,
    COLOURS,
    HEADLINE,
    INK,
    MARKERS,
    QUIET,
    STYLE,
    UNUSED,
    USED,
    WARNING,
    blank,
    card,
    inches,
    logarithmic,
    png,
    shades,
    whole_numbers,
)
from mlx_lora.spectral.metrics import (
    CRITICAL,
    DOMINATING,
    LOW_UTILIZATION,
    LoRAAdapterMetrics,
    LoRAReport,
)
from mlx_lora.spectral.names import kinds, places
from mlx_lora.spectral.structure import finding
from mlx_lora.spectral.trajectories import trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BANDS = (  # upper edge, colour, what the update is to the base
    (0.05, "#ffffff", "slight"),
    (0.10, "#edf5ed", "clear"),
    (DOMINATING, "#fdf6d8", "strong"),
    (CRITICAL, "#fbdfc0", "dominating"),
    (math.inf, "#f6c6bf", "critical"),
)
BLACK = (0.13, 0.13, 0.13, 1.0)
DECADES = 4  # singular values further below the largest are not worth the paper


def draw(report: LoRAReport) -> dict[str, bytes]:
    """The pictures as PNG by file name. One that has nothing to show says why, and what to do."""
    import matplotlib

    trained = any(m.status == "trained" for m in report.adapters.values())
    drawn = {"singular_values": curves, "effective_rank": ranks, "dominance": dominance}
    pictures = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, picture in drawn.items():
            if not trained:
                figure = card(f"The adapter {finding(report)}", CARDS[report.status])
            elif name == "dominance" and not loud(report):
                figure = card("Dominance is not known without the base model", CARDS["no base"])
            else:
                figure = picture(report)
            pictures[f"{name}.png"] = png(figure)
        if report.splines:
            pictures["splines.png"] = png(splines.draw(report.splines))
        if len(report.looks) > 1:
            pictures["dynamics.png"] = png(trajectories(report.looks, report.dynamics))
    return pictures


def loud(report: LoRAReport) -> dict[str, float]:
    """Scaled dominance of the modules that have one above 0; nothing without a base."""
    known = report.structural.scaled_per_layer_dominance or {}
    return {name: ratio for name, ratio in known.items() if ratio}


def curves(report: LoRAReport) -> "Figure":
    """Singular values of scale·BA: a panel per kind of module, a line per block, k90 marked."""
    where = places(report.adapters)
    panels, found = kinds(where), defaultdict(list)
    for name, (layer, kind) in where.items():
        m = report.adapters[name]
        if m.k90 and m.effective_lr_scale:  # trained, and not switched off
            s = abs(m.effective_lr_scale) * np.array(m.singular_values)
            found[kind].append((layer, s, m.k90))
    depth = max((layer or 0 for layer, _ in where.values()), default=0)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(6.5, 2.5 * columns + (1.7 if depth else 0.9)), 2.1 * rows + 1.05
    figure = blank(width, height, f"The adapter {finding(report)}")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    figure.subplots_adjust(
        left=0.75 / width, right=1 - (0.95 if depth else 0.15) / width, wspace=0.08, hspace=0.22,
        bottom=0.62 / height, top=1 - (HEADLINE + 0.2) / height,
    )  # fmt: skip
    for i, axis in enumerate(axes):
        if i < len(panels):
            panel(axis, panels[i], found[panels[i]], depth)
            axis.tick_params(labelbottom=i + columns >= len(panels))
        else:
            axis.set_axis_off()
    every = [s for some in found.values() for _, s, _ in some]
    top, longest = max(s[0] for s in every), max(map(len, every))
    low = max(min(s[s > 0].min() for s in every), top / 10**DECADES)
    logarithmic(axes[0], low / 1.6, top * 1.6)
    axes[0].set_xlim(0.6, longest + 0.4)
    whole_numbers(axes[0].xaxis)
    if depth:
        box = inches(figure, width - 0.75, 0.62, 0.12, height - HEADLINE - 0.82)
        whole_numbers(figure.colorbar(shades(depth), cax=box, label="block").ax.yaxis)
    axes[0].set_ylabel("σ of scale·BA")
    note = "direction, strongest first   (a line per block; its dot: 90 % of the energy is reached)"
    figure.text(0.75 / width, 0.12 / height, note)
    return figure


def panel(axis: "Axes", kind: str, some: list, depth: int) -> None:
    """The spectra of one kind of module: (block or None, singular values, k90) of each."""
    from matplotlib.collections import LineCollection

    axis.grid(color="#eeeeee")
    axis.set_title(kind, loc="left")
    if not some:
        axis.text(0.5, 0.5, "untrained", transform=axis.transAxes, ha="center", color=QUIET)
        return
    shade = shades(depth)
    colours = np.array([shade.to_rgba(layer) if layer is not None else BLACK for layer, *_ in some])
    lines = [np.column_stack([np.arange(1, len(s) + 1), s]) for _, s, _ in some]
    axis.add_collection(LineCollection(lines, colors=colours, linewidths=1.3, alpha=0.9))
    dots = np.array([(k, s[k - 1]) for _, s, k in some])
    axis.scatter(*dots.T, c=colours, s=26, edgecolors=INK, linewidths=0.6, zorder=3)
    axis.set_title(f"90 % in {dots[:, 0].mean():.1f}", loc="right", color=QUIET)


def ranks(report: LoRAReport) -> "Figure":
    """Effective rank of BA against the nominal: blocks × kinds, under the mean of each kind."""
    where = places(report.adapters)
    columns, cells = kinds(where), defaultdict(list)
    for name, m in report.adapters.items():
        cells[where[name]].append(m)
    rows = sorted({layer for layer, _ in where.values()}, key=lambda i: (i is None, i))
    across, down = max(0.95 * len(columns), 4.6), 0.26 * len(rows)
    below = 0.55 if any("." in kind for kind in columns) else 0.4
    figure = blank(across + 1.9, down + below + 1.9, f"The adapter {finding(report)}")
    axis = inches(figure, 0.7, below, across, down)
    image = heat(axis, [[cells[row, kind] for kind in columns] for row in rows])
    axis.set_yticks(range(len(rows)), ["none" if r is None else str(r) for r in rows])
    axis.set_xticks(range(len(columns)), [kind.replace(".", ".\n") for kind in columns])
    axis.set_ylabel("block")
    axis.tick_params(length=0)
    by_kind = [[m for row in rows for m in cells[row, kind]] for kind in columns]
    bars(inches(figure, 0.7, down + below + 0.2, across, 1.1), by_kind, axis.get_xlim())
    tall = min(max(down, 1.6), 2.0)
    box = inches(figure, across + 0.85, below + max(0.0, down - tall), 0.12, tall)
    bar = figure.colorbar(image, cax=box)
    bar.ax.axhline(LOW_UTILIZATION, color=WARNING, lw=2)
    ticks = [0, LOW_UTILIZATION, 0.5, 0.75, 1]
    bar.set_ticks(ticks, labels=[f"{t:.0%}" for t in ticks])
    bar.set_label("of the nominal rank")
    return figure


def heat(axis: "Axes", grid: list[list[list[LoRAAdapterMetrics]]]) -> "AxesImage":
    """Each cell's mean effective rank as a number, its share of the nominal rank as a colour."""
    share = np.full((len(grid), len(grid[0])), np.nan)
    for (y, x), _ in np.ndenumerate(share):
        here = grid[y][x]
        used = [m for m in here if m.effective_rank_BA is not None]
        text, ink = "–" if here else "", QUIET
        if used:
            share[y, x] = np.mean([m.rank_utilization or 0.0 for m in used])
            text = f"{np.mean([m.effective_rank_BA or 0.0 for m in used]):.1f}"
            low = share[y, x] < LOW_UTILIZATION
            ink = "white" if share[y, x] > 0.6 else WARNING if low else INK
        if any(m.status == "non_finite" for m in here):
            text, ink = "NaN", WARNING
        axis.text(x, y, text, ha="center", va="center", color=ink)
    axis.set_facecolor("#f4f4f4")
    return axis.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)


def bars(axis: "Axes", by_kind: list, xlim: tuple[float, float]) -> None:
    """Mean effective rank inside the mean nominal rank, for each kind of module."""
    for x, some in enumerate(by_kind):
        used = [m.effective_rank_BA for m in some if m.effective_rank_BA is not None]
        paid, mean = float(np.mean([m.nominal_rank for m in some])), float(np.mean(used or [0.0]))
        axis.bar(x, paid, width=0.66, color=UNUSED)
        axis.bar(x, mean, width=0.66, color=USED)
        label = f"{mean:.1f} of {paid:.3g}" if used else f"– of {paid:.3g}"
        axis.text(x, paid, label, ha="center", va="bottom")
    most = max(m.nominal_rank for some in by_kind for m in some)
    axis.set(xlim=xlim, xticks=[], yticks=[0, most / 2, most], ylabel="mean rank")
    axis.spines["bottom"].set_visible(False)
    axis.set_ylim(0, 1.2 * most)


def dominance(report: LoRAReport) -> "Figure":
    """σ_max(scale·BA)/σ_max(W) by block, a line per kind, on the bands that say what it means."""
    where = places(report.adapters)
    ratios = loud(report)
    loudest, outside = by_block(ratios, where)
    layer, kind = where[max(ratios, key=lambda n: ratios[n])]
    most = max(ratios.values())
    word = next(word for edge, _, word in BANDS if most <= edge)
    at = kind if layer is None else f"{kind} of block {layer}"
    names = [kind for kind in kinds(where) if loudest[kind]]
    wide = [len(name) + 6 for name in names]  # of the legend's entries, in letters; a row holds 112
    across = len(names) if sum(wide) <= 112 else max(1, 112 // max(wide))
    below = 0.75 + 0.2 * math.ceil(len(names) / across)
    figure = blank(8.6, 3.6 + below, f"Loudest at {most:.2g} of the base, in {at}: {word}")
    axis = inches(figure, 0.75, below, 6.9, 3.1)
    low, high = (
        max(min(0.02, min(ratios.values()) / 1.5), min(most, 0.02) / 1e4),
        max(0.75, most * 1.4),
    )
    for (lower, *_), (upper, colour, word) in zip([(low,), *BANDS], BANDS, strict=False):
        lower, upper = max(lower, low), min(upper, high)
        axis.axhspan(lower, upper, color=colour, lw=0)
        beside: dict[str, Any] = {
            "xycoords": axis.get_yaxis_transform(),
            "va": "center",
            "color": QUIET,
        }
        axis.annotate(word, (1.01, math.sqrt(lower * upper)), **beside)
    many = max(map(len, loudest.values())) > 12
    for i, kind in enumerate(names):
        xs = sorted(loudest[kind])
        look: dict[str, Any] = {"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8]}
        look |= {"markersize": 3.5 if many else 5, "linewidth": 0.9 if many else 1.4}
        axis.plot(xs, [loudest[kind][x] for x in xs], label=kind, **look)
    logarithmic(axis, low, high, extra=[edge for edge, *_ in BANDS[:-1]])
    note = f" ({', '.join(outside)} after the last)" if outside else ""
    axis.set(xlabel=f"block{note}", ylabel="σ_max(scale·BA) / σ_max(W)")
    axis.set_xlim(-0.4, max(max(loudest[kind]) for kind in names) + 0.4)
    whole_numbers(axis.xaxis)
    figure.legend(loc="lower center", ncols=across, frameon=False, columnspacing=1.2)
    return figure


def by_block(
    ratios: Mapping[str, float], where: Mapping[str, tuple[int | None, str]]
) -> tuple[dict[str, dict[int, float]], list[str]]:
    """The largest ratio per kind and block (of its experts); kinds outside the blocks come last."""
    blocks = [layer for layer, _ in where.values() if layer is not None]
    outside = sorted({kind for layer, kind in where.values() if layer is None})
    loudest: dict[str, dict[int, float]] = defaultdict(dict)
    for name, value in ratios.items():
        layer, kind = where[name]
        x = layer if layer is not None else max(blocks, default=-1) + 1 + outside.index(kind)
        loudest[kind][x] = max(value, loudest[kind].get(x, 0.0))
    return loudest, outside
