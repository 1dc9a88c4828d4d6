"""The gated MLP's middle: activation(gate) * up, with SiLU (Llama, Qwen, Phi, Mistral) or GELU's tanh form (Gemma)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import backend, fp8, low_rank
from tunesmith.ops.backend import jit, tl
from tunesmith.ops.fp8 import scale_of, size_bits
from tunesmith.ops.low_rank import Low, product

ROWS, COLUMNS = 64, 64  # a tile with a low-rank part: what B costs, read out of L2, is shared by 64 rows
Activation = Literal["silu", "gelu_tanh"]


def reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """gate, up [..., hidden] -> [..., hidden], rounded after the activation and after the product, as transformers does."""
    return _activate(gate, activation) * up


def swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """As `reference`; saves gate and up only (autograd would keep the activation too) and computes the activation again."""
    return _SwiGLU.apply(gate, up, activation)


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        da = dy * up
        if ctx.activation == "silu":
            dgate = torch.ops.aten.silu_backward(da, gate)
        else:
            dgate = torch.ops.aten.gelu_backward(da, gate, approximate="tanh")
        return dgate, _activate(gate, ctx.activation).mul_(dy), None


# ---- what a hand-written half-block calls: no autograd, gate and up side by side as one GEMM leaves them ------------------------
# Shape letters: T tokens, F hidden width; gate_up_T2F holds the gate in columns [0, F), up in [F, 2F). Rows may be strided.
# `low` is what an FP8 product still lacks of its low-rank part (ops/low_rank.py), added in registers and rounded. Times on an H200
# for 8,192 tokens of Mistral-7B: addmm_ (in a step's profile) and the plain forward 380 + 167 us, one kernel that completes gate
# and up on its way 406; the plain backward 343, with what da lacks 362, with what gate and up lack too 602: so the forward
# completes them.


def forward(gate_up_T2F: Tensor, out_TF: Tensor | None = None, activation: Activation = "silu", low: Low | None = None,
            quantised: fp8.Rows | None = None) -> Tensor:  # fmt: skip
    """a_TF = activation(gate) * up, rounded as `reference`; as e4m3 into `quantised` where that is given, as `fp8.quantise_rows`.

    With `low`, `gate_up_T2F` is completed in place.
    """
    if activation == "silu" and backend.triton_for(gate_up_T2F, _needs(quantised)):
        rows, width = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
        out = _empty(gate_up_T2F) if out_TF is None else out_TF
        if low is not None:
            _forward_low(gate_up_T2F, out, low)
            if quantised is not None:
                fp8.quantise_rows(out, quantised)
            return out
        if quantised is not None and out.is_contiguous():
            return _forward_fp8(gate_up_T2F, out, quantised)
        block, chunks = _cut(width)
        if rows:
            _forward_kernel[(rows * chunks,)](gate_up_T2F, out, gate_up_T2F.stride(0), out.stride(0), width, chunks, BLOCK=block)
            if quantised is not None:
                fp8.quantise_rows(out, quantised)
        return out
    if low is not None:
        gate_up_T2F.copy_(low_rank.reference_added(gate_up_T2F, low))
    a_TF = reference(*gate_up_T2F.chunk(2, -1), activation)
    if quantised is not None:
        fp8.quantise_rows(a_TF, quantised)
    return a_TF if out_TF is None else out_TF.copy_(a_TF)


def backward_(da_TF: Tensor, gate_up_T2F: Tensor, activation: Activation = "silu", low: Low | None = None,
              low_da: Low | None = None, quantised: fp8.Rows | None = None) -> None:  # fmt: skip
    """In place: `gate_up_T2F` becomes (d_gate, d_up), as e4m3 in `quantised` too where that is given; `da_TF` becomes a_TF again.

    `low` is what `gate_up_T2F` lacks, `low_da` what `da_TF` lacks.
    """
    if activation == "silu" and backend.triton_for(gate_up_T2F, _needs(quantised)):
        rows, width = da_TF.shape
        if low is not None or low_da is not None or quantised is not None:
            _backward_low(da_TF, gate_up_T2F, low, low_da)
            if quantised is not None:
                fp8.quantise_rows(gate_up_T2F, quantised)
            return
        block, chunks = _cut(width)
        if rows:
            _backward_kernel[(rows * chunks,)](
                da_TF, gate_up_T2F, da_TF.stride(0), gate_up_T2F.stride(0), width, chunks, BLOCK=block
            )
        return
    gate, up = low_rank.reference_added(gate_up_T2F, low).chunk(2, -1)
    wide_da = low_rank.reference_added(da_TF, low_da)
    act, da = _activate(gate, activation), wide_da * up
    a_TF, d_up = act * up, wide_da * act
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(da, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(da, gate, approximate="tanh")
    gate, up = gate_up_T2F.chunk(2, -1)
    gate.copy_(d_gate), up.copy_(d_up), da_TF.copy_(a_TF)
    if quantised is not None:
        fp8.quantise_rows(gate_up_T2F, quantised)


def forward_fp8(gate_up_T2F: Tensor, activation: Activation = "silu") -> tuple[Tensor, Tensor, Tensor]:
    """(a_TF, a8_TF e4m3, scale [T, 1] fp32): `forward`, and its result quantised as `fp8.quantise_rows` does."""
    a_TF = _empty(gate_up_T2F)
    quantised = fp8.empty_rows(a_TF)
    return forward(gate_up_T2F, a_TF, activation, quantised=quantised), *quantised


# ---- Triton ---------------------------------------------------------------------------------------------------------------------
# A program takes a piece of one row; the pieces of a row follow each other, so that neighbours read neighbouring memory.


def _forward_fp8(gate_up_T2F: Tensor, out_TF: Tensor, quantised: fp8.Rows) -> Tensor:
    rows, width = out_TF.shape
    block = min(backend.round_up(width), 4096)  # 16 values a thread of 8 warps
    if rows:
        _forward_fp8_kernel[(rows,)](
            gate_up_T2F, out_TF, *quantised, gate_up_T2F.stride(0), width, BLOCK=block, num_warps=min(8, backend.warps_for(block))
        )
    return out_TF


def _forward_low(gate_up_T2F: Tensor, out_TF: Tensor, low: Low) -> None:
    rows, width = out_TF.shape
    chunks = -(-width // COLUMNS)
    if rows:
        _forward_low_kernel[(-(-rows // ROWS) * chunks,)](
            gate_up_T2F, out_TF, gate_up_T2F.stride(0), out_TF.stride(0), rows, width, chunks, *low_rank.arguments(low, out_TF),
            ROWS=ROWS, COLUMNS=COLUMNS, **low_rank.blocks(low[0].shape[1], out_TF.dtype), num_warps=4,
        )  # fmt: skip


def _backward_low(da_TF: Tensor, gate_up_T2F: Tensor, low: Low | None, low_da: Low | None) -> None:
    rows, width = da_TF.shape
    chunks = -(-width // COLUMNS)
    ranks = max(0 if x is None else x[0].shape[1] for x in (low, low_da))
    if rows:
        _backward_low_kernel[(-(-rows // ROWS) * chunks,)](
            da_TF, gate_up_T2F, da_TF.stride(0), gate_up_T2F.stride(0), rows, width, chunks, *low_rank.arguments(low, da_TF),
            *low_rank.arguments(low_da, da_TF), LOW=low is not None, LOW_DA=low_da is not None, ROWS=ROWS, COLUMNS=COLUMNS,
            **low_rank.blocks(ranks, da_TF.dtype), num_warps=4,
        )  # fmt: skip


def _needs(quantised: fp8.Rows | None) -> tuple[int, int]:
    return backend.NEEDS if quantised is None else backend.NEEDS_FP8


def _empty(gate_up_T2F: Tensor) -> Tensor:
    rows, both = gate_up_T2F.shape
    return torch.empty(rows, both // 2, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)


def _cut(width: int) -> tuple[int, int]:
    """(columns of a piece, pieces of a row): 2048 are 16 values a thread of 4 warps, and 14336 are seven of them."""
    block = min(backend.round_up(width), 2048)
    return block, -(-width // block)


@jit
def _silu(x):
    """(silu(x), sigmoid(x)) of fp32"""
    s = 1 / (1 + tl.exp(-x))
    return x * s, s


@jit
def _forward_kernel(gate_up, out, in_stride, out_stride, width, chunks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    gate_up += row * in_stride
    gate = tl.load(gate_up + at, here, other=0).to(tl.float32)
    up = tl.load(gate_up + width + at, here, other=0).to(tl.float32)
    act, _ = _silu(gate)
    act = act.to(gate_up.dtype.element_ty).to(tl.float32)  # rounded here, as `reference`
    tl.store(out + row * out_stride + at, (act * up).to(out.dtype.element_ty), here)


@jit
def _backward_kernel(da, gate_up, da_stride, stride, width, chunks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    gate_up += row * stride
    da += row * da_stride
    dtype = gate_up.dtype.element_ty
    d = tl.load(da + at, here, other=0).to(tl.float32)
    gate = tl.load(gate_up + at, here, other=0).to(tl.float32)
    up = tl.load(gate_up + width + at, here, other=0).to(tl.float32)
    act, s = _silu(gate)
    slope = s * (1 + gate * (1 - s))
    act = act.to(dtype).to(tl.float32)
    tl.store(gate_up + at, (d * up * slope).to(dtype), here)
    tl.store(gate_up + width + at, (d * act).to(dtype), here)
    tl.store(da + at, (act * up).to(da.dtype.element_ty), here)


@jit
def _forward_fp8_kernel(gate_up, out, a8, scale, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: first a and its largest value, then a once more, out of L2, as e4m3."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * stride
    out += row * WIDTH
    a8 += row * WIDTH
    most = tl.zeros([BLOCK], tl.int32)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < WIDTH
        gate = tl.load(gate_up + at, here, other=0).to(tl.float32)
        up = tl.load(gate_up + WIDTH + at, here, other=0).to(tl.float32)
        act, _ = _silu(gate)
        a = (act.to(out.dtype.element_ty).to(tl.float32) * up).to(out.dtype.element_ty)
        tl.store(out + at, a, here)
        most = tl.maximum(most, size_bits(a.to(tl.float32)))
    s = scale_of(tl.max(most, 0))
    tl.store(scale + row, s)
    inverse = tl.div_rn(1.0, s)
    tl.debug_barrier()  # what other threads of this program stored is read below
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < WIDTH
        a = tl.load(out + at, here, other=0).to(tl.float32)
        tl.store(a8 + at, (a * inverse).to(a8.dtype.element_ty), here)


@jit
def _forward_low_kernel(gate_up, out, in_stride, out_stride, rows, width, chunks, low, b, r, low_s, b_n, b_r, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """gate_up += low B^T, and `_forward_kernel` of it: a tile of rows and columns a program."""
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS)
    there, across = row < rows, at < width
    here = there[:, None] & across[None, :]
    dtype = gate_up.dtype.element_ty
    source = gate_up + row[:, None] * in_stride + at[None, :]
    gate = tl.load(source, here, other=0).to(tl.float32)
    up = tl.load(source + width, here, other=0).to(tl.float32)
    gate += product(low, b, row, at, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
    up += product(low, b, row, width + at, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
    gate, up = gate.to(dtype), up.to(dtype)
    tl.store(source, gate, here)
    tl.store(source + width, up, here)
    act, _ = _silu(gate.to(tl.float32))
    a = act.to(dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row[:, None] * out_stride + at[None, :], a.to(out.dtype.element_ty), here)


@jit
def _backward_low_kernel(da, gate_up, da_stride, stride, rows, width, chunks, low, b, r, low_s, b_n, b_r, low_da, a, da_r, low_da_s,
                         a_n, a_r, LOW: tl.constexpr, LOW_DA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         RANKS: tl.constexpr, CHUNKS: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """`_backward_kernel` of gate_up + low B^T and da + low_da A^T."""
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS)
    there, across = row < rows, at < width
    here = there[:, None] & across[None, :]
    dtype = gate_up.dtype.element_ty
    place = gate_up + row[:, None] * stride + at[None, :]
    place_da = da + row[:, None] * da_stride + at[None, :]
    d = tl.load(place_da, here, other=0).to(tl.float32)
    gate = tl.load(place, here, other=0).to(tl.float32)
    up = tl.load(place + width, here, other=0).to(tl.float32)
    if LOW_DA:
        d += product(low_da, a, row, at, there, across, da_r, low_da_s, a_n, a_r, RANKS, CHUNKS, IEEE)
        d = d.to(dtype).to(tl.float32)
    if LOW:
        gate += product(low, b, row, at, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
        up += product(low, b, row, width + at, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
    act, s = _silu(gate)
    slope = s * (1 + gate * (1 - s))
    act = act.to(dtype).to(tl.float32)
    tl.store(place, (d * up * slope).to(dtype), here)
    tl.store(place + width, (d * act).to(dtype), here)
    tl.store(place_da, (act * up).to(da.dtype.element_ty), here)
