"""The plain values of a plan: parts of memory, row lengths, one way to run. No torch."""

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


UNCALIBRATED = "uncalibrated, +-30 %: nobody has measured this device, its time is worked out from its data sheet"
OFF = {"memory": 0.05, "speed": 0.15}  # of what was planned: more than that is told


def astray(planned_gib: float | None, held: float | None, planned_speed: float | None, speed: float | None) -> list[str]:
    """A sentence for each of memory (GiB) and speed (tokens a second) that a run took otherwise than planned; None is not known."""
    said = []
    if planned_gib and held and abs(held / planned_gib - 1) > OFF["memory"]:
        said.append(
            f"memory was planned {planned_gib:.2f} GB and was {held:.2f} GB: {_apart(held / planned_gib - 1, 'more', 'less')}"
        )
    if planned_speed and speed and abs(speed / planned_speed - 1) > OFF["speed"]:
        apart = _apart(speed / planned_speed - 1, "faster", "slower")
        said.append(f"{planned_speed:,.0f} tokens a second were planned and {speed:,.0f} were reached: {apart}")
    return said


def _apart(share: float, more: str, less: str) -> str:
    return f"{abs(share):.0%} {more if share > 0 else less}"
