"""serve/engine.py: what joins, leaves, waits and comes back gets the answer it gets alone; adapters share steps; nothing leaks."""

import random
import threading
import time

import pytest
import torch
from tests.models.test_paged import decoder
from tests.serve.conftest import write_adapter

from tunesmith import adapters, models
from tunesmith.errors import AdapterError, ConfigError, DataError, DoesNotFit, ModelError
from tunesmith.generate import generate
from tunesmith.models.paged import bytes_per_block
from tunesmith.serve.engine import Engine, _Step
from tunesmith.serve.job import Busy, Missing


def prompts(count, seed=0, longest=90):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def ids(record):
    return [token.id for token in record.tokens]


def alone(model, prompt, n=20, stop=()):
    return generate(model, [prompt], stop_ids=stop, max_tokens=n)[0]


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_answers_of_requests_that_come_and_go_are_those_of_generate(answers, place, ahead):
    """40 ragged prompts, arriving at random moments, 8 at once: the tokens of each alone."""
    engine, model = answers.engine(ahead=ahead), models.load(place.model)
    rng, records = random.Random(1), []
    waiting = [(p, rng.randrange(1, 30)) for p in prompts(40)]
    wanted = [alone(model, p, n) for p, n in waiting]
    while waiting or engine.state()["running"] or engine.state()["waiting"]:
        for _ in range(rng.randrange(3)):
            if waiting:
                prompt, n = waiting.pop(0)
                records.append(answers.ask(engine, prompt, max_tokens=n))
        engine.step()
    answers.run(engine)
    assert [ids(r) for r in records] == wanted and {r.reason for r in records} == {"length"}


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_without_room_the_youngest_wait_and_come_back_the_same(answers, place, ahead):
    """A cache of 20 blocks for 12 sequences of up to 7: they are put back, and their tokens do not change, drawn ones included."""
    model = models.load(place.model)
    block = 2 * 2 * 2 * 8 * 16 * 4
    engine = answers.engine(cache=21 * block, ahead=ahead)
    wide = answers.engine(ahead=ahead)
    asked = prompts(12, seed=3, longest=50)
    settings = [{"temperature": 1.0 * (i % 2), "seed": i, "max_tokens": 60} for i in range(12)]
    found = [answers.ask(engine, p, **s) for p, s in zip(asked, settings, strict=True)]
    free = [answers.ask(wide, p, **s) for p, s in zip(asked, settings, strict=True)]
    answers.run(engine)
    answers.run(wide)
    assert engine.preempted > 3 and wide.preempted == 0
    assert [ids(r) for r in found] == [ids(r) for r in free]
    assert [ids(r) for r in found[::2]] == [alone(model, p, 60) for p in asked[::2]]


def test_a_long_prompt_does_not_hold_up_those_who_write(answers):
    engine = answers.engine(piece=4)
    first = answers.ask(engine, "hello", max_tokens=60)
    engine.step()
    late = answers.ask(engine, "x" * 120, max_tokens=2)
    steps = 0
    while late.reason is None:
        made = first.made
        engine.step()
        steps += 1
        assert first.made == made + 1, "a step without a token for the one who writes"
    assert steps >= 30


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_each_row_takes_its_own_adapter(answers, place, ahead):
    """Requests for the base and three adapters in the same steps: each answers as a model with its adapter alone."""
    names = ["", "plain", "wide", "some"]
    wanted = {}
    for name in names:
        model = models.load(place.model)
        if name:
            adapters.load(model, place.adapters[name])
        wanted[name] = [alone(model.eval(), p) for p in prompts(4, seed=9)]
    assert len({str(w) for w in wanted.values()}) == 4, "the adapters do not differ"
    engine = answers.engine(batch=16, ahead=ahead)
    for name in names[1:]:
        engine.load(name, place.adapters[name])
    assert engine.lean is not None
    found = {(name, i): answers.ask(engine, p, model=name) for i, p in enumerate(prompts(4, seed=9)) for name in names}
    answers.run(engine)
    for (name, i), record in found.items():
        assert ids(record) == wanted[name][i], (name, i)


