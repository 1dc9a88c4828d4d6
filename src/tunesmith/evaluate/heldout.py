"""Held-out rows: their loss and the model's answers, before, during and after. Memory does not grow with the set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from tunesmith.data.pack import collate, micro_batches
from tunesmith.data.render import Renderer
from tunesmith.generate import BATCH, stream
from tunesmith.train.loss import batch_loss, per_document
from tunesmith.types import Conversation, Example

T = TypeVar("T")
Check = Callable[[], None]


def _never() -> None: ...


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of each held-out example: `total` in nats [N] over its `trained` tokens [N]."""

    total: np.ndarray
    trained: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per trained token, every token weighing the same."""
        return float(self.total.sum() / self.trained.sum())

    @property
    def each(self) -> np.ndarray:
        """Nats per trained token of each example [N]."""
        return self.total / np.maximum(self.trained, 1)


def losses(
    model: nn.Module, examples: Sequence[Example], *, micro_batch_tokens: int, device: torch.device, check: Check = _never
) -> Losses:
    """The held-out loss, one micro-batch of at most `micro_batch_tokens` at a time (half as many after an out-of-memory).

    `check` is called before each; what it raises ends the evaluation.
    """

    def read(tokens_at_once: int) -> Losses:
        total, trained = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
        for part in micro_batches([len(e.ids) for e in examples], tokens_at_once):
            check()
            batch = collate([examples[i] for i in part])
            _, rows = batch_loss(model, batch, device)
            total[part], trained[part] = per_document(rows.cpu().double().numpy(), batch)
        return Losses(total, trained)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _within_memory(read, micro_batch_tokens)
    finally:
        model.train(was_training)


def answers(model: nn.Module, asked: Sequence[Asked], renderer: Renderer, *, tokens: int, check: Check = _never) -> list[str]:
    """The model's greedy answer to each prompt, of at most `tokens` tokens; fewer at once after an out-of-memory."""

    def write(at_once: int) -> list[str]:
        stop, found = renderer.stop_ids, [[] for _ in asked]
        for i, token in stream(model, [a.ids for a in asked], stop_ids=sorted(stop), max_tokens=tokens, batch=at_once):
            check()
            if token not in stop:
                found[i].append(token)
        return [renderer.tokenizer.decode(ids, skip_special=True).strip() for ids in found]

    return _within_memory(write, max(1, min(len(asked), BATCH)))


def _within_memory(work: Callable[[int], T], at_once: int) -> T:
    """`work(at_once)`, begun again with half as much each time the device runs out of memory; with 1 the error passes."""
    while True:
        try:
            return work(at_once)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        torch.cuda.empty_cache()
        at_once = max(1, at_once // 2)


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out prompt: its row, the prompt as the model gets it and as a person reads it, and the answer written to it."""

    index: int
    ids: tuple[int, ...]
    shown: str
    gold: str


def questions(conversations: Iterable[Conversation], renderer: Renderer, count: int, *, rows: int, longest: int) -> list[Asked]:
    """Up to `count` prompts of at most `longest` tokens, spread over the `rows` held-out rows; rows that end in no answer are left
    out. Only these prompts are rendered and kept."""
    found: list[Asked] = []
    for index, conversation in enumerate(conversations):
        if len(found) == count:
            break
        if index * count < len(found) * rows:
            continue
        question = renderer.question(conversation)
        if question is not None and 0 < len(question.ids) <= longest:
            found.append(Asked(index, tuple(question.ids), question.shown, question.gold))
    return found
