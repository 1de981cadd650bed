"""Does the check find what is broken, and leave alone what is sound? More than 200 cases.

On the embedded model: kinds of corruption that people meet, each in several sizes and seeds, and
kinds of health. A corrupted case is a miss when the verdict is pass (a failed load, exit code 2,
counts as found); a sound one is a false alarm when the verdict is not pass. Writes
figures/detection.json, .png and the table in docs/check.md.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import bases, config, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.tensors import digest
from mlx_lora.check import gate
from mlx_lora.errors import UserError
from mlx_lora.optimizers import optimizer_of
from mlx_lora.rl import grpo
from mlx_lora.runlog import Clock, commit, json_safe
from mlx_lora.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE = ROOT / "figures/detection.json", ROOT / "docs/check.md"
SEEDS, STEPS = (0, 1, 2), 24
Case = tuple[str, str, str, Callable[[], gate.Report]]  # health or fault, kind, what, the check
NO_RECORD = "no record of base or factors"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trained = [train(folder / f"trained{seed}", seed) for seed in SEEDS]
        cases = [*healthy(trained, folder), *broken(trained, folder)]
        rows = [record(case) for case in cases]
    wrong = [r for r in rows if r["wrong"]]
    found = {"question": (__doc__ or "").splitlines()[0], "commit": commit(), "cases": len(rows)}
    found |= {"wrong": len(wrong), "rows": rows}
    OUT.write_text(json.dumps(json_safe(found), indent=1) + "\n")
    write_table(rows)
    draw(rows)
    for r in wrong:
        print("WRONG", r["kind"], r["what"], r["verdict"], r["reasons"])
    print(f"{len(rows)} cases, {len(wrong)} wrong")


def record(case: Case) -> dict[str, Any]:
    side, kind, what, run = case
    try:
        report = run()
        verdict, reasons = report.verdict, list(report.reasons)[:2]
        kl, ratio = report.measured.kl_mean, report.to_json()["perplexity_ratio"]
        spoke = [g.name for g in report.gates if g.verdict != "pass"]
    except UserError as error:
        said = re.sub(r"\S*/", "", str(error))[:120]  # without the scratch folder
        verdict, reasons, kl, ratio, spoke = "refused", [said], None, None, ["load"]
    wrong = (verdict == "pass") if side == "fault" else (verdict != "pass")
    wrong = wrong and NO_RECORD not in kind  # named exceptions, listed but not counted
    return {"side": side, "kind": kind, "what": what, "verdict": verdict, "gates": spoke, "kl": kl,
            "perplexity_ratio": ratio, "wrong": wrong, "reasons": reasons}  # fmt: skip


def train(folder: Path, seed: int) -> Path:
    """A healthy adapter: some steps of GRPO at the demo's settings."""
    text = (ROOT / "configs/demo.yaml").read_text()
    e = config.from_text(text, "demo.yaml", [f"seed={seed}", f"iters={STEPS}"])
    loaded = models.load("demo")
    adapter = attach(loaded, rank=8, scale=2.0, seed=seed)
    steps = grpo.train(loaded, load_task("countdown"), e, optimizer_of(e), Clock(), lambda *_: None)
    for _ in steps:
        pass
    files.save(loaded.model, adapter | {"base": bases.identity(loaded)}, folder)
    return folder


def demo(bits: int = 4) -> models.Loaded:
    return models.load("demo", quantize={"bits": bits, "group_size": 64, "mode": "affine"})


def with_adapter(folder: Path, bits: int = 4) -> models.Loaded:
    loaded = demo(bits)
    files.load(loaded.model, folder)
    return loaded


