"""Duplicate rows: exact ones by a hash of what is said, near ones by MinHash over shingles and locality-sensitive hashing.

A held-out split that cuts through a group of near-equal rows measures memory, not learning; so it is made by cluster. Everything is
numpy over many rows at once and follows from the text and constants alone. Legend: B bytes of the texts end to end, S shingles,
P permutations, N rows.

Source: Broder 1997 (MinHash); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4 (bands).
"""

from __future__ import annotations

import hashlib
import json
import string
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.types import Conversation

WORDS = 5  # units in a shingle
PERMUTATIONS, BANDS = 64, 16  # 16 bands of 4: a pair of similarity 0.7 is found with probability 0.99, one of 0.3 with 0.12
NEAR = 0.7  # share of equal MinHash values from which two rows are called near duplicates
PART_ROWS, PARTS = 1 << 16, 16  # rows sorted at once (some 60 bytes each), but no more parts than these: time stays linear
MAX_THREADS = 4  # of clustering: each holds a part, some 70 bytes for each row of it (4 M rows: 146 MiB with one, 199 with four)
PAIRS = 1 << 16  # compared at once: their signatures are up to 32 MiB
RUN = 256  # signatures read at once, 64 KiB: as quick as five alone
LONG_UNITS = 16  # bytes per word from which a text is taken to have no spaces (Chinese, Japanese, Thai): its units are characters

PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_BLANK = string.punctuation + "\x1c\x1d\x1e\x1f"  # the last four are white space to str.split, and not to bytes.split
_ASCII = bytes.maketrans((_BLANK + string.ascii_uppercase).encode(), (" " * len(_BLANK) + string.ascii_lowercase).encode())
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
    if said.isascii():  # the same in one pass over bytes
        return b" ".join(said.encode().translate(_ASCII).split()).decode() or said
    return " ".join(said.translate(PUNCTUATION).lower().split()) or said


def letters(c: Conversation) -> str:
    """What makes two rows exact copies: all that is said, by whom, and what is learned of it, with blanks at the ends left aside.

    Rows with the same words and other signs (5 - 3 and 5 + 3) or other system messages are only near: their signatures are equal.
    """
    parts = [c.kind]
    for m in c.messages:
        parts += (m.role, m.content.strip())
    if c.tools or any(m.extra or m.learn is not None for m in c.messages):
        parts.append(json.dumps([[[m.learn, dict(m.extra)] for m in c.messages], c.tools], default=str))
    return "\0".join(parts)


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """64-bit hash of each text, uint64 [N]."""
    digests = b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, "<u8").copy()


