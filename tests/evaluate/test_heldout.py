"""Held-out losses and answers: the right numbers in the right order, in memory that does not grow with the set."""

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tunesmith import adapters, models
from tunesmith.config import schema
from tunesmith.data.render import build_renderer
from tunesmith.evaluate import heldout
from tunesmith.types import Conversation, Example, Message, Origin

CPU = torch.device("cpu")


def examples(count, low=4, high=24):
    draw, made = np.random.default_rng(1), []
    for i in range(count):
        ids = draw.integers(0, 250, int(draw.integers(low, high))).astype(np.int32)
        made.append(Example(ids, np.arange(len(ids)) >= 1 + i % (len(ids) - 1), Origin("rows", i)))
    return made


@pytest.fixture(scope="module")
def model(tiny):
    made = models.load(tiny.model, dtype=torch.float64)
    adapters.attach(made, schema.Lora(rank=2, alpha=4.0, dropout=0.5), seed=1)
    with torch.no_grad():
        for p in adapters.trainable(made).values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    return made


def test_each_rows_loss_stands_at_its_place(model):
    """Against the definition, row by row; dropout is off, the model is in training again afterwards."""
    rows = examples(11)
    found = heldout.losses(model.train(), rows, micro_batch_tokens=50, device=CPU)
    assert model.training
    model.eval()
    for i, e in enumerate(rows):
        logits = model(torch.from_numpy(e.ids.astype(np.int64)))
        each = F.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:].astype(np.int64)), reduction="none")
        wanted = each[torch.from_numpy(e.learn[1:])]
        assert found.total[i] == pytest.approx(wanted.sum().item(), abs=1e-10) and found.trained[i] == len(wanted)
        assert found.each[i] == pytest.approx(wanted.mean().item(), abs=1e-10)
    assert found.mean == pytest.approx(found.total.sum() / found.trained.sum())
    assert found.mean != pytest.approx(found.each.mean()), "every token weighs the same, not every row"


def test_memory_does_not_grow_with_the_set(model, monkeypatch):
    """When a micro-batch begins, all that is alive of the earlier ones is a number a trained token of the last."""
    plain_hidden, plain_loss, made, streams = model.hidden, heldout.batch_loss, [], []

    def hidden(tokens, layout, **how):
        assert sum(t.numel() for r in made if (t := r()) is not None) <= 61
        streams.append(len(tokens))
        x = plain_hidden(tokens, layout, **how)
        made.append(weakref.ref(x))
        return x

    def batch_loss(*args):
        out = plain_loss(*args)
        made.extend(weakref.ref(t) for t in out)
        return out

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(heldout, "batch_loss", batch_loss)
    heldout.losses(model, examples(96, 19, 20), micro_batch_tokens=60, device=CPU)
    assert len(streams) == 32 and max(streams) <= 60 and len(made) == 96


def test_the_micro_batch_size_changes_nothing_but_rounding(model):
    rows = examples(9)
    one, other = (heldout.losses(model, rows, micro_batch_tokens=t, device=CPU) for t in (1, 10_000))
    assert np.abs(one.total - other.total).max() < 1e-10 and (one.trained == other.trained).all()


def test_out_of_memory_halves_what_is_read_at_once(model):
    rows, plain, streams = examples(9), model.hidden, []
    wanted = heldout.losses(model, rows, micro_batch_tokens=30, device=CPU)

    def hidden(tokens, layout, **how):
        streams.append(len(tokens))
        if len(tokens) > 40:
            raise torch.OutOfMemoryError("made by a test")
        return plain(tokens, layout, **how)

    model.hidden = hidden
    try:
        found = heldout.losses(model, rows, micro_batch_tokens=10_000, device=CPU)
        assert np.abs(found.total - wanted.total).max() < 1e-10 and max(streams) > 40
        model.hidden = lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("made by a test"))
        with pytest.raises(torch.OutOfMemoryError):
            heldout.losses(model, rows, micro_batch_tokens=10_000, device=CPU)
    finally:
        del model.hidden


def test_what_check_raises_ends_it(model):
    calls = []

    class Enough(Exception): ...

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    with pytest.raises(Enough):
        heldout.losses(model.train(), examples(20), micro_batch_tokens=20, device=CPU, check=check)
    assert len(calls) == 3 and model.training


# ---- questions and answers -----------------------------------------------------------------------------------------------------


def chat(i, *turns, kind="chat"):
    return Conversation(tuple(Message(r, c) for r, c in turns), Origin("rows", i), kind)


@pytest.fixture(scope="module")
def renderer(tiny):
    return build_renderer(tiny.model, schema.Data(train=(schema.Source(path=str(tiny.train)),)))


def test_questions_are_spread_over_the_rows_that_end_in_an_answer(renderer):
    rows = [chat(i, ("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(40)]
    asked = heldout.questions(rows, renderer, 4, rows=40, longest=100)
    assert [a.index for a in asked] == [0, 10, 20, 30] and (asked[1].shown, asked[1].gold) == ("q10", "a10")
    assert renderer.tokenizer.decode(list(asked[1].ids), skip_special=False) == "<|user|>q10<|end|><|assistant|>"
    rows[10] = chat(10, ("user", "only asked"))
    assert [a.index for a in heldout.questions(rows, renderer, 4, rows=40, longest=100)] == [0, 11, 20, 30]
    assert [a.index for a in heldout.questions(rows[:3], renderer, 24, rows=3, longest=100)] == [0, 1, 2]
    long = [chat(0, ("user", "x" * 200), ("assistant", "a")), *rows[1:3]]
    assert [a.index for a in heldout.questions(long, renderer, 24, rows=3, longest=100)] == [1, 2]
    assert heldout.questions(rows, renderer, 0, rows=40, longest=100) == []


def test_only_the_prompts_that_are_asked_are_rendered(renderer, monkeypatch):
    made = []
    monkeypatch.setattr(type(renderer), "question", lambda self, c: made.append(c))
    heldout.questions((chat(i, ("user", "q"), ("assistant", "a")) for i in range(10_000)), renderer, 2, rows=10_000, longest=100)
    assert len(made) == 10_000, "none ends in an answer here, so each is tried"
    made.clear()
    question = heldout.Asked(0, (1,), "q", "a")
    monkeypatch.setattr(type(renderer), "question", lambda self, c: made.append(c) or question)
    heldout.questions((chat(i, ("user", "q"), ("assistant", "a")) for i in range(10_000)), renderer, 2, rows=10_000, longest=100)
    assert len(made) == 2


def test_answers_come_in_the_order_of_the_prompts(tiny, renderer):
    """Each as when it is asked alone, also when the device holds only one at a time."""
    model = models.load(tiny.model)
    asked = heldout.questions(
        [chat(i, ("user", "what " * (i % 5) + str(i)), ("assistant", "a")) for i in range(7)], renderer, 7, rows=7, longest=200
    )
    together = heldout.answers(model, asked, renderer, tokens=8)
    assert together == [heldout.answers(model, [a], renderer, tokens=8)[0] for a in asked] and len(set(together)) > 1
    plain = model.new_cache

    def new_cache(batch, capacity):
        if batch > 1:
            raise torch.OutOfMemoryError("made by a test")
        return plain(batch, capacity)

    model.new_cache = new_cache
    assert heldout.answers(model, asked, renderer, tokens=8) == together
    assert heldout.answers(model, [], renderer, tokens=8) == []


def test_a_loss_that_is_not_finite_is_not_hidden(model):
    found = heldout.Losses(np.array([1.0, math.nan]), np.array([2, 3]))
    assert math.isnan(found.mean)
