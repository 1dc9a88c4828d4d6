"""The chunked loss equals its definition: value and every gradient, at odd sizes, for each chunk length."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops.linear_ce import linear_cross_entropy, reference


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_the_definition(rows, chunk, softcap):
    torch.manual_seed(rows * chunk)
    x = torch.randn(rows, 11, dtype=torch.float64, requires_grad=True)
    w = torch.randn(29, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 29, (rows,))
    a = reference(x, w, labels, softcap)
    total, each = linear_cross_entropy(x, w, labels, softcap=softcap, chunk=chunk)
    assert_close(each, a.detach())
    scale = 0.37
    da = torch.autograd.grad(a.sum() * scale, (x, w))
    db = torch.autograd.grad(total * scale, (x, w))
    for p, q in zip(da, db, strict=True):
        assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_only_what_is_trained_gets_a_gradient():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    total, _ = linear_cross_entropy(x, w, torch.arange(4))
    total.backward()
    assert x.grad is not None and w.grad is None


def test_low_precision_keeps_the_sum_in_float32():
    torch.manual_seed(0)
    x, w, labels = torch.randn(64, 32).bfloat16(), torch.randn(100, 32).bfloat16(), torch.randint(0, 100, (64,))
    total, each = linear_cross_entropy(x, w, labels, chunk=16)
    assert total.dtype == each.dtype == torch.float32
    assert_close(each, reference(x, w, labels))
