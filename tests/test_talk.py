"""generate and chat: the adapter's words at the strength in force, streamed as they are decoded."""

import json

import pytest
from typer.testing import CliRunner

from mlx_lora import exam, models
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.cli import app
from mlx_lora.errors import ConfigError
from mlx_lora.progress import console
from mlx_lora.ship import talk
from mlx_lora.ship.switch import Adapters
from mlx_lora.ship.talk import Chat, Manner, answers, opened, printable, spoken
from tests.test_ship import adapter

QUESTION = "How many legs has a duck?"


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    options = {"init": "gaussian", "init_options": {"std": 0.2}}
    return adapter(tmp_path_factory.mktemp("talk") / "loud", models.load("demo"), **options)


def test_the_command_writes_what_the_library_generates(loud):
    done = CliRunner().invoke(app, ["generate", "demo", "-p", QUESTION])
    assert done.exit_code == 0 and done.stdout == "A duck has two legs.\n"
    options = ["--adapter", str(loud), "--strength", "0", "--json"]
    done = CliRunner().invoke(app, ["generate", "demo", "-p", QUESTION, *options])
    told = json.loads(done.stdout)
    assert told["completions"][0]["text"] == "A duck has two legs." and told["adapter"] == "loud"
    done = CliRunner().invoke(app, ["generate", "demo", "-p", QUESTION, *options[:2], "--json"])
    assert json.loads(done.stdout)["completions"][0]["text"] != "A duck has two legs."


def test_a_base_that_is_quantized_for_an_adapter_is_said(tmp_path):
    """On stderr, or in the one document."""
    form = {"bits": 8, "group_size": 64, "mode": "affine"}
    folder = str(adapter(tmp_path / "a", models.load("demo", quantize=form)))
    command = ["generate", "demo", "-p", "A", "--max-tokens", "1", "--adapter", folder]
    done = CliRunner().invoke(app, command)
    said = "demo is unquantized, and was quantized on load to 8-bit affine (groups of 64)"
    assert done.exit_code == 0 and said in done.stderr and "quantized" not in done.stdout
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert len(told["notices"]) == 1 and told["notices"][0].startswith(said)


def test_several_greedy_completions_are_refused():
    with pytest.raises(ConfigError, match="alike"):
        answers(Adapters(models.load("demo")), [QUESTION], 2, Manner())
    with pytest.raises(ConfigError, match="finite"):
        opened("demo", [], float("inf"))


def test_strength_reaches_eval_and_check(loud, monkeypatch, tmp_path):
    def seen(loaded, *_, **__):
        return {"scales": {m.scale for m in lora_layers(loaded.model).values()}}

    monkeypatch.setattr(exam, "evaluate", seen)
    asked = exam.request("demo", "countdown", [], n=1, max_tokens=8)
    quiet = console(quiet=True)
    scales = [
        exam.evaluate_named(asked, loud, 1, None, 0, quiet, strength=strength)["scales"]
        for strength in (1.0, 0.5)
    ]
    assert [len(found) for found in scales] == [1, 1] and scales[1] == {scales[0].pop() / 2}
    texts = tmp_path / "texts.txt"
    texts.write_text("Ben went home.\n")
    options = ["check", "demo", "--adapter", str(loud), "--prompts", str(texts), "--json"]
    assert json.loads(CliRunner().invoke(app, options).stdout)["bitwise_identical"] is False
    options += ["--strength", "0"]
    assert json.loads(CliRunner().invoke(app, options).stdout)["bitwise_identical"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "demo", "-p", "x", "--adapter", "a", "--adapter", "b"], "one adapter, got 2"),
        (["generate", "demo", "-p", "x", "--strength", "0.5"], "no adapter that could"),
        (["check", "demo", "--strength", "0.5"], "no adapter that could"),
        (["check", "demo", "--adapter", "a", "--strength", "inf"], "finite"),
        (["check", "demo", "--adapter", "a", "--strength", "2", "--certify"], "certificate"),
        (["eval", "demo", "--task", "countdown", "--strength", "0"], "no adapter that could"),
    ],
)
def test_strengths_and_adapters_that_would_go_unused_are_refused(words, message, run_here):
    done = run_here(*words)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_words_are_the_generated_ones(temperature):
    loaded = models.load("demo")
    manner = Manner(max_tokens=24, temperature=temperature, seed=3)
    pieces = list(spoken(loaded, [("user", QUESTION)], manner, 0))
    (found,) = answers(Adapters(loaded), [QUESTION], 1, manner)["completions"]
    assert "".join(pieces) == found["text"] and len(pieces) > 3


def test_a_chat_switches_adapters_and_strength(loud, tmp_path):
    other = adapter(tmp_path / "other", models.load("demo"), seed=1)
    said: list[str] = []
    adapters = opened("demo", [loud, other], 0.0)
    chat = Chat(adapters, Manner(max_tokens=16), said.append)
    lines = [QUESTION, "/new", "/adapter other", "/strength 0.5", "/strength x", "/adapter off",
             "/adapter nobody", "/what", "", QUESTION, "/quit", "never read"]  # fmt: skip
    chat.run(iter(lines))
    text = "".join(said)
    assert "demo with loud at strength 0. Also loaded: other." in text
    assert "demo with other at strength 0.5" in text and "x is no number." in text
    assert "demo, without an adapter" in text and "no adapter named nobody" in text
    assert text.count("A duck has two legs.") == 2, "at strength 0, and without"
    assert chat.turns == [("user", QUESTION), ("assistant", "A duck has two legs.")]


def test_a_conversation_is_what_was_said(monkeypatch):
    heard, said = [], []

    def parrot(loaded, turns, manner, turn):
        heard.append((turn, list(turns)))
        yield from "yes"

    monkeypatch.setattr(talk, "spoken", parrot)
    adapters = Adapters(models.load("demo"))
    Chat(adapters, Manner(), said.append, system="Be brief.").run(iter(["One?", "Two?"]))
    system = [("system", "Be brief.")]
    first = [*system, ("user", "One?")]
    assert heard == [(0, first), (1, [*first, ("assistant", "yes"), ("user", "Two?")])]


def test_control_characters_stay_out_of_the_terminal():
    assert printable("a\x1b[31mb\n\tc") == "a\\x1b[31mb\n\tc"
