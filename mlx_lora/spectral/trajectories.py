"""The picture of a run's looks: rank, size and conditioning by kind of module, step by step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlx_lora.spectral.canvas import COLOURS, MARKERS, QUIET, WARNING, blank, inches
from mlx_lora.spectral.dynamics import Look
from mlx_lora.spectral.metrics import ILL_CONDITIONED, LOW_UTILIZATION, LoRADynamicsMetrics
from mlx_lora.spectral.names import kinds, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (  # key of a look, title, log axis
    ("rank_utilization", "effective rank of BA, share of the nominal", False),
    ("frobenius_BA", "size of BA: ‖BA‖_F", False),
    ("gradient_rank", "effective rank of the gradient", False),
    ("kappa_B", "κ of B", True),
)


def trajectories(looks: Sequence[Look], d: LoRADynamicsMetrics | None) -> "Figure":
    """Four panels, a line per kind of module (its median over blocks), the step it settled at."""
    where = places(looks[-1].kappa_A)
    names = kinds(where)
    width, height = 9.2, 5.6
    figure = blank(width, height, headline(looks, d))
    steps = [x.step for x in looks]
    for i, (key, title, log) in enumerate(PANELS):
        axis = inches(figure, 0.65 + 4.5 * (i % 2), 3.1 - 2.3 * (i // 2), 3.85, 1.75)
        medians = [by_kind(getattr(x, key), where) for x in looks]
        for number, kind in enumerate(names):
            ys = [m.get(kind, np.nan) for m in medians]
            look = {"color": COLOURS[number % 8], "marker": MARKERS[number % 8], "markersize": 3}
            axis.plot(steps, ys, label=kind if i == 0 else None, linewidth=1.3, **look)
        axis.set_title(title, loc="left")
        axis.grid(color="#eeeeee")
        axis.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
        if log:
            axis.set_yscale("log")
            axis.minorticks_off()
        else:
            axis.set_ylim(bottom=0)
        settle(axis, d if key == "rank_utilization" else None)
        if i > 1:
            axis.set_xlabel("step")
    for axis, limit in ((figure.axes[0], LOW_UTILIZATION), (figure.axes[3], ILL_CONDITIONED)):
        axis.axhline(limit, color=WARNING, lw=1)
        at = {"xycoords": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axis.annotate("alert", (0.995, limit), color=WARNING, **at)
    figure.legend(loc="lower center", ncols=min(8, len(names)), frameon=False)
    return figure


def headline(looks: Sequence[Look], d: LoRADynamicsMetrics | None) -> str:
    used = [x.rank_utilization_mean for x in looks if x.rank_utilization_mean is not None]
    if not used or d is None:
        return f"The adapter over {looks[-1].step + 1} steps"
    return (
        f"Over {looks[-1].step + 1} steps the share of rank in use went from {used[0]:.0%} to "
        f"{used[-1]:.0%}: {d.rank_utilization_trend}"
    )


def settle(axis: "Axes", d: LoRADynamicsMetrics | None) -> None:
    if d is not None and d.steps_to_saturation is not None:
        axis.axvline(d.steps_to_saturation, color=QUIET, lw=1, ls=":")
        axis.annotate(
            " settled", (d.steps_to_saturation, 0.04), xycoords=axis.get_xaxis_transform(),
            color=QUIET,
        )  # fmt: skip


def by_kind(
    values: Mapping[str, float | None], where: Mapping[str, tuple[int | None, str]]
) -> dict[str, float]:
    """Median over the modules of a kind that have the number."""
    found = defaultdict(list)
    for name, value in values.items():
        if value is not None and name in where:
            found[where[name][1]].append(value)
    return {kind: float(np.median(some)) for kind, some in found.items()}
