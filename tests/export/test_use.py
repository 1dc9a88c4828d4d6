"""Exports as people make them: odd places, a runtime that hangs or is killed, proxies, a terminal; and what others get to see."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tests.export.cases import export, quiet
from tests.export.test_files import Hub

import tunesmith
from tunesmith.chat import Talker
from tunesmith.errors import ConfigError, DoesNotFit, ExportFailed, Interrupted, ModelError, RunError
from tunesmith.export import gguf, parity, source
from tunesmith.export.runtimes import NOT_HERE
from tunesmith.export.runtimes.transformers_ import _fits
from tunesmith.run import Run, base_fingerprint

EXPORTING = sys.modules["tunesmith.export"]  # the name is the verb's
SLEEPER = "import time\nfrom tunesmith.export.runtimes import main\nmain(lambda job, told: (told(3), time.sleep(60)))"
JOB = {"positions": [[0, 1, 2, 3]], "prompts": [[1]]}


@pytest.fixture
def unchecked(monkeypatch):
    """As if no runtime were installed."""
    monkeypatch.setattr(parity, "missing", lambda runtime: f"{runtime} is not here")


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be loaded any more."""
    monkeypatch.setattr(parity, "live", lambda source: pytest.fail("the model was asked before the refusal"))


# ---- places ------------------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_are_refused_before_any_work(trained, tmp_path, monkeypatch, no_work):
    run = trained("llama")
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(here)
    mounted = Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk" or mounted(path))
    (tmp_path / "disk").mkdir()
    for out, told in ((".", "the folder you are in"), (str(here), "the folder you are in"), (tmp_path / "disk", "a mounted disk"),
                      (tmp_path / "file" / "x", "is a file"), ("..", "not empty"), (tmp_path / "file", "is a file")):  # fmt: skip
        with pytest.raises(RunError, match=told):
            export(run, "merged", out)
        with pytest.raises(RunError, match=told):
            tunesmith.merge(run, out)


