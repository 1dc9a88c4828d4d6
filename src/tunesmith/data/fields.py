"""What people wrote in a conversation, and where it stands in a rendering of it.

Each text is a field. A rendering with a sentinel character in place of each field is a skeleton: pieces of the template's own text
with fields between them. `fit` proves that a row's real rendering is the skeleton with its fields filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError

ASSISTANT = "assistant"
SENTINEL, OPEN, CLOSE = 0xF1000, 0xF5000, 0xF9000  # private-use characters, one per field: instead of it, before it, after it
FIELDS = re.compile("[\U000f1000-\U000fcfff]")
REASONING = 0x1000  # field number of message i's reasoning_content is REASONING + i; of its content, i
GUARD = "\U000ffffd"  # splits a special token's text inside a tool's or a call's strings; taken out again before encoding
Spot = tuple[int, int, int]  # begin, end, field number


class RowRefused(DataError):
    """One conversation that cannot be rendered right, with the reason. `tokens` is its length when it is too long, else 0."""

    def __init__(self, what: str, fix: str = "", tokens: int = 0):
        super().__init__(what, fix)
        self.tokens = tokens

    def __reduce__(self):
        return type(self), (self.what, self.fix, self.tokens)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation made ready for the template."""

    messages: list[dict[str, Any]]
    contents: dict[int, str]  # field number -> text, fields with text only
    tools: tuple[dict[str, Any], ...]
    answers: tuple[int, ...]  # indices of the assistant messages
    trained: tuple[int, ...]  # those that are learned
    prompt: bool  # a prompt for inference: nothing is learned, the generation prompt stands at the end
    key: Any  # conversations with one key have one skeleton
    notes: tuple[str, ...]
    guarded: bool

    def asked(self) -> list[tuple[int, bool]]:
        """The renderings needed: the whole; the prompt of each answer; and the conversation up to each learned one."""
        n = len(self.messages)
        prompts = [(t, True) for t in self.answers if t or t in self.trained]  # a greeting that is not learned needs none
        return list(dict.fromkeys([(n, self.prompt), *prompts, *((t + 1, False) for t in self.trained)]))


def writable(text: str, i: int) -> None:
    """Half of a surrogate pair is no text; private-use characters of ours would be taken for sentinels."""
    if not text.isascii():
        where = f"message {i + 1}" if i >= 0 else "a tool or a tool call"
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowRefused(f"{where} holds half a surrogate pair, which is no character") from None
        if FIELDS.search(text) or GUARD in text:
            raise RowRefused(f"{where} holds private-use characters that mark fields here")


def replaced(message: dict[str, Any], i: int, contents: Mapping[int, str], before: int, after: int | None) -> dict[str, Any]:
    """The message with its fields replaced by (or, with `after`, put between) sentinels."""
    changed = dict(message)
    for f, name in ((i, "content"), (REASONING + i, "reasoning_content")):
        if f in contents:
            changed[name] = chr(before + f) if after is None else chr(before + f) + contents[f] + chr(after + f)
    return changed


def who(chat: Chat, f: int) -> str:
    i = f % REASONING
    return f"message {i + 1} ({chat.messages[i]['role']}{', its reasoning' if f >= REASONING else ''})"


def once(spots: Iterable[Spot]) -> None:
    seen: set[int] = set()
    for *_, f in spots:
        if f in seen:
            raise RowRefused(f"message {f % REASONING + 1} appears more than once in the template's rendering")
        seen.add(f)


def common(text: str, other: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def _variants(text: str) -> Iterator[str]:
    """What templates make of a content: as it is, trimmed, or inside JSON."""
    yield text
    for cut in (text.strip(), text.lstrip(), text.rstrip(), text.lstrip("\n"), text.rstrip("\n"), text.strip("\n")):
        if cut != text:
            yield cut
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def fit(text: str, pieces: Sequence[str], order: Sequence[int], contents: Mapping[int, str]) -> tuple[list[str], list[int]] | None:
    """The fields' texts and ends if `text` is the pieces with the contents between them; None if it is not."""
    if not text.startswith(pieces[0]):
        return None
    at, values, ends, last = len(pieces[0]), [], [0], len(order) - 1
    for k, f in enumerate(order):
        piece = pieces[k + 1]
        for value in _variants(contents[f]):
            end = at + len(value)
            if text.startswith(value, at) and text.startswith(piece, end) and (k != last or end + len(piece) == len(text)):
                break
        else:
            return None
        values.append(value)
        ends.append(end)
        at = end + len(piece)
    return (values, ends) if order or len(text) == at else None


def fit_spots(text: str, pieces: Sequence[str], order: Sequence[int], contents: Mapping[int, str]) -> list[Spot] | None:
    fitted = fit(text, pieces, order, contents)
    if fitted is None:
        return None
    values, ends = fitted
    return [(end - len(value), end, f) for value, end, f in zip(values, ends[1:], order, strict=True)]
