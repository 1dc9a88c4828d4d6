"""A GGUF file's header, read with every size held against the file before anything is made of it.

The format: magic, version, counts of tensors and keys; keys (name, type, value); tensors (name, dimensions, type, offset); padding;
data. Little-endian. A damaged file is ModelError, never another exception. What is made of a header takes at most MEMORY times its
bytes, whatever it holds: nothing is made for a size that is only announced, and arrays of numbers stay packed.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.errors import ModelError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BLOCKS = {  # type number -> (name, values in a block, bytes of a block), of llama.cpp's ggml types
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}  # fmt: skip
MOST_DIMENSIONS, LONGEST_NAME, DEEPEST = 4, 65_535, 4
MEMORY = 12  # bytes at the peak for a byte of header: 10 where it is all tensors, 9 all bools, 7 all short words
HEADER_MOST = 1 << 30  # bytes before the tensors' data; the largest vocabularies in use take 10 MB


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor: its type's name, shape (outermost first, as torch has it) and place in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """Arrays of numbers are `array.array`s, of bools and texts lists."""

    keys: dict[str, Any]
    tensors: dict[str, Placed]


def read_gguf(path: Path) -> Gguf:
    """Keys and places of a GGUF file; the tensors' data are not read. Raises ModelError with what is wrong and where."""
    try:
        with path.open("rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size, path.name).read()
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror}", "check the path and its permissions") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int, name: str):
        self.file, self.size, self.name, self.at = file, size, name, 0

    def wrong(self, what: str) -> ModelError:
        return ModelError(f"{self.name}: {what}, at byte {self.at:,}", "write or download the file again")

    def take(self, count: int) -> bytes:
        """The next bytes; none are asked for that the file does not have."""
        if count > self.size - self.at or self.at + count > HEADER_MOST:
            raise self.wrong(f"{count:,} bytes are announced where the file has {self.size - self.at:,} left")
        found = self.file.read(count)
        if len(found) != count:
            raise self.wrong("the file ended while it was being read")
        self.at += count
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def numbers(self, code: str, count: int) -> array | list[bool]:
        raw = self.take(count * struct.calcsize(f"<{code}"))
        if code == "?":
            return [byte != 0 for byte in raw]
        found = array(code, raw)
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def text(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise self.wrong(f"a name of {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a text that is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                return self.numbers(SCALARS[inner], count)
            if inner not in (STRING, ARRAY):
                raise self.wrong(f"an array of type {inner}")
            if count * (8 if inner == STRING else 12) > self.size - self.at:  # the least that each takes
                raise self.wrong(f"an array of {count:,} where the file has {self.size - self.at:,} bytes left")
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise self.wrong(f"a value of type {kind}" if kind != ARRAY else "arrays in arrays")

    def read(self) -> Gguf:
        if self.take(4) != MAGIC:
            raise self.wrong("no GGUF file")
        version, tensors, keys = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise self.wrong(f"version {version}, where 2 and 3 are known")
        if (
            keys * 13 + tensors * 32 > self.size
        ):  # the least that each takes: a name, a type, a byte; a name, one dimension, a place
            raise self.wrong(f"{keys:,} keys and {tensors:,} tensors are announced in {self.size:,} bytes")
        found = self._table(keys, lambda: self.value(self.number("I")), "key")
        placed = self._table(tensors, self._tensor, "tensor")
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise self.wrong(f"an alignment of {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return Gguf(found, self._places(placed, start, alignment))

    def _table(self, count: int, read: Callable[[], Any], what: str) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(LONGEST_NAME)
            if name in table:
                raise self.wrong(f"{what} {name!r} twice")
            table[name] = read()
        return table

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.wrong(f"a tensor of {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return shape, self.number("I"), self.number("Q")

    def _places(self, placed: dict[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int) -> dict[str, Placed]:
        end, found = start, dict[str, Any](placed)
        for name in sorted(placed, key=lambda name: placed[name][2]):
            shape, kind, offset = placed[name]
            if kind not in BLOCKS:
                raise self.wrong(f"tensor {name!r} of type {kind}, which is not known")
            type_name, block, size = BLOCKS[kind]
            if shape[-1] % block:
                raise self.wrong(f"tensor {name!r}: rows of {shape[-1]:,} in blocks of {block}")
            total = math.prod(shape) // block * size
            if offset % alignment or start + offset < end or start + offset + total > self.size:
                raise self.wrong(f"tensor {name!r}: {total:,} bytes at {start + offset:,} of {self.size:,}, or over another tensor")
            end = start + offset + total
            found[name] = Placed(name, type_name, shape, start + offset, total)
        return found
