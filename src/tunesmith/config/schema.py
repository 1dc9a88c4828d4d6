"""The run file: one pydantic tree is the YAML schema, the defaults, the checks, the editor's schema, the reference and `explain`.

Four keys suffice: model, data, method, output. `None` never means "maybe": a key whose default depends on others says "auto".
Each field's docstring says what it does; `key(...)` adds what too high and too low look like and the name in Axolotl, TRL, Unsloth
("-" where they have none). What one key allows stands beside it; what two keys forbid each other stands in `contradictions`.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError


def key(
    default: Any = ..., *, high: str = "", low: str = "", wrong: str = "", axolotl: str = "-", trl: str = "-", unsloth: str = "-"
) -> Any:
    """A field with what `explain` says of it. Numbers say `high` and `low`, choices say what a `wrong` one looks like."""
    assert bool(wrong) != bool(high and low), "a key says either wrong=, or both high= and low="
    notes = {"high": high, "low": low, "wrong": wrong, "axolotl": axolotl, "trl": trl, "unsloth": unsloth}
    return Field(default, json_schema_extra=notes)


def _number(value: Any) -> Any:
    """YAML's true is Python's 1: without this, `rank: true` would be a rank of 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "expected a number")
    return value


def _text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_text", "expected text")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ValueError("holds a control character or half a character, which no name has")
    return value


def place(value: str) -> str:
    """A path, a hub id or a word: `~` is the home folder; a relative path counts from the current directory, not from the file."""
    return os.path.expanduser(_text(value))


def _pattern(value: str) -> str:
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] == "/" else value
    if text != value or re.search(r"[*+?^$|()\[\]\\]", text):
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as fault:
            raise ValueError(f"{value!r} is not a regular expression: {fault}") from None
    return _text(value)


LATER = "contradictions are looked for later"  # the context with which load.py validates
INSIDE = "adamw_8bit_inside"  # train.optimizer: each weight is updated inside the backward
Auto = Literal["auto"]
Text = Annotated[str, AfterValidator(_text)]
Place = Annotated[str, AfterValidator(place)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_number)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_number)]
PositiveOrZero = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
# At most 1: AdamW never wants more, and `2e4` for `2e-4` is the commonest slip.
Rate = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def long_form(data: Any) -> Any:
    """`data: chats/`, `data: [a, b]` and `data: {train: chats/}` all mean `data: {train: [{path: ...}]}`."""
    if isinstance(data, (str, list, tuple)):
        data = {"train": data}
    if isinstance(data, dict) and data.get("train") is not None:
        train = data["train"] if isinstance(data["train"], (list, tuple)) else [data["train"]]
        data = {**data, "train": [{"path": source} if isinstance(source, str) else source for source in train]}
    return data


class Source(Section):
    """One source of rows in a mixture."""

    path: Place = key(
        wrong="A folder gives every data file in it, so keep notes and held-out rows elsewhere.",
        axolotl="datasets[].path",
        trl="ScriptArguments.dataset_name",
    )
    """A file, a folder of files (jsonl, json, csv, xlsx, parquet, txt, md, html, pdf, docx), or a hub dataset,
    `hub:owner/name[@revision][/split]`."""
    weight: Positive = key(
        1.0,
        high="This source drowns the others, and rows seen many times are learned by heart.",
        low="The model hardly sees this source.",
    )
    """Share of this source's rows used in an epoch: 0.5 takes half, 2 takes each twice."""
    columns: dict[Literal["prompt", "answer", "system", "id", "text"], Text] = key(
        {},
        wrong="Question and answer swapped: the model learns to ask. `tunesmith check` says what was guessed, and shows rows.",
        axolotl="datasets[].field_instruction, field_output, field_system",
        trl="dataset.rename_columns before training",
        unsloth="dataset.rename_columns before training",
    )
    """Which column, or key of a row, is the `prompt`, `answer`, `system`, `id`, or the `text` to learn as it stands. What is not
    said is guessed from the names and contents of a table, and told. In dialogues `answer` is the speaker that the model is to
    be."""


