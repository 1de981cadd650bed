"""The check: harmless starts pass, known-bad ones do not, every gate can speak both ways."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_lora import bases, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.check import gate, probes
from mlx_lora.check.gates import gates
from mlx_lora.check.metrics import Measured
from mlx_lora.errors import ConfigError, ModelError

KEYS = {
    "verdict", "reasons", "bitwise_identical", "kl_mean", "kl_p99", "top1_agreement",
    "perplexity_base", "perplexity_adapted", "perplexity_ratio", "entropy_base", "entropy_adapted",
    "samples", "seconds",
}  # fmt: skip


def demo(**options):
    return models.load("demo", **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_start_passes_bitwise(bits):
    report = gate.check(demo(quantize={"bits": bits, "group_size": 64, "mode": "affine"}))
    document = report.to_json()
    assert report.verdict == "pass"
    assert document["bitwise_identical"] and document["kl_mean"] == 0.0
    assert document["top1_agreement"] == 1.0 and document["perplexity_ratio"] == 1.0
    assert document.keys() >= KEYS
    assert all(s["base"] == s["adapted"] for s in document["samples"])
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(("std", "verdicts"), [(1e-6, {"warn"}), (0.3, {"fail"})])
def test_a_gaussian_start_never_gets_better_than_warn(std, verdicts):
    report = gate.check(demo(), init="gaussian", init_options={"std": std})
    assert report.verdict in verdicts
    assert any("gaussian" in r for r in report.reasons)


def test_an_untrained_adapter_from_disk_is_named(tmp_path):
    loaded = demo()
    files.save(loaded.model, attach(loaded.model), tmp_path)
    report = gate.check(demo(), adapter=tmp_path)
    assert report.verdict == "warn" and "untrained" in report.reasons[0]
    assert gate.check(demo(), adapter=tmp_path, expect="changed").verdict == "fail"
    assert gate.check(demo(), adapter=tmp_path, expect="same").verdict == "pass"


def spoiled(tmp_path, change):
    """An adapter folder whose factors went through `change(layer)`."""
    loaded = demo()
    config = attach(loaded.model, init="gaussian", init_options={"std": 0.02})
    for layer in lora_layers(loaded.model).values():
        change(layer)
    files.save(loaded.model, config, tmp_path)
    return gate.check(demo(), adapter=tmp_path)


def test_nan_and_a_wrong_scale_fail_and_a_small_adapter_is_healthy(tmp_path):
    def nan(layer):
        layer.lora_b = layer.lora_b * mx.array(float("nan"))

    def loud(layer):
        layer.scale = 500.0

    assert spoiled(tmp_path / "small", lambda layer: None).verdict == "pass"
    report = spoiled(tmp_path / "nan", nan)
    assert report.verdict == "fail" and "NaN" in report.reasons[0]
    document = report.to_json()
    json.dumps(document, allow_nan=False)
    assert document["kl_mean"] is None and document["perplexity_adapted"] is None
    assert spoiled(tmp_path / "loud", loud).verdict == "fail"


GOOD = Measured(
    bitwise_identical=True,
    same_prompts=True,
    off_restores_base=True,
    kl_mean=0.0,
    kl_p99=0.0,
    top1_agreement=1.0,
    perplexity_base=2.0,
    perplexity_adapted=2.0,
    entropy_base=1.0,
    entropy_adapted=1.0,
    vocabulary=1024,
    intervals={
        "kl_mean": (0.0, 0.0),
        "top1_agreement": (1.0, 1.0),
        "perplexity_ratio": (1.0, 1.0),
        "entropy_ratio": (1.0, 1.0),
    },
    mismatch_kl=0.0,
    mismatch_max=0.0,
    update_size=0.0,
    update_largest="q_proj",
    sensitive=True,
    sample_nll_base=1.0,
    sample_nll_adapted=1.0,
    distinct_base=0.9,
    distinct_adapted=0.9,
    ended_base=1.0,
    ended_adapted=1.0,
    empty_adapted=0.0,
    b_norm=0.0,
    non_finite=[],
    zeroed=[],
    base_recorded=None,
    file_intact=None,
    dropout=0.0,
    chat_template=True,
    probes_hash="p",
    logits_base_hash="l",
    logits_adapted_hash="l",
)
CHANGED = replace(GOOD, bitwise_identical=False, b_norm=1.0)
SPEAK = [  # gate, measured, expectation, verdict
    ("structure", GOOD, "same", "pass"),
    ("structure", replace(GOOD, non_finite=["q"]), "same", "fail"),
    ("structure", replace(GOOD, off_restores_base=False), "same", "fail"),
    ("structure", replace(GOOD, dropout=0.1), "same", "warn"),
    ("structure", replace(GOOD, same_prompts=False), "same", "fail"),
    ("structure", replace(GOOD, base_recorded=True), "same", "pass"),
    ("structure", replace(GOOD, base_recorded=False), "healthy", "fail"),
    ("structure", replace(GOOD, zeroed=["q"]), "healthy", "warn"),
    ("structure", replace(GOOD, zeroed=["q"]), "same", "pass"),
    ("structure", replace(GOOD, file_intact=True), "healthy", "pass"),
    ("structure", replace(GOOD, file_intact=False), "healthy", "warn"),
    ("identity", GOOD, "same", "pass"),
    ("identity", GOOD, "healthy", "warn"),
    ("identity", GOOD, "changed", "fail"),
    ("identity", CHANGED, "same", "fail"),
    ("identity", CHANGED, "changed", "pass"),
    ("divergence", replace(CHANGED, kl_p99=1.1), "same", "fail"),
    ("sensitivity", GOOD, "same", "pass"),
    ("sensitivity", replace(GOOD, sensitive=False), "same", "fail"),
    ("size", replace(GOOD, update_size=0.1), "same", "pass"),
    ("size", replace(GOOD, update_size=0.2), "same", "warn"),
    ("size", replace(GOOD, update_size=1.1), "same", "fail"),
    ("size", replace(GOOD, update_size=1.0), "healthy", "pass"),
    ("size", replace(GOOD, update_size=3.0), "healthy", "warn"),
    ("size", replace(GOOD, update_size=5.0), "healthy", "fail"),
    ("sampler", replace(GOOD, mismatch_kl=1e-3), "same", "pass"),
    ("sampler", replace(GOOD, mismatch_kl=0.01), "healthy", "warn"),
    ("sampler", replace(GOOD, mismatch_kl=0.2), "healthy", "fail"),
    ("writing", replace(CHANGED, ended_adapted=0.2), "healthy", "warn"),
    ("divergence", replace(CHANGED, kl_mean=1e-3), "same", "pass"),
    ("divergence", replace(CHANGED, kl_mean=1.1e-3), "same", "warn"),
    ("divergence", replace(CHANGED, kl_mean=0.11), "same", "fail"),
    (
        "divergence",
        replace(CHANGED, kl_mean=9e-4, intervals={**GOOD.intervals, "kl_mean": (5e-4, 11e-4)}),
        "same",
        "warn",
    ),
    ("divergence", replace(CHANGED, kl_mean=float("nan")), "same", "fail"),
    ("agreement", replace(CHANGED, top1_agreement=0.955), "same", "pass"),
    ("agreement", replace(CHANGED, top1_agreement=0.94), "same", "warn"),
    ("agreement", replace(CHANGED, top1_agreement=0.89), "same", "fail"),
    ("reading", replace(CHANGED, perplexity_adapted=2.03), "same", "pass"),
    ("reading", replace(CHANGED, perplexity_adapted=2.1), "same", "warn"),
    ("reading", replace(CHANGED, perplexity_adapted=2.3), "same", "fail"),
    ("reading", replace(CHANGED, perplexity_adapted=3.9), "healthy", "pass"),
    ("reading", replace(CHANGED, perplexity_adapted=float("inf")), "healthy", "fail"),
    ("uncertainty", replace(CHANGED, entropy_adapted=1.2), "same", "pass"),
    ("uncertainty", replace(CHANGED, entropy_adapted=1.3), "same", "warn"),
    ("uncertainty", replace(CHANGED, entropy_adapted=0.1), "healthy", "warn"),
    ("uncertainty", replace(CHANGED, entropy_adapted=5.6), "healthy", "fail"),
    ("uncertainty", replace(CHANGED, entropy_adapted=float("nan")), "healthy", "fail"),
    ("writing", replace(CHANGED, sample_nll_adapted=1.4), "healthy", "pass"),
    ("writing", replace(CHANGED, sample_nll_adapted=1.6), "healthy", "warn"),
    ("writing", replace(CHANGED, sample_nll_adapted=3.1), "healthy", "fail"),
    ("writing", replace(CHANGED, empty_adapted=0.6), "healthy", "fail"),
    ("writing", replace(CHANGED, distinct_adapted=0.4), "healthy", "warn"),
    ("writing", replace(CHANGED, distinct_adapted=0.1), "healthy", "fail"),
    ("writing", replace(CHANGED, sample_nll_adapted=3.1, distinct_adapted=0.4), "healthy", "fail"),
    (
        "writing",
        replace(CHANGED, sample_nll_adapted=float("nan"), distinct_adapted=0.4),
        "healthy",
        "fail",
    ),
]


@pytest.mark.parametrize(("name", "measured", "expect", "verdict"), SPEAK)
def test_every_gate_speaks_at_its_boundary(name, measured, expect, verdict):
    init = "zero" if expect == "same" else None
    assert gates[name](measured, expect, init).verdict == verdict


def test_a_start_that_leaves_embeddings_at_zero_passes():
    lora = {"keys": ["q_proj", "embed_tokens"]}
    report = gate.check(models.load("demo"), init="split_support", lora=lora, samples=1)
    assert report.measured.zeroed == ["model.embed_tokens"]
    assert report.verdict == "pass", report.reasons


def test_an_update_that_is_lost_in_rounding_is_no_harmless_start():
    """Equal to the bit by luck of this machine's rounding: never better than warn."""
    lost = replace(GOOD, b_norm=1e-6)
    assert gates["identity"](lost, "same", "gaussian (std=1e-06)").verdict == "warn"
    assert gates["identity"](lost, "same", "split_support").verdict == "pass"
    assert gates["identity"](lost, "same", None).verdict == "pass"
    assert gates["identity"](GOOD, "same", "gaussian (std=0.0)").verdict == "pass"


