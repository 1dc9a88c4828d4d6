"""The programs that exports are for, each in a process of its own: load the artefact, say what it computes, end.

    python -m tunesmith.export.runtimes.NAME JOB.json RESULT.npz

A runtime imports nothing of the house but this file: what it says must be its own. The job (JSON):

    artefact, adapter, base, nf4     what to load: a folder or file, and for an adapter what it lies over
    rows [N][T], positions [N][]     token ids, and after which of them the next token's distribution is wanted
    top                              how many of its likeliest tokens are given
    asked [M]                        {messages, tools} to render with the artefact's own template and generation prompt, or {text}
    prompts [M][T], max_tokens       token ids to answer greedily, ended by what the artefact itself says ends an answer

The result: `ids` and `logp` [positions, top], likeliest first, in natural logarithms, and `facts`, JSON:

    rendered [M]                     ids, or null where it refuses the conversation
    answers [M], texts [M], ended    ids without the stop token, the text, whether a stop token ended it
    template, bos, eos, stops, adds_bos, runtime, notes
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Answer = tuple[np.ndarray, np.ndarray, dict[str, Any]]  # ids, logp, facts


def main(answer: Callable[[dict[str, Any]], Answer]) -> None:
    """Reads the job that the command line names and writes the result beside it, whole or not at all."""
    job, result = Path(sys.argv[1]), Path(sys.argv[2])
    ids, logp, facts = answer(json.loads(job.read_text("utf-8")))
    part = result.with_suffix(".part.npz")
    np.savez(part, ids=ids.astype(np.int32), logp=logp.astype(np.float32), facts=np.array(json.dumps(facts)))
    part.rename(result)
