"""The run folder: one writer, a status that does not lie, rows that are whole, resumption only of what is the same."""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tunesmith import run as module
from tunesmith.config.schema import RunConfig
from tunesmith.errors import RunError, TunesmithError
from tunesmith.run import Run, base_fingerprint, config_sha256


def make_config(output, **changes):
    return RunConfig.model_validate(
        {"model": "owner/name", "data": "chats.jsonl", "method": "lora", "output": str(output), **changes}
    )


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", make_config(tmp_path / "run"), command=["tunesmith", "train", "run.yaml"])


# ---- made and opened -----------------------------------------------------------------------------------------------------------


def test_what_create_writes(run):
    assert sorted(p.name for p in run.path.iterdir()) == ["lock", "manifest.json", "run.yaml", "status.json"]
    again = Run.open(run.path)
    assert again.config == make_config(run.path)
    manifest = again.manifest
    assert manifest["command"] == ["tunesmith", "train", "run.yaml"] and manifest["seed"] == 0
    assert manifest["versions"]["python"] == platform.python_version() and manifest["versions"]["torch"]
    assert manifest["config_sha256"] == config_sha256(again.config)
    run.record(data="d" * 64, base="b" * 64, template_sha256="t" * 64, finished="later")
    assert again.manifest["data"] == "d" * 64 and again.manifest["seed"] == 0


def test_run_yaml_gives_every_value_back(tmp_path):
    config = make_config(
        tmp_path / "r", seed=7, train={"learning_rate": 1e-05, "betas": (0.9, 0.95), "epochs": 1.0},
        lora={"rank_pattern": {"q_proj": 4}, "targets": ("q_proj", "no"), "new_tokens": ("<a>", "é\u2028", "#x: y")},
    )  # fmt: skip
    assert Run.create(tmp_path / "r", config, command=[]).config == config


