"""One arm of the GPU bench on one row, in a process of its own: `python bench/gpu_arms.py TASK.json RESULT.json`, called by gpu.py.

Same work for all: NF4 with double quantisation (or a bf16 base), bf16 compute, LoRA r=16 on every linear of the layers, the same
ids; AdamW with 8-bit moments for the peers. An arm is a function `step(Step) -> loss` that ends with the optimiser's update.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_rows import ALPHA, CONFIGS, RANK, RATE, ROWS, WARM, Row, Step, data, tiny

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "trl", "liger-kernel", "axolotl", "tunesmith")
LINEARS = {
    "phi": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
Run = Callable[[Step], Any]


# ---- ours ------------------------------------------------------------------------------------------------------------------------


def prepare_model(model: Any, knobs: dict[str, Any]) -> dict[str, Any]:
    """Set the model up as the knobs say, after its adapter is attached; returns what was really applied, which is recorded.

    activations   a level of levels.SAVED: keep, recompute, attention, checkpoint ...
    offload       what a layer keeps waits in main memory
    tile          tokens of a tile of an MLP half
    compute       bf16 | fp8
    weight_cache  bytes of decoded weights that are kept
    """
    from tunesmith.models.fast import FastLayers, policies, refusal

    if reason := refusal(model):
        if knobs["compute"] != "bf16":
            raise NotImplementedError(f"compute: {knobs['compute']}: {reason}")
        model.checkpoint_layers = knobs["activations"] != "keep"
        return {"path": f"composed ({reason})", "activations": "checkpoint" if model.checkpoint_layers else "keep"}
    chosen = policies(len(model.model.layers), knobs["activations"], offload=knobs["offload"], tile=knobs["tile"])
    model.fast = FastLayers(model, chosen, fp8=knobs["compute"] == "fp8")
    kept = model.fast.cache(knobs["weight_cache"]) if knobs["weight_cache"] else 0
    told = {name: knobs[name] for name in ("activations", "offload", "tile", "compute")}
    told["embedding"] = "host" if knobs["offload"] and model.embedding_to_host() else "device"
    return {"path": "half-blocks", **told, "weight_cache": kept}


def make_optimizer(parameters: dict[str, Any], knobs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Our optimiser and what of the knobs it applies. `optimizer`: 8bit | 32bit moments | inside the backward, 8 bits too."""
    from tunesmith.config.schema import Train
    from tunesmith.train.inside import optimizer_for

    kind = {"8bit": "adamw_8bit", "32bit": "adamw", "inside": "adamw_8bit_inside"}[knobs["optimizer"]]
    optimizer = optimizer_for(parameters, Train(weight_decay=0.01, optimizer=kind), fast=(), seed=0)
    optimizer.set_rate(RATE)
    return optimizer, {"optimizer": knobs["optimizer"]}


LEVELS = {  # what a layer keeps where not all is kept: the fastest inside the peer's memory; it waits in main memory
    "4x2048-budget": "recompute", "1x2048-ckpt": "recompute", "1x8192-ckpt": "attention", "1x32768-ckpt": "attention",
    "llama-ckpt": "recompute", "start": "checkpoint", "full": "checkpoint",
}  # fmt: skip


FASTER = dict.fromkeys(("4x2048-budget", "1x2048-ckpt", "llama-ckpt"), "attention")  # in FP8 the link is slower than a layer


def default_knobs(row: Row, arm: str, budget_gib: float | None) -> dict[str, Any]:
    kept = row.policy == "keep"
    levels = LEVELS | FASTER if arm.startswith("ours-fp8") else LEVELS
    return {
        "activations": "keep" if kept else levels[row.name],
        "offload": not kept,
        "tile": 1 << 30 if kept or row.batch * row.seq <= 2048 else 2048,
        "budget_gib": budget_gib,
        "compute": "fp8" if arm.startswith("ours-fp8") else "bf16",
        "recorded": True,  # as CUDA graphs
        "micro_batch_tokens": None,  # None: a step's tokens go through at once
        # as the peers' is; where the start is timed, the setting's own: bitsandbytes' import would be waited for
        "optimizer": "inside" if row.full else "32bit" if row.model == "tiny" or row.name == "start" else "8bit",
        "weight_cache": 14 << 30 if row.data == "gsm8k" and not arm.startswith("ours-fp8") else 0,
    }


