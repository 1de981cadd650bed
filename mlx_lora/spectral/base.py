"""Singular values of a frozen weight by its products alone: packed weights stay packed."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import EMBEDDINGS, LINEARS, lora_layers
from mlx_lora.errors import ModelError
from mlx_lora.models import in_dims

SMALL = 1 << 20  # weights: up to here one dense copy (4 MB) costs less than the calls into MLX
MANY = 8  # vectors that a CPU multiplies sooner by chunks of dequantized rows
TURNED = 64  # rows that share a scale where a weight is packed the other way
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
        dense = mx.dequantize(*self.stored(start, stop), **self.settings)
        return dense.astype(mx.float32)

    def stored(self, start: int, stop: int) -> list[Any]:
        """Some rows, packed: weight, scales and biases."""
        found = (self.weight, self.scales, self.biases)
        return [None if part is None else part[start:stop] for part in found]

    def times(self, x: np.ndarray) -> np.ndarray:
        """W x, of a vector [I], or of several [K, I] as [K, O]."""
        return self.product(x, transpose=True)

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """Wᵀ y, of a vector [O], or of several [K, O] as [K, I]."""
        return self.product(y, transpose=False)

    def product(self, x: np.ndarray, *, transpose: bool) -> np.ndarray:
        x = x.astype(np.float32)
        if self.dense_OI is not None:
            return x @ self.dense_OI.T if transpose else x @ self.dense_OI
        if len(np.atleast_2d(x)) >= MANY and mx.default_device() == mx.cpu:
            return self.by_chunks(x, transpose=transpose)
        if transpose and x.ndim == 1 and self.turned:
            found = [
                part.times(x, stream) for part, stream in zip(self.turned, lanes(), strict=False)
            ]
            mx.eval(found)
            return np.sum([np.array(y_O) for y_O in found], axis=0)
        rows_KN, found, start = mx.array(np.atleast_2d(x)), [], 0
        for stream, part in zip(lanes(), self.slices, strict=False):
            stop = start + part[0].shape[0]
            given = rows_KN if transpose else rows_KN[:, start:stop]
            about: dict[str, Any] = {**self.settings, "transpose": transpose, "stream": stream}
            found.append(mx.quantized_matmul(given, *part, **about))
            start = stop
        mx.eval(found)
        ys = [np.array(y) for y in found]
        y = np.concatenate(ys, axis=1) if transpose else np.sum(ys, axis=0)
        return y[0] if x.ndim == 1 else y

    def by_chunks(self, x_KN: np.ndarray, *, transpose: bool) -> np.ndarray:
        """The product of many vectors where quantized products gain nothing from their number."""
        step = max(1, CHUNK // self.shape[1])
        spans = [slice(i, i + step) for i in range(0, self.shape[0], step)]
        parts = ((span, np.array(self.rows(span.start, span.stop))) for span in spans)
        if transpose:
            return np.concatenate([x_KN @ part.T for _, part in parts], axis=1)
        return np.sum([x_KN[:, span] @ part for span, part in parts], axis=0)

    @cached_property
    def slices(self) -> list[list[Any]]:
        """The packed rows in as many parts as there are lanes to work on them."""
        edges = np.linspace(0, self.shape[0], len(lanes()) + 1).astype(int).tolist()
        found = [self.stored(*edge) for edge in pairwise(edges) if edge[0] < edge[1]]
        mx.eval(found)
        return found

    @cached_property
    def turned(self) -> list["Turned"]:
        """A 4-bit weight packed the other way, a part for each lane; none where that gains nothing.

        W x by MLX's kernel for packed rows takes a processor three times as long as Wᵀ y.
        """
        about = self.settings
        usual = about.get("mode") == "affine" and about["bits"] == 4 and not self.shape[0] % TURNED
        if mx.default_device() != mx.cpu or not usual:
            return []
        size = about["group_size"]
        packed_GNW = nibbles_turned(np.array(self.weight)).reshape(-1, size, self.shape[0] // 8)
        scales_GO, biases_GO = np.array(self.scales).T, np.array(self.biases).T
        edges = np.linspace(0, len(packed_GNW), len(lanes()) + 1).astype(int).tolist()
        return [
            Turned.of(packed_GNW, scales_GO, biases_GO, span)
            for span in pairwise(edges)
            if span[0] < span[1]
        ]


@dataclass(frozen=True)
class Turned:
    """Groups of columns of a 4-bit weight: its whole numbers q - 8 packed along O, W = s·q + b."""

    packed_GNW: mx.array  # N columns of a group, 8 rows of the weight in a word
    ones: mx.array  # what packed numbers are multiplied with, and what is added: -8
    eights: mx.array
    scales_GO: mx.array
    shifts_GO: mx.array  # b + 8 s
    columns: slice

    @classmethod
    def of(
        cls, packed_GNW: np.ndarray, scales_GO: np.ndarray, biases_GO: np.ndarray, span: Any
    ) -> "Turned":
        """The groups from span[0] to span[1]."""
        groups, size = slice(*span), packed_GNW.shape[1]
        packed, scales = packed_GNW[groups], scales_GO[groups]
        ones = mx.ones((len(packed), size, scales_GO.shape[1] // TURNED))
        parts = (mx.array(packed), ones, -8 * ones, mx.array(scales))
        found = cls(
            *parts, mx.array(biases_GO[groups] + 8 * scales), slice(span[0] * size, span[1] * size)
        )
        mx.eval(*parts, found.shifts_GO)
        return found

    def times(self, x: np.ndarray, stream: Any) -> mx.array:
        """W x of these columns, [O]."""
        groups, size, _ = self.packed_GNW.shape
        about: dict[str, Any] = {"transpose": False, "group_size": TURNED, "bits": 4}
        with mx.stream(stream):
            x_G1N = mx.array(x[self.columns]).reshape(groups, 1, size)
            packed = (self.packed_GNW, self.ones, self.eights)
            y_GO = mx.quantized_matmul(x_G1N, *packed, **about)[:, 0]
            return (y_GO * self.scales_GO + x_G1N.sum(axis=-1) * self.shifts_GO).sum(axis=0)


def nibbles_turned(words_OW: np.ndarray) -> np.ndarray:
    """4-bit numbers that lie along I, eight in a word, as they lie along O: [I, O / 8]."""
    bytes_OH = np.ascontiguousarray(words_OW).view(np.uint8)
    even, odd = bytes_OH[::2], bytes_OH[1::2]
    found = np.empty((bytes_OH.shape[1], 2, len(even)), np.uint8)
    found[:, 0] = ((even & 15) | (odd << 4)).T
    found[:, 1] = ((even >> 4) | (odd & 240)).T
    return found.reshape(-1, len(even)).view(np.uint32)


class Linear(Protocol):
    """A linear map [O, I] known by its products."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def times(self, x: np.ndarray) -> np.ndarray: ...
    def transposed(self, y: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Updated:
    """W + scale · BA."""

    weight: Matrix
    a_IR: np.ndarray
    b_RO: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def times(self, x: np.ndarray) -> np.ndarray:
        return self.weight.times(x) + self.scale * ((x @ self.a_IR) @ self.b_RO)

    def transposed(self, y: np.ndarray) -> np.ndarray:
        return self.weight.transposed(y) + self.scale * ((y @ self.b_RO.T) @ self.a_IR.T)


@cache
def lanes() -> tuple[Any, ...]:
    """Streams that work at once: one per core of a CPU, else the device's own."""
    if mx.default_device() != mx.cpu:
        return (None,)
    return tuple(mx.new_stream(mx.cpu) for _ in range(os.cpu_count() or 1))


def matrix(layer: nn.Module, expert: int | None = None, *, small: int = SMALL) -> Matrix:
    """The weight of a linear layer, an embedding or one expert.

    Up to `small` weights are held as one dense copy; larger quantized ones are never unpacked.
    """

    def pick(name: str) -> Any:
        value = layer.get(name)
        return value if value is None or expert is None else value[expert]

    weight, scales, biases = pick("weight"), pick("scales"), pick("biases")
    if scales is None:
        return dense(weight)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if layer.mode == "affine":  # in bf16 the product itself would be off by percents
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = Matrix(weight, scales, biases, settings)
    if found.shape[0] * found.shape[1] > small:
        return found
    return replace(found, dense_OI=np.array(found.rows(0, found.shape[0])))


def dense(weight: mx.array) -> Matrix:
    """A weight that is not quantized: NumPy multiplies it, one pass over the memory."""
    wide = weight.astype(mx.float32)  # once, not in every product
    return Matrix(wide, None, None, {}, dense_OI=np.array(wide, copy=False))


def sigma_max(weight: Matrix, *, tolerance: float = 1e-6) -> float:
    """The largest singular value, see `top_triples`."""
    return float(top_singular_values(weight, 1, tolerance=tolerance)[0])


def top_singular_values(weight: "Linear", count: int = 1, *, tolerance: float = 1e-6) -> np.ndarray:
    """The `count` largest singular values, see `top_triples`."""
    return top_triples(weight, count, tolerance=tolerance)[0]


def top_triples(
    weight: "Linear", count: int = 1, *, tolerance: float = 1e-6, max_steps: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest singular values and their left vectors [count, O].

    By Golub-Kahan-Lanczos bidiagonalisation.

    Bases are kept in float64 and fully reorthogonalised; the start vector is fixed, so that the
    answer is. Stops when every wanted Ritz value θ is known to `tolerance` · θ_max: with the
    residual ρ = ‖Wᵀu − θv‖ it is off by at most ρ, and by ρ² over its distance to the next one. It
    has to be so at two looks in a row: what the start vector hardly holds comes late (of 4,000
    random 96 × 64 weights σ_max of one is missed, by 0.2 %). A value that occurs twice is found
    once.
    """
    steps = min(*weight.shape, max_steps)
    count = min(count, *weight.shape)
    u_KO, v_KI = np.empty((steps, weight.shape[0])), np.empty((steps + 1, weight.shape[1]))
    # starting inside the row space makes min(O, I) steps exact
    start = weight.transposed(np.random.default_rng(0).standard_normal(weight.shape[0]))
    alphas, betas = [], []
    norm, v_KI[0] = unit(start.astype(np.float64))
    theta_K, left, done, check_at = np.zeros(0), np.zeros((0, 0)), norm == 0, 4
    known = False
    while not done:
        k = len(alphas)
        alpha, u_KO[k] = unit(orthogonal(weight.times(v_KI[k]), u_KO[:k]))
        beta, v_KI[k + 1] = unit(orthogonal(weight.transposed(u_KO[k]), v_KI[: k + 1]))
        alphas, betas = [*alphas, alpha], [*betas, beta]
        done = len(alphas) == steps or beta == 0
        if done or len(alphas) >= check_at:
            left, theta_K, _ = np.linalg.svd(np.diag(alphas) + np.diag(betas[:-1], 1))
            error_K = errors(theta_K, beta * np.abs(left[-1]))[:count]
            before, known = known, error_K.max() <= tolerance * theta_K[0]
            known = bool(known) and len(theta_K) > count
            done = done or (known and before)
            check_at = len(alphas) + (max(3, k // 8) if known else max(2, k // 16))
    short = max(0, count - len(theta_K))
    u_CO = left[:, :count].T @ u_KO[: len(left)]
    return np.pad(theta_K, (0, short))[:count], np.pad(u_CO, ((0, short), (0, 0)))


def errors(theta_K: np.ndarray, residual_K: np.ndarray) -> np.ndarray:
    """How far Ritz values, descending, may be off: min(ρ, ρ² / distance to the nearest other)."""
    apart = np.abs(np.diff(theta_K, prepend=np.inf, append=-np.inf))
    gap_K = np.maximum(np.minimum(apart[:-1], apart[1:]), np.finfo(float).tiny)
    return np.minimum(residual_K, residual_K**2 / gap_K)


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
