"""NF4: the fast path equals its definition bit for bit, takes 0.516 bytes a weight and no temporary of the weight's size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.ops import nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a: nf4.NF4, b: nf4.NF4) -> bool:
    fields = ("codes", "absmax", "nested_absmax", "nested_map", "offset")
    return a.shape == b.shape and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


@given(
    st.integers(1, 3 * nf4.BLOCK * nf4.NESTED_BLOCK // 2),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
    st.sampled_from([1e-4, 1.0, 30.0]),
)
@settings(max_examples=40, deadline=None)
def test_fast_equals_reference_at_any_size(n, dtype, seed, scale):
    weight = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    q = nf4.quantise(weight)
    assert same(q, nf4.reference_quantise(weight))
    for out in DTYPES:
        assert torch.equal(nf4.dequantise(q, out), nf4.reference_dequantise(q, out))


@pytest.mark.parametrize("n", [nf4.CHUNK["cpu"] - 64, nf4.CHUNK["cpu"] + 1, 2 * nf4.CHUNK["cpu"] + 64 * 3 + 7])
def test_fast_equals_reference_across_chunks(n):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(n))
    q = nf4.quantise(weight)
    assert same(q, nf4.reference_quantise(weight))
    assert torch.equal(nf4.dequantise(q), nf4.reference_dequantise(q))


def test_every_byte_decodes_to_its_two_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    q = nf4.NF4(codes, torch.ones(8), None, None, None, (8, 64))
    wanted = torch.tensor(nf4.CODES)
    assert torch.equal(nf4.dequantise(q).flatten()[::2], wanted[codes.long() >> 4])
    assert torch.equal(nf4.dequantise(q).flatten()[1::2], wanted[codes.long() & 15])


def test_a_weight_keeps_its_code_after_a_round_trip():
    """Decoding and encoding again with the same absmax gives the same codes: each code lies in its own interval."""
    weight = torch.randn(64, 256)
    q = nf4.quantise(weight)
    assert torch.equal(nf4.quantise(nf4.dequantise(q)).codes, q.codes)


def test_bytes_per_weight():
    """0.5 for the code, 1/64 for its block's absmax, 4/(64 x 256) for the nested one; the map and the offset once a weight."""
    q = nf4.quantise(torch.randn(1024, 2048))
    n = q.numel
    assert n // 2 + n // 64 + 4 * n // (64 * 256) + 1024 + 4 == q.nbytes
    assert (q.nbytes - 1028) / n == pytest.approx(0.5159, abs=1e-4)


