"""Contamination: text of public evaluation sets in the rows.

evaluations.bin holds, for each set, hashes of runs of words of its questions, and none that also stands in other text of its kind
(bench/findings.py --evaluations makes it; the texts themselves cannot be had from it). A run has WORDS words, and one in KEEP is
held; short questions have runs of fewer words, all of them held. A row that has one of them has a question of that set in it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunesmith.data.clusters import Shingles

FILE = Path(__file__).with_name("evaluations.bin")
WORDS = 13  # as GPT-3's authors had it (Brown et al. 2020, appendix C)
KEEP = 4  # one hash in four: a question of 20 words has two of them, one of 13 words is missed three times in four
TABLE_BITS = 20  # of the first look: 1 MB, so it stays in the cache


class Known(NamedTuple):
    """A set: its name, the words of a run, its hashes in order; for the first look, whether only one hash in KEEP is held, and
    whether any begins with these bits."""

    name: str
    words: int
    hashes: np.ndarray
    thinned: bool
    table: np.ndarray

    @classmethod
    def of(cls, name: str, words: int, hashes: np.ndarray) -> Known:
        table = np.zeros(1 << TABLE_BITS, bool)
        table[(hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)] = True
        return cls(name, words, np.sort(hashes), not (hashes & np.uint64(KEEP - 1)).any(), table)


@cache
def known() -> list[Known]:
    head, _, body = FILE.read_bytes().partition(b"\n")
    sets = json.loads(head)
    parts = np.split(np.frombuffer(body, "<u8"), np.cumsum([s["hashes"] for s in sets])[:-1])
    return [Known.of(s["name"], s["words"], part) for s, part in zip(sets, parts, strict=True)]


def contamination(shingles: Shingles) -> dict[int, str]:
    """Rows with text of an evaluation set, and its name."""
    found: dict[int, str] = {}
    for name, words, hashes, thinned, table in known() if shingles.texts else ():
        span_S, begin_N = shingles.hashes(words)
        held = np.flatnonzero(span_S & np.uint64(KEEP - 1) == 0) if thinned else np.arange(len(span_S))
        maybe = held[table[(span_S[held] >> np.uint64(64 - TABLE_BITS)).astype(np.int64)]]
        at = np.minimum(np.searchsorted(hashes, span_S[maybe]), len(hashes) - 1)
        for row in np.searchsorted(begin_N, maybe[hashes[at] == span_S[maybe]], side="right") - 1:
            found.setdefault(int(row), name)
    return found
