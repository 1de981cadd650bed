"""A YAML of mlx_lm.lora runs unchanged, and what it would pass over in silence is an error."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from rich.console import Console

from mlx_lora import config, curves, experiment, models
from mlx_lora.adapter import files
from mlx_lora.errors import ConfigError
from mlx_lora.progress import console

# every key that mlx-lm's example file and its LORA.md name, with its values where they fit
YAML = """
model: "demo"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "DATA"
seed: 0
num_layers: 16
batch_size: 4
iters: 6
val_batches: 1
learning_rate: 1e-3
steps_per_report: 2
steps_per_eval: 3
resume_adapter_file: null
adapter_path: "OUT"
save_every: 2
test: true
test_batches: 1
max_seq_length: 64
grad_checkpoint: false
grad_accumulation_steps: 2
mask_prompt: true
prompt_feature: "prompt"
completion_feature: "completion"
report_to: null
project_name: null
clear_cache_threshold: 0
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 2 # 0 for no warmup
  warmup_init: 1e-7
  arguments: [1e-3, 1000, 1e-7]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"How many legs have {n} ducks?", "completion": f"{2 * n}."} for n in range(9)
    ]
    for split in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, name in ((experiment, "write"), (experiment, "plot"), (curves, "draw")):
        monkeypatch.setattr(module, name, lambda *given: None)


def text_of(data, out) -> str:
    return YAML.replace("DATA", str(data)).replace("OUT", str(out))


def run(text, folder, *options, **more):
    e = config.from_text(text, "cfg.yaml", options)
    return experiment.run(e, folder, console(quiet=True), **more)


