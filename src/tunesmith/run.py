"""The run folder: what training leaves and every other verb reads. One writer at a time, and a status that does not lie.

    run = Run.create("runs/x", config, command=sys.argv)       refused on another's files, and on a run that exists
    with run.lock():                                            refused at once, with pid and since when, when another trains
        run.set_status("running", step=0, steps=120)
        run.append("metrics", {"kind": "step", "step": 1, "loss": 2.31})
    Run.open("runs/x").status()                                 'stopped' when the writer is gone without a word

Nothing here is ordered by the clock: times are told to people, steps decide. No torch.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from tunesmith.config import yaml12
from tunesmith.config.load import resolved
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError, RunError
from tunesmith.files import LEFTOVER, append, fsync_folder, make_folder, settle, sha256, write_atomic
from tunesmith.redact import redact, redact_command, redact_tree

FORMAT = 1
State = Literal["preparing", "running", "finished", "interrupted", "failed", "stopped"]
Stream = Literal["metrics", "samples"]
STREAMS: tuple[Stream, ...] = ("metrics", "samples")
PACKAGES = ("tunesmith", "torch", "numpy", "safetensors", "tokenizers", "transformers", "triton")  # versions kept in the manifest
HALF_MADE = {"lock", "lock.pid", "manifest.json", "status.json"}  # all a crash inside `create` can leave: run.yaml is written last

# Keys that may differ between a run and its resumption: none of them reaches a weight.
HARMLESS = ("output", "log.", "checkpoint.", "eval.samples", "eval.sample_tokens", "data.workers", "data.max_refused")

SAMPLE_BLOCKS, SAMPLE_BYTES = 16, 1 << 16  # of each weight file go into the base's fingerprint: 1 MiB a shard


@dataclass(frozen=True, slots=True)
class Status:
    """`status.json`. `stopped` is never written: it is what a reader sees when the writer is gone and did not say why."""

    state: State
    step: int = 0
    steps: int = 0
    message: str = ""
    pid: int = 0
    updated: str = ""  # UTC, for people


class Run:
    """A run folder. Paths are attributes; what is in them is read on request."""

    def __init__(self, path: Path):
        self.path = path
        self.adapter, self.model, self.tokenizer = path / "adapter", path / "model", path / "tokenizer"
        self.data, self.checkpoints, self.report = path / "data", path / "checkpoints", path / "report.html"
        self._lock: _Lock | None = None

    # ---- made and opened -------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path | str, config: RunConfig, *, command: Sequence[str]) -> Run:
        """A new run folder with run.yaml and manifest.json. RunError when `path` holds a run already, or anything else.

        One that ended before its first step (it did not fit, its data were refused, Ctrl-C) holds nothing to keep: it is begun
        again."""
        run = cls(Path(path).absolute())
        if file := next((p for p in (run.path, *run.path.parents) if p.exists() and not p.is_dir()), None):
            raise RunError(f"{path}: {'' if file == run.path else f'{file} '}is a file", "name a folder as `output`")
        make_folder(run.path)
        former = run.status()  # before the lock is ours: a killed run shows by nobody holding it
        with run.lock():
            there = {p.name for p in run.path.iterdir() if not LEFTOVER.fullmatch(p.name)}
            begun = bool(run._lines("metrics")) or any(run.checkpoints.glob("step-*"))
            if "run.yaml" in there and (begun or former.state not in ("failed", "interrupted")):
                when = f"after step {former.step}" if former.step else "before its first step"
                how = f", which was killed {when}" if former.state == "stopped" else f" ({former.state})"
                go_on = "" if former.state == "finished" else "go on with --resume, or "
                raise RunError(f"{path}: holds a run already{how}", f"{go_on}choose another `output`")
            if "run.yaml" not in there and (strange := sorted(there - HALF_MADE)):
                raise RunError(
                    f"{path}: is not empty and not a run folder (it holds {', '.join(strange[:3])})", "name another `output`"
                )
            run._write_json("manifest.json", _manifest(config, command))
            run.set_status("preparing")
            text = yaml12.write(redact_tree(resolved(config)))
            write_atomic(
                run.path / "run.yaml", "# The run file as resolved: every key that has an effect, defaults included.\n" + text
            )
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run folder; RunError when `path` is none."""
        run = cls(Path(path).absolute())
        if not (run.path / "run.yaml").is_file():
            what = "is not a run folder (no run.yaml)" if run.path.exists() else "there is no such folder"
            raise RunError(f"{path}: {what}", cls.near(path) or "name the `output` folder of a training run")
        return run

    @staticmethod
    def near(path: Path | str) -> str:
        """As an error's fix: the run folders beside `path`, here and in runs/, the likest name first; empty when there are none."""
        found = {
            str(p.parent) for folder in {Path(path).expanduser().parent, Path(), Path("runs")} for p in folder.glob("*/run.yaml")
        }
        ranked = sorted(found, key=lambda p: (-SequenceMatcher(None, p, str(path)).ratio(), p))
        return f"run folders here: {', '.join(ranked[:5])}" if ranked else ""

    @property
    def config(self) -> RunConfig:
        """run.yaml as it was resolved (secrets are `[redacted]` in it)."""
        try:
            return RunConfig.model_validate(yaml12.read((self.path / "run.yaml").read_text("utf-8")).tree)
        except (OSError, ValueError, ConfigError, ValidationError) as e:
            raise RunError(f"{self.path / 'run.yaml'}: damaged: {e}", "put the original run file back in its place") from e

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json: versions, fingerprints, command, seed."""
        return self._read_json("manifest.json")

    def record(self, **facts: Any) -> None:
        """Add facts to manifest.json: data, base, template_sha256, dtype ... Text in them is redacted."""
        self._write_json("manifest.json", {**self.manifest, **redact_tree(facts)})

    # ---- one writer ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[Run]:
        """Be the only writer; RunError at once when another process is. What a crash left half-done is cleared on entry.

        The system frees the lock when its holder dies, so a stale one cannot stand in the way.
        """
        assert self._lock is None, "this Run holds its lock already"
        self._lock = _Lock.take(self.path / "lock")
        try:
            settle(self.path)
            settle(self.checkpoints)
            for stream in STREAMS:
                self._cut_torn_line(stream)
            yield self
        finally:
            self._lock.release()
            self._lock = None

    # ---- status ----------------------------------------------------------------------------------------------------------------

    def set_status(self, state: State, *, step: int | None = None, steps: int | None = None, message: str = "") -> None:
        """Write status.json at once; step and steps stay as they were unless given. Only the holder of the lock may."""
        assert self._lock is not None and state != "stopped", "the writer states its own state"
        was = self.status()
        step, steps = was.step if step is None else step, was.steps if steps is None else steps
        status = Status(state, step, steps, redact(message), os.getpid(), _now())
        write_atomic(self.path / "status.json", json.dumps(asdict(status)) + "\n", durable=state not in ("preparing", "running"))

    def status(self) -> Status:
        """The truth as far as it can be known: a run whose writer is gone without a last word is `stopped`."""
        try:
            status = Status(**self._read_json("status.json"))
        except (RunError, TypeError):  # a machine that lost power can leave an empty one
            status = Status("running", message="status.json is missing or damaged")
        if status.state in ("preparing", "running") and self._lock is None and not _Lock.held(self.path / "lock"):
            where = f"at step {status.step} of {status.steps}" if status.steps else f"while {status.state}"
            return Status(
                "stopped", status.step, status.steps, f"stopped unexpectedly {where}; --resume goes on", status.pid, status.updated
            )
        return status

    # ---- metrics and samples ---------------------------------------------------------------------------------------------------

    def append(self, stream: Stream, row: Mapping[str, Any]) -> None:
        """One line of JSON into metrics.jsonl or samples.jsonl, in one write. nan and inf become text; a full disk is DoesNotFit
        and leaves no half line.
        """
        text = json.dumps(_json_value(row), ensure_ascii=False, allow_nan=False)
        append(self._stream(stream), text.encode("utf-8", "backslashreplace") + b"\n")  # a lone surrogate becomes its JSON escape

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order, nan and inf as floats again, a torn last line left out. RunError names a damaged one."""
        return [{k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in self._rows("metrics")]

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl in order; a torn last line is left out."""
        return self._rows("samples")

    def rewind(self, step: int) -> int:
        """Before going on from `step`: move rows of later steps to *.superseded.jsonl, so that every step appears once.
        Returns how many were moved.
        """
        moved = 0
        for stream in STREAMS:
            rows, lines = self._rows(stream), self._lines(stream)
            if late := [line for row, line in zip(rows, lines, strict=True) if row.get("step", 0) > step]:
                kept = [line for row, line in zip(rows, lines, strict=True) if row.get("step", 0) <= step]
                aside = self.path / f"{stream}.superseded.jsonl"
                write_atomic(aside, (aside.read_bytes() if aside.exists() else b"") + b"".join(late))  # durable before they leave
                write_atomic(self._stream(stream), b"".join(kept))
                moved += len(late)
        return moved

    def sync(self) -> None:
        """Make metrics and samples durable; before a checkpoint is written, so that no checkpoint knows more than the log."""
        for stream in STREAMS:
            with suppress(FileNotFoundError), self._stream(stream).open("ab") as f:
                os.fsync(f.fileno())
        fsync_folder(self.path)

    # ---- resuming --------------------------------------------------------------------------------------------------------------

    def changed_since(self, config: RunConfig, data: str | None = None, base: str | None = None) -> list[str]:
        """What differs from the run as started, one line a key; empty when it may be resumed. None leaves a fingerprint out."""
        resumed = RunConfig.model_validate(resolved(config))  # absolute paths, as run.yaml holds them
        before, after = _flat(_plain(self.config)), _flat(redact_tree(_plain(resumed)))
        lines = [
            f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not key.startswith(HARMLESS)
        ]
        manifest = self.manifest
        for what, name, now in (("the training data", "data", data), ("the base model", "base", base)):
            if now is not None and manifest.get(name) not in (None, now):
                lines.append(f"{what}: the files changed (fingerprint {str(manifest[name])[:12]} -> {now[:12]})")
        return lines

    def refuse_if_changed(self, config: RunConfig, data: str | None = None, base: str | None = None) -> None:
        """RunError with the whole diff when `changed_since` finds anything."""
        if lines := self.changed_since(config, data, base):
            raise RunError(
                f"{self.path}: cannot be resumed, it was started with something else:\n  " + "\n  ".join(lines),
                "put these back to resume, or name another `output` for a new run",
            )

    # ---- the card --------------------------------------------------------------------------------------------------------------

    def write_card(
        self,
        *,
        base: str,
        rows: Mapping[str, int],
        losses: Mapping[str, tuple[float, float]] | None = None,
        licence: Mapping[str, str] | None = None,
        steps: int = 0,
    ) -> Path:
        """README.md, the model card. `base`: hub id or folder; `rows`: counts by class; `losses`: name -> (before, after);
        `licence`: the base's, as `hub.licence_of` finds it."""
        config, manifest = self.config, self.manifest
        text = redact(_card(self.path.name, config, manifest, base, rows, losses or {}, licence or {}, steps))
        write_atomic(self.path / "README.md", text)
        return self.path / "README.md"

    # ---- inside ----------------------------------------------------------------------------------------------------------------

    def _stream(self, stream: Stream) -> Path:
        return self.path / f"{stream}.jsonl"

    def _lines(self, stream: Stream) -> list[bytes]:
        """Whole lines; what follows the last newline is torn."""
        try:
            return [line for line in self._stream(stream).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        except FileNotFoundError:
            return []

    def _rows(self, stream: Stream) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self._lines(stream), 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise RunError(f"{self._stream(stream)}:{number}: damaged line: {e}", "remove that line") from e
            if not isinstance(row, dict):
                raise RunError(f"{self._stream(stream)}:{number}: damaged line: no object", "remove that line")
            rows.append(row)
        return rows

    def _cut_torn_line(self, stream: Stream) -> None:
        with suppress(FileNotFoundError), self._stream(stream).open("r+b") as f:
            raw = f.read()
            f.truncate(raw.rfind(b"\n") + 1)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as e:
            raise RunError(f"{self.path / name}: cannot be read: {e}", "the folder is damaged: train into another `output`") from e
        if not isinstance(found, dict):
            raise RunError(f"{self.path / name}: is no JSON object", "the folder is damaged: train into another `output`")
        return found

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomic(self.path / name, json.dumps(_json_value(value), indent=1, ensure_ascii=False) + "\n")


def base_fingerprint(folder: Path) -> str:
    """What a checkpoint folder is, for about 1 MiB read a shard: sha256 over config.json, the index, the tokenizer, and of each
    safetensors file its size, its header and 16 blocks of 64 KiB spread over it (two tunes of one base differ only there).
    """
    parts: list[str] = []
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (file := folder / name).is_file():
            parts.append(f"{name} {sha256(file.read_bytes())}")
    for file in sorted(p for p in folder.glob("*.safetensors") if p.is_file()):  # what a dead link was for is missed at the load
        size = file.stat().st_size
        with file.open("rb") as f:
            header = f.read(min(8 + int.from_bytes(f.read(8), "little"), 100 << 20))
            pieces = [header]
            for i in range(SAMPLE_BLOCKS):
                f.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLE_BLOCKS - 1))
                pieces.append(f.read(SAMPLE_BYTES))
        parts.append(f"{file.name} {size} {sha256(b''.join(pieces))}")
    return sha256("\n".join(parts))


