"""Singular values of a frozen weight by its products alone: packed weights stay packed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import EMBEDDINGS, LINEARS, lora_layers
from mlx_lora.errors import ModelError
from mlx_lora.models import in_dims

SMALL = 1 << 20  # weights: up to here one dense copy (4 MB) costs less than the calls into MLX
CHUNK = 1 << 22  # weights dequantized at a time for the Frobenius norm


@dataclass(frozen=True)
class Matrix:
    """A frozen weight [O, I], quantized or not, as what it does to vectors, in float32."""

    weight: mx.array
    scales: mx.array | None  # None: not quantized
    biases: mx.array | None
    settings: Mapping[str, Any]  # group_size, bits, mode
    dense_OI: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        out_dims, width = self.weight.shape
        return out_dims, width if self.scales is None else width * 32 // self.settings["bits"]

    def rows(self, start: int, stop: int) -> mx.array:
        """Some rows, dequantized."""
        if self.scales is None:
            return self.weight[start:stop].astype(mx.float32)
        cut = slice(start, stop)
        biases = None if self.biases is None else self.biases[cut]
        dense = mx.dequantize(self.weight[cut], self.scales[cut], biases, **self.settings)
        return dense.astype(mx.float32)

    def times(self, x_I: np.ndarray) -> np.ndarray:
        """W x."""
        return self.product(x_I, transpose=True)

    def transposed(self, y_O: np.ndarray) -> np.ndarray:
        """Wᵀ y."""
        return self.product(y_O, transpose=False)

    def product(self, x: np.ndarray, *, transpose: bool) -> np.ndarray:
        x = x.astype(np.float32)
        if self.dense_OI is not None:
            return self.dense_OI @ x if transpose else x @ self.dense_OI
        row = mx.array(x)[None]
        if self.scales is None:
            y = row @ (self.weight.T if transpose else self.weight)
        else:
            stored = (self.weight, self.scales, self.biases)
            y = mx.quantized_matmul(row, *stored, transpose=transpose, **self.settings)
        return np.array(y[0])


def matrix(layer: nn.Module, expert: int | None = None, *, small: int = SMALL) -> Matrix:
    """The weight of a linear layer, an embedding or one expert.

    Up to `small` weights are held as one dense copy; larger quantized ones are never unpacked.
    """

    def pick(name: str) -> Any:
        value = layer.get(name)
        return value if value is None or expert is None else value[expert]

    weight, scales, biases = pick("weight"), pick("scales"), pick("biases")
    settings = {}
    if scales is None:
        weight = weight.astype(mx.float32)  # once, not in every product
    else:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        if layer.mode == "affine":  # in bf16 the product itself would be off by percents
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = Matrix(weight, scales, biases, settings)
    if found.shape[0] * found.shape[1] > small:
        return found
    return replace(found, dense_OI=np.array(found.rows(0, found.shape[0])))


def sigma_max(weight: Matrix, *, tolerance: float = 1e-6) -> float:
    """The largest singular value, to a relative residual of `tolerance`."""
    return float(top_singular_values(weight, 1, tolerance=tolerance)[0])


def top_singular_values(
    weight: Matrix, count: int = 1, *, tolerance: float = 1e-6, max_steps: int = 1000
) -> np.ndarray:
    """The `count` largest singular values by Golub-Kahan-Lanczos bidiagonalisation.

    Bases are kept in float64 and fully reorthogonalised. Stops when every wanted Ritz triple has
    ‖Wᵀu − θv‖ <= tolerance · θ_max, which bounds the relative error of each θ; the start vector is
    fixed, so that the answer is. A value that occurs twice is found once.
    """
    steps = min(*weight.shape, max_steps)
    count = min(count, *weight.shape)
    u_KO, v_KI = np.empty((steps, weight.shape[0])), np.empty((steps + 1, weight.shape[1]))
    # starting inside the row space makes min(O, I) steps exact
    start = weight.transposed(np.random.default_rng(0).standard_normal(weight.shape[0]))
    alphas, betas = [], []
    norm, v_KI[0] = unit(start.astype(np.float64))
    theta_K, done, check_at = np.zeros(count), norm == 0, 4
    while not done:
        k = len(alphas)
        alpha, u_KO[k] = unit(orthogonal(weight.times(v_KI[k]), u_KO[:k]))
        beta, v_KI[k + 1] = unit(orthogonal(weight.transposed(u_KO[k]), v_KI[: k + 1]))
        alphas, betas = [*alphas, alpha], [*betas, beta]
        done = len(alphas) == steps or beta == 0
        if done or len(alphas) >= check_at:
            check_at = len(alphas) + max(4, k // 8)
            left, theta_K, _ = np.linalg.svd(np.diag(alphas) + np.diag(betas[:-1], 1))
            residual = beta * np.abs(left[-1, :count]).max()
            done = done or (len(theta_K) >= count and residual <= tolerance * theta_K[0])
    return np.pad(theta_K, (0, max(0, count - len(theta_K))))[:count]


def orthogonal(x: np.ndarray, basis_KN: np.ndarray) -> np.ndarray:
    """x without its part in the basis; twice, since once loses half the digits."""
    x = x.astype(np.float64)
    for _ in range(2):
        x = x - basis_KN.T @ (basis_KN @ x)
    return x


def unit(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Length and direction. ModelError for a weight with NaN or infinity in it."""
    norm = float(np.linalg.norm(x))
    if not math.isfinite(norm):
        raise ModelError("a weight of the base model is not finite", "Is the download complete?")
    return norm, x / norm if norm else x


def frobenius(weight: Matrix) -> float:
    """‖W‖_F, a few rows at a time."""
    step = max(1, CHUNK // weight.shape[1])
    total = 0.0
    for start in range(0, weight.shape[0], step):
        part_S = mx.square(weight.rows(start, start + step)).sum(axis=1)
        total += float(np.array(part_S).sum(dtype=np.float64))  # MLX's sum of all is naive on a CPU
    return math.sqrt(total)


def frozen_layers(model: nn.Module) -> dict[str, Any]:
    """Every layer that can carry an adapter, by name, without the adapter it may carry."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (*LINEARS, *EMBEDDINGS))}
    for name, layer in lora_layers(model).items():
        layers[name] = layer.embedding if "embedding" in layer else layer.linear
    return layers


def misfit(layer: Any, shape_OI: tuple[int, int], expert: int | None) -> str:
    """Why an adapter of this shape cannot sit on this layer; empty when it can."""
    width = in_dims(layer)
    *experts, rows = layer.weight.shape[:-1]
    if (expert is None) != (not experts) or (expert or 0) >= (experts or [1])[0]:
        return f"the base has {experts[0] if experts else 'no'} experts here"
    held = (width, rows) if isinstance(layer, EMBEDDINGS) else (rows, width)
    return "" if held == shape_OI else f"the adapter is for {shape_OI}, the base is {held}"
