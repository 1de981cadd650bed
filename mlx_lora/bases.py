"""What an adapter remembers of its base, and by what the base is known again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.tensors import CONFIG, place_of
from mlx_lora.errors import AdapterError
from mlx_lora.models import DEMO, DEMO_QUANTIZATION, Loaded, dense_weight, read_json

SKETCHED, SKETCH_ROWS, SKETCH_SUMS = 8, 16, 4
SAME_BASE = 0.7  # correlation of two sketches: above 0.95 across bits, about 0 for another model


def identity(loaded: Loaded) -> dict[str, Any]:
    """What an adapter records about its base."""
    quantization = loaded.config.get("quantization")
    return {
        "model": loaded.name,
        "model_type": loaded.config.get("model_type"),
        "quantization": {
            k: quantization[k] for k in ("bits", "group_size", "mode") if k in quantization
        }
        if quantization
        else None,
        "sketch": sketch(loaded.model),
    }


def config_of(folder: Path) -> dict[str, Any]:
    """The config of an adapter's folder or file; nothing where it is not readable."""
    try:
        config = read_json(place_of(folder)[0] / CONFIG)
    except (OSError, ValueError):
        return {}  # whoever loads the adapter says what is wrong with it
    return config if isinstance(config, dict) else {}


def recorded(folder: Path) -> dict[str, Any]:
    """What an adapter says of its base; nothing where it says nothing readable."""
    about = config_of(folder).get("base")
    return about if isinstance(about, dict) else {}


def compare(about: Mapping[str, Any], model: Loaded | nn.Module) -> tuple[list[str], list[str]]:
    """Why a model is not the recorded base, and in what it is another form of it; often neither.

    A bare module has no config: it is known by its weights alone.
    """
    found: dict[str, Any] = (
        identity(model) if isinstance(model, Loaded) else {"sketch": sketch(model)}
    )
    told = ("model_type", "quantization", "sketch")
    known = {k: about[k] for k in told if k in about and k in found}
    problems, notices = [], []
    if known.get("model_type") not in (None, found.get("model_type")):
        problems.append(f"the base is a {known['model_type']}, this is a {found['model_type']}")
    sketched = known.get("sketch")
    if sketched and not same_base(sketched, found["sketch"]):
        problems.append("the base's weights are others (their sketches do not correlate)")
    elif "quantization" in known and known["quantization"] != found["quantization"]:
        notices.append(
            f"the adapter was trained on {form(known['quantization'])} weights, and these are "
            f"{form(found['quantization'])}: it meets other weights than it learned on"
        )
    elif sketched and sketched != found["sketch"]:
        notices.append("the base's weights differ in their last digits from those it learned on")
    return problems, notices


def rebuilt(loaded: Loaded, adapter: Path | None) -> list[str]:
    """A sentence where an unquantized model was quantized because an adapter's base had been."""
    asked = recorded(adapter).get("quantization") if adapter else None
    usual = loaded.name == DEMO and asked == DEMO_QUANTIZATION
    if not asked or not loaded.quantized_here or usual:
        return []
    return [
        f"{loaded.name} is unquantized, and was quantized on load to {form(asked)}, on which the "
        "adapter learned"
    ]


def refuse_other(
    adapter: Path,
    about: Mapping[str, Any],
    model: Loaded | nn.Module,
    *,
    rebased: bool = False,
    misfits: Sequence[str] = (),
) -> list[str]:
    """What to know of the base. AdapterError lists every reason why the adapter is not for it.

    `rebased`: the adapter's init wrote weights of its own under it. `misfits` are reasons found
    elsewhere.
    """
    problems, notices = compare(about, model)
    if rebased and notices:
        problems.append("its init wrote weights of its own under it: give that run's base folder")
    problems += misfits
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        name = model.name if isinstance(model, Loaded) else "this model"
        hint = f"It was trained on {about['model']}." if about.get("model") else ""
        raise AdapterError(
            f"the adapter {adapter} does not belong to {name}:\n{lines}",
            f"{hint} Name its base with --model.".strip(),
        )
    return notices


def form(quantization: Mapping[str, Any] | None) -> str:
    """
    >>> form({"bits": 4, "group_size": 64, "mode": "affine"}), form(None)
    ('4-bit affine (groups of 64)', 'unquantized')
    """
    if quantization is None:
        return "unquantized"
    mode, group = quantization.get("mode", "affine"), quantization.get("group_size")
    return f"{quantization.get('bits')}-bit {mode} (groups of {group})"


def sketch(model: nn.Module) -> list[float]:
    """Some numbers by which a base is known again at any quantization, without an adapter on it.

    Of a few layers, a few random signed sums over some rows, in units of what chance gives.
    """
    names = {name.removesuffix(".linear"): m for name, m in model.named_modules() if is_matrix(m)}
    chosen = [sorted(names)[i * len(names) // SKETCHED] for i in range(SKETCHED)] if names else []
    found: list[float] = []
    for index, name in enumerate(chosen):
        w = np.array(dense_weight(names[name], slice(SKETCH_ROWS)), np.float64)
        signs = np.random.default_rng(index).choice([-1.0, 1.0], (SKETCH_SUMS, *w.shape))
        sums = (signs * w).sum(axis=(1, 2)) / max(float(np.linalg.norm(w)), 1e-30)
        found += [round(float(x), 4) for x in sums]
    return found


def is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def same_base(recorded: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two sketches are of one base, at whatever quantization."""
    if len(recorded) != len(found) or not found:
        return False
    return float(np.corrcoef(recorded, found)[0, 1]) > SAME_BASE
