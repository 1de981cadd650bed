"""What docs/tasks.md shows works: its files, its experiment, its command line."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mlx_lora import config, experiment
from mlx_lora.progress import console
from mlx_lora.registry import options
from mlx_lora.rewards.score import score
from mlx_lora.tasks import dressed, jsonl, load_task, python

PAGE = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's blocks as files: Python by the name in their first line."""
    folder = tmp_path_factory.mktemp("page")
    for kind, text in re.findall(r"```(python|jsonl|yaml)\n(.*?)```", PAGE, re.DOTALL):
        named = re.match(r"# (\w+\.py)\n", text)
        name = named[1] if named else {"jsonl": "rows.jsonl", "yaml": "shout.yaml"}[kind]
        (folder / name).write_text(text)
    return folder


def test_the_experiment_runs_from_any_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    summary = experiment.run(config.load(folder / "shout.yaml"), run, console(quiet=True))
    assert summary["accuracy_after"] is not None
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["reward"] > 0 for step in steps)
    again = config.load(run / "config.yaml")
    config.check_names(again)
    assert again.task and again.task.options["path"] == f"{folder}/rewards.py:shout"


def test_what_is_held_out_is_said_before_a_run(folder):
    heard = Console(file=io.StringIO(), width=500)
    experiment.validated(config.load(folder / "shout.yaml"), heard)
    said = heard.file.getvalue()
    assert "1 of the 6 problems" in said and "are held out to test." in said


def test_a_build_is_a_task_with_options(folder):
    task = load_task("python", {"path": f"{folder}/sums.py:build", "options": {"high": 6}})
    problems = task.load("train", 20, 1)
    assert all(score(task, p, p.gold).reason == "correct" for p in problems)
    assert score(task, task.first, task.wrong).value == score(task, task.first, "").value == 0
    assert not {p.prompt for p in problems} & {p.prompt for p in task.load("test", 20, 1)}


def test_the_command_line_works(folder, run_cli):
    (command,) = re.findall(r"    mlx-lora (eval .*)", PAGE)
    done = run_cli(*command.split(), "--max-tokens", 8, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(x) for x in (folder / "read_me.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout)
    assert len(kept) == 2 * result["n"] and result["accuracy"] is None
    greedy = [row["reward"] for row in kept if row["temperature"] == 0]
    assert result["reward_mean"] == pytest.approx(sum(greedy) / len(greedy))


def test_every_option_is_on_the_page():
    known = {*options(jsonl.build), *options(python.build), *options(dressed)}
    assert {name for name in known if f"`{name}`" not in PAGE and f"{name}:" not in PAGE} == set()
