"""Where the rows of SFT come from: files, hub datasets. Everything wrong with them at once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_lora.blocks import HfDataset
from mlx_lora.data import Row, lines_of
from mlx_lora.errors import ConfigError
from mlx_lora.formats import Features
from mlx_lora.schema import Stage

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "assets" / "demo_data"
SHOWN = 20  # of the problems of one file
SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
OFFLINE = (
    "Without a network: fetch it where there is one (`hf download --repo-type dataset {name} "
    "--local-dir DIR`), write its rows to DIR/train.jsonl, and give `data: DIR`."
)


@dataclass(frozen=True)
class Source:
    """Rows of one origin, and under which keys they keep what."""

    name: str  # of a file, or a hub dataset with its split
    rows: Sequence[tuple[str, Row]]  # where each stands, for errors, and the row
    features: Features
    unread: Sequence[str] = ()  # a line for each row that could not be read


Sources = Mapping[str, Sequence[Source]]  # by split: train, valid, test


def sources_of(e: Stage) -> Sources:
    """All rows that an SFT stage asks for, each looked at. ConfigError lists what is wrong."""
    blocks = (from_block(block, e) for block in e.hf_dataset)
    found = joined(blocks) if e.hf_dataset else from_data(e)
    found = {split: parts for split, parts in found.items() if e.test or split != "test"}
    problems = [line for parts in found.values() for s in parts for line in shortened(wrong(s, e))]
    problems += [line for split in needed(e) if split not in found for line in absent(split, e)]
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def needed(e: Stage) -> list[str]:
    return [split for split, wanted in (("train", e.train), ("test", e.test)) if wanted]


def absent(split: str, e: Stage) -> list[str]:
    if e.hf_dataset:
        return [f"hf_dataset: {split} is asked for: give {split}_split"]
    return [f"data: {e.data} holds no {split}.jsonl"]


def wrong(source: Source, e: Stage) -> Iterator[str]:
    """What is wrong with a source, a line each."""
    yield from source.unread
    if not source.rows:
        if not source.unread:
            yield f"{source.name} is empty: fill it with rows, or take it away"
        return
    place, first = source.rows[0]
    form = source.features.form_of(first)
    if form is None:
        yield f"{place}: needs {source.features.in_words()}; it has {listed(first)}"
        return
    if form == "text" and e.mask_prompt:
        yield f"{place}: mask_prompt needs a prompt, not a text"
        return
    for where, row in source.rows:
        other = source.features.form_of(row)
        if other != form:
            has = other or f"neither ({listed(row)})"
            yield f"{where}: is {has}, while the first row is {form}: one form in a file"
        elif problem := source.features.problem(row, form):
            yield f"{where}: {problem}"


def listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "no keys"


def shortened(lines: Iterator[str]) -> list[str]:
    """
    >>> shortened(map(str, range(22)))[-2:]
    ['19', '... and 2 more']
    """
    found = list(lines)
    rest = len(found) - SHOWN
    return found[:SHOWN] + ([f"... and {rest} more"] if rest > 0 else [])


def from_data(e: Stage) -> dict[str, list[Source]]:
    """`data`: a file, a folder with train.jsonl and perhaps valid and test, `demo`, or a hub id."""
    features, path = Features.of(e), Path(e.data).expanduser()
    path = DEMO_FOLDER if e.data == DEMO and not path.exists() else path
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS}
        files = {split: file for split, file in files.items() if file.is_file()}
        return {split: [read_file(file, features)] for split, file in files.items()}
    if path.is_file():
        return {"train": [read_file(path, features)]}
    if e.data.count("/") != 1 or e.data.startswith(("/", ".", "~")) or path.suffix:
        raise ConfigError(
            f"data: there is no file or folder {e.data}",
            "Give a .jsonl file, a folder with train.jsonl, or the hub id of a dataset.",
        )
    whole = fetched(e.data, None, "{}")
    names = {s: next((n for n in names if n in whole), None) for s, names in SPLITS.items()}
    return {
        split: [numbered(f"{e.data}[{name}]", whole[name], features)]
        for split, name in names.items()
        if name
    }


def from_block(block: HfDataset, e: Stage) -> dict[str, list[Source]]:
    """One block of `hf_dataset`, with mlx-lm's meaning of its keys."""
    splits = {"train": block.train_split, "valid": block.valid_split} if e.train else {}
    splits |= {"test": block.test_split} if e.test and block.test_split else {}
    features, config = Features.of(block), json.dumps(block.config, sort_keys=True)
    return {
        split: [numbered(f"{block.path}[{at}]", fetched(block.path, at, config), features)]
        for split, at in splits.items()
    }


def joined(parts: Iterator[dict[str, list[Source]]]) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    for part in parts:
        for split, more in part.items():
            found.setdefault(split, []).extend(more)
    return found


def numbered(name: str, rows: Sequence[Row], features: Features) -> Source:
    return Source(name, [(f"{name}:{n}", row) for n, row in enumerate(rows)], features)


def read_file(path: Path, features: Features) -> Source:
    """The rows of a JSONL file, and the lines of it that are no JSON object."""
    rows: list[tuple[str, Row]] = []
    problems: list[str] = []
    for number, line in lines_of(path):
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problems.append(f"{place}: not UTF-8: {error.reason} (byte {error.start + 1})")
            continue
        except json.JSONDecodeError as error:
            problems.append(f"{place}: not JSON: {error.msg} (column {error.colno})")
            continue
        if isinstance(row, dict):
            rows.append((place, row))
        else:
            shown = line.decode().strip()
            problems.append(f"{place}: a row is an object, like {{...}}, not {shown:.20}")
    return Source(str(path), rows, features, problems)


@lru_cache(maxsize=8)
def fetched(name: str, split: str | None, config: str) -> Any:
    """A dataset of the hub, or of another kind that `datasets` knows; by split where none is named.

    ConfigError where the package is missing, or the hub cannot be reached.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{name} is no file or folder here, and hub datasets need the package `datasets`",
            "pip install 'mlx-lora[hub]', or give `data` a folder with train.jsonl.",
        ) from None
    try:
        return datasets.load_dataset(name, split=split, **json.loads(config))
    except Exception as error:  # of many kinds: no such dataset, no such split, no network
        what = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"the dataset {name} could not be loaded: {type(error).__name__}: {what}",
            OFFLINE.format(name=name),
        ) from error
