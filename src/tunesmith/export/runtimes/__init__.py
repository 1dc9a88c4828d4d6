"""The programs that exports are for, each in a process of its own: load the artefact, say what it computes, end.

    python -m tunesmith.export.runtimes.NAME JOB.json RESULT.npz

A runtime imports nothing of the house but this file: what it says must be its own. The job (JSON):

    artefact, adapter, base, nf4     what to load: a folder or file, and for an adapter what it lies over
    dtype, max_lora_rank             in which numbers, where the artefact does not say; the widest adapter (vLLM)
    rows [N][T], positions [N][]     token ids, and after which of them the next token's distribution is wanted
    top                              how many of its likeliest tokens are given
    asked [M]                        {messages, tools} to render with the artefact's own template and generation prompt, or {text}
    prompts [M][T], max_tokens       token ids to answer greedily, ended by what the artefact itself says ends an answer

The result: `ids` and `logp` [positions, top], likeliest first, in natural logarithms, and `facts`, JSON:

    rendered [M]                     ids, or null where it refuses the conversation
    answers [M], texts [M], ended    ids without the stop token, the text, whether a stop token ended it
    template, bos, eos, stops, adds_bos, runtime, notes

While it works `progress`, beside the result, says how many of how many positions and answers are done. It ends by itself, and takes
the job with it, once the process that asked is gone: standard input is a pipe that nobody writes to.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

Answer = tuple[np.ndarray, np.ndarray, dict[str, Any]]  # ids, logp, facts
Told = Callable[[int], None]  # so many more positions or answers are done
PROGRESS = "progress"
NOT_HERE = 75  # exit code, EX_TEMPFAIL of sysexits.h


class NotHere(Exception):
    """The program cannot run on this machine, or has no room on it: nothing is said of the artefact."""


def main(answer: Callable[[dict[str, Any], Told], Answer]) -> None:
    """Reads the job that the command line names and writes the result beside it, whole or not at all."""
    file, result = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_leave_with_the_asker, args=(file.parent,), daemon=True).start()
    job = json.loads(file.read_text("utf-8"))
    done, total = 0, sum(map(len, job["positions"])) + len(job["prompts"])

    def told(more: int) -> None:
        nonlocal done
        done += more
        part = file.with_name(f"{PROGRESS}.part")
        with suppress(OSError):  # on Windows it may be open for reading
            part.write_text(f"{done} {total}")
            part.replace(file.with_name(PROGRESS))

    told(0)
    try:
        ids, logp, facts = answer(job, told)
    except NotHere as fault:
        print(fault, file=sys.stderr, flush=True)
        sys.exit(NOT_HERE)
    part = result.with_suffix(".part.npz")
    np.savez(part, ids=ids.astype(np.int32), logp=logp.astype(np.float32), facts=np.array(json.dumps(facts)))
    part.rename(result)


def _leave_with_the_asker(folder: Path) -> None:
    """However the asker ends, its end of the pipe closes. The job quotes a person's rows: it does not stay in /tmp."""
    with suppress(OSError):
        while os.read(0, 1):  # not sys.stdin: a thread that waits in it stops Python from ending
            pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
