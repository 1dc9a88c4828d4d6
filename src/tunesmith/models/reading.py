"""A checkpoint's bytes onto a GPU while the GPU takes what came before: disk, link and quantising overlap."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import ModelError

READERS = 4  # threads; one reads from memory at 4 GB/s, and a disk wants several requests at once
PIECE = 32 << 20  # bytes of a request: 8 of them lie in pinned memory, 256 MiB
Span = tuple[Path, int, int]  # a file, the first byte and the one after the last


def to_device(spans: Iterable[Span], device: torch.device) -> Iterator[Tensor]:
    """Each span as uint8 on `device`, in order. At most two spans are on the device beyond those that the caller keeps.

    ModelError where a file ends early.
    """
    gpu = device.type == "cuda"  # else it is a test
    slots = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=gpu) for _ in range(2 * READERS)]
    copied = [torch.cuda.Event() for _ in slots] if gpu else []
    files: dict[Path, int] = {}

    def read(slot: int, path: Path, start: int, size: int) -> None:
        if gpu:
            copied[slot].synchronize()  # what it held before is on the device
        view = memoryview(slots[slot].numpy())[:size]
        while view:
            got = os.preadv(files[path], [view], start)
            if not got:
                raise ModelError(f"{path}: ended while it was being read", "download the checkpoint again")
            view, start = view[got:], start + got

    def asked() -> Iterator[tuple]:
        turn = 0
        for path, start, end in spans:
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
            for at in range(start, max(end, start + 1), PIECE):
                size = min(PIECE, end - at)
                slot = turn % len(slots)
                turn += 1
                yield slot, pool.submit(read, slot, path, at, size), at - start, size, end - start

    pool = ThreadPoolExecutor(READERS, "read")
    try:
        stream, ahead, whole = asked(), deque(), None
        while True:
            while len(ahead) < len(slots) - 1 and (piece := next(stream, None)):
                ahead.append(piece)
            if not ahead:
                return
            slot, done, at, size, total = ahead.popleft()
            if whole is None:
                whole = torch.empty(total, dtype=torch.uint8, device=device)
            done.result()
            whole[at : at + size].copy_(slots[slot][:size], non_blocking=True)
            if gpu:
                copied[slot].record()
            if at + size == total:
                yield whole
                whole = None
    finally:
        pool.shutdown(cancel_futures=True)
        for descriptor in files.values():
            os.close(descriptor)
