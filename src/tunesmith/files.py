"""Files that are whole or absent: atomic writes, folders that appear at once with a sha256 manifest, and their verification.

The order is always: write into a hidden temporary sibling, fsync the data, fsync its folder, rename, fsync the parent folder.
A crash at any point leaves the old content or the new, never a mixture; what it leaves behind is hidden and `settle` clears it.
Every operation that changes the disk is an `os` call in this file, so that the tests can crash at each of them.

    .NAME.tmp-PID-RANDOM    being written, or being deleted: worth nothing
    .NAME.old-PID-RANDOM    the former NAME while the new one takes its place: worth keeping until NAME exists again
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from tunesmith.errors import DoesNotFit, RunError

MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NO_FOLDER_FSYNC = {
    errno.EINVAL,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.ENOTSUP,
    errno.EISDIR,
}  # Windows, some network mounts
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
BINARY = getattr(os, "O_BINARY", 0)  # Windows
SLICE = 1 << 26  # bytes a write call: macOS refuses 2 GiB and more, Linux cuts there
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-\d+-[0-9a-f]{8}")


def sha256(data: bytes | str) -> str:
    """Hex digest of bytes, or of a text's UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, or of its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def ensure_room(path: Path, needed: int, what: str) -> None:
    """Raises DoesNotFit, with both numbers, when the disk of `path` has fewer than `needed` bytes left."""
    free = free_bytes(path)
    if needed > free:
        raise DoesNotFit(
            f"{what} needs {needed:,} bytes on the disk of {path}, {free:,} are free",
            f"free {needed - free:,} bytes more, or choose an output folder on another disk",
        )


@contextmanager
def room(path: Path, needed: int | None = None) -> Iterator[None]:
    """A full disk inside becomes DoesNotFit, with the bytes needed (when known) and free; any other error passes."""
    try:
        yield
    except Exception as e:
        if (number := _full(e)) is None:
            raise
        if number == errno.EFBIG:
            what, fix = "a file may not grow that large here", "raise the limit (ulimit -f) or choose a file system without one"
        else:
            what = "the disk is full"
            fix = "make room, then give the same command again; a training run that had begun goes on with --resume"
        numbers = (f"{needed:,} bytes are needed, " if needed is not None else "") + f"{free_bytes(path.parent):,} are free"
        raise DoesNotFit(f"{path}: {what}: {numbers}; what was there before is untouched", fix) from e


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a new file piece by piece and fsync it; for use inside `folder_atomic`. Raises OSError as it comes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    try:
        _write_all(fd, chunks)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(
    path: Path, data: bytes | str | Iterable[bytes | memoryview], *, durable: bool = True, needed: int | None = None
) -> None:
    """Replace a file's whole content, given whole or in pieces, at once. `durable=False` skips the fsyncs: safe when the program
    dies, not the machine. `needed`: the bytes that pieces add up to.

    When the disk is full: DoesNotFit, the former content stands and nothing is left behind.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    temp = _hidden(path, "tmp")
    with room(path, len(data) if isinstance(data, bytes) else needed):
        try:
            write_file(temp, [data] if isinstance(data, bytes) else data, durable=durable)
            os.replace(temp, path)
            if durable:
                fsync_folder(path.parent)
        finally:
            with suppress(OSError):  # it was renamed, as it should be
                os.unlink(temp)


def append(path: Path, line: bytes) -> None:
    """Append in one piece: when the disk is full the part that was written is cut off again and DoesNotFit is raised."""
    with room(path, len(line)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
        try:
            before = os.fstat(fd).st_size
            try:
                _write_all(fd, [line])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)


@contextmanager
def folder_atomic(
    target: Path, *, needed: int | None = None, durable: bool = True, known: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Path]:
    """`with folder_atomic(target) as temp:` fill `temp`; at the end it becomes `target`, with a manifest, or nothing happens.

    The manifest holds size and sha256 of every file, nested ones too. An existing `target` is replaced. `needed` is the estimate
    of bytes that is named when the disk is full (DoesNotFit). `durable=False` skips the fsyncs of what is in it: for what can be
    made again and is verified before it is used, as when the machine dies it may be there in part. `known`: the sha256 of files by
    their names in the folder, where it was taken meanwhile; those are not read again.
    """
    make_folder(target.parent)
    settle(target.parent, target.name)
    temp, done = _hidden(target, "tmp"), False
    with room(target, needed):
        try:
            os.mkdir(temp)
            yield temp
            _seal(temp, durable, known)
            _put(temp, target)
            done = True
        finally:
            if not done:
                with suppress(OSError):
                    settle(target.parent, target.name)  # removes temp, gives a former folder its name back


def verify(folder: Path, *, deep: bool = True) -> list[str]:
    """What is wrong with a folder made by `folder_atomic`, one line a fault with the file's name; empty when it is whole.

    Not `deep`: presence and sizes only, nothing is read but the manifest.
    """
    manifest, problems = _read_manifest(folder)
    for name, entry in manifest.items():
        if problem := _file_problem(folder / name, entry["size"], entry["sha256"] if deep else None):
            problems.append(f"{folder.name}/{name}: {problem}")
    return problems


def settle(parent: Path, name: str | None = None) -> list[Path]:
    """Clear what a crash left in `parent` (of `name` only, when given): a former folder without a successor gets its name back,
    all else is removed. Only the one writer may call it. Returns what was found.
    """
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if (m := LEFTOVER.fullmatch(path.name)) is None or (name is not None and m["name"] != name):
            continue
        found.append(path)
        if m["kind"] == "old" and not (home := parent / m["name"]).exists():
            os.rename(path, home)
        elif path.is_dir():
            remove_folder(path)
        else:
            os.unlink(path)
    return found


def former(parent: Path) -> dict[str, Path]:
    """Former folders whose successor a crash prevented, by the name they had."""
    matches = {p: LEFTOVER.fullmatch(p.name) for p in parent.iterdir()} if parent.is_dir() else {}
    return {m["name"]: p for p, m in matches.items() if m and m["kind"] == "old" and not (parent / m["name"]).exists()}


def remove_folder(path: Path) -> None:
    """Delete a folder so that it disappears at once: hidden by a rename first. Links are removed, never followed."""
    if not LEFTOVER.fullmatch(path.name):
        hidden = _hidden(path, "tmp")
        os.rename(path, hidden)
        fsync_folder(path.parent)  # else the power may fail with the name still there and the content gone
        path = hidden
    _remove_tree(path)


def make_folder(path: Path) -> None:
    """A folder and the parents it lacks, each made durable in its own parent. RunError where none can be."""
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError), room(folder):  # another process was quicker
                os.mkdir(folder)
            fsync_folder(folder.parent)
    except OSError as e:
        if e.errno in NO_PLACE:
            raise RunError(f"{path}: cannot be made: {e.strerror}", "name a folder in a place you may write to") from None
        raise
    if not path.is_dir():
        raise RunError(f"{path}: is {'a link that leads nowhere' if path.is_symlink() else 'a file'}", "name another folder")


def fsync_folder(path: Path) -> None:
    """Make a folder's entries durable, where the system can."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        if e.errno in NO_FOLDER_FSYNC:
            return
        raise
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(fd)