class Data(Section):
    """What is learned from. A bare path or list of paths is short for `train:`."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = key(
        wrong="Rows that do not look like what you will ask later teach the wrong thing, however low the loss.",
        axolotl="datasets",
        trl="train_dataset",
        unsloth="train_dataset",
    )
    """Rows to train on: a path, a list of paths, or a list of `{path:, weight:, columns:}`."""
    held_out: Place | Fraction = key(
        0.05,
        high="Few rows are left to learn from.",
        low="Under about 50 rows the held-out loss is noise; at 0 nothing shows whether the run helped.",
        axolotl="val_set_size, test_datasets",
        trl="eval_dataset",
        unsloth="eval_dataset",
    )
    """Rows never trained on: a file of your own, or a share of the clusters of near-equal rows (at most 500 rows are taken).
    0 for none."""
    template: Place = key(
        "auto",
        wrong="One the model was not trained with costs quality at once: odd turn markers, answers that do not end.",
        axolotl="chat_template, chat_template_jinja",
        trl="SFTConfig.chat_template_path",
        unsloth="get_chat_template(chat_template)",
    )
    """How a chat becomes text: `auto` is the checkpoint's own chat template, `plain` where it has none; `plain` is text markers
    and EOS; or name a jinja file."""
    train_on: Literal["all", "last"] = key(
        "all",
        wrong="`last` on long chats throws most answers away; `all` on chats whose early answers are bad teaches those too.",
        axolotl="datasets[].roles_to_train",
        trl="SFTConfig.assistant_only_loss",
        unsloth="train_on_responses_only(last_response_only)",
    )
    """Which assistant turns are learned. A message's own weight wins."""
    add_eos: bool = key(
        False,
        wrong="Off where the template writes no stop: answers never end (such a template is refused). On where it does: no effect.",
        axolotl="eot_tokens, datasets[].train_on_eos",
        trl="SFTConfig.eos_token",
        unsloth="EOS_TOKEN in the formatting function",
    )
    """Put the EOS token after each answer when the template writes no stop of its own."""
    max_length: Annotated[int, Field(ge=8), BeforeValidator(_number)] = key(
        2048,
        high="More memory for the longest rows; more than the model was made for gives nonsense.",
        low="Rows are refused, or cut: an answer cut before its end teaches the model not to stop.",
        axolotl="sequence_len",
        trl="SFTConfig.max_length",
        unsloth="max_seq_length",
    )
    """Longest document in tokens."""
    overlength: Literal["refuse", "truncate"] = key(
        "refuse",
        wrong="`truncate` trains on answers without their end; `refuse` stops the run beyond max_refused.",
        axolotl="excess_length_strategy",
        trl="SFTConfig.max_length always cuts",
        unsloth="max_seq_length always cuts",
    )
    """What happens to a document longer than max_length: refused with its line, or cut at the end and counted."""
    max_refused: Fraction = key(
        0.01,
        high="A broken export trains on what little of it can be read.",
        low="One bad line stops the run; at 0 every row must be good.",
    )
    """Share of rows that may be refused before the run stops."""
    workers: CountOrZero | Auto = key(
        "auto",
        high="Memory for each process, and no faster than the machine has cores.",
        low="Preparing a large set takes longer; 0 does it all in the main process.",
        axolotl="dataset_num_proc",
        trl="SFTConfig.dataset_num_proc",
        unsloth="dataset_num_proc",
    )
    """Processes that prepare the data."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return long_form(value)


class Lora(Section):
    """The two small matrices beside each frozen linear: W x + alpha / rank * B A x."""

    rank: Count = key(
        16,
        high="Memory and time grow, and small sets are learned by heart: held-out loss turns up early.",
        low="Training loss levels off high: the update is too narrow for the task.",
        axolotl="lora_r",
        trl="LoraConfig.r",
        unsloth="r",
    )
    """Width of the update."""
    alpha: Positive = key(
        32.0,
        high="Works like a larger learning rate: the loss jumps about or rises.",
        low="Works like a smaller learning rate: the loss hardly moves.",
        axolotl="lora_alpha",
        trl="LoraConfig.lora_alpha",
        unsloth="lora_alpha",
    )
    """The update is scaled by alpha / rank (alpha / sqrt(rank) for rslora)."""
    dropout: Fraction = key(
        0.0,
        high="Training loss stays high; above 0 the fast fused path is off.",
        low="Nothing is lost on most sets; on a few hundred rows 0.05 can delay learning by heart.",
        axolotl="lora_dropout",
        trl="LoraConfig.lora_dropout",
        unsloth="lora_dropout",
    )
    """Share of the adapter's inputs set to zero while training."""
    targets: Literal["all-linear"] | Annotated[tuple[Pattern, ...], Field(min_length=1)] = key(
        "all-linear",
        wrong="Attention alone (`[q_proj, v_proj]`) learns clearly less than all linears; a name that matches nothing is an error.",
        axolotl="lora_target_modules, lora_target_linear",
        trl="LoraConfig.target_modules",
        unsloth="target_modules",
    )
    """Linears to adapt: last names (`q_proj`), full names, or a pattern between slashes (`/layers\\.[0-9]\\..*_proj/`)."""
    variant: Literal["lora", "rslora", "dora"] = key(
        "lora",
        wrong="dora is slower for a small gain; rslora with an alpha meant for lora is sqrt(rank) times too strong.",
        axolotl="peft_use_rslora, peft_use_dora",
        trl="LoraConfig.use_rslora, LoraConfig.use_dora",
        unsloth="use_rslora",
    )
    """Kind of adapter: rslora scales by alpha / sqrt(rank); dora also trains each output's magnitude."""
    rank_pattern: dict[Pattern, Count] = key(
        {},
        wrong="A pattern that matches nothing is an error; alpha / rank changes with the rank unless alpha_pattern follows.",
        trl="LoraConfig.rank_pattern",
    )
    """Another rank for modules whose name ends in, or matches, the key."""
    alpha_pattern: dict[Pattern, Positive] = key(
        {},
        wrong="A pattern that matches nothing is an error; modules with another alpha / rank learn faster or slower than the rest.",
        trl="LoraConfig.alpha_pattern",
    )
    """Another alpha, in the same way."""
    continue_from: Place = key(
        "none",
        wrong="An adapter of another base model is refused; a learning rate as high as for a new adapter undoes what it knows.",
        axolotl="lora_model_dir",
        trl="PeftModel.from_pretrained(is_trainable)",
        unsloth="model_name of the adapter",
    )
    """A PEFT adapter folder to go on from; `none` starts a new adapter."""
    new_tokens: tuple[Text, ...] = key(
        (),
        wrong="A new token needs many rows that use it; words that the tokenizer already splits well need none.",
        axolotl="tokens",
        trl="LoraConfig.trainable_token_indices",
        unsloth="add_new_tokens",
    )
    """Tokens added to the vocabulary; only their embedding rows are trained (PEFT's trainable_token_indices). They are
    recognised in answers and in the template, never in what a user types."""
    modules_to_save: tuple[Text, ...] = key(
        (),
        wrong="`lm_head` or `embed_tokens` of a 7B model adds gigabytes to memory and to the adapter; new_tokens is the cheap way.",
        axolotl="lora_modules_to_save",
        trl="LoraConfig.modules_to_save",
        unsloth="modules_to_save",
    )
    """Modules trained whole beside the adapter, such as `lm_head`."""


