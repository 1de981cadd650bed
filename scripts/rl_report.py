"""What bench_rl.py found, as ratios, as the tables of docs/rl_engine.md and as a picture."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Lines = list[str]
TARGETS = {  # wanted, and what would be splendid
    "ratio_4bit_installed": (20, 30),
    "ratio_4bit_equal_blas": (25, 35),
    "ratio_float32_equal_blas": (4.5, 8),
    "rollout_ratio_4bit": (6, None),
    "rollout_ratio_4bit_installed": (5, None),
    "rollout_ratio_float32": (1.5, None),
}
STEPS = {
    "ratio_4bit_installed": "4bit_installed",
    "ratio_4bit_equal_blas": "4bit_equal_blas",
    "ratio_float32_equal_blas": "float32_equal_blas",
}
ROLLOUTS = {
    "rollout_ratio_4bit": "4bit_equal_blas",
    "rollout_ratio_4bit_installed": "4bit_installed",
    "rollout_ratio_float32": "float32_equal_blas",
}
WORDS = {
    "4bit_installed": "4 bits, as installed",
    "4bit_equal_blas": "4 bits, OpenBLAS in both",
    "float32_equal_blas": "float32, OpenBLAS in both",
}
COLOURS = {
    "4bit_installed": "tab:blue",
    "4bit_equal_blas": "tab:orange",
    "float32_equal_blas": "tab:green",
}
LIMIT = 1.1  # exponent of the growth


def summed_up(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios with their targets, and exponents of what was measured."""
    ratios: dict[str, Any] = {}
    for name, (target, stretch) in TARGETS.items():
        values = dict(ratio_values(found, name))
        if values:
            worst = min(values.values())
            ratios[name] = {"target": target, "stretch": stretch, "met": worst >= target}
            ratios[name] |= {"values": values}
    medians = {
        case: {shape: middles(row["seconds"]) for shape, row in shapes.items()}
        for case, shapes in found.get("steps", {}).items()
    }
    exponents = {
        path: {kind: exponent(points) for kind, points in kinds.items()}
        for path, kinds in found.get("growth", {}).items()
    }
    return {"ratios": ratios, "step_medians": medians, "exponents": exponents}


