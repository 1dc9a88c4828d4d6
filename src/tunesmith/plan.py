"""Will it fit, how long will it take, what to lower: from the Spec alone, before a weight is read. No torch, well under a second.

A plan adds up what is on the device when it is fullest: a backward of the largest micro-batch. Layers run on one of two paths: as
half-blocks, whose tables are plan_layers.py, or composed, where `kept` is the one table of what autograd keeps of each token and
layer. The constants are all that was not counted from the code. The trainer takes its micro-batch and the policy of each layer from
the same object, so what was printed is what runs.

Shape letters: T tokens at once, D model width, F MLP width, Q query heads, K key/value heads, H head width, V vocabulary, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.config.schema import INSIDE, Lora, RunConfig
from tunesmith.devices import GIB, Device, smallest_that_holds
from tunesmith.errors import DoesNotFit, ModelError
from tunesmith.levels import RECORDED
from tunesmith.plan_layers import LEVELS, TILES, WHOLE, Layers, Level, Shape, describe, pinned
from tunesmith.plan_page import duration, gb, print_plan
from tunesmith.spec import Spec, half_blocks_refusal, linear_shapes, norm_shapes, parameters

if TYPE_CHECKING:
    from rich.console import Console

Method = Literal["qlora", "lora", "full"]
Policy = Literal["keep", "checkpoint"]
Path = Literal["half-blocks", "composed"]
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")
POLICIES: tuple[Policy, ...] = ("keep", "checkpoint")  # of the composed path
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}

# ---- what is not counted from the code: estimates, until a device has been measured ----------------------------------------------
CONTEXT = {"cuda": 750 << 20, "mps": 400 << 20, "cpu": 450 << 20}  # CUDA context (an H200: 0.73 to 0.78 GiB) | torch's own pages
FRAGMENTS = {"cuda": 0.03, "mps": 0.10, "cpu": 0.10}  # of activations and transients: blocks the allocator holds and cannot reuse
HOST = {"cuda": 3 * GIB, "mps": 0, "cpu": 0}  # main memory of a process that drives a GPU; on a CPU all is counted as device
EFFICIENCY = {"cuda": 0.35, "mps": 0.30, "cpu": 0.50}  # share of the device's rate in GEMMs, attention and all else together
LAYER_SECONDS = {
    "cuda": 600e-6,
    "mps": 1e-3,
    "cpu": 200e-6,
}  # Python and launches of one layer's forward: a floor under small batches
FP32_SHARE = 1 / 8  # of a GPU's 16-bit rate without TensorFloat-32
CPU_BF16_SHARE = 0.25  # of a CPU's float32 rate, where no AMX or AVX512-BF16 helps
SPARED = {"cuda": 1.0, "mps": 0.7, "cpu": 0.9}  # share of what is free that a run may take: a CPU's memory is everybody's
BANDWIDTH_SHARE = 0.7  # of the printed memory bandwidth that a plain copy reaches

# ---- the same for half-blocks, measured on an H200 at Mistral-7B's shapes (tests/test_plan.py has the rows) ----------------------
WORKSPACES = 100 << 20  # cuBLAS's: 32 MiB for each of the threads that multiply, and its light version's
RECORDINGS = 280 << 20  # a second set of them, and the graphs' nodes: 0.2 to 0.4 GiB more than unrecorded passes had reserved
HALF_FRAGMENTS = 0.01, 0.08  # of what is kept, of what comes and goes
HALF_EFFICIENCY = 0.55  # of the card's rate over everything a step does: 0.54 to 0.55 at every level, 2,048 and 8,192 tokens long
FP8_GAIN = 1.4  # of the products of the base in e4m3
DECODE_BYTES = {"bf16": 2.6, "fp8": 1.6}  # of memory traffic a weight: codes and scales read, the dense weight written
TILE_TAX, OFFLOAD_TAX = 1.005, 1.03  # of time, more than was measured: neither is to be taken for nothing
UNHIDDEN = 0.03  # of what the link takes, even where a layer takes longer: at the ends, and in the device's own bandwidth
HOST_SHARE = 0.5  # of main memory that may be pinned
WORTH = 0.002  # of its time that a plan may give away for a GiB less: near ties go to the leaner one

# ---- counted from the code -----------------------------------------------------------------------------------------------------
DECODE_SCRATCH = 10  # bytes a weight while ops/nf4.py decodes, beyond the result ...
DECODE_CHUNK = {"cuda": 1 << 26, "mps": 1 << 26, "cpu": 1 << 18}  # ... of this many weights at a time
DECODE_TRAFFIC = (
    24  # bytes of memory traffic a weight and decode: codes, gathered values, scaling, the dense result and its reading
)
LOGIT_BYTES = 64 << 20  # float32 logits of one chunk (ops/linear_ce.py) ...
LOGIT_COPIES = 2.5  # ... with their 16-bit form before and after
SOFTCAP_ROWS = 512  # query rows whose scores are written out at once (ops/attention.py)
MASTER, GRADIENT = 4, 4  # the float32 master, its float32 gradient: bytes a trained parameter
EIGHT = 2 + 8 / 256  # two averages of 8 bits, each with a float32 for 256
MOMENTS = {"adamw": 8, "adamw_8bit": EIGHT, "paged_adamw_8bit": EIGHT, INSIDE: EIGHT}

MICRO_CAP = {"cuda": 1 << 17, "mps": 1 << 14, "cpu": 1 << 12}  # tokens at once beyond which nothing is gained
SLACK = 1.03  # of plans within this factor of the fastest, the one that takes least memory
DECODE_BATCH = 32  # prompts answered at once
EVALUATIONS = 11  # with `eval.every_steps: auto`: before, and about ten during the run
HELD_OUT_ROWS = 500  # at most, unless a file is named
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
class Advice:
    """A knob and what it saves. `enough`: with this alone the run fits."""

    key: str
    value: str
    gain: float  # GiB
    enough: bool
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.key}: {self.value} saves {gb(self.gain)} GB{', enough by itself' if self.enough else ''}{note}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run on this device reached, so that time is no guess: the share of the device's rate, and where it was measured."""

    efficiency: float
    where: str


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
    minutes: float
    measured: str  # where the time was measured; empty: uncalibrated
    components: tuple[Component, ...]
    choices: tuple[Choice, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    @cached_property
    def needs(self) -> float:
        """GiB on the device when it is fullest: the sum of the device's components."""
        return self._sum("device")

    @property
    def fits(self) -> bool:
        return self.needs <= self.budget

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
            **asdict(self), "device": device, "needs": self.needs, "fits": self.fits,
            "host": self.host, "disk": self.disk, "verdict": self.verdict,
        }  # fmt: skip

    def print(self, console: Console | None = None) -> None:
        """Bars for each component against the device, the three methods side by side, what to lower, and one line of verdict."""
        from rich.console import Console

        print_plan(self, console or Console())


