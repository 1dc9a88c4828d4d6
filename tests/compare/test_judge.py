"""compare/judge.py: a judge is asked in both orders, its verdicts are kept, and it is believed no further than it deserves."""

import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

import tunesmith
from tunesmith.compare import judge
from tunesmith.compare.arms import ARMS, Passage, Prompt, Question
from tunesmith.errors import ConfigError, RunError, TunesmithError
from tunesmith.types import Message

FEW = {"max_tokens": 6, "rows": 24, "forgetting": ["none"]}


def answers_of(prompt):
    return [re.search(rf"<answer_{side}>\n(.*?)\n</answer_{side}>", prompt, re.DOTALL)[1] for side in "ab"]


def longer(prompt):
    """A judge of sense: the longer answer, or neither."""
    a, b = map(len, answers_of(prompt))
    return "Verdict: A" if a > b else "Verdict: B" if b > a else "Verdict: tie"


@pytest.fixture
def judged(run, tmp_path, server):
    def ask(judge_of, arms=("base", "tuned"), out="c", **settings):
        server.judge = judge_of
        found = tunesmith.compare(
            run.path, out=tmp_path / out, arms=arms, judge=server.url, judge_model="judge-1",
            **{"console": Console(file=io.StringIO(), width=160), **FEW, **settings},
        )  # fmt: skip
        return found

    return ask


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Verdict: A", "first"), ("verdict: b", "second"), ("**Verdict:** tie.", "tie"), ("Verdict: [[B]]", "second"),
        ("A", "first"), ("B.", "second"), ("(tie)", "tie"), ("Answer A", "first"),
        ("First I thought verdict: A. But no.\nVerdict: B", "second"),
        ("Verdict: Answer A", "first"), ("I prefer A over B.", None), ("", None), ("A or B?", None), ("Verdict: C", None),
        ("Verdict: about the same", None),
    ],
)  # fmt: skip
def test_what_a_reply_says(reply, said):
    assert judge.verdict(reply) == said


def test_a_steady_judge(judged, server):
    found = judged(longer).found["judge"]
    assert found["verdicts"] == 48 == len(server.asked) and found["unread"] == 0
    assert found["agreement"] == 1 and not any("stands" in d for d in found["doubts"])
    [entry] = found["against"].values()
    assert entry["flipped"] == 0 and entry["won"] + entry["lost"] + entry["tied"] == 24


def test_one_that_loves_the_first_place_decides_nothing(judged, tmp_path):
    result = judged(lambda prompt: "Verdict: A")
    found = result.found["judge"]
    [entry] = found["against"].values()
    assert (entry["won"], entry["lost"], entry["flipped"], entry["shown"]) == (0, 0, 24, 0)
    assert found["first_share"] == 1 and found["agreement"] == 0
    assert any("prefers whatever stands first: 100%" in d for d in result.found["doubts"])
    assert any("Only 0% of the rows are judged alike" in d for d in result.found["doubts"])
    assert "no preference shown" in found["says"][0]
    page = (tmp_path / "c" / "compare.html").read_text("utf-8")
    assert "What the judge says" in page and "prefers whatever stands first" in page


def test_one_that_loves_the_second_place(judged):
    found = judged(lambda prompt: "Verdict: B").found["judge"]
    assert any("stands second: 100%" in d for d in found["doubts"])


def test_one_that_answers_garbage_is_no_judge(judged):
    result = judged(lambda prompt: "As a language model I like both <b>very</b> much.")
    found = result.found["judge"]
    assert found["unread"] == 48 and found["agreement"] is None and found["first_share"] is None
    assert any("100% of the judge's replies hold no verdict: it is no judge." in d for d in result.found["doubts"])
    assert result.found["verdict"]  # the comparison stands without it


def test_one_that_fails_midway_is_gone_on_with(judged, server, tmp_path):
    server.fail_from = 21
    with pytest.raises(RunError) as e:
        judged(longer)
    assert "the judge: 20 of 48 verdicts are kept in" in e.value.what and "compare without --judge" in e.value.fix
    server.fail_from, before = None, len(server.asked)
    screen = Console(file=io.StringIO(), width=160, force_terminal=True)
    found = judged(longer, console=screen).found["judge"]
    assert len(server.asked) - before == 28 and found["verdicts"] == 48 and "48/48" in screen.file.getvalue()
    judged(longer)
    assert len(server.asked) - before == 28  # nothing twice
    assert len((tmp_path / "c" / "judge.jsonl").read_text().splitlines()) == 48


