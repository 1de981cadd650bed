"""How long does a spectrum take, and how exact is it? Against gradience, and a full SVD.

Writes figures/bench_spectrum.json and .png. (a) 224 pairs of rank 64 in the shapes of a 7B model,
the whole process from start to exit, without pictures; every fourth B is near-singular. Singular
values against a float64 SVD of the product, formed. (b) σ_max of packed 4-bit 4096 x 11008 weights,
against dequantizing and a full SVD; one with outlier channels as real ones have, one without a gap.
(c) Adapters of rank 64 on the embedded model, cut by `shrink`: at the demo's learning rate and
alpha, and at less of a rate and more of a scale.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_lora import cpu  # isort: skip  before mlx, so that OpenBLAS can come first
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.runlog import environment
from mlx_lora.spectral import base

ROOT = Path(__file__).resolve().parents[1]
PEER = "gradience==0.11.0"
PARTS = ("adapter", "weights", "shrink")
WIDTH, INNER, RANK, BLOCKS = 4096, 11008, 64, 32
SHAPES = {  # in, out
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
SAMPLED = (  # a sound one, and one whose B is near-singular
    "model.layers.0.self_attn.q_proj",
    "model.layers.3.self_attn.k_proj",
)
TRAINED = {  # the demo's rate with its scale of 2 ruins the model at rank 64: 2 % are left
    "1e-3, scale 0.25": ("learning_rate=1e-3", "lora_parameters.scale=0.25"),  # alpha 16
    "3e-4, scale 2": ("learning_rate=3e-4", "lora_parameters.scale=2"),
}
SEEN = 1e-4  # of σ_max: smaller ones the dense SVD itself does not know to 1e-10


def make_adapter(folder: Path, blocks: int) -> None:
    """A PEFT adapter, which both sides read."""
    rng, tensors = np.random.default_rng(0), {}
    for block in range(blocks):
        for name, (into, out) in SHAPES.items():
            a = rng.standard_normal((RANK, into), dtype=np.float32) / 64
            b = rng.standard_normal((out, RANK), dtype=np.float32)
            b *= np.geomspace(1, 1e-2, RANK, dtype=np.float32)
            if block % 4 == 3:  # columns nearly in one plane
                turn = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0]
                b = b * np.geomspace(1, 1e-3, RANK, dtype=np.float32) @ turn.astype(np.float32)
            prefix = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = mx.array(a)
            tensors[f"{prefix}.lora_B.weight"] = mx.array(b)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    about = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": [name.partition(".")[2] for name in SHAPES],
        "base_model_name_or_path": "",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))


def peer_python(folder: Path, torch: str) -> Path:
    """The Python of an environment with the peer in it, and the torch that it needs."""
    python = folder / "bin" / "python"
    if ROOT in folder.resolve().parents:
        raise SystemExit(f"{folder} is inside this repository: give another --peer-env")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", torch, PEER], check=True)
    return python


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Wall and processor seconds of a process; its output goes to a file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with out.open("w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": used}


def adapter(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns over one adapter, and our singular values against a dense SVD."""
    blocks, runs = (4, 1) if args.quick else (BLOCKS, args.runs)
    with tempfile.TemporaryDirectory() as place:
        folder, answer = Path(place) / "adapter", Path(place) / "answer"
        folder.mkdir()
        make_adapter(folder, blocks)
        commands = {
            "ours": [sys.executable, "-m", "mlx_lora", "spectrum", str(folder), "--json"],
            "gradience": [
                *(str(peer_python(args.peer_env, args.torch)), "-m", "gradience", "audit"),
                *("--peft-dir", str(folder), "--json"),
            ],
        }
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for turn in range(runs + 1):  # the first warms the file cache
            for name, command in commands.items():
                found = timed(command, answer.with_suffix(f".{name}"))
                taken[name] += [found] if turn else []
                print(name, found, flush=True)
        document = json.loads(answer.with_suffix(".ours").read_text())
        told = re.search(r'"n_layers": (\d+)', answer.with_suffix(".gradience").read_text())
        if told is None or int(told[1]) != len(document["adapters"]):
            raise SystemExit(f"the sides do not read the same adapter: {told}")
        exact = {name: exactness(folder, document, name) for name in SAMPLED[: args.sampled]}
    seconds = {
        n: {k: float(np.median([t[k] for t in ts])) for k in ts[0]} for n, ts in taken.items()
    }
    return {
        "pairs": len(document["adapters"]),
        "rank": RANK,
        "runs": taken,
        "seconds": seconds,
        "times_faster": seconds["gradience"]["wall"] / seconds["ours"]["wall"],
        "largest_relative_error": exact,
    }


