"""Folds an adapter into its model: the twins go, plain modules stay, and the result is a checkpoint like any other.

W + scale B A (or DoRA's, the trained rows, the modules trained whole) is computed in float32 and rounded once to the store's dtype.
An NF4 base becomes dense: the decoded weight plus the delta, in the base's dtype or the one asked for. That is the model that was
trained and evaluated; adding the delta to the original 16-bit weights would be another one.
"""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.adapters.swap import at, put, set_config, settings_of, twins, vocabulary


def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """In place, one module at a time; returns the model. `dtype` is that of the weights an adapter changed; by default their own.

    A projection that shared the embedding's matrix and was trained apart from it is untied, in config.json too.
    """
    settings_of(model)
    tied = tied_vocabulary(model)
    for name, twin in twins(model).items():
        put(model, name, twin.folded(dtype))
    if tied and not tied_vocabulary(model):
        set_config(model, "tie_word_embeddings", False)
    del model.adapter_settings
    return model


def tied_vocabulary(model: nn.Module) -> bool:
    """Whether projection and embedding are one matrix, looking through twins at their bases."""
    found = [at(model, name) for name in vocabulary(model) if name is not None]
    plain = [getattr(module, "base", module).weight for module in found]
    return len(plain) == 2 and plain[0] is plain[1]
