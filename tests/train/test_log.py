"""Rows, trackers and the display: everything reaches metrics.jsonl, and no reader of ours can stop the loop."""

import fcntl
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import types
from contextlib import suppress

import pytest

from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError, MissingExtra
from tunesmith.run import Run
from tunesmith.train import log
from tunesmith.train.log import TRACKERS, Log, Progress, Unstalled


@pytest.fixture
def run(tmp_path):
    config = RunConfig.model_validate({"model": "owner/name", "data": "x.jsonl", "method": "lora", "output": str(tmp_path / "run")})
    run = Run.create(tmp_path / "run", config, command=["tunesmith", "train"])
    with run.lock():
        yield run


class Fake:
    """What every tracker must offer."""

    def __init__(self, folder, start):
        self.folder, self.start, self.calls = folder, start, []

    def scalars(self, step, values):
        self.calls.append((step, dict(values)))

    def text(self, step, name, text):
        self.calls.append((step, name, text))

    def close(self):
        self.calls.append("closed")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(TRACKERS.table, "fake", Fake)


def test_rows_reach_the_file_and_the_trackers(run, fake):
    with Log(run, ["fake"], steps=2, start=0) as log:
        log.step(1, loss=2.5, lr=1e-4, trained=17)
        log.eval(1, loss=2.25)
        log.event("note", text="with hf_" + "a" * 30)
        log.step(2, loss=float("nan"), grad_norm=float("inf"))
        log.sample(2, prompt="a", answer="b\ud800\n")
    assert run.metrics()[:3] == [
        {"kind": "step", "step": 1, "loss": 2.5, "lr": 1e-4, "trained": 17},
        {"kind": "eval", "step": 1, "loss": 2.25},
        {"kind": "event", "step": 1, "what": "note", "text": "with [redacted]"},
    ]
    last = run.metrics()[3]
    assert math.isnan(last["loss"]) and last["grad_norm"] == math.inf
    raw = (run.path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(raw[3], parse_constant=pytest.fail) == {"kind": "step", "step": 2, "loss": "nan", "grad_norm": "inf"}
    assert run.samples() == [{"step": 2, "prompt": "a", "answer": "b\ud800\n"}]
    (tracker,) = log.trackers
    assert tracker.calls[:3] == [
        (1, {"train/loss": 2.5, "train/lr": 1e-4, "train/trained": 17.0}),
        (1, {"eval/loss": 2.25}),
        (1, "event", "note"),
    ]
    assert tracker.calls[-1] == "closed" and tracker.folder == run.path / "trackers/fake" and tracker.start == 0


def test_losses_are_kept_to_the_bit(run):
    values = [0.1, 1 / 3, 5e-324, 2.0**-149, 1.7976931348623157e308, -0.0]
    with Log(run) as log:
        for i, v in enumerate(values):
            log.step(i, loss=v)
    assert [r["loss"].hex() for r in run.metrics()] == [v.hex() for v in values]


def test_status_follows_at_most_once_a_second(run, monkeypatch):
    now, writes = [100.0], []
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "set_status", lambda state, **kw: writes.append((state, kw["step"], kw["steps"])))
    with Log(run, steps=100) as it:
        for step in range(1, 31):
            it.step(step, loss=1.0)
            now[0] += 0.25
    assert writes == [("running", step, 100) for step in range(1, 31, 4)]


def test_an_unknown_tracker_is_refused_with_the_near_name(run):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        Log(run, ["tensorbord"])


def test_tensorboard_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"tensorboard is not installed\nfix: .*\[tensorboard\]"):
        Log(run, ["tensorboard"])


