"""Every family as a GGUF, in llama.cpp itself: the same tokens, the same distributions, the same answers as the live model."""

import pytest
from tests.export.cases import FAMILIES, export

from tunesmith.errors import ModelError
from tunesmith.export import gguf, gguf_model
from tunesmith.export.gguf_read import read_gguf
from tunesmith.export.source import open_run
from tunesmith.spec import FAMILIES as NATIVE
from tunesmith.spec import read_config, spec_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_live_model_in_llama_cpp(name, trained, tmp_path):
    """KL below 1e-5 in f16, a thousandth of what a wrong permutation or scale gives (test_breaks.py)."""
    done = export(trained(name), "gguf", tmp_path / "out", quant="f16")
    found = done.parity.measured
    assert done.parity.state == "verified", done.parity.reasons
    assert found["numbers"]["kl_mean"] < 1e-5 and found["numbers"]["positions"] > 100
    assert found["words"]["conversations"] == 6 and found["words"]["probes_same"] == found["words"]["probes"] == 10
    assert done.exit_code == 0 and (done.path / "parity.json").is_file()


SIX = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2")
EACH = [(name, to) for name in FAMILIES for to in ("merged", "adapter", "gguf-lora")]
SOON = [*((name, "merged") for name in SIX), ("phi3", "gguf-lora"), ("gemma2", "gguf-lora")]


@pytest.mark.parametrize(("name", "to"), [pytest.param(*c, marks=[] if c in SOON else [pytest.mark.soak]) for c in EACH])
def test_a_family_is_the_live_model_in_transformers_and_as_an_adapter(name, to, trained, tmp_path, request):
    """Merged in transformers, the adapter in PEFT over its base, the adapter's GGUF in llama.cpp over the base's."""
    if to != "gguf-lora":
        request.getfixturevalue("here")
    found = export(trained(name), to, tmp_path / "out").parity
    assert found.state == "verified", found.reasons
    assert found.measured["numbers"]["kl_mean"] < (5e-5 if to == "gguf-lora" else 1e-6)
    assert found.measured["words"]["conversations"] == 6 and not found.measured["words"]["different"]
    assert to == "gguf-lora" or found.measured["answers"]["equal"] == 6  # over a base in f16 near ties fall otherwise


def test_every_native_family_has_a_case():
    assert {FAMILIES[n].get("model_type", "llama") for n in FAMILIES} == set(NATIVE) == set(gguf_model.ARCHITECTURES)


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_quantisation_is_what_it_says(quant, trained, tmp_path):
    """Each file is smaller than the one before, nothing is refused, and the vocabulary keeps 8 bits below 8."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    run, path = trained("llama", sizes), tmp_path / "x.gguf"
    if quant in ("q8_0", "q5_1", "q4_0"):
        done = export(run, "gguf", tmp_path / "out", quant=quant)
        assert done.parity.state in ("verified", "warned"), done.parity.reasons
        (path,) = done.path.glob("*.gguf")
    else:
        gguf.write(open_run(run), path, quant, "auto")
    tensors = read_gguf(path).tensors
    kinds = {t.name: t.type for t in tensors.values()}
    assert kinds["blk.0.attn_q.weight"] == quant.upper() and kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if quant[:2] in ("q4", "q5") else quant.upper())
    bits = sum(t.size for t in tensors.values()) * 8 / sum(t.size * 8 / BITS[t.type] for t in tensors.values())
    assert bits < {"f32": 32.1, "bf16": 16.5, "q8_0": 8.9, "q5_1": 8.2, "q5_0": 8.1, "q4_1": 7.9, "q4_0": 7.8}[quant]


BITS = {"F32": 32, "BF16": 16, "F16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ({**FAMILIES["gemma"], "tie_word_embeddings": False}, "apart"),
        ({**FAMILIES["qwen3"], "attention_bias": True}, "biases"),
        ({**FAMILIES["gemma2"], "final_logit_softcapping": None}, "not capped"),
        ({**FAMILIES["gemma2"], "layer_types": ["full_attention", "sliding_attention"]}, "slide otherwise"),
        ({**FAMILIES["qwen2"], "rope_parameters": FAMILIES["llama 3.2"]["rope_parameters"]}, "Llama 3's"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(case, told, tiny):
    config = read_config(tiny.model) | case
    (why,) = gguf_model.refusals(gguf_model.architecture_of(config), spec_of(config))
    assert told in why


def test_a_window_that_llama_cpp_lacks_ends_the_context(trained, tmp_path):
    done = export(trained("mistral"), "gguf", tmp_path / "out", quant="f16")
    (path,) = done.path.glob("*.gguf")
    assert read_gguf(path).keys["llama.context_length"] == 128
    (note,) = done.parity.notes
    assert "no sliding window" in note and f"- {note}\n" in (done.path / "README.md").read_text()


def test_a_model_that_runs_through_transformers_has_no_gguf():
    with pytest.raises(ModelError, match="no GGUF is written for it"):
        gguf_model.architecture_of({"model_type": "gpt2"})
