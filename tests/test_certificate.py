"""harmless.json: certified is verified, and what changed since is seen and named."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora import cpu, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach
from mlx_lora.check import certificate
from mlx_lora.check.machine import openblas
from mlx_lora.check.run import check_named, request
from mlx_lora.check.show import RESULTS, sentences
from mlx_lora.errors import AdapterError, ConfigError, RunError
from tests.test_metrics_doc import documented, emitted
from tests.tiny import tiny

LOGITS = {"dtype", "bitwise_identical", "logits_base_hash", "logits_adapted_hash"}
DEFAULTS = {
    "adapter": None, "init": "zero", "option": [], "lora": {}, "expect": None, "prompts": None,
    "bits": None, "seed": 0,
}  # fmt: skip


def checked(model, **options):
    """`check` with its command line's options."""
    given = DEFAULTS | options
    own = {k: given.pop(k) for k in ("certify", "verify", "out") if k in given}
    return check_named(request(model, **given), **own)


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> Path:
    """A few texts and prompts, so that a check takes less than a second."""
    path = tmp_path_factory.mktemp("probes") / "few.jsonl"
    rows = [
        {"text": "One summer Tom ran to the forest. In the end Tom was quiet."},
        {"prompt": "How many legs has a duck?", "completion": "A duck has two legs."},
        {"prompt": "How many legs has a fox?"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(probes):
    """`run(adapter=..., verify=True)`: the command on the embedded model, in this process."""
    return lambda **options: checked("demo", **{"prompts": probes, **options})


@pytest.fixture(scope="module")
def original(run, tmp_path_factory) -> Path:
    """An adapter folder with its certificate."""
    folder = tmp_path_factory.mktemp("certified") / "adapter"
    report = run(certify=True, out=folder)
    assert report.exit_code == 0 and report.certificate["status"] == "written"
    return folder


@pytest.fixture
def certified(original, tmp_path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(original, tmp_path / "copy")


@pytest.fixture(scope="module")
def found(original) -> dict:
    """What the certificate says."""
    return certificate.read(original)


def unequal(outcome: dict) -> set[str]:
    return {row["item"] for row in outcome["compared"] if not row["equal"]}


def changed(document: dict, item: str, value: object) -> dict:
    """A copy with another value at a dotted name."""
    copy = json.loads(json.dumps(document))
    *path, last = item.split(".")
    owner = copy
    for part in path:
        owner = owner[part]
    assert owner[last] != value
    owner[last] = value
    return copy


def test_what_is_certified_is_verified(run, original):
    report = run(adapter=original, verify=True)
    assert report.exit_code == 0 and report.expect == "same"
    outcome = report.to_json()["certificate"]
    assert outcome["status"] == "valid" and outcome["environment_differences"] == []
    items = {row["item"] for row in outcome["compared"]}
    assert items == {*certificate.ANYWHERE, *certificate.HERE} - {"base.revision"}
    said = sentences(outcome)
    assert len(said) == len(items) + 1 and said[-1] == RESULTS["valid"]


def test_the_same_inputs_give_the_same_bytes(run, certified, tmp_path):
    once = (certified / certificate.NAME).read_bytes()
    run(certify=True, out=tmp_path / "twice")
    assert (tmp_path / "twice" / certificate.NAME).read_bytes() == once
    (certified / certificate.NAME).unlink()
    assert run(adapter=certified, certify=True).exit_code == 0
    assert (certified / certificate.NAME).read_bytes() == once


def test_a_changed_adapter_is_invalid_though_it_is_harmless(run, certified):
    _, tensors = files.read(certified)
    name = next(n for n in tensors if n.endswith("lora_a"))
    tensors[name][0, 0] += 0.5
    mx.save_safetensors(str(certified / files.WEIGHTS), tensors, metadata={"format": "mlx"})
    report = run(adapter=certified, verify=True)
    assert report.measured.bitwise_identical and not report.measured.file_intact
    assert report.certificate["status"] == "invalid" and report.exit_code == 1
    assert unequal(report.certificate) == {"adapter.weights_hash", "verdict"}
    said = sentences(report.certificate)
    assert said[-1] == RESULTS["invalid"]
    assert sum("recorded" in line and "found" in line for line in said) == 2


def test_an_adapter_config_of_the_same_meaning_is_another_file(run, certified):
    config = json.loads((certified / files.CONFIG).read_text())
    (certified / files.CONFIG).write_text(json.dumps(config))
    report = run(adapter=certified, verify=True)
    assert unequal(report.certificate) == {"adapter.config_hash"}


@pytest.mark.parametrize(
    ("row", "items"),
    [
        ({"prompt": "What is 2 * 4 ?"}, {"probes_hash"}),
        (
            {"text": "Tom lost the black cup."},
            {"probes_hash", "logits_base_hash", "logits_adapted_hash"},
        ),
    ],
)
def test_another_prompt_or_text_is_another_check(run, certified, probes, tmp_path, row, items):
    more = tmp_path / "more.jsonl"
    more.write_text(probes.read_text() + json.dumps(row) + "\n")
    report = run(adapter=certified, verify=True, prompts=more)
    assert unequal(report.certificate) == items


@pytest.mark.parametrize("item", sorted({*certificate.ANYWHERE, *certificate.HERE}))
def test_every_item_can_make_it_invalid(found, item):
    outcome = certificate.compare(changed(found, item, "other"), found)
    assert outcome["status"] == "invalid" and unequal(outcome) == {item}


def test_elsewhere_only_files_and_the_verdict_are_compared(found):
    there = changed(found, "environment.versions.mlx", "0.99")
    there = changed(there, "environment.openblas", "OpenBLAS, 64 threads")
    there = changed(there, "logits_base_hash", "other")
    outcome = certificate.compare(there, found)
    assert outcome["status"] == "other_environment"
    assert not LOGITS & {row["item"] for row in outcome["compared"]}
    about = {d["item"]: (d["recorded"], d["found"]) for d in outcome["environment_differences"]}
    assert about.keys() == {"versions.mlx", "openblas"}
    assert about["versions.mlx"] == ("0.99", found["environment"]["versions"]["mlx"])
    assert sentences(outcome)[-1] == RESULTS["other_environment"]
    for item in ("verdict", "adapter.weights_hash"):
        assert certificate.compare(changed(there, item, "other"), found)["status"] == "invalid"


def test_environments_differ_by_what_only_one_of_them_has(found):
    more = json.loads(json.dumps(found))
    more["environment"]["new"] = 1
    for pair in ((found, more), (more, found)):
        assert certificate.compare(*pair)["status"] == "other_environment"


@pytest.mark.parametrize("std", ["1e-6", "0.3"])
def test_a_start_that_moves_the_model_is_refused_and_not_saved(run, tmp_path, std):
    report = run(init="gaussian", option=[f"std={std}"], certify=True, out=tmp_path / "new")
    assert report.certificate["status"] == "refused" and report.exit_code == 1
    assert "Nothing was saved" in report.certificate["sentence"]
    assert not (tmp_path / "new").exists()


def test_a_trained_adapter_is_refused_and_a_stale_certificate_set_aside(run, certified, found):
    """Its change is so small that every gate of `same` passes: that is not harmless to the bit."""
    loaded = models.load("demo")
    files.save(
        loaded.model,
        attach(loaded.model, init="gaussian", init_options={"std": 0.01}),
        certified,
    )
    stale = (certified / certificate.NAME).read_bytes()
    report = run(adapter=certified, certify=True)
    assert report.verdict == "pass" and report.exit_code == 1
    assert report.measured.logits_base_hash == found["logits_base_hash"]
    assert report.measured.logits_adapted_hash != found["logits_adapted_hash"]
    assert "to the bit" in report.certificate["sentence"]
    assert f"{certificate.NAME}.invalid" in report.certificate["sentence"]
    assert not (certified / certificate.NAME).exists()
    assert (certified / f"{certificate.NAME}.invalid").read_bytes() == stale


def test_only_a_pass_under_the_expectation_same_is_certified(run, certified):
    loaded = models.load("demo")
    report = run(adapter=certified, expect="same")
    assert certificate.refusal(report) is None
    for spoiled in (replace(report, expect="healthy"), replace(report, verdict="warn")):
        assert certificate.write(loaded, spoiled, certified)["status"] == "refused"
        assert not (certified / certificate.NAME).exists()


def test_the_base_is_quantized_again_as_it_was(run, tmp_path):
    report = run(certify=True, out=tmp_path / "a", bits=8)
    assert report.exit_code == 0
    assert run(adapter=tmp_path / "a", verify=True).certificate["status"] == "valid"
    report = run(adapter=tmp_path / "a", verify=True, bits=4)
    assert "base.quantization" in unequal(report.certificate)


def test_a_hub_snapshot_is_known_by_its_revision_and_other_weights_by_their_hash(tmp_path):
    loaded = models.load("demo")
    revision = "0123456789abcdef0123456789abcdef01234567"
    for place, known in (
        (f"snapshots/{revision}", True),
        (revision, False),
        ("snapshots/a", False),
    ):
        folder = shutil.copytree(loaded.folder, tmp_path / place)
        about = certificate.base(replace(loaded, folder=folder))
        assert about["revision"] == (revision if known else None)
        assert (about["weights_hash"] is None) == known
    whole = certificate.base(replace(loaded, folder=folder))["weights_hash"]
    content = (folder / "model.safetensors").read_bytes()
    assert whole == hashlib.blake2b(content, digest_size=16).hexdigest()
    for shard in "3702516948":  # in whatever order a folder lists them
        (folder / f"m{shard}.safetensors").write_text(shard)
    sharded = hashlib.blake2b(b"0123456789" + content, digest_size=16).hexdigest()
    assert certificate.base(replace(loaded, folder=folder))["weights_hash"] == sharded


def test_the_dtype_is_that_of_the_frozen_weights():
    model = tiny(bits=4, dtype=mx.bfloat16)
    attach(model)
    assert certificate.dtype_of(model) == "bfloat16"
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    assert certificate.dtype_of(model) == "bfloat16+float32"


def test_the_threads_of_the_blas_in_use_are_recorded():
    text = openblas(cpu.mode())
    if cpu.mode() not in ("openblas", "numpy"):
        pytest.skip("this CPU path does not multiply with OpenBLAS")
    threads = min(int(os.environ["OPENBLAS_NUM_THREADS"]), os.cpu_count() or 1)
    assert text and text.startswith("OpenBLAS ") and text.endswith(f", {threads} threads")
    assert openblas("plain") is None and openblas("gpu") is None


BAD_OPTIONS = [
    ({"certify": True, "verify": True}, "give one of them"),
    ({"certify": True, "out": Path("x"), "expect": "healthy"}, "not healthy"),
    ({"verify": True}, "--verify needs --adapter"),
    ({"certify": True}, "--certify needs --out"),
    ({"out": Path("x")}, "drop it here"),
    ({"certify": True, "adapter": Path("x"), "out": Path("y")}, "drop it here"),
    ({"certify": True, "out": Path(__file__).parent}, "not an empty folder"),
    ({"certify": True, "out": Path("x"), "against": "demo"}, "leave --against out"),
    ({"certify": True, "adapter": Path("x"), "against": "demo"}, "leave --against out"),
    ({"verify": True, "adapter": Path("x"), "against": "demo"}, "leave --against out"),
    ({"certify": True, "adapter": Path(__file__)}, "give the folder that holds both"),
    ({"certify": True, "adapter": Path(__file__).parent}, "give the folder that holds both"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_do_not_go_together_are_refused_before_loading(options, message):
    with pytest.raises(ConfigError, match=message):
        checked("no/such-model", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no harmless.json"),
        ("{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[]", "format 1 but of None"),
        ('{"format": 2}', "format 1 but of 2"),
        ('{"format": 1, "base": 3, "environment": {}}', "base.weights_hash, .*verdict"),
    ],
)
def test_a_certificate_that_is_none_is_bad_input(certified, text, message):
    path = certified / certificate.NAME
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterError, match=message):
        checked("no/such-model", adapter=certified, verify=True)


def test_a_folder_that_cannot_be_written_is_said_so(run, certified, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificate, "atomically", full)
    with pytest.raises(RunError, match="No space left"):
        run(adapter=certified, certify=True)


def test_the_keys_are_documented(found):
    assert emitted(found) == documented(certificate.NAME)
    rows = documented("check --certify --json") | documented("check --verify --json")
    here = changed(found, "base.quantization", None)  # a mapping, which would be taken apart
    there = changed(here, "environment.python", "2.7")
    outcomes = [certificate.compare(there, here), certificate.refused("why", "")]
    assert set().union(*map(emitted, outcomes)) == rows


def test_the_command_certifies_verifies_and_says_what_changed(run_cli, tmp_path, probes):
    def command(*options: object) -> tuple[int, dict]:
        done = run_cli("check", "demo", "--prompts", probes, "--json", *options)
        return done.returncode, json.loads(done.stdout)

    folder = tmp_path / "fresh"
    code, document = command("--certify", "--out", folder)
    assert code == 0 and document["certificate"]["file"] == str(folder / certificate.NAME)
    code, document = command("--adapter", folder, "--verify")
    assert code == 0 and document["certificate"]["status"] == "valid", document["certificate"]
    weights = folder / files.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, document = command("--adapter", folder, "--verify")
    assert code == 1 and document["certificate"]["status"] == "invalid"
    (folder / certificate.NAME).unlink()
    code, document = command("--adapter", folder, "--verify")
    assert code == 2 and document["error"]["type"] == "AdapterError"
