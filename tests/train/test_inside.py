"""Each weight updated inside the backward: one gradient at a time, the same run whole or resumed, and what it refuses or admits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tunesmith
from tunesmith import models, tuning
from tunesmith.config import schema
from tunesmith.config.load import dump, load
from tunesmith.config.schema import INSIDE
from tunesmith.data.pack import collate
from tunesmith.devices import GIB, parse_device
from tunesmith.errors import ConfigError, DoesNotFit, ModelError, TrainingFailed, TunesmithError
from tunesmith.plan import make_plan
from tunesmith.plan.choice import Open
from tunesmith.run import Run
from tunesmith.spec import Spec, parameters
from tunesmith.train import loop
from tunesmith.train.inside import Inside, optimizer_for
from tunesmith.train.loss import batch_loss
from tunesmith.train.optim import Optimizer

TRAIN = schema.Train(optimizer=INSIDE, batch_size=4, weight_decay=0.1)
MISTRAL = Spec(
    vocab=32000, dim=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128, context=32768, norm_eps=1e-5, window=4096
)


def made(bench, dtype=torch.bfloat16, seed=5, **changes):
    model = bench.model("full", dtype)
    return model, Inside(dict(model.named_parameters()), TRAIN.model_copy(update=changes), seed)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def roomy(step=0):
    return loop.State(step=step, micro_batch_tokens=10_000)


def fit(bench, model, optimizer, total, **how):
    return bench.fit(model, lambda s: bench.examples(4, s), optimizer=optimizer, train=TRAIN, total=total,
                     **{"state": roomy(), **how})  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_never_stand_side_by_side(bench, checkpointed):
    """While the backward runs at most one weight has a gradient, and afterwards none; every weight has moved by then."""
    model, optimizer = made(bench)
    model.checkpoint_layers = checkpointed
    before, most = weights(model), 0

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():
        p.register_hook(lambda g: count(g))
        p.register_post_accumulate_grad_hook(count)  # behind the optimiser's own
    optimizer.set_rate(0.05)
    _, found = bench.gradient(model, bench.examples(4), optimizer=optimizer)
    assert most == 0 and all(g is None for g in found.values())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.never_moved() == []


def test_its_gradients_are_those_of_an_ordinary_backward(bench):
    """A weight moves only when all that read it have been through: the norms are those of a backward that moves nothing."""
    for checkpointed in (False, True):
        model, optimizer = made(bench, torch.float32)
        model.checkpoint_layers = checkpointed
        plain = bench.model("full")
        optimizer.set_rate(0.5)
        loss, _ = bench.gradient(model, bench.examples(4), optimizer=optimizer)
        wanted, gradients = bench.gradient(plain, bench.examples(4))
        assert loss == wanted
        for norm, (name, g) in zip(optimizer.norms.tolist(), gradients.items(), strict=True):
            assert norm == pytest.approx(g.norm().item(), rel=1e-6), name
        assert optimizer.step().item() == pytest.approx(torch.stack([g.norm() for g in gradients.values()]).norm().item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_it_learns_what_adamw_learns(bench, tiny, tmp_path, tied):
    """Thirty steps over the same rows. Losses at the end: within 3 % of those of AdamW with float32 masters and no clipping."""
    folder = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    rows, ends = bench.examples(4), []
    for kind in (INSIDE, "adamw"):
        train = schema.Train(optimizer=kind, max_grad_norm=0.0)
        model = models.load(folder, dtype=torch.bfloat16).requires_grad_(True)
        optimizer = optimizer_for(dict(model.named_parameters()), train, fast=(), seed=0)
        assert isinstance(optimizer, Inside if kind == INSIDE else Optimizer)
        found = bench.fit(model, lambda s: rows, optimizer=optimizer, train=train, total=30, state=roomy())
        ends.append([r["loss"] for r in found.recorder.steps])
    assert ends[0][0] == ends[1][0] and ends[0][-1] < 0.5 * ends[0][0]
    assert ends[0][-1] == pytest.approx(ends[1][-1], rel=0.03), ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_state_to_the_bit(bench, dtype):
    whole, unbroken = made(bench, dtype)
    fit(bench, whole, unbroken, 6)
    first, before = made(bench, dtype)
    with pytest.raises(tunesmith.errors.Interrupted):
        fit(bench, first, before, 6, recorder=bench.Recorder(stop_after=3))
    kept = {n: t.clone() for n, t in before.state().items()}
    assert all(isinstance(t, torch.Tensor) for t in kept.values())
    second, after = made(bench, dtype)
    after.load(kept)
    fit(bench, second, after, 6, state=roomy(3))
    ours, wanted = after.state(), unbroken.state()
    assert ours.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in ours.items())
    assert all(torch.equal(p, dict(whole.named_parameters())[n]) for n, p in second.named_parameters())
    with pytest.raises(KeyError):
        after.load({n: t for n, t in kept.items() if n != "exp_avg_scale/lm_head.weight"})
    other, another_seed = made(bench, dtype, seed=6)
    fit(bench, other, another_seed, 6)
    assert not torch.equal(second.lm_head.weight, other.lm_head.weight)


def test_the_state_names_weights_and_not_their_order(bench):
    """A step draws its bits by a weight's name."""
    model, optimizer = made(bench)
    twin = bench.model("full", torch.bfloat16)
    turned = Inside(dict(reversed(dict(twin.named_parameters()).items())), TRAIN, 5)
    fit(bench, model, optimizer, 3), fit(bench, twin, turned, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


# ---- what is not finite --------------------------------------------------------------------------------------------------------


def test_a_weight_whose_gradient_is_not_finite_stays(bench):
    """And with it all that the backward reaches later; those before it have moved, and the step says how many."""
    model, optimizer = made(bench)
    down = model.model.layers[0].mlp.down_proj
    down.weight.register_hook(lambda g: g * math.nan)
    before, recorder = weights(model), bench.Recorder()
    fit(bench, model, optimizer, 1, recorder=recorder)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == ["model.layers.0.mlp.down_proj.weight"]
    (message, values), *_ = recorder.events
    count = len(before)
    assert message == f"step applied to {count - 1} of {count} weights only: its loss or gradient is not finite"
    assert math.isnan(values["grad_norm"]) and math.isnan(recorder.steps[0]["grad_norm"])
    counts = dict(zip(optimizer.parameters, optimizer.counts.tolist(), strict=True))
    assert counts.pop(still[0]) == 0 and set(counts.values()) == {1}
    assert still[0] in optimizer.never_moved()


def test_a_loss_that_is_not_finite_moves_nothing(bench):
    """A nan reaches every gradient. Looking for the rows to blame moves nothing either. The third such step ends the run."""
    model, optimizer = made(bench)
    fit(bench, model, optimizer, 2)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    before, recorder = optimizer.state(), bench.Recorder()
    before = {n: t.clone() for n, t in before.items() if n != "steps"}
    with pytest.raises(TrainingFailed, match="3 steps in a row"):
        fit(bench, model, optimizer, 9, recorder=recorder, state=roomy(2))
    assert [m for m, _ in recorder.events] == ["step not applied: its loss or gradient is not finite"] * 3
    after = optimizer.state()
    assert all(torch.equal(torch.nan_to_num(t), torch.nan_to_num(after[n])) for n, t in before.items())


def test_only_the_backward_of_a_step_moves_weights(bench):
    model, optimizer = made(bench)
    before = weights(model)
    batch_loss(model, collate(bench.examples(4)), torch.device("cpu"))[0].backward()
    assert optimizer.gradient_norm() > 0 and all(p.grad is None for p in model.parameters())
    optimizer.clear()
    assert optimizer.gradient_norm() == 0 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- refusals ------------------------------------------------------------------------------------------------------------------


def test_a_second_micro_batch_is_refused_before_anything_moves(bench):
    model, optimizer = made(bench)
    before = weights(model)
    with pytest.raises(TrainingFailed, match=r"step 1 takes 4 micro-batches(?s:.*)train.batch_size"):
        fit(bench, model, optimizer, 3, state=loop.State(micro_batch_tokens=10))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_out_of_memory_is_gone_back_on_only_while_nothing_has_moved(bench, monkeypatch):
    """In the forward: layers keep less, and the step is the same. In the backward: some weights have moved, and the run ends."""
    calm, its = made(bench)
    fit(bench, calm, its, 2)
    model, optimizer = made(bench)
    recorder, hidden, calls = bench.Recorder(), model.hidden, 0

    def failing(*args, **how):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("full")
        return hidden(*args, **how)

    monkeypatch.setattr(model, "hidden", failing)
    end = fit(bench, model, optimizer, 2, recorder=recorder)
    assert [m for m, _ in recorder.events] == ["out of device memory: keeps less for the backward"] and not end.state.step_downs
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), calm.parameters(), strict=True))
    monkeypatch.undo()

    def full(_):
        raise torch.OutOfMemoryError("full")

    model.model.layers[0].mlp.down_proj.weight.register_hook(full)
    with pytest.raises(DoesNotFit, match=r"step 3 ran out of device memory after \d+ of \d+ weights(?s:.*)checkpoint stands"):
        fit(bench, model, optimizer, 3, state=roomy(2))


