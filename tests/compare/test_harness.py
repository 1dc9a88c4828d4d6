"""compare/harness.py beside lm-evaluation-harness itself, where it is installed (the extra `harness`)."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lm_eval")

from tunesmith.chat import Talker
from tunesmith.compare import forgetting, harness
from tunesmith.errors import DataError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITTEN = """doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def talker(tiny):
    return Talker.open(tiny.model)


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(kind, rest, rows):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "own.yaml"
        path.write_text(TASK.format(name="own_task", data=data, kind=kind, rest=rest))
        return str(path)

    return make


def rows(count):
    return [
        {"question": f"what is {i}?", "choices": ["it is", f"nobody knows {i}"], "label": i % 2, "answer": "x"}
        for i in range(count)
    ]


def test_choices_are_picked_by_likelihood(talker, task):
    path = task("multiple_choice", CHOICE, rows(7))
    found = harness.evaluate(talker, path, 5)["acc"]
    assert len(found["values"]) == 5 and found["higher_is_better"]

    def likelihood(question, answer):
        encode = talker.renderer.tokenizer.encode
        head, whole = encode(question), encode(f"{question} {answer}")
        start = sorted(talker.renderer.stop_ids)[:1]
        ids = torch.tensor([*start, *whole])
        logits = talker.model(ids).float()[len(head) : -1]
        return -F.cross_entropy(logits, ids[len(head) + 1 :], reduction="sum").item()

    for row, value in zip(rows(5), found["values"], strict=True):
        best = max((0, 1), key=lambda k: likelihood(row["question"], row["choices"][k]))
        assert value == float(best == row["label"])


def test_answers_are_written_up_to_their_end(talker, task):
    found = harness.evaluate(talker, task("generate_until", WRITTEN, rows(3)), 10)
    assert found["exact_match"]["values"] == [0.0, 0.0, 0.0]


def test_a_rolling_likelihood_counts_each_token_once(talker):
    text = "abc" * 200
    model, ids = harness.model_of(talker), talker.renderer.tokenizer.encode("abc" * 200)
    whole = model._rolling(text)
    assert math.isfinite(whole) and -12 * len(ids) < whole < -2 * len(ids)


def test_a_task_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="has no such task"):
        forgetting.tasks(["lm-eval:no_such_task_at_all"])
    with pytest.raises(DataError, match="no task file"):
        forgetting.tasks([f"lm-eval:{tmp_path / 'none.yaml'}"])
