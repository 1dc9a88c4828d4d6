"""Each step of an export, broken on purpose: the gate must say no, and say what. Without a break the same exports pass
(test_families.py, test_merged.py)."""

import json
import re
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file
from tests.export.cases import FAMILIES, export, quiet

import tunesmith
from tunesmith import cli
from tunesmith.errors import ExportRefused
from tunesmith.export import adapter, gguf, gguf_model, merged, parity, source


def twice_the_delta(monkeypatch):
    """As if alpha / rank had been read twice as large."""
    adapter = source.Weights.adapter
    monkeypatch.setattr(source.Weights, "adapter", lambda self, name: adapter(self, name) * (2 if "lora_B" in name else 1))


def keys(change):
    def patch(monkeypatch):
        keys_of = gguf.keys_of
        monkeypatch.setattr(gguf, "keys_of", lambda *a: change(keys_of(*a)))

    return patch


def without(name):
    return keys(lambda found: {k: v for k, v in found.items() if k != name})


def rewritten(name, value):
    return keys(lambda found: found | {name: value})


def no_permutation(monkeypatch):
    monkeypatch.setattr(gguf_model, "PERMUTED", ())


def no_rope_tensors(monkeypatch):
    monkeypatch.setattr(gguf_model, "_rope_tensors", lambda spec: iter(()))


def no_scale_ratio(monkeypatch):
    monkeypatch.setattr(gguf_model, "scale_ratio", lambda architecture, spec: 1.0)


def norms_as_stored(monkeypatch):
    changed = gguf_model.changed
    monkeypatch.setattr(gguf_model, "changed", lambda a, s, name, t: t if "norm" in name else changed(a, s, name, t))


def base_alone(monkeypatch):
    opened = source.Source.opened
    monkeypatch.setattr(source.Source, "opened", lambda self, onto, adapter=True: opened(self, onto, adapter=False))


KL = r"KL a token is .*, over 0\.05"
BREAKS = {
    "the permutation off": ("llama", no_permutation, KL),
    "the scale wrong": ("llama", twice_the_delta, KL),
    "the adapter forgotten": ("qwen2", base_alone, KL),
    "the rope's factors lost": ("llama 3.2", no_rope_tensors, KL),
    "the attention's scale lost": ("gemma2", no_scale_ratio, KL),
    "norms without their 1": ("gemma", norms_as_stored, KL),
    "the template lost": ("llama", without("chat_template"), "the chat template is another, or lost"),
    "the template another": (
        "llama",
        rewritten("chat_template", "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"),
        "6 of 6 conversations are rendered to other token ids; the chat template is another",
    ),
    "EOS rewritten": (
        "llama",
        rewritten("ggml.eos_token_id", 256),
        r"answers end at \[256\] where the run's end at \[257\]; EOS is 256",
    ),
    "BOS added": ("llama", keys(lambda k: k | {"ggml.add_bos_token": True, "ggml.bos_token_id": 256}), "BOS is added"),
    "a special token as text": (
        "llama",
        keys(lambda k: k | {"ggml.token_type": [1 if i == 258 else t for i, t in enumerate(k["ggml.token_type"])]}),
        "6 of 6 conversations are rendered to other token ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_gate_sees_a_broken_gguf(name, trained, tmp_path, monkeypatch):
    family, patch, told = BREAKS[name]
    run = trained(family)
    patch(monkeypatch)
    with pytest.raises(ExportRefused, match=told) as refused:
        export(run, "gguf", tmp_path / "out", quant="f16")
    assert refused.value.exit_code == 1 and not (tmp_path / "out").exists(), "what is refused is not kept"
    assert not list(tmp_path.iterdir()), "nor is anything beside it"


def test_force_keeps_what_is_refused_and_says_so(trained, tmp_path, monkeypatch):
    no_permutation(monkeypatch)
    done = export(trained("llama"), "gguf", tmp_path / "out", quant="f16", force=True)
    kept = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert kept["state"] == "refused" and re.search(KL, kept["reasons"][0]) and done.forced and done.exit_code == 0
    assert "**refused**" in (tmp_path / "out" / "README.md").read_text()


def written(module, change):
    """What an exporter has written, changed before the gate looks at it."""

    def patch(monkeypatch):
        write = module.write

        def broken(source, folder, *how, **more):
            write(source, folder, *how, **more)
            change(folder)

        monkeypatch.setattr(module, "write", broken)

    return patch


def rewrite(name, **values):
    def change(folder):
        config = json.loads((folder / name).read_text())
        assert values.keys() <= config.keys()
        (folder / name).write_text(json.dumps(config | values))

    return change


def gone(name):
    return lambda folder: (folder / name).unlink()


def halved_head(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] / 2}, path, metadata={"format": "pt"})


