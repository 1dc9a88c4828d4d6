"""The two commands set up once: a stand-in for Python writes down what make asks of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, in which every Python, also that of a new .venv, is a stand-in."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\necho "$*" >> "$LOG"\n'
        'case "$*" in *"-m venv"*) mkdir -p .venv/bin\n'
        'for n in python lint-imports ruff; do cp "$STAND_IN" .venv/bin/$n; done;; esac\n'
    )
    stand_in.chmod(0o755)
    log = tmp_path / "log"

    def make(target: str) -> list[str]:
        log.write_text("")
        env = {"PATH": os.environ["PATH"], "LOG": str(log), "STAND_IN": str(stand_in)}
        done = subprocess.run(["make", target, f"PYTHON={stand_in}"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    return make, tmp_path


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call]


def test_a_second_call_sets_nothing_up_again(checkout):
    make, folder = checkout
    first = make("demo")
    assert len(installs(first)) == 2 and first[-1] == "-m tunesmith.demo"  # torch, then this package
    assert make("demo") == ["-m tunesmith.demo"]
    tests = make("test")
    assert len(installs(tests)) == 1 and any("-m pytest" in call for call in tests)
    assert not installs(make("test")) and not installs(make("demo"))
    newer = (folder / ".venv/.installed-dev").stat().st_mtime + 5
    os.utime(folder / "constraints.txt", (newer, newer))
    assert len(installs(make("demo"))) == 2


def test_a_set_up_that_was_stopped_half_way_is_made_anew(checkout):
    """A .venv whose pip does not answer is what a stopped set-up, or a Python without ensurepip, leaves."""
    make, folder = checkout
    (folder / ".venv/bin").mkdir(parents=True)
    broken = folder / ".venv/bin/python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    calls = make("demo")
    assert any("-m venv --clear .venv" in call for call in calls) and calls[-1] == "-m tunesmith.demo"
