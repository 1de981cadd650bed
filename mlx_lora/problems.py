"""Problems from a JSONL file: rows with a prompt or messages, and all that is wrong with them."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_lora.errors import TaskError, near
from mlx_lora.types import Prompt, Sample

SPLITS = ("train", "test")
ROLES = ("system", "user", "assistant")
LISTED = 10  # problems spelled out
Row = Mapping[str, Any]
Judge = Callable[[Row], str]  # what is wrong with a row, or nothing


@dataclass(frozen=True)
class Problems:
    """Training and held-out problems, and a sentence on how they were parted, if there is one."""

    train: Sequence[Sample]
    test: Sequence[Sample]
    notice: str = ""

    @property
    def first(self) -> Sample:
        return self.load("train" if self.train else "test", 1, 0)[0]

    def load(self, split: str, count: int, seed: int) -> Sequence[Sample]:
        """Up to `count` problems in an order of the seed. All there are where there are fewer."""
        if split not in SPLITS:
            raise TaskError(f"there is no split {split!r}", near(split, SPLITS))
        samples = self.train if split == "train" else self.test
        if not samples:
            raise TaskError("there are problems to test on only", "Give a file to train on.")
        order = list(range(len(samples)))
        random.Random(f"{split}/{seed}").shuffle(order)
        return [samples[i] for i in order[:count]]


def question(prompt: Prompt) -> str:
    """The user's last message: a prompt of one turn is that."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]


