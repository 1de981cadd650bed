"""Experiment files: what is accepted, what is refused, and that a refusal says where and why."""

import ast
import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_lora import config, yamlfile
from mlx_lora.errors import ConfigError
from mlx_lora.schema import Experiment

SHIPPED = config.shipped()
MLX_LM = Path(next(iter(importlib.util.find_spec("mlx_lm").submodule_search_locations)))  # type: ignore
# `train: false` with `test: false` does nothing, and an adapter has its place in the run folder
OUR_DEFAULTS = {"train": True, "adapter_path": None}


def load(text: str, *overrides: str) -> Experiment:
    return config.from_text(text, "cfg.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def mlx_lm_defaults() -> dict:
    """CONFIG_DEFAULTS of mlx_lm.lora, read without the seconds that importing it takes."""
    for node in ast.parse((MLX_LM / "lora.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG_DEFAULTS":
            return ast.literal_eval(node.value)
    raise AssertionError("mlx_lm.lora has no CONFIG_DEFAULTS any more")


def test_something_is_shipped():
    assert {"demo", "grpo_countdown", "grpo_qwen3_0.6b"} <= SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_their_names_exist(name):
    experiment = config.load(name)
    config.check_names(experiment)
    assert not config.notices(experiment)
    header = SHIPPED[name].read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"mlx-lora train configs/{name}.yaml" in header and "Expected:" in header


def test_the_commented_config_is_the_demo():
    demo, commented = (config.resolved(config.load(n)) for n in ("demo", "grpo_countdown"))
    assert demo.pop("task") == commented.pop("task")["name"]
    assert demo == commented


def test_mlx_lm_defaults_are_ours():
    theirs, ours = mlx_lm_defaults(), config.resolved(load("seed: 0"))
    ours["lora_parameters"] = {k: ours["lora_parameters"][k] for k in theirs["lora_parameters"]}
    assert {k: ours[k] for k in theirs} == theirs | OUR_DEFAULTS


def test_mlx_lm_keys_are_accepted():
    source = (MLX_LM / "lora.py").read_text(encoding="utf-8")
    flags = {
        call.args[-1].value.removeprefix("--").replace("-", "_")  # type: ignore
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument"
    }
    features = {f"{kind}_feature" for kind in ("prompt", "completion", "chat", "text")}
    assert len(flags) > 20
    assert (
        flags | features | {"hf_dataset"} | mlx_lm_defaults().keys()
        <= Experiment.model_fields.keys()
    )


def test_an_mlx_lm_file_runs_unchanged():
    e = load(
        """
        model: mlx-community/Llama-3.2-1B-Instruct-4bit
        train: true
        optimizer: AdamW
        optimizer_config: {adamw: {betas: [0.9, 0.98], weight_decay: 1e-2}}
        learning_rate: 1e-5
        lora_parameters: {keys: ["self_attn.q_proj"], rank: 8, scale: 20, dropout: 0.05}
        lr_schedule: {name: cosine_decay, warmup: 100, arguments: [1e-5, 1000, 1e-7]}
        hf_dataset: {path: billsum, train_split: "train[:100]", prompt_feature: text}
        resume_adapter_file: null
        clear_cache_threshold: 1GB
        """
    )
    assert (e.method, e.optimizer, e.num_layers) == ("sft", "adamw", 16)
    assert e.lr_schedule is not None and e.lr_schedule.arguments == [1e-5, 1000, 1e-7]
    assert e.hf_dataset[0].path == "billsum" and e.clear_cache_threshold == 10**9
    assert e.dropout == 0.05
    config.check_names(e)


def test_scalars_are_what_people_mean():
    value = yamlfile.parse(
        "[1e-5, 1E3, -.5, 1_000, 010, on, yes, off, 2024-01-01, 1:30, true, FALSE, ~, .inf, '7']",
        "x",
    ).value
    words = ["on", "yes", "off", "2024-01-01", "1:30"]
    assert value == [1e-5, 1000.0, -0.5, 1000, 10, *words, True, False, None, float("inf"), "7"]
    assert [type(v) for v in value[:5]] == [float, float, float, int, int]


def test_the_global_loader_is_left_alone():
    import yaml

    assert yaml.safe_load("[on, 1e-5]") == [True, "1e-5"]


def test_every_problem_is_listed_with_its_place():
    message = refusal(
        "model: demo\nlearning_rte: 1e-5\nseed: 1\nseed: 2\nlora_parameters:\n  rank: 0\n"
        "  alpha: 16\n  scale: 2\nrank: 4\nmethod: grpo\nmask_prompt: yes\ncheck: 3\n"
    )
    lines = message.splitlines()
    assert lines[0] == "cfg.yaml:2:1: learning_rte: unknown key. Did you mean learning_rate?"
    assert lines[1] == "cfg.yaml:4:1: seed: given twice, first on line 3"
    assert lines[2].startswith("cfg.yaml:6:3: lora_parameters.rank: should be greater than")
    assert (
        lines[3].startswith("cfg.yaml:7:3: lora_parameters.alpha: ") and "alpha / rank" in lines[3]
    )
    assert lines[4] == "cfg.yaml:9:1: rank: unknown key. Did you mean lora_parameters.rank?"
    assert lines[5].startswith("cfg.yaml:10:1: method: grpo needs a task")
    assert lines[6].startswith("cfg.yaml:11:1: mask_prompt: ") and "'yes'" in lines[6]
    assert lines[7].startswith("cfg.yaml:12:1: check: should be a block")
    assert len(lines) == 8


BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 8)}]\n" for old, new in pairwise("abcdefg")
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("target_modules: [q_proj]", "Did you mean lora_parameters.keys?"),
        ("batch_size: true", "batch_size"),
        ("iters: 10.0", "iters"),
        ("iters: 0", "iters"),
        ("learning_rate: .nan", "finite"),
        ("iters: 5\nepochs: 1", "in place of iters"),
        ("train: false", "nothing to do"),
        ("test: true\ntest_batches: 0", "test_batches: 0 batches are no test"),
        ("lora_parameters: {rslora: true}", "give alpha"),
        ("lora_parameters: {scale: rslora}", "give alpha"),
        ("lora_parameters: {scale: rslor, alpha: 4}", "in place of scale"),
        ("lora_parameters: {lora_plus_ratio: 0}", "greater than 0"),
        ("method: grpo\ntask: countdown\nrejection_sampling: {}", "samples by itself"),
        ("rejection_sampling: {}", "needs a task"),
        ("task: countdown\ndata: x\nrejection_sampling: {}", "2:1: data: stands in place"),
        ("task: countdown\nrejection_sampling: {temperature: 0}", "greater than 0"),
        ("optimizer_config: {adma: {}}", "optimizer_config.adma"),
        ("quantize: {mode: mxfp4, bits: 8}", "should be 4 with mode mxfp4"),
        ("quantize: {group_size: 16}", "32, 64 or 128"),
        ("fine_tune_type: full\nquantize: {bits: 4}", "trains no adapter"),
        ("method: es\ntask: countdown\nes: {population: 7}", "even"),
        ("method: grpo\ntask: countdown\nrollout: {temperature: 0}", "nothing to learn"),
        ("method: grpo\ntask: countdown\nepochs: 2", "give iters"),
        ("init: {std: 1}", "init.name: needed"),
        ("init: [zero]", "block"),
        ("hf_dataset: [{path: a}, {path: 3}]", "1:26: hf_dataset.1.path"),
        ("stages: [{iters: 5}, {itres: 5}]", "1:23: stages.1.itres: unknown key"),
        ("stages: 3", "should be a list"),
        ("lora_parameters: {rank: !!int x}", "1:25: 'x' is no int"),
        ("? [a, b]\n: 1", "1:3: a key is a plain word"),
        ("model: !!python/object/apply:os.system [ls]", "the tag python/object"),
        ('model: "\\ud800"', "1:8"),
        ("a: [", "1:5: not valid YAML"),
        ("model: demo\n\tseed: 1", "2:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "another document"),
        ("- model", "found a list"),
        ("demo", "found a value"),
        ("# nothing\n", "found nothing"),
        ("a: &a {b: *a}", "nested deeper"),
        ("a: " + "[" * 1000, "not valid YAML"),
        (BOMB, "20000 values"),
    ],
)
def test_refused(text, part):
    message = refusal(text)
    assert part in message and message.startswith("cfg.yaml:")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"seed: \x80", b"\x00"])
