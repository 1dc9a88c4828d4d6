"""Duplicate rows: exact ones by a hash of the normalised text, near ones by MinHash over shingles and locality-sensitive hashing.

A held-out split that cuts through a group of near-equal rows measures memory, not learning; so it is made by cluster. Everything is
numpy over many rows at once and follows from the text and constants alone. Legend: B bytes of the texts end to end, S shingles,
P permutations, N rows.

Source: Broder 1997 (MinHash); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4 (bands).
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.types import Conversation

WORDS = 5  # units in a shingle
PERMUTATIONS, BANDS = 64, 16  # 16 bands of 4: a pair of similarity 0.7 is found with probability 0.99, one of 0.3 with 0.12
NEAR = 0.7  # share of equal MinHash values from which two rows are called near duplicates
LONG_UNITS = 16  # bytes per word from which a text is taken to have no spaces (Chinese, Japanese, Thai): its units are characters

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_draw = np.random.default_rng(20240229)  # the permutations: any fixed odd multipliers do
_MULTIPLY = _draw.integers(0, 1 << 31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_ADD = _draw.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32)


def normalised(c: Conversation) -> str:
    """The text that is compared: contents without system messages (often one for all rows), lower case, words only.

    A text of punctuation alone stays as it is.
    """
    said = "\n".join(m.content for m in c.messages if m.role != "system") or c.messages[0].content
    return " ".join(said.translate(_PUNCTUATION).lower().split()) or said


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """64-bit hash of each text, uint64 [N]."""
    digests = b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, "<u8").copy()


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures of normalised texts, uint32 [N, P]."""
    if not texts:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    encoded = [t.encode() + b" " for t in texts]
    data_B = np.frombuffer(b"".join(encoded), np.uint8)
    lengths_N = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    row_B = np.repeat(np.arange(len(texts)), lengths_N)

    space = data_B == 32
    first_of_word = ~space & np.concatenate([[True], space[:-1]])
    first_of_char = (data_B & 0xC0) != 0x80
    words_N = np.add.reduceat(first_of_word.astype(np.int64), starts_N)
    spaceless_N = lengths_N > LONG_UNITS * np.maximum(words_N, 1)
    unit_B = np.where(spaceless_N[row_B], first_of_char & ~space, first_of_word)
    unit_B[starts_N] = True

    # a shingle runs from its unit to the beginning of the WORDS-th unit behind it, or to the end of a shorter row
    at_U = np.flatnonzero(unit_B)
    row_U = row_B[at_U]
    behind_U = np.minimum(np.arange(len(at_U)) + WORDS, len(at_U))
    same_U = np.append(row_U, -1)[behind_U] == row_U
    end_U = np.where(same_U, np.append(at_U, 0)[behind_U], ends_N[row_U])
    order_U = np.arange(len(at_U)) - np.searchsorted(row_U, row_U)  # 0 for a row's first unit
    count_U = np.bincount(row_U, minlength=len(texts))[row_U]
    keep_U = order_U <= np.maximum(count_U - WORDS, 0)  # no shingle shorter than WORDS units, but one for a short row
    start_S, end_S, row_S = at_U[keep_U], end_U[keep_U], row_U[keep_U]

    # polynomial hash of every span from prefix sums, modulo 2^64: sum(byte * base^i) / base^start
    with np.errstate(over="ignore"):
        power_B = np.cumprod(np.full(len(data_B), _BASE))
        prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum((data_B.astype(np.uint64) + np.uint64(1)) * power_B)])
        back_B = np.cumprod(np.full(len(data_B), _INVERSE))
        span_S = (prefix[end_S] - prefix[start_S]) * back_B[start_S]
        span_S ^= span_S >> np.uint64(31)
        span_S *= np.uint64(0xBF58476D1CE4E5B9)
        hash_S = (span_S >> np.uint64(32)).astype(np.uint32)
        begin_N = np.searchsorted(row_S, np.arange(len(texts)))
        out = np.empty((len(texts), PERMUTATIONS), np.uint32)
        mixed_S = np.empty_like(hash_S)
        for p in range(PERMUTATIONS):
            np.multiply(hash_S, _MULTIPLY[p], out=mixed_S)
            mixed_S += _ADD[p]
            out[:, p] = np.minimum.reduceat(mixed_S, begin_N)
    return out


@dataclass(frozen=True)
class Clusters:
    """`exact` and `near` give each row the number of the first row it equals, or nearly equals: int64 [N]."""

    exact: np.ndarray
    near: np.ndarray

    @property
    def exact_duplicates(self) -> int:
        """Rows that repeat an earlier one."""
        return int((self.exact != np.arange(len(self.exact))).sum())

    @property
    def near_duplicates(self) -> int:
        """Rows that nearly repeat an earlier one, exact repeats not counted."""
        return int((self.near != np.arange(len(self.near))).sum()) - self.exact_duplicates


def cluster(hashes: np.ndarray, signatures: np.ndarray) -> Clusters:
    """Rows into clusters. `signatures` [N, P] may be memory-mapped: one band's columns are in memory at a time."""
    n = len(hashes)
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    exact = first[which].astype(np.int64)
    lead = np.flatnonzero(exact == np.arange(n))  # one row of each exact group
    pairs_a, pairs_b = [np.flatnonzero(exact != np.arange(n))], [exact[exact != np.arange(n)]]
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        key = np.zeros(len(lead), np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = key * _BASE + signatures[lead, column]
        order = np.argsort(key, kind="stable")
        heads = np.flatnonzero(np.append(True, key[order][1:] != key[order][:-1])[: len(order)])
        head_of = np.repeat(heads, np.diff(np.append(heads, len(order))))
        here = np.arange(len(order))
        later = here > head_of  # each row against the first of its bucket and against the one before it
        for other in (head_of, here - 1):
            a, b = lead[order[here[later]]], lead[order[other[later]]]
            close = _alike(signatures, a, b)
            pairs_a.append(a[close])
            pairs_b.append(b[close])
    return Clusters(exact, _components(n, np.concatenate(pairs_a), np.concatenate(pairs_b)))


def _alike(signatures: np.ndarray, a: np.ndarray, b: np.ndarray, block: int = 1 << 16) -> np.ndarray:
    """Whether the rows of each pair are near duplicates, a block of pairs at a time."""
    out = np.zeros(len(a), bool)
    for i in range(0, len(a), block):
        out[i : i + block] = (signatures[a[i : i + block]] == signatures[b[i : i + block]]).mean(1) >= NEAR
    return out


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Connected components by hooking roots to smaller roots and halving paths; each row gets its component's smallest member."""
    label = np.arange(n)
    while True:
        new = label.copy()
        low = np.minimum(label[a], label[b])
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        while not np.array_equal(jumped := new[new], new):
            new = jumped
        if np.array_equal(new, label):
            return label
        label = new


def held_out_rows(near: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Rows to hold out: whole clusters in random order, as many as fit in `wanted` rows. Sorted row numbers, never all rows."""
    roots, which, sizes = np.unique(near, return_inverse=True, return_counts=True)
    if len(roots) < 2 or wanted < 1:
        return np.zeros(0, np.int64)
    chosen, left = [], min(wanted, len(near) - 1)
    for root in np.random.default_rng([seed, 0x5EED]).permutation(len(roots)):
        if sizes[root] <= left:
            chosen.append(root)
            left -= sizes[root]
        if not left:
            break
    return np.flatnonzero(np.isin(which, chosen))
