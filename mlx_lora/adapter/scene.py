"""What an init may look at: the attached model, its sites, calibration texts, full precision."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import tasks
from mlx_lora.data import Row, Text, read, rows_of
from mlx_lora.errors import AdapterError, ConfigError, near
from mlx_lora.models import Loaded
from mlx_lora.types import Site

TASK_TEXTS = 128  # training problems with their gold completions, where a task is the data
HELD_OUT = 4  # every fourth text is kept to measure on


@dataclass(frozen=True)
class Scene:
    """The model carries its LoRA layers already, all with B = 0, so that it computes its base."""

    model: nn.Module
    sites: Sequence[Site]
    seed: int
    loaded: Loaded | None = None  # None: attached to a bare model, without tokenizer or folder
    rows: Sequence[Row] | None = None  # calibration rows where an init is given none

    def texts(self, data: str | None, who: str) -> tuple[list[Text], list[Text]]:
        """Calibration texts, and others to measure on. AdapterError where there are none."""
        if self.loaded is None:
            raise AdapterError(
                f"{who} looks at data, and a bare model has no tokenizer",
                "Give what models.load() returned in place of its .model.",
            )
        found, source = numbered_rows(data, self.rows, who)
        texts = read(self.loaded, found, source)
        held = texts[HELD_OUT - 1 :: HELD_OUT] or texts
        return [t for i, t in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1], held

    def layer(self, site: Site) -> Any:
        """The LoRA layer at a site."""
        return self.layers[site.name]

    @cached_property
    def layers(self) -> Mapping[str, Any]:
        modules = dict(self.model.named_modules())
        return {s.name: modules[s.name] for s in self.sites}


def numbered_rows(
    data: str | None, rows: Sequence[Row] | None, who: str
) -> tuple[list[tuple[int, Row]], str]:
    """Rows of a file or of a task, else those given, and what to call them in messages.

    Needs no model, so that a command can judge its data before it loads one.
    """
    if data is None:
        if not rows:
            raise ConfigError(
                f"the init {who} looks at data, and there is none",
                "Give -o data=FILE.jsonl or a task, like -o data=countdown.",
            )
        return list(enumerate(rows, start=1)), "the calibration data"
    if Path(data).suffix in (".jsonl", ".txt"):
        found = rows_of(Path(data))
        if not found:
            raise ConfigError(f"{data} is empty: there is no text in it")
        return found, data
    if data in tasks.names():
        return list(enumerate(task_rows(tasks.load_task(data)), start=1)), f"task {data}"
    raise ConfigError(
        f"data={data}: neither a .jsonl or .txt file nor a task", near(data, tasks.names())
    )


def task_rows(task: Any, count: int = TASK_TEXTS) -> list[Row]:
    """Training problems with the completions that earn the full reward."""
    samples = task.load("train", count, 0)
    return [{"prompt": s.prompt, "completion": s.gold} for s in samples]


def module_key(seed: int, name: str) -> mx.array:
    """A random key per (seed, module), the same on every machine and in any order of modules."""
    return mx.random.key(module_seed(seed, name))


def module_seed(seed: int, name: str) -> int:
    """The same as a whole number of 64 bits."""
    digest = hashlib.blake2s(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, name: str) -> np.random.Generator:
    """NumPy's random numbers for a module."""
    return np.random.default_rng(module_seed(seed, name))


def factor(x: np.ndarray) -> mx.array:
    """A factor as the layer holds it, in float32."""
    return mx.array(np.ascontiguousarray(x, dtype=np.float32))


WeightOf = Callable[[Site], np.ndarray]


def full_precision(scene: Scene, given: str | None, who: str) -> WeightOf:
    """Weights [O, I] of the unquantized model in float32, read from disk one at a time.

    `given` names the model; None means the folder of a model that we quantized on load.
    """
    from mlx_lora import models

    if given is None and (scene.loaded is None or not scene.loaded.quantized_here):
        raise AdapterError(
            f"{who} compares with the unquantized model, which is not known here",
            "Give it: -o full_precision=MODEL (a folder or hub id), or quantize on load.",
        )
    layers = models.lazy_layers(given or str(scene.loaded.folder))  # type: ignore[union-attr]
    problems = [s.name for s in scene.sites if s.name not in layers or "scales" in layers[s.name]]
    if problems:
        raise AdapterError(
            f"{given or 'the model'} has no full-precision weight for {', '.join(problems[:3])}",
            f"{who} needs the model that this one was quantized from.",
        )

    def weight(site: Site) -> np.ndarray:
        w = layers[site.name].weight
        if w.shape != (site.out_dims, site.in_dims):
            raise AdapterError(
                f"{site.name} is {w.shape} in full precision and "
                f"{(site.out_dims, site.in_dims)} here: another model?"
            )
        dense = np.array(w.astype(mx.float32))
        layers[site.name].weight = mx.zeros((1, 1))  # read once; the next one may be large
        return dense

    return weight