def test_every_gate_is_tested_quiet_and_speaking():
    for name in gates:
        said = {verdict for n, _, _, verdict in SPEAK if n == name}
        assert "pass" in said and len(said) > 1, name


def test_an_expectation_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match="sane"):
        gate.check(demo(), expect="sane")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", ":1: not JSON"),
        ('{"text": "a b"}\n[1]\n', ":2: a row is an object"),
        ('{"txet": "a"}\n', ":1: needs"),
        ('{"text": "a b c"}\n', "need both"),
        ("", "need both"),
        ('{"text": "a b"}\n{"prompt": "c"}\n{"text": "."}\n', ":3: a single token"),
        ('{"text": "a b"}\n{"prompt": " "}\n{"text": ""}\n', ":2: `prompt` is empty\n.*:3: `text`"),
        ('{"messages": "hello"}\n', ":1: `messages` is a list"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "probes.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        probes.read(demo(), path)


def test_prompt_files_of_both_kinds_and_the_general_set_are_read(tmp_path):
    lines = tmp_path / "probes.txt"
    lines.write_text("Anna went to the park.\n\nThen they all went home.\n")
    found = probes.read(demo(), lines)
    assert len(found.texts) == len(found.prompts) == 2
    general = probes.read(demo(), probes.ASSETS / "check_general.jsonl")
    assert len(general.texts) >= 8 and len(general.prompts) >= 4


TURNS = (
    '{"messages": [{"role": "user", "content": "What is 2 * 4 ?"},'
    ' {"role": "assistant", "content": "8"}]}\n'
    '{"messages": [{"role": "user", "content": "How many legs has a duck?"}]}\n'
)


def test_a_copy_of_the_embedded_model_is_asked_what_that_is_asked(tmp_path):
    models.save_base(demo(), tmp_path / "base")
    copy = models.load(str(tmp_path / "base"))
    assert probes.read(copy) == probes.read(demo())
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    assert probes.read(copy) != probes.read(demo())


def test_messages_are_read_from_the_last_answer_on_or_continued(tmp_path):
    path, loaded = tmp_path / "probes.jsonl", demo()
    path.write_text(TURNS)
    found = probes.read(loaded, path)
    path.write_text('{"prompt": "What is 2 * 4 ?", "completion": "8"}\n' + TURNS.split("\n")[1])
    plain = probes.read(loaded, path)
    assert found.texts == plain.texts and found.prompts == [
        (("user", "How many legs has a duck?"),)
    ]


def test_messages_need_a_chat_template_and_plain_prompts_do_not(tmp_path):
    path, loaded = tmp_path / "probes.jsonl", demo()
    path.write_text(TURNS)
    loaded.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        probes.read(loaded, path)
    report = gate.check(loaded, samples=1)
    assert report.verdict == "pass" and not report.measured.chat_template


def test_a_model_that_ends_texts_with_a_token_it_lacks_does_not_load(tmp_path):
    """MLX does not check ids: one past the table reads, and in a gradient writes, other memory."""
    folder = tmp_path / "model"
    shutil.copytree(models.DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 5000}))
    with pytest.raises(ModelError, match="ends texts with token 5000"):
        models.load(str(folder))


