"""What a person sees while it runs: a bar with a live line, on stderr; plain lines elsewhere."""

import contextlib
import math
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

WIDTHS = {"bar": 24, "bar, narrow": 8, "time": 7, "gaps": 4}  # of the line, in cells
NARROW = 110  # below it the bar is short
FORMATS = {
    "reward": "{:.2f}",
    "accuracy": "{:.0%}",
    "kl": "{:.3f}",
    "entropy": "{:.2f}",
    "loss": "{:.3f}",
    "valid_loss": "{:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
}


def console(*, quiet: bool = False) -> Console:
    """Everything for people goes to stderr, so that stdout stays the command's result."""
    return Console(stderr=True, quiet=quiet, highlight=False)


class Watcher:
    """Shows the steps of one loop. `update` takes the step's metrics."""

    def __init__(
        self, console: Console, progress: Progress | None, total: int, every: int, taken: int = 0
    ) -> None:
        self.console, self.progress, self.total, self.every = console, progress, total, every
        self.taken = taken  # cells of the line that are not the metrics'
        self.bar = progress.add_task("", total=total, line="") if progress else None
        self.last: dict[str, float] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:  # nothing learnt: what was measured earlier holds no more
            self.last = {}
        hidden = "loss" if "reward" in metrics else ""  # near 0 on-policy: it says little
        self.last |= {k: metrics[k] for k in FORMATS if k in metrics and k != hidden}
        if self.progress is not None and self.bar is not None:
            line = live_line(self.last, self.console.width - self.taken)
            self.progress.update(self.bar, completed=step + 1, line=line)
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            self.console.print(f"  step {step + 1}/{self.total}  {live_line(self.last)}")


def live_line(metrics: Mapping[str, float], room: float = math.inf) -> str:
    """The metrics in the order of FORMATS, as many as fit in `room` cells.

    >>> live_line({"reward": 0.5, "tokens_per_second": 1234.5})
    'reward 0.50  1,234 tok/s'
    >>> live_line({"reward": 0.5, "tokens_per_second": 1234.5}, 20)
    'reward 0.50'
    """
    shown = [(k, FORMATS[k].format(metrics[k])) for k in FORMATS if k in metrics]
    parts = [v if k == "tokens_per_second" else f"{k} {v}" for k, v in shown]
    while parts and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


@contextlib.contextmanager
def watch(console: Console, title: str, total: int, every: int = 10) -> Iterator[Watcher]:
    """A progress bar with a live line; without a terminal, a line `every` few steps."""
    if not console.is_terminal:
        console.print(title)
        yield Watcher(console, None, total, every)
        return
    bar = WIDTHS["bar" if console.width >= NARROW else "bar, narrow"]
    count = 2 * len(str(total)) + 1
    taken = Text.from_markup(title).cell_len + bar + count + WIDTHS["time"] + WIDTHS["gaps"]
    columns = (
        TextColumn(title),
        BarColumn(bar_width=bar),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Watcher(console, progress, total, every, taken)
