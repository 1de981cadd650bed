"""Inits that look at what flows into the layers on calibration texts."""

import math
from typing import Annotated

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from annotated_types import Ge, Gt, Lt

from mlx_lora.adapter.inits.random import Size, gaussian
from mlx_lora.adapter.inits.table import harmless, inits, zero_start
from mlx_lora.adapter.linalg import complete, least_used, principal, relative_error
from mlx_lora.adapter.listen import Inputs, inputs
from mlx_lora.adapter.scene import Scene, factor, generator
from mlx_lora.types import Factors, Site, Start

RowCount = Annotated[int, Ge(1)]


@inits.add
@harmless
def activations(
    scene: Scene,
    *,
    data: str | None = None,
    rows: RowCount = 1024,
    max_rank_ratio: Annotated[float, Ge(1), Lt(math.inf)] = 1.0,
) -> Start:
    """A = top directions of each layer's inputs on calibration texts, B = 0. Bitwise equal to base.

    With `max_rank_ratio` above 1 the ranks are redistributed: directions of all layers compete by
    the share of their layer's energy they explain, for the same total, at most that many times the
    nominal rank each. Source: EVA, arXiv 2410.07170.
    """
    heard = listen(scene, data, rows, "activations")
    found: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for site in scene.sites:
        if (x_NI := heard.seen.get(site.name)) is not None:
            most = min(int(site.rank * max_rank_ratio), site.in_dims, site.out_dims)
            s, v_IR = principal(x_NI, most)
            found[site.name] = s, v_IR, float((x_NI.astype(np.float64) ** 2).sum())
    shares = {n: s**2 / energy for n, (s, _, energy) in found.items() if energy > 0}
    ranks = redistributed(shares, {s.name: s.rank for s in scene.sites})
    factors, captured, chance = {}, [], []
    for site in scene.sites:
        rank = ranks[site.name]
        if site.name not in shares:
            factors[site.name] = zero_start(site, scene.seed)
            continue
        v_IR = found[site.name][1][:, :rank]
        v_IR = complete(v_IR, rank - v_IR.shape[1], generator(scene.seed, site.name))
        factors[site.name] = Factors(factor(v_IR), mx.zeros((rank, site.out_dims)))
        captured.append(shares[site.name][:rank].sum())
        chance.append(rank / site.in_dims)
    return Start(
        factors,
        measured={
            "input_energy_captured": float(np.mean(captured)) if captured else 0.0,
            "input_energy_of_random": float(np.mean(chance)) if chance else 0.0,
        },
    )


def redistributed(shares: dict[str, np.ndarray], ranks: dict[str, int]) -> dict[str, int]:
    """The ranks after the directions of all layers competed for the same total; at least 1 each.

    >>> redistributed({"a": np.array([0.9, 0.4]), "b": np.array([0.3, 0.1])}, {"a": 1, "b": 1})
    {'a': 1, 'b': 1}
    >>> shares = {"a": np.array([0.9, 0.4, 0.3]), "b": np.array([0.3, 0.1])}
    >>> redistributed(shares, {"a": 2, "b": 2})
    {'a': 3, 'b': 1}
    """
    left = sum(ranks[n] for n in shares) - len(shares)
    rest = sorted(((-x, n) for n, s in shares.items() for x in s[1:]), key=lambda pair: pair[0])
    found = dict(ranks) | dict.fromkeys(shares, 1)
    for _, name in rest[:left]:
        found[name] += 1
    return found


