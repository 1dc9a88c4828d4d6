"""bitsandbytes as the oracle for NF4: codes, both absmax, offset, maps and decoded weights, bit for bit on the CPU.

Odd row lengths send bitsandbytes through torch.compile, which is switched off here (it would take a minute and decode the same).
"""

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.models.linear import NF4Linear
from tunesmith.ops import nf4

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = {"fast": nf4.quantise, "reference": nf4.reference_quantise}


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def check(weight, quantise=nf4.quantise):
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    q = quantise(weight)
    assert torch.equal(q.codes, codes.flatten())
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(q.nested_absmax, state.state2.absmax)
    assert torch.equal(q.nested_map, state.state2.code)
    assert torch.equal(q.offset, state.offset)
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(bits(nf4.dequantise(q, dtype)), bits(bnb.dequantize_4bit(codes, state)))
    return q


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 64), (5, 63), (65,), (300, 301), (256, 448), (16448,), (41, 1000)], ids=str)
def test_any_size(shape, path):
    for dtype in DTYPES:
        check(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), PATHS[path])


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_huge_and_tiny(scale):
    check(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * scale)


def test_below_the_smallest_normal_number():
    """The codes are bitsandbytes'. What they decode to is the definition's: processors with bf16 units make zeros of it there."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 1e-39
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    q = nf4.quantise(weight)
    assert torch.equal(q.codes, codes.flatten()) and torch.equal(q.absmax, state.absmax)
    for dtype in DTYPES:
        assert torch.equal(bits(nf4.dequantise(q, dtype)), bits(nf4.reference_dequantise(q, dtype)))


def test_zero_blocks_and_equal_blocks():
    check(torch.zeros(64, 256))
    check(torch.full((64, 256), 0.25))
    weight = torch.randn(64, 256)
    weight[::3] = 0
    check(weight)
    weight[0, 0] = -0.0
    check(weight)


def test_every_code():
    scales = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(4))
    q = check(scales[:, None] * torch.tensor(nf4.CODES).repeat(4))
    assert set((q.codes >> 4).tolist()) | set((q.codes & 15).tolist()) == set(range(16))


def test_every_absmax_code_that_bitsandbytes_gives():
    """Half a million absmax over [-1, 1], an eighth of a grid point apart, each block with its 1. bitsandbytes' grid reaches 249 of
    the 256 codes: near zero the map is finer than the grid."""
    points = torch.linspace(-1, 1, 2 * nf4.GRID * 4).view(-1, 128)
    blocks = torch.cat([torch.ones(len(points), 64), -torch.ones(len(points), 64), points], 1).flatten()
    codes, nested, _, offset = nf4._quantise_absmax(blocks)
    theirs, state = bnb.quantize_blockwise(blocks - offset, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(nested, state.absmax)
    assert len(set(codes.tolist())) == 249


def test_every_absmax_code_decodes():
    """All 256 codes of the absmax, whether its quantiser reaches them or not."""
    weight = torch.randn(256, 64)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.absmax = torch.arange(256, dtype=torch.uint8)
    q = nf4.NF4(codes.flatten(), state.absmax, state.state2.absmax, state.state2.code, state.offset, (256, 64))
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(bits(nf4.dequantise(q, dtype)), bits(bnb.dequantize_4bit(codes, state)))


def test_ties():
    """Values at the fp32 midpoint of two codes, and one step to either side; absmax 1, and 3 (whose reciprocal is rounded)."""
    codes = torch.tensor(nf4.CODES)
    mid = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([mid, torch.nextafter(mid, mid + 1), torch.nextafter(mid, mid - 1), torch.ones(3), -torch.ones(16)])
    for absmax in (1.0, 3.0, 0.7):
        check((near * absmax).repeat(8, 1))
    q = nf4.quantise(torch.cat([mid, torch.ones(49)]))
    index = torch.stack([q.codes >> 4, q.codes & 15], -1).flatten()[:15]
    assert index.tolist() == list(range(15)), "a midpoint takes the lower code"


def test_a_million_random_weights():
    check(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2)) * 0.02)


def test_real_weights(shared_data):
    for name, weight in load_file(shared_data / "weights/TinyStories-656K/model.safetensors").items():
        q = check(weight)
        assert q.shape == tuple(weight.shape), name


def test_rows_that_are_no_whole_blocks():
    """bitsandbytes' AVX-512 decoder reads the wrong absmax there (it counts blocks per row); ours follows the format."""
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(3))
    codes, _ = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    flat, flat_state = bnb.quantize_4bit(weight.view(120, 64), quant_type="nf4", compress_statistics=True)
    assert torch.equal(nf4.quantise(weight).codes, codes.flatten())
    assert torch.equal(nf4.dequantise(nf4.quantise(weight)).view(120, 64), bnb.dequantize_4bit(flat, flat_state))


@pytest.mark.parametrize("nested", [True, False])
def test_a_stored_bitsandbytes_weight_loads_as_it_is(nested):
    weight = torch.randn(96, 128).bfloat16()
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    tensors = {"model.q_proj.weight": codes, **{f"model.q_proj.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    linear = NF4Linear(128, 96, dtype=torch.bfloat16, device="meta")
    linear.set_quantised(tensors)
    assert torch.equal(linear.dequantize(), bnb.dequantize_4bit(codes, state))
    assert torch.equal(linear.weight, codes.flatten())
