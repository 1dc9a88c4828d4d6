"""Signals as a flag: the first one asks the loop to save and stop within a step, the second one stops at once.

with graceful() as stop:
    for batch in batches:
        train(batch)
        if stop.requested:  # 'SIGINT' | 'SIGTERM' | 'SIGHUP' (SIGBREAK on Windows)
            save(); break
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # those this system has


@dataclass
class Stop:
    """`requested` is the name of the first signal that came, None before."""

    requested: str | None = None


@contextmanager
def graceful() -> Iterator[Stop]:
    """Catch the stop signals for the duration. Outside the main thread Python delivers none: the flag then stays None.

    A signal that is ignored on entry stays ignored (nohup, background jobs). A forked child does not inherit the patience: it dies
    of its first signal as if nothing were installed.
    """
    stop, owner, former = Stop(), os.getpid(), {}

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif stop.requested:
            raise KeyboardInterrupt
        else:
            stop.requested = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: installed by C code, cannot be put back
                former[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