@inits.add
def null_space(
    scene: Scene, *, data: str | None = None, rows: RowCount = 4096, limit: Size = 0.005
) -> Start:
    """B random, A in each layer's least-used input directions: both learn, outputs hardly move.

    Where the update would still change a layer's output on held-out texts by more than `limit` of
    its size, B is made smaller until it does not.
    """
    heard = listen(scene, data, rows, "null_space")
    factors, changes, shrunk = {}, [], 0
    for site in scene.sites:
        x_NI = heard.seen.get(site.name)
        if x_NI is None:
            factors[site.name] = zero_start(site, scene.seed)
            continue
        rng = generator(scene.seed, site.name)
        a_IR = least_used(x_NI, site.rank, rng)
        bound = site.out_dims**-0.5
        b_RO = rng.uniform(-bound, bound, (site.rank, site.out_dims))
        change = output_change(site, a_IR, b_RO, heard.held[site.name])
        if change > limit:
            b_RO, shrunk = b_RO * (limit / change), shrunk + 1
        changes.append(min(change, limit))
        factors[site.name] = Factors(factor(a_IR), factor(b_RO))
    return Start(
        factors,
        measured={
            "output_change_mean": float(np.mean(changes)) if changes else 0.0,
            "output_change_max": float(np.max(changes)) if changes else 0.0,
            "layers_shrunk": shrunk,
        },
    )


@inits.add
def output_match(
    scene: Scene,
    *,
    data: str | None = None,
    rows: RowCount = 1024,
    std: Size = 0.02,
    steps: Annotated[int, Ge(0)] = 100,
    learning_rate: Annotated[float, Gt(0), Lt(math.inf)] = 2e-3,
) -> Start:
    """A gaussian start, then A and B optimised to leave each layer's calibration outputs unchanged.

    Layer by layer: Adam on ‖s X A B‖² over the layer's inputs X. What it measured on held-out texts
    before and after is kept with the adapter.
    """
    heard = listen(scene, data, rows, "output_match")
    factors = dict(gaussian(scene, std=std).factors)
    before, after = [], []
    for site in scene.sites:
        x_NI = heard.seen.get(site.name)
        if x_NI is None:
            continue
        old = factors[site.name]
        new = matched(site, old, x_NI, steps, learning_rate)
        factors[site.name] = new
        held = heard.held[site.name]
        for changes, f in ((before, old), (after, new)):
            a_IR, b_RO = np.array(f.lora_a_IR), np.array(f.lora_b_RO)
            changes.append(output_change(site, a_IR, b_RO, held))
    return Start(
        factors,
        measured={
            "output_change_before": float(np.mean(before)) if before else 0.0,
            "output_change_after": float(np.mean(after)) if after else 0.0,
        },
    )


def matched(
    site: Site, start: Factors, x_NI: np.ndarray, steps: int, learning_rate: float
) -> Factors:
    """Factors after `steps` of Adam on the mean square of the update's output, in its own units."""
    r_KI = mx.array(np.linalg.qr(x_NI / math.sqrt(len(x_NI)), mode="r"))  # same norms, fewer rows
    factors = {"a": start.lora_a_IR, "b": start.lora_b_RO}

    def loss(factors: dict[str, mx.array]) -> mx.array:
        return mx.log(mx.square(site.scale * (r_KI @ factors["a"]) @ factors["b"]).sum() + 1e-30)

    step = mx.value_and_grad(loss)
    optimizer = optim.Adam(learning_rate=learning_rate)
    for _ in range(steps):
        _, grads = step(factors)
        factors = optimizer.apply_gradients(grads, factors)
        mx.eval(factors, optimizer.state)
    return Factors(factors["a"], factors["b"])


def listen(scene: Scene, data: str | None, rows: int, who: str) -> Inputs:
    """Inputs of every site on the calibration texts."""
    seen, held = scene.texts(data, who)
    return inputs(scene.model, scene.layers, seen, held, rows=rows)


def output_change(site: Site, a_IR: np.ndarray, b_RO: np.ndarray, x_NI: np.ndarray) -> float:
    """‖scale · X A B‖ / ‖X Wᵀ‖ on these inputs."""
    y_NO = np.array(site.linear(mx.array(x_NI)).astype(mx.float32))
    if "bias" in site.linear:
        y_NO = y_NO - np.array(site.linear.bias.astype(mx.float32))
    return relative_error(site.scale * (x_NI @ a_IR) @ b_RO, y_NO)
