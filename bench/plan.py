"""The plan against the card: for each row what was predicted, and what the trainer's own loop then held and how fast it was.

    python bench/plan.py --out FOLDER [--limit 400] [--have FILE]    on an NVIDIA GPU; random weights, nothing is read or downloaded
    python bench/plan.py --list                                      what each row plans on an H100, without a GPU
    python bench/plan.py --tiny --out FOLDER                         dry run on a CPU

A row is a family, a method, the rows' lengths, a card's size and settings of a run file. The plan is made for that budget; the
allocator is capped at the budget less CUDA's context; a few steps run through what a run uses (tuning.lay_out, optimizer_of,
loop.fit). Held is what torch had reserved at most, and the context. Each row has a process of its own: running out of memory while
a pass is recorded leaves one that cannot be trusted. Rows go round the families, so that a cut-off covers them; what is in FILE or
FOLDER is not run again. Errors are rows too. A row that ran out is taken once more without a cap: what would it have held?
The first call measures the card (plan --probe), and plans are made with its rates.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_rows import CONFIGS, LOWEST_ID, RANK

from tunesmith.levels import RECORDED

GIB = 1 << 30
CONFIGS["1b"] = CONFIGS["llama"] | dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
    rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192},
)  # fmt: skip
FAMILIES = {"mistral": "Mistral-7B", "llama": "Llama-3.1-8B", "phi": "Phi-4-mini", "1b": "Llama-3.2-1B"}
STEPS = 1000  # of the run that is planned
BATCH = {"short": 16, "2048": 4, "8192": 1, "32768": 1}  # rows a step
OPTIMIZER = {"full": "adamw_8bit_inside", "full32": "adamw", "qlora": "adamw", "lora": "adamw"}


@dataclass(frozen=True)
class Row:
    family: str
    method: str  # qlora | lora | full | full32 (float32 moments)
    lengths: str
    card: float  # GiB, as memory.budget_gb
    memory: tuple[tuple[str, Any], ...] = ()  # settings of `memory` beside the budget

    @property
    def name(self) -> str:
        forced = "".join(f" {key}={value}" for key, value in self.memory)
        return f"{self.family} {self.method} {self.lengths} {self.card:g}GB{forced}"


def _rows(family: str, method: str, *texts: str) -> tuple[Row, ...]:
    """`2048@24 compute=fp8`: lengths, card, settings."""
    out = []
    for text in texts:
        head, *settings = text.split()
        lengths, card = head.split("@")
        memory = tuple((key, {"true": True, "false": False}.get(value, value)) for key, value in (s.split("=") for s in settings))
        out.append(Row(family, method, lengths, float(card), memory))
    return tuple(out)


SETS = (
    _rows("mistral", "qlora", "2048@8", "short@8", "2048@12", "8192@8", "8192@16", "2048@24", "short@16", "2048@24 compute=fp8",
          "8192@48", "2048@80", "32768@12", "2048@16 activations=attention offload=false", "8192@16 compute=fp8"),
    _rows("phi", "lora", "2048@12", "short@12", "2048@16", "8192@12", "8192@24", "32768@48", "2048@24 activations=checkpoint"),
    _rows("1b", "full32", "2048@24", "short@24", "8192@24", "2048@48", "8192@48"),
    _rows("llama", "qlora", "2048@8", "2048@12", "short@12", "8192@12", "8192@24", "2048@24 compute=fp8", "32768@16", "8192@80"),
    _rows("phi", "full", "2048@24", "short@24", "8192@48", "2048@48"),
    _rows("mistral", "lora", "2048@24", "short@24", "8192@24", "2048@48 activations=recompute offload=false", "8192@48"),
    _rows("1b", "lora", "2048@8", "short@8", "8192@8", "8192@16", "32768@12"),
    _rows("phi", "qlora", "2048@8", "short@8", "8192@12", "2048@12 compute=fp8", "8192@24"),
    _rows("llama", "lora", "2048@24", "8192@24", "8192@48"),
    _rows("mistral", "full", "2048@48", "short@48", "8192@80"),
    _rows("1b", "qlora", "8192@8", "32768@16", "short@8"),
    _rows("llama", "full", "2048@48", "2048@80"),
)  # fmt: skip


@cache
def lengths_of(kind: str) -> np.ndarray:
    """Tokens of the training rows [rows]."""
    if kind != "short":
        return np.full(400, int(kind))
    drawn = np.random.default_rng(0).lognormal(np.log(150), 0.6, 1000)
    return np.clip(drawn, 24, 512).astype(int)


def steps_of(kind: str, batch: int, passes: int) -> list[list[int]]:
    """Lengths of the examples of each step. Short rows: the fullest step of a whole run's shuffled epochs, the most usual one over
    and over, and the fullest once more."""
    from tunesmith.data.pack import steps

    lengths = lengths_of(kind)
    if kind != "short":
        return [[int(kind)] * batch] * passes
    draw = np.random.default_rng(1)
    epochs = [steps(draw.permutation(len(lengths)), batch) for _ in range(math.ceil(STEPS * batch / len(lengths)))]
    run = [lengths[step].tolist() for epoch in epochs for step in epoch]
    mean = np.mean([sum(s) for s in run])
    fullest, usual = max(run, key=sum), min(run, key=lambda s: abs(sum(s) - mean))
    return [fullest, usual, usual, usual, fullest]


def config_of(row: Row, budget: float) -> Any:
    from tunesmith.config.schema import RunConfig

    kind = "full" if row.method == "full32" else row.method
    longest = int(lengths_of(row.lengths).max())
    train = {"batch_size": BATCH[row.lengths], "optimizer": OPTIMIZER[row.method], "learning_rate": 1e-5, "max_steps": STEPS}
    return RunConfig.model_validate({
        "model": FAMILIES.get(row.family, row.family), "method": kind, "output": "o", "lora": {"rank": RANK, "alpha": RANK},
        "data": {"train": "d.jsonl", "held_out": 0, "max_length": longest}, "eval": {"samples": 0},
        "train": train | ({"max_grad_norm": 0} if row.method == "full" else {}),
        "memory": {"budget_gb": budget} | dict(row.memory),
    })  # fmt: skip


def plan_of(row: Row, device: Any, shapes: str, budget: float | None = None) -> tuple[Any, Any]:
    """(config, plan). No budget is larger than what is free on the device."""
    from tunesmith.plan import make_plan, rates
    from tunesmith.spec import spec_of

    config = config_of(row, budget or min(row.card, device.free / GIB))
    spec, lengths, measured = spec_of(CONFIGS[shapes]), lengths_of(row.lengths), rates.kept(device)
    plan = make_plan(config, spec, lengths=lengths, device=device, measured=measured)
    return config, plan


def predicted(plan: Any) -> dict[str, Any]:
    return {
        "fits": plan.fits, "budget": round(plan.budget, 2), "needs": round(plan.needs, 3), "least": round(plan.least, 3),
        "tokens_per_s": round(plan.tokens / plan.minutes / 60, 1), "path": plan.path, "activations": plan.activations,
        "tile": plan.layers[0].tile if plan.layers[0].tile < 1 << 30 else None, "compute": plan.compute,
        "micro_batch_tokens": plan.micro_batch_tokens, "embedding": plan.embedding,
        "weight_cache": round(plan.weight_cache / GIB, 2), "measured": plan.measured,
        "parts": {c.name: round(c.bytes / GIB, 3) for c in plan.components if c.where == "device"},
        "host": round(plan.host, 2),
    }  # fmt: skip


class RanOut(Exception):
    """The trainer ran out of device memory and would now have lowered something."""


class Bench:
    def __init__(self, args: argparse.Namespace):
        import torch

        from tunesmith.config.schema import Memory
        from tunesmith.devices import local_device
        from tunesmith.models.place import place

        self.args, self.torch = args, torch
        self.device = local_device("cpu" if args.tiny else "cuda")  # what is free, before torch takes its context
        self.where = place(Memory(device="cpu" if args.tiny else "cuda"))
        self.cuda = self.where.device.type == "cuda"
        self.card = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.model: Any = None

    # -- a set's weights --

    def build(self, family: str, method: str) -> None:
        """Random weights in the method's store, and an adapter beside them or all of them trained."""
        torch = self.torch
        from tunesmith import adapters
        from tunesmith.config.schema import Lora
        from tunesmith.models.decoder import Decoder
        from tunesmith.models.linear import NF4Linear
        from tunesmith.spec import spec_of

        self.model = None
        self.free()
        self.cap(None)
        place = {"dtype": self.where.dtype, "device": self.where.device}
        nf4 = (lambda i, o, b: NF4Linear(i, o, b, **place)) if method == "qlora" else None
        self.model = model = Decoder(spec_of(CONFIGS["tiny" if self.args.tiny else family]), linear=nf4, **place)
        first: dict[tuple[int, int], Any] = {}
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.normal_(0, 0.02)
            for module in model.modules():
                if isinstance(module, NF4Linear):  # quantised once for each shape: the values do not matter here
                    shape = module.out_features, module.in_features
                    if shape not in first:
                        first[shape] = module
                        module.set_weight("weight", torch.randn(shape, **place) * 0.02)
                    else:
                        module.load_state_dict(first[shape].state_dict())
        if method.startswith("full"):
            model.requires_grad_(True)
        else:
            adapters.attach(model, Lora(rank=RANK, alpha=RANK), seed=0)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch._C._cuda_clearCublasWorkspaces()
            self.torch.cuda.empty_cache()

    def context(self) -> int:
        """Bytes of the card that are in use and not the allocator's: CUDA's context, modules, libraries."""
        free, total = self.torch.cuda.mem_get_info()
        return total - free - self.torch.cuda.memory_reserved()

    def cap(self, gib: float | None) -> None:
        """Let the allocator have so much of the card, CUDA's context included; None: all."""
        if self.cuda:
            total = self.torch.cuda.get_device_properties(0).total_memory
            share = 1.0 if gib is None else (gib * GIB - self.context()) / total
            self.torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    # -- a row --

    def run(self, row: Row, uncapped: bool = False) -> dict[str, Any]:
        shapes = "tiny" if self.args.tiny else row.family
        if self.args.tiny:  # a CPU has neither
            row = replace(row, memory=(), method="full32" if row.method == "full" else row.method)
        config, plan = plan_of(row, self.device, shapes, row.card if self.args.tiny else None)
        found: dict[str, Any] = {"plan": predicted(plan)}
        if plan.fits:
            found |= self.steps(row, config, plan, uncapped)
        return found

    def steps(self, row: Row, config: Any, plan: Any, uncapped: bool) -> dict[str, Any]:
        """A few steps under the row's cap."""
        from tunesmith import tuning
        from tunesmith.train import loop

        torch, model = self.torch, self.model
        self.free()
        self.cap(None if uncapped else plan.budget)
        before = self.context() if self.cuda else 0
        optimizer, events, kept = None, [], []

        def record(step: int, **values: Any) -> None:
            kept.append(values | self.peaks())

        def event(what: str, **why: Any) -> None:
            events.append(f"{what} {why}")
            if "out of device memory" in what:
                raise RanOut(what)

        try:
            tuning.lay_out(model, plan)
            optimizer = tuning.optimizer_of(model, config)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                at_rest = torch.cuda.memory_allocated()
            recorded = plan.path == "half-blocks" and plan.micro_batch_tokens <= RECORDED
            passes = 2 if row.lengths == "32768" else 4
            shapes = steps_of(row.lengths, config.train.batch_size, passes)
            if self.args.tiny:
                shapes = [[min(n, 24) for n in step] for step in shapes]
            examples = [self.examples(step, seed) for seed, step in enumerate(shapes)]
            hooks = loop.Hooks(lambda state: None, lambda state: None, lambda state: None, record, event, lambda: None)
            state = loop.fit(
                model, optimizer, lambda step: examples[step], hooks, train=config.train, peak=1e-5, total=len(examples),
                eval_every=1 << 30, save_every=1 << 30, early_stop=0, seed=0, device=self.where.device,
                state=loop.State(micro_batch_tokens=plan.micro_batch_tokens),
            )  # fmt: skip
            timed = [k["tokens"] / k["seconds"] for k in kept][
                slice(2, 4) if recorded else slice(1, None)
            ]  # the second is recorded
            found = {
                "tokens_per_s": round(statistics.median(timed), 1), "seconds": [round(k["seconds"], 3) for k in kept],
                "losses": [round(k["loss"], 3) for k in kept], "step_tokens": [k["tokens"] for k in kept],
                "micro_batch_tokens": state.micro_batch_tokens, "peaks": [[k.get("reserved"), k.get("allocated")] for k in kept],
            }  # fmt: skip
            if self.cuda:
                context = self.context()
                found |= {
                    "held": round((torch.cuda.max_memory_reserved() + context) / GIB, 3),
                    "allocated": round(torch.cuda.max_memory_allocated() / GIB, 3), "context": round(context / GIB, 3),
                    "context_before": round(before / GIB, 3), "at_rest": round(at_rest / GIB, 3),
                }  # fmt: skip
            return found | {"events": events, "oom": False}
        except Exception as e:  # noqa: BLE001 - it must not end the rows behind it
            oom, peak = isinstance(e, (torch.OutOfMemoryError, RanOut)) or "memory" in str(e), self.peaks()
            peak["peaks"] = [[k.get("reserved"), k.get("allocated")] for k in kept]
            text = f"{type(e).__name__}: {str(e)[:300]}"
            where = traceback.format_exc().splitlines()[-8:]
            return {"error": text, "oom": oom, "events": events, "where": where, **peak}

    def peaks(self) -> dict[str, Any]:
        """GiB that torch has reserved and allocated at most so far."""
        if not self.cuda:
            return {}
        cuda = self.torch.cuda
        return {"reserved": round(cuda.max_memory_reserved() / GIB, 3), "allocated": round(cuda.max_memory_allocated() / GIB, 3)}

    def examples(self, lengths: list[int], seed: int) -> list[Any]:
        """Random documents that learn all but their first token."""
        from tunesmith.types import Example, Origin

        draw, vocab = np.random.default_rng(seed), min(self.model.spec.vocab, 32000)
        out = []
        for n in lengths:
            ids = draw.integers(LOWEST_ID, vocab, n).astype(np.int32)
            out.append(Example(ids, np.arange(n) > 0, Origin("bench", 1)))
        return out


