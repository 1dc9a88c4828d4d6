"""NF4 with double quantisation, byte for byte as bitsandbytes stores it: 0.516 bytes a weight.

A weight is read in row-major order in blocks of 64. Each block is divided by its absmax and each value becomes one of 16
codes (quantiles of a normal distribution; Dettmers et al. 2023, arXiv 2305.14314), two to a byte, the first in the high nibble.
The absmax themselves lose their mean (`offset`) and are quantised in blocks of 256 to the 8-bit dynamic map
(Dettmers et al. 2021, arXiv 2110.02861) with one fp32 absmax a block. Each weight is quantised on its own, so that several may
later lie as row ranges of one buffer.

`reference_quantise` and `reference_dequantise` are the definition; `quantise` and `dequantise` equal them bit for bit, in chunks
that stay in cache and take little memory.

The rule at a tie, which a nearest-value search cannot know: a value exactly at the fp32 midpoint of two codes takes the lower
code, in both maps; and a value is multiplied by the reciprocal of its block's absmax (rounded once more than a division would),
except in the ragged last block, which is divided. One wrong choice in these moves about one byte in 8 million.

Shape letters: n weights, N blocks of 64, M blocks of 256 absmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
CODES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
CHUNK = 1 << 18  # weights worked on at once: 1 MiB of fp32, which stays in a core's second-level cache
TINY = 1e-38  # bitsandbytes' floor under an absmax, so that a block of zeros does not divide by zero


@dataclass(frozen=True, slots=True)
class NF4:
    """One quantised weight. `nested_absmax` is None when the absmax are plain fp32 (a file made without double quantisation)."""

    codes: Tensor  # uint8 [ceil(n / 2)]
    absmax: Tensor  # uint8 [N], or fp32 [N] when not nested
    nested_absmax: Tensor | None  # fp32 [M]
    nested_map: Tensor | None  # fp32 [256]
    offset: Tensor | None  # fp32 []
    shape: tuple[int, ...]
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@cache
def code_map(device: torch.device) -> Tensor:
    """fp32 [16]"""
    return torch.tensor(CODES, device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """fp32 [256]: signed, seven decades, more fraction bits in the larger ones; 0 and 1 exact.

    The lowest value is -1, not the formula's -0.99297: bitsandbytes' CPU quantiser writes it there, into the map it then saves.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-m for m in means]
    values.sort()
    return torch.tensor([-1.0, *values[1:]], dtype=torch.float32, device=device)


def _absmax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(-1)


def reference_quantise(weight: Tensor) -> NF4:
    """`weight` of any shape in fp32, bf16 or fp16 -> its NF4 form. The definition: whole arrays, one line a step."""
    flat = weight.detach().reshape(-1).float()
    ragged = flat.numel() % BLOCK
    full, last = flat[: flat.numel() - ragged].view(-1, BLOCK), flat[flat.numel() - ragged :]
    absmax = _absmax(full)
    scaled = (full * (1 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1).flatten()
    if ragged:
        last_absmax = last.abs().max().clamp(min=TINY)
        absmax, scaled = torch.cat([absmax, last_absmax[None]]), torch.cat([scaled, (last / last_absmax).clamp(-1, 1)])
    codes = code_map(flat.device)
    index = torch.bucketize(scaled, (codes[:-1] + codes[1:]) / 2).to(torch.uint8)
    if len(index) % 2:
        index = torch.cat([index, index.new_full((1,), CODES.index(0.0))])
    return NF4(index[::2] << 4 | index[1::2], *_quantise_absmax(absmax), tuple(weight.shape))


def _quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 [N] -> (uint8 [N], fp32 [M], the map, the offset)"""
    codes, offset = dynamic_map(absmax.device), absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = _absmax(padded)
    scaled = (padded * (1 / nested)[:, None]).flatten()[: len(centred)].clamp(-1, 1)
    right = torch.searchsorted(codes, scaled).clamp(1, 255)
    nearer_right = (codes[right] - scaled).abs() < (scaled - codes[right - 1]).abs()
    index = torch.where(scaled <= codes[0], 0, right - 1 + nearer_right.long())
    index = torch.where(nested.repeat_interleave(NESTED_BLOCK)[: len(centred)] == 0, 0, index)
    return index.to(torch.uint8), nested, codes, offset


def reference_dequantise(q: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, computed in fp32 and rounded once to `dtype`. The definition."""
    index = torch.stack([q.codes >> 4, q.codes & 15], -1).flatten()[: q.numel].long()
    scale = absmax_of(q).repeat_interleave(q.block)[: q.numel]
    return (code_map(q.codes.device)[index] * scale).to(dtype).view(q.shape)


def absmax_of(q: NF4) -> Tensor:
    """The blocks' scales, fp32 [N]."""
    if q.nested_absmax is None:
        return q.absmax.float()
    nested = q.nested_absmax.repeat_interleave(q.nested_block)[: len(q.absmax)]
    return q.nested_map[q.absmax.long()] * nested + q.offset


quantise, dequantise = reference_quantise, reference_dequantise
