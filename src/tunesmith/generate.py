"""From prompt ids to answer ids: batched, cached, streamed.

A batch is one flat stream here too: prompts of different lengths are prefilled side by side without padding, then each live
sequence gets one token a step; a finished one leaves the batch. Draws are seeded per prompt, so an answer does not depend on its
neighbours.

Shape letters: N sequences, V vocabulary, K tokens that can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.ops.attention import Layout

BATCH = 32  # sequences at once: past this a 7B model's decode gains little and the cache grows


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: temperature, then the top_k likeliest, then the fewest of those that hold top_p of what is left,
    in transformers' order. Temperature 0 is greedy and ignores the rest. Raises ConfigError with every value that cannot be."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            faults.append(f"temperature is {self.temperature}: 0 is greedy, 0.7 varies a little, 1 is as trained")
        if self.top_k < 0:
            faults.append(f"top_k is {self.top_k}: 0 is all, else this many of the likeliest tokens")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p}: above 0, at most 1")
        if faults:
            raise ConfigError("\n".join(faults), "leave it out for the default")


def context(model: nn.Module) -> int | None:
    """Tokens that prompt and answer may have together; None where the model sets no end (ALiBi, state spaces)."""
    if model.spec is None:
        return model.context
    return model.spec.reach


def together(model: nn.Module, tokens: int) -> int:
    """How many sequences of `tokens`, prompt and answer, fill the device: 8 on a CPU; on a GPU what half of its free memory
    holds (keys and values, a prompt's widest layer, logits), at most 256; 32 where the model's shapes are not known."""
    if model.device.type != "cuda":
        return 8
    if model.spec is None:
        return BATCH
    s, width = model.spec, model.model.norm.weight.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    token = 2 * s.layers * s.kv_heads * s.head_dim * width + (3 * s.hidden + 4 * s.dim) * width
    return max(1, min(256, free // 2 // (tokens * token + s.vocab * (4 + width))))


@torch.no_grad()  # not inference_mode: some models of transformers keep tables between calls, and training must be able to use them
def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    batch: int = BATCH,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt index, token id) as tokens come, the stop token included.

    An answer ends at a stop token, after `max_tokens`, or where the model's context does. Raises DataError, before the first token,
    for every prompt that is empty or leaves no room in the context; ModelError where the model answers nan.
    """
    stop, device = set(stop_ids), model.device
    room = [min(max_tokens, r) for r in _room(model, prompts)] if max_tokens > 0 else []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(room), batch):
            live = list(range(start, min(start + batch, len(prompts))))
            draws = {i: torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in live}
            layout = Layout.of([len(prompts[i]) for i in live], device)
            cache = model.new_cache(len(live), max(len(prompts[i]) + room[i] for i in live))
            tokens = torch.tensor([t for i in live for t in prompts[i]], device=device)
            x = model.hidden(tokens, layout, rows=layout.cu_seqlens[1:].long() - 1, cache=cache)
            layout = Layout.of([1] * len(live), device)
            for step in range(1, max_tokens + 1):
                chosen = choose(model.logits(x), sampling, [draws[i] for i in live])
                yield from zip(live, chosen, strict=True)
                keep = [k for k, (i, t) in enumerate(zip(live, chosen, strict=True)) if t not in stop and step < room[i]]
                if not keep:
                    break
                if len(keep) < len(live):
                    live, chosen = [live[k] for k in keep], [chosen[k] for k in keep]
                    cache.keep(keep)
                    layout = Layout.of([1] * len(live), device)
                x = model.hidden(torch.tensor(chosen, device=device), layout, cache=cache)
    finally:
        model.train(was_training)


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int], max_tokens: int,
             sampling: Sampling = Sampling(), batch: int = BATCH) -> list[list[int]]:  # fmt: skip
    """The answers' ids, one list a prompt, without the stop token. Raises as `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    stop = set(stop_ids)
    for i, token in stream(model, prompts, stop_ids=stop_ids, max_tokens=max_tokens, sampling=sampling, batch=batch):
        if token not in stop:
            answers[i].append(token)
    return answers


def choose(logits_NV: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """One token a row: the likeliest, or drawn on the CPU, so that a seed means the same on every device."""
    if sampling.temperature == 0:
        best, ids = logits_NV.max(-1)  # the first of equals, as argmax
        values = best.tolist()
        if any(math.isnan(v) for v in values):
            raise ModelError(*_NAN)
        return ids.tolist()
    p_NK, ids_NK = distribution(logits_NV, sampling)
    if not p_NK.isfinite().all():
        raise ModelError(*_NAN)
    picked = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(p_NK, draws, strict=True)])
    return ids_NK.gather(-1, picked).squeeze(-1).tolist()


_NAN = "the model's answers are nan: its weights are damaged, or its numbers too large for this dtype", "use memory.dtype: fp32"


def distribution(logits_NV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(p_NK, ids_NK), likeliest first, on the CPU: what the next token is drawn from. Equals of the last of top_k stay in."""
    scores = logits_NV.to("cpu", torch.promote_types(logits_NV.dtype, torch.float32)) / sampling.temperature
    width = scores.shape[-1]
    if 0 < sampling.top_k < width:
        last = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < last, -math.inf)
        width = max(sampling.top_k, int((scores >= last).sum(-1).max()))
    scores, ids = scores.topk(width)  # sorted
    p = scores.softmax(-1)
    outside = p.cumsum(-1) - p >= sampling.top_p  # the token that crosses top_p stays in
    if sampling.top_p < 1:
        p = p.masked_fill(outside, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p, ids


def _room(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[int | float]:
    """How many tokens each answer may have."""
    limit = context(model)
    faults = [f"prompt {i + 1} has no token" for i, p in enumerate(prompts) if not len(p)]
    if limit is not None:
        long = [(i, len(p)) for i, p in enumerate(prompts) if len(p) >= limit]
        faults += [f"prompt {i + 1} has {n:,} tokens, and the model's context holds {limit:,} with the answer" for i, n in long]
    if faults:
        shown = faults[:8] + [f"and {len(faults) - 8} more"] * (len(faults) > 8)
        raise DataError("\n".join(shown), "shorten the prompt" if limit is not None else "write something in it")
    return [math.inf if limit is None else limit - len(p) for p in prompts]
