"""Adapted linears: every method starts at zero effect, its fast path is its definition, and merging is its forward."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tunesmith import adapters
from tunesmith.adapters.lora import METHODS, Lora, dense
from tunesmith.config import schema
from tunesmith.errors import AdapterError
from tunesmith.models.linear import Linear, NF4Linear

BASES = {
    "dense": lambda: Linear(64, 48, True),
    "no bias": lambda: Linear(64, 48),
    "torch": lambda: nn.Linear(64, 48),
    "nf4": lambda: NF4Linear(64, 48, True),
    "conv1d": lambda: Conv1D(48, 64),
}


def made(base, variant="lora", dtype=torch.float32, dropout=0.0, zero=False):
    torch.manual_seed(0)
    linear = BASES[base]()
    if base == "nf4":
        linear.set_weight("weight", torch.randn(48, 64))
        linear.set_weight("bias", torch.randn(48))
        linear.dtype = dtype
    linear = linear.to(dtype)
    method = METHODS[variant]
    twin = method.twin(linear, 4, method.scale(8, 4), dropout)
    twin.reset(torch.Generator().manual_seed(0))
    if not zero:
        with torch.no_grad():
            twin.lora_B.normal_(std=0.3)
            if variant == "dora":
                twin.lora_magnitude_vector.mul_(1.5)
    return twin


def test_methods_are_the_variants_of_the_run_file():
    assert set(METHODS) == set(schema.Lora.model_fields["variant"].annotation.__args__)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", METHODS)
def test_contract(variant, base):
    """Zero effect at the start; merged equals forward; disabled equals base; the twin has the face of a linear."""
    x = torch.randn(5, 64)
    fresh = made(base, variant, zero=True)
    assert_close(fresh(x), fresh.base(x), rtol=1e-5, atol=1e-6)
    twin = made(base, variant)
    y = twin(x)
    assert (y - twin.base(x)).abs().max() > 0.1
    assert (twin.in_features, twin.out_features, twin.dequantize().shape) == (64, 48, (48, 64))
    assert twin.weight.shape == (twin.base.weight.shape if base != "nf4" else (48, 64))
    wanted = x @ twin.dequantize().t() + (0 if twin.bias is None else twin.bias)
    assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    twin.enabled = False
    assert torch.equal(twin(x), twin.base(x))
    assert torch.equal(twin.dequantize(), dense(twin.base))
    twin.enabled = True
    plain = twin.folded()
    assert not isinstance(plain, Lora)
    assert type(plain) is (Linear if base == "nf4" else type(twin.base))
    assert_close(plain(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_fast_path_equals_the_definition(base, dtype):
    twin = made(base, dtype=dtype)
    results, weights = [], torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    for path in (twin, twin.reference):
        x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = path(x)
        results.append((y, *torch.autograd.grad((y * weights).sum(), [x, twin.lora_A, twin.lora_B])))
    for fast, slow in zip(*results, strict=True):
        assert fast.dtype == slow.dtype
        # bf16 keeps 8 bits, and the two paths round at different places: 0.4 % each
        assert (fast - slow).double().norm() <= {torch.bfloat16: 1e-2}.get(dtype, 1e-5) * slow.double().norm()
    assert results[0][2].dtype == torch.promote_types(torch.float32, dtype)


@pytest.mark.parametrize("base", ["dense", "nf4", "conv1d"])
def test_gradients_by_finite_differences(base):
    twin = made(base, dtype=torch.float64).double()
    twin.scale = 1.7
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: functional_call(
        twin, {"lora_A": a, "lora_B": b}, (x,)), (x, twin.lora_A, twin.lora_B), fast_mode=True)  # fmt: skip


def test_what_the_fast_path_keeps():
    """x, x A^T and the small matrices: no dense weight, and nothing of the output's size."""
    for base in ("dense", "nf4"):
        twin, kept = made(base), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t):
            twin(torch.randn(10, 64, requires_grad=True)).sum()
        assert sorted(kept) == [(4, 64), (10, 4), (10, 64), (48, 4)]


def test_an_input_that_needs_no_gradient_costs_none():
    twin = made("dense")
    seen = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for needs in (True, False):
        seen.clear()
        y = twin(torch.randn(3, 64, requires_grad=needs))
        with Counting():
            y.sum().backward()
        products = sum(name.startswith(("mm", "addmm")) for name in seen)
        assert products == (5 if needs else 3)


def test_low_rank_is_offered_only_where_it_is_the_whole_truth():
    twin = made("dense", dropout=0.1)
    assert twin.train().low_rank() is None
    a, b, scale = twin.eval().low_rank()
    assert (a is twin.lora_A, b is twin.lora_B, scale) == (True, True, 2.0)
    twin.enabled = False
    assert twin.low_rank() is None
    assert made("dense", "dora").eval().low_rank() is None