class Train(Section):
    """How the weights move."""

    epochs: Positive = key(
        3.0,
        high="Training loss keeps falling while held-out loss turns up: the rows are learned by heart.",
        low="Held-out loss is still falling at the end.",
        axolotl="num_epochs",
        trl="num_train_epochs",
        unsloth="num_train_epochs",
    )
    """Passes over the rows."""
    max_steps: CountOrZero = key(
        0,
        high="As too many epochs.",
        low="The run ends before it has learned; good for a first trial (`train.max_steps=20`).",
        axolotl="max_steps",
        trl="max_steps",
        unsloth="max_steps",
    )
    """Stop after this many optimiser steps; 0 leaves it to `epochs`."""
    batch_size: Count = key(
        8,
        high="Few steps in a run: each is steady, but little is learned in the same time.",
        low="Noisy steps: the loss jumps about, and the learning rate must be lower.",
        axolotl="batch_size, micro_batch_size x gradient_accumulation_steps",
        trl="per_device_train_batch_size x gradient_accumulation_steps",
        unsloth="per_device_train_batch_size x gradient_accumulation_steps",
    )
    """Examples per optimiser step, at most: an epoch's are spread evenly over as few steps as that allows. How many micro-batches a
    step takes is the memory plan's affair and never changes the gradient."""
    learning_rate: Rate | Auto = key(
        "auto",
        high="The loss jumps, rises or becomes NaN; answers turn into repetition.",
        low="The loss falls slowly and is still falling at the end.",
        axolotl="learning_rate",
        trl="learning_rate",
        unsloth="learning_rate",
    )
    """Peak learning rate; auto is 2e-4 for lora and qlora, 2e-5 for full."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "cosine",
        wrong="constant ends on a noisy loss; the falling ones tie the result to the planned length of the run.",
        axolotl="lr_scheduler",
        trl="lr_scheduler_type",
        unsloth="lr_scheduler_type",
    )
    """How the rate falls after warm-up: cosine or linear to zero, constant, or wsd (constant, then linear to zero over the last
    fifth)."""
    warmup_ratio: Fraction = key(
        0.03,
        high="Much of the run is spent below the chosen rate.",
        low="The first steps are the largest: the loss jumps at the start.",
        axolotl="warmup_ratio, warmup_steps",
        trl="warmup_ratio, warmup_steps",
        unsloth="warmup_ratio, warmup_steps",
    )
    """Share of all steps over which the rate rises from zero."""
    weight_decay: PositiveOrZero = key(
        0.0,
        high="Weights are pulled to zero: training loss stays high.",
        low="No harm in most runs; 0.01 to 0.1 can help method: full on small sets.",
        axolotl="weight_decay",
        trl="weight_decay",
        unsloth="weight_decay",
    )
    """AdamW's decoupled decay, on matrices only."""
    betas: tuple[Fraction, Fraction] = key(
        (0.9, 0.999),
        high="The averages react late: after a bad batch many steps go the wrong way.",
        low="The averages follow every batch: noisy steps. 0.95 for the second is usual with large batches.",
        axolotl="adam_beta1, adam_beta2",
        trl="adam_beta1, adam_beta2",
        unsloth="adam_beta1, adam_beta2",
    )
    """AdamW's two averages."""
    max_grad_norm: PositiveOrZero = key(
        1.0,
        high="One odd batch can throw the weights far off: a spike in the loss.",
        low="Nearly every step is cut, as if the learning rate were lower.",
        axolotl="max_grad_norm",
        trl="max_grad_norm",
        unsloth="max_grad_norm",
    )
    """The gradient's norm is cut to this; 0 turns clipping off. adamw_8bit_inside never clips."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_8bit_inside"] = key(
        "adamw",
        wrong="8 bits save 6 bytes a trained weight: much with method: full, a quarter GiB for an adapter of a 7B. They need an "
        "NVIDIA GPU, the first two bitsandbytes. adamw_8bit_inside needs 4 bytes a weight where adamw needs 18, and gives up "
        "clipping, micro-batches and float32 masters for it.",
        axolotl="optimizer",
        trl="optim",
        unsloth="optim",
    )
    """AdamW with averages in float32, or in 8 bits (bitsandbytes; tensors of fewer than 4,096 numbers stay in 32); paged ones move
    to main memory when the device is full. adamw_8bit_inside, for method: full, updates each weight inside the backward and keeps
    neither gradients nor float32 masters: a step is one micro-batch, bf16 weights are rounded stochastically."""
    neftune_alpha: PositiveOrZero = key(
        0.0,
        high="Training loss stays high and facts blur; above 15 is too much.",
        low="0 is plain training; 5 can make chat answers richer.",
        axolotl="neftune_noise_alpha",
        trl="neftune_noise_alpha",
        unsloth="neftune_noise_alpha",
    )
    """Noise of this strength on the embeddings while training (NEFTune); 0 is off."""
    loraplus_ratio: Positive = key(
        1.0,
        high="B runs away: the loss jumps as with too high a learning rate. 16 is the paper's value.",
        low="1 is plain LoRA; below 1 B learns slower than A, which helps nobody.",
        axolotl="loraplus_lr_ratio",
        trl="create_loraplus_optimizer(loraplus_lr_ratio)",
    )
    """B learns this many times faster than A (LoRA+); 1 is plain LoRA."""
    deterministic: bool = key(
        False,
        wrong="On costs GPU speed; off, two GPU runs of one seed differ in the last digits.",
        trl="full_determinism",
        unsloth="full_determinism",
    )
    """Bit-identical on one GPU at some cost in speed (a CPU always is)."""

    def rate(self, method: str) -> float:
        """The peak rate: as given, or the method's usual one. LoRA wants about ten times that of full (Schulman et al. 2025)."""
        return self.learning_rate if self.learning_rate != "auto" else {"full": 2e-5}.get(method, 2e-4)

    def steps(self, examples: int) -> int:
        """Optimiser steps of a run whose epoch has so many examples."""
        return self.max_steps or max(1, math.ceil(math.ceil(examples / self.batch_size) * self.epochs))


