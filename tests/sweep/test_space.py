"""What may be tried: lists, ranges, overrides; every slip told before anything runs."""

import pytest

from tunesmith.config.load import load
from tunesmith.errors import ConfigError
from tunesmith.sweep.space import Axis, corners, grid, own, plain, space

BASE = {"model": "embedded", "data": "rows.jsonl", "method": "lora", "output": "o"}


def axes(*settings):
    return space(load(BASE), settings)[1]


def test_lists_ranges_and_overrides():
    settings = ["lora.rank=8, 16,8", "train.learning_rate=1e-4..1e-3", "train.epochs=2", "lora.targets=[q_proj, v_proj],all-linear"]
    config, found = space(load(BASE), settings)
    assert config.train.epochs == 2
    assert found == [
        Axis("lora.rank", ("8", "16")),
        Axis("train.learning_rate", low=1e-4, high=1e-3, log=True),
        Axis("lora.targets", ('["q_proj", "v_proj"]', "all-linear")),
    ]
    assert load(config, f"lora.targets={found[2].values[0]}").lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "whole", "log"),
    [
        ("train.learning_rate=1e-4..1e-3", False, True),
        ("train.learning_rate=1e-4..9e-4", False, False),
        ("train.learning_rate=1e-4..1e-3:linear", False, False),
        ("train.learning_rate=2e-4..3e-4:log", False, True),
        ("lora.rank=4..64", True, False),
        ("lora.rank=4..64:log", True, True),
        ("train.epochs=1..4", False, False),
        ("train.epochs=1..4:int", True, False),
        ("lora.dropout=0..0.5", False, False),
    ],
)
def test_kinds_of_ranges(text, whole, log):
    (axis,) = axes(text)
    assert (axis.whole, axis.log) == (whole, log)


def test_numbers_are_rounded_and_stay_inside():
    (axis,) = axes("train.learning_rate=1.2345e-4..9.8765e-4")
    assert (
        axis.text(2.34567e-4) == "0.000235"
        and float(axis.text(1.2345e-4)) >= 1.2345e-4
        and float(axis.text(9.8765e-4)) <= 9.8765e-4
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["lora.rankk=1,2"], "did you mean 'rank'"),
        (["lora.rank=0,2"], "expected a whole number above 0, got 0"),
        (["lora.rank="], "has no values"),
        (["lora.rank=8,,16"], "is no list"),
        (["lora.rank"], "is no setting"),
        (["output=a,b"], "output cannot be swept"),
        (["seed=1,2"], "--seeds N"),
        (["seed=1..9"], "--seeds N"),
        (["data.held_out=0.1,0.2"], "must stay the same"),
        (["lora.rank=8..2"], "write lora.rank=2..8"),
        (["lora.rank=8..8"], "a range goes from a smaller number"),
        (["lora.rank=1.5..4"], "is a whole number"),
        (["train.learning_rate=1e-4..5"], "at most 1"),
        (["lora.dropout=0..0.5:log"], "begins above 0"),
        (["lora.rank=1..x"], "is no range"),
        (["lora.rank=1..8:loud"], "unknown kind of range 'loud'"),
        (["train.schedule=cosine,lineear"], "did you mean 'linear'"),
        (["lora.rank=2,4", "lora.rank=8,9"], "given twice"),
        (["lora.rank=4"], "nothing to try"),
        ([], "nothing to try"),
        (["train.learning_rate=1e-4,1e-3", "train.epochss=3"], "did you mean 'epochs'"),
    ],
)
def test_slips_are_told(settings, what):
    with pytest.raises(ConfigError) as caught:
        space(load(BASE), settings)
    assert what in str(caught.value)


def test_grid_and_corners():
    found = axes("lora.rank=2,4,8", "train.learning_rate=1e-3,1e-2")
    assert len(grid(found)) == 6 and {"lora.rank": "4", "train.learning_rate": "0.01"} in grid(found)
    assert len([*corners(found, 64)]) == 6
    assert [c["lora.rank"] for c in corners(found, 5)] == ["2", "2", "8", "8"]


def test_the_files_own_values():
    found = axes("train.learning_rate=1e-4..1e-3", "lora.rank=8,64", "lora.targets=[q_proj],all-linear")
    assert own(load(BASE), found) == {"train.learning_rate": "0.0002", "lora.rank": "16", "lora.targets": "all-linear"}
    assert found[0].holds("0.0002") and not found[0].holds("0.1") and not found[1].holds("16")
    assert own(load(BASE, "method=full"), found[:1]) == {"train.learning_rate": "2e-5"}


@pytest.mark.parametrize("value", [1, 0.0002, 1e-07, 0.1 + 0.2, True, "cosine", "no", "1.5", ("q_proj", "v_proj"), {"a": 1}])
def test_a_value_reads_back_as_it_was(value):
    from tunesmith.config.yaml12 import read

    back = read(plain(value)).tree
    assert (back == (list(value) if isinstance(value, tuple) else value) and type(back) is not bool) or value is True
