"""From a batch to its loss: the one path that training, held-out evaluation and comparison share.

The loss of a step is the sum over its trained tokens divided by their number, so how the examples are split into micro-batches
changes nothing but the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.ops.attention import Layout, to_device
from tunesmith.ops.linear_ce import LOGIT_BYTES, linear_cross_entropy
from tunesmith.types import Batch

Noise = Callable[[Tensor], Tensor]


def batch_loss(model: nn.Module, batch: Batch, device: torch.device, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """(sum over trained tokens in nats, differentiable scalar; each labelled row's loss, detached [L])."""
    layout = Layout.of(np.diff(batch.cu_seqlens).tolist(), device)
    rows, labels = (to_device(torch.from_numpy(a), device) for a in (batch.rows, batch.labels))
    tokens = to_device(torch.from_numpy(batch.tokens), model.embedding_device)
    x_LD = model.hidden(tokens, layout, rows=rows, noise=noise)
    if head := model.plain_head():
        weight, softcap = head
        return linear_cross_entropy(x_LD, weight, labels, softcap=softcap)
    return _any_head(model, x_LD, labels)


def _any_head(model: nn.Module, x_LD: Tensor, labels_L: Tensor) -> tuple[Tensor, Tensor]:
    """A head with an adapter, a bias or trained rows: autograd's own path, its logits recomputed chunk by chunk."""

    def part(x: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")

    chunk = max(1, LOGIT_BYTES // (4 * model.vocab))
    pieces = zip(x_LD.split(chunk), labels_L.split(chunk), strict=True)
    if torch.is_grad_enabled():
        rows_L = torch.cat([checkpoint(part, x, labels, use_reentrant=False) for x, labels in pieces])
    else:
        rows_L = torch.cat([part(x, labels) for x, labels in pieces])
    return rows_L.sum(), rows_L.detach()


def per_document(rows_L: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Sum of losses and count of trained tokens of each document in the batch, [N] each."""
    document = np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1
    n = len(batch.cu_seqlens) - 1
    return np.bincount(document, rows_L, n), np.bincount(document, minlength=n)


def draw(*numbers: int) -> int:
    """A seed that follows from these numbers alone; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def neftune(alpha: float, batch: Batch, seeds: Sequence[int]) -> Noise | None:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise within alpha / sqrt(tokens x width) on the embeddings of each
    document; None for alpha 0. One seed a document, so that its noise does not depend on what it is packed with.
    """
    if not alpha:
        return None
    lengths = np.diff(batch.cu_seqlens).tolist()

    def add(x_TD: Tensor) -> Tensor:
        generator, width = torch.Generator(x_TD.device), x_TD.shape[-1]
        parts = []
        for seed, tokens in zip(seeds, lengths, strict=True):
            uniform = torch.rand(tokens, width, generator=generator.manual_seed(seed), device=x_TD.device)
            parts.append((uniform * 2 - 1) * (alpha / (tokens * width) ** 0.5))
        return x_TD + torch.cat(parts).to(x_TD.dtype)

    return add
