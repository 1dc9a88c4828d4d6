"""Nothing ends as a success that did not learn: nan and inf, weights without a gradient, rates, masks, overflow, full disks."""

import io
import json
import math
import os
import resource

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file

import tunesmith
from tunesmith import files, tuning
from tunesmith.config import schema
from tunesmith.errors import DataError, DoesNotFit, ModelError, TrainingFailed
from tunesmith.models.place import place
from tunesmith.run import Run
from tunesmith.train import checkpoint, loop
from tunesmith.train.optim import LossScale, Optimizer

POISON = 251


def quiet():
    return Console(file=io.StringIO(), width=200)


def poisoned(model, kind):
    """Rows that hold token 251 get a loss or a gradient that is not finite."""
    plain, seen = model.hidden, {"nan": math.nan, "inf": math.inf}[kind.split()[0]]

    def hidden(tokens, layout, **how):
        x = plain(tokens, layout, **how)
        if bool((tokens == POISON).any()):
            if "loss" in kind:
                return x * seen
            x.register_hook(lambda g: g * seen)
        return x

    model.hidden = hidden
    return model


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "nan gradient", "inf gradient"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_that_is_not_finite_is_not_applied_and_names_its_rows(bench, kind, method):
    def rows(step):
        made = bench.examples(4, step)
        return [*made[:3], bench.example([5, 6, POISON, 7, 8], name="bad.jsonl", line=41 + step)] if step in (2, 4, 5) else made

    model = poisoned(bench.model(method), kind)
    optimizer, weights = Optimizer(bench.parameters(model), schema.Train()), []

    class Watch(bench.Recorder):
        def hooks(self):
            plain = super().hooks()

            def record(step, **values):
                weights.append({n: m.detach().clone() for n, m in optimizer.masters.items()})
                plain.record(step, **values)

            return loop.Hooks(**{**plain.__dict__, "record": record})

    recorder = Watch()
    end = bench.fit(model, rows, total=8, optimizer=optimizer, recorder=recorder)
    assert end.state.step == 8 and end.state.not_finite == 0
    for step in range(2, 9):
        still = all(torch.equal(w, weights[step - 2][n]) for n, w in weights[step - 1].items())
        assert still == (step in (3, 5, 6)), f"step {step}"
    told = [e for e in recorder.events if "not applied" in e[0]]
    assert [e[1]["step"] for e in told] == [3, 5, 6] and [e[1]["rows"] for e in told] == [
        "bad.jsonl:43",
        "bad.jsonl:45",
        "bad.jsonl:46",
    ]
    lost = [not math.isfinite(r["loss"] + r["grad_norm"]) for r in recorder.steps]
    assert lost == [s in (3, 5, 6) for s in range(1, 9)]
    assert all(torch.isfinite(t).all() for t in optimizer.state().values())


def test_three_in_a_row_end_the_run(bench):
    model, recorder = poisoned(bench.model(), "nan loss"), bench.Recorder()
    bad = [bench.example([5, POISON, 6, 7], name="bad.jsonl", line=i) for i in range(20)]
    with pytest.raises(TrainingFailed, match="3 steps in a row") as e:
        bench.fit(model, lambda s: bad if s >= 2 else bench.examples(4, s), total=20, recorder=recorder)
    assert e.value.exit_code == 1 and "bad.jsonl:7 and 12 more" in e.value.what and len(recorder.steps) == 5


def test_three_in_a_row_are_counted_across_a_resume(bench):
    bad = [bench.example([5, POISON, 6, 7])]
    with pytest.raises(TrainingFailed, match="the last was step 5"):
        bench.fit(poisoned(bench.model(), "nan loss"), lambda s: bad, total=20, state=loop.State(step=4, not_finite=2))


def bad_base(tiny, folder, character="~"):
    """A checkpoint whose embedding of one byte is nan, as a damaged one may have."""
    tiny.checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][vocab[character]] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(path, answers):
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": a}]} for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def every_tensor_is_finite(folder):
    found = [t for p in folder.rglob("*.safetensors") for t in load_file(p).values()]
    return all(np.isfinite(t).all() for t in found if t.dtype.kind == "f")


