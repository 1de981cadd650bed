"""Two processes over the loopback take the steps of one."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_lora import distributed, sft
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach
from mlx_lora.config import from_text
from mlx_lora.data import Text
from mlx_lora.errors import ConfigError
from mlx_lora.experiment import refuse_alone
from mlx_lora.schema import Stage
from tests.tiny import tiny_loaded

YAML = """
model: demo
method: grpo
task: {name: countdown, max_count: 2, partial_credit: 0.5}
iters: 3
save_every: 2
batch_size: 3
learning_rate: 1e-4
grpo: {group_size: 4, beta: 0.01, advantage: batch_normalised, LOOPS}
rollout: {max_tokens: 16}
eval: {n: 7}
monitor: {every: 1}
"""
TIMES = {"seconds", "tokens_per_second"}
SAY = """
from mlx_lora import distributed as d
import mlx.core as mx
from mlx_lora.errors import TaskError
import json

def part():
    if d.rank() == 1:
        raise TaskError("one of us is ill", "rest")
    return [1]

def refused(call):
    try:
        call()
    except Exception as error:
        return str(error)

tree = {"a": mx.full((2, 3), d.rank() + 1.0), "b": [mx.array([d.rank()], mx.int32)]}
print(json.dumps({
    "rank": d.rank(),
    "everybody": d.everybody({"é": d.rank(), "nan": float("nan")})[1]["é"],
    "agreed": d.agreed(d.rank()),
    "mine": list(d.mine(range(5))),
    "everything": d.everything(lambda: d.mine(range(5))),
    "summed": d.summed(tree)["a"].tolist(),
    "whole": d.summed(tree)["b"][0].tolist(),
    "first": d.from_first(tree)["a"].tolist(),
    "equal": refused(lambda: d.refuse_difference("it", {"x": mx.ones(3)})),
    "unequal": refused(lambda: d.refuse_difference("it", tree)),
    "ill": refused(lambda: d.everything(part)),
}))
"""


def ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


def together(folder: Path, *arguments, ranks=2):
    """The same command as so many ranks of a ring; what each prints."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(ranks)]))
    command = [sys.executable, *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    try:
        found = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert not any(p.returncode for p in started), "\n".join(err for _, err in found)
    return [out for out, _ in found]


def test_ranks_hear_each_other(tmp_path):
    first, second = (json.loads(out) for out in together(tmp_path, "-c", SAY))
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first.pop("mine") + second.pop("mine") == [0, 1, 2, 3, 4]
    assert first == second
    assert first == {
        "everybody": 1,
        "agreed": 0,
        "everything": [0, 1, 2, 3, 4],
        "summed": [[3.0] * 3] * 2,
        "whole": [1],
        "first": [[1.0] * 3] * 2,
        "equal": None,
        "unequal": "it on rank 1 is not that of rank 0",
        "ill": "rank 1: TaskError: one of us is ill",
    }


def test_alone_nothing_happens():
    tree = {"a": mx.ones(2)}
    assert distributed.everybody(1) == [1] and distributed.summed(tree) is tree
    assert distributed.mine([1, 2]) == [1, 2] and distributed.leads()


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def test_two_processes_are_one(tmp_path, run_cli):
    """Three prompts, two ranks: one samples two of them. Rank 0 alone leaves a folder."""
    path = tmp_path / "run.yaml"
    path.write_text(YAML.replace("LOOPS", "epochs: 2, minibatches: 2"))
    done = run_cli("train", path, "--run-dir", tmp_path / "one", "--json")
    assert done.returncode == 0, done.stderr
    arguments = ("-m", "mlx_lora", "train", path, "--run-dir", tmp_path / "two", "--json")
    first, second = together(tmp_path, *arguments)
    summary, alone = json.loads(first), json.loads(done.stdout)
    assert second == "" and summary["accuracy_after"] == alone["accuracy_after"]
    agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_stopped_run_goes_on_together(tmp_path, run_cli):
    """Rank 1 has no checkpoint on its disk: it is told where rank 0 stands. Begun by one alone."""
    path, folder = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(YAML.replace("LOOPS", "epochs: 1"))
    assert run_cli("train", path, "--run-dir", folder).returncode == 0
    whole = metrics(folder)
    status = folder / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    together(tmp_path, "-m", "mlx_lora", "train", path, "--run-dir", folder, "--resume")
    for a, b in zip(whole, metrics(folder), strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)


SFT = """
model: demo
method: sft
data: rows.jsonl
iters: 4
batch_size: 3
save_every: 3
steps_per_eval: 2
grad_accumulation_steps: 2
learning_rate: 1e-4
"""


def texts(folder: Path) -> Path:
    """Rows of many lengths, some to validate on, and how to learn them."""
    (folder / "data").mkdir()
    for name, count in (("train", 14), ("valid", 7)):
        rows = [{"text": "What is 2 + 3 ? " + "No, it is 5. " * i} for i in range(1, count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    path = folder / "sft.yaml"
    path.write_text(SFT.replace("rows.jsonl", str(folder / "data")))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_on_two_is_that_on_one(packing, tmp_path, run_cli):
    """Batches of three, so that one rank has a row more, of other lengths."""
    path = texts(tmp_path)
    path.write_text(path.read_text() + ("sft: {packing: true}\n" if packing else ""))
    done = run_cli("train", path, "--run-dir", tmp_path / "one", "--json")
    assert done.returncode == 0, done.stderr
    arguments = ("-m", "mlx_lora", "train", path, "--run-dir", tmp_path / "two", "--json")
    first, second = together(tmp_path, *arguments)
    ends = [json.loads(text)["valid_loss"] for text in (first, done.stdout)]
    assert second == "" and ends[0] == pytest.approx(ends[1], abs=1e-5)
    agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sft_goes_on_together_between_two_updates(tmp_path, run_cli):
    """The checkpoint after 3 steps holds the gradients of the third: rank 1 is told of them."""
    path = texts(tmp_path)
    for name in ("one", "two"):
        assert run_cli("train", path, "--run-dir", tmp_path / name).returncode == 0
    status = tmp_path / "two" / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    arguments = ("-m", "mlx_lora", "train", path, "--run-dir", tmp_path / "two", "--resume")
    together(tmp_path, *arguments)
    agree(tmp_path / "one", tmp_path / "two")


def agree(one: Path, two: Path) -> None:
    """Both runs have said the same of each step, and ended at the same adapter."""
    said = [metrics(folder) for folder in (one, two)]
    assert [m.keys() for m in said[0]] == [m.keys() for m in said[1]]
    for a, b in zip(*said, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)
    pairs = [files.read(folder / "adapters")[1] for folder in (one, two)]
    start = files.read(one / "adapters" / "initial")[1]
    for name, value in pairs[0].items():
        np.testing.assert_allclose(np.array(value), np.array(pairs[1][name]), atol=1e-5)
    assert any(not mx.array_equal(start[k], pairs[0][k]) for k in start), "nothing was learnt"


@pytest.mark.parametrize("rows", [1, 3])
def test_what_two_ranks_sum_up_is_the_whole_batch(rows, monkeypatch):
    """Each rank in turn, with what the other would say. One row: a rank has nothing to do."""
    e, loaded = Stage.model_validate({"method": "sft", "data": "x"}), tiny_loaded()
    attach(loaded, rank=4, scale=2.0)
    model = loaded.model
    batch = [(Text(tuple(range(1, 5 + 4 * i)), 1),) for i in range(rows)]
    learn = nn.value_and_grad(model, sft.mean_loss)
    loss, tokens, grads = sft.shared(model, partial(learn, model), batch, e)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    halves = [batch[: rows // 2], batch[rows // 2 :]]
    counts = [float(sft.as_arrays(h, e)[3].sum()) if h else 0.0 for h in halves]
    monkeypatch.setattr(distributed, "everybody", lambda said: counts)
    monkeypatch.setattr(distributed, "summed", lambda tree: tree)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(sft.shared(model, partial(learn, model), batch, e))
    assert [t for _, t, _ in found] == [tokens] * 2
    assert sum(part for part, _, _ in found) == pytest.approx(loss, rel=1e-5)
    total = tree_map(mx.add, found[0][2], found[1][2])
    for (name, whole), (_, both) in zip(tree_flatten(grads), tree_flatten(total), strict=True):
        assert mx.allclose(whole, both, rtol=1e-4, atol=1e-7).item(), name


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("stages: [{method: sft, data: x}]", "an experiment with stages"),
        ("method: sft\ntask: countdown\nrejection_sampling: {}", "rejection_sampling"),
    ],
)
def test_what_one_machine_runs_is_refused_on_two(more, what, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ConfigError, match=f"{what} runs on one machine"):
        refuse_alone(from_text(f"model: demo\n{more}\n"))
