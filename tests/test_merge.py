"""Merged adapters do what the formula says, and what keeps adapters apart is named."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import bases, cli, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import AdapterError, ConfigError, UnknownNameError
from mlx_lora.ship import merge as merging
from mlx_lora.ship.algebra import Thin, decomposed, overlap, principal_cosines, product, rebuilt
from mlx_lora.ship.formats import FORMATS
from mlx_lora.ship.merge import merge
from mlx_lora.ship.methods import methods
from mlx_lora.ship.trained import read
from tests.test_ship import adapter
from tests.tiny import IDS, tiny_loaded

RNG = np.random.default_rng(0)
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def of_a_tiny_model(request, monkeypatch):
    """Their base is a tiny model that is in no folder; the check runs where a test asks for it."""
    if "checked" not in request.fixturenames:
        monkeypatch.setattr(merging, "opened", lambda *_: ("tiny", tiny_loaded(), []))
        monkeypatch.setattr(merging, "proven", lambda merged, *_: merged)


def thin(rank=3, inputs=20, outputs=12) -> Thin:
    return Thin(RNG.standard_normal((inputs, rank)), RNG.standard_normal((rank, outputs)))


def dense(t) -> np.ndarray:
    if isinstance(t, Thin):
        return t.a_IK @ t.b_KO
    return (t.u_IK * t.s_K) @ t.v_OK.T


def deltas(folder, **options) -> dict[str, np.ndarray]:
    loaded = tiny_loaded(**options)
    files.load(loaded.model, folder)
    return {
        name: m.scale * np.array(m.lora_a @ m.lora_b)
        for name, m in lora_layers(loaded.model).items()
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Adapters of other seeds, ranks, scales and layers on one base."""
    folder = tmp_path_factory.mktemp("merge")
    return [
        adapter(folder / "one" / "adapters", tiny_loaded()),
        adapter(folder / "two" / "adapters", tiny_loaded(), seed=1, rank=4, scale=3.0),
        adapter(folder / "three" / "adapters", tiny_loaded(), seed=2, keys=["q_proj"]),
    ]


def test_linear_is_the_weighted_sum_in_every_layer(three, tmp_path):
    found = merge(three, tmp_path / "m", weights=[0.5, 2.0, -1.0])
    merged, parts = deltas(tmp_path / "m"), [deltas(folder) for folder in three]
    for name, value in merged.items():
        wanted = sum(w * p[name] for w, p in zip((0.5, 2.0, -1.0), parts, strict=True) if name in p)
        assert np.allclose(value, wanted, atol=1e-5), name
    assert found.kept == pytest.approx(1) and found.to_json()["rank"] == 20
    assert found.names == ["one/adapters", "two/adapters", "three/adapters"]
    assert {"merge.json", "merge.png"} <= {p.name for p in (tmp_path / "m").iterdir()}


def test_a_smaller_rank_keeps_the_best_part_and_says_how_much(three, tmp_path):
    found = merge(three[:2], tmp_path / "m", rank=4)
    whole, part = merge(three[:2], tmp_path / "whole"), deltas(tmp_path / "m")
    full = deltas(tmp_path / "whole")
    norms = [sum((d**2).sum() for d in side.values()) for side in (part, full)]
    assert 0.2 < found.kept < 0.9 and whole.kept == pytest.approx(1)
    assert found.kept == pytest.approx(norms[0] / norms[1], rel=1e-4)
    best = np.linalg.svd(full[MODULE], compute_uv=False)[:4]
    assert np.allclose(np.linalg.svd(part[MODULE], compute_uv=False)[:4], best, rtol=1e-4)


def test_orthogonal_leaves_the_first_alone_where_it_acts():
    parts = [thin(), thin(), thin(2)]
    found = dense(methods["orthogonal"](parts, [1.0, 2.0, 1.0], 99)[0])
    first = decomposed(parts[0])
    inside = first.u_IK @ first.u_IK.T @ found @ first.v_OK @ first.v_OK.T
    assert np.allclose(inside, dense(parts[0]))
    plain = dense(methods["linear"](parts, [1.0, 2.0, 1.0], 99)[0])
    assert not np.allclose(plain, found)
    apart = [Thin(np.eye(20)[:, :2], np.eye(12)[:2]), Thin(np.eye(20)[:, 2:4], np.eye(12)[2:4])]
    assert np.allclose(dense(methods["orthogonal"](apart, [1, 1], 9)[0]), sum(map(dense, apart)))