def test_a_base_is_known_again_at_any_quantization_and_no_other_is():
    sketches = {bits: bases.sketch(demo(quantize={"bits": bits}).model) for bits in (2, 3, 4, 8)}
    assert all(bases.same_base(sketches[4], s) for s in sketches.values())
    other = demo()
    attach(other.model)
    assert bases.same_base(sketches[4], bases.sketch(other.model)), "an adapter is not the base"
    for name, m in other.model.named_modules():
        if name.endswith(".linear"):
            m.weight = mx.random.permutation(m.weight, key=mx.random.key(1))
    assert not bases.same_base(sketches[4], bases.sketch(other.model))
    assert not bases.same_base([], sketches[4])


def test_an_adapter_of_another_base_is_a_failure(tmp_path):
    loaded = demo()
    config = attach(loaded, init="gaussian", init_options={"std": 0.02})
    base = bases.identity(loaded)
    files.save(loaded.model, config | {"base": base}, tmp_path / "own")
    assert gate.check(demo(), adapter=tmp_path / "own").verdict == "pass"
    base["sketch"] = [-x for x in base["sketch"]]
    files.save(loaded.model, config | {"base": base}, tmp_path / "other")
    report = gate.check(demo(), adapter=tmp_path / "other")
    assert report.verdict == "fail" and "another base" in report.reasons[0]


