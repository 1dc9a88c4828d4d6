"""The plain values of a plan: parts of memory, row lengths, one way to run, what a device was measured to do. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Method = Literal["qlora", "lora", "full"]
Policy = Literal["keep", "checkpoint"]
Path = Literal["half-blocks", "composed"]
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")
POLICIES: tuple[Policy, ...] = ("keep", "checkpoint")  # of the composed path
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}

ASSUMED_ROWS, ASSUMED_LENGTH = 1000, 512  # where no cache tells


@dataclass(frozen=True, slots=True)
class Component:
    """One use of memory. `where` is device, host (main memory beside a GPU) or disk."""

    name: str
    bytes: int
    where: Literal["device", "host", "disk"]
    why: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Row lengths as far as they matter: `squares` is sum(n^2) / sum(n), the length that attention feels."""

    count: int
    mean: float
    longest: int
    squares: float
    assumed: bool

    @classmethod
    def of(cls, lengths: np.ndarray | None, max_length: int) -> Rows:
        if lengths is None or not len(lengths):
            mean = min(ASSUMED_LENGTH, max_length / 2)
            return cls(ASSUMED_ROWS, mean, max_length, mean * 1.5, True)
        n = np.minimum(np.asarray(lengths, np.float64), max_length)
        return cls(len(n), float(n.mean()), int(n.max()), float((n @ n) / n.sum()), False)

    @property
    def total(self) -> float:
        return self.count * self.mean


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run: a column of the table that sets qlora, lora and full side by side."""

    method: Method
    activations: str
    micro_batch_tokens: int
    needs: float  # GiB
    minutes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run on this device reached, so that time is no guess: the share of the device's rate, and where it was measured."""

    efficiency: float
    where: str
