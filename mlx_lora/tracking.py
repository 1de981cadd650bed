"""`report_to`: the metrics of each step to services and viewers that are installed.

What is in metrics.jsonl goes there, no more. The run folder stays the record: a service that fails
in a run ends nothing, and is said once. A resumed run goes on in the run that its service knows.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lora import distributed
from mlx_lora.errors import ConfigError
from mlx_lora.runlog import RunLog
from mlx_lora.schema import Stage

PROJECT = "mlx-lora"  # unless project_name says otherwise
Log = Callable[[int, Mapping[str, float]], None]
Begun = tuple[Log, Callable[[], None], str | None]  # a step's metrics, the end, the run's id
FILE = "tracking.json"  # of a run folder: the id of its run by service
PACKAGES = {  # name -> module, what pip calls it
    "wandb": ("wandb", "wandb"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
    "tensorboard": ("tensorboardX", "tensorboardX"),
}


def refuse_missing(e: Stage) -> None:
    """ConfigError that names every package that `report_to` wants and this machine has not."""
    absent = [name for name in e.services if importlib.util.find_spec(PACKAGES[name][0]) is None]
    if absent:
        names = " ".join(PACKAGES[name][1] for name in absent)
        raise ConfigError(
            f"report_to: {', '.join(absent)} is not installed",
            f"pip install {names}, or leave report_to out: metrics.jsonl has all of it.",
        )


@contextmanager
def tracked(
    e: Stage, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Log]:
    """Something that passes the metrics of a step on to every service; `say` hears of failures."""
    begun: dict[str, Begun] = {}
    file = folder / FILE
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    failed: set[str] = set()

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        if name in failed:
            return None
        try:
            with redirect_stdout(sys.stderr):  # stdout is the command's result
                return work()
        except Exception as error:  # a service of others: its network, its login, its disk
            failed.add(name)
            say(f"report_to {name} stopped: {type(error).__name__}: {error}")
            return None

    for name in e.services if distributed.leads() else ():
        project = e.project_name or PROJECT
        start = partial(STARTS[name], project, folder, dict(config), known.get(name))
        if made := attempt(name, start):
            begun[name] = made
            known |= {name: made[2]} if made[2] else {}
    if known:
        RunLog(folder).write_json(FILE, known)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, (send, *_) in begun.items():
            attempt(name, lambda s=send: s(step, metrics))

    try:
        yield log
    finally:
        for name, (_, close, _) in begun.items():
            attempt(name, close)


def wandb(project: str, folder: Path, config: dict[str, Any], known: str | None) -> Begun:
    module = importlib.import_module("wandb")
    again = {"id": known, "resume": "allow"} if known else {}
    run = module.init(project=project, name=folder.name, dir=str(folder), config=config, **again)
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish, run.id


def swanlab(project: str, folder: Path, config: dict[str, Any], known: str | None) -> Begun:
    module = importlib.import_module("swanlab")
    about = {"project": project, "experiment_name": folder.name, "logdir": str(folder / "swanlog")}
    again = {"id": known, "resume": "allow"} if known else {}
    run = module.init(config=config, **about, **again)
    name = getattr(run, "id", None)  # none where it sends nothing
    return lambda step, metrics: module.log(dict(metrics), step=step), module.finish, name


def trackio(project: str, folder: Path, config: dict[str, Any], known: str | None) -> Begun:
    """Its runs are known by their names, and one whose name is taken gets another."""
    module = importlib.import_module("trackio")
    again = {"resume": "allow"} if known else {}
    run = module.init(project=project, name=known or folder.name, config=config, **again)
    return lambda step, metrics: module.log(dict(metrics), step=step), module.finish, run.name


def tensorboard(project: str, folder: Path, config: dict[str, Any], known: str | None) -> Begun:
    """Its folder is its run."""
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close, None


STARTS: dict[str, Callable[[str, Path, dict[str, Any], str | None], Begun]] = {
    "wandb": wandb,
    "swanlab": swanlab,
    "trackio": trackio,
    "tensorboard": tensorboard,
}
