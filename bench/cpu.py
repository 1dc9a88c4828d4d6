"""The same LoRA step on a CPU: ours, TRL's SFTTrainer + PEFT three ways, and a ten-line transformers + PEFT loop.

    python bench/cpu.py --data GSM8K_TRAIN.jsonl --tokenizer FOLDER [--batches 60] [--json out.json]

One thread, one process: every arm takes each fixed micro-batch of 8 rows in turn and the order rotates, so a drift of the machine
falls on all alike. What counts is trained tokens per CPU-second (wall clock swings on shared cores), as a ratio micro-batch by
micro-batch, and of those the median. First the losses and adapter gradients of all arms are compared on the same weights. Peak
memory comes from a process per arm.

The peers run as their users get them: SDPA attention, no cache, clipping at 1 and fused AdamW everywhere; TRL's model is prepared
by its trainer's own steps (checkpointing, autocast), its batches made by its own collator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = dict(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.02)  # fmt: skip
ROWS, RANK, RATE = 8, 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = """{% for m in messages %}<s>{{ m.role }}
{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
ARMS = {  # arm -> settings of TRL's SFTConfig; None: not TRL
    "ours": None,
    "trl": {"bf16": False},
    "trl packed": {"bf16": False, "gradient_checkpointing": False, "padding_free": True},
    "trl bf16": {},
    "ten lines": None,
}
MEMORY_BATCHES = 2  # how many micro-batches the memory of an arm is watched over: the second is among the largest

Row = tuple[list[int], list[int]]  # input_ids, labels


@dataclass(frozen=True)
class Place:
    """What every arm starts from: one base, one adapter (A and B both drawn, so that every gradient is alive), one tokenizer."""

    base: Path
    adapter: Path
    tokenizer: Path
    scratch: Path


def micro_batches(data: Path, tokenizer_folder: Path, count: int) -> list[list[Row]]:
    """`count` micro-batches of ROWS rows, rendered by us; the labels are the answers."""
    from tunesmith.data.render import Renderer
    from tunesmith.tokenizer import Tokenizer
    from tunesmith.types import Conversation, Message, Origin

    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        renderer = Renderer(Tokenizer.load(tokenizer_folder), template=str(template))
        rows = []
        with data.open(encoding="utf-8") as lines:
            for n, line in zip(range(count * ROWS), lines, strict=False):
                row = json.loads(line)
                talk = Conversation(
                    (Message("user", row["question"]), Message("assistant", row["answer"])), Origin(data.name, n + 1)
                )
                (example,) = renderer.examples(talk).examples
                rows.append((example.ids.tolist(), np.where(example.learn, example.ids, -100).tolist()))
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def make_place(scratch: Path, tokenizer: Path, size: dict[str, object]) -> Place:
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    model.save_pretrained(scratch / "base")
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    model.save_pretrained(scratch / "adapter")
    return Place(scratch / "base", scratch / "adapter", tokenizer, scratch)


class Ours:
    def __init__(self, place: Place):
        from tunesmith import adapters, models
        from tunesmith.config.schema import Train
        from tunesmith.train.optim import Optimizer

        self.model = models.load(place.base, dtype=torch.float32, device=torch.device("cpu"))
        adapters.load(self.model, place.adapter, trainable=True)
        self.model.train()
        self.trained = adapters.trainable(self.model)
        self.optimizer = Optimizer(self.trained, Train(max_grad_norm=1.0, weight_decay=0.0))
        self.optimizer.set_rate(RATE)

    def gradient(self, rows: list[Row]) -> float:
        from tunesmith.data.pack import collate
        from tunesmith.train.loss import batch_loss
        from tunesmith.types import Example, Origin

        examples = [Example(np.array(i, np.int32), np.array(y) != -100, Origin("bench", 1)) for i, y in rows]
        batch = collate(examples)
        loss, _ = batch_loss(self.model, batch, torch.device("cpu"))
        (loss / batch.trained).backward()
        return loss.item() / batch.trained

    def step(self) -> None:
        self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in self.trained.items()}

    def clear(self) -> None:
        self.optimizer.clear()


