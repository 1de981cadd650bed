"""A user's own rewards and tasks: a local Python file, run as the user's own code."""

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from mlx_lora.errors import TaskError, near
from mlx_lora.problems import question, stamp
from mlx_lora.rewards.score import described
from mlx_lora.types import CORRECT, SCORED, Reward, Sample

GIVEN = ("prompts", "completions")  # what every reward gets; more are the columns of the rows
SIGNATURE = "f(prompts, completions, **columns) -> list[float]"


def find(target: str) -> Any:
    """What `path.py:name` names. TaskError when the file, or the name in it, does not load."""
    path, colon, name = target.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise TaskError(f"{target!r} should be path.py:name, a local file and a name in it")
    file = Path(path).expanduser()
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise TaskError(f"there is no file {path}", near(file.name, beside) if beside else "")
    module = run(str(file.resolve()), stamp(path))
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if isinstance(v, FunctionType)]
        raise TaskError(f"{path} has no {name}", near(name, known))
    return getattr(module, name)


@lru_cache(maxsize=16)
def run(path: str, stamp: tuple[int, int]) -> ModuleType:
    """The module in a file, executed once as long as the file stays as it is.

    Its folder can be imported from, after all others. What it prints goes to stderr.
    """
    file = Path(path)
    name = f"mlx_lora_user_{file.stem}_{abs(hash((path, stamp)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no cache beside their file
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except BaseException as error:  # a file that calls sys.exit too
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TaskError(f"{path} does not load: {described(error)}") from error
    finally:
        sys.dont_write_bytecode = keep
    return module


def is_reward(thing: Any) -> bool:
    """Whether it takes completions, as rewards do."""
    return callable(thing) and "completions" in inspect.signature(thing).parameters


def judged_by(
    function: Callable[..., Any], target: str, columns: Mapping[str, Any], solved: float | None
) -> Callable[[Sample, Sequence[str]], list[Reward]]:
    """A user's function as a judge of a problem's completions.

    `columns` are those of a row: TaskError when the function needs others. A value from `solved` on
    is correct; None: nothing is.
    """
    wanted = accepted(function, target, columns)

    def judge(sample: Sample, completions: Sequence[str]) -> list[Reward]:
        count = len(completions)
        given: dict[str, Any] = {k: [v] * count for k, v in sample.columns.items()}
        given |= {"prompts": [question(sample.prompt)] * count, "completions": list(completions)}
        values = function(**{k: v for k, v in given.items() if wanted is None or k in wanted})
        return [rewarded(v, solved) for v in checked(values, count, target)]

    return judge


def accepted(
    function: Callable[..., Any], target: str, columns: Mapping[str, Any]
) -> frozenset[str] | None:
    """Names of the arguments to give it; None: all there are. TaskError for a wrong signature."""
    parameters = inspect.signature(function).parameters
    kinds = [p.kind for p in parameters.values()]
    taken = sorted(columns.keys() & set(GIVEN))
    if taken:
        raise TaskError(f"a row may not have {', '.join(taken)}: rewards get these from the model")
    if inspect.iscoroutinefunction(function) or inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise TaskError(f"{target} should be a plain function {SIGNATURE}, called by keywords")
    needed = {
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    missing = sorted(needed - {*GIVEN, *columns})
    if missing:
        raise TaskError(
            f"{target} needs {', '.join(missing)}, and the rows have {', '.join(columns) or 'no'} "
            f"columns besides the prompt"
        )
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds
    return None if open_ended else frozenset(parameters)


def checked(values: Any, count: int, target: str) -> list[float]:
    """The values as numbers. TaskError when they are not `count` numbers."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise TaskError(f"{target} returned {values!r:.40}, not a list of numbers,")
    values = list(values)
    if len(values) != count:
        raise TaskError(f"{target} returned {len(values)} values for {count} completions,")
    return [plain(v, target) for v in values]


def plain(value: Any, target: str) -> float:
    """A number of Python's, of NumPy's or in an array without dimensions."""
    value = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value
    if not isinstance(value, Real):
        raise TaskError(f"{target} returned {value!r:.40}, which is no number,")
    return float(value)


def rewarded(value: float, solved: float | None) -> Reward:
    if solved is None:
        return Reward(value, SCORED)
    return Reward(value, CORRECT if value >= solved else "unsolved")