def test_an_adapter_on_weights_of_its_inits_own_belongs_to_them_alone(tmp_path):
    """LoftQ's base is so near the one it was made from that nothing else tells them apart."""
    loaded = models.load("demo")
    config = attach(loaded, init="loftq", init_options={"iterations": 2})
    files.save(loaded.model, config | {"base": bases.identity(loaded)}, tmp_path / "a")
    models.save_base(loaded, tmp_path / "base")
    report = gate.check(models.load("demo"), adapter=tmp_path / "a", samples=1)
    assert report.verdict == "fail" and "another base" in report.reasons[0]
    report = gate.check(models.load(str(tmp_path / "base")), adapter=tmp_path / "a", samples=1)
    assert report.verdict == "pass", report.reasons


def test_factors_that_changed_since_they_were_saved_are_named(tmp_path):
    loaded = demo()
    config = attach(loaded, init="gaussian", init_options={"std": 0.02})
    files.save(loaded.model, config, tmp_path)
    assert gate.check(demo(), adapter=tmp_path).measured.file_intact is True
    _, tensors = files.read(tmp_path)
    name = next(n for n in tensors if n.endswith("lora_b"))
    mx.save_safetensors(str(tmp_path / files.WEIGHTS), tensors | {name: 1.01 * tensors[name]})
    report = gate.check(demo(), adapter=tmp_path)
    assert report.verdict == "warn" and "not those that were saved" in report.reasons[0]


def test_rows_longer_than_the_context_are_listed_and_nothing_is_cut(tmp_path):
    path = tmp_path / "probes.jsonl"
    rows = [{"text": "word " * 300}, {"text": "fine"}, {"prompt": "go on " * 200}, {"other": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError) as caught:
        probes.read(demo(), path)
    message = str(caught.value)
    assert "probes.jsonl:1:" in message and "the context holds 512" in message
    assert "probes.jsonl:3:" in message and "probes.jsonl:4: needs" in message
    assert "probes.jsonl:2:" not in message
    path.write_text('{"text": "' + "word " * 80 + '"}\n{"prompt": "hi"}\n')
    assert len(probes.read(demo(), path).texts[0][0]) > 200, "long texts are read whole"
