"""What goes out is what was trained: every format is read back onto the base and checked."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import bases, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.errors import AdapterError, ConfigError, ModelError, RunError
from mlx_lora.ship import export as exporting
from mlx_lora.ship import gguf_files, peft_files
from mlx_lora.ship.export import NotSame, export, import_peft
from mlx_lora.ship.formats import FORMATS, Target
from mlx_lora.ship.switch import wearing
from mlx_lora.ship.trained import load_base, read, refuse_other_base
from tests.tiny import COMMON, IDS, tiny_loaded

LOUD = {"init": "gaussian", "init_options": {"std": 0.05}}


def logits(model) -> np.ndarray:
    return np.array(models.logits(model, mx.array(IDS)))


def adapter(folder: Path, loaded=None, **options) -> Path:
    """A loud random adapter, saved with its base as training does."""
    loaded = loaded or tiny_loaded()
    config = attach(loaded, **{**LOUD, **options})
    files.save(loaded.model, {**config, "base": bases.identity(loaded)}, folder)
    return folder


def written(folder: Path, to: str, out: Path, loaded) -> Target:
    out.mkdir()
    target = Target(loaded, out, "base")
    FORMATS[to].write(read(folder), target)
    return target


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return adapter(tmp_path_factory.mktemp("trained") / "a", models.load("demo"))


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_is_proven_on_the_base_and_leaves_the_proof(trained, to, tmp_path):
    found = export(trained, to, tmp_path / to)
    assert found.report.measured.bitwise_identical
    assert json.loads((tmp_path / to / "check.json").read_text())["verdict"] == "pass"
    assert found.to_json()["check"]["kl_mean"] == 0


def test_an_export_that_is_not_the_same_leaves_nothing(trained, tmp_path, monkeypatch):
    real = gguf_files.reordered
    monkeypatch.setattr(gguf_files, "reordered", lambda rows, heads: -real(rows, heads))
    with pytest.raises(NotSame) as different:
        export(trained, "gguf", tmp_path / "out")
    assert different.value.report.measured.kl_mean > 1e-3
    assert not list(tmp_path.iterdir())


def test_what_peft_reads_of_a_universal_folder_is_proven_too(trained, tmp_path, monkeypatch):
    real = peft_files.tensors_of

    def broken(*given):
        return {n: -3 * v if "lora_B" in n else v for n, v in real(*given).items()}

    monkeypatch.setattr(peft_files, "tensors_of", broken)
    with pytest.raises(NotSame):
        export(trained, "universal", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_import_brings_back_what_was_exported(trained, tmp_path):
    written(trained, "peft", tmp_path / "peft", models.load("demo"))
    found = import_peft(tmp_path / "peft", tmp_path / "back", model="demo")
    assert found.report.measured.bitwise_identical
    _, ours = files.read(trained)
    _, back = files.read(tmp_path / "back")
    assert ours.keys() == back.keys()
    assert all(mx.array_equal(ours[k], back[k]) for k in ours)
    about = read(tmp_path / "back").about_base
    assert about == {**bases.identity(models.load("demo")), "model": "demo"}
    assert "weights are others" in bases.compare(about, tiny_loaded())[0][0]
    for mine in (tmp_path / "back", tmp_path / "back" / files.WEIGHTS):
        with pytest.raises(AdapterError, match="no PEFT folder"):
            import_peft(mine, tmp_path / "again")
    again = import_peft(tmp_path / "peft", tmp_path / "unproven")
    assert again.report is None and again.to_json()["check"] is None


@pytest.mark.parametrize("to", ["mlx", "peft", "gguf", "universal"])
def test_ranks_that_differ_survive_every_format(to, tmp_path):
    loaded = tiny_loaded()
    loaded.config.update(COMMON)
    folder = adapter(tmp_path / "a", loaded)
    wanted = logits(loaded.model)
    config, tensors = files.read(folder)
    for name, layer in lora_layers(loaded.model).items():
        if "down_proj" in name:  # the last two directions do nothing: the rank is 6
            layer.lora_b = layer.lora_b * (mx.arange(8) < 6)[:, None]
            tensors[f"{name}.lora_a"] = layer.lora_a[:, :6]
            tensors[f"{name}.lora_b"] = layer.lora_b[:6]
    wanted = logits(loaded.model)
    files.write(config, tensors, folder)
    fresh = tiny_loaded()
    fresh.config.update(COMMON)
    target = written(folder, to, tmp_path / to, fresh)
    readers = FORMATS[to].read_back(target)
    assert len(readers) == (2 if to == "universal" else 1)
    for layers in readers:
        with wearing(fresh.model, layers):
            assert np.allclose(logits(fresh.model), wanted, atol=1e-5)
    if to in ("peft", "universal"):
        about = json.loads((target.folder / "adapter_config.json").read_text())
        assert about["rank_pattern"]["model.layers.0.mlp.down_proj"] == 6
        assert about["alpha_pattern"]["model.layers.0.mlp.down_proj"] == 6 * 2.0
        assert (about["r"], about["lora_alpha"]) == (8, 16.0)


def test_rows_are_turned_for_llama_alone_and_back():
    rows = mx.arange(16.0).reshape(8, 2)  # 2 heads of 4 rows
    turned = gguf_files.reordered(rows, 2)
    assert turned[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert mx.array_equal(gguf_files.restored(turned, 2), rows)
    for kind, same in (("llama", False), ("mistral", False), ("qwen3", True)):
        config = {"model_type": kind, "num_attention_heads": 2}
        found = gguf_files.turned(
            rows, "model.layers.0.self_attn.q_proj", config, lambda *_: turned
        )
        assert mx.array_equal(found, rows) == same
        value = gguf_files.turned(
            rows, "model.layers.0.self_attn.v_proj", config, lambda *_: turned
        )
        assert mx.array_equal(value, rows)


def test_a_gguf_holds_q_and_k_in_neighbouring_rows_each_by_its_own_heads(tmp_path):
    """As llama.cpp's converter: row j of a head's first half beside row j of its second."""
    loaded = tiny_loaded()
    loaded.config.update(COMMON)
    folder = adapter(tmp_path / "a", loaded)
    written(folder, "gguf", tmp_path / "g", loaded)
    stored = mx.load(str(tmp_path / "g" / "adapter.gguf"))
    _, ours = files.read(folder)
    half = COMMON["head_dim"] // 2
    heads = {"q": COMMON["num_attention_heads"], "k": COMMON["num_key_value_heads"], "v": 0}
    assert heads["q"] != heads["k"]
    for kind, count in heads.items():
        b_OR = np.array(ours[f"model.layers.1.self_attn.{kind}_proj.lora_b"]).T
        rows = [h * 2 * half + side * half + j for h in range(count) for j in range(half)
                for side in (0, 1)]  # fmt: skip
        assert sorted(rows or range(len(b_OR))) == list(range(len(b_OR)))
        wanted = b_OR[rows] if rows else b_OR
        found = np.array(stored[f"blk.1.attn_{kind}.weight.lora_b"])
        assert np.array_equal(found, wanted), kind


def test_the_gguf_file_says_what_llama_cpp_wants(trained, tmp_path):
    written(trained, "gguf", tmp_path / "g", models.load("demo"))
    stored, about = mx.load(str(tmp_path / "g" / "adapter.gguf"), return_metadata=True)
    assert about["general.architecture"] == "llama"
    assert (about["general.type"], about["adapter.type"]) == ("adapter", "lora")
    assert about["adapter.lora.alpha"].item() == 16
    assert stored["blk.0.attn_q.weight.lora_a"].shape == (8, 128)
    assert stored["blk.0.ffn_up.weight.lora_b"].shape == (384, 8)


class TestWhatAFormatCannotHold:
    def refused(self, folder, to, config=None):
        return FORMATS[to].refusals(read(folder), config or {"model_type": "llama"})

    def test_dora_goes_to_peft_but_not_to_gguf(self, tmp_path):
        folder = adapter(tmp_path / "a", dora=True)
        assert not self.refused(folder, "peft")
        assert "DoRA" in self.refused(folder, "gguf")[0]

    def test_an_architecture_without_a_mapping(self, tmp_path):
        folder = adapter(tmp_path / "a")
        (text,) = self.refused(folder, "gguf", {"model_type": "mamba"})
        assert "mamba" in text and "llama, mistral, qwen2, qwen3, gemma" in text

    def test_modules_that_llama_cpp_has_no_name_for(self, tmp_path):
        folder = adapter(tmp_path / "a", keys=["q_proj"])
        config, tensors = files.read(folder)
        tensors = {k.replace("self_attn.q_proj", "mixer.in_proj"): v for k, v in tensors.items()}
        files.write(config, tensors, folder)
        assert "model.layers.0.mixer.in_proj" in self.refused(folder, "gguf")[0]

    def test_a_scale_of_nothing(self, tmp_path):
        folder = adapter(tmp_path / "a", scale=0.0)
        assert "scale is 0" in self.refused(folder, "gguf")[0]

    def test_an_init_with_a_base_of_its_own(self, tmp_path):
        folder = adapter(tmp_path / "a")
        about = json.loads((folder / files.CONFIG).read_text()) | {"init": {"name": "pissa"}}
        (folder / files.CONFIG).write_text(json.dumps(about))
        for to in ("peft", "gguf", "universal"):
            assert "pissa" in self.refused(folder, to)[0]
        assert not self.refused(folder, "mlx")

    def test_a_spline_fits_nowhere(self, tmp_path):
        folder = adapter(tmp_path / "a")
        about = json.loads((folder / files.CONFIG).read_text())
        about["lora_parameters"]["type"] = "spline"
        (folder / files.CONFIG).write_text(json.dumps(about))
        with pytest.raises(AdapterError, match="spline"):
            read(folder)

    def test_experts_and_tied_embeddings(self, tmp_path):
        config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}}
        experts = {"e.lora_a": mx.zeros((3, 2, 8)), "e.lora_b": mx.zeros((3, 8, 2))}
        files.write(config, experts, tmp_path / "e")
        for to in ("peft", "gguf", "universal"):
            assert "stacked experts" in self.refused(tmp_path / "e", to)[0]
        table = {"model.embed_tokens.lora_a": mx.zeros((9, 2))}
        table["model.embed_tokens.lora_b"] = mx.zeros((2, 8))
        files.write(config, table, tmp_path / "t")
        tied = {"model_type": "llama", "tie_word_embeddings": True}
        assert "tied" in self.refused(tmp_path / "t", "peft", tied)[0]
        assert not self.refused(tmp_path / "t", "peft")

    def test_embeddings_that_are_the_head_though_no_config_says_so(self, tmp_path, monkeypatch):
        for kind, tied in (("llama", True), ("gemma", False)):  # a gemma always shares them
            monkeypatch.setitem(COMMON, "tie_word_embeddings", tied)
            loaded = tiny_loaded(kind)
            folder = adapter(tmp_path / kind, loaded, keys=["q_proj", "embed_tokens"])
            assert not self.refused(folder, "peft")
            for to in ("peft", "universal"):
                with pytest.raises(AdapterError, match="tied output head"):
                    written(folder, to, tmp_path / f"{kind}_{to}", loaded)
        folder = adapter(tmp_path / "apart", keys=["q_proj", "embed_tokens"])
        written(folder, "peft", tmp_path / "peft", tiny_loaded())
        import_peft(tmp_path / "peft", tmp_path / "back")
        for place in (tmp_path / "peft", tmp_path / "back"):
            files.load(tiny_loaded().model, place)
        monkeypatch.setitem(COMMON, "tie_word_embeddings", True)
        for place in (tmp_path / "peft", tmp_path / "back"):
            with pytest.raises(AdapterError, match="embed_tokens and not the output head"):
                files.load(tiny_loaded().model, place)

    def test_everything_at_once_with_exit_code_2(self, run_cli, trained, tmp_path):
        about = json.loads((trained / files.CONFIG).read_text())
        folder = adapter(tmp_path / "a", models.load("demo"), dora=True)
        about = json.loads((folder / files.CONFIG).read_text()) | {"init": {"name": "loftq"}}
        (folder / files.CONFIG).write_text(json.dumps(about))
        options = ("--to", "gguf", "--model", "demo", "--out", tmp_path / "o", "--json")
        done = run_cli("export", folder, *options)
        assert done.returncode == 2
        said = json.loads(done.stdout)["error"]
        assert said["type"] == "AdapterError"
        assert "DoRA" in said["message"] and "loftq" in said["message"]


class TestTheBase:
    def test_everything_that_is_another_is_listed(self, tmp_path):
        config, tensors = files.read(adapter(tmp_path / "a"))
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.lora_a"] = mx.zeros((64, 8))
        for factor in ("lora_a", "lora_b"):
            tensors[f"model.layers.7.mlp.up_proj.{factor}"] = tensors.pop(
                f"model.layers.1.mlp.up_proj.{factor}"
            )
        config["base"]["model_type"] = "qwen3"
        config["base"]["sketch"] = config["base"]["sketch"][::-1]
        files.write(config, tensors, tmp_path / "a")
        with pytest.raises(AdapterError) as refused:
            refuse_other_base(read(tmp_path / "a"), tiny_loaded())
        text = str(refused.value)
        assert "the base is a qwen3, this is a llama" in text
        assert "weights are others" in text
        assert f"{name}: made for 64 to 128 dimensions, the layer has 128 to 128" in text
        assert "model.layers.7.mlp.up_proj: the model has no such layer" in text

    def test_another_quantization_is_told(self, tmp_path):
        folder = adapter(tmp_path / "a", tiny_loaded(bits=4))
        loaded = tiny_loaded()
        loaded.config["quantization"] = {"bits": 8, "group_size": 64, "mode": "affine"}
        about = {**bases.recorded(folder), "quantization": {"bits": 4, "group_size": 64}}
        problems, (notice,) = bases.compare(about, loaded)
        assert not problems and "4-bit" in notice and "8-bit" in notice

    def test_it_is_quantized_again_bit_for_bit(self, tmp_path):
        form = {"bits": 3, "group_size": 32, "mode": "affine"}
        first = models.load("demo", quantize=form)
        folder = adapter(tmp_path / "a", first)
        again = models.load("demo", rebuild=bases.recorded(folder)["quantization"])
        weights = models.base_weights(first.model)
        back = models.base_weights(again.model)
        assert weights.keys() == back.keys()
        assert all(mx.array_equal(weights[k], back[k]) for k in weights)
        assert bases.compare(bases.recorded(folder), again) == ([], [])
        trained = read(folder)
        loaded, notices = load_base(trained, "demo")
        assert not notices and loaded.config["quantization"]["bits"] == 3

    def test_quantizing_a_quantized_model_in_another_way_is_an_error(self, tmp_path):
        models.save_base(models.load("demo"), tmp_path / "base")
        same = {"bits": 4, "group_size": 64, "mode": "affine"}
        assert not models.load(str(tmp_path / "base"), quantize=same).quantized_here
        with pytest.raises(ModelError, match="bits is 4, asked for 8"):
            models.load(str(tmp_path / "base"), quantize={"bits": 8})
        kept = models.load(str(tmp_path / "base"), rebuild={"bits": 8})
        assert kept.config["quantization"]["bits"] == 4

    def test_nobody_says_which(self, tmp_path):
        folder = adapter(tmp_path / "a")
        about = json.loads((folder / files.CONFIG).read_text())
        del about["base"]
        (folder / files.CONFIG).write_text(json.dumps(about))
        with pytest.raises(AdapterError, match="does not say which base"):
            export(folder, "mlx", tmp_path / "o")


def test_names_are_judged_before_anything_is_read(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigError, match="no format 'gguff'"):
        export(tmp_path / "none", "gguff", tmp_path / "o")
    with pytest.raises(RunError, match="not an empty folder"):
        export(tmp_path / "none", "gguf", tmp_path / "full")
    with pytest.raises(AdapterError, match="no adapter folder"):
        export(tmp_path / "none", "gguf", tmp_path / "o")


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_peft_adapters_that_mean_something_else_are_refused(about, words, trained, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    peft_files.write(read(trained), folder, "demo", frozenset())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | about))
    with pytest.raises(AdapterError, match=words):
        exporting.import_peft(folder, tmp_path / "out")


def test_tensors_of_another_kind_are_named(trained, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    peft_files.write(read(trained), folder, "demo", frozenset())
    path = str(folder / peft_files.WEIGHTS)
    stored = mx.load(path)
    stored["base_model.model.lm_head.base_layer.weight"] = mx.zeros((2, 2))  # PEFT adds these
    mx.save_safetensors(path, stored)
    read(folder)
    stored["base_model.model.score.modules_to_save.weight"] = mx.zeros((2, 2))
    mx.save_safetensors(path, stored)
    with pytest.raises(AdapterError, match=r"score\.modules_to_save"):
        read(folder)


def test_an_adapter_from_disk_drops_nothing(tmp_path):
    folder = adapter(tmp_path / "a", dropout=0.5)
    loaded = tiny_loaded()
    files.load(loaded.model, folder)
    assert np.array_equal(logits(loaded.model), logits(loaded.model))
