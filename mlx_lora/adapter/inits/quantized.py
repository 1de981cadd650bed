"""Inits that answer quantization: they compare with the full-precision weights, layer by layer."""

from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from annotated_types import Ge

from mlx_lora import models
from mlx_lora.adapter.inits.calibrated import RowCount, listen
from mlx_lora.adapter.inits.table import inits, rebasing, zero_start
from mlx_lora.adapter.linalg import randomized_svd, relative_error
from mlx_lora.adapter.scene import Scene, factor, full_precision, generator
from mlx_lora.errors import AdapterError
from mlx_lora.types import Factors, Site, Start

FLOOR = 1e-3  # of the mean input size: no channel weighs less, or its inverse would explode


Weighting = Literal["exact", "channels", "none"]


@inits.add
def quant_repair(
    scene: Scene,
    *,
    data: str | None = None,
    rows: RowCount = 4096,
    full_precision: str | None = None,
    weighting: Weighting = "exact",
) -> Start:
    """BA repairs what quantization did to the outputs, at this rank; the base file stays as it is.

    `exact` finds the update that leaves the least output error on calibration texts, `channels`
    weights the error's columns by the size of their input, `none` is the plain SVD of W - Q. A
    layer is repaired only if its error on held-out texts falls, else it starts at `zero`. At 2 bits
    `exact` repairs the kind of text it saw and little else (figures/quant_repair.png): calibrate on
    what you will read. Source: QERA, arXiv 2410.06040 (its exact and approximate solutions).
    """
    weight_of = weights_of(scene, full_precision, "quant_repair")
    heard = listen(scene, data, rows, "quant_repair")
    factors = {s.name: zero_start(s, scene.seed) for s in scene.sites}
    errors: list[dict[str, float]] = []
    kept = 0
    for site in scene.sites:
        if site.name not in heard.seen or "scales" not in site.linear:
            continue
        w_OI = weight_of(site)
        error_OI = w_OI - np.array(models.dense_weight(site.linear))
        rng = generator(scene.seed, site.name)
        start = repair(error_OI, site, rng, heard.seen[site.name], weighting)
        plain = low_rank(error_OI, site, rng)
        held_NI = heard.held[site.name]
        y_NO = held_NI @ w_OI.T
        found = {
            "quantized": relative_error(held_NI @ error_OI.T, y_NO),
            "repaired": error_left(site, start, error_OI, held_NI, y_NO),
            "plain_svd": error_left(site, plain, error_OI, held_NI, y_NO),
        }
        if found["repaired"] < found["quantized"]:
            factors[site.name], kept = start, kept + 1
        errors.append({k: min(v, found["quantized"]) for k, v in found.items()})
    if not errors:
        raise AdapterError("quant_repair repairs quantized layers, and none is adapted here")
    measured = {f"output_error_{k}": float(np.mean([e[k] for e in errors])) for k in errors[0]}
    return Start(factors, measured=measured | {"layers_repaired": kept})


def repair(
    error_OI: np.ndarray,
    site: Site,
    rng: np.random.Generator,
    x_NI: np.ndarray,
    weighting: str,
) -> Factors:
    """Factors whose update takes the most of a weight error away, in the norm of the weighting."""
    if weighting == "none":
        return low_rank(error_OI, site, rng)
    if weighting == "channels":
        size_I = np.sqrt((x_NI.astype(np.float64) ** 2).mean(axis=0)).astype(np.float32)
        return low_rank(error_OI, site, rng, weights_I=np.maximum(size_I, FLOOR * size_I.mean()))
    # the best product of rank R is the error itself, seen in its R largest outputs
    u_OR, s_R, _ = randomized_svd(error_OI @ x_NI.T / len(x_NI) ** 0.5, site.rank, rng)
    root_R = np.maximum(np.sqrt(s_R / site.scale), 1e-12)
    a_IR = (error_OI.T @ u_OR) / (root_R * site.scale)
    return Factors(factor(a_IR), factor((u_OR * root_R).T))


def error_left(
    site: Site, start: Factors, error_OI: np.ndarray, x_NI: np.ndarray, y_NO: np.ndarray
) -> float:
    """Relative output error on these inputs once the update is added."""
    a_IR, b_RO = np.array(start.lora_a_IR), np.array(start.lora_b_RO)
    return relative_error(x_NI @ error_OI.T - site.scale * (x_NI @ a_IR) @ b_RO, y_NO)


