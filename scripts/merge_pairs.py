"""Is a merge of two adapters as good as they are? Every pair of five demos, every method.

    OPENBLAS_NUM_THREADS=1 python scripts/merge_pairs.py
    python scripts/merge_pairs.py --seeds 0 1 --iters 2 --folder /tmp/x     # does it run

Trains `mlx-lora demo` with five seeds, merges every pair in every way, and all five by their mean.
Writes figures/merge_pairs.json and .png: accuracy on 512 held-out problems, and what a merge gains
over the mean of its two adapters. The ten pairs share five adapters, so they are not independent:
the range over pairs is given, not an interval.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.rl.evaluate import judge
from mlx_lora.runlog import commit
from mlx_lora.ship.merge import merge
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT, MAX_TOKENS = 512, 12
WAYS: dict[str, dict[str, Any]] = {
    "the mean": {},
    "the sum": {"weights": [1.0, 1.0]},
    "ties, density 0.3": {"method": "ties", "options": {"density": 0.3}},
    "orthogonal": {"method": "orthogonal"},
}


def trained(seed: int, folder: Path, iters: int) -> Path:
    """The adapter of a demo."""
    options = "-o", f"iters={iters}", "-o", f"seed={seed}"
    command = [sys.executable, "-m", "mlx_lora", "train", "demo", *options]
    subprocess.run(
        [*command, "--run-dir", str(folder), "--json"], stdout=subprocess.DEVNULL, check=True
    )
    return folder / "adapters"


def accuracy(adapter: Path | None) -> float:
    """Share of the held-out problems solved, greedy."""
    loaded = models.load("demo", quantize=models.DEMO_QUANTIZATION)
    if adapter:
        files.load(loaded.model, adapter)
    problems = load_task("countdown").load("test", HELD_OUT, 0)
    groups = judge(loaded, load_task("countdown"), problems, MAX_TOKENS, 0.0, 0)
    return float(np.mean([g.rewards[0].reason == CORRECT for g in groups]))


def measured(adapters: dict[int, Path], place: Path) -> dict[str, Any]:
    """Accuracy of the base, of each adapter, of every merge of two and of all."""
    alone = {seed: accuracy(adapter) for seed, adapter in adapters.items()}
    rows = []
    for way, options in WAYS.items():
        for a, b in itertools.combinations(adapters, 2):
            out = place / f"{way}-{a}-{b}".replace(" ", "_")
            found = merge([adapters[a], adapters[b]], out, **options)
            row = {"way": way, "seeds": [a, b], "accuracy": accuracy(out)}
            row["gain"] = row["accuracy"] - (alone[a] + alone[b]) / 2
            pair = {k: v for k, v in found.pairs[0].items() if k not in ("a", "b", "layers")}
            rows.append(row | pair)
            print(
                f"{way}, {a} and {b}: {row['accuracy']:.1%}, {100 * row['gain']:+.1f}", flush=True
            )
    merge(list(adapters.values()), place / "all")
    return {"base": accuracy(None), "alone": alone, "all": accuracy(place / "all"), "pairs": rows}


def draw(report: dict[str, Any], path: Path) -> None:
    """What each merge gains over the mean of its two, a dot a pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="grey", ls="--", lw=1)
    for y, way in enumerate(reversed(WAYS)):
        gains = np.array([100 * r["gain"] for r in report["pairs"] if r["way"] == way])
        axes.plot(gains, [y] * len(gains), "o", color="steelblue", alpha=0.5)
        axes.plot([gains.mean()], [y], "D", color="navy")
        axes.annotate(f"{gains.mean():+.1f}", (gains.mean(), y + 0.2), ha="center", fontsize=9)
    axes.set_yticks(range(len(WAYS)), reversed(WAYS))
    axes.set_ylim(-0.5, len(WAYS) - 0.3)
    axes.set_xlabel("points of held-out accuracy above the mean of the two   ◆ mean, ● pairs")
    axes.set_title("Two demos of other seeds, merged", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--iters", type=int, default=64, help="of each demo")
    parser.add_argument("--folder", type=Path, default=ROOT / "figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        adapters = {s: trained(s, folder / f"run{s}", given.iters) for s in given.seeds}
        found = measured(adapters, folder)
    report = {"script": "scripts/merge_pairs.py", "commit": commit(), "held_out": HELD_OUT, **found}
    given.folder.mkdir(parents=True, exist_ok=True)
    out = given.folder / "merge_pairs.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
