"""Does it matter how an adapter starts? Every init, tuned alike, trained by RL on the demo task.

Each init gets its own learning rate, the best of one small grid on seed 0, continued downwards
where the best is at its edge (otherwise the ranking would rank learning rates). Rates that come
close are tried on one seed more, and the best mean is chosen: one seed's noise is as large as what
inits differ by. It is judged at that rate on five other seeds, one by one against `zero` on the
same. Every run is kept in figures/inits_runs.jsonl as soon as it ends, and a run that is there is
not repeated: the script can be stopped and started again. Writes figures/inits.json, .png and the
table in docs/inits.md.

    OPENBLAS_NUM_THREADS=1 python scripts/bench_inits.py               # all of it, some hour
    python scripts/bench_inits.py --only zero,gradient --part 0/2      # a share of it
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import config, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, calibration_rows
from mlx_lora.check import gate
from mlx_lora.check.probes import read
from mlx_lora.optimizers import optimizer_of
from mlx_lora.rl import grpo
from mlx_lora.rl.evaluate import judge, wilson
from mlx_lora.runlog import Clock, commit, json_safe
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT

ROOT = Path(__file__).resolve().parents[1]
RUNS, OUT = ROOT / "figures/inits_runs.jsonl", ROOT / "figures/inits.json"
PAGE = ROOT / "docs/inits.md"
RATES, LOWEST = (5e-4, 1e-3, 2e-3), 1.5625e-5
TUNING, MORE, CLOSE = 0, (6,), 0.03  # seeds that choose the rate, and how close is undecided
SEEDS = (1, 2, 3, 4, 5)  # those that are judged
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 %, by the number of seeds
HELD_OUT = 512
VARIANTS: dict[str, dict[str, Any]] = {
    "zero": {},
    "orthonormal": {"init": "orthonormal"},
    "split_support": {"init": "split_support"},
    "activations": {"init": "activations"},
    "activations redistributed": {"init": {"name": "activations", "max_rank_ratio": 2}},
    "gradient": {"init": "gradient"},
    "svd of another run": {"init": {"name": "svd", "reference": "REFERENCE"}},
    "tiny_scale": {"init": "tiny_scale"},
    "null_space": {"init": "null_space"},
    "output_match": {"init": "output_match"},
    "quant_repair": {"init": "quant_repair"},
    "loftq": {"init": "loftq"},
    "pissa": {"init": "pissa"},
    "gaussian 0.02": {"init": {"name": "gaussian", "std": 0.02}},
    "gaussian 0.1": {"init": {"name": "gaussian", "std": 0.1}},
    "zero DoRA": {"fine_tune_type": "dora"},
    "zero LoRA+ 16": {"lora_parameters": {"rank": 8, "scale": 2.0, "lora_plus_ratio": 16.0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="variants, comma-separated")
    parser.add_argument("--part", default="0/1", help="this share of the variants, like 0/2")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    names = given.only.split(",") if given.only else list(VARIANTS)
    if not given.report:
        for rate in sorted(RATES, key=lambda r: abs(r - 1e-3)):
            for name in names[part::parts]:
                ensure(name, rate, TUNING)
        for name in names[part::parts]:
            while best_rate(name) == (lowest := min(tried(name))) and lowest > LOWEST:
                ensure(name, lowest / 2, TUNING)  # the best was at the edge of the grid
        for name in names[part::parts]:
            for rate in undecided(name):
                for seed in MORE:
                    ensure(name, rate, seed)
        for seed in SEEDS:
            for name in names[part::parts]:
                ensure(name, best_rate(name), seed)
    write_report()


def runs() -> list[dict[str, Any]]:
    if not RUNS.exists():
        return []
    found = [json.loads(line) for line in RUNS.read_text().splitlines()]
    return list({(r["variant"], r["learning_rate"], r["seed"]): r for r in found}.values())


def ensure(name: str, rate: float, seed: int) -> None:
    """Make the run unless it is on file."""
    if any((r["variant"], r["learning_rate"], r["seed"]) == (name, rate, seed) for r in runs()):
        return
    record = {"variant": name, "learning_rate": rate, "seed": seed} | one(name, rate, seed)
    with RUNS.open("a") as log:
        log.write(json.dumps(json_safe(record)) + "\n")
    print(
        f"{name:26} lr {rate:g} seed {seed}: {record['accuracy']:.1%}, {record['seconds']:.0f} s",
        flush=True,
    )


def experiment_of(name: str, rate: float, seed: int) -> config.Experiment:
    text = (ROOT / "configs/demo.yaml").read_text()
    changes = {k: json.dumps(v) for k, v in VARIANTS[name].items()}
    if "REFERENCE" in changes.get("init", ""):
        changes["init"] = changes["init"].replace("REFERENCE", str(reference_folder()))
    overrides = [f"{k}={v}" for k, v in changes.items()]
    return config.from_text(
        text, "demo.yaml", [*overrides, f"learning_rate={rate}", f"seed={seed}"]
    )


def reference_folder() -> Path:
    """An adapter that the same task trained from a seed that is not measured."""
    folder = ROOT / "figures/.inits_reference"
    if not (folder / files.CONFIG).exists():
        one("zero", 1e-3, 100, keep=folder)
    return folder


def one(name: str, rate: float, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Attach, check, train, evaluate: what a user's run does, without its files."""
    begin = time.perf_counter()
    e = experiment_of(name, rate, seed)
    task = load_task("countdown", e.task.options)  # type: ignore[union-attr]
    loaded = models.load(e.model, quantize=e.quantize.model_dump())  # type: ignore[union-attr]
    probes = read(loaded)
    prints = gate.fingerprint(loaded, probes)
    attached = time.perf_counter()
    adapter = attach(
        loaded,
        rank=e.lora_parameters.rank,
        scale=e.lora_parameters.effective_scale,
        init=e.init.name,
        init_options=e.init.options,
        seed=seed,
        dora=e.fine_tune_type == "dora",
        rows=calibration_rows(e),
    )
    attach_seconds = time.perf_counter() - attached
    start = gate.judge(loaded, probes, prints, "same", None, begin, seed)
    before = accuracy(loaded, task, e)
    history: list[dict[str, float]] = []

    def report(step: int, metrics: dict[str, float], groups: Any) -> None:
        history.append(metrics)

    try:
        for _ in grpo.train(loaded, task, e, optimizer_of(e), Clock(), report):
            pass
        diverged = False
    except grpo.Diverged:
        diverged = True
    after = accuracy(loaded, task, e)
    if keep:
        files.save(loaded.model, adapter, keep)
    low, high = wilson(round(after * HELD_OUT), HELD_OUT)
    return {
        "kl_at_start": start.measured.kl_mean,
        "perplexity_ratio_at_start": start.to_json()["perplexity_ratio"],
        "verdict_at_start": start.verdict,
        "first_gradient_norm": history[0].get("grad_norm", 0.0),
        "measured": adapter["init"].get("measured", {}),
        "accuracy_at_start": before,
        "accuracy": after,
        "accuracy_low": low,
        "accuracy_high": high,
        "diverged": diverged,
        "attach_seconds": attach_seconds,
        "seconds": time.perf_counter() - begin,
        "commit": commit(),
    }


