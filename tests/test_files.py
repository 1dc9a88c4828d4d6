"""Atomic files and folders: what is written is read back, faults are named, nothing is left behind. Crashes: test_crash.py."""

import errno
import hashlib
import os

import pytest

from tunesmith import files
from tunesmith.errors import DoesNotFit, RunError


def listing(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.fixture
def folder(tmp_path):
    with files.folder_atomic(tmp_path / "out") as temp:
        (temp / "deep").mkdir()
        (temp / "a.json").write_text("{}")
        (temp / "deep/b.bin").write_bytes(bytes(range(256)))
        (temp / "empty").touch()
    return tmp_path / "out"


def test_digests_are_sha256():
    assert files.sha256("é") == hashlib.sha256("é".encode()).hexdigest()
    assert files.sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_folder_appears_whole_with_every_file_in_its_manifest(folder):
    assert listing(folder) == ["a.json", "deep", "deep/b.bin", "empty", "manifest.json"]
    assert files.verify(folder) == []
    assert listing(folder.parent) == ["out"] + [f"out/{name}" for name in listing(folder)]
    assert files.sha256_file(folder / "deep/b.bin") in (folder / "manifest.json").read_text()


def test_an_exception_in_the_body_leaves_nothing_or_what_was(folder):
    for target in (folder, folder.parent / "new"):
        before = listing(folder.parent)
        with pytest.raises(KeyboardInterrupt), files.folder_atomic(target) as temp:
            (temp / "x").touch()
            raise KeyboardInterrupt
        assert listing(folder.parent) == before and files.verify(folder) == []


def test_a_replaced_folder_holds_only_the_new(folder):
    with files.folder_atomic(folder) as temp:
        (temp / "c").write_text("c")
    assert listing(folder.parent) == ["out", "out/c", "out/manifest.json"] and files.verify(folder) == []


def test_write_atomic_replaces_text_and_bytes(tmp_path):
    path = tmp_path / "x"
    for data in ("héllo", b"\x00\xff", ""):
        files.write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert listing(tmp_path) == ["x"]
    with pytest.raises(IsADirectoryError):
        files.write_atomic(tmp_path, b"")
    assert listing(tmp_path.parent).count(tmp_path.name) == 1


def test_new_files_have_the_rights_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "x", b"")
        with files.folder_atomic(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640 and (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def damage_grow(path):
    path.write_bytes(path.read_bytes() + b"x")


DAMAGES = {
    "truncated": damage_truncate,
    "sha256 differs": damage_flip,
    "grown": damage_grow,
    "empty": lambda p: p.write_bytes(b""),
    "missing": lambda p: p.unlink(),
    "cannot be read": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("name", ["a.json", "deep/b.bin", "manifest.json"])
def test_each_damage_of_each_file_is_named(folder, name, what):
    DAMAGES[what](folder / name)
    problems = files.verify(folder)
    assert len(problems) == 1 and problems[0].startswith(f"out/{name}: "), problems
    assert what in problems[0] or (name == "manifest.json" and "damaged" in problems[0]) or what == "cannot be read"


def test_any_flipped_bit_of_the_manifest_shows(folder):
    path = folder / "manifest.json"
    raw = path.read_bytes()
    for bit in range(0, len(raw) * 8, 5):  # 5 and 8 have no common divisor: every bit of a byte has its turn
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert files.verify(folder), f"bit {bit}"
    path.write_bytes(raw)
    assert files.verify(folder) == []


def test_a_shallow_look_sees_sizes_only(folder):
    damage_flip(folder / "deep/b.bin")
    assert files.verify(folder, deep=False) == [] and len(files.verify(folder)) == 1
    damage_truncate(folder / "deep/b.bin")
    assert files.verify(folder, deep=False) == ["out/deep/b.bin: 255 bytes, 256 expected (truncated)"]


def test_a_manifest_cannot_point_outside(folder):
    for name in ("../secret", "/etc/passwd", "..\\secret"):
        entries = {name: {"sha256": "0" * 64, "size": 1}}
        (folder / "manifest.json").write_bytes(files._manifest_bytes(entries))
        assert files.verify(folder) == ["out/manifest.json: names a file outside the folder"]


def test_settle_gives_a_former_folder_its_name_back_and_clears_the_rest(tmp_path):
    (tmp_path / ".a.old-12-0123abcd").mkdir()
    (tmp_path / ".b.old-12-0123abcd").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / ".c.tmp-12-0123abcd").mkdir()
    (tmp_path / ".d.tmp-12-0123abcd").touch()
    (tmp_path / ".gitignore").touch()
    (tmp_path / ".mine.tmp").touch()
    assert files.former(tmp_path) == {"a": tmp_path / ".a.old-12-0123abcd"}
    assert len(files.settle(tmp_path, "c")) == 1  # of one name only
    assert len(files.settle(tmp_path)) == 3
    assert listing(tmp_path) == [".gitignore", ".mine.tmp", "a", "b"]


def test_removal_does_not_follow_links(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/x").touch()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/link").symlink_to(tmp_path / "keep")
    files.remove_folder(tmp_path / "gone")
    assert listing(tmp_path) == ["keep", "keep/x"]


def test_room_is_checked_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_000)
    files.ensure_room(tmp_path, 1_000, "it")
    with pytest.raises(DoesNotFit) as e:
        files.ensure_room(tmp_path, 1_500, "the checkpoint")
    assert (
        "the checkpoint needs 1,500 bytes" in e.value.what and "1,000 are free" in e.value.what and "500 bytes more" in e.value.fix
    )


def test_free_bytes_of_a_folder_that_is_yet_to_be(tmp_path):
    assert files.free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EINVAL])
