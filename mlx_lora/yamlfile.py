"""YAML text to plain values, with the place of each, so that errors can point at a line.

Differs from PyYAML's SafeLoader where that surprises people: `1e-5` is a number; `on`, `off`,
`yes`, `no` and dates are text; `010` is ten; a key given twice is an error. Merge keys (`<<`) are
not read. The global loader stays untouched: everything lives in a subclass.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from mlx_lora.errors import ConfigError

DEPTH, NODES = 20, 20_000  # beyond these it is an alias bomb, not an experiment
TAG = "tag:yaml.org,2002:"
DIGITS = "[0-9]+(?:_[0-9]+)*"
REAL = rf"(?:{DIGITS}\.(?:{DIGITS})?|\.{DIGITS})(?:[eE][-+]?[0-9]+)?|{DIGITS}[eE][-+]?[0-9]+"

KeyPath = tuple[str | int, ...]


class Mark(NamedTuple):
    """A place in a file or on the command line; sorts in reading order."""

    line: int
    column: int
    label: str  # what an error starts with: "cfg.yaml:6:3"


class Document(NamedTuple):
    """Values, the place of every one of them, and what is wrong with them already."""

    value: Any
    marks: dict[KeyPath, Mark]
    problems: list[tuple[Mark, str]]


class Kind(NamedTuple):
    """What makes an unquoted word a value of this kind."""

    pattern: re.Pattern[str]
    first: list[str]  # the characters it starts with: PyYAML's index
    convert: Callable[[str], Any]


KINDS = {
    "null": Kind(re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""], lambda _: None),
    "bool": Kind(
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
        list("tTfF"),
        lambda text: {"true": True, "false": False}[text.lower()],
    ),
    "int": Kind(re.compile(rf"[-+]?{DIGITS}\Z"), list("-+0123456789"), int),
    "float": Kind(
        re.compile(rf"(?:[-+]?(?:{REAL}|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z"),
        list("-+.0123456789"),
        lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    ),
}


class Loader(yaml.SafeLoader):
    """SafeLoader with none of YAML 1.1's implicit types but the four kinds above."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's attribute)


class Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _kind in KINDS.items():
    Loader.add_implicit_resolver(TAG + _name, _kind.pattern, _kind.first)
    Dumper.add_implicit_resolver(TAG + _name, _kind.pattern, _kind.first)


def parse(text: str, name: str) -> Document:
    """The document in `text`; `name` is what errors call it. ConfigError when it is not YAML."""
    try:
        root = yaml.compose(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # the last three escape PyYAML on "\UFFFFFFFF" and on thousands of opening brackets
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(
            f"{where}: not valid YAML: {what}",
            "Indent with spaces, put a space after each colon, and quote odd text.",
        ) from error
    document = Document(None, {}, [])
    return document._replace(value=None if root is None else read(root, (), name, document))


def read(node: yaml.Node, path: KeyPath, name: str, document: Document) -> Any:
    """The plain value of a node. Notes the place of each entry: a key's, where it has one."""
    mark = mark_of(node, name)
    document.marks.setdefault(path, mark)
    if len(path) > DEPTH or len(document.marks) > NODES:
        raise ConfigError(
            f"{mark.label}: nested deeper than {DEPTH}, or more than {NODES} values",
            "Does an alias (*name) contain itself?",
        )
    kind = node.tag.removeprefix(TAG)
    if kind not in (*KINDS, "str", "seq", "map"):
        document.problems.append((mark, f"the tag {kind:.60} is not read"))
    elif isinstance(node, yaml.SequenceNode):
        return [read(item, (*path, i), name, document) for i, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        return read_mapping(node, path, name, document)
    elif kind == "str" and sound(node.value):
        return node.value
    else:
        try:
            return KINDS[kind].convert(node.value)
        except (KeyError, ValueError):  # `!!int abc`, or more digits than Python reads
            document.problems.append((mark, f"{node.value!r:.60} is no {kind}"))
    return None


def read_mapping(
    node: yaml.MappingNode, path: KeyPath, name: str, document: Document
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        mark, key = mark_of(key_node, name), key_node.value
        if not isinstance(key, str) or not sound(key):
            document.problems.append((mark, "a key is a plain word, without odd characters"))
        elif key in found:
            first = document.marks[(*path, key)]
            document.problems.append((mark, f"{key}: given twice, first on line {first.line}"))
        else:
            document.marks[(*path, key)] = mark
            found[key] = read(value_node, (*path, key), name, document)
    return found


def sound(text: str) -> bool:
    """Text that files and paths can hold: no NUL, no half of a surrogate pair (by escapes)."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def mark_of(node: yaml.Node, name: str) -> Mark:
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    return Mark(line, column, f"{name}:{line}:{column}")


def option(text: str) -> Any:
    """The value in `-o key=value`: a YAML list, block or quoted text, else one scalar.

    >>> option("1e-5"), option("on"), option("Numbers: {numbers}"), option("[q_proj, v_proj]")
    (1e-05, 'on', 'Numbers: {numbers}', ['q_proj', 'v_proj'])
    """
    if text[:1] in ("[", "{", '"', "'"):
        document = parse(text, "value")
        if document.problems:
            raise ConfigError("\n".join(f"{m.label}: {what}" for m, what in document.problems))
        return document.value
    for kind in KINDS.values():
        if kind.pattern.match(text):
            try:
                return kind.convert(text)
            except ValueError as error:  # more digits than Python reads
                raise ConfigError(str(error)) from error
    if not sound(text):
        raise ConfigError(f"{text!r:.60} is no str")
    return text


def dump(data: Any) -> str:
    """YAML that `parse` reads back as it was."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)
