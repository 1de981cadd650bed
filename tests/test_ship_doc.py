"""docs/metrics.md lists what shipping writes and prints, key by key; docs/ship.md names it all."""

import json
from pathlib import Path

import pytest

from mlx_lora import models
from mlx_lora.progress import console
from mlx_lora.ship import gguf_files, peft_files
from mlx_lora.ship.export import Shipped
from mlx_lora.ship.formats import FORMATS
from mlx_lora.ship.fuse import fuse
from mlx_lora.ship.merge import merge
from mlx_lora.ship.methods import methods
from mlx_lora.ship.switch import Adapters
from mlx_lora.ship.talk import Manner, answers
from mlx_lora.ship.trained import read
from tests.test_metrics_doc import documented, emitted
from tests.test_ship import adapter

PAGE = (Path(__file__).parent.parent / "docs" / "ship.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    options = {"init": "gaussian", "init_options": {"std": 0.05}, "keys": ["q_proj"]}
    return adapter(tmp_path_factory.mktemp("doc") / "a", models.load("demo"), **options)


def test_an_export_prints_the_documented_keys(demo):
    found = Shipped(read(demo), demo, "mlx", "demo", None, ["note"]).to_json()
    assert emitted(found) == documented("export --json")


def test_a_merge_writes_the_documented_keys(demo, tmp_path):
    merge([demo, demo], tmp_path / "m")
    told = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert emitted(told) == documented("merge.json")


def test_a_fuse_writes_the_documented_keys(demo, tmp_path):
    fuse(demo, tmp_path / "f", dequantize=True, console=console(quiet=True))
    told = json.loads((tmp_path / "f" / "fuse.json").read_text())
    assert emitted(told) == documented("fuse.json")


def test_generate_prints_the_documented_keys():
    told = answers(Adapters(models.load("demo")), ["A duck"], 1, Manner(max_tokens=2))
    assert emitted(told) == documented("generate --json")


def test_the_page_names_every_format_method_and_architecture():
    names = [*FORMATS, *methods, *gguf_files.ARCHITECTURES, *peft_files.VERIFIED]
    assert not [name for name in names if f"`{name}`" not in PAGE]
