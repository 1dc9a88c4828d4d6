"""The gated MLP's middle: activation(gate) * up, with SiLU (Llama, Qwen, Phi, Mistral) or GELU's tanh form (Gemma)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