@inits.add
@rebasing
def loftq(
    scene: Scene,
    *,
    full_precision: str | None = None,
    iterations: Annotated[int, Ge(1)] = 5,
) -> Start:
    """Alternates quantizing W - BA and the SVD of W - Q: closer to full precision, on a new base.

    The new base is written beside the adapter, and the adapter belongs to it alone. Source: LoftQ,
    arXiv 2310.08659.
    """
    weight_of = weights_of(scene, full_precision, "loftq")

    def parts(site: Site, w_OI: np.ndarray) -> tuple[Factors, Any]:
        rng = generator(scene.seed, site.name)
        update_OI, linear, start = np.zeros_like(w_OI), site.linear, None
        for _ in range(iterations):
            linear = repacked(site.linear, w_OI - update_OI)
            start = low_rank(w_OI - np.array(models.dense_weight(linear)), site, rng)
            update_OI = change_of(site, start)
        assert start is not None
        return start, linear

    return rebased(scene, weight_of, parts, "loftq", quantized_only=True)


@inits.add
@rebasing
def pissa(scene: Scene, *, full_precision: str | None = None) -> Start:
    """BA = the principal components of W, base = the rest, on a new base. Collapses in RL.

    The new base is written beside the adapter, and the adapter belongs to it alone. Sources: PiSSA,
    arXiv 2404.02948; that it collapses under RL with verifiable rewards: PeRL, arXiv 2512.23165.
    """
    weight_of = weights_of(scene, full_precision, "pissa")

    def parts(site: Site, w_OI: np.ndarray) -> tuple[Factors, Any]:
        start = low_rank(w_OI, site, generator(scene.seed, site.name))
        return start, repacked(site.linear, w_OI - change_of(site, start))

    return rebased(scene, weight_of, parts, "pissa", quantized_only=False)


def rebased(scene: Scene, weight_of: Any, parts: Any, who: str, *, quantized_only: bool) -> Start:
    """Factors and new frozen layers for every site, and the weight error before and after."""
    factors, bases, before, after = {}, {}, [], []
    for site in scene.sites:
        if quantized_only and "scales" not in site.linear:
            factors[site.name] = zero_start(site, scene.seed)
            continue
        w_OI = weight_of(site)
        factors[site.name], bases[site.name] = parts(site, w_OI)
        before.append(relative_error(w_OI - np.array(models.dense_weight(site.linear)), w_OI))
        whole = np.array(models.dense_weight(bases[site.name])) + change_of(
            site, factors[site.name]
        )
        after.append(relative_error(w_OI - whole, w_OI))
    if not bases:
        raise AdapterError(f"{who} needs quantized layers, and none is adapted here")
    return Start(
        factors,
        bases,
        {
            "weight_error_quantized": float(np.mean(before)),
            "weight_error_after": float(np.mean(after)),
        },
    )


def weights_of(scene: Scene, given: str | None, who: str) -> Any:
    if not all(s.scale for s in scene.sites):
        raise AdapterError(f"{who} divides by the scale, which is 0")
    quantized = any("scales" in s.linear for s in scene.sites)
    if given is None and not quantized:
        return lambda site: np.array(models.dense_weight(site.linear))
    return full_precision(scene, given, who)


def low_rank(
    w_OI: np.ndarray,
    site: Site,
    rng: np.random.Generator,
    *,
    weights_I: np.ndarray | None = None,
) -> Factors:
    """Factors whose update is the best rank-R part of w, in the norm of the weighted inputs."""
    d_I = np.ones(site.in_dims, w_OI.dtype) if weights_I is None else weights_I
    u_OR, s_R, v_IR = randomized_svd(w_OI * d_I, site.rank, rng)
    root_R = np.sqrt(s_R / site.scale)
    return Factors(factor(v_IR / d_I[:, None] * root_R), factor((u_OR * root_R).T))


def change_of(site: Site, start: Factors) -> np.ndarray:
    """scale · BA as [O, I]."""
    a_IR, b_RO = np.array(start.lora_a_IR), np.array(start.lora_b_RO)
    return site.scale * (a_IR @ b_RO).T


def repacked(linear: Any, w_OI: np.ndarray) -> nn.Module:
    """A frozen layer like this one, quantized alike, with another weight and the same bias."""
    made: Any = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    if "scales" in linear:
        affine = linear.mode == "affine"
        made.weight = factor(w_OI).astype(linear.scales.dtype if affine else mx.float32)
        made = nn.QuantizedLinear.from_linear(
            made, linear.group_size, linear.bits, mode=linear.mode
        )
    else:
        made.weight = factor(w_OI).astype(linear.weight.dtype)
    if "bias" in linear:
        made.bias = linear.bias
    made.freeze()
    mx.eval(made.parameters())
    return made