def healthy(trained: list[Path], folder: Path) -> Iterator[Case]:
    for init in ("zero", "orthonormal", "split_support", "activations", "gradient"):
        for seed in SEEDS:
            for bits in (4, 8):
                options = {"data": "countdown"} if init in ("activations", "gradient") else {}
                yield (
                    "health", "harmless init", f"{init}, {bits} bits, seed {seed}",
                    lambda i=init, o=options, b=bits, s=seed: gate.check(
                        demo(b), init=i, init_options=o, seed=s
                    ),
                )  # fmt: skip
    for index, adapter in enumerate(trained):
        for bits in (3, 4, 8):
            yield ("health", "trained adapter", f"{index}, on {bits} bits",
                   lambda a=adapter, b=bits: gate.check(demo(b), adapter=a))  # fmt: skip
        for seed in (1, 2, 3, 4, 5, 6):
            yield ("health", "trained adapter", f"{index}, samples of seed {seed}",
                   lambda a=adapter, s=seed: gate.check(demo(), adapter=a, seed=s))  # fmt: skip
        yield ("health", "it did learn", f"{index}",
               lambda a=adapter: gate.check(demo(), adapter=a, expect="changed"))  # fmt: skip
        for strength in (0.5, 0.75, 1.25, 1.5):
            scaled = changed(adapter, folder / f"strength{index}{strength}", scale=strength)
            yield ("health", "other strength", f"{index} × {strength}",
                   lambda a=scaled: gate.check(demo(), adapter=a))  # fmt: skip
        copy = shutil.copytree(adapter, folder / f"copy{index}")
        for bits in (4, 8):
            yield ("health", "exported copy", f"{index}, {bits} bits",
                   lambda a=adapter, c=copy, b=bits: gate.compare(
                       with_adapter(c, b), with_adapter(a, b)))  # fmt: skip
        fused = lambda a=adapter: gate.compare(fuse(with_adapter(a), None), with_adapter(a))  # noqa: E731
        yield ("health", "fused in full precision", f"{index}", fused)
        copies = {
            "PEFT copy": to_peft(adapter, folder / f"peft{index}"),
            "stored in float16": changed(adapter, folder / f"half{index}", dtype=mx.float16),
        }
        for kind, other in copies.items():
            yield ("health", kind, f"{index}",
                   lambda a=adapter, b=other: gate.compare(
                       with_adapter(b), with_adapter(a)))  # fmt: skip
    for bits in (2, 3, 4, 5, 6, 8):
        yield ("health", "the same model twice", f"{bits} bits",
               lambda b=bits: gate.compare(demo(b), demo(b)))  # fmt: skip


def broken(trained: list[Path], folder: Path) -> Iterator[Case]:
    for std in (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5):
        for seed in SEEDS:
            yield ("fault", "gaussian start", f"std {std}, seed {seed}",
                   lambda x=std, s=seed: gate.check(
                       demo(), init="gaussian", init_options={"std": x}, seed=s))  # fmt: skip
    for seed in SEEDS:
        yield ("fault", "antisymmetric start", f"seed {seed}",
               lambda s=seed: gate.check(demo(), init="antisymmetric", seed=s,
                                         lora={"keys": ["q_proj", "o_proj"]}))  # fmt: skip
    for index, adapter in enumerate(trained):
        for kind, what, arguments in spoilers():
            made = changed(adapter, folder / f"{kind}{what}{index}".replace(" ", "_"), **arguments)
            if kind != "shuffled layers":  # fluent, so that only the original tells
                yield ("fault", kind, f"{index}, {what}",
                       lambda a=made: gate.check(demo(), adapter=a))  # fmt: skip
            if kind in ("zeroed layer", "wrong scale", "shuffled layers"):
                yield ("fault", f"{kind}, against the original", f"{index}, {what}",
                       lambda a=made, o=adapter: gate.compare(
                           with_adapter(a), with_adapter(o)))  # fmt: skip
        for kind, edit in (("swapped A and B", swapped), ("another base", blind)):
            made = changed(adapter, folder / f"blind{kind}{index}", edit=edit, recorded=False)
            yield ("fault", f"{kind}, {NO_RECORD}", f"{index}",
                   lambda a=made: gate.check(demo(), adapter=a))  # fmt: skip
        for size in (0.1, 0.5, 0.9):
            cut = truncated(adapter, folder / f"cut{index}{size}", size)
            yield ("fault", "truncated file", f"{index}, {size:.0%} left",
                   lambda a=cut: gate.check(demo(), adapter=a))  # fmt: skip
        for bits in (2, 3, 4):
            yield ("fault", "fused and quantized again", f"{index}, {bits} bits",
                   lambda a=adapter, b=bits: gate.compare(
                       fuse(with_adapter(a), b), with_adapter(a)))  # fmt: skip
        yield ("fault", "dropout left on", f"{index}", lambda a=adapter: dropping(a))
        yield ("fault", "untrained", f"{index}", lambda a=adapter: idle(a, folder))
    for template in ("{{ messages[0]['content'] }}", "Q: {{ messages[0]['content'] }}"):
        yield ("fault", "wrong chat template", template[:30],
               lambda t=template: gate.compare(templated(t), demo()))  # fmt: skip


