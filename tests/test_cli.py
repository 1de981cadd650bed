"""The command line's contract, through the real command: exit codes, one JSON, clear errors."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mlx_lora import models
from mlx_lora.cli import main
from mlx_lora.errors import ModelError

SMALL = """
model: demo
method: grpo
quantize: {bits: 4, group_size: 64}
task: countdown
iters: 3
batch_size: 4
learning_rate: 1e-3
grpo: {group_size: 4}
rollout: {max_tokens: 12}
eval: {n: 32}
monitor: {every: 1}
"""


@pytest.fixture(scope="module")
def finished(run_cli, tmp_path_factory):
    """A run folder made by the real command, and its JSON."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(SMALL)
    done = run_cli("train", folder / "small.yaml", "--run-dir", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout)


def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "check.json", "metrics.jsonl", "samples.jsonl", "base",
        "adapters", "spectrum.json", "time_breakdown.json", "time_breakdown.png", "status.json",
        "report.html",
    }  # fmt: skip
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert summary["check"]["verdict"] == "pass" and summary["run_dir"] == str(folder)
    for when in ("before", "after"):
        low, value, high = (summary[f"accuracy_{when}{x}"] for x in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1
    rows = json.loads((folder / "time_breakdown.json").read_text())
    assert rows["rows"] and any(r["name"] == "unaccounted" for r in rows["rows"])


def test_stock_mlx_lm_loads_base_and_adapter_with_our_logits(finished):
    """Run in a process without our fast path: the plain products of stock mlx-lm."""
    folder, _ = finished
    code = f"""
import mlx.core as mx, numpy as np
from mlx_lm import load
model, tokenizer = load({str(folder / "base")!r}, adapter_path={str(folder / "adapters")!r})
np.save({str(folder / "stock.npy")!r}, np.array(model(mx.array([[1, 50, 60, 70, 2]]))))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    import mlx.core as mx
    import numpy as np

    from mlx_lora.adapter import files

    for name in ("demo", str(folder / "base")):
        loaded = models.load(name)
        files.load(loaded.model, folder / "adapters")
        ours = np.array(models.logits(loaded.model, mx.array([[1, 50, 60, 70, 2]])))
        assert np.abs(ours - np.load(folder / "stock.npy")).max() < 1e-4


def test_eval_and_spectrum_and_check_read_the_run(finished, run_cli):
    folder, summary = finished
    given = ("--adapter", folder / "adapters", "--expect", "changed")
    done = run_cli("check", "demo", *given, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["bitwise_identical"] is False
    done = run_cli(
        "eval", "demo", "--task", "countdown", "--adapter", folder / "adapters",
        "-n", 32, "--max-tokens", 12, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["task"] == "countdown" and result["n"] == 32
    assert result["accuracy"] == summary["accuracy_after"]
    done = run_cli("spectrum", folder, "--model", "demo", "--json")
    document = json.loads(done.stdout)
    assert document.keys() >= {"adapters", "structural", "dynamics", "alerts", "suggested_rank"}


def test_check_demo_passes_and_gaussian_fails(run_cli):
    done = run_cli("check", "demo", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["verdict"] == "pass"
    done = run_cli("check", "demo", "--init", "gaussian", "-o", "std=0.3", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["verdict"] == "fail"


def test_check_takes_an_experiment_file(run_cli, tmp_path):
    path = tmp_path / "bad_start.yaml"
    path.write_text(SMALL + "init: {name: gaussian, std: 0.3}\n")
    assert run_cli("check", path).returncode == 1


def test_a_failing_check_stops_the_run_before_the_first_step(run_cli, tmp_path):
    path = tmp_path / "bad_start.yaml"
    path.write_text(SMALL + "init: {name: gaussian, std: 0.3}\n")
    done = run_cli("train", path, "--run-dir", tmp_path / "run", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["check"]["verdict"] == "fail"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def bad_inputs(tmp):
    """(arguments, words that the message must hold)."""
    folder = tmp / "truncated"
    shutil.copytree(models.DEMO_FOLDER, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    empty = tmp / "empty"
    empty.mkdir()
    used = tmp / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    locked = tmp / "file"
    locked.write_text("a file, not a folder")

    def config(name, text):
        (tmp / name).write_text(text)
        return tmp / name

    good = config("good.yaml", SMALL)
    typo = config("typo.yaml", SMALL + "learning_rte: 3\n")
    return {
        "yaml typo": (["train", typo], ["learning_rte", "learning_rate", "typo.yaml:13"]),
        "unknown task": (["eval", "demo", "--task", "countdwn"], ["countdwn", "countdown"]),
        "unknown task in yaml": (
            ["train", config("t.yaml", SMALL.replace("task: countdown", "task: countdwn"))],
            ["countdwn", "countdown"],
        ),
        "unknown init": (["check", "demo", "--init", "gausian"], ["gausian", "gaussian"]),
        "unknown init option": (
            ["check", "demo", "--init", "gaussian", "-o", "sdt=1"],
            ["sdt", "std"],
        ),
        "bad init value": (["check", "demo", "--init", "gaussian", "-o", "std=x"], ["std", "x"]),
        "unknown key": (["check", "demo", "--keys", "q_prj"], ["q_prj", "q_proj"]),
        "missing model": (["check", tmp / "nowhere"], ["nowhere"]),
        "no model folder": (["check", empty], ["config.json"]),
        "truncated weights": (["check", folder], ["truncated", "does not load"]),
        "missing adapter": (["check", "demo", "--adapter", empty], ["adapter_config.json"]),
        "existing run folder": (["train", good, "--run-dir", used], ["used", "exists"]),
        "not writable": (["train", good, "--run-dir", locked / "run"], ["file"]),
        "missing config": (["train", tmp / "no.yaml"], ["no.yaml"]),
        "ignored key": (
            ["train", config("i.yaml", SMALL + "test: true\n")],
            ["does not act on test"],
        ),
        "flags beside a config": (["check", good, "--init", "gaussian"], ["--init"]),
        "prompt rows": (
            ["check", "demo", "--prompts", config("p.jsonl", '{"completion": "x"}\n')],
            ["p.jsonl:1"],
        ),
        "test only": (["train", config("n.yaml", SMALL + "train: false\n")], ["train"]),
        "rank 0": (["check", "demo", "--rank", "0"], ["rank", "0"]),
        "no scale": (["check", "demo", "--scale", "nan"], ["scale", "nan"]),
        "no tokens": (
            ["eval", "demo", "--task", "countdown", "--max-tokens", "0"],
            ["max-tokens"],
        ),
        "unknown list": (["ls", "init"], ["init", "inits"]),
    }


def test_bad_input_is_one_readable_message_and_exit_code_2(run_cli, run_here, tmp_path):
    """Some in a process of their own, each kind of command once; the others here."""
    apart = {"yaml typo", "truncated weights", "no tokens", "unknown list"}
    for name, (arguments, words) in bad_inputs(tmp_path).items():
        done = (run_cli if name in apart else run_here)(*arguments)
        assert done.returncode == 2, (name, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, (name, done.stderr)
        assert all(w in done.stderr for w in words), (name, done.stderr)
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_errors_are_json_with_json(run_cli):
    done = run_cli("check", "demo", "--init", "gausian", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UnknownNameError" and "gaussian" in error["hint"]


@pytest.mark.parametrize(
    "words",
    [["spectrum", "--nope"], ["spectrum"], ["nothing"], ["advise", "x", "--batches", "1"]],
)
def test_usage_errors_are_json_with_json(run_here, words):
    done = run_here(*words, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["type"]) == (2, "UsageError") and error["message"]
    assert error["hint"].endswith(" --help`.") and not done.stderr
    done = run_here(*words)
    assert done.returncode == 2 and not done.stdout and error["message"] in done.stderr


def test_what_nobody_foresaw_is_json_with_json(run_here, monkeypatch):
    def burst(*_):
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("mlx_lora.listing.listing", burst)
    done = run_here("ls", "--json")
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "the roof fell in")
    assert done.returncode == 1 and "in burst" in done.stderr
    done = run_here("ls")
    assert done.returncode == 1 and not done.stdout and "in burst" in done.stderr


def test_ctrl_c_leaves_a_loadable_adapter_and_says_so(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(SMALL.replace("iters: 3", "iters: 5000"))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mlx_lora", "train", str(path), "--run-dir", str(run)]

    def heed_ctrl_c():  # a suite started in the background inherits "ignore"
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        give_up = time.time() + 120
        while not (run / "metrics.jsonl").exists() and time.time() < give_up:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    from mlx_lora.adapter import files

    files.load(models.load("demo").model, run / "adapters")


@pytest.mark.parametrize(
    "words",
    [
        ["check", "demo"],
        ["eval", "demo", "--task", "countdown"],
        ["eval", "sft.yaml", "-o", "task=countdown"],
        ["spectrum", "ADAPTER", "--model", "demo"],
        ["spectrum", "ADAPTER", "--compare", "ADAPTER", "--model", "demo"],
        ["shrink", "ADAPTER", "--out", "small", "--model", "demo"],
        ["repair", "ADAPTER", "--out", "sound", "--model", "demo"],
        ["generate", "demo", "-p", "x"],
    ],
)
def test_a_models_own_code_runs_only_where_it_is_trusted(words, run_here, tmp_path, monkeypatch):
    """Every command that loads a model, up to the loading."""
    import mlx.core as mx

    about = {"lora_parameters": {"rank": 2, "scale": 1.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    factors = {"q.lora_a": mx.ones((4, 2)), "q.lora_b": mx.ones((2, 4))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), factors)
    (tmp_path / "sft.yaml").write_text("model: demo\nmethod: sft\ndata: x\n")
    asked = []

    def load(name, *, trust_remote_code=False, **_):
        asked.append(trust_remote_code)
        raise ModelError("far enough")

    monkeypatch.setattr(models, "load", load)
    given = [w.replace("ADAPTER", str(tmp_path)).replace("sft", f"{tmp_path}/sft") for w in words]
    run_here(*given), run_here(*given, "--trust-remote-code")
    assert asked == [False, True]


def test_a_terminal_without_unicode_gets_escapes_and_no_crash(monkeypatch):
    """A check that passed ended with exit code 1, which is that of one that failed."""
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(sys, "argv", ["mlx-lora", "ls", "inits"])
    with pytest.raises(SystemExit) as end:
        main()
    ascii_only.seek(0)
    assert not end.value.code and "U(\\xb1" in ascii_only.read()


def test_version_help_and_listings(run_cli):
    assert run_cli("--version").stdout.startswith("mlx-lora 0.")
    helped = run_cli("--help").stdout
    assert "spectrum" in helped and "..." not in helped.partition("Commands:")[2], "cut off"
    listed = json.loads(run_cli("ls", "--json").stdout)
    assert {e["name"]: e["note"] for e in listed["inits"]}["zero"] == "harmless"
    assert all(listed[k] for k in ("tasks", "losses", "metrics", "alerts", "schedules", "gates"))
    assert "countdown" in run_cli("ls", "tasks").stdout


def test_doctor_finds_this_machine_sound(run_cli):
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["sound"] is True


@pytest.mark.parametrize(("ok", "said"), [(True, "is sound"), (False, "1 of 1 tests failed")])
def test_doctor_ends_with_its_verdict_and_names_versions_in_words(capsys, ok, said):
    from mlx_lora.show import print_doctor

    test = {"name": "softmax", "ok": ok, "detail": "off by 1e-6", "action": ""}
    versions = {"versions": {"mlx": "0.32.4", "numpy": "2.4.6"}}
    print_doctor({"environment": versions, "tests": [test], "advice": []})
    seen = capsys.readouterr().out
    assert "mlx 0.32.4, numpy 2.4.6" in seen and said in seen.splitlines()[-1]
