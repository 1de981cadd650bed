"""Results for a person. Each function prints one finished thing; nothing here computes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_lora.bases import recorded
from mlx_lora.report.answers import Share, gained
from mlx_lora.runlog import TIMES, gathered, in_words

PROMPTS = {"countdown": "Numbers: 7 23 25. Target: 41."}  # to try a task with

PLANNED = {  # keys of a plan that need more words
    "tried": "a step was tried",
    "peak_memory_mb": "memory of that step mb",
    "memory_peak_mb": "memory foretold in all mb",
    "memory_machine_mb": "memory of this machine mb",
}


def out() -> Console:
    return Console(highlight=False)


def interval(result: Mapping[str, Any], key: str) -> str:
    if result[key] is None:  # the task gives rewards, not right or wrong
        mean = result.get(key.replace("accuracy", "reward_mean"))
        return "" if mean is None else f"mean reward {mean:.4g}"
    return f"{result[key]:.1%} ({result[f'{key}_low']:.1%} to {result[f'{key}_high']:.1%})"


def print_summary(summary: Mapping[str, Any]) -> None:
    """The end of a run: where it lies, what was gained, how to go on, in this order."""
    console, folder = out(), Path(summary["run_dir"])
    trained = "check" in summary
    if trained:
        print_contents(folder, summary["seconds"])
    if "accuracy_before" in summary:
        console.print()
        console.print(accuracies(summary))
    if "valid_loss" in summary:
        before, after = summary.get("valid_loss_before"), summary["valid_loss"]
        begun = "" if before is None else f"{before:.4g} before training, "
        console.print(f"Held-out loss: {begun}{after:.4g} nats per token after it.")
    if "test_loss" in summary:
        loss, perplexity = summary["test_loss"], summary["test_perplexity"]
        console.print(f"Test loss: {loss:.4g} nats per token, perplexity {perplexity:.4g}.")
    if not trained:
        console.print(f"{summary['seconds']:.0f} s. Also in {folder}.", markup=False)
        return
    before, after = (Share.of(summary, f"accuracy_{when}") for when in ("before", "after"))
    worse = False
    if before and after:
        found = gained(before, after)
        worse = found.verdict == "worse"
        console.print(f"{found.sentence}. {found.detail}.")
    alerts = ", ".join(summary["alerts"]) or "none"
    modules = ", ".join(f"{name} in {n}" for name, n in summary["adapter_alerts"].items())
    console.print(
        f"Check before training: {summary['check']['verdict']}. Alerts during it: {alerts}. "
        f"On modules of the adapter: {modules or 'none'}."
    )
    if summary["alerts"] or modules:
        console.print("What each alert asks for is in report.html.")
    print_next(summary, folder, ship=not worse)


def print_contents(folder: Path, seconds: float) -> None:
    """Where the time went, and the files of a run folder that a person opens."""
    console = out()
    if (folder / TIMES).exists():
        console.print(times(json.loads((folder / TIMES).read_text(encoding="utf-8"))))
    console.print(f"{seconds:.0f} s. Everything is in {folder}:", markup=False, soft_wrap=True)
    contents = {
        "report.html": "all of it on one page, for a browser",
        "adapters/": "the adapter, in mlx-lm's format",
        "adapters/best/": "that of the best evaluation",
        "base/": "the quantized base that it belongs to",
        "stages/": "each stage: metrics, samples, its adapter",
        "metrics.jsonl": "every step",
        "training.png": "  as a picture",
        "evals.jsonl": "evaluations on the way",
        "samples.jsonl": "what the model wrote on the way",
        "spectrum.json": "what the adapter is, and in pictures:",
        "singular_values.png": "  how many directions it uses",
        "effective_rank.png": "  the rank it uses, by block and layer",
        "dominance.png": "  how loud it is against the base",
        "dynamics.png": "  how these moved while it trained",
        "splines.png": "  how its curves bend the update",
        "time_breakdown.png": "where the time went",
        "weights.png": "how large the frozen matrices are",
    }
    for name, text in contents.items():
        if (folder / name).exists():
            console.print(f"  {name:22}{text}")


def print_next(summary: Mapping[str, Any], folder: Path, *, ship: bool) -> None:
    """Commands to go on with: prove the adapter, ship it unless it got worse, use it."""
    base, adapter, gguf = (quote(str(folder / name)) for name in ("base", "adapters", "gguf"))
    model = quote(recorded(folder / "adapters").get("model", "MODEL"))
    commands = {"Did it change the model, and is that sound": (
        f"mlx-lora check {model} --adapter {adapter} --expect changed"
    )}  # fmt: skip
    if ship and not (folder / "splines.png").exists():  # of splines only we know
        commands["Write it for llama.cpp"] = f"mlx-lora export {adapter} --to gguf --out {gguf}"
        if (folder / "base").exists():
            prompt = PROMPTS.get(summary.get("task") or "", "...")
            commands["Use it with stock mlx-lm"] = (
                f'mlx_lm generate --model {base} --adapter-path {adapter} --prompt "{prompt}"'
            )
    for what, command in commands.items():
        out().print(f"{what}:\n  {command}", soft_wrap=True, markup=False)


def times(breakdown: Mapping[str, Any]) -> Table:
    """Where the time went, longest first, with its share; what is small in one row of each kind."""
    total = breakdown["total"]
    parts = f", in {breakdown['parts']} parts" if breakdown["parts"] > 1 else ""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"where {in_words(total)} went{parts}", title_justify="left"
    )
    for heading in ("", "", "time", "share", "passes"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in gathered(breakdown):
        kind = {"once": "once", "step": "per step"}.get(row["kind"], "")
        share = f"{row['seconds'] / total:.1%}"
        passes = f"{row['count']:,}" if row["count"] else ""
        table.add_row(row["name"], kind, in_words(row["seconds"]), share, passes)
    return table


def accuracies(summary: Mapping[str, Any]) -> Table:
    """Before, after each of several stages, and after."""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{summary['task']}, held-out problems", title_justify="left"
    )
    for heading in ("", "greedy (95 % interval)", "sampled"):
        table.add_column(heading)
    rows = [("before", summary, "accuracy_before")]
    rows += [(f"after {s['name']}", s, "accuracy") for s in summary.get("stages", ())[:-1]]
    for name, result, key in (*rows, ("after", summary, "accuracy_after")):
        sampled = result[f"{key}_sampled"]
        table.add_row(name, interval(result, key), "" if sampled is None else f"{sampled:.1%}")
    return table


def print_evaluation(result: Mapping[str, Any]) -> None:
    console, about = out(), f"of {result['n']} held-out problems"
    if result["accuracy"] is None:
        console.print(f"{result['task']}: mean reward {result['reward_mean']:.4g} {about}, greedy")
    else:
        passed = {k: v for k, v in result["pass_at"].items() if k != "1"}
        more = "".join(f", pass@{k} {v:.1%}" for k, v in passed.items())
        sampled = f"{result['accuracy_sampled']:.1%}{more}"
        greedy = f"{interval(result, 'accuracy')} {about}, greedy"
        console.print(f"{result['task']}: {greedy}; sampled at temperature 1: {sampled}")
    table = Table(box=box.SIMPLE, show_header=False)
    for reason, count in result["reasons"].items():
        table.add_row(escape(reason), str(count))
    console.print(table)


def print_shrunk(found: Mapping[str, Any]) -> None:
    console, check = out(), found["check"]
    before, after = found["parameters_before"], found["parameters_after"]
    console.print(
        f"Rank {found['rank_before']} to {found['rank_after']}: {before:,} to {after:,} parameters "
        f"({after / before:.0%}), KL to the adapter as it was {found['kl_mean']:.2g} nats a token"
    )
    console.print(f"Check: {check['verdict']}  {escape('; '.join(check['reasons']))}")
    for notice in found["notices"]:
        console.print(f"Note: {escape(notice)}.")
    if found["out"]:
        sizes = f"{found['bytes_before']:,} to {found['bytes_after']:,} bytes"
        console.print(f"{sizes}: {escape(found['out'])}", soft_wrap=True)
    else:
        console.print("Nothing was written: choose a larger share or a smaller budget.")


def print_listing(found: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    console = out()
    for kind, entries in found.items():
        table = Table(box=box.SIMPLE_HEAD, title=kind, title_justify="left", show_header=False)
        for entry in entries:
            table.add_row(entry["name"], entry["about"], entry.get("note", ""))
        console.print(table)


def print_doctor(findings: Mapping[str, Any]) -> None:
    console = out()
    table = Table(box=box.SIMPLE, show_header=False)
    for key, value in findings["environment"].items():
        parts = isinstance(value, Mapping)
        said = ", ".join(f"{k} {v}" for k, v in value.items()) if parts else str(value)
        table.add_row(key, escape(said))
    console.print(table)
    for test in findings["tests"]:
        mark = "[green]PASS[/] " if test["ok"] else "[red]FAIL[/] "
        console.print(f"  {mark}{test['name']}: {test['detail']}")
        if test["action"]:
            console.print(f"       {test['action']}")
    for sentence in findings["advice"]:
        console.print(f"  [yellow]Note:[/] {sentence}")
    failed = sum(not test["ok"] for test in findings["tests"])
    console.print(
        f"{failed} of {len(findings['tests'])} tests failed: do not train here yet."
        if failed
        else "This machine is sound. Next: mlx-lora demo"
    )


def print_plan(found: Mapping[str, Any]) -> None:
    """One table, and one more for each of several stages; last what it comes to."""
    stages = found.get("stages", ())
    titled = [("plan", {k: v for k, v in found.items() if k != "stages"})]
    titled += [(f"stage {number}", stage) for number, stage in enumerate(stages, start=1)]
    for title, part in titled:
        table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left")
        for key, value in part.items():
            if value == []:
                continue
            about = PLANNED.get(key, key.replace("_", " "))
            table.add_row(about, cell(value))
        out().print(table)
    out().print(verdict(found))


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    return escape("\n".join(value) if isinstance(value, list) else str(value))


def verdict(plan: Mapping[str, Any]) -> str:
    """How long it takes, whether it fits, and what to do.

    >>> verdict({"minutes": 1.3, "memory_fits": True})
    '1.3 minutes without check and evaluations; it fits in memory. Run it without --dry-run.'
    """
    parts = plan.get("stages") or [plan]
    if "minutes" in plan:
        said = [f"{plan['minutes']:,} minutes without check and evaluations"]
    else:
        said = ["No step was tried, so that its time is not known"]
    fits = [part["memory_fits"] for part in parts if "memory_fits" in part]
    advised = any(part.get("memory_advice") for part in parts)
    if advised or not all(fits):
        return f"{said[0]}; it may not fit in memory: see memory advice."
    return f"{said[0]}{'; it fits in memory' if fits else ''}. Run it without --dry-run."
