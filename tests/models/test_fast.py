"""The layers as half-blocks against the composed path: the same outputs and gradients, whatever is kept, moved or made again."""

import pytest
import torch

from tunesmith import adapters
from tunesmith.config.schema import Lora
from tunesmith.levels import SAVED
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import FastLayers, policies, refusal
from tunesmith.models.groups import Group, Scratch
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.stash import Pool, Stash
from tunesmith.ops import low_rank
from tunesmith.ops.attention import Layout
from tunesmith.ops.half_blocks import Pass, Policy, layer, reference
from tunesmith.spec import spec_of

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "phi3": {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4},
             "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16},
}  # fmt: skip
LENGTHS = (7, 1, 19, 5)


def decoder(family: str, store: type = Linear, dtype: torch.dtype = torch.float64, **lora) -> Decoder:
    """Random weights and an adapter whose A and B are both alive."""
    torch.manual_seed(0)
    spec = spec_of(SIZES | FAMILIES[family])
    model = Decoder(spec, linear=lambda i, o, bias: store(i, o, bias, dtype=dtype), dtype=dtype)
    for name, p in [*model.named_parameters()]:
        p.data.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    if store is NF4Linear:
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.set_weight("weight", torch.randn(module.out_features, module.in_features) * 0.2)
    adapters.attach(model, Lora(**{"rank": 3, "alpha": 5, **lora}), seed=1)
    for name, p in adapters.trainable(model).items():
        if "lora_B" in name:
            p.data.normal_(std=0.2)
    return model.train()


def step(model: Decoder, rows: bool = False) -> list[torch.Tensor]:
    """The output and every gradient of one pass over four packed documents."""
    torch.manual_seed(5)
    tokens, chosen = torch.randint(0, 97, (sum(LENGTHS),)), torch.tensor([3, 8, 9, 20, 31]) if rows else None
    x = model.hidden(tokens, Layout.of(LENGTHS), rows=chosen)
    parameters = list(adapters.trainable(model).values())
    grads = torch.autograd.grad((x * torch.randn_like(x)).sum(), parameters)
    return [x.detach(), *grads]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        assert (p - q).norm() <= tolerance * q.norm() + 1e-30, (p.shape, ((p - q).norm() / q.norm()).item())


def fast(model: Decoder, *args, fp8: bool = False, **how) -> Decoder:
    model.fast = FastLayers(model, policies(len(model.model.layers), *args, **how), fp8=fp8)
    assert refusal(model) == "" and model.fast.runs
    return model


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_blocks_are_the_composed_path(family, rows):
    slow, quick = step(decoder(family), rows), step(fast(decoder(family)), rows)
    close(quick, slow, 1e-10)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_over_nf4_in_float32(family):
    close(step(fast(decoder(family, NF4Linear, torch.float32))), step(decoder(family, NF4Linear, torch.float32)), 2e-5)


@pytest.mark.parametrize("level", [name for name in SAVED if name not in ("keep", "int8")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_making_it_again_moves_no_bit(family, level):
    """float32, one order of the same operations: what is recomputed is what was kept."""
    kept = step(fast(decoder(family, NF4Linear, torch.float32)))
    again = step(fast(decoder(family, NF4Linear, torch.float32), level, offload=True))
    assert all(torch.equal(p, q) for p, q in zip(kept, again, strict=True))


def test_int8_gate_and_up_cost_under_a_percent_of_the_gradient():
    kept, rough = step(fast(decoder("llama"))), step(fast(decoder("llama"), "int8"))
    assert torch.equal(kept[0], rough[0])  # the forward does not know of it
    flat = [torch.cat([g.flatten() for g in grads[1:]]) for grads in (kept, rough)]
    assert 0 < ((flat[1] - flat[0]).norm() / flat[0].norm()).item() < 0.01


@pytest.mark.parametrize("level", SAVED)
def test_tiles_change_only_the_order_of_sums(level):
    close(step(fast(decoder("qwen2"), level, tile=6)), step(fast(decoder("qwen2"), level)), 1e-12)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("o_proj", "up_proj")])
def test_part_of_the_linears(targets):
    close(step(fast(decoder("llama", targets=targets))), step(decoder("llama", targets=targets)), 1e-10)


