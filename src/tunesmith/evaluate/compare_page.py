"""The page of `tunesmith compare`, drawn from compare.json: which way is worth it, how sure, answers side by side. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.evaluate import compare_parts as parts
from tunesmith.evaluate import guard_page
from tunesmith.evaluate.page import Markup, clip, el, facts_list, fold, number, page, signed, table, ticks
from tunesmith.files import write_atomic
from tunesmith.wording import counted

LONGEST = 1200  # characters of a text that are shown


def write(found: Mapping[str, Any], path: Path) -> Path:
    write_atomic(path, page(f"compare: {clip(str(found['name']), 80)}", _body(found)), durable=False)
    return path


def count(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _body(found: Mapping[str, Any]) -> Markup:
    foot = el("footer", "Made by Tunesmith from compare.json. This page loads nothing and runs nothing.")
    return el(
        "main", _head(found), _verdict(found), _facts(found), _picture(found), parts.winners(found), parts.groups(found),
        *_table(found), parts.forgetting(found), parts.citations(found), parts.judge(found), _cases(found),
        guard_page.sections(found.get("guardrails")), _how(found), foot,
    )  # fmt: skip


def _head(found: Mapping[str, Any]) -> Markup:
    ways = ", ".join(arm["name"] for arm in found["arms"])
    return el(
        "header", el("p", "Tunesmith compare", class_="brand"), el("h1", clip(str(found["name"]), 80)),
        el("p", f"{counted(found['rows'], 'held-out question')}, {counted(len(found['arms']), 'way')}: {ways}", class_="sub"),
    )  # fmt: skip


def _verdict(found: Mapping[str, Any]) -> Markup:
    first, *rest = found["verdict"]
    doubts = [el("h3", "What speaks against it"), el("ul", [el("li", d) for d in found["doubts"]], class_="plain")]
    return el(
        "section",
        el("p", first, class_="say"),
        [el("p", line, class_="note") for line in rest],
        doubts if found["doubts"] else None,
        aria_label="Verdict",
    )


def _facts(found: Mapping[str, Any]) -> Markup:
    left = f"{found['left_out']} too long" if found["left_out"] else f"of {found['held_out']} held out"
    facts = [("base model", clip(str(found["model"]).rstrip("/").rsplit("/", 1)[-1], 40), found["method"])]
    facts += [("rows", str(found["rows"]), left), ("decides", found["metrics"][0]["name"], found["metrics"][0]["says"])]
    if loss := found["loss"]:
        before, after = ("-" if loss[k] is None else f"{loss[k]:.3f}" for k in ("before", "after"))
        facts.append(("held-out loss", f"{before} → {after}", f"before and after tuning, {loss['rows']} rows"))
    if (training := found["training"]) and training.get("seconds"):
        facts.append(("training took", f"{training['seconds'] / 60:,.1f} min", str(training.get("device") or "")))
    return facts_list(facts)


# ---- the picture -----------------------------------------------------------------------------------------------------------------


def _picture(found: Mapping[str, Any]) -> Markup:
    first, *rest = found["metrics"]

    def drawn(metric: Mapping[str, Any]) -> list[Markup]:
        return [
            dots(metric["name"], found["arms"], found["recommended"], width=w, style=s) for w, s in ((920, "wide"), (400, "narrow"))
        ]

    note = (
        "The dot is the mean over the rows, the bar its 95 % interval. Bars that overlap may still differ: the same rows were "
        "asked, so the table below compares row by row."
    )
    more = [fold(f"{m['name']}: {m['says']}", drawn(m)) for m in rest]
    return el("section", el("h2", f"{first['name']}: {first['says']}"), el("p", note, class_="note"), drawn(first), more)


def dots(metric: str, arms: Sequence[Mapping[str, Any]], picked: str | None, *, width: int, style: str = "") -> Markup:
    """A dot and its interval for each arm, one below the other."""
    left, right, high, bottom = (170, 70, 34, 30) if width > 600 else (112, 52, 32, 28)
    values = [arm["metrics"][metric] for arm in arms]
    ends = [x for v in values for x in (v["value"], *(v["interval"] or ())) if x is not None and math.isfinite(x)]
    marks = ticks(max(0.0, min(ends)), min(1.0, max(ends)), 5 if width > 600 else 3)
    lo, hi = marks[0], marks[-1]
    height = high * len(arms) + bottom

    def at(x: float) -> float:
        return round(left + (min(max(x, lo), hi) - lo) / (hi - lo) * (width - left - right), 1)

    drawn: list[Any] = [el("title", f"{metric} of each way")]
    for x in marks:
        drawn.append(el("line", x1=at(x), x2=at(x), y1=6, y2=height - bottom, class_="grid"))
        drawn.append(el("text", number(x), x=at(x), y=height - 10, text_anchor="middle", class_="tick"))
    told = []
    for i, (arm, value) in enumerate(zip(arms, values, strict=True)):
        y, tone = i * high + high / 2 + 4, "good" if arm["name"] == picked else "open"
        drawn.append(el("text", arm["name"], x=left - 14, y=y + 4, text_anchor="end", class_="mark" if tone == "good" else "tick"))
        low, top = value["interval"]
        if low is not None and top is not None and math.isfinite(low) and math.isfinite(top):
            place = {"x": at(low), "y": y - 5, "width": max(2, round(at(top) - at(low), 1)), "height": 10, "rx": 5}
            words = el("title", f"{arm['name']}: {value['value']:.3f}, 95 % interval {low:.3f} to {top:.3f}")
            drawn.append(el("rect", words, **place, class_=f"span {tone}"))
        drawn.append(el("circle", cx=at(value["value"]), cy=y, r=6, class_=f"point {tone}"))
        drawn.append(el("text", f"{value['value']:.3f}", x=width - right + 16, y=y + 4, class_="tick"))
        told.append(f"{arm['name']} {value['value']:.3f}")
    label = clip(f"{metric}: {', '.join(told)}", 400)
    return el("svg", drawn, viewBox=f"0 0 {width} {height}", role="img", class_=f"chart {style}".strip(), aria_label=label)


# ---- the tables ------------------------------------------------------------------------------------------------------------------


def _table(found: Mapping[str, Any]) -> list[Markup]:
    names = [m["name"] for m in found["metrics"]]
    rows = [[_name(arm, found), *(_value(arm["metrics"][name]) for name in names)] for arm in found["arms"]]
    gaps = [(arm["name"], gap) for arm in found["arms"] if (gap := arm["metrics"][names[0]].get("to_best"))]
    beside = [[name, _gap(gap), *([_only(gap)] if "p" in gap else []), _word(gap)] for name, gap in gaps]
    binary = found["metrics"][0]["binary"]
    head = ["way", f"{names[0]}, difference", *(["only it right, only the best"] if binary else []), "shown?"]
    note = f"Row by row beside {found['best']}, which is the highest in {names[0]}; in brackets the 95 % interval."
    if binary:
        note += " p is McNemar's exact test over the rows that only one of the two has right."
    seconds = (found["training"] or {}).get("seconds")
    trained = seconds is not None and any(arm["model"] == "tuned" for arm in found["arms"])
    cost_head = ["way", "prompt tokens", "answer tokens", "seconds an answer", "cut at the limit"]
    cost_head += ["training"] * trained

    def costs_of(arm: Mapping[str, Any]) -> list[str]:
        counts = [count(arm["prompt_tokens"]), count(arm["answer_tokens"]), count(arm["seconds"], 2), f"{arm['cut']:.0%}"]
        return [arm["name"], *counts] + ([f"{seconds / 60:,.1f} min" if arm["model"] == "tuned" else "none"] if trained else [])

    cost = [costs_of(arm) for arm in found["arms"]]
    spent = (
        "Means over the rows. A model here writes several answers at a time, and its seconds are the batch's, shared; an "
        "endpoint's are those of one question, on its way and back. Prompt tokens are read anew for each question."
    )
    gaps_table = parts.tight(table(head, beside, numbers=range(1, 2 + binary), style="cards"))
    differences = [el("p", note, class_="note"), gaps_table] if beside else []
    values = parts.tight(table(["way", *names], rows, numbers=range(1, 1 + len(names)), style="cards"))
    costs = parts.tight(table(cost_head, cost, numbers=range(1, 5 + trained), style="cards"))
    return [
        el("section", el("h2", "All numbers"), values, differences),
        el("section", el("h2", "What each costs"), el("p", spent, class_="note"), costs),
    ]


def _only(gap: Mapping[str, Any]) -> str:
    return f"{gap['won']} and {gap['lost']} rows, p {gap['p']:.2g}"


def _name(arm: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    return [arm["name"], " ", el("span", "recommended", class_="tag good")] if arm["name"] == found["recommended"] else arm["name"]


def _value(entry: Mapping[str, Any]) -> Any:
    low, high = entry["interval"]
    if low is None or not math.isfinite(low) or not math.isfinite(high):
        return f"{entry['value']:.3f}"
    return parts.ranged(f"{entry['value']:.3f}", f"{low:.3f} to {high:.3f}")


def _gap(gap: Mapping[str, Any]) -> str:
    low, high = gap["interval"]
    words = signed(gap["difference"])
    known = low is not None and math.isfinite(low) and math.isfinite(high)
    return f"{words} ({signed(low)} to {signed(high)})" if known else words


def _word(gap: Mapping[str, Any]) -> Markup:
    word, tone = {1: ("better", "good"), 0: ("no difference shown", "open"), -1: ("worse", "bad")}[gap["shown"]]
    return el("span", word, class_=f"tag {tone}")


# ---- rows side by side -----------------------------------------------------------------------------------------------------------


def _cases(found: Mapping[str, Any]) -> Markup | None:
    cases = found["cases"]
    if not cases["against"]:
        return None
    counts = f"higher on {cases['won']} rows, lower on {cases['lost']}, the same on {cases['same']}"
    note = f"{cases['of']} beside {cases['against']}: {counts}."
    wins = [_case(case, cases) for case in cases["wins"]] or [el("p", "None.", class_="note")]
    losses = [_case(case, cases) for case in cases["losses"]] or [el("p", "None.", class_="note")]
    return el(
        "section", el("h2", "Where it wins, where it loses"), el("p", note, class_="note"),
        el("h3", f"Most won by {cases['of']}"), wins, el("h3", f"Most lost by {cases['of']}"), losses,
    )  # fmt: skip


def _case(case: Mapping[str, Any], cases: Mapping[str, Any]) -> Markup:
    pair = [(cases["against"], "was"), (cases["of"], "after")]
    shown = [_answer(name, case["answers"][name], kind) for name, kind in pair]
    others = [_answer(name, found, "") for name, found in case["answers"].items() if name not in (cases["of"], cases["against"])]
    written = el("div", el("h4", el("span", "written")), _text(case["gold"]), class_="answer")
    more = fold(counted(len(others), "other way"), el("div", others, class_="three")) if others else None
    return el(
        "div",
        el("p", clip(case["question"], LONGEST), class_="prompt text"),
        el("div", written, shown, class_="three"),
        more,
        class_="case",
    )


def _answer(name: str, found: Mapping[str, Any], kind: str) -> Markup:
    head = el("h4", el("span", name), el("span", f"{found['value']:.2f}"))
    passages = list(dict.fromkeys(found["passages"]))
    read = el("p", f"passages from {clip(', '.join(passages), 160)}", class_="note") if passages else None
    checked = el("p", found["citations"], class_="note") if found.get("citations") else None
    return el("div", head, _text(found["answer"]), read, checked, class_=f"answer {kind}".strip())


def _text(words: str) -> Markup:
    return el("p", clip(words, LONGEST), class_="text") if words.strip() else el("p", "(nothing)", class_="text empty")


def _how(found: Mapping[str, Any]) -> Markup:
    s = found["settings"]
    lines = [
        f"Every way got the same {found['rows']} questions and wrote at most {s['max_tokens']} tokens, "
        + (
            "always the likeliest token."
            if not s["temperature"]
            else f"drawn at temperature {s['temperature']} with seed {s['seed']}."
        ),
        *(f"{n[0].upper()}{n[1:]}." for n in found["notes"]),
    ]
    if any("retrieval" in name for name in s["arms"]):
        lines.append(f"Retrieval: {s['passages']} passages from {s['docs']}; citations are taken off before an answer is scored.")
    if s["endpoint"]:
        lines.append(f"Endpoint: {s['endpoint_model']} at {s['endpoint']}.")
    lines += [f"{m['name']}: {m['says']}." for m in found["metrics"]]
    says = el("ul", [el("li", line) for line in lines], class_="plain")
    prompt = [el("h3", "The system prompt"), el("pre", s["system"])] if s["system"] else None
    return el("section", fold("How it was compared", says, prompt))
