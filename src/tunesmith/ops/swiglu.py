"""The gated MLP's middle: activation(gate) * up, with SiLU (Llama, Qwen, Phi, Mistral) or GELU's tanh form (Gemma)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import backend, fp8
from tunesmith.ops.backend import jit, tl
from tunesmith.ops.fp8 import scale_of, size_bits

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


def forward(gate_up_T2F: Tensor, out_TF: Tensor | None = None, activation: Activation = "silu") -> Tensor:
    """a_TF = activation(gate) * up, rounded as `reference`."""
    if activation == "silu" and backend.triton_for(gate_up_T2F):
        rows, width = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
        out = _empty(gate_up_T2F) if out_TF is None else out_TF
        block, chunks = _cut(width)
        if rows:
            _forward_kernel[(rows * chunks,)](gate_up_T2F, out, gate_up_T2F.stride(0), out.stride(0), width, chunks, BLOCK=block)
        return out
    a_TF = reference(*gate_up_T2F.chunk(2, -1), activation)
    return a_TF if out_TF is None else out_TF.copy_(a_TF)


def backward_(da_TF: Tensor, gate_up_T2F: Tensor, activation: Activation = "silu") -> None:
    """In place: `gate_up_T2F` becomes (d_gate, d_up), `da_TF` becomes a_TF made again."""
    if activation == "silu" and backend.triton_for(gate_up_T2F):
        rows, width = da_TF.shape
        block, chunks = _cut(width)
        if rows:
            _backward_kernel[(rows * chunks,)](
                da_TF, gate_up_T2F, da_TF.stride(0), gate_up_T2F.stride(0), width, chunks, BLOCK=block
            )
        return
    gate, up = gate_up_T2F.chunk(2, -1)
    act, da = _activate(gate, activation), da_TF * up
    a_TF, d_up = act * up, da_TF * act
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(da, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(da, gate, approximate="tanh")
    gate.copy_(d_gate), up.copy_(d_up), da_TF.copy_(a_TF)


def forward_fp8(gate_up_T2F: Tensor, activation: Activation = "silu") -> tuple[Tensor, Tensor, Tensor]:
    """(a_TF, a8_TF e4m3, scale [T, 1] fp32): `forward`, and its result quantised as `fp8.quantise_rows` does."""
    if activation == "silu" and backend.triton_for(gate_up_T2F, backend.NEEDS_FP8):
        a_TF = _empty(gate_up_T2F)
        rows, width = a_TF.shape
        a8_TF, scale = fp8.empty_rows(a_TF)
        block = min(backend.round_up(width), 4096)  # 16 values a thread of 8 warps
        if rows:
            warps = min(8, backend.warps_for(block))
            _forward_fp8_kernel[(rows,)](
                gate_up_T2F, a_TF, a8_TF, scale, gate_up_T2F.stride(0), width, BLOCK=block, num_warps=warps
            )
        return a_TF, a8_TF, scale
    a_TF = forward(gate_up_T2F, activation=activation)
    return a_TF, *fp8.reference_quantise_rows(a_TF)


# ---- Triton ---------------------------------------------------------------------------------------------------------------------
# A program takes a piece of one row; the pieces of a row follow each other, so that neighbours read neighbouring memory.


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
