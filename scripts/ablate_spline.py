"""Does a spline adapter learn more than plain LoRA? Every fix in turn, at tuned rates, on 5 seeds.

V0 is the layer as first written down, each of V1 to V7 mends one thing more, and the last two are
what the package attaches. Plain LoRA and those that are judged against it (V7 and later) get the
best learning rate of one grid, tried on a seed of its own; V0 to V6 have a tenth of LoRA's, which
is what V7 mends, and V0 and V3 are tried at all of it too. Every run is kept in
figures/spline_ablation_runs.jsonl as soon as it ends, and one that is there is not repeated: the
script can be stopped and started again.

    OPENBLAS_NUM_THREADS=1 python scripts/ablate_spline.py                # all of it, hours
    python scripts/ablate_spline.py --method sft --only lora,calibrated   # a share of it
    python scripts/ablate_spline.py --report                              # draw what is there
    python scripts/ablate_spline.py --tiny --folder /tmp/x                # does it run

Writes spline_ablation.json and .png, and the table in docs/spline.md.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import config, data, models
from mlx_lora.adapter import spline
from mlx_lora.adapter.attach import attach
from mlx_lora.adapter.scene import task_rows
from mlx_lora.adapter.spline import SplineLoRALinear, spline_layers
from mlx_lora.adapter.spline_math import Curve, knots, softened
from mlx_lora.check.probes import read
from mlx_lora.optimizers import Diverged, optimizer_of
from mlx_lora.rl import grpo
from mlx_lora.rl.evaluate import judge
from mlx_lora.runlog import Clock, commit, json_safe
from mlx_lora.sft import mean_over, train
from mlx_lora.spectral.splines import of_model
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/spline.md"
METHODS = ("grpo", "sft")
RATES = {"grpo": (2.5e-4, 5e-4, 1e-3, 2e-3), "sft": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}
TUNING, SEEDS = 0, (1, 2, 3, 4, 5)  # the seed that chooses the rate is not among the judged
SLOWER = 0.1  # times LoRA's rate, before V7
HELD_OUT, TEXTS = 512, 1024  # problems; gold completions of SFT, of which an eighth validates
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 %, by the number of seeds


@dataclass(frozen=True)
class Variant:
    """What a layer computes: output · tanh?(φ(z)), and how it is trained."""

    about: str
    curve: Curve | None = None
    noise: float = 0.0  # standard deviation of v - k at the start
    tanh: bool = False
    output: float = 1.0
    anchored: bool = True  # φ(0) = 0
    share: float = 0.0  # of `calibrate`
    of_lora: float | None = None  # times LoRA's learning rate; None: tuned by itself

    @property
    def ours(self) -> bool:
        """The package's own layer computes it."""
        return self.anchored and not (self.noise or self.tanh) and self.output == 1


FIRST = Curve(5, -1.0, 1.0, "soft", "clamp", 0.1)
GRID = Curve(5, -3.0, 3.0, "soft", "clamp", 0.1)
PIECES = Curve(5, -3.0, 3.0, "piecewise", "clamp", 0.1)
LIGHT = Curve(5, -3.0, 3.0, "piecewise", "clamp", 0.01)
BAD: dict[str, Any] = {"anchored": False, "of_lora": SLOWER}
VARIANTS = {
    "lora": Variant("plain LoRA"),
    "V0": Variant("as first written", FIRST, noise=0.1, tanh=True, output=0.1, **BAD),
    "V1": Variant("+ identity at the start", FIRST, tanh=True, output=0.1, **BAD),
    "V2": Variant("+ the grid of the config", GRID, tanh=True, output=0.1, **BAD),
    "V3": Variant("+ no tanh", GRID, output=0.1, **BAD),
    "V4": Variant("+ output scale 1", GRID, **BAD),
    "V5": Variant("+ piecewise linear", PIECES, **BAD),
    "V6": Variant("+ regulariser 0.01", LIGHT, **BAD),
    "V7": Variant("+ standard learning rate", LIGHT, anchored=False),
    "anchored": Variant("+ φ(0) = 0, extrapolating", Curve()),
    "calibrated": Variant("+ grid that keeps up: the default", Curve(), share=0.1),
}
VARIANTS |= {
    f"{name}+rate": replace(VARIANTS[name], about=f"{name} at LoRA's rate", of_lora=1.0)
    for name in ("V0", "V3")
}


