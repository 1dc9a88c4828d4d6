"""A run that was killed, stopped or damaged goes on to the same bits as one that was not; what cannot go on is refused.

The kills are real: a server process imports everything once and forks a child for each run, which gets SIGKILL at a random moment.
"""

import datetime
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import tunesmith
from tunesmith import tuning
from tunesmith.chat import Talker
from tunesmith.errors import Interrupted, RunError
from tunesmith.run import Run
from tunesmith.train.log import Log

SERVER = """
import functools, json, os, sys, traceback
import torch
import tunesmith, tunesmith.tuning
from rich.console import Console
from tunesmith.errors import TunesmithError
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = open(job["log"], "a")
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            if job["half_blocks"]:
                tunesmith.tuning.plan_for = functools.partial(tunesmith.tuning.plan_for, half_blocks=True)
            tunesmith.train(job["config"], resume=job["resume"], console=Console(file=out))
            code = 0
        except TunesmithError as e:
            print(type(e).__name__, e, flush=True)
            code = e.exit_code
        except BaseException:
            traceback.print_exc()
            code = 70
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """train(config, resume=..., kill=None): the exit code. `kill(pid)` is called while it runs."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"

    def train(config, *, resume=False, kill=None, half_blocks=False):
        job = {"config": config, "resume": resume, "log": str(config["output"]) + ".log", "half_blocks": half_blocks}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if kill:
            kill(pid)
        return int(process.stdout.readline())

    yield train
    process.stdin.close()
    process.wait(20)


def recorded(path, kind="step"):
    """Rows of one kind by step, floats as their bits."""
    try:
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    found = {}
    for row in rows:
        if row["kind"] == kind:
            assert row["step"] not in found or kind == "event", f"step {row['step']} is there twice"
            found[row["step"]] = {k: v.hex() if isinstance(v, float) else v for k, v in row.items() if "second" not in k}
    return found


def result(path):
    """Everything that two runs of the same settings must share, to the bit."""
    files = [p for folder in ("adapter", "model") for p in sorted((path / folder).glob("*.safetensors"))]
    kept = [path / name for name in ("comparison.json", "before.json", "after.json", "losses_before.json", "samples.jsonl")]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files + kept}
    assert files
    return recorded(path), recorded(path, "eval"), digests


def same(path, unbroken):
    for what, one, other in zip(("steps", "evaluations", "files"), result(path), result(unbroken), strict=True):
        assert one == other, what


def wait_for(path, steps):
    """Until so many steps are recorded, or the run is over."""
    deadline = time.monotonic() + 60
    while len(recorded(path)) < steps and time.monotonic() < deadline:
        if (path / "status.json").exists() and '"finished"' in (path / "status.json").read_text():
            return
        time.sleep(0.002)


