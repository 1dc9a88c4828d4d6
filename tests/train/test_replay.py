"""Recorded passes: what fills a room up changes neither loss nor gradient. Real recordings are tested on a GPU (tests/gpu)."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tunesmith import adapters
from tunesmith.config.schema import Lora, Train
from tunesmith.data.pack import collate
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import FastLayers, policies
from tunesmith.spec import Rope, Spec
from tunesmith.train import replay
from tunesmith.train.optim import Optimizer
from tunesmith.train.replay import UNIT, Passes, Room, plain
from tunesmith.types import Example, Origin

SPEC = dict(vocab=64, dim=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, context=512, norm_eps=1e-5)
CPU = torch.device("cpu")


def decoder(level="keep", flat=True, lora=None, **spec):
    torch.manual_seed(0)
    model = Decoder(Spec(**SPEC | spec)).requires_grad_(False)
    adapters.attach(model, Lora(rank=4, **lora or {}), seed=0)
    trained = adapters.trainable(model)
    for name, p in trained.items():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    model.train()
    model.fast = FastLayers(model, policies(SPEC["layers"], level))
    return model, Passes(model, Optimizer(trained, Train(), flat=flat), CPU)


def batch(*lengths, seed=0, learn=0.5):
    """Documents whose last token is learned, so that nothing is left out but that."""
    rng = np.random.default_rng(seed)
    examples = []
    for n in lengths:
        trained = rng.random(n + 1) < learn
        trained[0], trained[-1] = False, True
        examples.append(Example(rng.integers(0, SPEC["vocab"], n + 1).astype(np.int32), trained, Origin("a", 1)))
    return collate(examples)


CASES = [(7,), (127,), (128,), (5, 9, 2), (60, 60, 60), (1, 1), (1, 126), (200, 3), tuple(range(1, 24))]


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("level", ["keep", "checkpoint"])
def test_filled_up_it_has_the_loss_and_the_gradient_of_the_definition(lengths, level):
    (one, passes), (two, _) = decoder(level), decoder(level, flat=False)
    these = batch(*lengths)
    assert passes.obstacle(these, Room.of(these)) == ""
    loss, wanted = passes(these, 0.3), plain(two, these, CPU, 0.3)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    for (name, a), b in zip(adapters.trainable(one).items(), adapters.trainable(two).values(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max()), name
    passes(these, 0.3)  # adds up
    for a, b in zip(adapters.trainable(one).values(), adapters.trainable(two).values(), strict=True):
        assert torch.allclose(a.grad, 2 * b.grad, rtol=1e-4, atol=2e-6 * b.grad.abs().max())


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_without_an_adapter_passes_its_gradient_on(layer):
    lora = {"targets": (f"/.*layers\\.{layer}\\..*q_proj/",)}
    (one, passes), (two, _) = decoder(lora=lora), decoder(flat=False, lora=lora)
    these = batch(5, 9, 2)
    assert passes.obstacle(these, Room.of(these)) == ""
    passes(these, 0.3), plain(two, these, CPU, 0.3)
    for a, b in zip(adapters.trainable(one).values(), adapters.trainable(two).values(), strict=True):
        assert b.grad.any() and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max())


def test_a_last_norm_that_is_trained_has_its_gradient():
    lora = {"modules_to_save": ("norm",)}
    (one, passes), (two, _) = decoder(lora=lora), decoder(flat=False, lora=lora)
    these = batch(5, 9, 2)
    assert "norm" in passes.obstacle(these, Room.of(these))
    passes(these, 0.3), plain(two, these, CPU, 0.3)
    for (name, a), b in zip(adapters.trainable(one).items(), adapters.trainable(two).values(), strict=True):
        assert b.grad.any() and torch.equal(a.grad, b.grad), name


def test_a_room_is_shared_by_what_fits_it_and_each_micro_batch_is_its_own():
    _, passes = decoder()
    seen = [passes(batch(*lengths, seed=i), 1.0).item() for i, lengths in enumerate([(60, 30), (30, 20, 50), (10, 90)])]
    assert len(passes.recordings) == 1
    _, fresh = decoder()
    assert seen[2] == fresh(batch(10, 90, seed=2), 1.0).item()


@pytest.mark.parametrize("lengths", CASES)
def test_what_a_room_holds(lengths):
    these = batch(*lengths)
    room, n = Room.of(these), len(these.tokens)
    tokens, positions, rows, labels, bounds = np.split(
        room.filled(these), np.cumsum([room.tokens, room.tokens, room.rows, room.rows])
    )
    assert np.array_equal(tokens[:n], these.tokens) and np.array_equal(positions[:n], these.positions)
    assert np.array_equal(rows[: len(these.rows)], these.rows) and np.array_equal(labels[: len(these.rows)], these.labels)
    assert (labels[len(these.rows) :] == -100).all() and not set(rows[len(these.rows) :]) & set(these.rows)
    assert len(bounds) == room.documents + 1 and bounds[0] == 0 and (np.diff(bounds) >= 0).all() and bounds[-1] == room.tokens
    assert np.diff(bounds).max() <= room.longest and tuple(np.diff(bounds)[: len(lengths)]) == room.lengths_of(these)
    inside = np.concatenate([np.arange(k) for k in room.lengths_of(these)])
    assert np.array_equal(positions, inside)
    if len(set(lengths)) == 1 and len(lengths) > 1:
        assert room.lengths == lengths and room.tokens == n
    else:
        assert room.tokens % UNIT == 0 and room.rows % UNIT == 0 and n <= room.tokens <= n + UNIT
        assert len(these.rows) <= room.rows


def test_few_rooms_serve_full_micro_batches():
    rooms = {Room.of(batch(*[n // 8] * 7, n - n // 8 * 7 + 1, seed=n)) for n in range(7600, 8190, 7)}
    assert len(rooms) <= 12
    assert all(room.tokens <= 8192 for room in rooms)


def test_what_cannot_be_recorded_says_why_and_is_the_definition():
    long = Rope(theta=1e4, kind="longrope", scaling=(("short_factor", (1.0,) * 4), ("long_factor", (2.0,) * 4),
                ("original_max_position_embeddings", 100), ("factor", 4.0), ("attention_factor", None)))  # fmt: skip
    (one, passes), (two, _) = decoder(rope=long), decoder(rope=long, flat=False)
    near, far, both = batch(20, 30), batch(110), batch(90, 120)
    assert passes.obstacle(near, Room.of(near)) != ""  # its last document would become a long one
    assert passes.obstacle(far, Room.of(far)) == ""
    assert "several kinds" in passes.obstacle(both, Room.of(both))
    assert passes(both, 1.0).item() == plain(two, both, CPU, 1.0).item() and not passes.recordings
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(adapters.trainable(one).values(), adapters.trainable(two).values(),
                                                           strict=True))  # fmt: skip
    (_, passes), alike = decoder(rope=Rope(theta=1e4, kind="dynamic", scaling=(("factor", 2.0),)), context=64), batch(100, 100)
    assert (
        "its length alone" in passes.obstacle(alike, Room.of(alike))
        and passes.obstacle(batch(40, 40), Room.of(batch(40, 40))) == ""
    )
    _, passes = decoder(flat=False)
    assert "float32 on an NVIDIA GPU" in passes.obstacle(near, Room.of(near))
    model, passes = decoder()
    assert "noise" in passes.obstacle(near, Room.of(near), lambda x: x)
    model.lm_head.weight.requires_grad_(True)
    assert "head" in passes.obstacle(near, Room.of(near))
    model.fast = None
    assert "half-blocks" in passes.obstacle(near, Room.of(near))


def test_another_policy_or_adapter_state_records_anew():
    model, passes = decoder()
    passes(batch(60, 30), 1.0)
    (first,) = passes.recordings.values()
    passes(batch(60, 30), 1.0)
    assert list(passes.recordings.values()) == [first]
    assert model.leaner() == "recompute"
    passes(batch(60, 30), 1.0)
    assert list(passes.recordings.values()) != [first]


class Graph:
    """Stands for a CUDA graph whose capture ends badly, as it does where copies to main memory are under way."""

    def capture_begin(self, **_): ...

    def capture_end(self):
        raise RuntimeError("unjoined work")


@pytest.mark.parametrize(("error", "raised"), [(torch.OutOfMemoryError, torch.OutOfMemoryError), (RuntimeError, None)])
def test_a_capture_that_fails_is_told_from_one_without_memory(monkeypatch, error, raised):
    _, passes = decoder()
    passes(batch(60, 30), 1.0)
    (recording,) = passes.recordings.values()
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(replay.Passes, "_roomy", lambda self: True)
    monkeypatch.setattr(recording, "body", lambda *a: (_ for _ in ()).throw(error("made by a test")))
    renewed, kept = [], []
    monkeypatch.setattr(Passes, "_join", lambda self: None)
    monkeypatch.setattr(Passes, "_renew_generator", lambda self: renewed.append(1))
    monkeypatch.setattr(replay, "BROKEN", kept)
    passes.device, said = torch.device("cuda"), []
    passes.tell = lambda *what, **why: said.append(what)
    if raised:
        with pytest.raises(raised, match="made by a test"):
            passes._captured(recording)
        assert passes.record and not said
    else:
        assert not passes._captured(recording)
        assert not passes.record and said and not passes.recordings and passes.pool is None
    assert renewed and len(kept) == 1, "its end would end the process, and the generator stays in the capture"


@pytest.mark.parametrize(("free", "records"), [(1200, True), (1000, False)])
def test_nothing_is_recorded_where_a_pass_would_not_fit_once_more(monkeypatch, free, records):
    """Reserved 1,000 MiB now and 2,000 at most: a recording wants the thousand between, and 128 of its own."""
    _, passes = decoder()
    passes(batch(60, 30), 1.0)
    for name, value in {"synchronize": None, "empty_cache": None, "mem_get_info": (free << 20, 80000 << 20),
                        "memory_reserved": 1000 << 20, "max_memory_reserved": 2000 << 20,
                        "get_per_process_memory_fraction": 1.0}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value, raising=False)
    assert passes._roomy() == records
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 2050 / 80000, raising=False)
    assert not passes._roomy(), "a cap on the process counts too"
    (recording,) = passes.recordings.values()
    passes.device, said = torch.device("cuda"), []
    passes.tell = lambda *what, **why: said.append(why["why"])
    assert not passes._captured(recording) and passes.paused and said == ["the device has no room for it"]


def test_of_too_many_shapes_the_one_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr(replay, "MOST_KEPT", 2)
    _, passes = decoder()
    near, far, other = batch(60, 30), batch(100, 90), batch(250, 90)
    for these in (near, far, near, other):
        passes(these, 1.0)
    assert {room for room, _ in passes.recordings} == {Room.of(near), Room.of(other)}
