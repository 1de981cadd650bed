"""PEFT folders are read as what they compute: names, transposition, scales, ranks, left-out layers.

The expected update is built here from PEFT's own definition, W + (alpha / r) · lora_B @ lora_A.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import AdapterError
from tests.tiny import tiny

SHAPES = {"self_attn.q_proj": (128, 128), "mlp.up_proj": (192, 128)}  # out, in


def write(folder, *, layers=(0, 1), rank=4, ranks=None, prefix="base_model.model.", **about):
    """A PEFT folder with random factors; returns {module: (A [R, I], B [O, R])}."""
    rng, pairs, tensors = np.random.default_rng(0), {}, {}
    for layer in layers:
        for name, (out, inside) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            r = (ranks or {}).get(name, rank)
            a, b = rng.standard_normal((r, inside)), rng.standard_normal((out, r))
            pairs[module] = a, b
            tensors[f"{prefix}{module}.lora_A.weight"] = mx.array(a, mx.float32)
            tensors[f"{prefix}{module}.lora_B.weight"] = mx.array(b, mx.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", **about}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return pairs


def deltas(model) -> dict[str, np.ndarray]:
    return {
        name: m.scale * (np.array(m.lora_a) @ np.array(m.lora_b)).T
        for name, m in lora_layers(model).items()
    }


@pytest.mark.parametrize(
    ("about", "scale_of"),
    [
        ({}, lambda name, r: 8 / r),
        ({"use_rslora": True}, lambda name, r: 8 / r**0.5),
        ({"alpha_pattern": {"up_proj": 2}}, lambda name, r: (2 if "up_proj" in name else 8) / r),
        ({"alpha_pattern": {"up_proj": 2, ".*_proj": 4}}, lambda n, r: (2 if "up" in n else 4) / r),
        ({"ranks": {"mlp.up_proj": 2}}, lambda name, r: 8 / r),
        ({"ranks": {"mlp.up_proj": 2}, "use_rslora": True}, lambda name, r: 8 / r**0.5),
    ],
)
def test_the_update_is_pefts(tmp_path, about, scale_of):
    pairs = write(tmp_path, **about)
    model = tiny(bits=4)
    files.load(model, tmp_path)
    found = deltas(model)
    assert found.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        assert np.allclose(found[module], scale_of(module, len(a)) * b @ a, atol=1e-3), module


def test_layers_that_were_left_out_stay_as_they_are(tmp_path):
    pairs = write(tmp_path, layers=(1,))
    model = tiny(bits=4)
    files.load(model, tmp_path)
    for module, delta in deltas(model).items():
        assert (np.abs(delta).max() > 0) == (module in pairs), module


def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path):
    for about, words in (
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"bias": "all"}, "no place for bias"),
        ({"modules_to_save": ["lm_head"]}, "no place for modules_to_save"),
    ):
        write(tmp_path, **about)
        with pytest.raises(AdapterError, match=words):
            files.read(tmp_path)
    write(tmp_path, prefix="other.")
    with pytest.raises(AdapterError, match=r"unexpected|matches no layer"):
        files.load(tiny(), tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match="pickle"):
        files.read(pickled)


def test_half_a_pair_is_named(tmp_path):
    write(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    tensors = mx.load(path)
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    mx.save_safetensors(path, tensors)
    with pytest.raises(AdapterError, match=r"half a pair at model\.layers\.0\.mlp\.up_proj"):
        files.read(tmp_path)