def adapters_rows_as_stored(monkeypatch):
    monkeypatch.setattr(gguf, "PERMUTED", ())


def no_ratio_in_the_adapter(monkeypatch):
    monkeypatch.setattr(gguf, "scale_ratio", lambda architecture, spec: 1.0)


def alpha_as_stored(monkeypatch):
    writer = gguf.the_package().GGUFWriter
    add = writer.add_float32
    monkeypatch.setattr(writer, "add_float32", lambda self, key, value: add(self, key, value / 2 if "alpha" in key else value))


ENDS = r"answers end at \[256\] where the run's end at \[257\]"
LOST = "the chat template is another, or lost"
OTHER_BREAKS = {  # what is broken -> (format, family, LoRA's variant, how, what is told)
    "merged: the scale wrong": ("merged", "llama", "lora", twice_the_delta, KL),
    "merged: EOS rewritten": (
        "merged",
        "llama",
        "lora",
        written(merged, rewrite("generation_config.json", eos_token_id=256)),
        ENDS,
    ),
    "merged: the template lost": ("merged", "llama", "lora", written(merged, gone("chat_template.jinja")), LOST),
    "merged: another head": ("merged", "llama", "lora", written(merged, halved_head), KL),
    "adapter: the scale wrong": ("adapter", "llama", "lora", written(adapter, rewrite("adapter_config.json", lora_alpha=32)), KL),
    "adapter: rsLoRA lost": ("adapter", "llama", "rslora", written(adapter, rewrite("adapter_config.json", use_rslora=False)), KL),
    "adapter: the template lost": ("adapter", "llama", "lora", written(adapter, gone("chat_template.jinja")), LOST),
    "adapter: EOS rewritten": (
        "adapter",
        "llama",
        "lora",
        written(adapter, rewrite("generation_config.json", eos_token_id=256)),
        ENDS,
    ),
    "gguf-lora: the permutation off": ("gguf-lora", "llama", "lora", adapters_rows_as_stored, KL),
    "gguf-lora: rsLoRA's root forgotten": ("gguf-lora", "llama", "rslora", alpha_as_stored, KL),
    "gguf-lora: the attention's scale lost": ("gguf-lora", "gemma2", "lora", no_ratio_in_the_adapter, KL),
}


@pytest.mark.parametrize("name", OTHER_BREAKS)
def test_the_gate_sees_what_is_broken_elsewhere(name, trained, tmp_path, monkeypatch, request):
    to, family, variant, patch, told = OTHER_BREAKS[name]
    run = trained(family, **({} if variant == "lora" else {"lora": {"variant": variant, "rank": 4, "alpha": 8}}))
    if to != "gguf-lora":
        request.getfixturevalue("here")
    patch(monkeypatch)
    with pytest.raises(ExportRefused, match=told):
        export(run, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_artefact_that_does_not_load_is_refused(trained, tmp_path, monkeypatch):
    tensors = gguf_model._tensors
    monkeypatch.setattr(gguf_model, "_tensors", lambda *a: (t for t in tensors(*a) if t.name != "output_norm.weight"))
    with pytest.raises(ExportRefused, match=r"llama\.cpp cannot load or run it"):
        export(trained("llama"), "gguf", tmp_path / "out", quant="f16")


def test_without_the_runtime_it_is_not_verified_and_the_exit_code_is_1(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    done = export(trained("llama"), "gguf", tmp_path / "out", quant="f16")
    assert done.parity.state == "not verified" and done.exit_code == 1
    assert '".[export]"' in done.parity.reasons[0] and list(done.path.glob("*.gguf"))


def test_the_command_line_says_not_verified_and_ends_with_1(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        parity, "find_spec", lambda name: None if name in ("transformers", "peft", "xllamacpp") else find_spec(name)
    )
    for to in ("merged", "adapter", "gguf"):
        assert cli.main(["export", str(trained("llama")), "--to", to, "--out", str(tmp_path / to)]) == 1
        assert "\nnot verified: " in (said := capsys.readouterr().out) and "pushed" not in said
        kept = json.loads((tmp_path / to / "parity.json").read_text())
        assert kept["state"] == "not verified" and "not installed: " in kept["reasons"][0]


def test_several_formats_go_on_after_one_is_refused(trained, tmp_path, monkeypatch):
    no_permutation(monkeypatch)
    monkeypatch.setattr(parity, "missing", lambda runtime: "peft is not here" if runtime == "peft" else "")
    with pytest.raises(ExportRefused, match="gguf: not what was trained"):
        tunesmith.export(trained("llama"), "gguf,adapter", out=tmp_path / "all", quant="f16", console=quiet())
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["adapter"]


def test_the_cases_are_families_with_a_test_of_their_own():
    assert {family for family, *_ in BREAKS.values()} <= set(FAMILIES)
