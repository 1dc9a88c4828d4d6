"""Models: a checkpoint folder becomes a Decoder (native) or a Fallback (through transformers), both with one face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tunesmith.errors import ModelError
from tunesmith.models import weights
from tunesmith.models.decoder import Decoder
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.models.weights import Progress
from tunesmith.spec import read_config, support

if TYPE_CHECKING:
    from tunesmith.models.fallback import Fallback


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         store: Literal["dense", "nf4"] = "dense", progress: Progress | None = None) -> Decoder | Fallback:  # fmt: skip
    """The checkpoint in `folder`, its linears dense in `dtype` or as NF4. Raises ModelError with the reason where it is refused."""
    found = support(read_config(folder))
    if found.state == "refused":
        raise ModelError(f"{folder}: {found.reason}", found.fix)
    if found.state == "fallback":
        from tunesmith.models import fallback

        return fallback.load(folder, dtype=dtype, device=device, store=store, progress=progress)
    return weights.load(folder, dtype=dtype, device=device, linear=NF4Linear if store == "nf4" else Linear, progress=progress)


def save_checkpoint(model: Decoder | Fallback, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """A standard Hugging Face folder in `dtype` (default: the model's own); quantised linears are written dense."""
    if isinstance(model, Decoder):
        weights.save_checkpoint(model, folder, dtype=dtype)
    else:
        model.save_checkpoint(folder, dtype=dtype)
