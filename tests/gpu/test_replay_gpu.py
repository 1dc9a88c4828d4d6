"""Recorded passes on an NVIDIA GPU: the same bits as unrecorded ones, whatever was played before."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.levels import RECORDED
from tunesmith.models.place import make_deterministic
from tunesmith.ops.linear_ce import linear_cross_entropy
from tunesmith.train import replay
from tunesmith.train.optim import Optimizer
from tunesmith.train.replay import Passes, plain

sys.path.insert(0, str(Path(__file__).parent))
from test_fast_gpu import SPEC, model  # noqa: F401 - the fixture

from tunesmith import adapters
from tunesmith.config.schema import Train
from tunesmith.data.pack import collate
from tunesmith.models.fast import FastLayers, policies
from tunesmith.types import Example, Origin

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture
def deterministic():
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def batch(*lengths, seed=0):
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        learn = rng.random(n + 1) < 0.5
        learn[0], learn[-1] = False, True
        rows.append(Example(rng.integers(0, SPEC.vocab, n + 1).astype(np.int32), learn, Origin("a", 1)))
    return collate(rows)


def passes_of(model, level="keep", fp8=False, **how) -> Passes:  # noqa: F811
    model.fast = FastLayers(model, policies(SPEC.layers, level, **how), fp8=fp8)
    said = []
    made = Passes(model, Optimizer(adapters.trainable(model), Train()), CUDA, lambda *what, **why: said.append((what, why)))
    made.said = said
    return made


def gradient(passes, these):
    passes.optimizer.clear()
    loss = passes(these, 0.01)
    return loss, [g.clone() for g in passes.optimizer.gradients()]


MIXED = [(300, 200, 77), (100, 90, 330, 21), (500,), (256, 256), (577, 1), (256, 256), (300, 200, 77), (490,)]


@pytest.mark.parametrize(
    ("level", "how"), [("keep", {}), ("recompute", {"offload": True}), ("checkpoint", {"offload": True, "tile": 128})]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_recorded_is_unrecorded_to_the_bit(model, deterministic, level, how, fp8):  # noqa: F811
    these = [batch(*lengths, seed=i) for i, lengths in enumerate(MIXED)]
    passes = passes_of(model, level, fp8, **how)
    played = [gradient(passes, b) for b in these] + [gradient(passes, b) for b in these]
    assert not passes.said and all(r.graph is not None for r in passes.recordings.values()), "some ran unrecorded to the end"
    unrecorded = passes_of(model, level, fp8, **how)
    for i, b in enumerate(these):
        unrecorded.warm = False  # never records
        loss, grads = gradient(unrecorded, b)
        for again in (played[i], played[i + len(these)]):
            assert torch.equal(again[0], loss), i
            assert all(torch.equal(x, y) for x, y in zip(again[1], grads, strict=True)), i


def test_filled_up_it_is_close_to_the_definition(model):  # noqa: F811
    passes = passes_of(model)
    for lengths in MIXED:
        b = batch(*lengths, seed=3)
        for _ in range(2):
            loss, grads = gradient(passes, b)
        passes.optimizer.clear()
        wanted = plain(model, b, CUDA, 0.01)
        assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)
        for x, y in zip(grads, passes.optimizer.gradients(), strict=True):
            assert ((x - y).norm() / y.norm()).item() < 0.02


def test_memory_is_that_of_the_largest_not_of_all(model):  # noqa: F811
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_reserved()  # what this process held before
    passes = passes_of(model)
    sizes = [(2000, 1000), (1500, 1400), (900, 800), (700, 300), (3000, 500)]
    gradient(passes, batch(*sizes[0]))
    gradient(passes, batch(*sizes[-1]))
    torch.cuda.empty_cache()
    one = torch.cuda.memory_reserved() - others
    for i, lengths in enumerate(sizes * 2):
        gradient(passes, batch(*lengths, seed=i))
    assert len(passes.recordings) >= len(sizes)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - others < 1.15 * one
    passes.clear()
    assert torch.cuda.memory_reserved() - others < 0.9 * one


@pytest.mark.parametrize("joined", [True, False])
def test_out_of_memory_while_recording_leaves_nothing_broken(model, monkeypatch, joined):  # noqa: F811
    """With copies to main memory under way; and with a capture that cannot end."""
    passes, b = passes_of(model, "recompute", offload=True), batch(300, 200)
    wanted, before = gradient(passes, b), len(replay.BROKEN)
    full = []

    def no_room(*args, **how):
        if torch.cuda.is_current_stream_capturing() and not full:
            full.append(1)
            raise torch.OutOfMemoryError("no room")
        return linear_cross_entropy(*args, **how)

    monkeypatch.setattr(replay, "linear_cross_entropy", no_room)
    with monkeypatch.context() as patch:
        if not joined:
            patch.setattr(Passes, "_join", lambda self: None)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            gradient(passes, b)
    assert len(replay.BROKEN) == before + (not joined)
    passes.relieve()
    gc.collect()
    torch.randn(8, device=CUDA)
    for _ in range(3):
        loss, _ = gradient(passes, b)
        assert loss.item() == pytest.approx(wanted[0].item(), rel=1e-3)
    assert all(r.graph is not None for r in passes.recordings.values())
    gc.collect()
    torch.randn(8, device=CUDA)
    replay.BROKEN.clear() if joined else None


def test_long_passes_run_unrecorded(model):  # noqa: F811
    passes = passes_of(model, "checkpoint")
    gradient(passes, batch(RECORDED + 1))
    assert not passes.recordings
