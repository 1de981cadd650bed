"""At which std does a gaussian start turn the embedded model's samples to garble?

    python scripts/garble_threshold.py

Sweeps std at rank 8 and scale 2.0, three seeds each, one fresh model a point, and writes
figures/garble_threshold.png, .json and .md; the table also goes into docs/check.md. About a minute
on two CPU cores.
"""

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mlx_lora import models
from mlx_lora.check import gate, probes
from mlx_lora.check.metrics import Measured
from mlx_lora.numerics import log_softmax
from mlx_lora.registry import options
from mlx_lora.runlog import atomically, commit, json_safe, version
from mlx_lora.spectral.report import LoRAAnalyzer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

ROOT = Path(__file__).parents[1]
OUT = ROOT / "figures" / "garble_threshold"
PAGE = ROOT / "docs" / "check.md"
LOW, HIGH, COUNT = 0.003, 0.6, 12
RANK, SCALE, SEEDS = 8, 2.0, (0, 1, 2)
COLOURS = {"pass": "#d9efdb", "warn": "#fdf0cf", "fail": "#f8d7d3"}
DARK = {"pass": "#2e7d32", "warn": "#b26a00", "fail": "#b3261e"}
INK, QUIET = "#222222", "#6b6b6b"
QUOTED = 4  # stds whose samples are shown in the picture
LABELS = {
    "kl_mean": "KL(base ‖ adapted),\nnats per token",
    "perplexity_ratio": "perplexity of known-good text,\ntimes the base's",
    "sample_nll_excess": "surprise of samples over the\nbase's own, nats per token",
}
CAPTION = (
    "Line: median of the seeds. Band: their range. "
    "Shade: verdict on the start, of which any but a harmless one is warned."
)
Row = dict[str, Any]


