"""Batches without padding: every example once an epoch, budgets kept, labels as a naive double loop has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import collate, micro_batches, plan_epoch, steps
from tunesmith.types import Example, Origin

CASES = settings(max_examples=100, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def example(ids, learn):
    return Example(np.array(ids, np.int32), np.array(learn, bool), Origin("f.jsonl", 1))


@st.composite
def examples(draw):
    learn = [False, *draw(st.lists(st.booleans(), min_size=1, max_size=12))]
    learn[draw(st.integers(1, len(learn) - 1))] = True
    return example(draw(st.lists(st.integers(0, 99), min_size=len(learn), max_size=len(learn))), learn)


@CASES
@given(LENGTHS, st.integers(1, 80))
def test_micro_batches_hold_every_example_once_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in g) <= budget or len(g) == 1 for g in groups)
    assert groups == micro_batches(lengths, budget)
    total = sum(min(n, budget) for n in lengths)
    assert len(groups) <= 2 * total / budget + 1  # no two groups would fit into one


def test_micro_batches_are_few():
    lengths = np.random.default_rng(0).integers(20, 400, 512).tolist()
    assert len(micro_batches(lengths, 4096)) == -(-sum(lengths) // 4096)


@CASES
@given(LENGTHS, st.integers(1, 9), st.integers(1, 80), st.integers(0, 5))
def test_an_epoch_holds_every_example_once_spread_evenly_over_as_few_steps_as_can_be(lengths, batch_size, budget, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    plan = plan_epoch(order, np.array(lengths, np.int64), batch_size, budget)
    assert sorted(i for step in plan for part in step for i in part) == list(range(len(lengths)))
    sizes = [sum(map(len, step)) for step in plan]
    assert len(sizes) == -(-len(lengths) // batch_size)
    assert max(sizes, default=0) <= batch_size and max(sizes, default=0) - min(sizes, default=0) <= 1
    assert [sorted(i for part in step for i in part) for step in plan] == [sorted(s) for s in steps(order, batch_size)]


def test_no_step_of_an_epoch_holds_a_single_row_left_over():
    """609 = 38 x 16 + 1: one would be left over."""
    sizes = [len(step) for step in steps(range(609), 16)]
    assert len(sizes) == 39 and set(sizes) == {15, 16}


@CASES
@given(st.lists(examples(), min_size=1, max_size=6))
def test_collate_equals_a_double_loop(many):
    batch = collate(many)
    tokens, positions, bounds, rows, labels = [], [], [0], [], []
    for e in many:
        last = max(t for t in range(len(e.ids)) if e.learn[t])
        for t in range(last + 1):
            if e.learn[t]:
                labels.append(int(e.ids[t]))
                rows.append(len(tokens) - 1)
            if t < last:
                tokens.append(int(e.ids[t]))
                positions.append(t)
        bounds.append(len(tokens))
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.rows.tolist() == rows
    assert batch.labels.tolist() == labels
    assert batch.trained == sum(int(e.learn.sum()) for e in many) and len(batch.origins) == len(many)
    assert (batch.tokens.dtype, batch.rows.dtype, batch.cu_seqlens.dtype) == (np.int64, np.int64, np.int32)


@pytest.mark.parametrize("learn", [[0, 0, 0], [1, 0, 1]])
def test_an_example_that_teaches_nothing_or_its_first_token_does_not_reach_a_batch(learn):
    with pytest.raises(AssertionError):
        collate([example([1, 2, 3], learn)])
