"""Causal attention over one flat stream of documents that cannot see each other.

`reference` is the definition, in float32. `attention` is the fast door: one variable-length kernel on an NVIDIA GPU in bf16 and
fp16, one call a document elsewhere. `forward` and `backward` are the same for code that writes its own backward and keeps output
and row sums itself. None builds a T x T mask over the stream: what belongs to document A has no way to B.

Shape letters: T tokens in the stream, N documents, t tokens of one document, Q query heads, K key/value heads (Q a multiple of K),
H head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # query rows at once where scores are written out (softcap): 512 x 8192 x 8 heads in fp32 are 134 MB


@dataclass(frozen=True, eq=False)
class Layout:
    """Where documents lie in the stream. `bounds[i]:bounds[i + 1]` is document i; `positions_T` restarts at 0 in each."""

    lengths: tuple[int, ...]
    bounds: tuple[int, ...]  # N + 1
    positions_T: Tensor  # int64
    cu_seqlens: Tensor  # int32 [N + 1], `bounds` on the device
    room: int = (
        0  # above 0: documents of any lengths up to this will stand where `positions_T` and `cu_seqlens` are (recorded passes)
    )

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Layout:
        """From each document's tokens, in stream order; every document has at least one."""
        lengths = tuple(int(n) for n in lengths)
        assert lengths and min(lengths) > 0, "a document has no token"
        bounds = (0, *accumulate(lengths))
        positions = torch.from_numpy(
            np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        )  # torch wakes its threads for this: 1 ms
        return cls(lengths, bounds, to_device(positions, device), to_device(torch.tensor(bounds, dtype=torch.int32), device))

    @cached_property
    def longest(self) -> int:
        return self.room or max(self.lengths)

    @cached_property
    def documents_T(self) -> Tensor:
        """int64: which document each token belongs to."""
        documents = torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths))
        return to_device(documents, self.positions_T.device)


def to_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """From main memory, without waiting for what an NVIDIA GPU has queued: a plain copy to it would."""
    if device is None or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def reference(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout, scale: float,
              window: int | None = None, softcap: float | None = None) -> Tensor:  # fmt: skip
    """softmax(cap(scale q k^T)) v over keys j with 0 <= i - j < window in the same document; float32 (float64 stays)."""
    wide = torch.promote_types(q_TQH.dtype, torch.float32)
    group = q_TQH.shape[1] // k_TKH.shape[1]
    out = []
    for start, end in pairwise(layout.bounds):
        q, k, v = (x[start:end].to(wide).transpose(0, 1) for x in (q_TQH, k_TKH, v_TKH))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(end - start, device=q.device)
        back = i[:, None] - i
        hidden = (back < 0) | (back >= (window or end))
        out.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out).to(q_TQH.dtype)


def attention(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout, scale: float,
              window: int | None = None, softcap: float | None = None) -> Tensor:  # fmt: skip
    """As `reference`, in the inputs' dtype, at linear memory unless there is a softcap. Returns [T, Q, H]."""
    if window is not None and window >= layout.longest:
        window = None
    if softcap is None and _has_kernel(q_TQH):
        return _Kernel.apply(q_TQH, k_TKH, v_TKH, layout, scale, window)
    if len(layout.lengths) == 1:
        return _document(q_TQH, k_TKH, v_TKH, scale, window, softcap)
    parts = zip(*(x.split(layout.lengths) for x in (q_TQH, k_TKH, v_TKH)), strict=True)  # split: its backward is one cat
    return torch.cat([_document(q, k, v, scale, window, softcap) for q, k, v in parts])


def _has_kernel(q: Tensor) -> bool:
    """Whether the variable-length kernel takes it: bf16 or fp16, heads of at most 256, an Ampere card or later."""
    return room_kernel(q, q.shape[-1])


def room_kernel(like: Tensor, head_dim: int) -> bool:
    """The same for a tensor of this dtype and place: whether documents may change under a recorded pass."""
    if not like.is_cuda or like.dtype not in (torch.bfloat16, torch.float16) or head_dim > 256:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(like.device)[0] >= 8


def _document(q_tQH: Tensor, k_tKH: Tensor, v_tKH: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_tQH, k_tKH, v_tKH))  # [1, heads, t, H], not copied
    t = q.shape[2]
    if window is not None and window >= t:
        window = None
    if softcap is not None:
        y = _softcapped(q, k, v, scale, window, softcap)
    elif window is not None:
        y = _windowed(q, k, v, scale, window)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)


def visible(queries: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys]: True where a query may look."""
    back = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(keys.start, keys.stop, device=device)
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """A band, chunk by chunk: each chunk of queries meets only the keys its window reaches."""
    t, step, parts = q.shape[2], max(window, 128), []
    for start in range(0, t, step):
        rows, keys = range(start, min(start + step, t)), range(max(0, start - window + 1), min(start + step, t))
        mask = visible(rows, keys, window, q.device)
        at, gqa = slice(keys.start, keys.stop), q.shape[1] != k.shape[1]
        args = q[:, :, rows.start : rows.stop], k[:, :, at], v[:, :, at]
        parts.append(F.scaled_dot_product_attention(*args, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    """No fused kernel caps scores: they are written out for CHUNK queries at a time and recomputed in the backward."""
    t, parts = q.shape[2], []
    for start in range(0, t, CHUNK):
        rows = range(start, min(start + CHUNK, t))
        keys = range(0 if window is None else max(0, start - window + 1), rows.stop)
        at = slice(keys.start, keys.stop)
        args = q[:, :, rows.start : rows.stop], k[:, :, at], v[:, :, at], visible(rows, keys, window, q.device), scale, softcap
        again = t > CHUNK and torch.is_grad_enabled()
        parts.append(checkpoint(capped, *args, use_reentrant=False) if again else capped(*args))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Scores written out. q [B, Q, i, H], k and v [B, K, j, H], mask broadcastable to [B, Q, i, j]; softmax in at least float32."""
    groups = q.unflatten(1, (k.shape[1], -1))  # query heads beside the key head they share: k and v are not copied
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (groups @ k[:, :, None].mT).flatten(1, 2).to(wide)
    scores = softcap * torch.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).to(v.dtype).unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)


