"""The longest document that QLoRA of Llama-3.1-8B's shapes trains on in a card of so many GB: what the plan says, and a step of it.

    python bench/longest.py --card 16 --card 24 --out FOLDER       on an NVIDIA GPU; random weights, no checkpoint is written

The plan is asked for the longest length that fits; the allocator is then capped at the card's size (less CUDA's context) and one
whole step is taken at that length: forward, backward, update. A row says what the plan expected and what torch had reserved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_rows import ALPHA, CONFIGS, RANK

STEP = 2048  # lengths are tried in so many tokens
GB = 10**9
MARGIN = 0.02  # a plan is at most so far below what is held (tests/test_plan.py)
CONTEXT = 0.78 * 2**30  # what CUDA itself held on an H200, docs/log.md


def plan_of(gb: float, length: int, device):
    from tunesmith.config.schema import RunConfig
    from tunesmith.plan import make_plan
    from tunesmith.spec import spec_of

    config = RunConfig.model_validate({
        "model": "m", "method": "qlora", "output": "o", "lora": {"rank": RANK, "alpha": ALPHA},
        "data": {"train": "d.jsonl", "held_out": 0, "max_length": length}, "train": {"batch_size": 1, "optimizer": "adamw_8bit"},
        "eval": {"samples": 0}, "memory": {"budget_gb": gb},
    })  # fmt: skip
    return make_plan(config, spec_of(CONFIGS["llama"]), lengths=np.full(100, length), device=device)


def longest(gb: float, device) -> tuple[int, object]:
    """The plan's longest, by bisection, and its plan; as far from the card's end as a plan may be wrong."""
    gb *= 1 - MARGIN
    low, high = 1, 1 << 10
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_of(gb, middle * STEP, device).fits else (low, middle - 1)
    return low * STEP, plan_of(gb, low * STEP, device)


def build(plan):
    """Random NF4 weights on the device, an adapter, and the plan's layers."""
    import torch

    from tunesmith import adapters
    from tunesmith.config.schema import Lora
    from tunesmith.models.decoder import Decoder
    from tunesmith.models.fast import FastLayers
    from tunesmith.models.linear import NF4Linear
    from tunesmith.ops.half_blocks import Policy
    from tunesmith.spec import spec_of

    place = {"dtype": torch.bfloat16, "device": "cuda"}
    model = Decoder(spec_of(CONFIGS["llama"]), linear=lambda i, o, b: NF4Linear(i, o, b, **place), **place)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.set_weight("weight", torch.randn(module.out_features, module.in_features, **place) * 0.02)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data.normal_(0, 0.02)
    model.requires_grad_(False)
    if plan.embedding == "host":
        model.embedding_to_host()
    adapters.attach(model, Lora(rank=RANK, alpha=ALPHA), seed=0)
    model.train()
    parts = [Policy(p.level, p.offload, p.tile) for p in plan.layers for _ in range(p.count)]
    model.fast = FastLayers(model, parts)
    return model


def step(model, length: int) -> float:
    """One optimiser step over one random document; the loss a token."""
    import torch

    from tunesmith import adapters
    from tunesmith.config.schema import Train
    from tunesmith.train.optim import Optimizer
    from tunesmith.train.replay import Passes
    from tunesmith.types import Batch

    optimizer = Optimizer(adapters.trainable(model), Train(optimizer="adamw_8bit"))
    optimizer.set_rate(1e-4)
    tokens, at = np.random.default_rng(0).integers(3, 32000, length), np.arange(length)
    batch = Batch(tokens, at, np.array([0, length], np.int32), at[:-1], tokens[1:])
    loss = Passes(model, optimizer, torch.device("cuda"))(batch, 1 / (length - 1))
    optimizer.step()
    return loss.item() / (length - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=float, action="append", help="GB of the card; may be given again")
    parser.add_argument("--length", type=int, help="take this length instead of the plan's longest")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for longest.jsonl (default bench/results)")
    args = parser.parse_args()
    import torch

    from tunesmith.config.schema import Memory
    from tunesmith.devices import local_device, parse_device
    from tunesmith.models.place import place

    if not args.plan_only:
        place(Memory(device="cuda"))  # sets the allocator to growing segments, as a run does

    device = parse_device("h100") if args.plan_only else local_device("cuda")
    for gb in args.card:
        budget = gb * GB / 2**30
        length, plan = longest(budget, device)
        length = args.length or length
        plan = plan_of(budget, length, device)
        row = {"card_GB": gb, "length": length, "planned_GiB": round(plan.needs, 2), "activations": plan.activations,
               "tile": plan.layers[0].tile, "embedding": plan.embedding}  # fmt: skip
        if not args.plan_only:
            cap = gb * GB - CONTEXT
            torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
            model = build(plan)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = step(model, length)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            reserved = (torch.cuda.max_memory_reserved() + CONTEXT) / 2**30
            row |= {"card": torch.cuda.get_device_name(), "held_GiB": round(reserved, 2), "seconds": round(seconds, 1),
                    "tokens_per_s": round(length / seconds), "loss": round(loss, 4)}  # fmt: skip
            del model
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)
        out = args.out or Path(__file__).resolve().parent / "results"
        if not args.plan_only:
            out.mkdir(parents=True, exist_ok=True)
            with (out / "longest.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
