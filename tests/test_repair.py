"""Intruders are found where they were planted and turned down; all else stays as it was."""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from typer.testing import CliRunner

from mlx_lora import bases, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.cli import app
from mlx_lora.errors import AdapterError, ConfigError, RunError
from mlx_lora.ship import repair as repairing
from mlx_lora.ship.repair import Wanted, answers, mended, repair, replaced, strangers, turned_down
from mlx_lora.spectral.base import frozen_layers, matrix, sigma_max
from mlx_lora.spectral.deep import lying
from mlx_lora.spectral.spectrum import Pair
from tests.test_metrics_doc import documented, emitted

SPIKED = "model.layers.2.mlp.up_proj"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def unit(*shape: int, seed: int) -> np.ndarray:
    x = random(*shape, seed=seed)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def update(pair: Pair) -> np.ndarray:
    return pair.scale * (pair.a_IR @ pair.b_RO).T


PAIR = Pair("m", random(30, 5, seed=1), random(5, 20, seed=2), 2.0, 2.0**-23)


@pytest.mark.parametrize("times", [0.75, 0.0])
def test_the_share_of_each_intruder_is_turned_down_and_the_rank_stays(times):
    lefts, rights = unit(3, 20, seed=3), unit(3, 30, seed=4)
    found = turned_down(PAIR, lefts, rights, times)
    assert found.a_IR.shape == PAIR.a_IR.shape and found.b_RO.shape == PAIR.b_RO.shape
    np.testing.assert_allclose(
        answers(found, lefts, rights), times * answers(PAIR, lefts, rights), atol=1e-9
    )
    np.testing.assert_allclose(
        answers(PAIR, lefts, rights), np.einsum("ko,oi,ki->k", lefts, update(PAIR), rights)
    )
    change = update(PAIR) - update(found)
    assert np.linalg.matrix_rank(change, tol=1e-9) == 3
    q_b, q_a = np.linalg.qr(PAIR.b_RO.T)[0], np.linalg.qr(PAIR.a_IR)[0]
    np.testing.assert_allclose(q_b @ (q_b.T @ change @ q_a) @ q_a.T, change, atol=1e-9)


def test_no_smaller_change_within_the_adapter_does_it():
    left, right = unit(1, 20, seed=3), unit(1, 30, seed=4)
    change = update(PAIR) - update(turned_down(PAIR, left, right, 0.0))
    q_b, q_a = np.linalg.qr(PAIR.b_RO.T)[0], np.linalg.qr(PAIR.a_IR)[0]
    p, q = left[0] @ q_b, right[0] @ q_a
    least = answers(PAIR, left, right)[0] / (np.linalg.norm(p) * np.linalg.norm(q))
    assert np.linalg.norm(change) == pytest.approx(abs(least))


def test_a_pair_without_full_rank_keeps_its_shape():
    thin = replace(PAIR, a_IR=np.repeat(PAIR.a_IR[:, :1], 5, axis=1))
    found = turned_down(thin, unit(1, 20, seed=3), unit(1, 30, seed=4), 0.5)
    assert found.a_IR.shape == (30, 5) and np.isfinite(found.b_RO).all()
    wide = Pair("w", random(3, 5), random(5, 4), 1.0, 2.0**-23)  # rank above both sizes
    found = turned_down(wide, unit(1, 4, seed=3), unit(1, 3, seed=4), 1.0)
    assert found.a_IR.shape == (3, 5)
    np.testing.assert_allclose(update(found), update(wide), atol=1e-9)


def test_an_embedding_lies_turned():
    mx.random.seed(0)
    table = nn.Embedding(60, 40)
    layers = {"e": table}
    spike = Pair("e", 90 * unit(1, 60, seed=5).T, unit(1, 40, seed=6), 1.0, 2.0**-23)
    (found,) = strangers(spike, layers, Wanted())
    assert found.sigma > 80 and found.left_O.shape == (60,)
    a, b = mended(spike, layers, [found], 0.1)
    assert (a.shape, b.shape) == ((60, 1), (1, 40))
    assert np.linalg.norm(a @ b) == pytest.approx(9, rel=0.1)
    twice = lying(lying(spike, table), table)
    assert np.array_equal(twice.a_IR, spike.a_IR) and np.array_equal(twice.b_RO, spike.b_RO)


def test_an_intruder_is_found_in_its_expert():
    mx.random.seed(0)
    layers = {"up": SwitchLinear(40, 60, 3, bias=False)}
    spike = Pair("up[1]", 90 * unit(1, 40, seed=5).T, unit(1, 60, seed=6), 1.0, 2.0**-23)
    still = replace(spike, name="up[2]", b_RO=0 * spike.b_RO)
    assert len(strangers(spike, layers, Wanted())) == 1
    assert strangers(still, layers, Wanted()) == []


