"""The loop's order of things: when it evaluates, saves and stops, what it records, and that a step follows from its number."""

import json
import os
from pathlib import Path

import pytest

import tunesmith
from tunesmith.config import schema
from tunesmith.errors import Interrupted
from tunesmith.train import loop
from tunesmith.train.optim import schedule

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"


def test_when_it_evaluates_saves_and_keeps_the_best(bench):
    recorder = bench.Recorder(losses=[3.0, 2.0, 2.5])
    end = bench.fit(bench.model(), lambda s: bench.examples(4, s), recorder=recorder, total=10, eval_every=4, save_every=3)
    assert recorder.evaluated == [4, 8, 10], "not before the first step: that is the caller's; always after the last"
    assert recorder.best == [4, 8] and (end.state.best_step, end.state.best_loss, end.state.since_best) == (8, 2.0, 1)
    assert recorder.saved == [3, 6, 9, 10]
    assert [r["step"] for r in recorder.steps] == list(range(1, 11)) and end.state.tokens == sum(
        r["tokens"] for r in recorder.steps
    )


def test_what_a_step_records(bench):
    train = schema.Train(batch_size=4, schedule="linear", warmup_ratio=0.3)
    recorder = bench.fit(bench.model(), lambda s: bench.examples(4, s), total=10, train=train).recorder
    assert [r["learning_rate"] for r in recorder.steps] == [0.01 * schedule("linear", s, 10, 0.3) for s in range(10)]
    assert all(r["grad_norm"] > 0 and r["seconds"] > 0 and "loss_scale" not in r for r in recorder.steps)
    for step, row in enumerate(recorder.steps):  # what goes through the model ends with the last trained token
        assert row["tokens"] == sum(int(e.learn.nonzero()[0][-1]) for e in bench.examples(4, step))
    assert not recorder.events


def test_without_held_out_rows_nothing_is_best(bench):
    recorder = bench.fit(bench.model(), lambda s: bench.examples(4, s), total=4, eval_every=1).recorder
    assert not recorder.best and recorder.saved == [4]


def test_early_stop(bench):
    recorder = bench.Recorder(losses=[3.0, 2.0, 2.1, 2.2, 1.0])
    end = bench.fit(bench.model(), lambda s: bench.examples(4, s), recorder=recorder, total=50, eval_every=2, early_stop=2)
    assert end.state.step == 8 and recorder.evaluated == [2, 4, 6, 8] and recorder.saved == [8]
    assert end.state.best_step == 4 and "stopped early" in recorder.events[0][0]


def test_a_request_to_stop_is_served_after_the_step(bench):
    recorder = bench.Recorder(losses=[3.0], stop_after=3)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 10"):
        bench.fit(bench.model(), lambda s: bench.examples(4, s), recorder=recorder, total=10, eval_every=3)
    assert recorder.saved == [3] and not recorder.evaluated, "saved at once; the evaluation that was due waits for the resume"


def test_an_evaluation_that_was_stopped_is_due_again(bench):
    model, recorder = bench.model(), bench.Recorder(losses=[3.0], stop_after=99)

    def evaluate(state):
        recorder.stop_after = 0
        raise loop.Stopped

    recorder.evaluate, kept = evaluate, []
    state = loop.State(micro_batch_tokens=40)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        bench.fit(model, lambda s: bench.examples(4, s), recorder=recorder, total=4, eval_every=2, state=state)
    assert state.step == 2 and state.evaluated == 0 and recorder.saved == [2]
    again = bench.Recorder(losses=[3.0])
    again.save = kept.append
    bench.fit(model, lambda s: bench.examples(4, s), recorder=again, total=4, eval_every=2, save_every=2, state=state)
    assert again.evaluated == [2, 4] and again.saved == [2, 4], "and what it found is saved"


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.2}])
def test_a_step_follows_from_its_number(bench, lora):
    """Steps 4 to 6 from the weights after step 3 are those of an unbroken run, draws of dropout and NEFTune included."""
    train = schema.Train(batch_size=4, neftune_alpha=5.0 if lora else 0.0)
    whole = bench.fit(bench.model(**lora), lambda s: bench.examples(4, s), total=6, train=train).recorder
    model = bench.model(**lora)
    recorder = bench.Recorder(stop_after=3)
    state = loop.State(micro_batch_tokens=40)
    optimizer = loop.Optimizer(bench.parameters(model), train)
    with pytest.raises(Interrupted):
        bench.fit(model, lambda s: bench.examples(4, s), total=6, train=train, recorder=recorder, state=state, optimizer=optimizer)
    rest = bench.fit(model, lambda s: bench.examples(4, s), total=6, train=train, state=state, optimizer=optimizer).recorder
    losses = [r["loss"].hex() for r in recorder.steps + rest.steps]
    assert losses == [r["loss"].hex() for r in whole.steps]


CASES = {
    "lora": {},
    "lora, dropout, neftune, lora+": {"lora": {"dropout": 0.1}, "train": {"neftune_alpha": 5.0, "loraplus_ratio": 4.0}},
    "qlora, rslora, linear": {"method": "qlora", "lora": {"variant": "rslora"}, "train": {"schedule": "linear"}},
    "dora, constant, small batches": {"lora": {"variant": "dora"}, "train": {"schedule": "constant", "batch_size": 2}},
    "full, wsd, decay": {"method": "full", "train": {"schedule": "wsd", "weight_decay": 0.1, "learning_rate": 0.003}},
}


@pytest.mark.parametrize("case", CASES)
def test_golden_losses(tiny, tmp_path, case):
    """Twenty steps, from the rows on: whoever changes them on purpose writes them anew with TUNESMITH_GOLDEN=write.

    1e-5: another BLAS or vector width rounds elsewhere; a change of meaning moves a loss by far more.
    """
    config = tiny.config(tmp_path / "run", **CASES[case])
    config["train"] = {**config["train"], "max_steps": 20}
    del config["train"]["epochs"]
    config["eval"] = {"every_steps": 20}
    config["data"] = {**config["data"], "held_out": 0}
    if config["method"] == "full":
        del config["lora"]
    run = tunesmith.train(config)
    losses = [row["loss"] for row in run.metrics() if row["kind"] == "step"]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("TUNESMITH_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(golden | {case: [round(v, 7) for v in losses]}, indent=1) + "\n")
        return
    assert len(losses) == 20 and losses[0] - losses[-1] > 0.2
    assert losses == pytest.approx(golden[case], abs=1e-5)
