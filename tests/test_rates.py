"""A device's rates: measured, kept whole or not at all, asked for again after a change, and a plan made of them."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

import tunesmith
from tunesmith.config.schema import Memory, RunConfig
from tunesmith.devices import GIB, local_device, parse_device
from tunesmith.plan import make_plan, rates
from tunesmith.plan.parts import astray

RATES = rates.Rates(
    products={"16bit": [[512, 1024, 1e14], [2048, 1024, 4e14], [512, 4096, 2e14], [2048, 4096, 8e14]], "fp32": [[512, 1024, 1e13]]},
    attention=[[64, 512, 1e13, 1e13], [128, 512, 1e14, 5e13], [128, 8192, 4e14, 2e14]], copy=1e12, decode=1e11, link=2e10,
    launch=1e-4, factors={"composed": 0.9}, where="a test",
)  # fmt: skip


def test_between_measured_places_rates_are_interpolated_on_logarithmic_scales_and_level_beyond():
    assert RATES.product("16bit", 512, 1024) == pytest.approx(1e14) and RATES.product("16bit", 2048, 4096) == pytest.approx(8e14)
    assert RATES.product("16bit", 1024, 1024) == pytest.approx(2e14)  # half way from 512 to 2,048, where 1e14 goes to 4e14
    assert RATES.product("16bit", 512, 2048) == pytest.approx(2**0.5 * 1e14)
    assert RATES.product("16bit", 1 << 20, 1 << 20) == pytest.approx(8e14)
    assert RATES.product("16bit", 128, 1024) == pytest.approx(1e14 / 4)  # weights are read all the same
    assert RATES.attend(128, 2048) == pytest.approx((2e14, 1e14)) and RATES.attend(80, 100) == pytest.approx((1e13, 1e13))


def test_a_measurement_is_kept_for_this_device_driver_and_torch_alone(tmp_path, monkeypatch):
    here = local_device("cpu")
    assert rates.kept(here, tmp_path) is None
    file = rates.keep(RATES, here, tmp_path)
    assert rates.kept(here, tmp_path) == RATES and json.loads(file.read_text())["machine"] == rates.machine(here)
    assert [p.name for p in file.parent.iterdir()] == [file.name], "written at once, nothing is left beside it"
    assert rates.kept(parse_device("h100"), tmp_path) is None and rates.kept(replace(here, name="another"), tmp_path) is None
    monkeypatch.setattr(rates, "version", lambda _: "99.0")
    assert rates.kept(here, tmp_path) is None, "another torch"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}', None])
def test_a_measurement_that_cannot_be_read_is_as_if_there_were_none(tmp_path, text):
    here = local_device("cpu")
    file = rates.keep(RATES, here, tmp_path)
    if text is None:
        text = json.dumps(json.loads(file.read_text()) | {"copy": float("nan")})
    file.write_text(text)
    assert rates.kept(here, tmp_path) is None


def test_a_plan_says_whether_it_is_calibrated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (tmp_path / "run.yaml").write_text("model: embedded\ndata: rows.jsonl\nmethod: lora\noutput: out\nmemory: {device: cpu}\n")
    plan = tunesmith.plan("run.yaml")
    plan.print()
    assert not plan.measured and "uncalibrated, +-30 %" in " ".join(capsys.readouterr().out.split())
    rates.keep(RATES, local_device("cpu"))
    plan = tunesmith.plan("run.yaml", page="plan.html")
    plan.print()
    assert plan.measured == "a test" and "calibrated: rates measured on a test" in capsys.readouterr().out
    assert "calibrated: rates measured on a test" in (tmp_path / "plan.html").read_text()


def test_the_trainer_plans_with_what_was_kept(tiny, tmp_path, monkeypatch):
    from tunesmith.tuning import plan_for

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    rates.keep(RATES, local_device("cpu"))
    assert plan_for(RunConfig.model_validate(tiny.config(tmp_path / "run")), tiny.model, np.full(24, 20)).measured == "a test"


def test_the_probe_measures_what_a_run_then_reaches(tmp_path, monkeypatch):
    """The embedded model on this CPU, one thread, in CPU time, which neighbours do not take: within 25 %."""
    import torch

    from tunesmith.models.place import place
    from tunesmith.train import loop, probe

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(probe.time, "perf_counter", time.process_time)
    monkeypatch.setattr(loop.time, "monotonic", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = local_device("cpu")
        rates.keep(probe.measure(here, place(Memory(device="cpu"))), here)
        words = ["river", "stone", "light", "green", "walks", "slowly", "bright", "house", "tree", "road"]
        draw = np.random.default_rng(0)
        rows = [{"prompt": " ".join(draw.choice(words, 30)), "completion": " ".join(draw.choice(words, 30))} for _ in range(64)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": "embedded", "method": "lora", "output": str(tmp_path / "run"), "memory": {"device": "cpu"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "held_out": 0, "workers": 1},
            "train": {"max_steps": 12, "batch_size": 8},
        }  # fmt: skip
        run = tunesmith.train(config)
    finally:
        torch.set_num_threads(threads)
    steps = [r for r in run.metrics() if r["kind"] == "step"][3:]
    reached = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
    planned = json.loads((run.path / "plan.json").read_text())
    assert planned["measured"] and abs(planned["speed"] / reached - 1) < 0.25, (planned["speed"], reached)
    (beside,) = [r for r in run.metrics() if r["kind"] == "plan"]
    assert beside["planned_gib"] == planned["needs"] and beside["planned_tokens_per_second"] == planned["speed"]


def test_more_than_five_percent_of_memory_and_fifteen_of_speed_are_told():
    assert astray(10.0, 10.4, 100.0, 90.0) == [] == astray(10.0, None, 100.0, None)
    memory, speed = astray(10.0, 11.0, 100.0, 80.0)
    assert memory == "memory was planned 10.00 GB and was 11.00 GB: 10% more"
    assert speed == "100 tokens a second were planned and 80 were reached: 20% slower"


def test_each_knob_is_the_plan_with_that_one_thing_turned():
    """Where the run file can say it: planned anew with all else pinned, GB and speed are the knob's."""
    from tunesmith.spec import Spec

    spec = Spec(vocab=32000, dim=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128, context=32768, norm_eps=1e-5)

    def plan(**changes):
        tree = {"model": "m", "method": "qlora", "output": "o", "data": {"train": "d.jsonl", "held_out": 0, "max_length": 2048},
                "train": {"batch_size": 4}, "eval": {"samples": 0}, "lora": {"rank": 16},
                "memory": {"budget_gb": 24}}  # fmt: skip
        for name, value in changes.items():
            tree[name] = {**tree[name], **value} if isinstance(value, dict) else value
        return make_plan(RunConfig.model_validate(tree), spec, lengths=np.full(1000, 2048), device=parse_device("4090"))

    base = plan()
    pinned = {"activations": "keep", "offload": False, "micro_batch_tokens": base.micro_batch_tokens, "budget_gb": 24}
    assert base.activations == "keep" and plan(memory=pinned).needs == base.needs
    told = {(k.key, k.value): k for k in base.knobs}
    checked = 0
    for (key, value), knob in told.items():
        section, _, name = key.partition(".")
        if section not in ("memory", "lora", "train") or not knob.fits:
            continue
        value = {"true": True, "false": False}.get(value, value)
        value = int(value.replace(",", "")) if isinstance(value, str) and value.replace(",", "").isdigit() else value
        changed = {section: {name: value}} if section != "memory" else {}
        turned = plan(memory={**pinned, **({name: value} if section == "memory" else {})}, **changed)
        assert turned.needs - base.needs == pytest.approx(knob.memory, abs=1e-6), knob
        assert turned.speed / base.speed - 1 == pytest.approx(knob.speed, abs=1e-6), knob
        checked += 1
    assert checked >= 6 and {"memory.activations", "memory.micro_batch_tokens", "lora.rank", "method", "decoded 4-bit weights"} <= {
        k.key for k in base.knobs
    }
    assert told["memory.compute", "fp8"].speed > 0.2 and told["lora.rank", "32"].memory > 0
    assert not told["decoded 4-bit weights", "kept"].fits, "13 GiB more are not there"


def test_the_meter_leaves_out_the_first_steps_and_says_nothing_of_a_short_run():
    import torch

    from tunesmith.train.meter import Meter

    meter = Meter(torch.device("cpu"))
    for tokens, seconds in [(100, 50.0)] * 3 + [(100, 2.0)] * 4:
        meter.step(tokens, seconds)
    assert meter.rate is None
    meter.step(100, 2.0)
    assert meter.rate == pytest.approx(50.0)
    assert meter.held is None or meter.held > 50 << 20


def test_a_macs_memory_is_what_metal_lets_a_gpu_use():
    for name, total, share in (("m1", 8, 0.74), ("m2-max", 32, 0.74), ("M4 Pro 48GB", 48, 0.74), ("m3-ultra-256", 256, 0.84)):
        mac = parse_device(name)
        assert (mac.kind, mac.total) == ("mps", total * GIB) and mac.free == round(share * mac.total) and mac.guessed