def test_dropout_drops_only_the_adapters_input():
    twin = made("dense", dropout=0.5)
    x = torch.ones(2000, 64)
    torch.manual_seed(0)
    noisy = twin.train()(x)
    assert_close(noisy.mean(0), twin.eval()(x)[0], rtol=0.2, atol=0.2)
    assert noisy.std(0).max() > 0.01
    with torch.no_grad():
        twin.lora_B.zero_()
    assert_close(twin.train()(x), twin.base(x))


class Tiny(nn.Module):
    def __init__(self, order=("q_proj", "v_proj")):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({name: Linear(8, 8) for name in order}) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.lm_head = Linear(8, 11)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer["v_proj"](torch.tanh(layer["q_proj"](x)))
        return self.lm_head(self.norm(x))


def attached(seed=0, order=("q_proj", "v_proj"), **lora):
    torch.manual_seed(5)
    model = Tiny(order)
    adapters.attach(model, schema.Lora(rank=2, **lora), seed=seed)
    return model


def test_the_start_depends_on_seed_and_name_alone():
    a, b = attached(), attached(order=("v_proj", "q_proj"))
    for name, p in adapters.trainable(a).items():
        assert torch.equal(p, adapters.trainable(b)[name]), name
    other = adapters.trainable(attached(seed=1))
    first = [p for n, p in adapters.trainable(a).items() if "lora_A" in n]
    assert all(not torch.equal(p, other[n]) for n, p in adapters.trainable(a).items() if "lora_A" in n)
    assert len({tuple(p.flatten().tolist()) for p in first}) == len(first)
    assert all(0.5 < p.abs().max() * 8**0.5 <= 1 for p in first)  # uniform within 1 / sqrt(8)


def test_only_the_adapter_is_trainable_and_the_base_names_stay():
    model = attached(modules_to_save=("norm",))
    names = set(adapters.trainable(model))
    assert {n.split(".")[-2] for n in names if "lora" in n} == {"lora_A", "lora_B"}
    assert {n for n in names if "lora" not in n} == {"base_model.model.norm.weight", "base_model.model.norm.bias"}
    trained = {id(p) for p in adapters.trainable(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert set(adapters.fast(model)) == {n for n in names if n.endswith(".lora_B.weight")}


def test_unmoved_names_what_no_step_has_reached():
    model = attached()
    assert len(adapters.unmoved(model)) == 4
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-2)
    model(torch.arange(11)).logsumexp(-1).sum().backward()
    optimizer.step()
    assert adapters.unmoved(model) == []


def test_disabled_gives_the_base_and_comes_back():
    plain = attached()
    tokens = torch.arange(11)
    torch.manual_seed(5)
    wanted = Tiny()(tokens)
    with torch.no_grad():
        for p in adapters.trainable(plain).values():
            p.normal_()
    changed = plain(tokens)
    with pytest.raises(RuntimeError), adapters.disabled(plain):
        assert torch.equal(plain(tokens), wanted)
        raise RuntimeError
    assert torch.equal(plain(tokens), changed)
    assert not torch.equal(changed, wanted)


def test_merge_rounds_once_in_the_stores_dtype():
    model = attached()
    model.to(torch.bfloat16)
    for p in adapters.trainable(model).values():
        p.data = torch.randn(p.shape)
    twin = adapters.twins(model)["layers.0.q_proj"]
    wanted = (twin.base.weight.float() + twin.scale * twin.lora_B @ twin.lora_A).bfloat16()
    adapters.merge(model)
    assert torch.equal(model.layers[0]["q_proj"].weight, wanted)
    assert not adapters.twins(model)
    with pytest.raises(AdapterError, match="no adapter"):
        adapters.merge(model)


def test_merging_a_tied_projection_leaves_the_embedding_alone():
    torch.manual_seed(5)
    model = Tiny()
    model.config = {"tie_word_embeddings": True}
    model.lm_head.weight = model.embed_tokens.weight
    before = model.embed_tokens.weight.detach().clone()
    adapters.attach(model, schema.Lora(rank=2, targets=("lm_head",)), seed=0)
    with torch.no_grad():
        adapters.twins(model)["lm_head"].lora_B.normal_()
    live = model(torch.arange(11))
    adapters.merge(model)
    assert torch.equal(model.embed_tokens.weight, before)
    assert_close(model(torch.arange(11)), live)
    assert model.config["tie_word_embeddings"] is False


def test_masters_stay_float32_over_a_bf16_base():
    torch.manual_seed(5)
    model = Tiny().to(torch.bfloat16)
    adapters.attach(model, schema.Lora(rank=2, modules_to_save=("norm",)), seed=0)
    assert {p.dtype for p in adapters.trainable(model).values()} == {torch.float32}
    out = model(torch.arange(11))
    assert out.dtype == torch.bfloat16
    out.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.trainable(model).values())
