"""Preparing data on a CPU: rows per CPU-second of read + render + mask + pack, ours against TRL's SFTTrainer.

    python bench/prepare.py --data GSM8K_TRAIN.jsonl --tokenizer FOLDER [--rounds 3] [--times 4] [--json out.json]

Question and answer become messages in a file of their own; both sides render the same ChatML-like template, learn the assistant's
turns and pack. First ids and labels of every row are compared. Each measurement is a process of its own, arms alternate, medians
are told. TRL prepares inside SFTTrainer's constructor, so the CPU time of one with 8 rows is taken off. Loading the tokenizer and
importing count for nobody, except in worker processes, where they are part of the price. Wall time is told but not judged: shared
cores swing.
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
from importlib.util import find_spec
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1"
)
TEMPLATE = (  # every line break inside an expression: jinja trims those behind a block
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LENGTH, BATCH = 2048, 8
ARMS = ("ours", "ours, 2 workers", "trl", "trl, 2 workers")


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(rows: Path, tokenizer: str, workers: int, scratch: Path):
    """(CPU seconds, wall seconds, prepared)."""
    import functools

    import numpy as np

    from tunesmith.config.schema import Data
    from tunesmith.data.pack import collate, plan_epoch
    from tunesmith.data.prepare import prepare
    from tunesmith.data.render import build_renderer

    template = scratch / "plain.jinja"
    template.write_text(PLAIN)
    data = Data(train=str(rows), held_out=0, template=str(template), max_length=LENGTH, workers=workers)
    make = functools.partial(build_renderer, tokenizer, data)
    renderer = make()
    renderer.examples_many([])
    before, wall = cpu(), time.monotonic()
    prepared = prepare(data, make, seed=0, renderer=renderer, cache_dir=scratch / "cache")
    plan = plan_epoch(np.arange(len(prepared.train)), prepared.train.lengths, BATCH, LENGTH)
    for step in plan:
        for part in step:
            collate([prepared.train[i] for i in part])
    renderer.close()  # a child's CPU time is known once it has ended
    return cpu() - before, time.monotonic() - wall, prepared


def trl(rows: Path, tokenizer: str, workers: int, scratch: Path, packing: bool = True):
    """(CPU seconds, wall seconds, the prepared dataset). The constructor's own share is still in it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tok = AutoTokenizer.from_pretrained(tokenizer)
    tok.chat_template = TEMPLATE
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok) + 64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    before, wall = cpu(), time.monotonic()
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch / "hf"))
    args = SFTConfig(
        output_dir=str(scratch / "out"), max_length=LENGTH, packing=packing, assistant_only_loss=True, report_to=[], use_cpu=True,
        bf16=False, per_device_train_batch_size=BATCH, dataset_num_proc=workers if workers > 1 else None, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tok)
    return cpu() - before, time.monotonic() - wall, trainer.train_dataset


def compare(rows: Path, tokenizer: str, scratch: Path) -> dict[str, float]:
    """How many rows have equal ids and labels on both sides; stops at the first that has not."""
    _, _, prepared = ours(rows, tokenizer, 1, scratch)
    _, _, dataset = trl(rows, tokenizer, 1, scratch, packing=False)
    assert len(prepared.train) == len(dataset), f"{len(prepared.train)} rows here, {len(dataset)} there"
    for i, theirs in enumerate(dataset):
        e = prepared.train[i]
        mask = theirs.get("assistant_masks") or [int(x != -100) for x in theirs["labels"]]
        assert e.ids.tolist() == theirs["input_ids"], f"row {i + 1}: ids differ"
        assert e.learn.astype(int).tolist() == list(mask), f"row {i + 1}: labels differ"
    return {"equal": len(dataset)}


def measure(arm: str, rows: Path, tokenizer: str) -> dict[str, float]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--data", str(rows), "--tokenizer", tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="jsonl of {question, answer}")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json and <|im_start|>, <|im_end|>")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="how many times over the rows are taken, each time as other rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.arm == "compare":
            print(json.dumps(compare(options.data, options.tokenizer, scratch)))
            return
        if options.arm:
            side, workers = (ours if options.arm.startswith("ours") else trl), 2 if "2" in options.arm else 1
            seconds, wall, _ = side(options.data, options.tokenizer, workers, scratch)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(json.dumps({"cpu": seconds, "wall": wall, "peak_mib": peak}))
            return
        if missing := [m for m in ("trl", "datasets", "transformers", "accelerate") if find_spec(m) is None]:
            sys.exit(f"skipped: {', '.join(missing)} not installed (pip install --no-deps trl accelerate datasets)")
        pairs = [json.loads(line) for line in options.data.read_text().splitlines()]
        rows, few = scratch / "rows.jsonl", scratch / "few.jsonl"
        with rows.open("w") as f:
            for again in range(options.times):
                for p in pairs:
                    asked = p["question"] + (f" ({again})" if again else "")
                    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": p["answer"]}]
                    f.write(json.dumps({"messages": messages}) + "\n")
        few.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
        count = len(pairs) * options.times
        equal = measure("compare", rows, options.tokenizer)["equal"]
        print(f"ids and labels equal on {equal:,} rows")
        found: dict[str, list[dict[str, float]]] = {a: [] for a in ARMS}
        for turn in range(options.rounds):
            for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
                one = measure(arm, rows, options.tokenizer)
                if arm.startswith("trl"):
                    empty = measure("trl", few, options.tokenizer)
                    one = {"cpu": one["cpu"] - empty["cpu"], "wall": one["wall"] - empty["wall"], "peak_mib": one["peak_mib"]}
                found[arm].append(one)
        table = {a: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for a, runs in found.items()}
        base = count / table["trl"]["cpu"]
        print(f"{'':18} {'rows/CPU-s':>10} {'x TRL':>6} {'rows/s wall':>12} {'peak MiB':>9}")
        for arm, m in table.items():
            rate = count / m["cpu"]
            print(f"{arm:18} {rate:10,.0f} {rate / base:6.2f} {count / m['wall']:12,.0f} {m['peak_mib']:9,.0f}")
        if options.json:
            options.json.write_text(json.dumps({"rows": count, "arms": table, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
