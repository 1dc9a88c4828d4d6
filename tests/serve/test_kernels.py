"""The engine's GPU path as far as a CPU can run it: the kernels in Triton's interpreter, a recorded pass without the recording."""

import random
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tests.models.test_paged import decoder
from tests.serve.conftest import Answers
from tests.serve.fake import Words
from tests.serve.test_engine import alone, ids, prompts

from tunesmith import adapters, models
from tunesmith.errors import AdapterError
from tunesmith.models.lean import Lean
from tunesmith.models.paged import Part, Pass, Pool, RecordedPass
from tunesmith.ops import attention, backend, paged
from tunesmith.serve.engine import Engine, Graphs, Limits


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_step_in_kernels_is_the_step_in_plain_torch(family):
    """After prompts of 5, 21 and 40 tokens one token each: by kernels, and at the places of a recorded pass, padded to four."""
    model = decoder(family, num_hidden_layers=1)
    lean = Lean(model)
    tokens, lengths = torch.arange(66) % 90, (5, 21, 40)
    newest = torch.tensor([7, 8, 9])
    results = {}
    for mode in ("reference", "triton"):
        pool = Pool(model.spec, 12, torch.float32, "cpu")
        pool.keys.fill_(float("nan"))
        pool.values.fill_(float("nan"))
        blocks = [pool.blocks.take(-(-(n + 1) // 16)) for n in lengths]
        with backend.use("reference"), torch.no_grad():
            lean.hidden(tokens, Pass(pool, [Part(n, 0, b, n) for n, b in zip(lengths, blocks, strict=True)]))
        with backend.use(mode), torch.no_grad():
            step = Pass(pool, [Part(1, n, b, n + 1) for n, b in zip(lengths, blocks, strict=True)])
            results[mode] = lean.hidden(newest, step)
            if mode == "triton":
                where = RecordedPass(pool, 4, 8, 2)
                where.positions_T.copy_(torch.tensor([*lengths, 0]))
                where.lengths_N.copy_(torch.tensor([*(n + 1 for n in lengths), 1]))
                for row, mine in zip(where.tables_NM, blocks, strict=False):
                    row[: len(mine)] = torch.tensor(mine)
                where.find()
                results["recorded"] = lean.hidden(torch.cat([newest, newest[:1]]), where)
    wanted = results["reference"]
    assert (results["triton"] - wanted).abs().max() < 2e-4 * wanted.abs().max()
    assert (results["recorded"][:3] - wanted).abs().max() < 2e-4 * wanted.abs().max()
    assert results["recorded"][3].isfinite().all(), "a place without a sequence computes numbers, not nan"


class Played(Graphs):
    """Recorded steps on a CPU: a replay runs what would have been recorded, at the same places."""

    replays = prompt_replays = captures = 0
    TOKENS = (8, 16, 48, 80)

    def _prompts_too(self):
        return True

    def _capture(self, body, prompts=False):
        logits = body()
        self.captures += 1

        def replay():
            self.replays += not prompts
            self.prompt_replays += prompts
            logits.copy_(body())

        return SimpleNamespace(replay=replay), logits


@pytest.fixture
def plain_kernels(monkeypatch):
    """What a recording calls, in plain torch."""

    def decode(q, keys, values, tables, lengths, scale, window, softcap, splits):
        return paged.reference(q, keys, values, tables, lengths, scale, window, softcap)

    def varlen(q, k, v, ends, ends_k, longest, longest_k, scale, window):
        assert ends is ends_k and longest == len(q) == ends[-1]
        out = torch.full_like(q, float("nan"))
        for start, end in pairwise(ends.tolist()):
            if end > start:
                own = slice(start, end)
                out[own] = attention.attention(q[own], k[own], v[own], attention.Layout.of([end - start]), scale, window)
        return out

    monkeypatch.setattr(paged, "decode", decode)
    monkeypatch.setattr("tunesmith.models.paged.varlen", varlen)


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_recorded_steps_serve_any_sequences(answers, place, plain_kernels, ahead):
    """40 ragged requests for the base and two adapters come and go, every step at recorded places: the answers of each alone."""

    names = ["", "plain", "wide"]
    wanted, rng = [], random.Random(4)
    asked = [(p, rng.choice(names), rng.randrange(1, 20)) for p in prompts(40, seed=6, longest=60)]
    for name in names:
        model = models.load(place.model)
        if name:
            adapters.load(model, place.adapters[name])
        wanted.append({i: alone(model.eval(), p, n) for i, (p, m, n) in enumerate(asked) if m == name})
    engine = answers.engine(ahead=ahead, batch=10, piece=48)
    engine._graphs = Played(engine)
    for name in names[1:]:
        engine.load(name, place.adapters[name])
    engine._warm()
    assert len(engine._graphs.found) == 2 * 5  # sizes 1, 2, 4, 8, 12; without and with adapters
    assert len(engine._graphs.found_prompts) == 2 * 3
    records = []
    while len(records) < len(asked) or engine.state()["running"]:
        for p, name, n in asked[len(records) : len(records) + rng.randrange(4)]:
            records.append(answers.ask(engine, p, model=name, max_tokens=n))
        engine.step()
    answers.run(engine)
    assert engine._graphs.replays > 40 and engine._graphs.prompt_replays > 10
    assert {i: ids(r) for i, r in enumerate(records)} == wanted[0] | wanted[1] | wanted[2]


def test_steps_are_recorded_when_adapters_have_changed_and_not_before(answers, place, plain_kernels):
    """Each adapter at the start recorded all steps, and so did one that was refused, while everybody waited."""
    engine = answers.engine(batch=2)
    engine._graphs = Played(engine)
    for name in ("plain", "wide"):
        engine.load(name, place.adapters[name])
    assert engine._graphs.captures == 0
    with engine:
        engine.call(lambda: None)
        assert engine._graphs.captures == 2 * (2 + 2)  # sizes 1, 2, prompts of 8 and 16 tokens; without and with adapters
        with pytest.raises(AdapterError):
            engine.load("bad", place.model)
        with pytest.raises(AdapterError):
            engine.drop("none")
        assert engine._graphs.captures == 2 * 4
        record = answers.ask(engine, "hello", model="wide", max_tokens=5)
        while record.reason is None:
            time.sleep(0.01)
        engine.drop("plain")
        assert engine._graphs.captures == 4 * 4
    model = models.load(place.model)
    adapters.load(model, place.adapters["wide"])
    assert ids(record) == alone(model.eval(), list(b"hello"), 5)


def test_a_recording_that_fails_is_told_and_done_without(answers, capsys):
    class Broken(Graphs):
        def _capture(self, body, prompts=False):
            raise RuntimeError("operation not permitted when stream is capturing")

    engine = answers.engine()
    engine._graphs = Broken(engine)
    with engine:
        record = answers.ask(engine, "hello", max_tokens=3)
        while record.reason is None:
            time.sleep(0.01)
    assert (
        record.reason == "length" and "not recorded: RuntimeError" in engine.notes[-1] and "not recorded" in capsys.readouterr().err
    )


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_answer_as_plain_ones_do(family, dtype):
    """On a GPU: 24 ragged prompts, with CUDA graphs a step ahead, and eagerly; the same tokens in float32, nearly in bf16."""
    from tests.serve.test_engine import ids, prompts

    found = {}
    for graphs in (False, True):
        model = decoder(family).to("cuda", dtype)
        engine = Engine(model, limits=Limits(batch=16, piece=32, prompts=64, cache=1 << 24, graphs=graphs), ahead=graphs)
        assert (engine._graphs is not None) == graphs
        asking = Answers.__new__(Answers)
        asking.words = Words()
        records = [asking.ask(engine, [t % 90 for t in p], max_tokens=40) for p in prompts(24, seed=2)]
        engine._warm()
        Answers.run(engine)
        found[graphs] = [ids(r) for r in records]
    same = sum(a == b for a, b in zip(found[False], found[True], strict=True))
    assert same == 24 if dtype == torch.float32 else same >= 12, same


@pytest.mark.gpu
def test_adapters_share_recorded_steps(place):
    """On a GPU: the base and two adapters in the same graphs, each as it answers eagerly."""
    from tests.serve.test_engine import ids, prompts

    from tunesmith import models

    found = {}
    for graphs in (False, True):
        asking = Answers(place)
        model = models.load(place.model, device="cuda")
        engine = Engine(model, base="base", limits=Limits(batch=16, cache=1 << 24, graphs=graphs), ahead=graphs)
        for name in ("plain", "wide"):
            engine.load(name, place.adapters[name])
        engine._warm()
        records = [asking.ask(engine, p, model=m) for p in prompts(4, seed=3) for m in ("base", "plain", "wide")]
        Answers.run(engine)
        found[graphs] = [ids(r) for r in records]
    assert found[False] == found[True]