class Peft:
    """What the peers share: PEFT's model, clipping, and gradients under the names that its files have."""

    def __init__(self, place: Place):
        import peft
        import transformers

        base = transformers.LlamaForCausalLM.from_pretrained(place.base, attn_implementation="sdpa")
        self.model = peft.PeftModel.from_pretrained(base, place.adapter, is_trainable=True).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.clear()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n.replace(".default", ""): p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def clear(self) -> None:
        self.model.zero_grad()


class TenLines(Peft):
    """The plain loop: padded rows, cross-entropy on label rows only, no checkpointing."""

    def gradient(self, rows: list[Row]) -> float:
        longest = max(len(ids) for ids, _ in rows)
        ids, labels, mask = (
            torch.tensor([seq + [pad] * (longest - len(seq)) for seq in seqs])
            for seqs, pad in (([i for i, _ in rows], 0), ([y for _, y in rows], -100), ([[1] * len(i) for i, _ in rows], 0))
        )
        keep = labels[:, 1:] != -100
        llama = self.model.base_model.model
        hidden = llama.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        loss = F.cross_entropy(llama.lm_head(hidden[:, :-1][keep]), labels[:, 1:][keep])
        loss.backward()
        return loss.item()


class Trl(Peft):
    """SFTTrainer's own training_step on ready ids and labels; what train() does before the first step is done here, its way."""

    def __init__(self, place: Place, settings: dict[str, object], sample: list[Row]):
        import transformers
        import trl
        from datasets import Dataset

        super().__init__(place)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(place.tokenizer / "tokenizer.json"), pad_token="<unk>", eos_token="</s>"
        )
        rows = Dataset.from_list([{"input_ids": i, "labels": y} for i, y in sample])
        args = trl.SFTConfig(
            output_dir=str(place.scratch / "trl"), per_device_train_batch_size=ROWS, learning_rate=RATE, max_length=None,
            lr_scheduler_type="constant", use_cpu=True, report_to="none", **settings,
        )  # fmt: skip
        self.trainer = trl.SFTTrainer(model=self.model, args=args, train_dataset=rows, processing_class=tokenizer)
        if args.activation_checkpointing:
            self.trainer.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=args.activation_checkpointing_kwargs or None
            )
        self.trainer.current_gradient_accumulation_steps = 1
        self.prepared, _ = self.trainer._prepare_for_training(1, None, None)
        self.prepared.train()
        assert self.trainer.model is self.model, "TRL trains another model than the one whose gradients are read"
        assert bool(self.model.is_gradient_checkpointing) == args.gradient_checkpointing
        self.optimizer = self.trainer.optimizer

    def gradient(self, rows: list[Row]) -> float:
        batch = self.trainer.data_collator([{"input_ids": i, "labels": y} for i, y in rows])
        trained = (batch["labels"] != -100).sum()
        return float(self.trainer.training_step(self.prepared, batch, num_items_in_batch=trained))


def build(arm: str, place: Place, sample: list[Row]) -> Ours | TenLines | Trl:
    if arm in ("ours", "ten lines"):
        return Ours(place) if arm == "ours" else TenLines(place)
    return Trl(place, ARMS[arm], sample)


def compare(arms: dict[str, Ours | TenLines | Trl], batch: list[Row]) -> dict[str, tuple[float, float, float]]:
    """Arm -> relative differences to the ten-line loop: of the loss, the whole gradient, the worst tensor's gradient."""
    found = {}
    for name, arm in arms.items():
        loss = arm.gradient(batch)
        found[name] = loss, {k: g.double() for k, g in arm.gradients().items()}
        arm.clear()
    loss0, grads0 = found["ten lines"]
    out = {}
    for name, (loss, grads) in found.items():
        assert grads.keys() == grads0.keys(), f"{name}: other parameters train"
        off = {k: (grads[k] - g).norm() for k, g in grads0.items()}
        whole = torch.stack(list(off.values())).norm() / torch.stack([g.norm() for g in grads0.values()]).norm()
        out[name] = abs(loss - loss0) / loss0, whole.item(), max((off[k] / g.norm()).item() for k, g in grads0.items())
    return out


