"""Contamination: text of public evaluation sets in the rows.

evaluations.bin holds, for each set, hashes of runs of WORDS words of its questions, one in KEEP of them, and none that also stands
in other text of its kind (bench/findings.py --evaluations makes it; the texts themselves cannot be had from it). A row that has
HITS of them has a question of that set in it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from tunesmith.data.clusters import Shingles

FILE = Path(__file__).with_name("evaluations.bin")
WORDS = 13  # as GPT-3's authors had it (Brown et al. 2020, appendix C)
KEEP = 4  # one hash in four: a question of 20 words has two of them, one of 13 words is missed three times in four
HITS = 1
TABLE_BITS = 20  # of the first look: 1 MB, so it stays in the cache


@cache
def known() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names of the sets; hashes in order and the set of each; for the first look, whether any hash begins with these bits."""
    if not FILE.is_file():
        return [], np.zeros(0, np.uint64), np.zeros(0, np.uint8), np.zeros(1 << TABLE_BITS, bool)
    raw = FILE.read_bytes()
    head, _, body = raw.partition(b"\n")
    sets = json.loads(head)
    hashes = np.frombuffer(body, "<u8")
    of = np.repeat(np.arange(len(sets), dtype=np.uint8), [s["hashes"] for s in sets])
    order = np.argsort(hashes, kind="stable")
    hashes, of = hashes[order], of[order]
    table = np.zeros(1 << TABLE_BITS, bool)
    table[(hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)] = True
    return [s["name"] for s in sets], hashes, of, table


def contamination(shingles: Shingles) -> dict[int, str]:
    """Rows with text of an evaluation set, and its name."""
    names, hashes, of, table = known()
    if not names or not shingles.texts:
        return {}
    span_S, begin_N = shingles.hashes(WORDS)
    kept = np.flatnonzero(span_S & np.uint64(KEEP - 1) == 0)  # no others are known
    maybe = kept[table[(span_S[kept] >> np.uint64(64 - TABLE_BITS)).astype(np.int64)]]
    at = np.minimum(np.searchsorted(hashes, span_S[maybe]), len(hashes) - 1)
    sure = hashes[at] == span_S[maybe]
    rows = np.searchsorted(begin_N, maybe[sure], side="right") - 1
    found: dict[int, str] = {}
    for row, of_set in zip(rows.tolist(), of[at[sure]].tolist(), strict=True):
        found.setdefault(row, names[of_set])
    return found
