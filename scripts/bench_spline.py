"""What a spline costs beside plain LoRA: tokens a second in training and in decoding.

    OPENBLAS_NUM_THREADS=1 python scripts/bench_spline.py
    python scripts/bench_spline.py --tiny --folder /tmp/x      # does it run

Both adapters lie on one model in one process and take turns, so that a drifting machine hits both
alike; the ratio is the median over rounds of ratios of neighbours. The models: the embedded one, of
width 128, and a random one of width 1024, as far as memory lets a quick benchmark go towards what
people train. B and the curves are random, as after training: straight curves would be quicker.
Writes figures/bench_spline.json and .png. MLX_LORA_CPU picks the CPU path and is recorded. Run it
on an otherwise idle machine.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lora import cpu, models  # isort: skip  before mlx, so that OpenBLAS can come first
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.spline_math import Curve
from mlx_lora.generate import generate
from mlx_lora.runlog import commit
from mlx_lora.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"training": 0.5, "decoding": 0.85}
WIDTH, TOKENS = 24, 16  # tokens of a row that trains, and of a completion
Sizes = dict[str, tuple[tuple[int, int], ...]]
NARROW: Sizes = {  # rows at once: prompts, and completions of each
    "training": ((16, 1), (128, 1)),
    "decoding": ((1, 1), (8, 1), (8, 8), (128, 1)),
}
BROAD: Sizes = {"training": ((16, 1),), "decoding": ((1, 1), (8, 1), (8, 8))}
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
CURVES = {"lora": None, "spline": Curve(), "soft": Curve(interpolation_method="soft")}


def wide(folder: Path) -> str:
    """A model of random weights in a folder, with the embedded one's tokenizer."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    shutil.copytree(models.DEMO_FOLDER, folder, dirs_exist_ok=True)
    about = json.loads((folder / "config.json").read_text()) | WIDE
    (folder / "config.json").write_text(json.dumps(about))
    model = llama.Model(llama.ModelArgs.from_dict(about))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return str(folder)


def adapted(name: str, curve: Curve | None) -> models.Loaded:
    """The model, packed to 4 bits, with an adapter that does something."""
    loaded = models.load(name, quantize=models.DEMO_QUANTIZATION)
    attach(loaded, rank=8, scale=2.0, curve=curve)
    for number, layer in enumerate(lora_layers(loaded.model).values()):
        key = mx.random.key(number)
        layer.lora_b = 0.02 * mx.random.normal(layer.lora_b.shape, key=key)
        if curve:
            layer.spline = 0.05 * mx.random.normal(layer.spline.shape, key=key)
            layer.spline_scale = mx.array([20.0])
    loaded.model.eval()
    mx.eval(loaded.model.parameters())
    return loaded


def learning(loaded: models.Loaded, size: tuple[int, int]) -> Callable[[], int]:
    """One gradient over so many rows of one length; returns its tokens."""
    rows = size[0] * size[1]
    ids_BT = mx.random.randint(2, 200, (rows, WIDTH + 1), key=mx.random.key(0))

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(ids_BT[:, :-1]), ids_BT[:, 1:]).mean()

    def work() -> int:
        mx.eval(nn.value_and_grad(loaded.model, loss)(loaded.model))
        return rows * WIDTH

    return work


def decoding(loaded: models.Loaded, size: tuple[int, int]) -> Callable[[], int]:
    """So many completions at once; returns the tokens sampled."""
    prompts = [s.prompt for s in load_task("countdown").load("test", size[0], 0)]

    def work() -> int:
        groups = generate(loaded, prompts, purpose="bench", group=size[1], max_tokens=TOKENS)
        return sum(len(r.ids) for group in groups for r in group)

    return work


def speed(work: Callable[[], int], least: float) -> float:
    """Tokens a second, over at least so many seconds."""
    begin, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < least or not tokens:
        tokens += work()
    return tokens / spent


def measure(
    model: str, sizes: Sizes, rounds: int, least: float, curves: dict[str, Curve | None]
) -> list[dict[str, Any]]:
    sides = {name: adapted(model, curve) for name, curve in curves.items()}
    first, *_ = lora_layers(sides["lora"].model).values()  # an attention's: it has the width
    width, found = len(first.lora_a), []
    for kind, make in (("training", learning), ("decoding", decoding)):
        for size in sizes[kind]:
            works = {name: make(loaded, size) for name, loaded in sides.items()}
            for work in works.values():
                work()
            speeds = [{n: speed(w, least) for n, w in works.items()} for _ in range(rounds)]
            for name in [n for n in curves if n != "lora"]:
                ratios = [s[name] / s["lora"] for s in speeds]
                row = {"width": width, "kind": kind, "prompts": size[0], "group": size[1]}
                row |= {"curve": name, "goal": GOALS[kind]}
                row |= {"ratio": float(np.median(ratios)), "ratios": ratios}
                row |= {
                    f"{n}_tokens_per_second": float(np.median([s[n] for s in speeds]))
                    for n in ("lora", name)
                }
                found.append(row)
                print(f"{told(row)}: {row['ratio']:.2f} of LoRA", flush=True)
    return found


def told(row: dict[str, Any]) -> str:
    count = f"{row['prompts']} x {row['group']}" if row["group"] > 1 else f"{row['prompts']}"
    return f"width {row['width']}, {row['kind']}, {count} rows, {row['curve']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    parser.add_argument("--folder", type=Path, default=ROOT / "figures")
    parser.add_argument("--tiny", action="store_true", help="one short round, without `soft`")
    given = parser.parse_args()
    rounds, least = (1, 0.01) if given.tiny else (given.rounds, given.seconds)
    curves = {n: c for n, c in CURVES.items() if n != "soft" or not given.tiny}
    with tempfile.TemporaryDirectory() as place:
        rows = measure("demo", NARROW, rounds, least, curves)
        if not given.tiny:
            straight = {n: c for n, c in curves.items() if n != "soft"}
            rows += measure(wide(Path(place)), BROAD, rounds, least, straight)
    report = {
        "script": "scripts/bench_spline.py",
        "commit": commit(),
        "blas": cpu.mode(),
        "rounds": rounds,
        "rows": rows,
        "met": all(r["ratio"] >= r["goal"] for r in rows if r["curve"] == "spline"),
    }
    given.folder.mkdir(parents=True, exist_ok=True)
    out = given.folder / "bench_spline.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, out.with_suffix(".png"))


def draw(report: dict[str, Any], path: Path) -> None:
    """The ratios with their goals, every round a dot."""
    from matplotlib.figure import Figure

    rows = report["rows"][::-1]
    figure = Figure(figsize=(8, 1.3 + 0.34 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        met = row["ratio"] >= row["goal"]
        axes.barh(y, row["ratio"], color="#4682b4" if met else "#d9a066", height=0.6)
        axes.plot(row["ratios"], [y] * len(row["ratios"]), "k.", ms=3)
        axes.plot([row["goal"]] * 2, [y - 0.42, y + 0.42], color="#c2410c", lw=2)
        axes.annotate(f"{row['ratio']:.2f}", (0.01, y), va="center", color="white")
    axes.set_yticks(range(len(rows)), [told(row) for row in rows])
    axes.set_xlim(0, max(1.05, *(max(r["ratios"]) for r in rows)))
    axes.set_xlabel("tokens a second, of plain LoRA's (red: the goal)")
    axes.set_title(f"What a spline costs, CPU path {report['blas']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
