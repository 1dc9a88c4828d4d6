"""The store in one SQLite file: FTS5 for words, sqlite-vec's vec0 for vectors.

Words and values are always bound, never part of a statement; a question's words are quoted, so that FTS5's query language (AND,
NEAR, *, column:) is not reachable. A document's rows change in one transaction: SQLite's journal rolls back what a kill cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, DoesNotFit, MissingExtra, RunError, install
from tunesmith.files import free_bytes
from tunesmith.retrieve.chunks import Chunk
from tunesmith.retrieve.store import Passage, Scored

import sqlite3 as driver  # isort: skip

if not hasattr(driver.Connection, "enable_load_extension"):  # how this Python was built; then the extra brings another SQLite.
    with suppress(ImportError):  # One for the whole process: two in one process would undo each other's locks on a file.
        from pysqlite3 import dbapi2 as driver  # type: ignore[no-redef]

APPLICATION = 0x54534D31  # "TSM1" in the file's header: never write into a database of somebody else
TOKENIZE = "porter unicode61 remove_diacritics 2"
WAIT_S = 30  # for another process that writes
SMALL = 2_000  # chunks; scored word by word below
MOST_NEAR = 4096  # vectors that sqlite-vec finds at once
POSTINGS = 60_000  # chunks to score for one question: FTS5 scores about a million in a second, and p95 is to stay under 100 ms

SCHEMA = f"""
create table setting(name text primary key, value text not null) without rowid;
create table document(id integer primary key, path text not null unique, content text not null);
create table chunk(id integer primary key, document integer not null references document(id), start integer not null,
    "end" integer not null, context text not null, text text not null);
