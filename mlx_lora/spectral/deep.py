"""What costs many products with every weight: dominance by direction and on text, and intruders."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import EMBEDDINGS, lora_layers, switched_off
from mlx_lora.adapter.listen import listener
from mlx_lora.adapter.mapped import widened
from mlx_lora.check import probes
from mlx_lora.models import Loaded, logits
from mlx_lora.spectral.base import Matrix, Updated, frozen_layers, matrix, top_triples
from mlx_lora.spectral.gram import triangle
from mlx_lora.spectral.metrics import LoRAStructuralMetrics
from mlx_lora.spectral.names import split_expert
from mlx_lora.spectral.spectrum import Pair, finite
from mlx_lora.spectral.structure import greatest, known, mean

WIDER = 4  # directions of the base, for each of the updated weight's, that these are sought among
TOKENS = 256  # of text that are listened to

Tell = Callable[[int, int], None]  # (modules done, of so many)


def look(
    found: list[Pair],
    loaded: Loaded,
    structural: LoRAStructuralMetrics,
    trained: Collection[str],
    *,
    top: int = 10,
    cosine: float = 0.5,
    tell: Tell = lambda done, total: None,
) -> LoRAStructuralMetrics:
    """The structural record with all that needs the base's products or its reading of text.

    Of the `trained` modules alone; the others have none of these numbers.
    """
    layers = frozen_layers(loaded.model)
    directions: dict[str, float | None] = {}
    strangers: dict[str, int | None] = {}
    for done, pair in enumerate(found):
        name, expert = split_expert(pair.name)
        layer = layers[name]
        directions[pair.name] = strangers[pair.name] = None
        if pair.name in trained:
            flat = lying(pair, layer)
            weight = matrix(layer, expert)
            directions[pair.name] = directional(weight, flat)
            strangers[pair.name] = intruders(weight, flat, top=top, cosine=cosine)
        tell(done + 1, len(found))
    said = on_text(loaded, [pair for pair in found if pair.name in trained])
    heard = {pair.name: said.get(pair.name) for pair in found}
    return replace(
        structural,
        directional_mean_dominance=mean(directions),
        directional_max_dominance=greatest(directions),
        directional_per_layer_dominance=directions,
        activation_mean_dominance=mean(heard),
        activation_max_dominance=greatest(heard),
        activation_per_layer_dominance=heard,
        intruder_dimensions=int(sum(known(strangers))),
        per_layer_intruders=strangers,
    )


def directional(weight: Matrix, pair: Pair) -> float | None:
    """The largest scale·σ_i / ‖W v_i‖ over the input directions v_i of BA.

    The base's own answer to the direction that the update acts on, where σ_max(W) is its answer to
    its loudest. None for a direction that the base maps to nothing.
    """
    q_a, r_a = np.linalg.qr(pair.a_IR)
    u_RR, s_R, _ = np.linalg.svd(r_a @ triangle(pair.b_RO.T).T, full_matrices=False)
    real = s_R > 1e-12 * s_R[0]
    answered = np.linalg.norm(weight.times((q_a @ u_RR[:, real]).T), axis=1)
    if not answered.all():
        return None
    return float(abs(pair.scale) * (s_R[real] / answered).max())


def lying(pair: Pair, layer: Any) -> Pair:
    """The pair in float64, its update lying as the weight does.

    An embedding's rows are looked up: there W and the update lie turned. Twice is as it was.
    """
    a_IR, b_RO = widened(pair.a_IR), widened(pair.b_RO)
    if isinstance(layer, EMBEDDINGS):
        a_IR, b_RO = b_RO.T, a_IR.T
    return replace(pair, a_IR=a_IR, b_RO=b_RO)


@dataclass(frozen=True)
class Intruder:
    """A strong left singular vector of W + scale·BA that is none of W's."""

    sigma: float  # of W + scale·BA
    left_O: np.ndarray
    cosine: float  # to the nearest of W's


def intruding(weight: Matrix, pair: Pair, *, top: int = 10, cosine: float = 0.5) -> list[Intruder]:
    """Those of the `top` left singular vectors of W + scale·BA that are none of W's.

    None of W's: |cosine| below `cosine` to each of the 4 · `top` strongest of W (arXiv 2410.21228
    compares with all of them).
    """
    count = min(top, *weight.shape)
    sigma_K, after_KO = top_triples(
        Updated(weight, pair.a_IR, pair.b_RO, pair.scale), count, tolerance=1e-3
    )
    _, before_KO = top_triples(weight, min(WIDER * count, *weight.shape), tolerance=1e-3)
    nearest_K = np.abs(after_KO @ before_KO.T).max(axis=1)
    found = zip(sigma_K.tolist(), after_KO, nearest_K.tolist(), strict=True)
    return [Intruder(*each) for each in found if each[2] < cosine]


def intruders(weight: Matrix, pair: Pair, *, top: int = 10, cosine: float = 0.5) -> int:
    """How many."""
    return len(intruding(weight, pair, top=top, cosine=cosine))


def on_text(loaded: Loaded, found: list[Pair]) -> dict[str, float | None]:
    """Σ‖scale·BAx‖ / Σ‖Wx‖ over the inputs x of each linear layer while the base reads text.

    The texts are the check's, the first 256 tokens. None for experts and embeddings.
    """
    attached = lora_layers(loaded.model)
    layers = attached or frozen_layers(loaded.model)
    plain = {p.name: p for p in found if finite(p.a_IR) and finite(p.b_RO)}
    wanted = {
        n: m for n, m in layers.items() if n in plain and not isinstance(m, EMBEDDINGS)
        and "embedding" not in m
    }  # fmt: skip
    sums = {name: np.zeros(2) for name in wanted}
    left = TOKENS
    with switched_off(loaded.model):
        for ids, _ in probes.read(loaded).texts:
            if left <= 0:
                break
            with hearing(wanted, plain) as heard:
                mx.eval(logits(loaded.model, mx.array([ids[:left]])))
            for name, both in heard.items():
                sums[name] += np.array(both)
            left -= len(ids)
    return {p.name: ratio(sums.get(p.name)) for p in found}


def ratio(both: np.ndarray | None) -> float | None:
    return float(both[0] / both[1]) if both is not None and both[1] > 0 else None


@contextmanager
def hearing(layers: Mapping[str, Any], pairs: Mapping[str, Pair]) -> Iterator[dict[str, mx.array]]:
    """Inside, each layer's call leaves Σ‖scale·BAx‖ and Σ‖Wx‖ in the mapping."""
    heard: dict[str, mx.array] = {}
    with ExitStack() as undo:
        for name, layer in layers.items():
            kind, pair = type(layer), pairs[name]
            a, b = (mx.array(widened(m).astype(np.float32)) for m in (pair.a_IR, pair.b_RO))
            bias_O = layer.get("linear", layer).get("bias", 0)
            take = partial(sizes, a, b, abs(pair.scale), bias_O)
            layer.__class__ = listener(name, kind, take, heard)
            undo.callback(setattr, layer, "__class__", kind)
        yield heard


def sizes(
    a_IR: mx.array, b_RO: mx.array, scale: float, bias_O: Any, x: mx.array, y: mx.array
) -> mx.array:
    """Σ‖scale·BAx‖ and Σ‖Wx‖ of a layer that makes y = Wx + bias."""
    update = scale * ((x.astype(mx.float32) @ a_IR) @ b_RO)
    wx = y.astype(mx.float32) - bias_O
    return mx.stack([mx.linalg.norm(z, axis=-1).sum() for z in (update, wx)])