def test_types_and_shapes_it_cannot_hold():
    for p in (torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16)), torch.nn.Parameter(torch.ones(4, 2).t())):
        with pytest.raises(TunesmithError, match=INSIDE):
            Inside({"w": p}, TRAIN, 0)


BASE = {"model": "m", "data": "rows.jsonl", "method": "full", "output": "runs/x", "train": {"optimizer": INSIDE}}


@pytest.mark.parametrize(("changes", "what"), [
    ({"method": "qlora"}, "train.optimizer: .*is for method: full"),
    ({"train": {"optimizer": INSIDE, "max_grad_norm": 1.0}}, "train.max_grad_norm: .*cannot clip.*write 0"),
    ({"memory": {"dtype": "fp16"}}, "memory.dtype: fp16 needs a loss scale"),
    ({"memory": {"device": "cpu"}}, "train.optimizer: .*needs an NVIDIA GPU"),
])  # fmt: skip
def test_what_two_keys_forbid(changes, what):
    with pytest.raises(ConfigError, match=what):
        load(BASE | changes)


def test_an_override_does_not_drop_clipping_that_was_written_down():
    with pytest.raises(ConfigError, match="cannot clip"):
        load(BASE | {"train": {"max_grad_norm": 0.5}}, f"train.optimizer={INSIDE}")
    assert load(BASE | {"train": {"max_grad_norm": 0.0}}, f"train.optimizer={INSIDE}").train.optimizer == INSIDE


