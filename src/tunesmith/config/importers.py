"""An Axolotl or LLaMA-Factory YAML becomes a run file: `tunesmith init --from axolotl.yml`.

Nothing is dropped in silence: each key of the source ends in `mapped`, in `always` (so here without a key, or empty in the
source) or in `cannot`, with the reason; a test counts them. The text is checked by load() before it is handed out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.load import load
from tunesmith.config.yaml12 import one_line, read, show, write
from tunesmith.errors import ConfigError

COMMON = {  # theirs -> ours, the value as it is
    "seed": "seed",
    "output_dir": "output",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "neftune_noise_alpha": "train.neftune_alpha",
    "warmup_ratio": "train.warmup_ratio",
    "loraplus_lr_ratio": "train.loraplus_ratio",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "load_best_model_at_end": "eval.keep_best",
    "early_stopping_patience": "eval.early_stop",
    "logging_steps": "log.every_steps",
}
AXOLOTL = COMMON | {
    "lora_r": "lora.rank",
    "lora_model_dir": "lora.continue_from",
    "lora_modules_to_save": "lora.modules_to_save",
    "sequence_len": "data.max_length",
    "num_epochs": "train.epochs",
    "dataset_num_proc": "data.workers",
    "dataset_processes": "data.workers",
    "eval_table_size": "eval.samples",
    "eval_max_new_tokens": "eval.sample_tokens",
    "eval_table_max_new_tokens": "eval.sample_tokens",
}
LLAMA_FACTORY = COMMON | {
    "lora_rank": "lora.rank",
    "adapter_name_or_path": "lora.continue_from",
    "cutoff_len": "data.max_length",
    "num_train_epochs": "train.epochs",
    "preprocessing_num_workers": "data.workers",
}

PACKED = "batches are packed without padding and documents never see each other"
PLANNED = "planned from the memory there is; it never changes the result"
FAST = "fast kernels are chosen where the device has them (memory.kernels)"
FOUND = "read from the checkpoint"
ALWAYS = {
    **dict.fromkeys(
        ["sample_packing", "eval_sample_packing", "pad_to_sequence_len", "group_by_length", "packing", "neat_packing"], PACKED
    ),
    **dict.fromkeys(["sample_packing_bin_size", "sample_packing_group_size", "multipack_real_batches", "batch_flattening"], PACKED),
    **dict.fromkeys(["gradient_checkpointing", "gradient_checkpointing_kwargs", "disable_gradient_checkpointing"], PLANNED),
    **dict.fromkeys(
        ["per_device_eval_batch_size", "eval_batch_size", "low_cpu_mem_usage", "use_unsloth_gc", "use_reentrant_gc"], PLANNED
    ),
    **dict.fromkeys(
        ["flash_attention", "flash_attn", "sdp_attention", "xformers_attention", "eager_attention", "attn_implementation"], FAST
    ),
    **dict.fromkeys(
        ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "enable_liger_kernel", "use_unsloth", "use_liger_kernel"], FAST
    ),
    **dict.fromkeys(
        ["liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy", "torch_compile"], FAST
    ),
    **dict.fromkeys(["model_type", "tokenizer_type", "tokenizer_use_fast", "use_fast_tokenizer", "rope_scaling"], FOUND),
    **dict.fromkeys(
        ["is_mistral_derived_model", "is_llama_derived_model", "is_qwen_derived_model", "is_falcon_derived_model"], FOUND
    ),
    **dict.fromkeys(["dataset_prepared_path", "overwrite_cache", "tokenized_path"], "prepared data is cached by its content"),
    **dict.fromkeys(
        ["dataloader_num_workers", "dataloader_pin_memory", "dataset_keep_in_memory"], "data is memory-mapped; nothing to set"
    ),
    **dict.fromkeys(["plot_loss", "include_tokens_per_second"], "in report.html of every run"),
    **dict.fromkeys(["ddp_timeout", "ddp_find_unused_parameters", "local_rank"], "one device, so nothing to wait for"),
    **dict.fromkeys(["quantization_method", "quantization_type", "double_quantization"], "qlora is NF4 with double quantisation"),
    "do_train": "`tunesmith train` trains",
    "do_eval": "the held-out loss is always taken",
    "remove_unused_columns": "columns that the format does not know are ignored",
    "shuffle_merged_datasets": "rows are shuffled by the seed",
    "save_safetensors": "nothing else is written",
    "strict": "unknown keys are always an error",
    "lora_fan_in_fan_out": FOUND,
    "upcast_layernorm": "adapter masters are fp32, norms are computed in fp32",
    "tf32": "PyTorch's default stands",
    "eval_strategy": "the held-out loss is taken during training (eval.every_steps)",
    "evaluation_strategy": "the held-out loss is taken during training (eval.every_steps)",
    "save_strategy": "checkpoints are written during training (checkpoint.every_steps)",
    "evals_per_epoch": "eval.every_steps: auto makes about ten in a run",
    "saves_per_epoch": "checkpoint.every_steps: auto saves at each evaluation",
    "save_only_model": "checkpoints always hold what a resume needs",
}
ONE_GPU = "one GPU or CPU only"
TRACKER = "nothing leaves the machine; log.trackers: [tensorboard] is there"
NOT_SFT = "only supervised tuning on answers"
CANNOT = {
    **dict.fromkeys(
        ["deepspeed", "fsdp", "fsdp_config", "ddp", "sequence_parallel_degree", "context_parallel_size", "device_map"], ONE_GPU
    ),
    **dict.fromkeys(["rl", "trl", "rl_beta", "pref_beta", "pref_loss", "reward_model", "ref_model", "stage"], NOT_SFT),
    **dict.fromkeys(
        ["hub_model_id", "hub_strategy", "push_dataset_to_hub", "push_to_hub"],
        "nothing is uploaded; upload the run folder yourself",
    ),
    **dict.fromkeys(["resume_from_checkpoint", "auto_resume_from_checkpoints"], "write `tunesmith train run.yaml --resume`"),
    "trust_remote_code": "code from a checkpoint or a data set is never run",
    "load_in_8bit": "no 8-bit base: method lora keeps it in 16 bits, qlora in 4",
    "overwrite_output_dir": "a run folder is never written over; name a new output",
    "max_samples": "give the source a weight below 1: data: [{path: ..., weight: 0.1}]",
    "train_on_inputs": "only answers are learned",
    "train_on_prompt": "only answers are learned",
    "warmup_steps": "a share here: write train.warmup_ratio, warm-up steps / all steps",
    "adam_epsilon": "fixed at 1e-8",
    "default_system_message": "put the system message into the rows",
    "plugins": "no plug-ins",
}
NO_ROWS = "write-the-path-of-your-rows"
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}


@dataclass
class Imported:
    """A run file's text and what became of each key of its source."""

    text: str = ""
    mapped: list[tuple[str, str]] = field(default_factory=list)  # theirs, ours
    always: list[tuple[str, str]] = field(default_factory=list)  # theirs, why there is nothing to set
    cannot: list[tuple[str, str]] = field(default_factory=list)  # theirs, why not


