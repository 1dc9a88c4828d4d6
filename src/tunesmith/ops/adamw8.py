"""AdamW of one tensor in one pass over it: both averages in 8 bits, a bf16 weight rounded stochastically.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        w <- (1 - rate decay) w - rate m^ / (sqrt(v^) + eps)

An average is a code and one float32 scale, its largest size, for 256 numbers: 1.016 bytes. Codes stand for squares, so that what is
small beside its block keeps some of its digits, and reading one is two multiplications where a table would be a gather:

    m   scale (k / 127)^2 with k's sign, k = -127 .. 127        v   scale (k / 256)^2, k = 1 .. 256

v is never read as 0, which would make the step of a weight with a small gradient boundless: below 1/65,536 of its block's largest
it counts as that, and the step is smaller than AdamW's. Scales below TINY are 0.

All three roundings are stochastic, up with the probability of the distance from below, so none has a bias. Rounded to the nearest,
a step under 0.2 % of a bf16 weight would be lost, and v, which moves by a thousandth of itself a step (b2 = 0.999) while codes are
0.8 % apart at best, would never fall. What it costs is noise: a bf16 weight that moves by d a step gains a variance of at most d
times the distance of its neighbours (1/256 to 1/128 of it) each step. The random bits are a hash of the place in the tensor and two
keys; no generator's state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

BLOCK = 256  # numbers with a scale of their own
ROWS = 8  # blocks of a program: 2,048 numbers, 16 a thread of 4 warps
CHUNK = 1 << 20  # numbers at once in the reference, which writes every step of it out: 100 MB
TINY = 1e-30
MASK = 0xFFFFFFFF
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # 2^32 / golden ratio; lowbias32 (Wellons 2018)


@dataclass(frozen=True, slots=True)
class Averages:
    """m and v of a tensor of n numbers."""

    m: Tensor  # int8 [n]
    v: Tensor  # uint8 [n], k - 1
    m_scale: Tensor  # float32 [ceil(n / BLOCK)]
    v_scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Averages:
        """Zero, for this weight."""
        n, device = weight.numel(), weight.device
        scales = (torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device) for _ in range(2))
        return cls(
            torch.zeros(n, dtype=torch.int8, device=device), torch.zeros(n, dtype=torch.uint8, device=device), *scales
        )  # fmt: skip

    def read(self) -> tuple[Tensor, Tensor]:
        """(m, v) in float32 [n]."""
        n = len(self.m)
        m_scale, v_scale = (s.repeat_interleave(BLOCK)[:n] for s in (self.m_scale, self.v_scale))
        return _read(self.m, self.v, m_scale, v_scale)


@dataclass(frozen=True, slots=True)
class How:
    """What all tensors of a step share."""

    rate: float
    betas: tuple[float, float]
    decay: float = 0.0
    eps: float = 1e-8


def update_(weight: Tensor, gradient: Tensor, averages: Averages, how: How, norm: Tensor, correction: Tensor, keys: Tensor) -> None:
    """One step in place; nothing of it where `norm`, a float32 scalar on the device, is nan or inf.

    `weight` and `gradient`: bf16 or float32, both contiguous. `correction` float32 [2]: 1 / (1 - b1^t) and 1 / sqrt(1 - b2^t).
    `keys` int32 [2]: where the random bits come from, other ones at every step and for every tensor.
    """
    if not backend.triton_for(weight):
        reference_update_(weight, gradient, averages, how, norm, correction, keys)
        return
    assert weight.is_contiguous() and gradient.is_contiguous() and weight.numel() < 1 << 31
    wide, n = weight.dtype is torch.float32, weight.numel()
    weight, gradient = (t.detach() if wide else t.detach().view(torch.int16) for t in (weight, gradient))
    b1, b2 = how.betas
    if n:
        _update_kernel[(-(-n // (ROWS * BLOCK)),)](
            weight, gradient, averages.m, averages.v, averages.m_scale, averages.v_scale, norm, correction, keys, n,
            how.rate, 1 - how.rate * how.decay, b1, 1 - b1, b2, 1 - b2, how.eps, WIDE=wide, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@torch.no_grad()
def reference_update_(
    weight: Tensor, gradient: Tensor, averages: Averages, how: How, norm: Tensor, correction: Tensor, keys: Tensor
) -> None:
    """The definition, CHUNK numbers at a time."""
    (b1, b2), finite = how.betas, torch.isfinite(norm)
    weight, gradient = weight.detach().view(-1), gradient.detach().reshape(-1)
    for start in range(0, weight.numel(), CHUNK):
        at = slice(start, min(start + CHUNK, weight.numel()))
        scales = slice(start // BLOCK, -(-at.stop // BLOCK))
        m, v = Averages(averages.m[at], averages.v[at], averages.m_scale[scales], averages.v_scale[scales]).read()
        g = gradient[at].float()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        step = how.rate * (m * correction[0]) / (v.sqrt() * correction[1] + how.eps)
        w = weight[at].float() * (1 - how.rate * how.decay) - step
        place = torch.arange(at.start, at.stop, device=weight.device)
        first, second = random_bits(place, keys)
        m_code, m_scale = _codes_m(m, first >> 16)
        v_code, v_scale = _codes_v(v, second >> 16)
        if weight.dtype is torch.bfloat16:
            w = round_(w, second & 0xFFFF)
        for old, new in (
            (weight[at], w), (averages.m[at], m_code), (averages.v[at], v_code),
            (averages.m_scale[scales], m_scale), (averages.v_scale[scales], v_scale),
        ):  # fmt: skip
            old.copy_(torch.where(finite, new.to(old.dtype), old))


def random_bits(place: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Two times 32 bits for each place, in int64."""
    k = keys.to(torch.int64) & MASK
    first = _mixed((place * GOLDEN + k[0]) & MASK)
    return first, _mixed(first ^ k[1])


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = ((x ^ (x >> 15)) * SECOND) & MASK
    return x ^ (x >> 16)


