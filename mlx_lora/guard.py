"""The check while training: every so many steps, is the model still sound? And if not: what then.

Between checks nothing is computed. One look is one forward pass of a few of the check's texts.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_lora import distributed
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.check.gates import gates
from mlx_lora.check.metrics import is_finite, perplexity
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import surprise
from mlx_lora.check.sides import Side
from mlx_lora.prepare import Prepared
from mlx_lora.recorder import Recorder
from mlx_lora.rl.checkpoints import Snapshot
from mlx_lora.schema import Stage
from mlx_lora.types import Finding

TEXTS = 8  # read at a look: the shortest that are known to be good
LOOKED_AT = ("structure", "reading", "uncertainty")
NAME = "unhealthy"
ROLLBACKS = 3  # in a stage; the next one stops it


def plain_texts(probes: Probes) -> Probes:
    """The shortest texts that are known to be good."""
    return Probes(sorted(probes.texts, key=lambda text: len(text[0]))[:TEXTS], [])


class Unhealthy(Exception):
    """The model failed the check in training, and the policy was to stop."""


class Guard:
    """Looks at the model in training and keeps the last state that was healthy."""

    def __init__(self, e: Stage, prepared: Prepared, recorder: Recorder) -> None:
        self.e, self.recorder, self.loaded = e, recorder, prepared.loaded
        self.limits = prepared.asked.limits
        self.probes = plain_texts(prepared.probes)
        self.healthy: Snapshot | None = None
        self.rollbacks = 0
        self.quiet_until = 0
        if e.monitor.check_every:
            base = surprise(Side(self.loaded, off=True), self.probes)
            self.base = replace(
                prepared.report.measured,
                perplexity_base=perplexity(base["nll"]),
                entropy_base=base["entropy"],
                off_restores_base=True,
            )

    def due(self, steps_done: int) -> bool:
        """At every `monitor.check_every` steps, and where a checkpoint is written."""
        every = self.e.monitor.check_every
        return bool(every) and (steps_done % every == 0 or steps_done % self.e.save_every == 0)

    def start(self, state: Snapshot) -> None:
        """The state that a rollback goes back to until a look finds a healthier one."""
        self.healthy = state

    def memory(self) -> dict[str, int]:
        """What a resumed run has to know."""
        return {"quiet_until": self.quiet_until, "rollbacks": self.rollbacks}

    def recall(self, memory: Mapping[str, int]) -> None:
        self.quiet_until = memory.get("quiet_until", 0)
        self.rollbacks = memory.get("rollbacks", 0)

    def after(self, steps_done: int, model: nn.Module, optimizer: optim.Optimizer) -> Snapshot:
        """The state to go on from after a step: as it is, or the last healthy one.

        Raises Unhealthy when the policy is to stop, or after too many rollbacks.
        """
        now = Snapshot.take(steps_done, model, optimizer)
        if not self.due(steps_done):
            return now
        with self.recorder.clock.measure("check in training", kind="step"):
            failed = distributed.agreed(self.failures())
        if not failed:
            self.healthy = now
            return now
        policy = self.e.monitor.policy
        if steps_done >= self.quiet_until:
            self.say(steps_done, "; ".join(failed), policy)
            self.quiet_until = steps_done + self.e.monitor.cooldown
        if policy == "warn":
            return now
        assert self.healthy is not None
        self.healthy.put_back(model, optimizer)
        self.rollbacks += 1
        if policy == "stop" or self.rollbacks > ROLLBACKS:
            after = f" for the {self.rollbacks}th time" if self.rollbacks > 1 else ""
            raise Unhealthy(
                f"the model failed the check at step {steps_done}{after}: {failed[0]}; "
                f"the adapter is that of step {self.healthy.steps_done}"
            )
        return replace(self.healthy, steps_done=steps_done)

    def failures(self) -> list[str]:
        """What the gates of a trained adapter fail, in words."""
        layers = lora_layers(self.loaded.model)
        now = surprise(Side(self.loaded), self.probes)
        ratio = perplexity(now["nll"]) / self.base.perplexity_base
        change = now["entropy"] / self.base.entropy_base if self.base.entropy_base else 1.0
        point = {"perplexity_ratio": (ratio, ratio), "entropy_ratio": (change, change)}
        measured = replace(
            self.base,
            perplexity_adapted=perplexity(now["nll"]),
            entropy_adapted=now["entropy"],
            intervals={**self.base.intervals, **point},
            non_finite=[n for n, m in layers.items() if not is_finite(m)],
            zeroed=[],
            dropout=0.0,
        )
        bound = [gates.bind(name, self.limits.get(name, {})) for name in LOOKED_AT]
        said = [gate(measured, "healthy", None) for gate in bound]
        return [g.sentence for g in said if g is not None and g.verdict == "fail"]

    def say(self, steps_done: int, message: str, policy: str) -> None:
        """An alert on the run: in alerts.jsonl and on the terminal."""
        done = {
            "warn": "Training goes on.",
            "stop": "Training stops at the last healthy step.",
            "rollback": "The adapter goes back to the last healthy step, and training goes on.",
        }
        found = Finding(NAME, "", message, f"{done[policy]} Lower the learning rate.")
        self.recorder.alert(steps_done - 1, asdict(found))