def test_one_bad_row_in_a_real_run_costs_its_steps_and_is_named(tiny, tmp_path):
    data = write(tmp_path / "data.jsonl", ["a fine answer", "a ~ here"] + ["one more"] * 14)
    config = tiny.config(tmp_path / "run", model=str(bad_base(tiny, tmp_path / "base")), data={"train": data})
    run = tunesmith.train(config, console=quiet())
    events = [r for r in run.metrics() if r["kind"] == "event" and "not applied" in r["what"]]
    assert events and all(e["rows"].endswith("data.jsonl:2") for e in events) and run.status().state == "finished"
    assert every_tensor_is_finite(run.path) and "data.jsonl:2" in run.report.read_text()


def test_a_real_run_of_bad_rows_fails(tiny, tmp_path):
    data = write(tmp_path / "data.jsonl", ["a fine answer"] * 4 + [f"a ~ here {i}" for i in range(20)])
    config = tiny.config(tmp_path / "run", model=str(bad_base(tiny, tmp_path / "base")), data={"train": data})
    config["checkpoint"] = {"every_steps": 1}
    with pytest.raises(TrainingFailed, match="in a row"):
        tunesmith.train(config, console=quiet())
    run = Run.open(tmp_path / "run")
    assert run.status().state == "failed" and "nan or inf" in run.status().message
    assert not run.adapter.exists() and every_tensor_is_finite(run.path)
    assert "must not be taken for a success" in run.report.read_text()


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    """Whatever made them so."""
    plain = Optimizer.step

    def step(self, loss):
        norm = plain(self, loss)
        with torch.no_grad():
            next(iter(self.masters.values()))[0, 0] = math.nan
        return norm

    monkeypatch.setattr(Optimizer, "step", step)
    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 1}, eval={"every_steps": 1})
    with pytest.raises(TrainingFailed, match="nan or inf"):
        tunesmith.train(config, console=quiet())
    assert not list((tmp_path / "run").rglob("tensors.safetensors")) and Run.open(tmp_path / "run").status().state == "failed"


# ---- what does not learn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 10])
def test_an_adapter_without_any_gradient_fails(bench, total):
    model = bench.model()
    plain, parameters = model.hidden, bench.parameters(model)
    model.hidden = lambda *a, **k: plain(*a, **k).detach() + 0 * sum(p.sum() for p in parameters.values())
    with pytest.raises(TrainingFailed, match="no trained weight has had a gradient") as e:
        bench.fit(model, lambda s: bench.examples(4, s), total=total)
    assert e.value.exit_code == 1


def test_a_single_module_that_never_moves_is_named(bench):
    model = bench.model()
    name = "model.layers.1.self_attn.v_proj"
    model.get_submodule(name).enabled = False
    recorder = bench.fit(model, lambda s: bench.examples(4, s), total=5).recorder
    assert [e[1]["step"] for e in recorder.events] == [3, 5]
    assert recorder.events[0][0] == "2 trained weights have had no gradient so far"
    assert all(f"{name}.lora_{x}.weight" in recorder.events[0][1]["weights"] for x in "AB")


def test_a_sound_run_of_any_length_tells_nothing(bench):
    for total in (1, 2, 3, 4):
        assert not bench.fit(bench.model(), lambda s: bench.examples(4, s), total=total).recorder.events


def test_nothing_to_train_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.adapters, "trainable", lambda model: {})
    with pytest.raises(ModelError, match="nothing is trained"):
        tunesmith.train(tiny.config(tmp_path / "run"), console=quiet())