CAMPAIGNS = {
    "dropout and neftune": (10, {"lora": {"dropout": 0.1}, "train": {"neftune_alpha": 5.0, "epochs": 5}}),
    "qlora": (3, {"method": "qlora", "train": {"epochs": 3}}),
    "qlora as half-blocks": (3, {"method": "qlora", "train": {"epochs": 3}, "memory": {"activations": "recompute"}}),
    "full": (3, {"method": "full", "lora": {}, "train": {"epochs": 3}, "checkpoint": {"every_steps": 1}}),
}


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_killed_at_random_points_it_ends_in_the_same_bits(tiny, tmp_path, server, name):
    """kill -9, resume, kill -9, resume ...: at a random step, and up to 40 ms into it (a step, a save or an evaluation)."""
    kills, changes = CAMPAIGNS[name]
    draw = random.Random(name)
    config = tiny.config(tmp_path / "killed", **{"checkpoint": {"every_steps": 2}, **changes})
    if name == "full":
        del config["lora"]
    how = {"half_blocks": "half-blocks" in name}
    assert server(config | {"output": str(tmp_path / "unbroken")}, **how) == 0
    assert ("half-blocks" in (tmp_path / "unbroken" / "plan.json").read_text()) == how["half_blocks"]
    steps = len(recorded(tmp_path / "unbroken"))
    path, done = tmp_path / "killed", 0
    for point in [*sorted(draw.sample(range(steps + 1), kills - 1)), steps]:

        def kill(pid, point=point):
            wait_for(path, point)
            time.sleep(draw.random() * 0.04)
            os.kill(pid, signal.SIGKILL)

        code = server(config, resume=done > 0, kill=kill, **how)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
        done += 1
        assert not (path / "run.yaml").exists() or Run.open(path).status().state in ("stopped", "finished")
    assert done >= kills - 1
    if Run.open(path).status().state != "finished":
        assert server(config, resume=True, **how) == 0, (tmp_path / "killed.log").read_text()
    same(path, tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_within_a_step(tiny, tmp_path, server, name):
    config = tiny.config(tmp_path / "run", train={"epochs": 5}, checkpoint={"every_steps": 100})
    counted = []

    def send(pid):
        wait_for(tmp_path / "run", 5)
        counted.append(len(recorded(tmp_path / "run")))
        os.kill(pid, getattr(signal, name))

    assert server(config, kill=send) == 130
    run, steps = Run.open(tmp_path / "run"), recorded(tmp_path / "run")
    assert len(steps) <= counted[0] + 2, "the step it came in, and one that ended while it was on its way"
    assert run.status().state == "interrupted" and name in run.status().message
    assert run.status().step == max(steps) == int(max(p.name for p in run.checkpoints.iterdir()).split("-")[1])
    assert "stopped on request" in run.report.read_text()
    assert not (run.path / "adapter").exists()
    if name == "SIGINT":
        return  # what comes after is the same
    assert server(config, resume=True) == 0
    assert server(config | {"output": str(tmp_path / "unbroken")}) == 0
    same(tmp_path / "run", tmp_path / "unbroken")


def test_killed_before_the_first_checkpoint_it_starts_again(tiny, tmp_path, server):
    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 100}, eval={"every_steps": 100})

    def kill(pid):
        wait_for(tmp_path / "run", 2)
        os.kill(pid, signal.SIGKILL)

    assert server(config, kill=kill) == -signal.SIGKILL
    assert not (tmp_path / "run/checkpoints").exists() and recorded(tmp_path / "run")
    assert server(config, resume=True) == 0 and server(config | {"output": str(tmp_path / "unbroken")}) == 0
    same(tmp_path / "run", tmp_path / "unbroken")


# ---- in this process: what is refused, what is damaged -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """A finished run of twelve steps, which no test changes."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    tunesmith.train(tiny.config(path, checkpoint={"every_steps": 2}), console=quiet())
    return path


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """config, path of a run that SIGTERM stopped after step 6 of 12 (or as told)."""

    def make(after=6, **changes):
        plain = Log.step

        def step(self, number, **values):
            plain(self, number, **values)
            if number == after:
                os.kill(os.getpid(), signal.SIGTERM)

        config = tiny.config(tmp_path / "run", **{"checkpoint": {"every_steps": 2}, **changes})
        with monkeypatch.context() as patch:
            patch.setattr(Log, "step", step)
            with pytest.raises(Interrupted, match="SIGTERM") as e:
                tunesmith.train(config, console=quiet())
        assert e.value.exit_code == 130
        return config, tmp_path / "run"

    return make


