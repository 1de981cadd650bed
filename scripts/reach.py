"""On which architectures of mlx-lm is an adapter harmless, and what else works there?

    python scripts/reach.py

Builds a tiny random model of every architecture in tests/zoo.py, unquantized and in 4 bits, and
asks it what tests/zoo_checks.py asks; then packs two of them in every way. Writes
figures/reach.json and the tables of docs/reach.md. About a minute on one CPU core.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora import cpu
from mlx_lora.runlog import atomically, version

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import zoo, zoo_checks  # noqa: E402  from the checkout, which is no installed package

OUT, PAGE = ROOT / "figures" / "reach.json", ROOT / "docs" / "reach.md"
BEGIN, END = "<!-- reach -->\n", "<!-- end of reach -->\n"
COLUMNS = {
    "4 bit": "4 bit",
    "short keys": "short keys",
    "harmless": "harmless",
    "switched off": "off is base",
    "gradients": "gradients",
    "loads": "loads in mlx-lm",
    "decodes": "decodes",
    "padded": "mixed lengths",
    "fast path": "fast path",
}
PACKINGS = [("affine", b) for b in (None, 2, 3, 4, 5, 6, 8)]
PACKINGS += [("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)]
DTYPES = ("float32", "float16", "bfloat16")
PACKED = ("llama", "qwen3_moe")
HEADINGS: dict[str, zoo.Faults] = {"In mlx-lm": zoo.LIMITS}
UNEXPLAINED = "Unexplained"
Record = dict[str, Any]


def main() -> None:
    architectures = []
    for name in zoo.ARCHITECTURES:
        architectures.append(examined(name))
        wrong = [c for c, text in architectures[-1]["problems"].items() if text]
        print(name, "ok" if not wrong else f"not: {', '.join(wrong)}", flush=True)
    packings = [packed(name, mode, bits) for name in PACKED for mode, bits in PACKINGS]
    about = {
        "script": "scripts/reach.py",
        "seed": 0,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_path": cpu.mode(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
    report = {"about": about, "architectures": architectures, "packings": packings}
    write(OUT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    parts = [summary(report), table(architectures), packing_table(packings)]
    paste("\n".join([*parts, limits(architectures), bare(architectures)]), PAGE)


def examined(name: str) -> Record:
    """Both runs of an architecture as one: a check is right when it is right in both."""
    runs = []
    for bits in (None, 4):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(zoo_checks.examine(name, bits, Path(folder)))
        if runs[-1]["problems"].get("runs"):
            break
    problems: dict[str, str] = {}
    for run in runs:
        problems |= {c: problems.get(c) or text for c, text in run["problems"].items()}
    return {
        "name": name,
        "kind": kind(name, runs[0]["layers"]),
        "layers": runs[0]["layers"],
        "left_out": runs[0]["left_out"],
        "problems": problems,
    }


def kind(name: str, layers: Mapping[str, int]) -> str:
    """The table of the zoo it is in, and what else it has."""
    words = [zoo.KIND_OF[name]]
    spelled = str(zoo.ARCHITECTURES[name])
    if any(f"{key}': {zoo.WINDOW}" in spelled for key in ("window", "window_size", "chunk_size")):
        words.append("sliding window")
    if layers.get("experts"):
        words.append("experts")
    return ", ".join(dict.fromkeys(words))


def packed(name: str, mode: str, bits: int | None) -> Record:
    """Harmless and switched off, by dtype, of one way to pack."""
    import mlx.core as mx

    def check(dtype: str) -> str:
        return zoo_checks.told(lambda: zoo_checks.packing(name, bits, mode, getattr(mx, dtype)))

    return {"name": name, "mode": mode, "bits": bits, "problems": {d: check(d) for d in DTYPES}}


def summary(report: Mapping[str, Any]) -> str:
    found = report["architectures"]
    files = {zoo.ARCHITECTURES[a["name"]]["model_type"] for a in found}
    counts = {c: sum(works(a, c) for a in found) for c in COLUMNS}
    versions = ", ".join(f"{k} {v}" for k, v in report["about"]["versions"].items())
    return f"""\
{report["about"]["system"]}, {versions}, CPU path `{report["about"]["cpu_path"]}`.
{len(found)} models of {len(files)} architectures. {sum(works(a, "runs") for a in found)} run here.

