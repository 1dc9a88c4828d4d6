"""Files to rows: jsonl, json, csv, tsv, parquet, txt, md, html (each also .gz), xlsx, pdf, docx, a folder of these, or hub:o/name.

Two kinds of fault, never mixed. A bad row is a `Refused` with its file, line and reason, and reading goes on. A bad file (missing,
empty, not UTF-8, cut off, damaged, a decompression bomb) is a DataError with the fix; all bad files of a folder are named at once,
at the end.

    find(path)          which files, in what order, and which were left aside
    chunks(files)       the files' text cut into rows, some hundreds at a time: cheap, so that one reader feeds many workers
    parse(chunk)        rows as values: the costly part
    rows(path)          all three, one row after the other
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from tunesmith.data import dialogues, documents, json_rows
from tunesmith.data.columns import SAMPLE_CHARS, SAMPLE_ROWS, ColumnsError, choose, rename
from tunesmith.data.exports import BESIDE, CONVERSATIONS
from tunesmith.data.row import BLOCK, MAX_ROW, Item, Refused, Row, fault, iconv, not_utf8
from tunesmith.errors import DataError
from tunesmith.types import Origin

CHUNK_ROWS, CHUNK_CHARS = 1024, 4 << 20
TEXT_PIECE = 64 << 10  # a raw text file is cut at blank lines into pieces of about this size, so that a share of it can be held out
LINE_MOST = 4 << 20  # characters; a longer line of raw text is taken in pieces
BOMB_FROM, BOMB_RATIO, BOMB_MAX = 64 << 20, 20, 4 << 30  # gzip: real text packs 3x to 10x

ROWS_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx"), (".txt", ".md", ".html", ".pdf", ".docx")
SPOKEN = (".txt", ".md")  # text that may be a dialogue
PACKED = (".xlsx", ".pdf", ".docx")  # whole files, which are packed themselves: not read as .gz
ALIASES = {".htm": ".html", ".xhtml": ".html", ".ndjson": ".jsonl", ".text": ".txt", ".markdown": ".md"}
OTHER_FILES = (  # what a file begins with that is not what its name says; what it is, and what to do
    (b"PK\x03\x04", "a zip archive", "unpack it; an Office file keeps its own ending (.xlsx, .docx)"),
    (b"\x1f\x8b\x08", "packed with gzip", "add .gz to its name; if it ends in .gz, it was packed twice: gzip -d it once"),
    (b"(\xb5/\xfd", "packed with zstd", "zstd -d it, or pack it with gzip"),
    (b"\xfd7zXZ\0", "packed with xz", "xz -d it, or pack it with gzip"),
    (b"BZh91AY&SY", "packed with bzip2", "bzip2 -d it, or pack it with gzip"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"%PDF-", "a PDF", "name it .pdf"),
    (b"SQLite format 3\0", "a SQLite database", "write the table as .csv: sqlite3 -header -csv FILE 'select * from TABLE'"),
    (b"\xd0\xcf\x11\xe0", "an Office file in the old binary form", "save it as .xlsx or .docx"),
)
NOT_ROWS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}  # what the datasets library puts beside its rows
# fmt: off
COLUMNS = frozenset((
    "messages", "conversation", "conversations", "tools", "functions", "instruction", "input", "output", "response", "system",
    "system_prompt", "context", "history", "question", "answer", "query", "prompt", "completion", "inputs", "targets", "text",
    "label", "input_ids", "message_tree_id", "role", "chosen", "rejected", "chosen_messages", "rejected_messages", "response_j",
    "response_k", "mapping", "current_node", "create_time", "preferred_output", "non_preferred_output",
    "image", "images", "audio", "audios", "video", "videos",
))
# fmt: on
"""Keys that formats.py reads of a row: a table's column is found by them however its name is capitalised."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file. An item is a JSON text still to be parsed (`raw`), a value, or a row already refused."""

    file: str
    raw: bool
    lines: list[int]
    items: list[Any]
    position: int  # bytes of the file on disk that have been read
    columns: Mapping[str, str] = field(default_factory=dict)  # under which keys its rows are, where the person has said so
    look: bool = False  # for faults in its rows (data/findings)
    rest: bool = False  # columns that are not used stay in the row, under their own names


