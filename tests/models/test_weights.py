"""Weights: every fault of a folder is listed before anything is allocated; loading streams; pickles are never opened."""

import errno
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunesmith import models
from tunesmith.errors import DoesNotFit, ModelError
from tunesmith.models import weights
from tunesmith.models.decoder import Decoder
from tunesmith.models.linear import NF4Linear
from tunesmith.models.weights import INDEX, SINGLE, read_header, save_checkpoint
from tunesmith.spec import spec_of, tensor_shapes

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj.weight"


def make(folder, *, dtype=torch.float32, shard_bytes=10**9, seed=0, **config):
    """A checkpoint of ours in `folder`; returns its model."""
    torch.manual_seed(seed)
    config = {**CONFIG, **config}
    model = Decoder(spec_of(config), config=config, dtype=dtype)
    save_checkpoint(model, folder, shard_bytes=shard_bytes)
    return model


def change(folder, **tensors):
    """Rewrite a single file: a name given None is dropped, others are set."""
    held = load_file(folder / SINGLE)
    for name, value in tensors.items():
        held.pop(name.replace("__", "."), None)
        if value is not None:
            held[name.replace("__", ".")] = value
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def refusal(folder, **how):
    with pytest.raises(ModelError) as e:
        models.load(folder, **how)
    assert e.value.fix
    return e.value.what


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000, 1])
def test_round_trip(tmp_path, shard_bytes, tied):
    model = make(tmp_path, shard_bytes=shard_bytes, tie_word_embeddings=tied, auto_map={"AutoModel": "x.Y"})
    calls = []
    loaded = models.load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    sizes = sum(t.numel() * 4 for k, t in ours.items() if not (tied and k == "lm_head.weight"))
    assert calls[-1] == (sizes, sizes) and [d for d, _ in calls] == sorted(d for d, _ in calls)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "auto_map" not in config
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9) and not list(tmp_path.glob(".*"))


def test_the_files_are_safetensors_as_its_own_library_reads_them(tmp_path):
    model = make(tmp_path, dtype=torch.bfloat16, shard_bytes=30_000)
    seen = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            seen |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert seen.keys() == dict(model.named_parameters()).keys() and all(
        torch.equal(seen[k], p) for k, p in model.named_parameters()
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in seen.values())


@pytest.mark.parametrize(("stored", "wanted"), [("float16", "float32"), ("float64", "bfloat16"), ("bfloat16", "bfloat16")])
def test_weights_are_cast_once_on_the_way_in(tmp_path, stored, wanted):
    model = make(tmp_path, dtype=getattr(torch, stored))
    loaded = models.load(tmp_path, dtype=getattr(torch, wanted))
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.to(getattr(torch, wanted))), name


def test_every_fault_of_the_tensors_is_listed_at_once(tmp_path):
    make(tmp_path)
    change(
        tmp_path,
        model__norm__weight=None,
        model__layers__0__mlp__down_proj__weight=torch.zeros(64, 95),
        model__layers__1__mlp__up_proj__weight=torch.zeros(96, 64, dtype=torch.int8),
        model__layers__2__mlp__up_proj__weight=torch.zeros(96, 64),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),
    )
    what = refusal(tmp_path)
    assert "5 faults" in what
    for fault in ("model.norm.weight: missing", "down_proj.weight: shape [64, 95] where", "stored as I8",
                  "model.layers.2.mlp.up_proj.weight: not part", "model.layers.0.self_attn.q_proj.bias: not part"):  # fmt: skip
        assert fault in what, fault


def test_a_config_of_another_model_gives_a_short_list(tmp_path):
    make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 128, "num_hidden_layers": 4}))
    what = refusal(tmp_path)
    assert "... and" in what and len(what.splitlines()) == weights.SHOWN + 2


def test_old_buffers_and_a_tied_heads_copy_are_no_faults(tmp_path):
    model = make(tmp_path, tie_word_embeddings=True)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8)}
    head = model.lm_head.weight.detach().clone()
    change(tmp_path, **{"lm_head.weight": head, **buffers})
    assert torch.equal(models.load(tmp_path).lm_head.weight, head)
    change(tmp_path, **{"lm_head.weight": head + 1})
    assert "two different matrices" in refusal(tmp_path)


