"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, per row, in at least float32.

Two roundings are in use: Llama and its kin round to the input's dtype, then multiply; Gemma multiplies by 1 + weight, then rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import backend, fp8
from tunesmith.ops.backend import jit, tl
from tunesmith.ops.fp8 import scale_of, size_bits


def reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`offset` 0: Llama's rounding; 1: Gemma's. x [..., D], weight [D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (y * (offset + weight.to(y.dtype))).to(x.dtype)
    return weight * y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As `reference`; saves x and one number a row, and skips the weight's gradient where nobody asks for it.

    A frozen weight's on a GPU runs in the kernels below: float32 stays in registers, where each of the three float32 copies of
    131,072 rows of 4,096 took 2 GiB.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.kernels = not offset and not weight.requires_grad and x.dtype != torch.float64 and backend.triton_for(x)
        if ctx.kernels:
            y, rstd = forward(_rows(x), weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y.view(x.shape)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        y = wide * rstd
        if offset:
            return y.mul_(offset + weight.to(y.dtype)).to(x.dtype)
        y = y.to(x.dtype)
        return y.mul_(weight) if weight.dtype == y.dtype else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        if ctx.kernels:
            return backward(_rows(dy), _rows(x), weight, rstd).view(x.shape), None, None, None
        dx = dw = None
        wide, dy = x.to(rstd.dtype), dy.to(rstd.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy * wide).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scale = weight.to(rstd.dtype)
            g = dy * (ctx.offset + scale if ctx.offset else scale)
            along = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(rstd.pow(3)).div_(x.shape[-1])
            dx = g.mul_(rstd).sub_(wide * along).to(x.dtype)
        return dx, dw, None, None


def _rows(x: Tensor) -> Tensor:
    """[T, D] as the kernels read it: an expanded gradient, as a sum's, has no contiguous rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


# ---- what a hand-written half-block calls: no autograd, no gradient of a frozen weight, Llama's rounding (offset 0) ----------
# Shape letters: T tokens, D width. Rows may be strided, the last dimension is contiguous.


def forward(x_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None,
            quantised: fp8.Rows | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h_TD as `reference`, rstd_T fp32). Writes into `out` when given, and h as e4m3 into `quantised`, as `fp8.quantise_rows`."""
    if backend.triton_for(x_TD, backend.NEEDS if quantised is None else backend.NEEDS_FP8):
        return _forward(x_TD, weight_D, eps, out, quantised or ())[:2]
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    rstd_T1 = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
    rstd_T, h_TD = rstd_T1[:, 0], (wide * rstd_T1).to(x_TD.dtype)  # for one token 13 us, by square and mean 23
    h_TD = h_TD.mul_(weight_D) if weight_D.dtype == h_TD.dtype else h_TD * weight_D
    if quantised is not None:
        fp8.quantise_rows(h_TD, quantised)
    return (h_TD if out is None else out.copy_(h_TD)), rstd_T


def backward(dh_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, residual_TD: Tensor | None = None,
             out: Tensor | None = None, quantised: fp8.Rows | None = None) -> Tensor:  # fmt: skip
    """The gradient that reaches x, in x's dtype: through the norm, plus `residual_TD` that flows past it; fp32 inside,
    rounded once, and as e4m3 into `quantised` where that is given. `out` may be `dh_TD` or `residual_TD` itself.
    """
    if backend.triton_for(x_TD, backend.NEEDS if quantised is None else backend.NEEDS_FP8):
        out = torch.empty_like(x_TD) if out is None else out
        residual = dh_TD if residual_TD is None else residual_TD
        (rows, width), block = x_TD.shape, backend.round_up(x_TD.shape[1])
        if rows:
            _backward_kernel[(rows,)](
                dh_TD, x_TD, weight_D, rstd_T, residual, out, *(quantised or (out, rstd_T)), dh_TD.stride(0), x_TD.stride(0),
                residual.stride(0), out.stride(0), width, RESIDUAL=residual_TD is not None, FP8=quantised is not None, BLOCK=block,
                num_warps=backend.warps_for(block),
            )  # fmt: skip
        return out
    wide, rstd = x_TD.to(rstd_T.dtype), rstd_T[:, None]
    g = dh_TD.to(wide.dtype) * weight_D.to(wide.dtype)
    dx_TD = rstd * (g - wide * rstd * ((g * wide).mean(-1, keepdim=True) * rstd))
    if residual_TD is not None:
        dx_TD += residual_TD
    if quantised is not None:
        fp8.quantise_rows(dx_TD.to(x_TD.dtype), quantised)
    return dx_TD.to(x_TD.dtype) if out is None else out.copy_(dx_TD)


def forward_fp8(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_TD, rstd_T, h8_TD e4m3, scale [T, 1] fp32): `forward`, and its result quantised as `fp8.quantise_rows` does."""
    quantised = fp8.empty_rows(x_TD)
    return *forward(x_TD, weight_D, eps, quantised=quantised), *quantised


# ---- Triton: a row a program, held in registers (up to 16384 wide: 32 values a thread) ----------------------------------------


def _forward(
    x_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None, quantised: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    rows, width = x_TD.shape
    if out is None:
        out = torch.empty(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weight_D.dtype), device=x_TD.device)
    rstd_T = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    block = backend.round_up(width)
    if rows:
        _forward_kernel[(rows,)](
            x_TD, weight_D, out, rstd_T, *(quantised or (out, rstd_T)), x_TD.stride(0), out.stride(0), width, eps,
            FP8=bool(quantised), BLOCK=block, num_warps=backend.warps_for(block),
        )  # fmt: skip
    return out, rstd_T, *quantised


@jit
def _forward_kernel(x, weight, out, rstd, h8, scale, x_stride, out_stride, width, eps, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    value = tl.load(x + row * x_stride + at, here, other=0).to(tl.float32)
    gain = tl.load(weight + at, here, other=0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    h = (value * r).to(x.dtype.element_ty).to(tl.float32) * gain  # rounded here, as `reference`
    tl.store(rstd + row, r)
    tl.store(out + row * out_stride + at, h.to(out.dtype.element_ty), here)
    if FP8:
        h = h.to(out.dtype.element_ty).to(tl.float32)
        s = scale_of(tl.max(size_bits(h), 0))
        tl.store(scale + row, s)
        tl.store(h8 + row * width + at, (h * tl.div_rn(1.0, s)).to(h8.dtype.element_ty), here)


@jit
def _backward_kernel(dh, x, weight, rstd, residual, out, dx8, scale, dh_stride, x_stride, residual_stride, out_stride, width,
                     RESIDUAL: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx = rstd (g - xhat mean(g xhat)) + residual, where g = dh weight. Reads the row before it writes: `out` may be an input."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    r = tl.load(rstd + row)
    xhat = tl.load(x + row * x_stride + at, here, other=0).to(tl.float32) * r
    g = tl.load(dh + row * dh_stride + at, here, other=0).to(tl.float32)
    g = g * tl.load(weight + at, here, other=0).to(tl.float32)
    dx = r * (g - xhat * (tl.sum(g * xhat, 0) / width))
    if RESIDUAL:
        dx += tl.load(residual + row * residual_stride + at, here, other=0).to(tl.float32)
    tl.store(out + row * out_stride + at, dx.to(out.dtype.element_ty), here)
    if FP8:
        dx = dx.to(out.dtype.element_ty).to(tl.float32)
        s = scale_of(tl.max(size_bits(tl.where(here, dx, 0.0)), 0))
        tl.store(scale + row, s)
        tl.store(dx8 + row * width + at, (dx * tl.div_rn(1.0, s)).to(dx8.dtype.element_ty), here)
