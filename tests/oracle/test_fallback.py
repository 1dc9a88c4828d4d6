"""transformers and PEFT as the oracle for models/fallback.py: same logits, same LoRA gradients, documents kept apart."""

import json
import shutil
import sys
import warnings
from itertools import pairwise

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tunesmith import adapters, models
from tunesmith.config import schema
from tunesmith.errors import MissingExtra, ModelError
from tunesmith.generate import generate
from tunesmith.models import fallback
from tunesmith.models.linear import NF4Linear
from tunesmith.ops.attention import Layout
from tunesmith.spec import support
from tunesmith.train.loss import batch_loss
from tunesmith.types import Batch

T = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
         max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GQA = T | dict(num_key_value_heads=2)
SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
CASES = {
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2),
    "phi": hf.PhiConfig(**T, partial_rotary_factor=0.5),
    "olmo2": hf.Olmo2Config(**GQA),
    "starcoder2": hf.Starcoder2Config(**GQA, sliding_window=6),
    "cohere": hf.CohereConfig(**GQA, logit_scale=0.25),
    "granite": hf.GraniteConfig(**GQA, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "gpt_neox": hf.GPTNeoXConfig(**T),
    "mixtral": hf.MixtralConfig(**GQA, num_local_experts=4, sliding_window=None),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97),
    "opt": hf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0),
    "mpt": hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64),
    "falcon": hf.FalconConfig(**SMALL, num_attention_heads=4),
    "falcon-alibi": hf.FalconConfig(**SMALL, num_attention_heads=4, alibi=True),
    "mamba": hf.MambaConfig(**SMALL, state_size=8),
    "olmo2-dynamic": hf.Olmo2Config(**GQA | dict(max_position_embeddings=8),
                                    rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
}  # fmt: skip
PACKS = {"gpt2", "phi", "olmo2", "starcoder2", "cohere", "granite", "gpt_neox"}
SCALED = {"cohere", "granite"}  # logits are not lm_head(hidden)
RECOMPUTES = {"mamba", "olmo2-dynamic"}
# mixtral: which tokens share an expert's matrix product changes with the other document, and with it the last bits
TIGHT = dict(rtol=1e-5, atol=1e-6)  # float64, but transformers computes norms and softmax of some models in float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each case's checkpoint, written by transformers, its norms and biases shaken."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in CASES.items():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(root / name)
    return root


def oracle(folder, **how):
    return hf.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float64} | how).eval()


def tokens_of(*lengths):
    return torch.randint(3, 97, (sum(lengths),), generator=torch.Generator().manual_seed(1))