def test_unreadable_files_are_one_readable_error(tmp_path, content):
    (tmp_path / "cfg.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cfg\.yaml"):
        config.load(tmp_path / "cfg.yaml")


def test_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "cfg.yaml").write_bytes(b"\xef\xbb\xbfseed: 3")
    assert config.load(tmp_path / "cfg.yaml").seed == 3


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="there is no experiment file") as caught:
        config.load(tmp_path / "mien.yaml")
    assert caught.value.hint == "Did you mean mine.yaml?"
    with pytest.raises(ConfigError, match="is a folder") as caught:
        config.load(tmp_path)
    assert "mine.yaml" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        config.find("dmeo")
    assert "demo" in caught.value.hint
    assert config.find("demo") == config.find("demo.yaml") == SHIPPED["demo"]


def test_an_installed_wheel_carries_its_own_configs(tmp_path, monkeypatch):
    (tmp_path / "mlx_lora" / "configs").mkdir(parents=True)
    (tmp_path / "mlx_lora" / "configs" / "only.yaml").write_text("seed: 5")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "mlx_lora" / "config.py"))
    assert list(config.shipped()) == ["only"] and config.load("only").seed == 5


KEYS = sorted({part for path in config.known_keys() for part in path})
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("zero")
BLOCKS = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
SYNTAX = [*"\n\t[]{}|>'\"\\#%?!", ": ", "  ", "- ", "&a", "*a", "!!", "---", "<<", "1e-5", "null"]
LINES = st.lists(st.sampled_from(KEYS) | st.sampled_from(SYNTAX), max_size=30).map("".join)