def test_halves_lie_in_one_buffer():
    """Q, K, V are quantised each on its own and may be ranges of one buffer: a view decodes as its own tensor does."""
    parts = [nf4.quantise(torch.randn(rows, 128)) for rows in (64, 32, 32)]
    joined = torch.cat([p.codes for p in parts])
    start = 0
    for p in parts:
        view = nf4.NF4(joined[start : start + len(p.codes)], p.absmax, p.nested_absmax, p.nested_map, p.offset, p.shape)
        assert torch.equal(nf4.dequantise(view), nf4.dequantise(p))
        start += len(p.codes)


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor any operation makes, views of the given one aside."""

    def __init__(self, given):
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_the_weights_size(dtype):
    weight = torch.randn(4096, 512).to(dtype)  # 2 M weights, 8 chunks
    with LargestResult(weight) as quantising:
        q = nf4.quantise(weight)
    assert quantising.bytes <= max(4 * nf4.CHUNK["cpu"], q.codes.numel())
    with LargestResult(weight) as decoding:
        dense = nf4.dequantise(q, dtype)
    assert decoding.bytes <= max(4 * nf4.CHUNK["cpu"], dense.numel() * dense.element_size())


# ---- the kernels ----------------------------------------------------------------------------------------------------------------

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (7, 13), (5, 70), (4, 128), (3, 2128), (2, 4096)]
ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


def stores(shape, device):
    """One weight in each form: nested, plain absmax, an offset a nested block, blocks of 128."""
    q = nf4.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device))
    m = len(q.nested_absmax)
    yield q
    yield nf4.NF4(q.codes, nf4.absmax_of(q), None, None, None, q.shape)
    offsets = q.offset + torch.arange(m, device=device) * 0.01
    yield nf4.NF4(q.codes, q.absmax, q.nested_absmax, q.nested_map, offsets, q.shape)
    blocks = -(-q.numel // 128)
    yield nf4.NF4(q.codes, q.absmax[:blocks], q.nested_absmax, q.nested_map, q.offset, q.shape, block=128)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_decodes_bit_for_bit(kernels, padded, shape, dtype):
    for q in stores(shape, kernels):
        wanted = nf4.dequantise(q, dtype)
        assert torch.equal(nf4.decode(q, torch.full_like(wanted, torch.nan)), wanted)
        out = padded(torch.full_like(wanted, torch.nan))
        assert nf4.decode(q, out) is out and torch.equal(out, wanted)


def test_every_absmax_code_is_scaled_in_two_roundings(kernels):
    """All 256 codes of the absmax; a fused multiply-add would change a third of the weights."""
    weight = torch.randn(256, 64, device=kernels)
    q = nf4.quantise(weight)
    q = nf4.NF4(q.codes, torch.arange(256, device=kernels, dtype=torch.uint8), q.nested_absmax, q.nested_map, q.offset, (256, 64))
    fused = (q.nested_map.double() * q.nested_absmax.double() + q.offset.double()).float()
    assert (fused != nf4.absmax_of(q)).any(), "the case cannot tell"
    assert torch.equal(nf4.decode(q, torch.empty_like(weight)), nf4.dequantise(q))


def test_offsets_of_parts_that_lie_side_by_side(kernels):
    """Three weights of whole nested blocks, each quantised on its own, decoded as one."""
    parts = [nf4.quantise(torch.randn(rows, 256, device=kernels)) for rows in (128, 64, 64)]
    joined = [torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "absmax", "nested_absmax")]
    offsets = torch.cat([p.offset.expand(len(p.nested_absmax)) for p in parts])
    q = nf4.NF4(*joined, parts[0].nested_map, offsets, (256, 256))
    wanted = torch.cat([nf4.dequantise(p) for p in parts])
    assert torch.equal(nf4.dequantise(q), wanted) and torch.equal(nf4.reference_dequantise(q), wanted)
    assert torch.equal(nf4.decode(q, torch.empty_like(wanted)), wanted)


@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (4, 128), (3, 1072), (130, 192)], ids=str)
def test_the_kernels_decode_to_e4m3_and_transposed(kernels, padded, same_e4m3, shape):
    for q in stores(shape, kernels):
        rows, columns = nf4.absmax_rows_columns(q)
        rows, columns = rows.clamp(min=1e-12) / 448, columns.clamp(min=1e-12) / 448
        dense = nf4.dequantise(q)
        out = padded(torch.zeros(shape, device=kernels).to(E4M3))
        assert nf4.decode_fp8(q, rows, out) is out
        assert same_e4m3(out, dense * (1 / rows)[:, None])
        out = padded(torch.zeros(shape[::-1], device=kernels).to(E4M3))
        assert nf4.decode_fp8_transposed(q, columns, out) is out
        assert same_e4m3(out, (dense * (1 / columns)).t())


@pytest.mark.parametrize("shape", [(7, 13), (130, 70), (300, 1024)], ids=str)
def test_the_largest_of_rows_and_columns(shape, monkeypatch):
    monkeypatch.setitem(nf4.CHUNK, "cpu", 1 << 13)
    q = nf4.quantise(torch.randn(shape))
    dense = nf4.dequantise(q).abs()
    rows, columns = nf4.absmax_rows_columns(q)
    assert torch.equal(rows, dense.amax(1)) and torch.equal(columns, dense.amax(0))
