"""How many micro-batches a step takes changes nothing: 16x1 = 4x4 = 1x16, ragged tails, out of memory half-way."""

from types import SimpleNamespace

import pytest
import torch

from tunesmith.config import schema
from tunesmith.data.pack import micro_batches
from tunesmith.errors import DoesNotFit
from tunesmith.train import loop
from tunesmith.train.optim import Optimizer
from tunesmith.train.replay import Passes


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_sixteen_by_one_is_four_by_four_is_one_by_sixteen(bench, method, alpha):
    """16 rows of uneven length and a tail of 3: loss and every gradient to 1e-10 in float64; NEFTune's noise goes with its row."""
    model = bench.warm(bench.model(method, torch.float64))
    for rows in (bench.examples(16), bench.examples(3, seed=4)):
        lengths = [len(e.ids) for e in rows]
        found = [bench.gradient(model, rows, tokens=t, alpha=alpha) for t in (sum(lengths), max(lengths) * 2, 1)]
        assert len(micro_batches(lengths, sum(lengths))) == 1 < len(micro_batches(lengths, max(lengths) * 2)) <= len(rows)
        assert len(micro_batches(lengths, 1)) == len(rows)
        for loss, grads in found[1:]:
            assert abs(loss - found[0][0]) < 1e-10
            for name, g in grads.items():
                assert g.abs().max() > 0 and (g - found[0][1][name]).abs().max() < 1e-10, name


def test_a_step_is_the_same_whatever_the_order_of_its_rows(bench):
    model, rows = bench.warm(bench.model("lora", torch.float64)), bench.examples(8)
    one, other = bench.gradient(model, rows, tokens=30), bench.gradient(model, rows[::-1], tokens=30)
    assert abs(one[0] - other[0]) < 1e-10 and all((g - other[1][n]).abs().max() < 1e-10 for n, g in one[1].items())


class Full:
    """A device that holds `limit` tokens at once: a longer stream runs out of memory in the backward."""

    def __init__(self, model, limit):
        self.model, self.limit, self.streams = model, limit, []
        self.plain, model.hidden = model.hidden, self.hidden

    def hidden(self, tokens, layout, **how):
        self.streams.append(len(tokens))
        x = self.plain(tokens, layout, **how)
        if len(tokens) > self.limit:
            x.register_hook(self.full)
        return x

    def full(self, _):
        raise torch.OutOfMemoryError("made by a test")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(bench, method):
    model, rows = bench.warm(bench.model(method, torch.float64)), bench.examples(12)
    wanted = bench.gradient(model, rows, tokens=10_000)
    device, state, recorder = Full(model, 60), loop.State(micro_batch_tokens=10_000), bench.Recorder()
    loss, grads = bench.gradient(model, rows, state=state, recorder=recorder)
    assert abs(loss - wanted[0]) < 1e-10 and all((g - wanted[1][n]).abs().max() < 1e-10 for n, g in grads.items())
    assert 1 <= state.step_downs <= loop.STEP_DOWNS and state.micro_batch_tokens < sum(len(e.ids) for e in rows)
    assert len(recorder.events) == state.step_downs and "out of device memory" in recorder.events[0][0]
    assert recorder.events[-1][1]["micro_batch_tokens"] == state.micro_batch_tokens
    assert max(device.streams[-3:]) <= 60


def test_out_of_memory_gives_up_when_a_row_alone_does_not_fit(bench):
    model, rows = bench.model(), bench.examples(4)
    Full(model, 2)
    state = loop.State(micro_batch_tokens=64)
    with pytest.raises(DoesNotFit, match="out of device memory") as e:
        bench.gradient(model, rows, state=state)
    assert "data.max_length" in e.value.fix and state.step_downs <= loop.STEP_DOWNS


def test_out_of_memory_gives_up_after_four_times(bench):
    model, rows = bench.model(), [bench.example(range(2, 8), line=i) for i in range(64)]
    Full(model, 6)
    state = loop.State(micro_batch_tokens=10_000)
    with pytest.raises(DoesNotFit, match="4 times halved"):
        bench.gradient(model, rows, state=state)
    assert state.step_downs == 4


