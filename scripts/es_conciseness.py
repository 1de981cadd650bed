"""Evolution strategies on Conciseness with the embedded model: the reward, and what it costs.

    python scripts/es_conciseness.py

Runs configs/es_conciseness_demo.yaml through the real command with three seeds, greedy, and keeps
the mean reward on its eight held-out questions, the KL to the base there (k3, 20 samples of each,
nats a token), exact matches, and what the answers were. Writes figures/es_conciseness.json and
.png. Three times 25 seconds; MLX_LORA_CPU picks the CPU path and is recorded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora.runlog import atomically, commit

ROOT = Path(__file__).parent.parent
OUT = ROOT / "figures" / "es_conciseness"
CONFIG = ROOT / "configs" / "es_conciseness_demo.yaml"
COLOURS = ("#0072b2", "#d55e00", "#009e73")
MEASURED = ("reward_mean", "kl_to_base", "accuracy", "reasons")


def run(seed: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """One run: what was measured before and after it, and its curves by generation."""
    command = [sys.executable, "-m", "mlx_lora", "train", str(CONFIG), "--run-dir", str(folder)]
    settings = [part for option in (f"seed={seed}", *options) for part in ("-o", option)]
    done = subprocess.run([*command, *settings, "--json"], stdout=subprocess.PIPE, check=True)
    summary = json.loads(done.stdout)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = {
        f"{name}_{when}": summary[f"{name}_{when}"]
        for when in ("before", "after")
        for name in MEASURED
    }
    return {
        "seed": seed,
        **ends,
        "seconds": round(summary["seconds"], 1),
        "blas": json.loads((folder / "environment.json").read_text())["blas"],
        "rewards": [round(m["reward"], 3) for m in lines],
        "kl": {m["step"]: round(m["kl"], 3) for m in lines if "kl" in m},
    }


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The reward of the training questions and the KL to the base, by generation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for r, colour in zip(runs, COLOURS, strict=False):
        label = f"seed {r['seed']}"
        left.plot(range(1, len(r["rewards"]) + 1), r["rewards"], color=colour, label=label)
        steps = [int(step) + 1 for step in r["kl"]]
        right.plot(steps, list(r["kl"].values()), "o-", ms=3, color=colour, label=label)
    ends = ", ".join(f"{r['reward_mean_after']:.2f}" for r in runs)
    before = f"{runs[0]['reward_mean_before']:.2f}"
    left.set_title(f"Held-out reward {before} to {ends}", loc="left", fontsize=10)
    left.set(xlabel="generation", ylabel="reward, minus characters off")
    exact = ", ".join(f"{8 * r['accuracy_after']:.0f}" for r in runs)
    right.set_title(f"Exact answers afterwards: {exact} of 8", loc="left", fontsize=10)
    right.set(xlabel="generation", ylabel="KL to the base, nats a token", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    left.legend(frameon=False)
    with atomically(path) as part:
        figure.savefig(part, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--option", action="append", default=[], help="of the experiment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder) / str(seed), args.option) for seed in args.seeds]
    about = {"commit": commit(), "threads": os.environ.get("OPENBLAS_NUM_THREADS")}
    with atomically(OUT.with_suffix(".json")) as part:
        part.write_text(json.dumps(about | {"runs": runs}, indent=2) + "\n")
    draw(runs, OUT.with_suffix(".png"))
    for r in runs:
        print({k: v for k, v in r.items() if k not in ("rewards", "kl")})


if __name__ == "__main__":
    main()
