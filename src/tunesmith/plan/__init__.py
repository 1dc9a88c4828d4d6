"""Will it fit, how long will it take, what to lower: from the Spec alone, before a weight is read. No torch, well under a second.

`make_plan` asks a job (job.py) what it takes (sizes.py, layers.py), how long it takes (speed.py, rates.py) and which way of running
is best (choice.py); knobs.py says what each setting would change, advice.py what to lower, page.py how it is printed. The trainer
takes its micro-batch and the policy of each layer from the same object, so what was printed is what runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.config.schema import RunConfig
from tunesmith.devices import GIB, Device, smallest_that_holds
from tunesmith.errors import DoesNotFit
from tunesmith.plan.advice import Advice, advise, remarks
from tunesmith.plan.choice import MICRO_CAP, Open
from tunesmith.plan.knobs import Knob, turn
from tunesmith.plan.layers import Layers
from tunesmith.plan.page import duration, gb, print_plan
from tunesmith.plan.parts import ASSUMED_ROWS, METHODS, Choice, Component, Method, Path
from tunesmith.plan.rates import Rates
from tunesmith.plan.sizes import pinnable, usable
from tunesmith.spec import Spec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "METHODS",
    "MICRO_CAP",
    "Advice",
    "Choice",
    "Component",
    "Knob",
    "Method",
    "Plan",
    "answering",
    "budget_of",
    "least",
    "make_plan",
    "pinnable",
    "usable",
    "ways",
]

SPARED = {"cuda": 1.0, "mps": 1.0, "cpu": 0.9}  # share of what is free that a run may take: a CPU's memory is everybody's


@dataclass(frozen=True)
class Plan:
    """Where a run's memory and time go. Sizes are GiB (as cards are sold, `24 GB`); `components` holds bytes."""

    model: str
    method: Method
    device: Device
    dtype: Literal["bf16", "fp16", "fp32"]
    activations: str  # in words; `layers` says it for the trainer
    layers: tuple[Layers, ...]  # from the bottom
    path: Path
    path_why: str  # why the layers are composed; empty: half-blocks
    compute: Literal["bf16", "fp16", "fp32", "fp8"]  # of the products with frozen weights
    weight_cache: int  # bytes of decoded 4-bit weights that are kept
    embedding: Literal["device", "host"]  # where the embedding's rows are
    micro_batch_tokens: int
    longest: int
    steps: int
    tokens: int  # through the model in training
    budget: float
    least: float  # with the smallest micro-batch and recomputed activations: below this no setting of `memory` helps
    minutes: float  # of the whole run: training, held-out losses, sample answers
    speed: float  # tokens a second in training alone
    measured: str  # where the device's rates were measured (tunesmith plan --probe); empty: uncalibrated
    components: tuple[Component, ...]
    choices: tuple[Choice, ...]
    advice: tuple[Advice, ...]
    knobs: tuple[Knob, ...]
    notes: tuple[str, ...]
    page: FilePath | None = None  # the .html file that was written

    @cached_property
    def needs(self) -> float:
        """GiB on the device when it is fullest: the sum of the device's components."""
        return self._sum("device")

    @property
    def fits(self) -> bool:
        """Whether it stays within what may be filled of the budget: a GPU's last 2 % are for what a plan may be wrong by."""
        return self.needs <= usable(self.budget, self.device)

    @property
    def host(self) -> float:
        """GiB of main memory beside a GPU; 0 on a CPU, where all is the device's."""
        return self._sum("host")

    @property
    def disk(self) -> float:
        """GiB the run folder grows to, a merged export included."""
        return self._sum("disk")

    def _sum(self, where: str) -> float:
        return sum(c.bytes for c in self.components if c.where == where) / GIB

    @property
    def verdict(self) -> str:
        """One line: `fits: 11.2 of 24 GB, about 38 min`, or what to lower."""
        if self.fits:
            return f"fits: {gb(self.needs)} of {gb(self.budget)} GB, {duration(self.minutes)}"
        line = f"does not fit: {gb(self.needs)} of {gb(self.budget)} GB"
        enough = [a for a in self.advice if a.enough]
        if enough:
            return f"{line}; {' or '.join(f'{a.key}: {a.value}' for a in enough[:3])} would do"
        if self.advice:
            return f"{line}; lower {', '.join(f'{a.key} (to {a.value}: -{gb(a.gain)} GB)' for a in self.advice[:3])}"
        return f"{line}; a smaller model, or a larger card, is needed"

    def require(self) -> Plan:
        """Itself when it fits; else DoesNotFit with what to lower."""
        if self.fits:
            return self
        needs, there = gb(self.needs), gb(self.budget)
        what = f"{self.model} with method: {self.method} needs {needs} GB, {there} GB are there ({self.device.name}); "
        what += f"the floor with these settings is {gb(self.least)} GB"
        card = smallest_that_holds(self.needs)
        fix = [str(a) for a in self.advice[:4]] + ([f"or a card such as {card.name}"] if card else [])
        raise DoesNotFit(what, "\n     ".join(fix) or "take a smaller model or a larger device")

    def as_dict(self) -> dict[str, Any]:
        """For plan.json: all fields, and what follows from them."""
        device = {"name": self.device.name, "kind": self.device.kind, "gib": round(self.device.total / GIB, 2)}
        return {
            **asdict(self), "page": self.page and str(self.page), "device": device, "needs": self.needs, "fits": self.fits,
            "host": self.host, "disk": self.disk, "verdict": self.verdict,
        }  # fmt: skip

    def print(self, console: Console | None = None) -> None:
        """Bars for each component against the device, the three methods side by side, what to lower, and one line of verdict."""
        from rich.console import Console

        print_plan(self, console or Console())