def test_ties_is_the_papers_example():
    """Figure 1 of the paper, in a 1×4 layer: trim the small, vote on signs, mean of those."""
    updates = [[3.0, 0.1, -2.0, 4.0], [5.0, 0.2, 3.0, -1.0], [-1.0, 0.1, 4.0, 2.0]]
    parts = [Thin(np.eye(1), np.array([u])) for u in updates]
    found, energy = methods["ties"](parts, [1.0, 1.0, 1.0], 1, density=0.75)
    wanted = [4.0, 0.0, 3.5, 3.0]
    assert np.allclose(dense(found), [wanted], atol=1e-5)
    assert energy == pytest.approx(np.square(wanted).sum())


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ((2.0, 2.0, 2.0), [8.0, 0.0, 7.0, 6.0]),  # the paper's lambda
        ((1.0, 1.0, 3.0), [4.0, 0.0, 7.5, 5.0]),  # the mean of 3 and 12, and of 4 and 6
        ((1.0, 1.0, -1.0), [3.0, 0.0, -3.0, 4.0]),
    ],
)
def test_ties_counts_each_update_times_its_weight(weights, wanted):
    updates = [[3.0, 0.1, -2.0, 4.0], [5.0, 0.2, 3.0, -1.0], [-1.0, 0.1, 4.0, 2.0]]
    parts = [Thin(np.eye(1), np.array([u])) for u in updates]
    found, _ = methods["ties"](parts, weights, 1, density=0.75)
    assert np.allclose(dense(found), [wanted], atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "orthogonal"])
def test_without_weights_linear_is_the_mean_and_the_others_count_one(method, three, tmp_path):
    pair = [three[0], three[0]]
    found = merge(pair, tmp_path / "m", method=method)
    assert found.weights == ([0.5, 0.5] if method == "linear" else [1.0, 1.0])
    if method != "ties":  # of the same adapter twice the mean is it, and so is what is orthogonal
        merged, once = deltas(tmp_path / "m"), deltas(three[0])
        assert np.allclose(merged[MODULE], once[MODULE], atol=1e-5)


def test_ties_says_what_its_rank_cannot_hold(three, tmp_path):
    found = merge(three[:2], tmp_path / "m", method="ties", options={"density": 0.5}, rank=6)
    assert 0.1 < found.kept < 0.9
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["method"] == "ties"


def test_angles_are_those_between_the_spaces():
    angle = 0.3
    x = np.eye(5)[:, :2]
    y = np.stack(
        [np.eye(5)[:, 0], np.cos(angle) * np.eye(5)[:, 1] + np.sin(angle) * np.eye(5)[:, 2]]
    )
    assert np.allclose(principal_cosines(x, y.T), [1, np.cos(angle)])
    assert overlap(x, y.T) == pytest.approx((1 + np.cos(angle) ** 2) / 2)
    assert overlap(x, np.eye(5)[:, 3:]) == 0 and overlap(x, np.zeros((5, 0))) == 0


def test_decomposing_and_rebuilding_is_the_same_update():
    whole = thin(4)
    back, share = rebuilt(decomposed(whole), None)
    assert np.allclose(dense(back), dense(whole)) and share == pytest.approx(1)
    assert product(whole, back) == pytest.approx((dense(whole) ** 2).sum())
    none, share = rebuilt(decomposed(Thin(whole.a_IK, 0 * whole.b_KO)), None)
    assert dense(none).any() == False and share == 1  # noqa: E712


