"""Attention: the fast door equals the definition, forward and gradients; documents cannot see each other."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import attention as op
from tunesmith.ops.attention import Layout, attention, reference

LENGTHS = [1, 7, 300, 2, 33]  # 300 is more than two chunks of a window of 128


def inputs(lengths, heads=4, kv_heads=2, width=8, dtype=torch.float64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), n, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def test_a_layout_says_where_documents_lie():
    layout = Layout.of([3, 1, 2])
    assert layout.bounds == (0, 3, 4, 6) and layout.longest == 3
    assert layout.positions_T.tolist() == [0, 1, 2, 0, 0, 1] and layout.documents_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 6] and layout.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 5, 128, 299, 300, 400])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (5, 1)])
def test_the_fast_door_equals_the_definition(heads, kv_heads, window, softcap, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 128)  # so that the softcapped path is cut too
    layout, a = Layout.of(LENGTHS), inputs(LENGTHS, heads, kv_heads)
    b = [x.detach().clone().requires_grad_() for x in a]
    ya, yb = attention(*a, layout, 0.3, window, softcap), reference(*b, layout, 0.3, window, softcap)
    assert_close(ya, yb, rtol=1e-10, atol=1e-12)
    dy = torch.randn(ya.shape, dtype=torch.float64)
    ya.backward(dy)
    yb.backward(dy)
    for x, y in zip(a, b, strict=True):
        assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


def test_the_definition_is_a_weighted_mean_over_what_is_visible():
    """By hand: three tokens, window 2, one head of width 1."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in ([1.0, 2.0, 3.0], [0.5, -1.0, 2.0], [10.0, 20.0, 30.0]))
    y = reference(q, k, v, Layout.of([3]), 1.0, window=2).flatten()
    second = (torch.tensor([1.0, -2.0]).double().softmax(0) * torch.tensor([10.0, 20.0])).sum()
    third = (torch.tensor([-3.0, 6.0]).double().softmax(0) * torch.tensor([20.0, 30.0])).sum()
    assert_close(y, torch.stack([torch.tensor(10.0).double(), second, third]))


@pytest.mark.parametrize("how", [{}, {"window": 5}, {"softcap": 5.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_changes_nothing_in_another(how, dtype):
    layout = Layout.of(LENGTHS)
    before = inputs(LENGTHS, dtype=dtype)
    after = [x.detach().clone() for x in before]
    for x in after:
        x[8:308] = torch.randn_like(x[8:308]) * 100  # the long one in the middle
    ya, yb = attention(*before, layout, 0.3, **how), attention(*after, layout, 0.3, **how)
    other = torch.ones(len(ya), dtype=torch.bool)
    other[8:308] = False
    assert torch.equal(ya[other], yb[other]) and not torch.equal(ya[8:308], yb[8:308])
    grads = torch.autograd.grad(ya[8:308].float().sum(), before)
    assert all((g[other] == 0).all() for g in grads)


def test_no_mask_over_the_stream_is_ever_made(monkeypatch):
    """The largest tensor made inside grows with the documents, not with the square of the stream."""
    seen = []
    real = op.visible
    monkeypatch.setattr(op, "visible", lambda *a: seen.append(real(*a).numel()) or real(*a))
    lengths = [40] * 50
    attention(*inputs(lengths), Layout.of(lengths), 0.3, 8, None)
    assert max(seen) <= 40 * 40


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 64, 100])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_equals_the_definition(dtype, width, window):
    lengths = [1, 7, 300, 2, 129]
    layout = Layout.of(lengths, "cuda")
    a = inputs(lengths, 8, 2, width, dtype, device="cuda")
    a = [x.detach().requires_grad_() for x in a]
    b = [x.detach().double().requires_grad_() for x in a]
    ya, yb = attention(*a, layout, width**-0.5, window), reference(*b, layout, width**-0.5, window)
    assert_close(ya.double(), yb, rtol=2e-2, atol=2e-2)  # 8 bits of mantissa
    dy = torch.randn_like(ya)
    ya.backward(dy)
    yb.backward(dy.double())
    for x, y in zip(a, b, strict=True):
        assert (x.grad.double() - y.grad).norm() < 1e-2 * y.grad.norm() + 1e-3  # a window of 1 has no gradient to q and k
    changed = [x.detach().clone() for x in a]
    for x in changed:
        x[8:308] += 1
    again = attention(*changed, layout, width**-0.5, window)
    assert torch.equal(again[:8], ya[:8]) and torch.equal(again[308:], ya[308:])
