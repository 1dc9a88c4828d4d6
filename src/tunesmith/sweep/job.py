"""One training run in a process of its own: started, followed through its run folder, stopped so that it saves, made small.

A run that another process still writes (the sweep before this one was killed, its training was not) is followed, not begun again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import RunError
from tunesmith.files import remove_folder
from tunesmith.run import Run

TRAIN = (sys.executable, "-m", "tunesmith.cli", "train")
SAID = 600  # characters of a log's end that are told of a run that died without a word


@dataclass(frozen=True)
class End:
    """How a run ended. `stopped`: on our request, all saved. `loss` is the held-out loss of the weights it ended with."""

    how: Literal["finished", "failed", "stopped"]
    loss: float = math.nan
    tokens: int = 0  # held-out tokens that the loss is taken over
    seconds: float = 0.0
    reason: str = ""


class Job:
    """`folder` becomes the run folder; what the process prints goes into `log`. `command`: arguments of `tunesmith train`."""

    def __init__(self, folder: Path, log: Path, command: Sequence[str], env: dict[str, str]):
        self.folder, self.log, self.command, self.env = folder, log, command, env
        self.run = Run(folder)
        self.process: subprocess.Popen[bytes] | None = None
        self.asked_to_stop = False
        self._at, self._rest = 0, b""

    @property
    def state(self) -> str:
        return self.run.status().state if (self.folder / "run.yaml").exists() else "none"

    def start(self) -> None:
        """Begin, go on from the newest checkpoint, or follow who writes it already. Ended runs stay as they are."""
        if self.state in ("finished", "failed", "preparing", "running"):
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if self.state != "none" else []
        line = [*TRAIN, *self.command, *resume]
        with self.log.open("ab") as out:  # in a session of its own: Ctrl-C reaches the sweep, which stops its runs in order
            self.process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )

    def stop(self) -> None:
        """Ask it to save and stop within a step; `end` says when it has."""
        self.asked_to_stop = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(number)
        elif self.state in ("preparing", "running"):  # another's child: its folder knows its pid
            with suppress(ProcessLookupError):
                os.kill(self.run.status().pid, number)

    def evaluations(self) -> list[tuple[int, float]]:
        """(step, held-out loss) that came since the last call."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as f:
                f.seek(self._at)
                raw = f.read()
        except OSError:
            return []
        self._at += len(raw)
        *lines, self._rest = (self._rest + raw).split(b"\n")
        rows = [json.loads(line) for line in lines if b'"kind": "eval"' in line]
        return [(row["step"], float(row["loss"])) for row in rows]  # float reads 'nan' too

    def end(self) -> End | None:
        """None while it runs."""
        if self.process is not None:
            if self.process.poll() is None:
                return None
            if not (self.folder / "run.yaml").exists():
                return End("stopped") if self.asked_to_stop else End("failed", reason=self._last_words())
        status = self.run.status()
        match status.state:
            case "preparing" | "running":
                return None
            case "finished":
                return self._result()
            case "interrupted" | "stopped" if self.asked_to_stop:
                return End("stopped")
            case "stopped":
                code = self.process.returncode if self.process else 0
                how = f"its process was ended by signal {-code}" if code < 0 else self._last_words()
                return End("failed", reason=how + (" (main memory may have run out)" if code == -signal.SIGKILL.value else ""))
        return End("failed", reason=status.message.partition("\nfix:")[0] or self._last_words())

    def _result(self) -> End:
        try:
            after = json.loads((self.folder / "comparison.json").read_text("utf-8"))["loss"]["after"]
            tokens = next(row["tokens"] for row in reversed(self.run.metrics()) if row["kind"] == "eval")
            seconds = float(self.run.manifest.get("seconds") or 0)
        except (OSError, ValueError, KeyError, StopIteration, RunError):
            return End("failed", reason="it ended without a held-out loss")
        if after is None:
            return End("failed", reason="its held-out loss is not finite")
        return End("finished", float(after), int(tokens), seconds)

    def _last_words(self) -> str:
        """The error in its log, or the log's last line."""
        try:
            lines = self.log.read_text("utf-8", "replace")[-4000:].splitlines()
        except OSError:
            lines = []
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (" ".join(errors) or next((line for line in reversed(lines) if line.strip()), "it died without a word"))[-SAID:]

    def make_small(self, *, keep_one: bool) -> None:
        """Remove checkpoints that nobody goes on from; with `keep_one` the newest stays, so that the run can be resumed."""
        found: list[Any] = sorted(self.run.checkpoints.glob("step-*"))
        for path in found[:-1] if keep_one else found:
            remove_folder(path)
