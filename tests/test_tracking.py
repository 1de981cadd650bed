"""report_to: what is logged reaches every service, and one that fails ends nothing."""

import sys
import types

import pytest

from mlx_lora import tracking
from mlx_lora.config import from_text
from mlx_lora.errors import ConfigError
from mlx_lora.recorder import Recorder
from mlx_lora.runlog import Clock, RunLog
from mlx_lora.schema import Stage


class Service:
    """Stands for each of the packages."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.began, self.sent, self.ended = fails, {}, [], 0
        self.id = "a1b2c3"

    def init(self, **about):
        if self.fails == "init":
            raise ConnectionError("no login")
        self.began = about
        self.name = about["name"] if "name" in about else about["experiment_name"]
        return self

    def log(self, metrics, step):
        if self.fails == "log":
            raise ConnectionError("no network")
        self.sent.append((step, metrics))

    def finish(self):
        self.ended += 1

    SummaryWriter = property(lambda self: self.writer)

    def writer(self, folder):
        return types.SimpleNamespace(
            add_scalar=lambda name, value, step: self.sent.append((step, {name: value})),
            flush=lambda: None,
            close=self.finish,
        )


@pytest.mark.parametrize("name", tracking.PACKAGES)
def test_every_step_reaches_the_service(name, tmp_path, monkeypatch):
    service, said = Service(), []
    monkeypatch.setitem(sys.modules, tracking.PACKAGES[name][0], service)
    e = Stage(report_to=name, project_name="ducks")
    recorder = Recorder(e, RunLog(tmp_path), Clock())
    with tracking.tracked(e, tmp_path, {"iters": 2}, said.append) as recorder.track:
        for step in range(2):
            recorder(step, {"loss": 1.0, "tokens_trained": 4})
    found = {}
    for step, metrics in service.sent:
        found.setdefault(step, {}).update(metrics)
    assert found.keys() == {0, 1} and found[1]["loss"] == 1.0
    assert {"seconds", "tokens_per_second"} <= found[1].keys()
    assert service.ended == 1 and not said
    if name != "tensorboard":
        assert service.began["project"] == "ducks" and service.began["config"] == {"iters": 2}


RESUMED = {
    "wandb": {"id": "a1b2c3", "resume": "allow"},
    "swanlab": {"id": "a1b2c3", "resume": "allow"},
    "trackio": {"name": "run", "resume": "allow"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_in_the_same_run_of_its_service(name, tmp_path, monkeypatch):
    service, began = Service(), []
    monkeypatch.setitem(sys.modules, name, service)
    for folder in ("run", "run", "run", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with tracking.tracked(Stage(report_to=name), tmp_path / folder, {}, print):
            began.append(service.began)
    for fresh in (began[0], began[3]):
        assert "id" not in fresh and "resume" not in fresh
    assert all(RESUMED[name].items() <= about.items() for about in began[1:3])


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_service_that_fails_is_said_once_and_the_others_go_on(fails, tmp_path, monkeypatch):
    bad, good, said = Service(fails), Service(), []
    monkeypatch.setitem(sys.modules, "wandb", bad)
    monkeypatch.setitem(sys.modules, "swanlab", good)
    e = Stage(report_to="wandb,swanlab")
    with tracking.tracked(e, tmp_path, {}, said.append) as log:
        log(0, {"loss": 1.0})
        log(1, {"loss": 1.0})
    assert [step for step, _ in good.sent] == [0, 1] and good.ended == 1
    (sentence,) = said
    assert sentence.startswith("report_to wandb stopped: ConnectionError")


def test_what_is_not_installed_or_unknown_is_refused(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb, tensorboard is not installed") as caught:
        tracking.refuse_missing(Stage(report_to="wandb,TensorBoard"))
    assert "pip install wandb tensorboardX" in caught.value.hint
    tracking.refuse_missing(Stage())
    with pytest.raises(ConfigError, match=r"report_to.*'wnadb'"):
        from_text("report_to: wnadb")


def test_without_services_nothing_is_sent(tmp_path):
    with tracking.tracked(Stage(), tmp_path, {}, print) as log:
        log(0, {"loss": 1.0})