def make_plan(
    config: RunConfig, spec: Spec, *, lengths: np.ndarray | None = None, device: Device, measured: Measured | None = None,
    half_blocks: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a run. `lengths` are the training rows' tokens [rows], None when they are not known yet.

    What `memory` leaves to `auto` is chosen here: of all that fits the budget the fastest, and of the nearly fastest the leanest.
    Does not raise when nothing fits (see `Plan.require`). ModelError names what `memory` asks for and the card or the path lacks.
    `half_blocks`: also where they would be no faster, on a CPU (for tests).
    """
    job = _Job.of(config, spec, lengths, device, measured, half_blocks)
    job.refuse(config)
    budget = budget_of(config, device)
    best = job.best(budget)
    choices = tuple(job.by(m).best(budget).choice(budget) for m in METHODS)
    return Plan(
        model=config.model, method=job.method, device=device, dtype=job.dtype, activations=best.activations,
        layers=best.layers, path="composed" if job.composed_because else "half-blocks", path_why=job.composed_because,
        compute="fp8" if job.fp8 else job.dtype, weight_cache=job.cache_of_weights if best.cached else 0,
        embedding="host" if best.lifted else "device",
        micro_batch_tokens=best.tokens, longest=job.rows.longest, steps=job.steps, tokens=round(job.trained_tokens),
        budget=float(budget), least=job.least, minutes=best.minutes, measured=measured.where if measured else "",
        components=(*best.components, *job.host(best), *job.disk()), choices=choices,
        advice=tuple(_advice(job, best, budget)), notes=tuple(_notes(job, config)),
    )  # fmt: skip


# ---- a model alone, without data: fits.py asks ---------------------------------------------------------------------------------


def _alone(config: RunConfig, spec: Spec, device: Device, method: Method, length: int) -> _Job:
    """A run of rows that all have `length` tokens."""
    return _Job.of(config, spec, np.full(ASSUMED_ROWS, length), device, None).by(method)


def ways(config: RunConfig, spec: Spec, *, length: int, device: Device) -> list[tuple[Choice, float, tuple[Component, ...]]]:
    """For each method what `make_plan` would choose for rows of `length` tokens, the least it can do with (GiB), and its parts."""
    budget, found = budget_of(config, device), []
    for method in METHODS:
        job = _alone(config, spec, device, method, length)
        best = job.best(budget)
        found.append((best.choice(budget), job.least, (*best.components, *job.host(best), *job.disk())))
    return found


def least(config: RunConfig, spec: Spec, method: Method, *, length: int, tokens: int | None = None, device: Device) -> float:
    """GiB without which a run with rows of `length` tokens is not possible, `tokens` of them at once where that is given."""
    job = _alone(config, spec, device, method, length)
    return (replace(job, tokens=tokens, fullest=tokens) if tokens else job).least


def answering(config: RunConfig, spec: Spec, *, length: int, count: int, device: Device) -> tuple[Component, ...]:
    """What it takes to answer `count` prompts at once, prompt and answer `length` tokens long, with 16-bit weights."""
    return tuple(_alone(config, spec, device, "lora", length).answering(count))


def pinnable(device: Device) -> float:
    """Bytes of main memory that may be pinned. A machine that is not here is taken to have 16 GiB, or its card's size."""
    return HOST_SHARE * (device.host or max(16 * GIB, device.total))


def budget_of(config: RunConfig, device: Device) -> float:
    """GiB that a run may take."""
    return config.memory.budget_gb if config.memory.budget_gb != "auto" else device.free * SPARED[device.kind] / GIB


# ---- what autograd keeps -------------------------------------------------------------------------------------------------------


def kept(
    spec: Spec,
    method: Method,
    adapted: set[str],
    *,
    width: int,
    device: str,
    rank: int = 16,
    variant: str = "lora",
    dropout: bool = False,
) -> list[tuple[str, float, str]]:
    """(what, bytes a token and layer, why) that autograd keeps for the backward when nothing is recomputed: the one table.

    Counted from ops/ (rms_norm keeps its input and a number, rotate nothing, swiglu gate and up) and adapters/lora.py (x and A x; a
    frozen base keeps nothing). `adapted` are names inside a layer (`mlp.up_proj`) that train: adapters, or all of them for full.
    """
    q, kv, w = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, width
    last = {name.rpartition(".")[2] for name in adapted}
    whole = method == "full"
    shared = whole or not dropout  # with dropout each adapter keeps an input of its own instead of the one they share
    qkv, gate_up = last & {"q_proj", "k_proj", "v_proj", "qkv_proj"}, last & {"gate_proj", "up_proj", "gate_up_proj"}
    shapes = {name.rpartition(".")[2]: shape for name, shape in linear_shapes(spec).items()}
    rows = [
        ("layer input", spec.dim * w + 4, "the first norm's backward, with one float32 a row"),
        ("first norm's output", spec.dim * w * bool(qkv and shared), "the gradient of what stands beside q, k, v"),
        ("q, k, v", (q + 2 * kv) * w, "attention's backward, after the rotation"),
        ("fused q, k", (q + kv) * w * spec.fused, "v is a view of one fused product, which keeps all of it alive"),
        ("q, k before their norm", ((q + kv) * w + 4 * (spec.heads + spec.kv_heads)) * spec.qk_norm, "the norms of q and k"),
        ("attention output", q * w + 4 * spec.heads, "attention's backward and o_proj's input, with the log-sum of each row"),
        (
            "attention output joined",
            q * w * (device != "cuda" and "o_proj" in last and shared),
            "one call a document, then one stream",
        ),
        ("after attention", spec.dim * w + 4, "the second norm's backward"),
        ("second norm's output", spec.dim * w * bool(gate_up and shared), "the gradient of what stands beside gate and up"),
        ("gate, up", 2 * spec.hidden * w, "swiglu's backward; the activation is computed again"),
        ("down's input", spec.hidden * w * ("down_proj" in last and shared), "the gradient of what stands beside down"),
        ("branch outputs", 2 * (spec.dim * w + 4) * spec.sandwich, "the norms after attention and MLP (Gemma 2, 3)"),
        ("A x", 0 if whole else rank * w * len(last), "the gradient of B"),
    ]
    if variant == "dora" and not whole:
        rows.append(("DoRA's parts", 2 * w * sum(shapes[n][0] for n in last), "the gradient of the magnitudes: W x and B A x"))
    if not shared:
        mask = 1 if device == "cuda" else w
        rows.append(("dropped inputs", (w + mask) * sum(shapes[n][1] for n in last), "each adapter's own input and its mask"))
    return [row for row in rows if row[1]]


# ---- one job, and what it takes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
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
    measured: Measured | None
    fullest: int  # tokens that a step has at most
    mix: tuple[Layers, ...] = ()  # the layers as they were chosen, for what one knob would change

    @classmethod
    def of(
        cls, config: RunConfig, spec: Spec, lengths: np.ndarray | None, device: Device, measured: Measured | None,
        half_blocks: bool = False,
    ) -> _Job:  # fmt: skip
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

    def by(self, method: Method) -> _Job:
        """With another method, and an optimiser that goes with it."""
        optimizer = "adamw" if method != "full" and self.optimizer == INSIDE else self.optimizer
        return replace(self, method=method, optimizer=optimizer)

    @cached_property
    def composed_because(self) -> str:
        """Why the layers run composed, and not as half-blocks; empty when they do."""
        if self.method == "full":
            return "every weight is trained"
        lora, last = self.lora, [*linear_shapes(self.spec), *norm_shapes(self.spec)]
        inside = [f"model.layers.{i}.{name}" for i in range(self.spec.layers) for name in last] if lora.modules_to_save else []
        reasons = {
            f"lora.variant is {lora.variant}": lora.variant == "dora",
            "lora.dropout is on": lora.dropout > 0,
            "lora.modules_to_save names a module inside the layers": any(
                _matches(e, f) for e in lora.modules_to_save for f in inside
            ),
        }
        return self.refused or next((why for why, there in reasons.items() if there), "")

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Of the composed path, which has no level in between."""
        return tuple(p for p in POLICIES if p in {level if level == "keep" else "checkpoint" for level in self.levels})

    # -- sizes --

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @cached_property
    def adapted(self) -> dict[str, int]:
        """Names inside a layer that train in any layer, with the adapter's largest rank; for full, all of them with rank 0."""
        linears = linear_shapes(self.spec)
        if self.method == "full":
            return dict.fromkeys(linears, 0)
        return {name: max(ranks) for name, ranks in self._ranks().items() if ranks}

    def _ranks(self) -> dict[str, list[int]]:
        targets = self.lora.targets
        found: dict[str, list[int]] = {}
        for name in linear_shapes(self.spec):
            full = [f"model.layers.{i}.{name}" for i in range(self.spec.layers)]
            hit = full if targets == "all-linear" else [f for f in full if any(_matches(t, f) for t in targets)]
            found[name] = [_of_pattern(self.lora.rank_pattern, f, self.lora.rank) for f in hit]
        return found

    @cached_property
    def adapter_parameters(self) -> int:
        """Trained beside the frozen base: A, B, DoRA's magnitudes, new tokens' rows, modules trained whole."""
        if self.method == "full":
            return 0
        shapes, spec = linear_shapes(self.spec), self.spec
        count = sum(
            r * sum(shapes[n]) + (shapes[n][0] if self.lora.variant == "dora" else 0) for n, rs in self._ranks().items() for r in rs
        )
        ends = {"model.embed_tokens": spec.vocab * spec.dim, "lm_head": spec.vocab * spec.dim}
        if self.lora.targets != "all-linear" and any(_matches(t, "lm_head") for t in self.lora.targets):
            count += self.lora.rank * (spec.vocab + spec.dim)
        count += len(self.lora.new_tokens) * spec.dim * (1 if spec.tied else 2)
        return count + sum(size for name, size in ends.items() if any(_matches(entry, name) for entry in self.lora.modules_to_save))

    @cached_property
    def largest(self) -> int:
        """Weights of the largest matrix inside a layer."""
        return max(o * i for o, i in linear_shapes(self.spec).values())

    @cached_property
    def kept_bytes(self) -> float:
        """Bytes a token and layer that autograd keeps under `keep`."""
        ranks = list(self.adapted.values())
        mean = sum(ranks) / len(ranks) if ranks else 0
        table = kept(self.spec, self.method, set(self.adapted), width=self.width, device=self.device.kind, rank=mean,
                     variant=self.lora.variant, dropout=self.lora.dropout > 0)  # fmt: skip
        return sum(size for _, size, _ in table)

    # -- memory --

    def weights(self) -> Iterator[Component]:
        """The model itself."""
        count, w = parameters(self.spec), self.width
        dense = count.total - count.linear
        if self.method == "qlora":
            stored = self.spec.layers * sum(nf4_bytes(o * i) for o, i in linear_shapes(self.spec).values())
            yield Component(
                "linear weights", stored, "device", f"{count.linear:,} weights in 4 bits with their scales, 0.516 bytes each"
            )
        else:
            yield Component("linear weights", count.linear * w, "device", f"{count.linear:,} weights in {self.dtype}")
        yield Component("embedding, head, norms", dense * w, "device", f"{dense:,} parameters in {self.dtype}, never quantised")

    def fixed(self) -> Iterator[Component]:
        """What does not depend on how many tokens go through at once."""
        count, w = parameters(self.spec), self.width
        yield from self.weights()
        n = self.adapter_parameters
        if self.method != "full":
            copies = 0 if w == 4 or not self.composed_because else w  # half-blocks round them where they lay them beside a weight
            yield Component(
                "adapter", n * (MASTER + copies), "device", f"{n:,} float32 masters{' and their 16-bit copies' if copies else ''}"
            )
        else:
            n = count.total
        if self.method == "full" and w != 4 and not self.inside:
            yield Component("masters", n * MASTER, "device", "a float32 master of every weight: a 16-bit one loses small updates")
        if not self.inside:
            yield Component("gradients", n * GRADIENT, "device", "float32, so that micro-batches add up without rounding")
        elif self.spec.tied:
            shared = self.spec.vocab * self.spec.dim * w
            yield Component("gradients", shared, "device", "the head's waits for the embedding's: they are one weight")
        words = "in float32" if self.optimizer == "adamw" else "in 8 bits, with a scale for 256"
        paged = self.optimizer.startswith("paged")
        where = f"AdamW's two averages {words}{', which the driver moves off a full device' if paged else ''}"
        yield Component("optimiser", round(n * MOMENTS[self.optimizer]), "host" if paged else "device", where)
        if not self.composed_because and self.method == "lora":
            yield Component(
                "room for adapters",
                self.spec.layers * self.shape.room,
                "device",
                "around the weights, so that one product serves both",
            )

    def working(self, policy: Policy, tokens: int) -> Iterator[Component]:
        """What depends on `tokens`, those that go through at once."""
        s, w = self.spec, self.width
        layer = self.kept_bytes
        ends = (
            tokens * (2 * s.dim * w + 8) + tokens * 2 * s.head_dim * w
        )  # final norm's input, labelled rows, their gradient; rope tables
        if policy == "keep":
            activations = s.layers * layer * tokens + self._scores(tokens)[0]
            why = f"{layer:,.0f} bytes a token and layer, nothing is recomputed"
        else:
            activations = s.layers * s.dim * w * tokens
            why = f"{s.dim * w:,} bytes a token and layer: only each layer's input is kept"
        activations += ends
        yield Component("activations", round(activations), "device", f"{tokens:,} tokens at once; {why}")
        transient, reason = self.transient(policy, tokens)
        yield Component("largest transient", round(transient), "device", reason)
        cache, count = self.cache_bytes(), min(self.samples, DECODE_BATCH)
        beyond = max(0, cache - round(activations + transient))
        if self.samples:
            why = f"{gb(cache / GIB, 2)} GB to answer {count} prompts" + (
                "" if beyond else ", less than training's activations leave again"
            )
            yield Component("sample answers", beyond, "device", why)
        yield self._overhead(activations + transient + beyond)

    def _overhead(self, moving: float) -> Component:
        kind = self.device.kind
        what = {"cuda": "CUDA's context and workspaces", "cpu": "Python and torch themselves"}.get(kind, "the runtime itself")
        why = f"{what}; {FRAGMENTS[kind]:.0%} of what moves for fragments"
        return Component("context, allocator", CONTEXT[kind] + round(FRAGMENTS[kind] * moving), "device", why)

    def transient(self, policy: Policy, tokens: int) -> tuple[float, str]:
        """The fullest instant beyond what is kept: the top layer's backward, or the loss of a chunk of logits."""
        s, w, kind = self.spec, self.width, self.device.kind
        if self.method == "qlora":
            weight = self.largest * w + DECODE_SCRATCH * min(self.largest, DECODE_CHUNK[kind])
            what = "a dequantised weight"
        elif self.method == "full":
            weight = max(self.largest, s.vocab * s.dim) * w
            what = "one weight's gradient"
        else:
            weight, what = 0, "gradients in flight"
        flight = tokens * (2 * s.dim * w + max(4 * s.hidden * w, 16 * s.dim))  # swiglu's four, or a norm's four in float32
        again = tokens * self.kept_bytes + self._scores(tokens)[0] / s.layers if policy == "checkpoint" else 0
        backward = weight + flight + again + self._scores(tokens)[1]
        logits = min(LOGIT_BYTES, 4 * s.vocab * tokens) * LOGIT_COPIES + ((4 + w) * s.vocab * s.dim if self._head_trains else 0)
        if logits > backward:
            return logits, "one chunk of logits" + (", and the head's gradient in float32" if self._head_trains else "")
        return backward, f"the top layer's backward: {what}, its gradients" + (", and its activations made again" if again else "")

    @property
    def _head_trains(self) -> bool:
        return self.method == "full" or any(_matches(entry, "lm_head") for entry in self.lora.modules_to_save)

    def _scores(self, tokens: int) -> tuple[float, float]:
        """(kept, transient) bytes of attention scores that a softcap writes out (Gemma 2); none elsewhere."""
        if self.spec.attention_softcap is None:
            return 0.0, 0.0
        row = self.spec.heads * (8 + self.width % 4) + 1  # float32 tanh and softmax, its 16-bit cast; a mask for all heads
        near = min(self.rows.longest, SOFTCAP_ROWS)  # of longer documents nothing is kept: CHUNK rows at a time are made again
        far = self.rows.longest if self.rows.longest > SOFTCAP_ROWS else 0
        return self.spec.layers * row * near * tokens, 2 * row * SOFTCAP_ROWS * far

    def cache_bytes(self) -> int:
        """Keys and values of the sample answers, and the widest activations of reading their prompts."""
        count, longest = min(self.samples, DECODE_BATCH), self.rows.longest
        return self._cached(count * (longest + self.sample_tokens)) + self._read(count * longest)

    def _cached(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        s = self.spec
        return tokens * s.layers * 2 * s.kv_heads * s.head_dim * self.width

    def _read(self, tokens: int) -> int:
        """Bytes of the widest activations while so many tokens of prompts are read at once."""
        return tokens * (3 * self.spec.hidden + 4 * self.spec.dim) * self.width

    def answering(self, count: int) -> Iterator[Component]:
        """To answer so many prompts at once, each with its answer as long as the longest row: nothing is trained."""
        tokens, s = count * self.rows.longest, self.spec
        yield from self.weights()
        cache, logits = self._cached(tokens), count * s.vocab * (4 + self.width)
        reading = round(self._read(tokens) + self._scores(tokens)[1]) + logits
        each = self._cached(1)
        yield Component("KV cache", cache, "device", f"{tokens:,} tokens of {each:,} bytes: keys and values of every layer")
        yield Component(
            "reading, logits", reading, "device", f"the widest layer over {tokens:,} tokens at once, the last one's logits"
        )
        yield self._overhead(cache + reading)
        yield from self._process()

    @cached_property
    def embedding_bytes(self) -> int:
        """Of an embedding that can wait in main memory, where layers do: neither the head's matrix too nor trained. 0 of others."""
        trained = self.method == "full" or self.lora.new_tokens
        trained = trained or any(_matches(e, "model.embed_tokens") for e in self.lora.modules_to_save)
        return 0 if self.composed_because or self.spec.tied or trained else self.spec.vocab * self.spec.dim * self.width

    def host(self, way: _Way) -> Iterator[Component]:
        if way.lifted:
            yield Component("embedding", way.lifted, "host", "a step reads a few thousand of its rows")
        if size := self._pinned(way.layers, way.tokens):
            yield Component("offloaded", size, "host", "pinned: what waits there for the backward")
        yield from self._process()

    def _process(self) -> Iterator[Component]:
        if base := HOST[self.device.kind]:
            largest = max(self.largest, self.spec.vocab * self.spec.dim) * 4
            yield Component("process", base, "host", "Python, torch and CUDA's host side")
            yield Component("loading", largest, "host", "the largest tensor: weights stream in one at a time")

    def disk(self) -> Iterator[Component]:
        count = parameters(self.spec)
        n = count.total if self.method == "full" else self.adapter_parameters
        whole = count.total * 2
        yield Component(
            "checkpoints",
            round((self.keep + 1) * n * ((self.width if self.inside else MASTER) + MOMENTS[self.optimizer])),
            "disk",
            f"{self.keep} kept and one being written",
        )
        if self.method == "full":
            yield Component(
                "model", whole * (1 + self.keep_best), "disk", f"16-bit weights{', the best so far too' if self.keep_best else ''}"
            )
        else:
            yield Component(
                "adapter file", n * 4 * (1 + self.keep_best), "disk", f"float32{', the best so far too' if self.keep_best else ''}"
            )
            yield Component("merged export", whole, "disk", "only if you merge: the whole model in 16 bits")

    # -- time --

    @property
    def trained_tokens(self) -> float:
        return self.epochs * self.rows.total

    def seconds(self, policy: Policy, tokens: int) -> float:
        """Of the whole run on the composed path."""
        passes = 3 if policy == "checkpoint" else 2  # forward, backward, and the forward again
        step = self.batch_size * self.rows.mean
        parts = max(1.0, step / tokens)  # micro-batches a step, on average
        training = self._compute(self.trained_tokens, self.flops(policy)) + self.steps * parts * self._weights(passes)
        training = max(training, self.steps * parts * self.spec.layers * passes * LAYER_SECONDS[self.device.kind])
        return training + self._beside

    @cached_property
    def _beside(self) -> float:
        """Seconds of held-out losses and sample answers."""
        work = self.held_out * self.rows.mean, self.flops("forward")
        seconds = self._compute(*work) + self._weights(1) if self.composed_because else work[0] * work[1] / self._half_rate
        held = self.evaluations * seconds
        stored = sum(c.bytes for c in self.weights())
        token = max(
            self._weights(1) + stored / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE),
            self.spec.layers * LAYER_SECONDS[self.device.kind],
        )
        return held + self.evaluations * token * self.sample_tokens * bool(self.samples)

    def flops(self, phase: str) -> float:
        """A token's: 2 a weight forward, 2 more for the gradient of x, 2 more for a weight's own, 2 to recompute; and attention."""
        s, count = self.spec, parameters(self.spec)
        attention = 4 * s.layers * s.heads * s.head_dim * self.seen
        head = s.vocab * s.dim
        if phase == "forward":
            return 2 * count.linear + 2 * head + attention
        passes = 6 if self.method == "full" else 4
        again = phase == "checkpoint"
        return (passes + 2 * again) * count.linear + passes * head + (3.5 + again) * attention + 6 * self.adapter_parameters

    @property
    def seen(self) -> float:
        """Keys that a query meets, on average over tokens and layers."""
        s = self.spec
        if not s.sliding:
            return min(self.rows.squares / 2, s.window or math.inf)
        return (
            sum(min(self.rows.squares / 2, s.window) if s.slides(i) else self.rows.squares / 2 for i in range(s.layers)) / s.layers
        )

    def _compute(self, tokens: float, flops: float) -> float:
        kind, share = self.device.kind, self.measured.efficiency if self.measured else EFFICIENCY[self.device.kind]
        if kind == "cuda" and self.dtype == "fp32":
            share *= FP32_SHARE
        if kind == "cpu" and self.dtype != "fp32":
            share *= CPU_BF16_SHARE
        return tokens * flops / (self.device.tflops * 1e12 * share)

    def _weights(self, passes: int) -> float:
        """Seconds that decoding the 4-bit weights takes in so many passes over the model."""
        traffic = DECODE_TRAFFIC * parameters(self.spec).linear * passes if self.method == "qlora" else 0
        return traffic / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE)

    # -- the layers as half-blocks: `low` layers at the bottom, `high` ones on them; n_high may be an array --

    @cached_property
    def shape(self) -> Shape:
        ranks = {name.rpartition(".")[2]: rank for name, rank in self.adapted.items()}
        return Shape(self.spec, ranks, self.width, "nf4" if self.method == "qlora" else "dense", self.fp8)

    @property
    def cache_of_weights(self) -> int:
        """Bytes of all layers' decoded weights."""
        return self.spec.layers * sum(self.shape.matrices.values())

    def sizes(self, low: Layers, high: Layers, n_high, tokens: int, cached: bool) -> tuple[Any, Any, Any, Any]:
        """Bytes: kept on the device, what comes and goes beside it at the fullest instant, sample answers beyond both, overhead.

        The backward begins at the top: what the `high` layers keep is gone when the `low` ones, whose backward takes more, begin.
        Of what is offloaded two layers' sets are on the device (the next is fetched while one is used), in the forward three (two
        leave while the next is made).
        """
        n_low = self.spec.layers - n_high
        (sets_0, stay_0, back_0, ahead_0), (sets_1, stay_1, back_1, ahead_1) = (
            self._layer(part.level, part.offload, part.tile, tokens, cached) for part in (low, high)
        )
        resident = n_low * stay_0 + n_high * stay_1
        top = resident + np.maximum(back_1 + max(2 * sets_1, sets_0 + sets_1), ahead_1)
        bottom = n_low * stay_0 + max(back_0 + 2 * sets_0, ahead_0)
        peak = resident + self._loss(tokens, low.tile, cached) + 2 * max(sets_0, sets_1)
        peak = np.maximum(peak, np.where(n_high > 0, top, 0))
        peak = np.maximum(peak, np.where(n_low > 0, bottom, 0))
        kept_bytes = resident + tokens * (self.spec.head_dim * self.width + 40)  # rope tables, ids, rows, labels
        transient = peak - resident
        answers = self.cache_bytes() + bool(self.samples) * self._decode_scratch
        beyond = np.maximum(0, answers - kept_bytes - transient)
        share = HALF_FRAGMENTS[0] * kept_bytes + HALF_FRAGMENTS[1] * (transient + beyond)
        workspaces = WORKSPACES + RECORDINGS * (tokens <= RECORDED and self.device.kind == "cuda")
        return kept_bytes, transient, beyond, np.rint(share) + CONTEXT[self.device.kind] + workspaces

    def _layer(self, level: Level, offload: bool, tile: int, tokens: int, cached: bool) -> tuple[int, int, int, int]:
        """Bytes of one layer: what it keeps that is moved away, that stays; what its backward holds; its forward if it moves."""
        key = level, offload, tile, tokens, cached
        if key not in self._known:
            own, shape = self.shape.kept(level) * tokens, self.shape
            ahead = 3 * own + shape.forward(level, tokens, tile, cached) if offload else 0
            self._known[key] = offload * own, (not offload) * own, shape.backward(level, tokens, tile, cached), ahead
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Level, bool, int, int, bool], tuple[int, int, int, int]]:
        return {}  # many plans are made of the same few layers

    def _loss(self, tokens: int, tile: int, cached: bool) -> float:
        if not self._head_trains:
            return self.shape.loss(tokens, tile, cached)
        return self.shape.loss(tokens, tile, cached) + 4 * self.spec.vocab * self.spec.dim + LOGIT_BYTES * LOGIT_COPIES

    @property
    def _decode_scratch(self) -> int:
        """Sample answers go through the composed path, which decodes a weight at a time in plain PyTorch."""
        least = self.largest * self.width + DECODE_SCRATCH * min(self.largest, DECODE_CHUNK[self.device.kind])
        return least if self.method == "qlora" else 0

    def _pinned(self, layers: tuple[Layers, ...], tokens: int) -> int:
        return sum(part.count * pinned(self.shape, part.level, tokens) for part in layers if part.offload)

    def half_seconds(self, low: Layers, high: Layers, n_high, tokens: int, cached: bool) -> Any:
        """Of the whole run: all arithmetic at one rate, the link where it is slower."""
        s, shape, n_low = self.spec, self.shape, self.spec.layers - n_high
        linear, head, gain = parameters(s).linear, s.vocab * s.dim, FP8_GAIN if self.fp8 else 1.0
        attention = 4 * s.heads * s.head_dim * self.seen  # a layer's forward
        forward = 2 * linear / gain + 2 * head + s.layers * attention
        backward = 2 * linear / gain + 2 * head + 2.5 * s.layers * attention + 6 * self.adapter_parameters
        again = [shape.again(part.level, attention) for part in (low, high)]
        backward = backward + sum(
            n * (product / gain + attend) for n, (product, attend) in zip((n_low, n_high), again, strict=True)
        )
        moved = sum(n * part.offload * shape.kept(part.level) for n, part in ((n_low, low), (n_high, high)))
        moved = moved / (self.device.link * 1e9) if self.device.link else 0.0
        token = np.maximum(forward / self._half_rate, moved) + np.maximum(backward / self._half_rate, moved)
        token = token + 2 * UNHIDDEN * moved
        tax = np.where(moved > 0, OFFLOAD_TAX, 1.0) * (TILE_TAX if tokens > low.tile else 1.0)
        parts = self.steps * max(1.0, self.batch_size * self.rows.mean / tokens)  # micro-batches
        decoded = 0.0
        if self.fp8 or (self.method == "qlora" and not cached):
            decoded = (n_low * shape.decodes(low.level) + n_high * shape.decodes(high.level)) * self._decode_second
        return tax * (self.trained_tokens * token + parts * decoded) + self._beside

    @property
    def _decode_second(self) -> float:
        return DECODE_BYTES["fp8" if self.fp8 else "bf16"] / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE)

    @property
    def _half_rate(self) -> float:
        return self.device.tflops * 1e12 * (self.measured.efficiency if self.measured else HALF_EFFICIENCY)

    # -- choice --

    def _token_sizes(self) -> list[int]:
        """A row is never cut: fewer tokens at once than the longest row has are not possible."""
        longest = self.rows.longest
        if self.inside:
            return [self.fullest]
        if self.tokens is not None:
            return [max(longest, self.tokens)]
        top = max(longest, min(MICRO_CAP[self.device.kind], self.batch_size * longest))
        return [longest, *(1 << k for k in range(6, 18) if longest < 1 << k <= top)]

    def candidates(self) -> list[_Way]:
        """All that `memory` leaves open on the composed path."""
        layers = self.spec.layers
        return [_Way(self, (Layers(layers, policy),), size) for policy in self.policies for size in self._token_sizes()]

    @cached_property
    def table(self) -> tuple[list[tuple[Layers, Layers, int, bool]], np.ndarray, np.ndarray]:
        """All that is open to half-blocks: (low, high, tokens, cached) for each row, and GiB and minutes with 0 .. layers `high`
        ones; infinite where main memory cannot hold what is offloaded. No plan has more than two kinds of layers."""
        counts = self.spec.layers + 1 if not self.mix else 1
        rows, needs, minutes = [], [], []
        for low, high, tokens, cached, n_high, size in self._sized():
            time = self.half_seconds(low, high, n_high, tokens, cached) / 60
            pad = (0, counts - len(n_high))
            rows.append((low, high, tokens, cached))
            needs.append(np.pad(size, pad, constant_values=np.inf))
            minutes.append(np.pad(np.broadcast_to(time, n_high.shape), pad, constant_values=np.inf))
        return rows, np.array(needs), np.array(minutes)

    def _sized(self, caching: bool = True) -> Iterator[tuple[Layers, Layers, int, bool, np.ndarray, np.ndarray]]:
        """The table's rows as (low, high, tokens, cached, n_high, GiB); without `caching` no decoded weights are kept."""
        kinds = [(level, off) for off in self.offloads for level in self.levels]
        pairs = [(low, high) for low in kinds for high in kinds if low == high or _richer(high, low)]
        counts = np.arange(self.spec.layers + 1)
        if self.mix:
            below, above = self.mix[0], self.mix[-1]
            pairs = [((below.level, below.offload), (above.level, above.offload))]
            counts = np.array([above.count if len(self.mix) > 1 else 0])
        caches = (False, True) if caching and self.method == "qlora" and not self.fp8 and self.device.kind == "cuda" else (False,)
        fixed = sum(c.bytes for c in self.fixed() if c.where == "device")
        for tokens in self._token_sizes():
            waits = {kind: kind[1] * pinned(self.shape, kind[0], tokens) for kind in {kind for pair in pairs for kind in pair}}
            for tile in TILES if tokens > min(TILES) else (WHOLE,):
                for below, above in pairs:
                    low, high = Layers(0, *below, tile), Layers(0, *above, tile)
                    n_high = counts if below != above or self.mix else counts[:1]
                    pin = waits[below], waits[above]
                    over = (self.spec.layers - n_high) * pin[0] + n_high * pin[1] > pinnable(self.device)
                    for cached in caches:
                        size = sum(self.sizes(low, high, n_high, tokens, cached)) + fixed + cached * self.cache_of_weights
                        offloads = (low.offload & (n_high < self.spec.layers)) | (high.offload & (n_high > 0))
                        size = size - offloads * self.embedding_bytes
                        yield low, high, tokens, cached, n_high, np.where(over, np.inf, size / GIB)

    def _way(self, at: int) -> _Way:
        rows, needs, _ = self.table
        row, n = divmod(int(at), needs.shape[1])
        low, high, tokens, cached = rows[row]
        n_high = n if not self.mix else self.mix[1].count if len(self.mix) > 1 else 0
        parts = (replace(low, count=self.spec.layers - n_high), replace(high, count=n_high))
        return _Way(self, tuple(part for part in parts if part.count), tokens, cached)

    def best(self, budget: float) -> _Way:
        """Of those that fit the fastest; of near ties the leanest. When none fits, the leanest of all.

        More budget never makes the choice slower: what is added takes more memory, so it is taken only where it is faster.
        Composed: the leanest within SLACK of the fastest. Half-blocks, whose sizes are many: the least time x (1 + WORTH a GiB).
        """
        if not self.composed_because:
            _, needs, minutes = self.table
            if not (needs <= budget).any():
                return self.leanest
            return self._way(np.where(needs <= budget, minutes * (1 + WORTH * np.minimum(needs, 1e6)), np.inf).argmin())
        ways = self.candidates()
        fitting = [way for way in ways if way.needs <= budget]
        if not fitting:
            return min(ways, key=lambda way: way.needs)
        quickest = min(way.minutes for way in fitting)
        return min((way for way in fitting if way.minutes <= SLACK * quickest), key=lambda way: (way.needs, way.minutes))

    @cached_property
    def leanest(self) -> _Way:
        """With one kind of layers: what is said of a run that does not fit."""
        if not self.composed_because:
            needs = self.table[1] if self.mix else self.table[1][:, :1]
            return self._way(needs.argmin() * self.table[1].shape[1])
        return min(self.candidates(), key=lambda way: way.needs)

    @property
    def least(self) -> float:
        if self.composed_because:
            return self.leanest.needs
        return min(float(size.min()) for *_, size in self._sized(caching=False))