def load(*files: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for f in files if f and f.exists() for line in f.read_text().splitlines() if line.strip()]


def chosen(args: argparse.Namespace, have: set[str]) -> list[Row]:
    """Rows to run, one of each set in turn, so that a cut-off covers families and methods."""
    rounds = [row for turn in zip_longest(*SETS) for row in turn if row is not None]
    return [r for r in rounds if r.name not in have and (not args.only or any(word in r.name for word in args.only))]


def listing() -> None:
    from tunesmith.devices import parse_device

    device = parse_device("h100")
    device = replace(device, free=round(79.1 * GIB), host=100 * GIB)
    for group in SETS:
        for row in group:
            _, plan = plan_of(row, device, row.family)
            p = predicted(plan)
            size = f"{p['needs']:6.2f} of {p['budget']:5.1f}{'' if p['fits'] else ' NO'}"
            print(f"{row.name:52} {size:20} {p['tokens_per_s']:8.0f} tok/s {p['micro_batch_tokens']:6} host {p['host']:5.1f} "
                  f"{p['activations']}{' cached' * bool(plan.weight_cache)}")  # fmt: skip


def main() -> None:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for plan.jsonl")
    parser.add_argument("--have", type=Path, help="a plan.jsonl whose rows are not run again")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which no row is begun")
    parser.add_argument("--only", action="append", help="rows whose name holds this word; may be given again")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        return listing()
    if not args.out:
        parser.error("--out FOLDER is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "plan.jsonl"
    os.environ["TUNESMITH_CACHE"] = str(args.out / "cache")
    have = {r["row"] for r in load(file, args.have) if "row" in r}
    import torch  # noqa: F401 - imported once, before any process touches the card: a row's process is forked from this one

    import tunesmith.train.loop
    import tunesmith.tuning  # noqa: F401

    def apart(work: Callable[[Bench], dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Do it in a process of its own: a row that runs out of memory leaves pools and graphs behind that the next would hold."""
        here, there = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            try:
                bench = Bench(args)
                there.send({"card": bench.card} | work(bench))
            except Exception as e:  # noqa: BLE001
                there.send({"error": f"{type(e).__name__}: {str(e)[:300]}", "where": traceback.format_exc().splitlines()[-8:]})
            there.close()
            os._exit(0)  # graphs and pools need no orderly end

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        there.close()
        try:
            return here.recv() if here.poll(seconds) else {"error": f"took more than {seconds:.0f} s"}
        except EOFError:
            return {"error": "the process died"}
        finally:
            process.kill()
            process.join()

    with file.open("a") as out:

        def put(record: dict[str, Any]) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        if not (args.out / "cache").exists():
            put(apart(lambda bench: {"rates": measured_rates(bench)}, 90))
        for row in chosen(args, have):
            if time.time() - began > args.limit:
                print("no time left; call again to go on", flush=True)
                break
            started = time.time()

            def work(bench: Bench, row: Row = row, uncapped: bool = False) -> dict[str, Any]:
                bench.build(row.family, row.method)
                return bench.run(row, uncapped)

            for uncapped in (False, True):
                found = apart(partial(work, uncapped=uncapped), 120)
                found["took"] = round(time.time() - started, 1)
                put({"row": row.name, "uncapped": uncapped, **found})
                show(row, found)
                if not found.get("oom"):
                    break


def measured_rates(bench: Bench) -> dict[str, Any]:
    """The product's own probe, kept where the rows' processes find it, and its seconds."""
    from dataclasses import asdict

    from tunesmith.plan import rates
    from tunesmith.train.probe import measure

    started = time.time()
    found = measure(bench.device, bench.where)
    rates.keep(found, bench.device)
    return asdict(found) | {"took": round(time.time() - started, 1)} | bench.peaks()


def show(row: Row, found: dict[str, Any]) -> None:
    p = found.get("plan")
    if "error" in found:
        line = f"FAILED {found['error'][:120]}"
    elif not p["fits"]:
        line = f"does not fit: {p['needs']} of {p['budget']}"
    else:
        speed = f"{found['tokens_per_s']:8.0f} tok/s ({p['tokens_per_s'] / found['tokens_per_s'] - 1:+.0%})"
        memory = (
            f"held {found['held']:6.2f} planned {p['needs']:6.2f} ({p['needs'] / found['held'] - 1:+.1%})"
            if "held" in found
            else ""
        )
        line = f"{memory} {speed} {p['activations']} {'; '.join(found['events'])}"
    print(f"{row.name:52} {line} {found['took']} s", flush=True)


if __name__ == "__main__":
    main()
