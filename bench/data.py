"""Preparing data on a CPU: rows per CPU-second from the file to ids and labels, ours against TRL's and Axolotl's.

    python bench/data.py --data GSM8K_TRAIN.jsonl [SHAREGPT.json ...] --tokenizer FOLDER [--rows 15000] [--more 100000] [--rounds 3]
                         [--memory 100000 400000] [--json bench/results/data.json]

Rows are chats: `question` and `answer`, or `conversations`, written as messages to a file of their own, as often over as `--rows`
takes, each time with another number behind the first message. All sides render the same ChatML-like template and learn the
assistant's turns. First ids and labels are compared row by row. Each measurement is a process of its own, and arms alternate.

ours      prepare() and packing every micro-batch; `check` also looks for findings; `more` takes more rows
trl       SFTTrainer with assistant_only_loss and packing, which prepares in its constructor
axolotl   its chat_template strategy over TokenizedPromptDataset, without what `axolotl preprocess` does after it (filters, packing)

A peer's time for 8 rows is taken off, which holds what it does but once. Loading the tokenizer and importing count for nobody,
except in worker processes, where they are part of the price. All numbers are medians; of wall times only over the runs in which
other programs took less than CALM cores, or the calmest one if there is none (`others`: what was taken in these runs). `unpacked`
is what two workers gain without the packing, which the training loop does step by step in one process.

--cores 1 2 4 8 prepares `--rows` of the first set with so many workers each, one after the other, `--rounds` times; no peer is
needed. The table holds prepare() from the file to the store, with findings and without, and what so many processes at once do
without workers; it is added to what --json holds, round by round.

--memory prepares so many short rows, none like another, with findings and two workers, and tells the most that all processes held
together: `rss` counts pages that they share once for each of them, `pss` once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1",
    AXOLOTL_DO_NOT_TRACK="1",
)  # fmt: skip
TEMPLATE = (  # every line break inside an expression: jinja trims those behind a block
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LENGTH, BATCH = 2048, 8
ARMS = ("ours", "ours, check", "ours, 2 workers", "trl", "trl, 2 workers", "axolotl", "axolotl, 2 workers")
MORE = ("ours, more", "ours, more, 2 workers", "ours, more, check, 2 workers")
PEERS = ("trl", "axolotl")
CALM = 0.1  # cores
EVERY = 0.1  # seconds between two looks at the memory


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


# ---- the arms ------------------------------------------------------------------------------------------------------------------


def ours(rows: Path, tokenizer: str, workers: int, scratch: Path, pack: bool = True, look: bool = False):
    """(what the clock says, the prepared examples)."""
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
    clock = Clock()
    train = prepare(data, make, seed=0, renderer=renderer, cache_dir=scratch / "cache", look=look).train
    packing = Clock()
    for step in plan_epoch(np.arange(len(train)), train.lengths, BATCH, LENGTH) if pack else ():
        for part in step:
            collate([train[i] for i in part])
    renderer.close()  # a child's CPU time is known once it has ended
    return clock.stop() | {"packing": packing.stop()["wall"]}, train


def trl(rows: Path, tokenizer: str, workers: int, scratch: Path, pack: bool = True):
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
        output_dir=str(scratch / "out"), max_length=LENGTH, packing=pack, assistant_only_loss=True, report_to=[], use_cpu=True,
        bf16=False, per_device_train_batch_size=BATCH, dataset_num_proc=workers if workers > 1 else None, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tok)
    return clock.stop(), trainer.train_dataset


def axolotl(rows: Path, tokenizer: str, workers: int, scratch: Path):
    """(what the clock says, the prepared dataset)."""
    from axolotl.datasets import TokenizedPromptDataset
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tokenizer)
    tok.eos_token = "<|im_end|>"  # it looks for the end of a turn by this token
    settings = DictDefault(sequence_len=LENGTH, train_on_inputs=False, chat_template="jinja", chat_template_jinja=PLAIN)
    strategy = load(tok, settings, {"field_messages": "messages", "chat_template": "jinja", "chat_template_jinja": PLAIN})
    clock = Clock()
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch / "hf"))
    prepared = TokenizedPromptDataset(strategy, dataset, process_count=workers)
    return clock.stop(), prepared


def compare(rows: Path, tokenizer: str, scratch: Path, peer: str) -> dict[str, float]:
    """How many rows have the ids and the labels of ours, and how many rows there are."""
    _, train = ours(rows, tokenizer, 1, scratch)
    _, dataset = trl(rows, tokenizer, 1, scratch, pack=False) if peer == "trl" else axolotl(rows, tokenizer, 1, scratch)
    assert len(train) == len(dataset), f"{len(train)} rows here, {len(dataset)} there"
    ids = labels = 0
    for e, theirs in zip(train, dataset, strict=True):
        learned = theirs.get("assistant_masks") or [int(x != -100) for x in theirs["labels"]]
        ids += e.ids.tolist() == list(theirs["input_ids"])
        labels += e.learn.astype(int).tolist() == list(learned)
    return {"rows": len(dataset), "equal ids": ids, "equal labels": labels}


def one_arm(arm: str, rows: Path, tokenizer: str, scratch: Path) -> dict[str, float]:
    """What a process of its own measures."""
    if arm.startswith("compare"):
        return compare(rows, tokenizer, scratch, arm.split()[1])
    workers = int(arm.split(", ")[-1].split()[0]) if arm.endswith("workers") else 1
    if arm.startswith("ours"):
        return ours(rows, tokenizer, workers, scratch, look="check" in arm, pack="memory" not in arm and "cores" not in arm)[0]
    return (trl if arm.startswith("trl") else axolotl)(rows, tokenizer, workers, scratch)[0]


# ---- measuring -----------------------------------------------------------------------------------------------------------------


def start(arm: str, rows: Path, tokenizer: str) -> subprocess.Popen[str]:
    # -P: else a peer that asks for a package `kernels` finds the bench of that name
    command = [sys.executable, "-P", __file__, "--arm", arm, "--data", str(rows), "--tokenizer", tokenizer]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def measure(arm: str, rows: Path, tokenizer: str) -> dict[str, float]:
    """One arm in a process of its own."""
    process = start(arm, rows, tokenizer)
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{arm}:\n{err[-3000:]}")
    return json.loads(out.splitlines()[-1])


def held(pid: int) -> tuple[int, int]:
    """KiB of this process and all below it: resident, and with shared pages counted once."""
    rss = pss = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            rss += int(line.split()[1]) * line.startswith("Rss:") if line[:4] in ("Rss:", "Pss:") else 0
            pss += int(line.split()[1]) * line.startswith("Pss:") if line[:4] in ("Rss:", "Pss:") else 0
        below = [held(int(c)) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return rss, pss
    return rss + sum(r for r, _ in below), pss + sum(p for _, p in below)


def memory(count: int, tokenizer: str, scratch: Path) -> dict[str, float]:
    """The most that all processes hold together while `count` short rows are prepared, none like another."""
    rows = scratch / "many.jsonl"
    with rows.open("w") as f:
        for i in range(count):
            words = " ".join(f"w{(i * 7919 + k * 104729) % 50021}" for k in range(3))
            f.write(json.dumps({"question": f"{words}?", "answer": f"{i}."}) + "\n")
    process = start("ours, check, memory, 2 workers", rows, tokenizer)
    most = (0, 0)
    while process.poll() is None:
        most = tuple(map(max, most, held(process.pid)))
        time.sleep(EVERY)
    if process.returncode:
        sys.exit(process.stderr.read()[-3000:])
    told = json.loads(process.stdout.read().splitlines()[-1])
    return {"rss_mib": most[0] / 1024, "pss_mib": most[1] / 1024, "main_mib": told["peak_mib"], "cpu": told["cpu"]}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: statistics.median(r[k] for r in runs) for k in runs[0]}


def chats(path: Path) -> list[list[dict[str, str]]]:
    """Messages of each row of a file of questions and answers, or of conversations."""
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    roles = {"human": "user", "gpt": "assistant"}
    return [
        [{"role": roles[t["from"]], "content": t["value"]} for t in r["conversations"]]
        if "conversations" in r
        else [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
        for r in rows
    ]


def write(path: Path, said: list[list[dict[str, str]]], count: int) -> None:
    with path.open("w") as f:
        for i in range(count):
            first, *rest = said[i % len(said)]
            again = i // len(said)
            first = first | {"content": first["content"] + (f" ({again})" if again else "")}
            f.write(json.dumps({"messages": [first, *rest]}) + "\n")


def one_set(path: Path, o: argparse.Namespace, scratch: Path) -> dict:
    """Everything that is measured on one set, and its table."""
    said = chats(path)
    rows, more, few = (scratch / f"{name}.jsonl" for name in ("rows", "more", "few"))
    for file, count in ((rows, o.rows), (few, 8), (more, o.more)):
        write(file, said, count)
    equal = {peer: measure(f"compare {peer}", rows, o.tokenizer) for peer in PEERS}
    for peer, e in equal.items():
        print(
            f"{path.name}, {e['rows']:,} rows: ids equal {peer}'s on {e['equal ids']:,}, labels on {e['equal labels']:,}",
            flush=True,
        )
    arms = ARMS + (MORE if o.more else ())
    found: dict[str, list[dict[str, float]]] = {a: [] for a in arms}
    for turn in range(o.rounds):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            one = measure(arm, more if "more" in arm else rows, o.tokenizer)
            if not arm.startswith("ours"):
                empty = measure(arm.split(",")[0], few, o.tokenizer)
                one |= {k: one[k] - empty[k] for k in ("cpu", "children", "wall")}
            found[arm].append(one)
    calm = {a: medians([r for r in rs if r["others"] < CALM] or [min(rs, key=lambda r: r["others"])]) for a, rs in found.items()}
    rates = {a: (o.more if "more" in a else o.rows) / medians(rs)["cpu"] for a, rs in found.items()}
    print("| arm | rows per CPU-second | x TRL | x Axolotl | rows a second | x one process | unpacked | others | peak MiB |")
    print("|" + "---|" * 9)
    for arm, runs in found.items():
        q, alone = calm[arm], calm[arm.removesuffix(", 2 workers").removesuffix(", check") if "more" in arm else arm.split(",")[0]]
        bare = (alone["wall"] - alone.get("packing", 0)) / (q["wall"] - q.get("packing", 0))
        count = o.more if "more" in arm else o.rows
        print(
            f"| {arm} | {rates[arm]:,.0f} | {rates[arm] / rates['trl']:.2f} | {rates[arm] / rates['axolotl']:.2f} "
            f"| {count / q['wall']:,.0f} | {alone['wall'] / q['wall']:.2f} | {bare:.2f} | {q['others']:.2f} "
            f"| {medians(runs)['peak_mib']:,.0f} |",
            flush=True,
        )
    return {"set": path.name, "rows": o.rows, "more": o.more, "equal": equal, "rows per CPU-second": rates, "runs": found}


def cores(counts: list[int], o: argparse.Namespace, scratch: Path) -> Iterator[dict]:
    """Rows a second by the number of workers, all counts once in each round, so that a machine that grows slower does so for all of
    them; a result after each round. Beside them what the machine itself allows: so many processes at once, each alone with its
    share of the rows (for one worker that is the same work, and not done twice)."""
    arms, rows, said = ("ours", "ours, check", "apart"), scratch / "rows.jsonl", chats(o.data[0])
    write(rows, said, o.rows)
    runs: dict[str, dict[int, list[float]]] = {arm: {count: [] for count in counts} for arm in arms}
    for turn in range(o.rounds):
        for count in counts[::-1] if turn % 2 else counts:
            for arm in arms[:2]:
                runs[arm][count].append(o.rows / measure(f"{arm}, cores, {count} workers", rows, o.tokenizer)["wall"])
            if count > 1:
                share = scratch / "share.jsonl"
                write(share, said, o.rows // count)
                runs["apart"][count].append(apart(count, share, o.rows // count, o.tokenizer))
        runs["apart"][1] = runs["ours"].get(1, [])
        yield {"set": o.data[0].name, "rows": o.rows, "rounds": turn + 1, "cores": os.cpu_count(), "rows a second": runs}


def show_cores(found: dict) -> None:
    """The table, of the best of the rounds: other programs can only make a run slower."""
    best = {arm: {count: max(r) for count, r in of.items() if r} for arm, of in found["rows a second"].items()}
    print(f"{found['rounds']} of the rounds:\n| workers | " + " | ".join(f"{arm}, rows a second | x one" for arm in best) + " |")
    print("|" + "---|" * (1 + 2 * len(best)))
    for count in sorted(best["ours"]):
        shown = (f"{r[count]:,.0f} | {r[count] / r[min(r)]:.2f}" for r in best.values())
        print(f"| {count} | {' | '.join(shown)} |", flush=True)


def apart(count: int, rows: Path, each: int, tokenizer: str) -> float:
    """Rows a second of `count` processes together, none of which has a worker."""
    processes = [start("ours, cores, 1 workers", rows, tokenizer) for _ in range(count)]
    told = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("apart:\n" + "\n".join(err[-1000:] for _, err in told))
    return sum(each / json.loads(out.splitlines()[-1])["wall"] for out, _ in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json and <|im_start|>, <|im_end|>")
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--more", type=int, default=0, help="rows for ours with two workers, and alone beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="*", default=[])
    parser.add_argument("--memory", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if o.arm:
            print(json.dumps(one_arm(o.arm, o.data[0], o.tokenizer, scratch)))
            return
        if o.cores:
            held = json.loads(o.json.read_text()) if o.json and o.json.is_file() else {}
            for found in cores(o.cores, o, scratch):
                show_cores(found)
                held["cores"] = {"date": datetime.date.today().isoformat()} | found
                if o.json:
                    o.json.write_text(json.dumps(held, indent=1) + "\n")
            return
        if missing := [m for m in ("trl", "axolotl", "datasets", "transformers", "accelerate") if find_spec(m) is None]:
            sys.exit(f"skipped: {', '.join(missing)} not installed (pip install trl datasets addict colorama; --no-deps axolotl)")
        names = ("trl", "axolotl", "datasets", "transformers", "tokenizers", "numpy")
        out: dict = {"date": datetime.date.today().isoformat(), "python": sys.version.split()[0]}
        out |= {"versions": {n: version(n) for n in names}, "tokenizer": Path(o.tokenizer).name, "rounds": o.rounds}
        out["sets"] = [one_set(path, o, scratch) for path in o.data]
        out["memory"] = {}
        for count in o.memory:
            out["memory"][count] = m = memory(count, o.tokenizer, scratch)
            print(f"{count:10,} short rows, all processes: " + ", ".join(f"{k} {v:,.0f}" for k, v in m.items()), flush=True)
        if o.json:
            o.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
