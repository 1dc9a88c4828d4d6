"""The cache of a server: keys and values in blocks that sequences take and give back while others run.

`Blocks` says which are free; `Pool` holds the numbers; a `Pass` is one stream through the model, of sequences with one new token
each (decoding) and then of others with more (a prompt, or a piece of one). A Pass has the face that Decoder.hidden asks of a cache.

Block 0 is nobody's: what a recorded pass computes for places without a sequence is written there. Keys are kept rotated. A
sequence gets blocks beside its last one where they are free, because a CPU then reads it in place, without gathering it.

Shape letters: T tokens in the stream, N sequences, S slots, M blocks of the longest table, Q query heads, K key/value heads, H head
width, G = Q / K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops import backend, paged
from tunesmith.ops.attention import Layout, attention, capped, room_kernel, to_device, visible
from tunesmith.ops.paged import BLOCK
from tunesmith.spec import Spec

TOGETHER = 512  # tokens: what is longer is read where it lies, not gathered


class Blocks:
    """Which of `count` blocks are free. Block 0 never is."""

    def __init__(self, count: int):
        self._free = np.ones(count, bool)
        self._free[0] = False
        self.free, self.count = count - 1, count - 1

    def take(self, wanted: int, after: int | None = None) -> list[int] | None:
        """`wanted` blocks, the first behind `after` where that is free; None, and nothing taken, when there are not so many."""
        if wanted > self.free:
            return None
        found: list[int] = []
        for _ in range(wanted):
            near = after + 1 if after is not None else 0
            after = near if 0 < near < len(self._free) and self._free[near] else self._room(wanted - len(found))
            self._free[after] = False
            found.append(after)
        self.free -= wanted
        return found

    def give(self, blocks: Sequence[int]) -> None:
        assert not self._free[list(blocks)].any(), "a block was given back twice"
        self._free[list(blocks)] = True
        self.free += len(blocks)

    def _room(self, wanted: int) -> int:
        """In the middle of the longest run of free blocks, so that it and the sequence before it can grow."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self._free, [False]]).astype(np.int8)))
        starts, ends = edges[::2], edges[1::2]
        k = int((ends - starts).argmax())
        start, length = int(starts[k]), int(ends[k] - starts[k])
        return start + min(length // 2, max(0, length - wanted)) if start > 1 else start


def bytes_per_block(spec: Spec, dtype: torch.dtype) -> int:
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * BLOCK * dtype.itemsize


class Pool:
    """Keys and values of `blocks` blocks, for every layer: [layers, S, K, H] each."""

    def __init__(self, spec: Spec, blocks: int, dtype: torch.dtype, device: torch.device | str):
        shape = (spec.layers, blocks * BLOCK, spec.kv_heads, spec.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))  # only what was written is read
        self.blocks = Blocks(blocks)


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence brings to a pass: `new` tokens behind `past` that the cache holds, its `blocks`, and the length it is known
    to reach (which decides the rotary table of some families)."""

    new: int
    past: int
    blocks: Sequence[int]
    whole: int


class Pass:
    """One stream: first the parts with one token, then the others. `layout` is the stream's."""

    def __init__(self, pool: Pool, parts: Sequence[Part]):
        device = pool.keys.device
        self.pool, self.parts = pool, parts
        self.singles = sum(part.new == 1 for part in parts)
        assert all(part.new == 1 for part in parts[: self.singles]), "sequences with one new token come first"
        self.layout = Layout.of([part.new for part in parts], device)
        self.lengths = [part.whole - part.new for part in parts]  # Decoder adds what is new
        held = [np.arange(part.past, part.past + part.new) for part in parts]
        slots = [slots_of(part.blocks, t) for part, t in zip(parts, held, strict=True)]
        self.positions_T = to_device(torch.from_numpy(np.concatenate(held)), device)
        self.slots_T = to_device(torch.from_numpy(np.concatenate(slots)), device)
        self.longest = max((part.past + 1 for part in parts[: self.singles]), default=0)
        self._where: list[slice | Tensor] | None = None  # made when first asked for, as the next four
        self._tables: tuple[Tensor, Tensor] | None = None
        self._grouped: dict[int | None, list[tuple[list[int], Tensor | None, Tensor | None]]] = {}
        self._alone: Layout | None = None
        self._joined: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    # ---- what Decoder.hidden asks of a cache

    def begin(self, tokens_T: Tensor, layout: Layout) -> tuple[Tensor, Layout, None]:
        return tokens_T, layout, None

    def positions(self, layout: Layout) -> Tensor:
        return self.positions_T

    def advance(self, layout: Layout) -> None:
        """Nothing to count: who made the pass knows."""

    def attend(self, layer: int, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout, scale: float,
               window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """Puts this layer's keys and values in their slots and attends to all the sequences hold. Returns [T, Q, H]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        paged.store(k_TKH, v_TKH, keys, values, self.slots_T)
        d, parts = self.singles, []
        if d:
            parts.append(self._decode(q_TQH[:d], keys, values, scale, window, softcap))
        if d < len(self.parts):
            rest = (x[d:] for x in (q_TQH, k_TKH, v_TKH))
            parts.append(self._pieces(*rest, keys, values, scale, window, softcap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ---- inside

    def _decode(self, q_NQH: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
                softcap: float | None) -> Tensor:  # fmt: skip
        if backend.triton_for(q_NQH):
            if self._tables is None:
                tables = torch.zeros(self.singles, max(len(p.blocks) for p in self.parts[: self.singles]), dtype=torch.int32)
                for row, part in zip(tables, self.parts, strict=False):
                    row[: len(part.blocks)] = torch.tensor(part.blocks, dtype=torch.int32)
                lengths = torch.tensor([part.past + 1 for part in self.parts[: self.singles]], dtype=torch.int32)
                self._tables = to_device(tables, q_NQH.device), to_device(lengths, q_NQH.device)
            splits = paged.splits_for(self.singles, keys.shape[1], self.longest)
            return paged.decode(q_NQH, keys, values, *self._tables, scale, window, softcap, splits)
        n, _, width = q_NQH.shape
        out = torch.empty_like(q_NQH, memory_format=torch.contiguous_format)
        grouped, into = q_NQH.reshape(n, keys.shape[1], -1, width), out.view(n, keys.shape[1], -1, width)
        for group, slots, mask in self._groups(window):
            if slots is None:
                k, v = self._held(group[0], keys, values, window)
            else:
                shape = len(group), -1, *keys.shape[1:]
                k, v = (x.index_select(0, slots).view(shape).transpose(1, 2) for x in (keys, values))
            at = slice(group[0], group[0] + 1) if slots is None else group
            if softcap is None:
                into[at] = F.scaled_dot_product_attention(grouped[at], k, v, attn_mask=mask, scale=scale)
            else:
                into[at] = capped(grouped[at], k, v, mask, scale, softcap)
        return out

    def _groups(self, window: int | None) -> list[tuple[list[int], Tensor | None, Tensor | None]]:
        """Singles whose attention is one call: up to TOGETHER tokens, those within a factor of two, gathered and masked (slots and
        bool mask); longer ones each by itself, in place. On two cores a call costs 50 us and a wake-up of the other, 64 of them in
        each layer."""
        if window not in self._grouped:
            sizes: dict[int, list[int]] = {}
            for i, part in enumerate(self.parts[: self.singles]):
                length = part.past + 1 if window is None else min(part.past + 1, window)
                sizes.setdefault(backend.round_up(max(length, 64)) if length <= TOGETHER else -1 - i, []).append(i)
            self._grouped[window] = [
                (group, None, None) if len(group) == 1 else (group, *self._joint(group, window)) for group in sizes.values()
            ]
        return self._grouped[window]

    def _joint(self, group: list[int], window: int | None) -> tuple[Tensor, Tensor]:
        """(slots of all the group's tokens, each sequence padded with its own first one; which are no padding [n, 1, 1, t])."""
        held = [np.arange(0 if window is None else max(0, p.past + 1 - window), p.past + 1) for p in (self.parts[i] for i in group)]
        slots = np.zeros((len(group), max(map(len, held))), np.int64)
        for row, i, tokens in zip(slots, group, held, strict=True):
            row[:] = self.parts[i].blocks[tokens[0] // BLOCK] * BLOCK + tokens[0] % BLOCK
            row[: len(tokens)] = slots_of(self.parts[i].blocks, tokens)
        mask = np.arange(slots.shape[1]) < np.array([len(t) for t in held])[:, None]
        device = self.pool.keys.device
        return to_device(torch.from_numpy(slots.reshape(-1)), device), to_device(torch.from_numpy(mask), device)[:, None, None]

    def _held(self, i: int, keys: Tensor, values: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """[1, K, t, H] each: what sequence i holds, its last `window` tokens; not copied where its blocks lie in a row."""
        if self._where is None:
            self._where = [self._place(part) for part in self.parts]
        where = self._where[i]
        if isinstance(where, slice):
            start = where.start if window is None else max(where.start, where.stop - window)
            k, v = keys[start : where.stop], values[start : where.stop]
        else:
            where = where if window is None else where[-window:]
            k, v = keys.index_select(0, where), values.index_select(0, where)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def _place(self, part: Part) -> slice | Tensor:
        end, blocks = part.past + part.new, part.blocks
        if all(b == a + 1 for a, b in pairwise(blocks)):
            return slice(blocks[0] * BLOCK, blocks[0] * BLOCK + end)
        return to_device(torch.from_numpy(slots_of(blocks, np.arange(end))), self.pool.keys.device)

    def _pieces(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
                softcap: float | None) -> Tensor:  # fmt: skip
        """Prompts and pieces of prompts."""
        parts, first = self.parts[self.singles :], self.singles
        fresh = not any(part.past for part in parts)
        if softcap is None and room_kernel(q, q.shape[-1]):
            return self._flash(q, k, v, keys, values, scale, window, fresh)
        if fresh:
            return attention(q, k, v, self._pieces_layout(), scale, window, softcap)
        out = []
        for i, (part, own) in enumerate(zip(parts, q.split([part.new for part in parts]), strict=True), first):
            k_one, v_one = self._held(i, keys, values)
            past, end = part.past, part.past + part.new
            mask = visible(range(past, end), range(end), window, q.device)
            args = own.transpose(0, 1)[None], k_one, v_one
            if softcap is None:
                y = F.scaled_dot_product_attention(*args, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            else:
                y = capped(*args, mask, scale, softcap)
            out.append(y[0].transpose(0, 1))
        return torch.cat(out)

    def _pieces_layout(self) -> Layout:
        """Where they lie in the stream without the singles."""
        if self._alone is None:
            self._alone = (
                Layout.of([p.new for p in self.parts[self.singles :]], self.slots_T.device) if self.singles else self.layout
            )
        return self._alone

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
               fresh: bool) -> Tensor:  # fmt: skip
        """torch's variable-length kernel; it counts back from the last key, so each piece sees what stands before it. Not
        `attention`'s choice, which for a prompt alone in its step is cuDNN: that plans anew for each length it has not met."""
        if fresh:
            layout = self._pieces_layout()
            return varlen(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest, scale, window)
        if self._joined is None:
            parts, device = self.parts[self.singles :], q.device
            held = [part.past + part.new for part in parts]
            slots = np.concatenate([slots_of(part.blocks, np.arange(n)) for part, n in zip(parts, held, strict=True)])
            ends = [torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in ([p.new for p in parts], held)]
            placed = (to_device(x, device) for x in (torch.from_numpy(slots), *ends))
            self._joined = (*placed, max(part.new for part in parts), max(held))
        slots, *ends = self._joined
        return varlen(q, keys.index_select(0, slots), values.index_select(0, slots), *ends, scale, window)


def varlen(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, scale: float,
           window: int | None) -> Tensor:  # fmt: skip
    """FA2 of several sequences, causal from each one's last key; `ends`: int32 bounds on the device."""
    back = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    args = q.contiguous(), k, v, ends_q, ends_k, longest_q, longest_k, 0.0, True, False
    return torch.ops.aten._flash_attention_forward(*args, scale=scale, **back)[0]


class RecordedPass(Pass):
    """Decoding of `n` sequences at places that stay where they are, so that a CUDA graph can be replayed for others: what changes
    between steps is copied into `positions_T` [n], `lengths_N` [n] and `tables_NM` [n, M]. Only with the kernel over blocks."""

    def __init__(self, pool: Pool, n: int, blocks: int, splits: int):
        device = pool.keys.device
        self.pool, self.parts, self.singles, self._splits = pool, [None] * n, n, splits
        self.layout = Layout((1,) * n, tuple(range(n + 1)), torch.zeros(n, dtype=torch.int64, device=device),
                             torch.arange(n + 1, dtype=torch.int32, device=device))  # fmt: skip
        self.lengths = [0] * n
        self.positions_T = torch.zeros(n, dtype=torch.int64, device=device)
        self.lengths_N = torch.ones(n, dtype=torch.int32, device=device)
        self.tables_NM = torch.zeros(n, blocks, dtype=torch.int32, device=device)
        self.find()

    def find(self) -> None:
        """The slots of the new tokens, from positions and tables: part of what is recorded."""
        block = self.tables_NM.gather(1, (self.positions_T // BLOCK)[:, None])[:, 0].long()
        self.slots_T = block * BLOCK + self.positions_T % BLOCK

    def _decode(self, q_NQH: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
                softcap: float | None) -> Tensor:  # fmt: skip
        return paged.decode(q_NQH, keys, values, self.tables_NM, self.lengths_N, scale, window, softcap, self._splits)


class RecordedPrompts(Pass):
    """Up to `n` whole prompts of together up to `tokens` tokens, at places that stay, for a CUDA graph. The tokens behind them are
    one more sequence, which lies in block 0. All that changes is in `places`, int64, one copy a step; `views` are its parts."""

    def __init__(self, pool: Pool, tokens: int, n: int):
        device = pool.keys.device
        self.pool, self.singles, self._sizes = pool, 0, (tokens, tokens, tokens, tokens, n, n + 2)
        self.places = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self.places[-1] = tokens
        self.tokens_T, self.positions_T, self.slots_T, self.numbers_T, self.rows_N, self._ends = self.views(self.places)
        self.ends = self._ends.to(torch.int32)
        self.layout = Layout((tokens,), (0, tokens), self.positions_T, self.ends, room=tokens)
        self.lengths = [0]
        self.parts = [None]

    def views(self, places: Tensor | np.ndarray) -> tuple:
        """Tokens, positions, slots and adapters' numbers [T] each, rows whose logits are wanted [n], the bounds [n + 2]."""
        ends = np.cumsum(self._sizes).tolist()
        return tuple(places[end - size : end] for size, end in zip(self._sizes, ends, strict=True))

    def find(self) -> None:
        """The kernel's bounds: part of what is recorded."""
        self.ends.copy_(self._ends)

    def _pieces(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
                softcap: float | None) -> Tensor:  # fmt: skip
        longest = self.layout.longest
        return varlen(q, k, v, self.ends, self.ends, longest, longest, scale, window)


def slots_of(blocks: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """int64: the slot of each of a sequence's tokens."""
    return np.asarray(blocks, np.int64)[tokens // BLOCK] * BLOCK + tokens % BLOCK