def test_without_fsync_of_folders_all_still_works(tmp_path, monkeypatch, refusal):
    """Windows cannot open a folder (EACCES); some network mounts open but do not sync one (EINVAL)."""

    class NoFolders:
        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, path, flags, mode=0o777):
            if refusal == errno.EACCES and os.path.isdir(path):
                raise PermissionError(refusal, os.strerror(refusal))
            return os.open(path, flags, mode)

        def fsync(self, fd):
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(files, "os", NoFolders())
    for text in ("a", "b"):
        with files.folder_atomic(tmp_path / "d") as temp:
            (temp / "x").write_text(text)
    files.write_atomic(tmp_path / "y", "y")
    assert files.verify(tmp_path / "d") == [] and (tmp_path / "d/x").read_text() == "b" and (tmp_path / "y").read_text() == "y"


def test_a_folder_that_can_be_made_again_is_whole_and_not_synced(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    for durable in (False, True):
        synced.clear()
        with files.folder_atomic(tmp_path / "place/d", durable=durable) as temp:
            (temp / "x").write_text("a" * 9)
        assert files.verify(tmp_path / "place/d") == []
        assert any(name.endswith("/x") for name in synced) == durable
    (tmp_path / "place/d/x").write_text("a" * 4 + "\0" * 5)  # as a power failure leaves what was not synced
    assert files.verify(tmp_path / "place/d")


def test_sums_that_are_known_are_not_taken_again(tmp_path, monkeypatch):
    known: dict[str, str] = {}
    with files.folder_atomic(tmp_path / "f", known=known) as temp:
        (temp / "a.bin").write_bytes(b"as written")
        (temp / "b.bin").write_bytes(b"read once more")
        known["a.bin"] = files.sha256(b"as written")
        read = []
        monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path.name) or files.sha256(path.read_bytes()))
    assert read == ["b.bin"]
    monkeypatch.undo()
    assert files.verify(tmp_path / "f") == []
    (tmp_path / "f" / "a.bin").write_bytes(b"as wr1tten")
    assert files.verify(tmp_path / "f") == ["f/a.bin: damaged (sha256 differs)"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    class Short:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, fd, data):
            return os.write(fd, data[:3])

    monkeypatch.setattr(files, "os", Short())
    files.write_atomic(tmp_path / "x", b"0123456789")
    files.append(tmp_path / "x", b"abcde")
    assert (tmp_path / "x").read_bytes() == b"0123456789abcde"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, what in ((tmp_path / "file/run", "cannot be made"), (tmp_path / "link", "a link that leads nowhere"),
                       (tmp_path / ("x" * 300), "cannot be made"), (tmp_path / "file", "is a file")):  # fmt: skip
        with pytest.raises(RunError, match=what) as e:
            files.make_folder(path)
        assert e.value.fix
    files.make_folder(tmp_path / "a/b")
    files.make_folder(tmp_path / "a/b")
    assert listing(tmp_path / "a") == ["b"]