def blind(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    return another_basis(tensors, 0)


def spoilers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, what, and the arguments of `changed`."""
    for times in (8, 16, 64):  # alpha for alpha / rank, and twice over
        yield "wrong scale", f"× {times}", {"scale": times}
    yield "swapped A and B", "square layers", {"edit": swapped}
    yield "transposed factor", "lora_a", {"edit": transposed}
    for seed in SEEDS:
        yield (
            "another base",
            f"basis {seed}",
            {"edit": lambda t, s=seed: another_basis(t, s), "foreign": seed},
        )
    for value in (float("nan"), float("inf")):
        yield "not finite", f"{value}", {"edit": lambda t, v=value: poisoned(t, v)}
    yield "missing tensor", "one", {"edit": lambda t: dict(list(t.items())[1:])}
    yield "zeroed layer", "B of block 4", {"edit": zeroed}
    for times in (1.0, 3.0):
        yield "shuffled layers", f"reversed, × {times:g}", {"edit": reversed_blocks, "scale": times}
    yield "scale zero", "0", {"scale": 0.0}


def changed(
    adapter: Path,
    out: Path,
    *,
    scale: float = 1.0,
    edit: Callable | None = None,
    dtype=None,
    foreign: int | None = None,
    recorded: bool = True,
) -> Path:
    """A copy of an adapter folder with something changed."""
    shutil.copytree(adapter, out)
    about, tensors = files.read(adapter)
    about["lora_parameters"]["scale"] *= scale
    if foreign is not None:  # signed sums over another model's weights are as good as noise
        noise = np.random.default_rng(foreign).standard_normal(len(about["base"]["sketch"]))
        about["base"]["sketch"] = noise.tolist()
    tensors = edit(tensors) if edit else tensors
    if dtype:  # stored anew by a tool that knows what it does
        tensors = {k: v.astype(dtype) for k, v in tensors.items()}
        about["tensors_hash"] = digest(tensors)
    if not recorded:  # as mlx-lm or PEFT would have saved it
        about = {k: v for k, v in about.items() if k not in ("tensors_hash", "base")}
    (out / files.CONFIG).write_text(json.dumps(about))
    mx.save_safetensors(str(out / files.WEIGHTS), tensors)
    return out


def swapped(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    found = dict(tensors)
    for name, a in tensors.items():
        module = name.removesuffix(".lora_a")
        b = tensors[f"{module}.lora_b"] if name.endswith("lora_a") else a
        if name.endswith("lora_a") and a.shape[0] == b.shape[1]:
            found[name], found[f"{module}.lora_b"] = b.T, a.T
    return found


def transposed(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    return {k: v.T if k.endswith("lora_a") else v for k, v in tensors.items()}


def another_basis(tensors: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    """The adapter of a model that is the same function in another basis: all widths permuted."""
    rng = np.random.default_rng(seed)
    orders: dict[int, mx.array] = {}

    def order(width: int) -> mx.array:
        return orders.setdefault(width, mx.array(rng.permutation(width)))

    return {
        k: v[order(v.shape[0])] if k.endswith("lora_a") else v[:, order(v.shape[1])]
        for k, v in tensors.items()
    }


def poisoned(tensors: dict[str, mx.array], value: float) -> dict[str, mx.array]:
    name = sorted(tensors)[3]
    spoiled = np.array(tensors[name])
    spoiled.flat[5] = value
    return tensors | {name: mx.array(spoiled)}


def zeroed(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    return {k: mx.zeros_like(v) if "layers.4." in k and "lora_b" in k else v
            for k, v in tensors.items()}  # fmt: skip


def reversed_blocks(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    def other(name: str) -> str:
        before, _, rest = name.partition("layers.")
        number, _, end = rest.partition(".")
        return f"{before}layers.{4 - int(number)}.{end}"

    return {other(k): v for k, v in tensors.items()}


def truncated(adapter: Path, out: Path, share: float) -> Path:
    shutil.copytree(adapter, out)
    content = (adapter / files.WEIGHTS).read_bytes()
    (out / files.WEIGHTS).write_bytes(content[: int(share * len(content))])
    return out


def fuse(loaded: models.Loaded, bits: int | None) -> models.Loaded:
    """W + BA in place of every layer, quantized again where `bits` says so."""
    for name, layer in lora_layers(loaded.model).items():
        dense = models.dense_weight(layer.linear)
        dense = dense + (layer.scale * layer.lora_a @ layer.lora_b).T
        made: Any = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        made.weight = dense
        if bits:
            made = nn.QuantizedLinear.from_linear(made, 64, bits)
        *path, last = name.split(".")
        parent: Any = loaded.model
        for part in path:
            parent = parent[int(part)] if isinstance(parent, list) else parent[part]
        parent[last] = made
    return loaded


def to_peft(adapter: Path, out: Path) -> Path:
    about, tensors = files.read(adapter)
    lora = about["lora_parameters"]
    out.mkdir()
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    named = {}
    for key, value in tensors.items():
        module, _, factor = key.rpartition(".")
        named[f"base_model.model.{module}.{names[factor]}"] = mx.contiguous(value.T)
    mx.save_safetensors(str(out / "adapter_model.safetensors"), named)
    peft = {"peft_type": "LORA", "r": lora["rank"], "lora_alpha": lora["scale"] * lora["rank"]}
    (out / "adapter_config.json").write_text(json.dumps(peft))
    return out


def dropping(adapter: Path) -> gate.Report:
    loaded = demo()
    probes = gate.read(loaded, None)
    prints = gate.fingerprint(loaded, probes)
    files.load(loaded.model, adapter)
    for layer in lora_layers(loaded.model).values():
        layer.dropout = nn.Dropout(0.1)
    return gate.judge(loaded, probes, prints, "healthy", None, 0.0, 0)


def idle(adapter: Path, folder: Path) -> gate.Report:
    out = folder / f"idle{adapter.name}"
    made = changed(adapter, out, edit=lambda t: {
        k: mx.zeros_like(v) if k.endswith("lora_b") else v for k, v in t.items()})  # fmt: skip
    return gate.check(demo(), adapter=made)


def templated(template: str) -> models.Loaded:
    loaded = demo()
    loaded.tokenizer._tokenizer.chat_template = template
    return loaded


def write_table(rows: list[dict[str, Any]]) -> None:
    """Kind by kind: how many cases, what the verdicts were, which gates spoke."""
    lines = ["| | kind | cases | verdicts | gates that spoke | wrong |", "|" + "---|" * 6]
    for side in ("health", "fault"):
        for kind in dict.fromkeys(r["kind"] for r in rows if r["side"] == side):
            mine = [r for r in rows if (r["side"], r["kind"]) == (side, kind)]
            verdicts = {v: sum(r["verdict"] == v for r in mine) for v in
                        ("pass", "warn", "fail", "refused")}  # fmt: skip
            said = ", ".join(f"{n} {v}" for v, n in verdicts.items() if n)
            spoke = sorted({g for r in mine for g in r["gates"]})
            wrong = sum(r["wrong"] for r in mine)
            row = (side, kind, len(mine), said, ", ".join(spoke), wrong)
            lines.append(f"| {' | '.join(map(str, row))} |")
    begin, end = "<!-- detection table -->", "<!-- end of detection table -->"
    before, _, rest = PAGE.read_text().partition(begin)
    body = "\n".join(lines)
    PAGE.write_text(f"{before}{begin}\n\n{body}\n\n{end}{rest.partition(end)[2]}")


def draw(rows: list[dict[str, Any]]) -> None:
    """Every case by KL and perplexity, coloured by verdict."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = {"pass": "seagreen", "warn": "darkorange", "fail": "firebrick"}
    for side, marker in (("health", "o"), ("fault", "x")):
        for verdict, colour in colours.items():
            mine = [r for r in rows if (r["side"], r["verdict"]) == (side, verdict)]
            points = [(r["kl"], r["perplexity_ratio"]) for r in mine if r["kl"] is not None
                      and r["perplexity_ratio"] is not None]  # fmt: skip
            points = [(max(k, 1e-10), p) for k, p in points if np.isfinite(k) and np.isfinite(p)]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.6,
                          label=f"{side}: {verdict}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("KL(base ‖ adapted), nats a token (1e-10: none)")
    axes.set_ylabel("perplexity ratio")
    axes.set_title(f"{len(rows)} cases: what is sound (o) and what is broken (x)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
