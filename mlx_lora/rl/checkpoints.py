"""Checkpoints that a run resumes from: adapter, optimizer, step. Whole or absent, never half."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapter import files
from mlx_lora.adapter.schedules import scale_of, set_scale
from mlx_lora.adapter.spline import grids
from mlx_lora.errors import RunError
from mlx_lora.optimizers import copied, overwrite

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
KEPT = 2


@dataclass(frozen=True)
class Snapshot:
    """A state of training kept in memory. Arrays never change, so that holding them is enough."""

    steps_done: int
    weights: Any
    grids: Mapping[str, mx.array]  # of splines
    optimizer: Any
    scale: float

    @classmethod
    def take(cls, steps_done: int, model: nn.Module, optimizer: optim.Optimizer) -> "Snapshot":
        optimizer.init(model.trainable_parameters())  # else the first one would lack its moments
        weights, state = copied(model.trainable_parameters()), copied(optimizer.state)
        return cls(steps_done, weights, grids(model), state, scale_of(model))

    def put_back(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        """Undo whatever was done since, a half-done update too."""
        model.update(self.weights)
        model.update(tree_unflatten(list(self.grids.items())))
        set_scale(model, self.scale)
        overwrite(optimizer.state, self.optimizer)


def save(
    folder: Path,
    steps_done: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    config: Mapping[str, Any],
    memory: Mapping[str, Any] | None = None,
) -> None:
    """Write checkpoints/NNNNNNN after that many steps and drop all but the newest two.

    `memory` is plain data that `recall` gives back.
    """
    final = folder / f"{steps_done:07d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    files.save(model, config, part)
    state = {k: v for k, v in tree_flatten(optimizer.state) if isinstance(v, mx.array)}
    mx.save_safetensors(str(part / OPTIMIZER), state)
    (part / STATE).write_text(json.dumps({"steps_done": steps_done, "memory": dict(memory or {})}))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in every(folder)[:-KEPT]:
        shutil.rmtree(old)


def every(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / STATE).is_file())


def steps_done(folder: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    found = every(folder)
    return int(found[-1].name) if found else 0


def load(checkpoint: Path, model: nn.Module, optimizer: optim.Optimizer) -> int:
    """Put a checkpoint into an attached model and its optimizer. Returns the steps done."""
    try:
        state = mx.load(str(checkpoint / OPTIMIZER))
        steps = json.loads((checkpoint / STATE).read_text())["steps_done"]
        restore(checkpoint, model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"the checkpoint {checkpoint} does not load: {error}") from error
    optimizer.init(model.trainable_parameters())
    optimizer.state = tree_unflatten(list(state.items()))  # type: ignore[union-attr]
    mx.eval(optimizer.state)
    return steps


def recall(checkpoint: Path) -> dict[str, Any]:
    """The `memory` that a checkpoint was saved with."""
    return json.loads((checkpoint / STATE).read_text()).get("memory", {})


def restore(folder: Path, model: nn.Module) -> None:
    """Put a saved adapter, and the scale it was saved with, into a model that has its layers."""
    config, tensors = files.read(folder)
    files.put(model, config, tensors)
    set_scale(model, config["lora_parameters"]["scale"])
    mx.eval(model.parameters())