def test_create_refuses_what_is_not_its_own(run, tmp_path):
    with pytest.raises(RunError, match="holds a run already") as e:
        Run.create(run.path, run.config, command=[])
    assert "--resume" in e.value.fix and "output" in e.value.fix
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(RunError, match=r"not empty and not a run folder \(it holds cat.jpg\)"):
        Run.create(tmp_path / "photos", run.config, command=[])
    assert not (tmp_path / "photos/run.yaml").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        Run.create(tmp_path / "file", run.config, command=[])
    for path, what in ((tmp_path / "photos", "not a run folder"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(RunError, match=what):
            Run.open(path)


def test_create_says_of_a_killed_run_that_it_was_killed(run):
    with run.lock():
        run.set_status("running", step=37, steps=120)
        run.append("metrics", {"kind": "step", "step": 37})
        with pytest.raises(RunError, match="another process is writing this run"):
            Run.create(run.path, run.config, command=[])
    with pytest.raises(RunError, match="holds a run already, which was killed after step 37\nfix: go on with --resume, or choose"):
        Run.create(run.path, run.config, command=[])


def test_create_begins_again_what_was_stopped_before_its_first_step(run):
    with run.lock():
        run.set_status("interrupted", message="stopped")
    again = Run.create(run.path, run.config, command=["again"])
    assert again.manifest["command"] == ["again"]


def test_an_output_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    config = make_config(tmp_path / "run")
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match=f"x: {tmp_path}/runs is a file"):
        Run.create(tmp_path / "runs" / "x", config, command=[])

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(TunesmithError, match="run: cannot be made: Permission denied"):
        patch.setattr(os, "mkdir", denied)
        Run.create(tmp_path / "run", config, command=[])
    made = Run.create(tmp_path / "run", config, command=[])
    with monkeypatch.context() as patch, pytest.raises(RunError, match="run: cannot be written: Permission denied"):
        patch.setattr(os, "open", denied)
        made.lock().__enter__()


def test_a_slip_in_a_runs_name_is_answered_with_the_runs_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no such folder\nfix: name the `output` folder"):
        Run.open("runs/frist")
    for name in ("first", "second"):
        Run.create(f"runs/{name}", make_config(f"runs/{name}"), command=[])
    for name, order in (("runs/frist", "runs/first, runs/second"), ("secnd", "runs/second, runs/first")):
        with pytest.raises(RunError, match=f"no such folder\nfix: run folders here: {order}"):
            Run.open(name)


def test_create_takes_an_empty_folder_and_a_half_made_one(run, tmp_path):
    (tmp_path / "empty").mkdir()
    config = run.config
    Run.create(tmp_path / "empty", config, command=[])
    (run.path / "run.yaml").unlink()  # the last file `create` writes
    (run.path / ".run.yaml.tmp-1-0123abcd").touch()
    Run.create(run.path, config, command=[])
    assert sorted(p.name for p in run.path.iterdir()) == ["lock", "manifest.json", "run.yaml", "status.json"]


def test_damaged_files_are_named(run):
    (run.path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        _ = run.manifest
    (run.path / "run.yaml").write_text("model: [")
    with pytest.raises(RunError, match=r"run\.yaml: damaged"):
        _ = run.config


def test_no_secret_reaches_the_folder(tmp_path, monkeypatch):
    secrets = ["hf_" + "Ab1" * 11, "pw-in-the-url", "tok-after-an-option", "env-value-123456"]
    monkeypatch.setenv("SOME_API_KEY", secrets[3])
    config = make_config(tmp_path / "r", data=f"https://me:{secrets[1]}@host/x.jsonl", model=f"owner/{secrets[0]}")
    run = Run.create(tmp_path / "r", config, command=["tunesmith", "train", "--token", secrets[2], f"model={secrets[0]}"])
    with run.lock():
        run.set_status("failed", message=f"401 for {secrets[0]}")
        run.record(note=[f"key {secrets[3]}"])
        run.write_card(base=f"owner/{secrets[0]}", rows={"used": 1}, licence={"license": secrets[3]})
    written = "\n".join(p.read_text() for p in run.path.iterdir())
    assert [s for s in secrets if s in written] == [] and written.count("[redacted]") >= 6
    assert run.changed_since(config) == []


# ---- one writer ----------------------------------------------------------------------------------------------------------------


def child(body):
    """Run `body()` in a forked process; its exit code is what body returns."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = body()
        finally:
            os._exit(code)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class LikeMsvcrt:
    """msvcrt.locking by its documentation (bytes from the current position, EACCES when another has them), over those locks of
    Linux that belong to an open file, as Windows' do. What it cannot show: Windows also refuses to read locked bytes.
    """

    LK_NBLCK, LK_UNLCK = 2, 0

    @staticmethod
    def locking(fd, mode, nbytes):
        kind = fcntl.F_WRLCK if mode else fcntl.F_UNLCK
        try:
            fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", kind, os.SEEK_CUR, 0, nbytes, 0))  # F_OFD_SETLK
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


@pytest.fixture(params=["flock", "msvcrt", "existence"])
def locking(request, monkeypatch):
    """The three ways to lock: Unix, Windows, and a file with a pid where there is neither."""
    if request.param == "msvcrt" and sys.platform != "linux":
        pytest.skip("the stand-in needs Linux")
    if request.param != "flock":
        monkeypatch.setattr(module, "fcntl", None)
        monkeypatch.setattr(module, "msvcrt", LikeMsvcrt if request.param == "msvcrt" else None)
    return request.param


def try_lock(path):
    try:
        with Run.open(path).lock():
            return 0
    except RunError as e:
        return 3 if f"pid {os.getppid()}" in e.what and "since 20" in e.what else 4


def test_a_second_writer_is_refused_with_pid_and_time(run, locking):
    with run.lock():
        assert ended(child(lambda: try_lock(run.path))) == 3
        with pytest.raises(RunError, match=f"pid {os.getpid()}"), Run.open(run.path).lock():  # a second one in this process too
            pass
        assert ended(child(lambda: try_lock(run.path))) == 3
    assert ended(child(lambda: try_lock(run.path))) == 0
    with run.lock():
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_that_start_at_once_exactly_one_wins(run, locking, stale):
    dead = child(lambda: 0)
    ended(dead)
    for _ in range(10):
        if stale:
            for name in ("lock", "lock.pid"):
                (run.path / name).write_text(json.dumps({"pid": dead, "since": "2020"}))
        (start_r, start_w), (end_r, end_w), (said_r, said_w) = os.pipe(), os.pipe(), os.pipe()

        def contend(start=start_r, end=end_r, said=said_w, writers=(start_w, end_w)):
            for fd in writers:
                os.close(fd)
            os.read(start, 1)  # until the parent closes its end
            try:
                with Run.open(run.path).lock():
                    os.write(said, b"won")
                    os.read(end, 1)  # holds it until the other has had its answer
                return 0
            except RunError:
                os.write(said, b"not")
                return 3

        pair = [child(contend), child(contend)]
        os.close(start_w)
        answers = os.read(said_r, 3) + os.read(said_r, 3)
        os.close(end_w)
        assert sorted([answers[:3], answers[3:]]) == [b"not", b"won"] and sorted(ended(p) for p in pair) == [0, 3]
        for fd in (start_r, end_r, said_r, said_w):
            os.close(fd)


def test_the_lock_of_a_dead_process_is_reclaimed_and_its_status_told(run, locking):
    ready_r, ready_w = os.pipe()

    def work():
        with run.lock():
            run.set_status("running", step=37, steps=120)
            os.write(ready_w, b"x")
            time.sleep(600)
        return 0

    pid = child(work)
    os.read(ready_r, 1)
    assert Run.open(run.path).status() == run.status()
    assert (run.status().state, run.status().step, run.status().pid) == ("running", 37, pid)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    status = run.status()
    assert (
        status.state == "stopped"
        and status.message == "stopped unexpectedly at step 37 of 120; --resume goes on"
        and status.pid == pid
    )
    with run.lock():
        run.set_status("running", step=38, steps=120)
        assert run.status().state == "running"
        run.set_status("interrupted", message="on request")  # keeps the numbers
    assert (run.status().state, run.status().step, run.status().steps) == ("interrupted", 38, 120)


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(run):
    """A forked data worker inherits descriptors; with flock that would keep the dead run locked."""
    ready_r, ready_w = os.pipe()

    def parent():
        with run.lock():
            worker = child(lambda: time.sleep(600) or 0)
            os.write(ready_w, str(worker).encode())
            time.sleep(600)
        return 0

    pid = child(parent)
    worker = int(os.read(ready_r, 20))
    time.sleep(0.05)  # the worker's first act is to close the lock
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    try:
        os.kill(worker, 0)  # it lives
        with run.lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_asking_for_the_status_does_not_get_in_a_writers_way(run):
    def ask():
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            run.status()
        return 0

    pids = [child(ask), child(ask)]
    for _ in range(100):
        with Run.open(run.path).lock():
            pass
    assert [ended(p) for p in pids] == [0, 0]


def test_a_reader_that_asks_just_now_is_waited_for(run, monkeypatch):
    answers, real = [False] * (module.TRIES - 1), module._try_lock
    monkeypatch.setattr(module, "_try_lock", lambda fd: answers.pop() if answers else real(fd))
    with run.lock():
        assert not answers


def test_a_lock_that_changed_hands_since_it_looked_stale_is_put_back(run, monkeypatch):
    """Without system locks: we read a dead pid, another process reclaims the file first, we rename its new one away: and back."""
    monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(module, "msvcrt", None)
    holder = child(lambda: time.sleep(600) or 0)
    marker = run.path / "lock.pid"
    marker.write_text(json.dumps({"pid": holder, "since": "2020"}))
    real = module._holder
    monkeypatch.setattr(
        module, "_holder", lambda p, first=[1]: {"pid": 2**22 + 1} if p == marker and first and first.pop() else real(p)
    )
    try:
        with pytest.raises(RunError, match=f"pid {holder}"), run.lock():
            pass
        assert real(marker)["pid"] == holder and not [p for p in run.path.iterdir() if p.name.startswith("lock.") and p != marker]
    finally:
        os.kill(holder, signal.SIGKILL)
        ended(holder)


def test_a_file_system_without_flock(run, tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX = LOCK_NB = LOCK_UN = 0

        @staticmethod
        def flock(fd, how):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module, "fcntl", NoLocks)
    with run.lock():
        assert ended(child(lambda: try_lock(run.path))) == 3
        run.set_status("running", step=1, steps=2)
        assert Run.open(run.path).status().state == "running"
    assert run.status().state == "stopped"
    assert Run.create(tmp_path / "new", run.config, command=[]).config == run.config
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["lock", "manifest.json", "run.yaml", "status.json"]


def test_status_survives_damage(run):
    for raw in ("", "{", "[]", '{"state": "running", "other": 1}'):
        (run.path / "status.json").write_text(raw)
        assert run.status().state == "stopped"


@pytest.mark.parametrize("clock", [-86_400, 315_360_000, 0.0])
def test_the_clock_decides_nothing(run, monkeypatch, clock):
    with run.lock():
        run.set_status("running", step=1, steps=9)
        run.append("metrics", {"kind": "step", "step": 1})
        monkeypatch.setattr(time, "time", lambda: clock)
        run.set_status("running", step=2, steps=9)
        run.append("metrics", {"kind": "step", "step": 2})
        run.rewind(1)
        assert run.status().step == 2 and [r["step"] for r in run.metrics()] == [1]


# ---- rows ----------------------------------------------------------------------------------------------------------------------

ROWS = [{"kind": "step", "step": s, "loss": 1 / s} for s in range(1, 6)]


def test_a_line_torn_anywhere_costs_that_line_only(run):
    with run.lock():
        for row in ROWS:
            run.append("metrics", row)
    path = run.path / "metrics.jsonl"
    raw = path.read_bytes()
    start = raw[:-1].rfind(b"\n") + 1
    for cut in range(start, len(raw)):
        for tail in (b"", b"\0" * 5):  # some file systems fill what was not written with zeros
            path.write_bytes(raw[:cut] + tail)
            assert run.metrics() == ROWS[:4]
    path.write_bytes(raw[: start + 9])
    with run.lock():  # the next writer cuts it off, so that its own rows are whole
        run.append("metrics", ROWS[4])
    assert path.read_bytes() == raw


def test_a_damaged_line_in_the_middle_is_named(run):
    for damaged in ('{"st', "[1]", "3"):
        (run.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        with pytest.raises(RunError, match=r"metrics.jsonl:2: damaged line"):
            run.metrics()


def test_rewinding_leaves_every_step_once(run):
    with run.lock():
        for row in ROWS:
            run.append("metrics", row)
            run.append("samples", {"step": row["step"], "answer": "é"})
        assert run.rewind(3) == 4
        for row in ROWS[3:]:
            run.append("metrics", row)
        assert run.rewind(4) == 1 and run.rewind(4) == 0
    assert run.metrics() == ROWS[:4] and [r["step"] for r in run.samples()] == [1, 2, 3]
    aside = [json.loads(x) for x in (run.path / "metrics.superseded.jsonl").read_text().splitlines()]
    assert aside == [ROWS[3], ROWS[4], ROWS[4]]


def test_rows_of_any_kind_of_number(run):
    with run.lock():
        run.append(
            "metrics", {"step": np.int64(3), "loss": np.float32(0.5), "list": (math.inf, np.float64(-math.inf)), "path": run.path}
        )
        run.sync()
    assert run.metrics() == [{"step": 3, "loss": 0.5, "list": ["inf", "-inf"], "path": str(run.path)}]
    assert Run.open(run.path).samples() == []


# ---- resuming ------------------------------------------------------------------------------------------------------------------


def test_what_changed_is_told_key_by_key(run):
    run.record(data="d" * 64, base="b" * 64)
    assert run.changed_since(run.config, "d" * 64, "b" * 64) == []
    changed = make_config(run.path, method="qlora", seed=1, train={"learning_rate": 0.01}, lora={"rank": 8, "targets": ["q_proj"]})
    assert run.changed_since(changed, "e" * 64, "c" * 64) == [
        "lora.rank: 16 -> 8",
        'lora.targets: "all-linear" -> ["q_proj"]',
        'method: "lora" -> "qlora"',
        "seed: 0 -> 1",
        'train.learning_rate: "auto" -> 0.01',
        "the training data: the files changed (fingerprint dddddddddddd -> eeeeeeeeeeee)",
        "the base model: the files changed (fingerprint bbbbbbbbbbbb -> cccccccccccc)",
    ]
    with pytest.raises(RunError, match="cannot be resumed") as e:
        run.refuse_if_changed(changed)
    assert "lora.rank: 16 -> 8" in e.value.what and "another `output`" in e.value.fix


def test_harmless_keys_may_change(run, tmp_path):
    changed = make_config(
        tmp_path / "elsewhere", log={"every_steps": 5}, eval={"samples": 0, "sample_tokens": 9}, checkpoint={"keep": 5},
    )  # fmt: skip
    assert run.changed_since(changed) == []
    run.refuse_if_changed(changed, "first", "first")  # nothing recorded yet: nothing to compare


def test_every_other_key_is_watched(run):
    """A ratchet: a new key of the schema refuses resumption until someone says here that it reaches no weight."""
    harmless = {k for k in module._flat(run.config.model_dump(mode="json")) if k.startswith(module.HARMLESS)}
    assert harmless == {
        "output", "log.every_steps", "log.trackers", "checkpoint.every_steps", "checkpoint.keep",
        "eval.samples", "eval.sample_tokens", "data.workers", "data.max_refused",
    }  # fmt: skip


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    g = np.random.default_rng(0)
    for i in (1, 2):
        save_file({f"w{i}": g.standard_normal((600, 500)).astype(np.float32)}, folder / f"model-{i}.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_base_is_known_by_its_files(base, tmp_path):
    was = base_fingerprint(base)
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "README.md").write_text("other")
    assert base_fingerprint(copy) == was  # neither place, nor times, nor a card

    def changed(change):
        folder = tmp_path / "x"
        shutil.copytree(base, folder)
        change(folder)
        now = base_fingerprint(folder)
        shutil.rmtree(folder)
        return now != was

    assert changed(lambda f: (f / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}'))
    assert changed(lambda f: (f / "tokenizer.json").write_text('{"a": 1}'))
    assert changed(lambda f: (f / "model-2.safetensors").unlink())
    assert changed(lambda f: (f / "model-2.safetensors").rename(f / "model-3.safetensors"))
    g = np.random.default_rng(1)
    same_header = {"w1": g.standard_normal((600, 500)).astype(np.float32)}
    assert changed(lambda f: save_file(same_header, f / "model-1.safetensors"))  # another tune: same names, shapes and sizes


def test_a_dead_link_among_the_weights_is_for_the_loader_to_tell(base):
    """A hub cache that was cleaned leaves them."""
    was = base_fingerprint(base)
    (base / "model-4.safetensors").symlink_to(base / "gone")
    (base / "model-5.safetensors").mkdir()
    assert base_fingerprint(base) == was


def test_a_lock_that_cannot_be_written_is_said(run):
    (run.path / "lock").unlink(missing_ok=True)
    (run.path / "lock").mkdir()
    with pytest.raises(RunError, match="cannot be written"), run.lock():
        pass


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes read through /proc")
def test_fingerprint_reads_little_of_a_large_file(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 34], "data_offsets": [0, 1 << 34]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:  # 16 GiB, sparse
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + (1 << 34))

    def read_so_far():
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = read_so_far()
    base_fingerprint(tmp_path)
    assert read_so_far() - before < 3 << 20


# ---- the card ------------------------------------------------------------------------------------------------------------------


def front_matter(path):
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card(run):
    run.record(data="d" * 64, base="b" * 64)
    path = run.write_card(
        base="owner/name@abc",
        rows={"used": 1234, "refused": 5},
        losses={"held-out loss": (2.345678, 1.2)},
        licence={"license": "apache-2.0"},
        steps=77,
    )
    front, body = front_matter(path)
    assert front == {"library_name": "peft", "base_model": "owner/name", "license": "apache-2.0", "tags": ["tunesmith", "lora"]}
    for text in ("1,234 used, 5 refused", "d" * 64, "b" * 64, "| held-out loss | 2.3457 | 1.2000 |", "PeftModel.from_pretrained",
                 "tunesmith chat run", "| Steps | 77 |", "| Licence | apache-2.0 |"):  # fmt: skip
        assert text in body, text


def test_a_card_for_a_local_base_tells_no_path_and_invents_no_licence(tmp_path):
    (tmp_path / "mine").mkdir()
    run = Run.create(tmp_path / "r", make_config(tmp_path / "r", method="full"), command=[])
    front, body = front_matter(run.write_card(base=str(tmp_path / "mine"), rows={"used": 1}))
    assert front == {"library_name": "transformers", "tags": ["tunesmith", "full"]}
    assert (
        "**mine**" in body
        and str(tmp_path) not in body
        and "unknown: the licence of the base model" in body
        and "PeftModel" not in body
    )


def test_no_torch_is_reached():
    code = "import sys, tunesmith.run, tunesmith.files, tunesmith.redact; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
