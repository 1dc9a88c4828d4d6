"""A question as words, and two rankings as one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tunesmith.data.columns import word_set
from tunesmith.retrieve.store import Scored

# Of the fusion. The usual k = 60 (Cormack, Clarke and Buettcher 2009) makes the first ranks nearly equal: with it vectors of any
# weight took the first place from better passages (docs/retrieval.md has the numbers).
RRF_K = 2
MEANING = 0.1  # the weight of vectors beside words, which have 1
MOST_WORDS = 64  # of a question; a pasted page would be scored word by word

_WORD = re.compile(r"[^\W_]+")
STOP = word_set(
    """a about above after again against all am an and any are aren as at be because been before being below between both but by can
    could couldn d did didn do does doesn doing don down during each few for from further had hadn has hasn have haven having
    he her here hers herself him himself his how i if in into is isn it its itself just ll m me more most my myself no nor not
    now of off on once only or other our ours ourselves out over own re s same she should shouldn so some such t than that the
    their theirs them themselves then there these they this those through to too under until up ve very was wasn we were weren
    what when where which while who whom whose why will with won would wouldn you your yours yourself yourselves yes"""
)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def asked(question: str) -> list[str]:
    """The words to look for, each once: without stop words, unless nothing else is there."""
    found = list(dict.fromkeys(words(question)))
    return ([w for w in found if w not in STOP] or found)[:MOST_WORDS]


def fuse(rankings: Sequence[Sequence[Scored]], weights: Sequence[float] | None = None, k: int = RRF_K) -> list[Scored]:
    """Reciprocal rank fusion: a chunk's score is the sum of weight / (k + its rank) over the rankings. Best first, then by id."""
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, (chunk, _) in enumerate(ranking, 1):
            scores[chunk] = scores.get(chunk, 0.0) + weight / (k + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
