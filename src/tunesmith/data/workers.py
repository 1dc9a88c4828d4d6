"""Chunks of rows worked through in several processes, their results in the chunks' order (see prepare.py).

What stands in the parent when workers start is inherited where they can be forked; elsewhere each makes its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, util
from typing import Any

from tunesmith.data.sources import Chunk
from tunesmith.errors import DataError

INLINE_ROWS = 500  # rows prepared here before workers are started: a forked one begins with what these taught the tokenizer
BYTES_A_WORKER = {"fork": 1 << 20, "spawn": 4 << 20}  # `workers: auto`: files for each, that it is worth its start (0.2 or 1-3 s)
MAX_WORKERS = 16

_worker: Any = None
_work_of: Callable[[Chunk, Any], Any] | None = None


def _start_worker(make: Callable[[], Any], process: Callable[[Chunk, Any], Any]) -> None:
    global _worker, _work_of
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has its parent's handlers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    gc.disable()  # see no_collector
    _worker, _work_of = make(), process
    util.Finalize(None, _worker.close, exitpriority=0)  # a forked process runs no atexit; its template process must not outlive it


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; they would wait for rows for ever and keep open what they inherited."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(chunk: Chunk) -> Any:
    assert _work_of is not None, "a worker has nothing to work with"
    return _work_of(chunk, _worker)


def _start_method() -> str:
    """How workers start: `fork` where that is safe, else `spawn`.

    A forked worker has the tokenizer and its memory of words already, which cost a spawned one 1 to 3 s. But a fork copies locks
    that other threads hold, so it needs a process with no other Python thread (threads of libraries hold none that a worker
    takes), and on macOS the system's own libraries do not survive it.
    """
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"


@contextmanager
def _one_thread_in_tokenizers() -> Iterator[None]:
    """Else a forked worker says on stderr that it turned the threads off."""
    was = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if was is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = was


@contextmanager
def no_collector() -> Iterator[None]:
    """Rows make millions of small objects and no cycles; looking for cycles among them costs 6 % of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _without_main() -> Iterator[None]:
    """A spawned process imports the caller's script again, and a script that calls `train` at its top level would train there too.
    Workers need nothing of it, so while they start, there is no script.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def worker_count(wanted: int | str, size: int) -> int:
    if wanted != "auto":
        return max(1, int(wanted))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, MAX_WORKERS, size // BYTES_A_WORKER[_start_method()]))


Tagged = tuple[int, Chunk]


def results(
    chunks: Iterator[Tagged], tool: Any, make_tool: Callable[[], Any], workers: int, process: Callable[[Chunk, Any], Any]
) -> Iterator[tuple[int, Chunk, Any]]:
    """`process(chunk, tool)` of each chunk, in the chunks' order. INLINE_ROWS rows are done here, the rest by workers if there are
    any: each makes its own `tool` (a renderer; anything with `close()`) where it cannot inherit this one."""
    done = 0
    for source, chunk in chunks:
        yield source, chunk, process(chunk, tool)
        done += len(chunk.lines)
        if done >= INLINE_ROWS and workers > 1:
            break
    else:
        return
    waiting: deque[tuple[int, Chunk, Future[Any]]] = deque()
    method = _start_method()
    make = (lambda: tool) if method == "fork" else make_tool
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (make, process))
    try:
        for source, chunk in chunks:
            with _one_thread_in_tokenizers(), _without_main():  # any of the first calls may start a process
                waiting.append((source, chunk, pool.submit(_work, chunk)))
            if len(waiting) > 3 * workers:  # so that the reader does not run ahead of the workers
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool:
        raise DataError("a process that prepares data has died (it may have run out of memory)", "set data.workers: 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[int, Chunk, Future[Any]]]) -> tuple[int, Chunk, Any]:
    source, chunk, future = waiting.popleft()
    return source, Chunk(chunk.file, chunk.raw, [], [], chunk.position), future.result()
