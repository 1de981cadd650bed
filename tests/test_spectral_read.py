"""Spectra from files: every format as stored, ten digits, broken files named, nothing heavy."""

import json
import math
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import bases, cpu_threads
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.mapped import BF16, mapped, widened
from mlx_lora.errors import AdapterError
from mlx_lora.report.compare import compare
from mlx_lora.ship.shrink import refuse_unfit
from mlx_lora.spectral import gram
from mlx_lora.spectral.read import of_folder
from mlx_lora.spectral.report import LoRAAnalyzer, to_json, write
from mlx_lora.spectral.show import summary
from mlx_lora.spectral.spectrum import measure
from tests.tiny import tiny_loaded

PLAIN = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.0}}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def save(folder, tensors, config=PLAIN, *, dtype=mx.float32, peft=False):
    """An adapter folder, mlx-lm's or PEFT's, of arrays by name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "adapter_model.safetensors" if peft else "adapters.safetensors"
    stored = {k: mx.array(v).astype(dtype) for k, v in tensors.items()}
    mx.save_safetensors(str(folder / name), stored)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dense(a_IR, b_RO) -> np.ndarray:
    """Singular values of the product, formed and decomposed in float64."""
    count = min(*a_IR.shape, b_RO.shape[1])
    return np.linalg.svd(np.float64(a_IR) @ np.float64(b_RO), compute_uv=False)[:count]


def turned(rows: int, rank: int, s_R, seed: int = 0) -> np.ndarray:
    """Orthonormal columns times s times a rotation: these are its singular values."""
    q, _ = np.linalg.qr(random(rows, rank, seed=seed))
    v, _ = np.linalg.qr(random(rank, rank, seed=seed + 1))
    return (q * s_R) @ v


# Accuracy


@pytest.mark.parametrize("condition", [1.0, 30.0, 60.0, 500.0, 1e3, 1e5])
def test_ten_digits_whatever_the_condition(condition, monkeypatch):
    qr, used = np.linalg.qr, []
    monkeypatch.setattr(gram.np.linalg, "qr", lambda *a, **k: used.append(1) or qr(*a, **k))
    a = turned(700, 16, np.geomspace(1, 1 / condition, 16))
    used.clear()
    b = random(16, 500, seed=5)
    found, s_a, _ = gram.spectra(a, b)
    assert bool(used) == (condition > 100)
    wanted = dense(a, b)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-15 * condition)
    np.testing.assert_allclose(s_a, np.linalg.svd(a, compute_uv=False), rtol=1e-10)


def test_columns_of_any_size_need_no_qr(monkeypatch):
    a, b = random(600, 16), random(16, 900, seed=1) * np.geomspace(1, 1e-6, 16)[:, None]
    wanted = gram.spectra(a, b)
    monkeypatch.setattr(gram, "SAFE", 0)
    for fast, slow in zip(wanted, gram.spectra(a, b), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-9)
    monkeypatch.undo()
    monkeypatch.setattr(gram.np.linalg, "qr", lambda *a, **k: pytest.fail("no need"))
    gram.spectra(a, b)


def test_directions_below_rounding_are_zero():
    turn = np.linalg.qr(random(6, 6, seed=3))[0]
    a, b = random(40, 6), turn @ np.diag([1, 1, 1, 1, 0, 0.0]) @ random(6, 30, seed=1)
    assert b.all() and (gram.spectra(a, b)[0] > 0).tolist() == [True] * 4 + [False] * 2


def test_blocks_of_rows_add_up(monkeypatch):
    a = random(130, 8)
    monkeypatch.setattr(gram, "ROWS", 50)
    np.testing.assert_allclose(gram.gram(a), a.T @ a, rtol=1e-12)
    whole = gram.householder(a)
    monkeypatch.setattr(gram, "TALL", 50)
    np.testing.assert_allclose(np.abs(gram.householder(a)), np.abs(whole), rtol=1e-10)


def test_a_zero_factor_and_a_tiny_one():
    a = random(50, 4)
    s_ba, s_a, s_b = gram.spectra(a, np.zeros((4, 20)))
    assert not s_ba.any() and not s_b.any() and s_a.all()
    tiny, _, _ = gram.spectra(a, random(4, 20, seed=1) * 1e-200)  # its Gram matrix underflows
    np.testing.assert_allclose(tiny, dense(a, random(4, 20, seed=1)) * 1e-200, rtol=1e-9)


def test_a_pool_of_threads_has_a_blas_without_any():
    blas = cpu_threads.numpys_blas()

    def threads() -> int:
        return max((library.num_threads for library in blas), default=1)

    def give(count):
        for library in blas:
            library.set_num_threads(count)

    before = threads()
    give(2)
    try:
        inside = cpu_threads.each(lambda _: threads(), range(4))
        assert inside == [1] * 4 and cpu_threads.each(lambda x: x * x, [3, 2, 1]) == [9, 4, 1]
        assert threads() == (2 if blas else 1)
        with pytest.raises(ZeroDivisionError):
            cpu_threads.each(lambda x: 1 // x, [0])
        assert threads() == (2 if blas else 1)
    finally:
        give(before)


# Formats


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_mapped_file_holds_what_mlx_reads(tmp_path, dtype):
    save(tmp_path, {"m.lora_a": random(9, 4), "m.lora_b": random(4, 5, seed=1)}, dtype=dtype)
    loaded = mx.load(str(tmp_path / "adapters.safetensors"))
    found = mapped(tmp_path / "adapters.safetensors")
    assert found.keys() == loaded.keys()
    for name, value in found.items():
        assert (value.dtype == BF16) == (dtype == mx.bfloat16)
        np.testing.assert_array_equal(widened(value), np.array(loaded[name].astype(mx.float32)))
    (pair,) = of_folder(tmp_path)
    wanted = dense(*(np.array(loaded[f"m.{f}"].astype(mx.float32)) for f in ("lora_a", "lora_b")))
    np.testing.assert_allclose(measure(pair).singular_values, wanted, rtol=1e-10)
    assert pair.eps == float(mx.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_nan_in_any_precision_is_a_status(tmp_path, dtype, bad):
    b = random(4, 5)
    b[2, 2] = bad
    save(tmp_path, {"m.lora_a": random(9, 4), "m.lora_b": b}, dtype=dtype)
    report = LoRAAnalyzer(tmp_path).analyze()
    assert report.adapters["m"].status == "non_finite" and report.suggested_rank is None


Q = "model.layers.0.self_attn.q_proj"


def peft_folder(folder, rank=4, **about):
    a, b = random(rank, 9), random(5, rank, seed=1)
    tensors = {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **about}
    return save(folder, tensors, config, peft=True), np.float32(a).T, np.float32(b).T


@pytest.mark.parametrize(
    ("about", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 4, 0.5),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
    ],
)
def test_peft_scales_stay_scales(tmp_path, about, rank, scale):
    folder, a, b = peft_folder(tmp_path, rank, **about)
    (m,) = LoRAAnalyzer(folder).analyze().adapters.values()
    assert (m.nominal_rank, m.effective_lr_scale, m.alpha) == (rank, scale, scale * rank)
    np.testing.assert_allclose(m.singular_values, dense(a, b), rtol=1e-10)


def test_dora_and_padded_ranks(tmp_path):
    a, b = random(9, 4), random(4, 5, seed=1)
    a[:, 2:], b[2:] = 0, 0
    tensors = {f"{Q}.lora_a": a, f"{Q}.lora_b": b, f"{Q}.m": np.ones(5)}
    config = {**PLAIN, "fine_tune_type": "dora", "rank_pattern": {Q: 2}}
    (m,) = LoRAAnalyzer(save(tmp_path, tensors, config)).analyze().adapters.values()
    assert m.nominal_rank == 2 and m.kappa_A_status == "exact"
    np.testing.assert_allclose(m.singular_values, dense(a[:, :2], b[:2]), rtol=1e-6)


@pytest.mark.parametrize("times", [1.0, 1.5, math.nan])
def test_magnitudes_alone_are_judged_by_the_base(tmp_path, times):
    loaded = tiny_loaded()
    config = attach(loaded, dora=True, keys=["q_proj"], rank=4)
    layers = lora_layers(loaded.model)
    for layer in layers.values():
        layer.m = times * layer.m
    files.save(loaded.model, config, tmp_path)
    alone, beside = (LoRAAnalyzer(tmp_path, m).analyze() for m in (None, tiny_loaded(bits=None)))
    live = LoRAAnalyzer(loaded.model).analyze()
    wanted = {1.0: "untrained", 1.5: "magnitudes"}.get(times, "non_finite")
    assert alone.status == ("non_finite" if math.isnan(times) else "unjudged")
    assert (beside.status, live.status) == (wanted, wanted)
    assert beside.suggested_rank is None
    assert [a.name for a in alone.alerts] == (["non_finite"] * 2 if math.isnan(times) else [])
    for m in beside.adapters.values():
        change = None if math.isnan(times) else pytest.approx(times - 1, abs=1e-6)
        assert m.magnitude_change == change
    if times == 1.5:
        assert ["untrained" in line for line in summary(alone) + summary(beside)].count(True) == 0
        assert "DoRA's magnitudes moved by at most 0.5 of the base's." in summary(beside)
        write(alone, tmp_path)
        write(beside, tmp_path)
        with pytest.raises(AdapterError, match="has BA = 0 everywhere"):
            refuse_unfit(of_folder(tmp_path), tmp_path, dora=True)


def test_experts_are_read_one_by_one(tmp_path):
    a, b = random(3, 4, 9), random(3, 5, 4, seed=1)
    save(tmp_path, {f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    found = LoRAAnalyzer(tmp_path).analyze().adapters
    assert list(found) == [f"{Q}[{e}]" for e in range(3)]
    for e, m in enumerate(found.values()):
        wanted = dense(np.float32(a[e]).T, np.float32(b[e]).T)
        np.testing.assert_allclose(m.singular_values, wanted, rtol=1e-10)


@pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors", "peft"])
def test_an_adapters_file_stands_for_its_folder(tmp_path, name):
    """So does mlx-lm's checkpoint beside the adapter, which holds other factors."""
    folder, *_ = peft_folder(tmp_path / "peft")
    if name != "peft":
        tensors = {"m.lora_a": random(9, 4), "m.lora_b": random(4, 5)}
        config = {**PLAIN, "base": {"quantization": {"bits": 3}}}
        folder = save(tmp_path / "a", tensors, config)
        doubled = {n: mx.array(2 * x).astype(mx.float32) for n, x in tensors.items()}
        mx.save_safetensors(str(folder / "0000100_adapters.safetensors"), doubled)
    file = folder / name.replace("peft", "adapter_model.safetensors")
    (found,), (whole,) = (LoRAAnalyzer(x).analyze().adapters.values() for x in (file, folder))
    times = 4 if name.startswith("0") else 1
    np.testing.assert_allclose(found.singular_values, np.multiply(times, whole.singular_values))
    assert bases.recorded(file) == bases.recorded(folder)
    assert [m["size"][0] / m["size"][1] for m in compare([file, folder]).modules.values()] == [
        times
    ]


