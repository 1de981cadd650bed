"""Evolution strategies against GRPO on the embedded model: at equal samples, at equal time.

    python scripts/es_vs_grpo.py
    python scripts/es_vs_grpo.py --seeds 0 --generations 8

Both begin with the same 4-bit model and the same untrained adapter and face the same 512 held-out
Countdown problems, greedy. GRPO is configs/demo.yaml, ES configs/es_countdown_demo.yaml: what each
does well here. Curves are over samples (completions that were scored) and over seconds of learning
(rollouts, rewards and updates; measurements are left out), both as CPU time of the process and by
the wall. Writes figures/es_vs_grpo.json and .png. Nine minutes of CPU
time; MLX_LORA_CPU picks the CPU path and is recorded.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora import config, cpu
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import attach, load
from mlx_lora.rl import es, grpo
from mlx_lora.rl.evaluate import judge, wilson
from mlx_lora.runlog import Clock, atomically, commit
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
OUT = ROOT / "figures" / "es_vs_grpo"
FILES = {"grpo": "demo", "es": "es_countdown_demo"}
HELD_OUT, LOOKS = 512, 8  # problems; measurements of a run beside the one before it
SEEDS = (0, 1, 2)
COLOURS = {"grpo": "#0072b2", "es": "#d55e00"}
NAMES = {"grpo": "GRPO", "es": "ES"}
Point = dict[str, float]


def train(method: str, seed: int, options: list[str]) -> dict[str, Any]:
    """One run: accuracy before it and at LOOKS places on the way, with samples and seconds."""
    experiment = config.load(config.find(FILES[method]), [f"seed={seed}", *options])
    e = experiment.first
    assert e.task is not None, "both files name the task"
    task, loaded = load_task(e.task.name, e.task.options), load(e)
    attach(loaded, experiment)
    judged = load_task("countdown")  # the same held-out problems for both
    problems = judged.load("test", HELD_OUT, 0)
    seen: list[dict[str, float]] = []
    loop = {"grpo": grpo.train, "es": es.train}[method]
    steps: Iterator[int] = loop(
        loaded,
        task,
        e,
        optimizer_of(e),
        Clock(),
        lambda step, metrics, groups: seen.append(metrics),
    )

    def point(samples: int, wall: float, process: float) -> Point:
        groups = judge(loaded, judged, problems, e.rollout.max_tokens, 0.0, 0)
        hits = sum(g.rewards[0].reason == CORRECT for g in groups)
        low, high = wilson(hits, HELD_OUT)
        return {
            "samples": samples,
            "seconds": round(wall, 2),
            "cpu_seconds": round(process, 2),
            "accuracy": hits / HELD_OUT,
            "accuracy_low": low,
            "accuracy_high": high,
        }

    each = rollouts(e)
    points, wall, process = [point(0, 0.0, 0.0)], 0.0, 0.0
    for step in range(e.iters):
        began, used = time.perf_counter(), time.process_time()
        next(steps)
        wall, process = wall + time.perf_counter() - began, process + time.process_time() - used
        if (step + 1) * LOOKS // e.iters > step * LOOKS // e.iters:
            points.append(point((step + 1) * each, wall, process))
            print(f"{NAMES[method]} seed {seed} step {step + 1}: {points[-1]}", flush=True)
    rewards = [round(m["reward"], 4) for m in seen]
    return {"method": method, "seed": seed, "points": points, "rewards": rewards}


def rollouts(e: Any) -> int:
    """Completions that a step scores."""
    if e.method == "es":
        return e.es.population * e.es.samples_per_generation
    return e.batch_size * e.grpo.group_size


def at(points: list[Point], axis: str, value: float) -> float | None:
    """Accuracy where `axis` has a value, on a line between measurements. None beyond the last."""
    xs = [p[axis] for p in points]
    return float(np.interp(value, xs, [p["accuracy"] for p in points])) if value <= xs[-1] else None


def compared(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies where the shorter method ends: by samples, by CPU seconds, by the wall."""
    found: dict[str, Any] = {}
    for axis in ("samples", "cpu_seconds", "seconds"):
        ends = [r["points"][-1][axis] for r in runs]
        value = min(ends)
        found[axis] = {"value": value} | {
            method: [at(r["points"], axis, value) for r in runs if r["method"] == method]
            for method in FILES
        }
    found["before"] = [r["points"][0]["accuracy"] for r in runs if r["method"] == "es"]
    found["after"] = {
        m: [
            {k: r["points"][-1][k] for k in ("accuracy", "accuracy_low", "accuracy_high")}
            for r in runs
            if r["method"] == m
        ]
        for m in FILES
    }
    return found


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over samples and over CPU seconds, a line a seed, intervals at the measurements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, runs, "samples", "completions scored")
    panel(right, runs, "cpu_seconds", "CPU seconds of learning")
    left.set_ylabel(f"of {HELD_OUT} held-out problems solved, %")
    equal = {"samples": "samples", "cpu_seconds": "CPU time"}
    for axes, (axis, words) in zip((left, right), equal.items(), strict=True):
        value = compared(runs)[axis]
        means = {m: 100 * float(np.mean(value[m])) for m in FILES}
        title = ", ".join(f"{NAMES[m]} {means[m]:.0f} %" for m in FILES)
        axes.axvline(value["value"], color="#999999", linewidth=0.8, linestyle=":")
        axes.set_title(f"At equal {words} (dotted): {title}", loc="left", fontsize=10)
    with atomically(path) as part:
        figure.savefig(part, format="png")


def panel(axes: "Axes", runs: Sequence[Mapping[str, Any]], axis: str, label: str) -> None:
    for r in runs:
        points, colour = r["points"], COLOURS[r["method"]]
        name = NAMES[r["method"]] if r["seed"] == min(x["seed"] for x in runs) else None
        xs = [p[axis] for p in points]
        low, high = ([100 * p[f"accuracy_{s}"] for p in points] for s in ("low", "high"))
        axes.plot(xs, [100 * p["accuracy"] for p in points], "o-", color=colour, ms=3, label=name)
        axes.vlines(xs, low, high, color=colour, alpha=0.25)
    axes.set(xlabel=label, xlim=(0, None))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--generations", type=int, help="of ES, in place of its file's")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the JSON")
    args = parser.parse_args()
    file = OUT.with_suffix(".json")
    if args.draw:
        draw(json.loads(file.read_text())["runs"], OUT.with_suffix(".png"))
        return
    shorter = [f"iters={args.generations}"] if args.generations else []
    runs = [
        train(method, seed, shorter if method == "es" else [])
        for seed in args.seeds
        for method in FILES
    ]
    about = {
        "commit": commit(),
        "blas": cpu.mode(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "files": FILES,
        "held_out": HELD_OUT,
    }
    found = about | {"compared": compared(runs), "runs": runs}
    with atomically(file) as part:
        part.write_text(json.dumps(found, indent=2) + "\n")
    draw(runs, OUT.with_suffix(".png"))
    print(json.dumps(found["compared"], indent=2))


if __name__ == "__main__":
    main()
