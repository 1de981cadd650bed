"""What can go wrong at the user's side. Each of these ends a command with exit code 2.

Say what is wrong, what was expected, and what to do next; collect all problems before raising.
"""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input. `hint` says what to do; the message says what is wrong."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def kind(self) -> str:
        """The name shown in `--json` output."""
        return type(self).__name__


class ConfigError(UserError):
    """A key, type or value in an experiment file or an `-o` option."""


class UnknownNameError(UserError):
    """A name that is in none of our tables."""


class ModelError(UserError):
    """A model folder that is missing, incomplete or not loadable."""


class AdapterError(UserError):
    """Adapter keys or files that do not fit the model."""


class TaskError(UserError):
    """A task, its data, or a reward that crashed (never a bad completion)."""


class RewardError(TaskError):
    """A reward that failed, named with its prompt and completion."""


class RunError(UserError):
    """A run folder that exists already, cannot be written, or cannot be resumed."""


class PlatformError(UserError):
    """A Python, macOS or processor that MLX does not support."""


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """A "did you mean" sentence, or the list of what there is.

    >>> near("gausian", ["zero", "gaussian"])
    'Did you mean gaussian?'
    >>> near("xyz", ["zero", "gaussian"])
    'There is: gaussian, zero.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, count, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"There is: {', '.join(names)}." if names else "There is none."


def few(names: Sequence[str], count: int = 3) -> str:
    """The first names of many, and how many there are besides.

    >>> few(["a", "b"]), few(list("abcdefg"), 5)
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
