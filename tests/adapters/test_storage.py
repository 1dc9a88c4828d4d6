"""Adapter files: the same bytes each time, whole or absent, and refused with every reason at once."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith import adapters
from tunesmith.config import schema
from tunesmith.errors import AdapterError
from tunesmith.models.linear import Linear


def model():
    torch.manual_seed(0)
    made = nn.Module()
    made.embed_tokens = nn.Embedding(11, 8)
    made.layers = nn.ModuleList(nn.ModuleDict({n: Linear(8, 8) for n in ("q_proj", "v_proj")}) for _ in range(2))
    made.lm_head = Linear(8, 11)
    return made


def trained(**lora):
    made = model()
    adapters.attach(made, schema.Lora(**{"rank": 2, **lora}), seed=0)
    with torch.no_grad():
        for p in adapters.trainable(made).values():
            p.normal_()
    return made


def same(a, b):
    a, b = adapters.named(a), adapters.named(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def folder(tmp_path):
    adapters.save(trained(), tmp_path / "a", base_name="owner/name", revision="abc")
    return tmp_path / "a"


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_same_adapter_gives_the_same_bytes(folder, tmp_path):
    adapters.save(trained(), tmp_path / "b", base_name="owner/name", revision="abc")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_config_holds_what_readers_ask_for(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 3, "0.q_proj": 1}, "alpha_pattern": {"v_proj": 4}}
    made = trained(alpha=3.5, variant="rslora", targets=("v_proj", "q_proj"), dropout=0.1, modules_to_save=("lm_head",), **patterns)
    adapters.save(made, tmp_path, base_name="owner/name", revision="abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/name", "revision": "abc", "r": 2,
        "lora_alpha": 3.5, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"],
        "trainable_token_indices": None, "rank_pattern": {"v_proj": 3, "0.q_proj": 1}, "alpha_pattern": {"v_proj": 4},
        "use_rslora": True, "use_dora": False, "fan_in_fan_out": False, "bias": "none", "inference_mode": True,
        "init_lora_weights": True}  # fmt: skip
    assert list(config["rank_pattern"]) == ["v_proj", "0.q_proj"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.layers.0.v_proj.lora_A.weight"].shape == (3, 8)
    assert "base_model.model.lm_head.weight" in tensors


@pytest.mark.parametrize("lora", [{}, {"variant": "rslora"}, {"variant": "dora"}, {"rank_pattern": {"0.q_proj": 5}},
                                  {"modules_to_save": ("lm_head",)}, {"targets": ("layers.1.q_proj",)}], ids=str)  # fmt: skip
def test_round_trip(lora, tmp_path):
    made, again = trained(**lora), model()
    adapters.save(made, tmp_path, base_name="x")
    settings = adapters.load(again, tmp_path)
    assert same(made, again)
    assert [t.scale for t in adapters.twins(made).values() if hasattr(t, "scale")] == [
        t.scale for t in adapters.twins(again).values() if hasattr(t, "scale")
    ]
    assert settings.variant == lora.get("variant", "lora")
    assert not any(p.requires_grad for p in again.parameters())
    again = model()
    adapters.load(again, tmp_path, trainable=True)
    assert adapters.trainable(again).keys() == adapters.trainable(made).keys()


def test_going_on_from_an_adapter(tmp_path):
    """Its rank, alpha, targets and variant win over the run's; what the run adds starts from the base."""
    earlier = trained(rank=3, alpha=5.0, variant="rslora", targets=("q_proj",))
    adapters.save(earlier, tmp_path, base_name="x")
    made = model()
    run = schema.Lora(rank=8, dropout=0.2, continue_from=str(tmp_path), modules_to_save=("lm_head",), new_tokens=())
    settings = adapters.attach(made, run, seed=1)
    assert (settings.rank, settings.alpha, settings.variant, settings.dropout) == (3, 5.0, "rslora", 0.2)
    assert set(adapters.twins(made)) == {"layers.0.q_proj", "layers.1.q_proj", "lm_head"}
    for name, p in adapters.named(earlier).items():
        assert torch.equal(p, adapters.trainable(made)[name])
    assert torch.equal(adapters.trainable(made)["base_model.model.lm_head.weight"], model().lm_head.weight)


def test_going_on_from_trained_tokens(tmp_path):
    """PEFT's short form trains the embedding alone, ids in any order: going on trains that again, and needs the tokens' names."""
    made = model()
    adapters.attach(made, schema.Lora(rank=2, new_tokens=("a", "b")), seed=0, new_tokens={9: None, 5: None})
    adapters.save(made, tmp_path, base_name="x")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    rows = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[rows] = tensors[rows][[1, 0]].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, trainable_token_indices=[9, 5])
    go_on = schema.Lora(continue_from=str(tmp_path), new_tokens=("a", "b"))
    again = model()
    settings = adapters.attach(again, go_on, seed=1, new_tokens={5: None, 9: None})
    assert settings.tokens == {"embed_tokens": (9, 5)}
    assert torch.equal(adapters.trainable(again)[rows][0], made.embed_tokens.base.weight[9])
    with pytest.raises(AdapterError, match=r"trains 2 tokens \(ids 5, 9\), lora.new_tokens names none"):
        adapters.attach(model(), schema.Lora(continue_from=str(tmp_path)), seed=1)
    with pytest.raises(AdapterError, match=r"ids 5, 8; the adapter in lora.continue_from trains 5, 9"):
        adapters.attach(model(), go_on, seed=1, new_tokens={5: None, 8: None})