def photograph(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def refused(config, match, path):
    """Refused with this message, and the folder is as it was."""
    before = photograph(path)
    with pytest.raises(RunError, match=match) as e:
        tunesmith.train(config, resume=True, console=quiet())
    assert photograph(path) == before
    return str(e.value)


def test_a_changed_run_file_is_refused_with_the_difference(stopped):
    config, path = stopped()
    changed = {**config, "seed": 8, "train": {**config["train"], "learning_rate": 0.02}}
    told = refused(changed, "cannot be resumed", path)
    assert "seed: 7 -> 8" in told and "train.learning_rate: 0.01 -> 0.02" in told
    assert Run.open(path).status().state == "interrupted"


def test_changed_data_and_a_changed_base_are_refused(tiny, stopped, tmp_path):
    data = shutil.copy(tiny.train, tmp_path / "data.jsonl")
    base = shutil.copytree(tiny.model, tmp_path / "base")
    config, path = stopped(data={"train": str(data)}, model=str(base))
    text = data.read_text()
    data.write_text(text.replace("add 1 and", "add 2 and", 1))
    assert "the training data" in refused(config, "cannot be resumed", path)
    data.write_text(text)
    tiny.checkpoint(base, seed=99)
    assert "the base model" in refused(config, "cannot be resumed", path)
    assert Run.open(path).status().state == "interrupted"


def test_a_finished_run_is_refused(tiny, unbroken):
    refused(tiny.config(unbroken, checkpoint={"every_steps": 2}), "has finished", unbroken)
    with pytest.raises(RunError, match="holds a run already"):
        tunesmith.train(tiny.config(unbroken), console=quiet())


def test_a_second_writer_is_refused(stopped):
    config, path = stopped()
    with Run.open(path).lock(), pytest.raises(RunError, match=f"pid {os.getpid()}"):
        tunesmith.train(config, resume=True, console=quiet())
    assert Run.open(path).status().state == "interrupted"


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, unbroken, file):
    config, path = stopped()
    newest = max((path / "checkpoints").iterdir())
    raw = bytearray((newest / file).read_bytes())
    raw[len(raw) // 2] ^= 4
    (newest / file).write_bytes(raw)
    console = quiet()
    tunesmith.train(config, resume=True, console=console)
    told = console.file.getvalue()
    assert "damaged checkpoint passed over" in told and newest.name in told and "from step 4 of 12" in told
    same(path, unbroken)


@pytest.mark.parametrize("state", [None, b"", b"{", b"[]", b"\xff"])
def test_a_checkpoint_without_a_readable_state_is_passed_over_to_the_end(stopped, unbroken, state):
    """It still stands there when the run that went on from the one before it saves again."""
    config, path = stopped(after=7)
    newest = max((path / "checkpoints").iterdir())
    assert newest.name == "step-00000007"
    (newest / "state.json").unlink()
    if state is not None:
        (newest / "state.json").write_bytes(state)
    console = quiet()
    tunesmith.train(config, resume=True, console=console)
    assert "damaged checkpoint passed over" in console.file.getvalue() and "from step 6 of 12" in console.file.getvalue()
    same(path, unbroken)


def test_the_day_a_template_prints_is_the_runs_first(tiny, tmp_path, stopped, monkeypatch):
    """A run that goes over midnight trains on one date, and is asked with it."""
    words = tiny.checkpoint(tmp_path / "base")
    settings = json.loads((words / "tokenizer_config.json").read_text())
    dated = "{{ strftime_now('%d %b %Y') }}" + settings["chat_template"]
    (words / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": dated}))
    config, path = stopped(model=str(words))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"date": "2024-07-26"}))
    with pytest.raises(RunError, match="training data"):  # of another day: other ids than those it was begun with
        tunesmith.train(config, resume=True, console=quiet())
    (path / "manifest.json").write_text(json.dumps(manifest))

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.fromisoformat(manifest["date"]) + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    run = tunesmith.train(config, resume=True, console=quiet())
    assert run.status().state == "finished" and run.manifest["date"] == manifest["date"]
    assert Talker.open(path).renderer.date == manifest["date"]


def test_only_damaged_checkpoints_are_refused(stopped):
    config, path = stopped()
    for file in (path / "checkpoints").glob("*/tensors.safetensors"):
        file.write_bytes(b"no")
    assert "step-00000006" in refused(config, "no checkpoint is whole", path)
    assert Run.open(path).status().state == "interrupted"


