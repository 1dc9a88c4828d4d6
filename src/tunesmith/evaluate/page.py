"""What a page is made of: elements that escape what they hold, charts drawn as SVG, one style sheet. No script, no network.

`el` is the only way to markup: a child or attribute that is not itself an element is text and is escaped, so nothing that came
out of data can become a tag. The style sheet's hash stands in the page's content security policy, which allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOID = frozenset({"meta", "br", "hr"})
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")
CSS = Path(__file__).with_name("report.css").read_text("utf-8")
POINTS = 400  # of a curve: more than a screen shows; of each stretch the lowest and highest stay


class Markup(str):
    """Text that is markup already. Only `el`, `join` and the page itself make it."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Escaped. Characters that cannot be seen, or turn the reading direction around, are shown by their number."""
    if isinstance(value, Markup):
        return value
    plain = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return Markup(html.escape(INVISIBLE.sub(lambda m: f"\\u{ord(m[0]):04x}", plain), quote=True))


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`el("p", "a < b", class_="note")`. None and False leave a child or attribute out; `_` in an attribute's name is `-`."""
    assert re.fullmatch(r"[a-z][a-zA-Z0-9]*", tag), "tags are ours, never data"
    parts = [
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' if value is not True else f" {name}"
        for name, value in attributes.items()
        if value is not None and value is not False
    ]
    head = f"<{tag}{''.join(parts)}>"
    return Markup(head if tag in VOID else f"{head}{join(children)}</{tag}>")


def join(children: Iterable[Any]) -> Markup:
    out = []
    for child in children:
        if isinstance(child, (list, tuple)):
            out.append(join(child))
        elif child is not None and child is not False:
            out.append(text(child))
    return Markup("".join(out))


def page(title: str, body: Markup) -> str:
    """A whole document. Its policy lets in the one style sheet and nothing else: no script, image, frame, form or request."""
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(CSS)),
    )
    return "<!doctype html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", numbers: Iterable[int] = (), *, style: str | None = None
) -> Markup:
    """A table whose first column names its rows; `numbers` are columns set flush right. Of style `cards` it has one column on a
    phone, and each cell its column's name."""
    right = set(numbers)
    cells = [
        el(
            "tr",
            [
                el(
                    "th" if i == 0 else "td",
                    c,
                    scope="row" if i == 0 else None,
                    class_="n" if i in right else None,
                    data_name=head[i] if style == "cards" else None,
                )
                for i, c in enumerate(row)
            ],
        )
        for row in rows
    ]
    top = el("thead", el("tr", [el("th", h, scope="col", class_="n" if i in right else None) for i, h in enumerate(head)]))
    return el(
        "div",
        el("table", el("caption", caption) if caption else None, top, el("tbody", cells), class_=style),
        class_="scroll",
        tabindex="0",
    )


