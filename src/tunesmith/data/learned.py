"""What will be trained, in numbers: tokens by source, steps, lengths, what a shorter `max_length` would cut, how well steps pack.

Read from the store's index, and from the bits that say which token is trained; no row is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.config.schema import Train
from tunesmith.data.pack import plan_epoch
from tunesmith.data.prepare import Prepared

LIMITS = (512, 1024, 2048, 4096, 8192)  # lengths for which the report says what they would cut
AT_ONCE = 8192  # tokens at once where only the plan knows how many fit
PACKED_ROWS = 8192  # examples of the first epoch that are packed to see how full the micro-batches are: some 0.05 s


@dataclass(frozen=True)
class Share:
    """One training source; held-out rows are left out. `share`: of the trained tokens of an epoch, its weight counted."""

    path: str
    weight: float
    examples: int
    tokens: int
    trained: int
    share: float


@dataclass(frozen=True)
class Cut:
    """What cutting at `limit` tokens would lose. Rows refused for their length count, but in `trained`: theirs is not known."""

    limit: int
    rows: int
    answers: int  # examples that lose at least one trained token; a refused row counts as one
    tokens: int
    trained: int


@dataclass(frozen=True)
class Packing:
    """How the first steps of the first epoch lie in micro-batches of at most `at_once` tokens."""

    at_once: int
    parts: float  # micro-batches a step
    filled: float  # of `at_once`
    padding: float  # share of the tokens that would be padding, were each step's examples padded to the longest of them


@dataclass(frozen=True)
class Learned:
    shares: tuple[Share, ...]
    steps: int
    epochs: float
    epoch_size: int  # examples
    batch_size: int
    cuts: tuple[Cut, ...]  # to the first limit that cuts nothing; none where rows are cut into windows anyway
    windows: bool  # some rows are raw text, which is cut into windows of max_length: there a shorter one loses nothing
    packing: Packing | None  # None when there is no row to train on


def learned(prepared: Prepared, train: Train, seed: int, at_once: int | str) -> Learned:
    """`at_once` is memory.micro_batch_tokens: a number or `auto`."""
    size = prepared.epoch_size
    per_epoch = -(-size // train.batch_size)
    steps = train.steps(size) if size else 0
    formats = {name for s in prepared.account.sources for name in s.formats}
    return Learned(
        shares=_shares(prepared),
        steps=steps,
        epochs=steps / per_epoch if size and train.max_steps else train.epochs,
        epoch_size=size,
        batch_size=train.batch_size,
        cuts=_cuts(prepared) if formats - {"text"} else (),
        windows="text" in formats,
        packing=_packing(prepared, train.batch_size, seed, AT_ONCE if isinstance(at_once, str) else at_once) if size else None,
    )


def bins(lengths: np.ndarray, overlong: Sequence[int]) -> list[tuple[int, int, int]]:
    """(longest, examples, rows refused for their length) by doubling lengths, from the first that holds any to the last."""
    longest = max(int(lengths.max(initial=0)), max(overlong, default=0))
    edges = [0, *(2**k for k in range(4, 40) if 2**k < max(2 * longest, 17))]  # at least one bin
    counts = [np.histogram(values, np.array(edges) + 1)[0].tolist() for values in (lengths, np.array(overlong, np.int64))]
    first = next((i for i, pair in enumerate(zip(*counts, strict=True)) if any(pair)), 0)
    return list(zip(edges[1:], *counts, strict=True))[first:]


def _shares(prepared: Prepared) -> tuple[Share, ...]:
    train, weights = prepared.train, prepared.weights
    source, count = train.column("source"), len(weights)
    examples = np.bincount(source, minlength=count).tolist()
    tokens, trained = (np.bincount(source, n, minlength=count).astype(int).tolist() for n in (train.lengths, train.trained))
    whole = sum(w * n for w, n in zip(weights, trained, strict=True)) or 1
    paths = [s.path for s in prepared.account.sources if not s.held_out]
    return tuple(
        Share(path, weight, n, size, learn, weight * learn / whole)
        for path, weight, n, size, learn in zip(paths, weights, examples, tokens, trained, strict=True)
    )


def _cuts(prepared: Prepared) -> tuple[Cut, ...]:
    """Held-out rows count too, as in the lengths: they are cut in the same way."""
    data, overlong = prepared.data, np.array(prepared.account.overlong, np.int64)
    stores = [s for s in (prepared.train, prepared.held_out) if len(s)]
    cuts = []
    for limit in LIMITS:
        if data.overlength == "truncate" and limit >= data.max_length:
            break  # rows that were cut there no longer tell their length
        rows, answers, tokens, trained = (overlong > limit).sum(), (overlong > limit).sum(), 0, 0
        tokens = (overlong[overlong > limit] - limit).sum()
        for store in stores:
            lengths = store.lengths
            rows += len(np.unique(store.column("row")[lengths > limit]))
            answers += (store.column("last") >= limit).sum()
            tokens += (lengths[lengths > limit] - limit).sum()
            trained += store.trained_from(limit)
        cuts.append(Cut(limit, *(int(n) for n in (rows, answers, tokens, trained))))
        if not rows:
            break
    return tuple(cuts)


def _packing(prepared: Prepared, batch_size: int, seed: int, at_once: int) -> Packing:
    lengths = prepared.train.lengths
    steps = plan_epoch(prepared.epoch(seed, 0)[: max(PACKED_ROWS, batch_size)], lengths, batch_size, at_once)
    parts = [lengths[part].sum() for step in steps for part in step]
    rows = [lengths[np.concatenate(step)] for step in steps]
    tokens, padded = sum(parts), sum(len(r) * r.max() for r in rows)
    return Packing(
        at_once=at_once,
        parts=len(parts) / len(steps),
        filled=float(tokens / sum(max(p, at_once) for p in parts)),  # a longer example goes alone
        padding=float(1 - tokens / padded),
    )
