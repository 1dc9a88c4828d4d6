"""The decoder against itself, in float64: packed equals one by one, A does not move B, rows, checkpointing, the cache, noise."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tunesmith.generate import generate
from tunesmith.models.decoder import Decoder
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.ops.attention import Layout
from tunesmith.spec import Rope, Spec

TINY = dict(vocab=61, dim=24, hidden=40, layers=3, heads=4, kv_heads=2, head_dim=8, context=64, norm_eps=1e-5)
LONG = Rope(kind="longrope", fraction=0.5, scaling=(("short_factor", (1.0, 2.0)), ("long_factor", (3.0, 5.0)),
            ("original_max_position_embeddings", 12), ("factor", None), ("attention_factor", None)))  # fmt: skip
SPECS = {
    "plain": Spec(**TINY),
    "window": Spec(**TINY, window=5),
    "biased": Spec(**TINY, qkv_bias=True, out_bias=True, mlp_bias=True, tied=True),
    "longrope": Spec(**TINY, fused=True, rope=LONG),
    "dynamic": Spec(**{**TINY, "context": 12}, rope=Rope(kind="dynamic", scaling=(("factor", 2.0),))),
    "gemma": Spec(**TINY, window=5, sliding=(True, False, True), rope_local=Rope(theta=100.0), activation="gelu_tanh", qk_norm=True,
                  sandwich=True, unit_offset=True, scale_embeddings=True, attention_softcap=3.0, logit_softcap=4.0, tied=True),
}  # fmt: skip
LENGTHS = [9, 1, 23, 14]


def model_of(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = Decoder(SPECS[name], dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.3)
    return model


def tokens_of(n, seed=0):
    return torch.randint(0, TINY["vocab"], (n,), generator=torch.Generator().manual_seed(seed))


def losses(logits, tokens, bounds):
    return [F.cross_entropy(logits[a : b - 1], tokens[a + 1 : b], reduction="sum") for a, b in pairwise(bounds) if b - a > 1]


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_packed_equals_one_by_one(name):
    model, layout, tokens = model_of(name), Layout.of(LENGTHS), tokens_of(sum(LENGTHS))
    packed = model(tokens, layout)
    alone = torch.cat([model(part) for part in tokens.split(LENGTHS)])
    assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    a, b = losses(packed, tokens, layout.bounds), losses(alone, tokens, layout.bounds)
    for x, y in zip(a, b, strict=True):
        assert abs(x - y) < 1e-10 * abs(y)
    ours, theirs = gradients(model, sum(a)), gradients(model, sum(b))
    for key, grad in theirs.items():
        assert_close(ours[key], grad, rtol=1e-10, atol=1e-10 * max(1.0, grad.abs().max().item()), msg=key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_a_document_moves_no_other_by_a_bit(name, dtype):
    model, layout, tokens = model_of(name, dtype), Layout.of(LENGTHS), tokens_of(sum(LENGTHS))
    changed = tokens.clone()
    changed[10:33] = (tokens[10:33] + 7) % TINY["vocab"]
    with torch.no_grad():
        a, b = model(tokens, layout), model(changed, layout)
    difference = (a - b).abs().amax(-1)
    assert (difference[:10] == 0).all() and (difference[33:] == 0).all() and (difference[10:33] > 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_rows_equal_indexing(name):
    model, layout, tokens = model_of(name), Layout.of(LENGTHS), tokens_of(sum(LENGTHS))
    rows = torch.tensor([3, 8, 12, 30, 31, 46, 33])  # any order
    part, whole = model.logits(model.hidden(tokens, layout, rows=rows)), model(tokens, layout)[rows]
    assert_close(part, whole, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(model, part.square().sum()), gradients(model, whole.square().sum())
    for key, grad in theirs.items():
        assert_close(ours[key], grad, rtol=1e-9, atol=1e-9, msg=key)


def test_rows_spare_the_last_layers_mlp():
    model, seen = model_of("plain"), []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model.hidden(tokens_of(20), Layout.of([20]), rows=torch.tensor([4, 19]))
    assert seen == [20, 20, 2]


@pytest.mark.parametrize("name", SPECS)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(name):
    model, layout, tokens = model_of(name), Layout.of(LENGTHS), tokens_of(sum(LENGTHS))
    found = []
    for policy in (False, True):
        model.checkpoint_layers, kept = policy, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = sum(losses(model(tokens, layout), tokens, layout.bounds))
        found.append((sum(kept), loss, gradients(model, loss)))
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(found[0][2][k], g) for k, g in found[1][2].items())
    assert found[1][0] < 0.5 * found[0][0]


@pytest.mark.parametrize("name", SPECS)
def test_the_cache_equals_the_full_forward(name):
    """Prompts of different lengths side by side, then token by token, a piece of several tokens, sequences dropped and reordered.

    dynamic's base grows with each token past its context and cached keys keep theirs, as in transformers: it is held below."""
    model = model_of(name)
    final = [30, 25, 33] if name != "dynamic" else [12, 11, 12]
    cut = [n // 2 for n in final]
    texts = [tokens_of(n, seed=i) for i, n in enumerate(final)]
    with torch.no_grad():
        whole = [model(t) for t in texts]
        cache = model.new_cache(3, max(final))
        x = model.hidden(torch.cat([t[:n] for t, n in zip(texts, cut, strict=True)]), Layout.of(cut), cache=cache)
        for i, y in enumerate(model.logits(x).split(cut)):
            assert_close(y, last_table(whole, model, texts, i, cut[i]), rtol=1e-10, atol=1e-10)
        at, live = list(cut), [0, 1, 2]
        for step in range(20):
            if step == 3:
                live = [2, 0]  # one dropped, the others change places
                cache.keep(live)
            if any(at[i] >= final[i] for i in live):
                break
            new = 3 if step == 5 and all(at[i] + 3 <= final[i] for i in live) else 1
            layout = Layout.of([new] * len(live))
            x = model.hidden(torch.cat([texts[i][at[i] : at[i] + new] for i in live]), layout, cache=cache)
            for i, y in zip(live, model.logits(x).split(new), strict=True):
                at[i] += new
                assert_close(y[-1], last_table(whole, model, texts, i, at[i])[-1], rtol=1e-9, atol=1e-9)
        assert step > 3
        assert cache.lengths == [at[i] for i in live]


def last_table(whole, model, texts, i, n):
    """The full forward of the first n tokens: longrope's table follows the length, all others' logits are those of the whole."""
    return model(texts[i][:n]) if model.spec.rope.kind == "longrope" else whole[i][:n]


def test_rows_and_the_cache_go_together():
    model, tokens = model_of("longrope"), tokens_of(20)
    with torch.no_grad():
        cache = model.new_cache(2, 20)
        layout = Layout.of([11, 4])
        x = model.hidden(tokens[:15], layout, rows=layout.cu_seqlens[1:].long() - 1, cache=cache)
        assert_close(
            x, torch.stack([model.hidden(tokens[:11], Layout.of([11]))[-1], model.hidden(tokens[11:15], Layout.of([4]))[-1]])
        )
        x = model.hidden(tokens[15:19], Layout.of([3, 1]), rows=torch.tensor([2, 3]), cache=cache)  # the first crosses 12 tokens
        first, second = torch.cat([tokens[:11], tokens[15:18]]), torch.cat([tokens[11:15], tokens[18:19]])
        assert_close(x, torch.stack([model.hidden(first, Layout.of([14]))[-1], model.hidden(second, Layout.of([5]))[-1]]))


def test_what_lies_in_unused_memory_reaches_no_answer():
    """Deterministic mode fills memory that nobody initialised with nan: a hidden key weighs 0, and 0 x nan is nan."""
    model, tokens = model_of("plain"), tokens_of(12)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            cache = model.new_cache(2, 20)
            model.hidden(tokens[:10], Layout.of([8, 2]), cache=cache)
            x = model.hidden(tokens[10:], Layout.of([1, 1]), cache=cache)
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_the_cache_on_a_gpu_in_bfloat16(name):
    """Beside the full forward in float64, as near as the full forward in bfloat16 is; memory is dirtied first."""
    model, exact = model_of(name).to("cuda", torch.bfloat16), model_of(name).cuda()
    dirt = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(20)]
    del dirt
    tokens, more = tokens_of(sum(LENGTHS)).cuda(), tokens_of(len(LENGTHS), seed=1).cuda()
    with torch.no_grad():
        layout, cache = Layout.of(LENGTHS, "cuda"), model.new_cache(len(LENGTHS), 40)
        model.hidden(tokens, layout, cache=cache)
        found = model.logits(model.hidden(more, Layout.of([1] * len(LENGTHS), "cuda"), cache=cache)).double()
        texts = [torch.cat([t, more[i : i + 1]]) for i, t in enumerate(tokens.split(LENGTHS))]
        right, half = (torch.stack([m(t)[-1] for t in texts]).double() for m in (exact, model))
    assert (found - right).norm() < 1.5 * (half - right).norm()


