"""Sweeps from beginning to end over a trainer that takes a second; one over the real one."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

import tunesmith
from tunesmith.errors import ConfigError, DoesNotFit, MissingExtra, RunError, TrainingFailed
from tunesmith.run import Run

pytest.importorskip("optuna")


def quiet():
    return Console(file=io.StringIO(), width=160)


def sweep(tiny, folder, *settings, console=None, config=None, **how):
    """In `folder`/sweep, over a run file whose rate of 0.01 and rank of 4 are near the best, 0.01 and 8."""
    return tunesmith.sweep(
        config or tiny.config(folder / "run"), *settings, out=folder / "sweep", console=console or quiet(), **how
    )


def names(trainer):
    return [call["folder"] for call in trainer()]


def test_every_combination_is_run_once_and_ranked(tiny, tmp_path, trainer):
    console = quiet()
    result = sweep(tiny, tmp_path, "lora.rank=4,8", "train.learning_rate=0.001,0.01", prune=False, console=console)
    rows = result.trials
    assert [row["changes"] for row in rows] == [
        {"lora.rank": "8", "train.learning_rate": "0.01"},
        {},  # rank 4 at 0.01 is the run file itself, and is not run a second time
        {"lora.rank": "8", "train.learning_rate": "0.001"},
        {"lora.rank": "4", "train.learning_rate": "0.001"},
    ]
    assert len(names(trainer)) == len(set(names(trainer))) == 4
    assert rows[0]["loss"] == pytest.approx(1.002) and rows[0]["difference"]["mean"] == pytest.approx(-0.04)
    assert rows[1]["baseline"] and rows[1]["values"] == {"lora.rank": "4", "train.learning_rate": "0.01"}
    said = console.file.getvalue()
    assert "4/4" in said and "as the run file has it  loss 1.0420" in said
    result.print(console)
    assert "best: lora.rank=8 train.learning_rate=0.01: loss 1.0020 against 1.0420" in console.file.getvalue()
    assert "one seed each" in result.found["verdict"][1]
    best = yaml.safe_load(result.best.read_text())
    assert best["lora"] == {"rank": 8, "alpha": 8.0} and best["output"].endswith("run-best")
    assert tunesmith.plan(result.best).fits
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == result.found
    for row in rows:  # a run folder each, without the checkpoints that nobody needs
        run = Run.open(tmp_path / "sweep" / row["folders"][0])
        assert run.status().state == "finished" and not any(run.checkpoints.glob("*")) and run.config.eval.samples == 0
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("<circle") >= 8 and "Learning curves" in page and "src=" not in page and "<script" not in page


def test_halving_stops_what_is_worse_but_never_the_files_own(tiny, tmp_path, trainer, monkeypatch):
    monkeypatch.setenv("PACE", "0.15")
    config = tiny.config(tmp_path / "run", train={"learning_rate": 0.1})
    result = sweep(tiny, tmp_path, "train.learning_rate=0.001,0.0001,0.05,0.02,0.002,0.0002", config=config)
    states = {row["values"]["train.learning_rate"]: row for row in result.trials}
    assert states["0.1"]["state"] == "finished" and states["0.1"]["baseline"]
    assert states["0.02"]["state"] == "finished" and states["0.02"]["place"] == 1
    assert states["0.0001"]["state"] == "finished"  # among the first four, whatever it is worth
    stopped = states["0.0002"]
    assert stopped["state"] == "pruned" and 25 <= stopped["stopped_at"] <= 60 and stopped["place"] is None
    run = Run.open(tmp_path / "sweep" / stopped["folders"][0])
    assert run.status().state == "interrupted" and len([*run.checkpoints.glob("*")]) == 1  # can be gone on with


def test_a_trial_that_fails_is_told_and_the_rest_goes_on(tiny, tmp_path, trainer):
    result = sweep(tiny, tmp_path, "lora.rank=13,17,19,8", prune=False)
    reasons = {row["values"]["lora.rank"]: row["reason"] for row in result.trials if row["state"] == "failed"}
    assert reasons["13"] == "out of memory"
    assert "signal 9" in reasons["17"] and "not finite" in reasons["19"]
    assert [row["values"]["lora.rank"] for row in result.trials if row["ranked"]] == ["8", "4"]
    assert len(names(trainer)) == 5
    sweep(tiny, tmp_path, "lora.rank=13,17,19,8", prune=False)
    assert len(names(trainer)) == 5  # nothing is run again


def test_all_failed_is_a_failure(tiny, tmp_path, trainer):
    with pytest.raises(TrainingFailed, match="all 2 settings failed; the first: out of memory"):
        sweep(tiny, tmp_path, "lora.rank=13,17", config=tiny.config(tmp_path / "run", lora={"rank": 13}))
    assert (tmp_path / "sweep" / "sweep.html").exists() and not (tmp_path / "sweep" / "best.yaml").exists()


def test_seeds_tell_luck_from_effect(tiny, tmp_path, trainer):
    result = sweep(tiny, tmp_path, "lora.rank=4,8,9", seeds=3, prune=False)
    assert sorted(names(trainer)) == sorted(f"{n:03d}-seed-{s}" for n in {int(f[:3]) for f in names(trainer)} for s in (7, 8, 9))
    best = result.trials[0]
    assert len(best["losses"]) == 3 and best["loss"] == pytest.approx(sum(best["losses"]) / 3)
    low, high = best["difference"]["interval"]
    assert low == pytest.approx(-0.04) and high == pytest.approx(-0.04)  # the seed adds the same to both: the pairs cancel it
    assert "beyond the noise of seeds" in result.found["verdict"][1]


def test_ranges_are_drawn_and_a_longer_sweep_goes_on(tiny, tmp_path, trainer):
    first = sweep(tiny, tmp_path, "train.learning_rate=1e-3..1e-1", "lora.rank=2..16", trials=3, prune=False)
    assert len(first.trials) == 4 and first.found["total"] == 4
    more = sweep(tiny, tmp_path, "train.learning_rate=1e-3..1e-1", "lora.rank=2..16", trials=9, prune=False)
    assert len(more.trials) == 10 == len(names(trainer)) and len({json.dumps(r["values"]) for r in more.trials}) == 10
    assert more.found["importance"] and sum(more.found["importance"].values()) == pytest.approx(1)
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "What mattered" in page
    assert all(1e-3 <= float(r["values"]["train.learning_rate"]) <= 1e-1 for r in more.trials)


def test_a_small_space_ends_when_all_was_tried(tiny, tmp_path, trainer):
    result = sweep(tiny, tmp_path, "lora.rank=4..6", trials=20, prune=False)
    assert sorted(row["values"]["lora.rank"] for row in result.trials) == ["4", "5", "6"] and len(names(trainer)) == 3


def test_jobs_run_at_once_and_share(tiny, tmp_path, trainer, monkeypatch):
    monkeypatch.setenv("PACE", "0.1")
    config = tiny.config(tmp_path / "run", memory={"budget_gb": "auto"})
    sweep(tiny, tmp_path, "lora.rank=5,6,7", jobs=2, prune=False, config=config)
    calls = trainer()
    assert calls[1]["began"] - calls[0]["began"] < 1.0  # a run takes longer
    assert {call["threads"] for call in calls} == {str(max(1, os.cpu_count() // 2))}
    assert len({call["budget"] for call in calls}) == 1 and calls[0]["budget"] != "auto"


def test_what_does_not_fit_is_told_before_anything_runs(tiny, tmp_path, trainer):
    with pytest.raises(DoesNotFit, match="the run file as it is: "):
        sweep(tiny, tmp_path, "lora.rank=2,4", config=tiny.config(tmp_path / "run", memory={"budget_gb": 0.001}))
    with pytest.raises(DoesNotFit, match=re.escape("lora.rank=6000000: ")):
        sweep(tiny, tmp_path, "lora.rank=2,6000000")
    assert names(trainer) == [] and not (tmp_path / "sweep").exists()


def test_nothing_to_rank_by(tiny, tmp_path, trainer):
    with pytest.raises(ConfigError, match=r"data.held_out is 0"):
        sweep(tiny, tmp_path, "lora.rank=2,4", config=tiny.config(tmp_path / "run", data={"held_out": 0}))


def test_a_loss_over_other_tokens_is_not_ranked(tiny, tmp_path, trainer):
    result = sweep(tiny, tmp_path, "data.max_length=64,128", prune=False)
    other = next(row for row in result.trials if row["values"]["data.max_length"] == "64")
    assert not other["ranked"] and other["place"] is None and "other tokens" in (tmp_path / "sweep/sweep.html").read_text()


def test_another_sweep_or_other_files_in_the_folder(tiny, tmp_path, trainer):
    sweep(tiny, tmp_path, "lora.rank=4,8", prune=False)
    with pytest.raises(RunError, match="started with another: the settings tried"):
        sweep(tiny, tmp_path, "lora.rank=4,9", prune=False)
    with pytest.raises(RunError, match="started with another: the run file"):
        sweep(tiny, tmp_path, "lora.rank=4,8", prune=False, config=tiny.config(tmp_path / "run", train={"epochs": 3}))
    other = tmp_path / "other"
    (other / "sweep").mkdir(parents=True)
    (other / "sweep" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="holds no sweep"):
        sweep(tiny, other, "lora.rank=4,8")


def test_other_rows_are_another_sweep_but_another_day_is_not(tiny, tmp_path, trainer, monkeypatch):
    from tunesmith.sweep import study

    sweep(tiny, tmp_path, "lora.rank=4,8", prune=False)
    config = tiny.config(tmp_path / "run", data={"train": str(tiny.rows(tmp_path / "train.jsonl", 20))})
    sweep(tiny, tmp_path / "b", "lora.rank=4,8", prune=False, config=config)
    tiny.rows(tmp_path / "train.jsonl", 21)
    with pytest.raises(RunError, match="started with another: the data"):
        sweep(tiny, tmp_path / "b", "lora.rank=4,8", prune=False, config=config)
    real = study.datetime

    class Tomorrow(real.date):
        @classmethod
        def today(cls):
            return real.date(2030, 1, 1)

    monkeypatch.setattr(study, "datetime", SimpleNamespace(date=Tomorrow))
    before = len(names(trainer))
    assert len(sweep(tiny, tmp_path, "lora.rank=4,8", prune=False).trials) == 2 and len(names(trainer)) == before


def test_without_optuna(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match="optuna") as caught:
        sweep(tiny, tmp_path, "lora.rank=4,8")
    assert "[sweep]" in caught.value.fix


@pytest.fixture
def process(tiny, tmp_path, trainer, monkeypatch):
    """Starts the same sweep in a process of its own; it prints `Interrupted` when it was stopped in order."""
    monkeypatch.setenv("PACE", "0.1")
    code = f"""