class Wrapper(nn.Module):
    """As a model of another library stands behind the decoder's face: its own names start one level deeper."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    @property
    def checkpoint_root(self):
        return self.inner


def test_a_wrapped_model_has_the_checkpoints_names(folder, tmp_path):
    wrapped, bare = Wrapper(), model()
    adapters.load(wrapped, folder)
    adapters.load(bare, folder)
    assert adapters.named(wrapped).keys() == adapters.named(bare).keys()
    adapters.save(wrapped, tmp_path / "again", base_name="owner/name", revision="abc")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    adapters.merge(wrapped)
    adapters.merge(bare)
    assert wrapped.inner.state_dict().keys() == bare.state_dict().keys()
    assert all(torch.equal(t, bare.state_dict()[n]) for n, t in wrapped.inner.state_dict().items())


def test_every_tensor_that_does_not_fit_is_named(folder):
    path = folder / "adapter_model.safetensors"
    tensors, prefix = load_file(path), "base_model.model.layers."
    del tensors[f"{prefix}0.q_proj.lora_B.weight"]
    tensors[f"{prefix}1.v_proj.lora_A.weight"] = torch.zeros(5, 8)
    tensors[f"{prefix}7.q_proj.lora_A.weight"] = torch.zeros(2, 8)
    save_file(tensors, path)
    with pytest.raises(AdapterError) as e:
        adapters.load(model(), folder)
    text = str(e.value)
    assert "wrong shape: layers.1.v_proj.lora_A.weight: [5, 8] where [2, 8] belongs" in text
    assert "missing: layers.0.q_proj.lora_B.weight" in text
    assert "without a place in this model: layers.7.q_proj.lora_A.weight" in text


def test_every_unsupported_field_is_named(folder):
    rewrite(folder, lora_bias=True, bias="all", use_qalora=True, init_lora_weights="pissa_niter_4", r=0)
    with pytest.raises(AdapterError) as e:
        adapters.load(model(), folder)
    for part in (
        "lora_bias: True is not",
        "bias: 'all' is not",
        "use_qalora",
        "'pissa_niter_4' changed the base's weights",
        "r: 0",
    ):
        assert part in str(e.value)


DAMAGED = {
    "r": [4.5, True, "8", -1], "lora_alpha": [None, "16", 0], "lora_dropout": [1.0, "0"], "target_modules": [3, [3], "("],
    "exclude_modules": [{}], "modules_to_save": ["lm_head", ["("]], "rank_pattern": [{"(": 3}, {"q_proj": "3"}, ["q_proj"]],
    "alpha_pattern": [{"q_proj": 0}], "layers_to_transform": ["1"], "layers_pattern": [["("]],
    "trainable_token_indices": ["abc", [-1], {"embed_tokens": 3}],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in DAMAGED.items() for value in values], ids=str)
def test_a_field_of_another_kind_is_named_not_met_later(folder, key, value):
    rewrite(folder, **{key: value})
    with pytest.raises(AdapterError, match=f"{key}: .*(, not |is no pattern)") as e:
        adapters.load(model(), folder)
    assert e.value.fix


def test_every_damaged_field_is_named_at_once(folder):
    rewrite(folder, **{key: values[0] for key, values in DAMAGED.items()})
    with pytest.raises(AdapterError) as e:
        adapters.load(model(), folder)
    assert sorted(line.split(": ")[1] for line in e.value.what.splitlines()) == sorted(DAMAGED)


def test_numbers_that_are_none_and_tokens_far_away_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: t.to(torch.int32) for name, t in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match=r"no floating-point numbers: layers\.0\.q_proj\.lora_A\.weight: int32"):
        adapters.load(model(), folder)
    rewrite(folder, trainable_token_indices=[10**12])  # rows up to it would be made
    with pytest.raises(AdapterError, match="token 1,000,000,000,000, far past"):
        adapters.load(model(), folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="no JSON"):
        adapters.load(model(), folder)


@pytest.mark.parametrize("field", [{"peft_type": "LOHA"}, {"peft_type": None}, {"use_dora": True, "use_rslora": True}], ids=str)
def test_another_kind_of_adapter_is_refused(folder, field):
    rewrite(folder, **field)
    with pytest.raises(AdapterError, match=next(iter(field))):
        adapters.load(model(), folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(AdapterError, match="is a pickle"):
        adapters.load(model(), folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damage_is_told_as_such(folder, name, damage):
    path = folder / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "noise": b"\xff\xfe" + raw}[damage])
    with pytest.raises(AdapterError):
        adapters.load(model(), folder)


def test_a_model_is_untouched_when_the_files_are_refused(folder):
    rewrite(folder, lora_bias=True)
    made = model()
    with pytest.raises(AdapterError):
        adapters.load(made, folder)
    assert not adapters.twins(made)
    assert all(p.requires_grad for p in made.parameters())
