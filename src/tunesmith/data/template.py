"""Chat templates rendered in a child process: jinja's immutable sandbox under a CPU and a memory limit.

A template comes with a checkpoint and is a program. It runs in a process of its own (template_child.py) that lives as long as the
sandbox and answers many jobs per round trip, as JSON over pipes. A render that takes more than its CPU time is killed by the
kernel, even inside C code; more memory fails there; no file can be opened. Where the platform has no such limits a wall clock
ends the child.
"""

from __future__ import annotations

import datetime
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from tunesmith.errors import TemplateError

CHILD = Path(__file__).with_name("template_child.py")
PER_TRIP = 256  # jobs a round trip
CHARACTERS_PER_TRIP = 1 << 20  # and text: 4 bytes a character and a few copies stay far below the memory limit
BOMBS = 3  # renders in a row that die before the template, not the row, is called broken


@dataclass(frozen=True, slots=True)
class Job:
    """Render `messages[:n]`, with or without the generation prompt, for each (n, generation_prompt) of `asked`.

    `blind`: the contents are sentinels; find out whether the template looks at what they stand for (`Texts.trimmed`).
    """

    messages: Sequence[Mapping[str, Any]]
    asked: Sequence[tuple[int, bool]]
    tools: Sequence[Mapping[str, Any]] = ()
    template: str = "default"
    blind: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a job has no text. `kind`: raised (by the template itself), fault, security, memory, time."""

    kind: str
    message: str

    @property
    def fix(self) -> str:
        return "set the token in tokenizer_config.json, or name another template" if "_token' is undefined" in self.message else ""

    def __str__(self) -> str:
        return f"the template says: {self.message}" if self.kind == "raised" else f"the template fails: {self.message}"


class Texts:
    """The texts of one job, in the order asked: the first whole, others as (length shared with the first, rest).

    `trimmed` is a str when the job was `blind` and the template does nothing with the contents but print them: whatever stands in
    their place is printed there too, without the white space around it for the sentinels named in `trimmed`. None: nobody knows.
    """

    __slots__ = ("_rows", "trimmed")

    def __init__(self, rows: list[Any], trimmed: str | None = None):
        self._rows, self.trimmed = rows, trimmed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: int) -> str:
        same, rest = self.shared(k)
        return self._rows[0][:same] + rest

    def shared(self, k: int) -> tuple[int, str]:
        """How much of the first text the k-th one begins with, and what follows there."""
        if k == 0:
            return len(self._rows[0]), ""
        same, rest = self._rows[k]
        return same, rest


class Sandbox:
    """Compiled templates in a child process.

    templates   {name: jinja text}; the child starts at the first use
    variables   what templates may read besides messages: bos_token, eos_token ...
    date        the day that `strftime_now` sees, for the whole run
    cpu         seconds of CPU time one render may take
    memory      bytes of address space of the whole child
    wall        seconds of wall-clock time one round trip may take; None: 600 where the CPU limit holds, else 20
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        *,
        date: datetime.date | None = None,
        cpu: float = 2.0,
        memory: int = 256 << 20,
        wall: float | None = None,
    ):
        day = date or datetime.date.today()
        self._first = {
            "templates": dict(templates),
            "variables": dict(variables or {}),
            "now": [day.year, day.month, day.day],
            "cpu": cpu,
            "memory": memory,
        }
        self._wall = wall if wall is not None else 20.0 if sys.platform == "win32" else 600.0
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked copy of this object must not share the pipe
        self._lock = threading.Lock()

    def render(self, jobs: Sequence[Job]) -> list[Texts | Fault]:
        """Texts of each job, in order. TemplateError if a template does not compile, or kills the child again and again."""
        answers: list[Texts | Fault] = []
        at = 0
        while at < len(jobs):
            end, size = at, 0
            while end < len(jobs) and end - at < PER_TRIP and (size == 0 or size < CHARACTERS_PER_TRIP):
                size += sum(len(m.get("content") or "") for m in jobs[end].messages) * len(jobs[end].asked) + 1
                end += 1
            answers += self._trip(jobs[at:end])
            at = end
        return answers

    def _trip(self, jobs: Sequence[Job]) -> list[Texts | Fault]:
        """One round trip; when the child dies, job by job to find whose fault it is."""
        wire = [[job.template, job.messages, list(job.tools) or None, job.asked, job.blind] for job in jobs]
        rows = self._ask(wire)
        if rows is not None:
            return [self._answer(row) for row in rows]
        answers: list[Texts | Fault] = []
        died = 0
        for one in wire:
            rows = self._ask([one])
            died = 0 if rows is not None else died + 1
            if died >= BOMBS:
                raise self._bomb(one[0])
            answers.append(self._answer(rows[0]) if rows is not None else Fault("time", self._limits()))
        if (
            died == len(jobs)
            and len(jobs) == 1
            and self._ask([[wire[0][0], [{"role": "user", "content": "Hi"}], None, [[1, False]], False]]) is None
        ):
            raise self._bomb(wire[0][0])  # it dies of one word too: the template, not the row
        return answers

    def _limits(self) -> str:
        return f"a render took more than {self._first['cpu']:g} s of CPU time or {self._first['memory'] >> 20} MB"

    def _bomb(self, name: str) -> TemplateError:
        return TemplateError(
            f"chat template {name!r}: {self._limits()}", "this template is broken or hostile: name another with data.template"
        )

    @staticmethod
    def _answer(row: Any) -> Texts | Fault:
        return Fault(row["error"], row["message"]) if isinstance(row, dict) else Texts(row[:-1], row[-1])

    def _ask(self, wire: list[Any]) -> list[Any] | None:
        """Send jobs, receive rows; None when the child died of them."""
        data = json.dumps(wire, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                self._start()
            return self._exchange(data)

    def _exchange(self, data: bytes) -> Any:
        child = self._child
        timer = threading.Timer(self._wall, child.kill)
        timer.daemon = True
        timer.start()
        try:
            child.stdin.write(struct.pack(">I", len(data)) + data)
            child.stdin.flush()
            head = child.stdout.read(4)
            if len(head) < 4:
                raise EOFError
            length = struct.unpack(">I", head)[0]
            body = child.stdout.read(length)
            if len(body) < length:
                raise EOFError
            return json.loads(body.decode("utf-8", "surrogatepass"))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._close()
            return None
        finally:
            timer.cancel()

    def _start(self) -> None:
        """Start the child and have it compile the templates."""
        jinja_home = str(Path(jinja2.__file__).resolve().parents[1])
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), jinja_home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k in ("SYSTEMROOT", "PATH", "LD_LIBRARY_PATH")},
        )
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child)
        reply = self._exchange(json.dumps(self._first).encode())
        if reply is None:
            raise TemplateError(
                f"the chat template could not be compiled in {self._first['cpu']:g} s and {self._first['memory'] >> 20} MB",
                "name another template with data.template",
            )
        if reply["errors"]:
            self._close()
            faults = "\n".join(f"chat template {name!r}: {fault}" for name, fault in reply["errors"].items())
            raise TemplateError(faults, "correct the template, or name another with data.template")

    def _close(self) -> None:
        if self._child is not None:
            _end(self._child)
            self._child = None

    def close(self) -> None:
        """End the child. The next render starts a fresh one. A forked copy leaves alone the child of the process it came from."""
        with self._lock:
            if self._owner == os.getpid():
                self._close()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        try:
            pipe.close()
        except BrokenPipeError:
            continue  # what was not yet written has no reader
    child.wait()
