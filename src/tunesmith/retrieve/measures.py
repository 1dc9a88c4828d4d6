"""How good a ranking, citations and silences are. A ranking is a list of names, best first; gold is a set of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from tunesmith.retrieve.cite import Cited


def hit(ranked: Sequence[Hashable], gold: Collection[Hashable], k: int) -> float:
    """1 when any gold is among the first k, else 0."""
    return float(any(name in gold for name in ranked[:k]))


def recall(ranked: Sequence[Hashable], gold: Collection[Hashable], k: int) -> float:
    """The share of gold among the first k."""
    return len(set(ranked[:k]) & set(gold)) / len(set(gold))


def reciprocal_rank(ranked: Sequence[Hashable], gold: Collection[Hashable]) -> float:
    """1 / the rank of the first gold; 0 when there is none."""
    return next((1 / rank for rank, name in enumerate(ranked, 1) if name in gold), 0.0)


def ndcg(ranked: Sequence[Hashable], gold: Collection[Hashable], k: int) -> float:
    """Normalised discounted cumulative gain at k, each gold worth 1."""
    gain = sum(1 / math.log2(rank + 1) for rank, name in enumerate(ranked[:k], 1) if name in gold)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(set(gold))) + 1))


@dataclass(frozen=True, slots=True)
class Ranked:
    """Means over questions; `hit`, `recall` and `ndcg` by k, `mrr` over the whole rankings."""

    questions: int
    hit: dict[int, float]
    recall: dict[int, float]
    ndcg: dict[int, float]
    mrr: float


def ranked(rankings: Sequence[Sequence[Hashable]], golds: Sequence[Collection[Hashable]], ks: Sequence[int] = (1, 5, 10)) -> Ranked:
    """Measure rankings against gold; ValueError without questions, or where a question has no gold."""
    if not rankings or len(rankings) != len(golds) or not all(golds):
        raise ValueError("rankings and golds must be as many, at least one, each with gold")
    pairs = list(zip(rankings, golds, strict=True))

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(pairs)

    return Ranked(
        len(pairs),
        {k: mean(hit(r, g, k) for r, g in pairs) for k in ks},
        {k: mean(recall(r, g, k) for r, g in pairs) for k in ks},
        {k: mean(ndcg(r, g, k) for r, g in pairs) for k in ks},
        mean(reciprocal_rank(r, g) for r, g in pairs),
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """Of answers to questions: shares, None where there is nothing to take a share of.

    `citation_precision`: citations that support, of all; `citation_recall`: sentences that are supported, of all;
    `abstained`: of questions that the documents do not answer, those left unanswered; `refused`: of the others, the same.
    """

    citation_precision: float | None
    citation_recall: float | None
    abstained: float | None
    refused: float | None


def answers(checked: Sequence[Cited], answerable: Sequence[bool]) -> Answers:
    """Measure checked answers; `answerable`: whether the documents hold the answer. An answer where nothing passes is a silence."""
    pairs = list(zip(checked, answerable, strict=True))
    given = [c for c, _ in pairs if not c.abstains]
    citations = [c.supports for answer in given for c in answer.citations]
    sentences = [s.supported for answer in given for s in answer.sentences]
    return Answers(
        _share(citations),
        _share(sentences),
        _share([c.abstains for c, known in pairs if not known]),
        _share([c.abstains for c, known in pairs if known]),
    )


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
