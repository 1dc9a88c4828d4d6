"""What came of a comparison: every arm by every metric with its interval, which way is worth it, the page, the table. No torch.

The recommendation is the cheapest arm that no other is shown to be better than (scoring.py says what shown means). A dearer arm
must win; a tie goes to the prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.compare import citing, guard, scoring, told
from tunesmith.compare.arms import ARMS, Arm
from tunesmith.compare.scoring import difference, interval
from tunesmith.compare.work import Comparison
from tunesmith.evaluate import compare_page
from tunesmith.evaluate.metrics import Scored
from tunesmith.evaluate.statistics import FEW_ROWS
from tunesmith.files import finite, write_atomic
from tunesmith.redact import redact
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

CASES = 6  # wins and as many losses on the page
CUT = 0.1  # share of answers that ended at the limit from which it is told as a doubt


@dataclass(frozen=True)
class Result:
    """`found` is compare.json; `page` its .html."""

    folder: Path
    found: Mapping[str, Any]

    @property
    def page(self) -> Path:
        return self.folder / "compare.html"

    @property
    def recommended(self) -> str | None:
        """The arm's name; None where nothing can be recommended."""
        return self.found["recommended"]

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console

        _print(self, console or Console())


def finish(work: Comparison) -> Result:
    """Score the answers; write compare.json and compare.html."""
    found = gather(work)
    write_atomic(work.folder / "compare.json", json.dumps(finite(found), indent=1, ensure_ascii=False) + "\n")
    compare_page.write(found, work.folder / "compare.html")
    return Result(work.folder, found)


def gather(work: Comparison) -> dict[str, Any]:
    scored, own = scoring.scores(work), scoring.weighed(work.arms)
    first, seed = work.metrics[0], work.options.seed
    best = scoring.leading(own, scored, first.name)
    base = next((arm for arm in work.arms if arm.name == "base"), None)
    beaten = scoring.beaten(own, scored, first, seed)
    rows = []
    for arm in work.arms:
        entry: dict[str, Any] = {"name": arm.name, "says": arm.says, "model": arm.model, **_cost(work, arm), "metrics": {}}
        entry |= {"weighed": arm.name in beaten, "beaten_by": beaten.get(arm.name, [])}  # by the metric that decides
        for metric in work.metrics:
            value = scored[arm.name][metric.name]
            mean, low, high = interval(value, metric, seed)
            entry["metrics"][metric.name] = {"value": mean, "interval": [low, high], "rows": len(value.counted)}
            for word, other in (("best", best), ("base", base)):
                if other is not None and other is not arm:
                    entry["metrics"][metric.name][f"to_{word}"] = difference(scored[other.name][metric.name], value, metric, seed)
        rows.append(entry)
    found: dict[str, Any] = {
        "format": 1, "name": work.source.name, "model": work.source.config.model, "method": work.source.config.method,
        "rows": len(work.questions), "held_out": len(work.source.held_out), "left_out": work.left_out,
        "metrics": [{"name": m.name, "says": m.says, "binary": m.binary, "form": m.form} for m in work.metrics],
        "best": best.name, "arms": rows, "loss": _loss(work), "training": _training(work),
        "settings": _settings(work), "notes": list(work.notes), "winners": scoring.winners(work, own, scored, seed),
        "citations": citing.measured(work, scored), "adherence": work.adherence, "forgetting": work.forgetting,
        "judge": work.judged,
    }  # fmt: skip
    if by := work.options.by:
        found["groups"] = scoring.groups(work, by, scored, seed)
    found |= recommend(found, own)
    found["cases"] = _cases(work, scored, found, base)
    found["guardrails"] = guard.gather(work.guarded) if work.guarded else None
    return found


def _cost(work: Comparison, arm: Arm) -> dict[str, Any]:
    rows = work.answers[arm.name]

    def mean(key: str) -> float | None:
        numbers = [row[key] for row in rows if row[key] is not None]
        return sum(numbers) / len(numbers) if numbers else None

    return {
        "prompt_tokens": mean("prompt_tokens"), "answer_tokens": mean("answer_tokens"), "seconds": mean("seconds"),
        "cut": sum(row["ended"] == "length" for row in rows) / len(rows),
    }  # fmt: skip