class Eval(Section):
    """Held-out loss and sample answers during training."""

    every_steps: Count | Auto = key(
        "auto",
        high="The best point of the run may fall between two evaluations.",
        low="Much of the time goes into evaluating.",
        axolotl="eval_steps, evals_per_epoch",
        trl="eval_steps",
        unsloth="eval_steps",
    )
    """Steps between evaluations; auto makes about ten in a run."""
    samples: CountOrZero = key(
        3,
        high="Each evaluation waits for that many answers to be written.",
        low="You see a number fall and not what the model says.",
        axolotl="eval_table_size",
        trl="LogCompletionsCallback(num_prompts)",
    )
    """Held-out prompts answered at each evaluation."""
    sample_tokens: Count = key(
        128,
        high="Slow evaluations while the model does not yet know when to stop.",
        low="Answers are cut before they say anything.",
        axolotl="eval_max_new_tokens",
    )
    """Longest sample answer in tokens."""
    keep_best: bool = key(
        True,
        wrong="Off, a run that went on too long ends with weights worse than it once had.",
        axolotl="load_best_model_at_end",
        trl="load_best_model_at_end",
        unsloth="load_best_model_at_end",
    )
    """End with the weights of the lowest held-out loss, not the last ones."""
    early_stop: CountOrZero = key(
        0,
        high="The run goes on long after the held-out loss has turned.",
        low="1 or 2 stops at the first noise in the held-out loss; 0 never stops early.",
        axolotl="early_stopping_patience",
        trl="EarlyStoppingCallback(early_stopping_patience)",
        unsloth="EarlyStoppingCallback(early_stopping_patience)",
    )
    """Stop after this many evaluations without a better held-out loss; 0 never."""


