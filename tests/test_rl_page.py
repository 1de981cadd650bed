"""docs/rl.md: what it tells the user to write is accepted, and what it says of defaults is so."""

import re
from pathlib import Path

import pytest

from mlx_lora import config, unsupported
from mlx_lora.blocks import Grpo
from mlx_lora.registry import options
from mlx_lora.rl.advantages import advantages
from mlx_lora.rl.losses import losses

PAGE = (Path(__file__).parent.parent / "docs" / "rl.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?ms)^```yaml\n(.*?)^```", PAGE)
RECIPES = dict(re.findall(r"(?m)^\| ([\w. +]+) \| .*?`(\{.*?\})`", PAGE))
BASE = "model: demo\nmethod: grpo\ntask: countdown\n"


def table(heading: str) -> dict[str, list[str]]:
    """First cell without backticks -> the others, of the section's table."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \|(.*)\|$", section.partition("|---")[2])
    assert rows, heading
    cells = {name: re.split(r"(?<!\\)\|", rest) for name, rest in rows}
    return {name: [c.strip().strip("`") for c in row] for name, row in cells.items()}


def test_there_is_something_to_test():
    assert len(SNIPPETS) >= 2 and len(RECIPES) >= 9


@pytest.mark.parametrize("text", [*SNIPPETS, *(f"{BASE}grpo: {r}\n" for r in RECIPES.values())])
def test_what_the_page_tells_to_write_is_accepted(text):
    experiment = config.from_text(text)
    config.check_names(experiment)
    unsupported.refuse(experiment)
    assert not config.notices(experiment)


@pytest.mark.parametrize("text", SNIPPETS)
def test_no_whole_example_has_the_default_scale_with_its_high_rate(text):
    experiment = config.from_text(text)
    assert experiment.lora_parameters.scale == 2.0, "20 ruins the demo at these learning rates"


def test_every_loss_has_a_row_with_its_clips():
    rows = table("Losses")
    assert rows.keys() == set(losses)
    for name, row in rows.items():
        known = options(losses[name])
        wanted = [f"{known[k]:g}" if k in known else "" for k in ("clip_low", "clip_high")]
        assert row[-2:] == wanted, name


def test_every_advantage_has_a_row():
    assert table("Advantages").keys() == set(advantages)


def test_every_key_has_a_row_with_its_default():
    rows = table("The other keys")
    fields = {**Grpo.model_fields, "grad_accumulation_steps": None}
    elsewhere = {"group_size", "loss", "advantage", "clip_low", "clip_high"}
    assert rows.keys() == fields.keys() - elsewhere
    for key, (default, _) in rows.items():
        if (field := fields[key]) is not None:
            assert config.yamlfile.option(default) == field.default, key
