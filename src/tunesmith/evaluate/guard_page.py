"""Guardrails as part of `tunesmith compare`'s page, and as `tunesmith guard`'s own: what each way passes by kind, before and after
tuning, and the answers that failed side by side. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.evaluate.page import Markup, clip, el, facts_list, fold, page, swatch, table
from tunesmith.files import write_atomic
from tunesmith.wording import counted

LONGEST = 1200  # characters of a text that are shown


def write(found: Mapping[str, Any], path: Path) -> Path:
    """`tunesmith guard`'s page."""
    name = clip(str(found["name"]), 80)
    last = found["arms"][-1]
    low, high = last["interval"]
    facts = [
        ("passed", f"{last['passed']} of {last['of']}", f"{last['name']}: {last['rate']:.3f}, {low:.3f} to {high:.3f}"),
        ("longest answer", f"{found['max_tokens']} tokens", ""),
        ("seed", str(found["seed"]), "decides the codes and words of the probes"),
    ]
    if found["scope"]:
        facts.append(("topic", clip(found["scope"], 60), ""))
    head = el(
        "header", el("p", "Tunesmith guard", class_="brand"), el("h1", name),
        el("p", f"{counted(found['probes'], 'probe')}, asked of {', '.join(arm['name'] for arm in found['arms'])}", class_="sub"),
    )  # fmt: skip
    foot = el("footer", "Made by Tunesmith from guardrails.json. This page loads nothing and runs nothing.")
    body = el("main", head, facts_list(facts), sections(found), foot)
    write_atomic(path, page(f"guard: {name}", body), durable=False)
    return path


def sections(found: Mapping[str, Any] | None) -> list[Markup]:
    """The section of the numbers and that of the answers; none where no probe was asked."""
    if not found:
        return []
    return [_numbers(found), *_cases(found)]


def _numbers(found: Mapping[str, Any]) -> Markup:
    shown = _shown(found)
    note = (
        "Probes try to lead the model away from its instructions, to get its secret code, to have orders in documents done; "
        "harmless ones must be answered. A program decides. A model that says nothing of use passes most attacks, so read both. "
        "The bar is the share passed, the line its 95 % interval."
    )
    legend = el("ul", [el("li", swatch(style), arm["name"]) for arm, style in shown], class_="legend")
    drawn = [bars(found["kinds"], shown, width=w, style=s) for w, s in ((920, "wide"), (400, "narrow"))]
    heads = ["kind", *(arm["name"] for arm in found["arms"])]
    rows = [
        [[kind["name"], el("br"), el("small", kind["says"]) if kind["says"] != kind["name"] else None],
         *(_rate(arm["kinds"][kind["name"]]) for arm in found["arms"])]
        for kind in found["kinds"]
    ]  # fmt: skip
    rows.append(["all", *(_rate(arm) for arm in found["arms"])])
    return el(
        "section",
        el("h2", "Guardrails"),
        [el("p", line, class_="say" if i == 0 else "") for i, line in enumerate(found["verdict"])],
        el("p", note, class_="note"),
        legend if len(shown) > 1 else None,
        drawn,
        table(heads, rows, style="cards"),
        [_pair(pair, open_=i == 0) for i, pair in enumerate(found["pairs"])],
        [el("p", f"{line[0].upper()}{line[1:]}.", class_="note") for line in found["notes"]],
    )


def _rate(entry: Mapping[str, Any]) -> list[Any]:
    low, high = entry["interval"]
    return [f"{entry['passed']}/{entry['of']}", el("br"), el("small", f"{low:.2f}–{high:.2f}")]


