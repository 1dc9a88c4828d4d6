"""Examples on disk, read through the operating system's page cache: memory does not grow with the number of rows.

ids.bin       uint32, every example's token ids end to end
learn.bin     one bit a token in the same order, most significant bit first: 1 = trained
index.bin     one INDEX record an example
store.json    written last: the index's columns, file names and sizes; a folder without it, or where they differ, is not a store
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import DataError
from tunesmith.types import Example, Origin

INDEX = np.dtype(
    [
        ("start", "<u8"),  # where its first token stands in ids.bin
        ("length", "<u4"),  # tokens
        ("trained", "<u4"),  # tokens that are targets
        ("last", "<u4"),  # position of the last target: what collate keeps
        ("row", "<u4"),  # which row it came from, counted from 0 over all sources
        ("line", "<u4"),  # that row's line in its file
        ("file", "<u2"),  # its file, in store.json's table
        ("source", "<u2"),  # its source, in the order of the run file
    ]
)
PARTS = ("ids.bin", "learn.bin", "index.bin")
_COLUMNS = [list(column) for column in INDEX.descr]


@dataclass(frozen=True)
class Packed:
    """Some examples as flat arrays, as a worker hands them over: ids uint32 [T], learn bool [T], index INDEX [N].

    What the index says of the whole store (`start`, `row`, `file`, `source`) is settled when they are appended to one.
    """

    ids: np.ndarray
    learn: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], rows: Sequence[int]) -> Packed:
        """`rows[i]` is the row number of `examples[i]`, counted from the first of them."""
        index = np.zeros(len(examples), INDEX)
        if not examples:
            return cls(np.zeros(0, np.uint32), np.zeros(0, bool), index)
        ids = np.concatenate([e.ids for e in examples]).astype(np.uint32)
        learn = np.concatenate([e.learn for e in examples])
        lengths = np.fromiter((len(e.ids) for e in examples), np.int64, len(examples))
        starts = np.cumsum(lengths) - lengths
        at = np.flatnonzero(learn)  # positions of targets in the flat stream
        first, beyond = np.searchsorted(at, starts), np.searchsorted(at, starts + lengths)
        index["length"], index["trained"], index["row"] = lengths, beyond - first, rows
        index["line"] = [e.origin.line for e in examples]
        some = beyond > first
        index["last"][some] = at[beyond[some] - 1] - starts[some]
        return cls(ids, learn, index)


class StoreWriter:
    """Appends to a store; nothing is a store before `close`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.files = folder, dict[str, int]()
        self._open = {p: ((folder / p).open("wb"), hashlib.sha256()) for p in PARTS}
        self._bits = np.zeros(0, bool)  # fewer than 8 that do not fill a byte yet
        self._tokens = 0

    def append(self, packed: Packed, *, file: str, source: int, row: int = 0) -> None:
        """Add examples that all come from one file of one source; their rows are counted on from `row`."""
        lengths = packed.index["length"].astype(np.uint64)
        packed.index["start"] = np.uint64(self._tokens) + np.cumsum(lengths) - lengths
        packed.index["file"] = self.files.setdefault(file, len(self.files))
        packed.index["source"] = source
        packed.index["row"] += np.uint32(row)
        self._tokens += len(packed.ids)
        bits = np.concatenate([self._bits, packed.learn])
        whole = len(bits) // 8 * 8
        self._bits = bits[whole:]
        self._write("ids.bin", packed.ids.astype("<u4"))
        self._write("learn.bin", np.packbits(bits[:whole]))
        self._write("index.bin", packed.index)

    def close(self) -> None:
        self._write("learn.bin", np.packbits(self._bits))
        for f, _ in self._open.values():
            f.close()
        meta = {"columns": _COLUMNS, "files": list(self.files), "sizes": {p: (self.folder / p).stat().st_size for p in PARTS}}
        (self.folder / "store.json").write_text(json.dumps(meta, indent=1))

    @property
    def sums(self) -> dict[str, str]:
        """sha256 of what was written to each of PARTS: taken as it comes, while worker processes are at work, not at the end."""
        return {name: digest.hexdigest() for name, (_, digest) in self._open.items()}

    def _write(self, name: str, array: np.ndarray) -> None:
        content = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
        f, digest = self._open[name]
        f.write(content)
        digest.update(content)


