"""Where tensors wait between a layer's forward and its backward: where they are, or in main memory.

On the way out a layer's tensors are copied to pinned buffers on a stream of their own while the next layers run; on the way back
the layer below is fetched while the one above computes. So two layers' tensors are on the device at a time, and the copies are
hidden as long as the link moves them faster than a layer takes. Elsewhere than on an NVIDIA GPU nothing moves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

IN_FLIGHT = 2  # layers whose copies to main memory may be under way before the device waits for the oldest


@dataclass(eq=False)
class Ticket:
    """What was put; exactly one of `tensors` and `host` is filled until it is fetched."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    host: dict[str, tuple[Tensor, torch.Size, torch.dtype]] = field(default_factory=dict)
    ready: torch.cuda.Event | None = None


class Pool:
    """Pinned buffers by size, kept from pass to pass: pinning a GiB takes a third of a second."""

    def __init__(self):
        self.free: dict[int, list[Tensor]] = {}
        self.stream: torch.cuda.Stream | None = None

    def take(self, size: int) -> Tensor:
        size = (
            1 << max(12, (size - 1).bit_length()) if size < 1 << 20 else -(-size >> 20) << 20
        )  # few sizes, so that they are met again
        waiting = self.free.get(size)
        return waiting.pop() if waiting else torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give(self, buffer: Tensor) -> None:
        self.free.setdefault(buffer.numel(), []).append(buffer)


class Stash:
    """Of one pass. Tickets come back last in, first out: the order of a backward."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.waiting: list[Ticket] = []  # in main memory
        self.handed: Tensor | None = None  # the gradient that a layer's backward gave to the layer below, in its wider rows
        self.leaving: deque[tuple[torch.cuda.Event, dict[str, Tensor]]] = deque()

    def put(self, tensors: Mapping[str, Tensor], offload: bool) -> Ticket:
        if not offload or not next(iter(tensors.values())).is_cuda:
            return Ticket(dict(tensors))
        side, main, ticket = self._side(), torch.cuda.current_stream(), Ticket()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for name, tensor in tensors.items():
                buffer = self.pool.take(tensor.numel() * tensor.element_size())
                _as(buffer, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
                ticket.host[name] = buffer, tensor.shape, tensor.dtype
            left = torch.cuda.Event()
            left.record(side)
        self.leaving.append((left, dict(tensors)))
        while len(self.leaving) > IN_FLIGHT:
            main.wait_event(self.leaving.popleft()[0])  # what is freed here may be written again by later work of this stream
        self.waiting.append(ticket)
        return ticket

    def take(self, ticket: Ticket) -> dict[str, Tensor]:
        main = torch.cuda.current_stream() if self.leaving or self.waiting else None
        while self.leaving:
            main.wait_event(self.leaving.popleft()[0])
        if ticket.host:
            self._fetch(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            main.wait_event(ticket.ready)
        if self.waiting:
            self._fetch(self.waiting[-1])
        tensors, ticket.tensors = ticket.tensors, {}
        return tensors

    def _fetch(self, ticket: Ticket) -> None:
        """Start its way back. The buffers are free at once: whatever is copied into them next waits in the same stream."""
        if not ticket.host:
            return
        side = self._side()
        ticket.tensors = {n: torch.empty(shape, dtype=dtype, device="cuda") for n, (_, shape, dtype) in ticket.host.items()}
        side.wait_stream(torch.cuda.current_stream())  # the new tensors' memory may still be read by work that was queued before
        with torch.cuda.stream(side):
            for name, (buffer, shape, dtype) in ticket.host.items():
                ticket.tensors[name].copy_(_as(buffer, shape, dtype), non_blocking=True)
                self.pool.give(buffer)
            ticket.ready = torch.cuda.Event()
            ticket.ready.record(side)
        ticket.host = {}

    def _side(self) -> torch.cuda.Stream:
        if self.pool.stream is None:
            self.pool.stream = torch.cuda.Stream()
        return self.pool.stream


def _as(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
