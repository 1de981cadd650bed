"""The check as one picture: where in the text, on which text and in which block it moved."""

from pathlib import Path

import numpy as np

from mlx_lora.check.gate import Report
from mlx_lora.check.reading import Reading
from mlx_lora.errors import ConfigError
from mlx_lora.runlog import atomically

COLOURS = {"pass": "seagreen", "warn": "darkorange", "fail": "firebrick"}
BINS = 24
FLOOR, FINE = 1e-9, 1e-3  # nats: below the one a KL is rounding, below the other it is fine


def plot(report: Report, path: Path) -> None:
    """KL and entropy by position, KL by text, and drift by block where it was measured."""
    from matplotlib.figure import Figure

    assert report.reading is not None, "the picture is drawn from the tokens that were read"
    figure = Figure(figsize=(13, 7.5), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    by_position(panels[0], report.reading)
    entropies(panels[1], report.reading)
    by_text(panels[2], report.reading)
    if report.layers:
        drifts(panels[3], report)
    else:
        gates_as_text(panels[3], report)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"check: {report.verdict} (expected {report.expect}), mean KL "
        f"{report.measured.kl_mean:.3g} nats a token",
        color=COLOURS[report.verdict],
        fontsize=14,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as part:
            figure.savefig(part, format="png")
    except OSError as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error.strerror}") from error


def by_position(axes, reading: Reading) -> None:
    kl = np.maximum(reading.column("kl"), FLOOR)
    axes.plot(reading.position_K, kl, ".", color="steelblue", alpha=0.35, ms=4, label="a token")
    where, mean = binned(reading.position_K, reading.column("kl"))
    axes.plot(where, np.maximum(mean, FLOOR), color="navy", lw=2, label="mean")
    from_rounding_up(axes, reading.column("kl"))
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("KL(base ‖ adapted), nats")
    axes.set_title("KL by position")
    axes.legend(fontsize=9)


def entropies(axes, reading: Reading) -> None:
    for name, colour, label in (
        ("entropy_base", "grey", "base"),
        ("entropy_adapted", "darkorange", "adapted"),
    ):
        where, mean = binned(reading.position_K, reading.column(name))
        axes.plot(where, mean, color=colour, lw=2, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("entropy of the next token, nats")
    axes.set_title("Entropy by position")
    axes.legend(fontsize=9)


def by_text(axes, reading: Reading) -> None:
    texts = np.unique(reading.text_K)
    kl = np.array([reading.column("kl")[reading.text_K == t].mean() for t in texts])
    order = np.argsort(-kl)
    axes.bar(range(len(texts)), np.maximum(kl[order], FLOOR), color="steelblue", bottom=0)
    from_rounding_up(axes, kl)
    if len(texts) <= 40:
        axes.set_xticks(range(len(texts)), texts[order] + 1, rotation=90, fontsize=7)
    axes.set_xlabel("the texts that were read, by number, worst first")
    axes.set_ylabel("mean KL, nats")
    axes.set_title("KL by text")


def from_rounding_up(axes, kl_K: np.ndarray) -> None:
    """Powers of ten from FLOOR, where whatever is smaller lies, to a fine KL at least."""
    most = float(kl_K.max())
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, max(FINE, 3 * most) if np.isfinite(most) else None)
    if most < FLOOR:
        said = "0 everywhere" if most == 0 else f"rounding: {most:.1g} at most"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", fontsize=12)


def drifts(axes, report: Report) -> None:
    moved = [layer["drift"] for layer in report.layers]
    axes.plot(range(len(moved)), moved, "o-", color="purple", clip_on=False)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("‖change‖ / ‖output‖")
    axes.set_title("How far each block's output moved")


def gates_as_text(axes, report: Report) -> None:
    axes.axis("off")
    axes.set_title("Gates")
    for row, gate in enumerate(report.gates):
        at = 1 - (row + 1) / (len(report.gates) + 1)
        axes.text(0.0, at, gate.verdict, color=COLOURS[gate.verdict], transform=axes.transAxes)
        words = gate.sentence if len(gate.sentence) < 95 else gate.sentence[:92] + "..."
        axes.text(0.09, at, words.replace("$", r"\$"), fontsize=8, transform=axes.transAxes)


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of y over bins of x that hold something."""
    edges = np.linspace(x.min(), x.max() + 1, min(BINS, int(x.max() - x.min()) + 1) + 1)
    bin_of = np.digitize(x, edges) - 1
    count = np.bincount(bin_of, minlength=len(edges) - 1)
    keep = count > 0
    mean = np.bincount(bin_of, y, minlength=len(edges) - 1)[keep] / count[keep]
    middle = np.bincount(bin_of, x, minlength=len(edges) - 1)[keep] / count[keep]
    return middle, mean
