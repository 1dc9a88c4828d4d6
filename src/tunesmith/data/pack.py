"""Examples to batches without padding: optimiser steps, the micro-batches inside them, and one flat stream each.

An epoch takes ceil(examples / batch_size) steps whose sizes differ by at most one; none is dropped or drawn twice. 609 examples by
16 are 39 steps of 15 or 16, not 38 of 16 and one of 1, whose single row would weigh as much as sixteen others. The loss of a step
is its sum over trained tokens divided by the step's trained tokens, so the number of micro-batches does not change it.
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
    count = -(-len(order) // batch_size)
    return [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]


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
    if not examples:
        none = np.zeros(0, np.int64)
        return Batch(none, none, np.zeros(1, np.int32), none, none)
    ids_T, learn_T = np.concatenate([e.ids for e in examples]), np.concatenate([e.learn for e in examples])
    lengths_N = np.fromiter((len(e.ids) for e in examples), np.int64, len(examples))
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    targets_L = np.flatnonzero(learn_T)
    beyond_N = np.searchsorted(targets_L, ends_N)  # of each document's targets, the one behind its last
    for e, first, beyond in zip(examples, np.searchsorted(targets_L, starts_N).tolist(), beyond_N.tolist(), strict=True):
        assert first < beyond, f"{e.origin}: an example without a trained token reached a batch"
        assert not e.learn[0], f"{e.origin}: nothing predicts the first token"
    keep_N = targets_L[beyond_N - 1] - starts_N  # tokens before the last target
    place_T = np.arange(len(ids_T)) - np.repeat(starts_N, lengths_N)
    kept_T = place_T < np.repeat(keep_N, lengths_N)
    bounds = np.concatenate([[0], np.cumsum(keep_N)])
    shift_N = starts_N - bounds[:-1]  # by how much a document moves forward, since the ends of those before it are left out
    return Batch(
        tokens=ids_T[kept_T].astype(np.int64),
        positions=place_T[kept_T],
        cu_seqlens=bounds.astype(np.int32),
        rows=targets_L - 1 - np.repeat(shift_N, np.diff(beyond_N, prepend=0)),
        labels=ids_T[targets_L].astype(np.int64),
        origins=tuple(e.origin for e in examples),
    )
