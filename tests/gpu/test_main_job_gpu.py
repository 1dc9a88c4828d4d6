"""The main job on an NVIDIA GPU: the same code as on a CPU, held to the same promises."""

import json
import shutil
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith import adapters, api, models
from tunesmith.config.schema import Lora
from tunesmith.hub import resolve_model
from tunesmith.levels import RECORDED
from tunesmith.models.linear import NF4Linear
from tunesmith.ops import nf4
from tunesmith.train import replay

pytestmark = pytest.mark.gpu
DEMO = files("tunesmith") / "assets" / "demo"


def config(output, **more):
    return {
        "model": "embedded",
        "data": {"train": str(DEMO / "train.jsonl"), "held_out": str(DEMO / "held_out.jsonl"), "max_length": 512},
        "method": "qlora",
        "output": str(output),
        "train": {"max_steps": 24, "batch_size": 16, "learning_rate": 2e-3, "deterministic": True},
        "eval": {"samples": 0, "every_steps": 8},
        "checkpoint": {"every_steps": 4},
        **more,
    }


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], float(r["loss"]).hex()) for r in rows if r["kind"] == "step"]


def test_nf4_is_the_same_bits_as_on_the_cpu():
    torch.manual_seed(0)
    for shape in ((64, 64), (33, 129), (257, 64)):
        w = torch.randn(shape)
        cpu, gpu = nf4.quantise(w), nf4.quantise(w.cuda())
        assert torch.equal(cpu.codes, gpu.codes.cpu()) and torch.equal(cpu.absmax, gpu.absmax.cpu())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(nf4.dequantise(cpu, dtype), nf4.dequantise(gpu, dtype).cpu())


def test_lora_over_nf4_in_bf16_follows_its_definition():
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.q_proj = NF4Linear(256, 512, dtype=torch.bfloat16, device="cuda")
    holder.q_proj.set_weight("weight", torch.randn(512, 256, device="cuda", dtype=torch.bfloat16) * 0.05)
    adapters.attach(holder, Lora(rank=8, targets=("q_proj",)), seed=0)
    twin = holder.q_proj
    with torch.no_grad():
        twin.lora_B.normal_(std=0.05)
    x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(100, 512, device="cuda", dtype=torch.bfloat16)
    fast = torch.autograd.grad(twin(x), (x, twin.lora_A, twin.lora_B), dy)
    # The definition in float64 over the same decoded weight; bf16 keeps 8 bits, a GEMM's result is within 1e-2 of it in norm.
    w = twin.base.dequantize(torch.bfloat16).double()
    x64 = x.detach().double().requires_grad_()
    a, b = twin.lora_A.detach().double().requires_grad_(), twin.lora_B.detach().double().requires_grad_()
    slow = torch.autograd.grad(x64 @ w.t() + twin.scale * (x64 @ a.t()) @ b.t(), (x64, a, b), dy.double())
    for p, q in zip(fast, slow, strict=True):
        assert ((p.double() - q).norm() / q.norm()).item() < 1e-2


def test_held_out_loss_agrees_with_the_cpu():
    run = {}
    for device in ("cpu", "cuda"):
        model = models.load(resolve_model("embedded").path, dtype=torch.float32, device=device)
        ids = torch.arange(5, 400, device=device)
        run[device] = model(ids).float().cpu()
    assert ((run["cpu"] - run["cuda"]).norm() / run["cpu"].norm()).item() < 1e-3  # float32 sums in another order


