"""Axolotl's and LLaMA-Factory's files: the common keys land where they mean the same, and no key is dropped in silence."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import importers
from tunesmith.config.importers import from_axolotl, from_file, from_llamafactory
from tunesmith.config.load import load
from tunesmith.config.yaml12 import read
from tunesmith.errors import ConfigError

AXOLOTL = """\
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
  - path: ./chats.jsonl
    type: chat_template
    field_messages: turns
val_set_size: 0.1
output_dir: ./qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 8192
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
peft_use_rslora: true
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
neftune_noise_alpha: 5
loraplus_lr_ratio: 16
bf16: true
train_on_inputs: false
gradient_checkpointing: true
warmup_ratio: 0.1
weight_decay: 0.01
save_total_limit: 1
eval_steps: 50
early_stopping_patience: 3
chat_template: chatml
special_tokens: {pad_token: "<pad>", additional_special_tokens: ["<call>"]}
deepspeed: zero3.json
an_unheard_of_key: 7
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
lora_target: q_proj,v_proj
use_dora: true
dataset: identity,alpaca_en_demo
dataset_dir: DIR
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_train_epochs: 3.0
mask_history: true
val_size: 0.1
bf16: true
ddp_timeout: 180000000
report_to: none
"""


def config_of(done, tmp_path):
    (tmp_path / "run.yaml").write_text(done.text)
    return load(tmp_path / "run.yaml")


def told(done) -> set[str]:
    return {theirs for pairs in (done.mapped, done.always, done.cannot) for theirs, _ in pairs}


def test_axolotl(tmp_path):
    (tmp_path / "ax.yml").write_text(AXOLOTL)
    done = from_file(tmp_path / "ax.yml")
    config = config_of(done, tmp_path)
    assert (config.model, config.method, str(config.output)) == ("mistralai/Mistral-7B-v0.1", "qlora", "qlora-out")
    assert [s.path for s in config.data.train] == ["hub:mhenrichsen/alpaca_2k_test/train", "./chats.jsonl"]
    assert (config.data.held_out, config.data.max_length) == (0.1, 8192)
    lora, train = config.lora, config.train
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets, lora.variant) == (32, 16.0, 0.05, ("q_proj", "v_proj"), "rslora")
    assert (train.batch_size, train.epochs, train.schedule, train.learning_rate) == (8, 1.0, "constant", 2e-4)
    assert (train.neftune_alpha, train.loraplus_ratio, train.warmup_ratio, train.weight_decay) == (5.0, 16.0, 0.1, 0.01)
    assert (config.memory.dtype, config.checkpoint.keep, config.eval.every_steps, config.eval.early_stop) == ("bf16", 2, 50, 3)
    assert lora.new_tokens == ("<call>",)
    cannot = dict(done.cannot)
    assert set(cannot) == {"datasets[1].field_messages", "chat_template", "deepspeed", "wandb_project", "an_unheard_of_key"}
    assert "chatml" in cannot["chat_template"] and "sample_packing" in dict(done.always) and "raise it" in done.text
    assert set(read(AXOLOTL).tree) <= told(done)


def test_llamafactory(tmp_path):
    info = {"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"hf_hub_url": "me/alpaca", "columns": {"prompt": "q"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "lf.yaml").write_text(LLAMA_FACTORY.replace("DIR", str(tmp_path)))
    done = from_file(tmp_path / "lf.yaml")
    config = config_of(done, tmp_path)
    assert (config.method, config.lora.targets, config.lora.variant) == ("qlora", ("q_proj", "v_proj"), "dora")
    assert [s.path for s in config.data.train] == [f"{tmp_path}/identity.json", "hub:me/alpaca/train"]
    # Their defaults where the file is silent: another learning would come of ours.
    assert (config.lora.rank, config.lora.alpha, config.train.learning_rate, config.train.schedule) == (8, 16.0, 5e-5, "linear")
    assert (config.train.batch_size, config.data.train_on, config.data.workers, config.data.held_out) == (8, "last", 16, 0.1)
    assert set(dict(done.cannot)) == {"template", "max_samples", "overwrite_output_dir"}
    assert set(read(LLAMA_FACTORY).tree) <= told(done)


def test_a_dataset_that_is_not_found_is_told_not_guessed_in_silence():
    done = from_llamafactory({"model_name_or_path": "a/b", "dataset": "mine", "dataset_dir": "/nowhere"})
    assert (
        "dataset",
        "'mine' was not found in /nowhere/dataset_info.json: see that the path written for it is right",
    ) in done.cannot


def test_a_full_run_leaves_the_adapters_keys_and_says_so(tmp_path):
    done = from_axolotl(
        {"base_model": "a/b", "datasets": [{"path": "x.jsonl"}], "lora_r": 8, "val_set_size": 0, "early_stopping_patience": 2}
    )
    config = config_of(done, tmp_path)
    assert config.method == "full" and "lora" not in config.model_fields_set and config.eval.early_stop == 0
    assert "has no effect with method: full" in dict(done.cannot)["lora_r"]
    assert "needs held-out rows" in dict(done.cannot)["early_stopping_patience"]


def test_values_our_schema_refuses_are_told(tmp_path):
    done = from_axolotl(
        {"base_model": "a/b", "adapter": "lora", "datasets": [{"path": "x.jsonl"}], "learning_rate": 3.0, "val_set_size": 200}
    )
    assert config_of(done, tmp_path).train.learning_rate == "auto"
    assert "above 0 and at most 1" in dict(done.cannot)["learning_rate"] and "share" in dict(done.cannot)["val_set_size"]


@pytest.mark.parametrize("text", ["", "- a", "foo: 1", "a: 1\na: 2\n", "base_model: [\n"])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path / "x.yml")
    assert len(caught.value.what.splitlines()) == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        from_file(tmp_path / "nope.yml")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=4), max_size=2)
)
KEYS = sorted(
    {*importers.AXOLOTL, *importers.LLAMA_FACTORY, *importers.ALWAYS, *importers.CANNOT, "adapter", "datasets", "special_tokens"}
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), VALUES, max_size=8),
    st.sampled_from(["base_model", "model_name_or_path"]),
)
def test_any_values_at_all_give_a_file_that_loads_and_no_key_is_lost(tmp_path_factory, keys, head):
    tree = keys | {head: "a/b"}
    done = (from_axolotl if head == "base_model" else from_llamafactory)(tree)
    path = Path(tmp_path_factory.getbasetemp()) / "imported.yaml"
    path.write_bytes(done.text.encode("utf-8"))
    load(path)
    assert set(tree) <= told(done)
