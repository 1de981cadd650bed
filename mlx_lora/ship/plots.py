"""Pictures of what a fuse kept of each layer, and of how far adapters are in each other's way."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.ship.fuse_plan import LayerPlan, Plan
from mlx_lora.ship.requantize import Survival, together
from mlx_lora.spectral.canvas import QUIET, STYLE, UNUSED, USED, WARNING, blank, inches, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOST = 0.5  # of the update, or of what it does to the outputs: less is refused
LOW, HIGH = -0.1, 1.2
SHOWN = {  # of a plan: title, what the picture holds, ticks
    "kept": ("share of the update that survives", (-0.1, 1.6), (0, 0.5, 1, 1.6)),
    "noise": ("noise over the update's size", (0.0, 3.0), (0, 0.5, 1, 1.5, 2, 3)),
}
ROW = 0.42  # inches
MOST = 30  # intruders in a picture
TICKS = [m * 10.0**e for e in range(-6, 2) for m in (1, 2, 5)]


def survival_plot(survivals: Sequence[Survival]) -> bytes:
    """A dot a layer: how much of its update is in the stored weight, by how large the update is."""
    from matplotlib import rc_context

    kept, _ = together(survivals)
    bits = [str(b) for b in sorted({s.bits for s in survivals if s.bits})]
    kinds = [f"{', '.join(bits)}-bit"] if bits else []
    kinds += ["unquantized"] if any(s.bits is None for s in survivals) else []
    where = f"{' and '.join(kinds)} weights"
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


def plan_plot(plan: Plan) -> bytes:
    """A line a layer: what survives and what is noise at each width; and the model's size."""
    from matplotlib import rc_context

    whole, rows = plan.summed([layer.chosen for layer in plan.layers]), plan.bits
    names = ["none" if bits is None else str(bits) for bits in rows]
    told = f"Planned: {whole['kept']:.1%} of the update in {whole['bytes'] / 1e6:,.1f} MB"
    keep, noise = plan.standard.keep, plan.standard.noise
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(10.6, 4.1, f"{told}; a line a layer, dots: bits chosen, grey: as asked")
        panels = [inches(figure, left, 0.6, 2.65, 2.75) for left in (0.75, 4.15, 7.75)]
        for axes, what, asked in zip(
            panels, ("kept", "noise"), ((keep, 2 - keep), (0, noise)), strict=False
        ):
            by_width(axes, plan, what)
            axes.axhspan(*asked, color=UNUSED, alpha=0.7, linewidth=0, zorder=0)
            axes.set_xticks(range(len(rows)), names)
            axes.set_xlabel("bits")
        sizes(panels[2], plan, names)
        return png(figure)


def by_width(axes: "Axes", plan: Plan, what: str) -> None:
    """`kept` or `noise` of every layer by width; what is beyond the picture lies on its edge."""
    title, (low, high), ticks = SHOWN[what]
    for layer in plan.layers:
        shown = [(i, s) for i, bits in enumerate(plan.bits) if (s := tried(layer, bits))]
        values = np.clip([getattr(s, what) for _, s in shown], low, high)
        axes.plot([i for i, _ in shown], values, color=USED, alpha=0.18, linewidth=0.9)
        for (i, s), value in zip(shown, values, strict=True):
            if s is layer.chosen:
                axes.plot(i, value, "o", ms=4, mew=0, color=WARNING, alpha=0.6, zorder=3)
    axes.set_title(title, loc="left")
    axes.set_ylim(low - 0.05, high + 0.05)
    axes.set_yticks(ticks, [*(f"{t:g}" for t in ticks[:-1]), f"{high:g} +"])


def tried(layer: LayerPlan, bits: int | None) -> Survival | None:
    """What an update came to at a width; nothing where the layer has no such width, or none."""
    return next((s for s in layer.tried if s.bits == bits and s.kept is not None), None)


def sizes(axes: "Axes", plan: Plan, names: Sequence[str]) -> None:
    """The model's size with all adapted layers at one width, and as planned."""
    totals = [plan.summed(plan.uniform(bits)) for bits in plan.bits]
    totals.append(plan.summed([layer.chosen for layer in plan.layers]))
    values = [total["bytes"] / 1e6 for total in totals]
    good = [plan.standard.holds(total["kept"], total["noise"]) for total in totals]
    colours = [USED if fine else UNUSED for fine in good[:-1]]
    bars = axes.barh(range(len(values)), values, color=[*colours, WARNING], height=0.65)
    axes.bar_label(bars, [f"{t['kept']:.0%}" for t in totals], padding=3, color=QUIET)
    axes.set_yticks(range(len(values)), [*names, "plan"])
    axes.set_xlim(0, 1.2 * max(values))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("MB of weights")
    axes.set_title("size, what survives; pale: not as asked", loc="left")


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
        names = [[shortened(pair[which], 14) for which in "ab"] for pair, _ in rows]
        labels = [f"{' and '.join(x)}, {side}" for x, (_, side) in zip(names, rows, strict=True)]
        axes.set_yticks(range(len(rows)), labels)
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


def repair_plot(found: Mapping[str, Any]) -> bytes:
    """An arrow an intruder, from what it was to what it is; and what that did to the texts."""
    from matplotlib import rc_context

    rows = [(m, d) for m in found["modules"] for d in m["intruders"]]
    rows = sorted(rows, key=lambda row: -row[1]["sigma"] / row[0]["base"])[:MOST]
    height = max(1.3, 0.27 * len(rows))
    told = f"{found['intruders_before']} intruders before, {found['intruders_after']} after"
    more = f" (the {MOST} strongest)" if found["intruders_before"] > MOST else ""
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(9.6, 1.4 + height, f"Repaired at λ = {found['lambda']:g}: {told}{more}")
        axes = inches(figure, 2.3, 0.6, 3.9, height)
        for row, (m, d) in enumerate(rows):
            start, end = d["sigma"] / m["base"], d["after"] / m["base"]
            axes.annotate(
                "", (end, row), (start, row), arrowprops={"arrowstyle": "-|>", "color": USED}
            )
            axes.plot(start, row, "o", ms=5, color=WARNING)
        axes.set_xlim(0, 1.15 * max([1.0, *(d["sigma"] / m["base"] for m, d in rows)]))
        axes.axvline(1, color=QUIET, linewidth=0.8, zorder=0)
        axes.set_title("before (dots) and after (arrows)", loc="left")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        names = [m["module"].removeprefix("model.layers.") for m, _ in rows]
        axes.set_yticks(range(len(rows)), [shortened(name, 30) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("σ of the intruder over the base's largest")
        texts = inches(figure, 7.35, 0.6, 1.75, height)
        values = [found[f"kl_base_{side}"] for side in ("before", "after")]
        bars = texts.barh(range(2), values, color=[WARNING, USED], height=0.5)
        texts.bar_label(bars, [f"{value:.2g}" for value in values], padding=3, color=QUIET)
        texts.set_yticks(range(2), ["before", "after"])
        texts.set_xlim(0, 1.35 * max(*values, 1e-9))
        texts.set_xticks([])
        texts.set_ylim(1.6, -0.6)
        texts.tick_params(axis="y", length=0)
        texts.set_title("KL to the base on text, nats", loc="left")
        sides = [f"{found[f'perplexity_{side}']:.4g}" for side in ("base", "before", "after")]
        texts.set_xlabel("perplexity: base {}, {} to {}".format(*sides))
        return png(figure)