def test_rows_that_are_masked_throughout_are_refused_before_the_first_step(tiny, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    for allowed in (0.01, 0.999):
        output = tmp_path / f"run{allowed}"
        config = tiny.config(output, data={"train": str(tmp_path / "data.jsonl"), "held_out": 0, "max_refused": allowed})
        del config["eval"]
        with pytest.raises(DataError) as e:
            tunesmith.train(config, console=quiet())
        assert e.value.exit_code == 2 and not (output / "metrics.jsonl").exists()
        assert Run.open(output).status().state == "failed"


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_rate_that_is_not_the_scheduled_one_fails(bench, ratio, monkeypatch):
    """A group that the schedule does not reach, as one added by hand."""
    monkeypatch.setattr(Optimizer, "set_rate", lambda self, rate: self.adamw.param_groups[0].update(lr=rate * self.ratios[0]))
    model, train = bench.model(variant="dora"), schema.Train(weight_decay=0.1, loraplus_ratio=ratio)
    with pytest.raises(TrainingFailed, match="the schedule says"):
        bench.fit(model, lambda s: bench.examples(4, s), total=5, train=train)


# ---- precision and cards -------------------------------------------------------------------------------------------------------


def test_an_fp16_overflow_halves_the_scale_and_repeats_the_step(bench):
    """A device whose gradients overflow above a scale of 4096: two halvings, then the losses of a run without a scale."""
    model, state = bench.model(), loop.State(micro_batch_tokens=40, loss_scale=LossScale.of(torch.float16))
    plain = model.hidden

    def hidden(tokens, layout, **how):
        x = plain(tokens, layout, **how)
        if x.requires_grad:
            x.register_hook(lambda g: g * (math.inf if state.loss_scale.value > 4096 else 1))
        return x

    model.hidden = hidden
    found = bench.fit(model, lambda s: bench.examples(4, s), total=5, state=state).recorder
    wanted = bench.fit(bench.model(), lambda s: bench.examples(4, s), total=5).recorder
    assert state.loss_scale.value == 4096 and not found.events and state.step == 5
    assert [r["loss_scale"] for r in found.steps] == [4096.0] * 5
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found.steps] == pytest.approx([r[key] for r in wanted.steps], rel=1e-6)


def test_an_fp16_model_whose_own_gradient_is_inf_is_not_tried_for_ever(bench):
    model, state = poisoned(bench.model(), "inf gradient"), loop.State(loss_scale=LossScale.of(torch.float16))
    with pytest.raises(TrainingFailed, match="in a row"):
        bench.fit(model, lambda s: [bench.example([5, POISON, 6, 7])], total=20, state=state)
    assert state.loss_scale.value == 2.0


@pytest.fixture
def card(monkeypatch):
    def of(name, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: name)

    return of


def test_a_card_without_bf16_is_refused_by_name_or_gets_fp16(card):
    card("Tesla T4", (7, 5))
    with pytest.raises(ModelError, match="Tesla T4 does not compute in bf16") as e:
        place(schema.Memory(dtype="bf16"))
    assert "fp16" in e.value.fix
    found = place(schema.Memory())
    assert found.dtype == torch.float16 and "Tesla T4" in found.note and "loss scaling" in found.note
    assert LossScale.of(found.dtype).active
    card("NVIDIA H200", (9, 0))
    found = place(schema.Memory())
    assert (found.dtype, found.note, found.describe()) == (torch.bfloat16, "", "NVIDIA H200 in bf16")


def test_devices_that_are_not_here_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(ModelError, match=f"memory.device is {device}"):
            place(schema.Memory(device=device))
    assert place(schema.Memory()).describe() == "CPU in fp32" and place(schema.Memory(dtype="bf16")).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = place(schema.Memory(device="mps"))
    assert found.dtype == torch.float32 and "nobody has tested it" in found.note


def test_full_in_bf16_keeps_float32_masters(tiny, tmp_path):
    config = tiny.config(tmp_path / "run", method="full", memory={"dtype": "bf16"}, train={"learning_rate": 1e-4})
    del config["lora"]
    run = tunesmith.train(config, console=quiet())
    newest = max(run.checkpoints.iterdir()) / "tensors.safetensors"
    masters = {n: t for n, t in checkpoint.load(newest.parent)[0].items() if n.startswith("master/")}
    assert masters and all(t.dtype == torch.float32 for t in masters.values())
    assert any(not torch.equal(t, t.to(torch.bfloat16).float()) for t in masters.values()), "more than bf16 can hold"
    from safetensors.torch import load_file as load_torch

    found = load_torch(run.model / "model.safetensors")
    for name, t in found.items():
        assert t.dtype == torch.bfloat16 and torch.equal(t, masters[f"master/{name}"].to(torch.bfloat16)), name


