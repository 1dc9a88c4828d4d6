"""The linears of a model and how their weights are stored: dense (bf16, fp32 ...) or NF4. One face:

    linear.in_features, linear.out_features
    linear(x) -> x @ W.T + bias                  in x's dtype
    linear.dequantize(dtype=None) -> W           [out, in], dense
    linear.set_weight("weight" | "bias", tensor) takes a dense tensor, quantising on the way in where the store is quantised

so neither an adapter nor the loader knows how a base is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.errors import ModelError
from tunesmith.ops import nf4

_FIX = "use the checkpoint this config.json belongs to"


class Linear(nn.Linear):
    """A dense linear. `weight` is [out, in] in `dtype`; frozen or trainable as its `requires_grad` says."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype=dtype, device=device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in]; not copied when `dtype` is its own."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def set_weight(self, name: str, tensor: Tensor) -> None:
        """Takes `weight` [out, in] or `bias` [out] in the store's dtype; from the meta device the linear moves to the tensor's."""
        _put(self, name, tensor)


class NF4Linear(nn.Module):
    """A frozen linear whose weight is NF4 with double quantisation (ops/nf4.py): 0.516 bytes a weight.

    `dtype` is that of `dequantize()` and of the bias. The backward decodes the weight again:
    nothing dense is kept between passes.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        n = in_features * out_features
        blocks = -(-n // nf4.BLOCK)
        self.block, self.nested_block = nf4.BLOCK, nf4.NESTED_BLOCK
        self.register_buffer("weight", torch.zeros(-(-n // 2), dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.uint8, device=device))
        self.register_buffer("nested_absmax", torch.zeros(-(-blocks // nf4.NESTED_BLOCK), device=device, dtype=torch.float32))
        self.register_buffer("nested_map", torch.zeros(256, device=device, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros((), device=device, dtype=torch.float32))
        bias_value = torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if bias_value is None else nn.Parameter(bias_value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return _NF4Matmul.apply(x, self)

    def quantised(self) -> nf4.NF4:
        """The store as ops/nf4.py names it."""
        return nf4.NF4(self.weight, self.absmax, self.nested_absmax, self.nested_map, self.offset,
                       (self.out_features, self.in_features), self.block, self.nested_block)  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new dense weight [out, in], decoded in fp32 and rounded once."""
        return nf4.dense(self.quantised(), dtype or self.dtype)

    def set_weight(self, name: str, tensor: Tensor) -> None:
        """Takes a dense `weight` [out, in], quantised here, or `bias` [out]."""
        if name != "weight":
            return _put(self, name, tensor)
        _check_shape(name, tuple(tensor.shape), (self.out_features, self.in_features))
        device = tensor.device if self.weight.is_meta else self.weight.device
        quantised = nf4.quantise(tensor.to(device))
        if not quantised.offset.isfinite():  # the mean of all absmax: one NaN or inf anywhere shows here
            raise ModelError("weight holds NaN or inf", "this checkpoint is damaged: get it again")
        self._store(quantised)

    def set_quantised(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes a weight that bitsandbytes has quantised, without requantising it, under its own keys after any module prefix:
        weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 and, with double quantisation,
        weight.nested_absmax, weight.nested_quant_map; bias. Raises ModelError for another type than nf4 or a missing part.
        """
        found = {key.rpartition("weight")[2].removeprefix("."): tensor for key, tensor in tensors.items() if "weight" in key}
        state_key = next((key for key in found if key.startswith("quant_state.bitsandbytes__")), "no quant_state")
        needed = ["", "absmax"] + ["nested_quant_map"] * ("nested_absmax" in found)
        faults = [f"lacks {f'weight.{key}'.rstrip('.')}" for key in needed if key not in found]
        if state_key != "quant_state.bitsandbytes__nf4":
            faults.append(f"holds {state_key} where quant_state.bitsandbytes__nf4 belongs")
        if faults:
            raise ModelError(f"a quantised weight {'; '.join(faults)}", "quantise the checkpoint as nf4, or use its 16-bit weights")
        state = json.loads(bytes(found[state_key].tolist()))
        shape = (self.out_features, self.in_features)
        _check_shape("weight", tuple(state["shape"]), shape)
        device = found[""].device if self.weight.is_meta else self.weight.device
        nested = "nested_absmax" in found
        codes, block = found[""].reshape(-1).view(torch.uint8), state["blocksize"]
        _check_shape("weight.absmax", tuple(found["absmax"].shape), (-(-shape[0] * shape[1] // block),))
        _check_shape("weight", tuple(codes.shape), (-(-shape[0] * shape[1] // 2),))
        self._store(
            nf4.NF4(
                codes=codes.to(device),
                absmax=found["absmax"].to(device),
                nested_absmax=found["nested_absmax"].float().to(device) if nested else None,
                nested_map=found["nested_quant_map"].float().to(device) if nested else None,
                offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=device) if nested else None,
                shape=shape,
                block=block,
                nested_block=state.get("nested_blocksize", nf4.NESTED_BLOCK),
            )
        )
        if biases := [tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "bias"]:
            self.set_weight("bias", biases[0])

    def _store(self, q: nf4.NF4) -> None:
        self.weight, self.absmax, self.nested_absmax, self.nested_map, self.offset = (
            q.codes, q.absmax, q.nested_absmax, q.nested_map, q.offset)  # fmt: skip
        self.block, self.nested_block = q.block, q.nested_block

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """`.to(device)` moves everything; `.to(dtype)` must not touch the scales, whose fp32 is part of the format."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None and self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, nf4"


class _NF4Matmul(torch.autograd.Function):
    """y = x W^T + b; the backward decodes W again. `linear` is held, not its dense weight."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None]:
        return (dy @ ctx.linear.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None), None


def _check_shape(name: str, got: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if got != needed:
        raise ModelError(f"{name} is {list(got)} where the model needs {list(needed)}", _FIX)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Copies `tensor` into the parameter `name`, or takes its place when the module is still on the meta device."""
    old = getattr(module, name, None) if name in ("weight", "bias") else None
    if old is None:
        raise ModelError(f"a linear of this model has no {name!r}", _FIX)
    _check_shape(name, tuple(tensor.shape), tuple(old.shape))
    if old.is_meta:
        setattr(module, name, nn.Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad))
    else:
        with torch.no_grad():
            old.copy_(tensor)
