"""Many perturbed adapters in one forward: each row of a batch is computed by a member of its own.

The frozen layer meets all rows in one product, as does the factor that all members share; only the
perturbed factor is a batched product, a member a matrix. Nothing is ever written into the adapter.

Noise is a function of (seed, generation, direction, module) alone, from a hash, so that every
machine makes the same and nobody has to keep or send it. Antithetic members 2k and 2k + 1 take one
direction with both signs, in one factor: the update scale · A B is linear in each.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora import cpu, cpu_spline
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.spline import SplineLoRALinear
from mlx_lora.adapter.weights import rms_of
from mlx_lora.caches import Sit, company
from mlx_lora.cpu_layers import SILENT, rows, times, view, with_bias
from mlx_lora.cpu_math import Beside
from mlx_lora.errors import AdapterError
from mlx_lora.models import split_head

Kind = Literal["rademacher", "uniform"]
Factor = Literal["lora_a", "lora_b"]


@dataclass(frozen=True)
class Noise:
    """The directions of one generation, of mean 0 and variance 1."""

    seed: int
    generation: int
    factor: Factor = "lora_b"
    kind: Kind = "rademacher"
    antithetic: bool = True

    def of(self, members: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Direction and sign of each of these members."""
        if not self.antithetic:
            return list(members), np.ones(len(members), np.float32)
        signs = np.array([1 - 2 * (m % 2) for m in members], np.float32)
        return [m // 2 for m in members], signs

    def drawn(self, name: str, directions: Sequence[int], shape: tuple[int, ...]) -> mx.array:
        """One module's directions [K, *shape], float32."""
        key = f"es/{self.seed}/{self.generation}/{self.factor}/{name}"
        draw = {"rademacher": rademacher, "uniform": uniform}[self.kind]
        drawn = [draw(f"{key}/{k}", math.prod(shape)).reshape(shape) for k in directions]
        return mx.array(np.stack(drawn))


def rademacher(key: str, count: int) -> np.ndarray:
    """[count] numbers, 1 or -1, one bit of the key's hash each."""
    digest = hashlib.shake_128(key.encode()).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=count)
    return 1 - 2 * bits.astype(np.float32)


def uniform(key: str, count: int) -> np.ndarray:
    """[count] numbers in ±sqrt(3), 16 bits of the key's hash each."""
    digest = hashlib.shake_128(key.encode()).digest(2 * count)
    odd = 2 * np.frombuffer(digest, "<u2").astype(np.float32) - (2**16 - 1)
    return odd * np.float32(math.sqrt(3) / 2**16)


def perturbed(master: mx.array, noise_K: mx.array, sizes_K: mx.array) -> mx.array:
    """[K, *shape] of members: the master plus each one's direction, so long (negative: against)."""
    return master + sizes_K.reshape(-1, *[1] * master.ndim) * noise_K


def sigma_of(layer: Any, factor: Factor, perturb_scale: float) -> float:
    """The noise that moves scale · A B by perturb_scale · rms(W), the weight's outliers cut.

    rms(A · noise) = sigma · ||A|| / sqrt(d_in), likewise for B: 0 where the other factor is 0.
    """
    other = layer.lora_a if factor == "lora_b" else layer.lora_b.T
    lever = abs(float(layer.scale)) * float(mx.linalg.norm(other)) / math.sqrt(other.shape[0])
    return perturb_scale * size_of(layer) / lever if lever else 0.0


def remember_sizes(model: nn.Module, sizes: Mapping[str, float]) -> None:
    """Keep sizes of frozen weights, by module, that somebody has measured already."""
    for name, layer in lora_layers(model).items():
        layer.__dict__["_size"] = sizes[name]


def size_of(layer: Any) -> float:
    """The size of the frozen weight under a LoRA layer, outliers cut. Remembered there."""
    if "_size" not in layer.__dict__:
        layer.__dict__["_size"] = rms_of(layer.linear)
    return layer.__dict__["_size"]


def refuse_unfit(model: nn.Module) -> None:
    """AdapterError that lists the adapted layers which have no population form."""
    kinds = {
        "LoRASwitchLinear": "mixture-of-experts layer",
        "LoRAEmbedding": "embedding",
        "LeanDoRALinear": "DoRA layer",
        "DoRALinear": "DoRA layer",
    }
    misfits = [
        f"  {name} ({kinds.get(type(m).__name__, type(m).__name__)})"
        for name, m in lora_layers(model).items()
        if not isinstance(m, LoRALinear)
    ]
    if misfits:
        more = [f"  ... {len(misfits)} in all"] if len(misfits) > 8 else []
        raise AdapterError(
            "method es perturbs plain LoRA on linear layers; these are of another kind\n"
            + "\n".join(misfits[:8] + more),
            "Leave them out of lora_parameters.keys, use fine_tune_type lora, or method grpo.",
        )


def grow(model: nn.Module, gain: float) -> None:
    """Multiply every A by so much. Harmless while B is zero."""
    for layer in lora_layers(model).values():
        layer.lora_a = gain * layer.lora_a


