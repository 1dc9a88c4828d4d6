"""A draw from the fewest likeliest tokens that hold top_p of a distribution, without a sort of the vocabulary where that is slow.

A sort of 64 rows of 128,256 takes a CPU core about a second and a GPU milliseconds, at every token. Here a CPU adds up what each of
16,000 small ranges of probability holds, and sorts the one that the cut falls into. A GPU sorts: milliseconds, and nobody waits for
it. The kernel that searches the cut by halves, in one launch, equals the sort in Triton's interpreter and compiles, but has not run
on a card yet: it must be asked for (`--kernels triton`).

Sums are of whole numbers (shares of 2^48), which come out the same in any order: so do the cut and the draw, whatever the batch,
the device or the way. What is less likely than 2^-48 is never drawn.

Shape letters: L rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

ONE = 1 << 48  # probability 1
PARTS = 0x3F81  # of the numbers from 0 to 1 by the first 16 bits of float32, each less than a hundredth wide; the last one is 1
TILE = 16_384  # probabilities that a program reads at once


def reference(p_LV: Tensor, top_p: Sequence[float], draws_L: Tensor) -> Tensor:
    """ids [L]: the token at `draws` (float64, in [0, 1)) of its row's nucleus, whose tokens stand in the order of their ids.

    The nucleus: in the order of falling p, equals by id, all before whom less than top_p is held: who crosses it stays in."""
    ordered, ids = p_LV.sort(dim=-1, descending=True, stable=True)
    share = _share(ordered)
    share = share * (share.cumsum(-1) - share < _target(top_p, p_LV.device))
    return _at(torch.zeros_like(share).scatter_(-1, ids, share), draws_L)


def pick(p_LV: Tensor, top_p: Sequence[float], draws_L: Tensor) -> Tensor:
    """As `reference`, to the bit. p float32, contiguous, each row's sum about 1."""
    target, (rows, vocab) = _target(top_p, p_LV.device), p_LV.shape
    if backend.asked() and backend.triton_for(p_LV):
        ids = torch.empty(rows, dtype=torch.int64, device=p_LV.device)
        tile = min(TILE, backend.round_up(vocab))
        _pick[(rows,)](p_LV, target, draws_L, ids, vocab, p_LV.stride(0), TILE=tile, ONE=float(ONE),
                       num_warps=min(32, max(1, tile // 512)))  # fmt: skip
        return ids
    if p_LV.device.type != "cpu":  # a search there would wait for the card between its steps
        return reference(p_LV, top_p, draws_L)
    return torch.cat([_searched(*row) for row in zip(p_LV, target[:, 0].tolist(), draws_L[:, None], strict=True)])


def _searched(p_V: Tensor, target: int, draw_1: Tensor) -> Tensor:
    """One row: what its probabilities hold in PARTS parts of float32's range, the part of the cut, and only that one sorted."""
    share, part = _share(p_V), (p_V.view(torch.int32) >> 16).clamp_(0, PARTS - 1)  # nan is neither
    held = torch.bincount(part, share.double(), minlength=PARTS).flip(0).cumsum(0).flip(0)  # whole numbers below 2^53: exact
    cut = max(0, int((held >= target).sum()) - 1)  # the highest part at or above which the target is held
    above = int(held[cut + 1]) if cut + 1 < PARTS else 0
    at = (part == cut).nonzero()[:, 0]
    order = p_V[at].sort(descending=True, stable=True).indices
    mine = share[at[order]]
    inside = at[order][above + mine.cumsum(0) - mine < target]
    kept = torch.where(part > cut, share, 0)
    kept[inside] = share[inside]
    return _at(kept[None], draw_1)


def inverse(p_LV: Tensor, draws_L: Tensor) -> Tensor:
    """ids [L]: the token at `draws` of the whole distribution."""
    return _at(_share(p_LV), draws_L)


def _share(p: Tensor) -> Tensor:
    return (p * ONE).long().clamp_(min=0)  # exact: a power of two; nan is nothing


def _target(top_p: Sequence[float], device: torch.device) -> Tensor:
    """[L, 1]; at least a share, so that the likeliest token is in."""
    target = torch.tensor([[max(1, int(p * ONE))] for p in top_p])
    return target.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else target


def _at(share_LV: Tensor, draws_L: Tensor) -> Tensor:
    """The first place whose running sum passes the draw's share of the whole."""
    sums = share_LV.cumsum(-1)
    found = torch.searchsorted(sums, (draws_L[:, None] * sums[:, -1:]).long(), right=True)[:, 0]
    return found.clamp_(max=share_LV.shape[-1] - 1)


@jit
def _pick(p, targets, draws, ids, vocab, stride, TILE: tl.constexpr, ONE: tl.constexpr):
    """One row. `low` and `high` are probabilities as float32's bits, which rise with them: the row holds the target at or above
    `low` and does not at or above `high`, so in the end `low` is the value at the cut."""
    row = tl.program_id(0).to(tl.int64)
    p += row * stride
    i = tl.arange(0, TILE)
    target = tl.load(targets + row)
    low, high, above = 0, 0x3F800001, target * 0  # above 1.0 nothing is held
    for _ in range(30):  # 2^30 values
        middle = (low + high) // 2
        shares = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab, TILE):
            x = tl.load(p + start + i, start + i < vocab, 0.0)
            shares += tl.where(x.to(tl.int32, bitcast=True) >= middle, (x * ONE).to(tl.int64), 0)
        held = tl.sum(shares, 0)
        reached = held >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        above = tl.where(reached, above, held)
    one = (low.to(tl.float32, bitcast=True) * ONE).to(tl.int64)  # the share of a token at the cut
    equals = tl.where(one > 0, tl.cdiv(target - above, tl.maximum(one, 1)), vocab)  # of those, the first so many
    before = target * 0
    kept = target * 0
    for start in range(0, vocab, TILE):
        x = tl.load(p + start + i, start + i < vocab, 0.0)
        kept += tl.sum(_kept(x, low, equals, before, ONE), 0)
        before += tl.sum((x.to(tl.int32, bitcast=True) == low).to(tl.int64), 0)
    wanted = (tl.load(draws + row) * kept.to(tl.float64)).to(tl.int64)
    before, passed, found = target * 0, target * 0, target * 0
    for start in range(0, vocab, TILE):
        x = tl.load(p + start + i, start + i < vocab, 0.0)
        share = _kept(x, low, equals, before, ONE)
        found += tl.sum(((passed + tl.cumsum(share, 0) <= wanted) & (start + i < vocab)).to(tl.int64), 0)
        passed += tl.sum(share, 0)
        before += tl.sum((x.to(tl.int32, bitcast=True) == low).to(tl.int64), 0)
    tl.store(ids + row, tl.minimum(found, vocab - 1))


@jit
def _kept(x, low, equals, before, ONE: tl.constexpr):
    """The shares of a tile's tokens that are in the nucleus; `before`: tokens at the cut in the tiles before."""
    bits = x.to(tl.int32, bitcast=True)
    here = (bits == low).to(tl.int64)
    inside = (bits > low) | ((here > 0) & (before + tl.cumsum(here, 0) <= equals))
    return tl.where(inside, (x * ONE).to(tl.int64), 0)