def _remove_tree(path: Path) -> None:
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and not inner.is_symlink():
            _remove_tree(inner)
        else:
            os.unlink(inner)
    os.rmdir(path)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{token_hex(4)}")


def _write_all(fd: int, chunks: Iterable[bytes | memoryview]) -> None:
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            view = view[os.write(fd, view[:SLICE]) :]


def _put(temp: Path, target: Path) -> None:
    """Rename `temp` to `target`; a `target` that exists steps aside first, and in between `former` knows where it is."""
    if not target.exists():
        os.rename(temp, target)
        fsync_folder(target.parent)
        return
    old = _hidden(target, "old")
    os.rename(target, old)
    os.rename(temp, target)
    fsync_folder(target.parent)
    with suppress(OSError):  # the new one stands; what cannot go now (an open file on Windows) goes at the next `settle`
        remove_folder(old)


def _seal(temp: Path, durable: bool, known: Mapping[str, str]) -> None:
    """Write the manifest of all that is in `temp` and, if `durable`, make everything so, the deepest folders first."""
    files, folders = {}, [temp]
    for path in sorted(temp.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            if durable:
                fd = os.open(path, os.O_RDWR)  # Windows flushes only what may be written
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            name = path.relative_to(temp).as_posix()
            files[name] = {"sha256": known.get(name) or sha256_file(path), "size": path.stat().st_size}
    write_file(temp / MANIFEST, [_manifest_bytes(files)], durable=durable)
    for folder in reversed(folders) if durable else ():
        fsync_folder(folder)


def _manifest_bytes(files: dict[str, Any]) -> bytes:
    """Canonical form, so that every flipped bit shows, also in the manifest itself."""
    whole = {"files": files, "sha256": sha256(json.dumps(files, sort_keys=True))}
    return json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n"


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    where = f"{folder.name}/{MANIFEST}"
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}, [f"{where}: missing"]
    except OSError as e:
        return {}, [f"{where}: cannot be read: {e.strerror}"]
    if not raw:
        return {}, [f"{where}: empty"]
    try:
        files = json.loads(raw)["files"]
        entries = {str(n): {"sha256": str(e["sha256"]), "size": int(e["size"])} for n, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [f"{where}: damaged (not a manifest)"]
    if raw != _manifest_bytes(entries):
        return {}, [f"{where}: damaged (its own sha256 differs)"]
    if any(PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts or "\\" in n for n in entries):
        return {}, [f"{where}: names a file outside the folder"]
    return entries, []


def _file_problem(path: Path, size: int, digest: str | None) -> str:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found:,} bytes, {size:,} expected ({'empty' if not found else 'truncated' if found < size else 'grown'})"
        return "" if digest is None or sha256_file(path) == digest else "damaged (sha256 differs)"
    except FileNotFoundError:
        return "missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _full(e: Exception) -> int | None:
    """The error number when the disk is full; safetensors and numpy's `tofile` tell it only in their text."""
    if isinstance(e, OSError) and e.errno is not None:
        return e.errno if e.errno in FULL else None
    if re.fullmatch(r"\d+ requested and \d+ written", str(e)):
        return errno.ENOSPC
    match = re.search(r"\(os error (\d+)\)", str(e))
    return int(match[1]) if match and int(match[1]) in FULL else None


def finite(value: Any) -> Any:
    """JSON has no nan and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
