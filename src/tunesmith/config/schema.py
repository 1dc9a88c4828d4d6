"""The run file: one pydantic tree is the YAML schema, the defaults, the checks, the editor's schema, the reference page and `explain`.

Four keys suffice: model, data, method, output. `None` never means "maybe": a key whose default depends on others says "auto".
Each field's docstring says what it does; `key(...)` adds what too high and too low look like and the name in Axolotl, TRL, Unsloth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Source(Section):
    """One source of rows in a mixture."""

    path: str
    """A file (jsonl, json, csv, parquet, txt, md; .gz too), a folder of them, or a hub dataset `hub:owner/name[@revision][/split]`."""
    weight: PositiveFloat = 1.0
    """Share of this source's rows used in an epoch: 0.5 takes half, 2 takes each twice."""


class Data(Section):
    """What is learned from. A bare path or list of paths is short for `train:`."""

    train: tuple[Source, ...]
    """Rows to train on."""
    held_out: str | Fraction = 0.05
    """Rows never trained on: a file of your own, or a share of the clusters of near-equal rows (at most 500 rows are taken). 0 for none."""
    template: str = "auto"
    """`auto`: the checkpoint's chat template, `plain` where it has none; `plain`: text markers and EOS; or a jinja file."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns are learned. A message's own weight wins."""
    add_eos: bool = False
    """Put the EOS token after each answer when the template writes no stop of its own."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest document in tokens."""
    overlength: Literal["refuse", "truncate"] = "refuse"
    """What happens to a document longer than max_length: refused with its line, or cut at the end and counted."""
    max_refused: Fraction = 0.01
    """Share of rows that may be refused before the run stops."""
    workers: NonNegativeInt | Auto = "auto"
    """Processes that prepare the data."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`data: chats/`, `data: [a, b]` and `data: {train: chats/}` all mean a list of sources."""
        if isinstance(value, (str, list, tuple)):
            value = {"train": value}
        if isinstance(value, dict) and "train" in value:
            train = value["train"]
            train = list(train) if isinstance(train, (list, tuple)) else [train]
            value = {**value, "train": [{"path": t} if isinstance(t, str) else t for t in train]}
        return value


class Lora(Section):
    """The two small matrices beside each frozen linear: W x + alpha / rank * B A x."""

    rank: PositiveInt = 16
    """Width of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) for rslora)."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs set to zero while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linears to adapt: last names (`q_proj`), full names, or a pattern between slashes (`/layers\\.[0-9]\\..*_proj/`)."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(rank); dora also trains each output's magnitude."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Another rank for modules whose name ends in, or matches, the key."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Another alpha, in the same way."""
    continue_from: str | Literal["none"] = "none"
    """A PEFT adapter folder to go on from."""
    new_tokens: tuple[str, ...] = ()
    """Tokens added to the vocabulary; only their embedding rows are trained (PEFT's trainable_token_indices)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapter, such as `lm_head`."""


class Train(Section):
    """How the weights move."""

    epochs: PositiveFloat = 3.0
    """Passes over the rows."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimiser steps; 0 leaves it to `epochs`."""
    batch_size: PositiveInt = 8
    """Examples per optimiser step. How many micro-batches that takes is the memory plan's affair and never changes the gradient."""
    learning_rate: PositiveFloat | Auto = "auto"
    """Peak learning rate; auto is 2e-4 for lora and qlora, 2e-5 for full."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate falls after warm-up: cosine or linear to zero, constant, or wsd (constant, then linear to zero over the last fifth)."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps over which the rate rises from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled decay, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's two averages."""
    max_grad_norm: NonNegativeFloat = 1.0
    """The gradient's norm is cut to this; 0 turns clipping off."""
    neftune_alpha: NonNegativeFloat = 0.0
    """NEFTune: noise of this strength on the embeddings while training; 0 is off."""
    loraplus_ratio: PositiveFloat = 1.0
    """LoRA+: B learns this many times faster than A; 1 is plain LoRA."""
    deterministic: bool = False
    """Bit-identical on one GPU at some cost in speed (a CPU always is)."""


class Eval(Section):
    """Held-out loss and sample answers during training."""

    every_steps: PositiveInt | Auto = "auto"
    """Steps between evaluations; auto makes about ten in a run."""
    samples: NonNegativeInt = 3
    """Held-out prompts answered at each evaluation."""
    sample_tokens: PositiveInt = 128
    """Longest sample answer in tokens."""
    keep_best: bool = True
    """End with the weights of the lowest held-out loss, not the last ones."""
    early_stop: NonNegativeInt = 0
    """Stop after this many evaluations without a better held-out loss; 0 never."""


class Memory(Section):
    """Where and in what precision it runs, and how much memory it may take."""

    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """auto takes an NVIDIA GPU where there is one, else the CPU."""
    budget_gb: PositiveFloat | Auto = "auto"
    """Device memory the run may use, in GiB; auto is what is free."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the frozen weights and the arithmetic: bf16 where the device has it, fp32 on a CPU. Adapter masters are always fp32."""
    micro_batch_tokens: PositiveInt | Auto = "auto"
    """Tokens that go through the model at once; auto takes what fits."""
    activations: Literal["auto", "keep", "checkpoint"] = "auto"
    """keep every activation for the backward, or checkpoint: recompute each layer; auto keeps when it fits."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """auto falls back to plain PyTorch and says so; triton raises if it cannot."""


class Checkpoint(Section):
    """What survives a crash."""

    every_steps: PositiveInt | Auto = "auto"
    """Steps between checkpoints; auto saves at each evaluation."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; at least two, because the last may be in the middle of being written."""


class Log(Section):
    """What is recorded besides metrics.jsonl. Nothing leaves the machine."""

    every_steps: PositiveInt = 1
    """Steps between lines in metrics.jsonl."""
    trackers: tuple[str, ...] = ()
    """Further sinks from the TRACKERS table, such as tensorboard."""


class RunConfig(Section):
    """Everything that decides a run."""

    model: str
    """A checkpoint folder, a hub id `owner/name[@revision]`, or `embedded`: the small model inside the package."""
    data: Data
    """What is learned from."""
    method: Literal["qlora", "lora", "full"]
    """qlora: 4-bit frozen base and an adapter; lora: 16-bit frozen base and an adapter; full: every weight is trained."""
    output: Path
    """The run folder."""
    seed: NonNegativeInt = 0
    """Decides shuffling, the held-out split, the adapter's start and every draw."""
    lora: Lora = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
