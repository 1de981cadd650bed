"""How much the CPU fast path buys: a GRPO step of the demo on each path, in turn, as ratios.

    python scripts/bench_cpu.py --rounds 3

Each path runs in a process of its own, A B C A B C ..., so that a drifting machine hits all alike.
Writes figures/bench_cpu.json and .png. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODES = ("plain", "numpy", "openblas")
REPEATS = 5
PROMPTS, GROUP, MAX_TOKENS = 16, 8, 16


def measure() -> dict[str, Any]:
    """Median seconds of one batch of rollouts and of one gradient over all of it."""
    from mlx_lora import cpu, models  # isort: skip  before mlx, so that OpenBLAS can come first
    import mlx.core as mx
    import numpy as np

    from mlx_lora.adapter.attach import attach
    from mlx_lora.generate import generate
    from mlx_lora.rl.learner import Rule, gradients
    from mlx_lora.rl.logprobs import pack
    from mlx_lora.rl.losses import losses
    from mlx_lora.tasks import load_task

    loaded = models.load("demo")
    attach(loaded.model)
    prompts = [s.prompt for s in load_task("countdown").load("test", PROMPTS, 0)]
    rule = Rule(losses.bind("dapo", {}))

    def roll():
        return generate(loaded, prompts, purpose="bench", group=GROUP, max_tokens=MAX_TOKENS)

    rows = [r for group in roll() for r in group]
    packed = pack(rows, np.linspace(-1, 1, len(rows)))

    def learn():
        mx.eval(gradients(loaded.model, packed, rule))

    return {"mode": cpu.mode(), "rollout": median(roll), "learn": median(learn)}


def median(work) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def one(mode: str) -> dict[str, Any] | None:
    """The measurement in a process on that path; None where the machine does not have it."""
    done = subprocess.run(
        [sys.executable, __file__, "--one"],
        env=os.environ | {"MLX_LORA_CPU": mode},
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure()))
        return
    found: dict[str, list[dict[str, Any]]] = {m: [] for m in MODES}
    for _ in range(args.rounds):
        for mode in MODES:
            if (result := one(mode)) is not None:
                found[mode].append(result)
    seconds = {
        mode: {part: statistics.median(r[part] for r in rounds) for part in ("rollout", "learn")}
        for mode, rounds in found.items()
        if rounds
    }
    ratios = {
        mode: {part: seconds["plain"][part] / s for part, s in parts.items()}
        for mode, parts in seconds.items()
    }
    about = {"rounds": args.rounds, "cpus": os.cpu_count(), "rows": PROMPTS * GROUP}
    report = {**about, "seconds": seconds, "times_faster_than_plain": ratios}
    (ROOT / "figures" / "bench_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report)
    print(json.dumps(report, indent=2))


def draw(report: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for axis, part in zip(axes, ("rollout", "learn"), strict=True):
        modes = list(report["seconds"])
        values = [report["seconds"][m][part] for m in modes]
        bars = axis.barh(modes, values, color=["#b0b0b0", "#4682b4", "#ff7f50"][: len(modes)])
        ratios = [report["times_faster_than_plain"][m][part] for m in modes]
        labels = [f"{v:.2f} s · {r:.1f}×" for v, r in zip(values, ratios, strict=True)]
        axis.bar_label(bars, labels, padding=4)
        axis.set_title(f"{part}, {report['rows']} rows", loc="left")
        axis.set_xlim(0, 1.35 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    figure.savefig(ROOT / "figures" / "bench_cpu.png", dpi=120)


if __name__ == "__main__":
    main()
