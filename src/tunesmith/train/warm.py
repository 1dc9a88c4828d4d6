"""Kernels compiled while the weights are read: one layer of the model's shapes takes two passes in a thread of its own.

What Triton compiles it keeps on disk, so this is for the first run of a shape: 5 s of a Mistral-7B's 25 to its first step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from tunesmith import adapters
from tunesmith.config import schema
from tunesmith.data.pack import collate
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import FastLayers
from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.ops import backend
from tunesmith.ops.half_blocks import Policy
from tunesmith.spec import Spec
from tunesmith.train.replay import plain
from tunesmith.types import Example, Origin

SIZES = 512, 509  # Triton compiles for counts that are a multiple of 16, and for others


class Warming:
    """Begun with the object; `end` before the model is used. An error here is no error: the model will meet it, and tell it."""

    def __init__(self, spec: Spec, lora: schema.Lora, policies: Sequence[Policy], device: torch.device, *, dtype: torch.dtype,
                 nf4: bool, fp8: bool):  # fmt: skip
        self.spec, self.lora, self.policies, self.device = spec, lora, [*dict.fromkeys(policies)], device
        self.dtype, self.nf4, self.fp8, self.late = dtype, nf4, fp8, threading.Event()
        self.thread = threading.Thread(target=self._run, name="warm", daemon=True)
        if device.type == "cuda" and not backend.obstacle(device):
            self.thread.start()

    def end(self) -> None:
        """Wait for the pass it is in; what it held is free afterwards."""
        self.late.set()
        if self.thread.ident:
            self.thread.join()
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB of a thread's own

    def _run(self) -> None:
        with suppress(Exception):
            self.passes()

    def passes(self) -> None:
        model = self._model()
        for tokens in SIZES:
            if not self.late.is_set():
                model.fast = FastLayers(model, self.policies, fp8=self.fp8)
                learn = np.arange(tokens + 1) % 3 == tokens % 3  # the last too: the tokens behind it would be left out
                batch = collate([Example(np.zeros(tokens + 1, np.int32), learn, Origin("", 0))])
                plain(model, batch, self.device, 1.0)

    def _model(self) -> nn.Module:
        """A layer for each policy; all zero, so that no random number is drawn from where the run's come from."""
        kind = NF4Linear if self.nf4 else Linear
        model = Decoder(
            replace(self.spec, layers=len(self.policies)), dtype=self.dtype, device="meta",
            linear=lambda i, o, bias: kind(i, o, bias, dtype=self.dtype, device="meta"),
        )  # fmt: skip
        for module in model.modules():  # `to_empty` would import all of torch.compile
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=self.device)))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros(b.shape, dtype=b.dtype, device=self.device))
        model.tie()
        only = {"new_tokens": (), "modules_to_save": (), "continue_from": "none"}
        adapters.attach(model, self.lora.model_copy(update=only), seed=0)
        return model.train()
