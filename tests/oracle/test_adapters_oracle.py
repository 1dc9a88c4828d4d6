"""PEFT as the oracle for adapters: files both ways, logits, gradients, on transformers' own models."""

import warnings

import peft
import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from tunesmith import adapters, models
from tunesmith.config import schema
from tunesmith.models.linear import NF4Linear

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


PATTERNS = [
    {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 3}, "alpha_pattern": {"o_proj": 5, r"layers\.0\..*": 7}},
    {"rank_pattern": {".*down_proj": 2}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 4, "(q|v)_proj": 9}},
    {"rank_pattern": {"self_attn.q_proj": 1, "q_proj": 5, "model.layers.0.mlp.gate_proj": 6}},
]


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_patterns_mean_what_peft_means(patterns, variant, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=ALPHA, target_modules="all-linear", **FLAGS[variant], **patterns)
    theirs = peft.get_peft_model(base("llama"), config)
    ours = base("llama")
    adapters.attach(ours, schema.Lora(rank=4, alpha=ALPHA, variant=variant, **patterns), seed=0)
    for name, twin in adapters.twins(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        assert (twin.rank, twin.scale) == (layer.r["default"], layer.scaling["default"]), name
    stir(ours)
    adapters.save(ours, tmp_path, base_name="base")
    assert_close(logits(ours), logits(load_peft(base("llama"), tmp_path)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chosen", [
    {"target_modules": ["q_proj", "mlp.down_proj"]},
    {"target_modules": ["model.layers.0.self_attn.v_proj", "lm_head"]},
    {"target_modules": r"model\.layers\.1\..*_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
], ids=str)  # fmt: skip
def test_targets_mean_what_peft_means(chosen, tmp_path):
    theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(r=4, **chosen), autocast_adapter_dtype=False).double()
    stir(theirs)
    saved_by_peft(theirs, tmp_path)
    ours = base("llama")
    adapters.load(ours, tmp_path)
    assert_close(logits(ours), logits(theirs), rtol=1e-9, atol=1e-9)
    again = tmp_path / "again"
    adapters.save(ours, again, base_name="base")
    assert_close(logits(load_peft(base("llama"), again)), logits(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "saved", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("model.norm", "layers.1.mlp.up_proj")], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied; tied, with a scaled embedding and norms of another kind
def test_modules_to_save(family, saved, tmp_path):
    ours = base(family)
    adapters.attach(ours, schema.Lora(rank=4, targets=("q_proj", "up_proj"), modules_to_save=saved), seed=0)
    assert_close(logits(ours), logits(base(family)), rtol=1e-9, atol=1e-9)
    stir(ours)
    adapters.save(ours, tmp_path, base_name="base")
    theirs = load_peft(base(family), tmp_path)
    live = logits(ours)
    assert_close(live, logits(theirs), rtol=1e-9, atol=1e-9)
    with adapters.disabled(ours):
        assert torch.equal(logits(ours), logits(base(family)))
    back = tmp_path / "back"
    saved_by_peft(theirs, back)
    again = base(family)
    adapters.load(again, back)
    assert_close(logits(again), live, rtol=1e-9, atol=1e-9)
    assert_close(logits(adapters.merge(ours)), live, rtol=1e-9, atol=1e-9)
    apart = bool({"embed_tokens", "lm_head"} & set(saved))
    assert ours.config.tie_word_embeddings == (family == "gemma3" and not apart)


NEW = {97: [3, 5], 98: [], 11: None}  # two rows beyond the vocabulary, one with pieces; one that was there


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_new_tokens(family, tmp_path):
    """Rows beyond the vocabulary and within it, in embedding and projection, tied or not."""
    tokens = TOKENS.clone()
    tokens[:, 3], tokens[0, 5], tokens[1, 7] = 97, 98, 11
    ours = base(family)
    embedding = ours.get_input_embeddings().weight.detach().clone()
    adapters.attach(ours, schema.Lora(rank=4, new_tokens=("a", "b", "c")), seed=0, new_tokens=NEW)
    rows = ours.get_input_embeddings().weight
    assert_close(rows[97], embedding[[3, 5]].mean(0))
    assert_close(rows[98], embedding.mean(0))
    assert torch.equal(rows[11], embedding[11])
    assert torch.equal(rows[:97], embedding)
    stir(ours)
    adapters.save(ours, tmp_path, base_name="base")
    theirs = base(family)
    theirs.resize_token_embeddings(99, mean_resizing=False)
    theirs = load_peft(theirs, tmp_path)
    live = ours(tokens).logits
    assert live.shape[-1] == 99
    assert_close(live, theirs(tokens).logits, rtol=1e-9, atol=1e-9)
    theirs.get_submodule("base_model.model").requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name or "trainable_tokens_delta" in name)
    for model in (ours, theirs):
        model(tokens).logits.sin().sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n}
    got = {n: p.grad for n, p in adapters.trainable(ours).items() if "trainable_tokens_delta" in n}
    assert len(wanted) == len(got) == (2 if family == "llama" else 1)
    for name, grad in wanted.items():
        assert_close(got[name.removesuffix(".default")], grad, rtol=1e-8, atol=1e-9)
    fresh = base(family)
    adapters.load(fresh, tmp_path)
    assert_close(fresh(tokens).logits, live, rtol=1e-9, atol=1e-9)
    merged = adapters.merge(ours)
    assert_close(merged(tokens).logits, live, rtol=1e-9, atol=1e-9)
    assert merged.config.vocab_size == 99
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert_close(again(tokens).logits, live, rtol=1e-9, atol=1e-5)  # gemma: sqrt(32) of the live model was rounded to float32


