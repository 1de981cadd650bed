"""The check's report for a person: verdict, gates, samples side by side."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_lora.check.certificate import ANYWHERE, HERE, NAME
from mlx_lora.check.gate import Report
from mlx_lora.problems import readable

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
SHOWN = 4
RESULTS = {
    "valid": f"{NAME} is valid: everything is as recorded, logits included.",
    "invalid": f"{NAME} is invalid: what differs is not what was certified.",
    "other_environment": (
        f"{NAME} holds as far as it can be compared: files, texts and verdict are as recorded. "
        "Logits were not compared, for the environment is another one."
    ),
}


def print_report(report: Report) -> None:
    """Gates, then samples, then the verdict last, where the eye ends up."""
    console = Console(highlight=False)
    console.print(gate_table(report))
    console.print(sample_table(report))
    if not report.measured.chat_template:
        console.print("The tokenizer has no chat template: prompts were given as plain text.")
    if report.layers:
        moved = [f"{layer['block']}: {layer['drift']:.3g}" for layer in report.layers]
        console.print(f"how far each block's output moved   {'   '.join(moved)}", soft_wrap=True)
    if report.init_measured:
        console.print(measured_table(report.init_measured))
    colour = COLOURS[report.verdict]
    body = "\n".join(report.reasons)
    title = f"[bold {colour}]{report.verdict}[/]  expected: {report.expect}, {report.seconds:.1f} s"
    console.print(Panel(Text(body), title=title, title_align="left", border_style=colour))
    for sentence in sentences(report.certificate) if report.certificate else ():
        console.print(sentence, markup=False, soft_wrap=True)


def gate_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for gate in report.gates:
        mark = Text(gate.verdict, style=COLOURS[gate.verdict])
        table.add_row(mark, gate.name, Text(gate.sentence))
    return table


def measured_table(measured: Mapping[str, float]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title="the init measured")
    for name, value in measured.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    return table


def sample_table(report: Report) -> Table:
    """The model's text is untrusted: shown as plain text, markup and control characters inert."""
    table = Table(box=box.SIMPLE_HEAD, title="samples, same random numbers", title_justify="left")
    for heading in ("prompt", *report.sides):
        table.add_column(plain(heading), ratio=1, overflow="fold")
    for pair in report.measured.samples[:SHOWN]:
        table.add_row(*(plain(x) for x in (readable(pair.prompt), pair.base, pair.adapted)))
    return table


def plain(text: str, limit: int = 300) -> Text:
    """Text with control characters made visible, so that no output can drive the terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit]))


def sentences(certificate: Mapping[str, Any]) -> list[str]:
    """One for every item that was compared, and what they come to."""
    if "sentence" in certificate:
        return [certificate["sentence"]]
    words = {**ANYWHERE, **HERE}
    lines = [
        f"{words[row['item']]}: "
        + ("as recorded" if row["equal"] else f"recorded {row['recorded']}, found {row['found']}")
        for row in certificate["compared"]
    ]
    lines += [
        f"environment, {row['item']}: recorded {row['recorded']}, found {row['found']}"
        for row in certificate["environment_differences"]
    ]
    return [*lines, RESULTS[certificate["status"]]]
