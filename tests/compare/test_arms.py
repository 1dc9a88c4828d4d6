"""compare/arms.py: what each way's prompt holds, which rows serve as examples, what is taken off an answer."""

import pytest

from tunesmith.compare import arms
from tunesmith.compare.arms import ARMS, Nearest, Passage, Shot, compose, question_of
from tunesmith.errors import ConfigError
from tunesmith.retrieve.cite import INSTRUCTION
from tunesmith.types import Conversation, Message, Origin

HERE = Origin("rows.jsonl", 1)


def chat(*said, kind="chat"):
    """Roles by their first letter: `u:hello`."""
    roles = {"u": "user", "a": "assistant", "s": "system", "p": "prompt", "c": "completion", "t": "tool"}
    return Conversation(tuple(Message(roles[s[0]], s[2:]) for s in said), HERE, kind)


def said(prompt):
    return [(m.role[0], m.content) for m in prompt.messages]


SHOTS = [Shot("near", "N", "r:1"), Shot("far", "F", "r:2")]
TEXTS = [Passage("1", "../folder/a.txt", "alpha "), Passage("2", "b.txt", "beta")]


def test_each_way_has_its_own_and_no_other():
    q = question_of(0, chat("s:own", "u:one", "a:1", "u:two", "a:2"))
    assert q.gold == "2" and q.shown == "two"

    def of(name):
        return said(compose(ARMS[name], q, system="given", shots=SHOTS, passages=TEXTS))

    plain = [("s", "own"), ("u", "one"), ("a", "1"), ("u", "two")]
    assert of("base") == of("tuned") == of("endpoint") == plain
    assert of("system") == [("s", "given"), *plain[1:]]
    assert of("few-shot") == [("s", "own"), ("u", "far"), ("a", "F"), ("u", "near"), ("a", "N"), *plain[1:]]
    *before, (_, last) = of("retrieval")
    assert before == plain[:-1] and of("tuned+retrieval") == of("retrieval")
    assert last == f"{INSTRUCTION}\n\n[1] a.txt\nalpha\n\n[2] b.txt\nbeta\n\ntwo"


def test_a_completion_is_one_text():
    q = question_of(0, chat("p:2+2=", "c:4", kind="completion"))
    prompt = compose(ARMS["few-shot"], q, shots=SHOTS)
    assert prompt.raw and said(prompt) == [("p", "farF\n\nnearN\n\n2+2=")]
    assert said(compose(ARMS["system"], q, system="Add.")) == [("p", "Add.\n\n2+2=")]
    assert prompt.as_dicts()[0]["role"] == "user"


def test_rows_that_ask_nothing():
    assert question_of(0, chat("u:hello")) is None
    assert question_of(0, chat("u:hello", "a:there", "u:you?")) is None
    assert question_of(0, chat("u:hello", "a:  ")) is None
    assert question_of(0, Conversation((Message("text", "a"), Message("text", "b")), HERE, "text")) is None


def test_no_example_asks_what_a_held_out_row_asks():
    held = [question_of(0, chat("u:What is  it?", "a:x"))]
    rows = [chat("u:what is it", "a:leak"), chat("u:other", "a:1"), chat("u:Other!", "a:again"), chat("u:third", "a:3")]
    rows += [chat("p:completion", "c:x", kind="completion")]
    assert [s.answer for s in arms.pool(rows, held, completion=False)] == ["1", "3"]
    assert [s.answer for s in arms.pool(rows, held, completion=True)] == ["x"]


def test_the_nearest_by_words_come_first_and_always_the_same():
    shots = [Shot(text, str(i), "") for i, text in enumerate(["the red fox", "a blue whale", "red whale", "nothing alike"])]
    index = Nearest(shots)
    assert index.nearest("Whale, red!", 1)[0].answer == "2"
    assert [s.answer for s in index.nearest("unknown words", 2)] == ["0", "1"]  # the rows' order
    assert len(index.nearest("red", 10)) == 4


def test_bm25_is_the_formula():
    """By hand: 2 texts of 1 and 3 words, `b` in both, `c` in one."""
    shots = [Shot("b", "0", ""), Shot("b b c", "1", "")]
    assert Nearest(shots).nearest("c", 1)[0].answer == "1"
    # Of `b`: 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 1/2)) = 1.257, and 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3/2)) = 1.205.
    assert [s.answer for s in Nearest(shots).nearest("b", 2)] == ["0", "1"]


def test_what_does_not_fit_goes_the_least_near_first():
    q = question_of(0, chat("u:q", "a:x"))
    arm = ARMS["few-shot"]
    whole = compose(arm, q, shots=SHOTS)
    made = arms.fitted(whole, lambda s, p: compose(arm, q, shots=s, passages=p), lambda prompt: len(prompt.messages) <= 3)
    assert said(made) == [("u", "near"), ("a", "N"), ("u", "q")] and made.shots == (SHOTS[0],)


def test_citations():
    assert arms.uncited("It is so [1]. And so [2, 3]. So [1; 3].", 3) == "It is so. And so. So."
    assert arms.uncited("a list [7] stays", 3) == "a list [7] stays"
    assert arms.uncited("no passages [1]", 0) == "no passages [1]"


def test_unknown_arms_all_at_once():
    with pytest.raises(ConfigError) as e:
        arms.named(["base", "tuend", "rag"])
    assert "tuend: there is no such arm" in e.value.what and "rag" in e.value.what
    assert "did you mean 'tuned'?" in e.value.fix


def test_rows_are_spread_over_all():
    assert arms.spread(10, 3) == [0, 3, 6] and arms.spread(3, 9) == [0, 1, 2]