@dataclass(frozen=True)
class _Way:
    """A job with the policy of its layers and its micro-batch chosen. `cached`: decoded weights are kept."""

    job: _Job
    layers: tuple[Layers, ...]  # from the bottom
    tokens: int
    cached: bool = False

    @property
    def activations(self) -> str:
        return describe(self.layers)

    @property
    def lifted(self) -> int:
        """Bytes of the embedding where it is in main memory: where layers wait there too."""
        return self.job.embedding_bytes if any(part.offload for part in self.layers) else 0

    @cached_property
    def components(self) -> tuple[Component, ...]:
        job = self.job
        fixed = [replace(c, bytes=c.bytes - self.lifted) if c.name.startswith("embedding") else c for c in job.fixed()]
        return (*fixed, *(job.working(self.layers[0].level, self.tokens) if job.composed_because else self._half_blocks()))

    def _half_blocks(self) -> Iterator[Component]:
        job, low, high = self.job, self.layers[0], self.layers[-1]
        n_high = high.count if len(self.layers) > 1 else 0
        kept_bytes, transient, beyond, overhead = (round(float(x)) for x in job.sizes(low, high, n_high, self.tokens, self.cached))
        levels = dict.fromkeys(part.level for part in reversed(self.layers))
        each = ", ".join(f"{job.shape.kept(level):,} bytes a token and layer for {level}" for level in levels)
        waits = " (waits in main memory where it is offloaded)" if low.offload or high.offload else ""
        yield Component("activations", kept_bytes, "device", f"{self.tokens:,} tokens at once; {each}{waits}")
        tiled = f", the MLP in tiles of {low.tile:,}" if self.tokens > low.tile else ""
        yield Component(
            "largest transient", transient, "device", f"a layer's backward and a dense weight, or a chunk of logits{tiled}"
        )
        if self.cached:
            yield Component("decoded weights", job.cache_of_weights, "device", "kept while there is room: nothing is decoded again")
        if job.samples:
            count = min(job.samples, DECODE_BATCH)
            yield Component("sample answers", beyond, "device", f"to answer {count} prompts, beyond what training leaves again")
        yield Component("context, allocator", overhead, "device", "CUDA's context, cuBLAS's workspaces, fragments")

    @cached_property
    def needs(self) -> float:
        return sum(c.bytes for c in self.components if c.where == "device") / GIB

    @cached_property
    def minutes(self) -> float:
        job, low, high = self.job, self.layers[0], self.layers[-1]
        if job.composed_because:
            return job.seconds(low.level, self.tokens) / 60
        return float(job.half_seconds(low, high, high.count if len(self.layers) > 1 else 0, self.tokens, self.cached)) / 60

    def choice(self, budget: float) -> Choice:
        return Choice(self.job.method, self.activations, self.tokens, self.needs, self.minutes, self.needs <= budget)


