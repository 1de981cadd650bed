"""A look at the spectra of the adapter in training, and what the looks so far warn of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_lora.spectral.alerts import alerts
from mlx_lora.spectral.dynamics import Look, look
from mlx_lora.spectral.metrics import LoRAReport
from mlx_lora.spectral.read import of_model
from mlx_lora.spectral.spectrum import FACTORS, as_numpy
from mlx_lora.spectral.structure import structure
from mlx_lora.types import Finding

WATCHED = ("collapsed_early", "saturated")  # alerts that need nothing but the looks
MEANS = {optim.Adam: "m", optim.AdamW: "m", optim.Lion: "m", optim.SGD: "v", optim.Muon: "v"}


def look_at(step: int, model: nn.Module, optimizer: optim.Optimizer) -> Look:
    return look(step, of_model(model), gradient_means(optimizer))


def gradient_means(optimizer: optim.Optimizer) -> dict[str, Any]:
    """What the optimizer remembers of the gradients, by `module.factor`; some remember nothing."""
    key = MEANS.get(type(optimizer))
    found = {}
    for path, value in tree_flatten(optimizer.state):
        name, _, kind = path.rpartition(".")
        if kind == key and name.rpartition(".")[2] in FACTORS:
            found[name] = as_numpy(value)
    return found


def warnings(
    looks: Sequence[Look], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Finding]:
    """One finding an alert; the first module with the count of the others."""
    report = LoRAReport({}, structure({}, None), looks=looks)
    found = []
    for name in WATCHED:
        some = alerts.bind(name, (options or {}).get(name, {}))(report)
        if some:
            more = f" (and {len(some) - 1} more modules)" if len(some) > 1 else ""
            where = f"{some[0].module}: " if some[0].module else ""
            found.append(replace(some[0], message=f"{where}{some[0].message}{more}"))
    return found
