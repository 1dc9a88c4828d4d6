"""The same fine-tuning several ways, loss by loss.

    ours       bf16          ours-fp8   its FP8 GEMMs          exact      ours in float32 throughout, over the same NF4 weights
    hf         transformers + PEFT + bitsandbytes as PEFT prepares them: bf16 products, but norms, embedding and with them the
               residual stream in float32             hf-bf16    the same without that: bf16 throughout, as the fast trainers run

    python bench/parity.py --site SITE [--model FOLDER] [--data TRAIN --held-out HELD] [--steps 300] [--seeds 3]
    python bench/parity.py --tiny --out FOLDER      a dry run on a CPU: the embedded base dense in fp32, a few steps

A seed decides the rows' order and the adapter's start, which are the same tensors for every arm: QLoRA (NF4, double quantisation,
r=16), AdamW, clipping at 1, a constant rate. Each curve is appended to parity.jsonl at once; a second call skips what is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_arms import default_knobs, prepare_model, versions
from gpu_rows import ALPHA, RANK, ROWS, Step

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "src" / "tunesmith" / "assets" / "demo"
ARMS, RATE, HELD = ("ours", "ours-fp8", "hf", "hf-bf16", "exact"), 2e-4, 64
STEP_APART, GAP = 1e-2, 0.005  # the bounds: loss at every step; held-out gap of FP8, relative


# ---- what all arms share: rows in order, held-out rows, the adapter's start ---------------------------------------------------


def prepare_files(work: Path, args: argparse.Namespace) -> Path:
    """Rows of each seed's steps, held-out rows, and each seed's adapter, as files that need none of our code to be read."""
    import torch

    from tunesmith import adapters, models
    from tunesmith.config.schema import Lora, RunConfig
    from tunesmith.data.prepare import prepare
    from tunesmith.data.render import build_renderer
    from tunesmith.hub import resolve_model

    base = resolve_model(args.model).path
    config = RunConfig.model_validate({
        "model": str(args.model), "method": "qlora", "output": str(work / "unused"),
        "data": {"train": str(args.data), "held_out": str(args.held_out), "max_length": 512, "workers": 1},
    })  # fmt: skip
    renderer = build_renderer(base, config.data)
    prepared = prepare(config.data, lambda: renderer, renderer=renderer, seed=0, cache_dir=work / "cache", model=base)
    held = [prepared.held_out[i] for i in range(min(HELD, len(prepared.held_out)))]
    _save(work / "held_out.npz", held)
    for seed in range(args.seeds):
        order: list[int] = []
        while len(order) < args.steps * args.batch:
            order += prepared.epoch(seed, len(order)).tolist()
        _save(work / f"train-{seed}.npz", [prepared.train[i] for i in order[: args.steps * args.batch]])
        model = models.load(base, dtype=torch.float32 if args.tiny else torch.bfloat16)
        adapters.attach(model, Lora(rank=RANK, alpha=ALPHA), seed=seed)
        adapters.save(model, work / f"adapter-{seed}", base_name=str(base))
    return base


def _save(file: Path, examples: Iterable[Any]) -> None:
    examples = list(examples)
    np.savez(file, ids=np.concatenate([e.ids for e in examples]), learn=np.concatenate([e.learn for e in examples]),
             lengths=[len(e.ids) for e in examples])  # fmt: skip


def steps_of(file: Path, batch: int) -> list[Step]:
    with np.load(file) as found:
        ends = np.cumsum(found["lengths"])[:-1]
        ids, learn = np.split(found["ids"].astype(np.int64), ends), np.split(found["learn"], ends)
    return [Step(ids[i : i + batch], learn[i : i + batch]) for i in range(0, len(ids), batch)]


# ---- arms: loss(step) -> mean loss of its trained tokens; gradient(step) adds its gradient up too --------------------------------


class Ours:
    def __init__(self, base: Path, adapter: Path, arm: str, tiny: bool):
        from tunesmith import adapters, models
        from tunesmith.config.schema import Memory, Train
        from tunesmith.models.place import place
        from tunesmith.train.optim import Optimizer
        from tunesmith.train.replay import Passes

        self.where = place(Memory(device="cpu" if tiny else "cuda", dtype="fp32" if arm == "exact" else "auto"))
        self.model = models.load(base, dtype=self.where.dtype, device=self.where.device, store="dense" if tiny else "nf4")
        adapters.load(self.model, adapter, trainable=True)
        self.applied = {} if arm == "exact" else prepare_model(self.model, default_knobs(ROWS["gsm8k"], arm, None))
        self.optimizer = Optimizer(adapters.trainable(self.model), Train(max_grad_norm=1.0, weight_decay=0.0))
        self.optimizer.set_rate(RATE)
        self.passes = Passes(self.model, self.optimizer, self.where.device)

    def batch(self, step: Step) -> Any:
        from tunesmith.data.pack import collate
        from tunesmith.types import Example, Origin

        return collate([Example(x.astype(np.int32), y, Origin("bench", 1)) for x, y in zip(step.ids, step.learn, strict=True)])

    def loss(self, step: Step) -> Any:
        from tunesmith.train.loss import batch_loss

        return batch_loss(self.model, self.batch(step), self.where.device)[0] / step.trained

    def gradient(self, step: Step) -> Any:
        return self.passes(self.batch(step), 1 / step.trained) / step.trained

    def update(self) -> None:
        self.optimizer.step()


class Transformers:
    def __init__(self, base: Path, adapter: Path, arm: str, tiny: bool):
        import torch
        from peft import PeftModel, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        self.device = torch.device("cpu" if tiny else "cuda")
        how: dict[str, Any] = {"dtype": torch.float32 if tiny else torch.bfloat16, "attn_implementation": "sdpa"}
        if not tiny:
            how["device_map"] = {"": 0}
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = AutoModelForCausalLM.from_pretrained(str(base), **how)
        model.config.use_cache = False
        if not tiny and arm == "hf":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        self.model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
        self.applied: dict[str, Any] = {}

    def loss(self, step: Step) -> Any:
        import torch

        ids, labels, mask = (torch.from_numpy(x).to(self.device) for x in step.padded())
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def gradient(self, step: Step) -> Any:
        loss = self.loss(step)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def held_out(arm: Ours | Transformers, steps: list[Step]) -> float:
    """Mean loss per trained token."""
    import torch

    arm.model.eval()
    with torch.no_grad():
        total = sum(float(arm.loss(s)) * s.trained for s in steps)
    arm.model.train()
    return total / sum(s.trained for s in steps)


def train(task: dict[str, Any]) -> dict[str, Any]:
    """One arm and seed: its loss at every step, and on the held-out rows before and after."""
    import torch

    work, seed = Path(task["work"]), task["seed"]
    kind = Transformers if task["arm"].startswith("hf") else Ours
    arm = kind(Path(task["base"]), work / f"adapter-{seed}", task["arm"], task["tiny"])
    held, losses = steps_of(work / "held_out.npz", 8), []
    before = held_out(arm, held)
    for n, step in enumerate(steps_of(work / f"train-{seed}.npz", task["batch"])):
        loss = arm.gradient(step)
        arm.update()
        losses.append(round(float(loss), 6))
        if n % 50 == 0:
            print(f"{task['arm']} seed {seed} step {n + 1}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"card": card, "losses": losses, "held_out_before": before, "held_out": held_out(arm, held), "applied": arm.applied,
            "versions": versions()}  # fmt: skip


# ---- the parent ------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, work: Path, base: Path, arm: str, seed: int) -> dict[str, Any]:
    """One arm and seed in a process of its own; only transformers' process sees the site folder, where bitsandbytes may be."""
    task = {"work": str(work), "base": str(base), "arm": arm, "seed": seed, "batch": args.batch, "tiny": args.tiny}
    file, result = work / "task.json", work / "result.json"
    file.write_text(json.dumps(task))
    result.unlink(missing_ok=True)
    path = [str(args.site.resolve())] if arm.startswith("hf") and args.site else [str(HERE.parent / "src")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
                        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    command = [sys.executable, str(HERE / "parity.py"), "--child", str(file), str(result)]
    try:
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=args.child_limit)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {args.child_limit:.0f} s"}
    if result.exists():
        return json.loads(result.read_text())
    lines = done.stderr.strip().splitlines()
    print("\n".join(lines[-12:]), file=sys.stderr)
    return {"error": lines[-1] if lines else f"exit {done.returncode}"}


