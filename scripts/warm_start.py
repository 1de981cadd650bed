"""Does a warm start help GRPO? The demo with and without one, on the same seeds and problems.

    python scripts/warm_start.py

Writes figures/warm_start.json and .png: accuracy on held-out problems before, after the warm start
and after GRPO, greedy with 95 % intervals and sampled, and the seconds of each run. With a warm
start: configs/warm_start_countdown.yaml. Without: configs/demo.yaml. Both take 64 steps of GRPO.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIGS = {"without": "demo", "with": "warm_start_countdown"}
KEYS = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled")


def run(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """One training: accuracy at every look, and what the process took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "mlx_lora", "train", CONFIGS[kind], "-o", f"seed={seed}"]
    done = subprocess.run(
        [*command, "--json", "--run-dir", str(folder)], stdout=subprocess.PIPE, check=True
    )
    seconds = time.perf_counter() - begin
    summary = json.loads(done.stdout)
    looks = {
        when: {k: summary[k.replace("accuracy", f"accuracy_{when}", 1)] for k in KEYS}
        for when in ("before", "after")
    }
    kept = None
    if warm := summary.get("stages", ())[:1]:
        looks["after the warm start"] = {k: warm[0][k] for k in KEYS}
        kept = warm[0]["rejection_sampling"]
    return {
        "warm_start": kind,
        "seed": seed,
        "looks": looks,
        "rejection_sampling": kept,
        "alerts": summary["alerts"],
        "process_seconds": round(seconds, 1),
        "blas": json.loads((folder / "environment.json").read_text())["blas"],
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    colours = {"without": "#0072b2", "with": "#d55e00"}
    names = ["before", "after the warm start", "after"]
    for axis, key, title in zip(axes, KEYS[::3], ("greedy", "sampled"), strict=True):
        for r in runs:
            looks = [(x, r["looks"][n]) for x, n in enumerate(names) if n in r["looks"]]
            shift = 0.03 * (r["seed"] - 2) + (0.1 if r["warm_start"] == "with" else -0.1)
            at, values = [x + shift for x, _ in looks], [100 * look[key] for _, look in looks]
            label = f"{r['warm_start']} a warm start" if r["seed"] == runs[0]["seed"] else None
            axis.plot(at, values, "o-", color=colours[r["warm_start"]], label=label, alpha=0.8)
            if key == "accuracy":
                for x, (_, look) in zip(at, looks, strict=True):
                    ends = [100 * look["accuracy_low"], 100 * look["accuracy_high"]]
                    axis.plot([x, x], ends, color=colours[r["warm_start"]], alpha=0.4)
        axis.set_xticks(range(3), ["before", "warm start", "64 steps\nof GRPO"])
        axis.set_title(f"{title}, one line a seed", loc="left")
        axis.set_ylim(30, 75)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("held-out problems solved, %")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run(kind, seed, Path(folder) / f"{kind}-{seed}")
            for seed in args.seeds
            for kind in CONFIGS
        ]
    (ROOT / "figures" / "warm_start.json").write_text(json.dumps(runs, indent=2) + "\n")
    draw(runs, ROOT / "figures" / "warm_start.png")
    for r in runs:
        print(r["warm_start"], r["seed"], {n: look["accuracy"] for n, look in r["looks"].items()})


if __name__ == "__main__":
    main()
