"""evaluate/checks.py: each kind of check holds and fails where it should; what cannot be read is said."""

import json
from importlib.resources import files

import pytest

from tunesmith.evaluate import checks, style
from tunesmith.evaluate.metrics import chosen, find

GOLDS = ["a text that is long enough to be no label and no short answer"] * 2


@pytest.mark.parametrize(
    ("check", "holds", "fails"),
    [
        ("basil", "Water the Basil.", "basilica"),
        ("C++", "I write C++ daily", "C is older"),
        (["tap", "knock"], "then knock softly", "then push"),
        ({"all": ["sill", "herbs"]}, "herbs on a sill", "herbs in a pot"),
        ({"any": ["sill", "herbs"]}, "herbs in a pot", "a pot"),
        ({"none": ["sorry", "cannot"]}, "Here it is.", "Sorry, no."),
        ({"regex": r"\bNo\b"}, "No, never", "Nothing"),
        ({"not_regex": "[!?]"}, "Calm.", "Loud!"),
        ({"number": 14}, "for 14 hours", "for 140 hours"),
        ({"number": 1200}, "it costs 1,200 euros", "it costs 1,20"),
        ({"number": 2.5}, "2.50 metres", "2 metres"),
    ],
)
def test_each_kind(check, holds, fails):
    [held] = checks.compiled([check])
    assert held(holds) and not held(fails)


@pytest.mark.parametrize(
    "wrong", [["ok", 3], [""], [[]], [{"all": "word"}], [{"regex": "("}], [{"number": "many"}], [{"sum": 3}], "text", [{}], [True]]
)
def test_what_is_no_check(wrong):
    with pytest.raises(checks.CheckError):
        checks.compiled(wrong)


def test_facts_of_the_demo_are_checks_and_hold_where_its_own_rule_holds():
    rows = [json.loads(line) for line in (files("tunesmith") / "assets/demo/held_out.jsonl").read_text("utf-8").splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    some = [row for row in rows if row["facts"]]
    assert len(some) == 81
    for row in some:
        for answer in (row["messages"][-1]["content"], *answers[:40]):
            assert all(held(answer) for held in checks.of_row(row, "facts")) == style.holds(row["facts"], answer)
    [metric] = chosen(["expect:facts"], answers, rows)
    scored = metric.of(answers, answers, rows)
    assert scored.whole == 1 and len(scored.counted) == 81  # the written answers hold their own facts


def test_named_checks_are_a_metric_each_and_rows_without_are_not_counted():
    rows = [{"expect": {"fact": ["sill"], "tone": [{"none": ["!"]}]}}, {"expect": {"fact": ["pot"]}}, {}]
    assert [m.name for m in find(GOLDS + GOLDS[:1], rows)][:2] == ["expect.fact", "expect.tone"]
    fact, tone = chosen(["expect"], [*GOLDS, GOLDS[0]], rows)
    answers = ["a sill", "a sill", "whatever"]
    assert list(fact.of(answers, answers, rows).counted) == [1, 0]
    assert list(tone.of(answers, answers, rows).counted) == [1]


def test_a_pattern_for_some_rows_alone():
    rows = [{"topic": "off"}, {"topic": "off"}, {"topic": "on"}, {"topic": "on"}, {}]
    [metric] = chosen(["when:topic=off:not here"], GOLDS * 2 + GOLDS[:1], rows)
    scored = metric.of(["not here", "yes", "not here", "yes", "not here"], [""] * 5, rows)
    assert list(scored.counted) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "rows", "what", "fix"),
    [
        ("expect:facts", [{"topic": "on"}], "no held-out row carries checks under 'facts'", "the rows carry topic"),
        ("expect:facts", [{}], "no held-out row carries checks", "nothing beside their messages"),
        ("expect:facts", [{"facts": [[]]}], "held-out row 1: facts: [] is no check", "correct the rows"),
        ("when:topic=of:x", [{"topic": "off"}], "no held-out row is such a one", "topic = off"),
        ("when:topic:x", [{"topic": "off"}], "needs a key, its value and a pattern", "when:KEY=VALUE:PATTERN"),
        ("when:topic=off:(", [{"topic": "off"}], "no regular expression", "correct"),
        ("when:", [{}], "needs what to look for", "when:KEY=VALUE:PATTERN"),
    ],
)
def test_what_does_not_fit_is_said_with_the_fix(name, rows, what, fix):
    from tunesmith.errors import ConfigError

    with pytest.raises(ConfigError) as told:
        chosen([name], GOLDS[:1], rows)
    assert what in told.value.what and fix in told.value.fix
