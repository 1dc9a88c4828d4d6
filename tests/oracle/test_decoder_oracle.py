"""transformers as the oracle: same weights and tokens, same logits and gradient of every parameter, for every family and rope."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch.testing import assert_close

from tunesmith import models
from tunesmith.models import decoder as decoder_module
from tunesmith.models.decoder import Decoder
from tunesmith.models.weights import save_checkpoint
from tunesmith.ops import attention as attention_op
from tunesmith.ops import rotary as rotary_op
from tunesmith.ops.attention import Layout
from tunesmith.spec import FAMILIES, ROPE_KEYS, parameters, spec_of, tensor_shapes

TINY = dict(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=500_000.0)  # fmt: skip
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            rope_theta=10_000.0, partial_rotary_factor=0.75, original_max_position_embeddings=32)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10_000.0)
ORIGINAL = 32

CASES = {
    "llama": hf.LlamaConfig(**TINY),
    "llama-biased": hf.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama-3.1": hf.LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama-3.2": hf.LlamaConfig(**TINY, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-linear": hf.LlamaConfig(**TINY, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "llama-dynamic": hf.LlamaConfig(**TINY | dict(max_position_embeddings=ORIGINAL),
                                    rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "llama-yarn-mscale": hf.LlamaConfig(**TINY, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5, truncate=False)),
    "mistral": hf.MistralConfig(**TINY, sliding_window=None),
    "mistral-window": hf.MistralConfig(**TINY, sliding_window=8),
    "qwen2": hf.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen2-yarn": hf.Qwen2Config(**TINY, rope_parameters=YARN),
    "qwen2-window": hf.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": hf.Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True),
    "qwen3-yarn": hf.Qwen3Config(**TINY, head_dim=24, attention_bias=True, rope_parameters=YARN | dict(attention_factor=1.5)),
    "phi3": hf.Phi3Config(**TINY, pad_token_id=0, sliding_window=8),
    "phi4-mini": hf.Phi3Config(**TINY, pad_token_id=0, tie_word_embeddings=True, rope_parameters=LONG,
                               original_max_position_embeddings=ORIGINAL),
    "gemma": hf.GemmaConfig(**TINY, head_dim=16),
    "gemma2": hf.Gemma2Config(**TINY, head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
    "gemma3": hf.Gemma3TextConfig(**TINY | dict(num_hidden_layers=6), head_dim=16, sliding_window=8, query_pre_attn_scalar=24,
                                  rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=1e4),
                                                       full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6))),
}  # fmt: skip
TIGHT = dict(rtol=1e-5, atol=1e-5)  # transformers computes its norms in float32 inside a float64 model: 1e-7 relative a norm


def pair(config, seed=0):
    torch.manual_seed(seed)
    theirs = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():  # norms start at a constant: shake them, or a wrong offset would pass
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    as_read = json.loads(json.dumps(config.to_dict()))
    ours = Decoder(spec_of(as_read), config=as_read, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)  # no renaming, none missing, none spare
    return ours, theirs


def tokens_of(*lengths, seed=1):
    return torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def loss_of(logits, tokens, bounds):
    """Summed next-token loss over documents: touches every logit and every parameter."""
    return sum(F.cross_entropy(logits[a : b - 1], tokens[a + 1 : b], reduction="sum") for a, b in pairwise(bounds))


def one_by_one(theirs, tokens, bounds):
    return torch.cat([theirs(tokens[None, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)])


def test_every_family_and_every_rope_has_a_case():
    assert {c.model_type for c in CASES.values()} == set(FAMILIES)
    assert {spec_of(c.to_dict()).rope.kind for c in CASES.values()} == set(ROPE_KEYS)


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_and_every_gradient_match_documents_one_by_one(name):
    """Three documents in one stream against transformers' runs of each alone; 48 tokens pass the window and the first context."""
    ours, theirs = pair(CASES[name])
    layout = Layout.of([48, 1, 20])
    tokens = tokens_of(48, 1, 20)
    a, b = ours(tokens, layout), one_by_one(theirs, tokens, layout.bounds)
    assert_close(a, b, **TIGHT)
    loss_of(a, tokens, layout.bounds).backward()
    loss_of(b, tokens, layout.bounds).backward()
    expected = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        assert expected[key].grad.abs().max() > 1e-3, key
        assert_close(p.grad, expected[key].grad, rtol=1e-4, atol=1e-4 * expected[key].grad.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_counts_follow_from_the_config_alone(name):
    _, theirs = pair(CASES[name])
    spec = spec_of(CASES[name].to_dict())
    shapes = {k: tuple(t.shape) for k, t in theirs.state_dict().items() if not (spec.tied and k == "lm_head.weight")}
    assert tensor_shapes(spec) == shapes
    assert parameters(spec).total == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_rounds_where_transformers_rounds(name):
    """To the bit, where both use SDPA; Gemma 2's written-out scores differ by less than bf16 itself costs."""
    ours, theirs = pair(CASES[name])
    tokens = tokens_of(24)
    kernel = "eager" if name == "gemma2" else "sdpa"
    half = hf.AutoModelForCausalLM.from_config(CASES[name], attn_implementation=kernel, dtype=torch.bfloat16).eval()
    half.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        exact, b = theirs(tokens[None]).logits[0], half(tokens[None]).logits[0]
        a = ours.bfloat16()(tokens)
    assert torch.equal(a, b) if kernel == "sdpa" else (a - b).norm() < (b - exact).norm()


@pytest.mark.parametrize("name", ["llama-3.2", "phi4-mini", "gemma2", "gemma3", "mistral-window", "qwen2-window"])
def test_greedy_generation_equals_transformers(name):
    """Through the cache, past the window and past longrope's first context (32 tokens), where both compute the cache again."""
    ours, theirs = pair(CASES[name])
    prompt = tokens_of(26)
    with torch.no_grad():
        expected = theirs.generate(prompt[None], max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, 26:
        ].tolist()
        cache = ours.new_cache(1, 40)
        x = ours.hidden(prompt, Layout.of([26]), rows=torch.tensor([25]), cache=cache)
        found = []
        for _ in range(14):
            found.append(int(ours.logits(x).argmax()))
            x = ours.hidden(torch.tensor(found[-1:]), Layout.of([1]), cache=cache)
    assert found == expected


# ------------------------------------------------------------------ mutants: the comparison above must notice each
def _window_off_by_one(monkeypatch):
    real = decoder_module.attention
    monkeypatch.setattr(decoder_module, "attention", lambda *a: real(*a[:5], a[5] and a[5] + 1, a[6]))


def _no_unit_offset(monkeypatch):
    real = decoder_module.rms_norm
    monkeypatch.setattr(decoder_module, "rms_norm", lambda x, w, eps, offset: real(x, w, eps, 0.0))


def _erf_gelu(monkeypatch):
    monkeypatch.setattr(decoder_module, "swiglu", lambda gate, up, activation: F.gelu(gate) * up)


def _swapped_rope_sign(monkeypatch):
    real = decoder_module.rotate
    monkeypatch.setattr(decoder_module, "rotate", lambda x, cos, sin: real(x, cos, -sin))


def _interleaved_rope(monkeypatch):
    real = decoder_module.rotate

    def rotate(x, cos, sin):
        pairs = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
        return real(pairs, cos, sin)

    monkeypatch.setattr(decoder_module, "rotate", rotate)


def _table_by_batch(monkeypatch):
    real = rotary_op.tables

    def tables(rope, head, context, positions, lengths, *rest):
        return real(rope, head, context, positions, [max(lengths)] * len(lengths), *rest)

    monkeypatch.setattr(decoder_module, "tables", tables)


def _no_softcap(monkeypatch):
    real = decoder_module.attention
    monkeypatch.setattr(decoder_module, "attention", lambda *a: real(*a[:6], None))


def _local_rope_everywhere(monkeypatch):
    real = Decoder._tables
    monkeypatch.setattr(Decoder, "_tables", lambda self, *a: (real(self, *a)[1],) * 2)


def _documents_see_each_other(monkeypatch):
    real = attention_op.attention
    monkeypatch.setattr(decoder_module, "attention", lambda q, k, v, layout, *how: real(q, k, v, Layout.of([len(q)]), *how))


MUTANTS = [
    ("mistral-window", _window_off_by_one), ("gemma", _no_unit_offset), ("gemma", _erf_gelu), ("llama", _swapped_rope_sign),
    ("llama", _interleaved_rope), ("phi4-mini", _table_by_batch), ("llama-dynamic", _table_by_batch), ("gemma2", _no_softcap),
    ("gemma3", _local_rope_everywhere), ("llama", _documents_see_each_other),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_mutant_is_caught(name, mutant, monkeypatch):
    ours, theirs = pair(CASES[name])
    layout, tokens = Layout.of([48, 1, 20]), tokens_of(48, 1, 20)
    with torch.no_grad():
        right = one_by_one(theirs, tokens, layout.bounds)
        assert_close(ours(tokens, layout), right, **TIGHT)
        mutant(monkeypatch)
        assert (ours(tokens, layout) - right).abs().max() > 100 * TIGHT["atol"]


# ------------------------------------------------------------------ files
@pytest.mark.parametrize("name", ["llama-biased", "phi4-mini", "gemma3", "qwen2-window"])
def test_transformers_reads_what_is_saved_and_the_reverse(name, tmp_path):
    ours, theirs = pair(CASES[name])
    tokens = tokens_of(40)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    loaded = models.load(tmp_path / "theirs", dtype=torch.float64)
    save_checkpoint(ours, tmp_path / "ours", shard_bytes=60_000)
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64, attn_implementation="eager").eval()
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(loaded(tokens), ours(tokens))
        assert torch.equal(back(tokens[None]).logits, theirs(tokens[None]).logits)


def test_a_real_model_tells_transformers_story(shared_data):
    """TinyStories-656K: its tied head lies in the file as lm_head.weight, with no embed_tokens."""
    folder = shared_data / "weights" / "TinyStories-656K"
    ours = models.load(folder)
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor(tokenizer("<|start_story|>", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        expected = theirs.generate(prompt[None], max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()
        cache, found = ours.new_cache(1, len(expected)), prompt.tolist()
        x = ours.hidden(prompt, Layout.of([len(prompt)]), cache=cache)
        while len(found) < len(expected):
            found.append(int(ours.logits(x[-1]).argmax()))
            x = ours.hidden(torch.tensor(found[-1:]), Layout.of([1]), cache=cache)
    assert found == expected
    assert "once upon a time" in tokenizer.decode(found).lower()
