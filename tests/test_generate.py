"""generate.py: who ends when, what a draw depends on, what is refused."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.models.decoder import Decoder
from tunesmith.spec import Rope, Spec

module = importlib.import_module("tunesmith.generate")  # `tunesmith.generate` is the verb
Sampling, choose, context, generate, stream = (getattr(module, n) for n in ("Sampling", "choose", "context", "generate", "stream"))
SPEC = Spec(vocab=61, dim=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, context=40, norm_eps=1e-5)
WARM = Sampling(temperature=1.5, top_k=30, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    decoder = Decoder(SPEC, dtype=torch.float64)
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(std=0.3)
    return decoder


PROMPTS = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9, 10], [11, 12], [3, 1]]


def ask(model, prompts, **how):
    return generate(model, prompts, **{"stop_ids": [], "max_tokens": 10} | how)


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_an_answer_does_not_depend_on_its_neighbours(model, sampling):
    whole = ask(model, PROMPTS, sampling=sampling)
    for batch in (1, 2, 3):
        assert ask(model, PROMPTS, sampling=sampling, batch=batch) == whole
    others = [[20 + i] * (i + 1) for i in range(len(PROMPTS))]
    for i, prompt in enumerate(PROMPTS):
        assert ask(model, [*others[:i], prompt, *others[i + 1 :]], sampling=sampling)[i] == whole[i]
    stops = [whole[1][3]]  # some leave early; the rest go on as before
    cut = [w[: w.index(stops[0])] if stops[0] in w else w for w in whole]
    assert len({len(w) for w in cut}) > 1
    assert ask(model, PROMPTS, sampling=sampling, stop_ids=stops) == cut


def test_as_many_are_answered_together_as_a_gpu_has_room_for(monkeypatch):
    assert module.together(SimpleNamespace(device=torch.device("cpu"), spec=SPEC), 100) == 8
    weight = SimpleNamespace(weight=torch.zeros(1, dtype=torch.bfloat16))
    card = SimpleNamespace(device=torch.device("cuda"), spec=SPEC, model=SimpleNamespace(norm=weight))
    each = 100 * (2 * 2 * 2 * 8 * 2 + (3 * 48 + 4 * 32) * 2) + 61 * 6
    for free, many in ((20 * each, 10), (20 * each - 2, 9), (each, 1), (1 << 40, 256)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert module.together(card, 100) == many
    assert module.together(SimpleNamespace(device=torch.device("cuda"), spec=None), 100) == module.BATCH


def test_draws_repeat_and_differ_by_seed_and_prompt(model):
    first = ask(model, [[1, 2]] * 4, sampling=WARM)
    assert ask(model, [[1, 2]] * 4, sampling=WARM) == first
    assert len({tuple(a) for a in first}) == 4
    assert ask(model, [[1, 2]] * 4, sampling=Sampling(1.5, 30, 0.95, seed=8)) != first
    state = torch.get_rng_state()
    ask(model, [[1, 2]], sampling=WARM)
    assert torch.equal(state, torch.get_rng_state())  # a sample during training moves no draw of the training


def test_draws_follow_their_distribution():
    """4,000 draws; each frequency within four standard errors of its probability."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    picked = choose(p.log().repeat(4000, 1), Sampling(1.0), [generator] * 4000)
    found = torch.bincount(torch.tensor(picked), minlength=4) / 4000
    assert ((found - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()


def test_the_answer_ends_where_the_context_does(model):
    prompts = [[1] * 38, [2] * 5]
    answers = ask(model, prompts, max_tokens=1000)
    assert [len(a) for a in answers] == [2, 35]
    assert ask(model, prompts[1:], max_tokens=12)[0] == answers[1][:12]


def test_prompts_without_room_are_named_at_once_before_any_token(model):
    with pytest.raises(DataError) as e:
        next(stream(model, [[1], [], [2] * 40, [3] * 99], stop_ids=[], max_tokens=5))
    assert e.value.what.splitlines() == [
        "prompt 2 has no token",
        "prompt 3 has 40 tokens, and the model's context holds 40 with the answer",
        "prompt 4 has 99 tokens, and the model's context holds 40 with the answer",
    ]
    assert e.value.fix
    assert ask(model, [], max_tokens=5) == [] and ask(model, [[1]], max_tokens=0) == [[]]


@pytest.mark.parametrize("rope, tokens", [
    (Rope(), 40),
    (Rope(kind="linear", scaling=(("factor", 4.0),)), 40),
    (Rope(kind="dynamic", scaling=(("factor", 2.0),)), 80),
    (Rope(kind="yarn", scaling=(("original_max_position_embeddings", 32), ("factor", 4.0))), 128),
    (Rope(kind="yarn", scaling=(("original_max_position_embeddings", 10), ("factor", 4.0))), 40),
    (Rope(kind="yarn", scaling=(("original_max_position_embeddings", 10), ("factor", None))), 40),
])  # fmt: skip
def test_the_context_counts_what_the_rotary_table_stretches(rope, tokens):
    class Model:
        spec = Spec(**{f: getattr(SPEC, f) for f in Spec.__dataclass_fields__} | {"rope": rope})

    assert context(Model()) == tokens


def test_training_mode_comes_back_even_from_a_stream_left_early(model):
    model.train()
    pieces = stream(model, PROMPTS, stop_ids=[], max_tokens=5)
    next(pieces)
    assert not model.training
    pieces.close()
    assert model.training
    model.eval()


def test_nothing_of_a_sample_is_kept_for_autograd(model):
    ask(model, [[1, 2, 3]])
    model.train()
    model(torch.tensor([1, 2, 3])).sum().backward()  # tables cached while sampling must serve here
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_nan_is_no_answer(sampling):
    with pytest.raises(ModelError, match="nan"):
        choose(torch.tensor([[0.0, float("nan"), 1.0]]), sampling, [torch.Generator()])


def test_every_impossible_setting_is_named_at_once():
    with pytest.raises(ConfigError) as e:
        Sampling(temperature=-1, top_k=-2, top_p=0)
    assert [line.split()[0] for line in e.value.what.splitlines()] == ["temperature", "top_k", "top_p"]