def test_layers_below_the_first_adapter_have_no_backward():
    model = fast(decoder("llama", targets=("/model.layers.2.mlp.*/",)))
    close(step(model), step(decoder("llama", targets=("/model.layers.2.mlp.*/",))), 1e-10)
    tokens = torch.arange(9)
    taken = []
    put = model.fast.pool
    assert put.free == {}
    from tunesmith.models import stash

    original = stash.Stash.put
    try:
        stash.Stash.put = lambda self, tensors, offload: taken.append(1) or original(self, tensors, offload)
        model.hidden(tokens, Layout.of([9]))
    finally:
        stash.Stash.put = original
    assert len(taken) == 1


def test_what_is_kept_is_what_the_policy_says():
    """Bytes a token and layer that wait for the backward, float32 here: 4 where the table of bf16 has 2."""
    for level in SAVED:
        model, seen = fast(decoder("llama", NF4Linear, torch.float32), level), []
        from tunesmith.models import stash

        original = stash.Stash.put
        try:
            stash.Stash.put = lambda self, t, offload, seen=seen, put=original: seen.append(set(t)) or put(self, t, offload)
            model.hidden(torch.arange(9), Layout.of([9]))
        finally:
            stash.Stash.put = original
        assert seen == [set(SAVED[level])] * 3


def test_what_cannot_runs_composed_and_says_why():
    assert "dora" in refusal(decoder("llama", variant="dora"))
    assert "drops" in refusal(decoder("llama", dropout=0.1))
    model = decoder("llama", dropout=0.1)
    model.fast = FastLayers(model, policies(3))
    step(model)  # composed
    assert not model.fast.runs
    model.eval()
    step(model)
    assert model.fast.runs  # without dropping, it is a low-rank product again


def test_a_switched_off_adapter_gives_the_base():
    model = fast(decoder("llama"))
    tokens, layout = torch.arange(11), Layout.of([11])
    with torch.no_grad(), adapters.disabled(model):
        base = model.hidden(tokens, layout)
        model.fast = None
        close([base], [model.hidden(tokens, layout)], 1e-12)


def test_cached_weights_give_the_same_and_can_be_given_back():
    model = fast(decoder("llama", NF4Linear, torch.float32))
    first = step(model)
    assert model.fast.cache(1 << 30) > 0
    cached = step(model)
    assert model.fast.evict() and not model.fast.evict()
    again = step(model)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(first, cached, again, strict=True))


