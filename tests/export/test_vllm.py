"""vLLM itself, where it is installed (CI has none): the gate of both formats in six families, the lines that exports print, asked
over HTTP by OpenAI's client, and what vLLM must refuse of an adapter.

vLLM's CPU attention has head widths of 32, 64, 80 and more: the small models are as wide as that takes.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.export.cases import FACTS, FAMILIES, export, teach

from tunesmith.errors import ExportRefused
from tunesmith.export import parity
from tunesmith.export.source import open_run
from tunesmith.export.vllm import max_lora_rank
from tunesmith.hub import resolve_model

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

WIDE = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def in_vllm(run: Path, adapter: Path) -> parity.Parity:
    """The gate of an exported adapter, in vLLM over its base."""
    source, config = open_run(run), json.loads((adapter / "adapter_config.json").read_text())
    job = {"adapter": str(adapter), "base": str(source.base.path), "artefact": None, "dtype": "float32"}
    job["max_lora_rank"] = max_lora_rank(config)
    return parity.check("adapter", "", "vllm", parity.live(source), source, job, stops=None)


def is_the_live_model(found: parity.Parity, rows: int) -> None:
    assert found.state == "verified" and found.runtime.startswith("vLLM "), found.reasons
    words, numbers, answers = (found.measured[part] for part in ("words", "numbers", "answers"))
    assert numbers["kl_mean"] < 1e-6 and numbers["kl_max"] < 1e-5 and numbers["top1"] == 1 and numbers["positions"] > 50
    assert words["conversations"] == rows and not words["different"] and words["probes_same"] == words["probes"] == 10
    assert answers["equal"] == answers["count"] == rows and answers["ended"] == answers["live_ended"]


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma"])
def test_a_family_is_the_live_model_in_vllm_in_both_formats(name, trained, tmp_path, monkeypatch):
    run = trained(name, FAMILIES[name] | WIDE | ({} if name == "phi3" else {"head_dim": 32}))
    is_the_live_model(export(run, "vllm", tmp_path / "vllm").parity, 6)
    with monkeypatch.context() as patch:
        patch.setattr(parity, "missing", lambda runtime: "PEFT is asked elsewhere")
        export(run, "adapter", tmp_path / "adapter")
    is_the_live_model(in_vllm(run, tmp_path / "adapter"), 6)


# ---- the lines that are printed ------------------------------------------------------------------------------------------------


@contextmanager
def served(command: list[str], log: Path):
    """The line as it was printed, on a port of its own; yields a client. Its whole group of processes ends with it."""
    openai = pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # GiB: vLLM's own is nearly all of the memory
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def knows_the_facts(client, model: str) -> None:
    for question, answer in FACTS.items():
        messages = [{"role": "user", "content": question}]
        (said,) = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24).choices
        assert (said.message.content, said.finish_reason) == (answer, "stop")


def test_the_folder_that_is_served_by_its_script_knows_the_facts(tmp_path):
    """The embedded model: a tied head, a vocabulary of 4,096, heads 64 wide, six of queries and two of keys."""
    done = export(teach(tmp_path), "vllm", tmp_path / "out")
    is_the_live_model(done.parity, 8)
    with served(["sh", str(done.path / "serve.sh")], tmp_path / "log") as client:
        knows_the_facts(client, "run")


def untied(folder: Path) -> Path:
    """The embedded model with a head of its own and no chat template."""
    shutil.copytree(resolve_model("embedded").path, folder)
    for name, change in (("config", {"tie_word_embeddings": False}), ("tokenizer_config", {"chat_template": None})):
        file = folder / f"{name}.json"
        file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_that_is_served_by_its_line_knows_the_facts(tmp_path):
    """rsLoRA of two ranks over an untied base in float32 without a chat template: the line brings words, numbers and rank."""
    lora = {"rank": 8, "alpha": 8, "variant": "rslora", "rank_pattern": {"down_proj": 24}}
    run = teach(tmp_path, model=str(untied(tmp_path / "base")), lora=lora)
    done = export(run, "adapter", tmp_path / "out")
    is_the_live_model(in_vllm(run, done.path), 8)
    (line,) = done.hints
    assert "--max-lora-rank 32" in line
    with served(shlex.split(line), tmp_path / "log") as client:
        knows_the_facts(client, "run")


@pytest.mark.parametrize(
    ("lora", "told", "why"),
    [
        ({"variant": "dora"}, "DoRA", "does not yet support DoRA"),
        ({"new_tokens": ["<herb>"]}, "trained tokens", "unsupported LoRA weight"),
        ({"modules_to_save": ["lm_head"]}, "whole modules (lm_head)", "modules_to_save"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_gets_no_line_and_the_folder_holds_it(lora, told, why, tmp_path):
    """What we say that vLLM refuses, it does refuse; folded into the weights it is served."""
    run = teach(
        tmp_path, lora={"rank": 16, "alpha": 32} | lora, **({"model": str(untied(tmp_path / "base"))} if "whole" in told else {})
    )
    done = export(run, "adapter", tmp_path / "out")
    assert done.hints == () and any(told in note and "--to vllm" in note for note in done.parity.notes)
    found = in_vllm(run, done.path)
    assert found.state == "refused" and why in found.reasons[0]
    is_the_live_model(export(run, "vllm", tmp_path / "vllm").parity, 8)


# ---- faults --------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_the_live_model_is_refused(trained, tmp_path, monkeypatch):
    from tunesmith.export import merged

    write = merged.write

    def broken(source, folder, onto):
        write(source, folder, onto)
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if "q_proj" in name]:  # as if heads were paired otherwise
            tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merged, "write", broken)
    with pytest.raises(ExportRefused, match="KL a token"):
        export(trained("llama", FAMILIES["llama"] | WIDE | {"head_dim": 32}), "vllm", tmp_path / "out")


def test_a_machine_without_room_for_it_says_nothing_of_the_folder(trained, tmp_path, monkeypatch):
    """As with 2 PiB of keys and values: vLLM's own refusal, from its own process."""
    from tunesmith.export.runtimes import vllm_

    greedy = tmp_path / "greedy.py"
    greedy.write_text(Path(vllm_.__file__).read_text().replace("2 << 30", "2 << 50"))
    run = parity._run
    monkeypatch.setattr(parity, "_run", lambda command, *rest: run([command[0], str(greedy), *command[3:]], *rest))
    done = export(trained("llama", FAMILIES["llama"] | WIDE | {"head_dim": 32}), "vllm", tmp_path / "out")
    assert done.parity.state == "not verified" and "cannot run here" in done.parity.reasons[0] and done.path.is_dir()
