"""The init that knows where the weights went before: an adapter, or a fine-tuned model."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import models
from mlx_lora.adapter.inits.table import harmless_unless, inits, zero_start
from mlx_lora.adapter.linalg import complete, randomized_svd
from mlx_lora.adapter.scene import Scene, factor, full_precision, generator
from mlx_lora.adapter.tensors import CONFIG, read
from mlx_lora.errors import AdapterError
from mlx_lora.types import Factors, Site, Start


@inits.add
@harmless_unless("keep_delta")
def svd(
    scene: Scene,
    *,
    reference: str,
    keep_delta: bool = False,
    full_precision: str | None = None,
) -> Start:
    """A from the SVD of a reference change, B = 0: bitwise equal. `keep_delta` keeps the change.

    `reference` is an adapter folder or a fine-tuned model; its change at each site is split by SVD.
    With `keep_delta` the start is the change's best approximation at this rank, and the energy it
    captures is reported. Layers the reference does not touch start at `zero`. `full_precision` is
    the model that both were made from, where this one is quantized and the reference a model.
    """
    if keep_delta and not all(site.scale for site in scene.sites):
        raise AdapterError("svd with keep_delta divides by the scale, which is 0")
    change_of = reference_changes(scene, reference, full_precision)
    factors, energy, kept, used = {}, 0.0, 0.0, 0
    for site in scene.sites:
        rng = generator(scene.seed, site.name)
        change = change_of(site)
        if change is None or not np.any(change[1]):
            factors[site.name] = zero_start(site, scene.seed)
            continue
        (u_OK, s_K, v_IK), total = change[:3], change[3]
        rank = min(site.rank, len(s_K))
        v_IR = complete(v_IK[:, :rank], site.rank - rank, rng)
        b_RO = np.zeros((site.rank, site.out_dims))
        if keep_delta:
            root = np.sqrt(s_K[:rank] / site.scale)
            v_IR[:, :rank] *= root
            b_RO[:rank] = (u_OK[:, :rank] * root).T
        factors[site.name] = Factors(factor(v_IR), factor(b_RO))
        energy, kept, used = energy + total, kept + float((s_K[:rank] ** 2).sum()), used + 1
    if not used:
        raise AdapterError(
            f"{reference} changes none of the layers that are adapted here",
            "Is it for another model, untrained, or for other keys?",
        )
    return Start(factors, measured={"delta_energy_captured": kept / energy, "layers_used": used})


def reference_changes(scene: Scene, reference: str, full: str | None) -> Any:
    """site -> (U, s, V, ‖change‖²), or None where there is no change."""
    folder = Path(reference).expanduser()
    if (folder / CONFIG).is_file():
        if full is not None:
            raise AdapterError(
                f"full_precision is read where the reference is a model, and {reference} is an "
                "adapter: it says by itself what it changes",
                "Leave full_precision out.",
            )
        return adapter_changes(scene, folder)
    weight_of = full_precision(scene, reference, "svd")
    packed = any("scales" in site.linear for site in scene.sites)
    base_of = full_precision(scene, full, "svd") if full or packed else dequantized

    def change(site: Site) -> Any:
        delta_OI = weight_of(site) - base_of(site)
        rng = generator(scene.seed, f"{site.name}/svd")
        return *randomized_svd(delta_OI, site.rank, rng), float((delta_OI**2).sum())

    return change


def dequantized(site: Site) -> np.ndarray:
    """The frozen weight [O, I] in float32."""
    return np.array(models.dense_weight(site.linear))


def adapter_changes(scene: Scene, folder: Path) -> Any:
    """The same from an adapter folder. AdapterError lists every layer that it does not fit."""
    config, tensors = read(folder)
    kind, scale = config.get("fine_tune_type", "lora"), config["lora_parameters"]["scale"]
    if kind != "lora":
        raise AdapterError(
            f"{folder} is a {kind} adapter, which changes more than BA says",
            "Give one of plain LoRA, or a fine-tuned model, like what `mlx-lora fuse` makes of it.",
        )
    problems = []
    for site in scene.sites:
        a, b = (tensors.get(f"{site.name}.{f}") for f in ("lora_a", "lora_b"))
        held = None if a is None or b is None else (a.shape[0], b.shape[-1])
        if held not in (None, (site.in_dims, site.out_dims)):
            problems.append(
                f"  {site.name}: the reference is {held}, the layer {site.in_dims, site.out_dims}"
            )
    if problems:
        raise AdapterError(
            f"{folder} was made for another model\n" + "\n".join(problems),
            "Its config names its base under `base`.",
        )

    def change(site: Site) -> Any:
        a, b = (tensors.get(f"{site.name}.{f}") for f in ("lora_a", "lora_b"))
        if a is None or b is None:
            return None
        a_IR, b_RO = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (a, b))
        q_a, r_a = np.linalg.qr(a_IR)
        q_b, r_b = np.linalg.qr(b_RO.T)
        u, s, vt = np.linalg.svd(scale * r_b @ r_a.T)
        return q_b @ u, s, q_a @ vt.T, float((s**2).sum())

    return change