def metrics(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of it: the folder, where mlx-lm would have put the adapter, and the summary."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((experiment, "write"), (experiment, "plot"), (curves, "draw")):
            patch.setattr(module, name, lambda *given: None)
        summary = run(text_of(data, folder / "adapters_here"), folder / "run")
    return folder / "run", folder / "adapters_here", summary


def test_it_runs_and_mlx_lm_loads_what_it_wrote(whole):
    folder, out, summary = whole
    seen = metrics(folder)
    assert len(seen) == 6 and [m["step"] for m in seen if "grad_norm" in m] == [1, 3, 5]
    assert [m["learning_rate"] for m in seen[::2]] == pytest.approx([1e-7, 5e-4, 1e-3], rel=0.01)
    assert [m["step"] for m in seen if "valid_loss" in m] == [2, 5]
    assert summary["test_loss"] < summary["valid_loss_before"] and summary["test_tokens"] > 0
    trained = dict(mx.load(str(out / "adapters.safetensors")))
    stock = load_adapters(models.load("demo").model, str(out))
    kept = dict(mx.load(str(folder / "adapters" / "adapters.safetensors")))
    assert trained.keys() == kept.keys() and len(trained) == 5 * 2 * 2
    layer = stock.layers[0].self_attn.q_proj
    assert mx.array_equal(layer.lora_b, trained["model.layers.0.self_attn.q_proj.lora_b"])
    assert mx.abs(layer.lora_b).max().item() > 0


def test_cut_between_batches_that_do_not_move_it_resumes_to_the_same_bits(whole, tmp_path, data):
    """After three batches: a checkpoint at two, and the gradient of the third is summed up."""
    folder, _, _ = whole
    text = text_of(data, tmp_path / "out").replace("save_every: 2", "save_every: 3")
    from mlx_lora import sft

    class Cut(Exception):
        pass

    real = sft.train

    def cut(*given, **more):
        for step in real(*given, **more):
            yield step
            if step == 3:
                raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "train", cut)
        with pytest.raises(Cut):
            run(text, tmp_path / "run")
    shutil.rmtree(tmp_path / "out")
    assert len(metrics(tmp_path / "run")) == 4
    run(text, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(folder)
    one, two = (files.read(f / "adapters")[1] for f in (folder, tmp_path / "run"))
    assert all(mx.array_equal(one[k], two[k]) for k in one | two)


def test_test_alone_finds_the_same_loss(whole, data, tmp_path):
    _, out, summary = whole
    alone = run(text_of(data, out), tmp_path / "run", "train=false")
    assert alone["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert alone["adapter"] == str(out) and "check" not in alone
    base = run(text_of(data, out), tmp_path / "base", "train=false", "adapter_path=''")
    assert base["adapter"] is None and base["test_loss"] > alone["test_loss"]
    from mlx_lora.show import print_summary

    print_summary(base | {"run_dir": str(tmp_path)})


@pytest.mark.parametrize(("task", "prompt"), [("countdown", "Numbers: 7"), ("jsonl", '"..."')])
def test_the_command_to_go_on_with_asks_the_task_s_own_question(tmp_path, capsys, task, prompt):
    from mlx_lora.show import print_summary

    (tmp_path / "base").mkdir()
    about = {"run_dir": str(tmp_path), "task": task, "alerts": [], "adapter_alerts": {}}
    print_summary(about | {"check": {"verdict": "pass"}, "seconds": 1.0})
    said = capsys.readouterr().out
    assert "mlx_lm generate" in said and prompt in said


def test_a_checkpoint_of_mlx_lm_is_gone_on_from(whole, data, tmp_path):
    """It is beside the last adapter, and another one."""
    _, out, _ = whole
    shutil.copytree(out, tmp_path / "theirs")
    numbered = tmp_path / "theirs" / "0000002_adapters.safetensors"
    tensors = dict(mx.load(str(numbered.with_name("adapters.safetensors"))))
    mx.save_safetensors(str(numbered), {k: v * 0.5 for k, v in tensors.items()})
    text = text_of(data, tmp_path / "out")
    options = [f"resume_adapter_file={numbered}", "iters=1", "test=false"]
    run(text, tmp_path / "run", *options, "grad_accumulation_steps=2")
    name = "model.layers.0.self_attn.q_proj.lora_b"
    found = files.read(tmp_path / "run" / "adapters")[1]
    assert mx.array_equal(found[name], 0.5 * tensors[name]), "one batch of two moves nothing"


IGNORED = {
    "learning_rte: 1e-3": "did you mean learning_rate",
    "clear-cache-threshold: 1": "clear",
    "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, alpah: 16}": "alpha",
    "optimizer_config: {sgd: {momentum: 0.9}}": "is not used: the optimizer is adam",
    "hf_dataset: {path: a/b}\nprompt_feature: q": "prompt_feature: is not read where there is hf",
    "hf_dataset: {path: a/b}\ndata: here": "data: is not read where there is hf_dataset",
    "hf_dataset: {name: a/b}": "hf_dataset",
    "training_mode: dpo": "training_mode",
    "train: false": "nothing to do",
}


@pytest.mark.parametrize("text", IGNORED)
def test_what_mlx_lm_would_not_act_on_is_refused(text):
    with pytest.raises(ConfigError, match=re.compile(re.escape(IGNORED[text]), re.IGNORECASE)):
        config.from_text(text)


def test_layers_that_match_nothing_are_refused(data, tmp_path):
    options = ['lora_parameters.keys=["self_attn.q_prj"]']
    with pytest.raises(Exception, match="q_prj"):
        run(text_of(data, tmp_path / "out"), tmp_path / "run", *options)


def test_what_will_not_happen_is_said(data, tmp_path):
    e = config.from_text(text_of(data, tmp_path), "cfg.yaml", ["iters=7", "learning_rate=1e-4"])
    first, second = sorted(config.notices(e))
    assert "gradients of the last 1 batches move nothing" in first
    assert "learning_rate 0.0001 is not used" in second


def test_waiting_for_a_better_validation_needs_one(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a duck"}\n' * 4)
    e = config.from_text(f"model: demo\ndata: {tmp_path}\neval: {{patience: 2}}")
    with pytest.raises(ConfigError, match=r"no valid\.jsonl"):
        experiment.run(e, tmp_path / "run", Console(quiet=True))


def accuracy_of(when, value):
    about = {"": value, "_low": value - 0.04, "_high": value + 0.04, "_sampled": value}
    return {f"accuracy_{when}{end}": number for end, number in about.items()}


@pytest.mark.parametrize(("after", "said"), [(0.61, "It learned: "), (0.38, "Not shown to have")])
def test_a_run_ends_with_whether_it_learned_and_where_its_alerts_are(tmp_path, capsys, after, said):
    from mlx_lora.show import print_summary

    about = {
        "run_dir": str(tmp_path),
        "task": "jsonl",
        "seconds": 1.0,
        "check": {"verdict": "pass"},
    }
    about |= {"alerts": [], "adapter_alerts": {"dominance_critical": 9}}
    print_summary(about | accuracy_of("before", 0.37) | accuracy_of("after", after))
    seen = " ".join(capsys.readouterr().out.split())
    assert f"{said}" in seen and "from 37.0% to" in seen
    assert "dominance_critical in 9" in seen and "report.html" in seen
    assert f"mlx-lora export {tmp_path}/adapters" in seen
    print_summary(about | accuracy_of("before", 0.37) | accuracy_of("after", 0.1))
    seen = capsys.readouterr().out
    assert "It got worse" in seen and "mlx-lora check" in seen and "mlx-lora export" not in seen


def test_a_task_of_rewards_shows_their_means_where_nothing_is_right_or_wrong(tmp_path, capsys):
    from mlx_lora.show import print_summary

    about = {"run_dir": str(tmp_path), "task": "python", "seconds": 1.0, "alerts": []}
    for when, mean in (("before", 0.25), ("after", 0.75)):
        about |= {f"accuracy_{when}": None, f"accuracy_{when}_sampled": None}
        about[f"reward_mean_{when}"] = mean
    print_summary(about | {"check": {"verdict": "pass"}, "adapter_alerts": {}})
    seen = capsys.readouterr().out
    assert "mean reward 0.25" in seen and "mean reward 0.75" in seen
