"""Cross-entropy of a vocabulary projection, a few rows of logits at a time.

`reference` is the definition. `linear_cross_entropy` never holds more than `chunk` rows of logits: the gradient is made in the
forward, where the logits are, so the backward is one multiplication. For Mistral's 32,000 words and 8,192 labelled rows that is
64 MiB of logits at a time instead of 1 GiB in float32 and as much again for their gradient.

Shape letters: L labelled rows, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

LOGIT_BYTES = 64 << 20  # logits of one chunk: on a CPU larger chunks leave the caches, on a GPU this keeps a GEMM busy
IGNORED = -100  # the label of a row that only fills up a shape: no loss, no gradient
GPU_ROWS = 512  # of a chunk at least: two GEMM tiles of 256; at V = 128k 262 rows would read the head's 1 GiB twice as often


def reference(x_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, softcap: float | None = None) -> Tensor:
    """-log p(label) of each row in nats, float32 [L]; 0 where the label is IGNORED."""
    logits = F.linear(x_LD, weight_VD).to(torch.promote_types(x_LD.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels_L, reduction="none")


def softmax_ce_(logits_LV: Tensor, labels_L: Tensor, gradient: bool = True) -> Tensor:
    """In place: the logits become softmax - onehot (fp32 inside, rounded once), unless `gradient` is False: then they are left or
    spoilt. Returns -log p(label) of each row in nats, fp32 [L].
    """
    if backend.triton_for(logits_LV):
        rows, vocab = logits_LV.shape
        rows_L = torch.empty(rows, dtype=torch.float32, device=logits_LV.device)
        block = min(backend.round_up(vocab), 8192)
        if rows:
            _softmax_ce_kernel[(rows,)](
                logits_LV, labels_L, rows_L, logits_LV.stride(0), vocab, GRADIENT=gradient, BLOCK=block,
                num_warps=backend.warps_for(block),
            )  # fmt: skip
        return rows_L
    wide = logits_LV.float()
    rows_L = F.cross_entropy(wide, labels_L, reduction="none")
    if gradient:
        d_logits, there = wide.softmax(-1), labels_L >= 0
        d_logits[torch.arange(len(labels_L), device=labels_L.device), labels_L.clamp(min=0)] -= 1
        d_logits *= there[:, None]
        logits_LV.copy_(d_logits)
    return rows_L


def linear_cross_entropy(
    x_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, *, softcap: float | None = None, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """(sum over rows, a scalar with gradients for `x_LD` and a trained `weight_VD`; each row's loss in nats, detached [L])."""
    chunk = chunk or rows_at_once(x_LD, weight_VD.shape[0], softcap)
    return _LinearCrossEntropy.apply(x_LD, weight_VD, labels_L, softcap, chunk)


def in_place(x_LD: Tensor, softcap: float | None) -> bool:
    """Whether `softmax_ce_` works on logits in their own dtype; elsewhere they are widened to fp32 first."""
    return softcap is None and x_LD.dtype != torch.float64 and backend.triton_for(x_LD)


def rows_at_once(x_LD: Tensor, vocab: int, softcap: float | None = None) -> int:
    """Rows of logits of a chunk: LOGIT_BYTES of them, in whole GEMM tiles of 128 rows where the kernel runs."""
    if not in_place(x_LD, softcap):
        return max(1, LOGIT_BYTES // (4 * vocab))
    return max(GPU_ROWS, LOGIT_BYTES // (x_LD.element_size() * vocab) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_LD, weight_VD, labels_L, softcap, chunk):
        wide = torch.promote_types(x_LD.dtype, torch.float32)
        need_x, need_w = ctx.needs_input_grad[:2]
        rows_L = torch.empty(len(x_LD), dtype=wide, device=x_LD.device)
        d_x = torch.empty_like(x_LD) if need_x else None
        d_w = torch.zeros_like(weight_VD, dtype=wide) if need_w else None
        fast = in_place(x_LD, softcap)
        for start in range(0, len(x_LD), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(x_LD[part], weight_VD)
            if fast:
                rows_L[part] = softmax_ce_(logits, labels_L[part], need_x or need_w)
                if need_x:
                    torch.mm(logits, weight_VD, out=d_x[part])
                if need_w:
                    d_w += logits.t() @ x_LD[part]
                del logits  # or the next chunk's would lie beside them
                continue
            logits = logits.to(wide)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            ignored = labels_L[part, None] < 0
            labels = labels_L[part, None].clamp(min=0)
            picked = logits.gather(1, labels)
            slope = None if softcap is None or not (need_x or need_w) else 1 - (logits / softcap).square()
            # in place, one exponential a logit: 524 x 32,000 take a CPU 41 ms; logsumexp and a second exponential took 111
            top = logits.amax(1, keepdim=True)
            d_logits = logits.sub_(top).exp_()
            total = d_logits.sum(1, keepdim=True)
            rows_L[part] = (top + total.log() - picked).masked_fill_(ignored, 0).squeeze(1)
            if not (need_x or need_w):
                continue
            d_logits.div_(total.masked_fill_(ignored, torch.inf)).scatter_add_(1, labels, ignored.to(picked.dtype) - 1)
            if slope is not None:
                d_logits *= slope
            d_logits = d_logits.to(x_LD.dtype)
            if need_x:
                torch.mm(d_logits, weight_VD, out=d_x[part])
            if need_w:
                d_w += d_logits.t() @ x_LD[part]
        ctx.gradients = d_x, d_w
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(rows_L)
        return rows_L.sum(), rows_L

    @staticmethod
    def backward(ctx, d_sum, _):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradient was given away by an earlier backward; call it again")
        (d_x, d_w), ctx.gradients = ctx.gradients, None  # scaled in place: of 131,072 rows a copy would be 1 GiB
        return (
            None if d_x is None else d_x.mul_(d_sum.to(d_x.dtype)),
            None if d_w is None else d_w.mul_(d_sum).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


@jit
def _softmax_ce_kernel(logits, labels, losses, stride, VOCAB: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program. Each lane keeps a running maximum and a sum relative to it; they meet once, after the first pass. The second
    pass finds the row in L2 (528 rows of 256 kB would not fit its 50 MB, the 132 x 2 that run at a time at V = 32,000 do).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    there = label >= 0
    picked = tl.load(logits + label, there, other=0).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, VOCAB, BLOCK):
        value = tl.load(logits + first + lane, first + lane < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    most = tl.max(top, 0)
    total_of_row = tl.sum(total * tl.exp(top - most), 0)
    tl.store(losses + row, tl.where(there, most + tl.log(total_of_row) - picked, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # `picked` is read by every thread before one of them overwrites it
        inverse = 1 / total_of_row
        for first in range(0, VOCAB, BLOCK):
            at = first + lane
            value = tl.load(logits + at, at < VOCAB, other=-float("inf")).to(tl.float32)
            slope = tl.exp(value - most) * inverse - tl.where(at == label, 1.0, 0.0)
            slope = tl.where(there, slope, 0.0)
            tl.store(logits + at, slope.to(logits.dtype.element_ty), at < VOCAB)
