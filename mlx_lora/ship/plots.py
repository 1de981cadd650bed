"""Pictures of what a fuse kept of each layer, and of how far adapters are in each other's way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_lora.ship.requantize import Survival, together
from mlx_lora.spectral.canvas import QUIET, UNUSED, USED, WARNING, blank, inches, png

HALF, LOW, HIGH = 0.5, -0.1, 1.2


def survival_plot(survivals: Sequence[Survival]) -> bytes:
    """A dot a layer: how much of its update is in the stored weight, by how large the update is."""
    kept, _ = together(survivals)
    bits = sorted({str(s.bits) for s in survivals if s.bits})
    where = f"{' and '.join(bits)}-bit weights" if bits else "unquantized weights"
    told = "nothing to keep" if kept is None else f"{kept:.1%} of the update is in the {where}"
    figure = blank(7.4, 4.1, told)
    axes = inches(figure, 0.75, 0.6, 6.4, 2.85)
    shown = [s for s in survivals if s.kept is not None and s.size > 0]
    values = np.array([s.kept for s in shown], float)
    colours = [WARNING if value < HALF else USED for value in values]
    axes.scatter([s.size for s in shown], np.clip(values, LOW, HIGH), s=22, c=colours, alpha=0.75)
    axes.axhline(1, color=QUIET, linewidth=0.8)
    axes.axhline(0, color=UNUSED, linewidth=0.8)
    axes.set(xscale="log", ylim=(LOW - 0.05, HIGH + 0.05))
    axes.set_xlabel("size of the update against its weight, ‖Δ‖ / ‖W‖, a dot a layer")
    axes.set_ylabel("share that survives")
    axes.set_yticks([0, 0.5, 1], ["0: lost", "50 %", "all"])
    return png(figure)


def overlap_plot(pairs: Sequence[Mapping[str, Any]]) -> bytes:
    """A row of dots a pair of adapters and side: the overlap of their spaces, a dot a layer."""
    rows = [(pair, side) for pair in pairs for side in ("inputs", "outputs")]
    figure = blank(7.4, 1.3 + 0.42 * max(len(rows), 1), headline(pairs))
    axes = inches(figure, 2.6, 0.6, 4.5, 0.42 * max(len(rows), 1))
    for row, (pair, side) in enumerate(rows):
        values = [layer[f"overlap_{side}"] for layer in pair["layers"]]
        axes.scatter(values, [row] * len(values), s=18, c=USED, alpha=0.5)
        axes.scatter([np.mean(values)], [row], s=60, c=WARNING, marker="|")
    axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(
        range(len(rows)), [f"{pair['a']} and {pair['b']}, {side}"[-38:] for pair, side in rows]
    )
    axes.set_xlabel("mean squared cosine of the principal angles: 0 apart, 1 the same space")
    return png(figure)


def headline(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "One adapter: nothing is in its way"
    worst = max(pairs, key=lambda pair: abs(pair["cosine"]))
    return f"{worst['a']} and {worst['b']}: their updates have a cosine of {worst['cosine']:.2f}"
