"""compare/result.py and its page: what is recommended and how sure it is said to be; nothing out of an answer becomes markup."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from tunesmith.compare import result
from tunesmith.compare.arms import ARMS, Passage, Prompt, Question
from tunesmith.compare.work import Comparison, Options
from tunesmith.evaluate import compare_page
from tunesmith.evaluate.metrics import METRICS, Scored, chosen
from tunesmith.types import Message

EVIL = '<script>alert(1)</script><img src=x onerror="x">\u202e'


def comparison(tmp_path, right, *, metrics=("exact_match",), rows=60, ended="stop", gold="gold", **options):
    """Arms by name with the share of rows that each has right; the rows that are right come first."""
    arms = [ARMS[name] for name in right]
    questions = [Question(i, (Message("user", f"question {i}"),), gold, False, f"r:{i}") for i in range(rows)]
    counts = {"prompt_tokens": 10, "answer_tokens": 3, "seconds": 0.5, "ended": ended}

    def answers(share):
        picked = share if isinstance(share, (set, range)) else range(round(share * rows))
        return [{"answer": gold if i in picked else f"wrong {EVIL}", **counts} for i in range(rows)]

    passages = (Passage("1", f"doc{EVIL}", "t"),)
    return Comparison(
        source=SimpleNamespace(name="name", run=None, tuned=False, held_out=[None] * rows,
                               config=SimpleNamespace(model="base-model", method="lora")),
        options=Options(system=options.pop("system", ""), **options), folder=tmp_path, arms=arms, questions=questions,
        metrics=chosen(metrics, [gold] * rows), max_tokens=20, left_out=0,
        prompts={arm.name: [Prompt(q.before, passages=passages if arm.passages else ()) for q in questions] for arm in arms},
        answers={name: answers(share) for name, share in right.items()},
    )  # fmt: skip


def verdict(tmp_path, right, **settings):
    return result.gather(comparison(tmp_path, right, **settings))


@pytest.mark.parametrize(
    ("right", "picked", "words"),
    [
        ({"base": 0.2, "system": 0.3, "tuned": 0.9}, "tuned", "every way that costs less is shown to be worse"),
        ({"base": 0.88, "system": 0.2, "tuned": 0.9}, "base", "no way that costs more is shown to be better"),
        ({"base": 0.2, "few-shot": 0.85, "tuned": 0.9}, "few-shot", "every way that costs less is shown to be worse"),
        ({"base": 0.2, "retrieval": 0.9, "tuned": 0.1}, "retrieval", "every way that costs less"),
        ({"base": 0.9, "tuned": 0.9}, "base", "no way that costs more is shown to be better"),
        ({"tuned": 0.9}, "tuned", "Only one way was tried"),
    ],
)
def test_the_cheapest_that_is_not_shown_worse(tmp_path, right, picked, words):
    found = verdict(tmp_path, right)
    assert found["recommended"] == picked and words in found["verdict"][0]
    if picked != found["best"]:
        assert "no difference shown" in found["verdict"][1]


def test_a_way_that_is_shown_to_be_better_and_not_the_highest_counts(tmp_path):
    """tuned is highest, 29 of 40, not shown better than base's 20 (19 rows to 10, p 0.14); few-shot, 28, is (8 to 0, p 0.008)."""
    tuned = {*range(10), *range(20, 39)}
    found = verdict(tmp_path, {"base": range(20), "few-shot": range(28), "tuned": tuned}, rows=40)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert found["best"] == "tuned" and arms["base"]["metrics"]["exact_match"]["to_best"]["shown"] == 0
    assert arms["base"]["beaten_by"] == ["few-shot"] and arms["tuned"]["beaten_by"] == []
    assert found["recommended"] == "few-shot" and "shown to be worse than another." in found["verdict"][0]
    assert "base is not shown to be worse than tuned, but than few-shot." in found["verdict"]


def test_worse_than_the_best_is_not_worse_than_the_one_that_is_recommended(tmp_path):
    found = verdict(tmp_path, {"base": range(30), "few-shot": range(33), "tuned": range(37)})  # 3, 4 and 7 rows: 0.25, 0.125, 0.016
    assert found["recommended"] == "few-shot" and found["verdict"][0].endswith("is shown to be worse than tuned.")


def test_a_measure_in_which_no_way_scores_is_no_other_measure(tmp_path):
    found = verdict(tmp_path, {"base": 0.2, "tuned": 0.9}, metrics=("exact_match", "regex:nowhere"))
    assert not any("otherwise" in line for line in found["verdict"])