def config_sha256(config: RunConfig) -> str:
    """Of the resolved config, keys in order."""
    return sha256(json.dumps(_plain(config), sort_keys=True))


# ---- the lock ------------------------------------------------------------------------------------------------------------------


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")  # Unix, Windows; neither: a file that exists, with a pid
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # some network file systems
FAR = 1 << 30  # Windows locks bytes against reading too: this one is beyond the text
TRIES, PAUSE = 5, 0.03  # a reader asking `held` owns the lock for microseconds; a second writer is still refused within 0.2 s


class _Lock:
    """An advisory lock on one file, which says in JSON who holds it. The system frees it when the holder dies, however it dies."""

    def __init__(self, path: Path, fd: int, by_existence: bool):
        self.path, self.fd, self.by_existence = path, fd, by_existence
        _held.add(self)

    @classmethod
    def take(cls, path: Path) -> _Lock:
        for attempt in range(TRIES):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as e:
                raise _unwritable(path.parent, e) from None
            got = _try_lock(fd)
            if got is None:
                os.close(fd)
                return cls._take_by_existence(path)
            if got:
                lock = cls(path, fd, False)
                os.ftruncate(fd, 0)
                os.write(fd, _who())
                return lock
            os.close(fd)
            if attempt < TRIES - 1:
                time.sleep(PAUSE)
        raise _refusal(path)

    @classmethod
    def _take_by_existence(cls, path: Path) -> _Lock:
        """Without system locks: a file that only one can link into place, with its pid in it from the first moment. That of a dead
        process is renamed away, which also only one can do.
        """
        marker, mine = path.with_name("lock.pid"), path.with_name(f"lock.{os.getpid()}-{token_hex(4)}")
        mine.write_bytes(_who())
        try:
            for _ in range(2):
                with suppress(FileExistsError):
                    os.link(mine, marker)
                    return cls(marker, -1, True)
                if _alive(_holder(marker).get("pid", 0)):
                    break
                stale = mine.with_suffix(".stale")
                with suppress(FileNotFoundError):  # another was quicker
                    os.rename(marker, stale)
                    if _alive(_holder(stale).get("pid", 0)):  # another's new one, put there since we looked
                        os.rename(stale, marker)
                        break
                    os.unlink(stale)
        finally:
            os.unlink(mine)
        raise _refusal(marker)

    def release(self) -> None:
        _held.discard(self)
        if self.by_existence:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        else:
            os.ftruncate(self.fd, 0)
            _unlock(self.fd)
            os.close(self.fd)

    @staticmethod
    def held(path: Path) -> bool:
        """Whether a living process holds it."""
        marker = path.with_name("lock.pid")
        if marker.exists() and _alive(_holder(marker).get("pid", 0)):
            return True
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:  # no lock was ever taken, or a folder one may only read: then its writer's pid is all there is to ask
            return _alive(_holder(path).get("pid", 0))
        try:
            if (got := _try_lock(fd)) is True:
                _unlock(fd)
            return got is False
        finally:
            os.close(fd)


