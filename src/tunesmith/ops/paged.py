"""Attention of one new token a sequence over keys and values that lie in blocks, and the copy into those blocks.

A cache is `keys`, `values` [S, K, H]: S slots, BLOCK of them a block. Sequence n holds its token t in slot
`tables[n, t // BLOCK] * BLOCK + t % BLOCK`. Nothing is padded to the longest sequence, and query heads that share a key head read
it once.

The kernel splits a sequence among `splits` programs where there are too few sequences to fill a card (flash-decoding), each with
its own running softmax; a second launch joins them. All it reads of a step lies on the device, so that a CUDA graph may replay it.

Shape letters: N sequences, S slots, M blocks of the longest table, Q query heads, K key/value heads, H head width, G = Q / K,
P splits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

BLOCK = 16  # tokens of a block: at most 15 slots of a sequence are idle
TILE = 64  # tokens that a program reads at once
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


def reference(q_NQH: Tensor, keys_SKH: Tensor, values_SKH: Tensor, tables_NM: Tensor, lengths_N: Tensor, scale: float,
              window: int | None = None, softcap: float | None = None) -> Tensor:  # fmt: skip
    """softmax(cap(scale q k^T)) v over the last `window` of a sequence's `lengths` tokens, in float32; [N, Q, H] in q's dtype."""
    group, out = q_NQH.shape[1] // keys_SKH.shape[1], []
    for q, table, length in zip(q_NQH, tables_NM.tolist(), lengths_N.tolist(), strict=True):
        first = 0 if window is None else max(0, length - window)
        slots = torch.tensor([table[t // BLOCK] * BLOCK + t % BLOCK for t in range(first, length)], device=q.device)
        k, v = (x[slots].float().repeat_interleave(group, 1).transpose(0, 1) for x in (keys_SKH, values_SKH))
        scores = (k @ q.float()[..., None])[..., 0] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out.append((scores.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(out).to(q_NQH.dtype)


def splits_for(sequences: int, kv_heads: int, longest: int) -> int:
    """How many programs share a sequence: a power of two that fills a card, with 256 tokens or more of the longest one for each."""
    wanted, room = backend.round_up(-(-PROGRAMS // max(1, sequences * kv_heads))), max(1, longest // 256)
    return min(wanted, 1 << (room.bit_length() - 1), 32)


def decode(q_NQH: Tensor, keys_SKH: Tensor, values_SKH: Tensor, tables_NM: Tensor, lengths_N: Tensor, scale: float,
           window: int | None = None, softcap: float | None = None, splits: int = 1) -> Tensor:  # fmt: skip
    """As `reference`, where `backend.triton_for(q)`; tables and lengths int32 on q's device. A length of 0 gives zeros."""
    n, heads, width = q_NQH.shape
    kv = keys_SKH.shape[1]
    group = heads // kv
    out = torch.empty_like(q_NQH, memory_format=torch.contiguous_format)
    if splits == 1:
        part, sums = out, lengths_N  # sums is not written
    else:
        part = torch.empty((n, heads, splits, width), dtype=torch.float32, device=q_NQH.device)
        sums = torch.empty((n, heads, splits), dtype=torch.float32, device=q_NQH.device)
    _decode[(n, kv, splits)](
        q_NQH, keys_SKH, values_SKH, tables_NM, lengths_N, part, sums, scale, softcap or 0.0, window or 0, group, width,
        q_NQH.stride(0), q_NQH.stride(1), keys_SKH.stride(0), keys_SKH.stride(1), tables_NM.stride(0), heads,
        SPLITS=splits, CAP=softcap is not None, PAGE=BLOCK, TOKENS=TILE if width <= 128 else TILE // 2,
        GROUP=max(16, backend.round_up(group)), WIDTH=max(16, backend.round_up(width)), IEEE=q_NQH.dtype == torch.float32,
        num_warps=4, num_stages=1 if q_NQH.dtype == torch.float32 else 3,  # at most 51 KiB of shared memory: small cards have 99
    )  # fmt: skip
    if splits > 1:
        _join[(n, heads)](part, sums, out, width, SPLITS=splits, WIDTH=backend.round_up(width), num_warps=2)
    return out