def test_out_of_memory_first_gives_back_decoded_weights_and_last_keeps_less(bench):
    """Decoded weights, then halves, then the levels below: one event each, and the gradient is the same."""
    from tunesmith.models.fast import FastLayers, policies

    model, rows = bench.warm(bench.model("qlora")), bench.examples(6)
    wanted = bench.gradient(model, rows, tokens=10_000)
    model.fast = FastLayers(model, policies(2))
    assert model.fast.cache(1 << 30)
    device, recorder, state = Full(model, 10_000), bench.Recorder(), loop.State(micro_batch_tokens=10_000)
    longest = max(len(e.ids) for e in rows)

    def full():
        """Room for the longest row alone, nothing decoded, and no gate and up."""
        room = not any(g.kept is not None for h in model.fast.halves for g in h.groups) and device.streams[-1] <= longest
        return not (room and model.fast.policies[0].level == "attention")

    device.hidden = lambda tokens, layout, **how: _failing(device, full, tokens, layout, how)
    model.hidden = device.hidden
    loss, grads = bench.gradient(model, rows, state=state, recorder=recorder)
    assert abs(loss - wanted[0]) < 1e-5 and all((g - wanted[1][n]).abs().max() < 1e-5 for n, g in grads.items())
    said = [message.removeprefix("out of device memory").lstrip(": ") for message, _ in recorder.events]
    assert (
        said[0].startswith("gave back decoded weights")
        and [s[:6] for s in said[1:]] == ["halved"] * state.step_downs + ["keeps "] * 2
    )
    assert [values.get("activations") for _, values in recorder.events[-2:]] == ["recompute", "attention"]
    assert state.micro_batch_tokens == longest and model.fast.leaner() == "checkpoint" and model.fast.leaner() == ""


def test_out_of_memory_gives_back_recordings_before_all_else(bench, monkeypatch):
    """Beside a pass too long to be recorded they take memory that the plan counts once: twice they are given back, the
    second time for good, and only without them the micro-batch is halved."""
    model = bench.model()
    rows, recorder, state = bench.examples(6), bench.Recorder(), loop.State(micro_batch_tokens=10_000)
    passes = Passes(model, Optimizer(bench.parameters(model), schema.Train()), torch.device("cpu"))
    held = SimpleNamespace(graph=object())
    seen = []

    def full(passes, batch, factor, noise=None):
        seen.append((bool(passes.recordings), passes.paused, len(batch.tokens)))
        if not passes.paused:
            passes.recordings["one"] = held
        if len(seen) < 4:
            raise torch.OutOfMemoryError("made by a test")
        return torch.zeros(())

    passes.recordings["one"] = held
    monkeypatch.setattr(Passes, "__call__", full)
    loop._gradient(passes, rows, state, recorder.hooks(), 0, 5, 0.0)
    assert [s[:2] for s in seen[:4]] == [(True, False), (False, False), (False, True), (False, False)]
    assert ["recorded" in message for message, _ in recorder.events] == [True, True, False]
    assert state.step_downs == 1 and seen[3][2] < seen[0][2]


def test_an_evaluation_out_of_memory_is_read_again_without_recordings(bench):
    passes, recorder = Passes(bench.model(), None, torch.device("cpu")), bench.Recorder([1.5])
    read, state = recorder.evaluate, loop.State(step=1)

    def evaluate(state):
        if passes.recordings:
            raise torch.OutOfMemoryError("made by a test")
        return read(state)

    recorder.evaluate = evaluate
    passes.recordings["one"] = SimpleNamespace(graph=object())
    loop._evaluate(state, recorder.hooks(), 0, passes)
    assert state.best_loss == 1.5 and not passes.recordings
    recorder.evaluate = lambda state: (_ for _ in ()).throw(torch.OutOfMemoryError("made by a test"))
    with pytest.raises(torch.OutOfMemoryError):
        loop._evaluate(state, recorder.hooks(), 0, passes)


def _failing(device, full, tokens, layout, how):
    device.streams.append(len(tokens))
    if full():
        raise torch.OutOfMemoryError("made by a test")
    return device.plain(tokens, layout, **how)


def test_the_composed_path_falls_to_checkpointing_once(bench):
    model = bench.model()
    assert not model.relieve() and model.leaner() == "checkpoint" and model.checkpoint_layers and model.leaner() == ""


def test_a_half_made_gradient_is_dropped_also_on_16_bit_weights(bench):
    """bf16 weights: the gradient moves to the float32 master as it comes; what an out-of-memory left behind must not be added."""
    model, rows = bench.warm(bench.model("full", torch.bfloat16)), bench.examples(8)
    optimizer, half = Optimizer(bench.parameters(model), schema.Train()), loop.State(micro_batch_tokens=40)
    wanted = bench.gradient(model, rows, state=half, optimizer=optimizer)
    device, state = Full(model, 40), loop.State(micro_batch_tokens=sum(len(e.ids) for e in rows))

    def left_behind(_):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        raise torch.OutOfMemoryError("made by a test")

    device.full = left_behind
    loss, grads = bench.gradient(model, rows, state=state, optimizer=optimizer)
    assert state.step_downs and loss == pytest.approx(wanted[0], rel=1e-3)
    for name, g in grads.items():  # other micro-batches round to bf16 in other places; a left-behind one would add 1 everywhere
        assert g.dtype == torch.float32 and (g - wanted[1][name]).abs().max() < 0.02, name
