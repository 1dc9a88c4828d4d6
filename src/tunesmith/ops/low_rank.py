"""What a low-rank adapter adds around a group's GEMMs (models/groups.py): its factors laid beside the weight, and a product of
rank R brought along where a residual is copied anyway.

`reference_*` are the definitions in plain PyTorch; the Triton kernels equal them.

Shape letters: T tokens, K inputs, N outputs, R ranks of all parts of a group side by side, r rank of one part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import tl

Part = tuple[Tensor, Tensor, float, slice, slice]  # A [r, K], B [n, r], scale, its rows of N, its columns of R
Low = tuple[Tensor, Tensor]  # low [T, R] and B [N, R], of any strides: low B^T is still to be added to an FP8 product [T, N]
TILE, ROWS = 1024, 64  # numbers of a row of A, or rows of B, that one program lays


def reference_place(parts: Sequence[Part], a_RK: Tensor, b_NR: Tensor) -> None:
    """scale A of each part into its rows of `a_RK`, B into its block of `b_NR`, zeros elsewhere."""
    a_RK.zero_()
    b_NR.zero_()
    for a, b, scale, rows, columns in parts:
        a_RK[columns] = (a * scale).to(a_RK.dtype)
        b_NR[rows, columns] = b.to(b_NR.dtype)


def place(parts: Sequence[Part], a_RK: Tensor, b_NR: Tensor) -> None:
    """As `reference_place`; one launch for up to three parts where there are kernels (copies and fills were nine for q, k, v)."""
    if not backend.triton_for(a_RK) or not 1 <= len(parts) <= 3:
        return reference_place(parts, a_RK, b_NR)
    (ranks, inputs), outputs = a_RK.shape, len(b_NR)
    tensors, numbers = [], []
    for i in range(3):
        a, b, scale, rows, columns = parts[min(i, len(parts) - 1)]
        there = i < len(parts)
        tensors += [a, b]
        ends = (rows.stop, columns.stop) if there else (rows.start, columns.start)  # a part that is not there is empty
        numbers += [float(scale), rows.start, ends[0], columns.start, ends[1]]
    tiles = -(-inputs // TILE)
    grid = (ranks * tiles + -(-outputs // ROWS),)
    _place[grid](
        *tensors, a_RK, b_NR, inputs, outputs, ranks, a_RK.stride(0), b_NR.stride(0), tiles, *numbers,
        TILE=TILE, ROWS=ROWS, WIDTH=_power(ranks),
    )  # fmt: skip


def reference_residual(base_TN: Tensor, low_TR: Tensor, b_NR: Tensor, out: Tensor) -> None:
    """out = base + low B^T, added in at least float32 and rounded once."""
    wide = torch.promote_types(base_TN.dtype, torch.float32)
    out.copy_(base_TN.to(wide) + low_TR.to(wide) @ b_NR.to(wide).t())


def reference_added(base_TN: Tensor, low: Low | None) -> Tensor:
    """base + low B^T, rounded to base's dtype: what a kernel that takes `low` reads in the place of `base_TN`."""
    if low is None:
        return base_TN
    reference_residual(base_TN, *low, out := torch.empty_like(base_TN))
    return out


def add_(base_TN: Tensor, low: Low | None) -> None:
    """As `reference_added`, in place: for what no later kernel reads first."""
    if low is not None:
        residual(base_TN, *low, base_TN)


