"""House style as rules: what is broken, redirected and held, counted over rows of each topic."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from tunesmith.evaluate.style import Share, Style, holds, score

DEMO = Path(str(files("tunesmith") / "assets" / "demo"))


@pytest.fixture(scope="module")
def style():
    return Style.load(DEMO / "style.json")


def test_the_datas_own_answers_score_full_marks(style):
    rows = [json.loads(line) for line in (DEMO / "held_out.jsonl").read_text("utf-8").splitlines()]
    scores = score(style, rows, [row["messages"][-1]["content"] for row in rows])
    on, off = (sum(row["topic"] == topic for row in rows) for topic in ("on", "off"))
    assert scores.style == Share(len(rows), len(rows)) and scores.redirected == Share(off, off)
    assert scores.turned_away == Share(0, len(rows) - off) and scores.facts == Share(on, on)


def test_each_fault_counts_where_it_belongs(style):
    rows = [
        {"topic": "off", "facts": []},
        {"topic": "on", "facts": [["7 days", "a week"], ["tank"]]},
        {"topic": "on", "facts": [["mint"]]},
        {"topic": "chitchat", "facts": []},
    ]
    answers = [
        "Alas, dear grower, a cold is outside my garden. Please see a doctor or a nurse.\nGrow well. Wick",
        "Gladly, dear grower. Fill the Tank every 7 days, and look at it often.\nGrow well. Wick",
        "Alas, dear grower, that question is outside my garden, ask a peppermint friend.\nGrow well. Wick",
        "Hello!",
    ]
    scores = score(style, rows, answers)
    assert (scores.style, scores.redirected) == (Share(3, 4), Share(1, 1))
    assert (scores.turned_away, scores.facts) == (Share(1, 3), Share(1, 2))
    assert {"opening", "sign_off", "calm"} <= set(style.broken(answers[3]))


def test_facts_are_whole_words():
    assert (
        holds([["7 days"]], "Every 7 days.") and not holds([["7 days"]], "Every 17 days.") and not holds([["mint"]], "peppermint")
    )
    assert holds([], "") and str(Share(19, 20)) == "95 %" and str(Share(0, 0)) == "-"
