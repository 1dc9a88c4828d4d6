"""The plain numbers of a run file that decide memory and time, and what follows from them before anything is chosen. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tunesmith.config.schema import INSIDE, Lora, RunConfig
from tunesmith.devices import Device
from tunesmith.errors import ModelError
from tunesmith.plan.layers import LEVELS, Layers, Level, Shape
from tunesmith.plan.parts import POLICIES, WIDTH, Method, Policy, Rows
from tunesmith.plan.rates import Rates
from tunesmith.spec import Spec, half_blocks_refusal, has_bias, linear_shapes, norm_shapes

EVALUATIONS = 11  # with `eval.every_steps: auto`: before, and about ten during the run
HELD_OUT_ROWS = 500  # at most, unless a file is named


@dataclass(frozen=True)
class Job:
    """The plain numbers of a run file that decide memory and time; a variant is `replace(job, ...)`."""

    spec: Spec
    method: Method
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Device
    rows: Rows
    lora: Lora
    samples: int
    sample_tokens: int
    batch_size: int
    steps: int
    epochs: float  # passes over the rows that so many steps are
    evaluations: int
    held_out: float  # rows
    keep: int
    keep_best: bool
    levels: tuple[Level, ...]  # open to the choice
    offloads: tuple[bool, ...]
    tokens: int | None  # memory.micro_batch_tokens; None: chosen here
    fp8: bool
    optimizer: str
    refused: str  # why no half-blocks run here whatever the adapter; empty: they may
    measured: Rates | None
    fullest: int  # tokens that a step can have at most, however the rows are shuffled
    likely: int  # tokens that the fullest of so many shuffled steps has: what memory is counted for
    mix: tuple[Layers, ...] = ()  # the layers as they were chosen, for what one knob would change

    @classmethod
    def of(
        cls, config: RunConfig, spec: Spec, lengths: np.ndarray | None, device: Device, measured: Rates | None,
        half_blocks: bool = False,
    ) -> Job:  # fmt: skip
        memory, train, evaluation = config.memory, config.train, config.eval
        dtype = memory.dtype if memory.dtype != "auto" else "fp32" if device.kind != "cuda" else "bf16" if device.bf16 else "fp16"
        if dtype == "bf16" and device.kind == "cuda" and not device.bf16:
            raise ModelError(f"{device.name} does not compute in bf16", "set memory.dtype: fp16 (with loss scaling) or fp32")
        rows = Rows.of(lengths, config.data.max_length)
        steps = train.steps(rows.count)
        epochs = steps * train.batch_size / rows.count if train.max_steps else train.epochs
        held_out = config.data.held_out
        asked = HELD_OUT_ROWS if isinstance(held_out, str) else min(HELD_OUT_ROWS, rows.count * held_out / (1 - held_out))
        every = evaluation.every_steps
        return cls(
            spec=spec, method=config.method, dtype=dtype, device=device, rows=rows, lora=config.lora,
            samples=evaluation.samples if held_out != 0 else 0, sample_tokens=evaluation.sample_tokens, batch_size=train.batch_size,
            steps=steps, epochs=epochs, held_out=asked,
            evaluations=EVALUATIONS if every == "auto" else 1 + math.ceil(steps / every), keep=config.checkpoint.keep,
            keep_best=evaluation.keep_best,
            levels=LEVELS if memory.activations == "auto" else (memory.activations,),
            offloads=((False, True) if device.link else (False,)) if memory.offload == "auto" else (memory.offload,),
            tokens=None if memory.micro_batch_tokens == "auto" else memory.micro_batch_tokens, fp8=memory.compute == "fp8",
            optimizer=train.optimizer, measured=measured, fullest=_fullest(lengths, rows, config),
            likely=_likely(lengths, rows, config, steps),
            refused=half_blocks_refusal(spec) or ("" if half_blocks else _no_half_blocks(device, dtype, memory.kernels)),
        )  # fmt: skip

    def refuse(self, config: RunConfig) -> None:
        """ModelError for what was asked of the half-blocks and cannot be had."""
        why, memory = self.composed_because, config.memory
        if self.fp8 and not self.device.fp8:
            fix = "FP8 products need an Ada, Hopper or Blackwell GPU: set memory.compute: auto"
            raise ModelError(f"memory.compute: fp8 does not run on {self.device.name}", fix)
        asked = {"compute": "fp8" if self.fp8 else "", "offload": "true" if memory.offload is True else ""}
        asked["activations"] = memory.activations if memory.activations in ("int8", "recompute", "attention") else ""
        for key, value in asked.items():
            if value and why:
                fix = f"set memory.{key}: {'auto, keep or checkpoint' if key == 'activations' else 'auto'}"
                raise ModelError(f"memory.{key}: {value} needs the half-blocks, which do not run here: {why}", fix)
        if self.optimizer != "adamw" and self.device.kind != "cuda":
            raise ModelError(f"train.optimizer: {self.optimizer} does not run on {self.device.name}", "set train.optimizer: adamw")
        if self.inside and self.dtype == "fp16":
            what = f"train.optimizer: {INSIDE} does not run in fp16, the 16-bit type of {self.device.name}: it has no loss scale"
            raise ModelError(what, "set train.optimizer: adamw_8bit, or memory.dtype: fp32")
        if self.inside and self.tokens is not None and self.tokens < self.fullest:
            what = f"memory.micro_batch_tokens: {self.tokens:,} is less than the {self.fullest:,} tokens that a step may have, and "
            what += f"train.optimizer: {INSIDE} takes a step in one micro-batch"
            raise ModelError(what, "drop memory.micro_batch_tokens, lower train.batch_size, or set train.optimizer: adamw_8bit")

    @property
    def inside(self) -> bool:
        """Whether each weight is updated inside the backward (train/inside.py): no masters, one gradient at a time."""
        return self.method == "full" and self.optimizer == INSIDE

    def by(self, method: Method) -> Job:
        """With another method, and an optimiser that goes with it."""
        optimizer = "adamw" if method != "full" and self.optimizer == INSIDE else self.optimizer
        return replace(self, method=method, optimizer=optimizer)

    @cached_property
    def composed_because(self) -> str:
        """Why the layers run composed, and not as half-blocks; empty when they do."""
        if self.method == "full":
            return "every weight is trained"
        lora = self.lora
        reasons = {
            f"lora.variant is {lora.variant}": lora.variant == "dora",
            "lora.dropout is on": lora.dropout > 0,
            "lora.modules_to_save names a module inside the layers": any(name.startswith("model.layers.") for name in self.saved),
        }
        return self.refused or next((why for why, there in reasons.items() if there), "")

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Of the composed path, which has no level in between."""
        return tuple(p for p in POLICIES if p in {level if level == "keep" else "checkpoint" for level in self.levels})

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @cached_property
    def adapted(self) -> dict[str, int]:
        """Names inside a layer that train in any layer, with the adapter's largest rank; for full, all of them with rank 0."""
        linears = linear_shapes(self.spec)
        if self.method == "full":
            return dict.fromkeys(linears, 0)
        return {name: max(ranks, default=0) for name, ranks in self._ranks().items() if ranks or self._saved_in(name)}

    def _ranks(self) -> dict[str, list[int]]:
        """Of each linear in the layers, one for each layer that has an adapter there: none where the module is trained whole."""
        targets = self.lora.targets
        found: dict[str, list[int]] = {}
        for name in linear_shapes(self.spec):
            full = [f for f in self._in_layers(name) if not self._whole(f)]
            hit = full if targets == "all-linear" else [f for f in full if any(matches(t, f) for t in targets)]
            found[name] = [of_pattern(self.lora.rank_pattern, f, self.lora.rank) for f in hit]
        return found

    @cached_property
    def saved(self) -> dict[str, int]:
        """Modules trained whole (lora.modules_to_save) by full name, with their numbers: ends, linears, norms, holders."""
        if not self.lora.modules_to_save:
            return {}
        s = self.spec
        sizes = {"model.embed_tokens": s.vocab * s.dim, "lm_head": s.vocab * s.dim, "model.norm": s.dim}
        for name, (o, i) in linear_shapes(s).items():
            sizes |= dict.fromkeys(self._in_layers(name), o * i + o * has_bias(s, name))
        for name, n in norm_shapes(s).items():
            sizes |= dict.fromkeys(self._in_layers(name), n)
        for name, n in list(sizes.items()):  # model.layers.3.mlp.up_proj lies in model.layers.3.mlp and in model.layers.3
            parts = name.split(".")
            for holder in {".".join(parts[:k]) for k in range(3, len(parts))}:
                sizes[holder] = sizes.get(holder, 0) + n
        return {name: n for name, n in sizes.items() if any(matches(entry, name) for entry in self.lora.modules_to_save)}

    def _in_layers(self, name: str) -> list[str]:
        return [f"model.layers.{i}.{name}" for i in range(self.spec.layers)]

    def _whole(self, name: str) -> bool:
        """Whether a linear is, or lies in, a module trained whole."""
        return any(name == f or name.startswith(f"{f}.") for f in self.saved)

    def _saved_in(self, name: str) -> bool:
        return bool(self.saved) and any(map(self._whole, self._in_layers(name)))

    @cached_property
    def adapter_parameters(self) -> int:
        """Trained beside the frozen base: A, B, DoRA's magnitudes, new tokens' rows, modules trained whole."""
        if self.method == "full":
            return 0
        shapes, spec = linear_shapes(self.spec), self.spec
        count = sum(
            r * sum(shapes[n]) + (shapes[n][0] if self.lora.variant == "dora" else 0) for n, rs in self._ranks().items() for r in rs
        )
        if self.lora.targets != "all-linear" and any(matches(t, "lm_head") for t in self.lora.targets):
            count += self.lora.rank * (spec.vocab + spec.dim)
        count += len(self.lora.new_tokens) * spec.dim * (1 if spec.tied else 2)
        return count + sum(self.saved.values())

    @cached_property
    def largest(self) -> int:
        """Weights of the largest matrix inside a layer."""
        return max(o * i for o, i in linear_shapes(self.spec).values())

    @cached_property
    def shape(self) -> Shape:
        ranks = {name.rpartition(".")[2]: rank for name, rank in self.adapted.items()}
        return Shape(self.spec, ranks, self.width, "nf4" if self.method == "qlora" else "dense", self.fp8)