def residual(base_TN: Tensor, low_TR: Tensor, b_NR: Tensor, out: Tensor, extra: Tensor | None = None) -> None:
    """As `reference_residual`, plus `extra` [T, N] where it is given, in one pass.

    cuBLAS copies the residual and multiplies after that: 91 us on an H200 for 8,192 x 4,096 where this takes 51.
    """
    if not backend.triton_for(base_TN):
        if extra is None:
            torch.addmm(base_TN, low_TR, b_NR.t(), out=out)
        else:
            reference_residual(base_TN.to(torch.promote_types(base_TN.dtype, torch.float32)) + extra, low_TR, b_NR, out)
        return
    (t, n), r = base_TN.shape, low_TR.shape[1]
    if not t:
        return
    grid = (-(-t // 64), -(-n // 128))
    _residual[grid](
        base_TN, low_TR, b_NR, out, out if extra is None else extra, t, n, base_TN.stride(0),
        out.stride(0), 0 if extra is None else extra.stride(0), r, low_TR.stride(0), *b_NR.stride(), EXTRA=extra is not None,
        ROWS=64, COLUMNS=128, **blocks(r, low_TR.dtype), num_warps=4,
    )  # fmt: skip


def arguments(low: Low | None, other: Tensor) -> tuple:
    """What `product` takes of `low`; `other` stands where there is none, and is not read."""
    return (other, other, 0, 0, 0, 0) if low is None else (*low, low[0].shape[1], low[0].stride(0), *low[1].stride())


def blocks(ranks: int, dtype: torch.dtype) -> dict:
    """The constants of `product`. Ranks beyond 64 take several turns."""
    return dict(RANKS=min(64, max(16, _power(ranks))), CHUNKS=-(-ranks // 64), IEEE=dtype == torch.float32)


def _power(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


@backend.jit
def _place(a0, b0, a1, b1, a2, b2, a_out, b_out, inputs, outputs, ranks, a_stride, b_stride, tiles,
           scale0, n0, n0_end, r0, r0_end, scale1, n1, n1_end, r1, r1_end, scale2, n2, n2_end, r2, r2_end,
           TILE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The first `ranks` x `tiles` programs lay a piece of a row of A each, the others ROWS rows of B."""
    program = tl.program_id(0)
    if program < ranks * tiles:
        rank, at = program // tiles, program % tiles * TILE + tl.arange(0, TILE)
        there = at < inputs
        row = tl.load(a0 + (rank - r0).to(tl.int64) * inputs + at, there & (rank >= r0) & (rank < r0_end), 0.0) * scale0
        row += tl.load(a1 + (rank - r1).to(tl.int64) * inputs + at, there & (rank >= r1) & (rank < r1_end), 0.0) * scale1
        row += tl.load(a2 + (rank - r2).to(tl.int64) * inputs + at, there & (rank >= r2) & (rank < r2_end), 0.0) * scale2
        tl.store(a_out + rank.to(tl.int64) * a_stride + at, row.to(a_out.dtype.element_ty), there)
    else:
        n = ((program - ranks * tiles) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        r = tl.arange(0, WIDTH)[None, :]
        mine = (n >= n0) & (n < n0_end) & (r >= r0) & (r < r0_end)
        block = tl.load(b0 + (n - n0) * (r0_end - r0) + (r - r0), mine, 0.0)
        mine = (n >= n1) & (n < n1_end) & (r >= r1) & (r < r1_end)
        block += tl.load(b1 + (n - n1) * (r1_end - r1) + (r - r1), mine, 0.0)
        mine = (n >= n2) & (n < n2_end) & (r >= r2) & (r < r2_end)
        block += tl.load(b2 + (n - n2) * (r2_end - r2) + (r - r2), mine, 0.0)
        tl.store(b_out + n * b_stride + r, block.to(b_out.dtype.element_ty), (n < outputs) & (r < ranks))


@backend.jit
def product(low_p, b_p, row, column, rows, columns, r, low_s, b_n, b_r, RANKS: tl.constexpr, CHUNKS: tl.constexpr,
            IEEE: tl.constexpr):  # fmt: skip
    """low B^T at these rows and columns, fp32; `rows` and `columns` say which of them there are."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        rank = chunk * RANKS + tl.arange(0, RANKS)
        low = tl.load(low_p + row[:, None] * low_s + rank[None, :], mask=rows[:, None] & (rank < r)[None, :], other=0.0)
        mask = columns[None, :] & (rank < r)[:, None]
        b = tl.load(b_p + column.to(tl.int64)[None, :] * b_n + rank[:, None] * b_r, mask=mask, other=0.0)
        if IEEE:
            total = tl.dot(low, b, total, input_precision="ieee")
        else:
            total = tl.dot(low, b, total)
    return total


@backend.jit
def _residual(base_p, low_p, b_p, out_p, extra_p, t, n, base_s, out_s, extra_s, r, low_s, b_n, b_r, EXTRA: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr,
              IEEE: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < t, column < n
    there = rows[:, None] & columns[None, :]
    total = tl.load(base_p + row[:, None] * base_s + column[None, :], mask=there, other=0.0).to(tl.float32)
    if EXTRA:
        total += tl.load(extra_p + row[:, None] * extra_s + column[None, :], mask=there, other=0.0).to(tl.float32)
    total += product(low_p, b_p, row, column, rows, columns, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
    tl.store(out_p + row[:, None] * out_s + column[None, :], total.to(out_p.dtype.element_ty), mask=there)
