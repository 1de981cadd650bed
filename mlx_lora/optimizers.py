"""What every loop of gradient steps shares: the optimizer, its learning rate, when to give up."""

import json
from collections.abc import Sequence
from inspect import signature
from typing import Any, get_type_hints

import mlx.optimizers as optim
from mlx.utils import tree_map
from pydantic import TypeAdapter, ValidationError

from mlx_lora.errors import ConfigError, near
from mlx_lora.schema import Stage

Metrics = dict[str, float]
BAD_STEPS = 3  # non-finite updates in a row before a run stops
CLASSES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}


class Diverged(Exception):
    """Loss, gradient or policy stayed non-finite. The weights are those of the last good step."""


def optimizer_of(e: Stage) -> optim.Optimizer:
    settings = dict(e.optimizer_config.get(e.optimizer, {}))
    return getattr(optim, CLASSES[e.optimizer])(learning_rate=e.learning_rate, **settings)


def check_optimizer(e: Stage) -> None:
    """ConfigError, all at once, where options are not those of the optimizer in use."""
    optimizer = getattr(optim, CLASSES[e.optimizer])
    known = get_type_hints(optimizer.__init__)
    known.pop("learning_rate")
    given, problems = e.optimizer_config.get(e.optimizer, {}), []
    for key, value in given.items():
        if key not in known:
            problems.append(f"{e.optimizer} has no option {key}. {near(key, known)}")
            continue
        try:  # as JSON: a list stands for a tuple, and no text for a number
            TypeAdapter(known[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            found = error.errors()[0]["msg"].replace("Input should", "should")
            problems.append(f"{e.optimizer}: {key} {found}, got {value!r:.60}")
    if not problems:
        try:
            optimizer_of(e)
        except ValueError as error:
            problems.append(f"{e.optimizer}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def check_schedule(e: Stage) -> None:
    """ConfigError where a schedule of the learning rate has too few or too many arguments."""
    if e.lr_schedule is None:
        return
    wanted = signature(getattr(optim.schedulers, e.lr_schedule.name))
    try:
        wanted.bind(*e.lr_schedule.arguments)
    except TypeError as error:
        shown = ", ".join(str(p).replace(": float", "").replace(": int", "") for p in
                          wanted.parameters.values())  # fmt: skip
        raise ConfigError(
            f"{e.lr_schedule.name} takes [{shown}], got {e.lr_schedule.arguments}"
        ) from error


def learning_rate(e: Stage, step: int) -> float:
    """mlx-lm's schedule where one is given; else constant in SFT and linear to zero in RL."""
    if e.lr_schedule is not None:
        from mlx_lm.tuner.utils import build_schedule

        return float(build_schedule(dict(e.lr_schedule))(step))
    return e.learning_rate * (1 - step / e.iters) if e.is_rl else e.learning_rate


def copied(tree: Any) -> Any:
    """New containers with the same arrays, which never change."""
    return tree_map(lambda leaf: leaf, tree)


def overwrite(tree: Any, values: Any) -> None:
    """Put the leaves of `values` into a tree of the same shape, whose containers stay the same.

    A compiled step holds on to the containers.
    """
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        if isinstance(tree[key], dict | list):
            overwrite(tree[key], values[key])
        else:
            tree[key] = values[key]


class Patience:
    """Counts updates in a row that were dropped because they were not finite."""

    def __init__(self, e: Stage, history: Sequence[Metrics] = ()) -> None:
        self.rate, self.bad = e.learning_rate, 0
        for metrics in history:  # of a resumed run
            self.count(metrics)

    def count(self, metrics: Metrics) -> None:
        if "update_taken" in metrics:
            self.bad = 0 if metrics["update_taken"] else self.bad + 1

    def saw(self, step: int, metrics: Metrics) -> None:
        """Take note of a step, if it made an update. Raises Diverged at the third bad one."""
        self.count(metrics)
        if self.bad == BAD_STEPS:
            raise Diverged(
                f"{BAD_STEPS} updates in a row had a loss, gradient or policy that is not finite, "
                f"the last at step {step}; the learning rate was {self.rate:g}"
            )