class Shingles:
    """Every run of `words` units of normalised texts as a 64-bit hash, for any `words`, from one pass over their bytes."""

    def __init__(self, texts: Sequence[str]):
        self.texts = len(texts)
        if not texts:
            return
        encoded = [t.encode() + b" " for t in texts]
        data_B = np.frombuffer(b"".join(encoded), np.uint8)
        lengths_N = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ends_N = np.cumsum(lengths_N)
        starts_N = ends_N - lengths_N

        space = data_B == 32
        unit_B = ~space
        unit_B[1:] &= space[:-1]  # the first of each word
        words_N = _counts(unit_B, ends_N)
        spaceless_N = lengths_N > LONG_UNITS * np.maximum(words_N, 1)
        if spaceless_N.any():
            first_of_char = (data_B & 0xC0) != 0x80
            unit_B = np.where(np.repeat(spaceless_N, lengths_N), first_of_char & ~space, unit_B)
        unit_B[starts_N] = True
        at_U = np.flatnonzero(unit_B)
        self._count_N = _counts(unit_B, ends_N)

        # polynomial hash of every span from prefix sums, modulo 2^64: sum(byte * base^i) / base^start
        with np.errstate(over="ignore"):
            power_B, back_B = _powers(len(data_B))
            prefix = np.zeros(len(data_B) + 1, np.uint64)
            np.cumsum((data_B + np.uint64(1)) * power_B, out=prefix[1:])
        self._prefix_U, self._back_U, self._prefix_N = prefix[at_U], back_B[at_U], prefix[ends_N]

    def hashes(self, words: int) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [S], and where those of each text begin, int64 [N]. A text of fewer than `words` units gives one, of all of it."""
        # a shingle runs from its unit to the beginning of the words-th unit behind it, or to the end of a shorter row
        first_N = np.cumsum(self._count_N) - self._count_N
        shingles_N = np.maximum(self._count_N - words, 0) + 1  # none shorter than that many units, but one for a short row
        begin_N = np.cumsum(shingles_N) - shingles_N
        unit_S = np.arange(shingles_N.sum()) + np.repeat(first_N - begin_N, shingles_N)
        end_S = self._prefix_U[np.minimum(unit_S + words, len(self._prefix_U) - 1)]
        end_S[begin_N + shingles_N - 1] = self._prefix_N
        with np.errstate(over="ignore"):
            span_S = (end_S - self._prefix_U[unit_S]) * self._back_U[unit_S]
            span_S ^= span_S >> np.uint64(31)
            span_S *= np.uint64(0xBF58476D1CE4E5B9)
        return span_S, begin_N


def signatures(texts: Sequence[str] | Shingles) -> np.ndarray:
    """MinHash signatures of normalised texts, uint32 [N, P]."""
    shingles = texts if isinstance(texts, Shingles) else Shingles(texts)
    if not shingles.texts:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    span_S, begin_N = shingles.hashes(WORDS)
    with np.errstate(over="ignore"):
        hash_S = (span_S >> np.uint64(32)).astype(np.uint32)
        out = np.empty((shingles.texts, PERMUTATIONS), np.uint32)
        mixed_S = np.empty_like(hash_S)
        for p in range(PERMUTATIONS):
            np.multiply(hash_S, _MULTIPLY[p], out=mixed_S)
            mixed_S += _ADD[p]
            out[:, p] = np.minimum.reduceat(mixed_S, begin_N)
    return out


def _counts(flag_B: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """How many bytes of each text are flagged."""
    return np.diff(np.searchsorted(np.flatnonzero(flag_B), ends_N), prepend=0)


_kept_powers = (np.zeros(0, np.uint64),) * 2


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """base^1 .. base^size, and the same of its inverse. Up to 8 MiB of them are remembered: a chunk of rows takes half of that."""
    global _kept_powers
    if len(_kept_powers[0]) < size:
        powers = np.cumprod(np.full(size, _BASE)), np.cumprod(np.full(size, _INVERSE))
        if size > 1 << 19:
            return powers
        _kept_powers = powers
    return _kept_powers[0][:size], _kept_powers[1][:size]


@dataclass(frozen=True)
class Clusters:
    """`exact` and `near` give each row the number of the first row it equals, or nearly equals: uint32 [N]."""

    exact: np.ndarray
    near: np.ndarray

    def among(self, rows: int) -> Clusters:
        """The same of the first `rows` rows alone: a cluster that has any of them is named after one of them."""
        return Clusters(self.exact[:rows], self.near[:rows])

    def repeats(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first rows that repeat an earlier one, and the first that only nearly do, at most so many of each."""
        exact, near = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for some in _blocks(len(self.near)):
            number = np.arange(some.start, some.stop, dtype=np.uint32)
            same = self.exact[some] != number
            exact.append(some.start + np.flatnonzero(same)[:most])
            near.append(some.start + np.flatnonzero((self.near[some] != number) & ~same)[:most])
        return np.concatenate(exact)[:most], np.concatenate(near)[:most]

    @property
    def exact_duplicates(self) -> int:
        """Rows that repeat an earlier one."""
        return len(self.exact) - len(_firsts(self.exact))

    @property
    def near_duplicates(self) -> int:
        """Rows that nearly repeat an earlier one, exact repeats not counted."""
        return len(self.near) - len(_firsts(self.near)) - self.exact_duplicates