_held: set[_Lock] = set()


def _forget_in_child() -> None:
    """A forked child (data workers) must not keep its parent's lock alive after the parent died."""
    for lock in _held:
        if not lock.by_existence:
            os.close(lock.fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _try_lock(fd: int) -> bool | None:
    """True: ours now; False: another's; None: this system or file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            os.lseek(fd, FAR, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            return None
        return True
    except OSError as e:
        if fcntl and e.errno in NO_FLOCK:
            return None
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise


def _unlock(fd: int) -> None:
    if fcntl:
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:
        os.lseek(fd, FAR, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)


def _who() -> bytes:
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": _now()}).encode()


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _refusal(path: Path) -> RunError:
    who = _holder(path)
    return RunError(
        f"{path.parent}: another process is writing this run (pid {who.get('pid', 'unknown')} "
        f"on {who.get('host', 'this machine')}, since {who.get('since', 'just now')})",
        "wait for it, stop it, or name another `output`",
    )


def _unwritable(path: Path | str, e: OSError) -> RunError:
    return RunError(f"{path}: cannot be written: {e.strerror}", "choose another `output`, or get the right to write there")


def _alive(pid: Any) -> bool:
    """Unix only: os.kill(pid, 0) asks; on Windows it would send Ctrl-C, and msvcrt's locks make the question needless."""
    if not isinstance(pid, int) or pid <= 0 or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


# ---- small things --------------------------------------------------------------------------------------------------------------

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _json_value(value: Any) -> Any:
    """What JSON can hold: nan and inf as text, numpy and torch scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return str(value) if isinstance(value, Path) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _manifest(config: RunConfig, command: Sequence[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
        "platform": platform.platform(),
        "command": redact_command(command),
        "config_sha256": config_sha256(config),
        "seed": config.seed,
        "data": None,
        "base": None,
        "template_sha256": None,
        "started": _now(),
        "finished": None,
    }


def _card(
    name: str,
    config: RunConfig,
    manifest: Mapping[str, Any],
    base: str,
    rows: Mapping[str, int],
    losses: Mapping[str, tuple[float, float]],
    licence: Mapping[str, str],
    steps: int,
) -> str:
    """The text of README.md. A local base is named by its last folder: paths of this machine do not travel."""
    local = Path(base).is_absolute() or Path(base).exists() or base == "embedded"
    shown = Path(base).name if local else base
    full = config.method == "full"
    front = {
        "library_name": "transformers" if full else "peft",
        **({} if local else {"base_model": base.partition("@")[0]}),
        **licence,
        "tags": ["tunesmith", config.method],
    }
    lora, dtype = config.lora, manifest.get("dtype", "an unrecorded precision")
    method = {
        "full": f"every weight was trained, with float32 masters, in {dtype}",
        "lora": f"LoRA ({lora.variant}), rank {lora.rank}, alpha {lora.alpha:g}, over the frozen base in {dtype}",
        "qlora": f"LoRA ({lora.variant}), rank {lora.rank}, alpha {lora.alpha:g}, over the frozen base in 4 bits (NF4), "
        f"computed in {dtype}",
    }[config.method]
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines += [f"Tuned from **{shown}** with Tunesmith {manifest['versions'].get('tunesmith', '')}.".replace(" .", "."), ""]
    lines += ["| | |", "|---|---|", f"| Base | {shown} |", f"| Base fingerprint | `{manifest.get('base') or 'unknown'}` |"]
    lines += [f"| Method | {config.method}: {method} |", f"| Steps | {steps} |", f"| Seed | {config.seed} |"]
    lines += [f"| Data | {', '.join(f'{n:,} {what}' for what, n in rows.items()) or 'unknown'} |"]
    lines += [f"| Data fingerprint | `{manifest.get('data') or 'unknown'}` |"]
    named = " ".join(dict.fromkeys(licence.values())) or "unknown: the licence of the base model and of the data applies"
    lines += [f"| Licence | {named} |", ""]
    if losses:
        lines += ["## Before and after", "", "| | before | after |", "|---|---|---|"]
        lines += [f"| {what} | {before:.4f} | {after:.4f} |" for what, (before, after) in losses.items()] + [""]
    lines += ["## How to load it", "", f"From the folder that holds `{name}`:", "", "```sh", f"tunesmith chat {name}", "```", ""]
    where = shown if base == "embedded" or not local else f"path/to/{shown}"
    lines += ["```python", how_to_load(name, full=full, base=where, manifest=manifest), "```", ""]
    if config.method == "qlora":
        lines += ["The adapter was trained over the base in 4 bits; over its 16-bit weights it answers a little differently."]
    if not full:
        lines += [f"`tunesmith merge {name} merged` writes one folder that needs neither the base nor PEFT.", ""]
    return "\n".join(lines)


def how_to_load(folder: str, *, full: bool, base: str, manifest: Mapping[str, Any]) -> str:
    """Python that loads the result in `folder` with transformers (and PEFT) and asks it something. `base` is `embedded`, a hub id
    or a folder; the manifest knows its revision and the precision it ran in.
    """
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(manifest.get("dtype", ""), "auto")
    revision = manifest.get("base_revision")
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if full:
        lines += ["", f'model = AutoModelForCausalLM.from_pretrained({json.dumps(folder + "/model")}, dtype="{dtype}")']
    else:
        lines = ["from peft import PeftModel", *lines]
        where = json.dumps(base)
        if base == "embedded":
            lines += ["from tunesmith.hub import resolve_model  # the base is the small model inside the package"]
            where = 'resolve_model("embedded").path'
        lines += ["", f'base = AutoModelForCausalLM.from_pretrained({where}{pinned}, dtype="{dtype}")']
        lines += [f"model = PeftModel.from_pretrained(base, {json.dumps(folder + '/adapter')})"]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder + '/tokenizer')})",
        "",
        'chat = [{"role": "user", "content": "Your question"}]',
        'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "answer = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0, prompt.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return "\n".join(lines)
