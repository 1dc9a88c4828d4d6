"""RMSNorm: forward and both gradients equal the definition, in Llama's rounding and in Gemma's."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops.rms_norm import reference, rms_norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(dtype, shape, offset):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    y, z = rms_norm(x, weight, 1e-5, offset), reference(x, weight, 1e-5, offset)
    low = dtype in (torch.bfloat16, torch.float16)
    near = (
        dict(rtol=8e-3, atol=1e-3)
        if low
        else dict(rtol=1e-5, atol=1e-6)
        if dtype == torch.float32
        else dict(rtol=1e-12, atol=1e-13)
    )
    assert_close(y, z, **near)
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(z, (x, weight), dy)
    for a, b in zip(ours, theirs, strict=True):  # low precision: the definition's own backward rounds at every step
        assert_close(a, b, **(dict(rtol=3e-2, atol=3e-2) if low else near))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_by_differences(offset):
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset), (x, weight))


def test_a_frozen_weight_gets_no_gradient_and_float32_weights_may_stand_beside_bfloat16():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None and x.grad is not None
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == reference(x.bfloat16(), weight, 1e-5).dtype
