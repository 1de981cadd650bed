"""The spline adapter: bitwise plain LoRA at the start, then a curve that stays what it says."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import cpu, cpu_math, cpu_spline
from mlx_lora.adapter import files, spline
from mlx_lora.adapter.attach import attach, lora_layers, switched_off
from mlx_lora.adapter.listen import its_input, listening
from mlx_lora.adapter.population import Noise, population
from mlx_lora.adapter.spline import spline_layers
from mlx_lora.adapter.spline_math import (
    Curve,
    bent,
    curve_of,
    hinges,
    knots,
    middle,
    pulling,
    single,
    slopes,
)
from mlx_lora.adapter.tensors import read
from mlx_lora.check.metrics import is_finite
from mlx_lora.config import from_text, notices
from mlx_lora.cpu_layers import view
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.rl import checkpoints
from mlx_lora.rl.learner import step
from mlx_lora.ship import trained
from mlx_lora.ship.shrink import shrink
from mlx_lora.ship.switch import Adapters
from mlx_lora.spectral import splines
from mlx_lora.spectral.report import LoRAAnalyzer
from tests.tiny import IDS, tiny, tiny_loaded

CURVES = [
    Curve(),
    Curve(num_knots=2),
    Curve(num_knots=9, k_min=-1.0, k_max=2.0),
    Curve(num_knots=4, k_min=-0.3, k_max=0.6),
    Curve(num_knots=3, k_min=1.0, k_max=2.0),
    Curve(num_knots=4, k_min=-2.0, k_max=-1.0),
]
X = mx.array(IDS)


def attached(curve=None, *, bits=None, fast=True, rank=4, moved=True, **more):
    """A tiny model with an adapter, the same factors whatever its type."""
    model = tiny(bits=bits)
    if fast:
        cpu.accelerate(model)
    config = attach(model, rank=rank, scale=2.0, seed=1, curve=curve, **more)
    if moved:
        move(model)
    return model, config


def move(model, size=0.1):
    for number, layer in enumerate(lora_layers(model).values()):
        key = mx.random.key(number)
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=key)
        if "spline" in layer:
            layer.spline = 0.3 * mx.random.normal(layer.spline.shape, key=key)
            layer.spline_scale = mx.array([10.0])


def straight(model):
    """Its curves are the identity again."""
    for layer in spline_layers(model).values():
        layer.spline = mx.zeros_like(layer.spline)
    return model


def loss(model):
    return mx.square(model(X)).mean()


def gradients(model) -> dict:
    return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


def slow(z: np.ndarray, d_K: np.ndarray, scale: float, curve: Curve) -> np.ndarray:
    """φ one number at a time, in float64."""
    k_K = np.linspace(curve.k_min, curve.k_max, curve.num_knots)

    def s(u):
        i = int(np.clip(np.searchsorted(k_K, u, "right") - 1, 0, len(k_K) - 2))
        return d_K[i] + (u - k_K[i]) * (d_K[i + 1] - d_K[i]) / (k_K[i + 1] - k_K[i])

    return np.array([x + (s(scale * x) - s(0.0)) / scale for x in z.tolist()])


def some(curve: Curve, scale=1.0):
    """Numbers over the grid, its knots and well beyond it, and a curve's parameters."""
    z = np.concatenate([np.linspace(-9, 9, 201), knots(curve)]).astype(np.float32) / scale
    d_K = np.random.default_rng(curve.num_knots).normal(size=curve.num_knots).astype(np.float32)
    return z, d_K


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_it_starts_as_plain_lora_to_the_bit(bits, fast):
    base = tiny(bits=bits)
    if fast:
        cpu.accelerate(base)
    fresh, _ = attached(Curve(), bits=bits, fast=fast, moved=False)
    assert mx.array_equal(fresh(X), base(X))
    bent_model, _ = attached(Curve(), bits=bits, fast=fast)
    plain, _ = attached(bits=bits, fast=fast)
    straight(bent_model)
    assert mx.array_equal(bent_model(X), plain(X))
    theirs, ours = gradients(plain), gradients(bent_model)
    assert all(mx.array_equal(theirs[name], ours[name]) for name in theirs)
    curves = {name for name in ours if name.endswith(".spline")}
    assert ours.keys() - theirs.keys() == curves and len(curves) == 14
    assert all(mx.any(ours[name] != 0).item() for name in curves)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_it_starts_as_plain_lora_in_half_precision(dtype):
    z = mx.random.normal((5, 40), key=mx.random.key(0)).astype(dtype)
    same = bent(z, mx.zeros(5), mx.ones(1), Curve())
    assert same.dtype == dtype and mx.array_equal(same, z)