class Memory(Section):
    """Where and in what precision it runs, and how much memory it may take."""

    device: Literal["auto", "cuda", "cpu", "mps"] = key(
        "auto",
        wrong="A device this machine lacks is an error; a CPU is fine for small models and hopeless for 7B.",
        axolotl="device",
        trl="use_cpu",
    )
    """Where it runs: auto takes an NVIDIA GPU where there is one, else the CPU. mps, Apple's GPU, is untested."""
    budget_gb: Positive | Auto = key(
        "auto",
        high="The run may end with out of memory when something else uses the device.",
        low="Refused, or slow: smaller micro-batches and recomputed activations.",
        axolotl="gpu_memory_limit",
    )
    """Device memory the run may use, in GiB; auto is what is free."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = key(
        "auto",
        wrong="fp16 overflows where bf16 does not (loss scaling guards it); fp32 takes twice the memory; bf16 crawls on old CPUs.",
        axolotl="bf16, fp16",
        trl="bf16, fp16",
        unsloth="dtype",
    )
    """Precision of the frozen weights and the arithmetic: auto is bf16 where the device has it, fp32 on a CPU. Adapter masters
    are always fp32."""
    micro_batch_tokens: Count | Auto = key(
        "auto",
        high="Out of memory.",
        low="The device idles between small pieces of work; results stay the same.",
        axolotl="micro_batch_size",
        trl="per_device_train_batch_size",
        unsloth="per_device_train_batch_size",
    )
    """Tokens that go through the model at once; auto takes what fits."""
    activations: Literal["auto", "keep", "int8", "recompute", "attention", "checkpoint"] = key(
        "auto",
        wrong="keep needs many times the memory of checkpoint, which costs a third more time; int8 moves gradients by under 1 %.",
        axolotl="gradient_checkpointing",
        trl="gradient_checkpointing",
        unsloth="use_gradient_checkpointing",
    )
    """What stays in memory for the backward, from all to least: keep; int8 (gate and up rounded to 8 bits; only where it is asked
    for); recompute (gate and up made again); attention (its output kept, all else made again); checkpoint (each layer's input).
    auto chooses for each layer what fits; results stay the same, but with int8. The three in the middle need the half-blocks:
    `plan` says whether they run."""
    offload: bool | Auto = key(
        "auto",
        wrong="On, a slow link to main memory is waited for, and that memory is pinned; off, less fits.",
        axolotl="activation_offloading",
        trl="activation_offloading",
        unsloth="use_gradient_checkpointing",
    )
    """Whether what stays for the backward waits in main memory while other layers run; auto takes it where it makes the run fit
    or faster. Results stay the same."""
    compute: Literal["auto", "fp8"] = key(
        "auto",
        wrong="fp8 is up to 1.4 times as fast and rounds each product by 3.7 %: compare held-out losses with and without. Cards "
        "before Ada, Hopper and Blackwell refuse it.",
        axolotl="fp8",
        unsloth="load_in_fp8",
    )
    """Precision of the products with frozen weights: auto is `dtype`; fp8 takes e4m3 in both directions, the adapters stay in 16
    bits. Needs the half-blocks."""
    kernels: Literal["auto", "reference", "triton"] = key(
        "auto",
        wrong="reference is slower on a GPU and good for tracking down a difference; triton needs an NVIDIA GPU.",
        axolotl="lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel",
        trl="use_liger_kernel",
    )
    """Which arithmetic: auto takes the fast kernels, or falls back to plain PyTorch and says so; triton raises if it cannot;
    reference is plain PyTorch throughout."""


class Checkpoint(Section):
    """What survives a crash."""

    every_steps: Count | Auto = key(
        "auto",
        high="A crash costs all work since the last checkpoint.",
        low="Time and disk go into writing.",
        axolotl="save_steps, saves_per_epoch",
        trl="save_steps",
        unsloth="save_steps",
    )
    """Steps between checkpoints; auto saves at each evaluation."""
    keep: Annotated[int, Field(ge=2), BeforeValidator(_number)] = key(
        2,
        high="Disk: each checkpoint of method: full is several times the model's size.",
        low="Below 2 is refused.",
        axolotl="save_total_limit",
        trl="save_total_limit",
        unsloth="save_total_limit",
    )
    """Newest checkpoints kept; at least two, because the last may be in the middle of being written."""


class Log(Section):
    """What is recorded besides metrics.jsonl. Nothing leaves the machine."""

    every_steps: Count = key(
        1,
        high="Coarse curves: spikes go unseen.",
        low="1 is every step, and costs nothing that could be measured.",
        axolotl="logging_steps",
        trl="logging_steps",
        unsloth="logging_steps",
    )
    """Steps between lines in metrics.jsonl."""
    trackers: tuple[Text, ...] = key(
        (),
        wrong="An unknown name, or one whose package is not installed, is an error.",
        axolotl="use_tensorboard",
        trl="report_to",
        unsloth="report_to",
    )
    """Further sinks from the TRACKERS table, such as tensorboard."""


class RunConfig(Section):
    """Everything that decides a run."""

    model: Place = key(
        wrong="A base model knows no chat and needs more rows than its Instruct version; a larger model needs more memory.",
        axolotl="base_model",
        trl="model_name_or_path",
        unsloth="model_name",
    )
    """A checkpoint folder, a hub id `owner/name[@revision]`, or `embedded`: the small model inside the package."""
    data: Data
    """What is learned from."""
    method: Literal["qlora", "lora", "full"] = key(
        wrong="full needs several times the memory of lora; qlora is slower than lora where lora fits.",
        axolotl="adapter, load_in_4bit",
        trl="use_peft, load_in_4bit",
        unsloth="load_in_4bit, full_finetuning",
    )
    """What is trained: qlora, an adapter on a 4-bit frozen base; lora, an adapter on a 16-bit frozen base; full, every weight."""
    output: Annotated[Path, BeforeValidator(lambda value: place(value) if isinstance(value, str) else value)] = key(
        wrong="A folder that already holds a run is refused, unless it is resumed.",
        axolotl="output_dir",
        trl="output_dir",
        unsloth="output_dir",
    )
    """The run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_number)] = key(
        0,
        wrong="None is better than another: results that hold for one seed only are luck.",
        axolotl="seed",
        trl="seed",
        unsloth="random_state",
    )
    """Decides shuffling, the held-out split, the adapter's start and every draw."""
    lora: Lora = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _keys_agree(self, info: ValidationInfo) -> RunConfig:
        """Only what cannot be run; load.py, which knows what a person wrote, also tells what has no effect."""
        faults = [c for c in contradictions(self) if not c.idle and info.context != LATER]
        if faults:
            raise ValueError("\n".join(f"{c.key}: {c.what}" for c in faults))
        return self


