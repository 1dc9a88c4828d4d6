"""Merging as it streams: the same bytes as merging in memory, for every variant; one tensor at a time; what transformers reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.export.cases import export, lively, quiet

import tunesmith
from tunesmith import adapters, models
from tunesmith.adapters import storage
from tunesmith.errors import AdapterError, ModelError, RunError
from tunesmith.export import gguf
from tunesmith.export.gguf_read import read_gguf
from tunesmith.export.source import open_run
from tunesmith.models.weights import find_tensors

TIED = {"tie_word_embeddings": True}
VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({}, {"lora": {"variant": "rslora", "rank": 4, "alpha": 8}}),
    "dora": ({}, {"lora": {"variant": "dora", "rank": 4, "alpha": 8}}),
    "tied": (TIED, {}),
    "patterns": ({}, {"lora": {"rank": 4, "alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}}}),
    "new tokens": ({}, {"lora": {"rank": 4, "alpha": 8, "new_tokens": ["<note>", "<more>"]}}),
    "new tokens, tied": (TIED, {"lora": {"rank": 4, "alpha": 8, "new_tokens": ["<note>"]}}),
    "head trained whole": ({}, {"lora": {"rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]}}),
    "head trained whole, tied": (TIED, {"lora": {"rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]}}),
    "embedding trained whole": ({}, {"lora": {"rank": 4, "alpha": 8, "modules_to_save": ["embed_tokens", "norm"]}}),
    "head adapted, tied": (TIED, {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "lm_head"]}}),
    "qlora": ({}, {"method": "qlora"}),
    "qlora, dora": ({}, {"method": "qlora", "lora": {"variant": "dora", "rank": 4, "alpha": 8}}),
    "full": ({}, {"method": "full"}),
}  # fmt: skip


def in_memory(run, onto="auto"):
    """The whole model, loaded and merged by adapters.merge."""
    source = open_run(run)
    model = models.load(source.base.path, store=source.store(onto))
    if not source.full:
        adapters.load(model, source.run.adapter)
        adapters.merge(model)
    return model


def trained_as(trained, name):
    config, changes = VARIANTS[name]
    return trained("llama", config, **changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_streamed_is_what_merging_in_memory_gives(name, trained, tmp_path):
    run = trained_as(trained, name)
    source = open_run(run)
    source.write_model(tmp_path / "streamed", "auto")
    models.save_checkpoint(in_memory(run), tmp_path / "whole")
    ours, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("streamed", "whole"))
    assert ours.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(ours[key], tensor), key
    ours, whole = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("streamed", "whole"))
    assert {k: v for k, v in ours.items() if not k.endswith("_token_id")} == {
        k: v for k, v in whole.items() if not k.endswith("_token_id")
    }


@pytest.mark.parametrize("name", ["rslora", "dora", "new tokens, tied", "head trained whole, tied", "qlora"])
def test_every_variant_is_the_live_model_in_llama_cpp(name, trained, tmp_path):
    """Tied and untied, a longer vocabulary, the other scales: KL below 1e-5."""
    done = export(trained_as(trained, name), "gguf", tmp_path / "out", quant="f16")
    assert done.parity.state == "verified", done.parity.reasons
    assert done.parity.measured["numbers"]["kl_mean"] < 1e-5
    tensors = read_gguf(next(done.path.glob("*.gguf"))).tensors
    assert ("output.weight" in tensors) == (name != "new tokens, tied")
    assert tensors["token_embd.weight"].shape[0] == (261 if "new tokens" in name else 260)


EACH = [(name, to) for name in VARIANTS for to in ("merged", "adapter") if (name, to) != ("full", "adapter")]
SOON = [("new tokens, tied", "merged"), *((name, "adapter") for name in ("rslora", "dora", "new tokens, tied"))]


@pytest.mark.parametrize(("name", "to"), [pytest.param(*c, marks=[] if c in SOON else [pytest.mark.soak]) for c in EACH])
def test_every_variant_is_the_live_model_in_transformers_and_peft(name, to, trained, tmp_path, here):
    """An adapter of a 4-bit run is laid over the 16-bit base: rows of 32 are too narrow for bitsandbytes on a CPU."""
    found = export(trained_as(trained, name), to, tmp_path / "out").parity
    other = "qlora" in name and to == "adapter"
    assert found.state == ("warned" if other else "verified"), found.reasons
    assert found.measured["numbers"]["kl_mean"] < (5e-2 if other else 1e-6)
    assert not other or any("over the 16-bit base" in note for note in found.notes)


def test_an_adapter_that_ends_answers_where_its_base_does_not_brings_that_along(trained, tmp_path, here):
    """As every base model that learns a chat template: PEFT reads no generation_config.json, and the adapter was refused."""
    done = export(trained("llama", {"eos_token_id": 256}), "adapter", tmp_path / "out")
    assert done.parity.state == "verified", done.parity.reasons
    stops = done.parity.measured["words"]["stops"]
    assert stops["live"] == stops["artefact"] and 257 in stops["live"]
    assert f"its answers end at {stops['live']}, the base's at [256]" in (done.path / "README.md").read_text()


def test_rslora_as_a_gguf_adapter_has_the_scale_it_was_trained_with(trained, tmp_path):
    """llama.cpp divides alpha by the rank, rsLoRA by its root."""
    found = export(trained_as(trained, "rslora"), "gguf-lora", tmp_path / "out").parity
    assert found.state == "verified" and found.measured["numbers"]["kl_mean"] < 1e-5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dora", "no DoRA's magnitudes"),
        ("new tokens", "no tokens or modules that were trained whole"),
        ("head adapted, tied", "no part for a vocabulary projection that the base shares"),
        ("patterns", "has one rank"),
    ],
)
def test_what_a_gguf_adapter_lacks_is_refused_by_name(name, told, trained, tmp_path):
    with pytest.raises(ModelError, match=told):
        gguf.write_adapter(open_run(trained_as(trained, name)), tmp_path / "x.gguf")


PEAK = """
import re, sys
from pathlib import Path
from tunesmith.export import gguf
from tunesmith.export.source import open_run

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak(work):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM") - before