def test_tensorboard_gets_what_its_writer_expects(run, monkeypatch):
    calls = []

    class SummaryWriter:
        """The four calls with the parameter names of torch.utils.tensorboard.SummaryWriter."""

        def __init__(self, log_dir=None, comment="", purge_step=None):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, tag, scalar_value, global_step=None):
            calls.append((tag, scalar_value, global_step))

        def add_text(self, tag, text_string, global_step=None):
            calls.append((tag, text_string, global_step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with Log(run, ["tensorboard"], start=5) as it:
        it.step(6, loss=1.5)
        it.event("resumed")
    folder = str(run.path / "trackers/tensorboard")
    assert calls == [("open", folder, 6), ("train/loss", 1.5, 6), ("event", "resumed", 6), "close"]


def test_every_tracker_has_the_face():
    for name in ("tensorboard",):
        assert all(callable(getattr(TRACKERS[name], method)) for method in ("scalars", "text", "close"))


# ---- the display ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hang():
    """Whatever takes over 20 seconds here hangs: the alarm ends it with an error."""

    def fail(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def flood(progress, n=2000):
    with progress:
        for step in range(1, n + 1):
            progress.update(step, loss=1.0, lr=1e-4, tokens_per_s=1000)
            progress.say("x" * 300)


@pytest.mark.parametrize("own", [True, False])
def test_a_pipe_that_nobody_reads_does_not_stop_the_loop(no_hang, monkeypatch, own):
    if not own:  # where a descriptor cannot be opened again (macOS): poll
        monkeypatch.setattr(Unstalled, "_open_own", lambda self: None)
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        progress = Progress(2000, file=file)
        assert progress.file.own is own
        flood(progress)
        assert progress.file.dropped > 300_000
        assert not fcntl.fcntl(write, fcntl.F_GETFL) & os.O_NONBLOCK, "the shared descriptor is as it was"
        fcntl.fcntl(read, fcntl.F_SETFL, os.O_NONBLOCK)
        assert os.read(read, 1 << 20).startswith(b"step 1/2000  loss 1  lr 0.0001  tokens/s 1000")
        progress = Progress(2, file=file)  # and when somebody reads again
        progress.say("first")
        os.read(read, 1 << 20)
        while progress.file.dropped == 0:
            progress.say("y" * 500)
        os.read(read, 1 << 20)
        progress.say("last")
        assert os.read(read, 1 << 20).endswith(b"last\n")
        progress.file.close()
    os.close(read)


def test_a_terminal_that_nobody_reads_does_not_stop_the_loop(no_hang, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as file:
        progress = Progress(500, file=file)
        assert progress._bar is not None
        flood(progress, 500)
        assert progress.file.dropped > 100_000
    os.close(master)


def test_a_terminal_gets_a_bar(no_hang, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as file, Progress(3, file=file) as progress:
        for step in (1, 2, 3):
            progress.update(step, loss=1.25, lr=1e-4)
    shown = ""
    with suppress(OSError):  # EIO: all is read and the terminal is gone
        while piece := os.read(master, 1 << 16):  # a terminal gives what it has, not all that was written
            shown += piece.decode()
    os.close(master)
    assert "training" in shown and "3/3" in shown and "loss 1.25" in shown


@pytest.mark.parametrize("how", ["the reader left", "closed", "descriptor closed", "none"])
def test_nobody_to_write_to(no_hang, how):
    if how == "none":
        flood(Progress(2000, file=Unstalled(None)))
        return
    read, write = os.pipe()
    file = os.fdopen(write, "w")
    progress = Progress(2000, file=file)
    if how == "the reader left":
        os.close(read)
    elif how == "closed":
        file.close()
        progress = Progress(2000, file=file)
    else:
        os.close(write)
        progress = Progress(2000, file=file)
    flood(progress)
    assert progress.file.dropped > 0
    if how == "descriptor closed":
        with pytest.raises(OSError):
            file.close()
    else:
        file.close()


def test_a_file_gets_few_lines_and_all_of_what_is_said(tmp_path):
    path = tmp_path / "out.txt"
    with path.open("w") as file:
        print("before", file=file)  # still in Python's buffer
        progress = Progress(500, file=file)
        for step in range(1, 501):
            progress.update(step, loss=2.0)
        progress.say("done")
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "done"
    assert len([x for x in lines if x.startswith("step ")]) <= 10
    assert [x for x in lines if x.startswith("step 500/500")]


def test_lines_come_as_time_passes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(100, start=50, file=out, every=10) as progress:
        for step in range(51, 101):
            now[0] += 4
            progress.update(step, loss=1.0)
    shown = [line.split()[1] for line in out.getvalue().splitlines()]
    assert shown == ["51/100", *[f"{s}/100" for s in range(54, 100, 3)], "100/100"]
    assert "left 3:16" in out.getvalue().splitlines()[0]  # 49 steps of 4 s


def test_a_process_whose_output_stalls_ends_by_itself(no_hang):
    """The child's pipe is never read; an exit that flushed a full buffer would hang."""
    script = """
from tunesmith.train.log import Progress
with Progress(5000) as progress:
    for step in range(1, 5001):
        progress.update(step, loss=1.0)
        progress.say("x" * 200)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.wait() == 0
    child.stdout.close()


def test_tensorboards_own_reader_finds_every_number_once(run):
    """The real writer, where the extra is installed: what a resumed run goes over again is there once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, range(1, 6)), (3, range(4, 8))):
        with Log(run, ["tensorboard"], start=start) as it:
            for step in steps:
                it.step(step, loss=step / 4 + start)
            it.event("note")
    found = reader.EventAccumulator(str(run.path / "trackers/tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        *((step, step / 4) for step in (1, 2, 3)), *((step, step / 4 + 3) for step in (4, 5, 6, 7))
    ]  # fmt: skip
