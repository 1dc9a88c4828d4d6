"""Examples on disk, read through the operating system's page cache: memory does not grow with the number of rows.

ids.bin       uint32, every example's token ids end to end
learn.bin     one bit a token in the same order, most significant bit first: 1 = trained
index.bin     one INDEX record an example
store.json    written last: file names, counts and sizes; a folder without it, or whose sizes differ, is not a store
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tunesmith.errors import DataError
from tunesmith.types import Example, Origin

INDEX = np.dtype(
    [
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


@dataclass(frozen=True)
class Packed:
    """Some examples as flat arrays, as a worker hands them over: ids uint32 [T], learn bool [T], index INDEX [N]."""

    ids: np.ndarray
    learn: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], rows: Sequence[int]) -> Packed:
        """`rows[i]` is the row number of `examples[i]`. `file` and `source` are left at 0."""
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
        self._ids, self._learn, self._index = ((folder / p).open("wb") for p in PARTS)
        self._bits = np.zeros(0, bool)  # fewer than 8 that do not fill a byte yet

    def append(self, packed: Packed, *, file: str, source: int) -> None:
        """Add examples that all come from one file of one source."""
        packed.index["file"] = self.files.setdefault(file, len(self.files))
        packed.index["source"] = source
        bits = np.concatenate([self._bits, packed.learn])
        whole = len(bits) // 8 * 8
        self._bits = bits[whole:]
        self._write(self._ids, packed.ids.astype("<u4"))
        self._write(self._learn, np.packbits(bits[:whole]))
        self._write(self._index, packed.index)

    def close(self) -> None:
        self._write(self._learn, np.packbits(self._bits))
        for f in (self._ids, self._learn, self._index):
            f.close()
        meta = {"files": list(self.files), "sizes": {p: (self.folder / p).stat().st_size for p in PARTS}}
        (self.folder / "store.json").write_text(json.dumps(meta, indent=1))

    @staticmethod
    def _write(f: BinaryIO, array: np.ndarray) -> None:
        f.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")


class ExampleStore(Sequence[Example]):
    """Examples that lie on disk; `subset` gives some of them without copying. Raises DataError for a damaged folder.

    `.index` is the INDEX table [N]; `.lengths` and `.trained` are its columns as int64 [N].
    """

    def __init__(self, folder: Path, chosen: np.ndarray | None = None):
        try:
            meta: dict[str, Any] = json.loads((folder / "store.json").read_text())
            files, sizes = list(meta["files"]), dict(meta["sizes"])
            found = {p: (folder / p).stat().st_size for p in PARTS}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{folder}: not a store of examples ({e})", "delete the folder; it is made again") from None
        if found != sizes:
            raise DataError(
                f"{folder}: the store's files have other sizes than were written", "delete the folder; it is made again"
            )
        self.folder, self.files, self._chosen = folder, files, chosen
        self._ids = _mapped(folder / "ids.bin", np.dtype("<u4"))
        self._learn = _mapped(folder / "learn.bin", np.dtype("u1"))
        self._all = np.fromfile(folder / "index.bin", INDEX)
        self._starts = np.concatenate([[0], np.cumsum(self._all["length"], dtype=np.int64)])
        self.index = self._all if chosen is None else self._all[chosen]
        self._file, self._line = self.index["file"], self.index["line"]

    def subset(self, chosen: np.ndarray) -> ExampleStore:
        """The examples at `chosen` (positions in this store), as a store of their own."""
        return ExampleStore(self.folder, chosen if self._chosen is None else self._chosen[chosen])

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return self.index["length"].astype(np.int64)

    @property
    def trained(self) -> np.ndarray:
        return self.index["trained"].astype(np.int64)

    def origin(self, i: int) -> Origin:
        return Origin(self.files[self._file[i]], int(self._line[i]))

    def __getitem__(self, i):  # type: ignore[override]
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        at = i if self._chosen is None else int(self._chosen[i])
        start, end = int(self._starts[at]), int(self._starts[at + 1])
        bits = np.unpackbits(self._learn[start // 8 : (end + 7) // 8])[start % 8 : start % 8 + end - start]
        return Example(self._ids[start:end].astype(np.int32), bits.astype(bool), self.origin(i))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's content as a plain array: slices of a np.memmap cost 10 times as much."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