def _richer(a: tuple[Level, bool], b: tuple[Level, bool]) -> bool:
    """Whether layers of kind `a` may lie on layers of kind `b`: they keep more, or as much where `b` is offloaded."""
    size = ("checkpoint", "attention", "recompute", "int8", "keep").index
    return (size(a[0]), b[1]) > (size(b[0]), a[1]) and a[1] <= b[1]


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


def nf4_bytes(weights: int) -> int:
    """Bytes of one NF4 weight with double quantisation (ops/nf4.py): 0.5159 a weight."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 1024 + 4


def usual_full_bytes(spec: Spec) -> int:
    """What full fine-tuning takes elsewhere before activations: 16-bit weights and gradients, float32 masters and two averages."""
    return parameters(spec).total * (2 + 2 + 4 + 8)


def _matches(target: str, name: str) -> bool:
    """PEFT's rule (adapters/targets.py, which lies above this file): a last name, a full name, or a pattern between slashes."""
    if len(target) > 2 and target[0] == target[-1] == "/":
        return re.fullmatch(target[1:-1], name) is not None
    return name == target or name.endswith(f".{target}")


def _of_pattern(patterns: dict[str, int], name: str, default: int) -> int:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


# ---- advice --------------------------------------------------------------------------------------------------------------------


def _advice(job: _Job, best: _Way, budget: float) -> Iterator[Advice]:
    """Each knob alone against the plan as chosen, dearest first; nothing when the plan fits with a tenth to spare."""
    if best.needs <= 0.9 * budget:
        return
    found = []
    for key, value, changed, note in _knobs(job, best):
        needs = changed.leanest.needs
        if best.needs - needs > 0.01 * best.needs:
            found.append(Advice(key, value, best.needs - needs, needs <= budget < best.needs, note))
    yield from sorted(found, key=lambda a: (not a.enough, -a.gain))