def make_plan(
    config: RunConfig, spec: Spec, *, lengths: np.ndarray | None = None, device: Device, measured: Rates | None = None,
    half_blocks: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a run. `lengths` are the training rows' tokens [rows], None when they are not known yet.

    What `memory` leaves to `auto` is chosen here: of all that fits the budget the fastest, and of the nearly fastest the leanest.
    Does not raise when nothing fits (see `Plan.require`). ModelError names what `memory` asks for and the card or the path lacks.
    `half_blocks`: also where they would be no faster, on a CPU (for tests).
    """
    job = Open.of(config, spec, lengths, device, measured, half_blocks)
    job.refuse(config)
    budget = budget_of(config, device)
    room = usable(budget, device)
    best = job.best(room)
    choices = tuple(job.by(m).best(room).choice(room) for m in METHODS)
    return Plan(
        model=config.model, method=job.method, device=device, dtype=job.dtype, activations=best.activations,
        layers=best.layers, path="composed" if job.composed_because else "half-blocks", path_why=job.composed_because,
        compute="fp8" if job.fp8 else job.dtype, weight_cache=job.cache_of_weights if best.cached else 0,
        embedding="host" if best.lifted else "device",
        micro_batch_tokens=best.tokens, longest=job.rows.longest, steps=job.steps, tokens=round(job.trained_tokens),
        budget=float(budget), least=job.least, minutes=best.minutes, speed=best.speed,
        measured=measured.where if measured else "",
        components=(*best.components, *job.host(best), *job.disk()), choices=choices,
        advice=tuple(advise(job, best, room)), knobs=tuple(turn(job, best, room)), notes=tuple(remarks(job, config)),
    )  # fmt: skip


# ---- a model alone, without data: fits.py asks ---------------------------------------------------------------------------------


def _alone(config: RunConfig, spec: Spec, device: Device, method: Method, length: int) -> Open:
    """A run of rows that all have `length` tokens."""
    return Open.of(config, spec, np.full(ASSUMED_ROWS, length), device, None).by(method)


def ways(config: RunConfig, spec: Spec, *, length: int, device: Device) -> list[tuple[Choice, float, tuple[Component, ...]]]:
    """For each method what `make_plan` would choose for rows of `length` tokens, the least it can do with (GiB), and its parts."""
    budget, found = usable(budget_of(config, device), device), []
    for method in METHODS:
        job = _alone(config, spec, device, method, length)
        best = job.best(budget)
        found.append((best.choice(budget), job.least, (*best.components, *job.host(best), *job.disk())))
    return found


def least(config: RunConfig, spec: Spec, method: Method, *, length: int, tokens: int | None = None, device: Device) -> float:
    """GiB without which a run with rows of `length` tokens is not possible, `tokens` of them at once where that is given."""
    job = _alone(config, spec, device, method, length)
    return (replace(job, tokens=tokens, fullest=tokens, likely=tokens) if tokens else job).least


def answering(config: RunConfig, spec: Spec, *, length: int, count: int, device: Device) -> tuple[Component, ...]:
    """What it takes to answer `count` prompts at once, prompt and answer `length` tokens long, with 16-bit weights."""
    return tuple(_alone(config, spec, device, "lora", length).answering(count))


def budget_of(config: RunConfig, device: Device) -> float:
    """GiB that a run may take."""
    return config.memory.budget_gb if config.memory.budget_gb != "auto" else device.free * SPARED[device.kind] / GIB
