"""The gated MLP's middle: activation(gate) * up, with SiLU (Llama, Qwen, Phi, Mistral) or GELU's tanh form (Gemma)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import fp8

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
    a_TF = reference(*gate_up_T2F.chunk(2, -1), activation)
    return a_TF if out_TF is None else out_TF.copy_(a_TF)


def backward_(da_TF: Tensor, gate_up_T2F: Tensor, activation: Activation = "silu") -> None:
    """In place: `gate_up_T2F` becomes (d_gate, d_up), `da_TF` becomes a_TF made again."""
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
    a_TF = forward(gate_up_T2F, activation=activation)
    return a_TF, *fp8.reference_quantise_rows(a_TF)
