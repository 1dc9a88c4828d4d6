"""Steps of the engine as CUDA graphs: what writes, for a few batch sizes, and a few whole prompts, for a few lengths together.

Launched one by one, a layer's products wait for Python: on an H200 a step with prompts of a 1B took 18 ms, of which the card worked
five, and the first of each length looked for its products' kernels besides. What does not fit a recording runs as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.models.paged import RecordedPass, RecordedPrompts, slots_of
from tunesmith.ops import paged
from tunesmith.ops.attention import room_kernel, to_device
from tunesmith.ops.paged import BLOCK

if TYPE_CHECKING:
    from tunesmith.serve.engine import Answer, Engine


class Graphs:
    """Each with and without adapters. Places beyond the sequences, and tokens beyond the prompts, compute into block 0."""

    SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of prompts; beyond, the card has more to do than Python
    PROMPTS = 4  # at most, of a recording: its attention is launched for as many of the full length

    def __init__(self, engine: Engine):
        self.engine = engine
        self.found: dict[tuple[int, bool], tuple[Any, ...]] = {}
        self.found_prompts: dict[tuple[int, bool], tuple[Any, ...]] = {}
        self.pools: dict[
            bool, Any
        ] = {}  # memory of what writes, and of prompts: in one step both replay, and both results are read

    def forget(self) -> None:
        self.found.clear()
        self.found_prompts.clear()
        self.pools.clear()

    def warm(self) -> None:
        """The largest first: the others find room in its memory."""
        for adapters in (False, True) if self.engine.bank.names and self.engine.bank.plain else (False,):
            for size in reversed(self.SIZES):
                if size <= self.size(self.engine.limits.batch):
                    self.found[size, adapters] = self._record(size, adapters)
            for size in reversed(self.TOKENS) if self._prompts_too() else ():
                if size <= self.engine.limits.piece:
                    self.found_prompts[size, adapters] = self._record_prompts(size, adapters)

    def _prompts_too(self) -> bool:
        """Whether attention has a kernel for prompts that change under a recording."""
        spec = self.engine.model.spec
        return spec.attention_softcap is None and room_kernel(self.engine.pool.keys, spec.head_dim)

    def size(self, n: int) -> int:
        return next((s for s in self.SIZES if s >= n), n)

    def run(self, writers: Sequence[Answer], tokens_n: Tensor) -> Tensor:
        """Logits [n, V] of the writers' next tokens; valid until the next run."""
        engine, n = self.engine, len(writers)
        size, adapters, device = self.size(n), any(s.adapter for s in writers), engine.device
        if (size, adapters) not in self.found:
            self.found[size, adapters] = self._record(size, adapters)
        graph, where, tokens, numbers, logits = self.found[size, adapters]
        blocks = max(len(s.blocks) for s in writers)
        table = np.zeros((size, blocks), np.int32)
        table[:n] = engine._tables[[s.row for s in writers], :blocks]
        held = torch.zeros(2, size, dtype=torch.int64)
        held[:, :n] = torch.tensor([[s.held for s in writers], [s.adapter for s in writers]])
        held = to_device(held, device)
        where.tables_NM[:, :blocks].copy_(to_device(torch.from_numpy(table), device))
        where.positions_T.copy_(held[0])
        where.lengths_N.copy_(held[0] + 1)
        numbers.copy_(held[1])
        tokens[:n].copy_(tokens_n)
        graph.replay()
        return logits[:n]

    def takes(self, planned: Sequence[tuple[Answer, int]]) -> bool:
        """Whether these are a few prompts from their beginning, and a recording holds them."""
        adapters, tokens = any(s.adapter for s, _ in planned), sum(n for _, n in planned)
        fits = len(planned) <= self.PROMPTS and not any(s.held for s, _ in planned)
        return fits and any(size >= tokens for size, has in self.found_prompts if has == adapters)

    def prompts(self, planned: Sequence[tuple[Answer, int]]) -> tuple[Tensor, list[Answer]]:
        """As Engine._forward: logits of those whose prompts are all computed now, valid until the next run, and who they are."""
        adapters, total = any(s.adapter for s, _ in planned), sum(n for _, n in planned)
        size = min(size for size, has in self.found_prompts if has == adapters and size >= total)
        graph, where, places, logits = self.found_prompts[size, adapters]
        done = [i for i, (s, n) in enumerate(planned) if n == s.pending]
        bounds = np.cumsum([0, *(n for _, n in planned)])
        now = np.zeros(len(places), np.int64)
        tokens, positions, slots, numbers, rows, ends = where.views(now)
        for (s, n), start, end in zip(planned, bounds, bounds[1:], strict=False):
            tokens[start:end] = s.ids[:n]
            positions[start:end] = np.arange(n)
            slots[start:end] = slots_of(s.blocks, positions[start:end])
            numbers[start:end] = s.adapter
        rows[: len(done)] = bounds[1:][done] - 1
        ends[: len(bounds)], ends[len(bounds) : -1], ends[-1] = bounds, total, size
        places.copy_(to_device(torch.from_numpy(now), self.engine.device))
        graph.replay()
        return logits[: len(done)], [planned[i][0] for i in done]

    def _record_prompts(self, tokens: int, adapters: bool) -> tuple[Any, ...]:
        engine = self.engine
        where = RecordedPrompts(engine.pool, tokens, self.PROMPTS)
        choice = engine.bank.choice

        def body() -> Tensor:
            choice.clear()
            choice.number_T, choice.rows = (where.numbers_T if adapters else None), where.rows_N
            choice.present = frozenset(engine.bank.numbers) if adapters else frozenset()
            where.find()
            return engine.model.logits(engine.hidden(where.tokens_T, where, where.rows_N))

        graph, logits = self._capture(body, prompts=True)
        choice.clear()
        choice.number_T = choice.rows = None
        return graph, where, where.places, logits

    def _record(self, size: int, adapters: bool) -> tuple[Any, ...]:
        engine, device = self.engine, self.engine.device
        blocks = engine._tables.shape[1]
        splits = paged.splits_for(size, engine.model.spec.kv_heads, blocks * BLOCK)
        where = RecordedPass(engine.pool, size, blocks, splits)
        tokens, numbers = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        choice = engine.bank.choice

        def body() -> Tensor:
            choice.clear()
            choice.number_T, choice.rows = (numbers if adapters else None), None
            choice.present = frozenset(engine.bank.numbers) if adapters else frozenset()
            where.find()
            return engine.model.logits(engine.hidden(tokens, where, None))

        graph, logits = self._capture(body)
        choice.clear()
        choice.number_T = None
        return graph, where, tokens, numbers, logits

    def _capture(self, body: Callable[[], Tensor], prompts: bool = False) -> tuple[Any, Tensor]:
        """(what replays it, where its result then lies)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            body()  # compiles and loads kernels, which a capture may not
            body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pools.get(prompts), capture_error_mode="thread_local"):
            logits = body()
        self.pools.setdefault(prompts, graph.pool())
        return graph, logits