@pytest.mark.parametrize("name", ["dora", "whole", "tokens"])
def test_adapters_that_are_more_than_low_rank_run_for_their_rows_alone(answers, place, name):
    model = models.load(place.model)
    base = [alone(model, p) for p in prompts(4, seed=9)]
    adapters.load(model, place.adapters[name])
    wanted = [alone(model.eval(), p) for p in prompts(4, seed=9)]
    engine = answers.engine()
    engine.load(name, place.adapters[name])
    engine.load("plain", place.adapters["plain"])
    assert engine.lean is None and "more than a low-rank" in engine.notes[0]
    found = [answers.ask(engine, p, model=m) for p in prompts(4, seed=9) for m in ("base", name, "plain")]
    answers.run(engine)
    assert [ids(r) for r in found[::3]] == base and [ids(r) for r in found[1::3]] == wanted
    engine.drop(name)
    assert engine.lean is not None and not engine.notes


def test_adapters_come_and_go_while_others_answer(answers, place):
    engine = answers.engine()
    model = models.load(place.model)
    steady = answers.ask(engine, "steady", max_tokens=60)
    for turn in range(3):
        engine.step()
        engine.load("plain", place.adapters["plain"])
        with pytest.raises(AdapterError, match="already"):
            engine.load("plain", place.adapters["plain"])
        record = answers.ask(engine, "hello", model="plain", max_tokens=40)
        for _ in range(4):
            engine.step()
        engine.drop("plain")
        assert record.reason == "cancelled" and record.made >= 2, turn
        with pytest.raises(Missing, match="no adapter"):
            answers.ask(engine, "hello", model="plain")
    answers.run(engine)
    assert ids(steady) == alone(model, list(b"steady"), 60)
    assert not [m for m in engine.model.modules() if type(m).__name__ in ("Several", "Lora")]


def test_a_request_for_an_adapter_that_is_dropped_meanwhile_is_not_answered_by_the_base(answers, place):
    engine = answers.engine()
    engine.load("plain", place.adapters["plain"])
    record = answers.ask(engine, "hello", model="plain")  # still on its way to the engine's thread
    engine.drop("plain")
    answers.run(engine)
    assert record.reason == "cancelled" and not record.text


def test_an_adapter_that_does_not_fit_changes_nothing(answers, place, tiny, tmp_path):
    other = write_adapter(tmp_path / "other", tiny.checkpoint(tmp_path / "big", hidden_size=48, seed=2), 1)
    engine, model = answers.engine(), models.load(place.model)
    engine.load("plain", place.adapters["plain"])
    for folder, what in ((other, "wrong shape"), (tmp_path / "none", "adapter_config"), (place.model, "adapter_config")):
        with pytest.raises(AdapterError, match=what):
            engine.load("bad", folder)
    found = [answers.ask(engine, "hello", model=m) for m in ("", "plain")]
    answers.run(engine)
    assert ids(found[0]) == alone(model, list(b"hello"))
    adapters.load(model, place.adapters["plain"])
    assert ids(found[1]) == alone(model, list(b"hello"))


def test_draws_are_of_the_seed_and_of_nothing_else(answers, place):
    """The same seed with other neighbours, in another order, on another engine; another seed, another answer."""
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    first, second = answers.engine(), answers.engine(piece=8, ahead=True)
    a = [answers.ask(first, "hello", seed=s, **settings) for s in range(6)]
    answers.run(first)
    for p in prompts(5, seed=8):
        answers.ask(second, p, temperature=0.7)
    b = [answers.ask(second, "hello", seed=s, **settings) for s in reversed(range(6))]
    answers.run(second)
    assert [ids(r) for r in a] == [ids(r) for r in reversed(b)] and len({str(ids(r)) for r in a}) == 6
    n = [answers.ask(first, "hello", seed=0, index=i, **settings) for i in range(3)]
    answers.run(first)
    assert ids(n[0]) == ids(a[0]) and len({str(ids(r)) for r in n}) == 3


