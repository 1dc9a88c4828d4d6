"""What docs/planning.md says of the plan beside runs on an H200 and an H100, against bench/results; the bench's dry run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import plan_report
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return plan_report


@pytest.fixture(scope="module")
def h200(report):
    return report.points(RESULTS / "plan.jsonl")


@pytest.fixture(scope="module")
def h100(report):
    return report.points(RESULTS / "plan_h100.jsonl")


def test_memory_is_never_planned_two_percent_too_small_nor_five_too_large(h200, h100):
    """By this checkout's constants; on the H200 also as it was foretold."""
    for found, x in ((h200, "foretold"), (h200, "planned"), (h100, "planned")):
        apart = {p.row.name: getattr(p, x) / p.held - 1 for p in found}
        assert len(apart) >= 50 and {p.row.family for p in found} == {"mistral", "llama", "phi", "1b"}
        assert not {name: off for name, off in apart.items() if not -0.02 < off < 0.05}, x


def test_speed_on_an_h200_is_within_fifteen_percent(h200):
    for x in ("foretold_speed", "planned_speed"):
        apart = {p.row.name: getattr(p, x) / p.speed - 1 for p in h200}
        assert not {name: off for name, off in apart.items() if abs(off) > 0.15}, x


def test_speed_on_an_h100_is_within_fifteen_percent_but_where_steps_wait_for_launches(h100):
    """Three rows of a 1B in float32 on the composed path are further off: their steps of 0.1 to 0.3 s vary by half from call to
    call, and two or three of them were timed (docs/planning.md; three such rows in a later call: +11, -16 and +5 %)."""
    apart = {p.row.name: p.planned_speed / p.speed - 1 for p in h100}
    off = {name: x for name, x in apart.items() if abs(x) > 0.15}
    assert set(off) <= {"1b full32 short 24GB", "1b full32 2048 48GB", "1b full32 8192 48GB"} and max(off.values(), default=0) < 0.5


def test_the_page_shows_what_the_files_say(report, h200, h100):
    page = (ROOT / "docs" / "planning.md").read_text()
    assert report.summary(h200) in page and report.summary(h100) in page and "planning.svg" in page
    assert report.picture(h200) == (ROOT / "docs" / "planning.svg").read_text()


def test_layers_are_read_back_from_their_words(report):
    from tunesmith.plan.layers import WHOLE, Layers, describe

    two = (Layers(12, "recompute", True), Layers(20, "keep"))
    for layers in (two, two[:1], (Layers(32, "checkpoint"),)):
        assert report.layers_of(describe(layers), layers[0].count, None) == layers and layers[0].tile == WHOLE


def test_a_dry_run_measures_a_row(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "plan.py"), "--tiny", "--out", str(tmp_path), "--only", "1b lora short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.search(r"1b lora short 8GB .* tok/s", done.stdout), done.stderr
