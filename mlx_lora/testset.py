"""`train: false` with `test: true`, as in mlx-lm: the loss on the test set, and no training."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mlx_lora.adapter import files
from mlx_lora.lessons import lessons_of
from mlx_lora.prepare import load
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from mlx_lora.sources import sources_of
from mlx_lora.stages import tested

MLX_LM_FOLDER = "adapters"  # its adapter_path unless given


def adapter_of(e: Stage) -> Path | None:
    """The adapter to test: adapter_path, by default `adapters` as in mlx-lm; empty is the base."""
    name = MLX_LM_FOLDER if e.adapter_path is None else e.adapter_path
    return files.folder_of(name) if name else None


def measured_alone(e: Stage, clock: Clock, console: Console) -> dict[str, Any]:
    """What the summary of a run that only tests says."""
    adapter = adapter_of(e)
    with clock.measure("load model"):
        loaded = load(e)
        if adapter:
            files.load(loaded.model, adapter)
        loaded.model.eval()
    made = lessons_of(loaded, sources_of(e)["test"], e)
    for note in made.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}.")
    with clock.measure("test"):
        found = tested(loaded, made.texts, e)
    return {"adapter": str(adapter) if adapter else None, **found}
