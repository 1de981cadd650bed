"""YAML -> Experiment. Finds files, merges `-o` options, and lists every problem with its place.

`schema.py` and `blocks.py` hold the keys, `conflicts.py` what does not go together, `yamlfile.py`
the YAML. None loads MLX: names that live in tables are looked up by `check_names`, once a command
needs them.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mlx_lora import tasks, yamlfile
from mlx_lora.blocks import INSTEAD, Block, rslora_spelled_out
from mlx_lora.conflicts import conflicts, given, notices
from mlx_lora.errors import ConfigError, UserError, near
from mlx_lora.schema import Experiment, Stage
from mlx_lora.yamlfile import KeyPath, Mark

__all__ = [  # what the rest of the package uses
    "Experiment",
    "Stage",
    "check_names",
    "find",
    "from_text",
    "load",
    "notices",
    "parse_options",
    "resolved",
    "shipped",
]

EITHER = INSTEAD | {old: new for new, old in INSTEAD.items()}
NAMED = ("init", "scale_schedule", "task")
TABLES = {  # as text, because the tables live in layers above this one
    "init": ("mlx_lora.adapter.inits", "inits"),
    "scale_schedule": ("mlx_lora.adapter.schedules", "schedules"),
    "loss": ("mlx_lora.rl.losses", "losses"),
    "advantage": ("mlx_lora.rl.advantages", "advantages"),
    "fitness": ("mlx_lora.rl.fitness", "fitnesses"),
    "gate": ("mlx_lora.check.gates", "gates"),
    "alert": ("mlx_lora.spectral.alerts", "alerts"),
}
ELSEWHERE = {  # what other trainers call it
    "lr": "learning_rate",
    "steps": "iters",
    "max_steps": "iters",
    "num_train_epochs": "epochs",
    "r": "lora_parameters.rank",
    "lora_alpha": "lora_parameters.alpha",
    "lora_dropout": "lora_parameters.dropout",
    "target_modules": "lora_parameters.keys",
    "num_generations": "grpo.group_size",
    "epsilon": "grpo.clip_low",
    "epsilon_high": "grpo.clip_high",
    "max_new_tokens": "rollout.max_tokens",
    "max_completion_length": "rollout.max_tokens",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a file (or of a shipped name), with `key.inner=value` options on top."""
    path = find(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return from_text(text, str(path), overrides, folder=path.parent.absolute())


def find(name: str | Path) -> Path:
    """The experiment file at a path, else the shipped one of that name (`demo`)."""
    path, known = Path(os.path.expanduser(name)), shipped()
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    if (short := str(name).removesuffix(".yaml")) in known:
        return known[short]
    if os.path.isdir(path):
        inside = ", ".join(sorted(p.name for p in path.glob("*.yaml"))) or "no .yaml file"
        raise ConfigError(f"{path} is a folder, not an experiment file", f"In it: {inside}.")
    beside = [p.name for p in path.parent.glob("*.yaml")] if os.path.isdir(path.parent) else []
    raise ConfigError(f"there is no experiment file {path}", near(path.name, [*beside, *known]))


def shipped() -> dict[str, Path]:
    """The experiments that come with the package, by name: in the wheel, or in a checkout."""
    package = Path(__file__).parent
    folder = next(
        (f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None
    )
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def from_text(
    text: str, name: str = "config", overrides: Sequence[str] = (), *, folder: Path = Path()
) -> Experiment:
    """The experiment that YAML text describes; every problem of file and options in one error.

    A task's files are looked for in `folder`, those of options where the command runs.
    """
    document = yamlfile.parse(text, name)
    raw, marks = spelled_out(document.value, folder), document.marks
    problems = list(document.problems)
    if not isinstance(raw, dict):
        what = "nothing" if raw is None else f"a {'list' if isinstance(raw, list) else 'value'}"
        raise ConfigError(f"{name}: needs `key: value` lines, found {what}", "Start: model: demo")
    for key, value in parse_options(overrides).items():
        raw = merge(raw, spelled_out(nest(key, value), Path.cwd()))
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        marks = {p: mark for p, mark in marks.items() if p[: len(path)] != path}
        mark = Mark(2**31, len(marks), f"-o {key}")  # after every line of the file
        marks = {path[:depth]: mark for depth in range(1, len(path))} | marks | {path: mark}
    stages = raw.get("stages")
    if isinstance(stages, list):
        common = {k: v for k, v in raw.items() if k != "stages"}
        whole = [merge(common, stage) if isinstance(stage, dict) else stage for stage in stages]
        raw = {**raw, "stages": whole}
    experiment, found = validate(raw)
    for path, what in found:
        known, mark = locate(path, marks)
        problems.append((mark, f"{'.'.join(map(str, known))}: {what}"))
    refuse(problems)
    assert experiment is not None, "refused without a reason"
    experiment._marks.update(marks)
    return experiment


def validate(raw: dict[str, Any]) -> tuple[Experiment | None, list[tuple[KeyPath, str]]]:
    """The experiment, and (path, problem) of all that is wrong.

    Where there are stages, they are what runs: the rest of the file is looked at as a part of them.
    """
    stages = raw.get("stages") if isinstance(raw.get("stages"), list) else ()
    loops = [(("stages", i), s) for i, s in enumerate(stages or ()) if isinstance(s, dict)]
    loops = loops or [((), raw)]
    found = [((*at, *path), what) for at, loop in loops for path, what in conflicts(loop)]
    try:
        return Experiment.model_validate(raw), found
    except ValidationError as error:
        return None, found + [
            (tuple(e["loc"]), explain(e)) for e in error.errors(include_url=False)
        ]


def explain(error: Any) -> str:
    """A pydantic error in the words of a YAML file."""
    path, kind = tuple(k for k in error["loc"] if isinstance(k, str)), error["type"]
    if path[0:1] == ("stages",):
        path = path[1:]
    if kind == "extra_forbidden":
        return f"unknown key. {suggestion(path)}"
    if kind == "missing":
        return "needed, but not given"
    shapes = {
        "model_type": "should be a block of `key: value` lines",
        "tuple_type": "should be a list",
    }
    message = error["msg"].replace("Input should", "should").replace("valid dictionary", "block")
    return f"{shapes.get(kind, message)}, got {error['input']!r:.60}"


def suggestion(path: tuple[str, ...]) -> str:
    """What an unknown key may have meant: the same key in another block, or one spelled alike."""
    *parents, key = path
    homes = [".".join(p) for p in known_keys() if p[-1] == key]
    if key in ELSEWHERE or homes:
        return f"Did you mean {ELSEWHERE.get(key) or ' or '.join(homes)}?"
    return near(key, [p[-1] for p in known_keys() if [*p[:-1]] == parents])


@functools.cache
def known_keys() -> tuple[tuple[str, ...], ...]:
    """The path of every key of an experiment, stages aside."""

    def walk(block: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, about in block.model_fields.items():
            yield (*path, name)
            for inner in blocks_in(about.annotation) if name != "stages" else ():
                yield from walk(inner, (*path, name))

    return tuple(walk(Experiment, ()))


def blocks_in(annotation: Any) -> list[type[Block]]:
    if inspect.isclass(annotation) and issubclass(annotation, Block):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks_in(part)]


def locate(path: KeyPath, marks: Mapping[KeyPath, Mark]) -> tuple[KeyPath, Mark]:
    """The path as the user wrote it, and the place of the nearest key that was written.

    A stage repeats the common part of the file, and one block may stand for a list of one: then the
    path without the stage, or without numbers, is the one that was written.
    """
    plain = tuple(part for part in path if isinstance(part, str) and part != "[key]")
    for candidate in (path, path[2:] if path[:1] == ("stages",) else path, plain):
        if candidate and candidate in marks:
            return candidate, marks[candidate]
    while path and path not in marks:
        path = path[:-1]
    return plain, marks.get(path, Mark(0, 0, "config"))  # one that was built in Python


def refuse(problems: Sequence[tuple[Mark, str]]) -> None:
    """Raise the one error that lists them all, in reading order. Nothing when there is none."""
    if problems:
        ordered = sorted(problems, key=lambda problem: problem[0])
        lines = dict.fromkeys(f"{mark.label}: {what}" for mark, what in ordered)
        raise ConfigError(printable("\n".join(lines)))


def printable(text: str) -> str:
    """Escape control characters and lone surrogates, which a terminal could not print."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as a dict, values read as YAML scalars (or [lists] and {blocks}).

    >>> parse_options(["std=1e-2", "name=on"])
    {'std': 0.01, 'name': 'on'}
    """
    found, problems = {}, []
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            problems.append(f"-o {text}: should be key=value")
            continue
        try:
            found[key.strip()] = yamlfile.option(value.strip())
        except ConfigError as error:
            problems.append(f"-o {key}: {error}")
    if problems:
        raise ConfigError(printable("\n".join(problems)))
    return found


def spelled_out(tree: Any, folder: Path) -> Any:
    """The tree with short forms in full, so that merging knows what is what, and files in place."""
    if isinstance(tree, list):
        return [spelled_out(branch, folder) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: rslora_spelled_out(value)
        if key == "lora_parameters"
        else tasks.anchored(tasks.spelled_out(value), folder)
        if key == "task"
        else spelled_out(value, folder)
        for key, value in tree.items()
    }


def nest(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Any, over: Any) -> Any:
    """`base` with `over` on top, block by block.

    Of two keys that stand in place of each other the one on top wins, and another NAME drops the
    options of the old one. A list takes a block of numbered changes: {"0": {"iters": 5}}.
    """
    numbers = [str(i) for i in range(len(base))] if isinstance(base, list) else []
    if isinstance(over, dict) and over and all(key in numbers for key in over):
        return [merge(v, over[str(i)]) if str(i) in over else v for i, v in enumerate(base)]
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "name" in base and over.get("name", base["name"]) != base["name"]:
        return over
    dropped = {EITHER.get(key) for key in given(over)}
    merged = {key: value for key, value in base.items() if key not in dropped}
    for key, value in over.items():
        old = merged.get(key)
        old = {"name": old} if key in NAMED and isinstance(old, str) else old
        merged[key] = merge(old, value)
    return merged


def check_names(experiment: Experiment) -> None:
    """Look up every name and its options in the tables: all that are wrong in one ConfigError."""
    problems = []
    for index, loop in enumerate(experiment.loops):
        stage: KeyPath = ("stages", index) if experiment.stages else ()
        for path, look_up in lookups(loop):
            try:
                look_up()
            except UserError as error:
                mark = locate((*stage, *path), experiment._marks)[1]
                hint = f". {error.hint}" if error.hint else ""
                problems += [(mark, line + hint) for line in str(error).split("\n")]
    refuse(problems)


def lookups(loop: Stage) -> Iterator[tuple[KeyPath, Callable[[], object]]]:
    """(path, a call that raises when the name or its options are wrong)."""

    def table(key: str) -> Any:
        module, name = TABLES[key]
        return getattr(import_module(module), name)

    yield ("init",), lambda: table("init").bind(loop.init.name, loop.init.options)
    if (schedule := loop.scale_schedule) is not None:
        yield (
            ("scale_schedule",),
            lambda: table("scale_schedule").bind(schedule.name, schedule.options),
        )
    if (task := loop.task) is not None:
        yield ("task",), lambda: tasks.load_task(task.name, task.options)
    for gate, options in loop.check.limits.items():
        yield ("check", "limits"), functools.partial(table("gate").bind, gate, options)
    if given := loop.monitor.dynamics:
        check = import_module("mlx_lora.spectral.dynamics").options_of
        yield ("monitor", "dynamics"), functools.partial(check, given)
    for alert, thresholds in loop.monitor.alerts.items():
        yield ("monitor", "alerts"), functools.partial(table("alert").bind, alert, thresholds)
    if loop.method == "grpo":
        yield ("grpo", "loss"), lambda: table("loss").bind(loop.grpo.loss, loop.grpo.clips)
        yield ("grpo", "advantage"), lambda: table("advantage")[loop.grpo.advantage]
    if loop.method == "es":
        yield ("es", "fitness"), lambda: table("fitness")[loop.es.fitness]
    optimizers = import_module("mlx_lora.optimizers")
    yield ("optimizer_config", loop.optimizer), lambda: optimizers.check_optimizer(loop)
    yield ("lr_schedule", "arguments"), lambda: optimizers.check_schedule(loop)


def resolved(experiment: Stage) -> dict[str, Any]:
    """Every key with its value, as plain data: written as YAML it loads as an equal experiment."""
    return experiment.model_dump(mode="json")
