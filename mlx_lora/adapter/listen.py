"""What flows into the layers when a model reads text: the calibration pass of the inits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data import Text
from mlx_lora.errors import ModelError
from mlx_lora.models import pad_right

BATCH = 16  # texts that run together
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """Inputs of every site: some rows to compute with, others to measure on. Float32."""

    seen: Rows  # site -> [N, I]
    held: Rows


@contextlib.contextmanager
def listening(
    layers: Mapping[str, Any], take: Callable[[Any, Any], mx.array]
) -> Iterator[dict[str, mx.array]]:
    """Inside, `take(input, output)` of each layer's last call is in the mapping, by its name."""
    heard: dict[str, mx.array] = {}
    kinds = {name: type(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__class__ = listener(name, kinds[name], take, heard)
    try:
        yield heard
    finally:
        for name, layer in layers.items():
            layer.__class__ = kinds[name]


def listener(
    name: str, parent: type, take: Callable[[Any, Any], mx.array], heard: dict[str, mx.array]
) -> type:
    def call(self: Any, x: mx.array, *rest: Any, **more: Any) -> Any:
        found = parent.__call__(self, x, *rest, **more)  # type: ignore[operator]
        heard[name] = take(x, found)
        return found

    return type(parent.__name__, (parent,), {"__call__": call})


def its_input(x: mx.array, found: Any) -> mx.array:
    return x


def its_output(x: mx.array, found: Any) -> mx.array:
    """Blocks may return more than their output, which then comes first."""
    return found[0] if isinstance(found, tuple | list) else found


def inputs(
    model: nn.Module,
    layers: Mapping[str, Any],
    seen: Sequence[Text],
    held: Sequence[Text],
    *,
    rows: int,
) -> Inputs:
    """Up to `rows` inputs of every layer on each of two sets of texts, spread evenly over them.

    Layers that share an input (q, k, v) share its rows in memory. Raises ModelError where an input
    is not finite.
    """
    return Inputs(
        *(layer_inputs(model, layers, texts, max(1, rows // part)) for texts, part in
          ((seen, 1), (held, 4)))
    )  # fmt: skip


def layer_inputs(
    model: nn.Module, layers: Mapping[str, Any], texts: Sequence[Text], rows: int
) -> Rows:
    total = sum(len(t.ids) for t in texts)
    keep = np.zeros(total, bool)
    keep[np.linspace(0, total - 1, min(rows, total)).astype(int)] = True
    parts: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    done = 0
    for start in range(0, len(texts), BATCH):
        block = texts[start : start + BATCH]
        ids, mask = pad_right([t.ids for t in block])
        real = np.array(mask, dtype=bool).reshape(-1)
        chosen = np.flatnonzero(real)[keep[done : done + real.sum()]]
        done += int(real.sum())
        with listening(layers, its_input) as heard:
            mx.eval(model(ids))
        shared: dict[int, np.ndarray] = {}  # by the array's identity: heard keeps them alive
        for name, x in heard.items():
            if id(x) not in shared:
                flat = x.reshape(-1, x.shape[-1])[mx.array(chosen)].astype(mx.float32)
                shared[id(x)] = np.array(flat)
            parts[name].append(shared[id(x)])
    merged: dict[tuple[int, ...], np.ndarray] = {}
    found: Rows = {}
    for name, arrays in parts.items():
        if not arrays:
            continue  # the layer was not called: an expert path that no text took
        key = tuple(map(id, arrays))
        if key not in merged:
            merged[key] = np.concatenate(arrays)
        found[name] = merged[key]
    broken = [name for name, x in found.items() if not np.isfinite(x).all()]
    if broken:
        raise ModelError(
            f"the inputs of {', '.join(broken[:3])} are not finite on the calibration texts",
            "The base itself overflows there: try another precision, or other texts.",
        )
    return found