def test_one_expert_is_repaired_and_the_others_stay():
    a, b = mx.random.normal((3, 2, 8)), mx.random.normal((3, 6, 2))
    before = {"up": (a, b), "x": (a, b)}
    found = replaced(before, {"up[1]": (np.ones((8, 2)), np.ones((2, 6)))})
    assert found["x"] is before["x"]
    assert mx.array_equal(found["up"][0][1], mx.ones((2, 8)))
    assert not mx.array_equal(a[1], mx.ones((2, 8))), "the original is compared with"
    for e in (0, 2):
        assert mx.array_equal(found["up"][1][e], b[e])


@pytest.fixture(scope="module")
def spiked(tmp_path_factory):
    """A faint adapter of the embedded model, with one loud direction in one module."""
    loaded = models.load("demo")
    config = attach(loaded, keys=["q_proj", "up_proj"], init="gaussian", init_options={"std": 0.02})
    layer = lora_layers(loaded.model)[SPIKED]
    size = 4 * sigma_max(matrix(frozen_layers(loaded.model)[SPIKED])) / layer.scale
    loud = mx.array(unit(128, seed=7), mx.float32), mx.array(size * unit(384, seed=8), mx.float32)
    layer.lora_a[:, 0], layer.lora_b[0] = loud
    folder = tmp_path_factory.mktemp("spiked")
    files.save(loaded.model, config | {"base": bases.identity(loaded)}, folder)
    return folder


def test_the_planted_intruder_is_repaired_and_nothing_else(spiked, tmp_path):
    out = tmp_path / "sound"
    done = CliRunner().invoke(
        app, ["repair", str(spiked), "--out", str(out), "--lambda", "0.1", "--json"]
    )
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told == json.loads((out / "repair.json").read_text())
    assert emitted(told) == documented("repair.json")
    assert (told["intruders_before"], told["intruders_after"]) == (1, 0)
    (module,) = told["modules"]
    assert module["module"] == SPIKED and module["moved"] == pytest.approx(0.9, abs=0.02)
    (found,) = module["intruders"]
    assert found["sigma"] == pytest.approx(4 * module["base"], rel=0.1)
    assert found["share"] > 0.8 and found["after"] < 0.3 * found["sigma"]
    assert told["kl_base_after"] < 0.2 * told["kl_base_before"]
    _, old = files.read(spiked)
    config, new = files.read(out)
    changed = {name for name in old if not mx.array_equal(old[name], new[name])}
    assert changed == {f"{SPIKED}.lora_a", f"{SPIKED}.lora_b"}
    assert all(old[name].shape == new[name].shape for name in old)
    assert config["base"]["model"] == "demo"
    assert json.loads((out / "check.json").read_text())["expect"] == "healthy", "meant to differ"
    assert {p.name for p in out.iterdir()} == {
        files.WEIGHTS, files.CONFIG, "repair.json", "repair.png", "check.json"
    }  # fmt: skip


def test_without_an_intruder_nothing_is_written(spiked, tmp_path):
    options = ["--out", str(tmp_path / "o"), "--cosine", "0.001"]
    done = CliRunner().invoke(app, ["repair", str(spiked), *options, "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["out"] is None and told["intruders_before"] == 0
    shown = CliRunner().invoke(app, ["repair", str(spiked), *options])
    assert shown.exit_code == 0 and "nothing to repair" in shown.stdout
    assert not list(tmp_path.iterdir())


def test_a_repair_that_the_check_refuses_is_not_written(spiked, tmp_path, monkeypatch):
    measured = SimpleNamespace(bitwise_identical=False, kl_mean=9.0, top1_agreement=0.1)
    failed = SimpleNamespace(exit_code=1, verdict="fail", reasons=["garbled"], measured=measured)
    monkeypatch.setattr(repairing, "judged", lambda *_: failed)
    options = ["--out", str(tmp_path / "o"), "--json"]
    done = CliRunner().invoke(app, ["repair", str(spiked), *options])
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["out"] is None and told["check"]["verdict"] == "fail"
    assert not list(tmp_path.iterdir())


def test_a_repair_is_written_whole_or_not_at_all(spiked, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repairing, "repair_plot", full)
    with pytest.raises(RunError, match="cannot be written: No space"):
        repair(spiked, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_repaired_is_said(spiked, tmp_path):
    with pytest.raises(RunError, match="not an empty folder"):
        repair(spiked, spiked)
    for wrong in ({"times": 1.0}, {"top": 0}, {"cosine": 0.0}):
        with pytest.raises(ConfigError, match="got"):
            Wanted(**wrong)
    loaded = models.load("demo")
    config = attach(loaded, keys=["q_proj"])
    files.save(loaded.model, config | {"base": bases.identity(loaded)}, tmp_path / "untrained")
    with pytest.raises(AdapterError, match="untrained"):
        repair(tmp_path / "untrained", tmp_path / "o")
    loaded = models.load("demo")
    config = attach(loaded, keys=["q_proj"], dora=True)
    files.save(loaded.model, config | {"base": bases.identity(loaded)}, tmp_path / "dora")
    with pytest.raises(AdapterError, match="DoRA"):
        repair(tmp_path / "dora", tmp_path / "o")