@dataclass(frozen=True)
class Files:
    """What a source is made of. `label` is the source as the person wrote it."""

    label: str
    paths: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]  # size and time of change of each, when it was found
    skipped: tuple[str, ...] = ()  # files of a folder that hold no rows, with the reason
    notes: Counter[str] = field(default_factory=Counter)  # what was mended or guessed in whole files, e.g. a byte order mark
    columns: Mapping[str, str] = field(default_factory=dict)  # data.train[].columns: what is what, as the person wrote it
    rest: bool = False  # columns that are not used stay in the row, under their own names

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(p.stat().st_size for p in self.paths)


def find(path: str | Path, columns: Mapping[str, str] | None = None) -> Files:
    """The files of a source. A folder is walked in name order; hidden files are passed over. DataError when nothing is there.

    Beside files with rows, text files are left aside (a dataset's README is not training text); alone, they are the data. A run
    folder inside is passed over: its samples and held-out rows would be trained on.
    """
    label, columns = str(path), columns or {}
    if label.startswith("hub:"):
        from tunesmith.hub import resolve_dataset

        path = resolve_dataset(label)
    root = Path(path)
    try:
        root = root.expanduser()
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero character in the path
        _missing(root)
    except RuntimeError:
        fault(root, "there is no such user's home folder", "write the path out")
    except OSError as e:
        fault(root, f"cannot be read: {e.strerror}", "correct the path; check its permissions and its links")
    if stat.S_ISREG(mode):
        if _suffix(root) not in ROWS_SUFFIXES + TEXT_SUFFIXES:
            fault(root, f"files of type {root.suffix or 'without a suffix'} are not read", _KNOWN)
        return Files(label, (root,), _stamps([root]), columns=columns)
    if not stat.S_ISDIR(mode):
        fault(root, "neither a file nor a folder (a pipe or a device)", "write what it gives into a file: cat it > rows.jsonl")
    every, not_files = _walk(root)
    runs = {p.parent for p in every if p.name == "run.yaml" and (p.parent / "manifest.json").is_file()}
    every = [p for p in every if runs.isdisjoint(p.parents)]
    exported = {p.parent for p in every if CONVERSATIONS.fullmatch(p.name)}
    beside = {p for p in every if p.name in NOT_ROWS or (p.parent in exported and BESIDE.fullmatch(p.name))}
    with_rows = [p for p in every if _suffix(p) in ROWS_SUFFIXES and p not in beside]
    text = [p for p in every if _suffix(p) in TEXT_SUFFIXES]
    if not with_rows and not text:
        fault(root, "the folder holds no file with rows", _KNOWN)
    chosen = with_rows or text
    skipped = [
        f"{p} ({'text beside files with rows' if p in text else 'metadata' if p in beside else 'unknown type'})"
        for p in every
        if p not in set(chosen)
    ]
    skipped += [f"{run} (a run folder)" for run in sorted(runs)]
    return Files(label, tuple(chosen), _stamps(chosen), tuple(skipped + not_files), columns=columns)


def _missing(path: Path) -> NoReturn:
    if os.path.islink(path):
        fault(path, f"a link to {os.readlink(path)}, which is not there", "correct the link, or give the file itself")
    try:
        near = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))[:8]
    except (OSError, ValueError):
        near = []
    beside = f"; {path.parent} holds {', '.join(near)}" if near else ""
    fault(path, "no such file or folder", f"correct the path (relative paths start at the current folder){beside}")


