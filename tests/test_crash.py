"""A disk that fails: crash at every file operation, with and without what was not synced; an error at every operation; a full disk.

`Disk` stands in for `os` inside tunesmith.files. It does each operation for real and keeps, beside it, a small model of the disk:
what every file and folder holds, and what of that an fsync made durable. After each operation the model is photographed; each
photograph is then developed into the states a power failure could leave (each folder's entries old or new, unsynced data kept, lost
or torn), and what the program finds there must be the old content or the new.
"""

import copy
import errno
import itertools
import os
import resource
from pathlib import Path

import pytest
import torch

from tunesmith import files
from tunesmith.config.schema import RunConfig
from tunesmith.errors import DoesNotFit, TunesmithError
from tunesmith.run import Run
from tunesmith.train import checkpoint


class File:
    def __init__(self, data=b""):
        self.data, self.durable = data, data


class Folder:
    def __init__(self):
        self.entries, self.durable = {}, {}


class Disk:
    """`os`, with a memory. `fail_at` and `error`: raise at that operation instead of doing it, once."""

    def __init__(self, root: Path, fail_at: int = -1, error: int = 0, half: bool = False):
        self.root, self.top, self.fds, self.photographs, self.count = root, self._scan(root), {}, [], 0
        self.fail_at, self.error, self.half, self.log = fail_at, error, half, []
        self.photographs.append(copy.deepcopy(self.top))

    def __getattr__(self, name):
        return getattr(os, name)

    def _scan(self, path):
        if path.is_file():
            return File(path.read_bytes())
        folder = Folder()
        folder.entries = {p.name: self._scan(p) for p in path.iterdir()}
        folder.durable = dict(folder.entries)
        return folder

    def _at(self, path):
        """Folder and name of a path in the model; None outside of it."""
        if not Path(path).is_relative_to(self.root):
            return None
        *parents, name = Path(path).relative_to(self.root).parts or ("",)
        node = self.top
        for part in parents:
            node = node.entries[part]
        return node, name

    def _node(self, path):
        folder, name = self._at(path)
        return folder.entries[name] if name else folder

    def _do(self, what, call):
        self.count += 1
        self.log.append(what)
        if self.count - 1 == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))
        return call()

    def _click(self):
        self.photographs.append(copy.deepcopy(self.top))

    def open(self, path, flags, mode=0o777):
        fd = self._do("open", lambda: os.open(path, flags, mode))
        if (place := self._at(path)) is not None:
            folder, name = place
            if flags & os.O_CREAT and name not in folder.entries:
                folder.entries[name] = File()
                folder.entries[name].durable = None  # after a power failure: empty, if it is there at all
                self._click()
            self.fds[fd] = folder.entries[name] if name else folder
        return fd

    def close(self, fd):
        self.fds.pop(fd, None)
        os.close(fd)

    def write(self, fd, data):
        if self.half:  # the error comes after half of it was written
            piece = bytes(data)[: len(data) // 2]
            if self.count == self.fail_at and piece:
                os.write(fd, piece)
                self.fds[fd].data += piece
        written = self._do("write", lambda: os.write(fd, data))
        node, raw = self.fds[fd], bytes(data)[:written]
        node.data += raw[: len(raw) // 2]
        self._click()
        node.data += raw[len(raw) // 2 :]
        self._click()
        return written

    def ftruncate(self, fd, size):
        self._do("ftruncate", lambda: os.ftruncate(fd, size))
        self.fds[fd].data = self.fds[fd].data[:size]
        self._click()

    def fsync(self, fd):
        self._do("fsync", lambda: None)
        node = self.fds[fd]
        if isinstance(node, File):
            node.durable = node.data
        else:
            node.durable = dict(node.entries)
        self._click()

    def mkdir(self, path, mode=0o777):
        self._do("mkdir", lambda: os.mkdir(path, mode))
        folder, name = self._at(path)
        folder.entries[name] = Folder()
        self._click()

    def rename(self, a, b):
        self._do("rename", lambda: os.rename(a, b))
        (fa, na), (fb, nb) = self._at(a), self._at(b)
        fb.entries[nb] = fa.entries.pop(na)
        self._click()

    def replace(self, a, b):
        self._do("replace", lambda: os.replace(a, b))
        (fa, na), (fb, nb) = self._at(a), self._at(b)
        fb.entries[nb] = fa.entries.pop(na)
        self._click()

    def unlink(self, path):
        self._do("unlink", lambda: os.unlink(path))
        folder, name = self._at(path)
        del folder.entries[name]
        self._click()

    def rmdir(self, path):
        self._do("rmdir", lambda: os.rmdir(path))
        folder, name = self._at(path)
        del folder.entries[name]
        self._click()


def states(top):
    """Every disk a crash here can leave: [(what happened, Folder whose entries and data are to be written out)]."""
    yield "the program died", top, lambda f: f.data
    dirty = [f for f in _folders(top) if f.entries != f.durable]
    policies = {
        "unsynced data survived": lambda f: f.data,
        "unsynced data lost": lambda f: f.durable or b"",
        "unsynced data torn": lambda f: f.data if f.data == f.durable else _torn(f.durable or b"", f.data),
    }
    for kept in itertools.product((True, False), repeat=len(dirty)):
        for name, content in policies.items():
            photo = copy.deepcopy(top)
            for folder, keep in zip([f for f in _folders(photo) if f.entries != f.durable], kept, strict=True):
                if not keep:
                    folder.entries = folder.durable
            yield f"the power failed: {name}, unsynced folders kept: {kept}", photo, content


def _torn(durable, data):
    middle = (len(durable) + len(data)) // 2
    return data[:middle] + b"\0" * (len(data) - middle)


def _folders(node):
    """All folders reachable by current or durable entries, each once, in a fixed order."""
    found, todo = [], [node]
    while todo:
        folder = todo.pop()
        if any(folder is f for f in found):
            continue
        found.append(folder)
        for table in (folder.entries, folder.durable):
            todo += [n for _, n in sorted(table.items()) if isinstance(n, Folder)]
    return found


def develop(folder, content, path):
    path.mkdir(parents=True)
    for name, node in folder.entries.items():
        if isinstance(node, File):
            (path / name).write_bytes(content(node))
        else:
            develop(node, content, path / name)


def photographed(monkeypatch, root, action):
    """Run `action` on `root` over a Disk; the photographs after each operation."""
    disk = Disk(root)
    with monkeypatch.context() as m:
        m.setattr(files, "os", disk)
        action()
    return disk


def every_state(disk, tmp_path):
    """(photograph's number, is it the last, description, folder on the real disk), without repeating equal states."""
    seen, last = set(), len(disk.photographs) - 1
    for i, photo in enumerate(disk.photographs):
        for what, folder, content in states(photo):
            key = (_key(folder, content), i == last)
            if key in seen:
                continue
            seen.add(key)
            path = tmp_path / f"state-{len(seen)}"
            develop(folder, content, path)
            yield i, i == last, f"operation {i} of {last}, {what}", path


def _key(folder, content):
    items = ((n, content(x) if isinstance(x, File) else _key(x, content)) for n, x in folder.entries.items())
    return tuple(sorted(items, key=lambda item: item[0]))


@pytest.fixture
def instant(monkeypatch):
    """No real fsync: the model says what is durable."""
    monkeypatch.setattr(files.os, "fsync", lambda fd: None)


def content_of(n):
    g = torch.Generator().manual_seed(n)
    tensors = {
        "layers.0.lora_A": torch.randn(3, 5, generator=g),
        "opt/exp_avg": torch.randn(7, generator=g).bfloat16(),
        "rng/torch": torch.arange(n, n + 9, dtype=torch.uint8),
    }
    return tensors, {"data": {"position": n * 8}, "rate": 1 / (n + 3), "best": float("inf")}


def save(folder, step, n):
    return checkpoint.save(folder, step, *content_of(n))


def is_content(found, n, step):
    tensors, state = checkpoint.load(found)
    want, want_state = content_of(n)
    same = tensors.keys() == want.keys() and all(
        torch.equal(tensors[k], want[k]) and tensors[k].dtype == want[k].dtype for k in want
    )
    return same and state == {**want_state, "step": step, "format": checkpoint.FORMAT}


def first(folder):
    pass


def second(folder):
    save(folder, 10, 1)


def overwriting(folder):
    save(folder, 10, 1)
    save(folder, 20, 2)


def overwriting_damaged(folder):
    overwriting(folder)
    (folder / "step-00000020/state.json").write_text("{}")


# before: what stands; the save that is interrupted writes content 3 under `step`; `old`: (content, step) that may be found instead
SAVES = {
    "the first one": (first, 10, None),
    "a further one": (second, 20, (1, 10)),
    "in place of one of the same step": (overwriting, 20, (2, 20)),
    "in place of a damaged one": (overwriting_damaged, 20, (1, 10)),
}


@pytest.mark.parametrize("case", SAVES)
def test_a_crash_at_every_operation_of_a_save_leaves_the_old_or_the_new(case, tmp_path, monkeypatch, instant):
    before, step, old = SAVES[case]
    root = tmp_path / "disk"
    root.mkdir()
    before(root / "checkpoints")
    disk = photographed(monkeypatch, root, lambda: save(root / "checkpoints", step, 3))
    assert disk.count >= 20, disk.log  # the shim sees the operations
    olds = news = 0
    for _, last, what, path in every_state(disk, tmp_path):
        found, _ = checkpoint.newest_valid(path / "checkpoints")
        new = found is not None and found.step == step and is_content(found, 3, step)
        assert new or (found is None and old is None) or (found is not None and old is not None and is_content(found, *old)), what
        assert new or not last, f"saved, but gone: {what}"
        olds, news = olds + (not new), news + new
        # and the next save goes through, clears what was left, and wins
        save(path / "checkpoints", step + 10, 4)
        found, problems = checkpoint.newest_valid(path / "checkpoints")
        assert is_content(found, 4, step + 10) and not problems, what
        assert not [p for p in (path / "checkpoints").iterdir() if p.name.startswith(".")], what
    assert olds >= 20 and news >= 1, (olds, news)


def test_a_crash_at_every_operation_of_pruning_leaves_the_newest_two(tmp_path, monkeypatch, instant):
    root = tmp_path / "disk"
    root.mkdir()
    for n in (1, 2, 3, 4):
        save(root / "checkpoints", n * 10, n)
    disk = photographed(monkeypatch, root, lambda: checkpoint.prune(root / "checkpoints", 2))
    for _, last, what, path in every_state(disk, tmp_path):
        found, problems = checkpoint.newest_valid(path / "checkpoints")
        assert is_content(found, 4, 40) and not problems, what
        files.remove_folder(found.path)
        found, problems = checkpoint.newest_valid(path / "checkpoints")
        assert is_content(found, 3, 30) and not problems, what
        files.remove_folder(found.path)
        found, problems = checkpoint.newest_valid(path / "checkpoints")
        assert found is None or is_content(found, found.step // 10, found.step), what
        assert not problems, f"half-removed in the open: {what}"
        assert found is None or not last, what


def test_a_crash_at_every_operation_of_replacing_a_nested_folder(tmp_path, monkeypatch, instant):
    root = tmp_path / "disk"
    root.mkdir()

    def write(n):
        with files.folder_atomic(root / "adapter") as temp:
            (temp / "deep").mkdir()
            for name in ("a.json", "deep/b.json"):
                files.write_file(temp / name, [b"%d" % n * 9], durable=False)  # as any other writer would leave it

    write(1)
    disk = Disk(root)
    monkeypatch.setattr(Path, "mkdir", lambda self, mode=0o777: disk.mkdir(self, mode))  # the body's own call
    with monkeypatch.context() as m:
        m.setattr(files, "os", disk)
        write(2)
    monkeypatch.undo()
    monkeypatch.setattr(files.os, "fsync", lambda fd: None)
    found = set()
    for _, last, what, path in every_state(disk, tmp_path):
        files.settle(path)  # the next writer's first deed
        assert files.verify(path / "adapter") == [], what
        pair = {(path / "adapter" / name).read_bytes() for name in ("a.json", "deep/b.json")}
        assert pair in ({b"1" * 9}, {b"2" * 9}), what
        assert pair == {b"2" * 9} or not last, what
        found |= pair
    assert len(found) == 2


def test_a_crash_at_every_operation_of_an_atomic_write(tmp_path, monkeypatch, instant):
    root = tmp_path / "disk"
    root.mkdir()
    (root / "status.json").write_bytes(b"old")
    disk = photographed(monkeypatch, root, lambda: files.write_atomic(root / "status.json", b"new content"))
    found = set()
    for _, last, what, path in every_state(disk, tmp_path):
        found.add(raw := (path / "status.json").read_bytes())
        assert raw in (b"old", b"new content") and (raw != b"old" or not last), what
    assert len(found) == 2


def test_a_crash_at_every_operation_of_rewinding_loses_no_row(tmp_path, monkeypatch, instant):
    config = RunConfig.model_validate(
        {"model": "owner/name", "data": "x.jsonl", "method": "lora", "output": str(tmp_path / "disk")}
    )
    run = Run.create(tmp_path / "disk", config, command=["tunesmith", "train"])
    with run.lock():
        for step in range(1, 7):
            run.append("metrics", {"kind": "step", "step": step, "loss": 1 / step})
        rows = run.metrics()
        disk = photographed(monkeypatch, run.path, lambda: run.rewind(4))
    for _, _, what, path in every_state(disk, tmp_path):
        again = Run.open(path)
        with again.lock():
            again.rewind(4)
            assert again.metrics() == rows[:4], what
            aside = [line for line in (path / "metrics.superseded.jsonl").read_bytes().splitlines() if b'"step": 5' in line]
            assert aside, f"a row is nowhere: {what}"


ERRORS = [("open", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EIO), ("mkdir", errno.ENOSPC), ("fsync", errno.EIO),
          ("fsync", errno.ENOSPC), ("rename", errno.EIO), ("open", errno.ENOSPC)]  # fmt: skip


@pytest.mark.parametrize(("operation", "error"), ERRORS)
def test_an_error_at_every_operation_of_a_save_is_raised_and_harms_nothing(operation, error, tmp_path, monkeypatch, instant):
    def attempt(root, fail_at):
        root.mkdir()
        save(root / "checkpoints", 10, 1)
        disk = Disk(root, fail_at, error, half=True)
        with monkeypatch.context() as m:
            m.setattr(files, "os", disk)
            try:
                save(root / "checkpoints", 20, 3)
            except (OSError, TunesmithError) as e:
                return disk, e
        return disk, None

    whole, raised = attempt(tmp_path / "whole", -1)
    assert raised is None
    places = [i for i, what in enumerate(whole.log) if what == operation]
    assert places
    for i in places:
        root = tmp_path / f"at-{i}"
        _, raised = attempt(root, i)
        assert raised is not None, f"{operation} {i} failed in silence"
        assert isinstance(raised, DoesNotFit) == (error == errno.ENOSPC), raised
        if error == errno.ENOSPC:
            assert "bytes are needed" in raised.what and "are free" in raised.what and raised.fix
        found, problems = checkpoint.newest_valid(root / "checkpoints")
        assert not problems
        assert is_content(found, 1, 10) or is_content(found, 3, 20)  # the rename had happened when the parent's fsync failed
        assert [p.name for p in (root / "checkpoints").iterdir() if p.name.startswith(".")] == []
        save(root / "checkpoints", 30, 4)
        assert is_content(checkpoint.newest_valid(root / "checkpoints")[0], 4, 30)


@pytest.fixture
def small_files():
    """No file may grow past 64 KiB, as on a full disk (Python ignores SIGXFSZ, the write fails with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_limit_stops_and_going_on_afterwards_is_bit_identical(tmp_path, small_files):
    save(tmp_path / "c", 10, 1)
    large = {"w": torch.arange(50_000, dtype=torch.float32)}
    with pytest.raises(DoesNotFit) as e:
        checkpoint.save(tmp_path / "c", 20, large, {})
    assert f"{checkpoint.bytes_needed(large):,} bytes are needed" in e.value.what and "ulimit" in e.value.fix
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000010"]
    assert is_content(checkpoint.newest_valid(tmp_path / "c")[0], 1, 10)

    (tmp_path / "x.json").write_text("old")
    with pytest.raises(DoesNotFit):
        files.write_atomic(tmp_path / "x.json", b"x" * 100_000)
    assert (tmp_path / "x.json").read_text() == "old"

    row = b'{"a": "' + b"x" * 40_000 + b'"}\n'
    files.append(tmp_path / "log", row)
    with pytest.raises(DoesNotFit):
        files.append(tmp_path / "log", row)
    assert (tmp_path / "log").read_bytes() == row, "no half line"

    from safetensors.torch import save_file  # another's writer inside our folder

    with pytest.raises(DoesNotFit), files.folder_atomic(tmp_path / "model", needed=200_000) as temp:
        save_file(large, temp / "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "log", "x.json"]

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoint.save(tmp_path / "c", 20, large, {})
    found, _ = checkpoint.newest_valid(tmp_path / "c")
    assert torch.equal(checkpoint.load(found)[0]["w"], large["w"])
