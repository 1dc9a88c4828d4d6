"""The same LoRA step on a CPU: ours, TRL's SFTTrainer + PEFT three ways, and a ten-line transformers + PEFT loop.

    python bench/cpu.py --data GSM8K_TRAIN.jsonl --tokenizer FOLDER [--batches 60] [--json out.json]

One thread, one process: every arm takes each fixed micro-batch of 8 rows in turn (its order rotates), so a drift of the machine falls on
all alike. What counts is trained tokens per CPU-second (wall clock swings on shared cores) as a ratio, batch by batch; medians. First the
losses and adapter gradients of all arms are compared on the same weights. Peak memory comes from a process per arm.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
SIZE = dict(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.02)  # fmt: skip
ROWS, RANK, RATE = 8, 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("ours", "trl", "trl packed", "trl bf16", "ten lines")
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def micro_batches(data: Path, tokenizer_folder: Path, count: int) -> list[list[tuple[list[int], list[int]]]]:
    """(input_ids, labels) of `count` micro-batches, rendered by us; the labels are the answers."""
    from tunesmith.data.render import Renderer
    from tunesmith.tokenizer import Tokenizer
    from tunesmith.types import Conversation, Message, Origin

    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as f:
        f.write(TEMPLATE)
        f.flush()
        renderer = Renderer(Tokenizer.load(tokenizer_folder), template=f.name)
        rows = []
        for n, line in enumerate(data.open(), 1):
            row = json.loads(line)
            talk = Conversation((Message("user", row["question"]), Message("assistant", row["answer"])), Origin(data.name, n))
            (example,) = renderer.examples(talk).examples
            labels = np.where(example.learn, example.ids, -100)
            rows.append((example.ids.tolist(), labels.tolist()))
            if len(rows) == count * ROWS:
                break
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def base_folder(where: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))
    model.save_pretrained(where / "base")
    return where / "base"


def adapter_folder(base: Path, where: Path) -> Path:
    """One PEFT adapter with A and B drawn, so that every gradient is alive; every arm starts from it."""
    import peft
    import transformers

    torch.manual_seed(1)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), peft_config())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    model.save_pretrained(where / "adapter")
    return where / "adapter"


def peft_config():
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")


def padded(rows) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    pad = lambda seqs, value: torch.tensor([s + [value] * (longest - len(s)) for s in seqs])  # noqa: E731
    return {
        "input_ids": pad([i for i, _ in rows], 0),
        "labels": pad([y for _, y in rows], -100),
        "attention_mask": pad([[1] * len(i) for i, _ in rows], 0),
    }


class Ours:
    def __init__(self, base: Path, adapter: Path):
        from tunesmith import adapters, models
        from tunesmith.config.schema import Train
        from tunesmith.train.optim import Optimizer

        self.model = models.load(base, dtype=torch.float32, device=torch.device("cpu"))
        adapters.load(self.model, adapter, trainable=True)
        self.model.train()
        self.optimizer = Optimizer(adapters.trainable(self.model), Train())
        self.optimizer.set_rate(RATE)
        self.named = adapters.trainable(self.model)

    def gradient(self, rows) -> float:
        from tunesmith.data.pack import collate
        from tunesmith.train.loss import batch_loss
        from tunesmith.types import Example, Origin

        examples = [Example(np.array(i, np.int32), np.array(y) != -100, Origin("bench", 1)) for i, y in rows]
        batch = collate(examples)
        loss, _ = batch_loss(self.model, batch, torch.device("cpu"))
        (loss / batch.trained).backward()
        return loss.item() / batch.trained

    def step(self) -> None:
        self.optimizer.step(self.optimizer.gradient_norm())

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in self.named.items()}

    def clear(self) -> None:
        self.optimizer.clear()


class TenLines:
    """The plain loop: padded rows, cross-entropy on label rows only, no checkpointing, clipping and AdamW as everywhere."""

    def __init__(self, base: Path, adapter: Path):
        import peft
        import transformers

        model = transformers.LlamaForCausalLM.from_pretrained(base)
        self.model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    def gradient(self, rows) -> float:
        batch = padded(rows)
        keep = batch["labels"][:, 1:] != -100
        llama = self.model.base_model.model
        hidden = llama.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
        loss = F.cross_entropy(llama.lm_head(hidden[:, :-1][keep]), batch["labels"][:, 1:][keep])
        loss.backward()
        return loss.item()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.clear()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n.replace(".default", ""): p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def clear(self) -> None:
        self.optimizer.zero_grad()


class Trl:
    """SFTTrainer's own training_step on ready ids and labels, its own collator, its optimiser."""

    def __init__(self, base: Path, adapter: Path, where: Path, sample, **settings):
        import peft
        import transformers
        import trl
        from datasets import Dataset

        model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), adapter, is_trainable=True)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json"), pad_token="<unk>", eos_token="</s>")
        rows = Dataset.from_list([{"input_ids": i, "labels": y} for i, y in sample])
        args = trl.SFTConfig(output_dir=str(where / "trl"), per_device_train_batch_size=ROWS, learning_rate=RATE, use_cpu=True,
                             report_to="none", lr_scheduler_type="constant", max_length=None, **settings)  # fmt: skip
        self.trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def gradient(self, rows) -> float:
        batch = self.trainer.data_collator([{"input_ids": i, "labels": y} for i, y in rows])
        trained = sum(sum(t != -100 for t in y) for _, y in rows)
        return float(self.trainer.training_step(self.model, batch, num_items_in_batch=torch.tensor(trained)))

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.trainer.optimizer.step()
        self.clear()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n.replace(".default", ""): p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def clear(self) -> None:
        self.model.zero_grad()


