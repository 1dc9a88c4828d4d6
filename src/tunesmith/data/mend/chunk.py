"""A chunk of rows mended, in a worker: what is written of each, what is set aside and why, and every change.

What was changed is looked at again with the detectors that found it: a row that still has the fault is set aside. So a fault is
gone from what is written, whatever the fix could do.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data import clusters, findings, formats, mend
from tunesmith.data.findings import evaluations, rows, whole
from tunesmith.data.findings.text import Joined, Rows, excerpt
from tunesmith.data.mend import split, text
from tunesmith.data.sources import Chunk, Refused, Row, parse
from tunesmith.types import Conversation, Origin

READING = "reading"  # what formats.py mended or refused: no fix of the table
READ = {  # keys of a row that became its conversation
    "alpaca": "instruction input context output response history system system_prompt tools functions",
    "sharegpt": "conversations system system_prompt tools functions",
    "messages": "messages conversation system system_prompt tools functions",
    "chatgpt": "mapping current_node",
    "prompt_completion": "prompt completion tools functions",
    "text": "text",
}
READ_BESIDE = {"system", "system_prompt", "tools", "functions", "conversation", "text", *formats.MEDIA}
TINY = 3  # characters, as findings/whole.py has it


@dataclass
class Mender:
    """What each worker needs."""

    fixes: tuple[str, ...]
    by: split.By | None = None
    model: Path | None = None  # whose tokenizer counts

    @cached_property
    def tokenizer(self) -> Any:
        from tunesmith.tokenizer import Tokenizer

        return Tokenizer.load(self.model) if self.model else None

    @property
    def hidden(self) -> tuple[str, ...]:
        """What is masked in rows that are set aside."""
        return tuple(text.SAID) if "pii" in self.fixes else text.KEYS if "secrets" in self.fixes else ()

    def close(self) -> None:
        """A worker's tool can be closed; this one holds nothing."""


@dataclass
class Result:
    """What became of a chunk. `lines` and the columns beside it are of the rows that are kept so far."""

    rows: int
    lines: list[bytes]
    places: np.ndarray  # line in the file, int64
    sizes: np.ndarray  # tokens or characters, int64
    groups: np.ndarray  # of split.By, int64
    hashes: np.ndarray
    signatures: np.ndarray
    tiny: np.ndarray  # whether the answer is tiny, bool
    refused: list[bytes]
    reasons: Counter[str]  # fix -> rows set aside
    changes: list[bytes]
    changed: Counter[str]  # fix -> rows
    changed_rows: int
    left_out: Counter[str]  # keys -> rows
    no_group: list[tuple[str, str]]  # place, and what stands where a date should
    sketch: whole.Sketch | None


@dataclass
class Entry:
    """A row on its way."""

    value: Any
    origin: Origin
    c: Conversation
    kind: str
    rest: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)
    aside: tuple[str, str] | None = None  # fix and reason
    touched: bool = False

    @property
    def body(self) -> list[Any]:
        """All that has texts."""
        c = self.c
        return [[m.content for m in c.messages], [dict(m.extra) for m in c.messages], list(c.tools), self.rest]

    def set_body(self, body: list[Any]) -> None:
        contents, extras, tools, self.rest = body
        messages = zip(self.c.messages, contents, extras, strict=True)
        made = tuple(replace(m, content=content, extra=tuple(extra.items())) for m, content, extra in messages)
        self.c = replace(self.c, messages=made, tools=tuple(tools))

    def change(self, fix: str, what: str, before: Sequence[str], after: Sequence[str]) -> None:
        a, b = next(((a, b) for a, b in zip(before, after, strict=False) if a != b), ("", ""))
        at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        told = {"before": _seen(excerpt(a, at, at)), "after": _seen(excerpt(b, at, at))}
        self.changes.append({"fix": fix, "what": what, **(told if a != b else {})})


def _seen(shown: str) -> str:
    """Characters that nobody sees, as their numbers."""
    return re.sub(f"{rows.INVISIBLE.pattern}|{rows.CONTROL.pattern}", lambda m: "".join(f"<U+{ord(c):04X}>" for c in m[0]), shown)


class Everything(Rows):
    """Rows whose `all` holds every text that is written: tools, calls and the row's other keys too."""

    def __init__(self, entries: Sequence[Entry]):
        super().__init__([e.c for e in entries])
        self.entries = entries

    @cached_property
    def all(self) -> Joined:
        pairs = [(t, i) for i, e in enumerate(self.entries) for t in text.leaves(e.body)]
        return Joined([t for t, _ in pairs], [i for _, i in pairs])