class Finder:
    """Collects rows on disk, 392 bytes each, and then clusters them: in memory are 8 bytes a row and what one part of them takes.

    Rows whose keys are equal are brought together a part of the keys at a time, so that a part can be sorted in memory; each part
    is a pass over that file of keys. Only candidates that no band before has joined are compared, and only their signatures read:
    in a file of copies each row is compared once, and not in 16 bands.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.rows = 0
        self._exact, self._signatures = folder / "exact.bin", folder / "signatures.bin"
        self._bands = [folder / f"band{b:02}.bin" for b in range(BANDS)]
        self._files = [path.open("wb") for path in (self._exact, self._signatures, *self._bands)]

    def add(self, hashes_N: np.ndarray, signatures_NP: np.ndarray) -> None:
        """The next rows: the `text_hashes` of their `letters`, and the `signatures` of their `normalised` texts."""
        assert self.rows + len(hashes_N) < 1 << 32, "rows are counted in 32 bits"
        for file, column in zip(self._files, (hashes_N, signatures_NP, *_band_keys(signatures_NP)), strict=True):
            file.write(column.tobytes())
        self.rows += len(hashes_N)

    def clusters(self, threads: int = 1) -> Clusters:
        """Of all rows added; to be called once. At most MAX_THREADS `threads` sort keys: the same comes out for any number."""
        for file in self._files:
            file.close()
        parts, threads = min(PARTS, -(-self.rows // PART_ROWS)), min(threads, MAX_THREADS)
        exact = np.arange(self.rows, dtype=np.uint32)
        for rows, head in _ahead(threads, self._bucket, ((self._exact, part, parts) for part in range(parts))):
            exact[rows] = rows[head]
        near = exact.copy()
        tasks = ((band, part, parts, exact) for band in self._bands for part in range(parts))
        with self._signatures.open("rb", buffering=0) as signatures:
            for rows, head in _ahead(threads, self._bucket, tasks):
                later = np.flatnonzero(head < np.arange(len(rows)))
                third = later[head[later] < later - 1]
                _join(near, rows[later], rows[head[later]], signatures)  # each row against the first of its bucket
                _join(near, rows[third], rows[third - 1], signatures)  # and against the one before it
        for some in _blocks(self.rows):
            near[some] = _roots(near, near[some])
        return Clusters(exact, near)

    def _bucket(self, path: Path, part: int, parts: int, exact: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one part of the keys, sorted by key and number, and for each the place of the first with its key. With `exact`:
        only one row of those that are equal."""
        rows, keys = [], []
        with path.open("rb") as f:
            for some in _blocks(self.rows):
                key = np.fromfile(f, np.uint64, some.stop - some.start)
                here = ((key >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32) == part
                if exact is not None:
                    here &= exact[some] == np.arange(some.start, some.stop, dtype=np.uint32)
                rows.append((np.flatnonzero(here) + some.start).astype(np.uint32))
                keys.append(key[here])
        key = np.concatenate(keys)
        order = np.argsort(key, kind="stable")
        key = key[order]
        heads = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
        return np.concatenate(rows)[order], np.repeat(heads, np.diff(np.append(heads, len(key))))


def _ahead(threads: int, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """`work(*task)` of each in order, done by so many threads; no more results than that wait to be taken."""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for task in tasks:
            waiting.append(pool.submit(work, *task))
            if len(waiting) >= threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _band_keys(signatures_NP: np.ndarray) -> np.ndarray:
    """One 64-bit key for the values of each band, uint64 [BANDS, N]."""
    values = signatures_NP.reshape(-1, BANDS, PERMUTATIONS // BANDS).T
    key = np.zeros(values.shape[1:], np.uint64)
    for value in values:
        key = key * _BASE + value
    return key


def _blocks(rows: int, size: int = 1 << 16) -> Iterator[slice]:
    """Rows a block at a time, for what would take memory for each of them."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _firsts(label: np.ndarray) -> np.ndarray:
    """Rows that are the first of their cluster, uint32."""
    rows = (np.arange(some.start, some.stop, dtype=np.uint32) for some in _blocks(len(label)))
    return np.concatenate([np.zeros(0, np.uint32), *(some[label[some] == some] for some in rows)])


def _roots(label: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of each one's cluster, where `label` leads from row to earlier row."""
    while not np.array_equal(up := label[rows], rows):
        rows = up
    return rows


def _join(label: np.ndarray, a: np.ndarray, b: np.ndarray, signatures: FileIO) -> None:
    """Join the clusters of those pairs whose signatures are alike. Pairs that are in one cluster are not looked at."""
    for some in _blocks(len(a), PAIRS):
        left, right = _roots(label, a[some]), _roots(label, b[some])
        label[a[some]], label[b[some]] = left, right  # the way is shorter next time
        apart = np.flatnonzero(left != right)
        if not len(apart):
            continue
        close = apart[_alike(signatures, a[some][apart], b[some][apart])]
        roots, which = np.unique(np.concatenate([left[close], right[close]]), return_inverse=True)
        label[roots] = roots[_components(len(roots), which[: len(close)], which[len(close) :])]


def _alike(signatures: FileIO, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the rows of each pair are near duplicates. Pages of a memory map that are touched all over would stay in memory, 256
    bytes a row, so they are read: those of RUN rows at once, from the first to the last that is wanted."""
    rows, which = np.unique(np.concatenate([a, b]), return_inverse=True)
    found = np.empty((len(rows), PERMUTATIONS), np.uint32)
    starts = np.flatnonzero(np.diff(rows // RUN, prepend=-1)).tolist()
    for start, stop in pairwise([*starts, len(rows)]):
        first, last = int(rows[start]), int(rows[stop - 1])
        run = np.empty((last - first + 1, PERMUTATIONS), np.uint32)
        signatures.seek(first * run.itemsize * PERMUTATIONS)
        signatures.readinto(run)
        found[start:stop] = run[rows[start:stop] - first]
    same = np.zeros(len(a), bool)
    for some in _blocks(len(a), 1 << 12):  # what is compared stays in the cache
        same[some] = (found[which[: len(a)][some]] == found[which[len(a) :][some]]).mean(1) >= NEAR
    return same


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
    roots = _firsts(near)
    if len(roots) < 2 or wanted < 1:
        return np.zeros(0, np.int64)
    sizes = np.zeros(len(near), np.uint32)
    for some in _blocks(len(near)):
        np.add.at(sizes, near[some], 1)
    np.random.default_rng([seed, 0x5EED]).shuffle(roots)
    chosen, left = [], min(wanted, len(near) - 1)
    for root in roots:
        if sizes[root] <= left:
            chosen.append(root)
            left -= int(sizes[root])
        if not left:
            break
    of = [some.start + np.flatnonzero(np.isin(near[some], chosen)) for some in _blocks(len(near))]
    return np.concatenate(of)