import sys, io
from rich.console import Console
import tunesmith
from tunesmith.errors import Interrupted
from tunesmith.sweep import job
job.TRAIN = (sys.executable, {str(tmp_path / "trainer.py")!r})
try:
    tunesmith.sweep({tiny.config(tmp_path / "run")!r}, "lora.rank=5,6,7", out={str(tmp_path / "sweep")!r}, prune=False, jobs=2)
except Interrupted as e:
    print("Interrupted", e.what)
"""
    return lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def settled(tmp_path, trainer):
    """What must hold however it was stopped: four settings, each counted once, each with one whole curve."""
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["values"]["lora.rank"] for row in found["trials"]] == ["7", "6", "5", "4"]
    for row in found["trials"]:
        assert row["state"] == "finished" and len(row["folders"]) == 1
        steps = [r["step"] for r in Run.open(tmp_path / "sweep" / row["folders"][0]).metrics() if r["kind"] == "step"]
        assert steps == [*range(1, 11)]
    return [call["folder"] for call in trainer() if not call["resume"]]


def half_way(tmp_path, trial, step=3):
    path = tmp_path / "sweep" / "trials" / trial / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count('"kind": "step"') >= step


def test_killed_and_started_again(tmp_path, trainer, process):
    """SIGKILL: its trainings live on, and are followed, not begun again."""
    first = process()
    until(half_way(tmp_path, "000"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert process().wait() == 0
    fresh = settled(tmp_path, trainer)
    assert len(fresh) == len(set(fresh)) == 4 == len(trainer())


def test_killed_with_its_trainings(tmp_path, trainer, process):
    """A power cut: what was running goes on from where it was."""
    first = process()
    until(half_way(tmp_path, "000"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    for name in {call["folder"] for call in trainer()}:
        run = Run.open(tmp_path / "sweep" / "trials" / name)
        if run.status().state == "running":
            os.kill(run.status().pid, signal.SIGKILL)
    until(lambda: Run.open(tmp_path / "sweep" / "trials" / "000").status().state == "stopped")
    assert process().wait() == 0
    fresh = settled(tmp_path, trainer)
    assert len(set(fresh)) == 4 and [call["folder"] for call in trainer() if call["resume"]].count("000") == 1


def test_stopped_by_a_signal(tmp_path, trainer, process):
    first = process()
    until(half_way(tmp_path, "000"))
    second = process()  # meanwhile it is refused
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and "running this sweep" in said
    until(lambda: len(trainer()) >= 3)  # its second pair is at work
    name = trainer()[-1]["folder"]
    until(half_way(tmp_path, name, 2))
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert "Interrupted stopped by SIGTERM after " in said
    assert Run.open(tmp_path / "sweep" / "trials" / name).status().state == "interrupted"
    assert process().wait() == 0
    settled(tmp_path, trainer)


def test_the_real_trainer(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = sweep(tiny, tmp_path, "train.learning_rate=1e-5,0.01", prune=False)
    assert [row["values"]["train.learning_rate"] for row in result.trials] == ["0.01", "1e-5"]
    run = Run.open(tmp_path / "sweep" / result.trials[0]["folders"][0])
    assert result.trials[0]["loss"] == json.loads((run.path / "comparison.json").read_text())["loss"]["after"]
    assert run.report.exists() and len(tunesmith.generate(run.path, ["add 1 and 2"], max_tokens=3)) == 1
    assert Path(tmp_path / "sweep" / "logs" / "000.log").read_text().startswith("model")
