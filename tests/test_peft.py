"""PEFT folders are read as what they compute: names, transposition, scales, ranks, left-out layers.

The expected update is built here from PEFT's own definition, W + (alpha / r) · lora_B @ lora_A.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.peft import scale_of
from mlx_lora.check.metrics import adapter_facts
from mlx_lora.check.probes import Probes
from mlx_lora.check.sides import Side
from mlx_lora.errors import AdapterError
from mlx_lora.ship.export import import_peft
from mlx_lora.ship.trained import left_out, read, refuse_other_base
from mlx_lora.spectral.read import of_folder
from tests.tiny import tiny, tiny_loaded

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
    ("about", "wanted"),
    [
        ({}, lambda name, r: 8 / r),
        ({"use_rslora": True}, lambda name, r: 8 / r**0.5),
        ({"alpha_pattern": {"up_proj": 2}}, lambda name, r: (2 if "up_proj" in name else 8) / r),
        ({"alpha_pattern": {"up_proj": 2, ".*_proj": 4}}, lambda n, r: (2 if "up" in n else 4) / r),
        ({"alpha_pattern": {"up_proj": 0}}, lambda name, r: (0 if "up_proj" in name else 8) / r),
        ({"ranks": {"mlp.up_proj": 2}}, lambda name, r: 8 / r),
        ({"ranks": {"mlp.up_proj": 2}, "use_rslora": True}, lambda name, r: 8 / r**0.5),
    ],
)
def test_the_update_is_pefts(tmp_path, about, wanted):
    pairs = write(tmp_path, **about)
    model = tiny(bits=4)
    files.load(model, tmp_path)
    found = deltas(model)
    assert found.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        assert np.allclose(found[module], wanted(module, len(a)) * b @ a, atol=1e-3), module


ALPHAS = {  # alpha_pattern, module -> the alpha that PEFT 0.21 gives it, where lora_alpha is 1
    ("q_proj|v_proj", "layers.0.q_proj"): 64,
    ("q_proj|v_proj", "layers.0.v_proj"): 64,
    ("q_proj|v_proj", "layers.0.qv_proj"): 1,
    ("q_proj|v_proj", "layers.0.q_proj_extra.o_proj"): 1,
    ("v_proj|q_proj", "layers.0.q_proj_extra"): 1,
    ("q_proj", "layers.0.q_proj.inner"): 1,
    ("^layers.0.q_proj", "layers.0.q_proj"): 64,
    ("^layers.0.q_proj", "model.layers.0.q_proj"): 1,
}


@pytest.mark.parametrize(("pattern", "module"), ALPHAS)
def test_an_alpha_is_for_whom_peft_means(pattern, module):
    about = {"lora_alpha": 1, "alpha_pattern": {pattern: 64}}
    wanted = ALPHAS[pattern, module]
    assert scale_of(about, module, 1) == wanted
    first_counts = {**about, "alpha_pattern": {pattern: 64, ".*": 2}}
    assert scale_of(first_counts, module, 1) == (64 if wanted == 64 else 2)


@pytest.mark.parametrize("pattern", ["(?i)Q_PROJ", "*q_proj", "(q_proj"])
def test_a_pattern_that_is_no_expression_is_bad_input(tmp_path, pattern):
    write(tmp_path, alpha_pattern={pattern: 64})
    with pytest.raises(AdapterError, match="is no regular expression"):
        files.read(tmp_path)


def test_layers_that_were_left_out_stay_as_they_are(tmp_path):
    pairs = write(tmp_path, layers=(1,))
    model = tiny(bits=4)
    files.load(model, tmp_path)
    for module, delta in deltas(model).items():
        assert (np.abs(delta).max() > 0) == (module in pairs), module


def test_layers_that_were_left_out_did_not_fail_to_learn(tmp_path):
    loaded = tiny_loaded()
    write(tmp_path, layers=(1,))
    files.load(loaded.model, tmp_path)
    facts = adapter_facts(Side(loaded), Probes([([5, 17, 3, 44], 1)], []))
    assert facts["zeroed"] == [] and facts["b_norm"] > 0
    silent = "model.layers.1.self_attn.q_proj"
    layer = lora_layers(loaded.model)[silent]
    layer.lora_b = layer.lora_b * 0
    facts = adapter_facts(Side(loaded), Probes([([5, 17, 3, 44], 1)], []))
    assert facts["zeroed"] == [silent]


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


def one_pair(folder, a, b, **about):
    """A PEFT folder of one module with these factors."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": mx.array(a), f"{name}.lora_B.weight": mx.array(b)}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **about}
    (folder / "adapter_config.json").write_text(json.dumps(config))


