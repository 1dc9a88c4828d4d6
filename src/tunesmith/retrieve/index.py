"""A folder of documents becomes an index, and a question becomes passages.

Links are not followed, neither to files nor to folders, and are named among the unread: what is read lies in the folder itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.data import sources
from tunesmith.errors import DataError
from tunesmith.files import sha256, sha256_file
from tunesmith.retrieve import search
from tunesmith.retrieve.chunks import WORDS, Chunk, split
from tunesmith.retrieve.sqlite import SqliteStore
from tunesmith.retrieve.store import Passage

READER = "1"  # counted up when the same file gives another text or other chunks: documents are then read again
BATCH_CHUNKS, BATCH_S = 512, 2.0  # what is made durable at once: an fsync for each small file would take most of the time
DEPTH = 50  # of each ranking, for the fusion
NOT_READ = {
    ".doc": "save it as .docx", ".rtf": "save it as .docx", ".odt": "save it as .docx", ".pages": "save it as .docx",
    ".ppt": "save it as .pdf", ".pptx": "save it as .pdf", ".odp": "save it as .pdf", ".epub": "save it as .html",
    ".rst": "name it .txt", ".tex": "name it .txt", ".adoc": "name it .txt",
}  # fmt: skip

Progress = Callable[[int, int, str], None]  # documents done, of how many, which


@dataclass
class Added:
    """What `add` did: documents new or changed and their chunks, those as before, those gone, (path, reason) of those unread."""

    documents: int = 0
    chunks: int = 0
    unchanged: int = 0
    removed: int = 0
    unread: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pending:
    path: str
    content: str
    chunks: list[Chunk]


class Index:
    """An index in one file. A context manager; `close` ends it."""

    def __init__(self, store: SqliteStore):
        self.store, self._embedder = store, None
        self.path = store.path

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """An index that is there. DataError when it is missing, empty, damaged or another program's."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such index", "make it: tunesmith docs add FOLDER, or name another file with --index")
        index = cls(SqliteStore(path))
        if not index.store.chunks():
            index.close()
            raise DataError(f"{path}: the index is empty", f"add documents: tunesmith docs add FOLDER --index {path}")
        return index

    @classmethod
    def create_or_open(cls, path: str | Path, model: str | Path | None = None) -> Index:
        """An index that is there, or a new one. `model`: an encoder (a folder or hub id), which makes searches hybrid; it stays.

        DataError when the index has documents without vectors or of another model; MissingExtra without the `retrieve` extra.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}", "make the folder, or name another file with --index")
        index = cls(SqliteStore(path, create=True))
        try:
            if model is not None:
                index._take(model)
        except BaseException:
            index.close()
            raise
        return index

    def _take(self, model: str | Path) -> None:
        from tunesmith.retrieve.embed import Embedder

        known = self.store.settings().get("identity")
        if known is None and self.store.documents():
            raise DataError(f"{self.path}: was made without an embedding model", "make a new index: --index ANOTHER.sqlite")
        embedder = Embedder(model)
        if known not in (None, embedder.identity):
            raise DataError(f"{self.path}: was made with another embedding model", "leave out --model, or make a new index")
        if known is None:
            self.store.keep({"model": embedder.name, "identity": embedder.identity, "width": str(embedder.width)})
        self._embedder = embedder

    # ---- adding
    def add(self, folder: str | Path, progress: Progress | None = None, *, only: bool = False) -> Added:
        """Read a folder (or one file) and what changed in it since. A document that cannot be read is named, the rest goes on.

        A document that is no longer there, or can no longer be read, leaves the index. Killed at any moment, the index is whole:
        documents that were not reached are added by the next call. `only`: what is not from this folder leaves the index too.
        DataError when there is no such folder or no document in it.
        """
        folder, added = Path(folder).expanduser(), Added()
        files, closed = self._find(folder, added)
        known = {p: c for p, c in self.store.documents().items() if only or self._within(p, folder)}
        if not files and not known and not added.unread:
            kinds = ", ".join(sources.TEXT_SUFFIXES)
            raise DataError(f"{folder}: holds no document", f"name a folder with files ending in {kinds}")
        pending: list[_Pending] = []
        most = BATCH_CHUNKS // 8 if self.model else BATCH_CHUNKS  # vectors take time that a kill should not lose
        since, seen = time.monotonic(), set()
        for number, file in enumerate(files):
            if progress:
                progress(number, len(files), file.name)
            key = self._key(file)
            try:
                content = sha256(f"{READER} {WORDS} {sha256_file(file)}")
                if known.get(key) == content:
                    seen.add(key)
                    added.unchanged += 1
                    continue
                chunks = split(sources.document(file))
                if not chunks:
                    raise DataError(f"{file}: holds no text", "remove it")
            except DataError as e:
                added.unread.append((_shown(file), e.what.removeprefix(f"{file}: ") + (f" (fix: {e.fix})" if e.fix else "")))
                continue
            except FileNotFoundError:  # gone since the folder was looked through
                continue
            except (OSError, MemoryError) as e:
                seen.add(key)  # it may be there again tomorrow: what was read before stays
                told = e.strerror if isinstance(e, OSError) and e.strerror else "this computer's memory is too small"
                added.unread.append((_shown(file), f"cannot be read: {told}"))
                continue
            seen.add(key)
            pending.append(_Pending(key, content, chunks))
            if sum(len(p.chunks) for p in pending) >= most or time.monotonic() - since > BATCH_S:
                self._write(pending, added)
                pending, since = [], time.monotonic()
        self._write(pending, added)
        gone = [p for p in known if p not in seen and not any(self._within(p, c) for c in closed)]
        if gone:
            with self.store.changes():
                for path in gone:
                    self.store.remove(path)
        added.removed = len(gone)
        if added.chunks > 2 * BATCH_CHUNKS:
            self.store.tidy()
        if progress:
            progress(len(files), len(files), "")
        return added

    def _write(self, pending: list[_Pending], added: Added) -> None:
        if not pending:
            return
        vectors: Any = None
        if embedder := self.embedder():
            vectors = embedder([f"{c.context}\n{c.text}" if c.context else c.text for p in pending for c in p.chunks])
        at = 0
        with self.store.changes():
            for p in pending:
                of_this = None if vectors is None else vectors[at : at + len(p.chunks)]
                self.store.replace(p.path, p.content, p.chunks, of_this)
                at += len(p.chunks)
        added.documents += len(pending)
        added.chunks += at

    def _find(self, folder: Path, added: Added) -> tuple[list[Path], list[Path]]:
        """The documents below a folder in the order of their names, and the folders that cannot be looked into."""
        if folder.is_file():
            return [folder], []
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder", "correct the path (relative paths start at the current folder)")
        files: list[Path] = []
        closed: list[Path] = []

        def unreadable(e: OSError) -> None:
            closed.append(Path(e.filename))
            added.unread.append((_shown(Path(e.filename)), f"cannot be read: {e.strerror}"))

        for path in _walk(folder, unreadable):
            suffix = path.suffix.lower()
            if path.is_symlink():
                added.unread.append((_shown(path), "a link; links are not followed"))
            elif suffix in NOT_READ:
                added.unread.append((_shown(path), f"files of type {suffix} are not read (fix: {NOT_READ[suffix]})"))
            elif sources.is_document(path):
                if not path.is_file():
                    added.unread.append((_shown(path), "a pipe or a device"))
                elif _shown(path) != str(path):
                    added.unread.append((_shown(path), "its name is not UTF-8"))
                else:
                    files.append(path)
        if folder in closed:
            raise DataError(f"{folder}: cannot be read", "check its permissions")
        return sorted(files), closed

    def _key(self, path: Path) -> str:
        """A document's name: its path from the folder of the index, so that both can move together."""
        path, home = Path(os.path.abspath(path)), os.path.abspath(self.path.parent)
        with suppress(ValueError):  # another drive
            return Path(os.path.relpath(path, home)).as_posix()
        return path.as_posix()

    def _within(self, key: str, folder: Path) -> bool:
        home = os.path.abspath(self.path.parent)
        return Path(os.path.abspath(os.path.join(home, key))).is_relative_to(os.path.abspath(folder))

    # ---- searching
    def search(self, query: str, k: int = 5, *, by_words: bool = False) -> list[Passage]:
        """The best k passages, best first; none when no word of the question is anywhere.

        By BM25; with a model by BM25 and by meaning, fused by rank (and then never none). `by_words`: by BM25 all the same.
        ModelError and MissingExtra when the index has a model that cannot be loaded here.
        """
        if k < 1:
            raise DataError(f"{k} passages: must be 1 or more", "write -k 5")
        if not (chunks := self.store.chunks()):
            raise DataError(f"{self.path}: the index is empty", f"add documents: tunesmith docs add FOLDER --index {self.path}")
        k = min(k, chunks)
        asked = search.asked(query)
        embedder = None if by_words else self.embedder()
        if embedder is None:
            return self.store.passages(self.store.lexical(asked, k))
        depth = max(DEPTH, k)
        vector = embedder([query], query=True)[0]
        fused = search.fuse([self.store.lexical(asked, depth), self.store.dense(vector, depth)], (1.0, search.MEANING))
        return self.store.passages(fused[:k])

    def embedder(self) -> Any | None:
        """The index's model, loaded when it is first asked for; None when it has none."""
        settings = self.store.settings()
        if self._embedder is None and "model" in settings:
            from tunesmith.retrieve.embed import Embedder

            embedder = Embedder(settings["model"], offline=True)  # an index from somebody does not make us download
            if embedder.identity != settings["identity"]:
                raise DataError(f"{self.path}: {settings['model']} has changed since", "make a new index with it, or bring it back")
            self._embedder = embedder
        return self._embedder

    # ---- what is in it
    @property
    def documents(self) -> list[str]:
        return sorted(self.store.documents())

    @property
    def chunks(self) -> int:
        return self.store.chunks()

    @property
    def model(self) -> str | None:
        return self.store.settings().get("model")

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _walk(root: Path, unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    """Files and links below a folder; hidden ones are passed over."""
    for folder, inner, names in os.walk(root, onerror=unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (link for name in inner if (link := Path(folder, name)).is_symlink())
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _shown(path: Path) -> str:
    """A path that can be printed and kept, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "replace")
