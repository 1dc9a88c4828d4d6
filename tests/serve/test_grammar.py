"""Schemas made to be slow: they end in words of their own, and hold up nobody else for longer than is said."""

import hashlib
import json
import threading
import time
from types import SimpleNamespace

import pytest

from tunesmith.errors import DataError
from tunesmith.serve import grammar
from tunesmith.serve.grammar import HOLD, Follower, Patience


def objects(count):
    """An object of so many optional keys: at its first key each may come."""
    return {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(count)}, "additionalProperties": False}


HOSTILE = {
    "optional": {"type": "array", "minItems": 3, "items": {"anyOf": [objects(150) for _ in range(30)]}},
    "nested": {"type": "array", "items": {"type": "array", "items": {"anyOf": [objects(100) for _ in range(40)]}}},
    "enum": {"enum": [f"value number {i * 7919 % 100_000} of many" for i in range(5000)]},
    "patterns": {"anyOf": [{"type": "string", "pattern": f"^(?:.*{c}.*){{8}}$"} for c in "abcdefghijklmnop"]},
    "classes": {"type": "string", "pattern": "^([ab]{1,20}|[bc]{1,20}|[ac]{1,20}|[a-z ]{1,30}){1,60}$"},
    "counted": {"type": "string", "pattern": "^.*a.{12}$"},
    "deep": json.loads('{"type": "array", "items": ' * 50 + '{"type": "integer"}' + "}" * 50),
}


BLOCK = bytes(1 << 20)


class Slow:
    """A matcher whose every mask takes `seconds` of a processor, without Python's lock, as llguidance's do."""

    over = threading.Event()  # nobody waits for it any more: the next test has the machine to itself

    def __init__(self, seconds):
        self.seconds, self.asked_on = seconds, set()

    def compute_bitmask(self):
        self.asked_on.add(threading.get_ident())
        start = time.thread_time()
        over = Slow.over
        while time.thread_time() - start < self.seconds and not over.is_set():
            hashlib.sha256(BLOCK)
        return b"\xff" * 33

    def consume_token(self, token):
        return True

    def is_error(self):
        return False

    is_stopped = is_accepting = is_error


class Starved(Slow):
    """Its thread works little and waits long for its turn."""

    def compute_bitmask(self):
        time.sleep(self.seconds)
        return b"\xff" * 33


def test_a_mask_is_made_elsewhere_from_the_moment_a_token_is_taken(waits):
    matcher = Slow(0.001)
    follower = Follower(matcher, 260, Patience())
    assert follower.allowed().shape == (260,)
    matcher.asked_on.clear()
    follower.take(7)
    end = time.monotonic() + 10
    while not matcher.asked_on and time.monotonic() < end:
        time.sleep(0.001)
    assert matcher.asked_on and threading.get_ident() not in matcher.asked_on


def test_patience_is_for_a_question_not_for_each_of_its_answers(waits):
    patience = Patience()
    for follower in [Follower(Slow(1.0), 260, patience) for _ in range(8)]:
        with pytest.raises(DataError, match="takes too long"):
            follower.allowed()
    assert sum(waits) < 2 * HOLD, "each had its own"


@pytest.mark.parametrize(("seconds", "most"), [(0.03, 8), (0.002, 40)])
def test_masks_that_are_slow_each_time_end_the_answer_and_cheap_ones_never_do(seconds, most, waits):
    follower, made = Follower(Slow(seconds), 260, Patience()), 0
    try:
        while made < 40:
            follower.allowed()
            follower.take(7)
            made += 1
    except DataError:
        pass
    assert made == most if most == 40 else made < most


def test_a_thread_that_waits_for_its_turn_is_waited_for():
    """0.3 s by the clock for a mask of no work: on a machine that others fill, harmless answers ended."""
    assert Follower(Starved(0.3), 260, Patience()).allowed().all()
    with pytest.raises(DataError, match="takes too long"):
        Follower(Starved(1.5), 260, Patience()).allowed()


@pytest.fixture
def waits(monkeypatch):
    """The processor time of this process during each wait of the engine's thread, which works at nothing then: by the clock a busy
    machine adds its own."""
    Slow.over = threading.Event()
    found, wait = [], Patience.wait

    def counted(self, come):
        start = time.process_time()
        try:
            wait(self, come)
        finally:
            found.append(time.process_time() - start)

    monkeypatch.setattr(Patience, "wait", counted)
    yield found
    Slow.over.set()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_slow_mask_ends_its_own_answer_and_holds_others_up_by_no_more_than_is_said(answers, ahead, waits):
    engine, patience = answers.engine(ahead=ahead), Patience()
    other = answers.ask(engine, "hello", max_tokens=60)
    bad = [answers.ask(engine, "world", grammar=lambda: Follower(Slow(0.8), 260, patience)) for _ in range(4)]
    answers.run(engine)
    assert other.reason == "length" and other.made == 60
    for one in bad:
        assert one.reason == "error" and isinstance(one.error, DataError) and "takes too long" in str(one.error)
    assert sum(waits) < 2 * HOLD, "four answers to one question have one patience"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_holds_others_up_by_no_more_than_is_said(answers, place, name, waits):
    """Each is refused, or followed with an engine that others use; they wait for 0.1 s of processor time at most. Before, a mask
    of `nested` took 0.3 s of it on the engine's thread."""
    pytest.importorskip("llguidance")
    words = place.renderer.tokenizer
    grammars = grammar.Grammars(words, place.renderer.stop_ids)
    try:
        compiled = grammars.compile(HOSTILE[name])
    except DataError as refused:
        assert "cannot be followed" in str(refused)
        return
    engine, patience = answers.engine(), Patience()
    other = answers.ask(engine, "hello", max_tokens=150)
    mine = [
        answers.ask(engine, "world", grammar=lambda: grammars.follow(compiled, patience), temperature=1.0, seed=i, max_tokens=140)
        for i in range(4)
    ]
    answers.run(engine)
    assert other.made == 150 and max(waits) < 2 * HOLD, max(waits)
    for one in mine:
        assert one.reason in ("stop", "length") or isinstance(one.error, DataError), one.error


def test_a_grammar_is_built_once_for_all_answers_to_a_question(place, monkeypatch):
    llguidance = pytest.importorskip("llguidance")
    grammars, made = grammar.Grammars(place.renderer.tokenizer, place.renderer.stop_ids), []
    real = llguidance.LLMatcher

    class Counted(SimpleNamespace):
        def __call__(self, *args, **more):
            made.append(1)
            return real(*args, **more)

    monkeypatch.setattr(grammars, "_library", Counted(LLMatcher=Counted(grammar_from_json_schema=real.grammar_from_json_schema)))
    compiled = grammars.compile({"type": "array", "items": {"type": "integer"}})
    followers = [grammars.follow(compiled) for _ in range(16)]
    for follower in followers:
        follower.take(int(follower.allowed().float().argmax()))
    assert len(made) == 1


def test_a_grammar_of_too_many_symbols_is_refused(place):
    pytest.importorskip("llguidance")
    grammars = grammar.Grammars(place.renderer.tokenizer, place.renderer.stop_ids)
    with pytest.raises(DataError, match="grammar size"):
        grammars.compile({"anyOf": [objects(300) for _ in range(40)]})