# ---- the pair for hand-written backwards ---------------------------------------------------------------------------------------


def kernel(q: Tensor, layout: Layout, window: int | None) -> Literal["cudnn", "flash", "cpu", "autograd"]:
    """Which kernel `forward` and `backward` run for these.

    cudnn: documents of one length on an NVIDIA GPU, 1.6 to 1.9 times FA2's speed on an H200, but without a deterministic backward.
    flash: torch's variable-length FA2, any lengths and windows. cpu: torch's flash kernel, one call a document. autograd: the rest.
    """
    if _has_kernel(q):
        alike = not layout.room and len(set(layout.lengths)) == 1 and window is None and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return "cudnn" if alike and CUDNN and not torch.are_deterministic_algorithms_enabled() else "flash"
    return "cpu" if q.device.type == "cpu" and window is None else "autograd"


CUDNN = True  # tests and benches turn it off to compare


def forward(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout, scale: float,
            window: int | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(output [T, Q, H], what `backward` needs besides: float32, 4 bytes a token and head; None where it computes it again)."""
    if window is not None and window >= layout.longest:
        window = None
    match kernel(q_TQH, layout, window):
        case "cudnn":
            q, k, v = (_batched(x, layout) for x in (q_TQH, k_TKH, v_TKH))
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)
            return out.transpose(1, 2).reshape(q_TQH.shape), lse
        case "flash":
            ends, n = layout.cu_seqlens, layout.longest
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q_TQH, k_TKH, v_TKH, ends, ends, n, n, 0.0, True, False, scale=scale, **_back(window)
            )
            return out, lse
        case "cpu":
            out, sums, group = torch.empty_like(q_TQH), [], q_TQH.shape[1] // k_TKH.shape[1]
            for start, end in pairwise(layout.bounds):
                q, k, v = _heads_first(q_TQH, k_TKH, v_TKH, start, end, group)
                y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
                out[start:end] = y[0].transpose(0, 1)
                sums.append(lse[0])
            return out, torch.cat(sums, -1)
    return attention(q_TQH, k_TKH, v_TKH, layout, scale, window), None


def backward(dout_TQH: Tensor, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TQH: Tensor, lse: Tensor | None, layout: Layout,
             scale: float, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q [T, Q, H], k and v [T, K, H], from what `forward` returned for them."""
    if window is not None and window >= layout.longest:
        window = None
    match kernel(q_TQH, layout, window):
        case "cudnn":
            dout, q, k, v, out = (_batched(x, layout) for x in (dout_TQH, q_TQH, k_TKH, v_TKH, out_TQH))
            n, none = layout.longest, torch.empty(0, dtype=torch.int64, device=q.device)
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse, none, none, None, None, None, n, n, 0.0, True, scale=scale
            )
            return tuple(d.transpose(1, 2).reshape(x.shape) for d, x in zip(found, (q_TQH, k_TKH, v_TKH), strict=True))
        case "flash":
            ends, n = layout.cu_seqlens, layout.longest
            none = torch.empty(0, dtype=torch.int64, device=q_TQH.device)
            return torch.ops.aten._flash_attention_backward(
                dout_TQH, q_TQH, k_TKH, v_TKH, out_TQH, lse, ends, ends, n, n, 0.0, True, none, none, scale=scale, **_back(window)
            )
        case "cpu":
            found, group = tuple(torch.empty_like(x) for x in (q_TQH, k_TKH, v_TKH)), q_TQH.shape[1] // k_TKH.shape[1]
            for start, end in pairwise(layout.bounds):
                q, k, v = _heads_first(q_TQH, k_TKH, v_TKH, start, end, group)
                y, dy = (x[start:end].transpose(0, 1)[None] for x in (out_TQH, dout_TQH))
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    dy, q, k, v, y, lse[None, :, start:end], 0.0, True, scale=scale
                )
                for whole, part in zip(found, parts, strict=True):
                    part = part[0].unflatten(0, (whole.shape[1], -1)).sum(1)  # heads that shared a key add up
                    whole[start:end] = part.transpose(0, 1)
            return found
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q_TQH, k_TKH, v_TKH)]
        return torch.autograd.grad(attention(*inputs, layout, scale, window), inputs, dout_TQH)


class _Kernel(torch.autograd.Function):
    """The pair for autograd. torch.nn.attention.varlen does the same, and importing it brings all of torch.compile: 1 s, and 8 s
    where no bytecode is kept."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale, window):
        out, lse = forward(q, k, v, layout, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = layout, scale, window
        return out

    @staticmethod
    def backward(ctx, dout):
        return *backward(dout, *ctx.saved_tensors, *ctx.how), None, None, None


def _batched(x_TnH: Tensor, layout: Layout) -> Tensor:
    """[documents, heads, tokens, H], not copied."""
    return x_TnH.unflatten(0, (len(layout.lengths), layout.longest)).transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, group: int) -> list[Tensor]:
    """One document as [1, Q, t, H] each; torch's CPU kernel wants a key head for each query head."""
    k, v = (x[start:end].repeat_interleave(group, 1) if group > 1 else x[start:end] for x in (k, v))
    return [x.transpose(0, 1)[None] for x in (q[start:end], k, v)]


def _back(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
