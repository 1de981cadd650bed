"""`mlx-lora eval` from names: load, sample, score, and keep every completion where asked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mlx_lora import bases, config, models
from mlx_lora.adapter import files
from mlx_lora.adapter.strength import refuse_strength, weaken_all
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.prepare import load
from mlx_lora.problems import readable
from mlx_lora.rl.evaluate import evaluate
from mlx_lora.rl.prompts import refuse_unfit
from mlx_lora.schema import Stage
from mlx_lora.tasks import load_task
from mlx_lora.types import Group


@dataclass(frozen=True)
class Request:
    """What to evaluate, once it is clear where everything comes from."""

    stage: Stage  # its model, task, rollout and eval
    n: int
    max_tokens: int

    def load(self, adapter: Path | None) -> models.Loaded:
        return load(self.stage, adapter)


def request(
    name: str,
    task: str | None,
    option: Sequence[str],
    *,
    n: int | None,
    max_tokens: int | None,
    trust_remote_code: bool = False,
) -> Request:
    """The request behind a command line: of a model and a task, or of an experiment file."""
    more = {"trust_remote_code": True} if trust_remote_code else {}
    if name.endswith((".yaml", ".yml")):
        if task is not None:
            raise ConfigError(
                "with an experiment file the task comes from it", "Say -o task=NAME for another."
            )
        experiment = config.load(config.find(name), option)
        stage = next((e for e in reversed(experiment.loops) if e.task), None)
        if stage is None:
            raise ConfigError(f"{name} names no task to evaluate on", "Say -o task=NAME.")
        stage = stage.model_copy(update=more)
        return Request(stage, n or stage.eval.n, max_tokens or stage.rollout.max_tokens)
    if task is None:
        raise ConfigError(
            "eval needs --task, or an experiment file that names one", "`mlx-lora ls tasks`"
        )
    options = config.parse_options(option)
    about = {"model": name, "task": {"name": task, "options": options}}
    stage = Stage.model_validate(about | more)
    return Request(stage, n or 512, max_tokens or 256)


def evaluate_named(
    asked: Request,
    adapter: Path | None,
    samples: int,
    out: Path | None,
    seed: int,
    console: Console,
    *,
    strength: float = 1.0,
) -> dict[str, Any]:
    """The JSON of `mlx-lora eval`. Names, data and `out` are judged before a model is loaded."""
    refuse_strength(strength, adapted=adapter is not None)
    named = asked.stage.task
    assert named is not None, "a request names a task"
    task = load_task(named.name, named.options)
    if out is not None:
        refuse_occupied(out)
    if task.notice:
        console.print(f"[yellow]Note:[/] {escape(task.notice)}.")
    loaded = asked.load(adapter)
    if adapter:
        files.load(loaded.model, adapter)
        weaken_all(loaded.model, strength)
        for notice in () if asked.stage.quantize else bases.rebuilt(loaded, adapter):
            console.print(f"[yellow]Note:[/] {escape(notice)}.")
    refuse_unfit(loaded, task.load("test", asked.n, 0), asked.max_tokens)
    lines: list[str] = []

    def keep(temperature: float, groups: Sequence[Group]) -> None:
        lines.extend(records(temperature, groups))

    found = evaluate(
        loaded,
        task,
        n=asked.n,
        max_tokens=asked.max_tokens,
        seed=seed,
        group=samples,
        stop=asked.stage.rollout.stop,
        reward_seconds=asked.stage.rollout.reward_seconds,
        width=asked.stage.rollout.width,
        heard=keep,
    )
    if out is not None:
        part = out.with_name(f".{out.name}.part")
        part.write_text("".join(lines), encoding="utf-8")
        part.rename(out)
    return {"task": named.name} | found


def refuse_occupied(out: Path) -> None:
    if out.exists():
        raise RunError(f"{out} exists already", "Nothing was overwritten. Choose another --out.")
    if not out.parent.is_dir():
        raise RunError(f"there is no folder {out.parent} for --out", "Make it, or choose another.")


def records(temperature: float, groups: Sequence[Group]) -> Iterator[str]:
    """A line of JSON for every completion."""
    for problem, group in enumerate(groups):
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            record = {
                "problem": problem,
                "temperature": temperature,
                "prompt": readable(group.sample.prompt),
                "completion": rollout.text,
                "reward": reward.value,
                "reason": reward.reason,
                "parts": dict(reward.parts),
                "tokens": len(rollout.ids),
                "truncated": not rollout.finished,
            }
            yield json.dumps(record, allow_nan=False) + "\n"