- bitwise harmless at the start: {counts["harmless"]}
- bitwise the base when switched off: {counts["switched off"]}
- gradients reach every layer: {counts["gradients"]}
- the saved adapter loads in stock mlx-lm: {counts["loads"]}
- cached decoding equals the full forward pass: {counts["decodes"]}
- and does so with prompts of mixed lengths in a batch: {counts["padded"]}
"""


def works(record: Record, check: str) -> bool:
    return record["problems"].get(check, "not reached") == ""


def cell(record: Record, check: str) -> str:
    problem = record["problems"].get(check)
    return "" if problem is None else "**no**" if problem else "yes"


def table(found: Sequence[Record]) -> str:
    lines = [
        "## Architectures\n",
        f"| architecture | kind | LoRA layers | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for record in found:
        layers = " + ".join(
            f"{count} experts" if what == "experts" else f"{count}"
            for what, count in sorted(record["layers"].items(), reverse=True)
        )
        if not works(record, "runs"):
            layers = "does not run"
        cells = [record["name"], record["kind"], layers, *(cell(record, c) for c in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def packing_table(found: Sequence[Record]) -> str:
    """Every packing by dtype, and why what does not work does not."""
    lines = [
        "## Packings\n",
        "Harmless, and bitwise the base when switched off:\n",
        f"| model | packing | {' | '.join(DTYPES)} |",
        f"|---|---|{'---|' * len(DTYPES)}",
    ]
    for record in found:
        name = f"{record['mode']}, {record['bits']} bits" if record["bits"] else "unquantized"
        cells = ["**no**" if text else "yes" for text in record["problems"].values()]
        lines.append(f"| {record['name']} | {name} | {' | '.join(cells)} |")
    wrong = [
        f"- {record['name']} in {dtype}: `{text}`"
        for record in found
        for dtype, text in record["problems"].items()
        if text
    ]
    return "\n".join([*lines, "", *wrong]) + "\n"


def limits(found: Sequence[Record]) -> str:
    """Each failure with its reason and in its own words: mlx-lm's, ours, unexplained ones."""
    names: dict[str, dict[str, list[str]]] = {h: {} for h in (*HEADINGS, UNEXPLAINED)}
    for record in found:
        wrong = {c: text for c, text in record["problems"].items() if text}
        for heading, faults in HEADINGS.items():
            checks, why = faults.get(record["name"], ({}, ""))
            if mine := {c: wrong.pop(c) for c in checks if c in wrong}:
                names[heading].setdefault(reason(why, mine), []).append(record["name"])
        if wrong:
            said = reason("no reason found", wrong)
            names[UNEXPLAINED].setdefault(said, []).append(record["name"])
    lines = ["## What does not work, and why\n"]
    for heading, reasons in names.items():
        lines += [f"### {heading}\n"] if reasons else []
        lines += [f"- **{', '.join(alike)}**: {said}" for said, alike in reasons.items()]
        lines += [""] if reasons else []
    lines += [f"Not tried: {name}; {why}." for name, why in zoo.UNTRIED.items()]
    return "\n".join(lines) + "\n"


def reason(why: str, wrong: Mapping[str, str]) -> str:
    """Why, and what was said; checks that fail alike share their words."""
    alike: dict[str, list[str]] = {}
    for check, text in wrong.items():
        alike.setdefault(text, []).append(COLUMNS.get(check, check))
    said = "; ".join(f"{', '.join(checks)}: `{text}`" for text, checks in alike.items())
    return f"{why}. {said}"


def bare(found: Sequence[Record]) -> str:
    """Weights inside the blocks that get no adapter, by class."""
    models: dict[str, list[str]] = {}
    for record in found:
        for name in record["left_out"]:
            models.setdefault(name, []).append(record["name"])
    lines = ["## Weights without an adapter\n", "mlx-lm's LoRA knows no layer for these:\n"]
    lines += [f"- `{name}`: {', '.join(where)}" for name, where in sorted(models.items())]
    return "\n".join(lines) + "\n"


def paste(text: str, page: Path) -> None:
    """Replace what stands between the page's two markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{page.name} has no line {END.strip()}"
    write(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def write(path: Path, text: str) -> None:
    with atomically(path) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
