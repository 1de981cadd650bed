"""Adapters side by side: numbers against dense algebra, what is not common is named."""

import json

import mlx.core as mx
import numpy as np
import pytest
from report_pages import LAYERS, adapter
from typer.testing import CliRunner

from mlx_lora.cli import app
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.report.compare import MOST, compare, states

SCALE = 2.0


def factors(folder, name) -> tuple[np.ndarray, np.ndarray]:
    tensors = mx.load(str(folder / "adapters.safetensors"))
    return tuple(np.array(tensors[f"{name}.{f}"], np.float64) for f in ("lora_a", "lora_b"))


def rewrite(folder, change) -> None:
    """The same adapter with tensors changed: name, array -> array."""
    file = str(folder / "adapters.safetensors")
    tensors = {name: mx.array(change(name, np.array(x))) for name, x in mx.load(file).items()}
    mx.save_safetensors(file, tensors)


def test_numbers_are_those_of_the_dense_updates(tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1, rank=3)
    (pair,) = compare([a, b]).pairs
    dense = {f: {n: SCALE * np.matmul(*factors(f, n)) for n in LAYERS} for f in (a, b)}
    changes = {n: np.linalg.norm(dense[b][n] - dense[a][n]) for n in LAYERS}
    assert [row.module for row in pair.modules] == sorted(LAYERS, key=lambda n: -changes[n])
    for row in pair.modules:
        x, y = dense[a][row.module], dense[b][row.module]
        assert row.change == pytest.approx(changes[row.module], rel=1e-6)
        share = changes[row.module] ** 2 / sum(c**2 for c in changes.values())
        assert row.change_share == pytest.approx(share, rel=1e-6)
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert row.cosine == pytest.approx(cosine, rel=1e-5)
        spaces = [main_directions(x), main_directions(y)]
        for side, key in ((0, "inputs"), (1, "outputs")):
            u, v = (space[side] for space in spaces)
            cosines = np.linalg.svd(u.T @ v, compute_uv=False)
            assert getattr(row, f"overlap_{key}") == pytest.approx(np.mean(cosines**2), abs=1e-6)
            wanted = np.degrees(np.arccos(np.clip(cosines, 0, 1)))
            assert getattr(row, f"angles_{key}") == pytest.approx(wanted, abs=1e-4)
            chance = max(u.shape[1], v.shape[1]) / len(u)
            assert getattr(row, f"chance_{key}") == chance
    assert pair.change == pytest.approx(np.sqrt(sum(c**2 for c in changes.values())), rel=1e-6)


def main_directions(update) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(update)
    kept = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
    return u[:, :kept], vt[:kept].T


