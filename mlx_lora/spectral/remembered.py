"""σ_max and ‖W‖_F of a base's weights: measured once, then kept in the user's cache folder."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.bases import sketch
from mlx_lora.runlog import atomically
from mlx_lora.spectral.base import SMALL, Matrix, frobenius, sigma_max

SAMPLED = 64  # rows of a weight that tell it from another


def cache_folder() -> Path:
    """Where programs keep what they can make again: XDG_CACHE_HOME, or the system's place."""
    home = Path.home()
    system = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or system) / "mlx_lora" / "bases"


class Sizes:
    """(σ_max, ‖W‖_F) of the weights of one base, by module.

    The file's name is a hash of the base's sketch. An entry counts only for a weight whose sampled
    rows are those it was measured on. Small weights are quicker measured than looked up.
    """

    def __init__(self, model: nn.Module) -> None:
        key = hashlib.blake2b(json.dumps(sketch(model)).encode(), digest_size=16).hexdigest()
        self.file = cache_folder() / f"{key}.json"
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # absent or torn: it is made again
            self.known = json.loads(self.file.read_text(encoding="utf-8"))
        self.new = False

    def of(self, name: str, weight: Matrix) -> tuple[float, float]:
        if weight.shape[0] * weight.shape[1] <= SMALL:
            return sigma_max(weight), frobenius(weight)
        entry, sample = self.known.get(name), sampled(weight)
        if not isinstance(entry, dict) or entry.get("sample") != sample:
            entry = {"sigma_max": sigma_max(weight), "frobenius": frobenius(weight)}
            self.known[name], self.new = entry | {"sample": sample}, True
        return entry["sigma_max"], entry["frobenius"]

    def keep(self) -> None:
        """Write what was measured. A cache that cannot be written costs time, nothing else."""
        if not self.new:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomically(self.file) as part:
                part.write_text(json.dumps(self.known), encoding="utf-8")


def sampled(weight: Matrix) -> str:
    """A hash of shape, quantization and some rows, as they are stored."""
    found = hashlib.blake2b(f"{weight.shape} {sorted(weight.settings.items())}".encode())
    rows = max(1, weight.shape[0] // SAMPLED)
    for part in (weight.weight, weight.scales, weight.biases):
        if part is not None:
            found.update(np.array(part[::rows]).tobytes())
    return found.hexdigest()[:32]