def main() -> None:
    stds = [LOW * (HIGH / LOW) ** (i / (COUNT - 1)) for i in range(COUNT)]
    rows = []
    for std in stds:
        rows.append(summary(std, [measured(std, seed) for seed in SEEDS]))
        print(line(rows[-1]), flush=True)
    cost = quantization()
    about = {
        "script": "scripts/garble_threshold.py",
        "rank": RANK,
        "scale": SCALE,
        "seeds": SEEDS,
        "quantization": cost,
        "commit": commit(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
    OUT.parent.mkdir(exist_ok=True)
    text = json.dumps(json_safe({"about": about, "rows": rows}), indent=2, allow_nan=False)
    write(OUT.with_suffix(".json"), text + "\n")
    shown = table(rows, cost)
    write(OUT.with_suffix(".md"), shown)
    paste(shown, PAGE)
    with atomically(OUT.with_suffix(".png")) as part:
        draw(rows, cost).savefig(part, format="png", dpi=110)


def measured(std: float, seed: int) -> Row:
    """The check of one start: what it measured, and its verdicts as a start and as an adapter."""
    loaded = models.load(models.DEMO)
    report = gate.check(
        loaded,
        init="gaussian",
        init_options={"std": std},
        lora={"rank": RANK, "scale": SCALE},
        seed=seed,
    )
    m = report.measured
    structural = LoRAAnalyzer(loaded.model).analyze().structural
    return {
        "seed": seed,
        "kl_mean": m.kl_mean,
        "kl_p99": m.kl_p99,
        "top1_agreement": m.top1_agreement,
        "perplexity_ratio": gate.ratio(m.perplexity_adapted, m.perplexity_base),
        "entropy_ratio": gate.ratio(m.entropy_adapted, m.entropy_base),
        "sample_nll_base": m.sample_nll_base,
        "sample_nll_adapted": m.sample_nll_adapted,
        "sample_nll_excess": m.sample_nll_adapted - m.sample_nll_base,
        "dominance": structural.scaled_max_dominance,
        "verdict": report.verdict,
        "failed": [g.name for g in report.gates if g.verdict == "fail"],
        "verdict_healthy": verdict(m, "healthy"),
        "samples": [pair.__dict__ for pair in (m.samples[0], m.samples[-1])],
    }


def quantization() -> dict[str, float]:
    """What 4-bit quantization itself does to the model, without any adapter: the same numbers."""
    import mlx.core as mx  # not at the top: on Linux our package must load OpenBLAS before it

    whole, packed = models.load(str(models.DEMO_FOLDER)), models.load(models.DEMO)
    kls, same = [], []
    for ids, start in probes.read(packed).texts:
        both = [models.logits(m.model, mx.array([ids]))[0] for m in (whole, packed)]
        p_TV, q_TV = (np.array(log_softmax(x))[start - 1 : len(ids) - 1] for x in both)
        kls += (np.exp(p_TV) * (p_TV - q_TV)).sum(axis=-1).tolist()
        same += (p_TV.argmax(axis=-1) == q_TV.argmax(axis=-1)).tolist()
    return {"kl_mean": statistics.fmean(kls), "top1_agreement": statistics.fmean(same)}


def verdict(m: Measured, expect: str) -> str:
    """What the gates would say of the same numbers in an adapter from disk."""
    said = [found for name in gate.gates if (found := gate.gates[name](m, expect, None))]
    return max((g.verdict for g in said), key=gate.ORDER.index)


def summary(std: float, runs: Sequence[Row]) -> Row:
    """One std over its seeds: median and range of each number, the worst verdict, two samples."""
    spread = {}
    for key in (key for key, value in runs[0].items() if isinstance(value, float)):
        values = [run[key] for run in runs]
        spread[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    worst = {
        key: max((run[key] for run in runs), key=gate.ORDER.index)
        for key in ("verdict", "verdict_healthy")
    }
    return {"std": std, **spread, **worst, "samples": runs[0]["samples"], "runs": runs}


def line(row: Row) -> str:
    return (
        f"std {row['std']:.4f}  KL {row['kl_mean']['median']:.2e}  "
        f"{row['verdict']}/{row['verdict_healthy']}  {legible(row['samples'][1]['adapted'], 60)}"
    )


def legible(text: str, limit: int) -> str:
    """The model's text on one line, control characters made visible, cut to `limit`."""
    flat = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).strip()
    return flat if len(flat) <= limit else f"{flat[: limit - 1].rstrip()}…"


def table(rows: Sequence[Row], cost: Mapping[str, float]) -> str:
    """Medians as Markdown, made to be pasted."""
    prompt = legible(rows[0]["samples"][1]["prompt"], 60)
    base = legible(rows[0]["samples"][1]["base"], 90)
    seeds = ", ".join(map(str, SEEDS))
    lines = [
        f"Medians and the worst verdict over seeds {seeds}, at rank {RANK} and scale {SCALE:g}. "
        f"For comparison: 4-bit quantization itself moved this model by a KL of "
        f"{cost['kl_mean']:.2g}, with {cost['top1_agreement']:.0%} of top-1 tokens kept. "
        f"The prompt is “{prompt}”; the base writes “{base}”",
        "",
        "| std | dominance | KL | perplexity | top-1 | a start | an adapter | seed 0 writes |",
        "|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for row in rows:
        sample = legible(row["samples"][1]["adapted"], 60).replace("|", "\\|").replace("`", "'")
        numbers = (
            f"{row['std']:.2g}",
            f"{row['dominance']['median']:.2g}",
            f"{row['kl_mean']['median']:.2g}",
            f"× {row['perplexity_ratio']['median']:.3g}",
            f"{row['top1_agreement']['median']:.0%}",
        )
        cells = (*numbers, row["verdict"], row["verdict_healthy"], f"`{sample}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paste(text: str, page: Path) -> None:
    """Replace what stands between the page's two markers."""
    begin, end = "<!-- garble table -->\n", "<!-- end of garble table -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{page.name} has no line {end.strip()}"
    write(page, f"{before}{begin}\n{text}\n{end}{after}")


def write(path: Path, text: str) -> None:
    with atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def draw(rows: Sequence[Row], cost: Mapping[str, float]) -> "Figure":
    """KL, perplexity and surprise against std over the verdicts, and what the model writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 12), layout="constrained")
    figure.suptitle(headline(rows), fontsize=14, x=0.01, ha="left", color=INK)
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=(9.6, 2.4)))
    above.suptitle(CAPTION, fontsize=9, x=0.01, ha="left", color=QUIET)
    panels = above.subplots(4, 1, gridspec_kw={"height_ratios": (3, 3, 3, 0.9)})
    stds = [row["std"] for row in rows]
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(edges(rows)[0], edges(rows)[-1])
        axes.set_xticks(stds, ["" for _ in stds])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:3]:
        shade(axes, rows, "verdict", 0, 1)
    start = {"warn": "warn", "fail": "fail"}
    trained = {f"trained_{k}": f"{k}, for an adapter from disk" for k in start}
    curve(panels[0], rows, "kl_mean")
    panels[0].set_yscale("log")
    limits(panels[0], gate.gates["divergence"], start)
    compare(panels[0], cost["kl_mean"])
    curve(panels[1], rows, "perplexity_ratio", shift=1)
    as_ratio(panels[1])
    limits(panels[1], gate.gates["reading"], start | trained, shift=1)
    curve(panels[2], rows, "sample_nll_excess")
    limits(panels[2], gate.gates["writing"], start)
    verdicts(panels[3], rows)
    quote(below, rows)
    return figure


def headline(rows: Sequence[Row]) -> str:
    """The finding, in the numbers of this run."""
    harmed = next((row for row in rows if row["verdict"] == "fail"), None)
    sick = next((row for row in rows if row["verdict_healthy"] == "fail"), None)
    start = f"fails the check from std {harmed['std']:.2g}" if harmed else "never fails the check"
    later = f"is garble from {sick['std']:.2g}" if sick else "never becomes garble"
    return f"A gaussian start, rank {RANK}, scale {SCALE:g}: it {start} and {later}"


def edges(rows: Sequence[Row]) -> list[float]:
    """Borders between neighbouring stds, halfway on the log axis."""
    half = math.sqrt(rows[1]["std"] / rows[0]["std"])
    return [rows[0]["std"] / half, *(row["std"] * half for row in rows)]


def shade(axes: "Axes", rows: Sequence[Row], key: str, low: float, high: float) -> None:
    borders = edges(rows)
    for row, left, right in zip(rows, borders, borders[1:], strict=False):
        axes.axvspan(left, right, low, high, color=COLOURS[row[key]], linewidth=0, zorder=0)


def curve(axes: "Axes", rows: Sequence[Row], key: str, *, shift: float = 0) -> None:
    """Median as a line, the range over seeds as a band, each seed as a dot."""
    stds = [row["std"] for row in rows]

    def of(part: str) -> list[float]:
        return [row[key][part] - shift for row in rows]

    axes.fill_between(stds, of("low"), of("high"), color="#2171b5", alpha=0.25, linewidth=0)
    axes.plot(stds, of("median"), color="#2171b5", linewidth=2)
    dots = [(row["std"], run[key] - shift) for row in rows for run in row["runs"]]
    axes.plot(*zip(*dots, strict=True), "o", color="#0b3c6f", markersize=3)
    axes.set_ylabel(LABELS[key], fontsize=10, color=INK)


def limits(
    axes: "Axes", function: Callable[..., Any], names: dict[str, str], *, shift: float = 0
) -> None:
    """A gate's thresholds, as its own options give them."""
    known = options(function)
    left = axes.get_xlim()[0]
    for option, label in names.items():
        colour = DARK["fail" if "fail" in option else "warn"]
        axes.axhline(known[option] - shift, color=colour, linestyle="--", linewidth=1, zorder=1)
        text = f" {label}: {known[option]:g}"
        axes.text(left, known[option] - shift, text, color=colour, fontsize=9, va="bottom")


def compare(axes: "Axes", value: float) -> None:
    """What the model has been through already: a line to judge the others by."""
    axes.axhline(value, color=QUIET, linestyle=":", linewidth=1)
    text = f"what 4-bit quantization itself did: {value:.2g} "
    right = axes.get_xlim()[1]
    axes.text(right, value, text, color=QUIET, fontsize=9, va="bottom", ha="right")


def as_ratio(axes: "Axes") -> None:
    """An axis of ratio - 1, logarithmic on both sides of 1, labelled with the ratio."""
    axes.set_yscale("symlog", linthresh=0.01)
    ticks = (1, 1.01, 1.1, 2, 10, 100, 1000)
    axes.set_yticks([t - 1 for t in ticks], [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(bottom=-0.003)


def verdicts(axes: "Axes", rows: Sequence[Row]) -> None:
    """Two strips: what the check says of a fresh start, and of an adapter with these numbers."""
    names = ("an adapter (--expect healthy)", "a start (--expect same)")
    style = {"ha": "center", "va": "center", "fontsize": 9, "fontweight": "bold"}
    for at, key in enumerate(("verdict_healthy", "verdict")):
        shade(axes, rows, key, at / 2, at / 2 + 0.46)
        for row in rows:
            axes.text(row["std"], at / 2 + 0.23, row[key], color=DARK[row[key]], **style)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.23, 0.73], names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    stds = [row["std"] for row in rows]
    axes.set_xticks(stds, [f"{std:.2g}" for std in stds])
    axes.set_xlabel("std of A and B", fontsize=10, color=INK)


def quoted(rows: Sequence[Row]) -> list[Row]:
    """Stds worth a quotation: the last healthy one, the first of each worse verdict, the last."""
    said = [row["verdict_healthy"] for row in rows]
    healthy = [i for i, verdict in enumerate(said) if verdict == "pass"]
    worth = [healthy[-1:], *([said.index(v)] for v in ("warn", "fail") if v in said)]
    chosen = {0, len(rows) - 1} if not healthy else {len(rows) - 1}
    chosen |= {i for some in worth for i in some}
    return [rows[i] for i in sorted(chosen)][-QUOTED:]


def quote(figure: "SubFigure", rows: Sequence[Row]) -> None:
    """What the model writes, seed 0, at a few stds side by side."""
    shown = quoted(rows)
    for row, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        axes.set_axis_off()
        style = {"va": "top", "transform": axes.transAxes}
        colour = DARK[row["verdict_healthy"]]
        axes.text(
            0, 1, f"std {row['std']:.2g}", color=colour, fontsize=11, fontweight="bold", **style
        )
        for sample, top in zip(row["samples"], (0.86, 0.42), strict=True):
            prompt = textwrap.fill(legible(sample["prompt"], 60), 36)
            axes.text(0, top, escaped(prompt), color=QUIET, fontsize=9, **style)
            answer = textwrap.fill(legible(sample["adapted"], 90), 34)
            axes.text(0.02, top - 0.1, escaped(answer), color=INK, fontsize=9, **style)


def escaped(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


if __name__ == "__main__":
    main()
