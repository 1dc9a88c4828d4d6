"""The parts of a comparison as terminal tables: who wins what, groups, citations, what was forgotten, the judge. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def parts(found: Mapping[str, Any], console: Console) -> None:
    """What there is of them, each with a heading."""
    _line(console, *_training(found))
    if len(found["winners"]) > 1:
        _line(console, "", *(w["says"] for w in found["winners"]))
    if heard := found["adherence"]:
        _line(console, adherence(heard))
    if grouped := found.get("groups"):
        _groups(found, grouped, console)
    if cites := found["citations"]:
        _citations(cites, console)
    if forgot := found["forgetting"]:
        _forgotten(forgot, console, found["doubts"])
    if judge := found["judge"]:
        _line(console, "", f"judge {judge['judge']}: {agreement(judge)}", *judge["says"])
    console.print()


def _training(found: Mapping[str, Any]) -> list[str]:
    seconds = (found["training"] or {}).get("seconds")
    return [f"training took {seconds / 60:,.1f} min"] if seconds else []


def adherence(heard: Mapping[str, Any]) -> str:
    parts = [
        f"{share(_with(heard[kind]), 1)} for {words}" for kind, words in (("others", "the base's"), ("damaged", "damaged ones"))
    ]
    text = (
        f"adherence: its classifier tells written training answers from others, unseen ones: right in {', '.join(parts)}; "
        f"it takes {heard['written']:.0%} of the written held-out answers for the house's"
    )
    if not heard["measured"]:
        return f"{text}; too little to measure with"
    return text if heard["whole"] else f"{text}; a piece of such an answer counts as one, since it cannot tell them"


def _with(heard: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": heard["accuracy"], "interval": heard["interval"]}


def agreement(judge: Mapping[str, Any]) -> str:
    """How far the judge can be believed."""
    if judge["agreement"] is None:
        return "no row has a readable verdict in both orders"
    low, high = judge["agreement_interval"]
    text = f"{judge['agreement']:.0%} of rows judged alike in both orders ({low:.0%} to {high:.0%})"
    if judge["first_share"] is not None:
        low, high = judge["first_interval"]
        text += f"; {judge['first_share']:.0%} of decided verdicts for the first place ({low:.0%} to {high:.0%})"
    unread = f"; {judge['unread']} of {judge['verdicts']} replies hold no verdict" if judge["unread"] else ""
    return text + unread


def share(entry: Mapping[str, Any] | float | None, digits: int = 0) -> str:
    """A share with its interval, where it has one."""
    if entry is None:
        return "-"
    if not isinstance(entry, Mapping):
        return f"{entry:.{digits}%}" if math.isfinite(entry) else "-"
    low, high = entry["interval"]
    value = f"{entry['value']:.{digits}%}"
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{value} ({low:.{digits}%}-{high:.{digits}%})" if known else value


def change(entry: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    low, high = entry["interval"]
    words = f"{entry['difference']:+.3f}"
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return (f"{words} ({low:.3f} to {high:.3f})" if known else words).replace("-", "−")


def _groups(found: Mapping[str, Any], grouped: Mapping[str, Any], console: Console) -> None:
    names = [m["name"] for m in found["metrics"]]
    rows = []
    for group in grouped["groups"]:
        for i, arm in enumerate(found["arms"]):
            numbers = [group["arms"][arm["name"]][name] for name in names]
            cells = [_number(n) for n in numbers]
            rows.append([f"{group['value']} ({group['rows']})" if i == 0 else "", arm["name"], *cells])
    _line(console, "", f"by {grouped['by']} (rows)")
    _table(console, ["", "", *names], rows, left=2)


def _number(entry: Mapping[str, Any]) -> str:
    value = entry["value"]
    return "-" if value is None or not entry["rows"] or not math.isfinite(value) else f"{value:.3f}"


def _citations(cites: Mapping[str, Any], console: Console) -> None:
    _line(console, "", "citations, checked by the words of the passages")
    silent = cites["gold"] is not None
    measures = {
        "answers that cite": lambda a: share(a["cites"]),
        "citations": lambda a: str(a["citations"]),
        "that exist": lambda a: share(a["exist"]),
        "that support": lambda a: share(a["precision"]),
        "sentences held": lambda a: share(a["supported"]),
        "withheld": lambda a: share(a["withheld"]),
    }
    if silent:
        measures |= {"of unanswerable": lambda a: share(a["abstained"]), "of answerable": lambda a: share(a["refused"])}
    arms = cites["arms"]
    _table(console, ["", *arms], [[name, *(of(a) for a in arms.values())] for name, of in measures.items()])
    if silent:
        _line(console, "withheld where the documents hold no answer, and where they do: high and low are right")
    if ranking := cites["ranking"]:
        hits = ", ".join(f"hit@{k} {share(v)}" for k, v in ranking["hit"].items())
        more = f"MRR {ranking['mrr']['value']:.3f}, nDCG@10 {ranking['ndcg']['10']:.3f}"
        _line(console, f"search, {ranking['questions']} questions with right passages by {cites['gold']}: {hits}; {more}")
    _line(console, *cites["says"])


def _forgotten(forgot: Mapping[str, Any], console: Console, doubts: Sequence[str]) -> None:
    _line(console, "", "what the base could do, before and after tuning")
    words = {1: "better", 0: "no difference shown", -1: "worse"}
    rows = []
    for e in forgot["tasks"]:
        of = f"{e['documents']}" + (f" of {e['of']}" if e["of"] > e["documents"] else "")
        rows.append([f"{e['task']}, {e['measure']}", of, f"{e['before']:.3f}", f"{e['after']:.3f}", change(e), words[e["shown"]]])
        rows += [[f"  {g['name']}", str(g["documents"]), f"{g['before']:.3f}", f"{g['after']:.3f}", change(g), ""]
                 for g in e.get("groups", ())]  # fmt: skip
    _table(console, ["", "texts", "before", "after", "difference", ""], rows)
    _line(console, *(line for line in forgot["says"] if line not in doubts), *forgot["notes"])  # those come below


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown, markup=False, highlight=False)


def _line(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
