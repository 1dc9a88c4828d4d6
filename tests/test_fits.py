"""A model alone: what it takes, what fits where, each number the one that the plan of a run would give; and what is refused."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tunesmith import api, cli
from tunesmith.config.load import load
from tunesmith.devices import GIB, parse_device
from tunesmith.errors import ConfigError, ModelError
from tunesmith.fits import PARTS, SIZES, WAYS, _lengths, what_fits
from tunesmith.plan import METHODS, make_plan
from tunesmith.spec import Rope, Spec, plan_spec

MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": 4096,
}  # fmt: skip
SMALL = Spec(vocab=512, dim=1024, hidden=2816, layers=12, heads=16, kv_heads=4, head_dim=64, context=4096, norm_eps=1e-5)


def settings(method="qlora", *overrides):
    return load({"model": "m", "data": "rows.jsonl", "method": method, "output": "runs/first"}, *overrides)


@pytest.fixture
def mistral(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def printed(found, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    found.print(console)
    return console.export_text()


# ---- known figures -------------------------------------------------------------------------------------------------------------


def test_mistral_7b_takes_the_known_figures(mistral):
    found = api.plan(str(mistral), gpu="24GB", context=8192)
    uses = {use.way: use for use in found.uses}
    assert tuple(uses) == WAYS == ("inference", "full", "lora", "qlora")
    assert uses["inference"].parts["weights"] * GIB / 1e9 == pytest.approx(14.48, abs=0.01), "about 14 GB in 16 bits"
    cache = next(c.bytes for c in uses["inference"].components if c.name == "KV cache")
    assert cache == 8192 * 131_072, "128 KiB a token: 32 layers, k and v of 8 heads of 128, 2 bytes"
    assert uses["full"].least > 90 and uses["lora"].least > 14 and uses["qlora"].least < 12
    assert found.longest["full"][:6] == (0,) * 6 and found.longest["qlora"][SIZES_AT[16]] >= 8192


SIZES_AT = {size: i for i, size in enumerate(SIZES)}


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("gpu", ["24GB", "t4", "cpu-64GB"])
def test_a_use_is_what_the_plan_of_a_run_says(way, gpu):
    device = parse_device(gpu)
    use = next(use for use in what_fits(settings(), SMALL, device, 1024).uses if use.way == way)
    config = settings(way, "data.max_length=1024")
    run = make_plan(config, SMALL, lengths=np.full(1000, 1024), device=device)
    assert (use.needs, use.least, use.tokens, use.activations) == (
        pytest.approx(run.needs), pytest.approx(run.least), run.micro_batch_tokens, run.activations
    )  # fmt: skip
    assert {c.name: c.bytes for c in use.components} == {c.name: c.bytes for c in run.components}
    known = {name for names in PARTS.values() for name in names}
    assert {c.name for c in use.components if c.where == "device"} <= known, "each component has its part"


@pytest.mark.parametrize("way", METHODS)
def test_the_longest_fits_and_the_next_does_not(way):
    spec = replace(SMALL, dim=3072, hidden=8192, layers=28, heads=24, kv_heads=8, head_dim=128, vocab=128256, context=131072)
    found = what_fits(settings(), spec, parse_device("24GB"))
    lengths = _lengths(spec.reach)

    def fits(length, size):
        config = settings(way, f"data.max_length={length}")
        return make_plan(config, spec, lengths=np.full(1000, length), device=parse_device(SIZES[size])).fits

    for size in (8, 24):
        longest = found.longest[way][SIZES_AT[size]]
        later = [n for n in lengths if n > longest][:1]
        assert (not longest or fits(longest, size)) and not any(fits(n, size) for n in later)
    assert all(list(sizes) == sorted(sizes) for table in (found.longest, found.micro_batch) for sizes in table.values())


def test_settings_count_and_the_context_has_its_default(mistral):
    assert api.plan(str(mistral), gpu="24GB").context == 2048
    assert what_fits(settings(), replace(SMALL, context=512), parse_device("24GB")).context == 512
    plain, spared = api.plan(str(mistral), gpu="24GB"), api.plan(str(mistral), "eval.samples=0", gpu="24GB")
    assert spared.longest["qlora"][SIZES_AT[16]] > plain.longest["qlora"][SIZES_AT[16]], "answers take room too"
    assert api.plan(str(mistral), "memory.budget_gb=12", gpu="24GB").budget == 12


def test_weights_updated_inside_the_backward_take_a_step_at_once():
    """So many tokens at once are so many a step: its size follows them, and does not stay that of the batch."""
    found = what_fits(settings("full", "train.optimizer=adamw_8bit_inside", "train.max_grad_norm=0"), SMALL, parse_device("8GB"))
    plain = what_fits(settings("full"), SMALL, parse_device("8GB"))
    assert found.uses[1].least < plain.uses[1].least
    sizes = dict(zip(SIZES, found.micro_batch["full"], strict=True))
    assert 2048 <= sizes[8] < sizes[141] == 131_072 and found.longest["full"][0] >= plain.longest["full"][0]


@pytest.mark.parametrize("file", ["Llama-3.1-8B.config.json", "mistral_7b.json", "phi-4.json", "qwen2_7b.json", "gemma2_2b.json"])
def test_real_configs(shared_data, tmp_path, file):
    (tmp_path / "config.json").write_text((shared_data / "configs" / file).read_text())
    found = api.plan(str(tmp_path), gpu="h200")
    assert found.fits and all(found.longest[way][-1] for way in WAYS if way != "full")
    assert all(n <= found.reach for sizes in found.longest.values() for n in sizes)


# ---- what is shown -------------------------------------------------------------------------------------------------------------


def test_terminal_and_page_say_the_same(mistral, tmp_path):
    page = tmp_path / "fits.html"
    found = api.plan(str(mistral), gpu="4090", page=page)
    said, drawn = printed(found), page.read_text()
    assert all(f"{size} GB" in said and f"{size} GB" in drawn for size in SIZES)
    for use in found.uses:
        assert re.search(rf"{use.way} +{use.needs:.1f}".removesuffix(".0"), said) and f"{use.way}, GB: weights" in drawn
    for words in ("KV cache", "optimiser", "longest row", "rows of 2k", "24k", found.verdict[0]):
        assert words in said and words in drawn
    assert f"Written to {page}" in said.replace("\n", "") and drawn.count("<svg") >= 5
    narrow = printed(replace(found, page=None, model="m"), 80)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow


def test_a_bar_has_the_parts_in_order_and_the_cards_end(mistral):
    said = printed(api.plan(str(mistral), gpu="24GB"))
    full, qlora = (next(line for line in said.splitlines() if line.startswith(way)) for way in ("full", "qlora"))
    assert re.search(r"█+▓+│▓+»  does not fit", full) and re.search(r"█+▓*▒+■*·*│·+ +fits", qlora)


# ---- what is refused -----------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_floor_says_the_floor_and_what_lowers_it(mistral, capsys):
    assert cli.main(["plan", str(mistral), "--gpu", "4GB"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"nothing fits 4 GB at 2,048 tokens: the floor is 7\.\d GB, with qlora", said)
    assert re.search(r"what lowers it: --context 256 \(6\.\d GB\), a smaller model, or a card such as RTX 3070", said)


def test_a_context_beyond_the_checkpoints(mistral):
    with pytest.raises(ConfigError, match=r"--context 40,000 is beyond the checkpoint's: it was made for 32,768 tokens") as e:
        api.plan(str(mistral), gpu="24GB", context=40_000)
    assert e.value.fix == "give 8 to 32768"
    with pytest.raises(ConfigError, match="--context 0 is too short"):
        api.plan(str(mistral), gpu="24GB", context=0)
    stretched = replace(SMALL, rope=Rope(kind="dynamic", scaling=(("factor", 2.0),)))
    assert what_fits(settings(), stretched, parse_device("24GB"), 8192).reach == 8192


def test_an_unknown_gpu(mistral):
    with pytest.raises(ConfigError, match="--gpu 4099: no such card is known") as e:
        api.plan(str(mistral), gpu="4099")
    assert "did you mean '4090'?" in e.value.fix and "24GB" in e.value.fix


@pytest.mark.parametrize(("config", "words"), [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "model_type 'bert' is a BertForMaskedLM, not a causal"),
    ({"model_type": "bert", "architectures": ["BertModel"]}, "model_type 'bert' is an encoder, not a causal language model"),
    ({"architectures": ["MistralForSequenceClassification"]}, "is a MistralForSequenceClassification, not a causal language model"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "model_type 't5' is an encoder-decoder"),
    ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "is a ViTForImageClassification, not a causal"),
])  # fmt: skip
def test_what_is_no_causal_language_model(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL | config))
    with pytest.raises(ModelError, match=words):
        api.plan(str(tmp_path), gpu="24GB")


def test_names_that_plan_a_causal_language_model_still(tmp_path):
    for config in (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"architectures": None},
        {"architectures": ["MistralModel"]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(MISTRAL | config))
        assert plan_spec(tmp_path).layers == 32


def test_words_of_a_model_beside_a_run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: embedded\ndata: rows.jsonl\nmethod: lora\noutput: runs/first\n")
    with pytest.raises(ConfigError, match="--context goes with a model, not with a run file"):
        api.plan(tmp_path / "run.yaml", context=512)
    with pytest.raises(ConfigError, match="--probe goes with a run file, not with a model"):
        api.plan("embedded", probe=True)
    with pytest.raises(ConfigError, match="--probe measures this machine, --gpu plans for another card"):
        api.plan(tmp_path / "run.yaml", gpu="4090", probe=True)


def test_it_needs_neither_torch_nor_time(mistral):
    """In a fresh process: no torch, and at most twelve times the CPU that importing pydantic, numpy and rich takes."""
    code = (
        "import io, json, sys, time; t = time.process_time(); import pydantic, numpy, rich.console\n"
        "base = time.process_time() - t\n"
        "t = time.process_time()\n"
        f"import tunesmith; found = tunesmith.plan({str(mistral)!r}, gpu='4090')\n"
        "found.print(rich.console.Console(file=io.StringIO()))\n"
        "print(json.dumps([(time.process_time() - t) / base, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, loaded = json.loads(done.stdout)
    assert loaded == [] and ratio < 12