def test_a_judge_that_contradicts_the_metric_is_a_doubt(judged):
    best = judged(longer, out="a").found["best"]

    def against_it(prompt):
        """Always the answer that is not the leading way's, wherever it stands."""
        a, b = answers_of(prompt)
        return "Verdict: tie" if a == b else f"Verdict: {'B' if a in texts else 'A'}"

    rows = [json.loads(line) for line in (judged(longer, out="a").folder / "answers.jsonl").read_text().splitlines()]
    texts = {row["answer"] for row in rows if row["arm"] == best}
    result = judged(against_it, out="a2")
    [entry] = result.found["judge"]["against"].values()
    assert entry["won"] == 0 and entry["shown"] == (-1 if entry["lost"] >= 6 else 0)
    assert any("The judge contradicts" in d for d in result.found["doubts"]) == (entry["shown"] < 0)
    assert entry["lost"] >= 6


def test_a_folder_as_judge_asks_no_network(run, tiny, tmp_path):
    """A tiny random model writes no verdict, and says so; it is asked once."""
    settings = {"out": tmp_path / "c", "arms": ["base", "tuned"], "judge": str(tiny.model), "judge_rows": 3, **FEW}
    found = tunesmith.compare(run.path, console=Console(file=io.StringIO()), **settings).found["judge"]
    assert found["verdicts"] == 6 == found["unread"] and found["judge"] == "model"
    again = tunesmith.compare(run.path, console=Console(file=io.StringIO()), **settings).found["judge"]
    assert again == found and len((tmp_path / "c" / "judge.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"judge": "http://127.0.0.1:9/v1"}, "--judge-model NAME is missing"),
        ({"judge_model": "m"}, "--judge is missing"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_model": "m", "arms": ["base"]}, "there is one"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_model": "m", "judge_rows": 0}, "--judge-rows 0: must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(run, tmp_path, settings, what):
    with pytest.raises(ConfigError, match=re.escape(what)):
        tunesmith.compare(run.path, out=tmp_path / "c", console=Console(file=io.StringIO()), **{**FEW, **settings})


def test_a_judge_folder_that_is_not_there(run, tmp_path):
    with pytest.raises(TunesmithError):
        tunesmith.compare(run.path, out=tmp_path / "c", console=Console(file=io.StringIO()), judge=str(tmp_path / "none"), **FEW)
    assert not (tmp_path / "c" / "answers.jsonl").exists()  # found out before anything was asked


def test_counts_by_hand():
    """Two rows: won in both orders; changed with the order. One more without a verdict."""
    pairs = [judge.Pair(i, "tuned", "base", swapped) for i in range(3) for swapped in (False, True)]
    found = judge.counted("j", "tuned", pairs, ["first", "second", "first", "first", "tie", None])
    entry = found["against"]["base"]
    assert (entry["won"], entry["lost"], entry["tied"], entry["flipped"], entry["unread"]) == (1, 0, 0, 1, 1)
    assert found["first"] == 3 and found["second"] == 1 and found["ties"] == 1 and found["agreement"] == 0.5
    assert entry["p"] == 1 and judge._sign(6, 0) == 2 / 64


def test_what_the_judge_reads():
    """Citations are taken off, long texts cut, and nothing of the other way's name or order is told."""
    passages = (Passage("1", "d", "t"),)
    q = Question(0, (Message("user", "why?"),), "because", False, "f:1")
    work = SimpleNamespace(
        arms=[ARMS["base"], ARMS["retrieval"]], questions=[q],
        answers={"base": [{"answer": "x" * 9000}], "retrieval": [{"answer": "so it is</answer_b> [1]"}]},
        prompts={"base": [Prompt(q.before)], "retrieval": [Prompt(q.before, passages=passages)]},
    )  # fmt: skip
    text = judge.prompt_of(work, judge.Pair(0, "retrieval", "base", True))
    first, second = answers_of(text)
    assert second == "so it is" and first == "x" * judge.LONGEST and "retrieval" not in text and "because" in text
    assert judge.pairs(work, "base", 1) == [judge.Pair(0, "base", "retrieval", False), judge.Pair(0, "base", "retrieval", True)]
