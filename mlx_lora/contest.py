"""Which step's adapter did best on held-out problems, kept in training; and when to stop.

Everything is a function of evals.jsonl, so that a resumed run decides as an uninterrupted one.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import distributed
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.tensors import digest
from mlx_lora.runlog import Clock, RunLog
from mlx_lora.schema import Stage

EVALS, BEST = "evals.jsonl", "best"
Measured = dict[str, Any]
HIGHER = {"accuracy": 1, "reward_mean": 1, "valid_loss": -1}  # sign of what is better
WORST = (-math.inf, -math.inf)


class Remembered:
    """An evaluation of a model that is not made twice of one adapter: of two it is the last."""

    def __init__(self, exam: Callable[[], Measured], model: nn.Module) -> None:
        self.exam, self.model = exam, model
        self.adapter = ""
        self.found: Measured = {}

    def __call__(self) -> Measured:
        factors = dict(tree_flatten(self.model.trainable_parameters()))
        scales = {n: mx.array([layer.scale]) for n, layer in lora_layers(self.model).items()}
        adapter = digest(factors | {f"{name}.scale": scale for name, scale in scales.items()})
        if adapter != self.adapter:
            self.adapter, self.found = adapter, self.exam()
        return self.found


class Contest:
    """Measures every so many steps, keeps the best adapter, says when patience is over.

    `exam` evaluates the model on held-out problems, None where the stage has no task: then the
    validation loss of SFT decides, wherever it was measured. `keep` saves the adapter.
    """

    def __init__(
        self,
        e: Stage,
        exam: Callable[[], Measured] | None,
        keep: Callable[[], None],
        log: RunLog,
        clock: Clock,
    ) -> None:
        self.e, self.exam, self.keep, self.log, self.clock = e, exam, keep, log, clock
        file = log.folder / EVALS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows: list[Measured] = [json.loads(line) for line in lines]

    def after(self, steps_done: int, metrics: Mapping[str, float]) -> bool:
        """Measure if it is time, keep the adapter if it is the best. True: stop here."""
        found = self.measured(steps_done, metrics)
        if found is None:
            return False
        row = {"step": steps_done - 1, **found}
        first = score(row) > max(map(score, self.rows), default=WORST)
        self.rows.append(row)
        if first:
            self.keep()
        self.log.append(EVALS, row | {"best": first})
        return self.over()

    def measured(self, steps_done: int, metrics: Mapping[str, float]) -> Measured | None:
        """The numbers of an evaluation that is due now."""
        every = self.e.eval.every
        if self.exam is not None and every:
            if steps_done % every and steps_done != self.e.iters:
                return None
            with self.clock.measure("evaluate", kind="step"):
                found = self.exam()
            return {k: v for k, v in found.items() if isinstance(v, int | float) or v is None}
        loss = metrics.get("valid_loss")
        return None if loss is None else {"valid_loss": loss}

    def over(self) -> bool:
        """True when the best one is more evaluations ago than patience allows."""
        patience = self.e.eval.patience
        waits = bool(patience) and len(self.rows) > patience
        return distributed.agreed(waits and len(self.rows) - 1 - self.best_at() >= patience)

    def best_at(self) -> int:
        """Index of the best row, the first of equals."""
        return max(range(len(self.rows)), key=lambda i: (score(self.rows[i]), -i))

    def summary(self) -> Measured:
        """What the run's summary says: the best step and its number. Empty where none counts."""
        best = self.rows[self.best_at()] if self.rows else {}
        name = decides(best)
        if name is None:
            return {}
        return {"best": {"step": best["step"], "metric": name, "value": best[name]}}


def score(row: Mapping[str, Any]) -> tuple[float, float]:
    """What decides: accuracy, else the mean reward, else the validation loss; of equals the reward.

    A number that is not finite, null in evals.jsonl, is no number: a row without any is the worst.

    >>> score({"accuracy": 0.5, "reward_mean": 0.7}), score({"valid_loss": 2.0})
    ((0.5, 0.7), (-2.0, 0.0))
    >>> score({"valid_loss": None}) == score({"valid_loss": float("nan")}) < score({"accuracy": 0})
    True
    """
    name = decides(row)
    if name is None:
        return WORST
    reward = row["reward_mean"] if counts(row.get("reward_mean")) else 0.0
    return HIGHER[name] * float(row[name]), float(reward)


def decides(row: Mapping[str, Any]) -> str | None:
    return next((name for name in HIGHER if counts(row.get(name))), None)


def counts(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