def test_a_tied_head_may_stand_under_its_own_name(tmp_path):
    model = make(tmp_path, tie_word_embeddings=True)
    change(tmp_path, **{"lm_head.weight": model.lm_head.weight.detach().clone(), "model.embed_tokens.weight": None})
    loaded = models.load(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, model.lm_head.weight)


def test_a_bare_trunk_is_recognised(tmp_path):
    make(tmp_path, tie_word_embeddings=True)
    held = {k.removeprefix("model."): v for k, v in load_file(tmp_path / SINGLE).items()}
    save_file(held, tmp_path / SINGLE)
    assert "bare trunk" in models_refusal_lines(tmp_path)


def models_refusal_lines(folder):
    spec = spec_of(json.loads((folder / "config.json").read_text()))
    return "\n".join(weights.check(spec, read_header(folder / SINGLE)[0])[1])


def test_faults_of_the_shards_are_listed_together(tmp_path):
    make(tmp_path, shard_bytes=60_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.ghost"] = shards[2].name
    (tmp_path / INDEX).write_text(json.dumps(index))
    what = refusal(tmp_path)
    assert f"{shards[0].name}: missing" in what and f"{shards[1].name}: truncated" in what and "model.ghost: not in" in what
    (tmp_path / INDEX).unlink()
    assert "index.json: missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}', "{}"]
)
def test_a_damaged_index_is_said(tmp_path, index):
    make(tmp_path)
    (tmp_path / INDEX).write_text(index)
    assert "damaged" in refusal(tmp_path)


def test_a_header_with_any_byte_changed_is_a_fault_or_the_same_tensors(tmp_path):
    """Each byte of length and header, flipped: never another error, never other sizes than the file has."""
    path = tmp_path / SINGLE
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    assert read_header(path)[1] == []
    for at in range(length):
        for bit in (1, 16, 128):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
            found, faults = read_header(path)
            assert faults or max(t.end for t in found.values()) == len(raw)
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        assert read_header(path)[1], cut
    path.write_bytes(raw + b"\0")
    assert "too long" in read_header(path)[1][0]


ENTRY = b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize("header", [b"[]", b'{"a": 3}', ENTRY % b"-1", ENTRY % b"1e0", ENTRY % b"true", b"[" * 50_000, b"\xff\xff"])
def test_a_strange_header_is_a_fault(tmp_path, header):
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert read_header(tmp_path / SINGLE)[1]


def test_nothing_is_allocated_before_all_is_checked(tmp_path, monkeypatch):
    make(tmp_path)
    change(tmp_path, model__norm__weight=None)
    monkeypatch.setattr(weights, "Decoder", None)
    monkeypatch.setattr(weights.Stored, "read", None)
    assert "model.norm.weight: missing" in refusal(tmp_path)


def test_pickles_are_refused_with_the_fix_and_never_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ModelError, match="pickled") as e:
        models.load(tmp_path)
    assert "safe_serialization=True" in e.value.fix and not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").unlink()
    assert "model.safetensors: missing" in refusal(tmp_path)


def test_a_refused_family_is_refused_before_its_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi-msft"}))
    assert "phi-msft" in refusal(tmp_path)


def test_nf4_quantises_on_the_way_in(tmp_path):
    model = make(tmp_path)
    loaded = models.load(tmp_path, store="nf4")
    layer = loaded.model.layers[1].mlp.up_proj
    assert isinstance(layer, NF4Linear) and type(loaded.lm_head).__name__ == "Linear"
    expected = NF4Linear(64, 96)
    expected.set_weight("weight", model.model.layers[1].mlp.up_proj.weight.detach())
    assert torch.equal(layer.dequantize(), expected.dequantize())


