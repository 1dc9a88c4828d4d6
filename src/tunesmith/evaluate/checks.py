"""Checks that a row carries itself: what an answer to it must hold, whatever its words are otherwise. No torch.

A row's `expect` is a list, and all of it must hold:

    "basil"                         the word or phrase stands in the answer, in any case
    ["tap", "knock"]                one of these does
    {"all": ["sill", "herbs"]}      each of these does
    {"none": ["sorry", "cannot"]}   none of these does
    {"regex": "\\\\bNo\\\\b"}           the pattern is found
    {"not_regex": "[!?]"}           the pattern is not found
    {"number": 14}                  this number is among those in the answer

An object of such lists, `{"facts": [...], "tone": [...]}`, makes a metric of each. Rows without checks are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

Held = Callable[[str], bool]

_NUMBER = re.compile(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?")


class CheckError(Exception):
    """What is wrong with a check."""


def stands(words: str, answer: str) -> bool:
    """Whether a word or phrase stands in an answer as such, in any case."""
    return re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", answer.casefold()) is not None


def compiled(value: Any) -> list[Held]:
    """The checks of one row. Raises CheckError."""
    if not isinstance(value, list):
        raise CheckError(f"{_short(value)} is no list of checks")
    return [_check(item) for item in value]


def _check(item: Any) -> Held:
    if isinstance(item, str) and item.strip():
        return lambda answer: stands(item, answer)
    if isinstance(item, list) and item and all(isinstance(w, str) and w.strip() for w in item):
        return lambda answer: any(stands(w, answer) for w in item)
    if isinstance(item, dict) and len(item) == 1:
        [(kind, value)] = item.items()
        if kind in _KINDS:
            return _KINDS[kind](value)
    raise CheckError(f"{_short(item)} is no check; one is a text, a list of texts, or an object with one of {', '.join(_KINDS)}")


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(w, str) and w.strip() for w in value):
        raise CheckError(f"{_short(value)} is no list of texts")
    return value


def _pattern(value: Any) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except (re.error, TypeError) as fault:
        raise CheckError(f"{_short(value)} is no regular expression: {fault}") from None


def _all(value: Any) -> Held:
    words = _words(value)
    return lambda answer: all(stands(w, answer) for w in words)


def _any(value: Any) -> Held:
    words = _words(value)
    return lambda answer: any(stands(w, answer) for w in words)


def _none(value: Any) -> Held:
    words = _words(value)
    return lambda answer: not any(stands(w, answer) for w in words)


def _regex(value: Any) -> Held:
    pattern = _pattern(value)
    return lambda answer: bool(pattern.search(answer))


def _not_regex(value: Any) -> Held:
    pattern = _pattern(value)
    return lambda answer: not pattern.search(answer)


def _number(value: Any) -> Held:
    if isinstance(value, bool) or (wanted := _decimal(str(value))) is None:
        raise CheckError(f"{_short(value)} is no number")
    return lambda answer: wanted in {_decimal(n) for n in _NUMBER.findall(answer)}


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None


_KINDS: dict[str, Callable[[Any], Held]] = {
    "any": _any, "all": _all, "none": _none, "regex": _regex, "not_regex": _not_regex, "number": _number,
}  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def names(rows: Sequence[Mapping[str, Any]], key: str = "expect") -> list[str]:
    """What the rows' checks are called: `expect`, or `expect.facts` and so on where they are named."""
    found: dict[str, None] = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, dict):
            found |= dict.fromkeys(f"{key}.{name}" for name in value)
        elif value:
            found[key] = None
    return list(found)


def of_row(row: Mapping[str, Any], name: str) -> list[Held]:
    """A row's checks by their name, as `names` has it; none where it carries none. Raises CheckError."""
    value = row.get(name)
    if value is None and "." in name:
        key, _, part = name.partition(".")
        value = named.get(part) if isinstance(named := row.get(key), dict) else None
    return compiled(value) if value else []
