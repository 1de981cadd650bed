"""What a loop of training steps leaves behind: metrics, samples, alerts, and the live line."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from rich.markup import escape

from mlx_lora.optimizers import Metrics
from mlx_lora.problems import readable
from mlx_lora.progress import Watcher
from mlx_lora.rl import monitor
from mlx_lora.rl.describe import extremes
from mlx_lora.runlog import METRICS, Clock, RunLog
from mlx_lora.schema import Stage
from mlx_lora.spectral import live, splines
from mlx_lora.spectral.dynamics import FILE as SPECTRA
from mlx_lora.spectral.dynamics import Look, looks_in
from mlx_lora.types import Group

SAMPLES, ALERTS, GRADIENTS = "samples.jsonl", "alerts.jsonl", "gradients.jsonl"
GROUPS_SHOWN = 4  # of which samples.jsonl holds completions, every `monitor.every` steps


class Recorder:
    """Receives each step: metrics.jsonl, samples.jsonl, alerts.jsonl, and the live line."""

    def __init__(self, e: Stage, log: RunLog, clock: Clock) -> None:
        self.e, self.log, self.clock = e, log, clock
        self.watcher: Watcher | None = None
        self.track: Callable[[int, Metrics], None] | None = None  # to the services of report_to
        self.history: list[Metrics] = []
        self.looks: list[Look] = []
        self.seen: set[str] = set()
        self.last = time.perf_counter()

    def remember(self) -> None:
        """Take up the history of a resumed run, so that alerts see what they would have seen."""
        for name, keep in ((METRICS, self.history.append), (ALERTS, self.saw)):
            path = self.log.folder / name
            for line in path.read_text().splitlines() if path.exists() else ():
                keep({k: v for k, v in json.loads(line).items() if v is not None})

        self.looks = looks_in(self.log.folder)

    def saw(self, finding: Mapping[str, Any]) -> None:
        self.seen.add(finding["name"])

    def __call__(self, step: int, metrics: Metrics, groups: Sequence[Group] = ()) -> None:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        tokens = metrics.get("tokens_sampled", metrics.get("tokens_trained", 0))
        metrics |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        self.history.append(metrics)
        with self.clock.measure("log", kind="step"):
            self.log.metric(step, metrics)
            if self.track:
                self.track(step, metrics)
            if step % self.e.monitor.every == 0:
                for record in shown(step, groups):
                    self.log.append(SAMPLES, record)
            for finding in monitor.fresh(self.history, self.seen):
                self.alert(step, asdict(finding))
        if self.watcher:
            self.watcher.update(step, metrics)

    def spectra(self, step: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
        """Every `monitor.spectrum_every` steps a line in spectra.jsonl, and what it warns of."""
        monitor = self.e.monitor
        if not monitor.spectrum_every or (step + 1) % monitor.spectrum_every:
            return
        with self.clock.measure("spectra", kind="step"):
            self.looks.append(live.look_at(step, model, optimizer))
            curves = {n: asdict(s) for n, s in splines.of_model(model).items()}
            more = {"splines": curves} if curves else {}
            self.log.append(SPECTRA, asdict(self.looks[-1]) | more)
            for finding in live.warnings(self.looks, monitor.alerts):
                if finding.name not in self.seen:
                    self.alert(step, asdict(finding))

    def gradients(self, step: int, norms: Mapping[str, float]) -> None:
        """A line in gradients.jsonl: the norm of each module's gradient."""
        self.log.append(GRADIENTS, {"step": step, "norms": norms})

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        """A line in alerts.jsonl and on the terminal."""
        self.saw(finding)
        self.log.append(ALERTS, {"step": step, **finding})
        if self.watcher:
            words = f"[yellow]step {step}: {escape(finding['message'])}.[/] {finding['action']}"
            self.watcher.console.print(words)


def shown(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Of the first groups the best, the worst and one more completion, with what they earned."""
    return [
        {
            "step": step,
            "prompt": readable(group.sample.prompt),
            "pick": pick,
            "completion": group.rollouts[row].text,
            "reward": group.rewards[row].value,
            "reason": group.rewards[row].reason,
            "parts": dict(group.rewards[row].parts),
            "tokens": len(group.rollouts[row].ids),
            "truncated": not group.rollouts[row].finished,
        }
        for number, group in enumerate(groups[:GROUPS_SHOWN])
        for pick, row in extremes(group, step * GROUPS_SHOWN + number).items()
    ]
