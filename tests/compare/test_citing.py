"""compare/citing.py: which passages are right, where they stand in the ranking, and whether an answer's citations hold."""

from types import SimpleNamespace

import numpy as np
import pytest

from tunesmith.compare import citing
from tunesmith.compare.arms import ARMS, Passage, Prompt, Question
from tunesmith.errors import ConfigError
from tunesmith.evaluate.metrics import METRICS, Scored
from tunesmith.evaluate.statistics import wilson
from tunesmith.types import Message

SILL = Passage("1", "a/manual.md", "Herbs grow on the sill all year.", "1 What it is")
PUMP = Passage("2", "a/manual.md", "The pump runs for 2 minutes.", "4 First start")
OTHER = Passage("3", "b/price list.txt", "A card costs 3 euros.", "")


def test_right_by_name_of_a_document_or_a_section():
    for value in ("manual.md", "manual", "4 First start", ["4 First start"]):
        count, among = citing.gold_of(value)
        assert count == 1 and among(PUMP) == {0} and not among(OTHER)
    count, among = citing.gold_of(["price list", "4 First start"])
    assert count == 2 and [among(p) for p in (SILL, PUMP, OTHER)] == [set(), {1}, {0}]


def test_right_by_checks_that_the_passage_holds():
    count, among = citing.gold_of([["sill", "window"], ["herbs"]])
    assert count == 1 and among(SILL) == {0} and not among(PUMP)


def test_rows_without_have_no_answer_in_the_documents():
    assert all(citing.gold_of(value) is None for value in (None, "", [], {}))


def test_the_key_is_found_or_asked_for():
    rows = [{"section": "1 What it is", "topic": "on"}, {}]
    assert citing.gold_key(rows, "") is None and citing.gold_key(rows, "section") == "section"
    assert citing.gold_key([{"sources": ["x"]}], "") == "sources"
    with pytest.raises(ConfigError, match="no held-out row says anything under 'sektion'") as e:
        citing.gold_key(rows, "sektion")
    assert "section, topic" in e.value.fix
    with pytest.raises(ConfigError, match="held-out row 1: facts: "):
        citing.gold_key([{"facts": [["a"], 3.5]}], "facts")


def test_the_ranking_by_hand():
    """Ranks 2 and 1 of one right source; of two sources ranks 1 and 3: MRR (1/2 + 1 + 1) / 3."""
    golds = [citing.gold_of("4 First start"), citing.gold_of("price list"), citing.gold_of(["manual", "price list"]), None]
    found = citing.ranking(golds, [[SILL, PUMP], [OTHER], [SILL, PUMP, OTHER], [OTHER]], 0)
    assert found["questions"] == 3 and found["mrr"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["hit"]["1"]["value"] == pytest.approx(2 / 3) and found["hit"]["3"]["value"] == 1
    second = 1 / np.log2(3)
    whole = (1 + 1 / np.log2(4)) / (1 + second)
    assert found["ndcg"]["10"] == pytest.approx((second + 1 + whole) / 3)
    assert citing.ranking([None], [[SILL]], 0) is None


def work(answers, fields, gold=""):
    questions = [Question(i, (Message("user", "q"),), "gold", False, f"r:{i}", (), f) for i, f in enumerate(fields)]
    prompt = Prompt(questions[0].before, passages=(SILL, PUMP))
    return SimpleNamespace(
        arms=[ARMS["base"], ARMS["retrieval"]], questions=questions, gold=gold or None, options=SimpleNamespace(seed=0),
        metrics=[METRICS["exact_match"]], ranked=[[SILL, PUMP, OTHER]] * len(fields),
        answers={"retrieval": [{"answer": a} for a in answers]}, prompts={"retrieval": [prompt] * len(fields)},
    )  # fmt: skip


ANSWERS = [
    "Herbs grow on the sill. [1]",  # supported
    "Herbs grow on the sill. [2]",  # the wrong passage
    "The pump runs for 2 minutes [7].",  # there is no passage 7
    "I do not know.",
]


def test_citations_must_exist_and_support():
    found = citing.measured(work(ANSWERS, [{}] * 4), {})
    arm = found["arms"]["retrieval"]
    assert found["gold"] is None and found["ranking"] is None and list(found["arms"]) == ["retrieval"]
    assert arm["cites"]["value"] == 3 / 4 and arm["citations"] == 3 and arm["exist"] == pytest.approx(2 / 3)
    assert arm["precision"]["value"] == pytest.approx(1 / 3) and arm["withheld"]["value"] == 3 / 4
    assert arm["abstained"] is None and [citing.note(row) for row in arm["rows"]] == [
        "1 of 1 citations support their sentence",
        "0 of 1 citations support their sentence; would be withheld",
        "0 of 1 citations support their sentence; there is no passage 7; would be withheld",
        "cites nothing; would be withheld",
    ]


def test_none_or_all_of_the_citations_is_no_certainty():
    assert citing._precision([(0, 2)] * 21, 0) == {"value": 0.0, "interval": list(wilson(0, 21))}
    assert citing._precision([(1, 1)] * 21, 0) == {"value": 1.0, "interval": list(wilson(21, 21))}


def test_silence_is_right_where_the_documents_do_not_answer():
    fields = [{"section": "1 What it is"}, {"section": "4 First start"}, {"section": "Prices"}, {"section": ""}]
    scored = {"retrieval": {"exact_match": Scored(np.array([1.0, 0.0, 1.0, 1.0]))}}
    found = citing.measured(work(ANSWERS, fields, "section"), scored)
    arm = found["arms"]["retrieval"]
    assert arm["abstained"] == 1 and arm["refused"] == pytest.approx(2 / 3)
    assert found["ranking"]["questions"] == 3
    assert found["says"] == [
        "retrieval: a right passage was in the prompt of 2 of 3 questions that have one; 0.500 in exact_match on those."
    ]


def test_without_passages_nothing_is_told():
    alone = work(ANSWERS, [{}] * 4)
    alone.arms = [ARMS["base"]]
    assert citing.measured(alone, {}) is None