@settings(max_examples=150)
@given(st.text(max_size=40) | LINES | BLOCKS.map(yamlfile.dump))
@example('a: "\\UFFFFFFFF"')
@example("seed: " + "9" * 5000)
@example('"\\0": 1')
def test_any_text_loads_or_is_a_config_error(text):
    try:
        experiment = load(text)
    except ConfigError as error:
        str(error).encode()
        assert str(error)
    else:
        again = load(yamlfile.dump(config.resolved(experiment)))
        assert repr(config.resolved(again)) == repr(config.resolved(experiment))


@settings(max_examples=60)
@given(BLOCKS)
def test_what_is_dumped_is_read_back(data):
    assert repr(yamlfile.parse(yamlfile.dump({"a": data}), "x").value) == repr({"a": data})


@settings(max_examples=50)
@given(st.lists(st.text(max_size=12), max_size=3))
def test_any_options_load_or_are_a_config_error(options):
    try:
        load("model: demo", *options)
    except ConfigError as error:
        str(error).encode()


def test_overrides_reach_every_level():
    e = load(
        "model: demo\nmethod: grpo\ntask: countdown\nlora_parameters: {rank: 4, alpha: 8}",
        "learning_rate=1e-4",
        "task.max_count=4",
        "lora_parameters.keys=[q_proj, v_proj]",
        "lora_parameters.scale=3",
        "init={name: gaussian, std: 0.1}",
        "project_name=a: b",
    )
    assert e.learning_rate == 1e-4 and e.project_name == "a: b"
    assert e.task and (e.task.name, e.task.options) == ("countdown", {"max_count": 4})
    assert e.lora_parameters.keys == ("q_proj", "v_proj") and e.lora_parameters.effective_scale == 3
    assert (e.init.name, e.init.options) == ("gaussian", {"std": 0.1})


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("rank=4", "-o rank: rank: unknown key. Did you mean lora_parameters.rank?"),
        ("es.sigam=4", "-o es.sigam: es.sigam: unknown key. Did you mean sigma?"),
        ("seed=on", "-o seed: seed: should be"),
        ("seed.x=1", "-o seed.x: seed: should be"),
        ("stages.1.itres=1", "-o stages.1.itres: stages.1.itres: unknown key. Did you mean iters"),
        ("stages.7.iters=1", "stages: should be a list, got {'7'"),
        (
            "lora_parameters.keys={}",
            "-o lora_parameters.keys: lora_parameters.keys: should be a list",
        ),
        ("seed", "-o seed: should be key=value"),
        ("=1", "should be key=value"),
        ("a..b=1", "should be key=value"),
        ("lora_parameters=[1", "-o lora_parameters: value:1:3: not valid YAML"),
    ],
)
def test_wrong_overrides(option, part):
    assert part in refusal("lora_parameters: {keys: [q_proj]}\nstages: [{seed: 1}, {}]", option)