def process(chunk: Chunk, mender: Mender) -> Result:
    entries, refused, left_out = _read(chunk)
    for fix in (mend.BY_NAME[name] for name in mender.fixes):
        if fix.how != mend.SET:
            _apply(fix, [e for e in entries if e.aside is None])
    _look_again(mender.fixes, [e for e in entries if e.touched and e.aside is None])
    kept = [e for e in entries if e.aside is None]
    refused += [(e.origin, *e.aside, {"row": e.value}) for e in entries if e.aside]
    refused.sort(key=lambda r: r[0].line)
    changes = [(e, c) for e in entries for c in e.changes]
    no_group: list[tuple[str, str]] = []
    conversations = [e.c for e in kept]
    texts = [clusters.normalised(c) for c in conversations]
    shingles = clusters.Shingles(texts)
    view = Rows(conversations)
    tiny = np.zeros(len(kept), bool)
    tiny[[i for i, _, answer in view.pairs if len(answer.strip()) <= TINY]] = True
    return Result(
        rows=len(chunk.lines),
        lines=[as_line(_written(e)) for e in kept],
        places=np.array([e.origin.line for e in kept], np.int64),
        sizes=_sizes(conversations, mender),
        groups=np.array([mender.by.group(e.value, e.origin, no_group) if mender.by else 0 for e in kept], np.int64),
        hashes=clusters.text_hashes([clusters.letters(c) for c in conversations]),
        signatures=clusters.signatures(shingles),
        tiny=tiny,
        refused=[as_line(_aside(*r, mender.hidden)) for r in refused],
        reasons=Counter(fix for _, fix, _, _ in refused),
        changes=[as_line({"file": e.origin.file, "line": e.origin.line, **c}) for e, c in changes],
        changed=Counter(fix for e in entries for fix in {c["fix"] for c in e.changes}),
        changed_rows=sum(bool(e.changes) for e in entries),
        left_out=left_out,
        no_group=no_group,
        sketch=whole.sketch(view, texts, shingles, [e.kind for e in kept]) if "empty" in mender.fixes else None,
    )


Place = tuple[Origin, str, str, dict[str, Any]]  # where, fix, reason, the row


def _read(chunk: Chunk) -> tuple[list[Entry], list[Place], Counter[str]]:
    entries: list[Entry] = []
    refused: list[Place] = []
    left_out: Counter[str] = Counter()
    for item, row in zip(chunk.items, parse(chunk), strict=True):
        if isinstance(row, Refused):
            whole_row = {"text": item} if chunk.raw and isinstance(item, str) else {"begins": row.preview}
            refused.append((row.origin, READING, row.reason, whole_row))
            continue
        try:
            c = formats.conversation(row)
        except formats.FormatError as e:
            refused.append((row.origin, READING, e.reason, {"row": row.value}))
            continue
        kind = formats.detect(row.value) or ""
        entries.append(entry := Entry(row.value, row.origin, c, kind, _rest(row.value, c, kind, left_out)))
        for what in c.fixes:
            entry.change(READING, what, (), ())
    return entries, refused, left_out


def _rest(value: Any, c: Conversation, kind: str, left_out: Counter[str]) -> dict[str, Any]:
    """A row's other keys. Those are left out, and counted, that would make another kind of row of what is written."""
    if isinstance(value, str):
        return {}
    if kind == "question_answer":
        read = {*next(p for p in formats.PAIRS if all(value.get(k) is not None for k in p)), "system", "system_prompt"}
        read |= {"tools", "functions"}
    else:
        read = set(READ[kind].split())
    base = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}[c.kind]
    rest: dict[str, Any] = {}
    for k, v in value.items():
        if v is None or k in read or (k in formats.MEDIA and not v):
            continue
        if _carried(base, k) and not (k == "label" and isinstance(v, bool)):
            rest[k] = v if isinstance(v, str) else _plain(v)
        else:
            left_out[k] += 1
    return rest


@lru_cache(maxsize=1024)
def _carried(base: tuple[str, ...], key: str) -> bool:
    return key not in READ_BESIDE and formats.matches((*base, key)) == formats.matches(base)