def test_dense_weights_move_into_their_group_and_are_held_once():
    model = decoder("llama", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    layer = model.model.layers[0]
    q, k = (m.base.weight for m in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_a_document_moves_no_other_by_a_bit():
    model = fast(decoder("llama", NF4Linear, torch.float32))
    tokens = torch.randint(0, 97, (sum(LENGTHS),))
    other = tokens.clone()
    other[:7] = (other[:7] + 1) % 97
    with torch.no_grad():
        a, b = (model.hidden(t, Layout.of(LENGTHS)) for t in (tokens, other))
    assert torch.equal(a[7:], b[7:]) and not torch.equal(a[:7], b[:7])


@pytest.mark.parametrize("store", [Linear, NF4Linear])
def test_each_fp8_product_is_within_its_precision(store):
    """Two operands of e4m3 lose 3.7 % in norm; the low-rank part beside them loses nothing."""
    exact, rough = (fast(decoder("qwen2", store, torch.float32), fp8=fp8).fast.halves[1] for fp8 in (False, True))
    for name in ("qkv", "o", "gate_up", "down"):
        a, b = getattr(exact, name), getattr(rough, name)
        x, dy = torch.randn(50, a.inputs), torch.randn(50, a.outputs)
        wa, wb = a.open(), b.open()
        low, back = wa.low(x), wa.low_back(dy)
        assert torch.equal(low, wb.low(x)) and torch.equal(back, wb.low_back(dy))
        pairs = [
            [torch.empty(50, a.outputs) for _ in "ab"],
            [torch.empty(50, a.inputs) for _ in "ab"],
            [torch.empty(50, a.outputs) for _ in "ab"],
        ]
        for w, i in ((wa, 0), (wb, 1)):
            low_rank.add_(pairs[0][i], w.up(torch.cat([x, low], 1), out=pairs[0][i]))
            low_rank.add_(pairs[1][i], w.back(torch.cat([dy, back], 1), out=pairs[1][i]))
            w.add(dy, x, low, out=pairs[2][i])
        for p, q in pairs:
            assert 0.005 < ((q - p).norm() / p.norm()).item() < 0.045


@pytest.mark.parametrize("level", ["recompute", "checkpoint"])
def test_fp8_made_again_moves_no_bit(level):
    kept, again = (step(fast(decoder("llama", NF4Linear, torch.float32), x, fp8=True)) for x in ("keep", level))
    assert all(torch.equal(p, q) for p, q in zip(kept, again, strict=True))


def test_stores_that_share_an_input_lie_as_one_and_keep_their_codes():
    """Each was quantised on its own: one absmax and one offset a nested block, so the fused store decodes to the same bits."""
    torch.manual_seed(0)
    q, k = (NF4Linear(256, n, dtype=torch.float32) for n in (128, 64))
    for linear in (q, k):
        linear.set_weight("weight", torch.randn(linear.out_features, 256))
    apart = [linear.dequantize() for linear in (q, k)]
    group = Group([q, k], Scratch(), torch.float32)
    assert group.fused is not None and q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    assert all(torch.equal(linear.dequantize(), before) for linear, before in zip((q, k), apart, strict=True))
    assert torch.equal(group.open().matrix, torch.cat(apart))
    ragged = [NF4Linear(256, n, dtype=torch.float32) for n in (100, 64)]
    assert Group(ragged, Scratch(), torch.float32).fused is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_its_definition(family):
    """The layer's own reference, written with autograd from the references of its parts."""
    model = fast(decoder(family))
    halves, names = model.fast.halves[0], ("qkv", "o", "gate_up", "down")
    x = torch.randn(sum(LENGTHS), 64, dtype=torch.float64, requires_grad=True)
    layout = Layout.of(LENGTHS)
    tables = model._tables(layout.positions_T, LENGTHS, layout, torch.float64)[0]
    run = Pass(layout, *tables, Stash(Pool()))

    def linear(name, value):
        return torch.cat([module(value) for module in getattr(halves, name).modules], -1)

    inputs = [x, *(p for name in names for p in getattr(halves, name).parameters)]
    dy = torch.randn_like(x)
    wanted = torch.autograd.grad(reference(x, halves, run, linear), inputs, dy)
    close(list(torch.autograd.grad(layer(x, halves, run, Policy()), inputs, dy)), list(wanted), 1e-10)


def test_in_fp16_the_gradient_of_a_is_not_multiplied_past_its_range():
    """A row of size 1/1000 and a gradient of 1,000, as a loss scale makes them: their product is 1, either over rms is not."""
    torch.manual_seed(0)
    linear = Linear(64, 8, dtype=torch.float16).requires_grad_(False)
    group = Group([adapters.lora.Lora(linear, 4, 1.0)], Scratch(), torch.float16)
    x, gain = torch.randn(6, 64).mul(1e-3).half(), torch.rand(64).half()
    rstd = x.float().square().mean(-1).rsqrt()
    dy = torch.randn(6, 8 + group.extra).half()
    dy[:, 8:] *= 1000
    da, _ = group.gradients(x, dy, torch.randn(6, group.extra).half(), None, (rstd, gain))
    wanted = dy[:, 8:12].float().t() @ (x.float() * rstd[:, None] * gain.float())
    assert (da - wanted).abs().max() < 5e-3 * wanted.abs().max()


@pytest.mark.parametrize("name", ["mlp", "self_attn", "model.layers.1"])
def test_a_module_of_several_linears_that_is_trained_whole_refuses_the_half_blocks(name):
    targets = {"mlp": "q_proj", "self_attn": "gate_proj", "model.layers.1": "model.layers.0.mlp.gate_proj"}[name]
    assert "trained whole" in refusal(decoder("mistral", targets=(targets,), modules_to_save=(name,)))
