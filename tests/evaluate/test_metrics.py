"""evaluate/metrics.py: what each metric says of an answer, which are found for which rows, and what is refused."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest

from tunesmith.data.formats import conversation
from tunesmith.data.sources import Refused, rows
from tunesmith.errors import ConfigError, MissingExtra
from tunesmith.evaluate import metrics
from tunesmith.evaluate.metrics import METRICS, chosen, exact_match, find, number_of, predicted, token_f1


def scores(name, answers, golds):
    return chosen([name], golds)[0].score(answers, golds).values.tolist()


def test_squad():
    """The values that SQuAD's evaluation script (v1.1 and v2.0) gives by its rules."""
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1
    assert exact_match("an apple", "apple") == 1
    assert exact_match("apples", "apple") == 0
    assert token_f1("the red fox", "red fox") == 1
    assert token_f1("red fox jumps", "red fox") == pytest.approx(0.8)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "the") == 1  # nothing is left of either
    assert token_f1("", "red") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3.\n#### 1,234", "1234"),
        ("#### $5.00", "5"),
        ("first 3, then 4 apples.", "4"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("costs $1,000.50.", "1000.50"),
        ("#### nothing, though 9 before", "9"),
        ("17 #### none", "17"),
        ("none", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    found = number_of(text)
    assert found == (None if number is None else metrics.Decimal(number))


def test_number_takes_the_one_behind_the_mark():
    golds = ["6 and 2 make 8\n#### 8"] * 2
    assert scores("number", ["... so 8.0", "#### 9\nor 8"], golds) == [1, 0]


def test_a_label_in_a_sentence_is_found_and_two_are_not_one():
    labels = ["bad", "good", "very good"]
    assert predicted("It is good.", labels) == "good"
    assert predicted("GOOD!", labels) == "good"
    assert predicted("I find it very good", labels) == "very good"
    assert predicted("good or bad", labels) is None
    assert predicted("goodness", labels) is None


def test_json():
    golds = ['{"a": 1, "b": [true]}'] * 6
    answers = ['{"b":[true],"a":1.0}', '{"a": 1, "b": [1]}', '```json\n{"a": 1}\n```', "[1", '{"a": NaN}', "[" * 100_000]
    assert scores("json_match", answers, golds) == [1, 0, 0, 0, 0, 0]
    assert scores("json", answers, golds) == [1, 1, 0, 0, 0, 0]


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["a"]}))
    metric = chosen([f"json_schema:{path}"], ["x", "y"])[0]
    assert metric.score(['{"a": 2}', "{}"], ["x", "y"]).values.tolist() == [1, 0]
    path.write_text('{"type": 5}')
    with pytest.raises(ConfigError, match="no JSON schema"):
        chosen([f"json_schema:{path}"], ["x"])


def test_json_schema_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtra, match="jsonschema"):
        chosen(["json_schema:x.json"], ["x"])


def test_regex_and_style(tmp_path):
    rules = tmp_path / "style.json"
    rule = {"name": "short", "pattern": "\\A.{0,5}\\Z", "match": True}
    rules.write_text(json.dumps({"rules": [rule], "redirect": {"pattern": "no"}, "system_prompt": ""}))
    found = chosen([r"regex:^\d+$", f"style:{rules}"], ["a", "b"])
    assert [m.name for m in found] == [r"regex:^\d+$", "style"]
    assert [m.score(["12", "too long"], ["a", "b"]).values.tolist() for m in found] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("golds", "names"),
    [
        (['{"a": 1}', "[2]"] * 5, ["json_match", "json"]),
        (["so 3 + 4 = 7\n#### 7", "#### 1,000"] * 5, ["number"]),
        (["12", "$3.50", "40 %", "7 km"] * 3, ["number"]),
        (["positive", "negative", "Neutral."] * 6, ["accuracy", "macro_f1"]),
        ([f"the name {i}" for i in range(20)], ["f1", "exact_match"]),
        ([f"A long answer of many words that says {i} and no more" for i in range(20)], ["rouge_l", "chrf", "f1"]),
        (["猫は好きです。犬も好きです。" + chr(0x4E00 + i) + " は" * 8 for i in range(20)], ["chrf", "f1"]),
    ],
)
def test_the_metrics_that_are_found(golds, names):
    assert [m.name for m in find(golds)] == names


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("gsm8k/test.jsonl", ["number"]),
        ("medquad/medquad.jsonl", ["rouge_l", "chrf", "f1"]),
        ("llama_factory/alpaca_zh_demo.json", ["chrf", "f1"]),
    ],
)
def test_the_metrics_that_are_found_for_real_rows(shared_data, file, names):
    read = (row for row in rows(shared_data / "sft" / file) if not isinstance(row, Refused))
    golds = [conversation(row).messages[-1].content for row in itertools.islice(read, 300)]
    assert [m.name for m in find(golds)] == names


def test_the_classes_of_real_rows(shared_data):
    with (shared_data / "sft/customer_support/banking77/test.csv").open(encoding="utf-8", newline="") as f:
        golds = [row["category"] for row in csv.DictReader(f)][::6]
    assert len(set(golds)) == 77 and [m.name for m in find(golds)] == ["accuracy", "macro_f1"]


def test_what_does_not_fit_is_told_with_what_does():
    golds = [f"A long answer of many words, the {w}" for w in ("first", "second", "third", "fourth")]
    with pytest.raises(ConfigError) as e:
        chosen(["number", "accuracy", "json", "rougel", "regex", "f1"], golds)
    assert "number does not fit these rows: 0% of the written answers hold a number" in e.value.what
    assert "accuracy does not fit" in e.value.what and "json does not fit" in e.value.what
    assert "rougel: there is no such metric" in e.value.what and "did you mean 'rouge_l'?" in e.value.fix
    assert "regex: it needs what to look for" in e.value.what and "regex:PATTERN" in e.value.fix
    assert "these fit: exact_match, f1, rouge_l, chrf" in e.value.fix


def test_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match="no regular expression"):
        chosen(["regex:("], ["x"])


def test_rouge_where_no_latin_letter_is_written():
    with pytest.raises(ConfigError, match="a-z and 0-9 alone, which 0%"):
        chosen(["rouge_l"], ["猫", "犬"])


def test_every_metric_is_between_0_and_1():
    golds = ["yes", "no", "", "12 {}"]
    for metric in METRICS.values():
        values = metric.score(["yes", "", "no", "\x00 #### ."], golds).values
        assert values.shape == (4,) and np.all((values >= 0) & (values <= 1)), metric.name
        assert not metric.binary or set(values) <= {0.0, 1.0}
