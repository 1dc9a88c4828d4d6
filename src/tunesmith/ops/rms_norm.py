"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, per row, in at least float32.

Two roundings are in use: Llama and its kin round to the input's dtype, then multiply; Gemma multiplies by 1 + weight, then rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import fp8


def reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`offset` 0: Llama's rounding; 1: Gemma's. x [..., D], weight [D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (y * (offset + weight.to(y.dtype))).to(x.dtype)
    return weight * y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As `reference`; saves x and one number a row, and skips the weight's gradient where nobody asks for it."""
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
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


# ---- what a hand-written half-block calls: no autograd, no gradient of a frozen weight, Llama's rounding (offset 0) ----------
# Shape letters: T tokens, D width. Rows may be strided, the last dimension is contiguous.


def forward(x_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(h_TD as `reference`, rstd_T fp32). Writes into `out` when given."""
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    rstd_T = torch.rsqrt(wide.square().mean(-1) + eps)
    h_TD = weight_D * (wide * rstd_T[:, None]).to(x_TD.dtype)
    return (h_TD if out is None else out.copy_(h_TD)), rstd_T


def backward(dh_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, residual_TD: Tensor | None = None,
             out: Tensor | None = None) -> Tensor:  # fmt: skip
    """The gradient that reaches x, in x's dtype: through the norm, plus `residual_TD` that flows past it; fp32 inside,
    rounded once. `out` may be `dh_TD` or `residual_TD` itself.
    """
    wide, rstd = x_TD.to(rstd_T.dtype), rstd_T[:, None]
    g = dh_TD.to(wide.dtype) * weight_D.to(wide.dtype)
    dx_TD = rstd * (g - wide * rstd * ((g * wide).mean(-1, keepdim=True) * rstd))
    if residual_TD is not None:
        dx_TD += residual_TD
    return dx_TD.to(x_TD.dtype) if out is None else out.copy_(dx_TD)


def forward_fp8(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_TD, rstd_T, h8_TD e4m3, scale [T, 1] fp32): `forward`, and its result quantised as `fp8.quantise_rows` does."""
    h_TD, rstd_T = forward(x_TD, weight_D, eps)
    return h_TD, rstd_T, *fp8.reference_quantise_rows(h_TD)
