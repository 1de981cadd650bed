"""Advice on ranks: what is pasted runs, what is saved is counted, and unsound adapters get none."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_lora import advise as advising
from mlx_lora import config
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.inits.gradient import summed_loss
from mlx_lora.adapter.patterns import ranks_of
from mlx_lora.adapter.tensors import CONFIG, WEIGHTS
from mlx_lora.advise import batched, before_training, calibration, cost_under, need_of, solutions
from mlx_lora.cli import app
from mlx_lora.data import Text
from mlx_lora.errors import AdapterError, ConfigError, RunError
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import attach, load
from mlx_lora.rl import grpo
from mlx_lora.runlog import Clock
from mlx_lora.spectral.advice import GRAINS, Need, block, patterned
from mlx_lora.spectral.advice_show import headline, print_advice
from mlx_lora.spectral.sketch import Agreement
from mlx_lora.tasks import load_task
from tests.test_metrics_doc import documented, emitted

YAML = """model: demo
method: grpo
task: {name: countdown, partial_credit: 0.5}
iters: 1
batch_size: 4
learning_rate: 1e-3
grpo: {group_size: 4}
rollout: {max_tokens: 12}
"""
LORA = "lora_parameters: {rank: 8, scale: 2.0, keys: [q_proj, down_proj, v_proj]}\n"


@pytest.fixture(scope="module")
def found() -> dict:
    """Advice as it would be, had the sketch of so few texts found several ranks."""
    real = advising.need_of
    counts = itertools.cycle([1, 3, 5])

    def several(layer, agreement):
        count = next(counts)
        return replace(
            real(layer, agreement), found=count, open="all_agree" if count == 5 else None
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "need_of", several)
        return before_training(config.from_text(YAML + LORA), batches=4, directions=2)


@pytest.mark.parametrize("grain", GRAINS)
def test_what_is_pasted_gives_every_module_its_rank(found, grain):
    e = config.from_text(YAML + found["blocks"][grain]["yaml"])
    assert e.lora_parameters.keys == ("q_proj", "down_proj", "v_proj"), "the rest stays"
    loaded = load(e)
    attach(loaded, e)
    ranks = {n: m.lora_a.shape[1] for n, m in lora_layers(loaded.model).items()}
    if grain == "module":
        assert ranks == {n: m["rank"] for n, m in found["modules"].items()}
        assert set(ranks.values()) == {1, 4, 8}
    count = sum(v.size for _, v in tree_flatten(loaded.model.trainable_parameters()))
    assert count == found["blocks"][grain]["parameters"]
    assert count + found["blocks"][grain]["parameters_saved"] == found["parameters_now"]
    if grain == "kind":
        task, before = load_task("countdown", {"partial_credit": 0.5}), held(loaded)
        list(grpo.train(loaded, task, e, optimizer_of(e), Clock(), lambda *told: None))
        assert all(not mx.array_equal(a, b) for a, b in zip(before, held(loaded), strict=True))


def held(loaded) -> list[mx.array]:
    return [m.lora_b for m in lora_layers(loaded.model).values()]


def test_at_the_scale_advised_a_first_step_of_adam_lowers_the_loss_as_much(found):
    def lowered(text: str) -> float:
        """By a step of 1 along the sign of each entry of B: the sum of |dL/dB|."""
        e = config.from_text(text)
        loaded = load(e)
        attach(loaded, e)
        texts = calibration(loaded, e, solutions(e, 32), 32)[0]
        grads = tree_flatten(nn.value_and_grad(loaded.model, summed_loss)(loaded.model, texts)[1])
        return sum(float(np.abs(np.array(g)).sum()) for n, g in grads if n.endswith("lora_b"))

    pasted = YAML + found["blocks"]["module"]["yaml"]
    assert lowered(pasted) == pytest.approx(lowered(YAML + LORA), rel=0.15)
    scale = found["blocks"]["module"]["scale"]
    unchanged = pasted.replace(f"scale: {scale}", "scale: 2.0")
    assert lowered(unchanged) < 0.6 * lowered(YAML + LORA), "or any scale would pass"


def test_it_says_so_where_all_that_was_measured_agrees(found):
    full = [m for m in found["modules"].values() if m["predicted_rank"] == 5]
    rest = [m for m in found["modules"].values() if m["predicted_rank"] < 5]
    assert all(m["cannot_tell"] and m["predicted_rank_text"] == "> 5" for m in full)
    assert full and not any(m["cannot_tell"] for m in rest)
    assert found["predicted_rank_text"] == "> 5" and found["cannot_tell"]
    assert headline(found) == "5 of 15 gradients show more directions than were counted"


def test_the_sketch_of_a_module_says_so_itself():
    layer = SimpleNamespace(lora_a=mx.zeros((64, 8)), lora_b=mx.zeros((8, 48)))

    def agreement(agreeing):
        cosines = np.tile(np.arange(4) < agreeing, (2, 1)).astype(float)
        return Agreement(cosines, np.array([0.1, 0.1]), 1.0, 0.5, held, 1.0)

    held = 0.9
    assert [need_of(layer, agreement(n)).text for n in (0, 3, 4)] == ["0", "3", "> 4"]
    held = 0.7
    assert need_of(layer, agreement(3)).text == "> 3", "there is more that the noise hides"
    assert need_of(layer, None).text == "–" and need_of(layer, None).found is None


def test_every_key_is_documented(found, tmp_path):
    trained(tmp_path, {UP: [1.0], Q: [0.0]})
    keys = [keys_of(found), keys_of(advising.advise(str(tmp_path)))]
    assert set().union(*keys) == documented("advice.json")


def keys_of(document: dict) -> set[str]:
    """As documented: what is below the name of a module, a group or a grain is one."""
    for family, name in (("modules", "MODULE"), ("groups", "GROUP"), ("blocks", "GRAIN")):
        merged = {k: v for each in document[family].values() for k, v in each.items()}
        document = {**document, family: {name: merged}}
    document["blocks"]["GRAIN"]["rank_pattern"] = {}
    return emitted(document)


def test_rows_of_sft_are_read_as_sft_reads_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    e = config.from_text(f"model: demo\ndata: {path}\nmask_prompt: true\n")
    texts, named = calibration(load(e), e, solutions(e, 16), 16)
    assert len(texts) == 16 and named == str(path) and all(t.start > 1 for t in texts)
    rows[1] = {"prompt": "Say it. " * 200, "completion": "No."}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]))
    few = e.model_copy(update={"max_seq_length": 64})
    texts, _ = calibration(load(few), few, None, 16)
    assert len(texts) == 2 and all(t.start < len(t.ids) for t in texts), (
        "a prompt alone is left out"
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    with pytest.raises(ConfigError, match="one row can be learnt"):
        calibration(load(few), few, None, 16)


def test_problems_without_solutions_have_no_gradient(tmp_path):
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions, **more):\n    return [0.0]\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Write."}\n{"prompt": "Sing."}\n' * 4)
    task = f"task: {{python: {tmp_path}/reward.py:score, data: {tmp_path}/rows.jsonl}}\n"
    e = config.from_text(YAML.replace("task: {name: countdown, partial_credit: 0.5}\n", task))
    with pytest.raises(ConfigError, match="0 training problems with a solution"):
        before_training(e, batches=2, directions=2)


def test_long_texts_come_fewer_together():
    texts = [Text((1,) * n, 1) for n in (10, 10, 3000, 3000, 10)]
    assert [len(some) for some in batched(texts)] == [2, 1, 1, 1]
    assert sum(map(len, batched(texts[:2] * 9))) == 18


def test_memory_is_that_of_weights_gradients_and_moments():
    needs = {"q": Need(128, 64, 8, 2)}
    e = config.from_text(YAML)
    assert cost_under(e, needs)({"q": 2}) == 4 * 4 * 2 * (128 + 64) + 12  # and its step and rate
    plain = config.from_text(YAML + "optimizer: sgd\n")
    assert cost_under(plain, needs)({"q": 2}) < cost_under(e, needs)({"q": 2})
    evolved = config.from_text("model: demo\nmethod: es\ntask: countdown\nes: {population: 4}\n")
    noise = (4 + 2) * 4 * 2 * 64  # each member's own B, and a direction for two
    assert cost_under(evolved, needs)({"q": 2}) == 4 * 2 * (128 + 64) + noise


def test_a_pattern_that_would_mislead_is_written_out():
    names = ["a.layers.0.q_proj", "b.layers.0.q_proj"]
    ranks = {names[0]: 2, names[1]: 4}
    assert patterned(ranks, dict.fromkeys(names, "q_proj"))[1] == {names[1]: 4}


def test_what_cannot_be_told_gets_no_less_than_it_has():
    needs = {"layers.0.q": Need(64, 64, 8, 3, "too_few_texts"), "layers.1.q": Need(64, 64, 8, 3)}
    made = block(needs, "module", scale=1.0, optimizer="adam", cost=lambda ranks: 0)
    assert made.ranks == {"layers.0.q": 8, "layers.1.q": 4}
    needs["layers.0.q"] = Need(64, 64, 2, 16, "all_agree")
    made = block(needs, "module", scale=1.0, optimizer="adam", cost=lambda ranks: 0)
    assert made.ranks["layers.0.q"] == 16


@pytest.mark.parametrize("grain", GRAINS)
def test_nor_where_others_share_its_pattern(grain):
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in "qkv"]
    needs = {name: Need(64, 64, 8, 1) for name in names}
    needs["layers.0.q"] = Need(64, 64, 8, 3, "too_few_texts")
    made = block(needs, grain, scale=1.0, optimizer="adam", cost=lambda ranks: 0)
    assert made.ranks["layers.0.q"] == 8
    assert {r for name, r in made.ranks.items() if name != "layers.0.q"} <= {1, 4}
    assert ranks_of(made.pattern, names, made.rank) == made.ranks


def test_what_was_not_measured_keeps_its_rank():
    needs = {"layers.0.mlp.experts": Need(512, 512, 6, None), "layers.0.q": Need(64, 64, 6, 3)}
    made = block(needs, "module", scale=1.0, optimizer="adam", cost=lambda ranks: 0)
    assert made.ranks == {"layers.0.mlp.experts": 6, "layers.0.q": 4}


UP, Q = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def trained(folder, spectra: dict[str, list[float]], rank: int = 8, **tensors) -> None:
    """An adapter with these singular values of BA."""
    rng = np.random.default_rng(0)
    made = {}
    for name, values in spectra.items():
        u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (64, 48))
        s = np.pad(values, (0, rank - len(values)))
        made[f"{name}.lora_a"] = mx.array((u * s).astype(np.float32))
        made[f"{name}.lora_b"] = mx.array(v.T.astype(np.float32))
    about = {"fine_tune_type": "lora", "num_layers": -1}
    about |= {"lora_parameters": {"rank": rank, "scale": 3.0, "dropout": 0.0, "keys": ["q_proj"]}}
    files.write(about, {**made, **tensors}, folder)


def test_after_training_the_ranks_are_those_in_use_and_idle_layers_are_named(tmp_path):
    trained(tmp_path, {UP: [3.0, 3.0, 3.0], Q: [1e-3]})
    found = advising.advise(str(tmp_path), by="module")
    assert found["status"] == "trained" and found["idle_modules"] == [Q]
    assert found["idle_blocks"] == [0]
    assert found["modules"][UP]["predicted_rank"] == 3 and found["modules"][UP]["rank"] == 4
    assert found["modules"][Q]["rank"] == 1
    made = found["blocks"]["module"]
    assert made["parameters_saved"] == (8 + 8 - 4 - 1) * (64 + 48)
    assert made["scale"] == pytest.approx(3.0 * 16 / 5, rel=1e-2)
    assert config.from_text(made["yaml"]).lora_parameters.keys == ("q_proj",)
    full = advising.advise(str(tmp_path), rule="energy", option=["share=1.0"])
    assert full["rule"] == {"name": "energy", "share": 1.0}


@pytest.mark.parametrize("rule", [None, "effective"])
def test_an_adapter_that_fills_its_rank_cannot_tell(tmp_path, rule):
    trained(tmp_path, {UP: [1.0] * 8})
    module = advising.advise(str(tmp_path), rule=rule)["modules"][UP]
    assert module["predicted_rank_text"] == "> 8" and module["cannot_tell"]
    assert module["cannot_tell_why"] == "full" and module["rank"] == 8


def test_yaml_of_a_peft_adapter_names_its_layers(tmp_path):
    trained(tmp_path / "mlx", {UP: [3.0, 3.0, 3.0], Q: [2.0]})
    _, tensors = files.read(tmp_path / "mlx")
    (tmp_path / "peft").mkdir()
    renamed = {
        f"base_model.model.{n.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}.weight": x.T
        for n, x in tensors.items()
    }
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), renamed)
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 24}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(about))
    made = advising.advise(str(tmp_path / "peft"))["blocks"]["kind"]["yaml"]
    keys = config.from_text(made).lora_parameters.keys
    assert keys == ("mlp.up_proj", "self_attn.q_proj")


@pytest.mark.parametrize(
    ("tensors", "status"),
    [({}, "untrained"), ({f"{UP}.lora_a": mx.full((64, 8), float("nan"))}, "non_finite")],
)
def test_unsound_adapters_get_a_status_and_no_ranks(tmp_path, tensors, status):
    trained(tmp_path, {UP: [0.0], Q: [0.0] if not tensors else [1.0]}, **tensors)
    done = CliRunner().invoke(
        app, ["advise", str(tmp_path), "--json", "--out", str(tmp_path / "a")]
    )
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["status"] == status
    assert found["modules"] == {} and found["blocks"] == {}
    assert (tmp_path / "a" / "advice.png").stat().st_size > 5000
    assert not (tmp_path / "a" / "lora_parameters.yaml").exists()


def test_torn_and_foreign_files_are_errors(tmp_path):
    trained(tmp_path, {UP: [1.0]})
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError):
        advising.advise(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / CONFIG).write_text('{"fine_tune_type": "vera"}')
    with pytest.raises(AdapterError, match="describes no LoRA adapter"):
        advising.advise(str(tmp_path))


def test_what_only_measures_has_no_rank(monkeypatch):
    monkeypatch.setattr(advising, "load", lambda e: pytest.fail("a model was loaded"))
    e = config.from_text("model: demo\ndata: rows.jsonl\ntrain: false\ntest: true\n")
    with pytest.raises(ConfigError, match="train is false"):
        before_training(e, batches=2, directions=2)


@pytest.mark.parametrize("command", ["advise", "spectrum"])
def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, command):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        done = CliRunner().invoke(app, [command, str(tmp_path / "none"), "--out", str(out)])
        assert isinstance(done.exception, RunError) and f"--out {out}" in str(done.exception)
    done = CliRunner().invoke(app, [command, str(tmp_path / "none"), "--out", str(tmp_path / "o")])
    assert done.exit_code and not isinstance(done.exception, RunError)
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "judged, not made"


def test_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--rule: of an adapter's spectra, and demo is an"):
        advising.advise("demo", rule="knee")
    with pytest.raises(ConfigError, match="--batches, --directions: of an experiment's gradient"):
        advising.advise(str(tmp_path), batches=16, directions=16)
    with pytest.raises(ConfigError, match="--rule kne: no rule") as caught:
        advising.advise(str(tmp_path), rule="kne")
    assert caught.value.hint == "Did you mean knee?"
    with pytest.raises(ConfigError, match="--by layers: ranks come by kind, layer, module"):
        advising.advise("demo", by="layers")
    with pytest.raises(ConfigError, match="mlx-lora shrink --by kl"):
        advising.advise(str(tmp_path), rule="kl")


def test_the_command_writes_json_yaml_and_a_picture(tmp_path, found):
    paths = advising.write(found, tmp_path, "layer")
    assert [p.name for p in paths] == ["advice.json", "lora_parameters.yaml", "advice.png"]
    assert json.loads(paths[0].read_text()) == found
    assert paths[1].read_text() == found["blocks"]["layer"]["yaml"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_terminal_shows_the_table_and_yaml_that_parses(found, capsys):
    print_advice(found, "kind")
    printed = capsys.readouterr().out
    assert "> 5/8" in printed and "agree on all directions" in printed
    _, _, lines = printed.partition("\n\n# ")
    assert f"# {lines}" == found["blocks"]["kind"]["yaml"]


def test_the_scale_counts_what_was_not_measured_like_the_rest():
    needs = {"q": Need(64, 64, 8, 2, lever=3.0), "experts": Need(64, 64, 8, None)}
    found = block(needs, "module", scale=1.0, optimizer="adam", cost=lambda ranks: 0)
    assert found.scale == 1.6  # (8 + 8) / (2 + 8)
    plain = block(needs, "module", scale=1.0, optimizer="sgd", cost=lambda ranks: 0)
    assert plain.scale == pytest.approx(1.6**0.5, rel=1e-2)
    still = block(needs, "module", scale=1.0, optimizer="es", cost=lambda ranks: 0)
    assert still.scale == 1.0


def test_where_nothing_can_be_measured_it_says_so(tmp_path):
    text = YAML + "lora_parameters: {keys: [embed_tokens]}\n"
    found = before_training(config.from_text(text), batches=2, directions=2)
    assert found["status"] == "not_measured" and not found["blocks"]
    (path,) = [p for p in advising.write(found, tmp_path, "kind") if p.suffix == ".png"]
    assert path.stat().st_size > 3000