def test_a_stop_ends_the_text_before_it_and_is_never_shown(answers, place):
    model = models.load(place.model)
    whole = answers.words.decode(alone(model, list(b"hello"), 40))
    for stop in (whole[6:9], whole[11:12], whole[4:9]):
        engine = answers.engine(ahead=stop == whole[4:9])
        record = answers.ask(engine, "hello", max_tokens=40, stop=("never here", stop))
        seen = []
        while record.reason is None:
            engine.step()
            seen.append(record.text)
        assert record.text == whole[: whole.index(stop)] and record.reason == "stop"
        assert all(record.text.startswith(text) for text in seen)
        answers.run(engine)


def test_a_stop_token_ends_it_and_is_no_text(answers, place):
    model = models.load(place.model)
    made = alone(model, list(b"hello"), 20)
    engine = answers.engine()
    record = answers.ask(engine, "hello", stop_ids=frozenset({made[5]}))
    answers.run(engine)
    first = made.index(made[5])
    assert record.reason == "stop" and ids(record) == made[:first] and record.text == answers.words.decode(made[:first])


def test_logprobs_are_the_models(answers, place):
    model = models.load(place.model)
    engine = answers.engine()
    record = answers.ask(engine, "hello", logprobs=5, max_tokens=8, temperature=0.8, seed=3)
    plain = answers.ask(engine, "other", logprobs=None, max_tokens=8)
    answers.run(engine)
    stream = list(b"hello") + ids(record)
    with torch.no_grad():
        wanted = model(torch.tensor(stream)).log_softmax(-1)
    for t, token in enumerate(record.tokens, len(b"hello") - 1):
        assert abs(token.logprob - wanted[t, token.id]) < 1e-4 and token.text == answers.words.decode([token.id])
        best = wanted[t].topk(5)
        assert [o.id for o in token.top] == best.indices.tolist()
        assert max(abs(o.logprob - p) for o, p in zip(token.top, best.values.tolist(), strict=True)) < 1e-4
    assert not plain.tokens and plain.made == 8


def test_a_bias_forbids_and_forces(answers):
    engine = answers.engine()
    forced = answers.ask(engine, "hello", bias={answers.words.token_to_id("A"): 100.0}, max_tokens=4)
    usual = answers.ask(engine, "hello", max_tokens=4)
    answers.run(engine)
    other = answers.ask(engine, "hello", bias={ids(usual)[0]: -100.0}, max_tokens=1)
    answers.run(engine)
    assert forced.text == "AAAA" and ids(other)[0] != ids(usual)[0]


@pytest.mark.parametrize("state", ["waiting", "in its prompt", "writing"])
def test_who_leaves_frees_its_blocks_at_once(answers, state):
    engine = answers.engine(batch=1 if state == "waiting" else 8, ahead=state == "writing")
    other = answers.ask(engine, "stays", max_tokens=50)
    engine.step()
    record = answers.ask(engine, "x" * 100, max_tokens=100)
    for _ in range({"waiting": 3, "in its prompt": 1, "writing": 12}[state]):
        engine.step()
    before = engine.state()["free_blocks"]
    record.handle.cancel()
    record.handle.cancel()
    engine.step()
    assert record.reason == "cancelled" and (state == "waiting" or engine.state()["free_blocks"] > before)
    assert engine.state()["running"] == 1
    answers.run(engine)
    assert other.reason == "length"
    record.handle.cancel()  # long gone


def test_beyond_the_queue_is_busy_and_all_or_none(answers):
    engine = answers.engine(batch=2, queue=3)
    records = [answers.ask(engine, "hello", max_tokens=3) for _ in range(4)]
    with pytest.raises(Busy, match="4 requests are running or waiting") as caught:
        engine.submit(records[0].job, records[1].job)
    assert caught.value.after >= 1
    records.append(answers.ask(engine, "hello", max_tokens=3))
    with pytest.raises(Busy):
        answers.ask(engine, "hello")
    answers.run(engine)
    assert {r.reason for r in records} == {"length"}
    answers.ask(engine, "hello")
    answers.run(engine)