def test_a_full_cache_is_an_error_not_a_wrong_answer():
    model = model_of("plain")
    cache = model.new_cache(1, 4)
    with torch.no_grad(), pytest.raises(AssertionError, match="full"):
        model.hidden(tokens_of(5), Layout.of([5]), cache=cache)


def test_noise_reaches_the_embeddings_only_when_asked():
    model, layout, tokens = model_of("gemma"), Layout.of([6]), tokens_of(6)
    seen = []
    plain = model.hidden(tokens, layout)
    assert torch.equal(model.hidden(tokens, layout, noise=lambda x: seen.append(x) or x), plain)
    assert_close(seen[0], model.model.embed_tokens(tokens) * TINY["dim"] ** 0.5)
    assert not torch.equal(model.hidden(tokens, layout, noise=lambda x: x + 0.1), plain)


def test_linears_come_from_the_factory_and_the_head_is_dense():
    model = Decoder(SPECS["plain"], linear=lambda i, o, bias: NF4Linear(i, o, bias))
    kinds = [type(m) for n, m in model.named_modules() if n.endswith("_proj")]
    assert set(kinds) == {NF4Linear} and len(kinds) == 7 * 3 and type(model.lm_head) is Linear
    weight, cap = model.plain_head()
    assert weight is model.lm_head.weight and cap is None and model.vocab == 61
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model.plain_head() is None


