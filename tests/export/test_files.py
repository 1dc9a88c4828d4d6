"""What lies beside the weights: Modelfile, serve.sh, README.md, parity.json; and what --push sends where."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tests.export.cases import export, quiet

import tunesmith
from tunesmith import hub
from tunesmith.errors import RunError
from tunesmith.export import gguf, parity, push
from tunesmith.export.gguf_read import read_gguf
from tunesmith.export.ollama import modelfile, read_modelfile
from tunesmith.export.source import open_run
from tunesmith.export.vllm import adapter_line, adapter_refusals, serve_options
from tunesmith.files import verify
from tunesmith.run import Run


@pytest.fixture
def unchecked(monkeypatch):
    """As if no runtime were installed: what is written is what these tests look at."""
    monkeypatch.setattr(parity, "missing", lambda runtime: f"{runtime} is not here")


def test_a_modelfile_names_the_gguf_its_stops_and_the_context(trained, tmp_path, unchecked):
    done = export(trained("llama"), "ollama", tmp_path / "out", quant="q8_0")
    text = (done.path / "Modelfile").read_text()
    assert read_modelfile(text) == ("./run-q8_0.gguf", ["<|end|>"], 256) and (done.path / "run-q8_0.gguf").is_file()
    assert "ADAPTER" not in text and "\nTEMPLATE" not in text
    assert done.hints == (f"ollama create run -f {done.path / 'Modelfile'}", "ollama run run")


def test_a_modelfile_escapes_and_does_not_open_more_context_than_memory_is_wont_to_hold():
    token = {5: '<"x\n">', 7: "<|end|>"}.get
    renderer = SimpleNamespace(stop_ids=frozenset({7, 5}), tokenizer=SimpleNamespace(token=token))
    text = modelfile("a.gguf", renderer, 131_072)
    assert read_modelfile(text) == ("./a.gguf", ['<"x\n">', "<|end|>"], 8192) and "131,072 tokens" in text


def test_a_vllm_folder_comes_with_the_line_that_serves_it(trained, tmp_path, unchecked):
    done = export(trained("llama"), "vllm", tmp_path / "out")
    line = f"vllm serve {done.path} --served-model-name run --dtype float32 --max-model-len 256 --generation-config auto"
    assert done.hints == (line,) and (done.path / "model.safetensors").is_file()
    assert (done.path / "serve.sh").read_text() == line.replace(str(done.path), '"$(dirname "$0")"') + ' "$@"\n'
    assert any("vLLM is not installed" in note for note in done.parity.notes)
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32", "n_positions": 64, "model_type": "gpt2"}')
    assert "--max-model-len 64 " in serve_options("run", tmp_path)


def test_a_model_whose_config_names_no_context_gets_a_line_without_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "torch_dtype": "float16"}')
    assert serve_options("x", tmp_path) == "--served-model-name x --dtype float16 --generation-config auto"


def test_an_adapter_comes_with_the_line_that_serves_it_and_its_words_over_its_base():
    """Or with none, where vLLM refuses such an adapter."""
    line = adapter_line("run", "a/b", Path("out"), {"r": 12}, "bfloat16")
    words = "--tokenizer out --generation-config out --dtype bfloat16"
    assert line == f"vllm serve a/b {words} --enable-lora --max-lora-rank 16 --lora-modules run=out"
    assert "--max-lora-rank 64 " in adapter_line("run", "a/b", Path("out"), {"r": 8, "rank_pattern": {"q_proj": 33}}, "float16")
    assert adapter_refusals({"r": 512, "use_rslora": True, "rank_pattern": None, "modules_to_save": None}) == []
    faults = {
        "r": 8,
        "rank_pattern": {"q_proj": 513},
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [5],
    }
    assert adapter_refusals(faults) == ["DoRA", "whole modules (lm_head)", "trained tokens", "rank 513, over 512"]


def test_an_adapter_over_four_bits_says_that_vllm_lays_it_over_others(trained, tmp_path, unchecked):
    said = {method: export(trained("llama", method=method), "adapter", tmp_path / method) for method in ("lora", "qlora")}
    assert [any("another model" in note for note in done.parity.notes) for done in said.values()] == [False, True]
    assert all(done.hints[0].startswith("vllm serve ") for done in said.values())


def test_an_export_is_whole_and_its_card_names_what_it_is_made_of(trained, tmp_path):
    done = export(trained("llama"), "gguf", tmp_path / "out", quant="q8_0")
    assert verify(done.path) == [] and {p.name for p in done.path.iterdir()} == {
        "run-q8_0.gguf", "README.md", "parity.json", "manifest.json",
    }  # fmt: skip
    text = (done.path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "gguf" and front["tags"] == ["tunesmith", "lora"]
    manifest = Run.open(trained("llama")).manifest
    for needed in (
        manifest["data"],
        manifest["base"],
        "KL a token",
        "llama-server -m out/run-q8_0.gguf",
        "before,",
        "**verified**",
    ):
        assert needed in text, needed
    assert str(tmp_path) not in text and str(trained("llama").parent) not in text
    kept = json.loads((done.path / "parity.json").read_text())
    assert kept["state"] == "verified" and kept["measured"]["numbers"]["bounds"] == [0.003, 0.05]


def test_parity_json_holds_all_that_was_compared(trained, tmp_path, here):
    """Ids, BOS, EOS, what ends an answer, the template, KL a token, greedy answers, the task's metric."""
    run = trained("llama")
    path = export(run, "merged", tmp_path / "out").path
    words, numbers, answers = json.loads((path / "parity.json").read_text())["measured"].values()
    renderer, held = open_run(run).renderer, open_run(run).held_out
    assert words["rendered"] == [renderer.prompt(c.messages[:-1]) for c in held] and not words["different"]
    assert (words["conversations"], words["probes"], words["probes_same"]) == (6, 10, 10)
    assert words["template"] == renderer.template and words["template_same"] and "template_artefact" not in words
    assert words["stops"] == {"live": [257], "artefact": [257]} and words["eos"] == {"live": 257, "artefact": 257}
    assert words["bos"] == {"live": None, "artefact": None}
    assert len(numbers["kl"]) == numbers["positions"] > 100 and max(numbers["kl"]) == pytest.approx(numbers["kl_max"], rel=0.01)
    assert sum(numbers["kl"]) / len(numbers["kl"]) == pytest.approx(numbers["kl_mean"], rel=0.01)
    assert {"kl_p99", "top1", "loss_live", "loss_artefact"} <= numbers.keys() and numbers["bounds"] == [1e-3, 5e-2]
    assert answers["count"] == answers["equal"] == 6 and answers["metric"] == "rouge_l"
    assert answers["metric_live"] == answers["metric_artefact"] and 0 <= answers["metric_live"] <= 1
    lines = (path / "parity.json").read_text().splitlines()
    assert len(lines) < 100, "a list of numbers takes one line"