class Ours:
    """The product's own code: streaming load, adapters, loss and optimiser."""

    def __init__(self, row: Row, folder: Path, knobs: dict[str, Any], seed: int = 0):
        from tunesmith import adapters, models
        from tunesmith.config.schema import Lora, Memory
        from tunesmith.models.place import place

        self.row, self.where = row, place(Memory(device="cpu" if row.model == "tiny" else "cuda"))
        self.knobs = knobs
        warming = self._warming(row, folder, knobs)
        self.model = models.load(folder, dtype=self.where.dtype, device=self.where.device, store=row.store)
        if row.full:
            self.model.requires_grad_(True)
            trained = dict(self.model.named_parameters())
        else:
            adapters.attach(self.model, Lora(rank=RANK, alpha=ALPHA), seed=seed)
            trained = adapters.trainable(self.model)
        if warming:
            warming.end()
        self.trained = trained
        self.start = {} if row.full else {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        self.model.train()
        self.take(row, knobs)

    def _warming(self, row: Row, folder: Path, knobs: dict[str, Any]) -> Any:
        """As a run does it: tuning.build_model."""
        if row.full or self.where.device.type != "cuda":
            return None
        from tunesmith.config.schema import Lora
        from tunesmith.models.fast import policies
        from tunesmith.spec import plan_spec
        from tunesmith.train.warm import Warming

        kept = policies(1, knobs["activations"], offload=knobs["offload"], tile=knobs["tile"])
        kinds = {"dtype": self.where.dtype, "nf4": row.store == "nf4", "fp8": knobs["compute"] == "fp8"}
        return Warming(plan_spec(folder), Lora(rank=RANK, alpha=ALPHA), kept, self.where.device, **kinds)

    def take(self, row: Row, knobs: dict[str, Any]) -> None:
        """The row's policies and an optimiser that has done nothing, over the adapter as it was at first."""
        import torch

        from tunesmith.train.replay import Passes

        self.row, self.knobs, self.model.fast, self.optimizer, self.passes = row, knobs, None, None, None
        with torch.no_grad():
            for name, value in self.start.items():
                self.trained[name].copy_(value)
        free()
        self.applied = prepare_model(self.model, knobs)
        self.optimizer, applied = make_optimizer(self.trained, knobs)
        self.passes = Passes(self.model, self.optimizer, self.where.device, lambda *what, **why: print(*what, why, file=sys.stderr))
        self.passes.record = knobs["recorded"]
        self.applied |= applied

    def __call__(self, step: Step) -> Any:
        from tunesmith.data.pack import micro_batches

        budget, total = self.knobs["micro_batch_tokens"] or step.tokens, 0.0
        parts = micro_batches([len(x) for x in step.ids], budget)
        self.optimizer.begin(len(parts))
        for part in parts:
            total = total + self.passes(self.batch(step, part), 1 / step.trained)
        self.optimizer.step()
        return total / step.trained

    def batch(self, step: Step, part: list[int]) -> Any:
        """gsm8k through the product's own collating; full-length documents by hand, so that all arms see tokens of one length."""
        import numpy as np

        from tunesmith.data.pack import collate
        from tunesmith.types import Batch, Example, Origin

        ids, learn = [step.ids[i] for i in part], [step.learn[i] for i in part]
        if self.row.data != "full":
            return collate([Example(x.astype(np.int32), y, Origin("bench", 1)) for x, y in zip(ids, learn, strict=True)])
        tokens, targets = np.concatenate(ids), np.flatnonzero(np.concatenate(learn))
        bounds = np.cumsum([0, *map(len, ids)]).astype(np.int32)
        positions = np.concatenate([np.arange(len(x)) for x in ids])
        return Batch(tokens, positions, bounds, targets - 1, tokens[targets])


# ---- peers -----------------------------------------------------------------------------------------------------------------------


def unsloth_model(row: Row, folder: Path, longest: int) -> tuple[Any, Any]:
    """`longest`: tokens of the longest document that any row of this process has; Unsloth's rope tables end there."""
    import torch
    from unsloth import FastLanguageModel  # patches the others, so it comes before them

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=max(2048, longest), dtype=torch.bfloat16, load_in_4bit=row.store == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=LINEARS.get(row.model, LINEARS[""]), bias="none",
        random_state=0, use_gradient_checkpointing=False if row.policy == "keep" else "unsloth",
    )  # fmt: skip
    return model, tokenizer


def axolotl_kernels(folder: Path) -> tuple[Any, Any]:
    """Axolotl's LoRA kernels without its trainer: the one helper of the trainer that they import is a name lookup."""
    stub, package = types.ModuleType("axolotl.utils.callbacks.models"), types.ModuleType("axolotl.utils.callbacks")
    stub.get_causal_lm_model_cls_prefix = lambda model_type: ("Mistral", "MistralForCausalLM")
    package.__path__ = []
    sys.modules |= {"axolotl.utils.callbacks": package, "axolotl.utils.callbacks.models": stub}
    from axolotl.monkeypatch import lora_kernels
    from axolotl.utils.dict import DictDefault

    wanted = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "fused_attn_kernel": False}
    return lora_kernels, DictDefault(base_model=str(folder), **wanted)