def round_(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16, up with the probability of the distance: 16 random bits are added below the last that stays."""
    whole = ((x.view(torch.int32).to(torch.int64) & MASK) + bits) >> 16 << 16
    return whole.to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _read(m: Tensor, v: Tensor, m_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
    m, v = m.float(), v.float() + 1
    return m * m.abs() * (m_scale * (1 / 127**2)), v * v * (v_scale * (1 / 256**2))


def _scales(x: Tensor) -> Tensor:
    top = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK).amax(1)
    return torch.where(top >= TINY, top, 0)


def _squares(x: Tensor, scale: Tensor, most: int) -> Tensor:
    """x in units of a code's square: 0 .. most^2."""
    inverse = torch.where(scale > 0, most**2 / scale.clamp(min=TINY), 0)
    return x * inverse.repeat_interleave(BLOCK)[: len(x)]


def _rounded(y: Tensor, least: int, most: int, bits: Tensor) -> Tensor:
    """The code whose square is y, of the two nearest by chance."""
    low = y.sqrt().floor().clamp(least, most - 1)
    return low + ((bits.float() + 0.5) * (1 / 65536) * (2 * low + 1) < y - low * low)


def _codes_m(m: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scales(m.abs())
    code = _rounded(_squares(m.abs(), scale, 127), 0, 127, bits)
    return torch.where(m < 0, -code, code), scale


def _codes_v(v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scales(v)
    return _rounded(_squares(v, scale, 256), 1, 256, bits) - 1, scale


# ---- Triton: a program takes ROWS blocks ----------------------------------------------------------------------------------------
# bf16 passes as int16, the upper half of an fp32: the kernel rounds it itself. A step reads 6 bytes a weight and writes 4.


@jit
def _mixed_bits(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _update_kernel(
    weight, gradient, m_codes, v_codes, m_scales, v_scales, norm, correction, keys, count,
    rate, shrink, b1, rest_1, b2, rest_2, eps, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.abs(tl.load(norm)) < float("inf"):  # nan is not
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        here, there = at < count, block * BLOCK < count
        w, g = tl.load(weight + at, here, other=0), tl.load(gradient + at, here, other=0)
        if not WIDE:
            w = (w.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        m, v = tl.load(m_codes + at, here, other=0).to(tl.float32), tl.load(v_codes + at, here, other=0).to(tl.float32) + 1
        m = m * tl.abs(m) * (tl.load(m_scales + block, there, other=0) * (1 / 16129))[:, None]
        v = v * v * (tl.load(v_scales + block, there, other=0) * (1 / 65536))[:, None]
        m = b1 * m + rest_1 * g
        v = b2 * v + rest_2 * (g * g)
        step = rate * (m * tl.load(correction)) / (tl.sqrt(v) * tl.load(correction + 1) + eps)
        w = w * shrink - step

        first_key = tl.load(keys).to(tl.uint32, bitcast=True)
        second_key = tl.load(keys + 1).to(tl.uint32, bitcast=True)
        first = _mixed_bits(at.to(tl.uint32) * 0x9E3779B9 + first_key)
        second = _mixed_bits(first ^ second_key)
        if WIDE:
            tl.store(weight + at, w, here)
        else:
            bits = (w.to(tl.uint32, bitcast=True) + (second & 0xFFFF)) >> 16
            tl.store(weight + at, bits.to(tl.int16), here)

        most = tl.max(tl.where(here, tl.abs(m), 0.0), 1)
        most = tl.where(most >= 1e-30, most, 0.0)
        tl.store(m_scales + block, most, there)
        inverse = tl.where(most > 0, 16129 / tl.maximum(most, 1e-30), 0.0)
        y = tl.abs(m) * inverse[:, None]
        low = tl.minimum(tl.floor(tl.sqrt(y)), 126.0)
        chance = ((first >> 16).to(tl.float32) + 0.5) * (1 / 65536)
        code = low + tl.where(chance * (2 * low + 1) < y - low * low, 1.0, 0.0)
        tl.store(m_codes + at, tl.where(m < 0, -code, code).to(tl.int32).to(tl.int8), here)

        most = tl.max(tl.where(here, v, 0.0), 1)
        most = tl.where(most >= 1e-30, most, 0.0)
        tl.store(v_scales + block, most, there)
        inverse = tl.where(most > 0, 65536 / tl.maximum(most, 1e-30), 0.0)
        y = v * inverse[:, None]
        low = tl.minimum(tl.maximum(tl.floor(tl.sqrt(y)), 1.0), 255.0)
        chance = ((second >> 16).to(tl.float32) + 0.5) * (1 / 65536)
        code = low + tl.where(chance * (2 * low + 1) < y - low * low, 1.0, 0.0)
        tl.store(v_codes + at, (code - 1).to(tl.int32).to(tl.uint8), here)
