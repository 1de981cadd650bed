"""Checkpoints that a run resumes from: adapter, optimizer, step. Whole or absent, never half."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapter import files
from mlx_lora.errors import RunError

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
KEPT = 2


def save(
    folder: Path,
    steps_done: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    config: Mapping[str, Any],
) -> None:
    """Write checkpoints/NNNNNNN after that many steps and drop all but the newest two."""
    final = folder / f"{steps_done:07d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    files.save(model, config, part)
    state = {k: v for k, v in tree_flatten(optimizer.state) if isinstance(v, mx.array)}
    mx.save_safetensors(str(part / OPTIMIZER), state)
    (part / STATE).write_text(json.dumps({"steps_done": steps_done}))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in every(folder)[:-KEPT]:
        shutil.rmtree(old)


def every(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / STATE).is_file())


def latest(folder: Path) -> Path:
    found = every(folder)
    if not found:
        raise RunError(
            f"there is no checkpoint in {folder} to resume from",
            "Runs write one every `save_every` steps; start this one again in a new folder.",
        )
    return found[-1]


def load(checkpoint: Path, model: nn.Module, optimizer: optim.Optimizer) -> int:
    """Put a checkpoint into an attached model and its optimizer. Returns the steps done."""
    try:
        _, tensors = files.read(checkpoint)
        state = mx.load(str(checkpoint / OPTIMIZER))
        steps = json.loads((checkpoint / STATE).read_text())["steps_done"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"the checkpoint {checkpoint} does not load: {error}") from error
    model.load_weights(list(tensors.items()), strict=False)
    optimizer.init(model.trainable_parameters())
    optimizer.state = tree_unflatten(list(state.items()))  # type: ignore[union-attr]
    mx.eval(model.parameters(), optimizer.state)
    return steps
