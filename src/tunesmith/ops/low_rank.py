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
BLOCK = 128  # columns of K, or rows of N, that one program lays


def reference_place(parts: Sequence[Part], a_RK: Tensor, b_NR: Tensor) -> None:
    """scale A of each part into its rows of `a_RK`, B into its block of `b_NR`, zeros elsewhere."""
    a_RK.zero_()
    b_NR.zero_()
    for a, b, scale, rows, columns in parts:
        a_RK[columns] = (a * scale).to(a_RK.dtype)
        b_NR[rows, columns] = b.to(b_NR.dtype)


def place(parts: Sequence[Part], a_RK: Tensor, b_NR: Tensor) -> None:
    """As `reference_place`, in one launch a part and factor where there are kernels: seven copies and four fills otherwise."""
    if not backend.triton_for(a_RK) or not parts:
        return reference_place(parts, a_RK, b_NR)
    end, (count, inputs) = max(p[4].stop for p in parts), a_RK.shape
    for a, b, scale, rows, columns in parts:
        r, top = a.shape[0], count if columns.stop == end else columns.stop  # the last part also clears what pads the ranks
        grid = (top - columns.start, -(-inputs // 1024))
        _place_rows[grid](a, a_RK[columns.start :], inputs, r, a_RK.stride(0), scale, BLOCK=1024)
        n = rows.stop - rows.start
        _place_columns[(-(-n // BLOCK),)](
            b, b_NR[rows], n, count, r, columns.start, b_NR.stride(0), BLOCK=BLOCK, WIDTH=_power(count)
        )
    covered = {i for *_, rows, _ in parts for i in (rows.start, rows.stop)}
    if len(covered) != len(parts) + 1 or sum(p[3].stop - p[3].start for p in parts) != len(b_NR):
        _clear_rest(parts, b_NR)


def _clear_rest(parts: Sequence[Part], b_NR: Tensor) -> None:
    """Outputs without an adapter have no B."""
    at = 0
    for rows in sorted((p[3] for p in parts), key=lambda rows: rows.start):
        b_NR[at : rows.start].zero_()
        at = rows.stop
    b_NR[at:].zero_()


def reference_residual(base_TN: Tensor, low_TR: Tensor, b_NR: Tensor, out: Tensor) -> None:
    """out = base + low B^T, added in at least float32 and rounded once."""
    wide = torch.promote_types(base_TN.dtype, torch.float32)
    out.copy_(base_TN.to(wide) + low_TR.to(wide) @ b_NR.to(wide).t())


def residual(base_TN: Tensor, low_TR: Tensor, b_NR: Tensor, out: Tensor, extra: Tensor | None = None) -> None:
    """As `reference_residual`, plus `extra` [T, N] where it is given, in one pass.

    cuBLAS copies the residual and multiplies after that: 91 us on an H200 for 8,192 x 4,096 where one pass takes 32.
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
        base_TN, low_TR, b_NR, out, out if extra is None else extra, t, n, r, base_TN.stride(0), low_TR.stride(0), b_NR.stride(0),
        out.stride(0), 0 if extra is None else extra.stride(0), EXTRA=extra is not None, ROWS=64, COLUMNS=128,
        RANKS=min(64, max(16, _power(r))), CHUNKS=-(-r // 64), IEEE=base_TN.dtype == torch.float32, num_warps=4,
    )  # fmt: skip


def _power(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


@backend.jit
def _place_rows(a_p, out_p, inputs, rank, out_stride, scale, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < inputs
    value = tl.load(a_p + row.to(tl.int64) * inputs + at, mask=there & (row < rank), other=0.0).to(tl.float32) * scale
    tl.store(out_p + row.to(tl.int64) * out_stride + at, value.to(out_p.dtype.element_ty), mask=there)


@backend.jit
def _place_columns(b_p, out_p, n, count, rank, first, out_stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mine = (column >= first) & (column < first + rank)
    value = tl.load(b_p + row * rank + (column - first), mask=(row < n) & mine, other=0.0).to(tl.float32)
    tl.store(out_p + row.to(tl.int64) * out_stride + column, value.to(out_p.dtype.element_ty), mask=(row < n) & (column < count))


@backend.jit
def _residual(base_p, low_p, b_p, out_p, extra_p, t, n, r, base_s, low_s, b_s, out_s, extra_s, EXTRA: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr,
              IEEE: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, columns = row < t, column < n
    there = rows[:, None] & columns[None, :]
    total = tl.load(base_p + row[:, None] * base_s + column[None, :], mask=there, other=0.0).to(tl.float32)
    if EXTRA:
        total += tl.load(extra_p + row[:, None] * extra_s + column[None, :], mask=there, other=0.0).to(tl.float32)
    for chunk in tl.static_range(CHUNKS):
        rank = chunk * RANKS + tl.arange(0, RANKS)
        low = tl.load(low_p + row[:, None] * low_s + rank[None, :], mask=rows[:, None] & (rank < r)[None, :], other=0.0)
        b = tl.load(b_p + column.to(tl.int64)[None, :] * b_s + rank[:, None], mask=columns[None, :] & (rank < r)[:, None], other=0.0)
        if IEEE:
            total += tl.dot(low, b, input_precision="ieee")
        else:
            total += tl.dot(low, b)
    tl.store(out_p + row[:, None] * out_s + column[None, :], total.to(out_p.dtype.element_ty), mask=there)