def _loss(work: Comparison) -> dict[str, Any] | None:
    """Held-out loss before and after, as the run measured it."""
    path = work.source.run.path / "comparison.json" if work.source.run else None
    try:
        loss = json.loads(path.read_text("utf-8"))["loss"] if path else None
        return {k: loss[k] for k in ("before", "after", "difference", "interval", "rows")} | {"overlap": loss.get("overlap", 0)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _training(work: Comparison) -> dict[str, Any] | None:
    if work.source.run is None or not work.source.tuned:
        return None
    manifest = work.source.run.manifest
    return {k: manifest.get(k) for k in ("seconds", "tokens", "device")}


def _settings(work: Comparison) -> dict[str, Any]:
    o = work.options
    return {
        "arms": [arm.name for arm in work.arms], "system": redact(o.system), "shots": o.shots, "passages": o.passages,
        "docs": str(o.docs) if o.docs else "", "max_tokens": work.max_tokens, "temperature": o.temperature, "seed": o.seed,
        "endpoint": redact(o.endpoint), "endpoint_model": o.endpoint_model, "by": o.by, "gold": work.gold or "",
        "judge": redact(o.judge), "judge_model": o.judge_model, "forgetting": list(o.forgetting),
    }  # fmt: skip


# ---- which way -------------------------------------------------------------------------------------------------------------------


def recommend(found: Mapping[str, Any], own: Sequence[Arm]) -> dict[str, Any]:
    """{recommended, verdict: [sentence, reason], doubts}: the cheapest of `own` that none of them is shown to be better than."""
    metric = found["metrics"][0]["name"]
    by_name = {arm["name"]: arm for arm in found["arms"]}
    best = by_name[found["best"]]

    def at(arm: Mapping[str, Any]) -> Mapping[str, Any]:
        return arm["metrics"][metric]

    doubts, rows = _doubts(found, own), at(best)["rows"]
    top = f"{best['name']} has {say(at(best)['value'])} in {metric}"
    if rows < FEW_ROWS:
        which = f"{rows} held-out rows" + ("" if rows == found["rows"] else f" with what {metric} looks at")
        head = f"No recommendation: {which} are too few to tell the ways apart (from {FEW_ROWS} on one is given)."
        return {"recommended": None, "verdict": [head, f"The highest: {top}."], "doubts": doubts}
    if not at(best)["value"] > 0:
        return {
            "recommended": None, "doubts": doubts,
            "verdict": [f"No recommendation: no way scores above 0 in {metric}.", "Read the answers, or name another --metric."],
        }  # fmt: skip
    ordered = sorted(own, key=lambda arm: arm.order)
    names = [arm.name for arm in ordered]
    pick = by_name[next(n for n in names if not by_name[n]["beaten_by"])]  # the best is one: none has a higher mean
    worse = names[: names.index(pick["name"])]
    to_best = [n for n in worse if best["name"] in by_name[n]["beaten_by"]]
    than = " than another" if len(to_best) < len(worse) else "" if pick is best else f" than {best['name']}"
    head = f"Use {pick['says']}: {say(at(pick)['value'])} in {metric}, and every way that costs less is shown to be worse{than}."
    if len(names) == 1:
        head = f"Only one way was tried, {pick['says']}: {say(at(pick)['value'])} in {metric}."
    elif names[0] == pick["name"]:
        head = f"Use {pick['says']}: {say(at(pick)['value'])} in {metric}, and no way that costs more is shown to be better."
    reasons = []
    if pick is not best:
        gap = at(pick)["to_best"]
        reasons.append(
            f"{best['name']} has {say(at(best)['value'])}, a difference of {_signed(gap['difference'])} "
            f"({_range(gap['interval'])}{_p(gap)}): no difference shown."
        )
    if to_best:
        gaps = [(n, at(by_name[n])["to_best"]) for n in to_best]
        lags = [f"{n} by {_signed(gap['difference'])} ({_range(gap['interval'])})" for n, gap in gaps]
        reasons.append(f"Shown to be worse than {best['name']}: {', '.join(lags)}.")
    reasons += [
        f"{n} is not shown to be worse than {best['name']}, but than {', '.join(by_name[n]['beaten_by'])}."
        for n in worse if n not in to_best
    ]  # fmt: skip
    for arm in found["arms"]:
        if arm["model"] == "endpoint" and arm["name"] not in names:
            gap = at(arm)["to_best"]
            word = {1: "better", 0: "no difference shown", -1: "worse"}[gap["shown"]]
            reasons.append(
                f"Beside {best['name']}, {arm['says']} has {say(at(arm)['value'])}, {_signed(gap['difference'])} "
                f"({_range(gap['interval'])}): {word}. It is not weighed here: its price and its privacy are yours to judge."
            )
    high = [w for w in found["winners"][1:] if w["value"] > 0]
    if others := [w["says"] for w in high if w["best"] != best["name"] or w["level"]]:
        reasons.append(f"By another measure it may be otherwise. {' '.join(others)}")
    return {"recommended": pick["name"], "verdict": [head, *reasons], "doubts": doubts}


def _doubts(found: Mapping[str, Any], own: Sequence[Arm]) -> list[str]:
    metric = found["metrics"][0]
    rows = found["arms"][0]["metrics"][metric["name"]]["rows"]
    out = []
    halves = []
    for arm in found["arms"]:
        if "to_best" in (entry := arm["metrics"][metric["name"]]):
            low, high = entry["to_best"]["interval"]
            halves.append((high - low) / 2)
    if halves and metric["binary"]:
        halves.append(3 / rows)  # where no row of n differs, up to 3 / n may (the rule of three)
    if rows >= FEW_ROWS and halves and math.isfinite(max(halves)):  # of fewer no difference is shown, however large
        out.append(
            f"On {rows} rows a difference below about {say(max(halves))} would not show; four times as many show one half as large."
        )
    if len(own) > 3:
        out.append(f"{len(own)} ways were compared, and the best was picked on these very rows: its lead is flattered a little.")
    for arm in found["arms"]:
        if arm["cut"] >= CUT:
            limit = found["settings"]["max_tokens"]
            out.append(
                f"{arm['cut']:.0%} of {arm['name']}'s answers were cut at {limit} tokens: with a larger --max-tokens they may gain."
            )
    if overlap := (found["loss"] or {}).get("overlap"):
        out.append(f"{overlap} of {found['held_out']} held-out rows are nearly training rows, which flatters the tuned model.")
    if metric["form"]:
        out.append(f"{metric['name']} sees an answer's form alone ({metric['says']}), not whether it is right: read the rows.")
    elif not metric["binary"]:
        out.append(f"{metric['name']} counts: {metric['says']}. It does not know whether an answer is true; read the rows.")
    if judge := found.get("judge"):
        out += judge["doubts"]
        out += [
            f"The judge contradicts {metric['name']}: it prefers {other} to {judge['best']}."
            for other, e in judge["against"].items()
            if e["shown"] < 0
        ]
    out += [say_ for e, say_ in _forgotten(found) if e["shown"] < 0]
    return out


def _forgotten(found: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    told_ = found.get("forgetting")
    return list(zip(told_["tasks"], told_["says"], strict=True)) if told_ else []


def say(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _range(interval_: Sequence[float]) -> str:
    low, high = interval_
    return "95 % interval unknown" if not (math.isfinite(low) and math.isfinite(high)) else f"{_signed(low)} to {_signed(high)}"


def _p(gap: Mapping[str, Any]) -> str:
    return f", McNemar p {gap['p']:.2g}" if "p" in gap else ""


# ---- rows side by side -----------------------------------------------------------------------------------------------------------


def _cases(
    work: Comparison, scored: Mapping[str, Mapping[str, Scored]], found: Mapping[str, Any], base: Arm | None
) -> dict[str, Any]:
    """Rows where the way that leads wins most over the base (or over the cheapest), and where it loses most."""
    metric = found["metrics"][0]["name"]
    others = sorted((a for a in work.arms if a.name != found["best"]), key=lambda a: a.order)
    if not others:
        return {"of": found["best"], "against": None, "wins": [], "losses": []}
    of, against = found["best"], base if base in others else others[0]
    if found["best"] == "base":
        means = {a.name: scored[a.name][metric].whole for a in others}
        of, against = max(others, key=lambda a: means[a.name]).name, base
    assert against is not None
    mine, theirs = scored[of][metric], scored[against.name][metric]
    used = np.ones(len(mine.values), bool) if mine.used is None else mine.used
    change = np.where(used, mine.values - theirs.values, 0.0)
    cited_rows = (found["citations"] or {"arms": {}})["arms"]

    def case(i: int) -> dict[str, Any]:
        question = work.questions[i]
        answers = {
            arm.name: {"answer": work.answers[arm.name][i]["answer"], "value": float(scored[arm.name][metric].values[i]),
                       "passages": [PurePath(p.document).name for p in work.prompts[arm.name][i].passages],
                       **({"citations": citing.note(cited_rows[arm.name]["rows"][i])} if arm.name in cited_rows else {})}
            for arm in work.arms
        }  # fmt: skip
        return {
            "row": question.row,
            "question": question.shown,
            "gold": question.gold,
            "change": float(change[i]),
            "answers": answers,
        }

    order = sorted(range(len(change)), key=lambda i: (-change[i], i))
    return {
        "of": of, "against": against.name, "won": int((change > 0).sum()), "lost": int((change < 0).sum()),
        "same": int((used & (change == 0)).sum()),
        "wins": [case(i) for i in order if change[i] > 0][:CASES],
        "losses": [case(i) for i in reversed(order) if change[i] < 0][:CASES],
    }  # fmt: skip


# ---- the terminal ----------------------------------------------------------------------------------------------------------------


def _print(result: Result, console: Console) -> None:
    from rich.table import Table

    found = result.found
    heads = ["", *(m["name"] for m in found["metrics"]), "prompt", "answer", "s/answer"]
    for intervals in (len(found["metrics"]), 1, 0):  # of so many metrics, as the terminal's width allows
        rows = [_row(arm, found["metrics"], intervals) for arm in found["arms"]]
        if sum(max(map(len, column)) + 2 for column in zip(heads, *rows, strict=True)) - 2 <= console.width:
            break
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, head in enumerate(heads):
        shown.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == found["recommended"] else "")
    console.print(shown, markup=False, highlight=False)  # a pattern's brackets are no markup
    rest = "prompt, answer: tokens, a row's mean" + ("; 95 % intervals" if intervals and found["rows"] > 1 else "")
    console.print(f"{counted(found['rows'], 'row')}; {rest}", style="dim", highlight=False)
    if loss := found["loss"]:
        before, after = (f"{loss[k]:.3f}" if loss[k] is not None else "-" for k in ("before", "after"))
        console.print(f"held-out loss {before} before tuning, {after} after ({loss['rows']} rows)", style="dim", highlight=False)
    told.parts(found, console)
    for line in (*found["verdict"], *(f"doubt: {d}" for d in found["doubts"])):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.get("guardrails"):
        console.print()
        guard.print_found(found["guardrails"], console)
    console.print(f"\nPage   {result.page}", highlight=False, markup=False, soft_wrap=True)


def _row(arm: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], intervals: int) -> list[str]:
    cells = [_cell(arm["metrics"][m["name"]], with_interval=i < intervals) for i, m in enumerate(metrics)]
    tokens = (compare_page.count(arm[k]) for k in ("prompt_tokens", "answer_tokens"))
    return [arm["name"], *cells, *tokens, compare_page.count(arm["seconds"], 2)]


def _cell(entry: Mapping[str, Any], with_interval: bool) -> str:
    low, high = entry["interval"]
    if not with_interval or not (math.isfinite(low) and math.isfinite(high)):
        return say(entry["value"])
    return f"{say(entry['value'])} ({low:.2f}-{high:.2f})"


assert all(arm.order == i for i, arm in enumerate(ARMS.values())), "the table of arms is in the order of cost"
