"""config.json -> Spec: every real config has its state, faults are listed at once, and nothing in a config can name code to run."""

import json

import pytest

from tunesmith.errors import ModelError
from tunesmith.spec import (
    FAMILIES,
    REMOTE_CODE,
    Spec,
    checkpoint_quantization,
    parameters,
    plan_spec,
    read_config,
    read_spec,
    spec_of,
    support,
    tensor_shapes,
)

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip

# published parameter counts (model cards and `safetensors` totals on the hub)
NATIVE = {
    "Llama-3.1-8B.config.json": 8_030_261_248, "Llama-3.2-1B.config.json": 1_235_814_400,
    "Mistral-7B-v0.1.config.json": 7_241_732_096, "gemma2_2b.json": 2_614_341_888, "gemma3_1b_it.json": 999_885_952,
    "gemma_2b.json": 2_506_172_416, "llama2_7b.json": 6_738_415_616, "llama3_1_8b.json": 8_030_261_248,
    "llama3_2_1b.json": 1_235_814_400, "llama3_2_3b.json": 3_212_749_824, "mistral_7b.json": 7_241_732_096,
    "mistral_7b_v03.json": 7_248_023_552, "phi-3_5.json": 3_821_079_552, "phi-4.json": 3_836_021_760,
    "qwen2.5_3b.json": 3_085_938_688, "qwen2_7b.json": 7_615_616_512, "qwen3_0.6b.json": 596_049_920,
    "smollm2_360m.json": 361_821_120, "tinyllama_1b_chat_v1.0.json": 1_100_048_384,
}  # fmt: skip


def test_every_real_config_has_its_state_and_its_published_size(shared_data):
    found = {p.name: json.loads(p.read_text()) for p in (shared_data / "configs").glob("*.json")}
    assert set(found) == {*NATIVE, "phi-2.json"}
    for name, size in NATIVE.items():
        assert support(found[name]).state == "native", (name, support(found[name]))
        assert parameters(spec_of(found[name])).total == size, name
    refused = support(found["phi-2.json"])
    assert refused.state == "refused" and "phi-msft" in refused.reason and "'phi'" in refused.fix and "auto_map" in refused.notes[0]


def test_real_configs_give_the_numbers_their_models_run_with(shared_data):
    def spec(name: str) -> Spec:
        return spec_of(read_json(shared_data / "configs" / name))

    assert spec("Mistral-7B-v0.1.config.json").window == 4096
    assert spec("mistral_7b.json").window == 4096  # the key is absent: transformers' default
    assert spec("mistral_7b_v03.json").window is None  # null
    assert spec("qwen2.5_3b.json").window is None  # use_sliding_window is false
    gemma2, gemma3 = spec("gemma2_2b.json"), spec("gemma3_1b_it.json")
    assert (
        gemma2.slides(0) and not gemma2.slides(1) and gemma2.attention_softcap == 50 and gemma2.logit_softcap == 30 and gemma2.tied
    )
    assert [gemma3.slides(i) for i in range(7)] == [True] * 5 + [False, True]
    assert (gemma3.rope.theta, gemma3.rope_local.theta, gemma3.logit_softcap) == (1e6, 1e4, None)
    assert spec("gemma_2b.json").activation == "gelu_tanh"  # its config says gelu and means the tanh form
    phi35, phi4 = spec("phi-3_5.json"), spec("phi-4.json")
    assert phi35.rope.kind == phi4.rope.kind == "longrope" and phi35.rope.switch == phi4.rope.switch == 4096
    assert (phi35.rope.fraction, phi4.rope.fraction, phi4.window) == (1.0, 0.75, 262144)
    assert spec("llama3_1_8b.json").rope.kind == "llama3" and spec("qwen3_0.6b.json").qk_norm


def read_json(path):
    return json.loads(path.read_text())


def test_keys_of_other_tools_change_nothing():
    extra = {
        "context_window_size": 2048,
        "prefill_chunk_size": 128,
        "sliding_window_size": 8,
        "attention_sink_size": 4,
        "surprise": [1],
    }
    assert spec_of({**LLAMA, **extra}) == spec_of(LLAMA)