def test_stopped_in_the_middle_of_an_evaluation_it_is_read_again(tiny, tmp_path, unbroken, monkeypatch):
    """The step is saved, the evaluation is not recorded, and after the resume it is there once."""
    plain, calls = tuning.heldout.losses, []

    def losses(*args, check, **how):
        calls.append(1)
        if len(calls) == 3:  # before, after step 4, after step 8
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, check=check, **how)

    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(tuning.heldout, "losses", losses)
        with pytest.raises(Interrupted, match="after step 8"):
            tunesmith.train(config, console=quiet())
    assert list(recorded(tmp_path / "run", "eval")) == [0, 4]
    console = quiet()
    tunesmith.train(config, resume=True, console=console)
    assert "from step 8 of 12" in console.file.getvalue()
    same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("call", [1, 5])
def test_stopped_before_the_first_step_or_after_the_last(tiny, tmp_path, unbroken, monkeypatch, call):
    plain, calls = tuning.heldout.answers, []

    def answers(*args, **how):
        calls.append(1)
        if len(calls) == call:  # 1: the untuned model's; 2 to 4: samples; 5: the tuned model's
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **how)

    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(tuning.heldout, "answers", answers)
        with pytest.raises(Interrupted, match="before a step was taken" if call == 1 else "after the last step"):
            tunesmith.train(config, console=quiet())
    assert Run.open(tmp_path / "run").status().state == "interrupted"
    tunesmith.train(config, resume=True, console=quiet())
    same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("damage", [{"before.json": None, "losses_before.json": None}, {"before.json": "{"},
                                    {"before.json": "[1]"}, {"losses_before.json": '{"total": [1.0], "trained": [1]}'},
                                    {"losses_before.json": "[]"}], ids=str)  # fmt: skip
def test_before_is_the_untuned_model_even_when_its_files_were_lost(stopped, unbroken, damage):
    config, path = stopped()
    for name, text in damage.items():
        (path / name).unlink() if text is None else (path / name).write_text(text)
    tunesmith.train(config, resume=True, console=quiet())
    same(path, unbroken)


def test_lost_best_weights_are_told_and_looked_for_again(stopped):
    config, path = stopped(after=7, eval={"every_steps": 3})
    best = max((path / "best").iterdir())
    assert best.name == "step-00000006"
    (best / "tensors.safetensors").write_bytes(b"no")
    console = quiet()
    run = tunesmith.train(config, resume=True, console=console)
    events = [r["what"] for r in run.metrics() if r["kind"] == "event"]
    assert any("best weights so far are lost" in e for e in events) and run.manifest["best_step"] > 7


def test_an_early_stop_is_remembered(tiny, tmp_path, monkeypatch):
    """Stopped between the last checkpoint of an early stop and the result: the resume writes the result and takes no step."""
    losses, plain = iter([5.0, 4.0, 4.5, 4.6]), tuning.heldout.losses

    def worse(*args, **how):
        found = plain(*args, **how)
        return tuning.Losses(found.trained * next(losses), found.trained)

    config = tiny.config(tmp_path / "run", eval={"every_steps": 2, "early_stop": 2}, checkpoint={"every_steps": 2})
    monkeypatch.setattr(tuning.heldout, "losses", worse)
    with monkeypatch.context() as patch:
        patch.setattr(tuning._Session, "_finish", lambda self, state: os.kill(os.getpid(), signal.SIGTERM) or self._check())
        with pytest.raises(Interrupted):
            tunesmith.train(config, console=quiet())
    monkeypatch.setattr(tuning.heldout, "losses", plain)
    run = tunesmith.train(config, resume=True, console=quiet())
    assert list(recorded(run.path)) == [1, 2, 3, 4, 5, 6] and run.manifest["weights_of_step"] == 2
    assert run.status().state == "finished" and run.status().step == 6
