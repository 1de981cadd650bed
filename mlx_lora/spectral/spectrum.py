"""Singular values of B·A without forming it: two QRs and an R×R SVD, in float64."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.errors import AdapterError, near
from mlx_lora.spectral.metrics import LoRAAdapterMetrics, effective_rank, kappa, metrics

NOISE = 64 * np.finfo(np.float64).eps  # of QR and SVD, relative to ‖A‖·‖B‖: below it, σ is zero


@dataclass(frozen=True)
class Pair:
    """One adapted matrix: its factors in float64, its scale, the precision they were stored in."""

    name: str  # an expert's ends with its number: "…up_proj[3]"
    a_IR: np.ndarray
    b_RO: np.ndarray
    scale: float
    eps: float


def spectra(a_IR: np.ndarray, b_RO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values, descending, of B·A, of A and of B; exactly 0 below rounding noise.

    (A B)ᵀ has those of R_A R_Bᵀ, where A = Q_A R_A and Bᵀ = Q_B R_B: O((I + O)·R²), no squaring.
    """
    r_a, r_b = np.linalg.qr(a_IR, mode="r"), np.linalg.qr(b_RO.T, mode="r")
    s_a, s_b, s_ba = (np.linalg.svd(m, compute_uv=False) for m in (r_a, r_b, r_a @ r_b.T))
    s_ba[s_ba <= NOISE * s_a[0] * s_b[0]] = 0.0
    for s in (s_a, s_b):
        s[s <= NOISE * s[0]] = 0.0
    return s_ba, s_a, s_b


def ba_singular_values(a_IR: np.ndarray, b_RO: np.ndarray) -> np.ndarray:
    """Singular values of B·A, descending, min(I, R, O) of them.

    >>> ba_singular_values(np.eye(3)[:, :2], np.diag([5.0, 2.0]))
    array([5., 2.])
    """
    return spectra(np.asarray(a_IR, np.float64), np.asarray(b_RO, np.float64))[0]


def measure(pair: Pair) -> LoRAAdapterMetrics:
    """Every metric of one adapted matrix that needs no base."""
    rank = pair.a_IR.shape[1]
    about: dict[str, Any] = {
        "nominal_rank": rank,
        "alpha": pair.scale * rank,
        "effective_lr_scale": pair.scale,
    }
    finite = np.isfinite(pair.a_IR).all() and np.isfinite(pair.b_RO).all()
    if not (finite and math.isfinite(pair.scale)):
        return without_numbers(about)
    s_ba, s_a, s_b = spectra(pair.a_IR, pair.b_RO)
    found: dict[str, Any] = {name: real(metrics[name](s_ba)) for name in metrics}
    effective = found.pop("effective_rank")
    (kappa_a, status_a), (kappa_b, status_b) = kappa(s_a, pair.eps), kappa(s_b, pair.eps)
    return LoRAAdapterMetrics(
        status="trained" if s_ba[0] > 0 else "untrained",
        **about,
        effective_rank_BA=effective,
        effective_rank_A=real(effective_rank(s_a)),
        effective_rank_B=real(effective_rank(s_b)),
        rank_utilization=None if effective is None else effective / rank,
        kappa_A=kappa_a,
        kappa_A_status=status_a,
        kappa_B=kappa_b,
        kappa_B_status=status_b,
        sigma_max_BA=float(s_ba[0]),
        frobenius_BA=float(np.linalg.norm(s_ba)),
        **found,
        singular_values=tuple(s_ba.tolist()),
    )


def without_numbers(about: Mapping[str, Any]) -> LoRAAdapterMetrics:
    """The record of a matrix with NaN or infinity in it."""
    absent = ("effective_rank_BA", "effective_rank_A", "effective_rank_B", "rank_utilization")
    absent += ("kappa_A", "kappa_B", "sigma_max_BA", "frobenius_BA")
    status = dict.fromkeys(("status", "kappa_A_status", "kappa_B_status"), "non_finite")
    return LoRAAdapterMetrics(**about, **dict.fromkeys(absent), **status)


def real(value: float) -> float | None:
    return value if math.isfinite(value) else None


