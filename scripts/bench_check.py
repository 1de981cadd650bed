"""What does `mlx-lora check demo` cost, whole process, and what is the least it could?

The floor is what nobody can leave out: importing mlx-lm, loading the model, one forward of the
texts by the base and one by the adapted model, and both sides' samples, by plain calls of the same
model functions. Taken in turns, medians. Writes figures/bench_check.json and .png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mlx_lora import cpu
from mlx_lora.runlog import environment

OUT = Path(__file__).resolve().parents[1] / "figures/bench_check.json"
FLOOR = """
import time
begin = time.perf_counter()
import mlx_lora
import mlx_lm
imported = time.perf_counter()
import mlx.core as mx
from mlx_lora import models
from mlx_lora.adapter.attach import attach
from mlx_lora.check.probes import ROOM, read
from mlx_lora.check.reading import blocks_of
from mlx_lora.generate import generate
loaded = models.load("demo")
probes = read(loaded)
ready = time.perf_counter()
for side in range(2):
    if side:
        attach(loaded)
    for block in blocks_of(probes, 1024):
        mx.eval(models.logits(loaded.model, block.ids_NT))
    generate(loaded, probes.prompts, purpose="bench", max_tokens=ROOM)
done = time.perf_counter()
print(imported - begin, ready - imported, done - ready)
"""
PATHS = ("openblas", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    paths = PATHS if cpu.mode() == "openblas" else PATHS[1:]
    check = [sys.executable, "-m", "mlx_lora", "check", "demo", "--json"]
    found: dict[str, dict[str, list[float]]] = {p: {"check": [], "floor": []} for p in paths}
    parts: dict[str, list[list[float]]] = {p: [] for p in paths}
    inside: dict[str, list[float]] = {p: [] for p in paths}
    for _ in range(repeats):
        for path in paths:
            seconds, text = timed(check, path)
            found[path]["check"].append(seconds)
            inside[path].append(json.loads(text)["seconds"])
            seconds, text = timed([sys.executable, "-c", FLOOR], path)
            found[path]["floor"].append(seconds)
            parts[path].append([float(x) for x in text.split()])
    rows = {}
    for path in paths:
        check_s, floor_s = (statistics.median(found[path][k]) for k in ("check", "floor"))
        imports, loading, work = (statistics.median(p) for p in zip(*parts[path], strict=True))
        rows[path] = {
            "check_seconds": check_s,
            "floor_seconds": floor_s,
            "ratio": check_s / floor_s,
            "seconds_inside_the_check": statistics.median(inside[path]),
            "floor_import": imports,
            "floor_load": loading,
            "floor_forwards_and_samples": work,
            "floor_start_and_exit": floor_s - imports - loading - work,
        }
        print(
            f"{path:9} check {check_s:.2f} s, floor {floor_s:.2f} s, {check_s / floor_s:.2f} times"
        )
        print(f"{'':9} of the floor: import {imports:.2f}, load {loading:.2f}, rest {work:.2f}")
    about = {"question": (__doc__ or "").splitlines()[0], "repeats": repeats}
    about["environment"] = environment(blas=cpu.mode())
    OUT.write_text(json.dumps(about | {"paths": rows}, indent=2) + "\n")
    draw(rows)


def timed(command: list[str], path: str) -> tuple[float, str]:
    begin = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"MLX_LORA_CPU": path}, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begin, done.stdout


def draw(rows: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 1.1 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = [f"{side}, {path}" for path in rows for side in ("floor", "check")]
    for y, (path, side) in enumerate((p, s) for p in rows for s in ("floor", "check")):
        row = rows[path]
        if side == "check":
            axes.barh(y, row["check_seconds"], color="steelblue")
            axes.text(row["check_seconds"], y, f"  {row['check_seconds']:.2f} s", va="center")
            continue
        left = 0.0
        for key, colour in (
            ("floor_import", "lightgrey"),
            ("floor_load", "darkgrey"),
            ("floor_forwards_and_samples", "dimgrey"),
            ("floor_start_and_exit", "whitesmoke"),
        ):
            label = key.removeprefix("floor_").replace("_", " ") if y == 0 else None
            axes.barh(y, row[key], left=left, color=colour, label=label)
            left += row[key]
        axes.text(row["floor_seconds"], y, f"  {row['floor_seconds']:.2f} s", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(2, color="firebrick", ls="--", lw=1)
    axes.set_xlabel("seconds, whole process (median)")
    axes.set_title("mlx-lora check demo, and the least it could cost")
    axes.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
