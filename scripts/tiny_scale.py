"""How much does a random start of a given size move the model? KL against size, on the demo model.

`tiny_scale` at sizes from 1e-4 to 10 (the largest singular value of each layer's update), 5 seeds
each, mean KL(base || attached) per token on the check's texts. Writes figures/tiny_scale.json
and .png.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mlx_lora import models
from mlx_lora.adapter.attach import attach, lora_layers, place, site_of, switched_off
from mlx_lora.adapter.inits import inits
from mlx_lora.adapter.scene import Scene
from mlx_lora.check.metrics import blocks, compared
from mlx_lora.check.probes import read
from mlx_lora.numerics import log_softmax
from mlx_lora.runlog import commit

OUT = Path(__file__).resolve().parents[1] / "figures/tiny_scale.json"
SIZES = [float(f"{s:.3g}") for s in np.logspace(-4, 1, 11)]
SEEDS, RANK = range(5), 8


def main() -> None:
    loaded = models.load(models.DEMO)
    model, probes = loaded.model, read(loaded)
    texts = blocks(probes, models.vocabulary_size(model))
    attach(loaded, rank=RANK, scale=2.0)
    sites = [site_of(name, layer, RANK) for name, layer in lora_layers(model).items()]
    with switched_off(model):
        base = [log_softmax(models.logits(model, b.ids_NT)) for b in texts]
    rows = []
    for size in SIZES:
        for seed in SEEDS:
            scene = Scene(model, sites, seed)
            start = inits.bind("tiny_scale", {"size": size})(scene)
            for name, factors in start.factors.items():
                place(scene.layers[name], factors, name)
            pairs = zip(texts, base, strict=True)
            now = [compared(b, p, log_softmax(models.logits(model, b.ids_NT))) for b, p in pairs]
            kl, agree, *_ = np.concatenate(now, axis=1)
            rows.append(
                {"size": size, "seed": seed, "kl": float(kl.mean()), "top1": float(agree.mean())}
            )
    small = [(r["size"], r["kl"]) for r in rows if 3e-3 <= r["size"] <= 0.4]  # below: rounding
    log_size, log_kl = np.log(np.array(small).T)
    slope, offset = np.polyfit(log_size, log_kl, 1)
    OUT.write_text(
        json.dumps(
            {
                "question": (__doc__ or "").splitlines()[0],
                "commit": commit(),
                "slope_of_log_kl": float(slope),
                "kl_at_size_1_by_the_fit": float(np.exp(offset)),
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )
    draw(rows, slope, offset)


def draw(rows: list[dict], slope: float, offset: float) -> None:
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    sizes = np.array(SIZES)
    axes.plot([r["size"] for r in rows], [r["kl"] for r in rows], "o", alpha=0.5, label="a seed")
    fit = np.exp(offset) * sizes**slope
    axes.plot(sizes, fit, color="grey", lw=1, label=f"KL grows with the {slope:.2f}th power")
    for at, name in ((1e-3, "the check passes below"), (0.1, "and fails above")):
        axes.axhline(at, color="firebrick", ls="--", lw=1)
        axes.text(SIZES[0], at * 1.2, name, color="firebrick", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("size: largest singular value of each layer's update")
    axes.set_ylabel("KL to the base, nats per token")
    axes.set_title("A random start on the demo model: rank 8, every linear layer")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
