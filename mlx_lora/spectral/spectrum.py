"""The pairs of factors in an adapter, and what the spectrum of each says."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_lora.adapter.mapped import BF16, EPS, widened
from mlx_lora.errors import AdapterError, near
from mlx_lora.spectral.gram import spectra
from mlx_lora.spectral.metrics import LoRAAdapterMetrics, effective_rank, kappa, metrics

FACTORS = ("lora_a", "lora_b")
OTHERS = ("m", "spline", "spline_scale")  # of DoRA, of splines
SAME = 1e-4  # of a row's norm: weights that were dequantized in bf16 move it by 3e-5


@dataclass(frozen=True)
class Pair:
    """One adapted matrix: its factors as they are stored, its scale, the precision of storage."""

    name: str  # an expert's ends with its number: "…up_proj[3]"
    a_IR: np.ndarray
    b_RO: np.ndarray
    scale: float
    eps: float
    m_O: np.ndarray | None = None  # DoRA's magnitudes


def measure(pair: Pair) -> LoRAAdapterMetrics:
    """Every metric of one adapted matrix that needs no base."""
    rank = pair.a_IR.shape[1]
    about: dict[str, Any] = {
        "nominal_rank": rank,
        "alpha": pair.scale * rank,
        "effective_lr_scale": pair.scale,
    }
    parts = [x for x in (pair.a_IR, pair.b_RO, pair.m_O) if x is not None]
    if not (all(map(finite, parts)) and math.isfinite(pair.scale)):
        return without_numbers(about)
    s_ba, s_a, s_b = spectra(pair.a_IR, pair.b_RO)
    found: dict[str, Any] = {name: real(metrics[name](s_ba)) for name in metrics}
    effective = found.pop("effective_rank")
    (kappa_a, status_a), (kappa_b, status_b) = kappa(s_a, pair.eps), kappa(s_b, pair.eps)
    return LoRAAdapterMetrics(
        status=status(pair, s_ba),
        **about,
        effective_rank_BA=effective,
        effective_rank_A=real(effective_rank(s_a)),
        effective_rank_B=real(effective_rank(s_b)),
        rank_utilization=share(effective, rank),
        stable_rank_utilization=share(found["stable_rank"], rank),
        energy_rank_utilization=share(found["energy_rank"], rank),
        kappa_A=kappa_a,
        kappa_A_status=status_a,
        kappa_B=kappa_b,
        kappa_B_status=status_b,
        sigma_max_BA=float(s_ba[0]),
        frobenius_BA=float(np.linalg.norm(s_ba)),
        **found,
        singular_values=tuple(s_ba.tolist()),
    )


def status(pair: Pair, s_ba: np.ndarray) -> str:
    """What a module with finite factors is, see `metrics.STATUSES`."""
    if s_ba[0] == 0:
        return "untrained" if pair.m_O is None or not pair.scale else "unjudged"
    return "trained" if pair.scale else "switched_off"


def judged(m: LoRAAdapterMetrics, pair: Pair, norm_O: np.ndarray) -> LoRAAdapterMetrics:
    """The metrics with what DoRA's magnitudes are beside the base's row norms, where they start.

    With BA = 0 a difference that rounding explains, of m or of the weights, leaves it untrained.
    """
    if pair.m_O is None or m.status == "non_finite":
        return m
    off_O = widened(pair.m_O).ravel() - norm_O
    size = float(np.linalg.norm(norm_O))
    change = float(np.linalg.norm(off_O)) / size if size else None
    moved = np.any(np.abs(off_O) > max(SAME, EPS[pair.m_O.dtype]) * norm_O)
    found = "magnitudes" if moved else "untrained"
    known = found if m.status == "unjudged" else m.status
    return replace(m, magnitude_change=change, status=known)


def without_numbers(about: Mapping[str, Any]) -> LoRAAdapterMetrics:
    """The record of a matrix with NaN or infinity in it."""
    absent = ("effective_rank_BA", "effective_rank_A", "effective_rank_B", "rank_utilization")
    absent += ("kappa_A", "kappa_B", "sigma_max_BA", "frobenius_BA")
    status = dict.fromkeys(("status", "kappa_A_status", "kappa_B_status"), "non_finite")
    return LoRAAdapterMetrics(**about, **dict.fromkeys(absent), **status)


def finite(x: np.ndarray) -> bool:
    """No NaN, no infinity."""
    if x.dtype == BF16:
        return not ((x["bf16"] & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(x).all())


def real(value: float) -> float | None:
    return value if math.isfinite(value) else None


def share(value: float | None, rank: int) -> float | None:
    return None if value is None else value / rank


def pairs(tensors: Mapping[str, Any], scales: Mapping[str, float] | float) -> Iterator[Pair]:
    """Factors by module, from tensors named `<module>.lora_a` and `.lora_b`; experts one by one.

    The curves of splines are passed over. AdapterError lists every tensor that is none of these,
    has no partner, or does not fit it.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    problems = [
        f"  {name} is not a LoRA factor. {near(name.rpartition('.')[2], FACTORS)}"
        for name in tensors
        if name.rpartition(".")[2] not in (*FACTORS, *OTHERS)
    ]
    for module in () if problems else modules:
        a, b = tensors.get(f"{module}.lora_a"), tensors.get(f"{module}.lora_b")
        if a is None or b is None:
            problems.append(f"  {module} has no {'lora_a' if a is None else 'lora_b'}")
        elif not fits(a.shape, b.shape):
            problems.append(f"  {module}: lora_a {a.shape} and lora_b {b.shape} do not multiply")
    if problems or not modules:
        more = [f"  ... and {len(problems) - 20} more"] if len(problems) > 20 else []
        lines = "\n".join([*problems[:20], *more]) or "  there are no tensors"
        raise AdapterError(
            f"this adapter cannot be read:\n{lines}",
            "Expected mlx-lm's tensors, `<module>.lora_a` and `<module>.lora_b`, or PEFT's.",
        )
    for module in modules:
        scale = scales if isinstance(scales, float | int) else scales[module]
        a, b, m = (tensors.get(f"{module}.{f}") for f in ("lora_a", "lora_b", "m"))
        yield from split(module, a, b, scale, m)


def fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Shapes (I, R) and (R, O), or for E experts (E, R, I) and (E, O, R); nothing empty."""
    if 0 in (*a, *b) or len(a) != len(b):
        return False
    return a[1] == b[0] if len(a) == 2 else len(a) == 3 and a[0] == b[0] and a[1] == b[2]


def split(name: str, a: Any, b: Any, scale: float, m: Any = None) -> Iterator[Pair]:
    """The pairs in one layer's factors: one, or one per expert (whose factors lie transposed)."""
    a, b = as_numpy(a), as_numpy(b)
    eps = max(EPS[a.dtype], EPS[b.dtype])
    if a.ndim == 2:
        yield Pair(name, a, b, float(scale), eps, None if m is None else as_numpy(m))
        return
    for e in range(len(a)):
        yield Pair(f"{name}[{e}]", a[e].T, b[e].T, float(scale), eps)


def as_numpy(x: Any) -> np.ndarray:
    """An array of NumPy or MLX, at the precision it has."""
    if isinstance(x, np.ndarray):
        return x
    import mlx.core as mx

    return np.array(x.view(mx.uint16)).view(BF16) if x.dtype == mx.bfloat16 else np.array(x)