# Bad input


def run(folder, *more: str) -> tuple[int, dict]:
    command = [sys.executable, "-m", "mlx_lora", "spectrum", str(folder), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout)


BROKEN = {
    "empty": (lambda whole: b"", "sound safetensors"),
    "truncated": (lambda whole: whole[:-40], "after the file does"),
    "a torn header": (lambda whole: whole[:20], "only the start"),
    "no safetensors": (lambda whole: b"PK\x03\x04" + bytes(200), "safetensors"),
    "another type": (lambda whole: whole.replace(b"F32", b"I32"), "its type I32"),
    "another shape": (lambda whole: whole.replace(b"[9,4]", b"[9,5]"), "does not fit its shape"),
    "foreign": (lambda whole: whole.replace(b".lora_b", b".lokr_b"), "is not a LoRA factor"),
    "no tensors": (lambda whole: b"\x02" + bytes(7) + b"{}", "no tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_errors_with_a_reason(tmp_path, name):
    save(tmp_path, {"m.lora_a": random(9, 4), "m.lora_b": random(4, 5)})
    file = tmp_path / "adapters.safetensors"
    change, message = BROKEN[name]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(AdapterError, match=message):
        LoRAAnalyzer(tmp_path).analyze()


CURVED = {"fine_tune_type": "spline", "num_layers": -1}
CURVED |= {"lora_parameters": {"rank": 4, "scale": 2.0, "type": "spline", "num_knots": 3}}


def curved(curve=(0.1, 0.0, -0.1), scale=2.0):
    pair = {"m.lora_a": random(8, 4), "m.lora_b": random(4, 6)}
    return {**pair, "m.spline": np.array(curve), "m.spline_scale": np.array([scale])}


def test_a_broken_curve_is_a_status_and_gets_no_advice(tmp_path):
    assert LoRAAnalyzer(save(tmp_path / "good", curved(), CURVED)).analyze().status == "trained"
    for i, bad in enumerate([((np.nan, 0, 0), 2.0), ((0, 0, 0), np.nan), ((0, 0, 0), 0.0)]):
        report = LoRAAnalyzer(save(tmp_path / str(i), curved(*bad), CURVED)).analyze()
        assert (report.status, report.suggested_rank) == ("non_finite", None)
        failed = [(f.name, f.module) for f in report.alerts if f.severity == "fail"]
        assert failed == [("non_finite", "m")]
        json.dumps(to_json(report), allow_nan=False)


def test_curves_that_are_missing_or_of_another_length_are_named(tmp_path):
    short = curved((0.1, 0.2))
    del short["m.spline_scale"]
    with pytest.raises(AdapterError) as caught:
        LoRAAnalyzer(save(tmp_path, short, CURVED)).analyze()
    assert "m.spline is (2,), should be (3,)" in str(caught.value)
    assert "m.spline_scale is missing" in str(caught.value)


def test_parameters_as_targets_are_refused(tmp_path):
    folder, *_ = peft_folder(tmp_path, target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterError, match="target_parameters"):
        of_folder(folder)


def test_the_command_line_says_so_in_one_document(tmp_path):
    code, document = run(tmp_path / "nowhere")
    assert code == 2 and document["error"]["type"] == "AdapterError"
    save(tmp_path / "zero", {"m.lora_a": random(9, 4), "m.lora_b": np.zeros((4, 5))})
    code, document = run(tmp_path / "zero")
    assert code == 0 and document["status"] == "untrained" and document["suggested_rank"] is None


def test_reading_an_adapter_loads_nothing_heavy(tmp_path):
    save(tmp_path, {"m.lora_a": random(9, 4), "m.lora_b": random(4, 5)})
    program = (
        "import sys; from mlx_lora.spectral.report import LoRAAnalyzer, to_json\n"
        f"to_json(LoRAAnalyzer({str(tmp_path)!r}).analyze())\n"
        "print({'mlx_lm', 'transformers', 'matplotlib', 'mlx.nn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
