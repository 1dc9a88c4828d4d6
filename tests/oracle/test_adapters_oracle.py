"""PEFT as the oracle for adapters: files both ways, logits, gradients, on transformers' own models."""

import warnings

import peft
import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from tunesmith import adapters
from tunesmith.config import schema

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, num_key_value_heads=2)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1,
                                                     eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL, num_key_value_heads=2)),
}  # fmt: skip
FLAGS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TOKENS = torch.arange(24).view(2, 12) * 7 % 97
ALPHA = 12.0


def base(family: str) -> hf.PreTrainedModel:
    """The same weights at every call; float64, so that only a different formula can show."""
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def stir(model: torch.nn.Module) -> None:
    """Random adapter weights, in float32 steps so that a file keeps them exactly."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape).mul(0.1).to(p.dtype)).copy_(p.float())


def saved_by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def load_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().eval()


def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("variant", FLAGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours(family, variant, tmp_path):
    ours = base(family)
    adapters.attach(ours, schema.Lora(rank=4, alpha=ALPHA, variant=variant), seed=0)
    assert_close(logits(ours), logits(base(family)), rtol=1e-9, atol=1e-9)
    stir(ours)
    adapters.save(ours, tmp_path, base_name="base")
    theirs = load_peft(base(family), tmp_path)
    assert_close(logits(ours), logits(theirs), rtol=1e-9, atol=1e-9)
    assert (logits(ours) - logits(base(family))).abs().max() > 1e-2
    with adapters.disabled(ours):
        assert torch.equal(logits(ours), logits(base(family)))
    live = logits(ours)
    assert_close(logits(adapters.merge(ours)), live, rtol=1e-9, atol=1e-9)
    assert set(ours.state_dict()) == set(base(family).state_dict())


@pytest.mark.parametrize("variant", FLAGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_pefts_with_equal_gradients(family, variant, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **FLAGS[variant])
    theirs = peft.get_peft_model(base(family), config, autocast_adapter_dtype=False).double()
    stir(theirs)
    saved_by_peft(theirs, tmp_path)
    ours = base(family)
    adapters.load(ours, tmp_path, trainable=True)
    assert_close(logits(ours), logits(theirs), rtol=1e-9, atol=1e-9)
    for model in (ours, theirs):
        logits(model).sin().sum().backward()
    wanted = {k.replace(".default", "").removesuffix(".weight"): p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    got = {k.removesuffix(".weight"): p.grad for k, p in adapters.trainable(ours).items()}
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name], rtol=1e-8, atol=1e-9, msg=name)
    assert not any(p.grad is not None for n, p in ours.named_parameters() if ".base." in n)
