"""How far do sound models differ from themselves? The null that the check's limits must clear.

The embedded model against itself: other batches, other chunks, other arithmetic, other random
numbers; and beside these the gaussian starts that ruin it, std 0.05 and up. A limit belongs in the
gap. Writes figures/null.json, .png and the table in docs/check.md.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import cpu, models
from mlx_lora.check import gate, writing
from mlx_lora.check.gates import gates
from mlx_lora.check.metrics import Measured
from mlx_lora.check.probes import ROOM, read
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.runlog import commit

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE = ROOT / "figures/null.json", ROOT / "docs/check.md"
SEEDS, BAD = 20, (0.054, 0.087, 0.14, 0.23, 0.37)
NUMBERS: dict[str, tuple[str, str, Callable[[Measured], float]]] = {  # gate, what, its number
    "KL": ("divergence", "mean KL a token, nats", lambda m: m.kl_mean),
    "KL p99": ("divergence", "its 99th percentile", lambda m: m.kl_p99),
    "top-1 lost": ("agreement", "likeliest token changed", lambda m: 1 - m.top1_agreement),
    "perplexity": ("reading", "perplexity ratio - 1",
                   lambda m: abs(m.perplexity_adapted / m.perplexity_base - 1)),
    "entropy": ("uncertainty", "entropy ratio - 1",
                lambda m: abs(m.entropy_adapted / m.entropy_base - 1)),
    "writing": ("writing", "surprise of samples, nats a token",
                lambda m: m.sample_nll_adapted - m.sample_nll_base),
    "sampler": ("sampler", "sampler against learner, nats", lambda m: m.mismatch_kl),
}  # fmt: skip


class Apart:
    """A model that computes a batch in another order: row by row, or padded by some tokens."""

    def __init__(self, inner: nn.Module, *, padding: int = 0) -> None:
        self.inner, self.padding = inner, padding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, ids_NT: mx.array, cache: Any = None) -> mx.array:
        if cache is not None:
            return self.inner(ids_NT, cache=cache)
        if self.padding:
            wide = mx.pad(ids_NT, [(0, 0), (0, self.padding)])
            return self.inner(wide)[:, : ids_NT.shape[1]]
        order = list(range(ids_NT.shape[0]))[::-1]
        return mx.concatenate([self.inner(ids_NT[i : i + 1]) for i in order])[mx.array(order)]


def demo(bits: int | None = 4) -> models.Loaded:
    asked = {"bits": bits, "group_size": 64, "mode": "affine"} if bits else {"bits": 0}
    return models.load("demo", quantize=asked)


def plainly(bits: int | None = 4) -> models.Loaded:
    """Without the fast products of the CPU path."""
    kept, cpu.accelerate = cpu.accelerate, lambda model: 0
    try:
        return demo(bits)
    finally:
        cpu.accelerate = kept


def in_dtype(dtype: mx.Dtype, bits: int | None) -> models.Loaded:
    loaded = plainly(bits)
    loaded.model.set_dtype(dtype)
    return loaded


def null() -> Iterator[tuple[str, Measured]]:
    base = demo()
    for name, model in (
        ("rows one by one, in reverse", Apart(base.model)),
        ("7 tokens of padding", Apart(base.model, padding=7)),
        ("64 tokens of padding", Apart(base.model, padding=64)),
    ):
        yield name, compared(replace(base, model=model), base)
    yield "plain MLX against the fast path", compared(plainly(), base)
    for bits in (4, 8, None):
        exact = plainly(bits)
        label = f"{bits} bits" if bits else "unquantized"
        yield f"float16, {label}", compared(in_dtype(mx.float16, bits), exact)
    yield "bfloat16, unquantized", compared(in_dtype(mx.bfloat16, None), plainly(None))
    same = gate.compare(base, base).measured
    for seed, (own, other) in enumerate(surprises(base)):
        yield f"random numbers {seed}", replace(same, sample_nll_base=own, sample_nll_adapted=other)


def compared(loaded: models.Loaded, base: models.Loaded) -> Measured:
    return gate.compare(loaded, base).measured


def surprises(loaded: models.Loaded) -> Iterator[tuple[float, float]]:
    """The base's surprise at its own samples, of one seed and of the next."""
    side, probes = Side(loaded), read(loaded)
    found = []
    for seed in range(SEEDS + 1):
        rows = writing.continuations(side, probes.prompts, ROOM, seed)
        texts = [([*r.prompt_ids, *r.ids], len(r.prompt_ids)) for r in rows]
        found.append(read_both(side, side, replace(probes, texts=texts)).mean("nll_base"))
    yield from pairwise(found)


