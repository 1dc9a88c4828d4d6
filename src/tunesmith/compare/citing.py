"""Passages and citations of the arms that have them: were the right ones found, does an answer cite them, do they support it?

retrieve/cite.py checks each answer by its rule: a citation must exist and support its sentence; where no sentence is supported
the answer would be withheld. Which passages are right is known where rows say it (`--gold KEY`): the names of documents or sections
(`"manual.md"`, `["3 Where to put it"]`, looked for in a passage's document, headings and text), or checks as in evaluate/checks.py
(`[["tap", "knock"], ["float"]]`), which the passage itself must hold. A row without such a value has no answer in the documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.compare.arms import Passage
from tunesmith.errors import ConfigError
from tunesmith.evaluate import checks
from tunesmith.evaluate.statistics import bootstrap, wilson

if TYPE_CHECKING:
    from tunesmith.compare.scoring import Scores
    from tunesmith.compare.work import Comparison

DEPTH = 10  # passages that are ranked where gold is known
KS = (1, 3, 5, 10)
SOURCES = "sources"  # the key that is read without --gold

Gold = Callable[[Passage], frozenset[int]]  # which of a row's right sources a passage is


def gold_key(fields: Sequence[Mapping[str, Any]], asked: str) -> str | None:
    """The key under which rows say which passages are right; None where none does. ConfigError where the one asked for is nowhere,
    or holds what cannot be read."""
    if not asked:
        return SOURCES if any(row.get(SOURCES) for row in fields) else None
    if not any(row.get(asked) for row in fields):
        have = sorted({key for row in fields for key in row})
        raise ConfigError(
            f"--gold {asked}: no held-out row says anything under {asked!r}",
            f"the rows carry {', '.join(have)}" if have else "the rows carry nothing beside their messages",
        )
    for i, row in enumerate(fields, 1):
        try:
            gold_of(row.get(asked))
        except checks.CheckError as fault:
            raise ConfigError(f"held-out row {i}: {asked}: {fault}", "correct the row, or leave --gold out") from None
    return asked


def gold_of(value: Any) -> tuple[int, Gold] | None:
    """(how many right sources, which of them a passage is); None where there is none."""
    if value in (None, "", [], {}):
        return None
    if isinstance(value, list) and not all(isinstance(v, (str, int)) for v in value):
        held = checks.compiled(value)
        return 1, lambda passage: frozenset({0} if all(check(_said(passage)) for check in held) else ())
    names = [str(v) for v in (value if isinstance(value, list) else [value])]

    def among(passage: Passage) -> frozenset[int]:
        place = f"{passage.document}\n{PurePath(passage.document).stem}\n{_said(passage)}"
        return frozenset(i for i, name in enumerate(names) if checks.stands(name, place))

    return len(names), among


def _said(passage: Passage) -> str:
    return f"{passage.context}\n{passage.text}"


def measured(work: Comparison, scored: Scores) -> dict[str, Any] | None:
    """For compare.json; None where no arm has passages."""
    some = [arm for arm in work.arms if arm.passages]
    if not some:
        return None
    from tunesmith.retrieve.cite import check
    from tunesmith.retrieve.measures import answers as silences

    key, seed = work.gold, work.options.seed
    golds = [gold_of(q.fields.get(key)) if key else None for q in work.questions]
    out: dict[str, Any] = {"gold": key, "ranking": ranking(golds, work.ranked, seed) if key else None, "arms": {}, "says": []}
    for arm in some:
        rows, prompts = work.answers[arm.name], work.prompts[arm.name]
        checked = [check(row["answer"], p.passages) for row, p in zip(rows, prompts, strict=True)]
        cites = [bool(c.citations) for c in checked]
        given = [(sum(x.supports for x in c.citations), len(c.citations)) for c in checked if c.citations]
        total = sum(n for _, n in given)
        held = [s.supported for c in checked for s in c.sentences]
        told = silences(checked, [g is not None for g in golds]) if key else None
        out["arms"][arm.name] = {
            "cites": _share(sum(cites), len(cites)), "citations": total,
            "exist": sum(x.exists for c in checked for x in c.citations) / total if total else None,
            "precision": _precision(given, seed), "supported": sum(held) / len(held) if held else None,
            "withheld": _share(sum(c.abstains for c in checked), len(checked)),
            "abstained": told.abstained if told else None, "refused": told.refused if told else None,
            "rows": [
                {"cites": len(c.citations), "supports": sum(x.supports for x in c.citations), "missing": list(c.missing),
                 "withheld": c.abstains}
                for c in checked
            ],
        }  # fmt: skip
        if key:
            out["says"] += _with_the_right_one(work, arm.name, golds, scored)
    return out


def _with_the_right_one(work: Comparison, arm: str, golds: Sequence[tuple[int, Gold] | None], scored: Scores) -> list[str]:
    """What an arm comes to where a right passage was in its prompt: whether the search failed, or the model."""
    prompts = work.prompts[arm]
    answerable = np.array([g is not None for g in golds])
    there = np.array([g is not None and any(g[1](p) for p in prompt.passages) for g, prompt in zip(golds, prompts, strict=True)])
    if not there.any():
        return [f"{arm}: no prompt held a right passage."] if answerable.any() else []
    metric = next((m for m in work.metrics if not m.form), work.metrics[0])
    metric = next((m for m in work.metrics if m.name == work.gold), metric)
    value = scored[arm][metric.name].among(there)
    told = f"{value.whole:.3f} in {metric.name} on those" if len(value.counted) else f"{metric.name} does not concern those"
    return [f"{arm}: a right passage was in the prompt of {there.sum()} of {answerable.sum()} questions that have one; {told}."]


def _share(hits: int, of: int) -> dict[str, Any]:
    return {"value": hits / of, "interval": list(wilson(hits, of))}


def _precision(given: Sequence[tuple[int, int]], seed: int) -> dict[str, Any] | None:
    """Citations that support, of all; the interval by a bootstrap over answers, since those of one answer hang together. Where none
    or all do, every draw is alike: Wilson's of the answers."""
    if not given:
        return None
    right, all_ = (np.array(part, float) for part in zip(*given, strict=True))
    if right.sum() in (0, all_.sum()):
        value = float(right.sum() > 0)
        return {"value": value, "interval": list(wilson(round(value * len(given)), len(given)))}
    value, low, high = bootstrap(lambda counts: counts @ right / (counts @ all_), len(given), seed=seed)
    return {"value": value, "interval": [low, high]}


