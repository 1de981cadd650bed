"""What does a population cost, against plain decoding of the base and against member by member?

    python scripts/bench_es.py                          # needs an idle machine, a minute or two
    python scripts/bench_es.py --pairs 2 --out /tmp/b.json

32 members with 4 problems each are 128 rows, which write 48 tokens each: once by the base without
any adapter, once by the population in one batch (rank 8, B perturbed on every linear layer), and
member by member, 4 rows at a time, each member's adapter read from its file first as trainers do
that have no population form. Sides take turns, on each CPU path in a process of its own. The ratio
counts the time from the prompts to the last token. Writes figures/bench_es.json and .png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("openblas", "numpy")
MEMBERS, PROBLEMS, RANK, SCALE, PERTURB, TOKENS = 32, 4, 8, 2.0, 0.03, 48
SIDES = ("base", "population", "member_by_member")
TARGET = 0.90


def measure(pairs: int) -> dict[str, Any]:
    """Seconds of each side, in turn, on the path that this process has."""
    from mlx_lora import cpu, models  # isort: skip  before mlx, so that OpenBLAS can come first
    import mlx.core as mx

    from mlx_lora.adapter import files
    from mlx_lora.adapter.attach import attach, lora_layers
    from mlx_lora.adapter.population import Noise, perturbed, population, sigma_of
    from mlx_lora.caches import nobody
    from mlx_lora.decode import Row, decode
    from mlx_lora.models import encode_prompt
    from mlx_lora.runlog import Clock
    from mlx_lora.sampling import drawer_of
    from mlx_lora.tasks import load_task

    base, adapted = models.load("demo"), models.load("demo")
    config = attach(adapted.model, rank=RANK, scale=SCALE)
    layers = lora_layers(adapted.model)
    sigmas = {name: sigma_of(m, "lora_b", PERTURB) for name, m in layers.items()}
    noise = Noise(0, 0)
    asked = load_task("countdown").load("train", PROBLEMS, 0)
    ids = [encode_prompt(base.tokenizer, sample.prompt) for sample in asked]
    every = [ids[p] for _ in range(MEMBERS) for p in range(PROBLEMS)]
    member_of = [g for g in range(MEMBERS) for _ in range(PROBLEMS)]

    def written(loaded: models.Loaded, prompts: list[tuple[int, ...]], sit: Any = nobody) -> None:
        rows = [Row(p, str(p)) for p in range(len(prompts))]
        with cpu.decoding(loaded.model):
            decode(
                loaded.model,
                prompts,
                rows,
                width=len(rows),
                max_tokens=TOKENS,
                drawer=drawer_of(0.0),
                closes=lambda ids: False,
                ended=lambda row: None,
                sit=sit,
                clock=Clock(),
            )

    def in_one_batch() -> None:
        with population(adapted.model, noise, sigmas, range(MEMBERS), member_of) as sit:
            written(adapted, every, sit)

    def save_members(folder: Path) -> None:
        directions, signs = noise.of(range(MEMBERS))
        masters = {name: layer.lora_b for name, layer in layers.items()}
        for member in range(MEMBERS):
            for name, layer in layers.items():
                drawn = noise.drawn(name, [directions[member]], masters[name].shape)
                size = mx.array([float(sigmas[name] * signs[member])])
                layer.lora_b = perturbed(masters[name], drawn, size)[0]
            files.save(adapted.model, config, folder / str(member))
        for name, layer in layers.items():
            layer.lora_b = masters[name]

    def one_by_one(folder: Path) -> None:
        for member in range(MEMBERS):
            files.put(adapted.model, *files.read(folder / str(member)))
            written(adapted, ids)

    with tempfile.TemporaryDirectory() as folder:
        save_members(Path(folder))
        work = {
            "base": lambda: written(base, every),
            "population": in_one_batch,
            "member_by_member": lambda: one_by_one(Path(folder)),
        }
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(pairs + 1):  # the first warms up
            for side in SIDES:
                if side == "member_by_member" and turn not in (1, 2):
                    continue  # it is many times slower, and nobody asks for its third digit
                begin = time.perf_counter()
                work[side]()
                if turn:
                    seconds[side].append(time.perf_counter() - begin)
    return {"path": cpu.mode(), "seconds": seconds}


def summed_up(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the ratios that the question asks for."""
    tokens = MEMBERS * PROBLEMS * TOKENS
    medians = {side: statistics.median(s) for side, s in found["seconds"].items()}
    pairs = zip(found["seconds"]["base"], found["seconds"]["population"], strict=True)
    return {
        **found,
        "tokens_per_second": {side: tokens / s for side, s in medians.items()},
        "population_decode_ratio": statistics.median(b / p for b, p in pairs),
        "population_over_member_by_member": medians["member_by_member"] / medians["population"],
    }


def one(path: str, pairs: int) -> dict[str, Any] | None:
    """The measurement in a process on that path; None where the machine does not have it."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", "--pairs", str(pairs)],
        env=os.environ | {"MLX_LORA_CPU": path},
        capture_output=True,
        text=True,
    )
    if done.returncode and path == "openblas":
        print("no system OpenBLAS here", file=sys.stderr)
        return None
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return summed_up(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=ROOT / "figures/bench_es.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.pairs)))
        return
    from mlx_lora.runlog import environment

    found = {path: result for path in PATHS if (result := one(path, args.pairs)) is not None}
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "members": MEMBERS,
        "rows": MEMBERS * PROBLEMS,
        "rank": RANK,
        "tokens_a_row": TOKENS,
        "target": TARGET,
        "population_decode_ratio": min(r["population_decode_ratio"] for r in found.values()),
        "paths": found,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "environment": environment(),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out.with_suffix(".png"))
    for path, result in found.items():
        print(path, {k: v for k, v in result.items() if k not in ("path", "seconds")})


def draw(report: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "base": "base, no adapter",
        "population": f"{report['members']} members, one batch",
        "member_by_member": "member by member, from files",
    }
    paths = report["paths"]
    figure, axes = plt.subplots(1, len(paths), figsize=(4.6 * len(paths), 2.3), squeeze=False)
    for axis, (path, found) in zip(axes[0], paths.items(), strict=True):
        speeds = [found["tokens_per_second"][side] for side in names]
        bars = axis.barh(list(names.values()), speeds, color=["#b0b0b0", "#ff7f50", "#4682b4"])
        shares = [speed / speeds[0] for speed in speeds]
        labels = [f"{v:,.0f} · {share:.2f}" for v, share in zip(speeds, shares, strict=True)]
        axis.bar_label(bars, labels, padding=4)
        axis.set_title(f"{path}: tokens per second, and of the base's", loc="left", fontsize=10)
        axis.set_xlim(0, 1.4 * max(speeds))
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
