"""NF4 with double quantisation, byte for byte as bitsandbytes (0.50, CPU) stores it: 0.516 bytes a weight.

A weight is read in row-major order in blocks of 64. Each block is divided by its absmax and each value becomes one of 16
codes (quantiles of a normal distribution; Dettmers et al. 2023, arXiv 2305.14314), two to a byte, the first in the high nibble.
The absmax themselves lose their mean (`offset`) and are quantised in blocks of 256 to the 8-bit dynamic map
(Dettmers et al. 2021, arXiv 2110.02861) with one fp32 absmax a block. Each weight is quantised on its own, so that several may
later lie as row ranges of one buffer.

`reference_quantise` and `reference_dequantise` are the definition, whole arrays at a time; `quantise` and `dequantise` equal them
bit for bit in chunks that stay in cache.

What a nearest-value search gets wrong, and so differs from bitsandbytes in about one byte of some millions:
- a value is multiplied by the fp32 reciprocal of its block's absmax, but in the ragged last block it is divided;
- it is compared with the fp32 midpoints of the codes, and at a midpoint takes the lower code;
- an absmax is first put on a grid of 65,536 points over [-1, 1], and the grid point takes the nearest map value (at a midpoint the
  lower); the map is finer than the grid near zero, where the nearest value would be another one.

Shape letters: n weights, N blocks of 64, M blocks of 256 absmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK, NESTED_BLOCK = 64, 256
CODES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
ZERO = CODES.index(0.0)
TINY = 1e-38  # the floor under an absmax, so that a block of zeros does not divide by zero
GRID = 65536  # points over [-1, 1] that a scaled absmax is rounded to
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # weights worked on at once: on a CPU 1 MiB of fp32, which a core's cache holds


@dataclass(frozen=True, slots=True)
class NF4:
    """One quantised weight. The nested fields are None where the absmax are plain fp32: a file made without double quantisation."""

    codes: Tensor  # uint8 [ceil(n / 2)]
    absmax: Tensor  # uint8 [N], or fp32 [N] when not nested
    nested_absmax: Tensor | None  # fp32 [M]
    nested_map: Tensor | None  # fp32 [256]
    offset: Tensor | None  # fp32 [], or [M] where tensors with offsets of their own lie side by side
    shape: tuple[int, ...]
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.nested_map, self.offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


@cache
def code_map(device: torch.device) -> Tensor:
    """fp32 [16]"""
    return torch.tensor(CODES, device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """fp32 [256], ascending: signed, seven decades, each with twice the values of the one below; 0 and 1 exact, -1 absent."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _grid_codes(device: torch.device) -> Tensor:
    """uint8 [65536]: the map index of each point of the grid."""
    codes = dynamic_map(torch.device("cpu"))
    points = -1 + torch.arange(GRID, dtype=torch.float32) * 2 / (GRID - 1)
    return torch.bucketize(points, 0.5 * (codes[:-1] + codes[1:])).to(device, torch.uint8)


@cache
def _pairs(device: torch.device) -> Tensor:
    """int64 [256]: the two fp32 codes of a byte as one 8-byte word, so that one gather decodes both (little-endian)."""
    byte = torch.arange(256, device=device)
    return torch.stack([code_map(device)[byte >> 4], code_map(device)[byte & 15]], -1).contiguous().view(torch.int64).flatten()


def reference_quantise(weight: Tensor) -> NF4:
    """`weight` of any shape in fp32, bf16 or fp16 -> its NF4 form. The definition."""
    flat = weight.detach().reshape(-1).float()
    ragged = flat.numel() % BLOCK
    full, last = flat[: flat.numel() - ragged].view(-1, BLOCK), flat[flat.numel() - ragged :]
    absmax = full.abs().amax(-1)
    scaled = (full * (1 / absmax.clamp(min=TINY))[:, None]).flatten()
    if ragged:
        last_absmax = last.abs().max().clamp(min=TINY)
        absmax, scaled = torch.cat([absmax, last_absmax[None]]), torch.cat([scaled, last / last_absmax])
    codes = code_map(flat.device)
    index = torch.bucketize(scaled, (codes[:-1] + codes[1:]) / 2).to(torch.uint8)
    index = F.pad(index, (0, len(index) % 2), value=ZERO)
    return NF4(index[::2] << 4 | index[1::2], *_quantise_absmax(absmax), tuple(weight.shape))


