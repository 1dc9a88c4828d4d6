"""Citations are checked by a rule that anyone can repeat; measures equal what the hand computes."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.retrieve import Passage, cite, measures

PASSAGES = [
    Passage(7, "a.md", 0, 9, "The pump is reset by holding the red button for 5 seconds.", 1.0),
    Passage(3, "b.md", 0, 9, "Valves open at 1,200 bar. Technicians close them by hand.", 0.5, "Valves"),
]


def test_a_supported_sentence_and_its_citation():
    cited = cite.check("Hold the red button for 5 seconds to reset the pump [1].", PASSAGES)
    assert [(c.number, c.exists, c.supports) for c in cited.citations] == [(1, True, True)]
    assert cited.precision == cited.recall == 1 and not cited.missing and not cited.abstains and cited.kept == cited.answer


@pytest.mark.parametrize(
    "answer",
    [
        "The pump is reset by holding the red button for 5 seconds [3].",  # no such passage
        "The pump is reset by holding the red button for 5 seconds [0].",
        "The pump is reset by holding the red button for 5 seconds [2].",  # another passage
        "The pump is reset by holding the red button for 9 seconds [1].",  # another number
        "Elephants paint the ceiling of the workshop every Sunday [1].",
        "The pump is reset by holding the red button for 5 seconds.",  # no citation
        "",
        "[1]",
        cite.ABSTAIN,
    ],
)
def test_it_abstains_when_nothing_passes(answer):
    cited = cite.check(answer, PASSAGES)
    assert cited.abstains and cited.kept == cite.ABSTAIN and not any(c.supports for c in cited.citations)


def test_numbers_that_no_passage_has_are_missing():
    cited = cite.check("The red button resets the pump [1, 9]. Valves open [2][12].", PASSAGES)
    assert (
        cited.missing == (9, 12) and [c.supports for c in cited.citations] == [True, False, True, False] and cited.precision == 0.5
    )


def test_what_passes_is_kept_and_the_rest_dropped():
    cited = cite.check(
        "The red button resets the pump. [1] It was painted by elephants in Rome [1]. Valves open at 1200 bar [2]!", PASSAGES
    )
    assert [s.supported for s in cited.sentences] == [True, False, True] and cited.recall == pytest.approx(2 / 3)
    assert cited.kept == "The red button resets the pump. [1] Valves open at 1200 bar [2]!"


def test_two_passages_together():
    both = "Holding the red button resets the pump, and technicians close valves by hand [1][2]."
    cited = cite.check(both, PASSAGES)
    assert [c.supports for c in cited.citations] == [True, True], "neither does it alone, none can be left out"
    more = cite.check("Holding the red button resets the pump [1][2].", PASSAGES)
    assert [c.supports for c in more.citations] == [True, False], "the second adds nothing"


def test_lists_and_what_has_no_content():
    cited = cite.check("Yes.\n- red button resets the pump [1]\n- valves open [2]\n[1] is where it stands.", PASSAGES)
    assert [s.numbers for s in cited.sentences][:2] == [(1,), (2,)] and all(s.supported for s in cited.sentences[:2])
    assert cited.sentences[0].text.startswith("- red") or cited.sentences[0].text.startswith("red")


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["[1]", "[2]", "[9]", "Pump. ", "reset ", "\n", "[1, 2]", "]", "[", ". ", "5 "])).map("".join)
)
def test_any_answer_is_checked_and_spans_are_exact(answer):
    cited = cite.check(answer, PASSAGES)
    at = 0
    for s in cited.sentences:
        assert answer[s.start : s.end] == s.text and s.start >= at and 0 <= s.cover <= 1
        at = s.end
    assert all(c.exists or not c.supports for c in cited.citations)


def test_the_model_is_asked_with_numbered_passages_or_not_at_all():
    prompts = []
    cited = cite.answer("How?", PASSAGES, lambda p: prompts.append(p) or "Hold the red button [1].")
    assert (
        not cited.abstains
        and re.search(r"\[1\] \S+\nThe pump", prompts[0])
        and re.search(r"\[2\] \S+\nValves open", prompts[0])
        and prompts[0].endswith("\n\nHow?")
    )
    assert cite.answer("How?", [], lambda p: 1 / 0).abstains


# ---- measures
def test_measures_by_hand():
    ranking, gold = ["a", "b", "c", "d"], {"b", "d"}
    assert [measures.hit(ranking, gold, k) for k in (1, 2)] == [0, 1] and measures.recall(ranking, gold, 3) == 0.5
    assert measures.reciprocal_rank(ranking, gold) == 0.5 and measures.reciprocal_rank(ranking, {"z"}) == 0
    assert measures.ndcg(ranking, gold, 4) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3)))
    assert measures.ndcg(ranking, gold, 1) == 0 and measures.ndcg(["b", "d"], gold, 2) == 1
    found = measures.ranked([ranking, ["x"]], [gold, {"x"}], ks=(1, 2))
    assert found.hit == {1: 0.5, 2: 1.0} and found.mrr == 0.75 and found.recall == {1: 0.5, 2: 0.75} and found.questions == 2
    with pytest.raises(ValueError, match="each with gold"):
        measures.ranked([["a"]], [set()])


def test_answers_by_hand():
    good = cite.check("The red button resets the pump [1]. Elephants sing loudly [2].", PASSAGES)
    silent = cite.check(cite.ABSTAIN, PASSAGES)
    found = measures.answers([good, silent, good, silent, silent], [True, True, False, False, False])
    assert (found.citation_precision, found.citation_recall) == (0.5, 0.5)
    assert found.abstained == pytest.approx(2 / 3) and found.refused == 0.5
    assert measures.answers([silent], [False]) == measures.Answers(None, None, 1.0, None)
