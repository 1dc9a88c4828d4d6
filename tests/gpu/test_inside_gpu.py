"""The optimiser inside the backward on an NVIDIA GPU: the kernel, without waiting for it; memory; bits kept over a kill."""

import gc
import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from tunesmith import api, models
from tunesmith.config import schema
from tunesmith.config.schema import INSIDE
from tunesmith.data.pack import collate
from tunesmith.devices import GIB, local_device
from tunesmith.hub import resolve_model
from tunesmith.models.decoder import Decoder
from tunesmith.ops import adamw8, backend
from tunesmith.ops.adamw8 import Averages, How
from tunesmith.plan import make_plan
from tunesmith.plan.sizes import CONTEXT
from tunesmith.spec import Spec, parameters
from tunesmith.train.inside import Inside, optimizer_for
from tunesmith.train.loss import batch_loss
from tunesmith.types import Example, Origin

pytestmark = pytest.mark.gpu
DEMO = files("tunesmith") / "assets" / "demo"
CUDA = torch.device("cuda")
SPEC = Spec(vocab=32000, dim=4096, hidden=14336, layers=4, heads=32, kv_heads=8, head_dim=128, context=32768, norm_eps=1e-5)


def inputs(shape, dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape, device="cuda")).to(dtype)
    size = 10 ** (-4 + 2 * torch.rand(shape, device="cuda"))
    return weight, [(size * torch.randn(shape, device="cuda")).to(dtype) for _ in range(3)]


def places(t):
    correction = torch.tensor([1 / (1 - 0.9**t), 1 / (1 - 0.999**t) ** 0.5], device="cuda")
    return correction, torch.tensor([t * 7919, -t], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (4096,), (999, 333), (4096, 14336)], ids=str)
def test_the_kernel_is_the_definition(shape, dtype):
    """A GPU contracts products and sums: of a hundred roundings fewer than one falls the other way, each to the neighbour. A code
    that did so changes its weight's later steps, which are at most 2 rates long here: of 58 million weights a few are off by that.
    Where a gradient cancels such an average, its one code spans several of the finer ones near zero: 5 at most was seen.
    """
    start, found = inputs(shape, dtype)
    one, two = start.clone(), start.clone()
    first, second, how = Averages.of(one), Averages.of(two), How(1e-4, (0.9, 0.999), 0.1)
    for t, g in enumerate(found, 1):
        norm = torch.linalg.vector_norm(g, dtype=torch.float32)
        with backend.use("reference"):
            adamw8.update_(one, g, first, how, norm, *places(t))
        with backend.use("triton"):
            adamw8.update_(two, g, second, how, norm, *places(t))
    off = (one.float() - two.float()).abs()
    near = off <= (2**-7 if dtype is torch.bfloat16 else 1e-5) * one.float().abs() + 1e-6
    assert (~near).float().mean() < 1e-3 and (off <= 2**-7 * one.float().abs() + 2 * 3 * how.rate).all()
    for a, b in ((first.m, second.m), (first.v, second.v)):
        apart = (a.int() - b.int()).abs()
        assert (apart > 0).float().mean() < 0.01 and (apart > 1).float().mean() < 1e-5 and apart.max() <= 8
    before = two.clone()
    bad = found[0].clone()
    bad.view(-1)[0] = float("nan")
    with backend.use("triton"):
        adamw8.update_(two, bad, second, how, torch.linalg.vector_norm(bad, dtype=torch.float32), *places(9))
    assert torch.equal(before, two)


def test_the_update_is_near_the_memorys_rate():
    """10 bytes a weight: printed with -s. A third of what an H100's memory gives is asked for, to see a lost vector load."""
    weight, (g, *_) = inputs((4096, 14336))
    averages, how, norm = Averages.of(weight), How(1e-4, (0.9, 0.999)), torch.ones((), device="cuda")
    place = places(1)
    for _ in range(3):
        adamw8.update_(weight, g, averages, how, norm, *place)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        adamw8.update_(weight, g, averages, how, norm, *place)
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 20e3
    rate = 10 * weight.numel() / seconds / 1e9
    whole = 7.24e9 / weight.numel() * seconds
    print(f"\nupdate of {weight.numel():,} weights: {seconds * 1e6:.0f} us, {rate:,.0f} GB/s; {whole * 1e3:.0f} ms a Mistral-7B")
    assert rate > 1000


def example(tokens, seed=0):
    rng = np.random.default_rng(seed)
    learn = np.arange(tokens) > 0
    return Example(rng.integers(3, SPEC.vocab, tokens).astype(np.int32), learn, Origin("a", 1))


