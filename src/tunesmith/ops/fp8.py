"""e4m3 with one scale a row, and the GEMM of two such operands: 1,180-1,405 TFLOP/s on an H200 where bf16 reaches 640-764.

e4m3 keeps 4 significant bits and reaches 448; a scale brings a row's largest value there. Dynamic range is no concern within a row
(2^-9 is the least step, 1 / 229,376 of the largest), precision is: of normal values 2.6 % are lost in norm, and of a product of
two such operands 3.7 %.

Shape letters: T tokens, K what is summed over, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-12  # the floor under a scale, so that a row of zeros does not divide by zero
Rows = tuple[Tensor, Tensor]  # e4m3 [T, K], contiguous, and the scale [T, 1] of each row
WHOLE = 16384  # values of a row that 16 warps hold in registers, 32 a thread; longer rows are read twice, the second time from L2


def supported(device: torch.device | str) -> str:
    """'' where `matmul` has the hardware (Ada, Hopper, Blackwell), else the reason why not."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return "FP8 matrix products need an NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < backend.NEEDS_FP8:
        return f"FP8 matrix products need an Ada, Hopper or Blackwell GPU (8.9 or later); this one is {found[0]}.{found[1]}"
    return ""


def reference_quantise_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(x8_TK e4m3, scale [T, 1] fp32). The definition: scale = max |row| / 448, at least 1e-12; x8 = x / scale to nearest even.

    Computed as multiplications by fp32 reciprocals. A NaN makes its row NaN; an infinity becomes NaN, the rest of its row 0.
    """
    wide = x_TK.float()
    scale = (wide.abs().amax(-1, keepdim=True) * (1 / LARGEST)).clamp(min=TINY)
    return (wide * (1 / scale)).to(E4M3), scale


def quantise_rows(x_TK: Tensor, out: Rows | None = None) -> Rows:
    """As `reference_quantise_rows`, into `out` where it is given; rows may be strided."""
    x8_TK, scale = empty_rows(x_TK) if out is None else out
    if not backend.triton_for(x_TK, backend.NEEDS_FP8):
        found = reference_quantise_rows(x_TK)
        return x8_TK.copy_(found[0]), scale.copy_(found[1])
    rows, columns = x_TK.shape
    block = min(backend.round_up(columns), WHOLE)
    if rows:
        _quantise_rows_kernel[(rows,)](x_TK, x8_TK, scale, x_TK.stride(0), columns, BLOCK=block, num_warps=backend.warps_for(block))
    return x8_TK, scale


def empty_rows(x_TK: Tensor) -> Rows:
    """Room for what `quantise_rows` gives."""
    x8_TK = torch.empty(x_TK.shape, dtype=E4M3, device=x_TK.device)
    return x8_TK, torch.empty(len(x_TK), 1, dtype=torch.float32, device=x_TK.device)


def reference_cast(w_NK: Tensor, scale: Tensor, turned: bool) -> Tensor:
    """A dense weight as e4m3 [N, K] with one static scale a row [N], or turned [K, N] with one a column [K]: w times 1 / scale."""
    y = w_NK.float() * ((1 / scale)[None] if turned else (1 / scale)[:, None])
    return (y.t() if turned else y).to(E4M3)


def cast(w_NK: Tensor, scale: Tensor, out: Tensor, turned: bool) -> Tensor:
    """As `reference_cast`, into `out`; rows may be strided."""
    if not backend.triton_for(w_NK, backend.NEEDS_FP8):
        return out.copy_(reference_cast(w_NK, scale, turned))
    (rows, columns), tile = w_NK.shape, 64
    grid = (-(-rows // tile), -(-columns // tile))
    _cast_kernel[grid](w_NK, scale, out, rows, columns, w_NK.stride(0), out.stride(0), TURNED=turned, TILE=tile)
    return out


def reference_matmul(x8_TK: Tensor, sx_T1: Tensor, w8_NK: Tensor, sw_N: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(x8 sx) (w8 sw)^T in float32, rounded once. The definition, and what a machine without FP8 hardware gets."""
    return (F.linear(x8_TK.float(), w8_NK.float()) * sx_T1 * sw_N).to(out_dtype)


