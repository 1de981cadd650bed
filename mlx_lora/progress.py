"""What a person sees while it runs: a bar with a live line, on stderr; plain lines elsewhere."""

import contextlib
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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

    def __init__(self, console: Console, progress: Progress | None, total: int, every: int) -> None:
        self.console, self.progress, self.total, self.every = console, progress, total, every
        self.bar = progress.add_task("", total=total, line="") if progress else None
        self.last: dict[str, float] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:  # nothing learnt: what was measured earlier holds no more
            self.last = {}
        hidden = "loss" if "reward" in metrics else ""  # near 0 on-policy: it says little
        self.last |= {k: metrics[k] for k in FORMATS if k in metrics and k != hidden}
        text = live_line(self.last)
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=step + 1, line=text)
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            self.console.print(f"  step {step + 1}/{self.total}  {text}")


def live_line(metrics: Mapping[str, float]) -> str:
    """
    >>> live_line({"reward": 0.5, "tokens_per_second": 1234.5})
    'reward 0.50  1,234 tok/s'
    """
    shown = [(k, FORMATS[k].format(metrics[k])) for k in FORMATS if k in metrics]
    return "  ".join(v if k == "tokens_per_second" else f"{k} {v}" for k, v in shown)


@contextlib.contextmanager
def watch(console: Console, title: str, total: int, every: int = 10) -> Iterator[Watcher]:
    """A progress bar with a live line; without a terminal, a line `every` few steps."""
    if not console.is_terminal:
        console.print(title)
        yield Watcher(console, None, total, every)
        return
    columns = (
        TextColumn(title),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Watcher(console, progress, total, every)