def _quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 [N] -> codes uint8 [N], nested absmax fp32 [M], the map, the offset"""
    offset = absmax.cpu().mean().to(absmax.device)  # a sum's order differs by device: one device's order, so that the bits do not
    centred = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = centred.abs().amax(-1)
    scaled = (centred * (1 / nested)[:, None]).clamp(-1, 1)
    # (scaled + 1) / 2 * 65535 + 0.5 as one fused multiply-add, as bitsandbytes is compiled: exact in float64, rounded once to fp32
    point = (((scaled + 1) * 0.5).double() * (GRID - 1) + 0.5).float()
    codes = _grid_codes(absmax.device)[point.nan_to_num(0).long()]
    codes = torch.where(nested[:, None] == 0, 0, codes).flatten()[: len(absmax)]  # a block without spread: code 0 times 0
    return codes.to(torch.uint8), nested, dynamic_map(absmax.device).clone(), offset


def quantise(weight: Tensor) -> NF4:
    """`reference_quantise` in chunks: beyond the result it takes 10 bytes a weight of one chunk, and the absmax in fp32."""
    flat, device = weight.detach().reshape(-1), weight.device
    n = flat.numel()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=device)
    midpoints = ((code_map(device)[:-1] + code_map(device)[1:]) / 2).tolist()
    whole = n - n % BLOCK
    for start, end in _chunks(whole, BLOCK, device):
        blocks = flat[start:end].float().view(-1, BLOCK)
        block_absmax = blocks.abs().amax(-1)
        absmax[start // BLOCK : end // BLOCK] = block_absmax
        scaled = blocks * (1 / block_absmax.clamp(min=TINY))[:, None]
        # 15 comparisons, summed: 2.3 times as fast on a CPU as a binary search per element
        index = torch.zeros(end - start, dtype=torch.uint8, device=device).view(-1, BLOCK)
        above = torch.empty_like(index, dtype=torch.bool)
        for midpoint in midpoints:
            index += torch.gt(scaled, midpoint, out=above).view(torch.uint8)
        twins = index.view(torch.int16).flatten()  # low byte first (little-endian): the first of two codes
        packed[start // 2 : end // 2] = (twins << 4 | twins >> 8).to(torch.uint8)
    if whole < n:
        last = reference_quantise(flat[whole:])
        packed[whole // 2 :] = last.codes
        absmax[-1] = last.offset  # the mean of its one absmax
    return NF4(packed, *_quantise_absmax(absmax), tuple(weight.shape))


def absmax_of(q: NF4) -> Tensor:
    """The blocks' scales, fp32 [N]."""
    if q.nested_absmax is None or q.nested_map is None:
        return q.absmax.float()
    nested = q.nested_absmax.repeat_interleave(q.nested_block)[: len(q.absmax)]
    offset = q.offset
    if offset.numel() > 1:
        offset = offset.repeat_interleave(q.nested_block)[: len(q.absmax)]
    return q.nested_map[q.absmax.int()] * nested + offset  # two roundings, as bitsandbytes: no fused multiply-add