def transformers_model(row: Row, folder: Path, arm: str) -> Any:
    """transformers + PEFT + bitsandbytes; `liger` adds Liger's kernels, `axolotl` Axolotl's LoRA kernels and
    Liger's norm, rope and loss."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = CONFIGS[row.model]["model_type"]
    if arm != "hf":
        import liger_kernel.transformers as liger

        patch = getattr(liger, f"apply_liger_kernel_to_{kind}")
        patch(rope=True, rms_norm=True, swiglu=arm == "liger", fused_linear_cross_entropy=True, cross_entropy=False)
    if arm == "axolotl":
        kernels, settings = axolotl_kernels(folder)
        kernels.patch_self_attn_lora(settings)
    on_cpu = row.model == "tiny"
    how: dict[str, Any] = {"dtype": torch.float32 if on_cpu else torch.bfloat16, "attn_implementation": "sdpa"}
    if not on_cpu:
        how["device_map"] = {"": 0}
    if row.store == "nf4":
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(str(folder), **how)
    model.config.use_cache = False
    again = {"use_reentrant": False}
    checkpointed = row.policy != "keep"
    if row.full:
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if arm == "hf" and row.store == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed, gradient_checkpointing_kwargs=again)
    elif checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        model.enable_input_require_grads()
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS.get(row.model, LINEARS[""]), bias="none",
                      task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(model, lora, autocast_adapter_dtype=arm == "hf")
    return kernels.apply_lora_kernel_patches(model, settings) if arm == "axolotl" else model


class Peer:
    """A peer's model under a plain loop: autocast, its own loss, AdamW with 8-bit moments."""

    def __init__(self, row: Row, folder: Path, arm: str, longest: int):
        unsloth = arm.startswith("unsloth")
        self.model = unsloth_model(row, folder, longest)[0] if unsloth else transformers_model(row, folder, arm)
        import torch

        self.device = torch.device("cpu" if row.model == "tiny" else "cuda")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [] if row.full else [p.detach().to("cpu", copy=True) for p in self.trained]
        self.applied: dict[str, Any] = {}
        self.model.train()
        self.take(row)

    def take(self, row: Row) -> None:
        """An optimiser that has done nothing, over the adapter as it was at first."""
        import torch

        self.row, self.padded, self.optimizer = row, row.data != "full", None
        with torch.no_grad():
            for p, value in zip(self.trained, self.start, strict=False):
                p.copy_(value)
                p.grad = None
        free()
        if self.device.type == "cuda":
            import bitsandbytes

            self.optimizer = bitsandbytes.optim.AdamW8bit(self.trained, lr=RATE)
        else:
            self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def __call__(self, step: Step) -> Any:
        import torch

        ids, labels, mask = (torch.from_numpy(x).to(self.device) for x in step.padded())
        more = {"attention_mask": mask} if self.padded else {}
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=ids, labels=labels, **more).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def unsloth_trainer(row: Row, folder: Path, steps: list[Step], born: float) -> dict[str, Any]:
    """Unsloth as its users run short chats: its SFTTrainer with padding-free on, rows in our order. A step's time is from the end
    of the one before it."""
    model, tokenizer = unsloth_model(row, folder, row.seq)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ids = [x.tolist() for s in steps for x in s.ids]
    labels = [[t if y else -100 for t, y in zip(x.tolist(), learn, strict=True)]
              for s in steps for x, learn in zip(s.ids, s.learn, strict=True)]  # fmt: skip
    times: list[float] = []
    first: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.last = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - self.last)
            self.last = now
            if not first:
                first.append(time.time() - born)

    out = tempfile.mkdtemp()
    args = SFTConfig(
        output_dir=out, per_device_train_batch_size=row.batch, gradient_accumulation_steps=1, max_steps=len(steps), bf16=True,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_8bit", weight_decay=0.01, max_length=None,
        packing=False, padding_free=True, gradient_checkpointing=row.policy != "keep", logging_steps=1, report_to="none",
        save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return summary(row, steps, times, losses, first[0]) | {"padding_free": bool(trainer.args.padding_free)}


# ---- timing ----------------------------------------------------------------------------------------------------------------------


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(row: Row, steps: list[Step], times: list[float], losses: list[float], first: float) -> dict[str, Any]:
    """Rates of the median step after the warm-up, peaks, losses, seconds from process start to the first update."""
    import torch

    timed = times[WARM:] or times[-1:]
    step = statistics.median(timed)
    tokens = statistics.median([s.tokens for s in steps][WARM:] or [steps[-1].tokens])
    cuda = torch.cuda.is_available()
    return {
        "ms": round(step * 1e3, 2), "ms_all": [round(t * 1e3, 1) for t in times], "tokens_per_s": round(tokens / step, 1),
        "examples_per_s": round(len(steps[0].ids) / step, 2),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
        "loss_first": round(losses[0], 5), "loss_last": round(losses[-1], 5), "losses": [round(x, 5) for x in losses],
        "first_step_s": round(first, 2),
    }  # fmt: skip


def free() -> None:
    """Give back what the row before held: a peak is a row's own."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(task: dict[str, Any], keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Run pairs of a row and an arm that share a loaded model, one after the other; `keep` is given what there is after each."""
    folder, born, run, out = Path(task["checkpoint"]), task["born"], None, []
    gsm8k = Path(task["gsm8k"]) if task["gsm8k"] else None
    longest = max(ROWS[name].seq for name, _ in task["rows"])
    for name, arm in task["rows"]:
        row = tiny(ROWS[name]) if task["tiny"] else ROWS[name]
        try:
            if arm == "read":
                found = read(folder)
            else:
                steps = data(row, row.steps or task["steps"], gsm8k, CONFIGS[row.model]["vocab_size"])
                if arm == "unsloth" and row.data == "gsm8k":
                    found = unsloth_trainer(row, folder, steps, born)
                else:
                    knobs = default_knobs(row, arm, task["budget_gib"]) | task["knobs"]
                    if run is None:
                        run = Ours(row, folder, knobs) if arm.startswith("ours") else Peer(row, folder, arm, longest)
                    elif arm.startswith("ours"):
                        run.take(row, knobs)
                    else:
                        run.take(row)
                    found = timed(row, run, steps, born) | {"applied": run.applied}
                if out:
                    found.pop("first_step_s", None)  # of the process, not of this row
        except Exception as error:  # noqa: BLE001 - a row that fails (out of memory, mostly) must not end those behind it
            traceback.print_exc()
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        out.append(found)
        keep(out)
    return out


def timed(row: Row, run: Any, steps: list[Step], born: float) -> dict[str, Any]:
    """One row's steps."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, losses, first = [], [], 0.0
    for n, step in enumerate(steps):
        wait()
        start = time.perf_counter()
        loss = run(step)
        wait()
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
        if not n:
            first = time.time() - born
            print(f"first step {times[0]:.2f} s, loss {losses[0]:.4f}", file=sys.stderr, flush=True)
    return summary(row, steps, times, losses, first)


def read(folder: Path) -> dict[str, Any]:
    """Seconds to read the checkpoint's weights once."""
    total, buffer, start = 0, bytearray(64 << 20), time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    seconds = time.perf_counter() - start
    return {"first_step_s": round(seconds, 2), "read_GB_per_s": round(total / seconds / 1e9, 2)}


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------


def make_checkpoint(task: dict[str, Any]) -> dict[str, Any]:
    """A random checkpoint in bf16, N(0, 0.02), norms 1, drawn on the GPU and written tensor by tensor, with a
    placeholder tokenizer."""
    import torch

    from tunesmith.models.weights import write_checkpoint
    from tunesmith.spec import spec_of, tensor_shapes

    folder, config = Path(task["checkpoint"]), CONFIGS[task["model"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str) -> Any:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)

    shapes = tensor_shapes(spec_of(config))
    folder.mkdir(parents=True, exist_ok=True)
    if task["model"] != "tiny":
        placeholder_tokenizer(config["vocab_size"]).save_pretrained(str(folder))
    write_checkpoint(folder, config, shapes, tensor, torch.bfloat16)
    (folder / "made_by_the_gpu_bench").touch()  # last: without it the folder is made again
    return {"bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}


def placeholder_tokenizer(vocab: int) -> Any:
    """Enough for loaders that insist on one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, vocab)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    task, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def failed(kind, error, trace):
        traceback.print_exception(kind, error, trace)
        at = traceback.extract_tb(trace)[-1]
        text = " ".join(str(error).split())[:400]
        result.write_text(
            json.dumps({"error": f"{kind.__name__}: {text} ({Path(at.filename).name}:{at.lineno})", "versions": versions()})
        )

    sys.excepthook = failed
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    import gpu_probe

    def keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"versions": versions(), "rows": rows}
        result.write_text(json.dumps(found))
        return found

    tasks = {
        "step": lambda task: keep(measure(task, keep)),
        "checkpoint": make_checkpoint,
        "rates": gpu_probe.rates,
        "link": gpu_probe.link,
        "profile": gpu_probe.profile,
    }
    result.write_text(json.dumps({"versions": versions()} | tasks[task["task"]](task)))


if __name__ == "__main__":
    main()