def _walk(root: Path) -> tuple[list[Path], list[str]]:
    """The files below a folder in the order of their names, and what is neither file nor folder. Hidden ones are passed over."""
    files, others, faults = [], [], []

    def unreadable(e: OSError) -> None:
        faults.append(DataError(f"{e.filename}: cannot be read: {e.strerror}", "check its permissions, or move it away"))

    for folder, inner, names in os.walk(root, onerror=unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        others += [f"{link} (a link to a folder)" for name in inner if (link := Path(folder, name)).is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if os.path.isfile(path):
                files.append(path)
            else:
                others.append(f"{path} ({'a link that leads nowhere' if path.is_symlink() else 'a pipe or a device'})")
    raise_all(faults)
    return sorted(files), sorted(others)


def _stamps(paths: list[Path]) -> tuple[tuple[int, int], ...]:
    """Of files that can be opened; DataError names all that cannot."""
    stamps, faults = [], []
    for path in paths:
        try:
            path.open("rb").close()
            stamps.append(_stamp(path))
        except OSError as e:
            faults.append(_unreadable(path, e))
    raise_all(faults)
    return tuple(stamps)


def _stamp(path: Path) -> tuple[int, int]:
    return (said := path.stat()).st_size, said.st_mtime_ns


def _unreadable(path: Path, e: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {e.strerror or e}", "check its permissions and the disk")


def chunks(files: Files) -> Iterator[Chunk]:
    """Every row of every file, in order. Raises one DataError at the end that names all bad files."""
    faults: list[DataError] = []
    voices = _voices(files)
    for path, stamp in zip(files.paths, files.stamps, strict=True):
        bad = None
        try:
            yield from _grouped(path, files, voices)
        except DataError as e:
            bad = e
        except OSError as e:
            bad = _unreadable(path, e)
        except MemoryError:
            bad = DataError(f"{path}: this computer's memory is too small to read it", "split it into several files")
        with suppress(OSError):
            if _stamp(path) != stamp:  # what was read is neither the old file nor the new one
                bad = DataError(f"{path}: changed while it was read", "run it again when nothing writes to the file")
        faults += [bad] if bad else []
    raise_all(faults)


def _voices(files: Files) -> dialogues.Voices:
    """Who speaks in the dialogues among the files: a look at the beginning of each. Faults are told when they are read."""
    voices = dialogues.Voices()
    if files.columns.keys() & {"text", "answer"}:
        return voices
    for path in files.paths:
        if _suffix(path) in SPOKEN:
            with suppress(DataError, OSError), _open(path, Counter())[0] as f:
                if found := _look(f, files):
                    voices.add(found)
    return voices


def _look(f: BinaryIO, files: Files) -> dialogues.Look | None:
    if "text" in files.columns:
        return None
    return dialogues.look(f.peek(BLOCK)[: dialogues.HEAD].decode(errors="ignore"), files.columns)  # type: ignore[attr-defined]


def raise_all(faults: list[DataError]) -> None:
    """One DataError for all of them; none for none."""
    if faults:
        raise DataError("\n".join(e.what for e in faults), "; ".join(dict.fromkeys(e.fix for e in faults)))


def parse(chunk: Chunk) -> list[Row | Refused]:
    """A chunk's rows as values."""
    out: list[Row | Refused] = []
    for line, item in zip(chunk.lines, chunk.items, strict=True):
        if isinstance(item, Refused):
            out.append(item)
        elif chunk.raw:
            out.append(json_rows.row_of(item, Origin(chunk.file, line)))
        else:
            out.append(Row(item, Origin(chunk.file, line)))
    return [_renamed(row, chunk.columns, chunk.rest) for row in out] if chunk.columns else out


def _renamed(row: Row | Refused, columns: Mapping[str, str], rest: bool) -> Row | Refused:
    if isinstance(row, Refused) or not isinstance(row.value, dict):
        return row
    value = _named(row.value, columns, rest)
    return Refused(row.origin, value, str(row.value)[:300]) if isinstance(value, str) else Row(value, row.origin)


def _named(value: dict[str, Any], columns: Mapping[str, str], rest: bool) -> dict[str, Any] | str:
    """`rename`, and with `rest` the other columns too, but for those that would be read as another kind of row."""
    named = rename(value, columns)
    if not rest or isinstance(named, str):
        return named
    return {k: v for k, v in value.items() if k not in COLUMNS and k not in columns.values()} | named


def rows(path: str | Path) -> Iterator[Row | Refused]:
    """Every row of a source. Raises DataError for bad files, after the rows of the good ones."""
    for chunk in chunks(find(path)):
        yield from parse(chunk)


def is_document(path: Path) -> bool:
    """Whether `document` reads files of this name."""
    return _suffix(path) in TEXT_SUFFIXES


def document(path: Path) -> str:
    """The whole text of a .txt, .md, .html, .pdf or .docx file, its lines ended by a line feed; headings of html as `## Title`.

    DataError when it cannot be read, OSError when it cannot be opened. Offsets into a document are offsets into this text.
    """
    suffix, notes = _suffix(path), Counter[str]()
    if suffix not in TEXT_SUFFIXES:
        fault(path, f"files of type {path.suffix or 'without a suffix'} are not read as documents", "save it as .txt, .md or .pdf")
    if suffix in PACKED:
        if not path.stat().st_size:
            fault(path, "the file is empty", "remove it, or save it again")
        text = "".join(line for _, line in (documents.pdf if suffix == ".pdf" else documents.docx)(path, notes))
    else:
        f, _ = _open(path, notes)
        with f:
            lines = _decoded(f, path, MAX_ROW if suffix == ".html" else LINE_MOST)
            text = "".join(line for _, line in documents.html(lines, path, True)) if suffix == ".html" else "".join(lines)
    if "\0" in text:
        fault(path, "a zero character (NUL) in the text", "save it again as plain text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- files ---------------------------------------------------------------------------------------------------------------------

_KNOWN = f"give a file ending in {', '.join(ROWS_SUFFIXES + TEXT_SUFFIXES)} (most also .gz), a folder of them, or hub:owner/name"


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return ALIASES.get(suffix, suffix)


class _Gunzip(io.RawIOBase):
    """A gzip file's content, with a limit on how far it may swell."""

    def __init__(self, path: Path):
        self.path, self.packed, self.out = path, path.stat().st_size, 0
        self.file = gzip.GzipFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.file.read(min(len(buffer), BLOCK))
        except EOFError:
            fault(self.path, "the gzip file is cut off", "copy or download it again")
        except (gzip.BadGzipFile, zlib.error) as e:
            fault(
                self.path,
                f"not a whole gzip file ({e})",
                "copy or download it again, or drop .gz from its name if it is not packed",
            )
        self.out += len(data)
        if self.out > BOMB_FROM and (self.out > BOMB_RATIO * self.packed or self.out > BOMB_MAX):
            fault(
                self.path,
                f"unpacks to more than {self.out:,} bytes from {self.packed:,}; the limit is {BOMB_RATIO} times its size and 4 GiB",
                "unpack it yourself if you trust it, and give the unpacked file",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _open(path: Path, notes: Counter[str]) -> tuple[BinaryIO, Any]:
    """A buffered binary file behind its byte order mark, and a function that tells how many bytes on disk have been read."""
    if path.suffix.lower() == ".gz":
        raw = _Gunzip(path)
        f, tell = io.BufferedReader(raw, BLOCK), raw.file.fileobj.tell  # type: ignore[union-attr]
    else:
        f = path.open("rb", buffering=BLOCK)
        tell = f.tell
    head = f.peek(4096)
    if not head:
        fault(path, "the file is empty", "remove it, or write its rows again")
    if head.startswith(b"\xef\xbb\xbf"):
        f.read(3)
        notes["UTF-8 byte order mark passed over"] += 1
    elif wide := _wide(head[:4096]):
        fault(path, f"not UTF-8 but {wide}", iconv(wide, path))
    for mark, what, fix in OTHER_FILES:
        if head.startswith(mark):
            fault(path, f"the file is {what}, whatever its name says", fix)
    return f, tell


def _wide(head: bytes) -> str:
    """UTF-16 or UTF-32, by its byte order mark or by where the zero bytes stand."""
    for mark, name in ((b"\xff\xfe\0\0", "utf32"), (b"\0\0\xfe\xff", "utf32"), (b"\xff\xfe", "utf16"), (b"\xfe\xff", "utf16")):
        if head.startswith(mark):
            return name
    even, odd, half = head[0::2].count(0), head[1::2].count(0), len(head) // 2
    if half >= 2 and max(even, odd) > 0.6 * half and min(even, odd) < 0.2 * half:
        return "utf-16le" if odd > even else "utf-16be"
    return ""


def _grouped(path: Path, files: Files, voices: dialogues.Voices) -> Iterator[Chunk]:
    """One file as chunks of at most CHUNK_ROWS rows and about CHUNK_CHARS characters."""
    suffix, notes = _suffix(path), files.notes
    if suffix == ".parquet":
        read = [0]
        yield from _collected(path, False, _parquet(path, read), lambda: read[0], files.columns)
        return
    if suffix in PACKED:
        yield from _collected(path, False, _packed(path, suffix, files), lambda: 0, {})
        return
    columns: Mapping[str, str] = files.columns if suffix in (".jsonl", ".json") else {}
    f, tell = _open(path, notes)
    with f:
        if suffix == ".json" and (first := json_rows.kind_of(f, path)) != "lines":
            raw, items = False, json_rows.read(f, path, first, notes)
        elif suffix in (".jsonl", ".json"):
            raw, items = True, json_rows.lines(f, path, notes)
        elif suffix in (".csv", ".tsv"):
            raw, items = False, _csv(f, path, suffix, files)
        elif suffix == ".html":
            raw, items = False, _text(documents.html(_decoded(f, path), path), path)
        elif found := _look(f, files):
            raw, items = False, _dialogue(f, path, found, files, voices)
        elif files.columns.keys() & {"prompt", "answer"}:
            fix = "correct data.train[].columns: in text files it names speakers, as in `Anna: ...`; or drop it"
            fault(path, "no lines of speakers are found", fix)
        else:
            raw, items = False, _text(_numbered(_decoded(f, path, LINE_MOST)), path)
        yield from _collected(path, raw, items, tell, columns)


def _collected(path: Path, raw: bool, items: Iterator[Item], tell: Any, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Items as chunks."""
    lines: list[int] = []
    values: list[Any] = []
    size, total = 0, 0
    for line, item, chars in items:
        lines.append(line)
        values.append(item)
        size += chars
        if len(lines) >= CHUNK_ROWS or size >= CHUNK_CHARS:
            yield Chunk(str(path), raw, lines, values, tell(), columns)
            total += len(lines)
            lines, values, size = [], [], 0
    if lines:
        yield Chunk(str(path), raw, lines, values, path.stat().st_size, columns)
    elif not total:
        fault(path, "the file holds no rows", "remove it, or write its rows again")


def _packed(path: Path, suffix: str, files: Files) -> Iterator[Item]:
    """The rows of a spreadsheet, or the pieces of a document."""
    if path.name.lower().endswith(".gz"):
        fault(path, f"a {suffix} file is not read as .gz", f"gzip -dk {path}, and use the unpacked file")
    if not path.stat().st_size:
        fault(path, "the file is empty", "remove it, or save it again")
    if suffix == ".xlsx":
        found = documents.xlsx(path, files.notes)
        header = next(found, (0, []))[1]
        if not header:
            fault(path, "no sheet holds a row", "remove it, or save it again")
        yield from _table(header, found, path, files, ",")
    else:
        yield from _text((documents.pdf if suffix == ".pdf" else documents.docx)(path, files.notes), path)


# ---- tables and text -----------------------------------------------------------------------------------------------------------


def _csv(f: BinaryIO, path: Path, suffix: str, files: Files) -> Iterator[Item]:
    """One row a record, its keys from the first line. An empty cell is an empty string."""
    csv.field_size_limit(MAX_ROW)
    text = _decoded(f, path)
    first, before = next(text, ""), 0
    mark = "\t" if suffix == ".tsv" else _mark(first)
    if said := re.fullmatch(r"sep=(.)\s*", first):  # what Excel writes for itself
        mark, first, before = said[1], next(text, ""), 1
        files.notes["line sep= passed over"] += 1
    lines = _RecordLines(chain([first], text))
    reader = csv.reader(lines, delimiter=mark, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as e:
        fault(path, f"the header cannot be read ({e})", "mend the first line; it names the columns")
    yield from _table(header, _records(reader, lines, path, before), path, files, mark)


class _RecordLines:
    """Lines for csv.reader, which would otherwise take a long line in pieces for many records, and hold any number of lines that
    an open quote makes one record."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.size = lines, 0

    def __iter__(self) -> _RecordLines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.size += len(line)
        if self.size >= MAX_ROW:
            raise csv.Error(f"longer than {MAX_ROW >> 20} MB")
        return line


def _mark(header: str) -> str:
    """What stands between the columns: the commonest of comma, semicolon and tab outside quotes."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=bare.count)


def _records(reader: Any, lines: _RecordLines, path: Path, before: int) -> Iterator[tuple[int, list[str] | Refused]]:
    """The records behind the header, each with the line it begins in."""
    while True:
        line, lines.size = reader.line_num + 1 + before, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if "unexpected end of data" in str(e):
                fault(path, f"the quotes opened in line {line} are never closed", "close them, or copy the file again")
            if lines.size >= MAX_ROW:  # where the next record begins cannot be told
                fault(path, f"the record that begins in line {line} is {e}", "close its quotes, or take it out")
            yield line, Refused(Origin(str(path), line), f"not a valid record ({e})")
            continue
        yield line, cells


def _table(
    header: list[str], records: Iterator[tuple[int, list[str] | Refused]], path: Path, files: Files, mark: str
) -> Iterator[Item]:
    """The rows of a table under the keys that formats.py reads: its own names, or else as `columns.choose` finds."""
    name, keys = str(path), _columns(header, path)
    first: list[tuple[int, list[str] | Refused]] = []
    wanted: dict[str, str] = {}
    if files.columns or not _known_keys(keys):
        size = 0
        for record in records:
            first.append(record)
            size += sum(map(len, record[1])) if isinstance(record[1], list) else 0
            if len(first) >= SAMPLE_ROWS or size >= SAMPLE_CHARS:
                break
        try:
            wanted, notes = choose(keys, [r for _, r in first if isinstance(r, list)], files.columns)
        except ColumnsError as e:
            fault(path, e.what, e.fix)
    else:
        notes = [f"column {h!r} read as {k!r}" for h, k in zip(header, keys, strict=True) if h != k]
    files.notes.update(notes)
    for line, cells in chain(first, records):
        if isinstance(cells, Refused):
            yield line, cells, 0
        elif not cells or cells == [""]:
            continue
        elif len(cells) != len(keys):
            reason = f"{len(cells)} columns, the header names {len(keys)}"
            yield line, Refused(Origin(name, line), reason, mark.join(cells)[:300]), 0
        elif cells == header:
            yield line, Refused(Origin(name, line), "the names of the columns again; files that were joined have them twice"), 0
        elif any("\0" in c for c in cells):
            yield line, Refused(Origin(name, line), "a zero character (NUL) in the text"), 0
        else:
            value: Any = dict(zip(keys, cells, strict=True))
            yield line, _named(value, wanted, files.rest) if wanted else value, sum(map(len, cells))


def _known_keys(keys: list[str]) -> bool:
    """Whether formats.py knows what rows with these keys are, be it only why they are refused."""
    from tunesmith.data import formats  # which is above this module

    return formats.knows(keys)


_AROUND = "\ufeff" + "".join(c for c in map(chr, range(0x3001)) if c.isspace())


def _columns(header: list[str], path: Path) -> list[str]:
    """A header's names without space and byte order marks around them, and those of COLUMNS in lower case."""
    keys: dict[str, str] = {}
    for name in header:
        key = name.strip(_AROUND)
        key = key.lower() if key.lower() in COLUMNS else key
        if key in keys:
            fault(
                path,
                f"two columns have one name: {keys[key]!r} and {name!r} are both read as {key!r}",
                "rename one of them in the first line, or take it out",
            )
        keys[key] = name
    return list(keys)


def _decoded(f: BinaryIO, path: Path, most: int = MAX_ROW) -> Iterator[str]:
    """Lines of a text file with their ends, longer ones than `most` in pieces."""
    text: TextIO = io.TextIOWrapper(f, encoding="utf-8", newline="")
    number = 0
    try:
        while line := text.readline(most):
            number += 1
            yield line
    except UnicodeDecodeError as e:
        not_utf8(path, f"after line {number}", e.object[max(0, e.start - 200) : e.start + 200])
    finally:
        if not f.closed:
            text.detach()  # else it closes the file, whose place is still asked for


def _numbered(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Pieces of lines, each with the number of its line."""
    number = 1
    for piece in pieces:
        yield number, piece
        number += piece.endswith(("\n", "\r"))


def _text(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Item]:
    """Raw text in pieces of about TEXT_PIECE characters, cut at a blank line, or at any line once a piece is twice as long."""
    name, piece, size, start = str(path), [], 0, 1

    def made() -> Item:
        text = "".join(piece).replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        bad = "\0" in text
        return start, Refused(Origin(name, start), "a zero character (NUL) in the text", text[:300]) if bad else text, len(text)

    for number, line in lines:
        if not piece:
            start = number
        if size >= TEXT_PIECE and (not line.strip() or size >= 2 * TEXT_PIECE):
            if size and any(not s.isspace() for s in piece):
                yield made()
            piece, size, start = [], 0, number
        piece.append(line)
        size += len(line)
    if any(not s.isspace() for s in piece):
        yield made()


def _dialogue(f: BinaryIO, path: Path, found: dialogues.Look, files: Files, voices: dialogues.Voices) -> Iterator[Item]:
    """The conversations of a text file with speakers."""
    try:
        how, told = dialogues.plan(found, files.columns, voices)
    except dialogues.SpeakerError as e:
        fault(path, str(e), "correct the name in data.train[].columns, or drop it to see whom `tunesmith check` takes")
    files.notes[told] += 1
    for line, row, chars in dialogues.read(_decoded(f, path), how, files.notes):
        yield line, Refused(Origin(str(path), line), row) if isinstance(row, str) else row, chars


PARQUET_BATCH = 32  # rows unpacked at once: a few bytes of a dictionary may stand for a long text in every row


def _parquet(path: Path, read: list[int]) -> Iterator[Item]:
    """Rows of a parquet file. `read` is told how many of its bytes they are."""
    import pyarrow as pa
    from pyarrow import parquet

    size, name = path.stat().st_size, str(path)
    if not size:
        fault(path, "the file is empty", "remove it, or write its rows again")
    try:
        with tempfile.TemporaryFile() as unpacked:
            source: Any = name
            if path.suffix.lower() == ".gz":
                with io.BufferedReader(_Gunzip(path), BLOCK) as f:
                    shutil.copyfileobj(f, unpacked)
                source = unpacked
            with parquet.ParquetFile(source) as table:
                twice = [k for k, n in Counter(table.schema_arrow.names).items() if n > 1]
                if twice:
                    fault(path, f"two columns have one name: {twice[0]!r}", "rename one of them, or take it out")
                total, done = max(1, table.metadata.num_rows), 0
                for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                    for i in range(len(batch)) if batch.nbytes > MAX_ROW else (None,):
                        some = batch if i is None else batch.slice(i, 1)
                        chars = some.nbytes // max(1, len(some))
                        for value in [None] if chars > MAX_ROW else some.to_pylist():
                            done += 1
                            origin = Origin(name, done)
                            yield (
                                done,
                                _plain(value, origin) if value is not None else Refused(origin, json_rows.ROW_TOO_LONG),
                                chars,
                            )
                    read[0] = size * done // total
    except (pa.ArrowException, ValueError, OSError, OverflowError) as e:
        if isinstance(e, MemoryError):
            raise
        told = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        fault(path, f"not a whole parquet file ({told})", "copy or download it again")


def _plain(value: dict[str, Any], origin: Origin) -> dict[str, Any] | Refused:
    return Refused(origin, reason) if (reason := json_rows.bad_text(value)) else value
