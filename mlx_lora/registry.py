"""A table of functions by name. A function's keyword-only arguments are its options."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar, get_type_hints

from mlx_lora.errors import ConfigError, UnknownNameError, near

Function = TypeVar("Function", bound=Callable[..., Any])


class Table(Generic[Function]):
    """Functions of one kind. Adding one is writing it with the decorator in its table's file.

    >>> shapes = Table("shape")
    >>> @shapes.add
    ... def square(*, side: float = 1.0):
    ...     '''A square.'''
    ...     return side**2
    >>> shapes.bind("square", {"side": 3})()
    9.0
    >>> shapes.bind("square", {"sied": 3})
    Traceback (most recent call last):
    mlx_lora.errors.ConfigError: shape square has no option sied. Did you mean side?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, Function] = {}

    def add(self, function: Function) -> Function:
        """Enter a function under its own name."""
        assert function.__doc__, (
            f"{self.kind} {function.__name__} needs a docstring: `ls` prints it"
        )
        assert function.__name__ not in self._functions, f"two entries named {function.__name__}"
        self._functions[function.__name__] = function
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __getitem__(self, name: str) -> Function:
        if name not in self._functions:
            raise UnknownNameError(f"unknown {self.kind} {name!r}", near(name, self._functions))
        return self._functions[name]

    def bind(self, name: str, given: Mapping[str, Any]) -> Callable[..., Any]:
        """The named function with checked options filled in."""
        return partial(self[name], **check_options(f"{self.kind} {name}", self[name], given))


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's options and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(
    owner: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    also: Iterable[str] = (),
) -> dict[str, Any]:
    """Options converted to their annotated types; every problem in one ConfigError.

    `also`: options that the owner takes elsewhere, for a "did you mean".
    """
    known = options(function)
    if not given and inspect.Parameter.empty not in known.values():
        return {}
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(function, include_extras=True)
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in given.items():
        if name not in known:
            problems.append(f"{owner} has no option {name}. {near(name, {*known, *also})}")
            continue
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
            if isinstance(checked[name], float) and math.isnan(checked[name]):
                problems.append(f"{owner}: {name}={value!r}: no comparison with NaN ever holds")
        except ValidationError as error:
            problems += [f"{owner}: {name}={value!r}: {e['msg']}" for e in error.errors()]
    missing = [k for k, v in known.items() if v is inspect.Parameter.empty and k not in given]
    problems += [f"{owner} needs the option {name}" for name in missing]
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def first_line(thing: Any) -> str:
    """The first line of a docstring: what `mlx-lora ls` prints."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]
