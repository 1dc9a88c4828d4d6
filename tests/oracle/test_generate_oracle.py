"""transformers' `generate` and its logits processors as the oracle for generate.py: the same tokens, the same distribution."""

import json

import pytest
import torch
import transformers as hf
from torch.testing import assert_close
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunesmith import models
from tunesmith.chat import Talker
from tunesmith.generate import Sampling, distribution, generate
from tunesmith.models.decoder import Decoder
from tunesmith.spec import FAMILIES, spec_of

TINY = dict(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)  # fmt: skip
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            rope_theta=10_000.0, partial_rotary_factor=0.75, original_max_position_embeddings=24)  # fmt: skip
CASES = {
    "llama": hf.LlamaConfig(**TINY),
    "mistral": hf.MistralConfig(**TINY, sliding_window=8),
    "qwen2": hf.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": hf.Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True),
    "phi3": hf.Phi3Config(**TINY, pad_token_id=0, sliding_window=8),
    "phi4-mini": hf.Phi3Config(**TINY, pad_token_id=0, tie_word_embeddings=True, rope_parameters=LONG,
                               original_max_position_embeddings=24),
    "gemma": hf.GemmaConfig(**TINY, head_dim=16),
    "gemma2": hf.Gemma2Config(**TINY, head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
    "gemma3": hf.Gemma3TextConfig(**TINY | dict(num_hidden_layers=6), head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
}  # fmt: skip
MOST = 12  # tokens an answer


def pair(config):
    torch.manual_seed(0)
    theirs = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    as_read = json.loads(json.dumps(config.to_dict()))
    ours = Decoder(spec_of(as_read), config=as_read, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def greedy(model, prompt, stop):
    ids = torch.tensor([list(prompt)])
    how = dict(max_new_tokens=MOST, do_sample=False, eos_token_id=stop or None, pad_token_id=0)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
    return made[:-1] if made[-1] in stop else made


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def test_every_family_has_a_case():
    assert {c.model_type for c in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_transformers_token_for_token(name):
    """Prompts of 1 to 30 tokens in one call: past the window (8), and before, across and after longrope's first context (24)."""
    ours, theirs = pair(CASES[name])
    prompts = prompts_of(20, 1, 30, 16)
    wanted = [greedy(theirs, p, []) for p in prompts]
    assert len({tuple(w) for w in wanted}) == len(prompts)
    assert generate(ours, prompts, stop_ids=[], max_tokens=MOST) == wanted
    assert generate(ours, prompts, stop_ids=[], max_tokens=MOST, batch=2) == wanted
    stop = [wanted[0][4], wanted[3][2]]
    cut = [w[: min((w.index(t) for t in stop if t in w), default=MOST)] for w in wanted]
    assert len(cut[0]) < MOST and cut[0] == greedy(theirs, prompts[0], stop)
    assert generate(ours, prompts, stop_ids=stop, max_tokens=MOST) == cut


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (0.8, 20, 0.7),
                                                       (2.5, 3, 0.01), (1.0, 500, 0.9)])  # fmt: skip
def test_the_distribution_is_that_of_transformers_processors(temperature, top_k, top_p):
    logits = torch.randn(6, 97, generator=torch.Generator().manual_seed(0)) * 3
    steps = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)]
    wanted = LogitsProcessorList(steps)(None, logits).softmax(-1)
    p, ids = distribution(logits, Sampling(temperature, top_k, top_p))
    got = torch.zeros_like(wanted).scatter(-1, ids, p)
    assert torch.equal(got > 0, wanted > 0)
    assert_close(got, wanted, rtol=1e-5, atol=1e-8)


def test_tokens_as_likely_as_the_last_of_top_k_stay_in_as_in_transformers():
    """bf16 logits near 20 lie 0.125 apart: equals are common."""
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]])
    wanted = TopKLogitsWarper(2)(None, logits).softmax(-1)
    p, ids = distribution(logits, Sampling(1.0, 2))
    assert_close(torch.zeros_like(wanted).scatter(-1, ids, p), wanted)
    assert (wanted > 0).sum() == 4


def test_a_real_small_model_tells_transformers_story(shared_data):
    folder = shared_data / "weights" / "TinyStories-656K"
    talker = Talker.open(folder)
    prompt = talker.raw("<|start_story|>Once upon a time")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert prompt == tokenizer("<|start_story|>Once upon a time").input_ids[1:]  # transformers puts a second BOS before it
    assert talker.raw("Once upon a time") == tokenizer("Once upon a time").input_ids
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    how = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
    assert generate(models.load(folder), [prompt], stop_ids=[2], max_tokens=40) == [made]
    answer = talker.answer(["<|start_story|>Once upon a time"], raw=True, max_tokens=40)[0]
    assert "little girl" in answer and answer == talker.renderer.tokenizer.decode(made)
