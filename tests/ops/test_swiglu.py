"""The gated activation: forward and gradients equal the definition, on halves of one fused product too."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import fp8, low_rank
from tunesmith.ops import swiglu as op
from tunesmith.ops.swiglu import reference, swiglu


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_definition(dtype, fused, activation):
    both = torch.randn(7, 26, dtype=dtype, requires_grad=True)
    gate, up = both.chunk(2, -1) if fused else (both[:, :13].contiguous(), both[:, 13:].contiguous())
    y, z = swiglu(gate, up, activation), reference(gate, up, activation)
    assert torch.equal(y, z)
    dy = torch.randn_like(y)
    (ours,), (theirs,) = torch.autograd.grad(y, both, dy, retain_graph=True), torch.autograd.grad(z, both, dy)
    assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradients_by_differences(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, activation), (gate, up))


def test_the_activation_is_not_kept():
    gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert sum(t.numel() for t in kept) == 2 * gate.numel()


# ---- the kernels ----------------------------------------------------------------------------------------------------------------

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong
SHAPES = [(1, 1), (5, 33), (2, 3000), (0, 8)]


def inputs(shape, dtype, device):
    g = torch.Generator().manual_seed(0)
    both = torch.randn(shape[0], 2 * shape[1], generator=g) * 3
    if both.numel():
        both[0, 0] = -200  # exp(200) is infinite in fp32
    return both.to(device, dtype), torch.randn(shape, generator=g).to(device, dtype)


def near(dtype):
    """Two steps of the last bit; fp32's exponential is within a few."""
    return dict(rtol=(8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forward_kernel(kernels, padded, shape, dtype):
    both, _ = inputs(shape, dtype, kernels)
    a = op.forward(padded(both))
    assert_close(a, reference(*both.chunk(2, -1)), **near(dtype))
    out = padded(torch.full_like(a, torch.nan))
    assert op.forward(both, out) is out and torch.equal(out, a)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_kernel(kernels, padded, shape, dtype):
    both, da = inputs(shape, dtype, kernels)
    wide = both.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(*wide.chunk(2, -1)), wide, da.double())
    a, both, da = op.forward(both), padded(both), padded(da)
    op.backward_(da, both)
    assert torch.equal(da, a)
    tolerance = near(dtype) | dict(atol=4 * torch.finfo(dtype).eps)  # the slope of silu passes zero, where its terms cancel
    assert_close(both, wanted.to(dtype), **tolerance)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_plain_torch_has_the_same_interface(padded, activation):
    both, da = inputs((5, 33), torch.float32, "cpu")
    wide = both.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(*wide.chunk(2, -1), activation), wide, da)
    a = op.forward(both, padded(da), activation)
    assert_close(a, reference(*both.chunk(2, -1), activation))
    op.backward_(da, both, activation)
    assert_close(both, wanted)
    assert torch.equal(da, a)


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 9000)], ids=str)
def test_the_activation_is_quantised_with_its_row(kernels, padded, same_e4m3, shape, dtype):
    both, _ = inputs(shape, dtype, kernels)
    a, a8, scale = op.forward_fp8(padded(both))
    assert torch.equal(a, op.forward(both))
    assert torch.equal(scale, fp8.reference_quantise_rows(a)[1])
    assert same_e4m3(a8, a.float() * (1 / scale))


def low_parts(rows, columns, ranks, dtype, device, turned=False):
    g = torch.Generator().manual_seed(3)
    low, b = torch.randn(rows, ranks + 5, generator=g), torch.randn(columns, ranks + 3, generator=g)
    low, b = low.to(device, dtype)[:, :ranks], b.to(device, dtype)[:, :ranks]
    return low, b.t().contiguous().t() if turned else b


@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 33, 16), (70, 150, 32), (3, 40, 100), (0, 8, 4)], ids=str)
def test_a_low_rank_part_is_added_in_the_kernels(kernels, padded, same_e4m3, shape, dtype):
    """As if gate_up + low B^T and da + low A^T had been written first, in the same dtype."""
    rows, width, ranks = shape
    both, da = inputs((rows, width), dtype, kernels)
    low, low_da = low_parts(rows, 2 * width, ranks, dtype, kernels), low_parts(rows, width, ranks // 2 + 1, dtype, kernels, True)
    whole, whole_da = low_rank.reference_added(both, low), low_rank.reference_added(da, low_da)
    rough = dict(rtol=4 * near(dtype)["rtol"], atol=2e-4 if dtype == torch.float32 else 0.25)  # a sum of products that rounds over
    room = fp8.empty_rows(da)
    a = op.forward(found := padded(both), low=low, quantised=room)
    assert_close(found, whole, **rough)
    assert torch.equal(op.forward(found), a)
    assert torch.equal(room[1], fp8.reference_quantise_rows(a)[1])
    assert not rows or same_e4m3(room[0], a.float() * (1 / room[1]))
    for given, given_da in ((low, low_da), (None, low_da), (low, None)):
        found, found_da = padded(both), padded(da)
        room = fp8.empty_rows(both)
        op.backward_(found_da, found, low=given, low_da=given_da, quantised=room)
        wanted, wanted_da = (both if given is None else whole).clone(), (da if given_da is None else whole_da).clone()
        op.backward_(wanted_da, wanted)
        assert_close(found, wanted, **rough)
        assert_close(found_da, wanted_da, **rough)
        assert torch.equal(room[1], fp8.reference_quantise_rows(found)[1])


def test_plain_torch_adds_the_low_rank_part(padded):
    both, da = inputs((5, 33), torch.float32, "cpu")
    low, low_da = low_parts(5, 66, 4, torch.float32, "cpu"), low_parts(5, 33, 2, torch.float32, "cpu", True)
    whole, whole_da = both + low[0] @ low[1].t(), da + low_da[0] @ low_da[1].t()
    assert_close(op.forward(completed := both.clone(), low=low), op.forward(whole))
    assert_close(completed, whole)
    room = fp8.empty_rows(both)
    op.backward_(da, both, low=low, low_da=low_da, quantised=room)
    op.backward_(whole_da, whole)
    assert_close(both, whole), assert_close(da, whole_da)
    assert all(torch.equal(p.float(), q.float()) for p, q in zip(room, fp8.reference_quantise_rows(both), strict=True))
