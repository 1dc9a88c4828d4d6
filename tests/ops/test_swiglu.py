"""The gated activation: forward and gradients equal the definition, on halves of one fused product too."""

import pytest
import torch
from torch.testing import assert_close

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
