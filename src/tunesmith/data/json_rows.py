"""Rows of JSON files: one a line, an array of them, or an object that holds one array or is one row (see sources.py)."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tunesmith.data.row import BLOCK, MAX_DEPTH, MAX_PARTS, MAX_ROW, Item, Refused, Row, fault, not_utf8
from tunesmith.types import Origin

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


# ---- one row a line ----------------------------------------------------------------------------------------------------------

ROW_TOO_LONG = f"the row is longer than {MAX_ROW >> 20} MB"


def lines(f: BinaryIO, path: Path, notes: Counter[str]) -> Iterator[Item]:
    """JSON texts, one a line, not parsed yet."""
    name, number = str(path), 0
    first = f.peek(BLOCK).lstrip().partition(b"\n")[0].strip()  # type: ignore[attr-defined]
    if first.startswith(b"[{") or first == b"[":
        fault(path, "one JSON array, not one row a line", "give it a name that ends in .json")
    if first == b"{":
        fault(path, "JSON that runs over many lines, not one row a line", "write each row in one line: jq -c . FILE > new.jsonl")
    while line := f.readline(MAX_ROW + 1):
        number += 1
        if line.startswith(b"\xef\xbb\xbf"):  # files with a mark were joined
            line = line[3:]
            notes["UTF-8 byte order mark passed over"] += 1
        if len(line) > MAX_ROW:
            while not line.endswith(b"\n") and (line := f.readline(BLOCK)):
                pass
            yield number, Refused(Origin(name, number), ROW_TOO_LONG), 0
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
            not_utf8(path, f"line {number}, byte {e.start + 1}", line)
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


# ---- one JSON text -----------------------------------------------------------------------------------------------------------


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


def row_of(text: str, origin: Origin) -> Row | Refused:
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
    if reason := _TOO_DEEP if _depth(value) > MAX_DEPTH else bad_text(value):
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
    if ("\\u0000" in text or _SURROGATE.search(text)) and (reason := bad_text(value)):
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


def bad_text(value: Any) -> str:
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


# ---- a file that is one JSON text ----------------------------------------------------------------------------------------------


def kind_of(f: BinaryIO, path: Path) -> str:
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
            not_utf8(self.path, f"byte 0x{e.object[e.start]:02x}", e.object[max(0, e.start - 200) : e.start + 200])
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
            fault(
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
                fault(self.path, _MANY_PARTS, "split the row, or write the file as one row a line (.jsonl)")
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
    fault(path, f"a row longer than {MAX_ROW >> 20} MB", "split it, or write the file as one row a line (.jsonl)")


def read(f: BinaryIO, path: Path, kind: str, notes: Counter[str]) -> Iterator[Item]:
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
                fault(path, f"not valid JSON: {key_text[:40]!r} is no key", "mend it, or write one row a line (.jsonl)")
            if key in own or key == listed:
                fault(path, f"the key {key[:40]!r} stands twice", "keep one of them")
            stream.take(":", f"after {key!r}")
            if stream.peek() == "[" and not (ONE_ROW_KEYS & {key, *own}):
                if listed:
                    fault(path, f"two lists of rows, {listed!r} and {key!r}", "keep one of them, or make a file of each")
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
        fault(path, "something stands behind the end of the JSON", "write one row a line and name the file .jsonl")


def _whole(stream: _Stream, path: Path) -> tuple[Any, str]:
    try:
        return stream.value()
    except (ValueError, EOFError) as e:
        fault(path, f"not valid JSON: {e.args[0] if e.args else 'it is cut off in the middle'}", "copy the file again, or mend it")


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
            fault(path, f"the JSON ends before row {number}: the file is cut off", "copy or download it again")
        try:
            value, text = stream.value()
            row = _checked(value, text, origin)
            yield number, row if isinstance(row, Refused) else row.value, len(text)
        except EOFError:
            fault(path, f"the JSON ends in the middle of row {number}: the file is cut off", "copy or download it again")
        except ValueError as e:
            yield number, Refused(origin, *e.args), 0
        if stream.peek() == "]":
            stream.at += 1
            return
        stream.take(",", f"after row {number}")