def reference_dequantise(q: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, computed in fp32 and rounded once to `dtype`. The definition."""
    index = torch.stack([q.codes >> 4, q.codes & 15], -1).flatten()[: q.numel].long()
    scale = absmax_of(q).repeat_interleave(q.block)[: q.numel]
    return (code_map(q.codes.device)[index] * scale).to(dtype).view(q.shape)


def dequantise(q: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference_dequantise` in chunks: two codes a gather. Beyond the result it takes 10 bytes a weight of one chunk."""
    out = torch.empty(q.numel, dtype=dtype, device=q.codes.device)
    scale = absmax_of(q)
    for start, end in _chunks(q.numel, q.block, out.device):
        out[start:end] = _decode_range(q, scale, start, end)
    return out.view(q.shape)


def _decode_range(q: NF4, scale_N: Tensor, start: int, end: int) -> Tensor:
    """Weights [start, end) of the flat order, fp32; `start` at a block's first weight."""
    values = _pairs(q.codes.device).index_select(0, q.codes[start // 2 : -(-end // 2)].int()).view(torch.float32)[: end - start]
    whole = len(values) - len(values) % q.block
    values[:whole].view(-1, q.block).mul_(scale_N[start // q.block : (start + whole) // q.block, None])
    values[whole:].mul_(scale_N[min(end // q.block, len(scale_N) - 1)])
    return values


def _chunks(n: int, block: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges that cover [0, n), each but the last of whole blocks."""
    step = CHUNK.get(device.type, CHUNK["cuda"]) // block * block
    for start in range(0, n, step):
        yield start, min(start + step, n)


# ---- the decode of a training step: into a buffer that lies ready, in 16 bits or in e4m3 -------------------------------------


def decode(q: NF4, out: Tensor) -> Tensor:
    """Writes the dense weight into `out` (any float dtype, any row stride), bit for bit as `dequantise`. Returns `out`."""
    return out.copy_(dequantise(q, out.dtype).view(out.shape))


def decode_fp8(q: NF4, scale_N: Tensor, out: Tensor) -> Tensor:
    """Writes e4m3 of w / scale, one fp32 scale an output row: `reference_decode_fp8`."""
    return out.copy_(reference_decode_fp8(q, scale_N))


def decode_fp8_transposed(q: NF4, scale_K: Tensor, out: Tensor) -> Tensor:
    """Writes the transpose of e4m3 of w / scale, one fp32 scale an input column: `reference_decode_fp8_transposed`."""
    return out.copy_(reference_decode_fp8_transposed(q, scale_K))


def reference_decode_fp8(q: NF4, scale_N: Tensor) -> Tensor:
    """e4m3 [N, K]: the fp32 weight times the fp32 reciprocal of its row's scale, rounded to nearest even by torch's cast.

    Times the reciprocal, not divided: an IEEE division a weight would cost more than reading it. The two differ in the last bit of
    fp32, which the 4 bits that are kept see about once in a million weights.
    """
    return (dequantise(q) * (1 / scale_N)[:, None]).to(torch.float8_e4m3fn)


def reference_decode_fp8_transposed(q: NF4, scale_K: Tensor) -> Tensor:
    """e4m3 [K, N]: as `reference_decode_fp8`, with one scale an input column, transposed."""
    return (dequantise(q) * (1 / scale_K)).t().contiguous().to(torch.float8_e4m3fn)


def absmax_rows_columns(q: NF4) -> tuple[Tensor, Tensor]:
    """The largest |w| of each output row and of each input column, fp32 [N] and [K]. Once a weight, at load; rows in chunks."""
    rows, columns = q.shape
    row_max = torch.empty(rows, device=q.codes.device)
    column_max = torch.zeros(columns, device=q.codes.device)
    scale = absmax_of(q)
    step = max(1, CHUNK.get(row_max.device.type, CHUNK["cuda"]) // columns // q.block) * q.block  # whole blocks, whatever K is
    for start in range(0, rows, step):
        end = min(start + step, rows)
        size = _decode_range(q, scale, start * columns, end * columns).abs_().view(-1, columns)
        torch.amax(size, 1, out=row_max[start:end])
        torch.maximum(column_max, size.amax(0), out=column_max)
    return row_max, column_max
