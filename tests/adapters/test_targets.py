"""What is adapted: names, patterns, near names, and every fault at once."""

import pytest
import torch
from torch import nn

from tunesmith import adapters
from tunesmith.adapters.targets import layer_of, matches, of_pattern, short_names
from tunesmith.config import schema
from tunesmith.errors import AdapterError
from tunesmith.models.linear import Linear


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, 8)
        names = ("q_proj", "k_proj", "up_proj")
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({n: Linear(8, 8) for n in names} | {"norm": nn.LayerNorm(8)}) for _ in range(3)
        )
        self.lm_head = Linear(8, 11)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def chosen(targets, **lora):
    model = Model()
    adapters.attach(model, schema.Lora(targets=targets, rank=2, **lora), seed=0)
    return [name.removeprefix("model.layers.") for name in adapters.twins(model)]


def test_all_linear_is_every_linear_but_the_projection():
    assert len(chosen("all-linear")) == 9
    assert "lm_head" not in chosen("all-linear")


def test_names_and_patterns():
    assert chosen(("q_proj",)) == ["0.q_proj", "1.q_proj", "2.q_proj"]
    assert chosen(("1.q_proj", "lm_head")) == ["1.q_proj", "lm_head"]
    assert chosen(("model.layers.2.k_proj",)) == ["2.k_proj"]
    assert chosen((r"/.*\.[02]\.(q|k)_proj/",)) == ["0.q_proj", "0.k_proj", "2.q_proj", "2.k_proj"]
    assert chosen((r"/.*1\.q_proj/", "up_proj")) == ["0.up_proj", "1.q_proj", "1.up_proj", "2.up_proj"]


def test_every_wrong_target_is_named_with_the_nearest():
    with pytest.raises(AdapterError) as e:
        chosen(("q_prj", "embed_tokens", "q_proj", r"/nothing.*/"))
    text = str(e.value)
    assert "'q_prj' matches no linear; did you mean 'q_proj'?" in text
    assert "'embed_tokens' is model.embed_tokens, which is no linear" in text
    assert "'/nothing.*/' matches no linear" in text
    assert "k_proj, lm_head, q_proj, up_proj" in text


def test_every_wrong_module_to_save_is_named():
    with pytest.raises(AdapterError) as e:
        chosen("all-linear", modules_to_save=("lm_hed", "nrm"))
    assert "'lm_hed'; did you mean 'lm_head'?" in str(e.value)
    assert "'nrm'; did you mean 'norm'?" in str(e.value)


def test_what_cannot_be_trained_whole_is_refused_by_name():
    """A module that the model reaches into is never called; one without weights trains nothing; one in another would be twice."""
    model = Model()
    model.model.layers[0]["drop"] = nn.Dropout()
    wrong = ("model", "layers", "drop", "layers.0", "layers.0.q_proj")
    with pytest.raises(AdapterError) as e:
        adapters.attach(model, schema.Lora(modules_to_save=wrong[:3]), seed=0)
    for part in ("'model' holds the layers themselves", "'model.layers' holds the layers", "'model.layers.0.drop' has no weights"):
        assert part in e.value.what
    with pytest.raises(AdapterError, match=r"'model.layers.0.q_proj' lies in 'model.layers.0'"):
        adapters.attach(model, schema.Lora(modules_to_save=wrong[3:]), seed=0)
    assert not adapters.twins(model)


def test_a_new_token_named_twice_is_refused():
    with pytest.raises(AdapterError, match="'<a>' twice"):
        adapters.attach(Model(), schema.Lora(new_tokens=("<a>", "<a>")), seed=0, new_tokens={3: None})


def test_a_module_that_peft_would_read_more_widely_is_refused():
    """PEFT matches the end of a name without a dot: a top module `norm` would be every `input_layernorm` too."""
    model = Model()
    model.norm, model.prenorm = nn.LayerNorm(8), nn.LayerNorm(8)
    with pytest.raises(AdapterError, match=r"PEFT would read 'norm' as 'prenorm' too"):
        adapters.attach(model, schema.Lora(modules_to_save=("norm",)), seed=0)


def test_a_module_trained_whole_is_not_adapted_too():
    names = chosen("all-linear", modules_to_save=("up_proj",))
    model = Model()
    adapters.attach(model, schema.Lora(rank=2, modules_to_save=("up_proj",)), seed=0)
    assert len(names) == 9
    assert [type(t).__name__ for n, t in adapters.twins(model).items() if n.endswith("up_proj")] == ["Saved"] * 3


def test_a_model_without_linears():
    with pytest.raises(AdapterError, match="no linear to adapt"):
        adapters.attach(nn.Sequential(nn.LayerNorm(4)), schema.Lora(), seed=0)


def test_a_second_adapter_is_refused():
    model = Model()
    adapters.attach(model, schema.Lora(), seed=0)
    with pytest.raises(AdapterError, match="already has an adapter"):
        adapters.attach(model, schema.Lora(), seed=0)


def test_short_names_are_used_only_where_they_mean_the_same():
    names = ["a.0.q", "a.1.q", "a.0.k", "a.1.k"]
    assert short_names(["a.0.q", "a.1.q"], names) == ["q"]
    assert short_names(["a.0.q"], names) == ["a.0.q"]


def test_matching_rules():
    assert matches("q", "a.q")
    assert not matches("q", "a.xq")
    assert matches("/a.*/", "a.q")
    assert not matches("/a/", "a.q")
    assert of_pattern({"q": 1, "a.q": 2}, "m.a.q", 0) == 1
    assert of_pattern({"b.q": 1}, "m.a.q", 0) == 0
    assert layer_of("model.layers.3.mlp.experts.0.up") == 3
    assert layer_of("model.layers.3.mlp.experts.0.up", ["experts"]) == 0
    assert layer_of("lm_head") is None


class Words:
    def __init__(self, known):
        self.known = known

    def token_to_id(self, token):
        return self.known.get(token)

    def encode(self, text):
        return [ord(c) % 11 for c in text]


def test_new_tokens_start_from_their_pieces():
    before, after = Words({"old": 4}), Words({"old": 4, "ab": 11})
    starts = adapters.token_starts(("ab", "old"), after, before)
    assert starts == {11: [97 % 11, 98 % 11], 4: None}
    with pytest.raises(AdapterError, match="the tokenizer lacks 'zz'"):
        adapters.token_starts(("zz",), after, before)
    for tied in (False, True):
        model = Model(tied)
        model.config = {"vocab_size": 11}
        old = model.lm_head.weight.detach().clone()
        adapters.attach(model, schema.Lora(rank=2, new_tokens=("ab", "old")), seed=0, new_tokens=starts)
        head = model.lm_head.weight
        assert head.shape == (12, 8) and model.config["vocab_size"] == 12
        torch.testing.assert_close(head[11], old[[97 % 11, 98 % 11]].mean(0))
        assert torch.equal(head[:11], old)
        assert sum("token_adapter" in n for n in adapters.trainable(model)) == 1 + (not tied)


def test_new_tokens_and_a_whole_embedding_exclude_each_other():
    with pytest.raises(AdapterError, match=r"both train model\.embed_tokens"):
        lora = schema.Lora(rank=2, new_tokens=("a",), modules_to_save=("embed_tokens",))
        adapters.attach(Model(), lora, seed=0, new_tokens={11: None})
    with pytest.raises(AdapterError, match="holds 1 tokens, 0 ids"):
        adapters.attach(Model(), schema.Lora(new_tokens=("a",)), seed=0)