def from_file(path: str | os.PathLike[str]) -> Imported:
    """Read either tool's YAML; ConfigError when it is neither's, or no YAML."""
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: cannot be read: {one_line(str(fault))}", "name an Axolotl or LLaMA-Factory YAML") from None
    document = read(text, str(path))
    tree = document.tree if isinstance(document.tree, dict) else {}
    if document.faults:
        _, line, what = document.faults[0]
        raise ConfigError(f"{path}:{line}: {what}", "mend the line, then import again")
    if "base_model" in tree:
        return from_axolotl(tree, path.name)
    if "model_name_or_path" in tree:
        return from_llamafactory(tree, path.name)
    raise ConfigError(
        f"{path}: has neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory)", "name a file of one of these two"
    )


def from_axolotl(tree: Mapping[str, Any], name: str = "an Axolotl file") -> Imported:
    """Axolotl's keys -> ours."""
    work = _Work(tree)
    work.model("base_model", "revision_of_model")
    quantised = bool(tree.get("load_in_4bit"))
    adapter = tree.get("adapter")
    work.note("adapter", "load_in_4bit", ours="method")
    work.put("method", "full" if not adapter else "qlora" if adapter == "qlora" or quantised else "lora")
    if adapter not in (None, "", "lora", "qlora"):
        work.cannot("adapter", f"{show(adapter)} is not known here; lora is written instead")
    work.datasets(tree.get("datasets"))
    work.held_out("val_set_size", "test_datasets")
    work.batch("micro_batch_size", "gradient_accumulation_steps", (1, 1))
    if tree.get("sample_packing"):
        work.advice.append(
            "sample_packing made each of their examples several rows; batch_size here counts rows: raise it to match"
        )
    work.direct(AXOLOTL)
    work.targets(tree.get("lora_target_modules"), bool(tree.get("lora_target_linear")), "lora_target_modules", "lora_target_linear")
    work.variant("peft_use_dora", "peft_use_rslora")
    work.template()
    tokens = tree.get("special_tokens") if isinstance(tree.get("special_tokens"), dict) else {}
    added = (tree.get("tokens"), tokens.get("additional_special_tokens"))
    work.new_tokens([token for some in added if isinstance(some, list) for token in some], "tokens")
    if "special_tokens" in tree:
        work.settle(
            "special_tokens", "always", "the checkpoint's own; no pad token is needed, additional ones go to lora.new_tokens"
        )
    work.choice("excess_length_strategy", "data.overlength", {"drop": "refuse", "raise": "refuse", "truncate": "truncate"})
    return work.finish(name, "Axolotl", {"train.epochs": 1.0} if "num_epochs" not in tree and not tree.get("max_steps") else {})


