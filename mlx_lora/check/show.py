"""The check's report for a person: verdict, gates, samples side by side."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_lora.check.gate import Report

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
SHOWN = 4


def print_report(report: Report) -> None:
    """Gates, then samples, then the verdict last, where the eye ends up."""
    console = Console(highlight=False)
    console.print(gate_table(report))
    console.print(sample_table(report))
    colour = COLOURS[report.verdict]
    body = "\n".join(report.reasons)
    title = f"[bold {colour}]{report.verdict}[/]  expected: {report.expect}, {report.seconds:.1f} s"
    console.print(Panel(Text(body), title=title, title_align="left", border_style=colour))


def gate_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for gate in report.gates:
        mark = Text(gate.verdict, style=COLOURS[gate.verdict])
        table.add_row(mark, gate.name, Text(gate.sentence))
    return table


def sample_table(report: Report) -> Table:
    """The model's text is untrusted: shown as plain text, markup and control characters inert."""
    table = Table(box=box.SIMPLE_HEAD, title="samples, same random numbers", title_justify="left")
    for heading in ("prompt", "base", "with adapter"):
        table.add_column(heading, ratio=1, overflow="fold")
    for pair in report.measured.samples[:SHOWN]:
        table.add_row(*(plain(x) for x in (pair.prompt, pair.base, pair.adapted)))
    return table


def plain(text: str, limit: int = 300) -> Text:
    """Text with control characters made visible, so that no output can drive the terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit]))
