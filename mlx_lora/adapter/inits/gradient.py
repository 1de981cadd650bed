"""The init that looks at the loss: A along the gradient's own directions, without forming it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from annotated_types import Ge
from mlx.utils import tree_flatten

from mlx_lora.adapter.inits.table import harmless, inits
from mlx_lora.adapter.linalg import complete
from mlx_lora.adapter.scene import Scene, factor, generator
from mlx_lora.data import Text, learnable
from mlx_lora.errors import AdapterError, ModelError
from mlx_lora.models import logits, pad_right
from mlx_lora.types import Factors, Start

BATCH = 8  # texts of one backward pass


@inits.add
@harmless
def gradient(
    scene: Scene,
    *,
    data: str | None = None,
    oversample: Annotated[int, Ge(0)] = 8,
    alternations: Annotated[int, Ge(1)] = 2,
) -> Start:
    """A = top input directions of the loss gradient on calibration texts, B = 0. Bitwise equal.

    With A = Ω and B = 0, dL/dB = scale · Ωᵀ Gᵀ is an exact sketch of the gradient G of the frozen
    weight; with B = Q and A = 0, dL/dA gives GᵀQ. Two of each find its leading directions at the
    memory of a LoRA step, on the quantized base. Unlike LoRA-GA (arXiv 2407.05000), from which the
    idea is, nothing is added to the weights.
    """
    if not all(s.scale for s in scene.sites):
        raise AdapterError("gradient reads the adapter's gradients, which are 0 at scale 0")
    seen, held = scene.texts(data, "gradient")
    texts = [*seen, *held]
    sketch = {
        s.name: generator(scene.seed, s.name).standard_normal(
            (s.in_dims, min(s.rank + oversample, s.in_dims, s.out_dims))
        )
        for s in scene.sites
    }
    energy: dict[str, float] = {}
    svds: dict[str, Any] = {}
    for _ in range(alternations):
        y_OK = gradients(scene, texts, sketch, "lora_b")
        if not energy:  # E‖GΩ‖² = K ‖G‖² for a Gaussian Ω
            energy = {n: float((y**2).sum()) / y.shape[1] for n, y in y_OK.items()}
        q_OK = {n: np.linalg.qr(y)[0] for n, y in y_OK.items()}
        z_IK = gradients(scene, texts, q_OK, "lora_a")
        svds = {n: np.linalg.svd(z, full_matrices=False) for n, z in z_IK.items()}
        sketch = {n: u for n, (u, _, _) in svds.items()}
    factors, captured = {}, 0.0
    for site in scene.sites:
        u_IK, s_K, _ = svds[site.name]
        rng = generator(scene.seed, f"{site.name}/rest")
        v_IR = u_IK[:, : site.rank] if s_K[0] > 0 else np.zeros((site.in_dims, 0))
        v_IR = complete(v_IR, site.rank - v_IR.shape[1], rng)
        factors[site.name] = Factors(factor(v_IR), mx.zeros((site.rank, site.out_dims)))
        captured += float((s_K[: site.rank] ** 2).sum())
    total = sum(energy.values())
    by_chance = sum(energy[s.name] * s.rank / s.in_dims for s in scene.sites)
    return Start(
        factors,
        measured={
            "gradient_energy_captured": min(1.0, captured / total) if total else 0.0,
            "gradient_energy_of_random": by_chance / total if total else 0.0,
        },
    )


def gradients(
    scene: Scene, texts: Sequence[Text], known: Mapping[str, np.ndarray], wanted: str
) -> dict[str, np.ndarray]:
    """GΩ [O, K] (`lora_b`, known Ω [I, K]) or GᵀQ [I, K] (`lora_a`, known Q [O, K]) by site.

    G is the gradient of the mean loss by the frozen weight [O, I]. The other factor is zero, so
    the model computes its base throughout. Raises ModelError where a gradient is not finite, or no
    text has a token to learn.
    """
    texts = learnable(texts)
    if not texts:
        raise ModelError("a gradient needs a text with a token to learn, and there is none")
    sums: dict[str, np.ndarray] = {}
    with probing(scene, known, wanted):
        tokens = sum(len(t.ids) - t.start for t in texts)
        for start in range(0, len(texts), BATCH):
            block = texts[start : start + BATCH]
            grads = nn.value_and_grad(scene.model, summed_loss)(scene.model, block)[1]
            flat = dict(tree_flatten(grads))
            mx.eval(flat)
            for site in scene.sites:
                g = np.array(flat[f"{site.name}.{wanted}"], dtype=np.float64)
                g = g.T if wanted == "lora_b" else g
                sums[site.name] = sums.get(site.name, 0) + g / (tokens * site.scale)
    broken = [n for n, g in sums.items() if not np.isfinite(g).all()]
    if broken:
        raise ModelError(f"the gradient at {', '.join(broken[:3])} is not finite on these texts")
    return sums


@contextlib.contextmanager
def probing(scene: Scene, known: Mapping[str, np.ndarray], wanted: str) -> Iterator[None]:
    """Inside, every site holds `known` in one factor and zero in the other, `wanted`."""
    kept = {n: (layer.lora_a, layer.lora_b) for n, layer in scene.layers.items()}
    try:
        for site in scene.sites:
            layer, x = scene.layer(site), known[site.name]
            a_side = wanted == "lora_b"
            layer.lora_a = factor(x) if a_side else mx.zeros((site.in_dims, x.shape[1]))
            layer.lora_b = mx.zeros((x.shape[1], site.out_dims)) if a_side else factor(x.T)
        yield
    finally:
        for name, layer in scene.layers.items():
            layer.lora_a, layer.lora_b = kept[name]


def summed_loss(model: nn.Module, texts: Sequence[Text]) -> mx.array:
    """Negative log-likelihood of the tokens that count, summed, in nats."""
    ids_BT, mask_BT = pad_right([t.ids for t in texts])
    start_B1 = mx.array([[t.start] for t in texts])
    counts_BT = mask_BT[:, 1:] * (mx.arange(1, ids_BT.shape[1]) >= start_B1)
    loss_BT = nn.losses.cross_entropy(logits(model, ids_BT[:, :-1]), ids_BT[:, 1:])
    return (loss_BT * counts_BT).sum()
