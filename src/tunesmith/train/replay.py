"""A micro-batch's forward and backward, recorded once as a CUDA graph and played again for every later one of its shape.

A layer of a Mistral-7B is 70 launches, a step over eight short chats 2,400; each costs the CPU 20 to 50 us, the GPU 79 ms in all:
on an H100 such a step took 126 ms. A recording plays them without the CPU. It needs fixed shapes and fixed places:

    shapes      a stream is filled up to a `Room` by lengthening its last document, which causal attention keeps from telling; the
                rows of the loss are filled up with ones that are ignored. Filled or not follows from the micro-batch alone, and an
                unrecorded pass is filled too, so that recorded and unrecorded steps are the same to the bit.
    places      what comes in is copied to where the recording reads it; gradients are added to the optimiser's flat ones. What lies
                between comes from one pool of memory that all recordings share: they never run at once.

`plain` is the definition, and what runs wherever `obstacle` names a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.levels import RECORDED
from tunesmith.ops.attention import Layout, room_kernel
from tunesmith.ops.linear_ce import IGNORED, linear_cross_entropy
from tunesmith.train.loss import Noise, batch_loss
from tunesmith.train.optim import Optimizer
from tunesmith.types import Batch

OWN = 128 << 20  # bytes of the device that a recording takes beside its pool, at first: workspaces of its stream, nodes
MOST_KEPT = 48  # recordings; a Mistral-7B's takes some MiB of nodes on the device
UNIT = 128  # tokens, and rows, that shapes are counted in: a GEMM's tile


def plain(model: nn.Module, batch: Batch, device: torch.device, factor: float, noise: Noise | None = None) -> Tensor:
    """Add the gradient of `factor` x (the batch's loss, summed over trained tokens) to `.grad`; returns that loss, detached."""
    loss, _ = batch_loss(model, batch, device, noise)
    (loss * factor).backward()
    return loss.detach()


@dataclass(frozen=True)
class Room:
    """The shapes that a micro-batch is filled up to, so that a few recordings serve many."""

    tokens: int
    rows: int
    lengths: tuple[int, ...]  # of every document where all are alike, else nothing
    documents: int
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> Room:
        lengths = tuple(np.diff(batch.cu_seqlens).tolist())
        tokens, rows, several = sum(lengths), len(batch.rows), len(lengths) > 1
        if several and len(set(lengths)) == 1:  # left as they are: for documents of one length there is a faster attention kernel
            return cls(tokens, rows, lengths, len(lengths), lengths[0])
        alone = rows == tokens and _up(rows, 8) > rows  # rows that only fill up look at a token that no label is predicted from
        filled = _up(tokens + alone)
        if not several:
            return cls(filled, _up(rows, 8), (filled,), 1, filled)
        longest = max(*lengths[:-1], lengths[-1] + filled - tokens)
        return cls(filled, _up(rows, 8), (), _power(max(8, len(lengths))), _power(max(1024, longest)))

    def lengths_of(self, batch: Batch) -> tuple[int, ...]:
        """The documents' lengths once they fill the room."""
        bounds = [*batch.cu_seqlens[:-1].tolist(), self.tokens]
        return tuple(b - a for a, b in pairwise(bounds))

    def filled(self, batch: Batch) -> np.ndarray:
        """int64: tokens, positions [tokens], rows, labels [rows], document bounds [documents + 1], one behind the other."""
        more, lengths = self.tokens - len(batch.tokens), self.lengths_of(batch)
        fill, last = self.rows - len(batch.rows), batch.positions[-1]
        free = np.setdiff1d(np.arange(self.tokens), batch.rows)[-1:]  # one that no label is predicted from
        return np.concatenate([
            batch.tokens, np.repeat(batch.tokens[-1:], more), batch.positions, np.arange(last + 1, last + 1 + more),
            batch.rows, np.repeat(free, fill), batch.labels, np.full(fill, IGNORED),
            batch.cu_seqlens[:-1], np.full(self.documents + 1 - len(lengths), self.tokens),
        ]).astype(np.int64)  # fmt: skip


BROKEN: list[torch.cuda.CUDAGraph] = []  # captures that could not end, kept: destroying one ends the process


@dataclass(eq=False)
class Recording:
    """One room: where its micro-batches are put, and the graph once there is one."""

    room: Room
    layout: Layout
    packed: Tensor  # as `Room.filled`
    factor: Tensor
    loss: Tensor
    x: Tensor | None  # the embedded stream, where the embedding is in main memory
    graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(cls, room: Room, batch: Batch, model: nn.Module, device: torch.device) -> Recording:
        packed = torch.zeros(2 * room.tokens + 2 * room.rows + room.documents + 1, dtype=torch.int64, device=device)
        lengths, varied = room.lengths_of(batch), 0 if room.lengths else room.longest
        bounds = torch.zeros(room.documents + 1, dtype=torch.int32, device=device)
        positions = packed[room.tokens : 2 * room.tokens]
        layout = Layout(lengths, (0, *accumulate(lengths)), positions, bounds, varied)
        x = None
        if model.embedding_device.type != device.type:
            like = model.model.norm.weight
            x = torch.empty(room.tokens, model.spec.dim, dtype=like.dtype, device=device)
        return cls(room, layout, packed, torch.zeros((), device=device), torch.zeros((), device=device), x)

    def fill(self, model: nn.Module, batch: Batch, factor: float) -> None:
        filled = torch.from_numpy(self.room.filled(batch))
        self.packed.copy_(filled.pin_memory() if self.packed.is_cuda else filled, non_blocking=True)
        self.factor.fill_(factor)
        if not self.packed.is_cuda:  # nothing is recorded, and attention there asks the layout for its bounds
            lengths = self.room.lengths_of(batch)
            self.layout = replace(self.layout, lengths=lengths, bounds=(0, *accumulate(lengths)))
        if self.x is not None:
            self.x.copy_(model.embed(filled[: self.room.tokens]))

    def body(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        """What is recorded: everything from the tokens to the gradients."""
        n = self.room.tokens, self.room.tokens, self.room.rows, self.room.rows, self.room.documents + 1
        tokens, _, rows, labels, bounds = self.packed.split(n)
        self.layout.cu_seqlens.copy_(bounds)
        x = model.embed(tokens) if self.x is None else self.x
        weight, softcap = model.plain_head()
        x_LD = model.fast_hidden(x, self.layout, rows, adds=True)  # `.backward()` would add on the stream of an unrecorded pass
        loss, _ = linear_cross_entropy(x_LD, weight, labels, softcap=softcap)
        torch.autograd.grad(loss * self.factor, parameters, allow_unused=True)
        self.loss.copy_(loss.detach())


@dataclass(eq=False)
class Passes:
    """The forwards and backwards of one run. `tell` is called once where recording had to be given up."""

    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    tell: Callable[..., Any] = lambda message, **values: None
    record: bool = True  # until it fails
    gave: int = 0  # times that an out-of-memory took them back
    paused: bool = False  # since the second time
    recordings: dict[tuple, Recording] = field(default_factory=dict)
    state: Any = None  # of the half-blocks, when they were recorded
    pool: Any = None
    stream: torch.cuda.Stream | None = None  # on which is recorded
    warm: bool = False  # one pass has run unrecorded: kernels are compiled, libraries loaded

    def __call__(self, batch: Batch, factor: float, noise: Noise | None = None) -> Tensor:
        """As `plain`."""
        room = Room.of(batch)
        if self.obstacle(batch, room, noise):
            return plain(self.model, batch, self.device, factor, noise)
        now = self.model.fast.state()
        if now != self.state:
            self.clear()
            self.state = now
        key = room, self._regime(batch, room)
        if key not in self.recordings:
            if len(self.recordings) == MOST_KEPT:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # it may still be playing
                del self.recordings[next(iter(self.recordings))]  # the one not used for longest
            self.recordings[key] = Recording.of(room, batch, self.model, self.device)
        recording = self.recordings[key] = self.recordings.pop(key)  # to the end: used last
        recording.fill(self.model, batch, factor)
        if recording.graph is not None or self._captured(recording):
            recording.graph.replay()
        else:
            self._run(recording)
        return recording.loss.clone()

    def obstacle(self, batch: Batch, room: Room, noise: Noise | None = None) -> str:
        """Why this pass cannot be recorded, and runs as `plain`; empty when it can."""
        model = self.model
        if not self.record or self.paused:
            return "it was given up"
        if not self.optimizer.flats:
            return "what is trained is not float32 on an NVIDIA GPU"
        if getattr(model, "fast", None) is None or not model.fast.renew(model):
            return "the layers do not run as half-blocks"
        if noise is not None:
            return "embeddings have noise"
        if type(model.model.embed_tokens) is not nn.Embedding or model.model.embed_tokens.weight.requires_grad:
            return "rows of the embedding are trained"
        if (head := model.plain_head()) is None or head[0].requires_grad:
            return "the head is trained"
        if any(p.requires_grad for p in model.model.norm.parameters()):  # `body` adds up the layers' gradients alone
            return "the last norm is trained"
        if self.device.type == "cuda" and not room_kernel(model.model.norm.weight, model.spec.head_dim):
            return "attention has no kernel for documents of any lengths"
        if room.tokens > RECORDED:
            return "the pass is long"
        if model.spec.rope.kind == "dynamic" and max(room.lengths_of(batch)) > model.spec.context:
            return "its rope table is of its length alone"  # `rotary` keeps the newest few, a recording would read a dropped one
        return "" if len(self._regime(batch, room)) == 1 else "its documents have rope tables of several kinds"

    def _regime(self, batch: Batch, room: Room) -> frozenset[tuple[int, ...]]:
        return self.model.rope_regime((*np.diff(batch.cu_seqlens).tolist(), *room.lengths_of(batch)))

    def clear(self) -> None:
        """Give the recordings and their memory back. Later passes are recorded anew."""
        self.recordings.clear()
        self.pool = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def relieve(self) -> bool:
        """After an out-of-memory: give the recordings back; True where they held memory. The second time none are made again."""
        held = any(recording.graph is not None for recording in self.recordings.values())
        self.clear()
        self.gave += held
        self.paused = held and self.gave > 1
        return held

    def _roomy(self) -> bool:
        """Whether what an unrecorded pass took at most is there once more, with what a recording itself takes.

        Running out while a pass is recorded is best not met: where the capture then cannot end, its memory stays taken (BROKEN; an
        H100, torch 2.11).
        """
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
        return min(free, share * total - reserved) >= torch.cuda.max_memory_reserved() - reserved + OWN

    def _run(self, recording: Recording) -> None:
        self.warm = True
        recording.body(self.model, list(self.optimizer.parameters.values()))

    def _captured(self, recording: Recording) -> bool:
        """Record; False where it is not the time, or cannot be. Nothing runs meanwhile, so a failure has changed nothing."""
        if not self.warm or self.device.type != "cuda":
            return False
        # what tables keep from call to call must not come out of the recordings' pool
        self.model._tables(recording.layout.positions_T, recording.layout.lengths, recording.layout, torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what unrecorded passes took and the recordings' pool must not stand side by side
        if not self._roomy():
            self.paused = True
            self.tell("passes are not recorded as CUDA graphs, steps are the same and slower", why="the device has no room for it")
            return False
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        self.stream = self.stream or torch.cuda.Stream()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="relaxed")
                try:
                    recording.body(self.model, list(self.optimizer.parameters.values()))
                except BaseException:
                    self._join()
                    raise
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            BROKEN.append(graph)
            self._renew_generator()
            if isinstance(e.__context__, torch.OutOfMemoryError):
                raise e.__context__ from None
            self.record = False
            self.clear()  # what runs from now on needs the memory
            self.tell("passes are not recorded as CUDA graphs, steps are the same and slower", why=str(e).splitlines()[0][:200])
            return False
        recording.graph = graph
        return True

    def _join(self) -> None:
        """A pass that ended half-way may have copies to main memory under way on their own stream; a capture whose streams have not
        come together cannot end.
        """
        side = self.model.fast.pool.stream
        if side is not None:
            with torch.cuda.stream(side):
                capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                self.stream.wait_stream(side)

    def _renew_generator(self) -> None:
        """A capture that could not end leaves the device's generator of random numbers in it: each later draw would fail."""
        generator = torch.cuda.default_generators[self.device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _up(n: int, parts: int = 32) -> int:
    """`n` in whole UNITs, or in `parts` of the next power of two where those are more. Rows reach the last layer's MLP and the head
    alone, and are counted in coarser parts than tokens: fewer shapes to record.
    """
    unit = max(UNIT, _power(n) // parts)
    return -(-n // unit) * unit
