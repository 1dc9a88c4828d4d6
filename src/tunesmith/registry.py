"""A literal table that suggests the near name.

Tables (FAMILIES, FORMATS, METHODS ...) stand as plain dicts at the foot of their file; this wraps one so that a wrong
name says what was meant, and lets third parties add rows through entry points in the group `tunesmith.<table>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from tunesmith.errors import TunesmithError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, else the list of known names. Empty when nothing is known."""
    known = [str(k) for k in known]
    if close := difflib.get_close_matches(str(name), known, 1, 0.6):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else ""


@cache  # it reads the metadata of every installed package: 2 ms, which is long for each of a million refused rows
def _points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"tunesmith.{group}"))


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping. Raises `error` (a TunesmithError class) with the near name for a key it lacks."""

    def __init__(self, what: str, table: Mapping[str, T], *, group: str = "", error: type[TunesmithError] = TunesmithError):
        self.what, self.table, self.group, self.error = what, dict(table), group, error

    def __getitem__(self, name: str) -> T:
        if name in self.table:
            return self.table[name]
        if self.group:
            for point in _points(self.group):
                if point.name == name:
                    self.table[name] = point.load()
                    return self.table[name]
        raise self.error(f"unknown {self.what} {name!r}", did_you_mean(name, self))

    def __contains__(self, name: object) -> bool:  # Mapping's own tries KeyError, ours is a TunesmithError
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        yield from self.table
        if self.group:
            yield from (p.name for p in _points(self.group) if p.name not in self.table)

    def __len__(self) -> int:
        return sum(1 for _ in self)
