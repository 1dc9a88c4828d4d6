"""The chunked loss equals its definition: value and every gradient, at odd sizes, for each chunk length."""

import pytest
import torch
from torch.testing import assert_close

from tunesmith.ops import backend
from tunesmith.ops import linear_ce as op
from tunesmith.ops.linear_ce import IGNORED, linear_cross_entropy, reference, softmax_ce_


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


# ---- the kernel -----------------------------------------------------------------------------------------------------------------

ON_THIS = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter's bf16 is silently wrong


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ON_THIS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 8192), (2, 20011), (0, 9)], ids=str)
def test_logits_become_their_gradient(kernels, padded, shape, dtype, plain):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=g) * 4).to(kernels, dtype)
    labels = torch.randint(0, shape[1], shape[:1], generator=g).to(kernels)
    if shape[0]:
        labels[0], labels[-1] = 0, shape[1] - 1
    wide = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), wide)
    given = padded(logits)
    with backend.use("reference" if plain else "triton"):
        losses = op.softmax_ce_(given, labels)
        assert_close(losses, wanted.detach().float(), rtol=1e-5, atol=1e-5)
        assert_close(given, slope.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 1e-4)
        assert torch.equal(op.softmax_ce_(logits.clone(), labels, gradient=False), losses)


def test_huge_logits_and_a_nan(kernels):
    logits = torch.tensor([[-3e4, 3e4, 0.0], [1.0, torch.nan, 0.0]], device=kernels)
    losses = op.softmax_ce_(logits, torch.tensor([0, 0], device=kernels))
    assert losses[0].item() == pytest.approx(6e4) and losses[1].isnan()
    assert logits[0].tolist() == [-1.0, 1.0, 0.0] and logits[1].isnan().any()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype", ON_THIS)
def test_the_loss_over_the_kernel(kernels, dtype, train_head, monkeypatch):
    """Chunks of 5 rows, the kernel inside: as the path without it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(13, 16, generator=g).to(kernels, dtype).requires_grad_()
    w = torch.randn(50, 16, generator=g).to(kernels, dtype).requires_grad_(train_head)
    labels, found = torch.randint(0, 50, (13,), generator=g).to(kernels), []
    real = op.softmax_ce_
    monkeypatch.setattr(op, "softmax_ce_", lambda logits, *a: found.append(logits.dtype) or real(logits, *a))
    for mode in ("triton", "reference"):
        with backend.use(mode):
            total, each = linear_cross_entropy(x, w, labels, chunk=5)
        found += [each, *torch.autograd.grad(total, [x, w] if train_head else [x])]
    assert found[:3] == [dtype] * 3
    half = (len(found) - 3) // 2
    for a, b in zip(found[3 : 3 + half], found[3 + half :], strict=True):
        assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 if dtype == torch.float32 else 4e-3)


def test_rows_of_a_chunk(kernels):
    x = torch.empty(1, 8, dtype=torch.float16, device=kernels)
    assert op.rows_at_once(x, 32000) == 1024 and op.rows_at_once(x, 128256) == op.GPU_ROWS
    assert op.rows_at_once(x, 32000, softcap=30.0) == 524


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_ignored_row_has_neither_loss_nor_gradient(kernels, softcap):
    """As torch's -100: rows that only fill a shape up."""
    x, weight, labels = torch.randn(7, 16), torch.randn(40, 16), torch.randint(0, 40, (7,))
    labels[[0, 3, 6]] = IGNORED
    x.requires_grad_(True)
    total, rows = linear_cross_entropy(x, weight, labels, softcap=softcap, chunk=3)
    total.backward()
    wanted = x.detach().clone().requires_grad_(True)
    expected = reference(wanted, weight, labels, softcap)
    expected.sum().backward()
    assert torch.allclose(rows, expected, atol=1e-5) and torch.allclose(x.grad, wanted.grad, atol=1e-5)
    assert not rows[[0, 3, 6]].any() and not x.grad[[0, 3, 6]].any()
    logits = (x @ weight.t()).detach()
    assert torch.allclose(softmax_ce_(logits, labels), reference(x, weight, labels), atol=1e-5) and not logits[[0, 3, 6]].any()


def test_a_second_backward_is_an_error_not_a_missing_gradient():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    total, _ = linear_cross_entropy(x, w, torch.arange(4))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        total.backward()