def peak_bytes() -> int:
    """The most memory this process ever had. On Linux not ru_maxrss: a child inherits its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def busy_seconds() -> float | None:
    """CPU-seconds that the whole machine has worked, where it says so."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def time_arms(arms: dict[str, Ours | TenLines | Trl], batches: list[list[Row]], bf16_every: int) -> dict[str, dict[int, float]]:
    """Arm -> number of the micro-batch -> CPU-seconds."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in arms}
    names = list(arms)
    for n, batch in enumerate(batches):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            if name == "trl bf16" and n % bf16_every:
                continue
            start = time.process_time()
            arms[name].gradient(batch)
            arms[name].step()
            seconds[name][n] = time.process_time() - start
        last = ", ".join(f"{name} {spent[n]:.2f}" for name, spent in seconds.items() if n in spent)
        print(f"{n + 1} of {len(batches)} micro-batches; CPU-seconds: {last}", file=sys.stderr, flush=True)
    return seconds


def watch_memory(arm: str, place: Place, batches: list[list[Row]]) -> dict[str, float]:
    """MiB of this process: with everything loaded, and at its peak while training."""
    trainer = build(arm, place, batches[0])
    loaded = peak_bytes()
    for batch in batches:
        trainer.gradient(batch)
        trainer.step()
    return {"loaded_MiB": loaded / 2**20, "peak_MiB": peak_bytes() / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--bf16-every", type=int, default=1, help="TRL's bf16 takes every n-th micro-batch only: it is slow without bf16 units"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # an arm and the folder that holds base and adapter
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's own, about names that change in transformers 6
    torch.set_num_threads(1)
    if args.memory:
        arm, folder = args.memory[0], Path(args.memory[1])
        place = Place(folder / "base", folder / "adapter", args.tokenizer, folder)
        batches = json.loads((folder / "batches.json").read_text())
        print(json.dumps(watch_memory(arm, place, batches)))
        return

    names = list(dict.fromkeys([*args.arms, "ours", "ten lines"]))
    batches = micro_batches(args.data, args.tokenizer, args.batches)
    trained = [sum(t != -100 for _, y in batch for t in y) for batch in batches]
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder), args.tokenizer, SIZE)
        arms = {name: build(name, place, batches[0]) for name in names}
        equal = compare(arms, batches[0])
        for name, (loss, whole, worst) in equal.items():
            print(
                f"{name:10} differs from the ten-line loop: loss {loss:.1e}, gradient {whole:.1e}, worst tensor {worst:.1e}",
                flush=True,
            )
        wall, busy, own = time.monotonic(), busy_seconds(), time.process_time()
        seconds = time_arms(arms, batches, args.bf16_every)
        wall, own = time.monotonic() - wall, time.process_time() - own
        conditions = {
            "load_average": [round(n, 2) for n in os.getloadavg()] if hasattr(os, "getloadavg") else None,
            "cores_busy_with_others": None if busy is None else round((busy_seconds() - busy - own) / wall, 2),
            "cores_busy_with_us": round(own / wall, 2),
        }
        table = {}
        for name, spent in seconds.items():
            ratios = [theirs / seconds["ours"][n] for n, theirs in spent.items()]
            table[name] = {
                "micro_batches": len(spent),
                "trained_tokens_per_cpu_s": statistics.median(trained[n] / s for n, s in spent.items()),
                "ours_over_it": statistics.median(ratios),
                "p10_p90": [float(np.quantile(ratios, q)) for q in (0.1, 0.9)],
            }
        del arms
        Path(folder, "batches.json").write_text(json.dumps(batches[:MEMORY_BATCHES]))
        for name in names:
            command = [sys.executable, __file__, "--data", args.data, "--tokenizer", args.tokenizer, "--memory", name, folder]
            done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
            table[name].update(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{'':10} {'batches':>7} {'tokens/CPU-s':>12} {'ours / it':>9} {'p10-p90':>11} {'loaded MiB':>10} {'peak MiB':>8}")
    for name, row in table.items():
        low, high = row["p10_p90"]
        speed = f"{row['trained_tokens_per_cpu_s']:12.0f} {row['ours_over_it']:9.2f} {low:6.2f}-{high:.2f}"
        print(f"{name:10} {row['micro_batches']:7} {speed} {row['loaded_MiB']:10.0f} {row['peak_MiB']:8.0f}")
    machine = f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}"
    print(f"{len(batches)} micro-batches of {ROWS} rows; {machine}; {conditions}")
    if args.json:
        found = {"equal": equal, "table": table, "conditions": conditions, "seconds": seconds}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