def report(records: list[dict[str, Any]]) -> str:
    """Differences per step, held-out losses and their spread over the seeds, against the bounds."""
    curves = {(r["arm"], r["seed"]): r for r in records if "error" not in r}
    seeds = sorted({seed for _, seed in curves})
    lines = []
    for one, other in (("ours", "hf"), ("ours", "hf-bf16"), ("ours-fp8", "ours"), *((arm, "exact") for arm in ARMS[:-1])):
        for seed in seeds:
            if (one, seed) in curves and (other, seed) in curves:
                pairs = zip(curves[one, seed]["losses"], curves[other, seed]["losses"], strict=True)
                apart = [abs(a - b) for a, b in pairs]
                worst, over = int(np.argmax(apart)), sum(x > STEP_APART for x in apart)
                mean = f"at most {apart[worst]:.2e} at step {worst + 1}, mean {np.mean(apart):.2e}"
                lines.append(f"{one} - {other}, seed {seed}: {mean}; over {STEP_APART} in {over} of {len(apart)} steps")
    ends = {arm: [curves[arm, s]["held_out"] for s in seeds if (arm, s) in curves] for arm in ARMS}
    for arm, losses in ends.items():
        if losses:
            text = ", ".join(f"{x:.4f}" for x in losses)
            lines.append(f"{arm}: held-out {text}; mean {np.mean(losses):.4f}, spread over seeds {max(losses) - min(losses):.4f}")
    spread = max((max(x) - min(x) for x in ends.values() if x), default=math.nan)
    for one, other in (("ours", "hf"), ("ours-fp8", "ours"), ("ours", "exact")):
        if ends[one] and len(ends[one]) == len(ends[other]):
            gap = np.mean(ends[one]) - np.mean(ends[other])
            lines.append(
                f"{one} - {other}: held-out gap {gap:+.5f} ({gap / np.mean(ends[other]):+.3%}; bounds {GAP:.1%} and {spread:.4f})"
            )
    lines += [f"{r['arm']} seed {r['seed']}: FAILED {r['error']}" for r in records if "error" in r]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return Path(sys.argv[3]).write_text(json.dumps(train(json.loads(Path(sys.argv[2]).read_text()))))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a trained checkpoint's folder (default: the embedded base)")
    parser.add_argument("--data", type=Path, default=DEMO / "train.jsonl")
    parser.add_argument("--held-out", type=Path, default=DEMO / "held_out.jsonl")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--site", type=Path, help="the unpacked peers (bitsandbytes)")
    parser.add_argument("--out", type=Path, help="folder for parity.jsonl (default bench/results)")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--child-limit", type=float, default=300, help="seconds for one arm and seed")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.seeds, args.batch, args.arms = 3, min(args.seeds, 2), 2, ["ours", "hf"]
        if not args.out:
            parser.error("--tiny needs --out: a dry run is no result")
    out = args.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    file, call = out / "parity.jsonl", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name = Path(args.model).name
    like = {"model": name, "steps": args.steps, "batch": args.batch, "tiny": args.tiny}
    old = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    old = [r for r in old if "error" not in r and like.items() <= r.items()]
    have = {(r["arm"], r["seed"]): r for r in old} if not args.again else {}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        base = prepare_files(Path(folder), args)
        for seed in range(args.seeds):
            for arm in args.arms:
                if (arm, seed) in have:
                    continue
                have[arm, seed] = {**like, "arm": arm, "seed": seed, "call": call} | run(args, Path(folder), base, arm, seed)
                with file.open("a") as lines:
                    lines.write(json.dumps(have[arm, seed]) + "\n")
    print(report(list(have.values())))


if __name__ == "__main__":
    main()
