"""Adapters: what is trained on top of a frozen model. The faces other rooms use:

    attach(model, lora, seed=..., new_tokens=...) -> Settings    swaps each target for its adapted twin; everything else is frozen
    trainable(model) -> {PEFT's name: Parameter}                 what an optimiser moves and a checkpoint holds
    fast(model) -> [name], unmoved(model) -> [name]              the B matrices, for LoRA+; linears whose B is still zero
    with disabled(model): ...                                    the base model's answers
    save(model, folder, base_name=..., revision=...)             PEFT's files
    load(model, folder, trainable=False) -> Settings
    merge(model, dtype=None) -> model                            plain modules again

Works over any module with the face of models/linear.py, nn.Linear and transformers' Conv1D; it knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tunesmith.adapters.lora import METHODS, Dora, Lora, Twin
from tunesmith.adapters.merge import merge
from tunesmith.adapters.storage import copy_tensors, load, named, read_config, read_tensors, resolve, save, vocabulary_into_base
from tunesmith.adapters.swap import (
    PREFIX,
    Settings,
    at,
    grow_vocabulary,
    resolve_saved,
    resolve_targets,
    swap_in,
    transposed,
    twins,
    unmatched,
    vocabulary,
)
from tunesmith.config import schema
from tunesmith.errors import AdapterError

__all__ = ["METHODS", "Dora", "Lora", "Settings", "Twin", "attach", "disabled", "fast", "load", "merge", "named", "save",
           "token_starts", "trainable", "twins", "unmoved"]  # fmt: skip


Pieces = Mapping[int, Sequence[int] | None]  # id of a token whose row is trained -> ids of its pieces; None: it starts as it is


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    def token_to_id(self, token: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...


def token_starts(tokens: Sequence[str], tokenizer: Vocabulary, before: Vocabulary) -> dict[int, list[int] | None]:
    """For `attach`: each token's id in `tokenizer`, which has them all, and its pieces in the tokenizer as it was before they were
    added (None for one that was known there and keeps its row)."""
    ids = {token: tokenizer.token_to_id(token) for token in tokens}
    if missing := [token for token, index in ids.items() if index is None]:
        raise AdapterError(
            f"lora.new_tokens: the tokenizer lacks {', '.join(map(repr, missing))}", "add them to the tokenizer first"
        )
    return {i: before.encode(t) if before.token_to_id(t) is None else None for t, i in ids.items() if i is not None}


def attach(model: nn.Module, lora: schema.Lora, *, seed: int, new_tokens: Pieces | None = None) -> Settings:
    """Freezes `model` and puts trainable twins in the place of its targets.

    `new_tokens`, from `token_starts`, maps the id of each of `lora.new_tokens` to the ids of its pieces in the old vocabulary: its
    row starts as the mean of theirs, or of all rows where it has none. Embedding and projection grow to hold the ids. With
    `lora.continue_from`, that adapter's rank, alpha, targets and variant win and its tensors are the start. Raises AdapterError.
    """
    if twins(model):
        raise AdapterError("this model already has an adapter", "merge it first, or load the model again")
    new_tokens = dict(new_tokens or {})
    if twice := sorted({token for token in lora.new_tokens if lora.new_tokens.count(token) > 1}):
        raise AdapterError(f"lora.new_tokens: {', '.join(map(repr, twice))} twice", "name each token once")
    if (ids := len(new_tokens)) != (words := len(lora.new_tokens)):
        raise AdapterError(f"lora.new_tokens holds {words} tokens, {ids} ids were given", "add them to the tokenizer")
    earlier, tensors = None, {}
    if lora.continue_from != "none":
        tensors = read_tensors(Path(lora.continue_from))
        earlier = resolve(model, read_config(Path(lora.continue_from)))
        tensors = vocabulary_into_base(model, earlier, tensors)
        settings = _continued(model, earlier, lora, new_tokens)
    else:
        saved = resolve_saved(model, lora.modules_to_save)
        targets = resolve_targets(model, lora.targets, saved)
        settings = Settings(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            variant=lora.variant,
            targets=targets,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            modules_to_save=saved,
            tokens=_token_rows(model, new_tokens, saved),
            transposed=transposed(model, targets),
        )
        unmatched(targets, rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern)
    if settings.tokens:
        grow_vocabulary(model, max(i for ids in settings.tokens.values() for i in ids) + 1)
    starts = {name: _starts(at(model, name).weight, ids, new_tokens) for name, ids in settings.tokens.items()}
    swap_in(model, settings, seed=seed, starts=starts)
    if earlier is not None:
        added = {*settings.modules_to_save, *settings.tokens} - {*earlier.modules_to_save, *earlier.tokens}
        kept = {f"{PREFIX}{name}.{key}": p for name in added for key, p in twins(model)[name].tensors().items()}
        copy_tensors(model, {**kept, **tensors})
    return settings


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that take gradients, by PEFT's names."""
    return {name: parameter for name, parameter in named(model).items() if parameter.requires_grad}