def ranking(golds: Sequence[tuple[int, Gold] | None], ranked: Sequence[Sequence[Passage]], seed: int) -> dict[str, Any] | None:
    """hit@k, MRR and nDCG over the questions that have right sources. A source counts where it is first found; a passage that is
    none of them takes its place in the ranking."""
    from tunesmith.retrieve import measures

    rankings, right = [], []
    for gold, passages in zip(golds, ranked, strict=True):
        if gold is None:
            continue
        count, among = gold
        seen: set[int] = set()
        names: list[Any] = []
        for place, passage in enumerate(passages):
            new = sorted(among(passage) - seen)
            seen |= set(new)
            names.append(new[0] if new else ("other", place))
        rankings.append(names)
        right.append(set(range(count)))
    if not rankings:
        return None
    found = measures.ranked(rankings, right, KS)
    hits = {str(k): _share(round(found.hit[k] * found.questions), found.questions) for k in KS}
    reciprocal = np.array([measures.reciprocal_rank(r, g) for r, g in zip(rankings, right, strict=True)])
    _, low, high = bootstrap(lambda counts: counts @ reciprocal / counts.sum(1), len(reciprocal), seed=seed)
    known = math.isfinite(low) and math.isfinite(high)
    return {
        "questions": found.questions, "depth": DEPTH, "hit": hits, "ndcg": {str(k): found.ndcg[k] for k in KS},
        "mrr": {"value": found.mrr, "interval": [low, high] if known else [None, None]},
    }  # fmt: skip


def note(row: Mapping[str, Any]) -> str:
    """What the check says of one answer, for the page."""
    if not row["cites"]:
        return "cites nothing; would be withheld" if row["withheld"] else "cites nothing"
    parts = [f"{row['supports']} of {row['cites']} citations support their sentence"]
    if row["missing"]:
        parts.append(f"there is no passage {', '.join(map(str, row['missing']))}")
    return "; ".join([*parts, *(["would be withheld"] if row["withheld"] else [])])