def exactness(folder: Path, document: dict[str, Any], name: str) -> float:
    """The largest relative difference of our σ from those of the product's float64 SVD."""
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    a, b = (
        np.array(tensors[f"base_model.model.{name}.lora_{f}.weight"]).astype(np.float64)
        for f in "AB"
    )
    dense = np.linalg.svd(b @ a, compute_uv=False)[:RANK]
    ours = np.array(document["adapters"][name]["singular_values"])
    seen = dense > SEEN * dense[0]
    return float(np.abs(ours[seen] / dense[seen] - 1).max())


def weights(args: argparse.Namespace) -> dict[str, Any]:
    """σ_max of packed weights by their products, and by unpacking and a full SVD."""
    rows, columns = (512, 1344) if args.quick else (WIDTH, INNER)
    found = {}
    for kind in ("outlier_channels", "gaussian"):
        rng = np.random.default_rng(1)
        weight = rng.standard_normal((rows, columns), dtype=np.float32) * 0.02
        if kind == "outlier_channels":
            weight[:, rng.choice(columns, 16, replace=False)] *= 20
        layer = nn.QuantizedLinear(columns, rows, bias=False, group_size=64, bits=4)
        layer.weight, layer.scales, layer.biases = mx.quantize(mx.array(weight), 64, 4)
        mx.eval(layer.parameters())
        times, top = [], 0.0
        for _ in range(args.runs):
            start = time.perf_counter()
            top = base.sigma_max(base.matrix(layer, small=0))
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        plain = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4))
        full = float(np.linalg.svd(plain, compute_uv=False)[0])
        dense = time.perf_counter() - start
        exact = np.sqrt(
            np.linalg.eigvalsh(plain.astype(np.float64) @ plain.T.astype(np.float64))[-1]
        )
        found[kind] = {
            "shape": [rows, columns],
            "seconds": float(np.median(times)),
            "seconds_all": times,
            "seconds_dequantize_and_svd_float32": dense,
            "times_faster": dense / float(np.median(times)),
            "relative_error": abs(top / float(exact) - 1),
            "relative_error_of_float32_svd": abs(full / float(exact) - 1),
        }
        print(kind, found[kind], flush=True)
    return found


def shrunk(args: argparse.Namespace) -> dict[str, Any]:
    """Adapters of rank 64 trained on the embedded model, cut within a budget of KL."""
    found: dict[str, Any] = {}
    problems = "32" if args.quick else "512"
    with tempfile.TemporaryDirectory() as place:
        for number, (name, how) in enumerate(TRAINED.items()):
            run, small = Path(place) / f"run_{number}", Path(place) / f"small_{number}"
            options = [*how, "lora_parameters.rank=64", f"eval.n={problems}"]
            options += ["iters=4"] if args.quick else []
            given = [word for option in options for word in ("-o", option)]
            ask("train", "demo", *given, "--run-dir", str(run))
            cut = ask("shrink", str(run), "--out", str(small))
            about = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
            found[name] = {k: cut[k] for k in (*about, "rank_before", "rank_after", "kl_mean")}
            found[name]["size"] = cut["bytes_after"] / cut["bytes_before"]
            found[name]["verdict"] = cut["check"]["verdict"]
            for when, folder in (("before", run / "adapters"), ("after", small)):
                exam = ("eval", "demo", "--task", "countdown", "-n", problems)
                answer = ask(*exam, "--adapter", str(folder))
                keys = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled")
                found[name][f"accuracy_{when}"] = {k: answer[k] for k in keys}
            print(name, found[name], flush=True)
    return found


