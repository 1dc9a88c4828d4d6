"""RMSNorm: forward and both gradients equal the definition, in Llama's rounding and in Gemma's."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import fp8
from tunesmith.ops import rms_norm as op
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


# ---- the kernels ----------------------------------------------------------------------------------------------------------------

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


def inputs(shape, dtype, device):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(device, dtype) for s in (shape, shape[-1:], shape, shape)]


def near(dtype, steps=2):
    """`steps` of the last bit."""
    return dict(rtol=steps * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 1024), (2, 5000), (0, 8)], ids=str)
def test_the_forward_kernel(kernels, padded, shape, dtype):
    x, weight, *_ = inputs(shape, dtype, kernels)
    wanted = reference(x, weight, 1e-5)
    h, rstd = op.forward(padded(x), weight, 1e-5)
    steps = 32 if dtype == torch.float32 else 2  # the sum of squares in another order
    assert_close(h, wanted, **near(dtype, steps))
    assert_close(rstd, torch.rsqrt(x.double().square().mean(-1) + 1e-5).float(), rtol=1e-6, atol=0)
    out = padded(torch.full_like(x, torch.nan))
    assert op.forward(x, weight, 1e-5, out)[0] is out
    assert torch.equal(out, h)


@pytest.mark.parametrize("how", ["plain", "residual", "into the residual", "into dh"])
@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 1024), (0, 8)], ids=str)
def test_the_backward_kernel(kernels, padded, shape, dtype, how):
    x, weight, dh, residual = inputs(shape, dtype, kernels)
    wide = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(wide, weight.double(), 1e-5), wide, dh.double())
    if how != "plain":
        wanted = wanted + residual.double()
    _, rstd = op.forward(x, weight, 1e-5)
    dh, residual = padded(dh), padded(residual)
    out = {"into the residual": residual, "into dh": dh}.get(how)
    dx = op.backward(dh, padded(x), weight, rstd, None if how == "plain" else residual, out)
    assert dx.dtype == dtype and (out is None or dx is out)
    assert_close(dx, wanted.to(dtype), **near(dtype, 32 if dtype == torch.float32 else 2))


def test_plain_torch_has_the_same_interface(padded):
    x, weight, dh, residual = inputs((7, 33), torch.float32, "cpu")
    wide = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(wide, weight, 1e-5), wide, dh)
    h, rstd = op.forward(x, weight, 1e-5, out=padded(x))
    assert_close(h, reference(x, weight, 1e-5))
    assert_close(op.backward(dh, x, weight, rstd), wanted)
    wanted += residual
    assert_close(op.backward(dh, x, weight, rstd, residual, residual), wanted)


@pytest.mark.parametrize("dtype", ON_THIS)
def test_the_norm_quantises_what_it_gives(kernels, padded, same_e4m3, dtype):
    x, weight, *_ = inputs((5, 1000), dtype, kernels)
    x[3] = 0
    h, rstd, h8, scale = op.forward_fp8(padded(x), weight, 1e-5)
    plain = op.forward(x, weight, 1e-5)
    assert torch.equal(h, plain[0]) and torch.equal(rstd, plain[1])
    assert torch.equal(scale, fp8.reference_quantise_rows(h)[1])
    assert same_e4m3(h8, h.float() * (1 / scale))


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 1024), (0, 8)], ids=str)
def test_the_backward_quantises_what_it_gives(kernels, padded, same_e4m3, shape, dtype):
    x, weight, dh, residual = inputs(shape, dtype, kernels)
    _, rstd = op.forward(x, weight, 1e-5)
    x8, scale = room = fp8.empty_rows(x)
    dx = op.backward(padded(dh), padded(x), weight, rstd, residual, quantised=room)
    assert torch.equal(dx, op.backward(dh, x, weight, rstd, residual))
    assert torch.equal(scale, fp8.reference_quantise_rows(dx)[1])
    assert not x.numel() or same_e4m3(x8, dx.float() * (1 / scale))


def test_autograd_over_the_kernels_takes_gradients_of_any_strides(kernels):
    x, weight = torch.randn(6, 40, device=kernels), torch.randn(40, device=kernels)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rms_norm(ours, weight, 1e-5).sum().backward()  # one number, expanded
    reference(theirs, weight, 1e-5).sum().backward()
    assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    x = x.t().contiguous().t()
    assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5), rtol=1e-5, atol=1e-5)