def as_bitsandbytes(folder):
    """The same checkpoint as transformers + bitsandbytes write it: linears packed, keys weight.absmax and so on."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    held, out, expected = load_file(folder / SINGLE), {}, {}
    for name, t in held.items():
        if "_proj." not in name:
            out[name] = t
            continue
        codes, state = bnb.quantize_4bit(t, quant_type="nf4", compress_statistics=True)
        out[name] = codes
        out |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        # in rows of whole blocks: bitsandbytes 0.50 decodes others wrong where the processor has bf16 units
        rows = bnb.quantize_4bit(t.view(-1, 64), quant_type="nf4", compress_statistics=True)
        expected[name] = bnb.dequantize_4bit(*rows).view(t.shape)
    save_file(out, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def test_a_bitsandbytes_folder_loads_without_requantising(tmp_path):
    make(tmp_path)
    expected = as_bitsandbytes(tmp_path)
    assert any(k.endswith("nested_absmax") for k in load_file(tmp_path / SINGLE))
    packed, dense = models.load(tmp_path, store="nf4"), models.load(tmp_path)
    codes = load_file(tmp_path / SINGLE)
    for name, t in expected.items():
        layer = packed.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight, codes[name].flatten()), name
        torch.testing.assert_close(layer.dequantize(), t, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dense.get_parameter(name), t, rtol=1e-6, atol=1e-7)
    save_checkpoint(packed, tmp_path / "dense")
    again = models.load(tmp_path / "dense")
    assert torch.equal(again.get_parameter(Q), packed.get_submodule(Q.removesuffix(".weight")).dequantize())
    assert "quantization_config" not in again.config
    change(tmp_path, **{Q: torch.zeros(3, 1, dtype=torch.uint8)})
    assert "bytes of nf4" in refusal(tmp_path)


def test_an_untied_head_is_written_where_the_config_says_so(tmp_path):
    model = make(tmp_path / "tied", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(50, 64))
    model.config["tie_word_embeddings"] = False  # as a merge of a trained head does
    save_checkpoint(model, tmp_path / "untied")
    loaded = models.load(tmp_path / "untied")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and not loaded.spec.tied


def test_a_save_over_another_leaves_only_its_own_files(tmp_path):
    make(tmp_path, shard_bytes=60_000)
    single = make(tmp_path, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert torch.equal(models.load(tmp_path).get_parameter(Q), single.get_parameter(Q))
    make(tmp_path, shard_bytes=60_000)
    assert not (tmp_path / SINGLE).exists() and models.load(tmp_path)


def test_a_full_disk_says_how_much_is_needed(tmp_path, monkeypatch):
    def full(path, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_file", full)
    with pytest.raises(DoesNotFit, match=r"bytes are needed"):
        make(tmp_path)


def test_a_save_that_is_cut_short_leaves_no_folder_that_loads(tmp_path):
    model = make(tmp_path / "whole")
    asked = []

    def tensor(name):
        asked.append(name)
        if len(asked) == 9:
            raise OSError("disk")
        return model.get_parameter(name)

    with pytest.raises(OSError, match="disk"):
        weights.write_checkpoint(tmp_path / "cut", CONFIG, tensor_shapes(model.spec), tensor, torch.float32, shard_bytes=60_000)
    assert not (tmp_path / "cut" / "config.json").exists() and not (tmp_path / "cut" / INDEX).exists()


PEAK = """
import os, resource, sys, torch
from tunesmith import models
folder = sys.argv[1]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for store, dtype in (("dense", "float32"), ("dense", "bfloat16"), ("nf4", "bfloat16")):
    if os.fork() == 0:  # a process of its own for each, without importing torch again
        models.load(folder + "/small", store=store)  # what libraries and allocator take is taken before the measure
        before = peak()
        model = models.load(folder + "/big", store=store, dtype=getattr(torch, dtype))
        held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        print(store, dtype, held, peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_the_peak_is_the_model_and_a_tensor(tmp_path):
    """31 MB of weights whose largest tensor has 4 MB; a state dict would need all 31 again."""
    make(tmp_path / "small")
    make(tmp_path / "big", hidden_size=512, intermediate_size=2048)
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 3
    for store, dtype, held, grown in lines:
        tensors = {"float32": 1, "bfloat16": 2}[dtype] + 4 * (store == "nf4")  # as stored, as cast, what quantising takes
        assert int(grown) < int(held) + (tensors + 1) * 4 * 2**20, (store, dtype, held, grown)  # and one for the allocator


def test_a_stored_tensor_of_no_elements_is_read(tmp_path):
    save_file({"a": torch.zeros(0, 3)}, tmp_path / SINGLE)
    stored, faults = read_header(tmp_path / SINGLE)
    with open(tmp_path / SINGLE, "rb") as f:
        assert not faults and stored["a"].read(f).shape == (0, 3)
    cut = replace(stored["a"], shape=(1,), end=stored["a"].end + 4)
    with open(tmp_path / SINGLE, "rb") as f, pytest.raises(ModelError, match="ended"):
        cut.read(f)
