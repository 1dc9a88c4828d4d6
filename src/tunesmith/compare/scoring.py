"""Answers as numbers: each arm by each metric with its interval, differences row by row, and who wins what. No torch.

Shown means: McNemar's exact p below 0.05 where each row is right or wrong, else a paired bootstrap interval of 95 % without zero
and at least FEW_CHANGED rows that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.compare.arms import Arm, uncited
from tunesmith.evaluate.metrics import Metric, Scored
from tunesmith.evaluate.statistics import FEW_CHANGED, FEW_ROWS, bootstrap, mcnemar, paired_bootstrap, wilson

if TYPE_CHECKING:
    from tunesmith.compare.work import Comparison

SHOWN_P = 0.05
GROUPS = 12  # of --by, the largest; the rest are one

Scores = Mapping[str, Mapping[str, Scored]]  # arm -> metric -> rows


def scores(work: Comparison) -> dict[str, dict[str, Scored]]:
    golds, fields = [q.gold for q in work.questions], [q.fields for q in work.questions]
    return {arm.name: {m.name: m.of(texts(work, arm, m), golds, fields) for m in work.metrics} for arm in work.arms}


def texts(work: Comparison, arm: Arm, metric: Metric) -> list[str]:
    """The arm's answers, as the metric reads them: citations of passages are no words of the answer."""
    answers = [row["answer"] for row in work.answers[arm.name]]
    if not arm.passages or metric.marks:
        return answers
    return [uncited(text, len(p.passages)) for text, p in zip(answers, work.prompts[arm.name], strict=True)]


def weighed(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that are weighed against each other: an endpoint's price and privacy are no numbers of ours."""
    return [arm for arm in arms if arm.model != "endpoint"] or list(arms)


def leading(own: Sequence[Arm], scored: Scores, metric: str) -> Arm:
    """The highest; of equals the cheapest."""
    means = {arm.name: scored[arm.name][metric].whole for arm in own}
    return max(own, key=lambda arm: (means[arm.name] if math.isfinite(means[arm.name]) else -math.inf, -arm.order))


def interval(value: Scored, metric: Metric, seed: int) -> tuple[float, float, float]:
    """(value, lo, hi) over all rows, for 95 %: Wilson's of a share, else a bootstrap over rows."""
    counted = value.counted
    if not len(counted):
        return math.nan, -math.inf, math.inf
    if metric.binary:
        return value.whole, *wilson(round(counted.sum()), len(counted))
    if value.statistic is not None:
        return bootstrap(value.statistic, len(value.values), seed=seed)
    return paired_bootstrap(np.zeros_like(counted), counted, seed=seed)


def difference(other: Scored, value: Scored, metric: Metric, seed: int) -> dict[str, Any]:
    """How much better `value` is than `other` on the same rows, and whether that is shown: -1 worse, 0 not shown, 1 better."""
    before, after = other.counted, value.counted
    if value.statistic is not None and other.statistic is not None:
        mine, theirs = value.statistic, other.statistic
        mean, low, high = bootstrap(lambda counts: mine(counts) - theirs(counts), len(value.values), seed=seed)
        sure = low > 0 or high < 0
    else:
        mean, low, high = paired_bootstrap(before, after, seed=seed)
        sure = (low > 0 or high < 0) and np.count_nonzero(before != after) >= FEW_CHANGED
    out: dict[str, Any] = {"difference": mean, "interval": [low, high]}
    if metric.binary:
        lost, won, p = mcnemar(before, after)
        out |= {"lost": lost, "won": won, "p": p}
        sure = p < SHOWN_P
    few = len(after) < FEW_ROWS
    return out | {"shown": 0 if few or not sure else 1 if mean > 0 else -1}


def beaten(own: Sequence[Arm], scored: Scores, metric: Metric, seed: int) -> dict[str, list[str]]:
    """Of each arm those that are shown to be better than it. The highest need not be one of them where another is: it may differ
    in more rows, both ways."""
    pairs = [(a, b) for a in own for b in own if a is not b]
    gaps = {(a.name, b.name): difference(*(scored[n.name][metric.name] for n in (a, b)), metric, seed)["shown"] for a, b in pairs}
    return {a.name: [b.name for b in own if gaps.get((a.name, b.name)) == 1] for a in own}


# ---- who wins what ---------------------------------------------------------------------------------------------------------------


def winners(work: Comparison, own: Sequence[Arm], scored: Scores, seed: int) -> list[dict[str, Any]]:
    """Of each metric: the highest arm, the arms not shown to be worse than it, and that in a sentence."""
    out = []
    for metric in work.metrics:
        best = leading(own, scored, metric.name)
        top = scored[best.name][metric.name]
        gaps = {a.name: difference(top, scored[a.name][metric.name], metric, seed) for a in own if a is not best}
        level = [name for name, gap in gaps.items() if gap["shown"] >= 0]
        entry = {"metric": metric.name, "best": best.name, "value": top.whole, "rows": len(top.counted), "level": level}
        out.append(entry | {"says": _says(entry, len(own))})
    return out


def _says(entry: Mapping[str, Any], arms: int) -> str:
    name, best, value, rows, level = (entry[k] for k in ("metric", "best", "value", "rows", "level"))
    if not math.isfinite(value) or value <= 0:
        return f"{name}: no way scores above 0."
    head = f"{name}: {best} is highest, {value:.3f} on {rows} rows"
    if arms == 1:
        return f"{head}."
    if rows < FEW_ROWS:
        return f"{head}, which are too few to show a difference."
    if not level:
        return f"{head}, shown better than {'the other way' if arms == 2 else 'every other way'}."
    if len(level) == arms - 1:
        return f"{head}, shown better than none: no difference shown."
    return f"{head}; not shown better than {', '.join(level)}, better than the rest."


def groups(work: Comparison, key: str, scored: Scores, seed: int) -> dict[str, Any]:
    """Every metric and arm by the value that rows have under `key`; the commonest values first, the rarest together."""
    values = [label(q.fields.get(key)) for q in work.questions]
    counts = {v: values.count(v) for v in dict.fromkeys(values)}
    kept = sorted(counts, key=lambda v: (-counts[v], v))
    shown, rest = (kept, []) if len(kept) <= GROUPS else (kept[: GROUPS - 1], kept[GROUPS - 1 :])
    out = []
    for name, members in [*((v, {v}) for v in shown), *([(f"{len(rest)} others", set(rest))] if rest else [])]:
        rows = np.array([v in members for v in values])
        entry: dict[str, Any] = {"value": name, "rows": int(rows.sum()), "arms": {}}
        for arm in work.arms:
            entry["arms"][arm.name] = {}
            for metric in work.metrics:
                part = scored[arm.name][metric.name].among(rows)
                mean, low, high = interval(part, metric, seed)
                entry["arms"][arm.name][metric.name] = {"value": mean, "interval": [low, high], "rows": len(part.counted)}
        out.append(entry)
    return {"by": key, "groups": out}


def label(value: Any) -> str:
    """A field's value as a group's name."""
    if value is None or value == "":
        return "(none)"
    return value if isinstance(value, str) else str(value)