@dataclass(frozen=True)
class Seating:
    """Rows [B] in groups of equal size, one group a matrix."""

    rows: int
    groups: int
    moves: "Moves | None" = None  # None: the rows lie so already


@dataclass(frozen=True)
class Moves:
    """How rows come to their seats and back."""

    row_at: np.ndarray  # [groups · seats], of an empty seat any
    seat_of: np.ndarray  # [B]

    @cached_property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return mx.array(self.row_at), mx.array(self.seat_of)


def seated(group_of_B: Sequence[int], groups: int) -> Seating:
    """Where each row sits: groups in order, rows within a group in theirs, the largest decides.

    >>> moves = seated([0, 1, 0], 2).moves
    >>> moves.row_at.tolist(), moves.seat_of.tolist()
    ([0, 2, 1, 0], [0, 2, 1])
    """
    order = np.argsort(np.array(group_of_B), kind="stable")
    counts = np.bincount(np.array(group_of_B), minlength=groups)
    seats, rows = int(counts.max()), len(group_of_B)
    if seats * groups == rows and np.array_equal(order, np.arange(rows)):
        return Seating(rows, groups)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = (
        np.arange(rows) - np.repeat(first, counts) + np.repeat(np.arange(groups), counts) * seats
    )
    row_at, seat_of = np.zeros(groups * seats, np.int64), np.zeros(rows, np.int64)
    row_at[place], seat_of[order] = order, place
    return Seating(rows, groups, Moves(row_at, seat_of))


@dataclass
class Crowd:
    """The members of a batch: whom each row belongs to, told before every forward."""

    member_of: Sequence[int]  # of each prompt, as a place among the members
    direction_of: np.ndarray  # of each member, as a place among the directions
    signs: np.ndarray  # of each member
    factor: Factor
    prompts: Sequence[int] = ()
    seating: Seating = Seating(0, 0)  # by member
    pairs: dict[tuple[int, int], "Pairs"] = field(default_factory=dict)

    def sit(self, prompts: Sequence[int]) -> None:
        """The next forwards have a row of each of these prompts."""
        if prompts != self.prompts:
            self.seating = seated([self.member_of[p] for p in prompts], len(self.signs))
            self.prompts, self.pairs = prompts, {}

    def of(self, rows: slice) -> "Pairs":
        """How some of these rows sit by direction."""
        asked = rows.start, rows.stop
        if asked not in self.pairs:
            members = [self.member_of[p] for p in self.prompts[rows]]
            directions, places = np.unique(self.direction_of[members], return_inverse=True)
            first, last = int(directions[0]), int(directions[-1])
            dense = last - first + 1 == len(directions)
            self.pairs[asked] = Pairs(
                seated(places.tolist(), len(directions)),
                slice(first, last + 1) if dense else directions,
                self.signs[members],
            )
        return self.pairs[asked]


@dataclass(frozen=True)
class Pairs:
    """Rows by the direction that their members take, with or against it."""

    seating: Seating
    directions: slice | np.ndarray  # that there are
    signs_B: np.ndarray

    def signed(self, z_NR: np.ndarray) -> np.ndarray:
        """In place: N is rows times tokens."""
        z_BLR = z_NR.reshape(len(self.signs_B), -1, z_NR.shape[-1])
        z_BLR *= self.signs_B[:, None, None]
        return z_NR

    def seated(self, x_NK: np.ndarray) -> np.ndarray:
        """[groups, N / groups, K], where seats may be empty."""
        moves, k = self.seating.moves, x_NK.shape[-1]
        if moves is not None:
            x_NK = x_NK.reshape(self.seating.rows, -1).take(moves.row_at, axis=0)
        return x_NK.reshape(self.seating.groups, -1, k)

    def back(self, y_PNO: np.ndarray, count: int) -> np.ndarray:
        """[N, O] in the order of the rows, N of them."""
        moves, o = self.seating.moves, y_PNO.shape[-1]
        if moves is not None:
            y_PNO = y_PNO.reshape(len(moves.row_at), -1).take(moves.seat_of, axis=0)
        return y_PNO.reshape(count, o)


@dataclass(frozen=True)
class Part:
    """What the crowd does to one layer. Arrays are lazy: each path computes those that it uses."""

    crowd: Crowd
    shift_K: mx.array  # [directions, *factor], scale times the noise of each
    factor_M: mx.array  # [members, *factor], the factor of each


@contextlib.contextmanager
def population(
    model: nn.Module,
    noise: Noise,
    sigmas: Mapping[str, float],
    members: Sequence[int],
    member_of: Sequence[int],
) -> Iterator[Sit]:
    """Inside, a forward computes each row by its member; the adapter itself stays as it is.

    `sigmas` by module. `members` by number; `member_of` says of each prompt at which place of them
    its member is. What is yielded has to hear, before each forward, which prompts its rows are of.
    """
    refuse_unfit(model)
    split_head(model)  # this and the next are tried on the model, with rows that have no member
    company(model)
    directions, signs = noise.of(members)
    used = sorted(set(directions))
    drawn_M = np.array([used.index(k) for k in directions])
    crowd, layers = Crowd(member_of, drawn_M, signs, noise.factor), lora_layers(model)
    before = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            master = layer[noise.factor]
            noise_K = noise.drawn(name, used, master.shape)
            sizes_M = mx.array(np.float32(sigmas[name]) * signs)
            every_M = perturbed(master, noise_K[mx.array(drawn_M)], sizes_M)
            shift_K = (layer.scale * np.float32(sigmas[name])) * noise_K
            if cpu.fast():
                mx.eval(shift_K)  # here: threads only read
            layer.__dict__["_part"] = Part(crowd, shift_K, every_M)
            layer.__class__ = population_twin(type(layer))
        yield crowd.sit
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("_part", None)
            layer.__class__ = before[name]