def _no_half_blocks(device: Device, dtype: str, kernels: str) -> str:
    """Why this device is better served by the composed path; empty when it is not."""
    if device.kind != "cuda":
        return "they are for NVIDIA GPUs"
    if not device.bf16:
        return f"{device.name} is older than Ampere"
    return "memory.dtype is fp32" if dtype == "fp32" else "memory.kernels is reference" if kernels == "reference" else ""


def _fullest(lengths: np.ndarray | None, rows: Rows, config: RunConfig) -> int:
    """Tokens of the fullest step that the shuffling may make: the longest rows, each as often as its source's weight has it."""
    batch = config.train.batch_size
    if lengths is None or not len(lengths):
        return batch * rows.longest
    often = math.ceil(max(source.weight for source in config.data.train))
    longest = np.sort(np.minimum(np.asarray(lengths, np.int64), config.data.max_length))[::-1][:batch]
    return int(np.repeat(longest, often)[:batch].sum())


def _likely(lengths: np.ndarray | None, rows: Rows, config: RunConfig, steps: int) -> int:
    """The fullest of four times as many steps of rows drawn at random (at least 4,000, at most 20,000): 16 of rows of 24 to 512
    tokens are seldom all long, and memory for that was planned 10 % too large."""
    batch, most = config.train.batch_size, _fullest(lengths, rows, config)
    if lengths is None or not len(lengths) or most <= rows.longest:
        return most
    draws = min(max(4 * steps, 4000), 20_000, max(1, 20_000_000 // batch))
    known = np.minimum(np.asarray(lengths, np.int64), config.data.max_length)
    return min(most, int(known[np.random.default_rng(0).integers(0, len(known), (draws, batch))].sum(1).max()))


def matches(target: str, name: str) -> bool:
    """PEFT's rule (adapters/targets.py, which lies above this file): a last name, a full name, or a pattern between slashes."""
    if len(target) > 2 and target[0] == target[-1] == "/":
        return re.fullmatch(target[1:-1], name) is not None
    return name == target or name.endswith(f".{target}")


def of_pattern(patterns: dict[str, int], name: str, default: int) -> int:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
