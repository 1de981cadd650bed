"""Is advice on ranks right? Planted ranks, and on the demo: against what trained adapters use.

Planted: two noisy matrices with 2, 5 or 10 directions in common, 20 seeds each. The demo: advice
from 128 and from 512 texts, its rank correlation with the effective rank of an adapter trained at
rank 32, and the accuracy of runs at uniform ranks and at the ranks advised. A run whose folder is
there is not repeated. Writes figures/bench_advise.json and .png.

    OPENBLAS_NUM_THREADS=1 python scripts/bench_advise.py --work runs/bench_advise    # 12 minutes
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import config, experiment
from mlx_lora.advise import advise
from mlx_lora.progress import console
from mlx_lora.runlog import commit
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.spectral.sketch import OVERSAMPLE, agreements

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "figures/bench_advise.json"
SEEDS = (0, 1)
ALPHA = 16.0
SHAPE, NOISES, PLANTED = (160, 96), (0.3, 0.45, 0.6), (2, 5, 10)
ADVICE = {"128 texts": (16, 16), "512 texts": (64, 32)}  # batches, directions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench_advise")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    advised = {
        name: advice(work / f"{batches}.json", batches, directions)
        for name, (batches, directions) in ADVICE.items()
    }
    settings = {f"rank {r}": {"rank": r, "scale": ALPHA / r} for r in (1, 2, 8, 32)}
    for name, document in advised.items():
        for grain in ("kind", "module"):
            block = document["blocks"][grain]
            settings[f"{name}, by {grain}"] = {
                k: block[k] for k in ("rank", "scale", "rank_pattern")
            }
    runs = [ensure(work, name, lora, seed) for seed in SEEDS for name, lora in settings.items()]
    used = LoRAAnalyzer(work / "rank_32_0").analyze().adapters
    found = {
        "commit": commit(),
        "planted": planted(),
        "advice": {name: against(document, used) for name, document in advised.items()},
        "runs": runs,
    }
    OUT.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    draw(found)


def planted() -> list[dict[str, Any]]:
    """How often the rank is found to within one, and is known to be all."""
    rows = []
    for noise in NOISES:
        for rank in PLANTED:
            seen = [agreement(seed, rank, noise) for seed in range(20)]
            right = [abs(a.agreeing - rank) <= 1 for a in seen]
            told = [a.open is None for a in seen]
            rows.append({"rank": rank, "noise": noise, "within_one": sum(right), "told": sum(told)})
    return rows


def agreement(seed: int, rank: int, noise: float) -> Any:
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in SHAPE)
    both = [u @ v.T + noise * rng.standard_normal(SHAPE) / SHAPE[0] ** 0.5 for _ in range(2)]
    return agreements(
        lambda half, x: {"w": both[half] @ x["w"]},
        lambda half, x: {"w": both[half].T @ x["w"]},
        {"w": rng.standard_normal((SHAPE[1], 16 + OVERSAMPLE))},
        16,
    )["w"]


def advice(kept: Path, batches: int, directions: int) -> dict[str, Any]:
    if not kept.exists():
        found = advise("demo", batches=batches, directions=directions)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def ensure(work: Path, name: str, lora: dict[str, Any], seed: int) -> dict[str, Any]:
    """The demo's experiment at these ranks: accuracy before and after, and what it paid."""
    folder = work / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    if not (folder / "summary.json").exists():
        e = config.load(config.find("demo"), [f"seed={seed}"])
        parameters = type(e.lora_parameters).model_validate(lora)
        e = e.model_copy(update={"lora_parameters": parameters})
        experiment.run(e, folder, console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    keys = ("accuracy_after", "accuracy_after_low", "accuracy_after_high", "accuracy_after_sampled")
    pairs = LoRAAnalyzer(folder).read()
    paid = sum(p.a_IR.size + p.b_RO.size for p in pairs)
    return {"setting": name, "seed": seed, "parameters": paid} | {k: summary[k] for k in keys}


def against(document: dict[str, Any], used: Any) -> dict[str, Any]:
    """Prediction and effective rank by module, and how alike their orders are."""
    modules = document["modules"]
    pairs = {n: (m["predicted_rank"], used[n].effective_rank_BA) for n, m in modules.items()}
    predicted, effective = (ordered(np.array(x)) for x in zip(*pairs.values(), strict=True))
    return {
        "spearman": float(np.corrcoef(predicted, effective)[0, 1]),
        "cannot_tell": sum(m["cannot_tell"] for m in modules.values()),
        "mean": {g: about["predicted_rank_mean"] for g, about in document["groups"].items()},
        "modules": {n: {"predicted_rank": p, "effective_rank": e} for n, (p, e) in pairs.items()},
    }


def ordered(values: np.ndarray) -> np.ndarray:
    """Their ranks, ties sharing the mean."""
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), width_ratios=(1, 1.15))
    for name, about in found["advice"].items():
        points = [(m["predicted_rank"], m["effective_rank"]) for m in about["modules"].values()]
        label = f"{name}: rank correlation {about['spearman']:.2f}"
        left.scatter(*zip(*points, strict=True), s=22, alpha=0.8, label=label)
    left.set(xlabel="directions the gradient shows before training")
    left.set(ylabel="effective rank of BA after training at rank 32", xlim=(-1, 33), ylim=(0, 32))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.set_title("Each module of the demo", loc="left", fontsize=10)
    settings = list(dict.fromkeys(run["setting"] for run in found["runs"]))
    for run in found["runs"]:
        y = len(settings) - settings.index(run["setting"]) + (run["seed"] - 0.5) * 0.22
        low, high = (100 * run[f"accuracy_after_{end}"] for end in ("low", "high"))
        right.plot([low, high], [y, y], color="#0072b2", lw=1.2, alpha=0.7)
        right.plot(100 * run["accuracy_after"], y, "o", color="#0072b2", ms=5)
    paid = {run["setting"]: run["parameters"] for run in found["runs"]}
    labels = [f"{name}\n{paid[name]:,} parameters" for name in settings]
    right.set_yticks(range(len(settings), 0, -1), labels, fontsize=8)
    right.set(xlabel="accuracy on 512 held-out problems, % (95 % interval), two seeds")
    right.set_title("The demo, trained at these ranks", loc="left", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eeeeee")
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(OUT.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