def one_by_one(theirs, tokens, bounds):
    return torch.cat([theirs(tokens[None, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)])


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_equal_transformers_one_by_one(name, folders):
    assert support(CASES[name].to_dict()).state == "fallback"
    dtype = torch.float32 if name == "mixtral" else torch.float64  # its grouped matrix product knows no float64
    ours, theirs = fallback.load(folders / name, dtype=dtype), oracle(folders / name, dtype=dtype)
    layout, tokens = Layout.of([9, 1, 12]), tokens_of(9, 1, 12)
    assert_close(ours(tokens, layout), one_by_one(theirs, tokens, layout.bounds), check_dtype=False, **TIGHT)
    assert {k for k, _ in ours.named_parameters()} == {k for k, _ in theirs.named_parameters()}
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert torch.equal(buffer, expected.pop(key)), key
    assert not expected
    assert ours.packs == (name in PACKS), ours.note
    assert ("one by one" in ours.note) != ours.packs
    assert ours.plain == (name not in SCALED) and ours.caches == (name not in RECOMPUTES)
    if name in ("gpt2", "olmo2"):
        assert ours.plain_head()[0] is ours.get_output_embeddings().weight
    if name in SCALED | {"phi"}:  # phi's head has a bias
        assert ours.plain_head() is None


@pytest.mark.parametrize("name", CASES)
def test_changing_one_document_leaves_the_other_as_it_is(name, folders):
    ours, layout = fallback.load(folders / name), Layout.of([9, 12])
    tokens = tokens_of(9, 12)
    other = tokens.clone()
    other[:9] = 96 - other[:9]
    before, after = (ours(t, layout) for t in (tokens, other))
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


@pytest.mark.parametrize("name", ["opt", "falcon", "falcon-alibi"])
def test_these_leak_when_packed_so_the_check_at_load_is_needed(name, folders):
    """If transformers mends this, the test fails and the families move to PACKS."""
    ours = fallback.load(folders / name)
    ours.packs = True
    tokens = tokens_of(9, 12)
    other = tokens.clone()
    other[:9] = 96 - other[:9]
    before, after = (ours(t, Layout.of([9, 12])) for t in (tokens, other))
    assert (before[9:] - after[9:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in CASES if n != "mixtral"])
def test_a_lora_gradient_equals_pefts(name, folders, tmp_path):
    ours = fallback.load(folders / name, dtype=torch.float64)
    targets = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"  # PEFT refuses its out_proj and passes by its dt_proj
    adapters.attach(ours, schema.Lora(rank=4, alpha=12.0, targets=targets), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapters.trainable(ours).values():
            p.add_(torch.randn(p.shape).mul(0.1).to(p.dtype)).copy_(p.float())
    adapters.save(ours, tmp_path, base_name="base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of fan_in_fan_out
        theirs = peft.PeftModel.from_pretrained(oracle(folders / name), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    theirs.double().eval()
    layout, tokens = Layout.of([9, 12]), tokens_of(9, 12)
    logits = one_by_one(theirs, tokens, layout.bounds)
    ours.train()  # the model's own dropout is off
    assert_close(ours(tokens, layout), logits, check_dtype=False, **TIGHT)
    keep = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, *range(9, 20)])
    F.cross_entropy(logits[keep].double(), tokens[keep + 1], reduction="sum").backward()
    batch = Batch(*_batch(tokens, layout, keep))
    loss, _ = batch_loss(ours, batch, torch.device("cpu"))
    loss.backward()
    wanted = {k.replace(".default", ""): p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    got = {k: p.grad for k, p in adapters.trainable(ours).items()}
    assert got.keys() == wanted.keys() and got
    for key in wanted:
        assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-4 * wanted[key].abs().max().item(), msg=key)


def _batch(tokens, layout, rows):
    fields = {
        "tokens": tokens,
        "positions": layout.positions_T,
        "cu_seqlens": layout.cu_seqlens,
        "rows": rows,
        "labels": tokens[rows + 1],
    }
    return [fields[f].numpy() for f in Batch.__dataclass_fields__ if f in fields]


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "bloom", "cohere"])
def test_recomputed_activations_and_noise_change_no_gradient_and_no_packing(name, folders):
    def noise(x_TD):
        """Of the whole stream, as NEFTune's: drawn anew at each call, the same."""
        return x_TD + torch.rand(x_TD.shape, generator=torch.Generator().manual_seed(3), dtype=x_TD.dtype)

    grads = {}
    for again in (False, True):
        ours = fallback.load(folders / name, dtype=torch.float64)
        adapters.attach(ours, schema.Lora(rank=2), seed=0)
        ours.train()
        ours.checkpoint_layers = again
        hidden = ours.hidden(tokens_of(9, 12), Layout.of([9, 12]), noise=noise, rows=torch.tensor([3, 15]))
        assert hidden.shape[0] == 2
        ours.logits(hidden).sin().sum().backward()
        grads[again] = {k: p.grad for k, p in adapters.trainable(ours).items()}
        calm = ours.hidden(tokens_of(9, 12), Layout.of([9, 12]), rows=torch.tensor([3, 15]))
        assert (calm - hidden).abs().max() > 1e-3  # the noise is in
        if ours.packs:
            ours.packs = False
            apart = ours.hidden(tokens_of(9, 12), Layout.of([9, 12]), noise=noise, rows=torch.tensor([3, 15]))
            assert_close(apart, hidden, rtol=1e-6, atol=1e-6)
    for key, grad in grads[False].items():
        assert_close(grads[True][key], grad, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["gpt2", "phi", "mixtral", "falcon", "mamba"])
