"""Preparing data on a CPU: rows per CPU-second of read + render + mask + pack, ours against TRL's SFTTrainer.

    python bench/prepare.py --data GSM8K_TRAIN.jsonl --tokenizer FOLDER [--times 14] [--rounds 3] [--memory] [--json out.json]

Question and answer become messages in a file of their own; both sides render the same ChatML-like template, learn the assistant's
turns and pack. First ids and labels are compared row by row. Each measurement is a process of its own and arms alternate. TRL
prepares inside SFTTrainer's constructor, so the CPU time of one with 8 rows is taken off; it takes the first TRL_ROWS rows only,
as its time is the same for each row. Loading the tokenizer and importing count for nobody, except in worker processes, where they
are part of the price. All numbers are medians; of wall times only over the runs in which other programs took less than CALM cores,
or the calmest one if there is none, since what two workers gain shows only on two free cores (`others`: what was taken in these
runs). `unpacked` is that gain without the packing, which the training loop does step by step in one process. `children` is the CPU
time of workers and template processes.

--memory prepares 50,000 and a million short rows in one process and tells the peak of each, the tokenizer's loading left out
(some 3 CPU-minutes).
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
TRL_ROWS = 15_000
CALM = 0.1  # cores
MEMORY_ROWS = (50_000, 1_000_000)


class Clock:
    """From its making to `stop`: CPU seconds of this process and of its children that have ended, wall seconds, and how many cores
    other programs took meanwhile."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, ...]:
        own, children = (sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
        return own, children, time.monotonic(), (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> dict[str, float]:
        own, children, wall, busy = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        cpu = own + children
        return {"cpu": cpu, "children": children, "wall": wall, "others": (busy - cpu) / wall, "peak_mib": peak()}


def peak() -> float:
    """MiB this process held at most. Not ru_maxrss: that begins at the parent's."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


def ours(rows: Path, tokenizer: str, workers: int, scratch: Path, pack: bool = True):
    """(what the clock says, prepared)."""
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
    if not pack:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the tokenizer
    clock = Clock()
    prepared = prepare(data, make, seed=0, renderer=renderer, cache_dir=scratch / "cache")
    packing = Clock()
    for step in plan_epoch(np.arange(len(prepared.train)), prepared.train.lengths, BATCH, LENGTH) if pack else ():
        for part in step:
            collate([prepared.train[i] for i in part])
    renderer.close()  # a child's CPU time is known once it has ended
    return clock.stop() | {"packing": packing.stop()["wall"]}, prepared


def trl(rows: Path, tokenizer: str, workers: int, scratch: Path, packing: bool = True):
    """(what the clock says, the prepared dataset). The constructor's own share is still in it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tok = AutoTokenizer.from_pretrained(tokenizer)
    tok.chat_template = TEMPLATE
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok) + 64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    clock = Clock()
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch / "hf"))
    args = SFTConfig(
        output_dir=str(scratch / "out"), max_length=LENGTH, packing=packing, assistant_only_loss=True, report_to=[], use_cpu=True,
        bf16=False, per_device_train_batch_size=BATCH, dataset_num_proc=workers if workers > 1 else None, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tok)
    return clock.stop(), trainer.train_dataset


def compare(rows: Path, tokenizer: str, scratch: Path) -> dict[str, float]:
    """How many rows have equal ids and labels on both sides; stops at the first that has not."""
    _, prepared = ours(rows, tokenizer, 1, scratch)
    _, dataset = trl(rows, tokenizer, 1, scratch, packing=False)
    assert len(prepared.train) == len(dataset), f"{len(prepared.train)} rows here, {len(dataset)} there"
    for i, theirs in enumerate(dataset):
        e = prepared.train[i]
        mask = theirs.get("assistant_masks") or [int(x != -100) for x in theirs["labels"]]
        assert e.ids.tolist() == theirs["input_ids"], f"row {i + 1}: ids differ"
        assert e.learn.astype(int).tolist() == list(mask), f"row {i + 1}: labels differ"
    return {"equal": len(dataset)}


def memory(count: int, tokenizer: str, scratch: Path) -> dict[str, float]:
    """The peak while `count` short rows are prepared, none like another."""
    rows = scratch / "many.jsonl"
    with rows.open("w") as f:
        for i in range(count):
            words = " ".join(f"w{(i * 7919 + k * 104729) % 50021}" for k in range(6))
            messages = [{"role": "user", "content": f"What of {words}?"}, {"role": "assistant", "content": f"{i}: {words[::-1]}."}]
            f.write(json.dumps({"messages": messages}) + "\n")
    found, prepared = ours(rows, tokenizer, 1, scratch, pack=False)
    assert len(prepared.train) == count
    return found