def test_a_tied_head_is_the_embedding_through_casts_and_moves():
    model = model_of("gemma").float().to("cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(set(map(id, model.parameters())))


def test_rows_of_the_embedding_may_lie_elsewhere():
    """Only where nothing else reads them: a tied head is the same matrix."""
    untied, tied = model_of("plain"), model_of("biased")
    assert not tied.requires_grad_(False).embedding_to_host()
    assert not untied.requires_grad_(True).embedding_to_host()
    assert untied.requires_grad_(False).embedding_to_host() and untied.embedding_device.type == "cpu"
    untied.model.norm.to("meta"), untied.model.embed_tokens.to("cpu")
    assert untied.embed(torch.arange(3)).device.type == "meta"  # where the layers are, whatever holds the rows


def test_answers_are_written_where_the_layers_are():
    """The first parameter is the embedding's, which may lie elsewhere: "meta" here, "cpu" beside an NVIDIA GPU."""
    model = model_of("plain").requires_grad_(False)
    how = {"stop_ids": [], "max_tokens": 4}
    before = generate(model, [[1, 2, 3], [4]], **how)
    rows = model.model.embed_tokens.weight.detach().clone()
    model.model.embed_tokens.to("meta")
    model.embed = lambda tokens: torch.nn.functional.embedding(tokens, rows)
    assert model.embedding_device.type == "meta" and model.device.type == "cpu"
    assert generate(model, [[1, 2, 3], [4]], **how) == before