def accuracy(loaded: models.Loaded, task: Any, e: config.Experiment) -> float:
    samples = task.load("test", HELD_OUT, 0)
    groups = judge(loaded, task, samples, e.rollout.max_tokens, 0.0, 0)
    return float(np.mean([g.rewards[0].reason == CORRECT for g in groups]))


def tried(name: str) -> dict[float, float]:
    """Accuracy by learning rate, on the seed for that."""
    mine = [r for r in runs() if r["variant"] == name and r["seed"] == TUNING]
    return {r["learning_rate"]: r["accuracy"] for r in mine}


def undecided(name: str) -> list[float]:
    """The rates that come close to the best on one seed; none where nothing does."""
    found = tried(name)
    near = [rate for rate, accuracy in found.items() if accuracy > max(found.values()) - CLOSE]
    return near if len(near) > 1 else []


def best_rate(name: str) -> float:
    """By the mean over the seeds for that, of those that are undecided on one."""
    near, chosen = undecided(name), {TUNING, *MORE}
    if not near:
        return max(tried(name), key=tried(name).__getitem__)
    mine = [r for r in runs() if r["variant"] == name and r["seed"] in chosen]

    def mean(rate: float) -> float:
        return float(np.mean([r["accuracy"] for r in mine if r["learning_rate"] == rate]))

    return max(near, key=mean)


def at_best(name: str) -> list[dict[str, Any]]:
    found = [r for r in runs() if r["variant"] == name and r["seed"] in SEEDS]
    rate = best_rate(name)
    return sorted((r for r in found if r["learning_rate"] == rate), key=lambda r: r["seed"])


def ranking() -> list[str]:
    done = {r["variant"] for r in runs()}
    return sorted(done, key=lambda n: -float(np.mean([r["accuracy"] for r in at_best(n)])))