def test_code_named_by_a_config_is_ignored_and_said():
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    assert spec_of(config) == spec_of(LLAMA) and "never run" in support(config).notes[0]


@pytest.mark.parametrize("kind", REMOTE_CODE)
def test_types_that_live_in_remote_code_are_refused_with_a_fix(kind):
    assert support({"model_type": kind}).state == "refused" and support({"model_type": kind}).fix


@pytest.mark.parametrize("kind", ["gpt2", "phi", "olmo2", "starcoder2", "cohere", "bloom", "mixtral", "opt"])
def test_other_families_fall_back(kind):
    found = support({"model_type": kind})
    assert found.state == "fallback" and "transformers" in found.reason and "fallback" in found.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type 'mrope'"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "each kind of layer"),
    ],
)
def test_a_setting_that_no_native_family_has_falls_back(change, said):
    found = support({**LLAMA, **change})
    assert found.state == "fallback" and said in found.reason


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "vision"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size is '64'"),
        ({**LLAMA, "num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({**LLAMA, "vocab_size": True}, "vocab_size is True"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "10,000 is the most"),
        ({**LLAMA, "num_key_value_heads": 3}, "no multiple"),
        ({**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 6}, "no multiple of num_attention_heads"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor is None"),
        ({**LLAMA, "rope_scaling": "linear"}, "not an object"),
        (
            {**LLAMA, "model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "8 positive",
        ),
        ({**LLAMA, "model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        ({**LLAMA, "model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    ],
)
def test_a_wrong_config_is_refused_with_the_key(config, said):
    found = support(config)
    assert found.state == "refused" and said in found.reason and found.fix
    with pytest.raises(ModelError):
        spec_of(config)


def test_all_faults_are_listed_at_once():
    config = {k: v for k, v in LLAMA.items() if k not in ("vocab_size", "intermediate_size")} | {"hidden_size": -1}
    reason = support(config).reason
    assert "vocab_size is missing" in reason and "intermediate_size is missing" in reason and "hidden_size is -1" in reason


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def test_bitsandbytes_nf4_is_read_and_every_other_quantiser_refused():
    config = {**LLAMA, "quantization_config": NF4}
    assert support(config).quantization == checkpoint_quantization(config) == "nf4" and spec_of(config) == spec_of(LLAMA)
    assert support(LLAMA).quantization is None
    for block in ({"quant_method": "gptq"}, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True},
                  {**NF4, "bnb_4bit_quant_type": "fp4"}, {"bits": 4}, "gptq"):  # fmt: skip
        found = support({**LLAMA, "quantization_config": block})
        assert found.state == "refused" and "16-bit" in found.fix, block


def test_both_spellings_of_rope_agree():
    block = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = spec_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **block}})
    assert old == spec_of({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **block}})
    assert old.rope.theta == 5e5 and spec_of(LLAMA).rope.theta == 1e4


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_is_one_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as e:
        read_config(tmp_path)
    assert "config.json" in e.value.what and e.value.fix


def test_a_missing_config_names_what_is_wanted(tmp_path):
    with pytest.raises(ModelError, match=r"no such file.*\n.*checkpoint"):
        read_config(tmp_path)


def test_counts_by_group_add_up_to_the_tensors():
    import math

    for name in FAMILIES:
        config = {**LLAMA, "model_type": name, "head_dim": 16, "attention_bias": True}
        spec = spec_of(config)
        assert parameters(spec).total == sum(math.prod(s) for s in tensor_shapes(spec).values()), name


def test_a_fallback_checkpoint_is_planned_by_its_sizes(tmp_path, shared_data):
    config = json.loads((shared_data / "tokenizers" / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = plan_spec(tmp_path)
    assert (spec.dim, spec.layers, spec.heads, spec.context, spec.vocab) == (768, 12, 12, 1024, 50257)
    assert 124_439_808 < parameters(spec).total < 1.35 * 124_439_808  # gpt2's own count; a plan must not be too small
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": 100}))
    with pytest.raises(ModelError, match="says nothing of its size"):
        plan_spec(tmp_path)
    (tmp_path / "config.json").write_text((shared_data / "configs" / "mistral_7b.json").read_text())
    assert plan_spec(tmp_path) == read_spec(tmp_path)