def test_a_run_folder_can_be_read_again(tmp_path):
    """A resolved file writes defaults down, and a clipping norm beside this optimiser would be refused."""
    (tmp_path / "run.yaml").write_text(dump(load(BASE)))
    again = load(tmp_path / "run.yaml")
    assert again.train.optimizer == INSIDE and "max_grad_norm" not in (tmp_path / "run.yaml").read_text()


# ---- the plan ------------------------------------------------------------------------------------------------------------------


def plan(gpu="80GB", lengths=None, spec=MISTRAL, method="full", **sections):
    config = schema.RunConfig.model_validate(
        {**BASE, "data": {"train": [{"path": "d.jsonl"}]}, "method": method, "eval": {"samples": 0}, **sections}
    )
    return make_plan(config, spec, lengths=lengths, device=parse_device(gpu))


def size(p, name):
    return sum(c.bytes for c in p.components if c.name == name)


def test_a_7b_fits_thirty_gb():
    """Weights 13.5 GiB, averages 13.7, and under 3 for one row of 2,048 tokens, one gradient and the context."""
    lengths = np.full(100, 2048)
    p = plan(lengths=lengths, train={"optimizer": INSIDE, "batch_size": 1}, memory={"activations": "checkpoint"})
    total = parameters(MISTRAL).total
    assert size(p, "linear weights") + size(p, "embedding, head, norms") == 2 * total
    assert size(p, "optimiser") == round(total * (2 + 1 / 32)) and not size(p, "masters") and not size(p, "gradients")
    assert p.needs < 30.5 and p.micro_batch_tokens == 2048
    assert any("27.2 GB before activations" in note for note in p.notes) and any("clips nothing" in note for note in p.notes)
    assert p.disk * GIB > 3 * total * 4 and plan("32GB", lengths, train={"optimizer": INSIDE, "batch_size": 1}).fits
    with_masters = plan("80GB", lengths, train={"optimizer": "adamw_8bit", "batch_size": 1})
    assert not with_masters.fits and any(f"{INSIDE} 27.2 GB" in note for note in with_masters.notes)