def pairs(tensors: Mapping[str, mx.array], scales: Mapping[str, float] | float) -> Iterator[Pair]:
    """Factors by module, from tensors named `<module>.lora_a` and `.lora_b`; experts one by one.

    AdapterError lists every tensor that is none of these, has no partner, or does not fit it.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    problems = [
        f"  {name} is not a LoRA factor. {near(name.rpartition('.')[2], ('lora_a', 'lora_b'))}"
        for name in tensors
        if name.rpartition(".")[2] not in ("lora_a", "lora_b")
    ]
    for module in () if problems else modules:
        a, b = tensors.get(f"{module}.lora_a"), tensors.get(f"{module}.lora_b")
        if a is None or b is None:
            problems.append(f"  {module} has no {'lora_a' if a is None else 'lora_b'}")
        elif not fits(a.shape, b.shape):
            problems.append(f"  {module}: lora_a {a.shape} and lora_b {b.shape} do not multiply")
    if problems or not modules:
        lines = "\n".join(problems) or "  there are no tensors"
        raise AdapterError(
            f"this adapter cannot be read:\n{lines}",
            "Expected mlx-lm's tensors, `<module>.lora_a` and `<module>.lora_b`.",
        )
    for module in modules:
        scale = scales if isinstance(scales, float | int) else scales[module]
        yield from split(module, tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"], scale)


def fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Shapes (I, R) and (R, O), or for E experts (E, R, I) and (E, O, R); nothing empty."""
    if 0 in (*a, *b) or len(a) != len(b):
        return False
    return a[1] == b[0] if len(a) == 2 else len(a) == 3 and a[0] == b[0] and a[1] == b[2]


def split(name: str, a: mx.array, b: mx.array, scale: float) -> Iterator[Pair]:
    """The pairs in one layer's factors: one, or one per expert (whose factors lie transposed)."""
    eps = float(mx.finfo(a.dtype).eps)
    a64, b64 = (np.array(m.astype(mx.float32)).astype(np.float64) for m in (a, b))
    if a.ndim == 2:
        yield Pair(name, a64, b64, float(scale), eps)
        return
    for e in range(len(a64)):
        yield Pair(f"{name}[{e}]", a64[e].T, b64[e].T, float(scale), eps)


NATURAL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
)


def split_expert(name: str) -> tuple[str, int | None]:
    """Module and expert number.

    >>> split_expert("mlp.up_proj[3]"), split_expert("mlp.up_proj")
    (('mlp.up_proj', 3), ('mlp.up_proj', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def natural(name: str) -> list[str | int]:
    """A sort key that puts block 10 after block 9.

    >>> sorted(["layers.10.q", "layers.9.q"], key=natural)
    ['layers.9.q', 'layers.10.q']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def places(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Block number and kind of each module: None outside the blocks, experts share their kind.

    >>> places(["model.layers.3.mlp.up_proj[7]", "lm_head"])
    {'model.layers.3.mlp.up_proj[7]': (3, 'up_proj'), 'lm_head': (None, 'lm_head')}
    """
    found: dict[str, tuple[int | None, str]] = {}
    for name in names:
        path, _ = split_expert(name)
        match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", path)
        found[name] = (int(match[1]), match[2]) if match else (None, path)
    paths = {path for _, path in found.values()}
    last = Counter(path.rpartition(".")[2] for path in paths)
    label = {  # two parts where one is ambiguous: self_attn.q_proj, cross_attn.q_proj
        path: ".".join(path.split(".")[-1 if last[path.rpartition(".")[2]] == 1 else -2 :])
        for path in paths
    }
    return {name: (layer, label[path]) for name, (layer, path) in found.items()}


def kinds(places: Mapping[str, tuple[int | None, str]]) -> list[str]:
    """The kinds of module in the order in which a block applies them."""

    def order(kind: str) -> tuple[int, str]:
        short = kind.rpartition(".")[2]
        return (NATURAL.index(short) if short in NATURAL else len(NATURAL), kind)

    return sorted({kind for _, kind in places.values()}, key=order)