def test_what_lies_beside_an_earlier_export_is_not_deleted(trained, tmp_path, unchecked):
    out = export(trained("llama"), "gguf", tmp_path / "out").path
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        export(trained("llama"), "gguf", out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_link_stays_one(trained, tmp_path, unchecked):
    first = export(trained("llama"), "gguf", tmp_path / "disk" / "out", quant="f16").path
    (tmp_path / "link").symlink_to(first)
    again = export(trained("llama"), "gguf", tmp_path / "link", quant="q8_0").path
    assert again == first and (tmp_path / "link").is_symlink() and [p.name for p in first.glob("*.gguf")] == ["run-q8_0.gguf"]
    assert {p.name for p in tmp_path.iterdir()} == {"link", "disk"}


def test_a_full_disk_is_told_before_a_byte_is_written(trained, tmp_path, monkeypatch):
    run = trained("llama")
    monkeypatch.setattr("tunesmith.files.free_bytes", lambda path: 5000)
    monkeypatch.setattr(gguf, "encoded", lambda *a: pytest.fail("written all the same"))
    monkeypatch.setattr(source.Weights, "tensor", lambda *a: pytest.fail("written all the same"))
    for to in ("gguf", "merged"):
        with pytest.raises(DoesNotFit, match=r"the export needs .* 5,000 are free"):
            export(run, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gguf", "gguf-lora", "merged"])
def test_a_disk_that_fills_while_an_export_is_written_is_told(to, trained, tmp_path, monkeypatch):
    """numpy says it without an error number; a limit on a file's size does the same without a small disk."""
    script = (
        "import resource, signal, sys, tunesmith.cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(tunesmith.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "export", str(trained("llama")), "--to", to, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=_env(), capture_output=True, text=True)
    assert done.returncode == 2 and "fix: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_an_adapters_check_leaves_nothing_beside_it(trained, tmp_path, monkeypatch):
    """The base's GGUF, made for the check alone, goes with everything else when its writing ends early."""

    def broken(source, path, *how, **more):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        export(trained("llama"), "gguf-lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- what is asked for -------------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_an_error(trained, no_work):
    for to in ("", ",", []):
        with pytest.raises(RunError, match="--to names no format"):
            tunesmith.export(trained("llama"), to, console=quiet())


def test_a_quantisation_of_what_has_none_is_refused(trained, no_work):
    with pytest.raises(RunError, match="--to adapter, merged is not quantised"):
        tunesmith.export(trained("llama"), "merged,adapter", quant="q4_0", console=quiet())


@pytest.mark.parametrize("to", ["adapter", "merged,adapter"])
def test_a_base_to_fold_into_is_refused_for_what_is_not_folded(to, trained, no_work):
    """It was ignored."""
    with pytest.raises(ConfigError, match="--onto nf4: --to adapter is folded into no base"):
        tunesmith.export(trained("llama"), to, onto="nf4", console=quiet())


def test_a_format_that_cannot_hold_the_model_stops_no_other(trained, tmp_path, monkeypatch, unchecked):
    """`--to gguf,merged,gguf-lora` ended with the first one's ModelError."""

    def fails(source, path, *how, **more):
        raise ModelError("GGUF has no word for this head", "export --to merged")

    monkeypatch.setattr(gguf, "write", fails)
    console = quiet()
    with pytest.raises(ExportFailed) as told:
        tunesmith.export(trained("llama"), ["gguf", "merged", "ollama"], out=tmp_path / "out", console=console)
    assert told.value.exit_code == 1 and {p.name for p in (tmp_path / "out").iterdir()} == {"merged"}
    assert told.value.what.splitlines() == [f"{name}: GGUF has no word for this head" for name in ("gguf", "ollama")]
    assert "export --to merged" in told.value.fix and console.file.getvalue().count("not written: GGUF has no word") == 2
    with pytest.raises(ModelError, match="no word"):
        tunesmith.export(trained("llama"), "gguf", out=tmp_path / "one", console=console)


def test_interrupting_one_of_several_formats_ends_all(trained, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(gguf, "write", lambda *how, **more: (_ for _ in ()).throw(Interrupted("stopped")))
    with pytest.raises(Interrupted):
        tunesmith.export(trained("llama"), "gguf,merged", out=tmp_path / "out", console=quiet())
    assert not (tmp_path / "out" / "merged").exists()


def test_formats_may_have_spaces_between(trained, tmp_path, unchecked):
    done = tunesmith.export(trained("llama"), "adapter, gguf", out=tmp_path / "out", console=quiet())
    assert [one.to for one in done] == ["adapter", "gguf"]


def test_a_run_without_an_adapter_has_none_as_gguf(trained, tmp_path, no_work):
    for to in ("adapter", "gguf-lora"):
        with pytest.raises(RunError, match="method full has no adapter"):
            export(trained("llama", method="full"), to, tmp_path / "out")


def test_the_other_base_is_loaded_for_formats_that_have_one(trained, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(EXPORTING, "_other_base", lambda *a: pytest.fail("for nothing"))
    export(trained("llama", method="qlora"), "adapter", tmp_path / "a")
    export(trained("llama", method="qlora"), "gguf-lora", tmp_path / "b")


def test_the_live_model_has_gone_when_the_next_one_is_loaded(trained, tmp_path, monkeypatch, unchecked):
    models, opened = [], Talker._of_run.__func__

    def remember(cls, *how):
        talker = opened(cls, *how)
        models.append(weakref.ref(talker.model))
        return talker

    monkeypatch.setattr(Talker, "_of_run", classmethod(remember))

    def other(*how):
        return {"onto": "x", "kl_mean": 0.0, "held": models[0]() is not None}

    monkeypatch.setattr(EXPORTING, "_other_base", other)
    done = export(trained("llama", method="qlora"), "merged", tmp_path / "out")
    assert done.parity.measured["other_base"]["held"] is False


def test_the_other_base_is_left_out_where_main_memory_has_no_room_for_it(trained, tmp_path, monkeypatch, unchecked):
    run = trained("llama", method="qlora")
    monkeypatch.setattr("tunesmith.devices.local_device", lambda wanted: SimpleNamespace(free=1000))
    assert "other_base" not in export(run, "merged", tmp_path / "out").parity.measured


def test_a_base_that_has_gone_is_named_and_so_is_what_to_do(trained, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(trained("llama"), run)
    (run / "run.yaml").write_text(
        (run / "run.yaml").read_text().replace(str(trained("llama").parent / "model"), str(tmp_path / "b"))
    )
    with pytest.raises(ModelError, match=r"the base of this run: .*no such folder") as fault:
        export(run, "merged", tmp_path / "out")
    assert f"write that as `model` in {run / 'run.yaml'}" in fault.value.fix
    shutil.copytree(trained("llama").parent / "model", tmp_path / "b")
    assert export(run, "gguf", tmp_path / "out", quant="f16").parity.state == "verified"


def test_at_most_so_many_rows_are_compared():
    example = SimpleNamespace(ids=[1, 2, 3], learn=[0, 1, 1])
    renderer = SimpleNamespace(examples_many=lambda held: [SimpleNamespace(examples=(example,) * 9)] * 64)
    rows, positions = parity._rows(renderer, [], 100)
    assert len(rows) == len(positions) == parity.ROWS


# ---- the runtime -------------------------------------------------------------------------------------------------------------


def test_a_runtime_that_hangs_is_ended_and_says_how_far_it_came(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "job.json"), str(tmp_path / "result.npz")]
    seen = []
    with pytest.raises(parity.RuntimeLost, match=r"no sign of life for .* after 3 of 5 tokens and answers"):
        parity._run(command, _env(), tmp_path, 6.0, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 5)


def test_a_runtime_lives_no_longer_than_who_asked_and_takes_the_rows_with_it(tmp_path):
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(JOB))
    command = [sys.executable, "-c", SLEEPER, str(folder / "job.json"), str(folder / "result.npz")]
    with subprocess.Popen(command, env=_env(), stdin=subprocess.PIPE) as process:
        began = time.monotonic()
        while not (folder / "progress").exists() and time.monotonic() - began < 30:
            time.sleep(0.05)
        process.stdin.close()  # as the system does for a process that was killed
        assert process.wait(10) == 1
    assert not folder.exists()


def test_a_hung_or_killed_runtime_says_nothing_about_the_file(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "SILENCE", 0.01)
    monkeypatch.setattr(parity, "SLOWEST", 1e12)
    hung = export(trained("llama"), "gguf", tmp_path / "a")
    assert (hung.parity.state, hung.exit_code) == ("not verified", 1) and hung.path.is_dir()
    assert "llama.cpp: no sign of life" in hung.parity.reasons[0]
    monkeypatch.setattr(parity, "_run", lambda *a: (-9, ""))
    killed = export(trained("llama"), "gguf", tmp_path / "b")
    assert killed.parity.state == "not verified" and "where memory runs out" in killed.parity.reasons[0]
    monkeypatch.setattr(parity, "_run", lambda *a: (NOT_HERE, "Free memory on device is less than desired"))
    crowded = export(trained("llama"), "gguf", tmp_path / "c")
    assert crowded.parity.state == "not verified" and crowded.path.is_dir()
    assert crowded.parity.reasons == ["llama.cpp: it cannot run here: Free memory on device is less than desired"]


def test_last_words_name_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_run", lambda *a: (1, f'  File "{tmp_path}/a.py", line 1\n    x\ncannot open {tmp_path}/x.gguf'))
    with pytest.raises(parity.RuntimeFailed) as fault:
        parity.ask("llama.cpp", {"artefact": str(tmp_path / "x.gguf")})
    assert str(fault.value) == "exit code 1: cannot open x.gguf"


def test_last_words_are_the_fault_and_the_reasons_below_it():
    frames = 'warming up\n[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1\n[rank0]:     x\n'
    said = f"{frames}[rank0]: ValidationError: 1 error for ModelConfig\n  Value error, max_model_len (512) is greater than 256\n"
    last = "ValidationError: 1 error for ModelConfig / Value error, max_model_len (512) is greater than 256"
    assert parity._last_words(said) == f"warming up / Traceback (most recent call last): / {last}"
    assert parity._last_words("  indented alone") == "indented alone" and parity._last_words("") == ""


def test_a_proxy_hears_nothing_of_the_held_out_rows(trained, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert export(trained("llama"), "gguf", tmp_path / "out", quant="f16").parity.state == "verified"


def test_a_model_too_large_for_the_gpu_is_run_on_the_cpu():
    weight = SimpleNamespace(numel=lambda: 7_000_000_000, element_size=lambda: 2)
    for free, fits in ((16 << 30, False), (24 << 30, True)):
        torch = SimpleNamespace(cuda=SimpleNamespace(mem_get_info=lambda free=free: (free, 80 << 30)))
        assert _fits(SimpleNamespace(parameters=lambda: [weight]), torch) == fits


def test_a_terminal_shows_what_is_being_done_and_a_file_does_not(trained, tmp_path):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    tunesmith.export(trained("llama"), "gguf", out=tmp_path / "a", console=terminal)
    said = terminal.file.getvalue()
    assert all(part in said for part in ("asking the live model", "writing", "asking llama.cpp"))
    plain = quiet()
    tunesmith.export(trained("llama"), "gguf", out=tmp_path / "b", console=plain)
    assert "asking" not in plain.file.getvalue() and "writing" not in plain.file.getvalue()


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(tunesmith.__file__).parents[1])}


# ---- what others see -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vllm", "my model's folder"])
def test_serve_sh_serves_its_own_folder_whatever_that_is_called(name, trained, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    done = export(trained("llama"), "vllm", Path(name))
    tool = tmp_path / "bin" / "vllm"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    tool.chmod(0o755)
    path = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    for command, where, shown in (
        (["sh", str(tmp_path / name / "serve.sh")], "/", tmp_path / name),
        (["sh", "-c", done.hints[0]], tmp_path, done.path),
    ):
        said = subprocess.run(command, env=path, cwd=where, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said[:4] == ["serve", str(shown), "--served-model-name", "run"]
    assert str(tmp_path) not in (done.path / "README.md").read_text()


def names_a_path(folder, *roots):
    """The files that do."""
    return [f.name for f in sorted(folder.iterdir()) if any(str(root).encode() in f.read_bytes() for root in roots)]


@pytest.mark.parametrize("to", ["adapter", "merged", "vllm", "ollama", "gguf-lora"])
def test_no_file_of_an_export_names_a_path_of_this_machine(to, trained, tmp_path, unchecked):
    """Nor does parity.json, which stays here. An adapter over a folder names it for PEFT, in the one place that PEFT looks at."""
    done = export(trained("llama"), to, tmp_path / "it's out")
    found = names_a_path(done.path, trained("llama").parent, tmp_path)
    assert found == (["adapter_config.json"] if to == "adapter" else [])


def test_peft_finds_the_base_of_an_exported_adapter_by_itself(trained, tmp_path):
    """It was null over a folder: AutoPeftModelForCausalLM.from_pretrained failed."""
    peft = pytest.importorskip("peft")
    run = trained("llama")
    done = export(run, "adapter", tmp_path / "out")
    assert any("names the base's folder" in note for note in done.parity.notes)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(done.path, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)
    with torch.no_grad():
        ours, theirs = Talker.open(run).model(ids), model(ids[None]).logits[0]
    assert (ours - theirs[:, : ours.shape[1]]).abs().max() < 1e-3


def test_a_pushed_adapter_names_no_folder_and_its_card_says_which_base(trained, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    run = trained("llama")
    (done,) = tunesmith.export(run, "adapter", out=tmp_path / "out", push="me/x", console=quiet())
    assert [call[0] for call in calls] == ["create", "upload"]
    assert json.loads((done.path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert not names_a_path(done.path, run.parent, tmp_path)
    card, manifest = (done.path / "README.md").read_text(), Run.open(run).manifest
    assert "came from a folder and is on no hub" in card and manifest["base"] in card and "PeftModel.from_pretrained" in card
    assert base_fingerprint(Path(manifest["base_name"])) == manifest["base"]


def test_an_adapter_over_a_base_from_the_hub_names_that(trained, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(source.Source, "hub_name", "owner/name")
    done = export(trained("llama"), "adapter", tmp_path / "out")
    assert json.loads((done.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
    assert "on no hub" not in (done.path / "README.md").read_text()


def test_what_was_not_verified_is_not_pushed_even_by_force(trained, tmp_path, monkeypatch, unchecked):
    import huggingface_hub

    calls, console = [], quiet()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    tunesmith.export(trained("llama"), "gguf", out=tmp_path / "out", push="me/x", force=True, console=console)
    assert not calls and "kept, not pushed: it is not verified" in console.file.getvalue()


def test_a_missing_login_is_told_before_any_work(trained, tmp_path, monkeypatch, no_work):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RunError, match="nobody is logged in"):
        export(trained("llama"), "gguf", tmp_path / "out", push="me/x")