FACTORS = np.ones((4, 128), np.float32), np.ones((128, 4), np.float32)
UNSOUND = {
    "no alpha": ({"lora_alpha": None}, FACTORS, "lora_alpha is None"),
    "a text for alpha": ({"lora_alpha": "16"}, FACTORS, "lora_alpha is '16'"),
    "yes for alpha": ({"lora_alpha": True}, FACTORS, "lora_alpha is True"),
    "a list of alphas": ({"alpha_pattern": [4]}, FACTORS, r"alpha_pattern is \[4\]"),
    "a text in the pattern": ({"alpha_pattern": {"q": "4"}}, FACTORS, "alpha_pattern: q is '4'"),
    "a rank of 0": ({}, (np.ones((0, 128)), np.ones((128, 0))), "hold no numbers"),
    "a list of numbers": ({}, (np.ones(128), np.ones(128)), "are no matrices"),
    "experts": ({}, (np.ones((3, 4, 128)), np.ones((3, 128, 4))), "are no matrices"),
    "two ranks": ({}, (FACTORS[0][:2], FACTORS[1]), r"lora_A \(2, 128\) .* different ranks"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_both_readers_name_what_is_unsound(tmp_path, name):
    about, factors, words = UNSOUND[name]
    one_pair(tmp_path, *map(np.float32, factors), **about)
    for reader in (files.read, of_folder):
        with pytest.raises(AdapterError, match=words):
            reader(tmp_path)


STARTS = {  # PEFT 0.21's init_lora_weights: whether it moves the base
    **dict.fromkeys((True, False, "gaussian", "eva", "orthogonal", "mica"), False),
    **dict.fromkeys(
        ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"), True
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_an_init_that_moves_the_base_is_refused(tmp_path, start):
    one_pair(tmp_path, *FACTORS, init_lora_weights=start)
    for reader in (files.read, of_folder):
        if STARTS[start]:
            with pytest.raises(AdapterError, match=f"the init {start} put other frozen weights"):
                reader(tmp_path)
        else:
            reader(tmp_path)


def test_all_that_is_unsound_is_said_at_once(tmp_path):
    one_pair(
        tmp_path, np.float32([1]), FACTORS[1], lora_alpha=None, use_bdlora={"n": 2}, bias="all"
    )
    with pytest.raises(AdapterError) as refused:
        files.read(tmp_path)
    assert str(refused.value).count("\n") == 3


def test_without_an_alpha_it_is_pefts_own():
    assert scale_of({}, "q_proj", 4) == 8 / 4


def test_half_a_pair_is_named(tmp_path):
    write(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    tensors = mx.load(path)
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    mx.save_safetensors(path, tensors)
    with pytest.raises(AdapterError, match=r"half a pair at model\.layers\.0\.mlp\.up_proj"):
        files.read(tmp_path)


def embedded(folder, weight_VD, name="model.embed_tokens"):
    """A PEFT folder that adapts an embedding: PEFT saves the frozen weight with the factors."""
    rows, width = weight_VD.shape
    tensors = {
        f"base_model.model.{name}.lora_embedding_A": mx.ones((4, rows)),
        f"base_model.model.{name}.lora_embedding_B": mx.ones((width, 4)),
        f"base_model.model.{name}.base_layer.weight": weight_VD,
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')


def test_a_frozen_weight_is_passed_over_and_named_where_it_is_not_the_bases(tmp_path):
    loaded = tiny_loaded()
    weight = loaded.model.model.embed_tokens.weight
    embedded(tmp_path, weight.astype(mx.bfloat16))
    (pair,) = of_folder(tmp_path)
    assert pair.name == "model.embed_tokens" and (pair.a_IR.shape, pair.scale) == ((96, 4), 1.0)
    assert refuse_other_base(read(tmp_path), loaded) == []
    embedded(tmp_path, mx.where(mx.arange(96)[:, None] == 7, 0, weight))
    (notice,) = refuse_other_base(read(tmp_path), loaded)
    assert "model.embed_tokens" in notice and "% away from the base's" in notice
    found = import_peft(tmp_path, tmp_path / "out")
    assert "model.embed_tokens" in found.notices[0] and "--model" in found.notices[0]
    assert files.read(tmp_path / "out")[1].keys() == {
        f"model.embed_tokens.{factor}" for factor in ("lora_a", "lora_b")
    }
    embedded(tmp_path, mx.zeros((100, 128)))
    assert "of another size" in left_out(tmp_path, loaded.model)[0]