def test_switched_off_it_is_the_base():
    model, _ = attached(Curve())
    base = tiny()
    cpu.accelerate(base)
    with switched_off(model):
        assert mx.array_equal(model(X), base(X))
    assert not mx.array_equal(model(X), base(X))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_pieces_are_those_of_a_slow_reference(curve, scale):
    z, d_K = some(curve, scale)
    wanted = slow(z, d_K.astype(np.float64), scale, curve)
    arrays = mx.array(z), mx.array(d_K), mx.array([scale])
    assert np.allclose(np.array(bent(*arrays, curve)), wanted, rtol=1e-5, atol=2e-6)
    weights_P = (hinges(curve) @ d_K).astype(np.float32)
    edges = (knots(curve)[1:-1] / scale).astype(np.float32)
    pieces = cpu_math.Hinges(weights_P, edges, middle(curve))
    quick = cpu_math.curved(z[None].copy(), pieces)[0]
    assert np.allclose(quick, wanted, rtol=1e-5, atol=2e-5)  # hinges cancel far outside
    nothing = np.zeros((1, 3), np.float32)
    assert not cpu_math.curved(nothing.copy(), pieces).any()
    if curve.num_knots > 2:
        slopes_P = 1 + slopes(curve) @ d_K
        found = (slopes_P[0] + slopes_P[-1]) / 2, np.diff(slopes_P) / 2, edges
        kinks = cpu_math.Kinks(*(np.asarray(x, np.float32) for x in found))
        each = cpu_math.Kinks(*(x[..., None].repeat(z.size, -1) for x in vars(kinks).values()))
        for bend in (kinks.bend, each.bend_few):
            y, still = kinks.slope * z[None], nothing[:, :1].repeat(z.size, 1)
            bend(y, z[None])
            assert np.allclose(y, wanted, rtol=1e-5, atol=2e-5)
            bend(still, np.zeros_like(still))
            assert not still.any()
    assert not mx.any(bent(mx.zeros(3), *arrays[1:], curve)).item()


@pytest.mark.parametrize("count", [2, 5, 10])
def test_a_soft_curve_is_a_mean_with_bell_shaped_weights(count):
    curve = Curve(count, -1.0, 2.0, "soft", "clamp")
    u, d_K = np.linspace(-1, 2, 301), np.random.default_rng(count).normal(size=count)
    places = np.append(u, 0.0)[:, None]
    weights = np.exp(-np.square((places - np.linspace(-1, 2, count)) / (3 / (count - 1))))
    means = (weights @ d_K) / weights.sum(axis=1)
    found = bent(single(u), single(d_K), mx.array([1.0]), curve)
    assert np.allclose(found, u + means[:-1] - means[-1], atol=2e-6)


@pytest.mark.parametrize("method", ["piecewise", "soft"])
@pytest.mark.parametrize("extrapolation", ["linear", "clamp"])
def test_gradients_are_finite_differences(method, extrapolation):
    curve = Curve(interpolation_method=method, extrapolation=extrapolation)
    z, d_K = np.array([-4.1, -2.2, -0.7, 0.4, 2.9, 3.6], np.float32), some(curve)[1]
    weights = mx.array([1.0, -0.5, 2.0, 0.3, 1.5, -1.0])

    def value(z, d_K):
        return (weights * bent(z, d_K, mx.array([1.0]), curve)).sum()

    found = mx.grad(value, argnums=(0, 1))(mx.array(z), mx.array(d_K))
    for argument, gradient in enumerate(found):
        for i in range(gradient.size):
            ends = []
            for side in (1, -1):
                moved = [z.copy(), d_K.copy()]
                moved[argument][i] += side * 1e-2
                ends.append(value(*map(mx.array, moved)).item())
            assert abs((ends[0] - ends[1]) / 2e-2 - gradient[i].item()) < 5e-3