def _knobs(job: _Job, best: _Way) -> Iterator[tuple[str, str, _Job, str]]:
    """(key, value, the job with it, what it costs). Knobs of `memory` stay where the plan has put them."""
    top = best.layers[-1]
    if len(best.layers) > 1:
        here = replace(job, mix=best.layers, tokens=best.tokens)
    else:
        here = replace(job, levels=(top.level,), tokens=best.tokens)
        here = here if job.composed_because else replace(here, offloads=(top.offload,))
    for method, note in (("lora", "trains an adapter, not every weight"), ("qlora", "4-bit base, some slower")):
        if METHODS.index(method) < METHODS.index(job.method):
            yield "method", method, here.by(method), note
    lean = replace(here, levels=("checkpoint",), mix=())
    if any(part.level != "checkpoint" for part in best.layers):
        yield "memory.activations", "checkpoint", lean, "about a third more time"
    if not job.composed_because and job.device.link and True not in job.offloads:
        yield "memory.offload", "true", replace(here, offloads=(True,), mix=()), "as fast where the link keeps up"
    longest = job.rows.longest
    if len(job.levels) == 1 and job.tokens is not None and top.level == "keep" and best.tokens > longest:
        lean = replace(here, levels=LEVELS, offloads=job.offloads, mix=(), tokens=longest)
        yield "memory.activations and memory.micro_batch_tokens", "auto", lean, "same result, some slower"
    if job.inside and job.batch_size > 1:
        alone = replace(here, batch_size=1, fullest=longest, tokens=None)
        yield "train.batch_size", "1", alone, "noisier steps, which want a lower learning rate"
    elif best.tokens > longest:
        yield "memory.micro_batch_tokens", str(longest), replace(here, tokens=longest), "same result, some slower"
    if longest >= 256:
        half = longest // 2
        rows = replace(job.rows, longest=half, mean=min(job.rows.mean, half), squares=min(job.rows.squares, half))
        short = replace(here, rows=rows, tokens=half, fullest=min(job.fullest, job.batch_size * half))
        yield "data.max_length", str(half), short, "longer rows are refused, or cut if you say so"
    if job.method != "full":
        if job.lora.rank > 8:
            yield (
                "lora.rank",
                "8",
                replace(here, lora=job.lora.model_copy(update={"rank": 8, "rank_pattern": {}})),
                "a narrower update",
            )
        if job.lora.targets == "all-linear" and not job.spec.fused:
            few = job.lora.model_copy(update={"targets": ("q_proj", "v_proj")})
            yield "lora.targets", "[q_proj, v_proj]", replace(here, lora=few), "learns clearly less"
        if job.lora.modules_to_save:
            yield (
                "lora.modules_to_save",
                "[]",
                replace(here, lora=job.lora.model_copy(update={"modules_to_save": ()})),
                "new_tokens is the cheap way",
            )
    if job.samples and next(c.bytes for c in best.components if c.name == "sample answers"):
        yield "eval.samples", "0", replace(here, samples=0), "no answers to read"
    if job.dtype == "fp32" and job.device.kind == "cuda":
        low = "bf16" if job.device.bf16 else "fp16"
        yield "memory.dtype", low, replace(here, dtype=low), "half the bytes"