def test_what_cannot_be_answered_is_refused_before_it_waits(answers, place):
    engine = answers.engine()
    for prompt, what in (([], "no token"), ("x" * 256, "256 tokens, and the model's context holds 256")):
        with pytest.raises(DataError, match=what):
            answers.ask(engine, prompt)
    record = answers.ask(engine, "x" * 250, max_tokens=None)
    answers.run(engine)
    assert record.made == 6 and record.reason == "length"
    model = decoder("llama")  # its context holds 512
    with pytest.raises(DataError, match="300 tokens, and the cache holds 256"):
        answers.ask(answers.engine(model, cache=17 * bytes_per_block(model.spec, torch.float32)), "x" * 300)
    with pytest.raises(DoesNotFit, match="too little for 256 tokens"):
        answers.engine(cache=1 << 14)
    with pytest.raises(ConfigError, match="sequences at once"):
        answers.engine(batch=0)


def test_ids_that_the_model_does_not_have_are_refused_and_harm_nobody(answers, place):
    """Such an id in logit_bias or in a prompt raised on the engine's thread, which ended every answer."""
    engine, vocab = answers.engine(), models.load(place.model).vocab
    other = answers.ask(engine, "hello", max_tokens=8)
    for change in ({"bias": {vocab: 5.0}}, {"bias": {999_999_999: -1.0, 1: 1.0}}):
        with pytest.raises(DataError, match="logit_bias has a token id"):
            answers.ask(engine, "hello", **change)
    for ids_ in ([1, vocab], [-1, 2]):
        with pytest.raises(DataError, match="the prompt has a token id"):
            answers.ask(engine, ids_)
    last = answers.ask(engine, "hello", bias={vocab - 1: 1.0, 0: -1.0}, max_tokens=3)
    answers.run(engine)
    assert other.reason == last.reason == "length"


class Failing:
    """A grammar that fails as a library does: with an error that is none of ours."""

    done = False

    def __init__(self, where):
        self.where = where

    def allowed(self):
        if self.where == "allowed":
            raise ValueError("a mask that cannot be")

    def take(self, token):
        if self.where == "take":
            raise RuntimeError("a token that cannot be")


@pytest.mark.parametrize("where", ["allowed", "take", "text"])
def test_an_answer_that_fails_fails_alone(answers, place, capsys, where):
    engine = answers.engine(ahead=True)
    other = answers.ask(engine, "hello", max_tokens=12)
    if where == "text":

        class Words:
            decode = staticmethod(lambda ids, skip_special=False: "")
            stream = staticmethod(lambda skip_special=True: None)  # nothing that could be pushed to

        bad = answers.ask(engine, "world", words=Words, logprobs=None)
    else:
        bad = answers.ask(engine, "world", grammar=lambda: Failing(where))
    answers.run(engine)
    assert bad.reason == "error" and "Error" in str(bad.error) and "cannot be" not in str(bad.error)
    assert ids(other) == alone(models.load(place.model), list(b"hello"), 12) and "Error" in capsys.readouterr().err


def test_a_request_that_comes_as_the_thread_ends_is_not_forgotten(answers):
    """It passed the door, and the thread looked into its inbox for the last time before it lay there: nobody answered."""
    engine = answers.engine().start()
    made, sequence = threading.Event(), engine._sequence

    def slow(job):
        answer = sequence(job)
        engine.close()
        made.set()
        return answer

    engine._sequence = slow
    with pytest.raises(ModelError, match="has stopped"):
        answers.ask(engine, "hello")
    assert made.is_set()
    with pytest.raises(ModelError, match="has stopped"):
        engine.call(print, timeout=5)