def store(k_TKH: Tensor, v_TKH: Tensor, keys_SKH: Tensor, values_SKH: Tensor, slots_T: Tensor) -> None:
    """keys[slots] = k, values[slots] = v, one launch on a GPU. slots int64; none twice but those of block 0, which is nobody's."""
    if not backend.triton_for(k_TKH):
        keys_SKH.index_copy_(0, slots_T, k_TKH)
        values_SKH.index_copy_(0, slots_T, v_TKH)
        return
    row = k_TKH.shape[1] * k_TKH.shape[2]
    k, v = k_TKH.reshape(-1, row), v_TKH.reshape(-1, row)
    if len(k):
        _store[(len(k),)](k, v, keys_SKH, values_SKH, slots_T, row, k.stride(0), v.stride(0), keys_SKH.stride(0),
                          ROW=backend.round_up(row), num_warps=backend.warps_for(row))  # fmt: skip


@jit
def _decode(q, keys, values, tables, lengths, out, sums, scale, softcap, window, group, width,
            q_n, q_h, slot_stride, head_stride, table_stride, heads,
            SPLITS: tl.constexpr, CAP: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
            WIDTH: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """A sequence's queries of one key head over its share of the tokens. Scores in base 2."""
    n, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + n).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TOKENS) * TOKENS
    low = first + split * share
    high = tl.minimum(low + share, length)
    g, i, t = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    head = kv * group + g
    there = (g < group)[:, None] & (i < width)[None, :]
    query = tl.load(q + n * q_n + head[:, None] * q_h + i[None, :], there, 0.0)
    best = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, WIDTH], tl.float32)
    for start in range(low, high, TOKENS):
        token = start + t
        held = token < high
        block = tl.load(tables + n * table_stride + token // PAGE, held, 0).to(tl.int64)
        at = (block * PAGE + token % PAGE) * slot_stride + kv * head_stride
        here = held[:, None] & (i < width)[None, :]
        k = tl.load(keys + at[:, None] + i[None, :], here, 0.0)
        if IEEE:
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, tl.trans(k)) * scale
        if CAP:
            x = scores / softcap  # tanh by exp, stable on both sides
            e = tl.exp(-2.0 * tl.abs(x))
            size = (1.0 - e) / (1.0 + e)
            scores = softcap * tl.where(x < 0, -size, size)
        scores = tl.where(held[None, :], scores * 1.4426950408889634, -1e30)
        top = tl.maximum(best, tl.max(scores, 1))
        p = tl.where(held[None, :], tl.exp2(scores - top[:, None]), 0.0)
        fade = tl.exp2(best - top)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(values + at[:, None] + i[None, :], here, 0.0)
        if IEEE:
            mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v)
        best = top
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + (n * heads + head)[:, None] * width + i[None, :], mixed.to(out.dtype.element_ty), there)
    else:
        place = (n * heads + head) * SPLITS + split
        tl.store(out + place[:, None] * width + i[None, :], mixed, there)
        tl.store(sums + place, tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), -1e30), g < group)


@jit
def _join(part, sums, out, width, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """One head of one sequence: its splits, weighed by their sums."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    s, i = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    each = tl.load(sums + place * SPLITS + s)
    top = tl.max(each, 0)
    weight = tl.where(each > -1e29, tl.exp2(each - top), 0.0)
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    parts = tl.load(part + (place * SPLITS + s)[:, None] * width + i[None, :], (i < width)[None, :], 0.0)
    tl.store(out + place * width + i, tl.sum(parts * weight[:, None], 0).to(out.dtype.element_ty), i < width)


@jit
def _store(k, v, keys, values, slots, row, k_stride, v_stride, slot_stride, ROW: tl.constexpr):
    """One token's key and value heads into its slot."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROW)
    slot = tl.load(slots + token)
    tl.store(keys + slot * slot_stride + i, tl.load(k + token * k_stride + i, i < row, 0.0), i < row)
    tl.store(values + slot * slot_stride + i, tl.load(v + token * v_stride + i, i < row, 0.0), i < row)
