"""Rows of SFT: what mlx-lm's readers make of them, and a named place for all that is wrong."""

import json
import sys
import types
from typing import Any

import pytest
from mlx_lm.tuner.datasets import create_dataset

from mlx_lora import config, data, lessons, models, plan
from mlx_lora.errors import ConfigError
from mlx_lora.formats import Features, lesson_of
from mlx_lora.lessons import lessons_of
from mlx_lora.progress import console
from mlx_lora.schema import Stage
from mlx_lora.show import print_plan
from mlx_lora.sources import fetched, read_file, sources_of
from tests.tiny import tiny_loaded

DEMO = models.load("demo")
TURNS = [
    {"role": "user", "content": "How many legs has a duck?"},
    {"role": "assistant", "content": "Two."},
]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "A duck has two legs."},
    "completions": {"prompt": "How many legs has a duck?", "completion": "Two."},
    "chat": {"messages": [*TURNS, {"role": "user", "content": "Sure?"}, TURNS[1]]},
    "ends with the user": {"messages": [*TURNS, {"role": "user", "content": "Sure?"}]},
    "one message": {"messages": TURNS[:1]},
    "tools": {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "count"}}]},
}


def stage(tmp_path, lines: list[str] | str, **keys) -> Stage:
    text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    return Stage(**{"data": str(tmp_path), "batch_size": 1} | keys)  # type: ignore[arg-type]


def refusal(work, *given) -> str:
    with pytest.raises(ConfigError) as caught:
        work(*given)
    return f"{caught.value}\n{caught.value.hint}"


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_tokens_that_mlx_lm_makes_of_it(name, mask_prompt):
    row, features = ROWS[name], Features()
    form = features.form_of(row)
    if form == "text" and mask_prompt:
        pytest.skip("refused, see below")
    if name == "one message" and mask_prompt:
        lesson = lesson_of(row, "chat", features, DEMO.tokenizer, mask_prompt=True)
        assert lesson.text.start == 1, "nothing comes before it"
        return
    config = types.SimpleNamespace(mask_prompt=mask_prompt)
    ids, offset = (data := create_dataset([row], DEMO.tokenizer, config)).process(data[0])
    lesson = lesson_of(row, form, features, DEMO.tokenizer, mask_prompt=mask_prompt)
    assert list(lesson.text.ids) == ids and lesson.text.start == max(1, offset)
    assert lesson.straight


def test_tools_reach_the_template(monkeypatch):
    class Tokenizer:
        chat_template = "given"

        def apply_chat_template(self, messages, tools=None, **_):
            return [7] * (len(messages) + (10 if tools else 0))

    pair = {**ROWS["completions"], "tools": ROWS["tools"]["tools"]}
    for form, row in (("chat", ROWS["tools"]), ("completions", pair)):
        lesson = lesson_of(row, form, Features(), Tokenizer(), mask_prompt=True)
        assert len(lesson.text.ids) == 12 and lesson.text.start == 11


def test_a_template_that_rewrites_the_prompt_is_said(tmp_path, monkeypatch):
    real = type(DEMO.tokenizer).apply_chat_template

    def rewriting(self, messages, **options):
        return [3, *real(self, messages, **options)][len(messages) == 1 :]

    monkeypatch.setattr(type(DEMO.tokenizer), "apply_chat_template", rewriting)
    e = stage(tmp_path, [json.dumps(ROWS["completions"])] * 2, mask_prompt=True)
    (note,) = lessons_of(DEMO, sources_of(e)["train"], e).notes
    assert "in 2 of 2 rows" in note and "the mask counts tokens" in note


def test_other_features_are_read(tmp_path):
    rows = [json.dumps({"q": "a?", "a": "b."}), json.dumps({"q": "c?", "a": "d."})]
    e = stage(tmp_path, rows, prompt_feature="q", completion_feature="a")
    assert len(lessons_of(DEMO, sources_of(e)["train"], e).texts) == 2
    assert "it has q, a" in refusal(sources_of, stage(tmp_path, rows))


