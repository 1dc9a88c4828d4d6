"""The rooms that need no torch bring none in: a fresh process imports each and looks. import-linter reads the same from the source;
this also sees what other packages import, and what a function imports when it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = (
    "plan",
    "fits",
    "data.prepare",
    "data.report",
    "tokenizer",
    "run",
    "evaluate.report",
    "evaluate.check_page",
    "evaluate.fits_page",
    "evaluate.plan_page",
    "evaluate.sweep_page",
    "evaluate.compare_page",
    "evaluate.guardrails",
    "evaluate.metrics",
    "compare.result",
    "advice",
    "sweep.job",
    "config.load",
    "spec",
    "hub",
    "devices",
    "serve.http",
    "cli",
)
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "triton")


def brought(code: str) -> set[str]:
    """Which of HEAVY a fresh process holds after `code`."""
    ask = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_down_to_the_plan_brings_no_torch(room: str) -> None:
    assert brought(f"import tunesmith.{room}") == set()


def test_the_look_would_see_torch() -> None:
    assert "torch" in brought("import tunesmith.ops.rms_norm")


def test_verbs_that_do_not_compute_bring_no_torch(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": f" then {i + 1}"}) + "\n" for i in range(8)))
    config = {"model": "embedded", "data": str(data), "method": "qlora", "output": str(tmp_path / "run")}
    verbs = f"config = {config!r}\ntunesmith.check(config)\ntunesmith.plan(config, gpu='24GB')\ntunesmith.init({str(data)!r})"
    verbs += "\ntunesmith.plan('embedded')"
    verbs += f"\ntunesmith.prepare(config, out={str(tmp_path / 'mended')!r}, fix='all')"
    assert brought(f"import tunesmith\n{verbs}\ntunesmith.explain('lora.rank')") == set()