def ask(*words: str) -> dict[str, Any]:
    """What a command prints with --json."""
    command = [sys.executable, "-m", "mlx_lora", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout)


def draw(found: dict[str, Any], path: Path) -> None:
    """Seconds on a log axis: one panel a part."""
    from matplotlib.figure import Figure

    bars: list[list[tuple[str, float, str]]] = []
    titles = []
    if "adapter" in found:
        part = found["adapter"]
        titles.append(
            f"Spectra of {part['pairs']} pairs, rank {part['rank']}, whole process: "
            f"{part['times_faster']:.1f} times faster"
        )
        seconds = part["seconds"]
        bars.append(
            [
                ("gradience 0.11.0", seconds["gradience"]["wall"], "#9a9a9a"),
                ("mlx-lora spectrum", seconds["ours"]["wall"], "#2171b5"),
            ]
        )
    for kind, part in found.get("weights", {}).items():
        rows, columns = part["shape"]
        titles.append(
            f"σ_max of a packed {rows} × {columns} weight, {kind.replace('_', ' ')}: "
            f"{part['times_faster']:.0f} times faster, error {part['relative_error']:.0e}"
        )
        dense = ("dequantize and full SVD", part["seconds_dequantize_and_svd_float32"], "#9a9a9a")
        bars.append([dense, ("Lanczos on packed rows", part["seconds"], "#2171b5")])
    for rate, part in found.get("shrink", {}).items():
        accuracy = [part[f"accuracy_{when}"]["accuracy"] for when in ("before", "after")]
        titles.append(
            f"shrink, trained at {rate}: rank {part['rank_before']} to {part['rank_after']}, "
            f"KL {part['kl_mean']:.1e}, accuracy {accuracy[0]:.1%} and {accuracy[1]:.1%}"
        )
        sizes = [part[f"bytes_{when}"] / 1e6 for when in ("before", "after")]
        bars.append([("as trained", sizes[0], "#9a9a9a"), ("shrunk", sizes[1], "#2171b5")])
    units = ["s"] * (len(bars) - len(found.get("shrink", {}))) + ["MB"] * len(
        found.get("shrink", {})
    )
    figure = Figure(figsize=(9, 0.4 + 1.35 * len(bars)), dpi=110, layout="constrained")
    axes = figure.subplots(len(bars), 1, squeeze=False)[:, 0]
    for axis, title, rows, unit in zip(axes, titles, bars, units, strict=True):
        names, values, colours = zip(*rows, strict=True)
        drawn = axis.barh(names, values, color=colours, height=0.62)
        axis.bar_label(drawn, [f"{value:.3g} {unit}" for value in values], padding=4)
        axis.set_title(title, loc="left", fontsize=10, weight="bold")
        axis.set_xlim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=False, bottom=False)
    figure.savefig(path)


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sampled", type=int, default=2, help="modules with a dense SVD: minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "figures/bench_spectrum.json")
    parser.add_argument("--quick", action="store_true", help="small shapes: to try the script")
    default = Path(tempfile.gettempdir()) / "mlx_lora_peer_spectrum"
    parser.add_argument("--peer-env", type=Path, default=default, help="made once, then kept")
    parser.add_argument("--torch", default="torch", help="as pip knows it; one for the CPU will do")
    args = parser.parse_args()
    if args.quick and args.out.resolve().parent == ROOT / "figures":
        parser.error("--quick measures nothing worth keeping: give another --out")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found |= {"question": (__doc__ or "").splitlines()[0], "peer": PEER}
    for part in args.parts:
        load = os.getloadavg()[0]
        found[part] = {"adapter": adapter, "weights": weights, "shrink": shrunk}[part](args)
        about = {"commit": commit(), "load": load, "cores": os.cpu_count()}
        about["threads"] = os.environ.get("OPENBLAS_NUM_THREADS")
        found.setdefault("of_part", {})[part] = about
        found["environment"] = environment(blas=cpu.mode())
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