def test_another_name_drops_the_old_options():
    text = "init: {name: gaussian, std: 0.1}"
    assert load(text, "init.name=zero").init.options == {}
    assert load(text, "init=zero").init.options == {}
    assert load(text, "init.std=0.2").init.options == {"std": 0.2}


def test_alpha_is_a_way_to_write_scale():
    def scale(parameters: str) -> float:
        return load(f"lora_parameters: {parameters}").lora_parameters.effective_scale

    assert scale("{}") == 20
    assert scale("{rank: 4, alpha: 8}") == 2
    assert scale("{rank: 4, alpha: 8, rslora: true}") == 4
    assert scale("{rank: 4, alpha: 8, scale: rslora}") == 4
    parameters = load("lora_parameters: {rank: 4, alpha: 8}").lora_parameters
    assert parameters.scale_at(2) == 4 and "scale" not in parameters.model_dump()


def test_rslora_may_be_said_as_a_scale_wherever_the_rest_is_said():
    text = "lora_parameters: {rank: 4, alpha: 8, scale: rslora}"
    e = load(text, "lora_parameters.alpha=16")
    assert e.lora_parameters.rslora and e.lora_parameters.effective_scale == 8
    e = load("lora_parameters: {rank: 4, alpha: 8}", "lora_parameters.scale=rslora")
    assert e.lora_parameters.effective_scale == 4
    e = load(text + "\nstages: [{seed: 1}, {lora_parameters: {alpha: 2}}]")
    assert [s.lora_parameters.effective_scale for s in e.loops] == [4, 1]
    assert config.resolved(load(yamlfile.dump(config.resolved(e)))) == config.resolved(e)


def test_rl_has_its_own_defaults_and_no_dropout():
    e = load("method: grpo\ntask: countdown\nlora_parameters: {dropout: 0.1}\nes: {population: 8}")
    assert e.num_layers == -1 and e.dropout == 0
    dropout, es = config.notices(e)
    assert "dropout 0.1 is set to 0" in dropout and "es: is not used by method grpo" in es


GRPO, ES = "method: grpo\ntask: countdown\n", "method: es\ntask: countdown\n"
IDLE = {
    GRPO
    + "data: mine.jsonl\nmask_prompt: true\nsft: {packing: true}": "data, mask_prompt, sft: is not",
    GRPO + "stages: [{method: grpo, data: mine.jsonl}, {}]": "data: is not used by method grpo",
    GRPO + "grpo: {importance_sampling: none, is_cap: 3}": "grpo.is_cap is not used",
    ES + "rollout: {top_k: 4}": "rollouts are greedy",
    ES + "es: {turn: 3}": "es.turn is not used",
    ES + "monitor: {policy: stop, check_every: 0}": "monitor.policy is not used",
}


@pytest.mark.parametrize("text", IDLE)
def test_keys_without_an_effect_are_said(text):
    (said,) = config.notices(load(text))
    assert IDLE[text] in said
    both = "task: countdown\ndata: mine.jsonl\nstages: [{method: sft}, {method: grpo}]"
    assert not config.notices(load(both))


def test_stages_are_the_file_with_changes():
    text = """
    lora_parameters: {rank: 4, alpha: 8}
    task: countdown
    stages:
    - {method: sft, epochs: 2}
    - {method: grpo, iters: 30, lora_parameters: {scale: 3}, task: {max_count: 4}}
    """
    e = load(text, "stages.1.iters=20")
    warm, rl = e.loops
    assert (warm.method, warm.epochs, warm.num_layers) == ("sft", 2, -1), "one adapter for both"
    alone = load("stages: [{method: sft}, {method: sft, num_layers: 3}]")
    assert [s.num_layers for s in alone.loops] == [16, 3]
    assert (rl.method, rl.iters, rl.num_layers) == ("grpo", 20, -1)
    assert warm.lora_parameters.effective_scale == 2 and rl.lora_parameters.effective_scale == 3
    assert rl.task and rl.task.options == {"max_count": 4}
    again = load(yamlfile.dump(config.resolved(e)))
    assert config.resolved(again) == config.resolved(e)
    assert refusal(text.replace("rank: 4", "rank: 0")).count("rank") == 1  # not once a stage