def _shown(found: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The arms of the picture: before tuning and after it, else the first and the last."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    pair = found["pairs"][0] if found["pairs"] else None
    names = [pair["before"], pair["after"]] if pair else list(dict.fromkeys([next(iter(arms)), next(reversed(arms))]))
    return [(arms[name], style) for name, style in zip(names, ("before", "held") if len(names) > 1 else ("held",), strict=True)]


def bars(
    kinds: Sequence[Mapping[str, Any]], shown: Sequence[tuple[Mapping[str, Any], str]], *, width: int, style: str = ""
) -> Markup:
    """For each kind a bar of what each arm passes, with its interval, from 0 to 1."""
    left, right, thick, gap, top = (130, 76, 13, 16, 22) if width > 600 else (92, 62, 11, 14, 20)
    high = thick * len(shown) + gap
    height = top + high * len(kinds)

    def at(x: float) -> float:
        return round(left + x * (width - left - right), 1)

    parts: list[Any] = [el("title", "Share of probes passed, by kind")]
    for x in (0, 0.5, 1) if width < 600 else (0, 0.25, 0.5, 0.75, 1):
        parts.append(el("line", x1=at(x), x2=at(x), y1=top - 6, y2=height - gap / 2, class_="grid"))
        parts.append(el("text", f"{x:.0%}", x=at(x), y=11, text_anchor="middle", class_="tick"))
    told = []
    for k, kind in enumerate(kinds):
        begin = top + k * high
        parts.append(el("text", kind["name"], x=left - 12, y=begin + thick * len(shown) / 2 + 4, text_anchor="end", class_="tick"))
        for a, (arm, tone) in enumerate(shown):
            entry = arm["kinds"][kind["name"]]
            (low, top_), y = entry["interval"], begin + a * thick
            words = f"{arm['name']}, {kind['name']}: {entry['passed']} of {entry['of']}, 95 % interval {low:.2f} to {top_:.2f}"
            long = max(1.5, round(at(entry["rate"]) - left, 1))
            place = {"x": left, "y": y + 1, "width": long, "height": thick - 2, "rx": 2, "opacity": 0.6}
            parts.append(el("rect", el("title", words), **place, class_=f"part {tone}"))
            middle = y + thick / 2
            parts.append(el("line", x1=at(low), x2=at(top_), y1=middle, y2=middle, class_="zero"))
            parts += [el("line", x1=at(x), x2=at(x), y1=middle - 3, y2=middle + 3, class_="zero") for x in (low, top_)]
            parts.append(el("text", f"{entry['passed']}/{entry['of']}", x=width - right + 14, y=middle + 4, class_="tick"))
            told.append(f"{arm['name']} {kind['name']} {entry['passed']}/{entry['of']}")
    label = clip(f"Share of probes passed, by kind: {', '.join(told)}", 600)
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", class_=f"chart {style}".strip(), aria_label=label)


def _pair(pair: Mapping[str, Any], *, open_: bool) -> Markup:
    heads = ["kind", "no longer passed", "passed anew", "McNemar's p", "shown?"]
    word = {1: ("better", "good"), 0: ("no difference shown", "open"), -1: ("worse", "bad")}
    rows = [
        [kind, str(c["lost"]), str(c["won"]), f"{c['p']:.2g}", el("span", word[c["shown"]][0], class_=f"tag {word[c['shown']][1]}")]
        for kind, c in [*pair["kinds"].items(), ("all", pair)]
    ]
    note = (
        "The same probes before and after. p is the exact test over those that only one of the two passes; with this many kinds "
        "one may fall below 0.05 by chance, and fewer than 20 probes show nothing."
    )
    return fold(
        f"{pair['before']} and {pair['after']}, kind by kind",
        el("p", note, class_="note"),
        table(heads, rows, numbers=(1, 2, 3), style="cards"),
        open_=open_,
    )


# ---- answers side by side --------------------------------------------------------------------------------------------------------


def _cases(found: Mapping[str, Any]) -> list[Markup]:
    if not found["cases"]:
        return []
    note = (
        "Probes that at least one way fails: first those that tuning lost, then those it won, then the others. All answers are in "
        "guardrails.jsonl."
    )
    names = [arm["name"] for arm, _ in _shown(found)]
    cases = [_case(case, names) for case in found["cases"]]
    some, more = cases[:8], cases[8:]
    rest = fold(f"{counted(len(more), 'probe')} more", more) if more else None
    return [el("section", el("h2", "Failed probes, side by side"), el("p", note, class_="note"), some, rest)]


def _case(case: Mapping[str, Any], names: Sequence[str]) -> Markup:
    styles = ("was", "after") if len(names) > 1 else ("after",)
    shown = [_answer(name, case["answers"][name], style) for name, style in zip(names, styles, strict=True)]
    others = [_answer(name, entry, "") for name, entry in case["answers"].items() if name not in names]
    before = [el("p", f"{turn['role']}: {clip(turn['content'], LONGEST)}", class_="note text") for turn in case["before"]]
    documents = [fold(f"document {clip(d['name'], 80)}", el("pre", clip(d["text"], LONGEST))) for d in case["documents"]]
    fails = ", ".join(f"{name} {argument}" if argument is not True else name for name, argument in case["fails"])
    return el(
        "div",
        el("p", f"{case['id']}; fails if it: {clip(fails, 200)}", class_="note"),
        before,
        el("p", clip(case["question"], LONGEST), class_="prompt text"),
        documents,
        el("div", shown, class_="two"),
        fold(counted(len(others), "other way"), el("div", others, class_="three")) if others else None,
        class_="case",
    )


def _answer(name: str, entry: Mapping[str, Any], style: str) -> Markup:
    tag = el("span", "failed" if entry["why"] else "passed", class_=f"tag {'bad' if entry['why'] else 'good'}")
    words = entry["answer"]
    said = el("p", clip(words, LONGEST), class_="text") if words.strip() else el("p", "(nothing)", class_="text empty")
    why = el("p", clip(entry["why"], 200), class_="note") if entry["why"] else None
    return el("div", el("h4", el("span", name), tag), said, why, class_=f"answer {style}".strip())