def measure(arm: str, rows: Path, tokenizer: str) -> dict[str, float]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--data", str(rows), "--tokenizer", tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: statistics.median(r[k] for r in runs) for k in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="jsonl of {question, answer}")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json and <|im_start|>, <|im_end|>")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="how many times over the rows are taken, each time as other rows")
    parser.add_argument("--memory", action="store_true", help="also the peak at 50,000 and a million rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.arm:
            print(json.dumps(one_arm(options.arm, options.data, options.tokenizer, scratch)))
            return
        if missing := [m for m in ("trl", "datasets", "transformers", "accelerate") if find_spec(m) is None]:
            sys.exit(f"skipped: {', '.join(missing)} not installed (pip install --no-deps trl accelerate datasets)")
        pairs = [json.loads(line) for line in options.data.read_text().splitlines()]
        rows, some, few = scratch / "rows.jsonl", scratch / "some.jsonl", scratch / "few.jsonl"
        count = len(pairs) * options.times
        files = [(path.open("w"), most) for path, most in ((rows, count), (some, TRL_ROWS), (few, 8))]
        for i in range(count):
            p, again = pairs[i % len(pairs)], i // len(pairs)
            asked = p["question"] + (f" ({again})" if again else "")
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": p["answer"]}]
            for f, most in files:
                if i < most:
                    f.write(json.dumps({"messages": messages}) + "\n")
        for f, _ in files:
            f.close()
        counts = {arm: count if arm.startswith("ours") else min(count, TRL_ROWS) for arm in ARMS}
        equal = measure("compare", some, options.tokenizer)["equal"]
        print(f"ids and labels equal on {equal:,} rows", flush=True)
        found: dict[str, list[dict[str, float]]] = {a: [] for a in ARMS}
        for turn in range(options.rounds):
            for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
                one = measure(arm, rows if arm.startswith("ours") else some, options.tokenizer)
                if arm.startswith("trl"):
                    empty = measure("trl", few, options.tokenizer)
                    one |= {k: one[k] - empty[k] for k in ("cpu", "children", "wall")}
                found[arm].append(one)
        median = {a: medians(runs) for a, runs in found.items()}
        calm = {
            a: medians([r for r in runs if r["others"] < CALM] or [min(runs, key=lambda r: r["others"])])
            for a, runs in found.items()
        }
        base = counts["trl"] / median["trl"]["cpu"]
        columns = ("rows/CPU-s", "x TRL", "CPU-s", "children", "rows/s wall", "x 1 process", "unpacked", "others", "peak MiB")
        print(f"{'':16} {'rows':>8} " + " ".join(f"{c:>11}" for c in columns))
        for arm, m in median.items():
            q, first, rate = calm[arm], calm[arm.split(",")[0]], counts[arm] / m["cpu"]
            bare = (first["wall"] - first.get("packing", 0)) / (q["wall"] - q.get("packing", 0))
            values = (
                f"{rate:,.0f}",
                f"{rate / base:.2f}",
                f"{m['cpu']:.1f}",
                f"{m['children']:.1f}",
                f"{counts[arm] / q['wall']:,.0f}",
            )
            values += (f"{first['wall'] / q['wall']:.2f}", f"{bare:.2f}", f"{q['others']:.2f}", f"{m['peak_mib']:,.0f}")
            print(f"{arm:16} {counts[arm]:8,} " + " ".join(f"{v:>11}" for v in values), flush=True)
        held = {}
        for many in MEMORY_ROWS if options.memory else ():
            held[many] = measure(f"memory {many}", rows, options.tokenizer)
            print(f"{many:9,} short rows: {held[many]['peak_mib']:,.0f} MiB at most, {held[many]['cpu']:,.0f} CPU-s", flush=True)
        if len(held) > 1:
            (a, first), (b, last) = held.items()
            print(f"a row more: {(last['peak_mib'] - first['peak_mib']) * 2**20 / (b - a):.1f} bytes")
        if options.json:
            options.json.write_text(json.dumps({"rows": counts, "runs": found, "memory": held}, indent=1))


def one_arm(arm: str, rows: Path, tokenizer: str, scratch: Path) -> dict[str, float]:
    """What a process of its own measures."""
    if arm == "compare":
        return compare(rows, tokenizer, scratch)
    if arm.startswith("memory"):
        return memory(int(arm.split()[1]), tokenizer, scratch)
    return (ours if arm.startswith("ours") else trl)(rows, tokenizer, 2 if "2" in arm else 1, scratch)[0]


if __name__ == "__main__":
    main()
