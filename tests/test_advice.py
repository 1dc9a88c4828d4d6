"""Advice before training: each rule speaks where it should, is silent beside it, and names its reason and its source."""

import io

import pytest
from rich.console import Console

import tunesmith
from tunesmith import advice, api
from tunesmith.advice import Job, advise
from tunesmith.config.load import load

BASE = {"model": "m", "data": "rows.jsonl", "method": "qlora", "output": "o"}


def job(*overrides, rows=5000, width=4096, answers=(), **base):
    return Job(load({**BASE, **base}, *overrides), rows, width, tuple(answers))


@pytest.mark.parametrize(
    ("key", "speaks", "silent"),
    [
        ("data.train", job(rows=49), job(rows=50)),
        ("data.train", job(answers=["It costs $5."] * 3 + ["Gladly."] * 7), job(answers=["It costs $5."] * 2 + ["Gladly."] * 8)),
        ("data.train", job(data="manual.pdf"), job(data="manual.jsonl")),
        ("train.learning_rate", job("train.learning_rate=0.005"), job("train.learning_rate=0.002")),
        ("train.learning_rate", job("train.learning_rate=1e-5"), job("train.learning_rate=2e-5")),
        ("train.learning_rate", job("method=full", "train.learning_rate=2e-4"), job("method=full", "train.learning_rate=1e-4")),
        ("train.learning_rate", job("train.learning_rate=0.004"), job("train.learning_rate=0.004", width=256)),
        ("train.epochs", job("train.epochs=5"), job("train.epochs=4")),
        ("train.epochs", job("train.epochs=8"), job("train.epochs=8", "eval.early_stop=3")),
        ("train.epochs", job("train.max_steps=4000"), job("train.max_steps=400")),
        ("train.batch_size", job("train.batch_size=64", rows=100), job("train.batch_size=16", rows=100)),
        ("lora.rank", job("lora.rank=128", "lora.alpha=128", rows=400), job("lora.rank=64", "lora.alpha=64", rows=400)),
        ("lora.rank", job("lora.rank=8", "lora.alpha=8", rows=30_000), job("lora.rank=16", rows=30_000)),
        ("lora.alpha", job("lora.rank=2"), job("lora.rank=4")),
        ("lora.alpha", job("lora.variant=rslora", "lora.alpha=64"), job("lora.variant=rslora", "lora.alpha=16")),
        ("lora.targets", job("lora.targets=[q_proj, v_proj]"), job("lora.targets=[q_proj, up_proj]")),
    ],
)
def test_a_rule_speaks_where_it_should_and_nowhere_beside(key, speaks, silent):
    (said,) = advise(speaks)
    assert said.key == key and said.why and ("arXiv" in said.source or "2025" in said.source)
    assert advise(silent) == []


def test_at_most_three_lines_the_gravest_first():
    said = advise(job("train.learning_rate=0.5", "lora.rank=1", "lora.targets=[q_proj]", rows=20, answers=["On 2024-01-01"] * 10))
    assert [a.key for a in said] == ["data.train", "data.train", "train.learning_rate"]


def test_what_is_not_known_is_not_guessed():
    assert advise(job(rows=None, width=None)) == []
    assert advise(job("train.max_steps=5000", rows=None)) == []


def test_every_rule_is_tried_above():
    rules = {name for name, value in vars(advice).items() if value in advice.RULES}
    assert len(rules) == len(advice.RULES) == 9


def test_an_adapter_that_goes_on_has_no_rank_to_choose():
    assert advise(Job(load(BASE, "lora.continue_from=some/adapter"), 400, 4096)) == []


def test_train_and_plan_say_it(tiny, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config = tiny.config(tmp_path / "run", train={"max_steps": 2, "learning_rate": 0.5})
    del config["train"]["epochs"]
    tunesmith.train(config, console=console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("advice")]
    assert len(lines) == 2 and "rows to train on" in lines[0] and "0.5 is outside 0.0001 to 0.02" in lines[1]
    assert [a.key for a in api.advice(config)] == ["data.train", "train.learning_rate"]
    assert api.advice("embedded") == []


def test_the_demo_is_told_of_its_five_passes_and_of_nothing_else():
    """They were measured: its table gets better though its loss does not (docs/hyperparameters.md)."""
    from tunesmith.demo import config

    (said,) = advise(Job(load(config("runs/x")), 813, 384))
    assert said.key == "train.epochs" and "5 times" in said.what