def from_llamafactory(tree: Mapping[str, Any], name: str = "a LLaMA-Factory file") -> Imported:
    """LLaMA-Factory's keys -> ours. Its defaults that differ from ours (rank 8, alpha 2 x rank, 5e-5, linear) are written out."""
    work = _Work(tree)
    work.model("model_name_or_path", "model_revision")
    kind, bits = tree.get("finetuning_type", "lora"), tree.get("quantization_bit")
    work.note("finetuning_type", "quantization_bit", ours="method")
    work.put("method", "full" if kind == "full" else "qlora" if bits == 4 else "lora")
    if kind not in ("lora", "full"):
        work.cannot("finetuning_type", f"{show(kind)} is not known here; lora is written instead")
    if bits not in (None, 4):
        work.cannot("quantization_bit", "only 4 bits (qlora); method lora keeps the base in 16")
    if tree.get("stage", "sft") in ("sft", "pt"):
        work.settle("stage", "always", "supervised tuning; rows of raw text are learned whole")
    work.named_datasets(tree.get("dataset"), str(tree.get("dataset_dir", "data")))
    work.held_out("val_size", "eval_dataset")
    work.batch("per_device_train_batch_size", "gradient_accumulation_steps", (8, 1))
    work.direct(LLAMA_FACTORY)
    target = tree.get("lora_target")
    work.targets(_words(target), target in (None, "all", ["all"]), "lora_target")
    work.variant("use_dora", "use_rslora")
    work.new_tokens([*_words(tree.get("add_tokens")), *_words(tree.get("add_special_tokens"))], "add_tokens", "add_special_tokens")
    if extra := _words(tree.get("additional_target")):
        work.map("additional_target", "lora.modules_to_save", extra)
    if tree.get("mask_history"):
        work.map("mask_history", "data.train_on", "last")
    work.template()
    work.advice.append("LLaMA-Factory cuts rows longer than cutoff_len; here they are refused, unless data.overlength: truncate")
    rank = tree.get("lora_rank") or 8
    theirs = {"train.learning_rate": 5e-5, "train.schedule": "linear", "lora.rank": rank}
    theirs |= {"lora.alpha": 2 * rank} if isinstance(rank, int) else {}
    return work.finish(name, "LLaMA-Factory", theirs)