class VariantLayer(SplineLoRALinear):
    """The spline layer with what the package has mended."""

    def bent(self, z: mx.array) -> mx.array:
        how: Variant = self.__dict__["_how"]
        y = super().bent(z)
        if not how.anchored:
            y = y + self.at_zero() / self.spline_scale
        return how.output * (mx.tanh(y) if how.tanh else y)

    def at_zero(self) -> mx.array:
        """S(0), which anchoring takes away."""
        if self.curve.interpolation_method == "soft":
            return softened(mx.array(0.0), self.spline, self.curve)
        hats = [np.interp(0.0, knots(self.curve), row) for row in np.eye(self.curve.num_knots)]
        return mx.array(hats, mx.float32) @ self.spline


def main() -> None:
    global HELD_OUT, TEXTS, SEEDS, RATES
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=METHODS, help="one of them; both by default")
    parser.add_argument("--only", help="variants, comma-separated")
    parser.add_argument("--part", default="0/1", help="this share of the variants, like 0/2")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "figures")
    parser.add_argument("--tiny", action="store_true", help="2 steps, 16 problems, 2 seeds")
    given = parser.parse_args()
    if given.tiny:
        HELD_OUT, TEXTS, SEEDS = 16, 64, (1, 2)
        RATES = dict.fromkeys(METHODS, (1e-3,))
    part, parts = map(int, given.part.split("/"))
    names = [n for n in (given.only.split(",") if given.only else VARIANTS) if n != "lora"]
    methods = [given.method] if given.method else METHODS
    runs = Runs(given.folder / "spline_ablation_runs.jsonl", tiny=given.tiny)
    for method in () if given.report else methods:
        wanted = ["lora", *names[part::parts]]  # whose rate the others need
        for rate in RATES[method]:
            for name in (n for n in wanted if VARIANTS[n].of_lora is None):
                runs.ensure(method, name, rate, TUNING)
        for seed in SEEDS:
            for name in wanted:
                runs.ensure(method, name, runs.rate(method, name), seed)
    write_report(runs, given.folder, page=None if given.tiny else PAGE)


