"""Reading in chunks is reading in full, in little memory; intervals and remarks tell the truth."""

import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from matplotlib.figure import Figure

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, forget_base, lora_layers
from mlx_lora.check import gate, layers
from mlx_lora.check.adapters import largest_update, moves_outputs
from mlx_lora.check.gates import gates
from mlx_lora.check.plots import from_rounding_up
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import COLUMNS, blocks_of, by_text, fingerprint, intervals, read_both
from mlx_lora.check.run import parse_limits, request
from mlx_lora.check.show import print_report
from mlx_lora.check.sides import CHUNK, Side, refuse_other_tokens
from mlx_lora.check.writing import write_both
from mlx_lora.errors import ConfigError
from tests.test_check import GOOD
from tests.tiny import IDS, tiny, tiny_loaded

RNG = np.random.default_rng(0)


def text(length: int, start: int = 1) -> tuple[list[int], int]:
    return RNG.integers(2, 90, length).tolist(), start


def noisy(**options) -> models.Loaded:
    loaded = tiny_loaded(**options)
    attach(loaded, init="gaussian", init_options={"std": 0.05}, rank=4)
    return loaded


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_chunks_through_a_cache_equal_one_forward(architecture):
    """A text longer than a chunk, against logits and formulas of the whole."""
    loaded = noisy(architecture=architecture, bits=4)
    probes = Probes([text(2 * CHUNK + 40, start=7), text(30)], [])
    reading = read_both(Side(loaded, off=True), Side(loaded), probes)
    assert reading.columns_CK.shape == (len(COLUMNS), 2 * CHUNK + 40 - 7 + 29)
    for index, (ids, start) in enumerate(probes.texts):
        ids_1T = mx.array([ids])
        with Side(loaded, off=True).entered() as model:
            p = logps(model(ids_1T))
        q = logps(loaded.model(ids_1T))
        at = slice(start - 1, len(ids) - 1)
        expected = {
            "kl": (np.exp(p) * (p - q)).sum(-1)[at],
            "nll_base": -np.take_along_axis(p[:-1], np.array(ids)[1:, None], 1)[start - 1 :, 0],
            "nll_adapted": -np.take_along_axis(q[:-1], np.array(ids)[1:, None], 1)[start - 1 :, 0],
            "entropy_adapted": -(np.exp(q) * q).sum(-1)[at],
        }
        mine = reading.text_K == index
        order = np.argsort(reading.position_K[mine])
        for name, values in expected.items():
            assert np.allclose(reading.column(name)[mine][order], values, atol=1e-3), name