def test_mcnemar_decides_where_rows_are_right_or_wrong(tmp_path):
    """6 rows to 0 is p 0.031, 5 to 0 is 0.0625: by hand, 2 / 2 ** n."""
    six = verdict(tmp_path, {"base": range(30), "tuned": range(36)})
    five = verdict(tmp_path, {"base": range(30), "tuned": range(35)})
    gap = six["arms"][0]["metrics"]["exact_match"]["to_best"]
    assert (gap["lost"], gap["won"], gap["p"], gap["shown"]) == (6, 0, 2 / 64, -1) and six["recommended"] == "tuned"
    gap = five["arms"][0]["metrics"]["exact_match"]["to_best"]
    assert (gap["p"], gap["shown"]) == (2 / 32, 0) and five["recommended"] == "base"
    assert "−0.083" in five["verdict"][1] and "McNemar p 0.062" in five["verdict"][1]


def test_where_nothing_is_recommended(tmp_path):
    few = verdict(tmp_path, {"base": 0.1, "tuned": 1.0}, rows=19)
    assert few["recommended"] is None and "19 held-out rows are too few" in few["verdict"][0]
    assert not any("would not show" in d for d in few["doubts"])  # however large a difference of 19 rows is
    none = verdict(tmp_path, {"base": 0.0, "tuned": 0.0})
    assert none["recommended"] is None and "no way scores above 0" in none["verdict"][0]


def test_doubts_are_told(tmp_path):
    found = verdict(tmp_path, {"base": 0.2, "system": 0.3, "few-shot": 0.4, "tuned": 0.9}, ended="length")
    said = "\n".join(found["doubts"])
    assert "On 60 rows a difference below about 0." in said and "4 ways were compared" in said
    assert "100% of tuned's answers were cut at 20 tokens" in said
    soft = verdict(tmp_path, {"base": 0.2, "tuned": 0.9}, metrics=("f1",))
    assert any("does not know whether an answer is true" in d for d in soft["doubts"])
    form = verdict(tmp_path, {"base": 0.2, "tuned": 0.9}, metrics=("regex:gold",))
    assert any("sees an answer's form alone (" in d and "), not whether it is right" in d for d in form["doubts"])
    same = verdict(tmp_path, {"base": 1.0, "tuned": 1.0})
    assert any("below about 0.050 would not show" in d for d in same["doubts"])  # 3 of 60


def test_an_endpoint_is_told_beside_the_others_and_not_weighed(tmp_path):
    found = verdict(tmp_path, {"base": 0.5, "endpoint": 1.0})
    assert found["recommended"] == "base" and found["best"] == "base"
    assert any("the endpoint's model has 1.000, +0.500" in line and "better" in line for line in found["verdict"])
    for ways, told in (({"base": 0.5, "endpoint": 1.0}, True), ({"base": 0.5, "tuned": 1.0}, False)):
        page = result.finish(comparison(tmp_path, ways, metrics=("exact_match", "f1"))).page.read_text("utf-8")
        assert ("Not weighed here: an endpoint" in page) == told  # it has no colour, and is not among those shown to be worse


def test_intervals_and_differences_are_the_bootstrap_of_the_rows():
    value = Scored(np.array([1.0] * 40 + [0.0] * 40))
    mean, low, high = result.interval(value, METRICS["f1"], seed=0)
    assert mean == 0.5 and 0.37 < low < 0.41 and 0.59 < high < 0.63  # sqrt(0.25 / 80) * 1.96 = 0.11
    golds = ["a", "b"] * 40
    good, poor = (METRICS["macro_f1"].score(answers, golds) for answers in (golds, ["a"] * 80))
    gap = result.difference(poor, good, METRICS["macro_f1"], seed=0)
    assert gap["difference"] == pytest.approx(1 - 1 / 3) and gap["shown"] == 1
    assert result.difference(good, good, METRICS["macro_f1"], seed=0)["shown"] == 0


def test_a_few_rows_that_differ_show_nothing():
    """5 of 200 are better and none is worse: the sign test's p is 0.062, and the bootstrap's interval lies above zero."""
    before, after = np.zeros(200), np.zeros(200)
    after[:5] = 1.0
    gap = result.difference(Scored(before), Scored(after), METRICS["f1"], seed=0)
    assert gap["interval"][0] > 0 and gap["shown"] == 0
    after[5] = 0.5
    assert result.difference(Scored(before), Scored(after), METRICS["f1"], seed=0)["shown"] == 1


def test_citations_are_not_held_against_retrieval(tmp_path):
    work = comparison(tmp_path, {"base": 0.5, "retrieval": 0.5})
    for row in work.answers["retrieval"]:
        row["answer"] = "gold [1]"
    found = result.gather(work)
    assert found["arms"][1]["metrics"]["exact_match"]["value"] == 1
    assert found["citations"]["arms"]["retrieval"]["cites"]["value"] == 1


