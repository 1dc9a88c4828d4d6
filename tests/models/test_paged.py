"""models/paged.py and models/lean.py: sequences that come, go and share blocks get what the model gives without a cache."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tunesmith.models import paged
from tunesmith.models.decoder import Decoder
from tunesmith.models.lean import Lean, densify, refusal
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.paged import Blocks, Part, Pass, Pool, bytes_per_block
from tunesmith.ops.attention import Layout
from tunesmith.ops.paged import BLOCK
from tunesmith.spec import spec_of

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}  # fmt: skip
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0 + i for i in range(4)]}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 40, "rope_scaling": LONG, "sliding_window": None},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
}


def decoder(family: str, **more) -> Decoder:
    config = SIZES | FAMILIES[family] | more
    model = Decoder(spec_of(config), config=config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(0.3 * drawn + (0.0 if "norm" not in name else 1 - model.spec.unit_offset))
    return model.eval().requires_grad_(False)


def run(model, pool, parts, tokens, rows=None):
    where = Pass(pool, parts)
    if isinstance(model, Lean):
        return model.hidden(tokens, where, rows)
    return model.hidden(tokens, where.layout, rows=rows, cache=where)


@pytest.mark.parametrize("lean", [False, True], ids=["composed", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_steps_give_what_the_model_gives_at_once(family, lean):
    """Three sequences of 70, 33 and 50 tokens: one prefilled in three pieces while another decodes, their blocks interleaved."""
    whole = decoder(family)
    if lean and (reason := refusal(whole)):
        assert family.startswith("gemma") and reason
        return
    model = Lean(decoder(family)) if lean else whole
    pool = Pool(whole.spec, 40, torch.float32, "cpu")
    tokens = [torch.randint(90, (n,), generator=torch.Generator().manual_seed(n)) for n in (70, 33, 50)]
    wanted = [whole.hidden(t, Layout.of([len(t)])) for t in tokens]
    held, blocks, found = [0, 0, 0], [[], [], []], [[], [], []]
    steps = [{0: 30}, {0: 1, 1: 20}, {0: 1, 1: 1, 2: 17}, {1: 1, 0: 1, 2: 16}, {2: 1, 0: 20}, {1: 11, 2: 16}, {0: 17}]
    for step in steps:
        parts, stream = [], []
        for i, n in sorted(step.items(), key=lambda item: item[1] != 1):
            need = -(-(held[i] + n) // BLOCK) - len(blocks[i])
            blocks[i] += pool.blocks.take(need) or []  # never beside the last: they interleave
            parts.append((i, Part(n, held[i], list(blocks[i]), len(tokens[i]))))
            stream.append(tokens[i][held[i] : held[i] + n])
        x = run(model, pool, [part for _, part in parts], torch.cat(stream))
        for (i, part), y in zip(parts, x.split([part.new for _, part in parts]), strict=True):
            found[i].append(y)
            held[i] += part.new
    assert held == [70, 33, 50]
    for a, b in zip(found, wanted, strict=True):
        assert (torch.cat(a) - b).abs().max() < 2e-5 * b.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_take_the_kernel_for_ragged_lengths_alone_too(family, monkeypatch):
    """As on a GPU, with the kernel's definition in its place: one fresh prompt, two, then pieces behind what the cache holds.
    cuDNN, which `attention` takes for one document, would be planned again for each length."""
    calls = []

    def plain(q, k, v, ends_q, ends_k, longest_q, longest_k, scale, window):
        calls.append((longest_q, longest_k))
        out = []
        for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
            back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            mask = (back >= 0) & (back < (window or d))
            heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(paged, "room_kernel", lambda like, width: True)
    monkeypatch.setattr(paged, "varlen", plain)
    monkeypatch.setattr(paged, "attention", lambda *args: pytest.fail("the kernel was left to attention's choice"))
    whole = decoder(family)
    lean, pool = Lean(decoder(family)), Pool(whole.spec, 40, torch.float32, "cpu")
    tokens = [torch.randint(90, (n,), generator=torch.Generator().manual_seed(n)) for n in (70, 33)]
    wanted = [whole.hidden(t, Layout.of([len(t)])) for t in tokens]
    one, two = pool.blocks.take(5), pool.blocks.take(3)
    alone = run(lean, pool, [Part(30, 0, one, 70)], tokens[0][:30])
    both = run(lean, pool, [Part(25, 30, one, 70), Part(20, 0, two, 33)], torch.cat([tokens[0][30:55], tokens[1][:20]]))
    last = run(lean, pool, [Part(1, 20, two, 33), Part(15, 55, one, 70)], torch.cat([tokens[1][20:21], tokens[0][55:]]))
    first = torch.cat([alone, both[:25], last[1:]])
    assert (first - wanted[0]).abs().max() < 2e-5 * wanted[0].abs().max()
    assert (torch.cat([both[25:], last[:1]]) - wanted[1][:21]).abs().max() < 2e-5 * wanted[1].abs().max()
    assert len(calls) == 3 * 3 and calls[0] == (30, 30) and calls[3] == (25, 55) and calls[6] == (15, 70)


def test_rows_alone_are_those_rows():
    model, pool = decoder("llama"), None
    for one in (model, Lean(decoder("llama"))):
        pool, tokens, rows = Pool(model.spec, 8, torch.float32, "cpu"), torch.arange(20), torch.tensor([6, 19])
        parts = [Part(7, 0, pool.blocks.take(1), 7), Part(13, 0, pool.blocks.take(1), 13)]
        whole = run(one, pool, parts, tokens)
        assert torch.allclose(run(one, pool, parts, tokens, rows), whole[rows], atol=1e-6)


def test_blocks_in_a_row_are_not_copied_and_all_come_back():
    blocks = Blocks(64)
    first = blocks.take(4)
    second = blocks.take(4)
    assert first == list(range(first[0], first[0] + 4)) and second == list(range(second[0], second[0] + 4))
    for _ in range(6):  # each grows beside its last block while there is room
        first += blocks.take(1, first[-1])
        second += blocks.take(1, second[-1])
    assert first == list(range(first[0], first[0] + 10)) and second == list(range(second[0], second[0] + 10))
    assert blocks.take(60) is None and blocks.free == 63 - 20 and 0 not in first + second
    rest = blocks.take(43)
    assert blocks.free == 0 and len({*first, *second, *rest}) == 63
    for mine in (first, rest, second):
        blocks.give(mine)
    assert blocks.free == 63
    with pytest.raises(AssertionError, match="twice"):
        blocks.give(first)


def test_the_lean_path_holds_no_weight_twice():
    model = decoder("llama")
    before = sum(p.numel() for p in model.parameters())
    lean = Lean(model)
    places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(places.values()) == 4 * before
    assert lean.groups[0][0].weight_NK.untyped_storage().data_ptr() in places


def test_dense_again_multiplies_as_nf4_did():
    model = Decoder(spec_of(SIZES | {"model_type": "llama"}), linear=NF4Linear).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                module.set_weight("weight", torch.randn(module.out_features, module.in_features))
            elif "norm" in name and hasattr(module, "weight"):
                module.weight.fill_(1.0)
    tokens = torch.arange(30)
    assert "dense" in refusal(model)
    wanted = model(tokens)
    assert densify(model) == 3 * 7 and not refusal(model)
    assert torch.equal(model(tokens), wanted) and type(model.model.layers[0].mlp.up_proj) is Linear


def test_the_size_of_a_block_is_what_a_pool_takes():
    spec = decoder("llama").spec
    pool = Pool(spec, 5, torch.bfloat16, "cpu")
    assert 5 * bytes_per_block(spec, torch.bfloat16) == pool.keys.nbytes + pool.values.nbytes
