"""The page of `tunesmith sweep`, drawn from sweep.json: who won, what mattered, each setting's effect, curves. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.evaluate.page import (
    Line,
    Mark,
    Markup,
    chart,
    clip,
    el,
    facts_list,
    fold,
    number,
    page,
    signed,
    swatch,
    table,
    ticks,
)
from tunesmith.files import write_atomic

WIDTH, HEIGHT = 460, 250  # of one setting's picture
SHOWN = 40  # rows of the table that are open
CURVES = 60  # curves drawn, the best ones


def write(found: Mapping[str, Any], path: Path) -> Path:
    write_atomic(path, page(f"sweep: {clip(str(found['model']), 80)}", _body(found)), durable=False)
    return path


def word(row: Mapping[str, Any]) -> str:
    """What became of a trial, in a few words."""
    if row["state"] == "pruned":
        return f"stopped at {row['stopped_at']} %"
    if row["state"] == "failed":
        return f"failed: {clip(str(row['reason']).splitlines()[0] if row['reason'] else 'no reason given', 70)}"
    if not row["ranked"]:
        return "measured on other held-out tokens: not ranked"
    return "the run file" if row["baseline"] else ""


def _body(found: Mapping[str, Any]) -> Markup:
    foot = el("footer", "Made by Tunesmith from sweep.json. This page loads nothing and runs nothing.")
    return el(
        "main",
        _head(found),
        _verdict(found),
        _facts(found),
        _importance(found),
        _effects(found),
        _table(found),
        _curves(found),
        foot,
    )


def _head(found: Mapping[str, Any]) -> Markup:
    tried = "; ".join(f"{a['key']}: {_range(a)}" for a in found["axes"])
    return el(
        "header", el("p", "Tunesmith sweep", class_="brand"), el("h1", clip(str(found["model"]), 80)),
        el("p", f"{found['method']}; {tried}", class_="sub"),
    )  # fmt: skip


def _range(axis: Mapping[str, Any]) -> str:
    if axis["values"]:
        return ", ".join(axis["values"])
    return f"{number(axis['low'])} to {number(axis['high'])}{' (logarithmic)' if axis['log'] else ''}"


def _verdict(found: Mapping[str, Any]) -> Markup:
    first, *rest = found["verdict"]
    return el("section", el("p", first, class_="say"), [el("p", line, class_="note") for line in rest], aria_label="Verdict")


def _facts(found: Mapping[str, Any]) -> Markup:
    rows = found["trials"]
    ways = [(state, sum(row["state"] == state for row in rows)) for state in ("finished", "pruned", "failed")]
    names = {"finished": "finished", "pruned": "stopped early", "failed": "failed"}
    seeds = len(found["seeds"])
    return facts_list(
        [("settings", str(len(rows)), f"of {found['total']}"), *((names[s], str(n), "") for s, n in ways),
         ("seeds", str(seeds), "each setting repeated" if seeds > 1 else "no repeats")]
    )  # fmt: skip


def _importance(found: Mapping[str, Any]) -> Markup | None:
    shares = found["importance"]
    if not shares:
        return None
    rows, width, high = sorted(shares.items(), key=lambda s: -s[1]), 900, 26
    parts: list[Any] = [el("title", "Share of the effect")]
    for i, (key, share) in enumerate(rows):
        y, long = i * high, max(1.0, (width - 320) * share)
        parts.append(el("text", key, x=230, y=y + 17, text_anchor="end", class_="tick"))
        parts.append(el("rect", x=240, y=y + 4, width=round(long, 1), height=high - 8, rx=3, class_="part a"))
        parts.append(el("text", f"{share:.0%}", x=round(248 + long, 1), y=y + 17, class_="tick"))
    words = ", ".join(f"{key} {share:.0%}" for key, share in rows)
    drawn = el("svg", parts, viewBox=f"0 0 {width} {len(rows) * high}", role="img", class_="chart", aria_label=words)
    note = "How much of what sets the best fifth of the settings apart is each one's doing (PED-ANOVA), among those that finished."
    return el("section", el("h2", "What mattered"), el("p", note, class_="note"), drawn)


# ---- one setting's effect --------------------------------------------------------------------------------------------------------


def _effects(found: Mapping[str, Any]) -> Markup:
    drawn = [el("div", el("h3", axis["key"]), effect(axis, found["trials"])) for axis in found["axes"]]
    note = (
        "Each point is a finished setting. Of a list the line goes through the medians, and the bar is the middle half; the other "
        "settings vary along with it. The ring is the run file's own value. A loss far above the others is drawn at the upper edge."
    )
    return el("section", el("h2", "The effect of each setting"), el("p", note, class_="note"), el("div", drawn, class_="two"))


def effect(axis: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], *, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """Held-out loss over one setting's values. Numbers of a wide list lie on a logarithmic axis, words side by side."""
    key, rows = axis["key"], [row for row in trials if row["ranked"]]
    if not rows:
        return el("p", "Nothing finished.", class_="note")
    place, marks = _places(axis, rows)
    losses = sorted(row["loss"] for row in rows)
    top_loss = _ceiling(losses)
    marks_y = ticks(losses[0], top_loss, 4)
    left, right, top, bottom = 58, 18, 14, 34

    def at(x: float, y: float) -> tuple[float, float]:
        y = min(y, marks_y[-1])
        down = top + (marks_y[-1] - y) / (marks_y[-1] - marks_y[0]) * (height - top - bottom)
        return round(left + 14 + x * (width - left - right - 28), 1), round(down, 1)

    parts: list[Any] = [el("title", f"{key}: held-out loss")]
    for y in marks_y:
        v = at(0, y)[1]
        parts.append(el("line", x1=left, x2=width - right, y1=v, y2=v, class_="grid"))
        parts.append(el("text", number(y), x=left - 8, y=v + 4, text_anchor="end", class_="tick"))
    for x, name in marks:
        parts.append(el("text", clip(name, 16), x=at(x, marks_y[0])[0], y=height - 12, text_anchor="middle", class_="tick"))
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(str(row["values"][key]), []).append(row["loss"])
    if axis["values"]:
        middle = sorted((place(value), statistics.median(losses), losses) for value, losses in groups.items())
        for x, _, group in middle:
            if len(group) > 3:
                low, _, high = statistics.quantiles(group, n=4)
                (u, v1), (_, v2) = at(x, low), at(x, high)
                parts.append(el("rect", x=u - 6, y=v2, width=12, height=max(1.5, round(v1 - v2, 1)), rx=6, class_="span good"))
        line = " ".join(f"{u},{v}" for u, v in (at(x, y) for x, y, _ in middle))
        parts.append(el("polyline", points=line, class_="line plain"))
    for row in rows:
        u, v = at(place(str(row["values"][key])), row["loss"])
        parts.append(el("circle", el("title", f"trial {row['number']}: {row['loss']:.4g}"), cx=u, cy=v, r=3.4, class_="dot held"))
        if row["baseline"]:
            parts.append(el("circle", cx=u, cy=v, r=7, class_="ring"))
    words = ", ".join(f"{value} {statistics.median(group):.4g}" for value, group in groups.items())
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", class_="chart", aria_label=clip(f"{key}: {words}", 400))


