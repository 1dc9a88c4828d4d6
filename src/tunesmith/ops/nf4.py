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

from tunesmith.ops import backend
from tunesmith.ops.backend import jit, tl

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
    if not backend.triton_for(q.codes):
        return out.copy_(dequantise(q, out.dtype).view(out.shape))
    return _decode(q, None, out)


def dense(q: NF4, dtype: torch.dtype) -> Tensor:
    """A new dense weight, by the fastest way there is."""
    if backend.triton_for(q.codes):
        return decode(q, torch.empty(q.shape, dtype=dtype, device=q.codes.device))
    return dequantise(q, dtype)


def decode_fp8(q: NF4, scale_N: Tensor, out: Tensor) -> Tensor:
    """Writes e4m3 of w / scale, one fp32 scale an output row: `reference_decode_fp8`."""
    if not backend.triton_for(q.codes, backend.NEEDS_FP8):
        return out.copy_(reference_decode_fp8(q, scale_N))
    return _decode(q, scale_N, out)


def decode_fp8_transposed(q: NF4, scale_K: Tensor, out: Tensor) -> Tensor:
    """Writes the transpose of e4m3 of w / scale, one fp32 scale an input column: `reference_decode_fp8_transposed`."""
    rows, columns = q.shape
    nibbles = _word(q, columns, 1)
    if not backend.triton_for(q.codes, backend.NEEDS_FP8) or not nibbles:
        return out.copy_(reference_decode_fp8_transposed(q, scale_K))
    assert out.shape == (columns, rows) and out.stride(1) == 1
    tiles = -(-rows // TILE_N) * -(-columns // TILE_K)
    _decode_transposed_kernel[(tiles,)](
        *_buffers(q, nibbles), scale_K, out, rows, columns, out.stride(0), *_format(q), NIBBLES=nibbles,
        SHARE=q.block // nibbles if columns % q.block == 0 and TILE_K % q.block == 0 else 1, TILE_N=TILE_N, TILE_K=TILE_K,
        DEEP=DEEP, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def reference_decode_fp8(q: NF4, scale_N: Tensor) -> Tensor:
    """e4m3 [N, K]: the code's value times (absmax of its block times the reciprocal of its row's scale), all fp32, rounded to
    nearest even by torch's cast.

    Times the reciprocal and block by block: a division or a second product a weight would cost more than reading it. What differs
    is the last bits of fp32, which the 4 bits that are kept see about once in a million weights.
    """
    index = torch.stack([q.codes >> 4, q.codes & 15], -1).flatten()[: q.numel].long().view(q.shape)
    size = absmax_of(q).repeat_interleave(q.block)[: q.numel].view(q.shape) * (1 / scale_N)[:, None]
    return (code_map(q.codes.device)[index] * size).to(torch.float8_e4m3fn)


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


# ---- Triton ---------------------------------------------------------------------------------------------------------------------
# A thread reads a word of codes and writes its weights as one 16-byte store: 8 codes become 8 numbers of 16 bits, 16 become 16 of
# e4m3. So what a thread reads is what it writes, nothing crosses threads, and reads and writes both run over whole lines. A code's
# value is gathered from a table of 16 fp32 that a program lays into shared memory, whose addresses are 32 bits wide: of 5
# instructions a look-up that leaves 4. Launched without fused multiply-add, which would round map * nested + offset once where the
# format rounds twice.
#
# To e4m3 a thread of `_decode_kernel` has two words, and a row's scale is multiplied into its blocks': 13 instructions a weight in
# the code for sm_90, the division's rare branches counted, where one word and a product a weight took 21.

TILE = 2048  # weights a program of 4 warps: 16 a thread; divides the 4096 and 14336 columns of Mistral-7B
WARPS_FP8 = 2  # to e4m3: 32 a thread; 3.5 TB/s on an H200, where 4 warps reach 2.9
TILE_N, TILE_K = 128, 64  # rows, columns of a transposed tile: 128 bytes of a row of the result, a sector of codes;
#                         1.85 TB/s on an H200, where 128 x 128 reach 1.65
DEEP, WARPS = 4, 4  # see its kernel


def _decode(q: NF4, scale_N: Tensor | None, out: Tensor) -> Tensor:
    """`decode`, or with scales `decode_fp8`. One launch."""
    whole = out.is_contiguous() and scale_N is None  # one row, whatever the shape
    rows, columns = (1, q.numel) if whole else q.shape
    nibbles = _word(q, columns, out.element_size(), rows == 1)
    if not nibbles:  # rows of odd length begin in the middle of a byte
        source = dequantise(q, out.dtype) if scale_N is None else reference_decode_fp8(q, scale_N)
        return out.copy_(source.view(out.shape))
    assert whole or (out.shape == q.shape and out.stride(1) == 1)
    tile = min(TILE, backend.round_up(columns))
    chunks = -(-columns // tile)
    _decode_kernel[(rows * chunks,)](
        *_buffers(q, nibbles), q.absmax if scale_N is None else scale_N, out, columns, 0 if whole else out.stride(0), chunks,
        *_format(q), SCALED=scale_N is not None, NIBBLES=nibbles, WORDS=max(1, tile // nibbles),
        num_warps=4 if scale_N is None else WARPS_FP8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _word(q: NF4, columns: int, size: int, one_row: bool = False) -> int:
    """Codes in a word, so that a word's weights fill 16 bytes where rows are whole words; 0 if even bytes will not do."""
    nibbles = 16 if size == 1 else 8
    if columns % nibbles == 0 and q.codes.data_ptr() % 8 == 0:
        return nibbles
    return 2 if one_row or columns % 2 == 0 else 0


def _buffers(q: NF4, nibbles: int) -> tuple[Tensor, ...]:
    """The pointers of a kernel; what a weight without nested scales lacks is filled by one that is not read."""
    words = q.codes.view({2: torch.uint8, 8: torch.int32, 16: torch.int64}[nibbles])
    nested = (q.absmax,) * 3 if q.nested_absmax is None else (q.nested_absmax, q.nested_map, q.offset)
    return words, q.absmax, *nested, code_map(q.codes.device)


def _format(q: NF4) -> tuple[int, int, bool, bool]:
    """BLOCK, NESTED_BLOCK, NESTED, OFFSETS"""
    nested = q.nested_absmax is not None
    return q.block, q.nested_block, nested, nested and q.offset.numel() > 1


@jit
def _block_scale(block, mask, absmax, nested_absmax, nested_map, offset,
                 NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr):  # fmt: skip
    """fp32 scale of each block, as `absmax_of`."""
    scale = tl.load(absmax + block, mask, other=0)
    if not NESTED:
        return scale.to(tl.float32)
    group = block // NESTED_BLOCK
    value = tl.load(nested_map + scale.to(tl.int32), mask, other=0)
    scale = value * tl.load(nested_absmax + group, mask, other=0)
    if OFFSETS:
        return scale + tl.load(offset + group, mask, other=0)
    return scale + tl.load(offset)


@jit
def _decode_kernel(words, absmax, nested_absmax, nested_map, offset, table, scale, out, columns, stride, chunks,
                   BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr,
                   SCALED: tl.constexpr, NIBBLES: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """WORDS words of one row, [WORDS, NIBBLES] weights; `stride` between rows of `out`."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * (WORDS * NIBBLES)  # column
    start = row * columns + first  # in the flat order
    left = tl.minimum(columns - first, WORDS * NIBBLES).to(tl.int32)  # columns of this tile
    word = tl.arange(0, WORDS)
    nibble = tl.arange(0, NIBBLES)
    here = word * NIBBLES < left
    packed = tl.load(words + start // NIBBLES + word, here, other=0)
    block = (start // BLOCK).to(tl.int32) + ((start % BLOCK).to(tl.int32) + word * NIBBLES) // BLOCK
    size = _block_scale(block, here, absmax, nested_absmax, nested_map, offset, NESTED_BLOCK, NESTED, OFFSETS)
    shift = (nibble ^ 1) * 4  # little-endian: a byte's high nibble comes first
    if SCALED:
        size = size * tl.div_rn(1.0, tl.load(scale + row))
    code = (packed[:, None] >> shift[None, :].to(packed.dtype)) & 15
    value = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape(code.to(tl.int32), [WORDS * NIBBLES]), 0)
    value = tl.reshape(value, [WORDS, NIBBLES]) * size[:, None]
    at = word[:, None] * NIBBLES + nibble[None, :]
    tl.store(out + row * stride + first + at, value.to(out.dtype.element_ty), at < left)


@jit
def _decode_transposed_kernel(words, absmax, nested_absmax, nested_map, offset, table, scale, out, rows, columns, stride,
                              BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr,
                              NIBBLES: tl.constexpr, SHARE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                              DEEP: tl.constexpr):  # fmt: skip
    """A tile of the weight as [DEEP, TILE_N / DEEP, TILE_K], stored along N. Triton 3.7 carries the layout of the stores back to
    the words of codes: those cross shared memory, and a thread decodes what it stores (DEEP 4 and 16 take the same time).
    `SHARE`: words of one scale.
    """
    WORDS: tl.constexpr = TILE_K // NIBBLES
    LINES: tl.constexpr = TILE_N // DEEP
    tiles_k = tl.cdiv(columns, TILE_K)
    first_n = tl.program_id(0) // tiles_k * TILE_N
    first_k = tl.program_id(0) % tiles_k * TILE_K
    n = first_n + tl.arange(0, LINES)[None, :, None] * DEEP + tl.arange(0, DEEP)[:, None, None]
    line = n.to(tl.int64) * (columns // NIBBLES)  # in words
    word = first_k // NIBBLES + tl.arange(0, WORDS)[None, None, :]
    packed = tl.load(words + line + word, (n < rows) & (word * NIBBLES < columns), other=0)
    word = first_k // NIBBLES + tl.arange(0, WORDS // SHARE)[None, None, :] * SHARE
    block = ((line + word) // (BLOCK // NIBBLES)).to(tl.int32)
    size = _block_scale(block, (n < rows) & (word * NIBBLES < columns), absmax, nested_absmax, nested_map, offset,
                        NESTED_BLOCK, NESTED, OFFSETS)  # fmt: skip
    size = tl.reshape(tl.broadcast_to(size[:, :, :, None], [DEEP, LINES, WORDS // SHARE, SHARE]), [DEEP, LINES, WORDS])
    shift = (tl.arange(0, NIBBLES) ^ 1) * 4
    code = (packed[:, :, :, None] >> shift[None, None, None, :].to(packed.dtype)) & 15
    flat = tl.reshape(code.to(tl.int32), [TILE_N * TILE_K])
    value = tl.gather(tl.load(table + tl.arange(0, 16)), flat, 0)
    value = tl.reshape(value, [DEEP, LINES, WORDS, NIBBLES]) * size[:, :, :, None]
    k = first_k + tl.arange(0, TILE_K)
    inverse = tl.div_rn(1.0, tl.load(scale + k, k < columns, other=1.0))
    value = tl.reshape(value, [DEEP, LINES, TILE_K]) * inverse[None, None, :]
    turned = tl.reshape(tl.permute(value.to(out.dtype.element_ty), [2, 1, 0]), [TILE_K, TILE_N])
    n_out = first_n + tl.arange(0, TILE_N)
    to = out + k.to(tl.int64)[:, None] * stride + n_out[None, :]
    tl.store(to, turned, (k < columns)[:, None] & (n_out < rows)[None, :])
