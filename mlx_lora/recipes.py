"""`mlx-lora new RECIPE`: a shipped experiment file as the start of one's own. And their list."""

import re
from pathlib import Path

from mlx_lora import config
from mlx_lora.errors import ConfigError, near
from mlx_lora.runlog import atomically


def recipes() -> dict[str, str]:
    """Name of every shipped experiment, and the first sentence of its comment."""
    return {name: first_sentence(path.read_text("utf-8")) for name, path in known().items()}


def known() -> dict[str, Path]:
    return config.shipped()


def first_sentence(text: str) -> str:
    """
    >>> first_sentence("# GRPO on Countdown. More about it.\\n# And more.\\n\\nmodel: demo\\n")
    'GRPO on Countdown.'
    """
    header = " ".join(line.lstrip("# ") for line in comment_of(text).splitlines())
    sentence, stop, _ = header.partition(". ")
    return sentence + stop.strip()


def comment_of(text: str) -> str:
    """The comment that a file begins with."""
    return text.partition("\n\n")[0]


def write(recipe: str, out: Path | None) -> Path:
    """The recipe as a file of one's own, whose comment names that file. Never over another."""
    if recipe not in known():
        raise ConfigError(f"there is no recipe {recipe!r}", near(recipe, known()))
    path = out or Path(f"{recipe}.yaml")
    if path.is_dir():
        path = path / f"{recipe}.yaml"
    if path.exists():
        raise ConfigError(
            f"{path} exists already", "Nothing was overwritten. Give another file with --out."
        )
    text = known()[recipe].read_text("utf-8")
    text = re.sub(rf"configs/{re.escape(recipe)}\.yaml", lambda _: str(path), text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return path
