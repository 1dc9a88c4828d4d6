"""Which rows are held out: whole groups, never a part of one. A group is what near-equal rows, a key, or a date make of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data import clusters
from tunesmith.data.prepare import HELD_OUT_MOST
from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Origin
from tunesmith.wording import counted

DAY_FIRST = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?:[ ,T]+(\d{1,2}):(\d{2})(?::(\d{2}))?)?")
YEAR_FIRST = re.compile(r"(\d{4})/(\d{1,2})/(\d{1,2})(?:[ ,T]+(\d{1,2}):(\d{2})(?::(\d{2}))?)?")
SECONDS = (
    10**8,
    10**11,
)  # a number between these is seconds since 1970 (1973 to 5138), one up to a thousand times that milliseconds


@dataclass(frozen=True)
class By:
    """`customer`, `meta.thread`, or `date:sent_at`: the key of a row whose value makes its group."""

    key: str
    date: bool = False

    @classmethod
    def parse(cls, text: str) -> By:
        date, key = text.startswith("date:"), text.removeprefix("date:").strip()
        if not key:
            raise ConfigError(
                f"--split-by {text}: no key is named", "--split-by customer, --split-by meta.thread, or --split-by date:sent_at"
            )
        return cls(key, date)

    def __str__(self) -> str:
        return f"date:{self.key}" if self.date else self.key

    def group(self, row: Any, origin: Origin, wrong: list[tuple[str, str]]) -> int:
        """A number for the group. Where there is none, its place goes to `wrong`, and with it what is no date."""
        value = self.value(row)
        if value is None or (isinstance(value, str) and not value.strip()):
            wrong.append((str(origin), ""))
            return 0
        if self.date:
            when = moment(value)
            if when is None:
                wrong.append((str(origin), str(value)[:40]))
            return when or 0
        text = json.dumps(value, sort_keys=True, default=str) if isinstance(value, (dict, list)) else str(value).strip()
        return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big", signed=True)

    def value(self, row: Any) -> Any:
        """What stands at the key: as it is written, or else as a path with dots."""
        if isinstance(row, Mapping) and self.key in row:
            return row[self.key]
        for part in self.key.split("."):
            if not isinstance(row, Mapping) or part not in row:
                return None
            row = row[part]
        return row

    def require(self, wrong: list[tuple[str, str]], count: int, rows: int) -> None:
        """DataError for rows without a group: how many, and the first."""
        if not count:
            return
        places = ", ".join(place + (f": {value!r}" if value else "") for place, value in wrong)
        if self.date and any(value for _, value in wrong):
            what = f"--split-by {self}: {count:,} of {rows:,} rows have no date there that can only be read one way ({places})"
            raise DataError(what, "write dates as 2024-05-17, with a time 2024-05-17T12:30:00Z, 17.05.2024, or seconds since 1970")
        raise DataError(
            f"--split-by {self}: {count:,} of {rows:,} rows have no {self.key!r} ({places})",
            "name a key that every row has (a.b for one inside another), or give those rows one",
        )


def moment(value: Any) -> int | None:
    """Microseconds since 1970 of a date in ISO 8601, 17.05.2024, 2024/05/17, or seconds or milliseconds; None for what is none.
    05/06/2024 may be May or June, so it is none. Without a zone it is UTC."""
    if isinstance(value, datetime.datetime):
        return _micro(value)
    if isinstance(value, datetime.date):
        return _micro(datetime.datetime(value.year, value.month, value.day))
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"\d{9,13}(?:\.\d+)?", text):
            return _written(text)
        value = float(text)
    if isinstance(value, (int, float)):
        low, high = SECONDS
        scale = 10**6 if low <= value < high else 10**3 if high <= value < 1000 * high else 0
        return round(value * scale) if scale else None
    return None


def _written(text: str) -> int | None:
    try:
        if m := DAY_FIRST.fullmatch(text):
            day, month, year, *time = m.groups()
        elif m := YEAR_FIRST.fullmatch(text):
            year, month, day, *time = m.groups()
        else:
            return _micro(datetime.datetime.fromisoformat(text)) if re.match(r"\d{4}-\d", text) else None
        return _micro(datetime.datetime(int(year), int(month), int(day), *(int(t or 0) for t in time)))
    except ValueError:
        return None


def _micro(when: datetime.datetime) -> int:
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return (when - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


# ---- how many, and which -------------------------------------------------------------------------------------------------------


def share_or_rows(text: str) -> float | int:
    """`5%` and `0.05` are a share, `200` is that many rows, `0` none."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    number = float(m[1]) / (100 if m[2] else 1) if m else -1.0
    if m and (m[2] or number < 1) and 0 <= number < 1:
        return number
    if m and not m[2] and number == int(number):
        return int(number)
    raise ConfigError(f"--split {text}: is no share and no number of rows", "--split 5%, --split 0.05, --split 200, or 0 for none")


def wanted(size: float | int, rows: int) -> int:
    """Rows to hold out of so many; a share takes at most HELD_OUT_MOST, as data.held_out does."""
    if isinstance(size, int):
        return min(size, rows - 1)
    return min(HELD_OUT_MOST, max(1, round(size * rows))) if size else 0


def firsts(labels: np.ndarray) -> np.ndarray:
    """For each row the number of the first one with its label, uint32."""
    _, index, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return index[inverse].astype(np.uint32)


def choose(labels: np.ndarray, by: By | None, number: int, seed: int) -> np.ndarray:
    """Rows to hold out, sorted: whole groups of equal `labels`, about `number` rows, never all. By date the latest."""
    if number < 1 or not len(labels):
        return np.zeros(0, np.int64)
    if by is not None and by.date:
        return _latest(labels, by, number)
    first = firsts(labels)
    chosen = clusters.held_out_rows(first, number, seed)
    if len(chosen) or by is None:
        return chosen
    groups, sizes = np.unique(first, return_counts=True)  # each has more rows than are wanted: the smallest, if it leaves enough
    smallest = int(sizes.argmin())
    if len(groups) < 2 or 2 * sizes[smallest] > len(labels):
        told = f"{counted(len(groups), 'group')}, the smallest of {sizes[smallest]:,} of {counted(len(labels), 'row')}"
        raise DataError(
            f"--split-by {by}: {told}: none can be held out", "split by a key with more values, or leave --split-by out"
        )
    return np.flatnonzero(first == groups[smallest])


def _latest(when: np.ndarray, by: By, number: int) -> np.ndarray:
    dates, sizes = np.unique(when, return_counts=True)
    behind = np.cumsum(sizes[::-1])[::-1]  # rows of this date and later
    fits = np.flatnonzero(behind <= number)
    start = int(fits[0]) if len(fits) else len(dates) - 1  # the last date goes whole, if it leaves enough
    if start == 0 or 2 * behind[start] > len(when):
        raise DataError(
            f"--split-by {by}: {behind[start]:,} of {len(when):,} rows have the latest date: they cannot be held out",
            "name a key with finer dates, or leave --split-by out",
        )
    return np.flatnonzero(when >= dates[start])
