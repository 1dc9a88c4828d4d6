"""The arms of bench/cpu.py train the same thing: our packed step and the padded transformers + PEFT loop agree."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SIZE = dict(vocab_size=311, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2)  # fmt: skip
LEARNED = [(9, 3, 9), (40, 1, 40), (17, 10, 14), (2, 1, 2), (25, 24, 25)]  # length, first learned token, end of the learned ones


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_cpu", Path(__file__).parents[2] / "bench" / "cpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows():
    generator = torch.Generator().manual_seed(5)
    for length, start, end in LEARNED:
        ids = torch.randint(SIZE["vocab_size"], (length,), generator=generator).tolist()
        yield ids, [t if start <= n < end else -100 for n, t in enumerate(ids)]


def test_same_loss_and_gradients(bench, tmp_path):
    place = bench.make_place(tmp_path, tmp_path, SIZE)
    arms = {name: bench.build(name, place, []) for name in ("ours", "ten lines")}
    batch = list(rows())
    loss, whole, worst = bench.compare(arms, batch)["ours"]
    assert loss < 1e-5 and whole < 1e-5 and worst < 1e-5, (loss, whole, worst)


def test_same_parameters_after_two_steps(bench, tmp_path):
    """Clipping and AdamW as well: each element moves by about the rate, so another optimiser would differ in the first digit."""
    place = bench.make_place(tmp_path, tmp_path, SIZE)
    ours, ten = bench.build("ours", place, []), bench.build("ten lines", place, [])
    start = {n: p.detach().clone() for n, p in ours.trained.items()}
    for _ in range(2):
        for arm in (ours, ten):
            arm.gradient(list(rows()))
            arm.step()
    theirs = {n.replace(".default", ""): p.detach() for n, p in ten.model.named_parameters() if p.requires_grad}
    assert theirs.keys() == start.keys()
    for name, p in ours.trained.items():
        moved, off = (theirs[name] - start[name]).norm(), (p.detach() - theirs[name]).norm()
        assert moved > 0 and off < 1e-3 * moved, (name, off / moved)
