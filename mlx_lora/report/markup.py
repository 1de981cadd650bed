"""HTML from Python calls: whatever is not `Html` is escaped, and what hides is made visible."""

import html
import math
import re
from collections.abc import Iterable
from typing import Any

ABSENT = "–"
VOID = frozenset(("meta", "link", "br"))
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)  # control characters, marks that turn the direction of text, invisible ones, lone surrogates


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def visible(text: str) -> str:
    r"""The same text with characters that hide, reorder or break a page spelled out.

    >>> visible("a\x07b\u202ec"), visible("two\nlines")
    ('a⟨07⟩b⟨202E⟩c', 'two\nlines')
    """
    return CONTROL.sub(lambda found: f"⟨{ord(found[0]):02X}⟩", text)


def escaped(thing: Any) -> str:
    """As HTML: None is nothing, lists are joined, plain text is escaped.

    >>> escaped(["<b>", None, Html("<br>"), 3])
    '&lt;b&gt;<br>3'
    """
    if thing is None:
        return ""
    if isinstance(thing, Html):
        return thing
    if isinstance(thing, Iterable) and not isinstance(thing, str):
        return "".join(escaped(x) for x in thing)
    return html.escape(visible(str(thing)))


def tag(name: str, /, *inside: Any, **attributes: Any) -> Html:
    """An element. `class_` is class, `aria_label` is aria-label; None leaves an attribute out.

    >>> tag("p", "1 < 2", class_="x", title=None)
    '<p class="x">1 &lt; 2</p>'
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(visible(str(value)))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{escaped(inside)}</{name}>")


def prose(text: str) -> Html:
    """A sentence, what stands between backticks as code.

    >>> prose("Run `mlx-lora check` where 1 < 2.")
    'Run <code>mlx-lora check</code> where 1 &lt; 2.'
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one backtick has no partner
        return joined(text)
    return joined(*(tag("code", x) if i % 2 else x for i, x in enumerate(parts)))


def joined(*parts: Any) -> Html:
    """Several pieces as one."""
    return Html(escaped(parts))


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str, **kind: Any) -> Html:
    """Rows whose first cell is their heading, under a caption. It scrolls where it is too wide.

    The caption is a paragraph: a real one would be as narrow as its table.
    """
    head = tag("tr", [tag("th", h, scope="col") for h in heads])
    body = [
        tag("tr", [tag("th", c, scope="row") if i == 0 else cell(c) for i, c in enumerate(row)])
        for row in rows
    ]
    whole = tag("table", tag("thead", head), tag("tbody", body), aria_label=caption, **kind)
    wide = tag("div", whole, class_="wide", tabindex="0", role="region", aria_label=caption)
    return joined(tag("p", caption, class_="quiet"), wide)


def cell(inside: Any) -> Html:
    return inside if isinstance(inside, Html) and inside.startswith("<td") else tag("td", inside)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else.

    >>> number(2), number("2"), number(True), number(float("nan"))
    (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def shown(value: Any) -> str:
    """A number in three digits, with thousands; a dash for none.

    >>> shown(0.12345), shown(12345.6), shown(-0.0), shown(None)
    ('0.123', '12,346', '0', '–')
    """
    found = number(value)
    if found is None:
        return ABSENT
    large = 1000 <= abs(found) < 1e12
    return f"{found:,.0f}" if large else f"{found + 0.0:.3g}"


def percent(value: Any) -> str:
    """
    >>> percent(0.3671), percent(None)
    ('36.7%', '–')
    """
    found = number(value)
    return ABSENT if found is None else f"{found:.1%}"
