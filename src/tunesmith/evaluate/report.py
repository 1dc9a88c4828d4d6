"""report.html: one page that shows whether a run helped, from its folder alone. It opens without a network and runs nothing.

Every part may be missing: a run that failed or was stopped says so at the top and shows what there is. What was left out for length
is counted. No torch.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluate.page import (
    Line,
    Mark,
    Markup,
    chart,
    clip,
    el,
    facts_list,
    fold,
    interval_chart,
    join,
    number,
    page,
    row_chart,
    signed,
    smooth,
    stacked,
    swatch,
    table,
)
from tunesmith.evaluate.statistics import FEW_ROWS
from tunesmith.files import write_atomic
from tunesmith.plan.parts import UNCALIBRATED, astray
from tunesmith.run import Run, how_to_load
from tunesmith.wording import counted

CASES, OPEN_CASES = 24, 8  # side-by-side answers on the page, and how many of them are unfolded
SHOWN, MOST = 420, 12_000  # characters of a text before it folds, and at all
REFUSED, REASONS, EVENTS, EVALUATIONS, SOURCES = 40, 30, 60, 200, 30  # rows of each table
LINE_MOST = 1 << 20  # bytes of one line of a jsonl file that are read at all
GIB = 1 << 30
MEANING = "A lower loss means closer in wording to the held-out answers, not that an answer is true."
STATES = {
    "finished": ("finished", "good"), "running": ("still running", "open"), "preparing": ("preparing", "open"),
    "interrupted": ("stopped on request", "open"), "stopped": ("stopped unexpectedly", "bad"), "failed": ("failed", "bad"),
}  # fmt: skip


def write(run_path: Path | str) -> Path:
    """Make `report.html` in the run folder, whatever state it is in; returns its path. RunError when there is no such folder."""
    folder = Path(run_path)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder", "name the `output` folder of a training run")
    found = _Found.read(folder)
    target = folder / "report.html"
    write_atomic(target, page(f"{found.name}: {_verdict(found).word}", _body(found)))
    return target


# ---- what the folder holds -----------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The run folder as far as it can be read. `gaps` names what is missing or damaged."""

    folder: Path
    name: str
    state: str = "unknown"
    message: str = ""
    step: int = 0
    steps: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    account: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> _Found:
        found = cls(folder, folder.resolve().name)
        found.manifest, found.plan = found._object("manifest.json"), found._object("plan.json")
        found.account, found.comparison = found._object("data/account.json"), found._object("comparison.json")
        found.rows, found.samples = found._lines("metrics.jsonl"), found._lines("samples.jsonl")
        found.refused = found._lines("data/refused.jsonl", most=REFUSED)
        found._read_config()
        found._read_status()
        return found

    def _read_config(self) -> None:
        import yaml

        try:
            self.config_text = (self.folder / "run.yaml").read_text("utf-8", "replace")
            loaded = yaml.safe_load(self.config_text)
        except FileNotFoundError:
            self.gaps.append("run.yaml is missing")
            return
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
            self.gaps.append(f"run.yaml cannot be read: {type(e).__name__}")
            return
        self.config = loaded if isinstance(loaded, dict) else {}

    def _read_status(self) -> None:
        raw = self._object("status.json")
        self.state, self.message = str(raw.get("state", "unknown")), str(raw.get("message", ""))
        self.step, self.steps = _count(raw.get("step")), _count(raw.get("steps"))
        if self.state in ("running", "preparing") and (self.folder / "run.yaml").is_file():
            status = Run.open(self.folder).status()  # knows when the writer is gone without a last word
            self.state, self.message = status.state, str(status.message)
        if done := self.kind("step"):
            self.step = max(self.step, _count(done[-1]["step"]))

    def _object(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            self.gaps.append(f"{name} is damaged and was left out")
            return {}
        if not isinstance(value, dict):
            self.gaps.append(f"{name} is no JSON object and was left out")
            return {}
        return value

    def _lines(self, name: str, most: int = 10**9) -> list[dict[str, Any]]:
        rows, bad = [], 0
        try:
            with (self.folder / name).open("rb") as f:
                while len(rows) < most and (line := f.readline(LINE_MOST)):
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        bad += 1
                        continue
                    if isinstance(row, dict):
                        rows.append(row)
        except FileNotFoundError:
            return []
        except OSError as e:
            self.gaps.append(f"{name} cannot be read: {e.strerror}")
        if bad:
            self.gaps.append(f"{name}: {bad} damaged {'line was' if bad == 1 else 'lines were'} left out")
        return rows

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r.get("kind") == kind and _number(r.get("step")) is not None]

    def curve(self, kind: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of each row that has both; what is not finite stays, as nan."""
        out = []
        for row in self.kind(kind):
            if (value := _number(row.get(key))) is not None:
                out.append((float(row["step"]), value))
        return out

    @property
    def method(self) -> str:
        return str(self.config.get("method", "?"))

    @property
    def loss(self) -> dict[str, Any]:
        value = self.comparison.get("loss")
        return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A float from JSON, where nan and inf may stand as text; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str) and value.lower().lstrip("+-") not in ("nan", "inf", "infinity"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(value: Any) -> float | None:
    found = _number(value)
    return found if found is not None and math.isfinite(found) else None


def _count(value: Any) -> int:
    return int(_finite(value) or 0)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# ---- the verdict ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    word: str
    tone: str  # good, bad, open
    say: str
    small: str = ""
    difference: float | None = None
    interval: tuple[float, float] | None = None


def _verdict(found: _Found) -> _Verdict:
    """What the held-out rows say, in one word and one sentence. 'No difference shown' is a result."""
    if found.state == "failed":
        return _Verdict(
            "Failed", "bad", "This run must not be taken for a success, whatever its numbers say.", "See the reason above."
        )
    before, after = _finite(found.loss.get("before")), _finite(found.loss.get("after"))
    if before is not None and after is not None:
        ends = [_number(v) for v in _list(found.loss.get("interval"))]
        move = (
            f"held-out loss {before:.3g} → {after:.3g}"
            if abs(after - before) >= 0.005
            else f"held-out loss {before:.4g} → {after:.4g}"
        )
        lead = "nats per trained token, lower is better"
        if len(ends) != 2 or not all(e is not None and math.isfinite(e) for e in ends):
            return _Verdict(
                "No verdict", "open", f"{move[0].upper()}{move[1:]}, but too few held-out rows to say more.", f"In {lead}."
            )
        lo, hi = ends
        difference = _finite(found.loss.get("difference"))
        difference = after - before if difference is None else difference
        words = f"95 % interval of the difference {signed(lo)} to {signed(hi)}"
        rows = f"{count:,.0f} held-out rows" if (count := _finite(found.loss.get("rows"))) else "held-out rows"
        small = f"In {lead}. Before and after saw the same {rows}, which were never trained on. {MEANING}"
        if seen := _count(found.loss.get("overlap")):
            rest = [_finite(v) for v in _list(found.loss.get("interval_of_the_rest"))]
            small = f"In {lead}. {seen:,} of the {rows} are trained on too, word for word or nearly."
            if hi < 0 and not (len(rest) == 2 and rest[1] is not None and rest[1] < 0):
                say = f"{move[0].upper()}{move[1:]}, but {seen:,} of the {rows} are trained on too: that may be all it shows."
                return _Verdict("No verdict", "open", say, f"In {lead}. Take those rows out of one of the two files.")
            if hi < 0:
                small += f" Without as many of those that gained most the interval is {signed(rest[0])} to {signed(rest[1])}."
        if (_finite(found.loss.get("rows")) or math.inf) < FEW_ROWS:
            more = f"Raise data.held_out: from {FEW_ROWS} rows on a verdict is given."
            say = f"{move[0].upper()}{move[1:]} on only {rows}; {words}. {more}"
            return _Verdict("Few rows", "open", say, small, difference, (lo, hi))
        if hi < 0:
            return _Verdict("Better", "good", f"{move[0].upper()}{move[1:]}; {words}.", small, difference, (lo, hi))
        if lo > 0:
            return _Verdict("Worse", "bad", f"{move[0].upper()}{move[1:]}; {words}.", small, difference, (lo, hi))
        say = f"{move[0].upper()}{move[1:]}; the {words} holds zero, so these rows do not show that tuning changed anything."
        return _Verdict("No difference shown", "open", say, small, difference, (lo, hi))
    curve = [p for p in found.curve("eval", "loss") if math.isfinite(p[1])]
    if len(curve) > 1:
        best = min(curve, key=lambda p: p[1])
        say = f"Held-out loss {curve[0][1]:.3g} at step {curve[0][0]:.0f}, at best {best[1]:.3g} at step {best[0]:.0f}."
        return _Verdict(
            "Not compared", "open", say, "The run ended before the comparison of before and after, so there is no interval."
        )
    if found.state == "finished":
        return _Verdict(
            "Not shown",
            "open",
            "Without held-out rows nothing shows whether the run helped.",
            "Set data.held_out to keep some rows aside.",
        )
    return _Verdict("Nothing to show yet", "open", "No held-out loss was recorded.")


# ---- the page ------------------------------------------------------------------------------------------------------------------


def _body(found: _Found) -> Markup:
    sections = (_head, _banner, _hero, _facts, _extra, _curves, _table, _cases, _during, _data, _cost, _use, _details)
    version = _dict(found.manifest.get("versions")).get("tunesmith", "")
    foot = el("footer", f"Made by Tunesmith {version} from this run folder alone. This page loads nothing and runs nothing.")
    return el("main", [section(found) for section in sections], foot)


def _head(found: _Found) -> Markup:
    label, tone = STATES.get(found.state, (found.state, "open"))
    model = found.manifest.get("base_name") or found.config.get("model") or "an unknown model"
    bits = [f"{model}, {found.method}"]
    if when := found.manifest.get("finished") or found.manifest.get("started"):
        bits.append(str(when)[:16].replace("T", " "))
    return el("header", el("p", "Tunesmith report", class_="brand"), el("h1", clip(found.name, 120)),
              el("p", clip(" · ".join(bits), 300), " · ", el("span", label, class_=f"tag {tone}"), class_="sub"))  # fmt: skip


def _banner(found: _Found) -> Markup | None:
    out = []
    if found.state != "finished":
        label, tone = STATES.get(found.state, (f"in an unknown state ({clip(found.state, 40)})", "open"))
        where = f" at step {found.step:,}" + (f" of {found.steps:,}" if found.steps else "") if found.step else ""
        more = {
            "running": "The figures below are those so far.", "preparing": "Nothing has been trained yet.",
            "interrupted": "Everything is saved: tunesmith train --resume goes on from here.",
            "stopped": "tunesmith train --resume goes on from the newest whole checkpoint.",
            "failed": "What it learned is not to be trusted.",
        }.get(found.state, "")  # fmt: skip
        message = el("p", clip(found.message, 2000)) if found.message else None
        what = f"This run failed{where}." if found.state == "failed" else f"This run is {label}{where}."
        style = "banner" if tone == "bad" else "banner soft"
        out.append(el("div", el("p", el("strong", what), f" {more}"), message, class_=style, role="status"))
    if found.gaps:
        items = [el("li", clip(gap, 300)) for gap in found.gaps[:20]]
        out.append(
            el(
                "div",
                el("p", el("strong", "Some of the run folder could not be read.")),
                el("ul", items, class_="plain"),
                class_="banner soft",
            )
        )
    return join(out) if out else None


def _hero(found: _Found) -> Markup:
    v = _verdict(found)
    picture = None
    if v.interval is not None:
        picture = el(
            "figure", interval_chart("Change in held-out loss", v.difference or 0.0, *v.interval, good="better"), style=None
        )
    words = el(
        "div", el("p", v.word, class_="word"), el("p", v.say, class_="say"), el("p", v.small, class_="note") if v.small else None
    )
    return el("section", words, picture, class_=f"hero {v.tone}", aria_label="Verdict")


def _facts(found: _Found) -> Markup:
    facts: list[tuple[str, str, str]] = []
    before, after = _finite(found.loss.get("before")), _finite(found.loss.get("after"))
    if before is not None and after is not None and max(before, after) < 50:
        facts.append(("perplexity", f"{_three(math.exp(before))} → {_three(math.exp(after))}", "per held-out token"))
    sources = [_dict(s) for s in _list(found.account.get("sources")) if not _dict(s).get("held_out")]
    if sources:
        used = sum(_count(s.get(k)) for s in sources for k in ("used", "fixed", "truncated"))
        used -= (
            0
            if any(_dict(s).get("held_out") for s in _list(found.account.get("sources")))
            else _count(found.account.get("held_out_rows"))
        )
        refused = sum(_count(s.get("refused")) for s in sources)
        facts.append(("rows learned from", f"{used:,}", f"{refused:,} refused" if refused else "none refused"))
    if held := _finite(found.account.get("held_out_rows")) or _finite(found.loss.get("rows")):
        seen = _count(found.loss.get("overlap"))
        facts.append(("rows held out", f"{held:,.0f}", f"{seen:,} of them trained on too" if seen else "never trained on"))
    if found.step:
        facts.append(("optimiser steps", f"{found.step:,}", f"of {found.steps:,} planned" if found.steps > found.step else ""))
    if seconds := _seconds(found):
        rate = _median([v for _, v in found.curve("step", "tokens_per_second") if math.isfinite(v)])
        facts.append(("training time", _clock(seconds), f"{rate:,.0f} tokens a second" if rate else ""))
    if peak := _peak(found):
        facts.append(("peak memory", f"{peak / GIB:.1f} GB", ""))
    return facts_list(facts)


def _curves(found: _Found) -> Markup | None:
    train, held = found.curve("step", "loss"), [p for p in found.curve("eval", "loss") if math.isfinite(p[1])]
    if not train and not held:
        return None
    span = max(5, len(train) // 25)
    lines = [Line(train, "raw"), Line(smooth(train, span), "train")] if len(train) > 12 else [Line(train, "train")]
    lines.append(Line(held, "held", dots=len(held) <= 60))
    later = [p for p in held if p[0] > 0] or held
    marks, words = [], "The loss of training rows per step."
    if later:
        best = min(later, key=lambda p: p[1])
        marks = [Mark(*best, f"best {best[1]:.3g}, step {best[0]:.0f}")]
        words = f"Held-out loss starts at {held[0][1]:.3g} and is lowest at step {best[0]:.0f} with {best[1]:.3g}."
    level = held[0][1] if held and held[0][0] == 0 else None
    charts = [chart("Loss over steps", words, lines, width=w, height=h, style=style, marks=marks, level=level)
              for w, h, style in ((920, 320, "wide"), (380, 280, "narrow"))]  # fmt: skip
    key = [("train", "training rows, smoothed" if len(train) > 12 else "training rows")]
    key += [("held", "held-out rows")] if held else []
    key += [("before", "held-out loss before training (dashed)")] if level is not None else []
    legend = el("ul", [el("li", swatch(style), name) for style, name in key], class_="legend")
    small = []
    for key_, name in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm")):
        if points := found.curve("step", key_):
            small.append(
                el("div", el("h3", name), chart(name, f"{name} over steps.", [Line(points, "plain")], width=440, height=170))
            )
    numbers = None
    if held:
        rows = [(f"{s:,.0f}", f"{v:.4f}", signed(v - held[0][1]) if i else "") for i, (s, v) in enumerate(held[:EVALUATIONS])]
        more = (
            [el("p", f"{len(held) - EVALUATIONS:,} more are in metrics.jsonl.", class_="note")] if len(held) > EVALUATIONS else []
        )
        numbers = fold(
            "Every evaluation in numbers", table(("step", "held-out loss", "since the start"), rows, numbers=(1, 2)), *more
        )
    lost = sum(not math.isfinite(v) for _, v in train)
    note = (
        el("p", f"{lost} steps had a loss that is not finite; they were not applied and are not drawn.", class_="note")
        if lost
        else None
    )
    return el("section", el("h2", "How it learned"), el("p", _reading(found, train, held), class_="note"), legend, *charts, note,
              el("div", small, class_="two") if small else None, numbers)  # fmt: skip


def _reading(found: _Found, train: Sequence[tuple[float, float]], held: Sequence[tuple[float, float]]) -> str:
    """What the curves suggest trying next, where they suggest anything."""
    later = [p for p in held if p[0] > 0]
    if len(later) < 3:
        return "Loss in nats per trained token; lower is better."
    best, last = min(later, key=lambda p: p[1]), later[-1]
    if best == last and later[-2][1] - last[1] > 0.005 * abs(last[1]):
        return "Held-out loss was still falling at the end: more epochs may help."
    if last[1] > best[1] * 1.02 and best[0] < 0.8 * last[0]:
        kept = " Its weights were kept." if _dict(found.config.get("eval")).get("keep_best", True) else ""
        return f"Held-out loss turned up after step {best[0]:.0f}: from there on rows were being learned by heart.{kept}"
    return "Held-out loss has levelled off: more of the same training would change little."


def _table(found: _Found) -> Markup | None:
    """Before and after on the held-out rows, and each row's change where it is known."""
    rows = []
    if _finite(found.loss.get("before")) is not None and _finite(found.loss.get("after")) is not None:
        rows.append(_compared("loss per trained token", found.loss, lower=True))
    for name, value in list(_dict(found.comparison.get("metrics")).items())[:30]:
        if isinstance(value, dict):
            rows.append(_compared(clip(str(name), 80), value, lower=value.get("better") == "lower"))
    if not rows:
        return None
    changes = _changes(found)
    bars: list[Markup] = []
    if len(changes) > 2:
        better, worse = sum(c < 0 for c in changes), sum(c > 0 for c in changes)
        words = (
            f"{better:,} of {len(changes):,} held-out rows became easier for the model, {worse:,} harder. "
            "One bar a row: the change in its loss."
        )
        bars = [el("h3", "Row by row"), el("p", words, class_="note")]
        for width, height, style in ((920, 170, "wide"), (380, 150, "narrow")):
            bars.append(row_chart("Change of each row's loss", changes, width=width, height=height, style=style))
    note = (
        "The interval is a paired bootstrap over held-out rows: how far the difference could move had other rows of the same kind "
        "been held out. It does not cover another seed, nor questions unlike these."
    )
    head = ("held-out rows", "before", "after", "difference", "95 % interval", "")
    return el("section", el("h2", "Before and after"), el("p", note, class_="note"), table(head, rows, numbers=(1, 2, 3, 4)), bars)


def _extra(found: _Found) -> Markup | None:
    """A table that whoever trained put into comparison.json: `title`, `head`, `rows` of text, `note`."""
    extra = _dict(found.comparison.get("table"))
    head = [clip(str(h), 80) for h in _list(extra.get("head"))[:8]]
    rows = [
        [clip(str(v), 80) for v in row] for row in _list(extra.get("rows"))[:30] if isinstance(row, list) and len(row) == len(head)
    ]
    if not head or not rows:
        return None
    note = el("p", clip(str(extra["note"]), 600), class_="note") if extra.get("note") else None
    title = el("h2", clip(str(extra.get("title", "")), 120) or "Checks")
    return el("section", title, note, table(head, rows, numbers=range(1, len(head))))


def _compared(name: str, value: Mapping[str, Any], *, lower: bool) -> tuple[Any, ...]:
    before, after = _finite(value.get("before")), _finite(value.get("after"))
    ends = [_finite(v) for v in _list(value.get("interval"))]
    whole = len(ends) == 2 and None not in ends
    difference = _finite(value.get("difference"))
    if difference is None and before is not None and after is not None:
        difference = after - before
    if not whole:
        tag = el("span", "no interval", class_="tag")
    elif ends[0] <= 0 <= ends[1]:
        tag = el("span", "no difference shown", class_="tag open")
    else:
        good = (ends[1] < 0) == lower
        tag = el("span", "better" if good else "worse", class_=f"tag {'good' if good else 'bad'}")
    span = f"{signed(ends[0])} to {signed(ends[1])}" if whole else "unknown"
    return (
        name,
        *("–" if v is None else f"{v:.3f}" for v in (before, after)),
        "–" if difference is None else signed(difference),
        span,
        tag,
    )


def _changes(found: _Found) -> list[float]:
    """after - before of each held-out row's loss per token: from loss.each, else from the rows that have both."""
    each = _dict(found.loss.get("each"))
    before, after = _list(each.get("before")), _list(each.get("after"))
    pairs = list(zip(before, after, strict=False)) if len(before) == len(after) else []
    if not pairs:
        answered = [_dict(r) for r in _list(found.comparison.get("rows"))]
        pairs = [(_dict(r.get("before")).get("loss"), _dict(r.get("after")).get("loss")) for r in answered]
    both = [(_finite(b), _finite(a)) for b, a in pairs]
    return [a - b for b, a in both if a is not None and b is not None]


def _cases(found: _Found) -> Markup | None:
    rows = [r for r in _list(found.comparison.get("rows")) if isinstance(r, dict)]
    if not rows:
        return None
    shown = [_case(r) for r in rows[:CASES]]
    rest = [fold(f"{len(shown) - OPEN_CASES} more answers", *shown[OPEN_CASES:])] if len(shown) > OPEN_CASES else []
    left = f" {len(rows) - CASES:,} more are in comparison.json." if len(rows) > CASES else ""
    note = f"The same held-out prompts, answered before and after. They are spread evenly over the held-out rows, not picked.{left}"
    return el("section", el("h2", "Side by side"), el("p", note, class_="note"), *shown[:OPEN_CASES], *rest)


def _case(row: Mapping[str, Any]) -> Markup:
    before, after = _dict(row.get("before")), _dict(row.get("after"))
    gold = row.get("gold")
    boxes = [_answer("reference", gold, "")] if gold not in (None, "") else []
    boxes += [_answer("before", before.get("answer"), "was", before.get("loss"), gold),
              _answer("after", after.get("answer"), "after", after.get("loss"), gold)]  # fmt: skip
    same = before.get("answer") == after.get("answer") and before.get("answer") not in (None, "")
    note = el("p", "Both answers are the same.", class_="note") if same else None
    return el("div", _long(row.get("prompt"), "text prompt"), el("div", boxes, class_="three"), note, class_="case")


def _answer(name: str, answer: Any, style: str, loss: Any = None, gold: Any = None) -> Markup:
    value = _finite(loss)
    right = f"loss {value:.2f}" if value is not None else None
    if isinstance(answer, str) and isinstance(gold, str) and answer.strip() == gold.strip() != "":
        right = "equals the reference"
    return el(
        "div", el("h4", el("span", name), el("span", right) if right else None), _long(answer), class_=f"answer {style}".strip()
    )


def _during(found: _Found) -> Markup | None:
    """The sample answers of each evaluation, by prompt: how they changed on the way."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in found.samples:
        prompts.setdefault(str(row.get("index", row.get("prompt", ""))), []).append(row)
    prompts = {k: rows for k, rows in prompts.items() if rows}
    if not prompts:
        return None
    shown = []
    for rows in list(prompts.values())[:6]:
        kept = rows if len(rows) <= 12 else [rows[round(i * (len(rows) - 1) / 11)] for i in range(12)]
        lines = [(f"step {_count(r.get('step')):,}", _long(r.get("answer"))) for r in kept]
        gold = [("reference", _long(rows[0].get("gold")))] if rows[0].get("gold") else []
        shown.append(fold(clip(str(rows[0].get("prompt") or "(no prompt)"), 160), table(("when", "answer"), [*lines, *gold])))
    return el("section", el("h2", "Answers on the way"), el("p", "What the model said at each evaluation.", class_="note"), *shown)


# ---- data ----------------------------------------------------------------------------------------------------------------------

TONES = {"error": "bad", "warning": "open"}
FINDINGS = 40  # kinds of faults that are shown; there are some 30
CLASSES = (("used", "b", "used as they are"), ("fixed", "a", "fixed"), ("truncated", "c", "cut"), ("refused", "e", "refused"))


def _data(found: _Found) -> Markup | None:
    sources = [_dict(s) for s in _list(found.account.get("sources"))]
    if not sources and not found.refused:
        return None
    parts: list[Any] = [el("h2", "What it learned from")]
    if sources:
        parts.append(classes(sources))
        columns = {name: name for name in ("rows", "used", "fixed", "truncated", "refused", "tokens", "trained")} | {
            "truncated": "cut"
        }
        body = [(_named(s), *(f"{_count(s.get(key)):,}" for key in columns)) for s in sources[:SOURCES]]
        parts.append(table(("source", *columns.values()), body, numbers=range(1, 8)))
        parts.append(_notes(found, sources))
        parts.append(findings_table(_list(found.account.get("findings"))))
        parts.append(refusals_table(sources))
    if found.refused:
        body = [
            (clip(_origin(r), 160), clip(str(r.get("reason", "")), 300), _long(r.get("row"), "text", 160)) for r in found.refused
        ]
        first = (
            f"The first {len(body)} refused rows"
            if len(body) >= REFUSED
            else f"The {len(body)} refused rows"
            if len(body) > 1
            else "The refused row"
        )
        parts.append(fold(first, table(("row", "why", "what it holds"), body)))
    return el("section", *parts)


def classes(sources: Sequence[Mapping[str, Any]]) -> Markup:
    """The rows of sources, as an account has them, by what became of them: a bar and its legend."""
    total = {c: sum(_count(s.get(c)) for s in sources) for c, _, _ in CLASSES}
    rows = sum(_count(s.get("rows")) for s in sources)
    legend = [el("li", swatch(style), f"{words}: {total[c]:,}") for c, style, words in CLASSES if total[c] or c == "refused"]
    return join(
        [
            el(
                "p",
                f"Every one of {counted(rows, 'row')} ended in one of these classes; nothing is dropped in silence.",
                class_="note",
            ),
            stacked("Rows by class", [(words, total[c], style) for c, style, words in CLASSES], total=rows),
            el("ul", legend, class_="legend"),
        ]
    )


def _named(source: Mapping[str, Any]) -> str:
    return clip(str(source.get("path", "?")), 120) + (" (held out)" if source.get("held_out") else "")


def _origin(row: Mapping[str, Any]) -> str:
    return f"{row.get('file', '?')}:{row['line']}" if "line" in row else str(row.get("origin", row.get("file", "?")))


def _notes(found: _Found, sources: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How rows were mended and cut, duplicates, and held-out rows that also stand among the training rows."""
    items = []
    for key, word in (("fixes", "fixed"), ("cuts", "cut")):
        counts: dict[str, int] = {}
        for source in sources:
            for name, count in _dict(source.get(key)).items():
                counts[str(name)] = counts.get(str(name), 0) + _count(count)
        items += [
            f"{word}: {clip(name, 200)} ({counted(count, 'row')})"
            for name, count in sorted(counts.items(), key=lambda kv: -kv[1])[:12]
        ]
    a = found.account
    exact, near = _count(a.get("exact_duplicates")), _count(a.get("near_duplicates"))
    if exact or near:
        own = any(source.get("held_out") for source in sources)
        split = "" if own else "; the held-out rows were chosen by group, so none is in both"
        items.append(
            f"{counted(exact, 'row repeats', 'rows repeat')} an earlier one, {near:,} nearly {'does' if near == 1 else 'do'}{split}"
        )
    over, close = _count(a.get("overlap_exact")), _count(a.get("overlap_near"))
    if over or close:
        items.append(
            f"{counted(over, 'held-out row also stands', 'held-out rows also stand')} among the training rows, {close:,} nearly:"
            " the result above is too good by them"
        )
    return el("ul", [el("li", item) for item in items], class_="plain note") if items else None


def findings_table(findings: Sequence[Any]) -> Markup | None:
    """What `check` found in the rows, as account.json has it: nothing secret stands whole in it."""
    rows = [_dict(f) for f in findings][:FINDINGS]
    if not rows:
        return None
    body = []
    for f in rows:
        places = [[str(part) for part in _list(e)[:2]] for e in _list(f.get("examples"))[:3]]
        shown = [el("div", clip(" ".join(filter(None, place)), 240)) for place in places]
        why = el("div", clip(str(f.get("detail") or f.get("why", "")), 240), class_="note")
        what = join([clip(str(f.get("what", f.get("name", "?"))), 120), why])
        severity, count = clip(str(f.get("severity", "")), 20), f"{_count(f.get('count')):,}"
        tag = el("span", severity, class_=f"tag {TONES.get(severity, '')}".strip())
        body.append((what, tag, count, join(shown), clip(str(f.get("fix", "")), 240)))
    head = ("finding", "severity", "rows", "for example", "fix")
    return table(head, body, caption="What was found in the rows, the worst first", numbers=(2,), style="cards")


def refusals_table(sources: Sequence[Mapping[str, Any]]) -> Markup | None:
    merged: dict[str, list[Any]] = {}
    for source in sources:
        for key, value in _dict(source.get("refusals")).items():
            entry = merged.setdefault(str(key), [0, str(_dict(value).get("reason", key)), []])
            entry[0] += _count(_dict(value).get("count"))
            entry[2] += [str(place) for place in _list(_dict(value).get("places"))]
    if not merged:
        return None
    ordered = sorted(merged.values(), key=lambda e: -e[0])
    body = [(clip(reason, 300), f"{count:,}", clip(", ".join(places[:3]), 240)) for count, reason, places in ordered[:REASONS]]
    more = el("p", f"{len(ordered) - REASONS} more reasons are in account.json.", class_="note") if len(ordered) > REASONS else None
    return join([table(("why rows were refused", "rows", "for example"), body, numbers=(1,), style="cards"), more])


# ---- cost, use, details --------------------------------------------------------------------------------------------------------


def _cost(found: _Found) -> Markup | None:
    plan = found.plan
    if not plan:
        return None
    parts: list[Any] = [el("h2", "What it took")]
    held, needs, budget = _finite(found.manifest.get("held_bytes")), _finite(plan.get("needs")), _finite(plan.get("budget"))
    held = held or _peak(found)
    seconds, minutes = _seconds(found), _finite(plan.get("minutes"))
    planned, reached = _finite(plan.get("speed")), _finite(found.manifest.get("tokens_per_second"))
    device = _dict(plan.get("device")).get("name", "")
    rows = []
    if needs is not None:
        gib = f"{held / GIB:.2f} GB" if held else "not measured"
        rows.append(("memory held at most", f"{needs:.2f} GB", gib, f"{held / GIB / needs:.2f}×" if held and needs else "–"))
    if planned is not None:
        tokens = f"{reached:,.0f}" if reached else "too short to tell"
        rows.append(("tokens a second", f"{planned:,.0f}", tokens, f"{reached / planned:.2f}×" if reached and planned else "–"))
    if minutes is not None:
        took = _clock(seconds) if seconds and found.state == "finished" else "not finished"
        ratio = f"{seconds / 60 / minutes:.2f}×" if seconds and minutes and found.state == "finished" else "–"
        rows.append(("time", _clock(minutes * 60), took, ratio))
    words = [f"On {device}" if device else "", f"{plan.get('dtype', '')}", f"activations: {plan.get('activations', '?')}",
             f"at most {_count(plan.get('micro_batch_tokens')):,} tokens at once"]  # fmt: skip
    parts.append(el("p", clip(", ".join(w for w in words if w), 300) + ".", class_="note"))
    if rows:
        parts.append(table(("", "planned", "measured", "ratio"), rows, numbers=(1, 2, 3)))
    on_gpu = _dict(plan.get("device")).get("kind") == "cuda" and _finite(found.manifest.get("held_bytes"))
    off = astray(needs, held / GIB if on_gpu else None, planned, reached)
    parts += [el("div", el("p", f"The plan was off: {said}."), class_="banner soft") for said in off]
    if planned is not None:
        rates = plan.get("measured")
        parts.append(
            el(
                "p",
                clip(f"Planned with rates measured on {rates}." if rates else f"The plan was {UNCALIBRATED}.", 300),
                class_="note",
            )
        )
    components = [
        c for c in map(_dict, _list(plan.get("components"))) if c.get("where") == "device" and (_finite(c.get("bytes")) or 0) > 0
    ][:12]
    if components:
        bar = [(str(c.get("name", "?")), round(float(c["bytes"]) / GIB, 3), "abcdefgh"[i % 8]) for i, c in enumerate(components)]
        parts.append(stacked(f"Planned memory in GB of {number(budget or 0)} GB", bar, total=budget))
        parts.append(
            el("ul", [el("li", swatch(style), f"{clip(name, 60)} {size:.2g} GB") for name, size, style in bar], class_="legend")
        )
    return el("section", *parts)


def _use(found: _Found) -> Markup:
    where = shlex.quote(str(found.config.get("output") or found.name))
    if not (found.folder / "adapter").is_dir() and not (found.folder / "model").is_dir():
        return el("section", el("h2", "How to use it"), el("p", "There is no finished model in this folder yet.", class_="note"),
                  el("pre", el("code", f"tunesmith train --resume {where}/run.yaml")))  # fmt: skip
    shell = f'tunesmith chat {where}\ntunesmith generate {where} --prompt "..."'
    full = found.method == "full"
    if not full:
        shell += f"\ntunesmith merge {where} merged-model        # a plain Hugging Face folder"
    base = str(found.manifest.get("base_name") or found.config.get("model") or "BASE")
    python = how_to_load(str(found.config.get("output") or found.name), full=full, base=base, manifest=found.manifest)
    note = "Ask it the way it was trained: the chat template that it was trained with is in the folder tokenizer/."
    return el("section", el("h2", "How to use it"), el("p", note, class_="note"), el("pre", el("code", shell)),
              fold("In Python, with transformers", el("pre", el("code", python))))  # fmt: skip


def _details(found: _Found) -> Markup | None:
    parts: list[Any] = []
    if events := found.kind("event"):
        rows = [(f"step {_count(e['step']):,}", *_event(e)) for e in events[-EVENTS:]]
        parts.append(fold(f"What happened on the way ({len(events)})", table(("when", "what", ""), rows), open_=len(events) <= 5))
    if found.config_text:
        parts.append(fold("The run file as resolved", el("pre", el("code", clip(found.config_text, 40_000)))))
    if found.manifest:
        rows = [
            (clip(str(k), 80), clip(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False), 1000))
            for k, v in list(found.manifest.items())[:60]
        ]
        parts.append(fold("Versions, fingerprints and the command", table(("", ""), rows)))
    return el("section", el("h2", "The fine print"), *parts) if parts else None