def _ceiling(losses: Sequence[float]) -> float:
    """The highest loss drawn: a run that diverged must not press all others into one line."""
    middle, low = statistics.median(losses), losses[0]
    edge = middle + 8 * max(middle - low, 0.02 * abs(low), 1e-9)
    return max(y for y in losses if y <= edge)


def _places(axis: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[tuple[float, str]]]:
    """A value's place from 0 to 1, and the marks below the axis."""
    said = list(dict.fromkeys([*axis["values"], *(str(row["values"][axis["key"]]) for row in rows)]))
    try:
        numbers = {value: float(value) for value in said}
    except ValueError:
        numbers = {}
    if not numbers:
        spots = {value: i / max(1, len(said) - 1) if len(said) > 1 else 0.5 for i, value in enumerate(said)}
        return spots.__getitem__, [(x, value) for value, x in spots.items()]
    low, high = min(numbers.values()), max(numbers.values())
    log = low > 0 and (axis["log"] or (bool(axis["values"]) and high / low >= 8))
    scale = math.log if log else float
    span = scale(high) - scale(low) or 1.0

    def place(value: str) -> float:
        return (scale(float(value)) - scale(low)) / span if high > low else 0.5

    if axis["values"]:
        return place, [(place(value), value) for value in said]
    shown = [low * (high / low) ** (i / 4) for i in range(5)] if log else [x for x in ticks(low, high, 4) if low <= x <= high]
    return place, [(place(str(x)), number(float(f"{x:.2g}"))) for x in shown]