def fast(model: nn.Module) -> list[str]:
    """The names of the B matrices, which LoRA+ (Hayou et al. 2024, arXiv 2402.12354) trains at a higher rate."""
    return [name for name in trainable(model) if name.endswith(".lora_B.weight")]


def unmoved(model: nn.Module) -> list[str]:
    """Names of the adapted linears whose B is still zero everywhere: no step has reached them."""
    return [name for name, twin in twins(model).items() if isinstance(twin, Lora) and not twin.lora_B.any()]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's answers while it lasts: no delta, no magnitudes, no trained rows or modules."""
    before = {name: twin.enabled for name, twin in twins(model).items()}
    try:
        for twin in twins(model).values():
            twin.enabled = False
        yield
    finally:
        for name, twin in twins(model).items():
            twin.enabled = before.get(name, True)


def _token_rows(model: nn.Module, new_tokens: Pieces, saved: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The modules whose rows `new_tokens` are trained: the embedding, and the projection where there is one."""
    if not new_tokens:
        return {}
    embedding, head = vocabulary(model)
    if embedding is None:
        raise AdapterError(
            "lora.new_tokens: this model's embedding is not found", "train without new tokens, or use a native family"
        )
    if both := [name for name in (embedding, head) if name in saved]:
        raise AdapterError(f"lora.new_tokens and lora.modules_to_save both train {', '.join(both)}", "drop one of the two")
    return {name: tuple(sorted(new_tokens)) for name in (embedding, head) if name is not None}


def _starts(weight: Tensor, ids: Sequence[int], pieces: Pieces) -> Tensor:
    """First values of the trained rows [K, D], at least float32: the mean of a new token's pieces (of all rows when it has none),
    else the row as it is."""
    weight, wide = weight.detach(), torch.promote_types(torch.float32, weight.dtype)

    def start(token: int) -> Tensor:
        parts = pieces.get(token)
        if parts is None:
            return weight[token].to(wide)
        return (weight[list(parts)] if parts else weight).to(wide).mean(0)

    return torch.stack([start(token) for token in ids])


def _continued(model: nn.Module, earlier: Settings, lora: schema.Lora, new_tokens: Pieces) -> Settings:
    """An earlier adapter's settings with what this run adds: its dropout, further modules to save, new tokens."""
    saved = tuple(dict.fromkeys([*earlier.modules_to_save, *resolve_saved(model, lora.modules_to_save)]))
    rows = _token_rows(model, new_tokens, saved)
    tokens = earlier.tokens or rows
    if trained := {i for ids in earlier.tokens.values() for i in ids}:
        ids = ", ".join(map(str, sorted(trained)))
        if not new_tokens:
            raise AdapterError(
                f"lora.continue_from: that adapter trains {len(trained)} tokens (ids {ids}), lora.new_tokens names none",
                "name the same tokens in lora.new_tokens: without them the text would be split as if they did not exist",
            )
        if trained != set(new_tokens):
            raise AdapterError(
                f"lora.new_tokens: ids {', '.join(map(str, sorted(new_tokens)))}; the adapter in lora.continue_from trains {ids}",
                "name the same tokens, in the same order",
            )
    return replace(earlier, dropout=lora.dropout, modules_to_save=saved, tokens=tokens)
