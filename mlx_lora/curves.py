"""`training.png`: what a stage did, step by step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_lora.runlog import METRICS, atomically
from mlx_lora.spectral.canvas import HEADLINE, QUIET, STYLE, USED, WARNING, blank, inches, png
from mlx_lora.spectral.canvas import whole_numbers as whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "training.png"
History = Sequence[Mapping[str, float]]
WINDOW = 5  # steps of the running mean
CHANCE = 1.96  # standard deviations that noise alone exceeds one time in twenty
BLOCKS = 1000  # means that a long history is tested by
WIDTH, LEFT, RIGHT, BOTTOM, GAP = 8.6, 0.75, 0.25, 0.5, 0.42  # inches
PANELS = {  # metric -> title, height in inches; drawn in this order where it was measured
    "reward": ("reward of the step's rollouts", 1.9),
    "loss": ("loss, nats per token", 1.9),
    "kl": ("KL to the reference policy, nats per token", 1.0),
    "perplexity": ("perplexity of plain text", 0.8),
    "fitness_correlation": (
        "fitness on one half of the problems against the other, correlation",
        0.9,
    ),
    "update_norm": ("length of the update", 0.8),
    "distance": ("distance of the factors from their start", 0.8),
    "scale": ("scale of the adapter", 0.8),
}
LEADING = ("reward", "loss")  # one of them is drawn large
SIGNED = ("fitness_correlation",)


def history_in(folder: Path) -> History:
    """The numbers of a loop's metrics.jsonl; nothing where no step is logged."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if v is not None} for line in lines]


def draw(history: History, path: Path, held_out: str = "") -> None:
    """Reward or loss, and what else was measured, over the steps, one under the other.

    On top what was `held_out`, which decides, and the trend of the steps only without it.
    """
    import matplotlib

    told = "reward" if any("reward" in h for h in history) else "loss"
    wanted = [n for n in PANELS if n == told or n not in LEADING]
    names = [n for n in wanted if len(column(history, n)[0])]
    if told not in names:
        return
    heights = [PANELS[n][1] for n in names]
    lead = held_out or validated(history)
    total = HEADLINE + GAP * (len(names) - 0.5) + sum(heights) + BOTTOM
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = blank(WIDTH, total, lead or headline(history, told))
        top = total - HEADLINE + GAP / 2
        for name, height in zip(names, heights, strict=True):
            top -= GAP + height
            axes = inches(figure, LEFT, top, WIDTH - LEFT - RIGHT, height)
            panel(axes, history, name, trend(history, name) if lead and name == told else "")
            if name == names[-1]:
                axes.set_xlabel("step")
            else:
                axes.tick_params(labelbottom=False)
        with atomically(path) as part:
            part.write_bytes(png(figure))


def panel(axes: "Axes", history: History, name: str, said: str) -> None:
    """One metric over the steps, with what is said of it; the line goes through gaps."""
    (steps, values), title = column(history, name), PANELS[name][0]
    title += f"; it {said}" if said else ""
    if name in LEADING:
        low, high = (column(history, f"fitness_{end}")[1] for end in ("min", "max"))
        if name == "reward" and len(low) == len(steps):
            axes.fill_between(steps, low, high, color=USED, alpha=0.12, lw=0, label="members")
        axes.plot(steps, values, ".", color=USED, alpha=0.35, markersize=4)
        axes.plot(steps, running_mean(values), color=USED, label=f"mean of {WINDOW} steps")
        begun, first = column(history, "valid_loss_before")
        valid_steps, valid = column(history, "valid_loss")
        valid_steps, valid = np.append(begun - 0.5, valid_steps), np.append(first, valid)
        if name == "loss" and len(valid):
            axes.plot(valid_steps, valid, "o-", color=WARNING, markersize=4, label="held out")
        axes.legend(frameon=False, fontsize=8, loc="best")
    else:
        axes.plot(
            steps,
            values,
            "o-" if len(values) < len(history) else "-",
            color=USED,
            ms=3,
        )
        if name in SIGNED:
            axes.set_ylim(-1.05, 1.05)
            axes.axhline(0, color=QUIET, lw=0.6)
        else:
            title += beyond(values)
            axes.set_ylim(0, ceiling(values))
    axes.set_title(title, loc="left", color=QUIET)
    axes.set_xlim(-0.02 * len(history) - 0.5, len(history) * 1.02 - 0.5)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    whole(axes.xaxis)


