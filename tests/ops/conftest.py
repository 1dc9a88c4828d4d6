"""What every kernel's test needs: Triton switched on, and views with columns beside them that must stay as they are."""

import pytest
import torch

from tunesmith.ops import backend


@pytest.fixture
def kernels():
    """The device the kernels run on, with fallbacks switched off: a GPU, or the CPU through Triton's interpreter."""
    pytest.importorskip("triton")
    with backend.use("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def padded():
    """padded(x) -> the same numbers as a view whose rows are 5 apart; at the end those 5 columns must be what they were."""
    made = []

    def make(x):
        whole = torch.full((*x.shape[:-1], x.shape[-1] + 5), 7.0, device=x.device).to(x.dtype)
        whole[..., : x.shape[-1]] = x
        made.append((whole, x.shape[-1]))
        return whole[..., : x.shape[-1]]

    yield make
    for whole, columns in made:
        assert (whole[..., columns:].float() == 7).all(), "written beside the view"


@pytest.fixture
def same_e4m3():
    """same_e4m3(e4m3, what was cast in fp32): to the byte on a GPU. The interpreter truncates, and drops the carry of a mantissa
    that rounds up to the next power of two (127.9 becomes 64): there four of five within a step and all within a factor of 2, which
    tells a wrong place or scale, not a wrong rounding.
    """

    def same(out, wide):
        if out.is_cuda:
            return torch.equal(out.view(torch.uint8), wide.to(torch.float8_e4m3fn).view(torch.uint8))
        off = (out.float() - wide).abs()
        step = wide.abs() / 8 + 2.0**-9
        return (off <= step).float().mean() > 0.8 and (off <= 4 * step).all()

    return same
