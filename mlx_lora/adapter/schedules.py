"""How the adapter's scale moves in training: functions of a moment giving a share of the scale.

All begin above 0, because at scale 0 no gradient reaches the adapter.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapter.attach import lora_layers
from mlx_lora.blocks import AboveOne, Count, Portion, Positive, Share
from mlx_lora.registry import Table


@dataclass(frozen=True)
class Moment:
    """What a schedule knows when it sets the scale of a step."""

    progress: float  # share of the steps done, in [0, 1)
    step: int
    factor: float | None  # in force at the step before; None at the first step
    kl: float | None  # to the base, nats a token, as measured at the step before; None: was not


schedules: Table[Callable[..., float]] = Table("scale schedule")
NEEDS_KL: set[str] = set()


def needs_kl(schedule: Callable[..., float]) -> Callable[..., float]:
    """Mark a schedule that looks at the KL: the loop then measures it at every step."""
    NEEDS_KL.add(schedule.__name__)
    return schedule


@schedules.add
def constant(moment: Moment) -> float:
    """The configured scale throughout.

    >>> constant(Moment(0.3, 3, 1.0, None))
    1.0
    """
    return 1.0


@schedules.add
def linear(moment: Moment, *, start: Portion = 0.1, until: Share = 0.2) -> float:
    """From `start` times the scale to the whole of it, evenly, over the first `until` of the run.

    >>> [round(linear(Moment(p, 0, None, None)), 2) for p in (0.0, 0.1, 0.2, 0.9)]
    [0.1, 0.55, 1.0, 1.0]
    """
    return start + (1 - start) * min(1.0, moment.progress / until)


@schedules.add
def cosine(moment: Moment, *, start: Portion = 0.1, until: Share = 0.4) -> float:
    """The same along half a cosine: slow at both ends, steepest in the middle.

    >>> [round(cosine(Moment(p, 0, None, None)), 2) for p in (0.0, 0.1, 0.2, 0.4, 0.9)]
    [0.1, 0.23, 0.55, 1.0, 1.0]
    """
    done = min(1.0, moment.progress / until)
    return start + (1 - start) * (1 - math.cos(math.pi * done)) / 2


@schedules.add
def warmup_hold(moment: Moment, *, start: Portion = 0.1, steps: Count = 10) -> float:
    """Evenly from `start` times the scale to the whole of it in `steps` steps, then held there.

    Unlike `linear` it does not depend on the length of the run.

    >>> [round(warmup_hold(Moment(0.5, s, None, None)), 2) for s in (0, 5, 10, 500)]
    [0.1, 0.55, 1.0, 1.0]
    """
    return start + (1 - start) * min(1.0, moment.step / steps)


@schedules.add
@needs_kl
def kl_budget(
    moment: Moment, *, start: Share = 0.1, budget: Positive = 0.005, growth: AboveOne = 1.1
) -> float:
    """Rises towards 1 as long as the KL to the base stays below `budget` times the steps done.

    KL grows about with the square of the scale, so the factor that spends the allowance is
    sqrt(allowed / kl) times the present one; it is met by at most `growth` a step, never fallen
    back from, and kept where no KL was measured.

    >>> kl_budget(Moment(0.0, 0, None, None))
    0.1
    >>> [round(kl_budget(Moment(0.5, 9, 0.5, kl), budget=0.01), 3) for kl in (0.0, 0.09, 0.2, None)]
    [0.55, 0.527, 0.5, 0.5]
    """
    if moment.factor is None:
        return start
    if moment.kl is None:
        return moment.factor
    allowed = budget * (moment.step + 1)
    room = math.sqrt(allowed / moment.kl) if moment.kl > 0 else math.inf
    return min(1.0, moment.factor * max(1.0, min(growth, room)))


def scale_at(
    schedule: Callable[[Moment], float],
    configured: float,
    steps: int,
    step: int,
    before: Mapping[str, float] | None,
) -> float:
    """The scale of a step, from the numbers logged at the step before: the log is all its memory.

    >>> scale_at(linear, 2.0, 10, 1, {"scale": 0.2})
    1.1
    """
    factor = before["scale"] / configured if before else None
    moment = Moment(step / steps, step, factor, (before or {}).get("kl"))
    return configured * schedule(moment)


def set_scale(model: nn.Module, scale: float) -> None:
    """Put one scale in force in every LoRA layer. Saving the adapter records it."""
    for layer in lora_layers(model).values():
        layer.scale = mx.array(scale) if "scale" in layer else scale


def scale_of(model: nn.Module) -> float:
    """The scale in force, the largest where layers differ."""
    return max(float(layer.scale) for layer in lora_layers(model).values())


@contextlib.contextmanager
def scale_as_array(model: nn.Module) -> Iterator[None]:
    """Inside, every scale is an array of the model's state that a compiled step reads anew.

    As a Python number it would be frozen into the step when that is traced. Not trained, not saved.
    """
    layers = list(lora_layers(model).values())
    exact = [float(layer.scale) for layer in layers]
    for layer, scale in zip(layers, exact, strict=True):
        layer.scale = mx.array(scale)
        layer.freeze(keys=["scale"], recurse=False)
    try:
        yield
    finally:
        for layer, before in zip(layers, exact, strict=True):
            layer.unfreeze(keys=["scale"], recurse=False)
            layer.scale = number(layer.scale, before)


def number(scale: mx.array, before: float) -> float:
    """The scale as a Python number: exactly the one from before where it did not move."""
    try:
        after = float(scale)
    except RuntimeError:  # stopped while a step was being traced: it has no value
        return before
    return before if mx.array(before).item() == after else after