def test_killed_and_resumed_is_bit_identical(tmp_path, kill_twice_and_resume):
    whole = api.train(config(tmp_path / "whole")).path
    killed = kill_twice_and_resume(config(tmp_path / "killed"))
    assert losses(killed) == losses(whole)
    assert (killed / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_memory_stays_under_its_plan(tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # what other tests of this process hold
    run = api.train(config(tmp_path / "run"))
    plan = json.loads((run.path / "plan.json").read_text())
    assert torch.cuda.max_memory_allocated() - before <= plan["needs"] * 2**30


def test_real_out_of_memory_halves_the_micro_batch_and_the_run_goes_on(tmp_path, monkeypatch):
    """The card turns out to hold less than an unrecorded step takes: it is taken in halves, and learns the same."""
    big = {"train": {"max_steps": 6, "batch_size": 64, "learning_rate": 1e-3}, "memory": {"micro_batch_tokens": 8192}}
    big |= {"eval": {"samples": 0, "every_steps": 6}, "checkpoint": {"every_steps": 6}}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with monkeypatch.context() as patch:  # what a recording takes besides would make 0.7 of it enough for a whole step
        patch.setattr(replay.Passes, "_roomy", lambda self: False)
        free = api.train(config(tmp_path / "free", **big)).path
    torch.cuda.empty_cache()
    room = before + 0.7 * (torch.cuda.max_memory_reserved() - before)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        capped = api.train(config(tmp_path / "capped", **big)).path
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = [json.loads(line) for line in (capped / "metrics.jsonl").read_text().splitlines()]
    told = [r["what"] for r in rows if r["kind"] == "event" and "out of device memory" in r["what"]]
    assert told and any("halved the micro-batch" in what for what in told), told
    manifest = json.loads((capped / "manifest.json").read_text())
    assert manifest["out_of_memory"] >= 1 and manifest["micro_batch_tokens"] < 8192 and manifest["steps"] == 6
    for (_, a), (_, b) in zip(losses(free), losses(capped), strict=True):
        assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=5e-3)  # bf16 adds up in another order


def copy_of_the_base(folder, **settings):
    """The embedded base with its head beside its embedding, and other settings in its config.json."""
    shutil.copytree(resolve_model("embedded").path, folder)
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | {"tie_word_embeddings": False} | settings))
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return str(folder)


def same_losses(a, b):
    """Of two runs that differ in tiles and in how far a recording's streams are filled up: bf16 adds up in another order."""
    a, b = losses(a), losses(b)
    assert a and len(a) == len(b)
    for (_, p), (_, q) in zip(a, b, strict=True):
        assert float.fromhex(p) == pytest.approx(float.fromhex(q), rel=2e-3)


def test_embedding_and_activations_in_main_memory_learn_the_same(tmp_path):
    """Held-out rows and written samples too: they go another way through the model than a training step."""
    how = {"model": copy_of_the_base(tmp_path / "model"), "train": {"max_steps": 8, "batch_size": 16, "learning_rate": 2e-3}}
    how["eval"] = {"samples": 2, "sample_tokens": 24, "every_steps": 4}
    near = api.train(config(tmp_path / "near", **how)).path
    far = api.train(config(tmp_path / "far", **how, memory={"offload": True})).path
    assert json.loads((far / "plan.json").read_text())["embedding"] == "host"
    same_losses(near, far)
    assert (far / "samples.jsonl").read_text().count("\n") == (near / "samples.jsonl").read_text().count("\n") > 0


def test_rows_too_long_to_record_among_short_ones(tmp_path, monkeypatch):
    """Beyond 16,384 tokens a micro-batch goes unrecorded between recorded ones."""
    words = [
        f"The {a} {b} was seen by the old {c} at the gate."
        for a in ("red", "tall")
        for b in ("bird", "cart")
        for c in ("cook", "king")
    ]
    rows = [{"text": " ".join(words[(i + j * j) % 8] for j in range(2000 if i % 4 == 0 else 20 + i))} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"model": copy_of_the_base(tmp_path / "model", max_position_embeddings=32768), "eval": {"samples": 0}}
    how["data"] = {"train": str(tmp_path / "rows.jsonl"), "max_length": 30000, "held_out": 0}
    how["train"] = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    recorded = api.train(config(tmp_path / "recorded", **how)).path
    assert max(json.loads(line).get("tokens", 0) for line in (recorded / "metrics.jsonl").read_text().splitlines()) > RECORDED
    monkeypatch.setattr(replay, "RECORDED", 0)
    same_losses(recorded, api.train(config(tmp_path / "plain", **how)).path)
