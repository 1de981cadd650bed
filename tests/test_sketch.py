"""The gradient sketch is the gradient's, and halves of the data agree on what was planted."""

import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapter.attach import attach, lora_layers, site_of
from mlx_lora.adapter.inits.gradient import gradients, summed_loss
from mlx_lora.adapter.scene import Scene
from mlx_lora.advise import summed
from mlx_lora.data import Text
from mlx_lora.errors import ModelError
from mlx_lora.spectral.sketch import OVERSAMPLE, agreements, null_of
from tests.tiny import tiny

TEXTS = [Text(tuple((3 * i + k * k) % 90 + 2 for k in range(12)), 1 + i % 3) for i in range(12)]
O, I = 160, 96  # noqa: E741


def halves(seed: int, rank: int, noise: float, strengths=None):
    """Two gradients with `rank` directions in common, and as products."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, max(rank, 1))))[0] for n in (O, I))
    common = (u * (np.ones(rank) if strengths is None else strengths)) @ v.T if rank else 0.0
    both = [common + noise * rng.standard_normal((O, I)) / O**0.5 for _ in range(2)]
    start = rng.standard_normal((I, 16 + OVERSAMPLE))
    return agreements(
        lambda half, x: {"w": both[half] @ x["w"]},
        lambda half, x: {"w": both[half].T @ x["w"]},
        {"w": start},
        16,
    )["w"]


@pytest.mark.parametrize("noise", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("planted", [0, 2, 5, 10])
def test_a_planted_rank_is_found_to_one_in_nine_of_ten_seeds(planted, noise):
    found = [halves(seed, planted, noise).agreeing for seed in range(10)]
    assert sum(abs(rank - planted) <= 1 for rank in found) >= 9, found


def test_unequal_strengths_are_found_too_and_all_agree_where_more_is_planted_than_measured():
    strengths = np.geomspace(1, 0.6, 5)
    assert abs(halves(0, 5, 0.3, strengths).agreeing - 5) <= 1
    full = halves(0, 24, 0.2)
    assert full.agreeing == full.measured == 16 and full.open == "all_agree"


@pytest.mark.parametrize("planted", [2, 5, 10])
def test_what_is_planted_is_known_to_be_all_there_is(planted):
    found = [halves(seed, planted, 0.45) for seed in range(10)]
    assert sum(f.open is None for f in found) >= 9
    assert np.mean([f.held for f in found]) == pytest.approx(1, abs=0.1)


def test_directions_that_noise_hides_are_known_to_be_there():
    strengths = np.concatenate([np.ones(3), np.full(60, 0.2)])  # 60 that are too weak to see
    found = [halves(seed, 63, 0.6, strengths) for seed in range(10)]
    assert all(f.agreeing <= 5 and f.open == "too_few_texts" for f in found)


def test_a_direction_of_one_half_alone_does_not_count():
    rng = np.random.default_rng(0)
    both = [rng.standard_normal((O, I)) * 0.3 / O**0.5 for _ in range(2)]
    both[0] += 5 * np.outer(*(np.linalg.qr(rng.standard_normal((n, 1)))[0] for n in (O, I)))
    found = agreements(
        lambda half, x: {"w": both[half] @ x["w"]},
        lambda half, x: {"w": both[half].T @ x["w"]},
        {"w": rng.standard_normal((I, 24))},
        16,
    )["w"]
    assert found.agreeing == 0 and abs(found.common) < 0.2


def test_norm_and_common_part_are_those_of_the_matrices():
    found = [halves(seed, 5, 0.5) for seed in range(10)]
    size = (5 + 0.25 * I) ** 0.5  # ‖M‖² = 5, ‖N‖² = 0.25 · I
    assert np.mean([f.norm for f in found]) == pytest.approx(size, rel=0.05)
    assert np.mean([f.common for f in found]) == pytest.approx(5 / size**2, abs=0.05)


def test_a_gradient_that_is_zero_agrees_on_nothing():
    zero = np.zeros((O, I))
    found = agreements(
        lambda half, x: {"w": zero @ x["w"]},
        lambda half, x: {"w": zero.T @ x["w"]},
        {"w": np.ones((I, 24))},
        16,
    )["w"]
    assert found.agreeing == 0 and found.norm == 0 and found.common == 0


def test_the_null_is_the_spread_of_pairs_that_do_not_belong_together():
    rng = np.random.default_rng(0)
    cosines = 0.1 * rng.standard_normal((40, 40)) + np.diag(np.full(40, 0.9))
    assert null_of(cosines) == pytest.approx(0.1, rel=0.1)


def test_batches_of_any_size_add_up_to_the_gradient_of_all_texts():
    model = tiny()
    attach(model, rank=2, scale=1.0, keys=["q_proj"])
    sites = [site_of(n, m, 2) for n, m in lora_layers(model).items()]
    scene, known = Scene(model, sites, 0), {s.name: np.eye(s.in_dims)[:, :6] for s in sites}
    batches, steps = [TEXTS[:1], TEXTS[1:3], TEXTS[3:]], []
    parts = summed(scene, batches, known, "lora_b", lambda: steps.append(1))
    for name, whole in gradients(scene, TEXTS, known, "lora_b").items():
        assert np.linalg.norm(parts[name] - whole) <= 1e-5 * np.linalg.norm(whole), name
    assert len(steps) == 3


def test_what_has_nothing_to_learn_does_not_count():
    model = tiny()
    attach(model, rank=2, scale=1.0, keys=["q_proj"])
    sites = [site_of(n, m, 2) for n, m in lora_layers(model).items()]
    scene, known = Scene(model, sites, 0), {s.name: np.eye(s.in_dims)[:, :6] for s in sites}
    cut_off = [Text((5, 6, 7), 3), Text((5, 6, 7), 40)]
    found = gradients(scene, [*TEXTS, *cut_off], known, "lora_b")
    for name, whole in gradients(scene, TEXTS, known, "lora_b").items():
        assert np.linalg.norm(found[name] - whole) <= 1e-5 * np.linalg.norm(whole), name
    with pytest.raises(ModelError, match="a token to learn"):
        gradients(scene, cut_off, known, "lora_b")


@pytest.mark.parametrize("wanted", ["lora_b", "lora_a"])
def test_the_sketch_is_the_gradient_times_the_test_matrix(wanted):
    model = tiny()
    attach(model, rank=2, scale=2.0)
    sites = [site_of(n, m, 2) for n, m in lora_layers(model).items()]
    rng = np.random.default_rng(0)
    known = {
        s.name: rng.standard_normal((s.in_dims if wanted == "lora_b" else s.out_dims, 6))
        for s in sites
    }
    sketches = gradients(Scene(model, sites, 0), TEXTS, known, wanted)

    for site in sites:
        site.linear.unfreeze()
    grads = nn.value_and_grad(model, summed_loss)(model, TEXTS)[1]
    tokens = sum(len(t.ids) - t.start for t in TEXTS)
    flat = dict(nn.utils.tree_flatten(grads))
    for site in sites:
        g_OI = np.array(flat[f"{site.name}.linear.weight"], np.float64) / tokens
        exact = (g_OI if wanted == "lora_b" else g_OI.T) @ known[site.name]
        error = np.linalg.norm(sketches[site.name] - exact) / np.linalg.norm(exact)
        assert error <= 1e-5, site.name
