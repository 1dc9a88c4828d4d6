"""Rotary position embedding: frequencies of every kind, tables of cosines and sines, and the rotation.

Tables are made in float32 with transformers' own expressions, then cast, so they agree to the bit. What depends on a document's
length (longrope's two tables, dynamic's base) is chosen for each document by its own length, never by the batch.

Shape letters: T tokens, N documents, h heads, H head width, R half of the rotated width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops import backend, low_rank
from tunesmith.ops.backend import jit, tl
from tunesmith.ops.low_rank import Low, product


class Rope(Protocol):
    """What is read of `spec.Rope`; hashable."""

    theta: float
    fraction: float  # share of the head that is rotated
    kind: str  # default, linear, dynamic, llama3, longrope or yarn
    scaling: tuple[tuple[str, Any], ...]


def reference(x_ThH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + R]); what lies beyond 2R passes through. The tables are cast to x's dtype first."""
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None].to(x_ThH.dtype), sin_TR[:, None].to(x_ThH.dtype)
    a, b, rest = x_ThH.split([half, half, x_ThH.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rotate(x_ThH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """As `reference`; writes its output once and saves nothing of x: the backward is the rotation back."""
    return _Rotate.apply(x_ThH, cos_TR, sin_TR)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=y[..., :half]).sub_(b * sin)
    torch.mul(b, cos, out=y[..., half : 2 * half]).add_(a * sin)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y


def rotate_(x_ThH: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False) -> Tensor:
    """`reference` in place, on any token stride; `inverse` turns back. No autograd."""
    return rotate_into(x_ThH, cos_TR, sin_TR, x_ThH, inverse)


def rotate_into(x_ThH: Tensor, cos_TR: Tensor, sin_TR: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
    """`reference` from one strided place into another, which may be the same; the last dimensions are contiguous. No autograd.

    On a GPU products and sum are rounded once, at the end: within 2^-8 (bf16) or 2^-10 (fp16) of |a| + |b| of `reference`.
    """
    if not backend.triton_for(x_ThH):
        return out.copy_(reference(x_ThH, cos_TR, -sin_TR if inverse else sin_TR))
    (tokens, heads, width), half = x_ThH.shape, cos_TR.shape[-1]
    size = backend.round_up(half)
    together = min(backend.round_up(heads), max(1, 2048 // size))  # 16 pairs a thread of 4 warps
    if tokens:
        _rotate_kernel[(tokens, -(-heads // together))](
            x_ThH, cos_TR, sin_TR, out, heads, half, *x_ThH.stride()[:2], *out.stride()[:2], cos_TR.stride(0), sin_TR.stride(0),
            INVERSE=inverse, HEADS=together, HALF=size, num_warps=min(4, backend.warps_for(together * size)),
        )  # fmt: skip
    if 2 * half < width and out.data_ptr() != x_ThH.data_ptr():
        out[..., 2 * half :] = x_ThH[..., 2 * half :]
    return out


@jit
def _rotate_kernel(x, cos, sin, out, heads, half, x_token, x_head, out_token, out_head, cos_token, sin_token,
                   INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """HEADS heads of one token: pairs (x[i], x[i + half]) as two tiles [HEADS, HALF]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    here = (head < heads)[:, None] & (i < half)[None, :]
    dtype = x.dtype.element_ty  # the tables in x's dtype, as `reference`
    c = tl.load(cos + token * cos_token + i, i < half, other=0).to(tl.float32).to(dtype).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_token + i, i < half, other=0).to(tl.float32).to(dtype).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    source = x + token * x_token + head[:, None] * x_head + i[None, :]
    a = tl.load(source, here, other=0).to(tl.float32)
    b = tl.load(source + half, here, other=0).to(tl.float32)
    to = out + token * out_token + head[:, None] * out_head + i[None, :]
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), here)
    tl.store(to + half, (b * c + a * s).to(out.dtype.element_ty), here)


def split(qkv_TN: Tensor, heads: int, cos_TR: Tensor, sin_TR: Tensor, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor,
          low: Low | None = None) -> None:  # fmt: skip
    """A projection's output -> q and k rotated, v as it is, each in its place (contiguous). One launch on a GPU.

    `low`: what an FP8 product still lacks (ops/low_rank.py), added first and rounded.
    """
    if low is not None:
        if backend.triton_for(qkv_TN):
            return _split_low(qkv_TN, heads, cos_TR, sin_TR, q_TQH, k_TKH, v_TKH, low)
        qkv_TN = low_rank.reference_added(qkv_TN, low)
    _split_or_join(qkv_TN, heads, cos_TR, sin_TR, (q_TQH, k_TKH, v_TKH), join=False)


def join(q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_TN: Tensor) -> None:
    """Gradients of what `split` wrote -> the gradient of what it read, q's and k's rotated back."""
    _split_or_join(out_TN, q_TQH.shape[1], cos_TR, sin_TR, (q_TQH, k_TKH, v_TKH), join=True)


def _split_or_join(
    whole_TN: Tensor, heads: int, cos: Tensor, sin: Tensor, parts: tuple[Tensor, Tensor, Tensor], join: bool
) -> None:
    q, k, v = parts
    kv, width = k.shape[1:]
    if not backend.triton_for(whole_TN):
        at = whole_TN.view(len(whole_TN), -1, width)
        if not join:  # q and k in one go: of one token 34 us, two rotations took 100, in each layer at each token
            turned = reference(at[:, : heads + kv], cos, sin)
            for source, place in ((turned[:, :heads], q), (turned[:, heads:], k), (at[:, heads + kv :], v)):
                place.copy_(source)
            return
        at = at.split([heads, kv, kv], 1)
        for source, place, turned in zip(parts, at, (True, True, False), strict=True):
            rotate_into(source, cos, sin, place, inverse=True) if turned else place.copy_(source)
        return
    assert all(x.is_contiguous() for x in parts)
    half, size = cos.shape[-1], backend.round_up(max(cos.shape[-1], width - 2 * cos.shape[-1]))
    if len(whole_TN):
        _split_kernel[(len(whole_TN),)](
            whole_TN, q, k, v, cos, sin, heads, kv, width, half, whole_TN.stride(0), cos.stride(0), JOIN=join,
            HEADS=backend.round_up(heads + 2 * kv), HALF=size, REST=2 * half < width, num_warps=4,
        )  # fmt: skip


def _split_low(qkv_TN: Tensor, heads: int, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor, low: Low) -> None:
    (tokens, kv, width), half = k.shape, cos.shape[-1]
    size = max(16, backend.round_up(max(half, width - 2 * half)))
    if tokens:
        _split_low_kernel[(-(-tokens // 64), heads + 2 * kv)](
            qkv_TN, q, k, v, cos, sin, tokens, heads, kv, width, half, qkv_TN.stride(0), cos.stride(0),
            *low_rank.arguments(low, q), ROWS=64, HALF=size, REST=2 * half < width, **low_rank.blocks(low[0].shape[1], q.dtype),
            num_warps=4,
        )  # fmt: skip


@jit
def _split_low_kernel(whole, q, k, v, cos, sin, tokens, heads, kv, width, half, stride, cos_stride, low, b, r, low_s, b_n, b_r,
                      ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr,
                      IEEE: tl.constexpr):  # fmt: skip
    """One head of ROWS tokens: pairs (x[i], x[i + half]) as two tiles [ROWS, HALF], each with its share of low B^T."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head, i = tl.program_id(1), tl.arange(0, HALF)
    there, across = token < tokens, i < half
    here = there[:, None] & across[None, :]
    dtype = q.dtype.element_ty
    at = head * width + i
    source = whole + token[:, None] * stride + at[None, :]
    x = tl.load(source, here, other=0).to(tl.float32)
    y = tl.load(source + half, here, other=0).to(tl.float32)
    x += product(low, b, token, at, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
    y += product(low, b, token, at + half, there, across, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
    x = x.to(dtype).to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    is_v = head >= heads + kv
    angle = token[:, None] * cos_stride + i[None, :]
    c = tl.load(cos + angle, here, other=0).to(tl.float32).to(dtype).to(tl.float32)
    s = tl.load(sin + angle, here, other=0).to(tl.float32).to(dtype).to(tl.float32)
    c = tl.where(is_v, 1.0, c)
    s = tl.where(is_v, 0.0, s)
    at_q = q + token[:, None] * heads * width + head * width + i[None, :]
    at_k = k + token[:, None] * kv * width + (head - heads) * width + i[None, :]
    at_v = v + token[:, None] * kv * width + (head - heads - kv) * width + i[None, :]
    place = tl.where(head < heads, at_q, tl.where(is_v, at_v, at_k))
    tl.store(place, (x * c - y * s).to(dtype), here)
    tl.store(place + half, (y * c + x * s).to(dtype), here)
    if REST:
        beyond = 2 * half + i < width
        at_rest = there[:, None] & beyond[None, :]
        z = tl.load(source + 2 * half, at_rest, other=0).to(tl.float32)
        z += product(low, b, token, at + 2 * half, there, beyond, r, low_s, b_n, b_r, RANKS, CHUNKS, IEEE)
        tl.store(place + 2 * half, z.to(dtype), at_rest)


@jit
def _split_kernel(whole, q, k, v, cos, sin, heads, kv, width, half, stride, cos_stride,
                  JOIN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """All heads of one token: pairs (x[i], x[i + half]) as two tiles [HEADS, HALF], and what is not rotated as a third."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    is_q, is_v = head < heads, head >= heads + kv
    here = (head < heads + 2 * kv) & (i < half)
    dtype = q.dtype.element_ty
    c = tl.load(cos + token * cos_stride + i, i < half, other=0).to(tl.float32).to(dtype).to(tl.float32)
    s = tl.load(sin + token * cos_stride + i, i < half, other=0).to(tl.float32).to(dtype).to(tl.float32)
    c = tl.where(is_v, 1.0, c)
    s = tl.where(is_v, 0.0, s)
    if JOIN:
        s = -s
    at_whole = whole + token * stride + head * width + i
    at_q = q + token * heads * width + head * width + i
    at_k = k + token * kv * width + (head - heads) * width + i
    at_v = v + token * kv * width + (head - heads - kv) * width + i
    at_part = tl.where(is_q, at_q, tl.where(is_v, at_v, at_k))
    if JOIN:
        a, b = tl.load(at_part, here, other=0).to(tl.float32), tl.load(at_part + half, here, other=0).to(tl.float32)
        tl.store(at_whole, (a * c - b * s).to(dtype), here)
        tl.store(at_whole + half, (b * c + a * s).to(dtype), here)
    else:
        a, b = tl.load(at_whole, here, other=0).to(tl.float32), tl.load(at_whole + half, here, other=0).to(tl.float32)
        tl.store(at_part, (a * c - b * s).to(dtype), here)
        tl.store(at_part + half, (b * c + a * s).to(dtype), here)
    if REST:
        here = (head < heads + 2 * kv) & (2 * half + i < width)
        if JOIN:
            tl.store(at_whole + 2 * half, tl.load(at_part + 2 * half, here, other=0), here)
        else:
            tl.store(at_part + 2 * half, tl.load(at_whole + 2 * half, here, other=0), here)


def tables(rope: Rope, head_dim: int, context: int, positions_T: Tensor, lengths: Sequence[int],
           documents_T: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cos_TR, sin_TR) in `dtype`. `lengths`: the documents' whole lengths, cached tokens included. `documents_T` is asked which
    document a token belongs to only where their lengths make a difference."""
    device = positions_T.device
    kinds = [regime(rope, context, n) for n in lengths]
    if len(set(kinds)) == 1:
        freq, gain = _frequencies_on(rope, head_dim, context, kinds[0], device)
    else:
        found = [_frequencies_on(rope, head_dim, context, kind, device) for kind in kinds]
        freq, gain = torch.stack([f for f, _ in found])[documents_T()], found[0][1]  # the gain is one for all of a model's tables
    angle_TR = positions_T[:, None].float() * freq
    return (angle_TR.cos() * gain).to(dtype), (angle_TR.sin() * gain).to(dtype)


def regime(rope: Rope, context: int, length: int) -> int:
    """The length that stands for all lengths with the same frequencies."""
    if rope.kind == "longrope":
        original = dict(rope.scaling)["original_max_position_embeddings"]
        return original + (length > original)
    return max(length, context) if rope.kind == "dynamic" else 0


@lru_cache(maxsize=256)
def _frequencies_on(rope: Rope, head_dim: int, context: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    with torch.inference_mode(False):  # kept across calls: must not be an inference tensor
        freq, gain = frequencies(rope, head_dim, context, length)
        return freq.to(device), gain


def frequencies(rope: Rope, head_dim: int, context: int, length: int) -> tuple[Tensor, float]:
    """(radians per token [R] in float32, gain of the tables) for a document of `length` tokens.

    Sources: linear and dynamic NTK as in transformers; Llama 3.1's by wavelength; LongRoPE arXiv 2402.13753; YaRN arXiv 2309.00071.
    """
    s = dict(rope.scaling)
    dim, theta, gain = int(head_dim * rope.fraction), rope.theta, 1.0
    if rope.kind == "dynamic":
        theta *= (s["factor"] * max(length, context) / context - (s["factor"] - 1)) ** (dim / (dim - 2))
    power = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    freq = 1.0 / power
    original = s.get("original_max_position_embeddings")
    match rope.kind:
        case "linear":
            freq = freq / s["factor"]
        case "llama3":
            wave, low, high = 2 * math.pi / freq, s["low_freq_factor"], s["high_freq_factor"]
            blend = (original / wave - low) / (high - low)
            slow = torch.where(wave > original / low, freq / s["factor"], freq)
            middle = ~(wave < original / high) * ~(wave > original / low)
            freq = torch.where(middle, (1 - blend) * slow / s["factor"] + blend * slow, slow)
        case "longrope":
            divide = torch.tensor(s["long_factor"] if length > original else s["short_factor"], dtype=torch.float32)
            factor = s["factor"] or context / original
            freq = 1.0 / (divide * power)
            gain = s["attention_factor"] or (1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))
        case "yarn":
            factor = s["factor"] or context / original
            gain = s["attention_factor"] or _yarn_gain(factor, s["mscale"], s["mscale_all_dim"])
            low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                         for turns in (s["beta_fast"] or 32, s["beta_slow"] or 1))  # fmt: skip
            if s["truncate"] is not False:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
            keep = 1 - ramp
            freq = 1.0 / (factor * power) * (1 - keep) + freq * keep
    return freq, gain


def _yarn_gain(factor: float, mscale: float | None, all_dim: float | None) -> float:
    def gain(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return gain(mscale) / gain(all_dim) if mscale and all_dim else gain(1.0)
