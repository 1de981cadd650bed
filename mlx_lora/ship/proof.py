"""The corruption check between what was trained and what goes out, written beside it."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_lora.check import gate
from mlx_lora.check.gate import Report
from mlx_lora.check.probes import read
from mlx_lora.check.sides import Side
from mlx_lora.models import Loaded
from mlx_lora.runlog import RunLog
from mlx_lora.ship.switch import Layers, wearing

CHECK = "check.json"


@dataclass(frozen=True)
class Wearing(Side):
    """The model with these LoRA layers as one side of the comparison."""

    layers: Layers = field(default_factory=dict)

    @contextlib.contextmanager
    def entered(self) -> Iterator[nn.Module]:
        with wearing(self.model, self.layers):
            yield self.model


def prove_adapter(
    loaded: Loaded, trained: Layers, shipped: Sequence[Layers], *, seed: int = 0
) -> Report:
    """Is the model with each of the shipped layers the one with the trained? One model in memory.

    The report is of those that differ most.
    """
    reports = []
    for layers in shipped:
        with wearing(loaded.model, layers):
            reports.append(prove(Wearing(loaded, layers=trained), Side(loaded), seed=seed))
    return max(
        reports,
        key=lambda r: (differs(r), not r.measured.bitwise_identical, r.measured.kl_mean),
    )


def prove_model(loaded: Loaded, shipped: Loaded, *, seed: int = 0) -> Report:
    """Is a fused model the one with its adapter on?"""
    return prove(Side(loaded), Side(shipped), seed=seed)


def prove(trained: Side, shipped: Side, *, seed: int) -> Report:
    probes = read(trained.loaded)
    begin = time.perf_counter()
    return gate.judged(trained, shipped, probes, None, "same", None, begin, seed)


def differs(report: Report) -> bool:
    """Whether a copy of an adapter is none. Another format rounds nothing: any divergence tells."""
    divergence = [gate.verdict for gate in report.gates if gate.name == "divergence"]
    return report.verdict == "fail" or divergence != ["pass"]


def write(report: Report, folder: Path) -> None:
    RunLog(folder).write_json(CHECK, report.to_json())


def summary(report: Report) -> dict[str, Any]:
    """What a result says of the check; the whole of it is in check.json."""
    measured = report.measured
    return {
        "verdict": report.verdict,
        "reasons": list(report.reasons),
        "bitwise_identical": measured.bitwise_identical,
        "kl_mean": measured.kl_mean,
        "top1_agreement": measured.top1_agreement,
    }
