"""Several adapters on one model: each is what it was alone, and without one the base is itself."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.ship.switch import Adapters
from tests.test_ship import adapter
from tests.tiny import IDS, tiny_loaded


def logits(loaded) -> np.ndarray:
    return np.array(models.logits(loaded.model, mx.array(IDS)))


def alone(folder, **options) -> np.ndarray:
    loaded = tiny_loaded(**options)
    files.load(loaded.model, folder)
    return logits(loaded)


@pytest.mark.parametrize("bits", [None, 4])
def test_switching_gives_each_adapter_and_the_base_to_the_bit(bits, tmp_path):
    one = adapter(tmp_path / "one", tiny_loaded(bits=bits))
    two = adapter(tmp_path / "two", tiny_loaded(bits=bits), seed=1, rank=4, keys=["q_proj"])
    loaded = tiny_loaded(bits=bits)
    base, adapters = logits(loaded), Adapters(loaded)
    assert (adapters.load(one), adapters.load(two)) == ("one", "two")
    assert np.array_equal(logits(loaded), base), "loading puts nothing in force"
    for name, folder in (("one", one), ("two", two), ("one", one)):
        adapters.use(name)
        assert np.array_equal(logits(loaded), alone(folder, bits=bits))
    with adapters.using("two"):
        assert np.array_equal(logits(loaded), alone(two, bits=bits))
    assert adapters.current == "one"
    adapters.unload("one")
    assert adapters.names == ["two"] and adapters.current is None
    assert np.array_equal(logits(loaded), base) and not lora_layers(loaded.model)
    adapters.use("two")
    assert adapters.load(one) == "one", "while another is in force"
    assert np.array_equal(logits(loaded), alone(two, bits=bits))


@pytest.mark.parametrize("dora", [False, True])
def test_strength_multiplies_the_update(dora, tmp_path):
    folder = adapter(tmp_path / "a", dora=dora)
    config, tensors = files.read(folder)
    if dora:
        for name in [k for k in tensors if k.endswith(".m")]:
            tensors[name] = tensors[name] * 1.3
        files.write(config, tensors, folder)
    loaded = tiny_loaded()
    base, adapters = logits(loaded), Adapters(loaded)
    adapters.use(adapters.load(folder))
    full = logits(loaded)
    assert np.array_equal(full, alone(folder))
    adapters.set_strength(0.0)
    assert np.array_equal(logits(loaded), base)
    adapters.set_strength(1e-3)
    small = logits(loaded)
    assert 0 < np.abs(small - base).max() < 0.02 * np.abs(full - base).max(), "no jump at 0"
    adapters.set_strength(1.0)
    assert np.array_equal(logits(loaded), full), "and back"


def test_strength_at_half_is_half_the_scale(tmp_path):
    folder = adapter(tmp_path / "a", scale=2.0)
    config, tensors = files.read(folder)
    config["lora_parameters"]["scale"] = 1.0
    files.write(config, tensors, tmp_path / "half")
    loaded = tiny_loaded()
    adapters = Adapters(loaded)
    adapters.use(adapters.load(folder), 0.5)
    assert np.array_equal(logits(loaded), alone(tmp_path / "half"))


def test_what_cannot_be_used_is_named(tmp_path):
    folder = adapter(tmp_path / "a")
    loaded = tiny_loaded()
    adapters = Adapters(loaded)
    adapters.load(folder)
    with pytest.raises(AdapterError, match="named a already"):
        adapters.load(folder)
    with pytest.raises(AdapterError, match="no adapter named b"):
        adapters.use("b")
    with pytest.raises(ConfigError, match="finite"):
        adapters.use("a", float("nan"))
    with pytest.raises(AdapterError, match="does not belong"):
        adapters.load(adapter(tmp_path / "other", tiny_loaded(seed=5)), "other")
    attached = tiny_loaded()
    attach(attached)
    with pytest.raises(AdapterError, match="already"):
        Adapters(attached)