def test_a_document_is_told_by_its_name(tmp_path):
    """An index names it by its way from there, which says how somebody's folders lie; the prompt has the name alone."""
    work = comparison(tmp_path, {"base": 0.2, "retrieval": 0.9})
    work.prompts["retrieval"] = [Prompt(q.before, passages=(Passage("1", "../../home/me/manual.md", "t"),)) for q in work.questions]
    case = result.gather(work)["cases"]["wins"][0]
    assert case["answers"]["retrieval"]["passages"] == ["manual.md"] and case["answers"]["base"]["passages"] == []


def test_wins_and_losses_are_the_rows_that_changed_most(tmp_path):
    found = verdict(tmp_path, {"base": set(range(10)), "tuned": set(range(5, 40))})["cases"]
    assert (found["of"], found["against"], found["won"], found["lost"], found["same"]) == ("tuned", "base", 30, 5, 25)
    assert [c["row"] for c in found["wins"]] == [10, 11, 12, 13, 14, 15]
    assert sorted(c["row"] for c in found["losses"]) == [0, 1, 2, 3, 4]
    led = verdict(tmp_path, {"base": 0.9, "system": 0.5, "tuned": 0.6})["cases"]
    assert (led["of"], led["against"]) == ("tuned", "base")


def test_the_page_and_the_file(tmp_path):
    work = comparison(tmp_path, {"base": 0.2, "retrieval": 0.3, "tuned": 0.9}, metrics=("exact_match", "f1"), system=EVIL)
    made = result.finish(work)
    page = made.page.read_text("utf-8")
    assert "<script" not in page and "<img" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert "default-src" in page and "http://" not in page and "https://" not in page
    for words in ("Use the tuned model", "recommended", "Most won by tuned", "1 other way<", "McNemar"):
        assert words in page
    assert page.count('class="scroll"') == page.count('class="tight"') > 3  # no number is cut off on a phone
    found = json.loads((tmp_path / "compare.json").read_text("utf-8"))
    assert found["recommended"] == made.recommended == "tuned"
    assert [a["name"] for a in found["arms"]] == ["base", "retrieval", "tuned"]


def test_one_row_has_no_interval_and_the_page_stands(tmp_path):
    made = result.finish(comparison(tmp_path, {"base": 0.0, "tuned": 1.0}, rows=1, metrics=("f1",)))
    found = json.loads((tmp_path / "compare.json").read_text("utf-8"))
    assert found["arms"][0]["metrics"]["f1"]["interval"] == [None, None]
    assert made.recommended is None
    compare_page.write(found, tmp_path / "again.html")  # from the file, where infinity is null
    assert (tmp_path / "again.html").read_text() == made.page.read_text()


@pytest.mark.parametrize("width", [80, 160])
def test_the_table(tmp_path, width):
    out = Console(file=io.StringIO(), width=width)
    result.finish(comparison(tmp_path, {"base": 0.2, "tuned": 0.9}, metrics=("exact_match", "f1"))).print(out)
    said = out.file.getvalue()
    lines = said.splitlines()
    assert lines[0].split() == ["exact_match", "f1", "prompt", "answer", "s/answer"]
    assert lines[1].startswith("base") and "0.200 (0.1" in lines[1] and lines[2].startswith("tuned") and "0.50" in lines[2]
    assert "Use the tuned model: 0.900 in exact_match" in said and "compare.html" in said


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_number_of_the_table_is_cut_off(tmp_path, width):
    """Four measures and the longest name do not fit 80 columns with an interval: then it is left out."""
    out = Console(file=io.StringIO(), width=width)
    metrics = ("rouge_l", "chrf", "f1", "exact_match")
    result.finish(comparison(tmp_path, {"base": 0.2, "tuned+retrieval": 0.9}, metrics=metrics)).print(out)
    table = out.file.getvalue().splitlines()[:8]
    assert "…" not in "".join(table)
    if width >= 80:
        assert table[1].split()[0] == "base" and table[2].split()[0] == "tuned+retrieval" and table[2].count("0.9") >= 4
    assert ("(" in table[1]) == (width > 80)


def test_one_way_is_one_way(tmp_path):
    assert "60 held-out questions, 1 way: tuned" in result.finish(comparison(tmp_path, {"tuned": 0.9})).page.read_text("utf-8")


def test_a_patterns_brackets_stay(tmp_path):
    out = Console(file=io.StringIO(), width=160)
    result.finish(comparison(tmp_path, {"base": 0.2, "tuned": 0.9}, metrics=("regex:[/g]old", "regex:[a-z]"))).print(out)
    assert out.file.getvalue().splitlines()[0].split()[:2] == ["regex:[/g]old", "regex:[a-z]"]
