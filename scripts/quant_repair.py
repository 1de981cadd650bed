"""How much of what quantization broke does a low-rank repair bring back, and at which rank?

On the embedded model at 2, 3 and 4 bits: relative output error of its layers on held-out
calibration texts, and KL(full precision || model) per token on two sets of texts: problems of the
kind that was calibrated on, and the check's stories and questions, which were not. Writes
figures/quant_repair.json and .png.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from mlx_lora import models
from mlx_lora.adapter.attach import attach
from mlx_lora.adapter.scene import task_rows
from mlx_lora.check.probes import read as read_probes
from mlx_lora.data import read
from mlx_lora.models import logits
from mlx_lora.numerics import exp, log_softmax
from mlx_lora.runlog import commit, json_safe
from mlx_lora.tasks import load_task

OUT = Path(__file__).resolve().parents[1] / "figures/quant_repair.json"
BITS, RANKS = (2, 3, 4), (2, 4, 8, 16, 32)
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD of W - Q": {"init": "quant_repair", "init_options": {"weighting": "none"}},
    "channel weights": {"init": "quant_repair", "init_options": {"weighting": "channels"}},
    "exact": {"init": "quant_repair", "init_options": {"weighting": "exact"}},
    "loftq": {"init": "loftq"},
    "pissa": {"init": "pissa"},
}


def main() -> None:
    full = models.load(models.DEMO, quantize={"bits": None})
    problems = load_task("countdown").load("test", 64, 0)
    unseen = [{"prompt": s.prompt, "completion": s.gold} for s in problems]
    texts = {
        "problems": [t.ids for t in read(full, list(enumerate(unseen)), "test problems")],
        "stories and questions": [tuple(ids) for ids, _ in read_probes(full).texts],
    }
    truth = {name: logps(full, rows) for name, rows in texts.items()}
    rows = []
    for bits in BITS:
        plain = models.load(models.DEMO, quantize={"bits": bits})
        rows.append({"bits": bits, "rank": 0, "method": "quantized"} | kls(plain, texts, truth))
        for rank in RANKS:
            for method, settings in METHODS.items():
                loaded = models.load(models.DEMO, quantize={"bits": bits})
                config = attach(
                    loaded, rank=rank, scale=1.0, rows=task_rows(load_task("countdown")), **settings
                )
                row = {"bits": bits, "rank": rank, "method": method} | kls(loaded, texts, truth)
                rows.append(row | {"measured": config["init"]["measured"]})
    found = {"question": (__doc__ or "").splitlines()[0], "commit": commit(), "rows": rows}
    OUT.write_text(json.dumps(json_safe(found), indent=2) + "\n")
    draw(rows)


def logps(loaded: models.Loaded, texts: list[tuple[int, ...]]) -> list[mx.array]:
    return [log_softmax(logits(loaded.model, mx.array([ids])))[0] for ids in texts]


def kls(loaded: models.Loaded, texts: dict, truth: dict) -> dict[str, float]:
    """Mean KL(full precision || this) per token, by set of texts."""
    found = {}
    for name, rows in texts.items():
        pairs = zip(truth[name], logps(loaded, rows), strict=True)
        kl = [np.array((exp(p) * (p - q)).sum(axis=-1)) for p, q in pairs]
        found[f"kl: {name}"] = float(np.concatenate(kl).mean())
    return found


def draw(rows: list[dict[str, Any]]) -> None:
    """KL over rank by method; a row of panels per set of texts, a column per number of bits."""
    keys = [k for k in rows[0] if k.startswith("kl: ")]
    figure = Figure(figsize=(13, 7), dpi=100, layout="constrained")
    panels = figure.subplots(len(keys), len(BITS), squeeze=False)
    for line, key in zip(panels, keys, strict=True):
        for axes, bits in zip(line, BITS, strict=True):
            mine = [r for r in rows if r["bits"] == bits]
            axes.axhline(mine[0][key], color="grey", ls="--", label="quantized")
            for method in METHODS:
                points = [(r["rank"], r[key]) for r in mine if r["method"] == method]
                axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=method)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xticks(RANKS, RANKS)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{bits} bits, {key.removeprefix('kl: ')}", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("rank")
    for line in panels:
        line[0].set_ylabel("KL to full precision, nats per token")
    panels[0][0].legend(fontsize=8)
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