def test_the_way_back_in_numpy_is_that_of_mlx():
    quick, _ = attached(Curve())
    own, _ = attached(Curve(), fast=False)
    assert mx.allclose(quick(X), own(X), rtol=1e-4, atol=1e-4)
    ours, theirs = gradients(quick), gradients(own)
    for name, wanted in theirs.items():
        size = mx.abs(wanted).max().item()
        assert mx.allclose(ours[name], wanted, rtol=1e-3, atol=1e-4 * size), name


def test_outside_the_grid_the_end_slopes_go_on_or_nothing_does():
    d_K, ends = mx.array([-0.5, 0.0, 0.0, 0.0, 0.75]), mx.array([-30.0, -4.0, 4.0, 30.0])
    on = bent(ends, d_K, mx.ones(1), Curve())
    slope = np.diff(np.array(on))[[0, 2]] / 26
    assert np.allclose(slope, [1 + 0.5 / 1.5, 1 + 0.75 / 1.5])
    still = bent(ends, d_K, mx.ones(1), Curve(extrapolation="clamp"))
    assert still.tolist() == [-3.5, -3.5, 3.75, 3.75]


@pytest.mark.parametrize(
    "curve", [Curve(), Curve(interpolation_method="soft")], ids=["hard", "soft"]
)
def test_zero_stays_zero_in_training_and_decay_leaves_curves_alone(curve):
    model, _ = attached(curve)
    optimizer = optim.AdamW(learning_rate=0.01, weight_decay=0.5)
    for _ in range(2):
        step(model, optimizer, nn.value_and_grad(model, loss)(model)[1])
    for layer in spline_layers(model).values():
        assert mx.any(layer.spline[1:] != layer.spline[:-1]).item()
        assert layer.bent(mx.zeros(4)).tolist() == [0.0] * 4
    before = spline_layers(model)
    still = {n: mx.zeros_like(v) for n, v in tree_flatten(model.trainable_parameters())}
    grads = tree_unflatten(list(still.items()))
    start = {n: np.array(m.spline) for n, m in before.items()}
    step(model, optim.SGD(learning_rate=1.0, weight_decay=0.5), grads)
    for name, layer in spline_layers(model).items():
        pulled = start[name] - curve.spline_reg_weight * pulling(curve) @ start[name]
        assert np.allclose(np.array(layer.spline), pulled, atol=1e-6)


def test_the_regulariser_is_zero_for_the_identity_and_grows_with_turns():
    curve = Curve(num_knots=4)

    def penalty(d):
        return np.mean(d**2) + np.mean(np.diff(d, n=2) ** 2)

    d_K = np.array([0.3, -0.1, 0.4, 0.2])
    for i in range(4):
        push = np.eye(4)[i] * 1e-6
        slope = (penalty(d_K + push) - penalty(d_K - push)) / 2e-6
        assert abs(slope - (pulling(curve) @ d_K)[i]) < 1e-6


@pytest.mark.parametrize("few", [0, cpu_spline.FEW])
@pytest.mark.parametrize("bits", [None, 4])
def test_decoding_beside_the_merged_products_is_the_forward(bits, few, monkeypatch):
    monkeypatch.setattr(cpu_spline, "FEW", few)
    model, _ = attached(Curve(), bits=bits)
    wanted = model(X)
    with cpu.decoding(model):
        names = {type(m).__name__ for m in spline_layers(model).values()}
        found, kept = model(X), make_prompt_cache(model)
        model(X[:, :-1], cache=kept)
        one_more = model(X[:, -1:], cache=kept)
    assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert mx.allclose(one_more, wanted[:, -1:], rtol=1e-4, atol=1e-4)
    assert names == ({"DecodingSpline"} if cpu.fast() else {"SplineLoRALinear"})
    assert {type(m).__name__ for m in spline_layers(model).values()} == {"SplineLoRALinear"}