create index chunk_of_document on chunk(document);
create virtual table words using fts5(context, text, content='chunk', content_rowid='id', tokenize='{TOKENIZE}');
pragma application_id = {APPLICATION};
"""


class SqliteStore:
    """A store in the file `path`. `create` makes it where it is missing.

    DataError: no such file, no index of ours, damaged; RunError: another process writes; DoesNotFit: the disk is full.
    """

    def __init__(self, path: Path, *, create: bool = False):
        self.path = path
        with self._explained():
            self._db = driver.connect(f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}", uri=True, timeout=WAIT_S,
                                      isolation_level=None, check_same_thread=False)  # fmt: skip
            try:
                self._begin(create)
            except BaseException:
                self._db.close()
                raise

    def _begin(self, create: bool) -> None:
        self._db.execute("pragma trusted_schema = off")  # the file may be somebody else's: its schema runs nothing
        self._db.execute("pragma cache_size = -65536")  # KiB
        if create and not self._one("select count(*) from sqlite_master"):
            self._db.execute("begin immediate")
            if not self._one("select count(*) from sqlite_master"):  # another process may have been quicker
                for statement in filter(str.strip, SCHEMA.split(";")):
                    self._db.execute(statement)
            self._db.execute("commit")
        if self._one("pragma application_id") != APPLICATION:
            raise DataError(f"{self.path}: a database, but no index of Tunesmith", "name another file with --index")
        self._db.execute(f"create virtual table temp.asked using fts5(word, tokenize='{TOKENIZE}')")
        self._db.execute("create virtual table temp.asked_terms using fts5vocab(temp, asked, instance)")
        self._db.execute("create virtual table temp.terms using fts5vocab(main, words, row)")
        self._width, self._extended = int(self.settings().get("width", 0)), False

    # ---- changes
    def documents(self) -> dict[str, str]:
        with self._explained():
            return dict(self._db.execute("select path, content from document"))

    @contextmanager
    def changes(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("begin immediate")
            try:
                yield
                self._db.execute("commit")
            except BaseException:
                with suppress(driver.Error):  # a full disk has rolled back already
                    self._db.execute("rollback")
                raise

    def replace(self, path: str, content: str, chunks: Sequence[Chunk], vectors: Any | None = None) -> None:
        self.remove(path)
        document = self._db.execute("insert into document(path, content) values (?, ?)", (path, content)).lastrowid
        for i, c in enumerate(chunks):
            row = self._db.execute(
                'insert into chunk(document, start, "end", context, text) values (?, ?, ?, ?, ?)',
                (document, c.start, c.end, c.context, c.text),
            ).lastrowid
            self._db.execute("insert into words(rowid, context, text) values (?, ?, ?)", (row, c.context, c.text))
            if vectors is not None:
                self._extend()
                self._db.execute("insert into vectors(rowid, embedding) values (?, ?)", (row, vectors[i].tobytes()))

    def remove(self, path: str) -> None:
        document = self._one("select id from document where path = ?", path)
        if document is None:
            return
        rows = self._db.execute("select id, context, text from chunk where document = ?", (document,)).fetchall()
        self._db.executemany("insert into words(words, rowid, context, text) values ('delete', ?, ?, ?)", rows)
        if self._width:
            self._extend()
            self._db.executemany("delete from vectors where rowid = ?", [row[:1] for row in rows])
        self._db.execute("delete from chunk where document = ?", (document,))
        self._db.execute("delete from document where id = ?", (document,))

    def tidy(self) -> None:
        """Join what many small changes left apart in FTS5's index, which makes searches faster."""
        with self._explained():
            self._db.execute("insert into words(words) values ('optimize')")

    # ---- searches
    def lexical(self, words: Sequence[str], k: int) -> list[Scored]:
        with self._explained():
            if self.chunks() <= SMALL:
                return self._lexical_small(words)[:k]
            if not (match := self._match(words)):
                return []
            found = self._db.execute("select rowid, -rank from words where words match ? order by rank limit ?", (match, k))
            return [(int(row), float(score)) for row, score in found]

    def _lexical_small(self, words: Sequence[str]) -> list[Scored]:
        """FTS5 gives a word that half of the chunks hold no weight, and in a small index many words are such. So each word is asked
        for by itself, and FTS5's weight is exchanged for Lucene's, ln(1 + (N - n + 1/2) / (n + 1/2)), which is never 0.
        """
        total, scores = self.chunks(), dict[int, float]()
        for word in words:
            found = self._db.execute("select rowid, -rank from words where words match ?", (_quoted(word),)).fetchall()
            odds = (total - len(found) + 0.5) / (len(found) + 0.5)
            for row, score in found:
                scores[row] = scores.get(row, 0.0) + score * math.log1p(odds) / (math.log(odds) if odds > 1 else 1e-6)
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))

    def _match(self, words: Sequence[str]) -> str:
        """FTS5's expression: any of the words, each quoted. Where they stand in so many chunks that scoring takes long, the rarest
        of them, up to POSTINGS chunks in all: BM25 gives the others little weight.
        """
        chosen = list(words)
        if len(chosen) * self.chunks() > POSTINGS:
            self._db.execute("delete from asked")
            self._db.executemany("insert into asked(rowid, word) values (?, ?)", enumerate(chosen))
            held: dict[int, int] = {}  # word -> chunks that hold it; one of several parts has the rarest's
            terms: dict[str, int] = {}
            for row, term in self._db.execute("select doc, term from asked_terms").fetchall():
                if term not in terms:
                    terms[term] = self._one("select doc from terms where term = ?", term) or 0
                held[row] = min(held.get(row, terms[term]), terms[term])
            total, kept = 0, []
            for row in sorted((r for r in held if held[r]), key=lambda r: (held[r], r)):
                total += held[row]
                if kept and total > POSTINGS:
                    break
                kept.append(chosen[row])
            chosen = kept
        return " OR ".join(map(_quoted, chosen))

    def dense(self, vector: Any, k: int) -> list[Scored]:
        with self._explained():
            self._extend()
            found = self._db.execute(
                "select rowid, distance from vectors where embedding match ? and k = ?",
                (vector.astype("float32").tobytes(), min(k, MOST_NEAR)),
            )
            return [(int(row), 1 - float(distance)) for row, distance in found]

    def passages(self, scored: Sequence[Scored]) -> list[Passage]:
        query = """select c.id, d.path, c.start, c."end", c.text, c.context from chunk c join document d on d.id = c.document
                   where c.id = ?"""
        with self._explained():
            rows = [(self._db.execute(query, (row,)).fetchone(), score) for row, score in scored]
        return [Passage(*row[:5], score, row[5]) for row, score in rows if row]

    # ---- settings
    def settings(self) -> dict[str, str]:
        with self._explained():
            return dict(self._db.execute("select name, value from setting"))

    def keep(self, settings: Mapping[str, str]) -> None:
        """`width`, once, makes room for vectors."""
        if "width" in settings:
            self._extend()
        with self.changes():
            self._db.executemany("insert or replace into setting(name, value) values (?, ?)", list(settings.items()))
            if "width" in settings and not self._width:
                self._width = int(settings["width"])
                self._db.execute(f"create virtual table vectors using vec0(embedding float[{self._width}] distance_metric=cosine)")

    def counts(self) -> dict[str, int]:
        query = "select d.path, count(*) from document d join chunk c on c.document = d.id group by d.id order by d.path"
        with self._explained():
            return dict(self._db.execute(query))

    def chunks(self) -> int:
        with self._explained():
            return int(self._one("select count(*) from chunk"))

    def close(self) -> None:
        self._db.close()

    def _one(self, query: str, *values: object) -> Any:
        row = self._db.execute(query, values).fetchone()
        return row[0] if row else None

    def _extend(self) -> None:
        """Only where vectors are asked for: an index that has them is searched by words without sqlite-vec."""
        if not self._extended:
            load_extension(self._db)
            self._extended = True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except driver.Error as e:
            told = str(e)
            if "full" in told:
                raise DoesNotFit(
                    f"{self.path}: the disk is full, {free_bytes(self.path):,} bytes are free; what was added before is kept",
                    "make room, then give the same command again: it goes on",
                ) from None
            if "locked" in told or "busy" in told:
                raise RunError(f"{self.path}: another process writes to it", "wait until it has finished") from None
            if "unable to open" in told:
                raise DataError(
                    f"{self.path}: no index there, or it may not be opened",
                    "make one: tunesmith docs add FOLDER, or name its file with --index",
                ) from None
            if "readonly" in told:
                raise DataError(
                    f"{self.path}: may not be written to", "get the right to, or name another file with --index"
                ) from None
            if isinstance(e, driver.DatabaseError) and ("not a database" in told or "malformed" in told or "corrupt" in told):
                raise DataError(
                    f"{self.path}: {'not an index' if 'not a database' in told else f'damaged ({told})'}",
                    "name another file with --index, or delete it and add the folder again",
                ) from None
            raise


def _quoted(word: str) -> str:
    """As FTS5's text: nothing in it is syntax."""
    return '"' + word.replace('"', '""') + '"'


def load_extension(db: Any) -> None:
    """sqlite-vec into a connection. MissingExtra, with the fix, where it is not installed or cannot be loaded."""
    try:
        import sqlite_vec
    except ImportError:
        raise MissingExtra("searching by meaning needs sqlite-vec, which is not installed", install("retrieve")) from None
    if not hasattr(db, "enable_load_extension"):
        raise MissingExtra(
            "searching by meaning needs sqlite-vec, and this Python's sqlite3 was built without extensions",
            "pip install pysqlite3-binary, or take a Python whose sqlite3 loads extensions",
        )
    db.enable_load_extension(True)
    try:
        sqlite_vec.load(db)
    except driver.Error as e:
        raise MissingExtra(f"sqlite-vec cannot be loaded here ({e})", install("retrieve")) from None
    finally:
        db.enable_load_extension(False)
