"""What the doctor says is what a run takes."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import tunesmith
from tunesmith import cli, diagnosis
from tunesmith.errors import ModelError


def lines(name=None):
    return [line for line in tunesmith.doctor().lines if name is None or line.name == name]


def test_it_looks_at_everything_and_a_sound_machine_is_sound(capsys):
    found = tunesmith.doctor()
    assert found.healthy
    names = {line.name for line in found.lines}
    assert {"python", "torch", "device", "memory", "kernels", "attention", "FP8", "downloads", "runs", "a step"} <= names
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in shown and "finite numbers" in shown


def test_it_says_which_attention_and_why():
    said = {line.found.partition(":")[0]: line.found for line in lines("attention")}
    assert set(said) == set(diagnosis.SHAPES)
    if not torch.cuda.is_available():
        assert "CPUs" in said["documents of one length"] and "plain PyTorch" in said["a sliding window"]


@pytest.mark.parametrize("package", ["triton", "bitsandbytes", "tensorboard", "transformers"])
def test_what_is_not_installed_is_named_with_what_it_is_for(monkeypatch, package):
    plain = diagnosis.version

    def version(name):
        if name == package:
            raise diagnosis.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(diagnosis, "version", version)
    (line,) = lines(package)
    assert line.found.startswith("not installed: ") and len(line.found) > 30


def test_a_device_that_cannot_be_used_is_a_fault(monkeypatch, capsys):
    def refused(memory):
        raise ModelError("the card does not answer", "restart the driver")

    monkeypatch.setattr(diagnosis, "place", refused)
    assert cli.main(["doctor"]) == 2
    assert "restart the driver" in capsys.readouterr().out


def test_no_room_for_a_download_is_a_note_and_no_right_to_write_a_fault(monkeypatch):
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 30))
    assert {line.state for line in lines("runs")} == {"note"}
    monkeypatch.setattr(diagnosis.os, "access", lambda path, mode: False)
    assert {line.state for line in lines("runs")} == {"fault"}


def test_numbers_that_are_not_finite_are_a_fault(monkeypatch):
    monkeypatch.setattr(diagnosis.torch, "isfinite", lambda x: torch.zeros_like(x, dtype=torch.bool))
    assert lines("a step")[0].state == "fault"


def test_it_fits_a_narrow_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    tunesmith.doctor().print(console)
    assert all(len(line) <= 80 for line in console.export_text().splitlines())
