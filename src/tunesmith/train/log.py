"""What a run records and shows: metrics.jsonl, trackers from one table, and a progress display that cannot stall the loop."""

from __future__ import annotations

import importlib
import math
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tunesmith.errors import ConfigError, MissingExtra, install
from tunesmith.redact import redact
from tunesmith.registry import Registry
from tunesmith.run import Run

STATUS_EVERY = 1.0  # seconds between rewrites of status.json; a reader sees a step at most this old
PIECE = 512  # bytes: POSIX lets so many into a pipe that is reported writable without blocking


class Tracker(Protocol):
    """A further sink. `step` orders everything; values are finite or not, as they came."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Log:
    """Rows into metrics.jsonl (and the trackers), one write a row: a crash of the program loses none.

    `start` is the step a resumed run goes on from; `steps` the last one, for status.json.
    """

    def __init__(self, run: Run, trackers: Sequence[str] = (), *, steps: int = 0, start: int = 0):
        self.run, self.steps, self.at = run, steps, start
        self.trackers = [TRACKERS[name](run.path / "trackers" / name, start) for name in trackers]
        self._stated = -math.inf

    def step(self, step: int, **values: Any) -> None:
        """kind=step: loss, lr, grad_norm, tokens ... Also keeps status.json at this step, at most once a second."""
        self._row("step", step, values)
        if (now := time.monotonic()) - self._stated >= STATUS_EVERY:
            self._stated = now
            self.run.set_status("running", step=step, steps=self.steps)

    def eval(self, step: int, **values: Any) -> None:
        """kind=eval: held-out loss and what else was measured."""
        self._row("eval", step, values)

    def event(self, what: str, *, step: int | None = None, **values: Any) -> None:
        """kind=event: something a person should know, such as `resumed`; text is redacted."""
        step = self.at if step is None else step
        text = {k: redact(v) if isinstance(v, str) else v for k, v in values.items()}
        self.run.append("metrics", {"kind": "event", "step": step, "what": redact(what), **text})
        for tracker in self.trackers:
            tracker.text(step, "event", redact(what))

    def sample(self, step: int, **values: Any) -> None:
        """One answered prompt into samples.jsonl."""
        self.run.append("samples", {"step": step, **values})

    def sync(self) -> None:
        """Make all rows durable; called before a checkpoint is saved."""
        self.run.sync()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _row(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.at = step
        self.run.append("metrics", {"kind": kind, "step": step, **values})
        numbers = {f"{'train' if kind == 'step' else kind}/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))}
        for tracker in self.trackers:
            tracker.scalars(step, numbers)


class TensorBoard:
    """TensorBoard's event files in the run folder; nothing leaves the machine."""

    def __init__(self, folder: Path, start: int):
        try:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as e:
            raise MissingExtra("log.trackers: tensorboard is not installed", install("tensorboard")) from e
        self.writer = writer(log_dir=str(folder), purge_step=start + 1 if start else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


TRACKERS: Registry[Callable[[Path, int], Tracker]] = Registry(
    "tracker", {"tensorboard": TensorBoard}, group="trackers", error=ConfigError
)  # fmt: skip


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing where nobody reads; it drops output before it waits for a reader.

    with Progress(steps=120, start=0) as progress:
        progress.update(step, loss=2.1, lr=2e-4, tokens_per_s=900)
        progress.say("held-out loss 2.05")
    """

    def __init__(self, steps: int, *, start: int = 0, file: TextIO | None = None, every: float = 10.0):
        self.steps, self.start, self.every = steps, start, every
        self.file = Unstalled(sys.stdout if file is None else file)
        self._began = self._shown = time.monotonic()
        self._bar: RichProgress | None = None
        if self.file.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = RichProgress(*columns, console=Console(file=self.file), redirect_stdout=False, redirect_stderr=False)  # type: ignore[arg-type]
            self._task = self._bar.add_task("training", total=steps, completed=start, facts="")

    def update(self, step: int, **values: float) -> None:
        """After each step. Known names: loss, lr, tokens_per_s; others are shown as they are."""
        facts = "  ".join(f"{k.replace('tokens_per_s', 'tokens/s')} {_short(v)}" for k, v in values.items())
        if self._bar:
            self._bar.update(self._task, completed=step, facts=facts)
            return
        now = time.monotonic()
        if step >= self.steps or step <= self.start + 1 or now - self._shown >= self.every:
            self._shown = now
            done = step - self.start
            left = f"  left {_clock((now - self._began) / done * (self.steps - step))}" if done > 0 and step < self.steps else ""
            self.file.write(f"step {step}/{self.steps}  {facts}{left}\n")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self.file.write(text + "\n")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()
        self.file.close()


class Unstalled:
    """A text stream that never blocks and never raises: what the reader does not take is dropped and counted.

    A pipe or terminal is opened a second time, non-blocking (Linux; the flag on the given descriptor would reach every process that
    shares it), or asked (poll) before each piece of 512 bytes. Nothing waits in a buffer to be flushed, and to hang, at exit.
    Windows can do neither: there it writes as usual.
    """

    def __init__(self, file: TextIO | None):
        self.file, self.dropped, self.dead = file, 0, file is None or getattr(file, "closed", False)
        self.encoding = getattr(file, "encoding", None) or "utf-8"
        self.fd: int | None = None
        self.own = False
        if not self.dead:
            with suppress(OSError, ValueError, AttributeError):  # a notebook or a test's capture has no descriptor
                self.fd = file.fileno()
                if self._ready():
                    file.flush()  # what was printed before comes first
                self._open_own()

    def write(self, text: str) -> int:
        if self.fd is None and not self.dead:
            self._attempt(lambda: (self.file.write(text), self.file.flush()))
            return len(text)
        raw = text.encode(self.encoding, "replace")
        while raw and not self.dead and self._ready() and (taken := self._attempt(os.write, self.fd, raw[:PIECE])):
            raw = raw[taken:]
        self.dropped += len(raw)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return not self.dead and bool(self._attempt(self.file.isatty))

    def fileno(self) -> int:
        if self.fd is None:
            raise OSError("no file descriptor")
        return self.fd

    def close(self) -> None:
        self.dead = True
        if self.own:
            os.close(self.fd)
            self.own = False

    def _open_own(self) -> None:
        kind = os.fstat(self.fd).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            self.fd, self.own = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), True

    def _ready(self) -> bool:
        if self.own or not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))

    def _attempt(self, call: Callable[..., Any], *args: Any) -> Any:
        """None when the stream takes nothing now, and for good when its reader left, its descriptor or its terminal is gone."""
        try:
            return call(*args)
        except BlockingIOError:
            return None
        except (OSError, ValueError, AttributeError):
            self.dead = True
            return None


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if math.isfinite(value) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