def _notes(job: _Job, config: RunConfig) -> Iterator[str]:
    rows, s = job.rows, job.spec
    if rows.assumed:
        yield (
            f"row lengths are not known yet: {rows.count:,} rows of {rows.mean:,.0f} tokens, the longest {rows.longest:,}, "
            "are assumed; `tunesmith check` reads yours"
        )
    if job.tokens is not None and job.tokens < rows.longest:
        yield f"memory.micro_batch_tokens: {job.tokens:,} is less than the longest row; {rows.longest:,} go through at once"
    if rows.longest > s.context:
        yield f"the longest row has {rows.longest:,} tokens, the model was made for {s.context:,}"
    if job.device.guessed:
        yield f"the speed of {job.device.name} is a guess"
    if job.device.kind == "mps":
        yield "Apple GPUs run the reference operations; nobody has tested them"
    if job.method == "full":
        total, usual = parameters(s).total, usual_full_bytes(s) / GIB
        inside = total * (job.width + MOMENTS[INSIDE])
        ours = inside if job.inside else total * ((job.width if job.width == 2 else 0) + MASTER + GRADIENT + MOMENTS[job.optimizer])
        line = f"full holds {gb(ours / GIB)} GB before activations; the usual mixed-precision recipe {gb(usual)} GB"
        if job.inside:
            yield line
            yield f"train.optimizer: {INSIDE} takes a step in one micro-batch, of up to {job.fullest:,} tokens, and clips nothing"
        else:
            cheaper = job.device.kind == "cuda" and job.dtype != "fp16"
            yield line + f"; train.optimizer: {INSIDE} {gb(inside / GIB)} GB" * cheaper
    if job.method != "full" and config.lora.continue_from != "none":
        yield "the adapter in lora.continue_from decides rank and targets; the defaults are counted here"
    if s.attention_softcap is not None:
        yield "attention scores are written out (softcap): no fused kernel serves this model"