def _plain(value: Any) -> Any:
    """As JSON has it: a table's dates become texts, what is no number becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


# ---- fixes ---------------------------------------------------------------------------------------------------------------------


def _view(fix: mend.Fix, entries: Sequence[Entry]) -> Rows:
    return Everything(entries) if fix.how == mend.TEXT or fix.name == "secrets" else Rows([e.c for e in entries])


def _flagged(fix: mend.Fix, view: Rows) -> dict[int, str]:
    """Rows with a fault that the fix answers, and which."""
    found: dict[int, str] = {}
    for name in fix.answers:
        detector = findings.BY_NAME[name].detector
        if name == "contamination":
            texts = clusters.Shingles([clusters.normalised(c) for c in view.conversations])
            hits: Iterable[int] = evaluations.contamination(texts)
        elif detector is not None and detector.__module__ == rows.__name__:
            hits = detector(view)
        else:
            continue  # only all rows together show it
        for row in hits:
            found.setdefault(row, name)
    return found


def _apply(fix: mend.Fix, entries: Sequence[Entry]) -> None:
    flagged = _flagged(fix, _view(fix, entries))
    if fix.name in ("pii", "secrets"):  # a value whose key says that it is one
        for i, e in enumerate(entries):
            if e.rest and i not in flagged and text.without_secret_keys(e.rest, Counter()) != e.rest:
                flagged[i] = "api_key"
    for i, name in sorted(flagged.items()):
        e = entries[i]
        if fix.how == mend.ASIDE:
            e.aside = fix.name, findings.BY_NAME[name].what
            continue
        e.touched = True
        seen: Counter[str] = Counter()
        if fix.how == mend.TEXT:
            before = list(text.leaves(e.body))
            after = _texts(fix.name, e, before, seen)
        else:
            before = ["\n".join(m.content for m in e.c.messages)]
            made = fix.mend(e.c, seen)  # type: ignore[misc]
            if isinstance(made, str):
                e.aside = fix.name, made
                continue
            e.c = made
            after = ["\n".join(m.content for m in made.messages)]
        seen = +seen
        if seen:
            told = text.counted(seen) if fix.name == "pii" else ", ".join(f"{n} {what}" for what, n in seen.items())
            e.change(fix.name, told, before, after)


def _texts(fix: str, e: Entry, before: list[str], seen: Counter[str]) -> list[str]:
    body = e.body
    if fix == "pii":
        body[-1] = text.without_secret_keys(body[-1], seen)
        after = text.anonymous(list(text.leaves(body)), tuple(text.SAID), seen)
    else:
        after = [text.clean(t, seen) for t in before]
    e.set_body(text.with_leaves(body, iter(after)))
    return after


def _look_again(fixes: Sequence[str], entries: Sequence[Entry]) -> None:
    """Set aside what still has the fault, or has one that a later fix brought to light, or cannot be read any more: an answer of
    control characters alone is empty without them.
    """
    for e in entries:
        try:
            formats.conversation(Row(_written(e), e.origin))
        except formats.FormatError as error:
            e.aside = (e.changes or [{"fix": READING}])[-1]["fix"], f"once mended, {error.reason}"
    for fix in (mend.BY_NAME[name] for name in fixes):
        if fix.how in (mend.TEXT, mend.ROW):
            for i, name in _flagged(fix, _view(fix, entries)).items():
                entries[i].aside = entries[i].aside or (fix.name, f"{findings.BY_NAME[name].what}: cannot be mended with certainty")


# ---- what is written -----------------------------------------------------------------------------------------------------------


LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON lets them stand, but to many readers of lines they end one


def as_line(value: Any) -> bytes:
    line = json.dumps(value, ensure_ascii=False, default=str)
    if not line.isascii():
        line = LINE_ENDS.sub(lambda m: f"\\u{ord(m[0]):04x}", line)
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _written(e: Entry) -> dict[str, Any]:
    """Messages as OpenAI has them, or the text; a prompt and its completion stay what they are, as no template goes around them."""
    c = e.c
    if c.kind != "chat":
        return {m.role: m.content for m in c.messages} | e.rest
    told = formats.to_dict(c)
    return {k: told[k] for k in ("messages", "tools") if k in told} | e.rest


def _aside(origin: Origin, fix: str, reason: str, row: dict[str, Any], hidden: tuple[str, ...]) -> dict[str, Any]:
    """With `hidden`, what a fix would have taken out of the row is masked here too: the file is made to be passed on. The row as it
    was is at its place."""
    if hidden:
        seen: Counter[str] = Counter()
        plain = text.without_secret_keys(_plain(row), seen)
        row = text.with_leaves(plain, iter(text.anonymous(list(text.leaves(plain)), hidden, seen)))
        row |= {"masked": text.counted(+seen)} if +seen else {}
    return {"file": origin.file, "line": origin.line, "fix": fix, "reason": reason, **row}


def _sizes(conversations: Sequence[Conversation], mender: Mender) -> np.ndarray:
    """Tokens of what is said, or characters where no tokenizer is known; what a template adds is not counted."""
    if mender.tokenizer is None:
        return np.array([sum(len(m.content) for m in c.messages) for c in conversations], np.int64)
    counts = iter(map(len, mender.tokenizer.encode_batch([m.content for c in conversations for m in c.messages])))
    return np.array([sum(next(counts) for _ in c.messages) for c in conversations], np.int64)
