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
import json
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

from tunesmith.data import dialogues, documents
from tunesmith.data.columns import SAMPLE_CHARS, SAMPLE_ROWS, ColumnsError, choose, rename
from tunesmith.data.exports import BESIDE, CONVERSATIONS
from tunesmith.errors import DataError
from tunesmith.types import Origin

MAX_ROW = 32 << 20  # characters of one row
MAX_PARTS = 1_000_000  # objects and lists in one JSON row: 32 MB of `{},` are 10 million, and take 1 GB
MAX_DEPTH = 64  # nesting of one JSON row
CHUNK_ROWS, CHUNK_CHARS = 1024, 4 << 20
TEXT_PIECE = 64 << 10  # a raw text file is cut at blank lines into pieces of about this size, so that a share of it can be held out
LINE_MOST = 4 << 20  # characters; a longer line of raw text is taken in pieces
BLOCK = 1 << 20
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
ONE_ROW_KEYS = {
    "messages",
    "conversations",
    "conversation",
    "mapping",
    "instruction",
    "prompt",
    "question",
    "text",
    "input_ids",
    "tools",
    "chosen",
}
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
class Row:
    """One row as it stands in the file: an object, or a bare string."""

    value: dict[str, Any] | str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used, and why. `preview` is its beginning."""

    origin: Origin
    reason: str
    preview: str = ""


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
        _fault(root, "there is no such user's home folder", "write the path out")
    except OSError as e:
        _fault(root, f"cannot be read: {e.strerror}", "correct the path; check its permissions and its links")
    if stat.S_ISREG(mode):
        if _suffix(root) not in ROWS_SUFFIXES + TEXT_SUFFIXES:
            _fault(root, f"files of type {root.suffix or 'without a suffix'} are not read", _KNOWN)
        return Files(label, (root,), _stamps([root]), columns=columns)
    if not stat.S_ISDIR(mode):
        _fault(root, "neither a file nor a folder (a pipe or a device)", "write what it gives into a file: cat it > rows.jsonl")
    every, not_files = _walk(root)
    runs = {p.parent for p in every if p.name == "run.yaml" and (p.parent / "manifest.json").is_file()}
    every = [p for p in every if runs.isdisjoint(p.parents)]
    exported = {p.parent for p in every if CONVERSATIONS.fullmatch(p.name)}
    beside = {p for p in every if p.name in NOT_ROWS or (p.parent in exported and BESIDE.fullmatch(p.name))}
    with_rows = [p for p in every if _suffix(p) in ROWS_SUFFIXES and p not in beside]
    text = [p for p in every if _suffix(p) in TEXT_SUFFIXES]
    if not with_rows and not text:
        _fault(root, "the folder holds no file with rows", _KNOWN)
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
        _fault(path, f"a link to {os.readlink(path)}, which is not there", "correct the link, or give the file itself")
    try:
        near = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))[:8]
    except (OSError, ValueError):
        near = []
    beside = f"; {path.parent} holds {', '.join(near)}" if near else ""
    _fault(path, "no such file or folder", f"correct the path (relative paths start at the current folder){beside}")


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
        fault = None
        try:
            yield from _grouped(path, files, voices)
        except DataError as e:
            fault = e
        except OSError as e:
            fault = _unreadable(path, e)
        except MemoryError:
            fault = DataError(f"{path}: this computer's memory is too small to read it", "split it into several files")
        with suppress(OSError):
            if _stamp(path) != stamp:  # what was read is neither the old file nor the new one
                fault = DataError(f"{path}: changed while it was read", "run it again when nothing writes to the file")
        faults += [fault] if fault else []
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
            out.append(_from_json(item, Origin(chunk.file, line)))
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
        _fault(path, f"files of type {path.suffix or 'without a suffix'} are not read as documents", "save it as .txt, .md or .pdf")
    if suffix in PACKED:
        if not path.stat().st_size:
            _fault(path, "the file is empty", "remove it, or save it again")
        text = "".join(line for _, line in (documents.pdf if suffix == ".pdf" else documents.docx)(path, notes))
    else:
        f, _ = _open(path, notes)
        with f:
            lines = _decoded(f, path, MAX_ROW if suffix == ".html" else LINE_MOST)
            text = "".join(line for _, line in documents.html(lines, path, True)) if suffix == ".html" else "".join(lines)
    if "\0" in text:
        _fault(path, "a zero character (NUL) in the text", "save it again as plain text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- files ---------------------------------------------------------------------------------------------------------------------

_KNOWN = f"give a file ending in {', '.join(ROWS_SUFFIXES + TEXT_SUFFIXES)} (most also .gz), a folder of them, or hub:owner/name"


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return ALIASES.get(suffix, suffix)


def _fault(path: Path | str, what: str, fix: str) -> NoReturn:
    raise DataError(f"{path}: {what}", fix)


def _not_utf8(path: Path, where: str, sample: bytes) -> NoReturn:
    code = "windows-1252" if any(0x80 <= b < 0xA0 for b in sample) else "latin1"
    _fault(path, f"not UTF-8 ({where}; it looks like {code})", _iconv(code, Path(path)))


def _iconv(code: str, path: Path) -> str:
    name = path.name.removesuffix(".gz")
    new = path.with_name(f"{name.partition('.')[0]}.utf8{''.join(Path(name).suffixes[-1:])}")
    if path.name.endswith(".gz"):
        return f"gzip -dc {path} | iconv -f {code} -t utf8 > {new}, and use {new}"
    return f"iconv -f {code} -t utf8 {path} > {new}, and use {new}"


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
            _fault(self.path, "the gzip file is cut off", "copy or download it again")
        except (gzip.BadGzipFile, zlib.error) as e:
            _fault(
                self.path,
                f"not a whole gzip file ({e})",
                "copy or download it again, or drop .gz from its name if it is not packed",
            )
        self.out += len(data)
        if self.out > BOMB_FROM and (self.out > BOMB_RATIO * self.packed or self.out > BOMB_MAX):
            _fault(
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
        _fault(path, "the file is empty", "remove it, or write its rows again")
    if head.startswith(b"\xef\xbb\xbf"):
        f.read(3)
        notes["UTF-8 byte order mark passed over"] += 1
    elif wide := _wide(head[:4096]):
        _fault(path, f"not UTF-8 but {wide}", _iconv(wide, path))
    for mark, what, fix in OTHER_FILES:
        if head.startswith(mark):
            _fault(path, f"the file is {what}, whatever its name says", fix)
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
        if suffix == ".json" and (first := _json_kind(f, path)) != "lines":
            raw, items = False, _json(f, path, first, notes)
        elif suffix in (".jsonl", ".json"):
            raw, items = True, _lines(f, path, notes)
        elif suffix in (".csv", ".tsv"):
            raw, items = False, _csv(f, path, suffix, files)
        elif suffix == ".html":
            raw, items = False, _text(documents.html(_decoded(f, path), path), path)
        elif found := _look(f, files):
            raw, items = False, _dialogue(f, path, found, files, voices)
        elif files.columns.keys() & {"prompt", "answer"}:
            fix = "correct data.train[].columns: in text files it names speakers, as in `Anna: ...`; or drop it"
            _fault(path, "no lines of speakers are found", fix)
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
        _fault(path, "the file holds no rows", "remove it, or write its rows again")


def _packed(path: Path, suffix: str, files: Files) -> Iterator[Item]:
    """The rows of a spreadsheet, or the pieces of a document."""
    if path.name.lower().endswith(".gz"):
        _fault(path, f"a {suffix} file is not read as .gz", f"gzip -dk {path}, and use the unpacked file")
    if not path.stat().st_size:
        _fault(path, "the file is empty", "remove it, or save it again")
    if suffix == ".xlsx":
        found = documents.xlsx(path, files.notes)
        header = next(found, (0, []))[1]
        if not header:
            _fault(path, "no sheet holds a row", "remove it, or save it again")
        yield from _table(header, found, path, files, ",")
    else:
        yield from _text((documents.pdf if suffix == ".pdf" else documents.docx)(path, files.notes), path)


Item = tuple[int, Any, int]  # line or row number, what it holds, its size in characters


# ---- JSON lines ----------------------------------------------------------------------------------------------------------------


_ROW_TOO_LONG = f"the row is longer than {MAX_ROW >> 20} MB"


def _lines(f: BinaryIO, path: Path, notes: Counter[str]) -> Iterator[Item]:
    name, number = str(path), 0
    first = f.peek(BLOCK).lstrip().partition(b"\n")[0].strip()  # type: ignore[attr-defined]
    if first.startswith(b"[{") or first == b"[":
        _fault(path, "one JSON array, not one row a line", "give it a name that ends in .json")
    if first == b"{":
        _fault(path, "JSON that runs over many lines, not one row a line", "write each row in one line: jq -c . FILE > new.jsonl")
    while line := f.readline(MAX_ROW + 1):
        number += 1
        if line.startswith(b"\xef\xbb\xbf"):  # files with a mark were joined
            line = line[3:]
            notes["UTF-8 byte order mark passed over"] += 1
        if len(line) > MAX_ROW:
            while not line.endswith(b"\n") and (line := f.readline(BLOCK)):
                pass
            yield number, Refused(Origin(name, number), _ROW_TOO_LONG), 0
            continue
        if line.isspace():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as e:
            if b"\0" in line or _has_utf8(line) or not _is_json(line):
                reason = f"not UTF-8 (byte {e.start + 1} of the line is 0x{line[e.start]:02x})"
                yield number, Refused(Origin(name, number), reason, line[:300].decode(errors="replace")), len(line)
                continue
            _not_utf8(path, f"line {number}, byte {e.start + 1}", line)
        yield number, text, len(text)


def _is_json(line: bytes) -> bool:
    """Whether the line is good JSON but for its encoding: then the file is in another encoding; otherwise the line is garbage."""
    try:
        json.loads(line.decode("latin1"))
    except (ValueError, RecursionError):
        return False
    return True


def _has_utf8(line: bytes) -> bool:
    """Whether good UTF-8 beyond ASCII stands in the line too: then only some bytes of it are damaged."""
    return any(ord(c) > 127 for c in line.decode(errors="ignore"))


# ---- JSON ----------------------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two values under one key and says nothing: a row would lose a text."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)


def _from_json(text: str, origin: Origin) -> Row | Refused:
    """One JSON text as a row."""
    text = text.strip()
    if _many_parts(text, 0):
        return Refused(origin, _MANY_PARTS, text[:300])
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return Refused(origin, _why_not_json(text), text[:300])
    return _checked(value, text, origin)


def from_json(text: str) -> Any:
    """JSON that stands in a text of a row, under the rules for rows. ValueError with the reason."""
    try:
        value = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        raise ValueError(_why_not_json(text.strip())) from None
    if reason := _TOO_DEEP if _depth(value) > MAX_DEPTH else _bad_text(value):
        raise ValueError(reason)
    return value


_MANY_PARTS = f"more than {MAX_PARTS:,} objects and lists in one row"


def _many_parts(text: str, start: int) -> bool:
    return len(text) - start > MAX_PARTS and text.count("{", start) + text.count("[", start) > MAX_PARTS


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _why_not_json(text: str) -> str:
    """What is wrong with a text that is no JSON."""
    try:
        _DECODER.decode(text)
    except RecursionError:
        return _TOO_DEEP
    except json.JSONDecodeError as e:
        if "\0" in text:
            return "zero bytes in the row"
        if e.pos >= len(text) or e.msg.startswith("Unterminated"):
            return "the JSON is cut off in the middle"
        if e.msg == "Extra data":
            return f"behind the end of the row, in column {e.pos + 1}, stands {text[e.pos : e.pos + 20]!r}; a line holds one row"
        return f"not valid JSON ({e.msg} at column {e.pos + 1})"
    except ValueError as e:  # NaN, an integer of thousands of digits
        return f"not valid JSON ({str(e).split(';')[0]})"
    return "not valid JSON"


def _checked(value: Any, text: str, origin: Origin) -> Row | Refused:
    """Refuse what parses as JSON and still is no row. The cheap looks at the text decide whether the value must be walked."""
    if not isinstance(value, (dict, str)):
        return Refused(origin, f"the row is {_A[type(value)]}, not an object", text[:300])
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return Refused(origin, _TOO_DEEP, text[:300])
    if ("\\u0000" in text or _SURROGATE.search(text)) and (reason := _bad_text(value)):
        return Refused(origin, reason, text[:300])
    return Row(value, origin)


_A = {list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
        if depth > MAX_DEPTH:
            break
    return depth


def _bad_text(value: Any) -> str:
    """Why a string inside is no text: a zero character, or half of a surrogate pair."""
    stack = [value]
    while stack:
        v = stack.pop()
        if isinstance(v, str):
            if "\0" in v:
                return "a zero character (NUL) in the text"
            if not v.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in v):
                return "half of a surrogate pair in the text (\\ud800 to \\udfff alone is no character)"
        elif isinstance(v, dict):
            stack += v.keys()
            stack += v.values()
        elif isinstance(v, (list, tuple)):
            stack += v
    return ""


def _json_kind(f: BinaryIO, path: Path) -> str:
    """What a .json file holds: an `array`, one `object`, or `lines`. Leaves the file where it was."""
    head = f.peek(BLOCK).lstrip()
    if head.startswith(b"["):
        return "array"
    if not head.startswith(b"{"):
        return "lines"
    first, _, rest = head.partition(b"\n")
    if not rest.strip():  # one line, or a first line longer than what can be looked at: an object is read whole, wherever it ends
        return "object"
    return "lines" if _is_json(first) else "object"


class _Stream:
    """A JSON text that is read as it comes: values one after the other, and after a bad one the next."""

    def __init__(self, f: BinaryIO, path: Path):
        self.path, self.file = path, io.TextIOWrapper(f, encoding="utf-8", newline="")
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        if self.ended:
            return False
        try:
            new = self.file.read(max(BLOCK, len(self.text) - self.at))
        except UnicodeDecodeError as e:
            _not_utf8(self.path, f"byte 0x{e.object[e.start]:02x}", e.object[max(0, e.start - 200) : e.start + 200])
        self.text, self.at, self.ended = self.text[self.at :] + new, 0, not new
        return bool(new)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, wanted: str, where: str) -> None:
        if (found := self.peek()) != wanted:
            told = f"{found!r} stands where {wanted!r} belongs" if found else "it ends too early"
            _fault(
                self.path,
                f"not valid JSON {where}: {told}",
                "copy the file again, or mend it there; one row a line (.jsonl) is safer",
            )
        self.at += 1

    def value(self) -> tuple[Any, str]:
        """The next value and its text. ValueError for one that is no JSON (and stands behind it), EOFError when it is cut off."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end == len(self.text) and self.text[self.at] not in '{["' and self.more():
                    continue  # a number may go on
                text = self.text[self.at : end]
                self.at = end
                return value, text
            except (ValueError, RecursionError):
                if (end := self._end()) is not None:
                    text = self.text[self.at : end].strip()
                    self.at = end
                    raise ValueError(_why_not_json(text), text[:300]) from None
            if len(self.text) - self.at > MAX_ROW:
                _too_long(self.path)
            if _many_parts(self.text, self.at):
                _fault(self.path, _MANY_PARTS, "split the row, or write the file as one row a line (.jsonl)")
            if not self.more():
                raise EOFError

    def _end(self) -> int | None:
        """Where the value that begins here ends, by brackets and quotes alone; None when its end has not been read."""
        depth = 0
        for m in _STRUCTURE.finditer(self.text, self.at):
            c = m[0]
            if c in "[{":
                depth += 1
            elif c in "]}":
                depth -= 1
                if depth <= 0:
                    return m.end() if depth == 0 else m.start()
            elif c == '"':
                return None
            elif depth == 0 and c == ",":
                return m.start()
        return None