def clip(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def fold(summary: Any, *content: Any, open_: bool = False) -> Markup:
    return el("details", el("summary", summary), *content, open=open_)


def facts_list(facts: Sequence[tuple[str, str, str]]) -> Markup:
    """A band of numbers: (name, value, a word more)."""
    if not facts:
        return Markup("")
    return el(
        "dl",
        [el("div", el("dt", name), el("dd", value, el("small", small) if small else None)) for name, value, small in facts],
        class_="facts",
    )


# ---- charts ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve: points (x, y) in order of x; not finite ones are left out. `style` is a class of the style sheet."""

    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """One point with words beside it."""

    x: float
    y: float
    words: str


def chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    width: int,
    height: int,
    style: str = "",
    marks: Sequence[Mark] = (),
    level: float | None = None,
) -> Markup:
    """Curves over steps as one SVG. `level` is a dashed line across, such as the loss before training."""
    drawn = [Line(thin(line.points), line.style, line.dots) for line in lines]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + ([level] if level is not None else [])
    if not xs:
        return el("p", f"{title}: nothing was recorded.", class_="note")
    left, right, top, bottom = 52, 14, 12, 30
    y_ticks = ticks(min(ys), max(ys), 5)
    x_lo, x_hi = min(xs), max(max(xs), min(xs) + 1)
    y_lo, y_hi = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_lo) / (x_hi - x_lo) * (width - left - right)
        return round(across, 1), round(top + (y_hi - y) / (y_hi - y_lo) * (height - top - bottom), 1)

    parts = [el("title", title), el("desc", description)]
    for y in y_ticks:
        _, v = at(x_lo, y)
        parts.append(el("line", x1=left, x2=width - right, y1=v, y2=v, class_="grid"))
        parts.append(el("text", number(y), x=left - 8, y=v + 4, text_anchor="end", class_="tick"))
    for x in [x for x in ticks(x_lo, x_hi, max(2, width // 110)) if x_lo <= x <= x_hi]:
        u, _ = at(x, y_lo)
        parts.append(el("text", number(x), x=u, y=height - 10, text_anchor="middle", class_="tick"))
    if level is not None:
        _, v = at(x_lo, level)
        parts.append(el("line", x1=left, x2=width - right, y1=v, y2=v, class_="level"))
    for line in drawn:
        path = " ".join(f"{u},{v}" for u, v in (at(*p) for p in line.points))
        parts.append(el("polyline", points=path, class_=f"line {line.style}"))
        if line.dots:
            for (x, y), (u, v) in ((p, at(*p)) for p in line.points):
                words = el("title", f"step {number(x)}: {y:.4g}")
                parts.append(el("circle", words, cx=u, cy=v, r=3.2, class_=f"dot {line.style}"))
    for mark in marks:
        u, v = at(mark.x, mark.y)
        anchor = "end" if u > width * 0.62 else "start"
        parts.append(el("circle", cx=u, cy=v, r=6.5, class_="ring"))
        above = v > top + 34
        parts.append(
            el(
                "text",
                mark.words,
                x=u + (-11 if anchor == "end" else 11),
                y=v - 11 if above else v + 22,
                text_anchor=anchor,
                class_="mark",
            )
        )
    return el(
        "svg",
        parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_=f"chart {style}".strip(),
        aria_label=f"{title}. {description}",
    )


def interval_chart(title: str, difference: float, lo: float, hi: float, *, good: str) -> Markup:
    """A difference and its interval on an axis with zero: what the verdict says, at a glance. `good` words the better side."""
    width, height, edge, y = 420, 112, 16, 48
    reach = max(abs(lo), abs(hi), abs(difference), 1e-9) * 1.25
    ends = (-reach, reach * 0.45) if hi < 0 else (-reach * 0.45, reach) if lo > 0 else (-reach, reach)

    def at(x: float) -> float:
        return round(edge + (x - ends[0]) / (ends[1] - ends[0]) * (width - 2 * edge), 1)

    tone = "good" if hi < 0 else "bad" if lo > 0 else "open"
    parts = [
        el("title", title),
        el("rect", x=edge, y=24, width=max(0, at(0) - edge), height=56, class_="goodside", rx=4),
        el("line", x1=edge, x2=width - edge, y1=80, y2=80, class_="grid"),
        el("line", x1=at(0), x2=at(0), y1=18, y2=86, class_="zero"),
        el("text", "no change", x=at(0), y=12, text_anchor="middle", class_="tick"),
        el("text", f"← {good}", x=edge + 8, y=37, class_="tick"),
        el("rect", x=at(lo), y=y - 6, width=max(2, at(hi) - at(lo)), height=12, rx=6, class_=f"span {tone}"),
        el("circle", cx=at(difference), cy=y, r=7, class_=f"point {tone}"),
        el("text", signed(difference), x=at(difference), y=y + 24, text_anchor="middle", class_="mark"),
    ]
    for x in ticks(*ends, 4):
        if ends[0] <= x <= ends[1]:
            parts.append(el("text", signed(x), x=at(x), y=98, text_anchor="middle", class_="tick"))
    words = f"{title}: {signed(difference)}, 95 % interval {signed(lo)} to {signed(hi)}"
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", class_="chart interval", aria_label=words)


def row_chart(title: str, changes: Sequence[float], *, width: int, height: int, style: str = "") -> Markup:
    """Each held-out row's change as a bar, from the most improved to the most worsened (loss: below zero is better)."""
    values = sorted(c for c in changes if math.isfinite(c))
    if len(values) > POINTS:  # evenly spaced ranks of the sorted rows: the shape stays
        values = [values[round(i * (len(values) - 1) / (POINTS - 1))] for i in range(POINTS)]
    if not values:
        return Markup("")
    marks = ticks(min(0.0, values[0]), max(0.0, values[-1]), 4)
    left, right, top, bottom = 52, 10, 8, 8

    def at(y: float) -> float:
        return round(top + (marks[-1] - y) / (marks[-1] - marks[0]) * (height - top - bottom), 1)

    parts = [el("title", title)]
    for y in marks:
        parts.append(el("line", x1=left, x2=width - right, y1=at(y), y2=at(y), class_="zero" if abs(y) < 1e-12 else "grid"))
        parts.append(el("text", signed(y), x=left - 8, y=at(y) + 4, text_anchor="end", class_="tick"))
    step = (width - left - right) / len(values)
    for i, value in enumerate(values):
        y, zero = at(value), at(0)
        place = {"x": round(left + i * step, 2), "y": min(y, zero), "width": round(max(step * 0.8, 0.4), 2)}
        parts.append(el("rect", **place, height=round(max(abs(y - zero), 0.6), 1), class_="bar good" if value < 0 else "bar bad"))
    better = sum(v < 0 for v in values)
    words = f"{title}: {better} of {len(values)} bars below zero"
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", class_=f"chart {style}".strip(), aria_label=words)


def stacked(
    title: str, parts: Sequence[tuple[str, float, str]], *, total: float | None = None, width: int = 920, height: int = 26
) -> Markup:
    """One bar of parts (name, size, class). `total` is the bar's whole length where the parts do not fill it."""
    whole = max(total or 0, sum(size for _, size, _ in parts)) or 1
    x, drawn = 0.0, [el("title", title), el("rect", x=0, y=0, width=width, height=height, rx=5, class_="track")]
    for name, size, style in parts:
        share = size / whole * width
        if size > 0:
            place = {"x": round(x, 2), "y": 0, "width": round(max(share - 1.5, 1), 2), "height": height, "rx": 3}
            drawn.append(el("rect", el("title", f"{name}: {number(size)}"), **place, class_=f"part {style}"))
        x += share
    words = f"{title}: " + ", ".join(f"{name} {number(size)}" for name, size, _ in parts)
    return el(
        "svg",
        drawn,
        viewBox=f"0 0 {width} {height}",
        role="img",
        preserveAspectRatio="none",
        class_="chart stacked",
        aria_label=words,
    )


def bin_chart(title: str, bins: Sequence[tuple[str, int, int]], *, width: int, style: str = "") -> Markup:
    """Lying bars: (name, count, count of another kind behind it)."""
    left, right, high = 76, 64, 24
    most = max((a + b for _, a, b in bins), default=0) or 1
    parts = [el("title", title)]
    for i, (name, a, b) in enumerate(bins):
        y, x, middle = i * high, float(left), i * high + high / 2 + 4
        parts.append(el("text", name, x=left - 10, y=middle, text_anchor="end", class_="tick"))
        for count, kind in ((a, "a"), (b, "e")):
            if count:
                long = max((width - left - right) * count / most, 1)
                parts.append(el("rect", x=round(x, 1), y=y + 3, width=round(long, 1), height=high - 6, rx=3, class_=f"part {kind}"))
                x += long
        parts.append(el("text", number(a + b), x=round(x + 8, 1), y=middle, class_="tick"))
    words = f"{title}: " + ", ".join(f"{name} {number(a + b)}" for name, a, b in bins)
    return el(
        "svg", parts, viewBox=f"0 0 {width} {len(bins) * high}", role="img", class_=f"chart {style}".strip(), aria_label=words
    )


def swatch(style: str) -> Markup:
    """The colour of a curve or part, beside its name in a legend."""
    return el(
        "svg",
        el("rect", width=14, height=10, y=1, rx=3, class_=f"part {style}"),
        viewBox="0 0 14 12",
        class_="swatch",
        aria_hidden="true",
    )


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` finite points; of each stretch the lowest and highest, so that no spike is lost."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= most:
        return finite
    size, out = 2 * len(finite) / most, []
    for i in range(most // 2):
        part = finite[round(i * size) : max(round(i * size) + 1, round((i + 1) * size))]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def smooth(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """An exponential average over about `span` points, without the start's bias."""
    keep, out, value, weight = 1 - 2 / (span + 1), [], 0.0, 0.0
    for x, y in points:
        if math.isfinite(y):
            value, weight = keep * value + (1 - keep) * y, keep * weight + (1 - keep)
            out.append((x, value / weight))
    return out


def ticks(lo: float, hi: float, count: int) -> list[float]:
    """Round numbers that enclose lo..hi, about `count` of them."""
    if not hi > lo:
        lo, hi = lo - (abs(lo) or 1) * 0.5, hi + (abs(hi) or 1) * 0.5
    raw = (hi - lo) / max(1, count)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """1,200; 0.35; 2e-5."""
    if not math.isfinite(value):
        return "not finite"
    if value and abs(value) < 1e-3:
        return re.sub(r"e([+-])0*", lambda m: "e-" if m[1] == "-" else "e", f"{value:.1e}".replace(".0e", "e"))
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def signed(value: float) -> str:
    """A true minus sign, and a plus: +0.12, −1.07."""
    if not math.isfinite(value):
        return "unknown"
    words = f"{abs(value):.3f}".rstrip("0").rstrip(".") if abs(value) >= 1e-3 or value == 0 else f"{abs(value):.1e}"
    return words if words == "0" else ("−" if value < 0 else "+") + words