class ExampleStore(Sequence[Example]):
    """Examples that lie on disk; `subset` gives some of them without copying. Raises DataError for a damaged folder.

    Memory: nothing for the whole store, 8 bytes an example for a subset of it.
    """

    def __init__(self, folder: Path):
        try:
            meta: dict[str, Any] = json.loads((folder / "store.json").read_text())
            files, sizes, columns = list(meta["files"]), dict(meta["sizes"]), meta["columns"]
            found = {p: (folder / p).stat().st_size for p in PARTS}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{folder}: not a store of examples ({e})", "delete the folder; it is made again") from None
        if columns != _COLUMNS:
            raise DataError(f"{folder}: a store of another version", "delete the folder; it is made again")
        if found != sizes:
            raise DataError(
                f"{folder}: the store's files have other sizes than were written", "delete the folder; it is made again"
            )
        self.folder, self.files = folder, files
        self._ids, self._learn, self._index = (
            _mapped(folder / p, dtype) for p, dtype in zip(PARTS, (np.dtype("<u4"), np.dtype("u1"), INDEX), strict=True)
        )
        self._chosen: np.ndarray | None = None  # of a subset: positions in the whole store

    def subset(self, chosen: np.ndarray) -> ExampleStore:
        """The examples at `chosen` (positions in this store), as a store of their own."""
        part = copy(self)
        part._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return part

    def __len__(self) -> int:
        return len(self._index if self._chosen is None else self._chosen)

    def column(self, name: str) -> np.ndarray:
        """One column of the INDEX table [N]. The table is read, not mapped: pages of a map count as memory, 32 bytes an example."""
        column, at = np.empty(len(self._index), INDEX[name]), 0
        with (self.folder / "index.bin").open("rb") as f:
            while len(some := np.fromfile(f, INDEX, 1 << 16)):
                column[at : at + len(some)] = some[name]
                at += len(some)
        return column if self._chosen is None else column[self._chosen]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return self.column("length").astype(np.int64)

    @property
    def trained(self) -> np.ndarray:
        """Of these, how many are targets, int64 [N]."""
        return self.column("trained").astype(np.int64)

    def trained_from(self, position: int) -> int:
        """How many tokens at `position` and behind it are targets, over all examples."""
        start, length = self.column("start").astype(np.int64), self.lengths
        long = length > position
        begin, end = (start + position)[long], (start + length)[long]
        if not len(begin):
            return 0
        bits, first, last = np.append(self._learn, np.uint8(0)), begin // 8, end // 8  # the last end may lie behind them all
        edges = np.stack([first, last], 1).ravel()
        between = np.add.reduceat(np.bitwise_count(bits), edges, dtype=np.int64)[::2]  # ones of the bytes first..last - 1

        def before(bit: np.ndarray) -> np.ndarray:
            """Ones of a bit's byte that stand before it."""
            return np.bitwise_count(bits[bit // 8] >> (8 - bit % 8))

        return int(between[first < last].sum() + before(end).sum(dtype=np.int64) - before(begin).sum(dtype=np.int64))

    def origin(self, i: int) -> Origin:
        entry = self._index[i if self._chosen is None else self._chosen[i]]
        return Origin(self.files[entry["file"]], int(entry["line"]))

    def __getitem__(self, i):  # type: ignore[override]
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        start, length, _, _, _, line, file, _ = self._index[i if self._chosen is None else self._chosen[i]].item()
        skip, end = start % 8, start + length
        bits = np.unpackbits(self._learn[start // 8 : (end + 7) // 8])[skip : skip + length]
        return Example(self._ids[start:end].astype(np.int32), bits.view(bool), Origin(self.files[file], line))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's content as a plain array: slices of a np.memmap cost 10 times as much."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
