"""Pictures of what a fuse kept of each layer, and of how far adapters are in each other's way."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.ship.requantize import Survival, together
from mlx_lora.spectral.canvas import QUIET, STYLE, UNUSED, USED, WARNING, blank, inches, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOST = 0.5  # of the update, or of what it does to the outputs: less is refused
LOW, HIGH = -0.1, 1.2
ROW = 0.42  # inches
TICKS = [m * 10.0**e for e in range(-6, 2) for m in (1, 2, 5)]


def survival_plot(survivals: Sequence[Survival]) -> bytes:
    """A dot a layer: how much of its update is in the stored weight, by how large the update is."""
    from matplotlib import rc_context

    kept, _ = together(survivals)
    bits = sorted({str(s.bits) for s in survivals if s.bits})
    where = f"{' and '.join(bits)}-bit weights" if bits else "unquantized weights"
    told = "nothing to keep" if kept is None else f"{kept:.1%} of the update is in the {where}"
    shown = [s for s in survivals if s.kept is not None and s.size > 0]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(7.4, 4.1, f"Fused: {told}")
        axes = inches(figure, 0.75, 0.6, 6.4, 2.85)
        values = np.clip(np.array([s.kept for s in shown], float), LOW, HIGH)
        colours = [WARNING if value < LOST else USED for value in values]
        axes.scatter([s.size for s in shown], values, s=22, c=colours, alpha=0.75)
        axes.axhspan(LOW - 0.05, LOST, color=UNUSED, alpha=0.4, linewidth=0)
        axes.axhline(1, color=QUIET, linewidth=0.8, zorder=0)
        span_of_sizes(axes, [s.size for s in shown])
        axes.text(0.99, 0.03, "less than half", transform=axes.transAxes, ha="right", color=QUIET)
        axes.set_ylim(LOW - 0.05, HIGH + 0.05)
        axes.set_xlabel("size of the update against its weight, ‖Δ‖ / ‖W‖; a dot a layer")
        axes.set_ylabel("share of the update that survives")
        axes.set_yticks([0, 0.5, 1], ["none", "half", "all"])
        if shown:
            value, worst = min(zip(values, shown, strict=True), key=lambda pair: pair[0])
            name = worst.module.removeprefix("model.layers.")
            axes.annotate(
                name, (worst.size, value), (0, -14), textcoords="offset points", color=QUIET
            )
        return png(figure)


def span_of_sizes(axes: "Axes", sizes: Sequence[float]) -> None:
    """A log axis with plain numbers that holds all sizes, at least a factor of 4 wide."""
    from matplotlib.ticker import NullLocator

    low, high = (min(sizes), max(sizes)) if sizes else (0.1, 1.0)
    room = max(1.15, (4 / (high / low)) ** 0.5)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    ticks = [t for t in TICKS if low / room <= t <= high * room]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def overlap_plot(pairs: Sequence[Mapping[str, Any]]) -> bytes:
    """A row of dots a pair of adapters and side: the overlap of their spaces, a dot a layer."""
    from matplotlib import rc_context

    rows = [(pair, side) for pair in pairs for side in ("inputs", "outputs")]
    height = ROW * len(rows)
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(7.4, 1.25 + height, headline(pairs))
        axes = inches(figure, 3.1, 0.6, 4.05, height)
        for row, (pair, side) in enumerate(rows):
            values = [layer[f"overlap_{side}"] for layer in pair["layers"]]
            axes.axhline(row, color=UNUSED, linewidth=0.8, zorder=0)
            axes.scatter(values, [row] * len(values), s=18, color=USED, alpha=0.5)
            axes.scatter([pair[f"overlap_{side}"]], [row], s=180, color=WARNING, marker="|")
        axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
        names = [f"{pair['a']} and {pair['b']}, {side}" for pair, side in rows]
        axes.set_yticks(range(len(rows)), [shortened(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("mean squared cosine of the principal angles; 1: one space")
        return png(figure)


def shortened(name: str, most: int = 40) -> str:
    """Its middle left out where it is long."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def headline(pairs: Sequence[Mapping[str, Any]]) -> str:
    worst = max(pairs, key=lambda pair: abs(pair["cosine"]))
    others = " at most" if len(pairs) > 1 else ""
    return (
        f"Merged: the updates have a cosine of {worst['cosine']:.2f}{others}; the spaces they use, "
        "by layer"
    )
