"""Does the demo work, and not by luck? Three seeds through the real command.

    python scripts/demo_seeds.py

Writes figures/demo_seeds.json and .png: reward by step, accuracy on held-out problems before and
after with 95 % intervals, seconds and peak memory of each whole process. MLX_LORA_CPU picks the CPU
path and is recorded.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMOOTH = 5  # steps averaged for the curve


def run(seed: int, folder: Path) -> dict[str, Any]:
    """One demo: its JSON, its rewards by step, and what the process took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "mlx_lora", "demo", "--seed", str(seed), "--json"]
    done = subprocess.run([*command, "--out", str(folder)], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - begin
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    keep = ("accuracy_before", "accuracy_after")
    summary = json.loads(done.stdout)
    return {
        "seed": seed,
        **{k: v for k, v in summary.items() if k.startswith(keep)},
        "alerts": summary["alerts"],
        "process_seconds": round(seconds, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "blas": json.loads((folder / "environment.json").read_text())["blas"],
        "rewards": [json.loads(line)["reward"] for line in lines],
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (curve, bars) = plt.subplots(
        1, 2, figsize=(9, 3.2), width_ratios=[3, 2], layout="constrained"
    )
    colours = ["#0072b2", "#d55e00", "#009e73"]
    for r, colour in zip(runs, colours, strict=False):
        smooth = np.convolve(r["rewards"], np.ones(SMOOTH) / SMOOTH, "valid")
        steps = np.arange(len(smooth)) + SMOOTH
        curve.plot(steps, smooth, color=colour, label=f"seed {r['seed']}")
        for x, when, filled in ((0, "before", "white"), (1, "after", colour)):
            value = 100 * r[f"accuracy_{when}"]
            low, high = (100 * r[f"accuracy_{when}_{side}"] for side in ("low", "high"))
            at = x + 0.12 * (r["seed"] - 1)
            bars.plot([at, at], [low, high], color=colour)
            bars.plot(at, value, "o", color=colour, markerfacecolor=filled)
    gains = [100 * (r["accuracy_after"] - r["accuracy_before"]) for r in runs]
    curve.set(xlabel="step", ylabel=f"reward, mean of {SMOOTH} steps", ylim=(0, None))
    curve.set_title("GRPO on the 4-bit model's own rollouts", loc="left")
    curve.legend(frameon=False)
    bars.set_xticks([0, 1], ["before", "after"])
    bars.set(xlim=(-0.5, 1.5), ylim=(0, 100), ylabel="held-out problems solved, %")
    bars.set_title(f"+{min(gains):.0f} to +{max(gains):.0f} points, greedy", loc="left")
    for axis in (curve, bars):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder) / str(seed)) for seed in args.seeds]
    (ROOT / "figures" / "demo_seeds.json").write_text(json.dumps(runs, indent=2) + "\n")
    draw(runs, ROOT / "figures" / "demo_seeds.png")
    for r in runs:
        print({k: v for k, v in r.items() if k != "rewards"})


if __name__ == "__main__":
    main()
