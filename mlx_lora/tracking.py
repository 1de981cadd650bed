"""`report_to`: the metrics of each step to services and viewers that are installed.

What is in metrics.jsonl goes there, no more. The run folder stays the record: a service that fails
in a run ends nothing, and is said once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mlx_lora import distributed
from mlx_lora.errors import ConfigError
from mlx_lora.schema import Stage

PROJECT = "mlx-lora"  # unless project_name says otherwise
Log = Callable[[int, Mapping[str, float]], None]
Tracker = tuple[Log, Callable[[], None]]  # a step's metrics, and the end
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
    begun: dict[str, Tracker] = {}
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
        begin = STARTS[name]
        if made := attempt(name, lambda b=begin, p=project: b(p, folder, dict(config))):
            begun[name] = made

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, (send, _) in begun.items():
            attempt(name, lambda s=send: s(step, metrics))

    try:
        yield log
    finally:
        for name, (_, close) in begun.items():
            attempt(name, close)


def wandb(project: str, folder: Path, config: dict[str, Any]) -> Tracker:
    module = importlib.import_module("wandb")
    run = module.init(project=project, name=folder.name, dir=str(folder), config=config)
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def swanlab(project: str, folder: Path, config: dict[str, Any]) -> Tracker:
    module = importlib.import_module("swanlab")
    place = str(folder / "swanlog")
    module.init(project=project, experiment_name=folder.name, logdir=place, config=config)
    return lambda step, metrics: module.log(dict(metrics), step=step), module.finish


def trackio(project: str, folder: Path, config: dict[str, Any]) -> Tracker:
    module = importlib.import_module("trackio")
    module.init(project=project, name=folder.name, config=config)
    return lambda step, metrics: module.log(dict(metrics), step=step), module.finish


def tensorboard(project: str, folder: Path, config: dict[str, Any]) -> Tracker:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


STARTS: dict[str, Callable[[str, Path, dict[str, Any]], Tracker]] = {
    "wandb": wandb,
    "swanlab": swanlab,
    "trackio": trackio,
    "tensorboard": tensorboard,
}
