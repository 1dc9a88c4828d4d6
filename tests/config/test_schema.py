"""The key list is frozen, every key speaks of itself, and a RunConfig survives being written out in full."""

import pytest
from pydantic import ValidationError

from tunesmith.config import explain, schema
from tunesmith.config.load import load
from tunesmith.errors import ConfigError

FOUR = {"model": "embedded", "data": "chats.jsonl", "method": "lora", "output": "runs/a"}

# A ratchet: a new key is a promise to every run file ever written. Add one here only with its reason in the commit.
KEYS = """
model method output seed
data.train data.train[].path data.train[].weight data.train[].columns data.held_out data.template data.train_on data.add_eos
data.max_length data.overlength data.max_refused data.workers
lora.rank lora.alpha lora.dropout lora.targets lora.variant lora.rank_pattern lora.alpha_pattern lora.continue_from
lora.new_tokens lora.modules_to_save
train.epochs train.max_steps train.batch_size train.learning_rate train.schedule train.warmup_ratio train.weight_decay
train.betas train.max_grad_norm train.optimizer train.neftune_alpha train.loraplus_ratio train.deterministic
eval.every_steps eval.samples eval.sample_tokens eval.keep_best eval.early_stop
memory.device memory.budget_gb memory.dtype memory.micro_batch_tokens memory.activations memory.offload memory.compute
memory.kernels
checkpoint.every_steps checkpoint.keep
log.every_steps log.trackers
"""


def test_the_key_list_is_frozen():
    assert sorted(explain.keys()) == sorted(KEYS.split()), f"the keys are now:\n{' '.join(explain.keys())}"


def test_every_key_says_what_it_does_what_goes_wrong_and_its_names_elsewhere():
    for key in explain.keys().values():
        assert key.does.endswith("."), key.name
        assert key.notes["wrong"] or (key.notes["high"] and key.notes["low"]), key.name
        assert all(key.notes[tool] for tool in explain.OTHERS), key.name
        page = explain.explain(key.name)
        assert page.startswith(key.name) and all(tool in page for tool in explain.OTHERS.values())
        assert max(map(len, page.splitlines())) <= 100, page


def test_no_name_elsewhere_means_two_keys_of_ours():
    # Names that other tools use for one thing and we for the same: each must lead somewhere that exists.
    assert set(explain.elsewhere().values()) <= set(explain.keys()) | {"model"}
    assert explain.elsewhere()["lora_r"] == "lora.rank" and explain.elsewhere()["max_seq_length"] == "data.max_length"


def test_explain_a_section_everything_a_foreign_name_and_a_typo():
    assert set(KEYS.split()) == {w for line in explain.explain().splitlines() for w in line.split()[:1]} & set(KEYS.split())
    assert "lora.rank " in explain.explain("lora") and "train.epochs" not in explain.explain("lora")
    assert explain.explain("sequence_len").startswith("sequence_len is data.max_length here.")
    with pytest.raises(ConfigError, match=r"unknown key 'lora\.rnk'\nfix: did you mean 'lora\.rank'\?"):
        explain.explain("lora.rnk")


def test_sections_stay_small():
    for section in explain.sections():
        inside = [k for k in sorted(explain.keys()) if k.rpartition(".")[0] == section]
        assert len(inside) <= 13, f"{section or 'the head'} has {len(inside)} keys"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_config_written_out_in_full_is_still_valid(method):
    config = load(FOUR | {"method": method, "train": {"max_steps": 3}, "data": {"train": "a", "held_out": 0}})
    assert schema.RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_what_cannot_run_is_refused_without_a_file_too():
    with pytest.raises(ValidationError, match=r"memory\.dtype: fp16 is not trained on memory\.device: cpu"):
        schema.RunConfig.model_validate(FOUR | {"memory": {"device": "cpu", "dtype": "fp16"}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", 2e4),  # the commonest slip
        ("train", "epochs", True),  # YAML's true is Python's 1
        ("train", "epochs", float("inf")),
        ("train", "betas", [0.9]),
        ("lora", "targets", []),
        ("lora", "targets", ["/(/"]),
        ("lora", "rank_pattern", {"[": 4}),
        ("lora", "new_tokens", ["\ud800"]),
        ("checkpoint", "keep", 1),
        ("data", "max_length", 4),
    ],
)
def test_values_that_can_only_be_slips(section, key, value):
    with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
        load(FOUR | {section: {key: value} | ({"train": "a"} if section == "data" else {})})
