"""Rows in e4m3: scales to the bit, what is lost, the odd rows; the product as its definition."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import fp8

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 5000), (2, fp8.WHOLE + 100), (0, 8)], ids=str)
def test_rows_are_quantised(kernels, padded, same_e4m3, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kernels, dtype)
    x8, scale = fp8.quantise_rows(padded(x))
    assert torch.equal(scale, fp8.reference_quantise_rows(x)[1])
    assert x8.shape == shape and (not x8.numel() or same_e4m3(x8, x.float() * (1 / scale)))


@pytest.mark.parametrize("width", [40, fp8.WHOLE + 40])
def test_odd_rows(kernels, width):
    """Zeros stay zeros; a NaN makes its row NaN; an infinity becomes NaN among zeros."""
    x = torch.ones(4, width, device=kernels)
    x[1], x[2, 7], x[3, 8] = 0, torch.nan, torch.inf
    for quantise in (fp8.quantise_rows, fp8.reference_quantise_rows):
        x8, scale = quantise(x)
        assert (x8[:2].float() == torch.tensor([448.0, 0.0], device=kernels)[:, None]).all()
        assert scale[1].item() == pytest.approx(1e-12) and scale[2].isnan() and scale[3].isinf()
        if x8.is_cuda or quantise is fp8.reference_quantise_rows:  # the interpreter's cast knows no NaN
            assert x8[2].float().isnan().all()
            assert x8[3].float().isnan().sum() == 1


def test_the_definition_loses_what_four_bits_lose():
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    x8, scale = fp8.reference_quantise_rows(x)
    lost = (x8.float() * scale - x.float()).norm() / x.float().norm()
    assert 0.024 < lost < 0.028
    assert x8.float().abs().amax(1).eq(448).all()


def test_the_product_is_its_definition():
    x, w = torch.randn(7, 33), torch.randn(11, 33)
    (x8, sx), (w8, sw) = fp8.reference_quantise_rows(x), fp8.reference_quantise_rows(w)
    y = fp8.matmul(x8, sx, w8, sw.flatten(), torch.float32)
    assert_close(y, (x8.float() * sx) @ (w8.float() * sw).t())
    assert fp8.supported("cpu")


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (128, 64)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_dense_weight_is_cast(kernels, padded, same_e4m3, shape, dtype, turned):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator).to(kernels, dtype)
    scale = w.float().abs().amax(0 if turned else 1) / 448 + 1e-12
    out = torch.empty(shape[::-1] if turned else shape, dtype=fp8.E4M3, device=kernels)
    fp8.cast(padded(w), scale, out, turned)
    wanted = w.float() * ((1 / scale)[None] if turned else (1 / scale)[:, None])
    assert same_e4m3(out, wanted.t() if turned else wanted)
