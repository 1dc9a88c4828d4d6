"""The decoder for serving: as few launches a layer as there are products, and no autograd. Equal to the composed path's answers.

Linears that share an input become one matrix, of which their weights are views: nothing is held twice. A layer is ten launches
on an NVIDIA GPU (norm, qkv, split and rotate, store, attention, output, norm, gate and up, swiglu, down), 12 more where adapters
are in the pass. `refusal` says who takes the composed path of models/decoder.py instead.

Shape letters: T tokens in the stream, L chosen rows, D model width, N outputs of a group, K its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import linears
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.paged import Pass
from tunesmith.ops import rms_norm, rotary, swiglu
from tunesmith.spec import half_blocks_refusal


class LowRank(Protocol):
    """What adapters add to a group's product (adapters/several.py)."""

    def add(self, x_TK: Tensor, y_TN: Tensor) -> None: ...


def refusal(model: nn.Module) -> str:
    """Why this model takes the composed path; empty when it need not."""
    if not isinstance(model, Decoder):
        return "it runs through transformers"
    if reason := half_blocks_refusal(model.spec):
        return reason
    for block in model.model.layers:
        for module in (m for group in linears(block) for m in group):
            if type(getattr(module, "base", module)) is not Linear:
                return "its weights are not dense"
    return ""


def densify(model: nn.Module) -> int:
    """Decode every NF4 linear for good, into its own dtype: the same numbers that each of its products decodes. How many."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    for name, old in found:
        new = Linear(old.in_features, old.out_features, old.bias is not None, dtype=old.dtype, device="meta").requires_grad_(False)
        new.set_weight("weight", old.dequantize())
        if old.bias is not None:
            new.set_weight("bias", old.bias.detach())
        new.requires_grad_(False).train(old.training)
        model.set_submodule(name, new)
    return len(found)


class Fused:
    """Linears with the same input as one matrix."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        bases = [getattr(m, "base", m) for m in modules]
        sizes = [b.out_features for b in bases]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.outputs = sum(sizes)
        self.weight_NK = bases[0].weight.detach()
        if len(bases) > 1:
            self.weight_NK = torch.cat([b.weight.detach() for b in bases])
            for base, part in zip(bases, self.weight_NK.split(sizes), strict=True):
                base.weight = nn.Parameter(part, requires_grad=False)
        biases = [b.bias for b in bases]
        self.bias_N = None
        if any(b is not None for b in biases):
            like = self.weight_NK
            self.bias_N = torch.cat([like.new_zeros(n) if b is None else b.detach() for b, n in zip(biases, sizes, strict=True)])
        self.low: LowRank | None = None

    def __call__(self, x_TK: Tensor, onto_TN: Tensor | None = None) -> Tensor:
        """x W^T + bias, with the adapters' parts; added to `onto_TN` where it is given."""
        if onto_TN is None:
            y = F.linear(x_TK, self.weight_NK, self.bias_N)
        else:
            y = torch.addmm(onto_TN, x_TK, self.weight_NK.t())
            if self.bias_N is not None:
                y += self.bias_N
        if self.low is not None:
            self.low.add(x_TK, y)
        return y


class Lean:
    """A decoder's layers, for passes over a paged cache. `groups[i]`: qkv, o, gate_up, down of layer i."""

    def __init__(self, model: Decoder):
        assert not refusal(model), refusal(model)
        self.model, self.spec = model, model.spec
        self.groups = [[Fused(group) for group in linears(block)] for block in model.model.layers]

    def hidden(self, tokens_T: Tensor, where: Pass, rows: Tensor | None = None) -> Tensor:
        """As Decoder.hidden: [T, D] after the final norm, or its `rows` [L, D]."""
        s, model = self.spec, self.model
        x = model.embed(tokens_T)
        lengths = [past + n for past, n in zip(where.lengths, where.layout.lengths, strict=True)]
        full, local = model._tables(where.positions_T, lengths, where.layout, x.dtype)
        t, heads, kv, width = len(x), s.heads, s.kv_heads, s.head_dim
        for i, (block, (qkv, o, gate_up, down)) in enumerate(zip(model.model.layers, self.groups, strict=True)):
            at, (cos, sin) = block.self_attn, local if s.slides(i) else full
            whole = qkv(_norm(x, block.input_layernorm))
            q, k, v = (x.new_empty(t, n, width) for n in (heads, kv, kv))
            if s.qk_norm:
                parts = whole.view(t, -1, width).split([heads, kv, kv], 1)
                q = rotary.rotate_into(_heads(parts[0], at.q_norm), cos, sin, q)
                k, v = rotary.rotate_into(_heads(parts[1], at.k_norm), cos, sin, k), parts[2]
            else:
                rotary.split(whole, heads, cos, sin, q, k, v)
            y = where.attend(i, q, k, v, where.layout, at.scale, at.window, None)
            x = o(y.reshape(t, -1), x)
            x = down(swiglu.forward(gate_up(_norm(x, block.post_attention_layernorm))), x)
        return _norm(x if rows is None else x[rows], model.model.norm)


def _norm(x_TD: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm.forward(x_TD, norm.weight, norm.eps)[0]


def _heads(x_ThH: Tensor, norm: nn.Module) -> Tensor:
    return _norm(x_ThH.reshape(-1, x_ThH.shape[-1]), norm).view(x_ThH.shape)