# ---- the end of a run ----------------------------------------------------------------------------------------------------------


def test_it_ends_with_the_best_weights_and_says_so(tiny, tmp_path, monkeypatch):
    plain, losses = tuning.heldout.losses, iter([5.0, 4.0, 4.4, 4.8])

    def told(*args, **how):
        found = plain(*args, **how)
        return tuning.Losses(found.trained * next(losses), found.trained)

    monkeypatch.setattr(tuning.heldout, "losses", told)
    console = quiet()
    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 1, "keep": 20})
    run = tunesmith.train(config, console=console)
    best, _ = checkpoint.load(run.checkpoints / "step-00000004")
    for name, value in load_file(run.adapter / "adapter_model.safetensors").items():
        assert np.array_equal(value, best[f"master/{name}"].numpy()), name
    assert run.manifest["weights_of_step"] == run.manifest["best_step"] == 4 and run.manifest["steps"] == 12
    assert json.loads((run.path / "comparison.json").read_text())["loss"]["after"] == pytest.approx(4.0)
    assert "ending with the weights of step 4" in console.file.getvalue() and "weights of step 4" in run.report.read_text()
    assert not (run.path / "best").exists()


def test_without_keep_best_it_ends_with_the_last(tiny, tmp_path):
    run = tunesmith.train(tiny.config(tmp_path / "run", eval={"keep_best": False}), console=quiet())
    last, _ = checkpoint.load(max(run.checkpoints.iterdir()))
    for name, value in load_file(run.adapter / "adapter_model.safetensors").items():
        assert np.array_equal(value, last[f"master/{name}"].numpy()), name


def test_a_full_disk_pauses_the_run_and_room_lets_it_go_on(tiny, tmp_path):
    """No file may grow past 50,000 bytes: the first checkpoint does not fit."""
    config = tiny.config(tmp_path / "run", checkpoint={"every_steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DoesNotFit, match="step-00000002") as e:
            tunesmith.train(config, console=quiet())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.exit_code == 2
    run = Run.open(tmp_path / "run")
    assert run.status().state == "interrupted" and "bytes are needed" in run.status().message
    assert tunesmith.train(config, resume=True, console=quiet()).status().state == "finished"


def test_too_small_a_disk_is_told_before_the_first_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100_000)
    with pytest.raises(DoesNotFit, match=r"keeping 2 checkpoints .* needs [\d,]+ bytes .* 100,000 are free"):
        tunesmith.train(tiny.config(tmp_path / "run"), console=quiet())
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_held_out_loss_that_is_not_finite_is_told_and_is_never_the_best(tiny, tmp_path, monkeypatch):
    plain, calls = tuning.heldout.losses, []

    def losses(*args, **how):
        found = plain(*args, **how)
        calls.append(1)
        if len(calls) == 4:  # before, 4, 8, then the last step
            found.total[[1, 3]] = math.nan
        return found

    monkeypatch.setattr(tuning.heldout, "losses", losses)
    run = tunesmith.train(tiny.config(tmp_path / "run"), console=quiet())
    told = [r for r in run.metrics() if r["kind"] == "event" and "held-out loss is not finite" in r["what"]]
    assert len(told) == 1 and told[0]["step"] == 12 and told[0]["rows"].count("held_out.jsonl:") == 2
    assert run.manifest["weights_of_step"] == 8


@pytest.mark.parametrize("where", ["_before", "__init__", "save"])
def test_a_second_signal_stops_at_once(tiny, tmp_path, monkeypatch, where):
    monkeypatch.setattr(tuning._Session, where, lambda self, *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(tiny.config(tmp_path / "run"), console=quiet())
    status = Run.open(tmp_path / "run").status()
    assert status.state == "interrupted" and status.message.startswith("stopped ") and "checkpoint" in status.message


def test_what_a_bug_leaves_is_no_success(tiny, tmp_path, monkeypatch):
    """No last word is said, and a reader is told that the run stopped."""
    monkeypatch.setattr(tuning._Session, "save", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tunesmith.train(tiny.config(tmp_path / "run"), console=quiet())
    status = Run.open(tmp_path / "run").status()
    assert status.state == "stopped" and status.pid == os.getpid()