def test_the_same_adapter_twice_overlaps_wholly(three, tmp_path):
    found = merge([three[0], three[0]], tmp_path / "m", weights=[0.5, 0.5])
    (pair,) = found.pairs
    assert pair["cosine"] == pytest.approx(1)
    assert pair["overlap_inputs"] == pytest.approx(1) == pair["overlap_outputs"]
    loaded = tiny_loaded()
    files.load(loaded.model, tmp_path / "m")
    once = tiny_loaded()
    files.load(once.model, three[0])
    assert np.allclose(loaded.model(mx.array(IDS)), once.model(mx.array(IDS)), atol=1e-4)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Two adapters of the embedded model."""
    folder = tmp_path_factory.mktemp("checked")
    quiet = {"keys": ["q_proj"], "init_options": {"std": 0.03}}
    return [adapter(folder / str(i), models.load("demo"), seed=i, **quiet) for i in range(2)]


def test_a_merge_is_checked_and_leaves_the_proof(checked, tmp_path):
    found = merge(checked, tmp_path / "m")
    report = json.loads((tmp_path / "m" / "check.json").read_text())
    assert report["verdict"] == found.to_json()["check"]["verdict"] == "pass"
    assert report["expect"] == "healthy" and report["kl_mean"] > 0 and report["base_recorded"]
    assert found.base == "demo" and read(tmp_path / "m").about_base["quantization"]["bits"] == 4


def test_a_merge_that_breaks_the_model_is_not_written(checked, tmp_path, capsys):
    asked = ["merge", *map(str, checked), "--out", str(tmp_path / "m"), "--weights", "40,40"]
    assert cli.app([*asked, "--json"], standalone_mode=False) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["out"] is None and told["check"]["verdict"] == "fail"
    assert not list(tmp_path.iterdir())


def test_adapters_that_are_not_the_bases_are_refused(checked, three, tmp_path):
    with pytest.raises(AdapterError, match="does not belong to demo"):
        merge(three[:2], tmp_path / "m", model="demo")


def begun(folder, to, **init):
    """The adapter in a folder, as if this init had started it."""
    config, tensors = files.read(folder)
    files.write({**config, "init": init}, tensors, to)
    return to


def test_what_lies_on_a_base_of_its_own_stays_there(three, tmp_path):
    one = begun(three[0], tmp_path / "one", name="pissa", iterations=4, measured={"seconds": 1})
    two = begun(three[0], tmp_path / "two", name="pissa", iterations=4, measured={"seconds": 2})
    merge([one, two], tmp_path / "m")
    merged = read(tmp_path / "m")
    assert merged.rebased
    assert "pissa" in FORMATS["peft"].refusals(merged, {"model_type": "llama"})[0]
    nobody = begun(three[0], tmp_path / "nobody", name="pissa", iterations=4)
    for folder in (one, nobody):
        about = json.loads((folder / files.CONFIG).read_text())
        (folder / files.CONFIG).write_text(json.dumps(about | {"base": {"model": "demo"}}))
    others = {
        "the original": three[0],
        "another init": begun(three[0], tmp_path / "loftq", name="loftq"),
        "another option": begun(three[0], tmp_path / "option", name="pissa", iterations=5),
        "another rank": begun(three[1], tmp_path / "rank", name="pissa", iterations=4),
        "other layers": begun(three[2], tmp_path / "layers", name="pissa", iterations=4),
        "nobody knows": nobody,
    }
    for why, other in others.items():
        first = one if why == "nobody knows" else two
        for pair in ([first, other], [other, first]):
            with pytest.raises(AdapterError, match="a base of its own"):
                merge(pair, tmp_path / why)


def test_numbers_that_are_none_are_refused(three, tmp_path):
    for weight in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="finite"):
            merge(three[:2], tmp_path / "m", weights=[weight, 1.0])
    config, tensors = files.read(three[0])
    tensors[f"{MODULE}.lora_b"] = tensors[f"{MODULE}.lora_b"] * np.nan
    files.write(config, tensors, tmp_path / "nan")
    with pytest.raises(AdapterError, match=f"nan: NaN or infinity in {MODULE}"):
        merge([tmp_path / "nan", three[1]], tmp_path / "m")


def test_everything_that_keeps_them_apart_is_listed(three, tmp_path):
    config, tensors = files.read(three[0])
    config["base"] = {**config["base"], "model_type": "qwen3"}
    config["base"]["sketch"] = bases.sketch(tiny_loaded(seed=4).model)
    tensors[f"{MODULE}.lora_a"] = mx.zeros((64, 8))
    files.write(config, tensors, tmp_path / "other")
    dora = adapter(tmp_path / "dora", tiny_loaded(), dora=True)
    with pytest.raises(AdapterError) as refused:
        merge([three[0], tmp_path / "other", dora], tmp_path / "m")
    for words in ("for a qwen3", "on other weights", f"{MODULE} is 128 to 128", "DoRA"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="2 adapters and 1 weights"):
        merge(three[:2], tmp_path / "m", weights=[1.0])
    with pytest.raises(ConfigError, match="density"):
        merge(three[:2], tmp_path / "m", method="ties", options={"density": 2.0})
    with pytest.raises(UnknownNameError):
        merge(three[:2], tmp_path / "m", method="slerp")
    assert not (tmp_path / "m").exists()