@cache
def population_twin(parent: type) -> type:
    """A LoRA layer's class that computes each row by its member.

    Its `beside` is for the CPU's way, where blocks are computed whole.
    """

    def call(self: Any, x: mx.array) -> mx.array:
        part: Part = self.__dict__["_part"]
        if "_merged" in self.__dict__ and x.dtype == mx.float32:
            return with_bias(self.linear, merged_and_beside(self, x, part.crowd.seating.rows))
        seating, y = part.crowd.seating, self.linear(x)
        if part.crowd.factor == "lora_b":
            z = batched(x @ self.lora_a, part.factor_M, seating)
        else:
            z = batched(x, part.factor_M, seating) @ self.lora_b
        z = self.bent(z) if isinstance(self, SplineLoRALinear) else z
        return y + (self.scale * z).astype(x.dtype)

    made = bent_beside if issubclass(parent, SplineLoRALinear) else beside
    own = {"__call__": call, "beside": staticmethod(made)}
    return type(f"Population{parent.__name__}", (parent,), own)


def bent_beside(*layers: Any) -> Beside:
    """The same of spline layers, whose curve bends each member's own product: all of it."""
    return cpu_spline.beside(*layers, shift=beside(*layers))


def beside(*layers: Any) -> Beside:
    """What the members' noise adds to products with merged matrices, of layers with one input."""
    parts: list[Part] = [layer.__dict__["_part"] for layer in layers]
    crowd, shifts = parts[0].crowd, [view(part.shift_K) for part in parts]
    a_IR, bs_RO = np.hstack([view(m.lora_a) for m in layers]), [view(m.lora_b) for m in layers]

    def through_b(y_NO: np.ndarray, x_NI: np.ndarray, rows: slice) -> None:
        pairs = crowd.of(rows)
        z_PNR = pairs.seated(pairs.signed(x_NI @ a_IR))
        y_PNO, r, o = np.empty((*z_PNR.shape[:2], outputs), np.float32), 0, 0
        for shift_KRO in shifts:  # each into its own place: one large product would be half zeros
            _, ranks, width = shift_KRO.shape
            z_PNQ, w_PRO = z_PNR[..., r : r + ranks], shift_KRO[pairs.directions]
            np.matmul(z_PNQ, w_PRO, out=y_PNO[..., o : o + width])
            r, o = r + ranks, o + width
        y_NO += pairs.back(y_PNO, len(x_NI))

    def through_a(y_NO: np.ndarray, x_NI: np.ndarray, rows: slice) -> None:
        pairs = crowd.of(rows)
        z_PNR = pairs.seated(x_NI) @ shift_KIR[pairs.directions]
        z_NR, r = pairs.signed(pairs.back(z_PNR, len(x_NI))), 0
        found: list[np.ndarray] = []
        for b_RO in bs_RO:
            found.append(z_NR[:, r : r + len(b_RO)] @ b_RO)
            r += len(b_RO)
        y_NO += np.hstack(found)

    if crowd.factor == "lora_b":
        outputs = sum(shift.shape[2] for shift in shifts)
        return through_b
    shift_KIR = np.concatenate(shifts, axis=2)
    return through_a


@SILENT
def merged_and_beside(layer: Any, x: mx.array, count: int) -> mx.array:
    """The product with W + scale · A B, and every row's own noise beside it."""
    x_NI = rows(view(x))
    y_NO = times(x_NI, view(layer.__dict__["_merged"]).T)
    layer.beside(layer)(y_NO, x_NI, slice(0, count))
    return mx.array(y_NO.reshape(*x.shape[:-1], -1))


def batched(x: mx.array, w_PKO: mx.array, seating: Seating) -> mx.array:
    """x [..., K] times the matrix of each row's group. The first axes of x are rows, then tokens.

    A head may get all rows on one axis: what counts is their order.
    """
    if seating.moves is None:
        y_PNO = x.reshape(seating.groups, -1, x.shape[-1]) @ w_PKO
        return y_PNO.reshape(*x.shape[:-1], -1)
    row_at, seat_of = seating.moves.arrays
    x_BLK = x.reshape(seating.rows, -1, x.shape[-1])
    x_PNK = x_BLK[row_at].reshape(seating.groups, -1, x.shape[-1])
    y_BLO = (x_PNK @ w_PKO).reshape(-1, x_BLK.shape[1], w_PKO.shape[-1])[seat_of]
    return y_BLO.reshape(*x.shape[:-1], -1)