def test_a_tied_heads_gradient_that_waits_is_counted_with_the_heads_own():
    """Phi-4-mini's shapes, whose vocabulary is 200,064: 43.1 GiB were held on an H100 where 44.8 had been planned with both."""
    tied = plan(spec=replace(MISTRAL, tied=True, vocab=200_064))
    assert not size(tied, "gradients") and size(tied, "largest transient") >= (2 + 4) * 200_064 * 4096


def test_the_fullest_step_goes_through_at_once():
    """The longest rows may meet in one step, and a source of weight 2 may bring one of them twice."""
    lengths = np.array([100, 900, 500, 700, 300])
    train = {"optimizer": INSIDE, "batch_size": 2}
    assert plan(lengths=lengths, train=train).micro_batch_tokens == 1600
    assert plan(lengths=lengths, train=train, data={"train": [{"path": "d", "weight": 1.5}]}).micro_batch_tokens == 1800
    assert plan(lengths=lengths, train=train | {"batch_size": 9}).micro_batch_tokens == 2500
    assert plan(train=train, data={"train": [{"path": "d"}], "max_length": 512}).micro_batch_tokens == 1024
    with pytest.raises(ModelError, match=r"1,024 is less than the 1,600 tokens(?s:.*)train.batch_size"):
        plan(lengths=lengths, train=train, memory={"micro_batch_tokens": 1024})
    assert plan(lengths=lengths, train=train, memory={"micro_batch_tokens": 4096}).micro_batch_tokens == 1600
    found = {a.key: a for a in plan("24GB", lengths=np.full(100, 2048)).advice}
    assert found["train.batch_size"].value == "1" and "memory.micro_batch_tokens" not in found
    smaller = plan("24GB", lengths=np.full(100, 2048), train=train | {"batch_size": 1})
    assert plan("24GB", lengths=np.full(100, 2048)).needs - smaller.needs == pytest.approx(found["train.batch_size"].gain, abs=0.02)


def test_the_plan_refuses_by_name():
    with pytest.raises(ModelError, match=f"{INSIDE} does not run in fp16"):
        plan("v100")
    with pytest.raises(ModelError, match=f"{INSIDE} does not run on a CPU"):
        plan("cpu-64GB")


# ---- a whole run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The plan refuses a CPU, where the update is plain PyTorch; for tests it may run there."""
    monkeypatch.setattr(Open, "refuse", lambda *_: None)


def test_a_run_is_interrupted_and_resumed_to_the_bit(tiny, tmp_path, on_a_cpu, monkeypatch):
    def config(name):
        return {k: v for k, v in tiny.config(
            tmp_path / name, method="full", train={"optimizer": INSIDE, "learning_rate": 5e-3}, checkpoint={"every_steps": 2},
            memory={"device": "auto", "dtype": "bf16", "budget_gb": 4},
        ).items() if k != "lora"}  # fmt: skip

    if torch.cuda.is_available():
        pytest.skip("tests/gpu does it there")
    whole = tunesmith.train(config("whole")).path
    record = tuning._Session.record

    def stop(self, step, **values):
        record(self, step, **values)
        if step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning._Session, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(config("broken"))
    monkeypatch.setattr(tuning._Session, "record", record)
    broken = tunesmith.train(config("broken"), resume=True).path

    def told(path):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [(r["step"], r["loss"].hex(), r["grad_norm"].hex()) for r in rows if r["kind"] == "step"]

    assert told(whole) == told(broken) and len(told(whole)) == 12
    assert Run.open(broken).status().state == "finished"
    one, two = (sorted((p / "model").glob("*.safetensors")) for p in (whole, broken))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two] and one
    losses = json.loads((whole / "comparison.json").read_text())["loss"]
    assert losses["after"] < losses["before"]
