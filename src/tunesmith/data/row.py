"""One row as it stands in a file, what is too much for one, and how a fault of a whole file is told (see sources.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tunesmith.errors import DataError
from tunesmith.types import Origin

MAX_ROW = 32 << 20  # characters of one row
MAX_PARTS = 1_000_000  # objects and lists in one JSON row: 32 MB of `{},` are 10 million, and take 1 GB
MAX_DEPTH = 64  # nesting of one JSON row
BLOCK = 1 << 20  # bytes that are read, or looked at ahead, at once

Item = tuple[int, Any, int]  # line or row number, what it holds, its size in characters


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


def fault(path: Path | str, what: str, fix: str) -> NoReturn:
    """Raise the DataError of a whole file."""
    raise DataError(f"{path}: {what}", fix)


def not_utf8(path: Path, where: str, sample: bytes) -> NoReturn:
    """Raise the fault of a file whose bytes are no UTF-8; `sample` is what stands around them."""
    code = "windows-1252" if any(0x80 <= b < 0xA0 for b in sample) else "latin1"
    fault(path, f"not UTF-8 ({where}; it looks like {code})", iconv(code, Path(path)))


def iconv(code: str, path: Path) -> str:
    """The command that writes the file again as UTF-8."""
    name = path.name.removesuffix(".gz")
    new = path.with_name(f"{name.partition('.')[0]}.utf8{''.join(Path(name).suffixes[-1:])}")
    if path.name.endswith(".gz"):
        return f"gzip -dc {path} | iconv -f {code} -t utf8 > {new}, and use {new}"
    return f"iconv -f {code} -t utf8 {path} > {new}, and use {new}"