def summary(name: str) -> dict[str, Any]:
    """One line of the table. Intervals are over seeds, by Student's t."""
    mine, zero = at_best(name), {r["seed"]: r["accuracy"] for r in at_best("zero")}
    accuracies = np.array([r["accuracy"] for r in mine])
    gaps = np.array([r["accuracy"] - zero[r["seed"]] for r in mine if r["seed"] in zero])
    wide, apart = (STUDENT.get(len(x), 0) * error(x) for x in (accuracies, gaps))
    return {
        "variant": name,
        "learning_rate": best_rate(name),
        "seeds": [r["seed"] for r in mine],
        "kl_at_start": float(np.mean([r["kl_at_start"] for r in mine])),
        "perplexity_ratio_at_start": float(np.mean([r["perplexity_ratio_at_start"] for r in mine])),
        "verdict_at_start": mine[0]["verdict_at_start"],
        "first_gradient_norm": float(np.mean([r["first_gradient_norm"] for r in mine])),
        "accuracy_at_start": float(np.mean([r["accuracy_at_start"] for r in mine])),
        "accuracies": accuracies.tolist(),
        "accuracy": float(accuracies.mean()),
        "accuracy_low": max(0.0, float(accuracies.mean() - wide)),
        "accuracy_high": min(1.0, float(accuracies.mean() + wide)),
        "difference": float(gaps.mean()),
        "difference_low": float(gaps.mean() - apart),
        "difference_high": float(gaps.mean() + apart),
        "grid": {f"{rate:g}": accuracy for rate, accuracy in sorted(tried(name).items())},
        "attach_seconds": float(np.median([r["attach_seconds"] for r in mine])),
        "seconds": float(np.median([r["seconds"] for r in mine])),
    }


def error(values_S: np.ndarray) -> float:
    """Of the mean."""
    return float(values_S.std(ddof=1) / len(values_S) ** 0.5) if len(values_S) > 1 else np.nan


def write_report() -> None:
    rows = [summary(name) for name in ranking()]
    document = {
        "question": "Does it matter how an adapter starts, once its learning rate is tuned?",
        "script": "scripts/bench_inits.py",
        "commits": sorted({r["commit"] for r in runs() if r["commit"]}),
        "held_out": HELD_OUT,
        "rates": RATES,
        "rows": rows,
    }
    OUT.write_text(json.dumps(json_safe(document), indent=2, allow_nan=False) + "\n")
    draw(rows, OUT.with_suffix(".png"))
    begin, end = "<!-- inits table -->", "<!-- end of inits table -->"
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(f"{before}{begin}\n\n{table(rows)}\n{end}{rest.partition(end)[2]}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/inits.md, best first."""
    lines = [
        "| start | learning rate | KL at start | perplexity at start | first gradient, squared | "
        "accuracy, mean over seeds | against zero, points | seeds |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        apart = f"{100 * r['difference']:+.1f}"
        if r["variant"] == "zero":
            apart = ""
        elif np.isfinite(r["difference_low"]):
            apart += f" ({100 * r['difference_low']:+.1f} to {100 * r['difference_high']:+.1f})"
        cells = (
            r["variant"],
            f"{r['learning_rate']:.3g}",
            f"{r['kl_at_start']:.2g}",
            f"× {r['perplexity_ratio_at_start']:.3g}",
            f"{r['first_gradient_norm'] ** 2:.2g}",
            f"{r['accuracy']:.1%} ({r['accuracy_low']:.1%} to {r['accuracy_high']:.1%})",
            apart,
            str(len(r["seeds"])),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by init with every seed, beside the KL it starts with."""
    from matplotlib.figure import Figure

    rows = rows[::-1]
    at = np.arange(len(rows))
    figure = Figure(figsize=(12, 1.6 + 0.4 * len(rows)), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for y, row in zip(at, rows, strict=True):
        left.plot(
            row["accuracies"], [y] * len(row["accuracies"]), "o", color="steelblue", alpha=0.5
        )
        left.plot([row["accuracy_at_start"]], [y], "|", color="grey", markersize=14)
        if row["accuracy_low"] is not None and np.isfinite(row["accuracy_low"]):
            left.plot([row["accuracy_low"], row["accuracy_high"]], [y, y], color="navy", lw=1.5)
        left.plot([row["accuracy"]], [y], "D", color="navy")
    left.set_yticks(at, [f"{r['variant']}  (lr {r['learning_rate']:.3g})" for r in rows])
    left.set_xlabel("greedy accuracy, 512 held-out problems\n◆ mean, ● seeds, | before training")
    left.grid(axis="x", alpha=0.3)
    left.set_xlim(left=0)
    floor = 1e-9
    right.barh(at, [max(r["kl_at_start"], floor) for r in rows], color="coral", left=0)
    right.set_xscale("log")
    right.set_xlim(floor, 20)
    right.axvline(1e-3, color="grey", ls="--", lw=1)
    right.set_xlabel("KL to the base before training,\nnats per token (no bar: exactly 0)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("RL from every start, each at its own best learning rate", fontsize=14)
    figure.savefig(path)


if __name__ == "__main__":
    main()