def ruined() -> Iterator[tuple[str, Measured]]:
    for std in BAD:
        for seed in (0, 1, 2):
            report = gate.check(demo(), init="gaussian", init_options={"std": std}, seed=seed)
            yield f"gaussian, std {std}, seed {seed}", report.measured


def limits(name: str) -> dict[str, float]:
    """The gate's limits for a start, in the units of NUMBERS."""
    options = {
        k: p.default
        for k, p in inspect.signature(gates[NUMBERS[name][0]]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    if name == "entropy":
        return {"warn": options["high"] - 1}
    if name == "KL p99":
        return {"fail": options["p99_fail"]}
    shift = 1 if name == "perplexity" else 0
    return {k: options[k] - shift for k in ("warn", "fail")}


def main() -> None:
    sides = {
        side: [{"what": what} | {n: number(m) for n, (_, _, number) in NUMBERS.items()}
               for what, m in cases()]
        for side, cases in (("null", null), ("bad", ruined))
    }  # fmt: skip
    found = {"question": (__doc__ or "").splitlines()[0], "commit": commit(),
             "cpu": cpu.mode(), **sides, "limits": {n: limits(n) for n in NUMBERS}}  # fmt: skip
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    write_table(sides)
    draw(sides)


def write_table(sides: dict[str, list[dict[str, Any]]]) -> None:
    lines = [
        "| number | other order, padding, products: at most | 16-bit arithmetic: at most | "
        "other random numbers, 95 % | limits: warn, fail above | a start that derails: at least |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (_, what, _) in NUMBERS.items():
        ordered, half, drawn = [], [], []
        for row in sides["null"]:
            kinds = {"random": drawn, "float16,": half, "bfloat16,": half}
            kind = kinds.get(row["what"].split()[0], ordered)
            kind.append(abs(row[name]))
        drawn_text = f"{np.quantile(drawn, 0.95):.2g}" if name == "writing" else ""
        worst = min(r[name] for r in sides["bad"] if float(r["what"].split()[2][:-1]) > 0.06)
        bounds = ", ".join(f"{x:.3g}" for x in limits(name).values())
        if name == "sampler":
            worst = float("nan")
        lines.append(
            f"| {what} | {max(ordered):.2g} | {max(half):.2g} | {drawn_text} | {bounds} | "
            + (f"{worst:.2g} |" if np.isfinite(worst) else " |")
        )
    page = PAGE.read_text()
    before, _, rest = page.partition("<!-- null table -->\n")
    _, _, after = rest.partition("<!-- end of null table -->")
    body = "\n".join(lines)
    PAGE.write_text(f"{before}<!-- null table -->\n\n{body}\n\n<!-- end of null table -->{after}")


def draw(sides: dict[str, list[dict[str, Any]]]) -> None:
    figure, axes = plt.subplots(len(NUMBERS), 1, figsize=(8, 7.5), layout="constrained")
    for axis, (name, (gate_name, what, _)) in zip(axes, NUMBERS.items(), strict=True):
        for side, colour, height in (("null", "tab:blue", 0.25), ("bad", "tab:red", 0.75)):
            values = [max(abs(r[name]), 1e-14) for r in sides[side] if np.isfinite(r[name])]
            if side == "bad" and name == "sampler":
                continue  # a garbled model decodes as faithfully as a sound one
            jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(values))
            label = {"null": "the model against itself", "bad": "gaussian starts"}[side]
            axis.scatter(values, height + jitter, s=14, color=colour, alpha=0.6, label=label)
        for level, value in limits(name).items():
            style = {"warn": ("tab:orange", "--"), "fail": ("black", "-")}[level]
            axis.axvline(value, color=style[0], linestyle=style[1], linewidth=1.2, label=level)
        axis.set_xscale("log")
        axis.set_xlim(1e-14, 1e4)
        axis.set_yticks([])
        axis.set_ylim(0, 1)
        axis.set_title(f"{gate_name}: {what}", loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
    handles = {t: h for a in axes for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("Where a sound model ends and a ruined one begins", fontsize=11)
    figure.savefig(OUT.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