def _event(event: Mapping[str, Any]) -> tuple[str, str]:
    rest = {k: v for k, v in event.items() if k not in ("kind", "step", "what", "message")}
    return clip(str(event.get("what", event.get("message", ""))), 300), clip(", ".join(f"{k} {v}" for k, v in rest.items()), 400)


# ---- small things --------------------------------------------------------------------------------------------------------------


def _long(value: Any, style: str = "text", shown: int = SHOWN) -> Markup:
    """A text as it is; a long one folds, and a very long one is cut, saying by how much."""
    if value is None or value == "":
        return el("p", "(nothing)" if value == "" else "(not recorded)", class_=f"{style} empty")
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(words) <= shown + 100:
        return el("p", words, class_=style, dir="auto")
    rest = words[shown:MOST]
    cut = [el("p", f"{len(words) - MOST:,} more characters are not shown.", class_="note")] if len(words) > MOST else []
    return join(
        [
            el("p", words[:shown].rstrip(), " …", class_=style, dir="auto"),
            fold(f"the other {len(words) - shown:,} characters", el("p", rest, class_=style, dir="auto"), *cut),
        ]
    )


def _seconds(found: _Found) -> float | None:
    if (whole := _finite(found.manifest.get("seconds"))) is not None:
        return whole
    each = [v for _, v in found.curve("step", "seconds") if math.isfinite(v)]
    return sum(each) if each else None


def _peak(found: _Found) -> float | None:
    """Bytes: the manifest's, else the largest that a step recorded."""
    if (whole := _finite(found.manifest.get("peak_bytes"))) is not None:
        return whole
    return max((v for _, v in found.curve("step", "peak_bytes") if math.isfinite(v)), default=None)


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