# ---- all of them -----------------------------------------------------------------------------------------------------------------


def _table(found: Mapping[str, Any]) -> Markup:
    keys = [axis["key"] for axis in found["axes"]]
    head = ["trial", *short(keys), "held-out loss", "difference", "seconds"]
    rows = [_cells(row, keys) for row in found["trials"]]
    right = range(1 + len(keys), 4 + len(keys))
    parts = [table(head, rows[:SHOWN], numbers=right)]
    if len(rows) > SHOWN:
        parts.append(fold(f"{len(rows) - SHOWN} more", table(head, rows[SHOWN:], numbers=right)))
    if failed := [row for row in found["trials"] if row["state"] == "failed"]:
        parts.append(fold(f"{len(failed)} failed", el("ul", [el("li", f"trial {r['number']}: {r['reason']}") for r in failed])))
    note = (
        "Ranked by the held-out loss of the weights each run ended with. The difference is to the run file's own values; in "
        "brackets its 95 % interval over seeds."
    )
    return el("section", el("h2", "All settings"), el("p", note, class_="note"), parts)


def short(keys: Sequence[str]) -> list[str]:
    """The last part of each key, where those differ."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return last if len(set(last)) == len(last) else list(keys)


def _cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    difference = "-"
    if row["difference"] and not row["baseline"]:
        difference = signed(row["difference"]["mean"])
        if row["difference"]["interval"]:
            low, high = row["difference"]["interval"]
            difference += f" ({signed(low)} to {signed(high)})"
    who = f"{row['number']}, the run file" if row["baseline"] else str(row["number"])
    loss = (
        number_of(row["loss"]) if row["ranked"] else "other tokens" if row["state"] == "finished" else word(row).partition(":")[0]
    )
    seconds = f"{row['seconds']:,.0f}" if row["seconds"] else "-"
    return [who, *(str(row["values"][key]) for key in keys), loss, difference, seconds]


def number_of(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _curves(found: Mapping[str, Any]) -> Markup:
    rows = [row for row in found["trials"] if row["curves"] and row["curves"][0]][:CURVES]
    best = next((row for row in rows if row["place"] == 1), None)
    lines, marks = [], []
    ends = sorted(row["loss"] for row in rows if row["ranked"])
    starts = [row["curves"][0][0][1] for row in rows]
    top = max(max(starts, default=0.0), ends[-1] if ends and ends[-1] < 2 * max(starts, default=1.0) else 0.0)
    for row in reversed(rows):
        points = [(x, min(y, top)) for x, y in row["curves"][0]]
        style = "held" if row is best else "train" if row["baseline"] else "raw"
        lines.append(Line(points, style, dots=row is best))
    if best:
        x, y = best["curves"][0][-1]
        marks = [Mark(x, min(y, top), f"trial {best['number']}")]
    legend = el(
        "ul", [el("li", swatch(style), name) for style, name in (("held", "the best"), ("train", "the run file"))], class_="legend"
    )
    words = "Held-out loss of each setting over the run, in percent"
    drawn = [
        chart("Learning curves", words, lines, width=w, height=h, style=style, marks=marks)
        for w, h, style in ((920, 320, "wide"), (420, 300, "narrow"))
    ]
    note = (
        "Held-out loss over percent of the run, first seed. A curve that ends early was stopped, or failed. Losses above the "
        "untrained model's are drawn at the upper edge."
    )
    return el("section", el("h2", "Learning curves"), el("p", note, class_="note"), legend, drawn)
