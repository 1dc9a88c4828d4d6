"""Groups in int8: the kernel to the bit, what is lost, the odd groups, the bytes."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import int8

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


def bits(t):
    return t.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (3, 64), (2, 5000), (0, 8)], ids=str)
def test_the_kernels_give_the_definitions_bits(kernels, padded, shape, group, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kernels, dtype)
    codes, scale = int8.quantise_groups(padded(x), group)
    wanted = int8.reference_quantise_groups(x, group)
    assert torch.equal(codes, wanted[0]) and torch.equal(bits(scale), bits(wanted[1]))
    out, plain = padded(torch.full_like(x, torch.nan)), torch.empty_like(x)
    assert int8.dequantise_groups(codes, scale, out, group) is out
    assert torch.equal(out, int8.reference_dequantise_groups(codes, scale, plain, group))


def test_odd_groups(kernels):
    """Zeros stay zeros, tiny values become zeros; a NaN or an infinity makes its own group NaN and no other."""
    x = torch.ones(5, 128, device=kernels)
    x[1], x[2], x[3, 7], x[4, 8] = 0, 1e-38, torch.nan, torch.inf
    x[:, 64:] = 1
    for quantise in (int8.quantise_groups, int8.reference_quantise_groups):
        y = int8.dequantise_groups(*quantise(x), torch.empty_like(x))
        assert (y[1:3, :64] == 0).all() and y[3:, :64].isnan().all()
        assert_close(y[:, 64:], x[:, 64:], rtol=0.004, atol=0)


def test_what_is_lost_and_what_it_takes():
    x = torch.randn(64, 4096)
    codes, scale = int8.quantise_groups(x)
    assert codes.nbytes + scale.nbytes == x.numel() * (1 + 2 / 64)
    assert codes.abs().max() <= 127
    y = int8.dequantise_groups(codes, scale, torch.empty_like(x))
    step = scale.float().repeat_interleave(64, 1)
    assert ((y - x).abs() <= 0.5001 * step).all()
    assert (y - x).norm() / x.norm() < 0.0062
