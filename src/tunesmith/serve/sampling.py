"""The next token of each row, on the rows' own device, each by its own settings and its own draw.

A draw is a number in [0, 1) from (seed, which answer, which token), so an answer does not depend on its neighbours, on when it was
asked or on whether it was computed twice. It picks from the distribution's running sum (ops/nucleus.py). Temperature, top_k and
top_p mean what they mean in generate.py.

Shape letters: L rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.ops import nucleus
from tunesmith.ops.attention import to_device
from tunesmith.serve.job import Job

MOST = 20  # likeliest tokens that can be told
COLDEST = 1e-5  # below this temperature the likeliest token has it all, and scores divided by it would overflow


def draw(seed: int, index: int, position: int) -> float:
    """Uniform in [0, 1): 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}:{index}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Row:
    """A row's job, how many tokens it has, and what its grammar allows now (bool [V], or None)."""

    job: Job
    made: int
    allowed: Tensor | None = None


@dataclass(slots=True)
class Drawn:
    """Tokens [L] int64 on the device; on the host, once `wait` is over: `ids`, and for rows that want it ln p and the likeliest."""

    tokens_L: Tensor
    largest_L: Tensor
    logprob_L: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None  # ln p and ids [L, MOST]
    event: object = None

    def to_host(self) -> Drawn:
        """Begin the copies; what they bring may be read after `wait`."""
        if not self.tokens_L.is_cuda:
            return self
        copies = [None if x is None else _to_host(x) for x in (self.tokens_L, self.largest_L, self.logprob_L)]
        top = None if self.top is None else tuple(_to_host(x) for x in self.top)
        return Drawn(*copies, top, _mark())

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


def nothing(device: torch.device) -> Drawn:
    """No token, of a step that can be waited for all the same."""
    empty = torch.empty(0, dtype=torch.int64)
    return Drawn(empty, empty, event=_mark() if device.type == "cuda" else None)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def _to_host(x: Tensor) -> Tensor:
    """Into pinned memory: a copy to any other waits for what the card has queued."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def sample(logits_LV: Tensor, rows: Sequence[Row]) -> Drawn:
    """One token a row. A row whose scores are nan shows as a `largest` that is not finite."""
    logits_LV = _adjusted(logits_LV, rows)
    largest, tokens = logits_LV.max(-1)
    random = [i for i, row in enumerate(rows) if row.job.temperature > COLDEST]
    if random:
        device = logits_LV.device
        at = to_device(torch.tensor(random), device)
        picked = _pick(logits_LV if len(random) == len(rows) else logits_LV[at], [rows[i] for i in random])
        tokens = picked if len(random) == len(rows) else tokens.index_copy(0, at, picked)
    drawn = Drawn(tokens, largest)
    if any(row.job.logprobs is not None for row in rows):
        scores = logits_LV.float().log_softmax(-1)
        drawn.logprob_L = scores.gather(-1, tokens[:, None])[:, 0]
        if most := max(row.job.logprobs or 0 for row in rows):
            drawn.top = tuple(scores.topk(min(most, scores.shape[-1])))
    return drawn


def _adjusted(logits_LV: Tensor, rows: Sequence[Row]) -> Tensor:
    changed = [i for i, row in enumerate(rows) if row.allowed is not None or row.job.bias]
    if not changed:
        return logits_LV
    logits_LV = logits_LV.clone()
    for i in changed:
        if rows[i].job.bias:
            ids = to_device(torch.tensor(list(rows[i].job.bias)), logits_LV.device)
            logits_LV[i, ids] += to_device(torch.tensor(list(rows[i].job.bias.values()), dtype=logits_LV.dtype), logits_LV.device)
        if (allowed := rows[i].allowed) is not None:
            hidden = torch.ones(logits_LV.shape[-1], dtype=torch.bool)
            hidden[: len(allowed)] = ~allowed[: len(hidden)]
            logits_LV[i].masked_fill_(to_device(hidden, logits_LV.device), -math.inf)
    return logits_LV


def _pick(logits_LV: Tensor, rows: Sequence[Row]) -> Tensor:
    """ids [L], each drawn from its row's distribution."""
    device = logits_LV.device

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), device)[:, None]

    scores = logits_LV.float() / column([row.job.temperature for row in rows], torch.float32)
    draws = column([draw(row.job.seed, row.job.index, row.made) for row in rows], torch.float64)[:, 0]
    if most := min(max(row.job.top_k for row in rows), scores.shape[-1]):
        keep = column([row.job.top_k or scores.shape[-1] for row in rows], torch.int64)  # more than `most`: all
        last = scores.topk(most).values.gather(-1, keep.clamp(max=most) - 1)
        scores = scores.masked_fill((scores < last) & (keep <= most), -math.inf)  # equals of the last stay in
    p = scores.softmax(-1)
    cut = [i for i, row in enumerate(rows) if row.job.top_p < 1]
    if not cut:
        return nucleus.inverse(p, draws)
    at = to_device(torch.tensor(cut), device)
    picked = nucleus.pick(p if len(cut) == len(rows) else p[at], [rows[i].job.top_p for i in cut], draws[at])
    return picked if len(cut) == len(rows) else nucleus.inverse(p, draws).index_copy(0, at, picked)
