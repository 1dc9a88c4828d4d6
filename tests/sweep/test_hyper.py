"""The guide's runs, pictures and words: each setting can be run, what is said follows from the numbers, the guide is current."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tunesmith.config.load import load
from tunesmith.demo import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hyper():
    spec = importlib.util.spec_from_file_location("hyper", ROOT / "bench" / "hyper.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hyper"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows_of(hyper, loss, seeds=3):
    return [
        {"key": p.key, "value": p.value, "seed": p.seed, "loss": loss(p), "training_loss": loss(p) / 2, "before": 5.8, "steps": 78,
         "seconds": 9.0, "device": "a card"}
        for p in hyper.points([*hyper.BY_KEY], seeds)
    ]  # fmt: skip


def test_every_setting_can_be_run_and_the_first_value_is_the_demos_own(hyper):
    demo = load(config("runs/x"))
    for setting in hyper.SETTINGS:
        (own, none), *others = setting.values.items()
        assert not none and others
        for value, overrides in others:
            assert load(demo, *hyper.ALWAYS, *overrides) != load(demo, *hyper.ALWAYS), value
        if not setting.words:
            section, name = setting.key.split(".")
            assert float(own) == getattr(getattr(demo, section), name)


def test_runs_are_kept_and_not_run_again(hyper, tmp_path, trainer):
    results = tmp_path / "results" / "hyper.jsonl"
    more = ["memory.device=cpu"]
    assert hyper.run(["lora.rank"], 1, 2, 600, more, results, tmp_path / "runs") == 0
    rows = hyper.read(results)
    assert {(r["key"], r["value"]) for r in rows} == {("demo", "demo"), *(("lora.rank", v) for v in ("4", "16", "128"))}
    assert all(r["loss"] == r["curve"][-1][1] and r["steps"] == 10 for r in rows)
    assert hyper.run(["lora.rank"], 1, 2, 600, more, results, tmp_path / "runs") == 0 and hyper.read(results) == rows
    assert (
        hyper.run(["train.epochs"], 1, 2, 0, more, results, tmp_path / "runs") == 0 and hyper.read(results) == rows
    )  # no time left


def test_cut_rows_are_measured_on_whole_ones(hyper, tmp_path, trainer, monkeypatch):
    setting = hyper.Setting("data.max_length", {"512": (), "32": ("data.max_length=32",)})
    monkeypatch.setattr(hyper, "BY_KEY", {setting.key: setting})
    results = tmp_path / "hyper.jsonl"
    assert hyper.run(["data.max_length"], 1, 1, 600, [], results, tmp_path / "runs") == 0
    demo, cut = hyper.read(results)
    assert cut["tokens"] == demo["tokens"] == 100  # the run over cut rows itself says 50
    assert [call["folder"] for call in trainer()][1:] == ["data.max-length-32-seed-0", "data.max-length-32-seed-0-read"]


def test_what_is_said_follows_from_the_numbers(hyper):
    noise = (0.0, 0.02, -0.02)
    effect = {"1e-4": 0.5, "3e-4": -0.3, "3e-3": 0.01, "1e-2": 4.0}
    shift = {("3e-3", 0): 0.3, ("3e-3", 1): -0.3}  # differs from seed to seed by more than its effect

    def loss(p):
        return 2 + noise[p.seed] + (effect[p.value] + shift.get((p.value, p.seed), 0) if p.key == "train.learning_rate" else 0)

    found = hyper.measured("train.learning_rate", rows_of(hyper, loss))
    assert [m.value for m in found] == ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"]
    text = hyper.block("train.learning_rate", found)
    words = " ".join(text.split())
    assert "Lowest at 3e-4. Better than the demo's 1e-3 beyond the noise of seeds: 3e-4. Worse: 1e-4; 1e-2." in words
    assert "No difference shown: 3e-3" in words and "| **1e-3** | 2.000 | - | 1.000 | 9 |" in text
    assert "| 1e-4 | 2.500 | +0.500 (+0.500 to +0.500) |" in text
    picture = hyper.picture("train.learning_rate", found)
    assert "6.00 ↑" in picture and picture.count("<circle") == 1 + 5 * 3 + 1
    ElementTree.fromstring(picture)
    one = hyper.block("train.learning_rate", hyper.measured("train.learning_rate", rows_of(hyper, loss, 1)))
    assert "1 seed:" in one and "Worse" not in one and "(" not in one.splitlines()[4]


def test_draw_fills_the_guide_and_a_second_time_changes_nothing(hyper, tmp_path):
    guide = (ROOT / "docs" / "hyperparameters.md").read_text("utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "hyperparameters.md").write_text(guide, "utf-8")
    results = tmp_path / "hyper.jsonl"
    rows = rows_of(hyper, lambda p: 2.0 + 0.1 * p.seed)
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hyper.draw(results, tmp_path / "docs")
    first = (tmp_path / "docs" / "hyperparameters.md").read_text("utf-8")
    assert all(f"![{key}: held-out loss](hyper/{key}.svg)" in first for key in hyper.BY_KEY)
    assert f"{len(rows)} runs on a card" in first
    assert {p.stem for p in (tmp_path / "docs" / "hyper").glob("*.svg")} == set(hyper.BY_KEY)
    hyper.draw(results, tmp_path / "docs")
    assert (tmp_path / "docs" / "hyperparameters.md").read_text("utf-8") == first
    drop = re.compile(r"(<!-- measured: [\w.]+ -->\n).*?(<!-- end)", re.DOTALL)
    assert drop.sub(r"\1\2", first) == drop.sub(r"\1\2", guide)


def test_the_guide_is_what_the_results_say(hyper, tmp_path):
    (tmp_path / "hyperparameters.md").write_text((ROOT / "docs" / "hyperparameters.md").read_text("utf-8"), "utf-8")
    hyper.draw(hyper.RESULTS, tmp_path)
    assert (tmp_path / "hyperparameters.md").read_text("utf-8") == (ROOT / "docs" / "hyperparameters.md").read_text("utf-8")
    for picture in (tmp_path / "hyper").glob("*.svg"):
        assert picture.read_text("utf-8") == (ROOT / "docs" / "hyper" / picture.name).read_text("utf-8")