def test_every_bad_line_is_named_at_once(tmp_path):
    path = tmp_path / "train.jsonl"
    e = stage(tmp_path, ['{"text": "a"}', "", '{"text": ', "[1]"])
    said = refusal(sources_of, e)
    assert f"{path}:3: not JSON" in said and f"{path}:4: a row is an object" in said
    e = stage(
        tmp_path,
        [json.dumps(row) for row in (
            ROWS["text"], ROWS["chat"], {"text": 3}, {"text": ""}, {"note": "x"}
        )],
    )  # fmt: skip
    said = refusal(sources_of, e)
    assert f"{path}:2: is chat, while the first row is text" in said
    assert f'{path}:3: "text" should be a string, not int' in said
    assert f'{path}:4: "text" is empty' in said and f"{path}:5: is neither (note)" in said
    assert ":1:" not in said


@pytest.mark.parametrize("reader", [data.rows_of, lambda path: read_file(path, Features()).rows])
def test_a_file_with_a_mark_and_with_line_separators_inside_of_texts_is_read(reader, tmp_path):
    """As PowerShell writes it: a byte order mark, CRLF; U+2028 is a sign like any other."""
    rows = [{"text": "one\u2028line"}, {"text": "two\x85 lines"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "train.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [row for _, row in reader(tmp_path / "train.jsonl")] == rows


def test_messages_are_looked_at(tmp_path):
    bad = ["Hello", [], [{"content": "x"}], [{"role": "user"}]]
    said = refusal(sources_of, stage(tmp_path, [json.dumps({"messages": m}) for m in bad]))
    assert all(f"train.jsonl:{n}: " in said for n in (1, 2, 3, 4))
    fine = [{"role": "assistant", "tool_calls": []}]
    sources_of(stage(tmp_path, [json.dumps({"messages": fine})]))


def test_empty_files_and_missing_splits_are_refused(tmp_path):
    e = stage(tmp_path, ['{"text": "a"}'], test=True)
    assert "holds no test.jsonl" in refusal(sources_of, e)
    (tmp_path / "valid.jsonl").write_text("\n")
    assert "valid.jsonl is empty" in refusal(sources_of, stage(tmp_path, ['{"text": "a"}']))
    (tmp_path / "train.jsonl").unlink()
    assert "holds no train.jsonl" in refusal(sources_of, e)
    assert "no file or folder nowhere" in refusal(sources_of, Stage(data="nowhere"))
    said = refusal(sources_of, stage(tmp_path, ['{"text": "a"}'], mask_prompt=True))
    assert "train.jsonl:1: mask_prompt needs a prompt" in said


def test_long_rows_are_counted_cut_and_said(tmp_path):
    rows = [{"text": "a duck " * n} for n in (1, 400, 500)]
    e = stage(tmp_path, [json.dumps(row) for row in rows])
    made = lessons_of(DEMO, sources_of(e)["train"], e)
    assert max(len(t.ids) for t in made.texts) == 512, "the context of the embedded model"
    (note,) = made.notes
    assert note.startswith("2 of 3 rows") and "512 tokens (the model's context)" in note
    e = stage(tmp_path, [json.dumps(row) for row in rows], max_seq_length=9)
    assert "9 tokens (max_seq_length)" in lessons_of(DEMO, sources_of(e)["train"], e).notes[0]


def test_a_plan_counts_the_rows_that_would_be_cut(tmp_path, capsys):
    rows = [ROWS["text"], {"text": "A duck has two legs. " * 200}]
    e = stage(tmp_path, [json.dumps(row) for row in rows])
    about = f"model: demo\ndata: {e.data}\niters: 1\nbatch_size: 1\n"
    found = plan.plan(config.from_text(about), console(quiet=True))
    assert "1 of 2 rows" in found["notes"][0] and "were cut" in found["notes"][0]
    print_plan(found | {"memory_advice": []})
    said = capsys.readouterr().out
    assert "were cut" in said and "memory advice" not in said


def test_rows_without_a_token_to_learn_are_counted(tmp_path):
    rows = [ROWS["completions"], {"prompt": "a duck " * 20, "completion": "Two."}]
    e = stage(tmp_path, [json.dumps(row) for row in rows], max_seq_length=14, mask_prompt=True)
    made = lessons_of(DEMO, sources_of(e)["train"], e)
    assert made.notes[1].startswith("1 of 2 rows") and "no token to learn" in made.notes[1]
    assert len(made.texts) == 2, "batches are those of mlx-lm"
    e = e.model_copy(update={"max_seq_length": 3})
    assert "no row has a token" in refusal(lambda: lessons_of(DEMO, sources_of(e)["train"], e))


def test_chats_need_a_template(tmp_path):
    e = stage(tmp_path, [json.dumps(ROWS["chat"])])
    said = refusal(lambda: lessons_of(tiny_loaded(), sources_of(e)["train"], e))
    assert "train.jsonl:1" in said and "no chat template" in said
    e = stage(tmp_path, [json.dumps(ROWS["completions"])], mask_prompt=True)
    (text,) = lessons_of(tiny_loaded(), sources_of(e)["train"], e).texts
    assert text.start == len(ROWS["completions"]["prompt"]) and text.ids[-1] == 1


def test_what_will_not_happen_to_rows_is_said(tmp_path):
    e = Stage(batch_size=4)
    notes = list(lessons.left_out({"train": [None] * 10}, e))  # type: ignore[list-item]
    assert notes[0].startswith("2 of 10 rows never train") and "no valid.jsonl" in notes[1]
    made: Any = {"train": [None] * 8, "valid": [None]}
    assert not list(lessons.left_out(made, e))
    none = e.model_copy(update={"val_batches": 0})
    assert list(lessons.left_out(made, none)) == ["there is no validation: val_batches is 0"]
    assert "batch_size 4 is more than the 3 rows" in refusal(lessons.refuse_few, [None] * 3, e)


def fake_hub(monkeypatch, load) -> None:
    fetched.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_hub_that_is_not_there_says_what_to_do(monkeypatch):
    fetched.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refusal(sources_of, Stage(data="mlx-community/WikiSQL"))
    assert "need the package `datasets`" in said and "mlx-lora[hub]" in said

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'mlx-community/WikiSQL' on the Hub\nmore")

    fake_hub(monkeypatch, unreachable)
    said = refusal(sources_of, Stage(data="mlx-community/WikiSQL"))
    assert "ConnectionError: Couldn't reach" in said and "more" not in said
    assert "hf download --repo-type dataset mlx-community/WikiSQL" in said


def test_hub_datasets_are_read_as_mlx_lm_reads_them(monkeypatch):
    asked = []

    def load(path, split=None, **config):
        asked.append((path, split, config))
        row = {"question": "a?", "response": "b."} if path == "one/set" else ROWS["chat"]
        return [row] * 3 if split else {"train": [ROWS["text"]], "validation": [ROWS["text"]]}

    fake_hub(monkeypatch, load)
    found = sources_of(Stage(data="some/set"))
    assert {k: [s.name for s in v] for k, v in found.items()} == {
        "train": ["some/set[train]"], "valid": ["some/set[validation]"],
    }  # fmt: skip
    blocks: Any = [
        {"path": "one/set", "prompt_feature": "question", "completion_feature": "response",
         "train_split": "train[:9]", "config": {"name": "x"}},
        {"path": "two/set", "test_split": "test"},
    ]  # fmt: skip
    found = sources_of(Stage(hf_dataset=blocks))
    assert asked[1:] == [
        ("one/set", "train[:9]", {"name": "x"}), ("one/set", "train[-10%:]", {"name": "x"}),
        ("two/set", "train[:80%]", {}), ("two/set", "train[-10%:]", {}),
    ]  # fmt: skip
    texts = lessons_of(DEMO, found["train"], Stage(hf_dataset=blocks)).texts
    assert len(texts) == 6 and "test" not in found
    assert len(texts[0].ids) > len(texts[5].ids), "fewer keys come first, as in mlx-lm"
    fetched.cache_clear()


def test_bytes_that_are_no_text_are_named_by_line_beside_all_else(tmp_path):
    e = stage(tmp_path, ['{"text": "a"}', "{", '{"text": 3}'])
    (tmp_path / "valid.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    said = refusal(sources_of, e)
    assert "train.jsonl:2: not JSON" in said and 'train.jsonl:3: "text" should be' in said
    assert "valid.jsonl:2: not UTF-8" in said
    assert "cannot read" in refusal(read_file, tmp_path / "nowhere.jsonl", Features())
