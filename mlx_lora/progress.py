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
    "tokens_per_second": "{:,.0f} tok/s",
}
PLAIN_EVERY = 10  # steps between lines when stderr is no terminal


def console(*, quiet: bool = False) -> Console:
    """Everything for people goes to stderr, so that stdout stays the command's result."""
    return Console(stderr=True, quiet=quiet, highlight=False)


class Watcher:
    """Shows the steps of one loop. `update` takes the step's metrics."""

    def __init__(self, console: Console, progress: Progress | None, total: int) -> None:
        self.console, self.progress, self.total = console, progress, total
        self.bar = progress.add_task("", total=total, line="") if progress else None
        self.last: dict[str, float] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:  # nothing learnt: what was measured earlier holds no more
            self.last = {}
        self.last |= {k: metrics[k] for k in FORMATS if k in metrics}
        text = live_line(self.last)
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=step + 1, line=text)
        elif step % PLAIN_EVERY == PLAIN_EVERY - 1 or step + 1 == self.total:
            self.console.print(f"  step {step + 1}/{self.total}  {text}")


def live_line(metrics: Mapping[str, float]) -> str:
    """
    >>> live_line({"reward": 0.5, "tokens_per_second": 1234.5})
    'reward 0.50  1,234 tok/s'
    """
    shown = [(k, FORMATS[k].format(metrics[k])) for k in FORMATS if k in metrics]
    return "  ".join(v if k == "tokens_per_second" else f"{k} {v}" for k, v in shown)


@contextlib.contextmanager
def watch(console: Console, title: str, total: int) -> Iterator[Watcher]:
    """A progress bar with a live line, or a line every few steps without a terminal."""
    if not console.is_terminal:
        console.print(title)
        yield Watcher(console, None, total)
        return
    columns = (
        TextColumn(title),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Watcher(console, progress, total)