def matmul(x8_TK: Tensor, sx_T1: Tensor, w8_NK: Tensor, sw_N: Tensor, out_dtype: torch.dtype = torch.bfloat16,
           out: Tensor | None = None) -> Tensor:  # fmt: skip
    """[T, N], into `out` where it is given. On the hardware with fast accumulation (partial sums in the tensor core's 14 bits;
    exact ones halve the rate), which wants K and N in sixteens and gives bf16; other shapes go to the reference.
    """
    (rows, depth), columns = x8_TK.shape, len(w8_NK)
    if supported(x8_TK.device) or depth % 16 or columns % 16 or not rows:
        y = reference_matmul(x8_TK, sx_T1, w8_NK, sw_N, out_dtype if out is None else out.dtype)
        return y if out is None else out.copy_(y)
    how = {"scale_a": sx_T1, "scale_b": sw_N[None], "out_dtype": torch.bfloat16, "use_fast_accum": True}
    if out is not None and out.dtype is torch.bfloat16 and out.stride(1) == 1:
        return torch._scaled_mm(x8_TK, w8_NK.t(), **how, out=out)
    y = torch._scaled_mm(x8_TK, w8_NK.t(), **how)
    return y.to(out_dtype) if out is None else out.copy_(y)


# ---- Triton ---------------------------------------------------------------------------------------------------------------------


@jit
def size_bits(x):
    """|x| as int32: in the order of the numbers, NaN above all of them, so that a maximum keeps NaN as torch's does."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_of(bits):
    """max |x| as `size_bits` -> the row's scale. Written so that a NaN stays: `maximum` would drop it."""
    scale = bits.to(tl.float32, bitcast=True) * (1 / 448)
    return tl.where(scale < 1e-12, 1e-12, scale)


@jit
def _quantise_rows_kernel(x, x8, scale, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    x8 += row * COLUMNS
    at = tl.arange(0, BLOCK)
    if COLUMNS <= BLOCK:
        value = tl.load(x + at, at < COLUMNS, other=0).to(tl.float32)
        s = scale_of(tl.max(size_bits(value), 0))
        tl.store(x8 + at, (value * tl.div_rn(1.0, s)).to(x8.dtype.element_ty), at < COLUMNS)
    else:
        most = tl.zeros([BLOCK], tl.int32)
        for first in range(0, COLUMNS, BLOCK):
            here = first + at < COLUMNS
            most = tl.maximum(most, size_bits(tl.load(x + first + at, here, other=0).to(tl.float32)))
        s = scale_of(tl.max(most, 0))
        inverse = tl.div_rn(1.0, s)
        for first in range(0, COLUMNS, BLOCK):
            here = first + at < COLUMNS
            value = tl.load(x + first + at, here, other=0).to(tl.float32)
            tl.store(x8 + first + at, (value * inverse).to(x8.dtype.element_ty), here)
    tl.store(scale + row, s)


@jit
def _cast_kernel(w, scale, out, rows, columns, stride, out_stride, TURNED: tl.constexpr, TILE: tl.constexpr):
    """A square tile a program."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = (n < rows)[:, None] & (k < columns)[None, :]
    value = tl.load(w + n.to(tl.int64)[:, None] * stride + k[None, :], here, other=0).to(tl.float32)
    if TURNED:
        value *= tl.div_rn(1.0, tl.load(scale + k, k < columns, other=1.0))[None, :]
        to = out + k.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(to, tl.trans(value).to(out.dtype.element_ty), tl.trans(here))
    else:
        value *= tl.div_rn(1.0, tl.load(scale + n, n < rows, other=1.0))[:, None]
        tl.store(out + n.to(tl.int64)[:, None] * out_stride + k[None, :], value.to(out.dtype.element_ty), here)