def test_nf4_is_the_quantised_base_and_saves_dense(name, folders, tmp_path):
    ours = fallback.load(folders / name, store="nf4")
    stores = [n for n, m in ours.named_modules() if isinstance(m, NF4Linear)]
    assert stores and not isinstance(ours.get_output_embeddings(), NF4Linear)
    theirs = oracle(folders / name, dtype=torch.float32)
    with torch.no_grad():  # transformers over the decoded weights: only the store may differ, not what is done with it
        for n in stores:
            weight = ours.get_submodule(n).dequantize(torch.float32)
            theirs.get_submodule(n).weight.copy_(weight.t() if n in ours.transposed else weight)
    tokens = tokens_of(12)
    logits = ours(tokens)
    assert_close(logits, theirs(tokens[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)
    ours.save_checkpoint(tmp_path / "saved")
    assert_close(
        oracle(tmp_path / "saved", dtype=torch.float32)(tokens[None], use_cache=False).logits[0], logits, rtol=1e-4, atol=1e-5
    )


WHOLE_BLOCKS = {  # rows of a multiple of 64: bitsandbytes 0.50 decodes others wrong where the processor has bf16 units
    "gpt2": hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2),
    "olmo2": hf.Olmo2Config(**GQA | dict(hidden_size=64, intermediate_size=128)),
}


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
def test_a_checkpoint_that_bitsandbytes_quantised_loads_as_it_is(name, tmp_path):
    """gpt2's Conv1D lies there turned round."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(WHOLE_BLOCKS[name]).save_pretrained(tmp_path / "plain")
    double = dict(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    how = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)
    theirs = oracle(tmp_path / "plain", dtype=torch.float32, quantization_config=how)
    theirs.save_pretrained(tmp_path / "packed")
    tokens = tokens_of(12)
    wanted = theirs(tokens[None], use_cache=False).logits[0]
    assert (wanted - oracle(tmp_path / "plain", dtype=torch.float32)(tokens[None]).logits[0]).abs().max() > 1e-3
    for store in ("nf4", "dense"):
        assert_close(fallback.load(tmp_path / "packed", store=store)(tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", ["dense", "nf4"])
@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_a_merged_adapter_is_a_folder_transformers_loads(name, store, folders, tmp_path):
    ours = fallback.load(folders / name, store=store)
    adapters.attach(ours, schema.Lora(rank=4, modules_to_save=("lm_head",)), seed=0)
    with torch.no_grad():
        for p in adapters.trainable(ours).values():
            p.add_(torch.randn_like(p) * 0.05)
    tokens = tokens_of(12)
    live = ours(tokens)
    assert ours.plain_head() is None
    adapters.merge(ours)
    models.save_checkpoint(ours, tmp_path)
    assert_close(oracle(tmp_path, dtype=torch.float32)(tokens[None], use_cache=False).logits[0], live, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def stir(parameters):
    """Random, in float32 steps so that a file keeps them exactly."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape).mul(0.1).to(p.dtype)).copy_(p.float())


def on_peft(model, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of fan_in_fan_out
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().eval()


FINAL_NORM = {"gpt2": "transformer.ln_f", "olmo2": "model.norm", "bloom": "transformer.ln_f"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FINAL_NORM)
def test_adapters_pass_between_the_fallback_and_peft(name, variant, folders, tmp_path):
    """Every variant with a new token, a known one and a module trained whole: ours in PEFT, PEFT's in ours, and merged."""
    ours, tokens = fallback.load(folders / name, dtype=torch.float64), tokens_of(12)
    tokens[4], tokens[7] = 97, 11
    lora = schema.Lora(rank=4, alpha=12.0, variant=variant, new_tokens=("a", "b"), modules_to_save=(FINAL_NORM[name],))
    adapters.attach(ours, lora, seed=0, new_tokens={97: [3, 5], 11: None})
    stir(adapters.trainable(ours).values())
    adapters.save(ours, tmp_path / "ours", base_name="base")
    theirs = oracle(folders / name)
    theirs.resize_token_embeddings(98, mean_resizing=False)
    theirs, live = on_peft(theirs, tmp_path / "ours"), ours(tokens)
    assert_close(live, theirs(tokens[None], use_cache=False).logits[0], check_dtype=False, **TIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    again = fallback.load(folders / name, dtype=torch.float64)
    adapters.load(again, tmp_path / "theirs")
    assert_close(again(tokens), live, **TIGHT)
    with adapters.disabled(again):
        assert (again(tokens) - live).abs().max() > 1e-2
    models.save_checkpoint(adapters.merge(ours), tmp_path / "merged", dtype=torch.float32)
    merged = oracle(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == 98
    assert_close(merged(tokens[None], use_cache=False).logits[0].double(), live.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("mixtral", "olmo2-dynamic")])
def test_greedy_answers_equal_transformers_generate(name, folders):
    ours, theirs = fallback.load(folders / name, dtype=torch.float64), oracle(folders / name)
    prompts = [tokens_of(n).tolist() for n in (7, 1, 4)]
    got = generate(ours, prompts, stop_ids=[5], max_tokens=8)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        how = dict(max_new_tokens=8, do_sample=False, eos_token_id=5, pad_token_id=0, bos_token_id=1)
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
        assert answer == (whole[: whole.index(5)] if 5 in whole else whole)


def test_a_short_document_is_not_rotated_by_an_earlier_long_ones_table(folders):
    """transformers keeps the table of the longest document it has seen; ours answers as a fresh model does."""
    ours, tokens = fallback.load(folders / "olmo2-dynamic", dtype=torch.float64), tokens_of(14)
    fresh = oracle(folders / "olmo2-dynamic")(tokens[None, :10], use_cache=False).logits[0]
    ours(tokens)
    assert_close(ours(tokens[:10]), fresh, **TIGHT)
    answer = generate(ours, [tokens[:6].tolist()], stop_ids=[], max_tokens=6)[0]
    for n in range(6):
        at = torch.tensor([*tokens[:6].tolist(), *answer[:n]])
        assert oracle(folders / "olmo2-dynamic")(at[None], use_cache=False).logits[0, -1].argmax() == answer[n]


# ------------------------------------------------------------------ refused, and what a config.json may not do
def changed(folder, tmp_path, **keys):
    shutil.copytree(folder, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return tmp_path / "c"


def test_a_config_cannot_name_code_or_kernels(folders, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    kernels = dict(_attn_implementation_internal="kernels-community/evil", attn_implementation="evil/evil",
                   _experts_implementation_internal="evil/evil")  # fmt: skip
    names = dict(auto_map={"AutoModelForCausalLM": "evil.Model"}, attribute_map={"x": "y"}, base_model_tp_plan={"layers.0": "evil"},
                 extra_files=["evil.safetensors"], trust_remote_code=True)  # fmt: skip
    folder = changed(folders / "olmo2", tmp_path, **kernels, **names)
    shutil.copy(tmp_path / "evil.py", folder)
    ours = fallback.load(folder)
    assert ours.hf.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(ours.hf.config, "auto_map") and not ours.hf.config.attribute_map
    assert "attn_implementation" in ours.note and "extra_files" in ours.note
    assert_close(ours(tokens_of(9)), fallback.load(folders / "olmo2")(tokens_of(9)))


def test_all_faults_of_the_files_at_once(folders, tmp_path):
    folder = changed(folders / "gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(32, 90)
    tensors["transformer.h.7.attn.c_attn.weight"] = torch.zeros(2)
    tensors["transformer.ln_f.bias"] = torch.zeros(32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as e:
        fallback.load(folder)
    for part in (
        "4 faults",
        "h.1.ln_1.bias: missing",
        "h.0.attn.c_attn.weight: shape [32, 90]",
        "[32, 96]",
        "h.7.attn",
        "ln_f.bias: stored as I32",
    ):
        assert part in e.value.what, part


def test_a_bare_trunk_loads_as_the_hub_has_gpt2(folders, tmp_path):
    folder = changed(folders / "gpt2", tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that old versions saved
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_close(fallback.load(folder)(tokens_of(9)), fallback.load(folders / "gpt2")(tokens_of(9)))


@pytest.mark.parametrize("keys, words", [
    ({"model_type": "no_such_thing"}, "knows no model_type 'no_such_thing'"),
    ({"model_type": "clip_vision_model"}, "no causal language model"),
    ({"num_attention_heads": "many"}, "refuses it"),
])  # fmt: skip
def test_refused_with_the_reason(keys, words, folders, tmp_path):
    with pytest.raises(ModelError, match=words) as e:
        fallback.load(changed(folders / "olmo2", tmp_path, **keys))
    assert e.value.fix


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    config = hf.BertConfig(**{k: v for k, v in T.items() if "token" not in k})
    hf.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="see those after it"):
        fallback.load(tmp_path)


def test_past_the_context_is_an_error_with_a_fix(folders):
    with pytest.raises(ModelError, match="65 tokens; this model was made for 64"):
        fallback.load(folders / "gpt2").hidden(tokens_of(65), Layout.of([65]))


def test_without_transformers_the_fix_is_the_extra(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra) as e:
        models.load(folders / "gpt2")
    assert '-e ".[fallback]"' in e.value.fix