def test_an_adapter_against_itself_and_its_opposite(tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    (pair,) = compare([a, b]).pairs
    assert pair.cosine == pytest.approx(1) and pair.overlap_inputs == pytest.approx(1)
    assert pair.change == 0
    rewrite(b, lambda name, x: -x if name.endswith("lora_b") else x)
    (pair,) = compare([a, b]).pairs
    assert pair.cosine == pytest.approx(-1) and pair.overlap_outputs == pytest.approx(1)


def test_random_adapters_overlap_as_chance_says(tmp_path):
    wide = {"width": 96, "names": [f"model.layers.{i}.mlp.up_proj" for i in range(24)]}
    folders = [adapter(tmp_path / str(seed), seed=seed, **wide) for seed in (0, 1)]
    (pair,) = compare(folders).pairs
    assert pair.overlap_inputs == pytest.approx(pair.chance_inputs, rel=0.15)


def test_untrained_and_broken_modules_have_no_angles(tmp_path):
    a, b, c = (adapter(tmp_path / name, seed=i) for i, name in enumerate("abc"))
    rewrite(b, lambda name, x: 0 * x if name == f"{LAYERS[0]}.lora_b" else x)
    rewrite(c, lambda name, x: np.nan * x if name == f"{LAYERS[1]}.lora_b" else x)
    found = compare([a, b, c])
    rows = {(p.a, p.b, r.module): r for p in found.pairs for r in p.modules}
    idle, broken = rows["a", "b", LAYERS[0]], rows["a", "c", LAYERS[1]]
    assert idle.cosine is None and idle.overlap_inputs is None
    assert idle.change == pytest.approx(found.modules[LAYERS[0]]["size"][0])
    assert broken.change is None and broken.change_share is None
    json.dumps(found.to_json(), allow_nan=False)


def test_what_is_not_common_is_named_and_the_rest_compared(tmp_path):
    other = [*LAYERS[1:], "lm_head"]
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", names=other)
    rewrite(b, lambda name, x: np.ones((30, 4)) if name == f"{LAYERS[1]}.lora_a" else x)
    found = compare([a, b])
    assert list(found.modules) == LAYERS[2:]
    assert found.only == {LAYERS[0]: ["a"], "lm_head": ["b"]}
    assert found.misfits == {LAYERS[1]: ["24 to 24", "30 to 24"]}
    strange = adapter(tmp_path / "c", names=["lm_head"])
    with pytest.raises(AdapterError, match="a and c have no module in common"):
        compare([a, strange])


def test_adapters_of_other_bases_are_compared_and_named(tmp_path):
    folders = [adapter(tmp_path / name) for name in "ab"]
    for folder, kind in zip(folders, ("llama", "qwen3"), strict=True):
        about = json.loads((folder / "adapter_config.json").read_text())
        text = json.dumps({**about, "base": {"model_type": kind}})
        (folder / "adapter_config.json").write_text(text)
    assert compare(folders).notices == ["a is for a llama, b for a qwen3"]


def test_states_of_a_run_come_in_the_order_they_were_made(tmp_path):
    names = ("adapters/initial", "checkpoints/0000004", "checkpoints/0000008", "adapters")
    for seed, name in enumerate(names):
        adapter(tmp_path / name, seed=seed)
        (tmp_path / name / "state.json").write_text("{}")
    assert [str(f.relative_to(tmp_path)) for f in states(tmp_path)] == list(names)
    with pytest.raises(AdapterError, match="keeps 1 state"):
        adapter(tmp_path / "alone" / "adapters")
        states(tmp_path / "alone")


def test_the_states_of_stages_are_those_of_each(tmp_path):
    names = ["stages/2_sft/adapters", "stages/10_es/checkpoints/0000004", "stages/10_es/adapters"]
    for name in ("adapters/initial", *names, "adapters"):
        adapter(tmp_path / name)
        (tmp_path / name / "state.json").write_text("{}")
    found = states(tmp_path)
    assert [str(f.relative_to(tmp_path)) for f in found] == ["adapters/initial", *names]
    assert len(set(compare(found).names)) == 4


def test_a_comparison_has_a_limit(tmp_path):
    for count in (1, MOST + 1):
        with pytest.raises(ConfigError, match=f"takes 2 to {MOST} adapters, got {count}"):
            compare([tmp_path] * count)


def test_the_command_prints_tables_or_one_document_and_writes_both_files(tmp_path):
    a, b, c = (str(adapter(tmp_path / name, seed=i)) for i, name in enumerate("abc"))
    done = CliRunner().invoke(app, ["spectrum", a, "--compare", b, c, "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert "changed most from a to c: 4 of 4 modules" in done.stdout
    assert (tmp_path / "o" / "compare.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "o" / "compare.json").read_text())
    done = CliRunner().invoke(app, ["spectrum", a, "--compare", b, "--compare", c, "--json"])
    assert json.loads(done.stdout) == written
    assert [x["name"] for x in written["adapters"]] == ["a", "b", "c"]
    done = CliRunner().invoke(app, ["spectrum", a, "--compare", b, "-o", "x.threshold=1"])
    assert isinstance(done.exception, ConfigError)
