"""`mlx-lora eval` on all kinds of task, from a model or an experiment file, and what it refuses."""

import json
from pathlib import Path

import pytest

from mlx_lora import exam, models
from mlx_lora.data import encode, rows_of
from mlx_lora.errors import ConfigError, ModelError, RunError, TaskError, UserError
from mlx_lora.exam import evaluate_named, request
from mlx_lora.progress import console
from mlx_lora.types import Sample
from tests.tiny import tiny_loaded

YAML = """
model: demo
task: {name: jsonl, path: rows.jsonl, answer: exact, rewards: [{name: task}, {name: format}]}
rollout: {max_tokens: 9}
eval: {n: 5}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "e.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def graded(asked, samples=1, out=None):
    return evaluate_named(asked, None, samples, out, 0, console(quiet=True))


def test_an_experiment_file_says_all_and_options_change_it(folder):
    asked = request("e.yaml", None, [], n=None, max_tokens=None)
    assert (asked.n, asked.max_tokens, asked.stage.model) == (5, 9, "demo")
    changed = request("e.yaml", None, ["task.answer=number", "eval.n=3"], n=None, max_tokens=4)
    assert (changed.n, changed.max_tokens) == (3, 4)
    assert changed.stage.task and changed.stage.task.options["answer"] == "number"


def test_every_completion_is_kept(folder):
    asked = request("e.yaml", None, [], n=3, max_tokens=6)
    out = folder / "out.jsonl"
    found = graded(asked, samples=2, out=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["n"] == 3 and len(rows) == 3 * (1 + 2)
    assert [r["problem"] for r in rows] == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert set(rows[0]["parts"]) == {"task", "format"}
    assert sorted(p.name for p in folder.iterdir()) == ["e.yaml", "out.jsonl", "rows.jsonl"]
    assert set(found["pass_at"]) == {"1", "2"}
    with pytest.raises(RunError, match="exists already"):
        graded(asked, out=out)
    with pytest.raises(RunError, match="no folder"):
        graded(asked, out=folder / "nowhere" / "out.jsonl")


def test_the_keys_of_a_kept_completion_are_documented(folder):
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## `eval --out`")[2].partition("\n## ")[0]
    out = folder / "out.jsonl"
    graded(request("e.yaml", None, [], n=1, max_tokens=2), out=out)
    row = json.loads(out.read_text().splitlines()[0])
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert row.keys() == documented


def test_a_system_prompt_reaches_the_model(folder):
    plain = request("demo", "jsonl", ["path=rows.jsonl"], n=2, max_tokens=3)
    told = request("demo", "jsonl", ["path=rows.jsonl", "system=Be brief."], n=2, max_tokens=3)
    seen = []

    def lengths(asked):
        out = folder / f"{len(seen)}.jsonl"
        seen.append(graded(asked, out=out))
        return [json.loads(x)["prompt"] for x in out.read_text().splitlines()]

    assert all(text.startswith("system: Be brief.\nuser: Say") for text in lengths(told))
    assert all(text.startswith("Say") for text in lengths(plain))


def test_a_tokenizer_without_a_template_is_an_error_before_sampling(folder, monkeypatch):
    monkeypatch.setattr(exam, "load", lambda stage, adapter: tiny_loaded())
    with pytest.raises(ModelError, match="no chat template"):
        graded(request("x", "jsonl", ["path=rows.jsonl", "system=s"], n=2, max_tokens=3))
    with pytest.raises(TaskError, match=r"rows\.jsonl:\d+: the prompt's \d+ tokens and 250"):
        graded(request("x", "jsonl", ["path=rows.jsonl"], n=2, max_tokens=250))


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("demo", None, "--task"),
        ("e.yaml", "countdown", "comes from it"),
        ("bare.yaml", None, "names no task"),
    ],
)
def test_where_the_task_comes_from_is_clear(folder, name, task, words):
    (folder / "bare.yaml").write_text("model: demo\n")
    with pytest.raises(ConfigError, match=words):
        request(name, task, [], n=None, max_tokens=None)


def test_bad_input_is_found_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(exam, "load", lambda stage, adapter: pytest.fail("loaded a model"))
    for task, option in (("jsonl", []), ("jsonl", ["path=no.jsonl"]), ("cuontdown", [])):
        with pytest.raises(UserError):
            graded(request("demo", task, option, n=1, max_tokens=1))


def test_conversations_can_be_learnt_from_as_they_were_sampled(tmp_path):
    turns = (("user", "Hello."), ("assistant", "Hi."), ("user", "How many legs has a duck?"))
    sample = Sample(turns, {}, "")
    path = tmp_path / "kept.jsonl"
    path.write_text(json.dumps({"prompt": sample.prompt, "completion": "Two."}) + "\n")
    ((_, row),) = rows_of(path)
    tokenizer = models.load("demo").tokenizer
    text = encode(row, tokenizer)
    assert text and text.ids[: text.start] == models.encode_prompt(tokenizer, turns)
    path.write_text('{"prompt": [["user", 3]], "completion": "Two."}\n')
    with pytest.raises(ConfigError, match=r"kept\.jsonl:1"):
        rows_of(path)