source, out, shard = open_run(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
source.write_model(out / "warm", "auto", shard_bytes=shard)  # imports, caches and threads are not the merge's
gguf.the_package()
print(peak(lambda: source.write_model(out / "merged", "auto", shard_bytes=shard)))
print(peak(lambda: gguf.write(source, out / "x.gguf", "q8_0", "auto")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory can be reset on Linux alone")
def test_a_merge_needs_less_memory_than_one_shard(trained, tmp_path):
    """121 MB in shards of 24 MB, over 4 bits and with DoRA, which need the most: the peak of resident memory while it is written
    rises by less than one of them. In a process whose allocator gives back at once what is freed: glibc keeps up to 64 MB, in
    which a peak does not show. A shard is 9 of the largest tensors here; of 5 GB it is 19 of a 7B model's in bf16."""
    big = {"hidden_size": 576, "intermediate_size": 1152, "num_hidden_layers": 10}
    _, changes = VARIANTS["qlora, dora"]
    run, shard = trained("llama", big, train={"epochs": 0.1}, data={"held_out": 0}, **changes), 24_000_000
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(tunesmith.__file__).parents[1])
    command = [sys.executable, "-c", PEAK, str(run), str(tmp_path), str(shard)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    stored, faults = find_tensors(tmp_path / "merged")
    files, total = {s.file.name for s in stored.values()}, sum(s.size for s in stored.values())
    assert not faults and len(files) >= 5 and total > 5 * shard
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"].values()) == files
    assert (tmp_path / "x.gguf").stat().st_size > shard and len(grown) == 2 and 0 < max(grown) < shard, grown


def test_generation_config_names_what_the_template_ends_with(trained, tmp_path):
    run = trained_as(trained, "lora")
    out = tunesmith.merge(run, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [257], "pad_token_id": 256}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 257


def test_merged_is_verified_in_transformers_and_both_bases_are_told(trained, tmp_path):
    """A QLoRA run onto its 4-bit base: nothing is lost; onto the original weights: measurably something, and it is said."""
    done = export(trained_as(trained, "qlora"), "merged", tmp_path / "out")
    found = done.parity.measured
    assert done.parity.state == "verified" and found["numbers"]["kl_mean"] < 1e-6 and found["numbers"]["top1"] == 1
    assert done.parity.runtime.startswith("transformers") and found["other_base"]["kl_mean"] > 1e-4
    assert found["answers"]["equal"] == found["answers"]["count"] == 6 and found["answers"]["metric"] == "rouge_l"
    assert any("--onto dense" in note for note in done.parity.notes)


def test_a_quantised_checkpoint_merges_from_its_own_codes(tiny, tmp_path):
    """bitsandbytes' NF4 files as the base: decoded, not quantised again."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    base = lively(tiny, tmp_path / "base", hidden_size=64, intermediate_size=128)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nf4" / name).write_bytes((base / name).read_bytes())
    config = tiny.config(tmp_path / "run", model=str(tmp_path / "nf4"), method="qlora")
    run = tunesmith.train(config, console=quiet()).path
    open_run(run).write_model(tmp_path / "streamed", "auto")
    models.save_checkpoint(in_memory(run), tmp_path / "whole")
    ours, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("streamed", "whole"))
    assert all(torch.equal(ours[k], whole[k]) for k in whole) and ours.keys() == whole.keys()


def test_an_adapter_that_lacks_a_tensor_is_refused_before_anything_is_written(trained, tmp_path):
    from safetensors.torch import save_file

    run = trained("llama", {"num_hidden_layers": 1})
    path = run / "adapter" / storage.WEIGHTS
    whole = path.read_bytes()
    tensors = load_file(path)
    name = next(n for n in tensors if "q_proj.lora_B" in n)
    try:
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight: missing"):
            tunesmith.merge(run, tmp_path / "out")
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_what_export_refuses(trained, tmp_path):
    run = trained_as(trained, "lora")
    full = trained_as(trained, "full")
    for to, how, told in (
        ("ggml", {}, "unknown --to .ggml."),
        ("gguf", {"quant": "q9"}, "--quant q9"),
        ("gguf", {"onto": "bf16"}, "--onto bf16"),
        ("merged", {"push": "not a name"}, "not a repository's name"),
        ("merged,gguf", {"push": "me/x"}, "a repository holds one"),
    ):
        with pytest.raises(RunError, match=told):
            tunesmith.export(run, to, out=tmp_path / "out", console=quiet(), **how)
    with pytest.raises(RunError, match="method full has no adapter"):
        tunesmith.export(full, "adapter", out=tmp_path / "out", console=quiet())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(RunError, match="not empty"):
        export(run, "gguf", tmp_path / "there")
    assert not (tmp_path / "out").exists()