def test_pefts_own_token_training_loads(tmp_path):
    """PEFT's short form, a bare list of ids: the embedding, and a tied projection with it; an untied one is left alone."""
    for family in ("llama", "gemma3"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 2, 11])
        theirs = peft.get_peft_model(base(family), config, autocast_adapter_dtype=False).double()
        stir(theirs)
        saved_by_peft(theirs, tmp_path / family)
        ours = base(family)
        adapters.load(ours, tmp_path / family)
        assert_close(logits(ours), logits(theirs), rtol=1e-9, atol=1e-9)


def test_a_real_adapter(shared_data):
    """16 ranks over gpt2's Conv1D, from the hub, on a random model of gpt2's shape."""
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ours, theirs = hf.GPT2LMHeadModel(config).eval(), hf.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    folder = shared_data / "weights/adapters/gpt2_kto_lora_r16"
    settings = adapters.load(ours, folder)
    assert (settings.rank, settings.variant, len(settings.targets), settings.transposed) == (16, "lora", 12, True)
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert_close(logits(adapters.merge(ours)), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FLAGS)
def test_dropout_of_peft(variant):
    """One linear in training mode, the same random numbers: DoRA drops the correction's inputs too."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 12)).double()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, target_modules=["0"], **FLAGS[variant])
    theirs = peft.get_peft_model(layer, config, autocast_adapter_dtype=False).double()
    stir(theirs)
    source = theirs.base_model.model[0]
    method = adapters.METHODS[variant]
    ours = method.twin(source.base_layer, 4, method.scale(8, 4), 0.4)
    with torch.no_grad():
        ours.lora_A.copy_(source.lora_A["default"].weight)
        ours.lora_B.copy_(source.lora_B["default"].weight)
        if variant == "dora":
            ours.lora_magnitude_vector.copy_(source.lora_magnitude_vector["default"].weight)
    x = torch.randn(9, 16, dtype=torch.float64)
    outs = []
    for module in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outs.append(module(x))
    assert_close(*outs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(outs[0], ours.eval()(x))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_over_nf4_equals_bitsandbytes_with_peft(variant):
    """QLoRA: Linear4bit + PEFT against NF4Linear + ours, forward and every gradient, on the CPU in float32."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 64)
    four = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    four.load_state_dict(dense.state_dict())
    four = four.to("cpu")
    four(torch.zeros(1, 128))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **FLAGS[variant])
    theirs = peft.get_peft_model(torch.nn.Sequential(four), config)
    stir(theirs)
    source = theirs.base_model.model[0]
    stored = NF4Linear(128, 64, True, dtype=torch.float32)
    stored.set_weight("weight", dense.weight.detach())
    stored.set_weight("bias", dense.bias.detach())
    assert torch.equal(stored.weight, source.base_layer.weight.flatten())
    method = adapters.METHODS[variant]
    ours = method.twin(stored, 4, method.scale(8, 4), 0.0)
    pairs = [(ours.lora_A, source.lora_A["default"].weight), (ours.lora_B, source.lora_B["default"].weight)]
    if variant == "dora":
        pairs.append((ours.lora_magnitude_vector, source.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, yours in pairs:
            mine.copy_(yours)
    xs = [torch.randn(7, 128, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outs = [model(x) for model, x in zip((ours, theirs), xs, strict=True)]
    assert_close(*outs, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.sin().sum().backward()
    assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    for mine, yours in pairs:
        assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5)


NATIVE = ["llama", "qwen3", "phi3", "gemma3"]


@pytest.fixture(params=[(f, v) for f in NATIVE for v in FLAGS], ids="-".join)
def native(request, tmp_path):
    """(our Decoder, transformers' model, variant) from one float64 checkpoint folder."""
    family, variant = request.param
    theirs = base(family)
    theirs.save_pretrained(tmp_path / "base")
    theirs = type(theirs).from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    return models.load(tmp_path / "base", dtype=torch.float64), theirs, variant


def test_on_our_decoder(native, tmp_path):
    """The same files on the native decoder; merged, it is a checkpoint that transformers reads as the live model."""
    ours, theirs, variant = native
    tokens = TOKENS[0]
    assert_close(ours(tokens), theirs(tokens[None]).logits[0], rtol=1e-9, atol=1e-5)  # rotary tables are float32 in transformers
    lora = schema.Lora(rank=4, alpha=ALPHA, variant=variant, new_tokens=("a",), modules_to_save=("model.norm",))
    adapters.attach(ours, lora, seed=0, new_tokens={97: [3, 5]})
    stir(ours)
    adapters.save(ours, tmp_path / "adapter", base_name="base")
    theirs.resize_token_embeddings(98, mean_resizing=False)
    theirs = load_peft(theirs, tmp_path / "adapter")
    tokens = tokens.clone()
    tokens[4] = 97
    live = ours(tokens)
    assert_close(live, theirs(tokens[None]).logits[0], rtol=1e-9, atol=1e-5)
    again = models.load(tmp_path / "base", dtype=torch.float64)
    adapters.load(again, tmp_path / "adapter")
    assert_close(again(tokens), live, rtol=1e-9, atol=1e-9)
    models.save_checkpoint(adapters.merge(ours), tmp_path / "merged", dtype=torch.float32)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.vocab_size == 98
    assert_close(merged(tokens[None]).logits[0].double(), live, rtol=1e-4, atol=1e-4)


def test_our_decoder_loads_pefts(native, tmp_path):
    """What PEFT trained and wrote, with a module whole and rows of the vocabulary: the native decoder answers as PEFT does."""
    ours, theirs, variant = native
    config = peft.LoraConfig(r=4, lora_alpha=ALPHA, target_modules="all-linear", modules_to_save=["model.norm"],
                             trainable_token_indices=[5, 2, 11], **FLAGS[variant])  # fmt: skip
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).double()
    before = theirs(TOKENS[:1]).logits[0].detach()
    stir(theirs)
    saved_by_peft(theirs, tmp_path / "adapter")
    settings = adapters.load(ours, tmp_path / "adapter")
    assert settings.variant == variant and settings.modules_to_save == ("model.norm",) and settings.tokens
    wanted = theirs(TOKENS[:1]).logits[0]
    assert_close(ours(TOKENS[0]), wanted, rtol=1e-9, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2


def test_qlora_merges_into_what_was_trained(tmp_path):
    """An NF4 base becomes dense, decoded weights plus the delta; a projection trained apart from a tied embedding is untied."""
    base("gemma3").float().save_pretrained(tmp_path / "base")
    ours = models.load(tmp_path / "base", store="nf4")
    adapters.attach(ours, schema.Lora(rank=4, modules_to_save=("lm_head",)), seed=0)
    stir(ours)
    live = ours(TOKENS[0])
    models.save_checkpoint(adapters.merge(ours), tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.tie_word_embeddings is False
    assert_close(merged(TOKENS[:1]).logits[0], live, rtol=1e-4, atol=1e-4)
    dense = models.load(tmp_path / "base")
    assert (dense(TOKENS[0]) - live).abs().max() > 1e-2
