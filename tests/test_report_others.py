"""The page of what other commands wrote: it says what a folder is, and what was proven of it."""

import json

import pytest
from report_pages import BESIDE, CHECK, SHIPPED, Seen, adapter, save
from typer.testing import CliRunner

from mlx_lora.cli import app
from mlx_lora.errors import RunError
from mlx_lora.report import page
from mlx_lora.report.folder import KINDS

SAID = {  # document -> what its page says
    "merge.json": ("ties", "one times 0.5, two times 1.5", "87.5%", "0.25", "50.0%", "12.5%",
                   "Note: stranger.", "Nothing was run to see"),
    "fuse.json": ("Forced: half of it is lost.", "95.5%", "0.562 times the update", "70%", "100%",
                  "0.0625 nats a token", "as the base is"),
    "fuse_plan.json": ("4 bits", "75.0%", "as planned", "2.5 MB", "5", "at least 95.0%"),
    "repair.json": ("5 before, 1 after, in 35 modules", "3.5 before, 2.75 after, 2.5 of the base",
                    "0.5 nats a token before, 0.375 after", "17.5%"),
    "advice.json": ("After training. The adapter uses half of it.", "lora_parameters: {rank: 2}",
                    "Nine of ten modules need 3 directions or fewer; the rank is 8.", "75.0%",
                    "1 modules do next to nothing, model.layers.1.self_attn.v_proj for one."),
    "compare.json": ("50.0% (6.2%)", "0.25", "trained on other weights",
                     "1 modules are left out: not all adapters have them."),
}  # fmt: skip


def text(folder) -> str:
    return " ".join(Seen(page.render(page.of(folder))).text)


@pytest.mark.parametrize("name", SAID)
def test_a_folder_is_what_its_document_says(tmp_path, name):
    (tmp_path / name).write_text(json.dumps((SHIPPED | BESIDE)[name]))
    found = page.of(tmp_path)
    assert found.folder.kind == KINDS[name] and len(found.parts) == 1
    assert not found.answers and not found.missing, "of a run, or an adapter, nothing is expected"
    written = text(tmp_path)
    assert [words for words in SAID[name] if words not in written] == []
    assert "In short" not in written


@pytest.mark.parametrize(
    ("name", "sides", "kl"),
    [
        ("fuse.json", "Fused against the adapter on its base", "KL to the adapter on its base"),
        ("repair.json", "Repaired against as it was", "KL to the adapter as it was"),
    ],
)
def test_a_check_says_which_two_it_compares(tmp_path, name, sides, kl):
    save(tmp_path, {name: SHIPPED[name], "check.json": {**CHECK, "verdict": "warn"}})
    (tmp_path / "config.yaml").unlink()
    found = page.of(tmp_path).answers["check"]
    assert (found.sentence, found.tone) == (f"{sides}: warn", "warn")
    assert kl in text(tmp_path) and "(with the adapter)" not in text(tmp_path)


def test_an_exported_adapter_is_one_where_the_check_expected_no_difference(tmp_path):
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    (tmp_path / "check.json").write_text(json.dumps(CHECK))
    found = page.of(tmp_path)
    assert found.folder.kind == "exported adapter" and list(found.parts) == ["shipped", "check"]
    assert found.answers["check"].sentence == "As written against as trained: pass"
    assert "GGUF" in text(tmp_path) and "KL to the adapter as trained" in text(tmp_path)
    (tmp_path / "check.json").write_text(json.dumps({**CHECK, "expect": "healthy"}))
    assert page.of(tmp_path).folder.kind == "check"


def test_a_merged_adapter_is_measured_like_any(tmp_path):
    adapter(tmp_path)
    (tmp_path / "merge.json").write_text(json.dumps(SHIPPED["merge.json"]))
    found = page.of(tmp_path)
    assert next(iter(found.parts)) == "shipped" and "ranks" in found.parts
    assert found.answers["rank"].verdict == "trained" and "harmless" not in found.answers


def test_what_a_stage_learned_from_is_told_with_its_name(tmp_path):
    counts = {**BESIDE["rejection_sampling.json"], "correct": 40}
    files = {"1_sft": BESIDE["rejection_sampling.json"], "2_sft": counts}
    named = {f"stages/{name}/rejection_sampling.json": found for name, found in files.items()}
    save(tmp_path, {"status.json": {"state": "finished"}, **named})
    written = text(tmp_path)
    assert "47.0% of what it wrote was correct." in written
    assert written.index("2_sft") < written.index("2.0% of what it wrote was correct. That is")
    assert written.count("That is little") == 1


def test_weights_name_their_outliers(tmp_path):
    save(tmp_path, {"metrics.jsonl": [{"step": 0}], "weights.json": BESIDE["weights.json"]})
    told = "Outliers in model.layers.0.self_attn.v_proj (84.5 times its size): framed below."
    assert told in text(tmp_path)
    quiet = BESIDE["weights.json"] | {"outlying": []}
    save(tmp_path, {"weights.json": quiet})
    assert "No matrix has outliers: its largest weight is at most 84.5" in text(tmp_path)


def test_a_model_without_a_word_beside_it_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="is a model"):
        page.of(tmp_path)


def test_the_command_says_what_a_folder_is(tmp_path):
    (tmp_path / "merge.json").write_text(json.dumps(SHIPPED["merge.json"]))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0 and done.stdout.startswith(f"{tmp_path}: merged adapter.")
