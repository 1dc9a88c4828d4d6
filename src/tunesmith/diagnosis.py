"""What this machine can do and which of the ways through a step it takes, each with its reason: what `tunesmith doctor` prints."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import models
from tunesmith.config.schema import Memory
from tunesmith.devices import GIB, local_device
from tunesmith.errors import TunesmithError, install
from tunesmith.models.place import place
from tunesmith.ops import attention, backend, fp8
from tunesmith.ops.attention import Layout

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (
    "torch",
    "triton",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "transformers",
    "peft",
    "bitsandbytes",
    "tensorboard",
)
NOT_HERE = {
    "triton": "an NVIDIA GPU then runs plain PyTorch: slower, the same results",
    "transformers": f"for models that are not native: {install('fallback')}",
    "bitsandbytes": f"for train.optimizer: adamw_8bit: {install('bnb')}",
    "tensorboard": f"for log.trackers: {install('tensorboard')}",
    "peft": "not needed: only tests use it",
}
SHAPES = {  # what attention is asked, as documents' lengths and window
    "documents of one length": ((64, 64), None),
    "documents of many lengths": ((64, 17), None),
    "a sliding window": ((64, 64), 16),
}
KERNELS = {
    "cudnn": "cuDNN's: 1.6 to 1.9 times the speed of FA2 on an H200; deterministic runs take the next",
    "flash": "torch's variable-length FlashAttention 2",
    "cpu": "torch's flash kernel for CPUs, one call a document",
    "autograd": "plain PyTorch, computed again in the backward",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at. `state`: fine | note (works, and a person should know) | fault (a run would fail)."""

    name: str
    found: str
    state: str = "fine"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    lines: tuple[Line, ...]

    @property
    def healthy(self) -> bool:
        return not any(line.state == "fault" for line in self.lines)

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for line in self.lines:
            table.add_row(line.name, Text(line.found, {"fine": "", "note": "yellow", "fault": "red"}[line.state]))
        (console or Console()).print(table)


def diagnose() -> Diagnosis:
    """Looks at packages, device, kernels, attention, FP8, memory and disk. Nothing is trained or downloaded."""
    lines = [Line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"), *_packages()]
    try:
        where = place(Memory())
    except TunesmithError as e:
        return Diagnosis((*lines, Line("device", str(e), "fault")))
    card, cuda = local_device("auto"), where.device.type == "cuda"
    lines.append(Line("device", where.describe(), "note" if where.note else "fine"))
    if where.note:
        lines.append(Line("", where.note, "note"))
    lines.append(Line("memory", f"{card.free / GIB:.1f} of {card.total / GIB:.1f} GB free"))
    lines.append(
        Line("kernels", backend.why().removeprefix("kernels: "), "note" if cuda and backend.obstacle(where.device) else "fine")
    )
    for name, (lengths, window) in SHAPES.items():
        q = torch.empty(sum(lengths), 2, 64, dtype=where.dtype, device=where.device)
        lines.append(Line("attention", f"{name}: {KERNELS[attention.kernel(q, Layout.of(lengths, where.device), window)]}"))
    reason = fp8.supported(where.device)
    lines.append(Line("FP8", reason or "memory.compute: fp8 can be used"))
    lines += _folders()
    lines.append(_trains(where))
    return Diagnosis(tuple(lines))


def _packages() -> list[Line]:
    lines = []
    for name in PACKAGES:
        try:
            lines.append(Line(name, version(name)))
        except PackageNotFoundError:
            lines.append(Line(name, f"not installed: {NOT_HERE[name]}"))
    return lines


def _folders() -> list[Line]:
    """Where downloads and runs go, and the room there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    lines = []
    for name, folder in (("downloads", Path(HF_HUB_CACHE)), ("runs", Path.cwd())):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free / GIB
        denied = "" if os.access(there, os.W_OK) else ", not writable"
        lines.append(Line(name, f"{folder}: {free:.0f} GB free{denied}", "fault" if denied else "note" if free < 20 else "fine"))
    return lines


def _trains(where: models.place.Place) -> Line:
    """Whether one forward and backward of the smallest decoder gives finite numbers here."""
    from tunesmith.models.decoder import Decoder
    from tunesmith.spec import Spec

    spec = Spec(vocab=64, dim=32, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=16, context=32, norm_eps=1e-5)
    model = Decoder(spec, dtype=where.dtype, device=where.device)
    loss = model(torch.arange(8, device=where.device)).float().logsumexp(-1).sum()
    loss.backward()
    finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    return Line("a step", "gives finite numbers" if finite else "gives nan or inf: check the driver", "fine" if finite else "fault")