@pytest.mark.parametrize("fast", [True, False])
def test_a_population_bends_each_members_own_update(fast):
    model, _ = attached(Curve(), fast=fast)
    noise, sigmas = Noise(seed=3, generation=0), dict.fromkeys(lora_layers(model), 0.05)
    x = mx.concatenate([X, X])
    with population(model, noise, sigmas, [0, 1], [0, 0, 1, 1]) as sit:
        sit([0, 1, 2, 3])
        found = model(x)
        with cpu.decoding(model):
            merged = model(x)
    assert mx.allclose(found, merged, rtol=1e-4, atol=1e-4)
    for member, sign in ((0, 1), (1, -1)):
        own, _ = attached(Curve(), fast=fast)
        for name, layer in lora_layers(own).items():
            layer.lora_b += sign * 0.05 * noise.drawn(name, [0], layer.lora_b.shape)[0]
        assert mx.allclose(found[2 * member : 2 * member + 2], own(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curve", [Curve(), Curve(3, -1.0, 2.0, "soft", "clamp", 0.5)], ids=str)
def test_saved_and_loaded_it_is_the_same(curve, tmp_path):
    model, config = attached(curve, bits=4)
    files.save(model, config, tmp_path)
    again = tiny(bits=4)
    cpu.accelerate(again)
    found = files.load(again, tmp_path)
    assert found["fine_tune_type"] == "spline"
    assert all(m.curve == curve for m in spline_layers(again).values())
    assert mx.array_equal(again(X), model(X))
    trained = {n for n, _ in tree_flatten(again.trainable_parameters())}
    assert {n.rpartition(".")[2] for n in trained} == {"lora_a", "lora_b", "spline"}


def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    def some_steps(model, optimizer, count):
        for _ in range(count):
            step(model, optimizer, nn.value_and_grad(model, loss)(model)[1])
        mx.eval(model.parameters(), optimizer.state)

    model, config = attached(Curve())
    optimizer = optim.AdamW(learning_rate=0.01)
    some_steps(model, optimizer, 1)
    checkpoints.save(tmp_path, 1, model, optimizer, config)
    some_steps(model, optimizer, 2)
    again, _ = attached(Curve(), moved=False)
    taken_up = optim.AdamW(learning_rate=0.01)
    assert checkpoints.load(tmp_path / "0000001", again, taken_up) == 1
    some_steps(again, taken_up, 2)
    wanted, found = (dict(tree_flatten(m.parameters())) for m in (model, again))
    assert all(mx.array_equal(wanted[name], found[name]) for name in wanted)


def test_stock_mlx_lm_fails_and_says_where(tmp_path):
    model, config = attached(Curve())
    files.save(model, config, tmp_path)
    with pytest.raises(ValueError, match=r"spline: not an adapter parameter"):
        load_adapters(tiny(), str(tmp_path))


@pytest.mark.parametrize("broken", [("spline", float("nan")), ("spline_scale", 0.0)])
def test_a_broken_curve_does_not_load(broken, tmp_path):
    factor, value = broken
    model, config = attached(Curve())
    layer = next(iter(spline_layers(model).values()))
    layer[factor] = mx.full(layer[factor].shape, value)
    assert is_finite(layer) == (factor != "spline")
    files.save(model, config, tmp_path)
    with pytest.raises(AdapterError, match=f"q_proj.{factor}|proj.{factor}"):
        files.load(tiny(), tmp_path)


def test_a_file_without_its_curves_or_with_a_bad_grid_does_not_load(tmp_path):
    model, config = attached(Curve())
    files.save(model, config, tmp_path)
    config, tensors = read(tmp_path)
    files.write(config, {n: t for n, t in tensors.items() if "spline" not in n}, tmp_path)
    with pytest.raises(AdapterError, match=r"missing .*spline"):
        files.load(tiny(), tmp_path)
    about = json.loads((tmp_path / files.CONFIG).read_text())
    about["lora_parameters"]["k_min"] = 4.0
    (tmp_path / files.CONFIG).write_text(json.dumps(about))
    with pytest.raises(AdapterError, match="k_min 4 is not below k_max 3"):
        files.load(tiny(), tmp_path)


def test_all_that_is_wrong_with_a_grid_is_said_at_once():
    wrong = {"num_knots": 1, "k_min": 2, "k_max": -2, "interpolation_method": "pieceweis"}
    wrong |= {"extrapolation": "wrap", "spline_reg_weight": -1}
    with pytest.raises(AdapterError) as caught:
        curve_of(wrong)
    for part in ("num_knots", "k_min 2 is", "piecewise", "extrapolation", "spline_reg_weight"):
        assert part in str(caught.value)
    with pytest.raises(AdapterError, match="k_max is a finite number"):
        curve_of({"k_max": float("inf")})
    with pytest.raises(AdapterError, match="not both"):
        attach(tiny(), rank=4, dora=True, curve=Curve())
    with pytest.raises(AdapterError, match="no weight matrix"):
        next(iter(spline_layers(attached(Curve())[0]).values())).fuse()


def test_calibration_stretches_the_grid_and_bends_nothing():
    model, _ = attached(Curve(), moved=False)
    before = model(X)
    spline.calibrate(model, IDS, share=0.1)
    assert mx.array_equal(model(X), before)
    first = {n: float(m.spline_scale) for n, m in spline_layers(model).items()}
    for name, layer in spline_layers(model).items():
        products = reached(model, name, lambda m, x: m.linear(x)) / float(layer.scale)
        assert np.isclose(first[name], 3 / (0.1 * products), rtol=1e-4)
    move(model)
    straight(model)
    spline.calibrate(model, IDS, share=0.1)
    for name, layer in spline_layers(model).items():
        update = reached(model, name, lambda m, x: (x @ m.lora_a) @ m.lora_b)
        assert np.isclose(float(layer.spline_scale), 3 / update, rtol=1e-4)


def reached(model, name, product) -> float:
    """The 99 % quantile of what a layer's inputs come to, text by text as calibration reads."""
    layer, values = spline_layers(model)[name], []
    for ids in IDS:
        with spline.listening({name: layer}, spline.its_input) as heard:
            mx.eval(model(mx.array([ids])))
        values.append(np.abs(view(product(layer, heard[name]))).ravel())
    return float(np.quantile(np.concatenate(values), 0.99))


def test_what_is_reported_is_the_curve(tmp_path):
    curve = Curve(num_knots=3, k_min=-2.0, k_max=2.0)
    model, config = attached(curve)
    name, layer = next(iter(spline_layers(model).items()))
    layer.spline, layer.spline_scale = mx.array([0.5, 1.0, 0.0]), mx.array([4.0])
    said = splines.of_model(model)[name]
    assert (said.input_scale, said.output_scale, said.deviation) == (4.0, 0.25, 0.5)
    assert said.knots == [-0.5, 0.0, 0.5]
    assert np.allclose(said.values, [-0.5 - 0.125, 0.0, 0.5 - 0.25])
    assert np.isclose(said.least_slope, 0.5) and np.isclose(said.slope_variance, 0.140625)
    files.save(model, config, tmp_path)
    assert splines.of_folder(tmp_path) == splines.of_model(model)
    report = LoRAAnalyzer(tmp_path).analyze()
    assert report.splines.keys() == report.adapters.keys()
    layer.spline = mx.array([0.5, float("nan"), 0.0])
    broken = splines.of_model(model)[name]
    assert broken.deviation is None and broken.values == []
    straight(model)
    assert "plain LoRA" in splines.headline(splines.of_model(model))


def test_what_ships_refuses_and_what_switches_takes_it(tmp_path):
    model, config = attached(Curve())
    files.save(model, config, tmp_path / "a")
    for refusing in (trained.read, lambda folder: shrink(folder, tmp_path / "b")):
        with pytest.raises(AdapterError, match="type spline: its update bends"):
            refusing(tmp_path / "a")
    adapters = Adapters(tiny_loaded())
    base = adapters.loaded.model(X)
    adapters.use(adapters.load(tmp_path / "a"))
    assert mx.allclose(adapters.loaded.model(X), model(X), rtol=1e-4, atol=1e-4)
    adapters.set_strength(0.0)
    assert mx.array_equal(adapters.loaded.model(X), base)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ("lora_parameters: {k_min: -2.0}", "is of splines only: give type: spline"),
        ("lora_parameters: {type: spline, k_min: 3}", "3 is not below k_max 3"),
        ("lora_parameters: {type: spline, num_knots: 1}", "num_knots: should be greater than"),
        ("lora_parameters: {type: spline, interpolation_method: x}", "'piecewise' or 'soft'"),
        ("lora_parameters: {type: spline, k_max: .inf}", "k_max: should be a finite number"),
        (
            "lora_parameters: {type: spline, interpolation_method: soft, num_knots: 11}",
            "num_knots: a soft curve has at most 10, got 11",
        ),
        ("fine_tune_type: dora\nlora_parameters: {type: spline}", "dora does not go with"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_its_line(keys, part):
    with pytest.raises(ConfigError) as caught:
        from_text(f"model: demo\ndata: x\n{keys}\n")
    assert part in str(caught.value)


def test_evolution_says_that_curves_stay():
    text = "method: es\ntask: countdown\nlora_parameters: {type: spline}\n"
    assert any("curves stay" in notice for notice in notices(from_text(text)))


def test_the_overhead_is_said():
    model, _ = attached(Curve(num_knots=8))
    assert spline.overhead(model).startswith("10 numbers a layer, 140 in 14 layers")
    assert spline.overhead(attached()[0]) is None


@pytest.mark.slow
def test_a_compiled_gradient_is_the_plain_one():
    model, _ = attached(Curve(), fast=False)
    layer = next(iter(spline_layers(model).values()))
    z = mx.random.normal((6, 8), key=mx.random.key(1))

    def value(d_K):
        return mx.square(bent(z, d_K, layer.spline_scale, layer.curve)).sum()

    grad = mx.grad(value)
    assert mx.allclose(mx.compile(grad)(layer.spline), grad(layer.spline), rtol=1e-5)


@pytest.mark.parametrize("curve", CURVES[:4], ids=str)
def test_a_stretched_grid_has_its_knots_on_the_curve_as_it_was(curve):
    model, _ = attached(curve)
    layer = next(iter(spline_layers(model).values()))
    z_K = single(knots(curve) / 25)  # 2.5 times as fine, so inside of what was learned
    before = layer.bent(z_K)
    spline.stretch(layer, 25.0)
    assert layer.spline_scale.item() == 25
    assert np.allclose(layer.bent(z_K), before, atol=1e-6)
    spline.stretch(straight(model) and layer, 7.0)
    assert not mx.any(layer.spline).item()


def test_grids_keep_up_with_what_is_learned_after_powers_of_two():
    model, _ = attached(Curve(), bits=4)
    start = {n: g.item() for n, g in spline.grids(model).items()}
    for steps_done, share in ((3, 0.1), (4, 0.0)):
        spline.keep_up(model, IDS, share, steps_done)
        assert {n: g.item() for n, g in spline.grids(model).items()} == start
    spline.keep_up(model, IDS, 0.1, 4)
    model_inputs = [heard_by(model, ids) for ids in IDS]
    for name, layer in spline_layers(model).items():
        updates = [(x[name] @ layer.lora_a) @ layer.lora_b for x in model_inputs]
        reached = np.quantile(np.abs(np.concatenate([np.array(u).ravel() for u in updates])), 0.99)
        assert abs(layer.spline_scale.item() * reached / 3 - 1) < 0.05, name


def heard_by(model, ids):
    with listening(spline_layers(model), its_input) as heard:
        mx.eval(model(mx.array([ids])))
    return dict(heard)


@pytest.mark.parametrize("method", ["piecewise", "soft"])
def test_nan_stays_nan(method):
    curve = Curve(interpolation_method=method)
    z, d_K = mx.array([float("nan"), 1.0]), mx.ones(5)
    assert mx.isnan(bent(z, d_K, mx.ones(1), curve)).tolist() == [True, False]
    bar = mx.grad(lambda z: bent(z, d_K, mx.ones(1), curve)[1])(z)
    assert abs(bar[1].item() - 1) < 1e-5


def test_a_snapshot_puts_grids_back():
    model, _ = attached(Curve())
    optimizer = optim.Adam(1e-3)
    before = checkpoints.Snapshot.take(0, model, optimizer)
    scale = spline.grids(model)
    spline.keep_up(model, IDS, 0.1, 1)
    assert any(g.item() != scale[n].item() for n, g in spline.grids(model).items())
    before.put_back(model, optimizer)
    assert all(g.item() == scale[n].item() for n, g in spline.grids(model).items())