@dataclass(frozen=True, slots=True)
class Contradiction:
    """`key` and `against` do not go together. `idle`: key merely has no effect, so an override of `against` may drop it."""

    key: str
    against: str
    what: str
    idle: bool = True


def given(section: Section, prefix: str = "") -> Iterator[str]:
    """The leaf keys that were written down, as `section.key`; defaults are not among them."""
    for name in type(section).model_fields:
        if name in section.model_fields_set:
            value = getattr(section, name)
            if isinstance(value, Section):
                yield from given(value, f"{prefix}{name}.")
            else:
                yield prefix + name


def contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What two keys forbid each other. Only keys that were given count: nobody asked for a default."""
    written = list(given(config))

    def without_effect(keys: list[str], against: str, why: str) -> Iterator[Contradiction]:
        yield from (Contradiction(k, against, why) for k in keys if k in written)

    if config.method == "full":
        why = "has no effect with method: full, which trains every weight and has no adapter; drop it, or write method: lora"
        yield from without_effect([k for k in written if k.startswith("lora.")], "method", why)
        if config.train.loraplus_ratio != 1:
            yield from without_effect(["train.loraplus_ratio"], "method", why)
    if config.method != "full" and config.lora.continue_from != "none":
        why = "comes from the adapter that lora.continue_from names; drop it, or drop lora.continue_from"
        kept = ("rank", "alpha", "targets", "variant", "rank_pattern", "alpha_pattern")
        yield from without_effect([f"lora.{k}" for k in kept], "lora.continue_from", why)
    if config.data.held_out == 0:
        why = "needs held-out rows, and data.held_out is 0; drop it, or write data.held_out: 0.05"
        wanted = {"keep_best": config.eval.keep_best, "early_stop": config.eval.early_stop, "samples": config.eval.samples}
        yield from without_effect([f"eval.{k}" for k, on in wanted.items() if on], "data.held_out", why)
    if config.train.max_steps:
        yield from without_effect(
            ["train.epochs"], "train.max_steps", f"and train.max_steps: {config.train.max_steps} both set the length; drop one"
        )
    if config.eval.samples == 0:
        yield from without_effect(["eval.sample_tokens"], "eval.samples", "has no effect with eval.samples: 0; drop one")
    if config.memory.dtype == "fp16" and config.memory.device == "cpu":
        yield Contradiction(
            "memory.dtype", "memory.device", "fp16 is not trained on memory.device: cpu; write auto or fp32", idle=False
        )
    yield from _inside(config, written)
    if config.memory.kernels == "triton" and config.memory.device in ("cpu", "mps"):
        what = f"triton needs an NVIDIA GPU, and memory.device is {config.memory.device}; write auto"
        yield Contradiction("memory.kernels", "memory.device", what, idle=False)
    yield from _same_place(config)


def _inside(config: RunConfig, written: list[str]) -> Iterator[Contradiction]:
    """What train.optimizer: adamw_8bit_inside cannot hold.

    Clipping is refused only where it was written down: who did so counts on it, and an override must not drop it silently.
    """
    if config.train.optimizer != INSIDE:
        return
    if config.method != "full":
        what = f"{INSIDE} is for method: full; an adapter's averages are small: write adamw, or method: full"
        yield Contradiction("train.optimizer", "method", what, idle=False)
    if "train.max_grad_norm" in written and config.train.max_grad_norm:
        what = (
            f"train.optimizer: {INSIDE} cannot clip: the norm over all gradients is known only when every weight has moved; "
            "write 0 or drop it, or write train.optimizer: adamw_8bit"
        )
        yield Contradiction("train.max_grad_norm", "train.optimizer", what, idle=False)
    if config.memory.dtype == "fp16":
        what = f"fp16 needs a loss scale and steps that can be left out, which train.optimizer: {INSIDE} cannot; write bf16"
        yield Contradiction("memory.dtype", "train.optimizer", what, idle=False)
    if config.memory.device in ("cpu", "mps"):
        what = f"{INSIDE} needs an NVIDIA GPU, and memory.device is {config.memory.device}; write adamw"
        yield Contradiction("train.optimizer", "memory.device", what, idle=False)


def _same_place(config: RunConfig) -> Iterator[Contradiction]:
    """The run folder must not be what it reads; held-out rows must not be trained on. Compared as written, not on the disk."""
    output = os.path.normpath(config.output)
    for name, value, word in (("model", config.model, "embedded"), ("lora.continue_from", config.lora.continue_from, "none")):
        if value != word and os.path.normpath(value) == output:
            yield Contradiction(
                "output", name, f"is the same folder as {name}; a run must not write over what it reads", idle=False
            )
    trained = {os.path.normpath(source.path) for source in config.data.train}
    if output in trained:
        yield Contradiction(
            "output", "data.train", "is also a path in data.train; a run must not write over what it reads", idle=False
        )
    if isinstance(config.data.held_out, str) and os.path.normpath(config.data.held_out) in trained:
        what = "is also a path in data.train, so its rows would be trained on; drop it there or here"
        yield Contradiction("data.held_out", "data.train", what, idle=False)