def ceiling(values: np.ndarray) -> float:
    """The top of an axis that begins at 0: one wild step may not flatten all others."""
    return max(1.15 * min(values.max(), 3 * float(np.quantile(values, 0.95))), 1e-9)


def beyond(values: np.ndarray) -> str:
    """
    >>> beyond(np.array([1.0] * 40 + [9.0])), beyond(np.array([1.0, 2.0]))
    (' (1 step above the axis, up to 9)', '')
    """
    count = int((values > ceiling(values)).sum())
    steps = "step" if count == 1 else "steps"
    return f" ({count} {steps} above the axis, up to {values.max():.3g})" if count else ""


def column(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it was measured and finite."""
    pairs = [(s, h[name]) for s, h in enumerate(history) if np.isfinite(h.get(name, np.nan))]
    return np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Over the last `window` values, fewer at the start.

    >>> running_mean(np.array([0.0, 2.0, 4.0])).tolist()
    [0.0, 1.0, 2.0]
    """
    return np.array([values[max(0, i - window + 1) : i + 1].mean() for i in range(len(values))])


def headline(history: History, name: str) -> str:
    """What a metric did.

    >>> headline([{"loss": 3 - 0.2 * i} for i in range(8)], "loss")
    'Loss fell from 2.9 to 1.7: first and last quarter of 8 steps'
    """
    return f"{name.capitalize()} {trend(history, name)}"


def trend(history: History, name: str) -> str:
    """Whether a metric rose or fell, and from where to where.

    >>> trend([{"loss": 2.0}, {"loss": 2.0}, {"loss": 1.0}, {"loss": 1.0}], "loss")
    'shows no clear trend: 2 in the first quarter of 4 steps, 1 in the last'
    >>> trend([{"loss": 2.0}] * 4, "loss")
    'was 2 in all 4 steps'
    """
    _, values = column(history, name)
    steps = f"{len(history)} steps" if len(history) != 1 else "1 step"
    if values.min() == values.max():
        return f"was {values[0]:.3g} in {'all ' if len(values) > 1 else ''}{steps}"
    quarter = max(1, len(values) // 4)
    first, last = values[:quarter].mean(), values[-quarter:].mean()
    way = rising(values)
    if not way or way * (last - first) <= 0:
        return (
            f"shows no clear trend: {first:.3g} in the first quarter of {steps}, {last:.3g} in the "
            "last"
        )
    moved = "rose" if way > 0 else "fell"
    return f"{moved} from {first:.3g} to {last:.3g}: first and last quarter of {steps}"


def rising(values: np.ndarray) -> int:
    """1 where values rise, -1 where they fall, 0 where steps in any order could look so.

    By how many pairs of steps are in order (Mann 1945, Kendall 1975), with its correction for ties:
    it takes the noise of the steps to be independent and asks nothing else of them. Fewer than five
    steps are never a trend.

    >>> rising(np.array([1.0, 2.0, 3.0, 4.0])), rising(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    (0, 1)
    """
    if len(values) > BLOCKS:
        values = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    n = len(values)
    score = int(np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    if abs(score) - 1 <= CHANCE * np.sqrt(variance):
        return 0
    return 1 if score > 0 else -1


def validated(history: History) -> str:
    """The held-out loss before the first step and at the last validation; empty without both."""
    before, after = (column(history, key)[1] for key in ("valid_loss_before", "valid_loss"))
    return loss_moved("Held-out loss", before[0], after[-1]) if len(before) and len(after) else ""


def loss_moved(what: str, before: float, after: float) -> str:
    """
    >>> loss_moved("Held-out loss", 3.0, 2.0), loss_moved("Test loss", 3.0, 2.9999)
    ('Held-out loss fell: 3 to 2 nats per token', 'Test loss stayed at 3 nats per token')
    """
    first, last = (f"{value:.3g}" for value in (before, after))
    if first == last:
        return f"{what} stayed at {last} nats per token"
    return f"{what} {'fell' if after < before else 'rose'}: {first} to {last} nats per token"
