"""docs/es.md: keys and defaults are the code's, the experiment is valid, figures were measured."""

import json
import re
from pathlib import Path

from mlx_lora import config
from mlx_lora.blocks import Es
from mlx_lora.config import check_names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "es.md").read_text(encoding="utf-8")
CONCISE = json.loads((ROOT / "figures" / "es_conciseness.json").read_text(encoding="utf-8"))
RUNS = json.loads((ROOT / "figures" / "es_vs_grpo.json").read_text(encoding="utf-8"))


def test_the_table_names_every_key_with_its_default():
    found: dict[str, str] = {}
    for keys, defaults in re.findall(r"(?m)^\| (`[^|]+`) \|([^|]*)\|", PAGE):
        names = re.findall(r"`(\w+)`", keys)
        values = [x.strip(" `") for x in defaults.split(",")]
        found |= dict(zip(names, values, strict=True))
    known = {name: field.default for name, field in Es.model_fields.items()}
    assert found.keys() == known.keys()
    for name, default in known.items():
        plain = str(default).lower() if isinstance(default, bool) else default
        plain = f"{plain:g}" if isinstance(plain, float) else str(plain or "")
        assert found[name] == ("" if default is None else plain), name


def test_the_experiment_is_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    check_names(config.from_text(text))


def test_accuracies_on_the_page_are_those_that_were_measured():
    rows = dict(re.findall(r"(?m)^\| (GRPO|ES), [^|]* \| [^|]* \| ([^|]*) \|", PAGE))
    names = {"GRPO": "grpo", "ES": "es"}
    assert rows.keys() == names.keys()
    for label, method in names.items():
        after = [100 * r["accuracy"] for r in RUNS["compared"]["after"][method]]
        assert [float(x) for x in re.findall(r"[0-9]+\.[0-9]", rows[label])] == [
            round(x, 1) for x in after
        ]


def test_rewards_on_the_page_are_those_that_were_measured():
    rows = re.findall(r"(?m)^\| (\d) \| (-[\d.]+) \| (-[\d.]+) \| ([\d.]+) \| (\d) of 8 \|", PAGE)
    assert [tuple(map(float, row)) for row in rows] == [
        (
            r["seed"],
            r["reward_mean_before"],
            r["reward_mean_after"],
            round(r["kl_to_base_after"], 1),
            8 * r["accuracy_after"],
        )
        for r in CONCISE["runs"]
    ]
