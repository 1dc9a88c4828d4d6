"""Parts of the page of `tunesmith compare`: who wins what, groups of rows, citations, what was forgotten, the judge. No torch.

Each takes compare.json and gives a section, or None where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.evaluate.page import Markup, clip, el, fold, number, signed, stacked, swatch, table, ticks

Found = Mapping[str, Any]


def tight(shown: Markup) -> Markup:
    """A table of many numbers: an interval may stand below its value."""
    return el("div", shown, class_="tight")


def ranged(value: str, interval: str) -> list[Any]:
    """A value and its interval, which may stand below it but is not torn."""
    return [value, " ", el("span", f"({interval})", class_="nb")]


def share(entry: Any, digits: int = 0) -> str:
    """A share of {value, interval}, or of a number; `-` where there is none."""
    if entry is None:
        return "-"
    if not isinstance(entry, Mapping):
        return f"{entry:.{digits}%}"
    text = f"{entry['value']:.{digits}%}"
    return f"{text} ({entry['interval'][0]:.{digits}%} to {entry['interval'][1]:.{digits}%})" if _known(entry["interval"]) else text


def _shares(*entries: Any) -> list[Any]:
    """Cells of a table."""
    cells: list[Any] = []
    for entry in entries:
        value, bracket, interval = share(entry).partition(" (")
        cells.append(ranged(value, interval.rstrip(")")) if bracket else value)
    return cells


def _known(interval: Sequence[float | None] | None) -> bool:
    return interval is not None and all(x is not None and math.isfinite(x) for x in interval)


def _tag(shown: int, better: str = "better", worse: str = "worse") -> Markup:
    word, tone = {1: (better, "good"), 0: ("no difference shown", "open"), -1: (worse, "bad")}[shown]
    return el("span", word, class_=f"tag {tone}")


# ---- who wins what ---------------------------------------------------------------------------------------------------------------


def winners(found: Found) -> Markup | None:
    if len(found["winners"]) < 2:
        return None
    arms = [arm["name"] for arm in found["arms"]]
    rows = []
    for w in found["winners"]:
        cells: list[Any] = [w["metric"]]
        for name in arms:
            value = next(a for a in found["arms"] if a["name"] == name)["metrics"][w["metric"]]["value"]
            text = "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
            tone = "good" if name == w["best"] and (w["value"] or 0) > 0 else "open" if name in w["level"] else None
            cells.append(el("span", text, class_=f"tag {tone}") if tone else text)
        rows.append(cells)
    note = "Green: the highest. Amber: not shown to be worse than it. The rest are shown to be worse, row by row."
    if not all(arm["weighed"] for arm in found["arms"]):
        note += " Not weighed here: an endpoint, the price and privacy of which are yours to judge."
    says = el("ul", [el("li", w["says"]) for w in found["winners"]], class_="plain")
    heard = found["adherence"]
    return el(
        "section", el("h2", "Which way wins what"), el("p", note, class_="note"),
        tight(table(["measure", *arms], rows, numbers=range(1, 1 + len(arms)), style="cards")), says,
        el("p", _heard(heard), class_="note") if heard else None,
    )  # fmt: skip


def _heard(heard: Found) -> str:
    others, damaged = (share({"value": heard[k]["accuracy"], "interval": heard[k]["interval"]}, 1) for k in ("others", "damaged"))
    text = (
        f"adherence: a classifier learned {heard['rows']} written training answers against the base's answers to the same "
        f"questions, and against the written ones damaged (a piece, words shuffled). Unseen ones of the base it tells "
        f"in {others}, damaged ones in {damaged}. It takes {heard['written']:.0%} of the written held-out answers for the house's."
    )
    if not heard["measured"]:
        return f"{text} That is too little to measure with, so adherence is left out."
    return text if heard["whole"] else f"{text} It cannot tell damaged ones and learned without them: a piece counts as an answer."


# ---- groups ----------------------------------------------------------------------------------------------------------------------


def groups(found: Found) -> Markup | None:
    grouped = found.get("groups")
    if not grouped:
        return None
    names = [m["name"] for m in found["metrics"]]
    arms = [arm["name"] for arm in found["arms"]]

    def of(name: str) -> Markup:
        rows = []
        for group in grouped["groups"]:
            cells = [group["arms"][arm][name] for arm in arms]
            count = max((c["rows"] for c in cells), default=0)
            if count:
                rows.append([f"{clip(group['value'], 60)} ({count})", *(_cell(c) for c in cells)])
        return tight(table([f"{grouped['by']} (rows)", *arms], rows, numbers=range(1, 1 + len(arms)), style="cards"))

    head = el("h2", f"By {grouped['by']}")
    note = "Means over the rows of each group; hold a few rows' numbers for little. compare.json has the intervals."
    more = [el("div", el("h3", name), of(name)) for name in names]
    return el("section", head, el("p", note, class_="note"), more)


def _cell(entry: Found) -> str:
    value = entry["value"]
    return "-" if value is None or not entry["rows"] or not math.isfinite(value) else f"{value:.3f}"


# ---- citations -------------------------------------------------------------------------------------------------------------------


def citations(found: Found) -> Markup | None:
    cites = found["citations"]
    if not cites:
        return None
    silent = cites["gold"] is not None
    head = ["way", "answers that cite", "citations", "exist", "support their sentence", "sentences supported", "withheld"]
    head += ["of unanswerable", "of answerable"] * silent
    rows = [
        [name, *_shares(a["cites"]), str(a["citations"]), *_shares(a["exist"], a["precision"], a["supported"], a["withheld"]),
         *(_shares(a["abstained"], a["refused"]) if silent else [])]
        for name, a in cites["arms"].items()
    ]  # fmt: skip
    note = (
        "A citation [n] must exist, and the words of its passage must support its sentence. An answer no sentence of which is "
        "supported would be withheld: “The documents do not answer this.”"
    )
    if silent:
        note += f" Which questions they answer is known from the rows' {cites['gold']}: answers to the others should be withheld."
    searched = _search(cites)
    return el(
        "section", el("h2", "Passages and citations"), searched, el("p", note, class_="note"),
        tight(table(head, rows, numbers=range(1, len(head)), style="cards")),
        el("ul", [el("li", line) for line in cites["says"]], class_="plain") if cites["says"] else None,
    )  # fmt: skip


def _search(cites: Found) -> list[Markup]:
    ranking = cites["ranking"]
    if not ranking:
        return []
    head = [*(f"hit@{k}" for k in ranking["hit"]), "MRR", "nDCG@10"]
    mrr = ranking["mrr"]
    value: Any = f"{mrr['value']:.3f}"
    if _known(mrr["interval"]):
        value = ranged(value, f"{mrr['interval'][0]:.3f} to {mrr['interval'][1]:.3f}")
    row = [*_shares(*ranking["hit"].values()), value, f"{ranking['ndcg']['10']:.3f}"]
    note = f"Was a right passage among the first k? {ranking['questions']} questions, by the rows' {cites['gold']}."
    return [
        el("p", note, class_="note"),
        tight(table(["", *head], [["search", *row]], numbers=range(1, 1 + len(head)), style="cards")),
    ]


# ---- what was forgotten ----------------------------------------------------------------------------------------------------------


def forgetting(found: Found) -> Markup | None:
    forgot = found["forgetting"]
    if not forgot:
        return None
    parts: list[Any] = [el("h2", "What was forgotten")]
    note = (
        "The base and the tuned model on tasks that have nothing to do with the rows, document by document. Bits per byte: "
        "how many bits a byte of the text costs the model, lower is better."
    )
    parts.append(el("p", note, class_="note"))
    parts.append(el("ul", [el("li", line) for line in forgot["says"]], class_="plain"))
    for e in forgot["tasks"]:
        shown = [{"name": e["task"], **e}, *e.get("groups", ())]
        if all(_known(s["interval"]) for s in shown):
            parts += [changes(e, shown, width=w, style=s) for w, s in ((920, "wide"), (400, "narrow"))]
    rows = []
    for e in forgot["tasks"]:
        of = f"{e['documents']}" + (f" of {e['of']}" if e["of"] > e["documents"] else "")
        rows.append([e["task"], e["measure"], of, f"{e['before']:.3f}", f"{e['after']:.3f}", _change(e), _tag(e["shown"])])
        rows += [
            [f"- {g['name']}", "", str(g["documents"]), f"{g['before']:.3f}", f"{g['after']:.3f}", _change(g), ""]
            for g in e.get("groups", ())
        ]
    head = ["task", "measure", "documents", "before", "after", "difference", "shown?"]
    parts.append(fold("All numbers", table(head, rows, numbers=(2, 3, 4, 5), style="cards")))
    parts.append(el("ul", [el("li", n) for n in forgot["notes"]], class_="plain") if forgot["notes"] else None)
    return el("section", parts)


def _change(e: Found) -> str:
    low, high = e["interval"]
    return f"{signed(e['difference'])} ({signed(low)} to {signed(high)})" if _known(e["interval"]) else signed(e["difference"])


def changes(entry: Found, shown: Sequence[Found], *, width: int, style: str = "") -> Markup:
    """Each part's difference with its interval, beside zero; what got worse is red."""
    left, right, high, bottom = (130, 90, 30, 40) if width > 600 else (104, 64, 30, 40)
    ends = [0.0, *(x for s in shown for x in (s["difference"], *s["interval"]))]
    marks = ticks(min(ends), max(ends), 6 if width > 600 else 3)
    lo, hi = marks[0], marks[-1]
    height = high * len(shown) + bottom

    def at(x: float) -> float:
        return round(left + (x - lo) / (hi - lo) * (width - left - right), 1)

    title = f"{entry['task']}: change in {entry['measure']}"
    parts: list[Any] = [el("title", title)]
    for x in marks:
        kind = "zero" if abs(x) < 1e-12 else "grid"
        parts.append(el("line", x1=at(x), x2=at(x), y1=4, y2=height - bottom, class_=kind))
        parts.append(el("text", signed(x), x=at(x), y=height - bottom + 16, text_anchor="middle", class_="tick"))
    side = "right of 0: worse after tuning" if entry["lower_is_better"] else "left of 0: worse after tuning"
    parts.append(el("text", side, x=(left + width - right) / 2, y=height - 4, text_anchor="middle", class_="tick"))
    told = []
    for i, s in enumerate(shown):
        y, (low, top) = i * high + high / 2, s["interval"]
        worse = (s["difference"] > 0) == entry["lower_is_better"]
        tone = "open" if low <= 0 <= top else "bad" if worse else "good"
        parts.append(el("text", clip(str(s["name"]), 18), x=left - 12, y=y + 4, text_anchor="end", class_="tick" if i else "mark"))
        parts.append(
            el("rect", x=at(low), y=y - 5, width=max(2, round(at(top) - at(low), 1)), height=10, rx=5, class_=f"span {tone}")
        )
        parts.append(el("circle", cx=at(s["difference"]), cy=y, r=5.5, class_=f"point {tone}"))
        parts.append(el("text", signed(s["difference"]), x=width - right + 16, y=y + 4, class_="tick"))
        told.append(f"{s['name']} {signed(s['difference'])}")
    label = clip(f"{title}: {', '.join(told)}", 400)
    return el("svg", parts, viewBox=f"0 0 {width} {height}", role="img", class_=f"chart {style}".strip(), aria_label=label)


