"""How fast is SFT, and in how much memory, against `mlx_lm.lora` on the same model and data?

    python scripts/bench_sft.py            # needs an otherwise idle machine, about 5 minutes
    python scripts/bench_sft.py --quick --out /tmp/b.json

Each side is a process that takes steps when it is asked to and sleeps in between, so that both take
turns: a round is a block of the same steps on each. Both run whole, from one experiment file, on
the embedded model as it comes, over stories of its own kind. Compared are a step's median seconds;
the batches are the same, so tokens per second have the same ratio. Writes figures/bench_sft.json
and .png.

`equal_blas`: both on a system OpenBLAS, at 4 bits and in float32, the lower of the two counts.
`installed`: what pip alone gives. `plain`: our CPU fast path off, for the memory. Peak memory is
what MLX counts, by step; NumPy's on our installed path is only in the resident size of the process.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora import cpu
from mlx_lora.runlog import atomically, commit, environment

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("sft_worker.py")
BATCH, LONGEST, ROWS = 4, 256, 64
STORIES = (2, 9)  # in a row, from and up to
BLOCK, WARMUPS = 3, 2
CASES = {  # bits, our CPU path
    "installed_4bit": (4, "numpy"),
    "equal_blas_4bit": (4, "openblas"),
    "equal_blas_float32": (32, "openblas"),
    "plain_4bit": (4, "plain"),
    "plain_float32": (32, "plain"),
}
SIDES = ("ours", "theirs")


class Side:
    """One process of a comparison."""

    def __init__(self, name: str, folder: Path, path: str, options: Mapping[str, Any]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        # no run-time C++ compilation on either side: it costs seconds a kernel
        surroundings = os.environ | {"MLX_LORA_CPU": path, "MLX_DISABLE_COMPILE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), name, str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=surroundings,
        )
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def take(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"steps": steps}), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def save_setting(folder: Path) -> dict[str, Any]:
    """The embedded model at 4 bits and in float32, and rows of stories. Returns what they are."""
    import mlx.core as mx
    from demo_corpus import story

    from mlx_lora import models

    packed = models.load("demo")
    models.save_base(packed, folder / "bits4")
    whole = models.load("demo", quantize={"bits": None})
    whole.model.set_dtype(mx.float32)
    models.save_base(whole, folder / "bits32")
    rng = random.Random(0)
    rows = [" ".join(story(rng) for _ in range(rng.randint(*STORIES))) for _ in range(ROWS)]
    (folder / "data").mkdir()
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(text)
    tokens = [min(len(packed.tokenizer.encode(row)) + 1, LONGEST) for row in rows]
    return {"rows": ROWS, "tokens_of_a_row": {"mean": sum(tokens) / ROWS, "max": max(tokens)}}


def compare(folder: Path, case: str, rounds: int) -> dict[str, Any]:
    """Both sides in turns. SystemExit where they do not do the same work."""
    bits, path = CASES[case]
    options = {"bits": bits, "batch": BATCH, "longest": LONGEST}
    sides = [Side(name, folder, path, options) for name in SIDES]
    try:
        for key in ("trainable", "prompts"):
            if sides[0].about[key] != sides[1].about[key]:
                raise SystemExit(f"{case}: the sides do not do the same work, {key}")
        slow = path == "plain"  # seconds a step, and only its memory is asked for
        block, rounds = (1, min(rounds, 3)) if slow else (BLOCK, rounds)
        for side in sides:
            side.take(1 if slow else WARMUPS)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for number in range(rounds):
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                found[side.name].append(side.take(block))
    finally:
        for side in sides:
            side.end()
    about = {side.name: {k: side.about[k] for k in ("blas", "threads")} for side in sides}
    return judged(found) | {"bits": bits, "path": path, "about": about}


def judged(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians by side, and the ratios of seconds and of memory."""
    seconds = {
        name: [s for block in blocks for s in block["seconds"]] for name, blocks in found.items()
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    blocks = [
        sum(theirs["seconds"]) / sum(ours["seconds"])
        for ours, theirs in zip(found["ours"], found["theirs"], strict=True)
    ]
    memory = {name: max(block["memory"] for block in blocks) for name, blocks in found.items()}
    return {
        "seconds_of_a_step": medians,
        "ratio": medians["theirs"] / medians["ours"],
        "ratio_of_rounds": {"min": min(blocks), "max": max(blocks)},
        "peak_memory_mb": {name: value / 1e6 for name, value in memory.items()},
        "resident_mb": {name: b[-1].get("resident_kb", 0) / 1e3 for name, b in found.items()},
        "memory_ratio": memory["ours"] / memory["theirs"],
    }


def numbers(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that the bench is for; those whose cases were not run are missing."""
    blas = [c["ratio"] for name, c in cases.items() if name.startswith("equal_blas")]
    plain = [c["memory_ratio"] for name, c in cases.items() if name.startswith("plain")]
    found = {"sft_ratio_equal_blas": min(blas, default=None)}
    found["sft_ratio_installed"] = cases.get("installed_4bit", {}).get("ratio")
    found["sft_memory_ratio_plain"] = max(plain, default=None)
    return {key: value for key, value in found.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench_sft.json")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        setting = save_setting(folder)
        for case in args.cases:
            if CASES[case][1] == "openblas" and not cpu.load_openblas():
                print(f"{case}: no system OpenBLAS", file=sys.stderr)
                continue
            cases[case] = compare(folder, case, rounds)
            print(f"{case}: {cases[case]['ratio']:.2f}", file=sys.stderr)
    report = {
        **numbers(cases),
        "cases": cases,
        "setting": setting | {"batch_size": BATCH, "max_seq_length": LONGEST, "model": "demo"},
        "rounds": rounds,
        "steps_of_a_round": BLOCK,
        "environment": environment(),
        "commit": commit(),
    }
    with atomically(args.out) as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, args.out.with_suffix(".png"))
    print(json.dumps(numbers(cases), indent=2))


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Seconds of a step and memory, side by side, a pair of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 1.7 + 0.75 * len(cases)), layout="constrained")
    parts = (
        ("seconds_of_a_step", "seconds of a step, median", "ratio", "{:.2f} s", "{:.1f}× as fast"),
        ("peak_memory_mb", "peak memory, MB", "memory_ratio", "{:.0f} MB", "{:.0%} of theirs"),
    )
    for axis, (key, title, ratio, form, words) in zip(axes, parts, strict=True):
        for side, colour, shift in (("ours", "#4682b4", -0.2), ("theirs", "#b0b0b0", 0.2)):
            places = [n + shift for n in range(len(cases))]
            values = [case[key][side] for case in cases.values()]
            bars = axis.barh(places, values, height=0.38, color=colour, label=side)
            labels = [form.format(v) for v in values]
            if side == "ours":
                said = [words.format(case[ratio]) for case in cases.values()]
                labels = [f"{a} · {b}" for a, b in zip(labels, said, strict=True)]
            axis.bar_label(bars, labels, padding=4, fontsize=8)
        highest = max(max(case[key].values()) for case in cases.values())
        axis.set_xlim(0, 1.55 * highest)
        axis.set_yticks(range(len(cases)), [name.replace("_", " ") for name in cases])
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    figure.suptitle(headline(report), x=0.01, ha="left", fontsize=12, weight="bold")
    axes[0].legend(("mlx-lora train", "mlx_lm.lora"), frameon=False, fontsize=8, loc="lower right")
    with atomically(path) as part:
        figure.savefig(part, dpi=120, format="png")


def headline(report: Mapping[str, Any]) -> str:
    """The result in a sentence, of the cases that were run."""
    words = {
        "sft_ratio_installed": "{:.1f} times as fast as mlx_lm.lora as pip installs both",
        "sft_ratio_equal_blas": "{:.1f} times on one BLAS",
        "sft_memory_ratio_plain": "{:.0%} of its memory with the fast path off",
    }
    said = [text.format(report[key]) for key, text in words.items() if key in report]
    return "A step of SFT: " + ",\n".join(said)


if __name__ == "__main__":
    main()
