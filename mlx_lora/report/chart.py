"""Small charts as inline SVG: they follow the page's colours and need neither script nor file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lora.report.markup import Html, joined, shown, tag

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 32
MOST = 240  # points of a line: a phone has no more pixels


@dataclass(frozen=True)
class Line:
    """One series: a line, dots, or a line with dots."""

    label: str
    points: Points
    look: str = "line"  # "line" | "dots" | "both"
    colour: str = "c0"  # a class of the style sheet


@dataclass(frozen=True)
class Frame:
    """The axes: limits in data, and where they lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def across(self, x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * part(x, *self.x)

    def up(self, y: float) -> float:
        low, high = self.y
        if self.log:
            y, low, high = (math.log10(max(v, 1e-300)) for v in (y, low, high))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(part(y, low, high), 0), 1)


def part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str = "step",
    log: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    limit: tuple[float, str] | None = None,
    note: str = "",
) -> Html | None:
    """A figure with its title, a legend where there are several lines, and words for the picture.

    `floor` and `ceiling` hold the y axis; `limit` is a dashed line with its name. None: no points.
    """
    drawn = [Line(s.label, thinned(usable(s.points, log)), s.look, s.colour) for s in lines]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return None
    frame = framed(drawn, log, floor, ceiling)
    inside = [axes(frame, x)]
    if limit and frame.y[0] <= limit[0] <= frame.y[1]:
        inside.append(ruled(frame, *limit))
    inside += [series(s, frame) for s in drawn]
    picture = tag(
        "svg",
        *inside,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=". ".join([title, *(told(s) for s in drawn)]),
    )
    legend = [tag("li", tag("i", class_=key(s)), s.label) for s in drawn if s.label]
    return tag(
        "figure",
        tag("figcaption", title),
        picture,
        tag("ul", legend, class_="legend") if len(legend) > 1 else None,
        tag("p", note, class_="quiet") if note else None,
    )


def key(line: Line) -> str:
    return f"key {'spot ' if line.look == 'dots' else ''}{line.colour}"


def usable(points: Points, log: bool) -> Points:
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and abs(y) < 1e300 and (y > 0 or not log)
    ]


def thinned(points: Points) -> Points:
    """At most MOST points; of each stretch the lowest and the highest stay, so that spikes do."""
    if len(points) <= MOST:
        return points
    size = math.ceil(len(points) / (MOST / 2))
    kept = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        ends = {min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def framed(lines: Sequence[Line], log: bool, floor: float | None, top: float | None) -> Frame:
    """Limits that hold every point, with some air; never of no height."""
    xs, ys = ([p[i] for s in lines for p in s.points] for i in (0, 1))
    low, high = min(ys), max(ys)
    if log:
        low, high = floor or low / 1.3, top or high * 1.3
        return Frame((min(xs), max(xs)), (low, high), True)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - air, high + air
    low = floor if floor is not None and min(ys) >= floor else low
    high = top if top is not None else high
    return Frame((min(xs), max(xs)), (low, max(high, low + 1e-12)))


def axes(frame: Frame, label: str) -> Html:
    """Grid lines with their numbers, and the x axis."""
    parts: list[Html] = []
    for value in decades(*frame.y) if frame.log else ticks(*frame.y, 5):
        y = f"{frame.up(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", plain(value), x=LEFT - 5, y=y, dy="0.32em", text_anchor="end"))
    for value in ticks(*frame.x, 5, whole=True):
        at = f"{frame.across(value):.1f}"
        parts.append(tag("text", plain(value), x=at, y=HEIGHT - BOTTOM + 13, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", label, x=middle, y=HEIGHT - 4, text_anchor="middle"))
    return joined(parts)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers between low and high, about `most`.

    >>> ticks(0, 1, 4), ticks(0, 63, 5, whole=True)
    ([0.0, 0.5, 1.0], [0.0, 20.0, 40.0, 60.0])
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, every other one where there are many; else 1, 2, 5."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if high < 100 * low:
        around = [m * 10.0**e for e in range(first - 2, last + 2) for m in (1, 2, 5)]
        return [v for v in around if low <= v <= high]
    return [10.0**e for e in range(first, last + 1, math.ceil((last - first + 1) / 6))]


def plain(value: float) -> str:
    """
    >>> plain(20000.0), plain(2000.0), plain(0.25), plain(0.0)
    ('20k', '2000', '0.25', '0')
    """
    if 10_000 <= abs(value) < 1e9:
        return f"{value / 1000:g}k"
    return f"{value:.0f}" if 1000 <= abs(value) < 10_000 else f"{value:.3g}"


def series(line: Line, frame: Frame) -> Html:
    places = [(frame.across(x), frame.up(y)) for x, y in line.points]
    parts = []
    if line.look != "dots" and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(tag("polyline", points=path, class_=f"line {line.colour}"))
    if line.look != "line" or len(places) == 1:
        size = 1.6 if line.look == "dots" and len(places) > 40 else 2.6
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        look = "dots faint" if line.look == "dots" else "dots"
        parts.append(tag("path", d=path, class_=f"{look} {line.colour}", stroke_width=2 * size))
    return joined(parts)


def ruled(frame: Frame, value: float, label: str) -> Html:
    y = f"{frame.up(value):.1f}"
    rule = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="limit")
    word = tag("text", label, x=WIDTH - RIGHT, y=y, dy="-0.3em", text_anchor="end", class_="limit")
    return joined(rule, word)


def told(line: Line) -> str:
    """A series in words, for who does not see it."""
    (x0, first), (x1, last) = line.points[0], line.points[-1]
    ys = [y for _, y in line.points]
    name = f"{line.label}: " if line.label else ""
    return (
        f"{name}{shown(first)} at {shown(x0)}, {shown(last)} at {shown(x1)}, "
        f"between {shown(min(ys))} and {shown(max(ys))}"
    )


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]]) -> Html:
    """Shares with their intervals, one under the other, on an axis of per cents."""
    low = min(r[2] for r in rows)
    high = max(r[3] for r in rows)
    low, high = max(0.0, math.floor(low * 10 - 0.5) / 10), min(1.0, math.ceil(high * 10 + 0.5) / 10)
    left, height = 96, 30 * len(rows) + 30

    def at(share: float) -> str:
        return f"{left + (WIDTH - left - 24) * part(share, low, high):.1f}"

    parts = []
    for value in ticks(low, high, 5):
        x, bottom = at(value), height - 26
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=bottom, class_="grid"))
        label = f"{value:.0%}"
        parts.append(tag("text", label, x=x, y=height - 10, text_anchor="middle"))
    for i, (name, value, lower, upper) in enumerate(rows):
        y, colour = 20 + 30 * i, "c0" if i == len(rows) - 1 else "c7"
        parts.append(tag("text", name, x=left - 8, y=y, dy="0.32em", text_anchor="end"))
        parts.append(
            tag("line", x1=at(lower), x2=at(upper), y1=y, y2=y, class_=f"whisker {colour}")
        )
        parts.append(tag("circle", cx=at(value), cy=y, r=4.5, class_=f"dot {colour}"))
    words = "; ".join(f"{n} {v:.1%} ({a:.1%} to {b:.1%})" for n, v, a, b in rows)
    view = f"0 0 {WIDTH} {height}"
    picture = tag("svg", parts, viewBox=view, role="img", aria_label=f"{title}: {words}")
    return tag("figure", tag("figcaption", title), picture)