def test_pieces_of_prompts_take_what_pace_allows(answers):
    """A step a token of 1 ms: 20 tokens at a pace of 20 ms; a step that compiled something is forgotten with the next."""
    for ahead in (False, True):
        engine = answers.engine(ahead=ahead, piece=200, pace=0.02, batch=2)
        assert engine._piece(1) == 200, "nothing is known yet"
        for seconds in (5.0, 0.1):
            engine._came = time.perf_counter() - seconds
            engine._time(_Step([], None, None, engine._came - 1, 101, 1))
        assert 32 <= engine._piece(1) <= 20 / 0.9 + 32 and engine._rate == pytest.approx(0.1 / 101, rel=0.2)
        before = engine._rate
        engine._time(_Step([], None, None, 0.0, 2, 2))
        assert engine._rate == before, "a step without prompts says nothing"
        engine._rate = 0.0
        answers.ask(engine, "hello", max_tokens=2)
        answers.run(engine)
        assert engine._rate > 0


def test_the_stops_are_looked_for_in_what_is_unsaid_alone(answers):
    """16 stops of 256 characters cost 4,096 comparisons a token of every answer."""

    class Counted(str):
        looked = 0

        def __getitem__(self, key):
            Counted.looked += 1
            return str.__getitem__(self, key)

    engine = answers.engine()
    record = answers.ask(engine, "hello", max_tokens=10, stop=(Counted("~" * 256),) * 16)
    answers.run(engine)
    assert record.made == 10 and Counted.looked < 10 * 16 * 8


def test_a_model_of_nan_fails_its_requests_and_no_other_thing(answers, place):
    model = models.load(place.model)
    engine = answers.engine(model, ahead=True)
    fine = answers.ask(engine, "hello", max_tokens=3)
    answers.run(engine)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    bad = answers.ask(engine, "hello", max_tokens=3)
    answers.run(engine)
    assert fine.reason == "length" and bad.reason == "error" and "nan" in str(bad.error)


def test_a_model_that_outgrows_its_first_context_is_computed_again(answers):
    """longrope: beyond 40 tokens all keys lie under the long table, as without a cache."""
    for ahead in (False, True):
        model = decoder("phi3")
        engine = answers.engine(decoder("phi3"), ahead=ahead)
        asked = [[i % 90 for i in range(n)] for n in (20, 38, 39, 40, 41, 60)]
        found = [answers.ask(engine, p, max_tokens=30) for p in asked]
        answers.run(engine)
        assert [ids(r) for r in found] == [alone(model, p, 30) for p in asked]


def test_the_thread_answers_sleeps_and_ends(answers):
    with answers.engine() as engine:
        records = [answers.ask(engine, f"hello {i}") for i in range(20)]
        end = time.monotonic() + 20
        while not all(r.reason for r in records) and time.monotonic() < end:
            time.sleep(0.01)
        assert {r.reason for r in records} == {"length"}
        steps = engine.steps
        time.sleep(0.1)
        assert engine.steps == steps, "it works without work"
        last = answers.ask(engine, "hello", max_tokens=200)
    assert last.reason in ("cancelled", "length") and not [t for t in threading.enumerate() if t.name == "tunesmith-engine"]
    with pytest.raises(ModelError, match="has stopped"):
        answers.ask(engine, "hello")


def test_a_thread_that_dies_ends_what_waits(answers, capsys):
    engine = answers.engine()
    engine._plan = lambda: 1 / 0
    record = answers.ask(engine, "hello")
    with engine:
        end = time.monotonic() + 10
        while record.reason is None and time.monotonic() < end:
            time.sleep(0.01)
    assert record.reason == "error" and "ZeroDivisionError" in str(record.error)
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ModelError, match="has stopped"):
        answers.ask(engine, "again")


def test_a_model_of_transformers_is_refused_with_the_way_out():
    class Foreign(torch.nn.Module):
        spec = None

    with pytest.raises(ModelError, match="vLLM"):
        Engine(Foreign())
