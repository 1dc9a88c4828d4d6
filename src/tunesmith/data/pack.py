"""Examples to batches without padding: optimiser steps, the micro-batches inside them, and one flat stream each.

A step holds `batch_size` examples; the last one of an epoch holds what is left (1 to batch_size), none is dropped or drawn twice.
The loss of a step is its sum over trained tokens divided by the step's trained tokens, so neither the ragged tail nor the number
of micro-batches changes what a step means.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from tunesmith.types import Batch, Example

Step = list[list[int]]  # micro-batches, each a list of example indices


def steps(order: Sequence[int] | np.ndarray, batch_size: int) -> list[list[int]]:
    """An epoch's shuffled examples -> the examples of each optimiser step."""
    order = [int(i) for i in order]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def plan_epoch(order: Sequence[int] | np.ndarray, lengths: np.ndarray, batch_size: int, micro_batch_tokens: int) -> list[Step]:
    """An epoch's shuffled examples -> optimiser steps, each a list of micro-batches of at most `micro_batch_tokens` tokens."""
    return [
        [[step[j] for j in part] for part in micro_batches(lengths[step].tolist(), micro_batch_tokens)]
        for step in steps(order, batch_size)
    ]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions 0..len-1 in groups of at most `budget` tokens; a longer example goes alone. Deterministic.

    Best-fit decreasing: the longest first, each into the fullest group that has room (at most 11/9 of the best possible, n log n).
    Inside a group the given order is kept.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, group = room.pop(at)
            groups[group].append(i)
        else:
            left, group = budget, len(groups)
            groups.append([i])
        if left > lengths[i]:
            insort(room, (left - lengths[i], group))
    return [sorted(g) for g in groups]


def collate(examples: Sequence[Example]) -> Batch:
    """One flat stream. Every example must have a trained token.

    Token t is predicted from t - 1, so a document's last trained token and all behind it teach nothing as inputs: they are left
    out, which changes neither loss nor gradient.
    """
    tokens, positions, rows, labels, bounds = [], [], [], [], [0]
    for e in examples:
        targets = np.flatnonzero(e.learn)
        assert len(targets), f"{e.origin}: an example without a trained token reached a batch"
        assert targets[0] > 0, f"{e.origin}: nothing predicts the first token"
        keep = int(targets[-1])
        tokens.append(e.ids[:keep])
        positions.append(np.arange(keep))
        rows.append(targets - 1 + bounds[-1])
        labels.append(e.ids[targets])
        bounds.append(bounds[-1] + keep)
    return Batch(
        tokens=_flat(tokens),
        positions=_flat(positions),
        cu_seqlens=np.array(bounds, np.int32),
        rows=_flat(rows),
        labels=_flat(labels),
        origins=tuple(e.origin for e in examples),
    )


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
