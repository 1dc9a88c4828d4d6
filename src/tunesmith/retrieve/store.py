"""What an index is kept in: the face that a store shows. sqlite.py is the one there is; a server could be another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.retrieve.chunks import Chunk

Scored = tuple[int, float]  # a chunk's id and its score; the higher the better


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk that was found: `text` is the document's [start, end), in characters of what data.sources.document reads.

    `score`: BM25's, or the fused ranks' (hybrid); comparable within one search only.
    """

    id: int
    document: str
    start: int
    end: int
    text: str
    score: float
    context: str = ""


class Store(Protocol):
    """Documents with their chunks. A document is in the store whole or not at all, whatever ends the process."""

    def documents(self) -> Mapping[str, str]:
        """Path -> the content hash it was added with."""

    def changes(self) -> AbstractContextManager[None]:
        """What is replaced and removed inside becomes durable at the end, or not at all."""

    def replace(self, path: str, content: str, chunks: Sequence[Chunk], vectors: Any | None = None) -> None:
        """A document's chunks instead of those it had. `vectors`: float32 [chunks, width], where the store has an embedder."""

    def remove(self, path: str) -> None: ...

    def lexical(self, words: Sequence[str], k: int) -> list[Scored]:
        """The best k chunks for any of the words, by BM25."""

    def dense(self, vector: Any, k: int) -> list[Scored]:
        """The k chunks of nearest vectors, by cosine; `vector`: float32 [width], of length 1."""

    def passages(self, scored: Sequence[Scored]) -> list[Passage]:
        """In the same order."""

    def settings(self) -> dict[str, str]: ...

    def keep(self, settings: Mapping[str, str]) -> None: ...

    def counts(self) -> Mapping[str, int]:
        """Path -> its chunks, by path."""

    def chunks(self) -> int: ...

    def tidy(self) -> None:
        """After many changes: whatever makes searches faster."""

    def close(self) -> None: ...