def readable(prompt: Prompt) -> str:
    """A prompt for a person: roles and contents of a conversation.

    >>> print(readable((("system", "Be brief."), ("user", "Hi"))))
    system: Be brief.
    user: Hi
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{role}: {content}" for role, content in prompt)


def parted(
    path: str | None,
    test_path: str | None,
    test_share: float,
    *,
    prompt_key: str,
    judge: Judge,
    gold: Callable[[Row], str],
) -> Problems:
    """The problems of one file, a part of them held out, or of two files, or only those to test on.

    `judge` says what is wrong with a row besides its prompt. TaskError lists it all, by line.
    """
    given = [p for p in (path, test_path) if p is not None]
    found = {p: read(p, prompt_key, judge, stamp(p)) for p in given}
    refuse([line for _, wrong in found.values() for line in wrong])
    samples = {
        p: [sample(*row, prompt_key, gold) for row in rows] for p, (rows, _) in found.items()
    }
    if path is None:
        (test,) = samples.values()
        return Problems([], test)
    if test_path is None:
        return held_out(path, samples[path], test_share)
    known = {s.prompt for s in samples[path]}
    shared = sum(s.prompt in known for s in samples[test_path])
    notice = f"{shared:,} of the {len(samples[test_path]):,} problems of {test_path} are in {path}"
    return Problems(samples[path], samples[test_path], notice if shared else "")


def held_out(path: str, samples: Sequence[Sample], share: float) -> Problems:
    """A share of the problems kept for testing, by a hash of the prompt: no order or row moves it.

    Where the share catches none, the problem with the smallest hash.
    """
    limits = {s.prompt: position(s.prompt) for s in samples}
    if len(limits) < 2:
        raise TaskError(f"{path}: needs two different prompts at least, one of them to test on")
    lowest, highest = min(limits.values()), max(limits.values())
    line = min(max(share, lowest), highest - 1e-9)  # neither part is empty
    test = [s for s in samples if limits[s.prompt] <= line]
    train = [s for s in samples if limits[s.prompt] > line]
    return Problems(
        train,
        test,
        f"{len(test):,} of the {len(samples):,} problems of {path} are held out to test",
    )


def position(prompt: Prompt) -> float:
    """A place in [0, 1) from the prompt alone."""
    digest = hashlib.blake2s(readable(prompt).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def stamp(path: str) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        about = Path(path).expanduser().stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


@lru_cache(maxsize=4)  # names are looked up before a run, and the task made after it
def read(
    path: str, prompt_key: str, judge: Judge, stamp: tuple[int, int]
) -> tuple[list[tuple[str, Row]], list[str]]:
    """(file:line, row) of every row, and what is wrong with them."""
    rows, wrong = [], []
    for place, line in lines_of(path):
        try:
            row = json.loads(line, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", None) or str(error)
            wrong.append(f"{place}: not JSON: {what}")
            continue
        faults = list(faults_of(row, prompt_key)) if isinstance(row, dict) else ["not an object"]
        if isinstance(row, dict) and (more := judge(row)):
            faults.append(more)
        wrong += [f"{place}: {fault}" for fault in faults]
        rows.append((place, row))
    if not rows and not wrong:
        wrong.append(f"{path}: is empty: there is no row in it")
    return rows, wrong


def json_rows(path: str) -> list[tuple[str, Row]]:
    """(place, row) of the objects in a JSON list, or in a file of one object a line."""
    lines = list(lines_of(path))
    wrong: list[str] = []
    rows: list[tuple[str, Any]] = []
    if lines and lines[0][1].lstrip().startswith("["):
        whole = [(path, "\n".join(text for _, text in lines))]
    else:
        whole = lines
    for place, text in whole:
        try:
            found = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            wrong.append(f"{place}: not JSON: {getattr(error, 'msg', None) or error}")
            continue
        many = isinstance(found, list)
        rows += (
            [(f"{place}[{i}]", row) for i, row in enumerate(found)] if many else [(place, found)]
        )
    wrong += [f"{place}: not an object" for place, row in rows if not isinstance(row, dict)]
    if not rows and not wrong:
        wrong.append(f"{path}: is empty: there is no row in it")
    refuse(wrong)
    return rows


def lines_of(path: str) -> Iterator[tuple[str, str]]:
    """(file:line, text) of the lines that hold something."""
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text (byte {error.start}): {error.reason}") from error
    except OSError as error:
        beside = [p.name for p in file.parent.glob("*.jsonl")] if file.parent.is_dir() else []
        hint = near(file.name, beside) if beside else "Give the path of a .jsonl file."
        raise TaskError(f"{path}: cannot be read: {error.strerror}", hint) from error
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold U+2028
        if line.strip():
            yield f"{path}:{number}", line


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def faults_of(row: Row, prompt_key: str) -> Iterator[str]:
    """What is wrong with the prompt or the messages of a row."""
    prompt, messages = row.get(prompt_key), row.get("messages")
    if prompt is not None and messages is not None:
        yield f"give `{prompt_key}` or `messages`, not both"
    elif messages is not None:
        yield from faults_of_messages(messages)
    elif prompt is None:
        keys = ", ".join(row) or "nothing"
        yield f"needs `{prompt_key}` or `messages`, has {keys:.80} (prompt_key names another)"
    elif not isinstance(prompt, str):
        yield f"`{prompt_key}` should be text, is {prompt!r:.40}"
    else:
        yield from faults_of_text(prompt_key, prompt)


def faults_of_messages(messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield "`messages` should be a list of {role, content}"
        return
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            yield f"{at} should be {{role, content}} with text in it, is {message!r:.40}"
            return
        role = message.get("role")
        if role not in ROLES:
            yield f"{at}: the role should be one of {', '.join(ROLES)}, is {role!r:.40}"
        elif role == "system" and number:
            yield f"{at}: a system message comes first"
        yield from faults_of_text(at, message["content"])
    last = messages[-1].get("role")
    if last == "assistant":
        yield (
            "the last message is the assistant's, which the model is to write: leave it out, or "
            "move it to `answer`"
        )
    elif last == "system":
        yield "the last message should be the user's"


def faults_of_text(key: str, text: str) -> Iterator[str]:
    if not text.strip():
        yield f"`{key}` is empty"
    elif any("\ud800" <= c <= "\udfff" for c in text):
        yield f"`{key}` holds half of a surrogate pair"


def refuse(wrong: Sequence[str]) -> None:
    """TaskError with the first of these and how many there are."""
    if len(wrong) > LISTED:
        raise TaskError("\n".join([*wrong[:LISTED], f"... {len(wrong):,} problems in all"]))
    if wrong:
        raise TaskError("\n".join(wrong))


def sample(place: str, row: Row, prompt_key: str, gold: Callable[[Row], str]) -> Sample:
    prompt: Prompt = (
        row[prompt_key]
        if row.get(prompt_key) is not None
        else tuple((m["role"], m["content"]) for m in row["messages"])
    )
    return Sample(prompt, {k: v for k, v in row.items() if k != prompt_key}, gold(row), place)