def test_experiments_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load("seed: 1").seed = 2  # type: ignore[misc]


def test_unknown_names_are_listed_with_their_places():
    e = load(
        "method: grpo\ntask: countdwn\ninit: {name: gaussian, sdt: 1}\n"
        "grpo: {loss: dapoo}\noptimizer_config: {adam: {beta: 1}}\nscale_schedule: cnstant\n"
    )
    with pytest.raises(ConfigError) as caught:
        config.check_names(e)
    assert str(caught.value).splitlines() == [
        "cfg.yaml:2:1: unknown task 'countdwn'. Did you mean countdown?",
        "cfg.yaml:3:1: init gaussian has no option sdt. Did you mean std?",
        "cfg.yaml:4:8: unknown loss 'dapoo'. Did you mean dapo?",
        "cfg.yaml:5:20: adam has no option beta. Did you mean betas?",
        "cfg.yaml:6:1: unknown scale schedule 'cnstant'. Did you mean constant?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: adamw\noptimizer_config: {adamw: {weight_decay: x}}", "valid number, got 'x'"),
        ("optimizer_config: {adam: {betas: 0.9}}", "adam: betas should be a valid"),
        ("optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}", "sgd: Nesterov"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-3]}", "takes .init, decay_steps, end"),
        ("lr_schedule: {name: linear_schedule, arguments: [1, 2, 3, 4]}", "takes .init, end, step"),
    ],
)
def test_arguments_that_an_optimizer_or_schedule_cannot_take(text, message):
    """Each crashed at the first step."""
    with pytest.raises(ConfigError, match=message):
        config.check_names(load(text))


def test_options_of_optimizers_that_fit():
    for name, options in {
        "adam": "betas: [0.9, 0.99]",
        "adafactor": "eps: [1e-30, 1e-3], beta_1: null",
        "muon": "ns_steps: 3, momentum: 1",
    }.items():
        config.check_names(load(f"optimizer: {name}\noptimizer_config: {{{name}: {{{options}}}}}"))


def test_adafactor_does_not_look_at_the_learning_rate_unless_told():
    def said(options: str) -> bool:
        more = f"optimizer_config: {{adafactor: {{{options}}}}}"
        found = config.notices(load(f"optimizer: adafactor\n{more}"))
        return any("does not look at learning_rate" in notice for notice in found)

    assert said("") and said("relative_step: true") and not said("relative_step: false")


def test_names_of_an_experiment_built_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"^config: unknown init 'zreo'\. Did you mean zero\?"):
        config.check_names(Experiment.model_validate({"init": "zreo"}))


def test_importing_config_is_light():
    heavy = "{'mlx.core', 'mlx_lm', 'transformers', 'matplotlib'}"
    code = f"import sys, mlx_lora.config, mlx_lora.runlog; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_pissa_under_rl_is_warned_of():
    text = "model: demo\nmethod: grpo\ntask: countdown\ninit: {}\n"
    assert "collapse" in config.notices(config.from_text(text.format("pissa")))[0]
    assert not config.notices(config.from_text(text.format("loftq")))
    assert not config.notices(config.from_text("model: demo\nmethod: sft\ninit: pissa\n"))


def test_a_curve_has_a_bounded_number_of_knots():
    about = "model: demo\ndata: demo\nlora_parameters: {{type: spline, num_knots: {}}}\n"
    config.from_text(about.format(100))
    with pytest.raises(ConfigError, match="at most 100, got 101"):
        config.from_text(about.format(101))


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_step_that_ruins_models_is_said(method):
    """mlx-lm's default scale at a rate for a scale of 2."""
    text = f"model: demo\nmethod: {method}\ndata: x\ntask: countdown\nlearning_rate: 1e-3\n"
    said = [n for n in config.notices(config.from_text(text)) if "long step" in n]
    assert len(said) == 1 and "at scale 20 " in said[0]
    for more in ("lora_parameters: {scale: 2}\n", "optimizer: sgd\n"):
        assert not any("long step" in n for n in config.notices(config.from_text(text + more)))