def logps(logits: mx.array) -> np.ndarray:
    x = np.array(logits.astype(mx.float32), np.float64)[0]
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_blocks_hold_every_text_once_and_stay_small():
    probes = Probes([text(n) for n in (5, 300, 40, 7, 90, 600, 33)], [])
    for vocabulary in (64, 130_000):
        blocks = blocks_of(probes, vocabulary)
        assert sorted(i for b in blocks for i in b.texts_N) == list(range(7))
        for block in blocks:
            rows, width = block.ids_NT.shape
            assert rows == 1 or rows * width <= max(CHUNK, (1 << 22) // vocabulary)


MEMORY = """
import mlx_lora, mlx.core as mx
from mlx_lora.adapter.attach import attach
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import CHUNK, Side
from tests import tiny
tiny.COMMON["vocab_size"] = 30_000
tiny.COMMON["max_position_embeddings"] = 4096
loaded = tiny.tiny_loaded()
attach(loaded, rank=4)
probes = Probes([([5] * 600, 1), ([7] * 200, 190), ([9] * 40, 1)], [])
short = Probes([([5] * 8, 1)], [])
read_both(Side(loaded, off=True), Side(loaded), short)
before = mx.get_active_memory()
mx.reset_peak_memory()
read_both(Side(loaded, off=True), Side(loaded), probes)
print((mx.get_peak_memory() - before) / (4 * CHUNK * 30_000))
"""


def test_memory_stays_below_three_chunks_of_a_large_vocabulary():
    """In a process of its own, where nothing else allocates."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True
    )
    assert 1.5 < float(done.stdout) < 3.0


def test_the_fingerprint_is_that_of_the_reading_and_feels_every_text():
    loaded = tiny_loaded(bits=4)
    attach(loaded, rank=4)
    probes = Probes([text(9), text(20), text(CHUNK + 9)], [])
    base = fingerprint(Side(loaded, off=True), probes)
    reading = read_both(Side(loaded, off=True), Side(loaded), probes)
    assert reading.base_prints == reading.adapted_prints == base
    probes.texts[0][0][3] += 1
    assert fingerprint(Side(loaded), probes) != base


def test_intervals_cover_the_mean_and_shrink_with_texts():
    loaded = noisy(bits=4)
    few, many = (Probes([text(20) for _ in range(n)], []) for n in (6, 60))
    widths = []
    for probes in (few, many):
        reading = read_both(Side(loaded, off=True), Side(loaded), probes)
        low, high = intervals(reading)["kl_mean"]
        assert low < reading.mean("kl") < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]
    same = read_both(Side(loaded), Side(loaded), few)
    assert intervals(same)["perplexity_ratio"] == (1.0, 1.0)


def test_by_text_is_the_mean_over_each_text():
    loaded = noisy(bits=4)
    probes = Probes([text(12), text(30), text(7)], [])
    reading = read_both(Side(loaded, off=True), Side(loaded), probes)
    alone = [
        read_both(Side(loaded, off=True), Side(loaded), Probes([t], [])).mean("kl")
        for t in probes.texts
    ]
    assert by_text(reading, probes.texts)["kl"] == pytest.approx(alone, rel=1e-3)


def test_a_value_near_its_limit_says_so():
    wide = replace(GOOD, bitwise_identical=False, kl_mean=0.0009)
    wide = replace(wide, intervals={**GOOD.intervals, "kl_mean": (0.0005, 0.002)})
    said = gates["divergence"](wide, "same", None)
    assert said.verdict == "warn" and said.near
    assert "0.0005 to 0.002, includes the limit 0.001" in said.sentence
    sure = replace(wide, intervals={**GOOD.intervals, "kl_mean": (0.0008, 0.00095)})
    assert not gates["divergence"](sure, "same", None).near


class TestSensitivity:
    def test_an_adapter_that_is_attached_moves_the_outputs_and_is_left_as_it_was(self):
        loaded = tiny_loaded(bits=4)
        attach(loaded, rank=4)
        probes = Probes([(IDS[0], 1)], [])
        before = [m.lora_b for m in lora_layers(loaded.model).values()]
        assert moves_outputs(loaded.model, probes)
        after = [m.lora_b for m in lora_layers(loaded.model).values()]
        assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))

    def test_an_adapter_at_scale_zero_or_cut_off_does_not(self):
        loaded = tiny_loaded(bits=4)
        attach(loaded, rank=4, scale=0.0)
        probes = Probes([(IDS[0], 1)], [])
        assert not moves_outputs(loaded.model, probes)
        report = gate.judge(
            loaded, Probes([(IDS[0], 1)], ["abc"]), gate.fingerprint(loaded, probes), "same",
            "zero", 0.0, 0,
        )  # fmt: skip
        assert report.verdict == "fail"
        assert "moves no output" in report.reasons[0]


def test_the_size_of_an_update_is_exact_over_the_estimated_weight():
    model = tiny(bits=4)
    attach(model, init="gaussian", init_options={"std": 0.1}, rank=4, scale=3.0, keys=["q_proj"])
    sizes = {}
    for name, layer in lora_layers(model).items():
        delta = 3.0 * np.array(layer.lora_a) @ np.array(layer.lora_b)
        weight = np.array(models.dense_weight(layer.linear))
        sizes[name] = np.linalg.norm(delta) / np.linalg.norm(weight)
    name, size = largest_update(lora_layers(model))
    assert name == max(sizes, key=lambda n: sizes[n])
    assert size == pytest.approx(sizes[name], rel=0.1)


def test_principal_components_taken_out_of_the_base_are_no_update(tmp_path):
    """PiSSA at full rank puts all of a weight into BA: sound, and little moves."""
    loaded = models.load("demo")
    attach(loaded, init="pissa", rank=64, keys=["k_proj", "v_proj"])
    fitted, sizes = lora_layers(loaded.model), {}
    for name, layer in fitted.items():
        was = np.array(models.dense_weight(layer.__dict__["_base"]))
        update = float(layer.scale) * (np.array(layer.lora_a) @ np.array(layer.lora_b)).T
        change = np.array(models.dense_weight(layer.linear)) + update - was
        sizes[name] = np.linalg.norm(change) / np.linalg.norm(was)
    name, size = largest_update(fitted)
    assert size == pytest.approx(sizes[name], rel=0.1) and size < 0.1
    fitted[name].lora_b = fitted[name].lora_b * 3
    assert largest_update(fitted)[1] > 1
    config = {"init": {"name": "pissa"}, "lora_parameters": {"rank": 64, "scale": 2.0}}
    config["lora_parameters"] |= {"keys": ["self_attn.k_proj", "self_attn.v_proj"]}
    files.save(loaded.model, config, tmp_path / "a")
    forget_base(loaded.model)
    assert largest_update(fitted) == ("", None)
    again = models.load("demo")
    files.load(again.model, tmp_path / "a")
    assert largest_update(lora_layers(again.model)) == ("", None)


def test_drift_is_zero_for_a_harmless_start_and_begins_at_the_block_that_was_touched():
    loaded = tiny_loaded(bits=4)
    attach(loaded, rank=4)
    probes = Probes([text(12), text(9)], [])
    sides = Side(loaded, off=True), Side(loaded)
    assert [x["drift"] for x in layers.drift(*sides, probes)] == [0, 0]
    touched = lora_layers(loaded.model)["model.layers.1.mlp.up_proj"]
    touched.lora_b = touched.lora_b + 0.5
    first, second = (x["drift"] for x in layers.drift(*sides, probes))
    assert first == 0 and second > 1e-3


class TestTwoModels:
    def test_a_model_against_itself_is_the_same_and_against_another_not(self):
        one, same = models.load("demo"), models.load("demo")
        report = gate.compare(one, same)
        assert report.verdict == "pass" and report.measured.bitwise_identical
        assert report.measured.sensitive is None and report.measured.b_norm is None
        coarse = gate.compare(models.load("demo", quantize={"bits": 2}), one)
        assert coarse.verdict == "fail"
        assert gate.compare(one, same, expect="changed").verdict == "fail"

    def test_an_exported_copy_is_the_same_as_the_trained_adapter(self, tmp_path):
        trained = models.load("demo")
        config = attach(trained, init="gaussian", init_options={"std": 0.05}, rank=4)
        files.save(trained.model, config, tmp_path)
        copy = models.load("demo")
        files.load(copy.model, tmp_path)
        assert gate.compare(copy, trained).measured.bitwise_identical
        for layer in lora_layers(copy.model).values():
            layer.scale = 8 * layer.scale
        assert gate.compare(copy, trained).verdict == "fail"

    def test_models_with_other_tokens_are_refused(self):
        with pytest.raises(ConfigError, match=r"1024 and 96 tokens wide.*cut the same text"):
            refuse_other_tokens(Side(models.load("demo")), Side(tiny_loaded()))


class TestOptions:
    def asked(self, **changed):
        plain = {"adapter": None, "init": "zero", "option": [], "lora": {}, "bits": None}
        return request("demo", **{**plain, **changed})

    def test_options_that_exclude_each_other(self, tmp_path):
        for changed, words in (
            ({"against": "demo", "init": "gaussian"}, "as they are"),
            ({"adapter2": tmp_path}, "belongs to the model of --against"),
            ({"adapter": tmp_path, "init": "gaussian"}, "brings its own start"),
        ):
            with pytest.raises(ConfigError, match=words):
                self.asked(**changed)

    def test_limits_reach_their_gates(self):
        limits = parse_limits(["divergence.fail=1e-9", "divergence.warn=1e-10"])
        assert limits == {"divergence": {"fail": 1e-9, "warn": 1e-10}}
        loaded = models.load("demo")
        lax = gate.check(loaded, init="tiny_scale", limits=None)
        assert lax.verdict == "warn"
        strict = gate.check(models.load("demo"), init="tiny_scale", limits=limits)
        assert strict.verdict == "fail"
        for wrong in ({"divergense": {"fail": 1}}, {"divergence": {"fial": 1}}):
            with pytest.raises(Exception, match="diverg"):
                gate.check(models.load("demo"), limits=wrong)
        with pytest.raises(ConfigError, match=r"gate\.threshold"):
            parse_limits(["fail=1"])


def test_the_sides_of_two_models_have_their_names(capsys):
    both = (models.load("demo", quantize={"bits": 4, "group_size": 64}), models.load("demo"))
    report = gate.compare(*both, samples=1)
    print_report(report)
    assert report.sides == ("demo (the base here)", "demo")
    assert "demo (the base here)" in capsys.readouterr().out


def test_against_the_real_command_line(run_cli, tmp_path):
    done = run_cli(
        "check", "demo", "--bits", "8", "--against", "demo", "--layers", "--json",
        "--plot", tmp_path / "check.png",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert done.returncode in (0, 1), done.stderr
    assert document["kl_mean"] > 0 and len(document["layers"]) == 5
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kl", [0.0, 3e-10, 0.2, float("nan")])
def test_a_picture_of_no_kl_says_so(kl):
    """Bars of the height of the floor looked like those of a broken adapter."""
    axes = Figure().subplots()
    from_rounding_up(axes, np.array([0.0, kl]))
    said = " ".join(text.get_text() for text in axes.texts)
    assert said == {0.0: "0 everywhere", 3e-10: "rounding: 3e-10 at most"}.get(kl, "")
    assert axes.get_ylim()[0] == 1e-9 and not axes.get_ylim()[1] < kl


def test_the_base_reads_its_own_samples_and_those_of_the_adapted_side():
    """Garble surprises the base; its own samples do not, whatever the adapted side writes."""
    loaded = models.load("demo")
    attach(loaded, init="gaussian", init_options={"std": 0.2})
    sides = Side(loaded, off=True), Side(loaded)
    prompts = ["How many legs has a duck?", "What is 2 * 4 ?"]
    found = write_both(*sides, prompts, 12, 0)
    assert found["sample_nll_base"] < 2 < 6 < found["sample_nll_adapted"]
    same = write_both(sides[0], sides[0], prompts, 12, 0)
    assert same["sample_nll_base"] == pytest.approx(same["sample_nll_adapted"], abs=1e-5)
    assert same["sample_nll_base"] == pytest.approx(found["sample_nll_base"], abs=1e-4)
    assert found["mismatch_max"] < 1e-2
