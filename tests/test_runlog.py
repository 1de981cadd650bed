"""Run folders and clocks: nothing half-written, nothing overwritten, every second in one row."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_lora import runlog
from mlx_lora.errors import RunError
from mlx_lora.progress import watch
from mlx_lora.runlog import Clock, RunLog, json_safe


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def run(tmp_path) -> RunLog:
    return RunLog.create(tmp_path / "run", name="test")


def lines(run: RunLog, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def seconds(report: dict) -> dict[str, float]:
    return {row["name"]: row["seconds"] for row in report["rows"]}


def test_without_a_path_a_fresh_timestamped_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (RunLog.create(None, name="grpo / odd name").folder for _ in range(2))
    assert first != second and re.fullmatch(r"runs/\d{8}-\d{6}-grpo-odd-name", first.as_posix())
    assert json.loads((second / "status.json").read_text())["state"] == "running"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    RunLog.create(tmp_path / "empty", name="test")  # an empty folder is fine, from now on it is not
    for taken in (tmp_path / "empty", tmp_path / "empty" / "status.json"):
        with pytest.raises(RunError, match="exists already") as caught:
            RunLog.create(taken, name="test")
        assert str(taken) in str(caught.value) and f"{taken}-2" in caught.value.hint


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written") as caught:
        RunLog.create(tmp_path / "file" / "run", name="test")
    assert "--run-dir" in caught.value.hint


def test_files_appear_whole_or_not_at_all(run, monkeypatch):
    run.write_text("a.txt", "old")
    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: self.touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.write_text("a.txt", "new")
    assert (run.folder / "a.txt").read_text() == "old"
    assert sorted(p.name for p in run.folder.iterdir()) == ["a.txt", "status.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(run):
    run.write_json("a.json", {"x": 1})
    with pytest.raises(TypeError, match="object has no JSON form"):
        run.write_json("a.json", {"x": object()})
    assert json.loads((run.folder / "a.json").read_text()) == {"x": 1}


def test_metrics_are_flat_lines_on_disk_at_once(run):
    run.metric(0, {"loss": np.float32(0.5), "count": np.int64(3), "on": np.bool_(True)})
    run.metric(1, {"loss": math.nan, "kl": -math.inf, "note": None})
    assert lines(run) == [
        {"step": 0, "loss": 0.5, "count": 3, "on": True},
        {
            "step": 1,
            "loss": None,
            "kl": None,
            "note": None,
            "loss_status": "nan",
            "kl_status": "inf",
        },
    ]
    with pytest.raises(TypeError, match="single numbers, unlike sizes"):
        run.metric(2, {"sizes": [1, 2]})
    run.status("interrupted", "Ctrl-C")
    status = json.loads((run.folder / "status.json").read_text())
    assert status == {"state": "interrupted", "detail": "Ctrl-C", "step": 1}


def test_yaml_keeps_text_as_text(run):
    from mlx_lora import yamlfile

    run.write_yaml("config.yaml", {"project_name": "1e-5", "rate": 1e-5, "on": None})
    text = (run.folder / "config.yaml").read_text()
    assert yamlfile.parse(text, "x").value == {"project_name": "1e-5", "rate": 1e-5, "on": None}


def test_resume_drops_what_came_after_the_checkpoint(run):
    for step in range(5):
        run.metric(step, {"loss": 1.0})
        run.append("samples.jsonl", {"step": step, "text": "π"})
    run.append("alerts.jsonl", {"name": "no step"})
    with open(run.folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "lo')  # killed in the middle of a line
    again = RunLog.resume(run.folder, step=2)
    again.metric(3, {"loss": 0.5})
    assert [x["step"] for x in lines(again)] == [0, 1, 2, 3]
    assert [x["step"] for x in lines(again, "samples.jsonl")] == [0, 1, 2]
    assert len(lines(again, "alerts.jsonl")) == 1
    with pytest.raises(RunError, match="no run folder"):
        RunLog.resume(run.folder / "nowhere", step=0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
def test_json_safe_is_always_strict_json(thing):
    safe = json_safe(thing)
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe


def test_json_safe_knows_our_types():
    import mlx.core as mx

    from mlx_lora.types import Finding

    assert json_safe(np.array([1.0, math.nan])) == [1.0, None]
    assert json_safe({"a": mx.array(math.inf), 1: (mx.array([2]),)}) == {
        "a": None,
        "a_status": "inf",
        "1": [[2]],
    }
    assert json_safe(Path("a")) == "a" and json_safe({"b", "a"}) == ["a", "b"]
    assert json_safe(Finding("n", "", "m", "a"))["severity"] == "warn"


def test_the_environment_names_versions():
    found = runlog.environment(blas="openblas")
    assert found["blas"] == "openblas" and found["versions"]["mlx"] and found["cpu_count"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])
    json.dumps(found, allow_nan=False)


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "mlx_lora"
    package.mkdir(parents=True)
    monkeypatch.setattr(runlog, "__file__", str(package / "runlog.py"))
    assert runlog.commit.__wrapped__() is None


def test_rows_add_up_and_nested_blocks_are_not_counted_twice():
    time = Time()
    clock = Clock(now=time)
    time.pass_by(1)
    with clock.measure("load"):
        time.pass_by(10)
    for decode in (2, 4):
        with clock.measure("step", kind="step"):
            time.pass_by(1)
            with clock.measure("decode", kind="step"):
                time.pass_by(decode)
                with clock.measure("reward", kind="step"):
                    time.pass_by(0.5)
    report = clock.report()
    assert seconds(report) == {"load": 10, "decode": 6, "step": 2, "reward": 1, "unaccounted": 1}
    assert report["total"] == sum(seconds(report).values()) == 20
    assert [row["seconds"] for row in report["rows"]] == [10, 6, 2, 1, 1]
    decode = next(row for row in report["rows"] if row["name"] == "decode")
    assert decode == {
        "name": "decode",
        "kind": "step",
        "seconds": 6,
        "count": 2,
        "p50": 2,
        "p95": 4,
    }


def test_the_parts_of_a_resumed_run_add_up(tmp_path):
    time = Time()
    log, saved = RunLog(tmp_path), {}
    for part, decode in enumerate((2, 5), start=1):
        clock = Clock(now=time, start=time())
        time.pass_by(1)  # in neither block
        clock.carry(log)
        if part == 1:
            with clock.measure("load"):
                time.pass_by(10)
        with clock.measure("decode", kind="step"):
            time.pass_by(decode)
        saved = clock.save()
        assert json.loads((tmp_path / "time_breakdown.json").read_text()) == saved
        time.pass_by(99)  # killed here: this is in no report
    assert saved["parts"] == 2 and saved["total"] == 13 + 6
    assert seconds(saved) == {"load": 10, "decode": 7, "unaccounted": 2}
    (decode_row,) = [r for r in saved["rows"] if r["name"] == "decode"]
    assert decode_row["count"] == 2 and decode_row["p50"] == 5


def test_time_before_the_clock_belongs_to_the_block_that_began_then():
    time = Time()
    began = time()
    time.pass_by(3)
    clock = Clock(now=time, start=began)
    with clock.measure("import", since=began):
        time.pass_by(4)
    assert seconds(clock.report()) == {"import": 7, "unaccounted": 0}


def test_small_rows_are_shown_as_one_and_nothing_is_lost():
    rows = [{"name": str(i), "kind": "once", "seconds": 0.1, "count": 2} for i in range(3)]
    rows += [{"name": "decode", "kind": "step", "seconds": 99.6, "count": 7}]
    rows += [{"name": "log", "kind": "step", "seconds": 0.1, "count": 7}]
    found = runlog.gathered({"total": 100.0, "rows": rows})
    assert [(r["name"], r["count"]) for r in found] == [("decode", 7), ("3 more", 6), ("log", 7)]
    assert sum(r["seconds"] for r in found) == pytest.approx(sum(r["seconds"] for r in rows))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100)), max_size=20))
def test_rows_add_up_whatever_happens(script):
    """Blocks opened (1), closed (2), or only time passing (0); an error closes the rest."""
    time = Time()
    clock = Clock(now=time)
    open_blocks = []
    for what, amount in script:
        time.pass_by(amount)
        if what == 1:
            open_blocks.append(clock.measure(f"block {amount % 3}"))
            open_blocks[-1].__enter__()
        elif what == 2 and open_blocks:
            open_blocks.pop().__exit__(None, None, None)
    for report in (clock.report(), close(open_blocks, clock)):
        assert sum(seconds(report).values()) == report["total"] == time.now - 100
        assert all(value >= 0 for value in seconds(report).values())


def close(open_blocks: list, clock: Clock) -> dict:
    for block in reversed(open_blocks):
        with contextlib.suppress(KeyError):  # booked on the way through
            block.__exit__(KeyError, KeyError(), None)
    return clock.report()


def test_the_plot_is_a_png_a_thousand_pixels_wide(tmp_path):
    time = Time()
    clock = Clock(now=time)
    runlog.plot(clock.report(), tmp_path / "empty.png")  # no time has passed at all
    with clock.measure("load $x$"):
        time.pass_by(1234.5)
    with clock.measure("decode", kind="step"):
        time.pass_by(2.0)
    runlog.plot(clock.report(), tmp_path / "time.png")
    header = (tmp_path / "time.png").read_bytes()[:24]
    assert header[:4] == b"\x89PNG" and int.from_bytes(header[16:20], "big") == 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.png", "time.png"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_keeps_the_count_of_steps_and_whole_metrics(width):
    seen = io.StringIO()
    screen = Console(file=seen, force_terminal=True, width=width, color_system=None)
    step = {"loss": 0.1, "reward": 0.46, "accuracy": 0.46, "kl": 0.182, "entropy": 0.24}
    with watch(screen, "grpo on demo", 64) as watcher:
        watcher.update(63, step | {"tokens_per_second": 2595.0})
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.getvalue()).strip().splitlines()[-1]
    assert "64/64 reward 0.46" in last and "…" not in last and len(last) <= width
    assert ("2,595 tok/s" in last) == (width == 120)