def _too_long(path: Path) -> NoReturn:
    _fault(path, f"a row longer than {MAX_ROW >> 20} MB", "split it, or write the file as one row a line (.jsonl)")


def _json(f: BinaryIO, path: Path, kind: str, notes: Counter[str]) -> Iterator[Item]:
    """An array of rows; an object that holds one array of rows; or an object that is one row."""
    stream = _Stream(f, path)
    if kind == "array":
        stream.take("[", "at the beginning")
        yield from _elements(stream, path, notes)
    else:
        stream.take("{", "at the beginning")
        own: dict[str, Any] = {}
        texts, listed, size = [], "", 0
        while stream.peek() != "}":
            key, key_text = _whole(stream, path)
            if not isinstance(key, str):
                _fault(path, f"not valid JSON: {key_text[:40]!r} is no key", "mend it, or write one row a line (.jsonl)")
            if key in own or key == listed:
                _fault(path, f"the key {key[:40]!r} stands twice", "keep one of them")
            stream.take(":", f"after {key!r}")
            if stream.peek() == "[" and not (ONE_ROW_KEYS & {key, *own}):
                if listed:
                    _fault(path, f"two lists of rows, {listed!r} and {key!r}", "keep one of them, or make a file of each")
                listed, stream.at = key, stream.at + 1
                yield from _elements(stream, path, notes)
            else:
                own[key], value_text = _whole(stream, path)
                texts.append(value_text)
                size += len(key_text) + len(value_text)
                if size > MAX_ROW:
                    _too_long(path)
            if stream.peek() != "}":
                stream.take(",", f"after {key!r}")
        stream.at += 1
        if not listed:
            text = "".join(texts)
            row = _checked(own, text, Origin(str(path), 1))
            yield 1, row if isinstance(row, Refused) else row.value, len(text)
    if stream.peek():
        _fault(path, "something stands behind the end of the JSON", "write one row a line and name the file .jsonl")


