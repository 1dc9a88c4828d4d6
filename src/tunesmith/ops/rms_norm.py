"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, per row, in at least float32.

Two roundings are in use: Llama and its kin round to the input's dtype, then multiply; Gemma multiplies by 1 + weight, then rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
