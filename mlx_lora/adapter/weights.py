"""How large the frozen weights are, matrix by matrix: what a relative perturbation is relative to.

A packed matrix is unpacked a few rows at a time, so that no float32 copy of a large one is made.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import ModelError
from mlx_lora.models import dense_weight

CHUNK = 1 << 22  # weights unpacked at a time
SAMPLED = 1 << 20  # weights that quantiles are taken of: whole rows, evenly spread
NORMAL = 1.4826  # of normal weights the standard deviation is this times the median of |w|
CUT = 6.0  # robust sigmas, beyond which a weight is an outlier: one in 5e8 of normal weights
PEAK = 50.0  # max / rms_robust, above which a matrix is said to have outliers


@dataclass(frozen=True)
class WeightStats:
    """Of one frozen matrix, dequantized. |w| is in the weight's own units."""

    shape: tuple[int, ...]
    rms: float
    rms_robust: float  # with every |w| cut at CUT robust sigmas: what perturbations are relative to
    median: float  # of |w|
    p99: float  # of |w|
    max: float  # of |w|
    kurtosis: float | None  # fourth central moment over the squared second: 3 for normal weights
    outlier_ratio: float  # share of weights beyond the cut

    @property
    def peak(self) -> float:
        """How far the largest weight sticks out."""
        return self.max / self.rms_robust if self.rms_robust else 0.0


def statistics(layer: Any) -> WeightStats:
    """Of a linear layer, an embedding or all experts of a layer, packed or not.

    Median and p99 are of at most SAMPLED weights, all else of every weight. ModelError where one is
    not finite.
    """
    shape = tuple(layer.weight.shape[:-1])
    sampled_N = np.abs(spread(layer))
    median, p99 = (float(q) for q in np.quantile(sampled_N, (0.5, 0.99)))
    unit = NORMAL * median or p99 or float(sampled_N.max())  # more than half may be 0
    sums, top, width = np.zeros(6), 0.0, 0
    for part_SI in parts(layer):
        found, part_top, width = moments(part_SI, unit or 1.0)
        sums, top = sums + found, max(top, part_top)
    if not (np.isfinite(sums).all() and math.isfinite(top)):
        raise ModelError("a weight of the base model is not finite", "Is the download complete?")
    count = math.prod(shape) * width
    first, second, third, fourth, cut, beyond = (sums / count).tolist()
    spread2 = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return WeightStats(
        shape=(*shape, width),
        rms=unit * math.sqrt(second),
        rms_robust=unit * math.sqrt(cut),
        median=median,
        p99=p99,
        max=unit * top if unit else top,
        kurtosis=central / spread2**2 if spread2 > 0 else None,
        outlier_ratio=beyond,
    )


def rms_of(layer: Any) -> float:
    """The size of a frozen matrix that its outliers do not move: see WeightStats.rms_robust.

    A plain rms is carried by the few largest weights: one row a hundred times too large in a
    thousand makes it three times what the other rows are. The median alone would call a matrix
    with many zeros, or with heavy tails, smaller than it acts. Cutting at CUT robust sigmas leaves
    normal weights as they are, and bounds what outliers add: a share s of them at most 36 · s.
    """
    return statistics(layer).rms_robust


def moments(part_SI: mx.array, unit: float) -> tuple[np.ndarray, float, int]:
    """Sums over all weights / unit of x, x², x³, x⁴, min(|x|, CUT)², |x| > CUT; max |x|; width."""
    x_SI = part_SI / unit
    size_SI = mx.abs(x_SI)
    square_SI = mx.square(x_SI)
    terms = (
        x_SI,
        square_SI,
        square_SI * x_SI,
        mx.square(square_SI),
        mx.square(mx.minimum(size_SI, CUT)),
        (size_SI > CUT).astype(mx.float32),
    )
    rows_KS = mx.stack([term.sum(axis=-1) for term in terms])
    top = size_SI.max()
    mx.eval(rows_KS, top)
    return np.array(rows_KS).sum(axis=1, dtype=np.float64), float(top), part_SI.shape[-1]


def parts(layer: Any) -> Iterator[mx.array]:
    """The dequantized weight, some rows [S, I] at a time; experts one after the other."""
    many = layer.weight.ndim == 3
    rows = layer.weight.shape[-2]
    step = max(1, CHUNK // (layer.weight.shape[-1] * per_word(layer)))
    for expert in range(layer.weight.shape[0] if many else 1):
        for begin in range(0, rows, step):
            some = slice(begin, begin + step)
            yield dense_weight(layer, (expert, some) if many else some)


def spread(layer: Any) -> np.ndarray:
    """At most SAMPLED of the dequantized weights: every so-many-th row."""
    many = layer.weight.ndim == 3
    rows = math.prod(layer.weight.shape[:-1])
    wanted = min(rows, max(1, SAMPLED // (layer.weight.shape[-1] * per_word(layer))))
    at = [i * rows // wanted for i in range(wanted)]
    if not many:
        return np.array(dense_weight(layer, mx.array(at))).ravel()
    inside = layer.weight.shape[1]
    experts, places = mx.array([i // inside for i in at]), mx.array([i % inside for i in at])
    return np.array(dense_weight(layer, (experts, places))).ravel()


def per_word(layer: Any) -> int:
    """Weights in an entry of the stored matrix, at most."""
    return 32 // layer.bits if "scales" in layer else 1


def adapted(model: nn.Module) -> dict[str, Any]:
    """The frozen layer under each adapter, by name, in the model's order."""
    layers = lora_layers(model).items()
    return {name: m.embedding if "embedding" in m else m.linear for name, m in layers}


def analyse(model: nn.Module) -> dict[str, WeightStats]:
    """The statistics of every matrix that carries an adapter."""
    return {name: statistics(layer) for name, layer in adapted(model).items()}
