"""The linears' one face: what they compute, what they keep between passes, what they refuse."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tunesmith.errors import ModelError
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.ops import nf4

KINDS = {"dense": Linear, "nf4": NF4Linear}


def made(kind, i=128, o=48, bias=True, dtype=torch.float32, device=None):
    linear = KINDS[kind](i, o, bias, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(0)
    linear.set_weight("weight", torch.randn(o, i, generator=g))
    if bias:
        linear.set_weight("bias", torch.randn(o, generator=g))
    return linear


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_are_those_of_the_dense_weight(kind, dtype, device):
    linear = made(kind, dtype=dtype, device=device)
    assert (linear.in_features, linear.out_features, linear.dequantize().shape) == (128, 48, (48, 128))
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    y = linear(x)
    wanted = F.linear(x, linear.dequantize(dtype), linear.bias)
    assert torch.equal(y, wanted)
    got = torch.autograd.grad(y.sin().sum(), x)[0]
    assert_close(got, torch.autograd.grad(wanted.sin().sum(), x)[0])


def test_nf4_decodes_the_weight_it_was_given():
    weight = torch.randn(48, 128)
    linear = NF4Linear(128, 48)
    linear.set_weight("weight", weight)
    assert torch.equal(linear.dequantize(), nf4.reference_dequantise(nf4.reference_quantise(weight)))
    assert 0.05 < (linear.dequantize() - weight).norm() / weight.norm() < 0.12  # NF4 loses 9.2 % of a normal matrix


def test_nf4_saves_no_dense_weight_for_the_backward():
    linear, kept = made("nf4"), []

    def pack(t):
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(torch.randn(3, 128, requires_grad=True)).sum()
    assert (48, 128) not in kept
    assert not kept


def test_nf4_bytes_are_those_of_its_buffers():
    linear = NF4Linear(4096, 1024, device="meta")
    stored = sum(t.numel() * t.element_size() for t in linear.state_dict().values())
    assert stored / (4096 * 1024) == pytest.approx(0.516, abs=5e-4)


def test_a_cast_leaves_the_scales_alone():
    """`.to(dtype)` on a whole model must not round what the format keeps in float32."""
    linear = made("nf4", bias=False)
    before = linear.dequantize(torch.float32)
    model = torch.nn.Sequential(linear).to(torch.bfloat16).half()
    assert linear.nested_absmax.dtype == linear.offset.dtype == linear.nested_map.dtype == torch.float32
    assert torch.equal(model[0].dequantize(torch.float32), before)


def test_tied_weights_stay_tied_when_set():
    a, b = Linear(4, 3), Linear(4, 3)
    b.weight = a.weight
    b.set_weight("weight", torch.ones(3, 4))
    assert a.weight is b.weight
    assert torch.equal(a.dequantize(), torch.ones(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_tensors_are_refused(kind):
    linear = KINDS[kind](128, 48)
    with pytest.raises(ModelError, match=r"weight is \[128, 48\] where the model needs \[48, 128\]"):
        linear.set_weight("weight", torch.zeros(128, 48))
    with pytest.raises(ModelError, match="no 'bias'"):
        linear.set_weight("bias", torch.zeros(48))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_weight_is_not_quantised(bad):
    weight = torch.randn(48, 128)
    weight[7, 9] = bad
    with pytest.raises(ModelError, match="NaN or inf"):
        NF4Linear(128, 48).set_weight("weight", weight)


def stored(linear, kind="nf4"):
    """bitsandbytes' keys for a weight without double quantisation."""
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [48, 128]}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    absmax = nf4.absmax_of(linear.quantised())
    return {"a.weight": linear.weight[:, None], "a.weight.absmax": absmax, f"a.weight.quant_state.bitsandbytes__{kind}": text}


def test_quantised_weights_are_taken_as_they_are_and_faults_named():
    first = made("nf4", bias=False)
    other = NF4Linear(128, 48)
    other.set_quantised(stored(first))
    assert torch.equal(other.dequantize(), first.dequantize())
    with pytest.raises(ModelError, match=r"bitsandbytes__fp4 where quant_state\.bitsandbytes__nf4"):
        other.set_quantised(stored(first, "fp4"))
    with pytest.raises(ModelError, match=r"lacks weight.absmax.*no quant_state"):
        other.set_quantised({"a.weight": first.weight})
    with pytest.raises(ModelError, match="where the model needs"):
        NF4Linear(64, 48).set_quantised(stored(first))
