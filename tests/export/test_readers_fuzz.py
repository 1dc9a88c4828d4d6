"""5,000 damaged files for each reader: a file is read or refused with ModelError or a fault, within a second, at a cost of memory
that its own size bounds. Sizes are held against the file before anything is made of them."""

import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tunesmith.errors import ModelError
from tunesmith.export.gguf_read import MEMORY, read_gguf
from tunesmith.models.weights import find_tensors, read_header

CASES = 5_000
TRACED = 500  # cases whose memory is watched, which makes them four times as slow
NASTY = (0, 1, 2, 8, 9, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


WORDS = (b"-1", b"1e9", b'"', b"[[[[[[", b"{}", b"null", b"\xff\xfe", b"99999999999999999999")


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_file() -> bytes:
    """A small one of version 3: a key of every kind, four tensors."""
    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("a.bool") + struct.pack("<I?", 7, True),
        text("a.float") + struct.pack("<If", 6, 1e-5),
        text("a.long") + struct.pack("<IQ", 10, 7),
        text("a.scores") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        text("a.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("<s>") + text("é") + text(""),
        text("a.nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2i", 5, 2, 1, 2),
    ]
    shapes = {"x": ((4, 2), 0, 32), "y": ((32, 1), 8, 34), "z": ((3,), 1, 6), "empty": ((0, 4), 0, 0)}
    offset, tensors, data = 0, [], b""
    for name, (dims, kind, size) in shapes.items():
        tensors.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        data += b"\1" * size + b"\0" * (-size % 32)
        offset += size + (-size % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def safetensors_file() -> bytes:
    tensors = {"a.weight": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}
    return save(tensors, metadata={"format": "pt"})


def damaged(whole: bytes, rng: random.Random) -> bytes:
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(max(1, len(raw)))
        match rng.randrange(8):
            case 0:
                raw[at : at + 1] = bytes([raw[at] ^ (1 << rng.randrange(8))]) if raw else b""
            case 1:
                del raw[at:]
            case 2:
                raw[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 3:
                del raw[at : at + rng.randrange(1, 40)]
            case 4:
                raw[at : at + 8] = struct.pack("<Q", rng.choice(NASTY))
            case 5:
                raw[at : at + 4] = struct.pack("<I", rng.choice(NASTY) % 2**32)
            case 6:
                raw[at : at + 16] = raw[: rng.randrange(1, 17)]
            case 7:
                raw[at : at + 6] = rng.choice(WORDS)
        if not raw:
            break
    return bytes(raw)


def campaign(whole: bytes, read) -> tuple[int, float]:
    """(how many were read, the slowest in seconds); fails with the case's number."""
    good, slowest = 0, 0.0
    tracemalloc.start()
    peak = 0
    try:
        for case in range(CASES):
            if case == TRACED:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            raw = damaged(whole, random.Random(case))
            began = time.perf_counter()
            try:
                good += read(raw)
            except Exception as fault:  # noqa: BLE001 - any but the reader's own is what is looked for
                pytest.fail(f"case {case}: {type(fault).__name__}: {fault}")
            slowest = max(slowest, time.perf_counter() - began)
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, f"{peak:,} bytes for files of {len(whole):,}"
    return good, slowest


def test_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    whole = gguf_file()
    path.write_bytes(whole)
    found = read_gguf(path)
    assert (
        found.keys["a.tokens"] == ["<s>", "é", ""]
        and [list(a) for a in found.keys["a.nested"]] == [[1, 2]]
        and found.keys["a.bool"] is True
    )
    assert found.tensors["y"].type == "Q8_0" and found.tensors["y"].shape == (1, 32) and found.tensors["z"].size == 6

    def read(raw: bytes) -> bool:
        path.write_bytes(raw)
        try:
            found = read_gguf(path)
        except ModelError as fault:
            assert fault.fix and path.name in fault.what
            return False
        assert all(t.start + t.size <= len(raw) for t in found.tensors.values())
        return True

    good, slowest = campaign(whole, read)
    assert slowest < 1 and 0 < good < CASES // 2


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"

    def read(raw: bytes) -> bool:
        path.write_bytes(raw)
        found, faults = find_tensors(tmp_path)
        assert all(t.end <= len(raw) for t in found.values()) or faults
        if not faults:
            with path.open("rb", buffering=0) as file:
                for stored in read_header(path)[0].values():
                    if stored.dtype in ("F32", "BF16"):
                        assert stored.read(file).shape == torch.Size(stored.shape)
        return not faults

    whole = safetensors_file()
    assert read(whole)
    good, slowest = campaign(whole, read)
    assert slowest < 1 and 0 < good < CASES // 2


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "announced"),
        (b"GGML" + b"\0" * 60, "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + b"\0" * 40, "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + b"\0" * 40, "tensors are announced in"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61) + b"\0" * 40, "an array of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 40, "bytes are announced"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + b"\0" * 64,
            "over another",
        ),
    ],
)
def test_a_size_that_the_file_does_not_have_is_told(raw, told, tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=told):
        read_gguf(tmp_path / "x.gguf")


def array_of(kind: int, count: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, kind, count) + body


SIZE = 8 << 20
LARGE = {
    "bytes": lambda: array_of(1, SIZE, bytes(range(256)) * (SIZE // 256)),
    "bools": lambda: array_of(7, SIZE, bytes(SIZE)),
    "words": lambda: array_of(2, SIZE // 2, bytes(range(256)) * (SIZE // 256)),
    "floats": lambda: array_of(6, SIZE // 4, b"\1\2\3\4" * (SIZE // 4)),
    "texts": lambda: array_of(8, SIZE // 10, (struct.pack("<Q", 2) + b"zq") * (SIZE // 10)),
    "no texts": lambda: array_of(8, SIZE // 8, bytes(SIZE)),
    "arrays": lambda: array_of(9, SIZE // 12, struct.pack("<IQ", 4, 0) * (SIZE // 12)),
    "arrays of one": lambda: array_of(9, SIZE // 13, struct.pack("<IQB", 0, 1, 9) * (SIZE // 13)),
    "a text": lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 8) + text("a" * SIZE + "\U0001d11e"),
    "keys": lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, SIZE // 18) + b"".join(
        text(f"{i:05x}") + struct.pack("<IB", 0, 1) for i in range(SIZE // 18)),
    "tensors": lambda: b"GGUF" + struct.pack("<IQQ", 3, SIZE // 37, 0) + b"".join(
        text(f"{i:05x}") + struct.pack("<IQIQ", 1, 0, 0, 0) for i in range(SIZE // 37)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_made_of_a_header_is_bounded_by_its_bytes(kind, tmp_path):
    """The peak of a process of its own, from before the file is read to after it: an array of bytes took 33 times its size."""
    path = tmp_path / "x.gguf"
    path.write_bytes(LARGE[kind]() + bytes(64))
    script = (
        "import sys, pathlib\n"
        "from tunesmith.export.gguf_read import read_gguf\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) << 10\n"
        "before = peak(); read_gguf(pathlib.Path(sys.argv[1])); print(peak() - before)"  # ru_maxrss begins with the parent's
    )
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    times = int(done.stdout) / path.stat().st_size
    assert times < MEMORY, f"{times:.1f} times the file"


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")