@pytest.fixture
def wide():
    """Four layers of a Mistral-7B, every weight trained, layers checkpointed."""
    torch.manual_seed(0)
    model = Decoder(SPEC, dtype=torch.bfloat16, device="cuda").requires_grad_(True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if "norm" in name else p.normal_(0, 0.02)
    model.checkpoint_layers = True
    yield model.train()
    del model
    free()


def free():
    """Weights, hooks and the optimiser hold each other."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def one_step(model, optimizer, tokens=2048, seed=0):
    optimizer.set_rate(2e-5)
    optimizer.begin(1)
    loss, _ = batch_loss(model, collate([example(tokens, seed)]), CUDA)
    (loss / tokens).backward()
    return loss.detach() / tokens, optimizer.step()


def test_a_step_of_it_stays_under_its_plan(wide):
    """Peak of 4 layers at 1 x 2,048, context aside, against the plan's. Of weights, averages and one gradient nothing is twice."""
    free()
    optimizer = Inside(dict(wide.named_parameters()), schema.Train(optimizer=INSIDE), 0)
    for seed in range(3):
        loss, norm = one_step(wide, optimizer, seed=seed)
    assert torch.isfinite(loss) and torch.isfinite(norm) and optimizer.never_moved() == []
    config = schema.RunConfig.model_validate({
        "model": "m", "data": {"train": [{"path": "d"}], "held_out": 0}, "method": "full", "output": "o",
        "train": {"optimizer": INSIDE, "batch_size": 1}, "eval": {"samples": 0}, "memory": {"activations": "checkpoint"},
    })  # fmt: skip
    plan = make_plan(config, SPEC, lengths=np.full(10, 2048), device=local_device("cuda"))
    peak = torch.cuda.max_memory_allocated()
    held = parameters(SPEC).total * (4 + 1 / 32)
    planned = plan.needs * GIB - CONTEXT["cuda"]
    print(f"\npeak {peak / GIB:.2f} GiB, planned {planned / GIB:.2f} (held {held / GIB:.2f})")
    assert held < peak <= planned, (peak / GIB, planned / GIB)


def test_nothing_waits_for_the_device(wide):
    """Hooks, `begin` and `step` ask it for nothing. The backward here is that of the weights alone."""
    optimizer = Inside(dict(wide.named_parameters()), schema.Train(optimizer=INSIDE), 0)
    one_step(wide, optimizer)
    leaves = list(wide.parameters())
    gradients = [torch.full_like(p, 1e-3) for p in leaves]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.begin(1)
        torch.autograd.backward(leaves, gradients)
        norm = optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() == pytest.approx(1e-3 * parameters(SPEC).total ** 0.5, rel=1e-2) and len(optimizer.moved) == len(leaves)


def test_it_learns_what_adamw_learns():
    """Sixty steps of the embedded model over the same rows in bf16: the loss at the end within 3 % of AdamW's with masters."""
    ends = []
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 400, 64).astype(np.int32) for _ in range(8)]
    batch = collate([Example(ids, np.arange(64) > 0, Origin("a", i + 1)) for i, ids in enumerate(rows)])
    for kind in (INSIDE, "adamw"):
        model = models.load(resolve_model("embedded").path, dtype=torch.bfloat16, device="cuda").requires_grad_(True).train()
        train = schema.Train(optimizer=kind, max_grad_norm=0.0)
        optimizer, losses = optimizer_for(dict(model.named_parameters()), train, fast=(), seed=0), []
        for _ in range(60):
            optimizer.set_rate(1e-3)
            optimizer.begin(1)
            loss, _ = batch_loss(model, batch, CUDA)
            (loss / 504).backward()
            optimizer.step()
            losses.append(loss.item() / 504)
        ends.append(losses)
    print(f"\nloss {ends[0][0]:.4f} -> {ends[0][-1]:.4f} inside the backward, {ends[1][-1]:.4f} with float32 masters")
    assert ends[0][-1] < 0.8 * ends[0][0] and ends[0][-1] == pytest.approx(ends[1][-1], rel=0.03)


def config(output, **more):
    return {
        "model": "embedded",
        "data": {"train": str(DEMO / "train.jsonl"), "held_out": str(DEMO / "held_out.jsonl"), "max_length": 512},
        "method": "full",
        "output": str(output),
        "train": {"max_steps": 24, "batch_size": 16, "learning_rate": 5e-4, "deterministic": True, "optimizer": INSIDE},
        "eval": {"samples": 0, "every_steps": 8},
        "checkpoint": {"every_steps": 4},
        **more,
    }


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], float(r["loss"]).hex(), float(r["grad_norm"]).hex()) for r in rows if r["kind"] == "step"]


def test_killed_and_resumed_is_bit_identical(tmp_path, kill_twice_and_resume):
    free()
    before = torch.cuda.memory_allocated()
    whole = api.train(config(tmp_path / "whole")).path
    plan = json.loads((whole / "plan.json").read_text())
    assert torch.cuda.max_memory_allocated() - before <= plan["needs"] * GIB
    killed = kill_twice_and_resume(config(tmp_path / "killed"))
    assert losses(killed) == losses(whole) and len(losses(whole)) == 24
    one, two = (sorted((run / "model").glob("*.safetensors")) for run in (whole, killed))
    assert one and [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