class Runs:
    """Those on file, and how one more is made."""

    def __init__(self, path: Path, *, tiny: bool) -> None:
        self.path, self.tiny = path, tiny

    def all(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = map(json.loads, lines)
        return list({(r["method"], r["variant"], r["rate"], r["seed"]): r for r in found}.values())

    def of(self, method: str, name: str) -> list[dict[str, Any]]:
        return [r for r in self.all() if (r["method"], r["variant"]) == (method, name)]

    def rate(self, method: str, name: str) -> float:
        """The best of the grid on the seed for that; a share of LoRA's where it is not tuned."""
        share = VARIANTS[name].of_lora
        if share is not None:
            return share * self.rate(method, "lora")
        tried = [r for r in self.of(method, name) if r["seed"] == TUNING]
        return max(tried, key=lambda r: r["accuracy"])["rate"]

    def judged(self, method: str, name: str) -> dict[int, float]:
        """Accuracy by seed at the chosen rate; nothing where there is none yet."""
        for needed in {name, "lora"}:
            if VARIANTS[needed].of_lora is None and not any(
                r["seed"] == TUNING for r in self.of(method, needed)
            ):
                return {}
        rate = self.rate(method, name)
        return {
            r["seed"]: r["accuracy"]
            for r in sorted(self.of(method, name), key=lambda r: r["seed"])
            if r["rate"] == rate and r["seed"] in SEEDS
        }

    def ensure(self, method: str, name: str, rate: float, seed: int) -> None:
        """Make the run unless it is on file."""
        if any((r["rate"], r["seed"]) == (rate, seed) for r in self.of(method, name)):
            return
        record = {"method": method, "variant": name, "rate": rate, "seed": seed}
        record |= one(method, VARIANTS[name], rate, seed, tiny=self.tiny)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as log:
            log.write(json.dumps(json_safe(record)) + "\n")
        print(
            f"{method} {name:10} rate {rate:g} seed {seed}: {record['accuracy']:.1%}, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def experiment_of(
    method: str, how: Variant, rate: float, seed: int, *, tiny: bool
) -> config.Experiment:
    text = (ROOT / "configs/demo.yaml").read_text()
    changes = [f"learning_rate={rate}", f"seed={seed}", f"method={method}"]
    changes += ["iters=2"] if tiny else []
    if how.curve:  # its numbers are given to `attach`; this says whether grids keep up
        changes += ["lora_parameters.type=spline", f"lora_parameters.calibrate={how.share}"]
    changes += ["num_layers=-1", "mask_prompt=true"] if method == "sft" else []
    return config.from_text(text, "demo.yaml", changes)


def attached(how: Variant, e: config.Experiment) -> models.Loaded:
    """The model with the variant's layers."""
    assert e.quantize is not None
    loaded = models.load(e.model, quantize=e.quantize.model_dump())
    lora = e.lora_parameters
    attach(loaded, rank=lora.rank, scale=lora.effective_scale, seed=e.seed, curve=how.curve)
    loaded.model.eval()
    if how.share:
        spline.calibrate(loaded.model, [ids for ids, _ in read(loaded).texts], how.share)
    keys = mx.random.split(mx.random.key(e.seed), max(1, len(spline_layers(loaded.model))))
    for key, layer in zip(keys, spline_layers(loaded.model).values(), strict=False):
        layer.spline = how.noise * mx.random.normal(layer.spline.shape, key=key)
        if not how.ours:
            layer.__dict__["_how"], layer.__class__ = how, VariantLayer
    return loaded


def one(method: str, how: Variant, rate: float, seed: int, *, tiny: bool) -> dict[str, Any]:
    """Attach, train, evaluate."""
    begin = time.perf_counter()
    e = experiment_of(method, how, rate, seed, tiny=tiny)
    assert e.task is not None
    task = load_task("countdown", e.task.options)
    loaded = attached(how, e)
    more: dict[str, Any] = {}
    try:
        if method == "grpo":
            steps = grpo.train(loaded, task, e, optimizer_of(e), Clock(), lambda *_: None)
            more["steps"] = sum(1 for _ in steps)
        else:
            more |= taught(loaded, task, e)
        diverged = False
    except Diverged:
        diverged = True
    curves = of_model(loaded.model).values()
    groups = judge(loaded, task, task.load("test", HELD_OUT, 0), e.rollout.max_tokens, 0.0, 0)
    return {
        "accuracy": float(np.mean([g.rewards[0].reason == CORRECT for g in groups])),
        "diverged": diverged,
        "deviation": float(np.mean([c.deviation or 0 for c in curves])) if curves else None,
        "seconds": time.perf_counter() - begin,
        "commit": commit(),
        **more,
    }


def taught(loaded: models.Loaded, task: Any, e: config.Experiment) -> dict[str, Any]:
    """SFT on gold completions; the loss on some that were held back."""
    rows = list(enumerate(task_rows(task, TEXTS), start=1))
    texts, _ = data.training_texts(loaded, rows, "countdown", limit=256, mask_prompt=True)
    held = texts[:: len(texts) // (len(texts) // 8)]
    kept = [t for t in texts if t not in held]
    steps = train(loaded, kept, e, optimizer_of(e), Clock(), lambda *_: None)
    return {"steps": sum(1 for _ in steps), "valid_loss": mean_over(loaded.model, held, e, -1)[0]}


def summary(runs: Runs, method: str, name: str) -> dict[str, Any] | None:
    """A line of the table: the mean over seeds, and its difference to LoRA's, seed by seed."""
    mine, theirs = runs.judged(method, name), runs.judged(method, "lora")
    if not mine:
        return None
    accuracies = np.array(list(mine.values()))
    gaps = np.array([a - theirs[seed] for seed, a in mine.items() if seed in theirs])
    return {
        "variant": name,
        "about": VARIANTS[name].about,
        "rate": runs.rate(method, name),
        "seeds": list(mine),
        "accuracies": accuracies.tolist(),
        "accuracy": float(accuracies.mean()),
        **interval("accuracy", accuracies),
        "differences": gaps.tolist(),
        "difference": float(gaps.mean()) if len(gaps) else None,
        **interval("difference", gaps),
    }


def interval(name: str, values_S: np.ndarray) -> dict[str, float | None]:
    """By Student's t, over seeds."""
    count = len(values_S)
    if count not in STUDENT:
        return {f"{name}_low": None, f"{name}_high": None}
    wide = STUDENT[count] * values_S.std(ddof=1) / count**0.5
    return {f"{name}_low": values_S.mean() - wide, f"{name}_high": values_S.mean() + wide}


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the default's interval says."""
    (ours,) = [r for r in rows if r["variant"] == "calibrated"] or [None]
    if ours is None or ours["difference_low"] is None:
        return "not measured yet"
    gap = f"{100 * ours['difference']:+.1f} points ({100 * ours['difference_low']:+.1f} to "
    gap += f"{100 * ours['difference_high']:+.1f})"
    if ours["difference_low"] > 0:
        return f"the spline is better than LoRA by {gap}"
    if ours["difference_high"] < 0:
        return f"the spline is worse than LoRA: {gap}"
    return f"no difference to LoRA is shown: {gap}"


def write_report(runs: Runs, folder: Path, *, page: Path | None) -> None:
    tables = {
        method: [row for name in VARIANTS if (row := summary(runs, method, name))]
        for method in METHODS
    }
    document = {
        "question": "Does a spline adapter learn more than plain LoRA at its best rate?",
        "script": "scripts/ablate_spline.py",
        "commits": sorted({r["commit"] for r in runs.all() if r["commit"]}),
        "variants": {n: json_safe(asdict(v)) for n, v in VARIANTS.items()},
        "held_out": HELD_OUT,
        "rates": RATES,
        "methods": {m: {"verdict": verdict(rows), "rows": rows} for m, rows in tables.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "spline_ablation.json"
    out.write_text(json.dumps(json_safe(document), indent=2, allow_nan=False) + "\n")
    if any(tables.values()):
        draw(tables, out.with_suffix(".png"))
    if page:
        begin, end = "<!-- ablation -->", "<!-- end of ablation -->"
        before, _, rest = page.read_text().partition(begin)
        text = "\n".join(told(method, rows) for method, rows in tables.items() if rows)
        text = text or "Not measured yet.\n"
        page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}")


def told(method: str, rows: list[dict[str, Any]]) -> str:
    """A method's table for docs/spline.md."""
    lines = [
        f"{method.upper()}: {verdict(rows)}.\n",
        "| variant | | learning rate | accuracy, mean over seeds | against LoRA, points | seeds |",
        "|" + "---|" * 6,
    ]
    for r in rows:
        gap = "" if r["difference"] is None else f"{100 * r['difference']:+.1f}"
        if r["difference_low"] is not None and r["variant"] != "lora":
            gap += f" ({100 * r['difference_low']:+.1f} to {100 * r['difference_high']:+.1f})"
        cells = r["variant"], r["about"], f"{r['rate']:g}", f"{r['accuracy']:.1%}", gap
        lines.append(f"| {' | '.join(cells)} | {len(r['seeds'])} |")
    return "\n".join(lines) + "\n"


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The difference to LoRA with every seed, a panel per method."""
    from matplotlib.figure import Figure

    shown = {m: [r for r in rows if r["variant"] != "lora"][::-1] for m, rows in tables.items()}
    names = [n for n in VARIANTS if n != "lora"][::-1]
    figure = Figure(figsize=(11, 1.8 + 0.38 * len(names)), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        axes.axvline(0, color="grey", ls="--", lw=1)
        for row in shown[method]:
            y = names.index(row["variant"])
            points = 100 * np.array(row["differences"])
            axes.plot(points, [y] * len(points), "o", color="steelblue", alpha=0.5)
            if row["difference_low"] is not None:
                ends = [100 * row["difference_low"], 100 * row["difference_high"]]
                axes.plot(ends, [y, y], color="navy", lw=1.5)
            if len(points):
                axes.plot([points.mean()], [y], "D", color="navy")
        axes.set_yticks(range(len(names)), [f"{n}  {VARIANTS[n].about}" for n in names])
        said = verdict(tables[method]).replace(": ", ":\n").replace(" by ", "\nby ")
        axes.set_title(f"{method.upper()}: {said}", loc="left", fontsize=9)
        axes.set_xlabel("points of accuracy above LoRA, same seed\n◆ mean and 95 %, ● seeds")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Splines against plain LoRA at its best learning rate", fontsize=12)
    figure.savefig(path)


if __name__ == "__main__":
    main()
