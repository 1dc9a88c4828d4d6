"""Where a model runs and in what precision: `memory.device` and `memory.dtype` made real, or refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from tunesmith.config.schema import Memory
from tunesmith.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Place:
    device: torch.device
    dtype: torch.dtype
    note: str = ""  # what a person should know about the choice

    def describe(self) -> str:
        """`NVIDIA H200 in bf16`"""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else {"cpu": "CPU", "mps": "Apple GPU"}[self.device.type]
        return f"{name} in {self.precision}"

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32."""
        return next(word for word, dtype in DTYPES.items() if dtype is self.dtype)


def place(memory: Memory) -> Place:
    """auto takes an NVIDIA GPU where there is one, else the CPU; bf16 where the card computes in it, else fp16; fp32 on a CPU.

    Raises ModelError for a device that is not here, and by its name for a card that does not compute in bf16.
    """
    wanted = memory.device if memory.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "memory.device is cuda, but torch sees no NVIDIA GPU",
            "set memory.device: cpu, or install torch's CUDA build and its driver",
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ModelError("memory.device is mps, but torch sees no Apple GPU", "set memory.device: cpu")
    device, note = torch.device(wanted), ""
    if wanted == "cuda":  # growing segments instead of fixed blocks: 4.7 GiB of 22.5 lay unused in an H200's cache without it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if wanted == "mps":
        note = "memory.device: mps runs the reference operations on an Apple GPU; nobody has tested it"
    if memory.dtype != "auto":
        dtype = DTYPES[memory.dtype]
        if wanted == "cuda" and dtype is torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
            raise ModelError(
                f"{torch.cuda.get_device_name()} does not compute in bf16", "set memory.dtype: fp16 (with loss scaling) or fp32"
            )
        return Place(device, dtype, note)
    if wanted == "cuda":
        if torch.cuda.get_device_capability()[0] >= 8:  # Ampere and later; before it bf16 is emulated
            return Place(device, torch.bfloat16, note)
        return Place(device, torch.float16, f"{torch.cuda.get_device_name()} does not compute in bf16: fp16 with loss scaling")
    return Place(device, torch.float32, note)


def make_deterministic() -> None:
    """Ask torch for bit-identical kernels; raises where an operation has none. cuBLAS reads its setting before its first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
