"""Held-out rows: their loss and the model's answers, before, during and after. Memory does not grow with the set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tunesmith.data.pack import collate, micro_batches
from tunesmith.data.render import Renderer
from tunesmith.train.loss import batch_loss, per_document
from tunesmith.types import Conversation, Example


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


@torch.no_grad()
def losses(model: nn.Module, examples: Sequence[Example], *, micro_batch_tokens: int, device: torch.device) -> Losses:
    """The held-out loss, one micro-batch at a time."""
    was_training = model.training
    model.eval()
    total, trained = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    for part in micro_batches([len(examples[i].ids) for i in range(len(examples))], micro_batch_tokens):
        batch = collate([examples[i] for i in part])
        _, rows = batch_loss(model, batch, device)
        total[part], trained[part] = per_document(rows.double().cpu().numpy(), batch)
    model.train(was_training)
    return Losses(total, trained)


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out prompt: its row, the prompt as the model gets it and as a person reads it, and the answer that was written to it."""

    index: int
    ids: tuple[int, ...]
    shown: str
    gold: str


def questions(conversations: Iterable[Conversation], renderer: Renderer, count: int, *, longest: int) -> list[Asked]:
    """Up to `count` prompts of at most `longest` tokens, spread evenly over the held-out rows that end in an answer."""
    found = [
        Asked(index, tuple(q.ids), q.shown, q.gold)
        for index, c in enumerate(conversations)
        if (q := renderer.question(c)) is not None and 0 < len(q.ids) <= longest
    ]
    if len(found) <= count:
        return found
    return [found[int(i)] for i in np.linspace(0, len(found) - 1, count)] if count else []