def _words(value: Any) -> list[str]:
    """LLaMA-Factory's lists are `a,b` in one string, or a list."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(p).strip() for p in parts if str(p).strip()]


class _Work:
    """One import: takes keys off the source until none is left."""

    def __init__(self, tree: Mapping[str, Any]):
        self.tree, self.left = tree, list(tree)
        self.out: dict[str, Any] = {}  # ours, dotted
        self.done = Imported()
        self.advice: list[str] = []

    def put(self, ours: str, value: Any) -> None:
        self.out[ours] = value

    def settle(self, theirs: str, where: str, what: str) -> None:
        if theirs in self.left:
            self.left.remove(theirs)
            getattr(self.done, where).append((theirs, what))

    def note(self, *theirs: str, ours: str) -> None:
        for key in theirs:
            self.settle(key, "mapped", ours)

    def map(self, theirs: str, ours: str, value: Any) -> None:
        self.put(ours, value)
        self.note(theirs, ours=ours)

    def cannot(self, theirs: str, why: str) -> None:
        """Also for a key that was mapped in part."""
        if theirs in self.left:
            self.left.remove(theirs)
        self.done.cannot.append((theirs, why))

    def direct(self, table: Mapping[str, str]) -> None:
        for theirs, ours in table.items():
            if self.tree.get(theirs) not in (None, ""):
                self.map(theirs, ours, self.tree[theirs])

    def choice(self, theirs: str, ours: str, table: Mapping[str, str]) -> None:
        value = self.tree.get(theirs)
        if value in (None, ""):
            return
        if str(value) in table:
            self.map(theirs, ours, table[str(value)])
        else:
            self.cannot(theirs, f"{show(value)} is not known here; known: {', '.join(dict.fromkeys(table.values()))}")

    def model(self, theirs: str, revision: str) -> None:
        at = f"@{self.tree[revision]}" if self.tree.get(revision) else ""
        self.map(theirs, "model", f"{self.tree[theirs]}{at}")
        if at:
            self.note(revision, ours="model")

    def datasets(self, found: Any) -> None:
        """Axolotl's list of {path, type, split, ...}."""
        sources: list[Any] = []
        for i, entry in enumerate(found if isinstance(found, list) else []):
            entry = entry if isinstance(entry, dict) else {"path": str(entry)}
            sources.append(_axolotl_source(entry))
            known = {"path", "split", "revision", "ds_type", "data_files"}
            for key, value in entry.items():
                where = f"datasets[{i}].{key}"
                if key in known or value in (None, ""):
                    continue
                if key == "type" and isinstance(value, str):
                    self.done.always.append((where, f"{value}: the format is found by the rows' keys"))
                elif key in ("roles_to_train", "train_on_eos", "chat_template") and value in (
                    ["assistant"],
                    "turn",
                    "tokenizer_default",
                ):
                    self.done.always.append((where, "so here"))
                else:
                    self.done.cannot.append(
                        (where, "the format is found by the rows' keys (alpaca, sharegpt, messages, prompt/completion, text)")
                    )
        self.map("datasets", "data.train", sources or [NO_ROWS])
        if not sources:
            self.done.cannot.append(("datasets", "names no rows; write their path under data"))

    def named_datasets(self, found: Any, folder: str) -> None:
        """LLaMA-Factory's `dataset: a,b`, looked up in dataset_dir/dataset_info.json."""
        sources = [self.named(name, folder, "dataset") for name in _words(found)]
        self.map("dataset", "data.train", sources or [NO_ROWS])
        self.settle("dataset_dir", "mapped", "data.train")
        if not sources:
            self.done.cannot.append(("dataset", "names no rows; write their path under data"))

    def named(self, name: str, folder: str, theirs: str) -> str:
        table = Path(folder, "dataset_info.json")
        try:
            entry = json.loads(table.read_text("utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError):
            self.done.cannot.append((theirs, f"{show(name)} was not found in {table}: see that the path written for it is right"))
            return f"{folder}/{name}.json"
        if not isinstance(entry, dict):
            entry = {}
        for key in entry.keys() - {"file_name", "hf_hub_url", "split"}:
            self.done.always.append((f"{theirs} {name}: {key}", "the format is found by the rows' keys"))
        if "hf_hub_url" in entry and "file_name" not in entry:
            return f"hub:{entry['hf_hub_url']}/{entry.get('split', 'train')}"
        return f"{folder}/{entry.get('file_name', name + '.json')}"

    def held_out(self, size: str, files: str) -> None:
        given = self.tree.get(files)
        if isinstance(given, str):
            paths: list[Any] = [self.named(name, str(self.tree.get("dataset_dir", "data")), files) for name in _words(given)]
        else:
            paths = [_axolotl_source(e) if isinstance(e, dict) else str(e) for e in given or []]
        share = self.tree.get(size)
        if len(paths) == 1:
            self.map(files, "data.held_out", paths[0])
            self.settle(size, "always", "a held-out file of your own is named")
        elif paths:
            self.cannot(files, "one held-out file; join them")
        elif isinstance(share, (int, float)) and 0 <= share < 1:
            self.map(size, "data.held_out", share)
        elif share not in (None, ""):
            self.cannot(size, "a share below 1, or a file, is held out here; the default 0.05 stands")

    def batch(self, micro: str, accumulate: str, default: tuple[int, int]) -> None:
        whole = self.tree.get("batch_size")
        each = [self.tree.get(key) or other for key, other in zip((micro, accumulate), default, strict=True)]
        if isinstance(whole, int) or all(isinstance(n, int) for n in each):
            self.put("train.batch_size", whole if isinstance(whole, int) else each[0] * each[1])
            self.note(micro, accumulate, "batch_size", ours="train.batch_size")

    def targets(self, names: Any, every: bool, *theirs: str) -> None:
        if every:
            self.put("lora.targets", "all-linear")
        elif names:
            self.put("lora.targets", [f"/{names}/"] if isinstance(names, str) else list(names))
        if every or names:
            self.note(*theirs, ours="lora.targets")

    def variant(self, dora: str, rslora: str) -> None:
        on = [name for name, key in (("dora", dora), ("rslora", rslora)) if self.tree.get(key)]
        if len(on) == 2:
            self.cannot(rslora, "dora and rslora together are not known here; dora is written")
        if on:
            self.put("lora.variant", on[0])
            self.note(dora, rslora, ours="lora.variant")

    def new_tokens(self, tokens: list[Any], *theirs: str) -> None:
        if tokens:
            self.put("lora.new_tokens", [str(t) for t in tokens])
            self.note(*theirs, ours="lora.new_tokens")

    def template(self) -> None:
        jinja, named = self.tree.get("chat_template_jinja"), self.tree.get("chat_template", self.tree.get("template"))
        if isinstance(jinja, str) and jinja and "{" not in jinja:
            self.map("chat_template_jinja", "data.template", jinja)
            self.note("chat_template", ours="data.template")
        elif jinja:
            self.cannot("chat_template_jinja", "save the template as a file and name it in data.template")
        if named in ("tokenizer_default", "default", "jinja"):
            self.settle("chat_template", "always", "the checkpoint's own template is used")
        elif named:
            why = (
                f"the checkpoint's own template is used, not a copy of {show(named)}; if it has none, name a file in data.template"
            )
            self.cannot("chat_template" if "chat_template" in self.tree else "template", why)

    def shared(self) -> None:
        """What both tools call by the same names."""
        tree = self.tree
        self.choice("lr_scheduler", "train.schedule", SCHEDULES)
        self.choice("lr_scheduler_type", "train.schedule", SCHEDULES)
        for key in ("optimizer", "optim"):
            if "adamw" in str(tree.get(key)) or str(tree.get(key)).startswith("paged_adamw"):
                self.settle(key, "always", "AdamW with fp32 state; train.optimizer has the 8-bit ones")
            elif tree.get(key):
                self.cannot(key, f"{show(tree[key])}: AdamW is the only optimiser")
        betas = [tree.get("adam_beta1", 0.9), tree.get("adam_beta2", 0.999)]
        if betas != [0.9, 0.999]:
            self.put("train.betas", betas)
        self.note("adam_beta1", "adam_beta2", ours="train.betas")
        for key, dtype in (("bf16", "bf16"), ("fp16", "fp16"), ("pure_bf16", "bf16"), ("bfloat16", "bf16"), ("float16", "fp16")):
            if tree.get(key) in (True, "auto", "true"):
                self.map(key, "memory.dtype", "auto" if tree[key] == "auto" else dtype)
        if isinstance(tree.get("max_steps"), int) and tree["max_steps"] > 0:
            self.map("max_steps", "train.max_steps", tree["max_steps"])
            if isinstance(tree.get("warmup_steps"), int):
                self.map("warmup_steps", "train.warmup_ratio", round(min(tree["warmup_steps"] / tree["max_steps"], 0.9), 4))
        for theirs, ours in (("eval_steps", "eval.every_steps"), ("save_steps", "checkpoint.every_steps")):
            if isinstance(tree.get(theirs), int):
                self.map(theirs, ours, tree[theirs])
            elif tree.get(theirs):
                self.cannot(theirs, "whole steps here; auto stands")
        if isinstance(tree.get("save_total_limit"), int):
            self.map("save_total_limit", "checkpoint.keep", max(2, tree["save_total_limit"]))
        if "tensorboard" in _words(tree.get("report_to")) or tree.get("use_tensorboard"):
            self.put("log.trackers", ["tensorboard"])
            self.note("report_to", "use_tensorboard", ours="log.trackers")
        elif tree.get("report_to") in ("none", ["none"]):
            self.settle("report_to", "always", "nothing leaves the machine")

    def finish(self, name: str, tool: str, their_defaults: Mapping[str, Any]) -> Imported:
        self.shared()
        for ours, value in their_defaults.items():
            if ours not in self.out:
                self.put(ours, value)
        self.out.setdefault("output", "runs/imported")
        for key in list(self.left):
            value = self.tree[key]
            if value is None or value == "" or value == [] or value == {}:
                self.settle(key, "always", "empty in the source")
            elif key in ALWAYS:
                self.settle(key, "always", ALWAYS[key])
            elif value is False:
                self.settle(key, "always", "off in the source")
            elif key.startswith(("wandb", "mlflow", "comet", "swanlab", "use_wandb", "use_mlflow", "report_to")):
                self.cannot(key, TRACKER)
            else:
                self.cannot(key, CANNOT.get(key, "no such setting here"))
        self.settle_contradictions()
        self.done.text = _text(self, name, tool)
        return self.done

    def settle_contradictions(self) -> None:
        """What our schema refuses, and keys without effect beside others (lora keys of a full run), are told and left out."""
        kept: dict[str, Any] = {"model": "write-the-model", "data.train": [NO_ROWS], "method": "lora", "output": "runs/imported"}
        for ours in [*kept, *(k for k in self.out if k not in kept)]:
            try:
                load(_tree(kept | {ours: self.out[ours]}))
                kept[ours] = self.out[ours]
            except ConfigError as fault:
                why = fault.what.splitlines()[0].partition(": ")[2]
                self.done.cannot += [(theirs, why) for theirs, o in self.done.mapped if o == ours]
                self.done.mapped = [(theirs, o) for theirs, o in self.done.mapped if o != ours]
        self.out = kept


def _axolotl_source(entry: Mapping[str, Any]) -> str:
    path = str(
        entry.get("data_files") if isinstance(entry.get("data_files"), str) else entry.get("path") or "write-the-path-of-your-rows"
    )
    on_disk = os.path.exists(path) or entry.get("ds_type") or re.search(r"\.(jsonl?|csv|parquet|txt|md)(\.gz)?$", path)
    if on_disk or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return path
    revision = f"@{entry['revision']}" if entry.get("revision") else ""
    return f"hub:{path}{revision}/{entry.get('split') or 'train'}"


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def _text(work: _Work, name: str, tool: str) -> str:
    order = ["model", "data", "method", "output", "seed", "lora", "train", "eval", "memory", "checkpoint", "log"]
    tree = _tree(work.out)
    sources = tree["data"]["train"]
    tree["data"]["train"] = sources[0] if len(sources) == 1 else sources
    parts = [f"# Made from {_comment(name)} ({tool}). Read the lists at the end, then: tunesmith check run.yaml", ""]
    parts += [write({key: tree[key]}).rstrip() for key in order if key in tree]
    done = work.done
    lists: list[tuple[str, list[tuple[str, str]], Callable[[str], str]]] = [
        ("Not carried over, and why:", done.cannot, lambda why: f": {why}"),
        ("Mapped:", done.mapped, lambda ours: f" -> {ours}"),
        ("Always so here, or empty there:", done.always, lambda why: f": {why}"),
    ]
    if work.advice:
        parts += ["", "# Mind:", *(f"#   {text}" for text in work.advice)]
    for title, pairs, say in lists:
        parts += ["", f"# {title}", *(f"#   {_comment(theirs + say(what))}" for theirs, what in pairs)] if pairs else []
    return "\n".join(parts) + "\n"


def _comment(text: str) -> str:
    text = one_line(text)
    return text if text.isprintable() else show(text, 200)