# ---- the judge -------------------------------------------------------------------------------------------------------------------

_KINDS = (
    ("won", "b", "won"), ("tied", "g", "tie"), ("flipped", "c", "changed with the order"), ("lost", "e", "lost"),
    ("unread", "h", "no verdict"),
)  # fmt: skip


def judge(found: Found) -> Markup | None:
    judged = found["judge"]
    if not judged:
        return None
    note = (
        f"{judged['judge']} saw {judged['rows']} rows, {judged['best']}'s answer beside each other way's, in both orders. A way "
        "wins a row where it is preferred in both. The judge is told beside the metrics and decides nothing."
    )
    bars = []
    for other, e in judged["against"].items():
        parts = [(name, float(e[kind]), style) for kind, style, name in _KINDS]
        title = f"{judged['best']} beside {other}"
        bars.append(el("h3", title, " ", _tag(e["shown"], f"{judged['best']} preferred", f"{other} preferred")))
        bars.append(stacked(title, parts))
    legend = el("ul", [el("li", swatch(style), name) for _, style, name in _KINDS], class_="legend")
    rows = [[other, *(number(e[kind]) for kind, _, _ in _KINDS), f"{e['p']:.2g}"] for other, e in judged["against"].items()]
    numbers = table(["beside", *(name for _, _, name in _KINDS), "sign test p"], rows, numbers=range(1, 7), style="cards")
    return el(
        "section", el("h2", "What the judge says"), el("p", note, class_="note"),
        el("p", _believed(judged)), legend, bars, fold("All numbers", numbers),
    )  # fmt: skip


def _believed(judged: Found) -> str:
    """How far the judge can be: the same verdict in both orders, and no love of a place."""
    if judged["agreement"] is None:
        return "No row has a readable verdict in both orders."
    alike = share({"value": judged["agreement"], "interval": judged["agreement_interval"]})
    text = f"Judged alike in both orders: {alike} of the rows."
    if judged["first_share"] is not None:
        first = share({"value": judged["first_share"], "interval": judged["first_interval"]})
        text += f" Verdicts for whatever stood first: {first} of those that decided; half would be fair."
    return text + (f" {judged['unread']} of {judged['verdicts']} replies hold no verdict." if judged["unread"] else "")
