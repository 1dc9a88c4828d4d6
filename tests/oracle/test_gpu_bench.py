"""The GPU bench without a GPU: its dry run ends with ours and transformers + PEFT at one loss; what it decides is decided right."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """The bench's files import each other as the scripts do: from their own folder."""
    monkeypatch.syspath_prepend(str(BENCH))


def call(script, *args):
    done = subprocess.run([sys.executable, str(BENCH / script), *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Tokens as --make-gsm8k writes them, of 32 steps."""
    file, generator = tmp_path_factory.mktemp("gsm8k") / "gsm8k.npz", np.random.default_rng(1)
    lengths = generator.integers(8, 40, 32 * 8).astype(np.int32)
    learn = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    np.savez_compressed(file, ids=generator.integers(3, 32000, lengths.sum()).astype(np.uint16), learn=learn, lengths=lengths)
    return file


def test_the_dry_run_agrees_resumes_and_makes_a_table(tmp_path, gsm8k):
    args = "gpu.py", "--tiny", "--out", tmp_path, "--gsm8k", gsm8k, "--steps", 4, "--rows", "gsm8k"
    said = call(*args)
    assert said.count("first losses agree") == 1, said
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(r["row"], r["arm"]) for r in records] == [("gsm8k", "ours"), ("gsm8k", "hf")]
    ours, theirs = records
    assert "error" not in ours.keys() | theirs.keys()
    assert ours["loss_first"] == pytest.approx(theirs["loss_first"], abs=1e-4)
    assert "tok/s" not in call(*args), "a second call times nothing again"


def test_parity_starts_every_arm_alike(tmp_path):
    said = call("parity.py", "--tiny", "--seeds", 1, "--out", tmp_path)
    ours, theirs = (json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines())
    np.testing.assert_allclose(ours["losses"], theirs["losses"], atol=1e-4)
    assert ours["held_out"] == pytest.approx(theirs["held_out"], abs=1e-4) and ours["held_out"] != ours["held_out_before"]
    assert "over 0.01 in 0 of 3 steps" in said


def test_ours_is_timed_with_its_baseline_in_one_call():
    from gpu import plan

    arms = ["ours", "ours-fp8", "unsloth", "hf"]
    assert plan(arms, set(), "unsloth") == arms
    assert plan(arms, {"ours", "ours-fp8", "unsloth"}, "unsloth") == ["hf"]
    assert plan(arms, {"ours", "unsloth", "hf"}, "unsloth") == ["ours-fp8", "unsloth"]
    assert plan(arms, {"ours", "ours-fp8", "hf"}, "unsloth") == ["ours", "unsloth"]
    assert plan(["ours", "hf"], {"hf"}, "unsloth") == ["ours"]


def test_a_failing_arm_is_recorded(tmp_path, monkeypatch):
    import gpu

    args = SimpleNamespace(limit=60, out=tmp_path, site=None, tiny=True, gsm8k=None, child_limit=60)
    bench = gpu.Bench(args)
    pairs = [("1x2048-ckpt", "ours-fp8"), ("1x2048-ckpt", "read")]
    found = bench.child(task="step", rows=pairs, checkpoint=str(tmp_path), steps=1, knobs={}, budget_gib=None)
    failed, other = found["rows"]  # a row that fails does not end those behind it
    assert failed["error"].startswith("ModelError") and "config.json" in failed["error"] and other["read_GB_per_s"] == 0
    lost = bench.child(task="nonsense", rows=pairs)
    assert lost["error"].startswith("KeyError") and "Traceback" in (tmp_path / "gpu-errors.txt").read_text()


def test_limits_are_the_measured_ones():
    """4 x 2048 kept on an H200: 19,500 tokens/s in bf16 and 30,000 with FP8 were worked out with other terms for small things."""
    from gpu_limits import Rates, Shapes, peak_gib, tokens_per_s
    from gpu_rows import CONFIGS

    mistral = Shapes.of(CONFIGS["mistral"])
    assert tokens_per_s(mistral, Rates(), "keep", 4, 2048) == pytest.approx(19_500, rel=0.05)
    assert tokens_per_s(mistral, Rates(), "keep", 4, 2048, fp8=True) == pytest.approx(30_000, rel=0.08)
    assert peak_gib(mistral, "keep", 8192) == pytest.approx(27.9, abs=0.1)
    assert peak_gib(mistral, "budget", 8192) == pytest.approx(5.0, abs=0.1)


def test_kernels_are_sorted_into_classes():
    from gpu_probe import class_of, sorted_by_class
    from torch.autograd import DeviceType

    names = {"nvjet_tst_128x256_64x4_NNT": "GEMM", "void flash_fwd_kernel<...>": "attention", "Memcpy DtoD": "copies",
             "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention", "_rms_norm_forward": "norm",
             "_nf4_to_bf16": "decode", "multi_tensor_apply_kernel<FusedAdam>": "optimiser", "vectorized": "other"}  # fmt: skip
    assert {name: class_of(name) for name in names} == names

    def event(name, device, us=0.0, kernels=(), shapes=None):
        return SimpleNamespace(name=name, device_type=device, device_time_total=us, kernels=kernels, input_shapes=shapes)

    gemm = "nvjet_tst"
    small, large = (SimpleNamespace(name=gemm, duration=us) for us in (2.0, 50.0))
    table, _ = sorted_by_class([
        event("aten::mm", DeviceType.CPU, kernels=[small], shapes=[[8192, 4096], [4096, 16]]),
        event("aten::mm", DeviceType.CPU, kernels=[large], shapes=[[8192, 4096], [4096, 4096]]),
        event(gemm, DeviceType.CUDA, 2.0), event(gemm, DeviceType.CUDA, 50.0),
    ])  # fmt: skip
    assert table["LoRA"] == {gemm: [2.0, 1]} and table["GEMM"] == {gemm: [50.0, 1]}


def test_table_and_picture_of_records(tmp_path):
    import xml.etree.ElementTree as ET

    from gpu_report import END, START, write

    same = {"card": "H200", "call": "2026-01-01", "rates": {"copy_tbs": 4.1}, "versions": {"torch": "2.11"}, "row": "4x2048-keep"}
    timed = {"peak_GiB": 30.0, "examples_per_s": 8.0, "loss_first": 10.4, "loss_last": 10.3, "first_step_s": 9.0}
    records = [same | timed | {"arm": "ours", "tokens_per_s": 18000.0}, same | timed | {"arm": "unsloth", "tokens_per_s": 15000.0},
               same | {"arm": "hf", "error": "OutOfMemoryError: tried to allocate"}]  # fmt: skip
    (tmp_path / "performance.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write(records, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page
    assert "1.20x" in page and "failed: out of memory" in page and "18,000, 30.00 GiB" in page
    ET.parse(tmp_path / "performance.svg")