def test_an_earlier_export_is_replaced_and_anything_else_is_not(trained, tmp_path, unchecked):
    run = trained("llama")
    first = export(run, "gguf", tmp_path / "out", quant="f16")
    again = export(run, "gguf", tmp_path / "out", quant="q8_0")
    assert first.path == again.path and [p.name for p in again.path.glob("*.gguf")] == ["run-q8_0.gguf"]
    (again.path / "parity.json").unlink()
    with pytest.raises(RunError, match="not empty"):
        export(run, "gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: acme-1\nlicense_link: https://acme.example/LICENSE\n---\n",
            {"license": "other", "license_name": "acme-1", "license_link": "https://acme.example/LICENSE"},
        ),
        ("---\nlicense: other\nlicense_name: [a]\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense: [a, b]\nlicense_name: x\n---\n", {}),
        ("---\nlicense: 'a b\\n# c'\n---\n", {}),
        ("---\n: : :\n---\n", {}),
        ("# no front", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_bases(text, licence, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert hub.licence_of(tmp_path) == licence and hub.licence_of(None) == {}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_card_inherits_the_licence(method, trained, tmp_path, unchecked):
    """Of the model that was tuned: what method full leaves has no card of its own."""
    run = trained("llama", {"num_hidden_layers": 1}, method=method)
    base = run.parent / "model"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1\n---\n# A base\n")
    text = (export(run, "merged", tmp_path / "out").path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "acme-1") and "| Licence | other acme-1 |" in text
    (base / "README.md").unlink()
    assert "| Licence | unknown:" in (export(run, "merged", tmp_path / "out").path / "README.md").read_text()
    if method == "full":  # which needs its base no more
        base.rename(base.with_name("moved"))
        assert "| Licence | unknown:" in (export(run, "merged", tmp_path / "out").path / "README.md").read_text()


def test_an_adapter_that_vllm_cannot_lay_over_has_no_line_for_it(trained, tmp_path, unchecked):
    plain = export(trained("llama"), "adapter", tmp_path / "plain")
    assert "--max-lora-rank 8" in plain.hints[0] and "vLLM" not in " ".join(plain.parity.notes)
    odd = {"variant": "dora", "new_tokens": ["<note>"], "modules_to_save": ["lm_head"]}
    for lora in ({key: value} for key, value in odd.items()):
        done = export(trained("llama", lora={"rank": 4, "alpha": 8, **lora}), "adapter", tmp_path / next(iter(lora)))
        assert done.hints == () and "vllm serve" not in (done.path / "README.md").read_text()
        (note,) = (note for note in done.parity.notes if "export --to vllm" in note)
        assert note in (done.path / "README.md").read_text()


# ---- K-quants ----------------------------------------------------------------------------------------------------------------


def test_k_quants_are_made_by_llama_cpps_own_quantiser(trained, tmp_path, monkeypatch):
    """A stand-in is called as llama-quantize is: the f16 file, the file to write, the type's name."""
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nhead -c 4 "$1" > "$2"; echo "$3" >> "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    gguf.write(open_run(trained("llama")), tmp_path / "x.gguf", "q4_k_m", "auto")
    assert (tmp_path / "x.gguf").read_bytes() == b"GGUFQ4_K_M\n" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(gguf.quantiser() is None, reason="neither llama-quantize nor llama-cpp-python is here")
def test_a_real_k_quant_is_the_live_model(trained, tmp_path):
    """Of whole blocks of 256. Six bits, because four are KL 0.37 on weights that learned this little (0.002 on the base)."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    done = export(trained("llama", sizes), "gguf", tmp_path / "out", quant="q6_k")
    assert done.parity.state in ("verified", "warned"), done.parity.reasons
    assert "Q6_K" in {t.type for t in read_gguf(next(done.path.glob("*.gguf"))).tensors.values()}


def test_k_quants_without_it_say_where_to_get_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "quantiser", lambda: None)
    with pytest.raises(RunError, match="own quantiser, which is not here") as refused:
        tunesmith.export(trained("llama"), "gguf", quant="q4_k_m", out=tmp_path / "out", console=quiet())
    assert "llama-quantize" in refused.value.fix and not (tmp_path / "out").exists()


# ---- the hub -----------------------------------------------------------------------------------------------------------------


class Hub:
    """huggingface_hub.HfApi as far as it is used."""

    def __init__(self, calls, fault=None):
        self.calls, self.fault = calls, fault

    def create_repo(self, repo, **how):
        self.calls.append(("create", repo, how))
        if self.fault:
            raise self.fault

    def upload_folder(self, **how):
        kept = [p.name for p in Path(how["folder_path"]).iterdir()]
        files = sorted(n for n in kept if not any(fnmatch(n, pattern) for pattern in how["ignore_patterns"]))
        self.calls.append(("upload", how["repo_id"], files, how["commit_message"]))
        return SimpleNamespace(commit_url="https://hub/me/x/commit/1")


def test_push_sends_the_export_to_a_private_repository(trained, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    console = quiet()
    tunesmith.export(trained("llama"), "gguf", out=tmp_path / "out", push="me/x", console=console)
    assert calls == [
        ("create", "me/x", {"private": True, "exist_ok": True}),
        ("upload", "me/x", ["README.md", "run-q8_0.gguf"], "run as gguf"),
    ]
    assert "https://hub/me/x/commit/1" in console.file.getvalue()


def test_nothing_is_pushed_that_was_not_verified_or_not_asked_for(trained, tmp_path, monkeypatch, unchecked):
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    export(trained("llama"), "gguf", tmp_path / "a", push="me/x")
    export(trained("llama"), "gguf", tmp_path / "b")
    assert calls == []


def test_what_the_hub_refuses_is_told_with_its_fix(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    for fault, told, fix in (
        (errors.LocalTokenNotFoundError("x"), "nobody is logged in", "hf auth login"),
        (OSError("no route"), "cannot be reached", "check the connection"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda fault=fault: Hub([], fault))
        with pytest.raises(RunError, match=told) as refused:
            push.push(tmp_path, "me/x", what="x")
        assert re.search(fix, refused.value.fix)