def middles(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def ratio_values(found: dict[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """Their median time over ours: of the steps by shape, of rollouts by what was written."""
    if name in STEPS:
        for shape, row in found.get("steps", {}).get(STEPS[name], {}).items():
            middle = middles(row["seconds"])
            yield shape, middle["peer"] / middle["ours"]
        return
    row = found.get("rollouts", {}).get(ROLLOUTS[name], {}).get("64")
    if row:
        yield "64 rows", over(row)


def over(row: dict[str, Any]) -> float:
    """How many times mlx-lm's rollout takes as long as ours."""
    middle = middles(row["seconds"])
    return middle["mlx_lm"] / middle["ours"]


def exponent(points: dict[str, Any]) -> float:
    """Slope of the log of the median time over the log of the size."""
    x, y = sizes_and_times(points)
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def sizes_and_times(points: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [int(at) for at in points], [statistics.median(p["seconds"]) for p in points.values()]


def steps_table(found: dict[str, Any]) -> Lines:
    lines = [
        "| | rollouts | mlx-lm-lora, s | ours, s | ratio | wanted | ours without a reference, s | "
        "memory, theirs and ours, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in STEPS.items():
        for shape, row in found["steps"].get(case, {}).items():
            m, memory = middles(row["seconds"]), row["peak_memory"]
            target, stretch = TARGETS[name]
            lines.append(
                f"| {WORDS[case]} | {shape.replace('x', ' · ')} | {m['peer']:.2f} | "
                f"{m['ours']:.3f} | {m['peer'] / m['ours']:.1f} | {target} ({stretch}) | "
                f"{m['ours_beta_0']:.3f} | {memory['peer'] / 1e6:.0f}, {memory['ours'] / 1e6:.0f} |"
            )
    return lines


def rollouts_table(found: dict[str, Any]) -> Lines:
    lines = [
        "| | rows | batch_generate, tokens/s | ours, tokens/s | ratio | wanted |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, case in ROLLOUTS.items():
        for what, row in found["rollouts"].get(case, {}).items():
            rate = rates(found, row)
            wanted = TARGETS[name][0] if what == "64" else ""
            lines.append(
                f"| {WORDS[case]} | {what} | {rate['mlx_lm']:,.0f} | {rate['ours']:,.0f} | "
                f"{over(row):.2f} | {wanted} |"
            )
    return lines


def rates(found: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Completion tokens per second of each side."""
    tokens = row["rows"] * found["setting"]["tokens"]
    return {name: tokens / seconds for name, seconds in middles(row["seconds"]).items()}


def growth_table(found: dict[str, Any]) -> Lines:
    lines = ["| CPU path | grows with | seconds a step | exponent |", "|---|---|---|---:|"]
    for path, kinds in found["growth"].items():
        for kind, points in kinds.items():
            pairs = zip(*sizes_and_times(points), strict=True)
            shown = ", ".join(f"{at}: {seconds:.2f}" for at, seconds in pairs)
            lines.append(f"| {path} | {kind} | {shown} | {exponent(points):.2f} |")
    return lines


def parts_table(found: dict[str, Any]) -> Lines:
    paths = list(found["profile"])
    heads = "".join(f" {path}, s | share | products alone, s |" for path in paths)
    lines = [f"| part |{heads}", "|---|" + "---:|---:|---:|" * len(paths)]
    for part in found["profile"][paths[0]]["parts"]:
        cells = ""
        for path in paths:
            p = found["profile"][path]
            floor = f"{p['products'][part]:.3f}" if part in p["products"] else ""
            seconds = p["parts"][part]
            cells += f" {seconds:.3f} | {seconds / p['seconds']['step']:.0%} | {floor} |"
        lines.append(f"| {part} |{cells}")
    return lines


def functions_table(found: dict[str, Any]) -> Lines:
    lines = ["| function, NumPy path | calls | own time, s | share |", "|---|---:|---:|---:|"]
    return lines + [
        f"| `{f['function']}` | {f['calls']:,} | {f['seconds']:.3f} | {f['share']:.0%} |"
        for f in found["profile"]["numpy"]["functions"]
    ]


TABLES = {
    "steps": ("steps", steps_table),
    "rollouts": ("rollouts", rollouts_table),
    "growth": ("growth", growth_table),
    "parts": ("profile", parts_table),
    "functions": ("profile", functions_table),
}


def fill(page: Path, found: dict[str, Any]) -> None:
    """Write the tables of what was measured between their marks on the page."""
    text = page.read_text()
    for name, (part, table) in TABLES.items():
        if part in found:
            start, end = f"<!-- {name} table -->\n", f"<!-- end of {name} table -->"
            before, _, rest = text.partition(start)
            body = "\n".join(table(found))
            text = f"{before}{start}\n{body}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text)


def draw(found: dict[str, Any], out: Path) -> None:
    """Ratios with their targets, tokens a second by rows, and growth; what there is of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    (ratios, rates), (rows, tokens) = figure.subplots(2, 2)
    draw_ratios(ratios, found)
    draw_rates(rates, found)
    for axes, kind in ((rows, "rows"), (tokens, "tokens")):
        draw_growth(axes, found, kind)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def draw_ratios(axes: Any, found: dict[str, Any]) -> None:
    bars = [
        (name, what, value)
        for name, ratio in found["ratios"].items()
        for what, value in ratio["values"].items()
    ]
    for y, (name, _, value) in enumerate(bars):
        target, stretch = TARGETS[name]
        case = (STEPS | ROLLOUTS)[name]
        axes.barh(y, value, color=COLOURS[case], height=0.6, alpha=1 if name in STEPS else 0.55)
        axes.text(value, y, f" {value:.1f} ", va="center", ha="left", fontsize=9)
        for goal, style in ((target, "-"), (stretch, ":")):
            if goal:
                axes.plot([goal, goal], [y - 0.45, y + 0.45], color="black", ls=style, lw=1.5)
    names = [
        f"{'step' if name in STEPS else 'rollout'}, {what.replace('x', ' × ')}\n"
        f"{WORDS[(STEPS | ROLLOUTS)[name]]}"
        for name, what, _ in bars
    ]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.7, 1.6 * max([35, *(value for *_, value in bars)]))
    ticks = [1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.axvline(1, color="grey", lw=0.8)
    axes.minorticks_off()
    axes.set_title("mlx-lm-lora's step and mlx-lm's rollout over ours", loc="left", fontsize=10)
    axes.set_xlabel("their time / our time (line: wanted, dots: stretch)")


def draw_rates(axes: Any, found: dict[str, Any]) -> None:
    for case, written in found.get("rollouts", {}).items():
        points = {int(what): rates(found, row) for what, row in written.items() if what.isdigit()}
        for side, style in (("ours", "o-"), ("mlx_lm", "x--")):
            values = [rate[side] for rate in points.values()]
            label = WORDS[case] if side == "ours" else None
            axes.plot(list(points), values, style, color=COLOURS[case], label=label)
    title = "Rollouts: ours (lines), batch_generate (dashes)"
    axes.set_title(title, loc="left", fontsize=10)
    logarithmic(axes, "rows", "tokens / s")


def draw_growth(axes: Any, found: dict[str, Any], kind: str) -> None:
    for path, kinds in found.get("growth", {}).items():
        sizes, times = sizes_and_times(kinds[kind])
        label = f"{path}: exponent {exponent(kinds[kind]):.2f}"
        (line,) = axes.plot(sizes, times, "o-", label=label)
        limit = [times[0] * (size / sizes[0]) ** LIMIT for size in sizes]
        axes.plot(sizes, limit, ":", color=line.get_color(), lw=1)
    other = "64 tokens each" if kind == "rows" else "64 rows"
    axes.set_title(f"Our step by {kind}, {other} (dots: {LIMIT})", loc="left", fontsize=10)
    logarithmic(axes, kind, "seconds a step")


def logarithmic(axes: Any, x: str, y: str) -> None:
    """Both axes, with plain numbers: x at what was measured."""
    from matplotlib.ticker import LogLocator, NullLocator

    lines = axes.get_lines()
    if not lines:
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({int(at) for line in lines for at in line.get_xdata()})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