def _whole(stream: _Stream, path: Path) -> tuple[Any, str]:
    try:
        return stream.value()
    except (ValueError, EOFError) as e:
        _fault(path, f"not valid JSON: {e.args[0] if e.args else 'it is cut off in the middle'}", "copy the file again, or mend it")


def _elements(stream: _Stream, path: Path, notes: Counter[str]) -> Iterator[Item]:
    """The rows of an array, behind its opening bracket."""
    name, number = str(path), 0
    while True:
        if (c := stream.peek()) == "]":
            stream.at += 1
            if number:
                notes["comma behind the last row passed over"] += 1
            return
        number += 1
        origin = Origin(name, number)
        if not c:
            _fault(path, f"the JSON ends before row {number}: the file is cut off", "copy or download it again")
        try:
            value, text = stream.value()
            row = _checked(value, text, origin)
            yield number, row if isinstance(row, Refused) else row.value, len(text)
        except EOFError:
            _fault(path, f"the JSON ends in the middle of row {number}: the file is cut off", "copy or download it again")
        except ValueError as e:
            yield number, Refused(origin, *e.args), 0
        if stream.peek() == "]":
            stream.at += 1
            return
        stream.take(",", f"after row {number}")


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
        _fault(path, f"the header cannot be read ({e})", "mend the first line; it names the columns")
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
                _fault(path, f"the quotes opened in line {line} are never closed", "close them, or copy the file again")
            if lines.size >= MAX_ROW:  # where the next record begins cannot be told
                _fault(path, f"the record that begins in line {line} is {e}", "close its quotes, or take it out")
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
            _fault(path, e.what, e.fix)
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
            _fault(
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
        _not_utf8(path, f"after line {number}", e.object[max(0, e.start - 200) : e.start + 200])
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
        _fault(path, str(e), "correct the name in data.train[].columns, or drop it to see whom `tunesmith check` takes")
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
        _fault(path, "the file is empty", "remove it, or write its rows again")
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
                    _fault(path, f"two columns have one name: {twice[0]!r}", "rename one of them, or take it out")
                total, done = max(1, table.metadata.num_rows), 0
                for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                    for i in range(len(batch)) if batch.nbytes > MAX_ROW else (None,):
                        some = batch if i is None else batch.slice(i, 1)
                        chars = some.nbytes // max(1, len(some))
                        for value in [None] if chars > MAX_ROW else some.to_pylist():
                            done += 1
                            origin = Origin(name, done)
                            yield done, _plain(value, origin) if value is not None else Refused(origin, _ROW_TOO_LONG), chars
                    read[0] = size * done // total
    except (pa.ArrowException, ValueError, OSError, OverflowError) as e:
        if isinstance(e, MemoryError):
            raise
        told = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        _fault(path, f"not a whole parquet file ({told})", "copy or download it again")


def _plain(value: dict[str, Any], origin: Origin) -> dict[str, Any] | Refused:
    return Refused(origin, reason) if (reason := _bad_text(value)) else value