def build(arm: str, base: Path, adapter: Path, where: Path, sample):
    match arm:
        case "ours":
            return Ours(base, adapter)
        case "ten lines":
            return TenLines(base, adapter)
        case "trl":
            return Trl(base, adapter, where, sample, bf16=False)
        case "trl packed":
            return Trl(base, adapter, where, sample, bf16=False, gradient_checkpointing=False, padding_free=True)
        case "trl bf16":
            return Trl(base, adapter, where, sample, bf16=True)
    raise AssertionError(arm)


def compare_gradients(arms, batch) -> dict[str, tuple[float, float]]:
    """Arm -> (relative difference of the loss, of the whole gradient) to the ten-line loop's."""
    found = {}
    for name, arm in arms.items():
        loss = arm.gradient(batch)
        found[name] = (loss, arm.gradients())
        arm.clear()
    loss0, grads0 = found["ten lines"]
    keys = sorted(grads0)
    flat0 = torch.cat([grads0[k].flatten().double() for k in keys])
    out = {}
    for name, (loss, grads) in found.items():
        assert sorted(grads) == keys, f"{name}: other parameters train"
        flat = torch.cat([grads[k].flatten().double() for k in keys])
        out[name] = (abs(loss - loss0) / loss0, ((flat - flat0).norm() / flat0.norm()).item())
    return out


def main() -> None:
    global TOKENIZER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    TOKENIZER = args.tokenizer
    batches = micro_batches(args.data, args.tokenizer, args.batches)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        base = base_folder(where)
        adapter = adapter_folder(base, where)
        if args.memory_of:
            arm = build(args.memory_of, base, adapter, where, batches[0])
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for batch in batches:
                arm.gradient(batch)
                arm.step()
            print(json.dumps({"before_MiB": before / 1024, "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        arms = {name: build(name, base, adapter, where, batches[0]) for name in args.arms}
        equal = compare_gradients(arms, batches[0])
        for name, (loss, grad) in equal.items():
            print(f"{name:11} differs from the ten-line loop: loss {loss:.1e}, gradient {grad:.1e}", flush=True)
        rates = {name: [] for name in arms}
        names = list(arms)
        for n, batch in enumerate(batches):
            trained = sum(sum(t != -100 for t in y) for _, y in batch)
            for name in names[n % len(names) :] + names[: n % len(names)]:
                start = time.process_time()
                arms[name].gradient(batch)
                arms[name].step()
                rates[name].append(trained / (time.process_time() - start))
        load = os.getloadavg()[0]
    table = {name: {"trained_tokens_per_cpu_s": statistics.median(r)} for name, r in rates.items()}
    for name, r in rates.items():
        ratios = [a / b for a, b in zip(rates["ours"], r, strict=True)]
        table[name]["ours_over_it"] = statistics.median(ratios)
        table[name]["ours_over_it_p10_p90"] = [float(np.quantile(ratios, q)) for q in (0.1, 0.9)]
    for name in arms:
        command = [sys.executable, __file__, "--data", str(args.data), "--tokenizer", str(args.tokenizer), "--batches", "8", "--memory-of", name]
        table[name].update(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    print(f"\n{'':11} {'tokens/CPU-s':>12} {'ours / it':>10} {'p10-p90':>13} {'peak MiB':>9}   load {load:.1f}, {len(batches)} micro-batches of {ROWS}")
    for name, row in table.items():
        low, high = row["ours_over_it_p10_p90"]
        print(f"{name:11} {row['trained_tokens_per_cpu_s']:12.0f} {row['ours_over_it']:10.2f} {low:6.2f}-{high:.2f} {row['peak_MiB']:9.0f}")
    if args.json:
        args.json.write_text(json.dumps({"equal": equal, "table": table, "load": load}, indent=1))


if __name__ == "__main__":
    main()
