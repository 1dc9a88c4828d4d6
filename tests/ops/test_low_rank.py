"""Adapters beside a weight: the Triton kernels in the interpreter against their definitions."""

import pytest
import torch

from tunesmith.ops import backend, low_rank

needs_triton = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")


def parts(sizes, ranks, inputs):
    out, row, column = [], 0, 0
    for n, r in zip(sizes, ranks, strict=True):
        if r:
            out.append((torch.randn(r, inputs), torch.randn(n, r), 0.5 + r, slice(row, row + n), slice(column, column + r)))
        row, column = row + n, column + r
    return out


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("sizes", "ranks"), [((33, 7, 5), (3, 2, 1)), ((130, 9), (0, 4)), ((20, 6), (5, 0)), ((40,), (16,))])
def test_place(sizes, ranks, dtype):
    torch.manual_seed(0)
    pad = -(-sum(ranks) // 8) * 8
    found = parts(sizes, ranks, 70)
    for mode in ("reference", "triton"):
        whole = torch.full((sum(sizes) + pad, 70 + pad), torch.nan, dtype=dtype)
        with backend.use(mode):
            low_rank.place(found, whole[sum(sizes) :, :70], whole[: sum(sizes), 70:])
        if mode == "reference":
            wanted = whole
    assert torch.equal(whole.nan_to_num(-7), wanted.nan_to_num(-7))  # the weight's own place stays as it was
    assert wanted[: sum(sizes), :70].isnan().all() and not wanted[: sum(sizes), 70:].isnan().any()


@needs_triton
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("shape", [(70, 140, 5), (1, 3, 16), (65, 129, 64), (64, 128, 100)])
def test_residual(shape, extra):
    torch.manual_seed(0)
    t, n, r = shape
    base, low, b = torch.randn(t, n), torch.randn(t, r + 3)[:, :r], torch.randn(n, r + 5)[:, :r]
    more, out = torch.randn(t, n) if extra else None, torch.full((t, n + 4), torch.nan)
    wanted = base + low @ b.t() + (more if extra else 0)
    with backend.use("triton"):
        low_rank.residual(base, low, b, out[:, :n], more)
    torch.testing.assert_close(out[:, :n], wanted, rtol=1e-5, atol=1e-5)
    assert out[:, n:].isnan().all()
    low_rank.residual(base, low, b, out[:, :n], more)
    torch.testing.assert_close(out[:, :n], wanted, rtol=1e-5, atol=1e-5)
