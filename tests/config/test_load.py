"""Every fault of a run file is told at once, at its line, in words; nothing but RunConfig or ConfigError ever comes out."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config.load import dump, load
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError

FOUR = "model: embedded\ndata: chats.jsonl\nmethod: lora\noutput: runs/a\n"
KNOWN = "known here: model, data, method, output, seed, lora, train, eval, memory, checkpoint, log"


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(text: str | bytes) -> str:
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "run.yaml"

    return written


def faults(source, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, *overrides)
    assert caught.value.exit_code == 2 and caught.value.fix
    return caught.value.what.splitlines()


def test_four_keys_suffice(run_yaml):
    config = load(run_yaml(FOUR))
    assert config.data.train[0].path == "chats.jsonl" and config.lora.rank == 16 and config.train.learning_rate == "auto"
    assert config == load({"model": "embedded", "data": Path("chats.jsonl"), "method": "lora", "output": Path("runs/a")})
    assert config == load(config) == load(Path("run.yaml")) == load(".")


def test_all_faults_at_once_each_at_its_line(run_yaml):
    text = """\
modle: x
data:
  train:
    - a.jsonl
    - 3
    - {path: b.jsonl,
       weigth: 2}
  held_out: 3
method: qlra
lora:
  rankk: 8
  targets: [q_proj, 1]
  rank_pattern:
    q_proj: 8
    k_proj: -1
  alpha: .inf
train:
  learning_rate: 2e4
  betas: [1, 0.9]
  batch_size: true
  schedule: cosin
  warmup_ratio:
eval: {every_steps: soon}
num_epochs: 3
"""
    assert faults(run_yaml(text)) == [
        "run.yaml:1: model: missing; write a checkpoint folder, a hub id such as mistralai/Mistral-7B-Instruct-v0.3, or embedded",
        "run.yaml:1: output: missing; write a folder for the run, such as runs/first",
        "run.yaml:1: modle: unknown key; did you mean 'model'?",
        "run.yaml:5: data.train.1: expected a path, or a mapping with path and weight, got 3; put it in quotes",
        "run.yaml:7: data.train.2.weigth: unknown key; did you mean 'weight'?",
        "run.yaml:8: data.held_out: expected a path or name or a number from 0 to below 1, got 3; put it in quotes",
        'run.yaml:9: method: expected "qlora", "lora" or "full", got \'qlra\'; did you mean \'qlora\'?',
        "run.yaml:11: lora.rankk: unknown key; did you mean 'rank'?",
        "run.yaml:12: lora.targets.1: expected text, got 1; put it in quotes",
        "run.yaml:15: lora.rank_pattern.k_proj: expected a whole number above 0, got -1",
        "run.yaml:16: lora.alpha: expected a number above 0, got inf",
        'run.yaml:18: train.learning_rate: expected a number above 0 and at most 1, or "auto", got 20000.0',
        "run.yaml:19: train.betas.0: expected a number from 0 to below 1, got 1",
        "run.yaml:20: train.batch_size: expected a whole number above 0, got true",
        'run.yaml:21: train.schedule: expected "cosine", "linear", "constant" or "wsd", got \'cosin\'; did you mean \'cosine\'?',
        "run.yaml:22: train.warmup_ratio: has no value; write a number from 0 to below 1, or drop the line",
        "run.yaml:23: eval.every_steps: expected a whole number above 0 or \"auto\", got 'soon'",
        "run.yaml:24: num_epochs: unknown key; did you mean 'train.epochs'?",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rank", "lora.rank"),
        ("lora_r", "lora.rank"),
        ("sequence_len", "data.max_length"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("lerning_rate", "train.learning_rate"),
        ("learningrate", "train.learning_rate"),
        ("outptu", "output"),
    ],
)
def test_unknown_keys_say_what_was_meant(run_yaml, key, meant):
    assert faults(run_yaml(f"{FOUR}{key}: 1\n")) == [f"run.yaml:5: {key}: unknown key; did you mean {meant!r}?"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "run.yaml: is empty"),
        ("# only a comment\n", "run.yaml: is empty"),
        ("- a\n- b\n", "run.yaml:1: holds a list, not `key: value` lines"),
        ("just words\n", "run.yaml:1: holds a single value, not `key: value` lines"),
        ("model: x\n\tdata: y\n", "run.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("model: [x\ndata: y\n", "run.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: but found another document"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "run.yaml: is not UTF-8 text (byte 0)"),
        (b"model: a\nx: \x00\n", "run.yaml:2: not text: holds the character '\\x00'"),
        ("[" * 1000, "run.yaml:1: nested too deeply"),
        ("a: &a [*a]\n", "run.yaml:1: nested too deeply"),
        ("x" * (1 << 20) + "yz", "run.yaml: has 1,048,578 bytes, too many for a run file"),
    ],
)
def test_what_is_no_run_file_is_told_in_one_line(run_yaml, text, told):
    assert faults(run_yaml(text)) == [told]


def test_aliases_of_aliases_do_not_blow_up(run_yaml):
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "too many values" in faults(run_yaml(bomb))[0]


def test_missing_files_and_folders(run_yaml):
    run_yaml(FOUR)
    with pytest.raises(ConfigError, match=r"rum.yaml: no such file\nfix: here are: run.yaml"):
        load("rum.yaml")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: a folder without a run.yaml\nfix: .*`tunesmith init empty`"):
        load("empty")
    Path("rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl: not a run file .*\nfix: .*`tunesmith init rows.jsonl`"):
        load("rows.jsonl")
    assert "cannot be read" in faults("a\0b")[0]


def test_a_key_given_twice_is_a_fault_even_in_a_section(run_yaml):
    assert faults(run_yaml(FOUR + "seed: 1\ntrain: {epochs: 1, epochs: 2}\nseed: 2\n")) == [
        "run.yaml:6: train.epochs: given twice, first on line 6; keep one",
        "run.yaml:7: seed: given twice, first on line 5; keep one",
    ]


def test_tags_run_nothing(run_yaml):
    text = FOUR.replace("embedded", '!!python/object/apply:os.system ["false"]')
    assert (
        faults(run_yaml(text))[0]
        == "run.yaml:1: model: has the tag 'tag:yaml.org,2002:python/object/apply:os.system'; write a plain value"
    )


def test_scalars_are_yaml_1_2(run_yaml):
    text = "model: no\ndata: 2024-01-01\nmethod: lora\noutput: 1:30\nlora: {alpha: 0x1, rank: 016}\ntrain: {learning_rate: 2e-4}\n"
    assert faults(run_yaml(text)) == ["run.yaml:5: lora.alpha: expected a number above 0, got '0x1'"]
    config = load(run_yaml(text.replace("0x1", "1e1")))
    assert (config.model, config.data.train[0].path, str(config.output)) == ("no", "2024-01-01", "1:30")
    assert (config.lora.alpha, config.lora.rank, config.train.learning_rate) == (10.0, 16, 2e-4)


def test_merges_and_empty_sections(run_yaml):
    text = FOUR + "train: &base\n  epochs: 2\n  seed: 1\neval:\nlora:\n  <<: {rank: 4, alpha: 8}\n  alpha: 9\n"
    assert faults(run_yaml(text)) == ["run.yaml:7: train.seed: unknown key; did you mean 'seed'?"]
    config = load(run_yaml(text.replace("  seed: 1\n", "")))
    assert (config.lora.rank, config.lora.alpha, config.eval.samples) == (4, 9.0, 3)


def test_overrides_win_and_their_faults_name_them(run_yaml):
    path = run_yaml(FOUR)
    config = load(path, "train.epochs=1", "lora.targets=[q_proj, v_proj]", "model=~/base", "train.learning_rate=1e-4")
    assert (config.train.epochs, config.lora.targets) == (1.0, ("q_proj", "v_proj"))
    assert config.model == str(Path.home() / "base") and config.train.learning_rate == 1e-4
    assert faults(path, "train.epochs=-1", "lora.rnk=8", "lora.rank", "model.x=1", "seed=[a", "x.y=1", "lora.dropout=") == [
        "override lora.rank: write key.path=value, such as train.epochs=2",
        "override model.x=1: model is no section; " + KNOWN,
        "override seed=[a: 1: not YAML: expected ',' or ']', but got '<stream end>'; quotes around the value may help",
        "override lora.dropout=: lora.dropout: has no value; write a number from 0 to below 1, or drop the line",
        "override lora.rnk=8: lora.rnk: unknown key; did you mean 'rank'?",
        "override train.epochs=-1: train.epochs: expected a number above 0, got -1",
        "override x.y=1: x: unknown key; " + KNOWN,
    ]


def test_overrides_reach_into_the_short_form_of_data(run_yaml):
    path = run_yaml(FOUR)
    assert load(path, "data.max_length=512").data.train[0].path == "chats.jsonl"
    config = load(path, "data.max_length=512", "data=other.jsonl")
    assert (config.data.max_length, config.data.train[0].path) == (512, "other.jsonl")


def test_contradictions_are_told_beside_the_other_faults_and_name_both_keys(run_yaml):
    text = """\
model: embedded
data: {train: chats.jsonl, held_out: 0}
method: full
output: embedded-run
lora: {rank: 8}
train:
  loraplus_ratio: 16
  epochs: 2
  max_steps: 10
  seed: 3
eval: {early_stop: 2, keep_best: true}
memory: {device: cpu, dtype: fp16, kernels: triton}
"""
    no_adapter = "has no effect with method: full, which trains every weight and has no adapter; drop it, or write method: lora"
    no_rows = "needs held-out rows, and data.held_out is 0; drop it, or write data.held_out: 0.05"
    assert faults(run_yaml(text)) == [
        f"run.yaml:5: lora.rank: {no_adapter}",
        f"run.yaml:7: train.loraplus_ratio: {no_adapter}",
        "run.yaml:8: train.epochs: and train.max_steps: 10 both set the length; drop one",
        "run.yaml:10: train.seed: unknown key; did you mean 'seed'?",
        f"run.yaml:11: eval.keep_best: {no_rows}",
        f"run.yaml:11: eval.early_stop: {no_rows}",
        "run.yaml:12: memory.dtype: fp16 is not trained on memory.device: cpu; write auto or fp32",
        "run.yaml:12: memory.kernels: triton needs an NVIDIA GPU, and memory.device is cpu; write auto",
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora": {"continue_from": "runs/a", "rank": 8}}, "lora.rank: comes from the adapter that lora.continue_from names"),
        ({"lora": {"modules_to_save": ["lm_head"]}, "method": "full"}, "lora.modules_to_save: has no effect with method: full"),
        ({"lora": {"new_tokens": ["<x>"]}, "method": "full"}, "lora.new_tokens: has no effect with method: full"),
        ({"eval": {"samples": 0, "sample_tokens": 9}}, "eval.sample_tokens: has no effect with eval.samples: 0"),
        (
            {"memory": {"device": "mps", "kernels": "triton"}},
            "memory.kernels: triton needs an NVIDIA GPU, and memory.device is mps",
        ),
        ({"model": "./out/", "output": "out"}, "output: is the same folder as model"),
        ({"lora": {"continue_from": "out"}, "output": "out"}, "output: is the same folder as lora.continue_from"),
        ({"data": "out", "output": "out"}, "output: is also a path in data.train"),
        ({"data": {"train": "a.jsonl", "held_out": "./a.jsonl"}}, "data.held_out: is also a path in data.train"),
    ],
)
def test_each_contradiction(changed, told):
    four = {"model": "embedded", "data": "chats.jsonl", "method": "lora", "output": "runs/b"}
    (line,) = faults(four | changed)
    assert line.startswith(told)


def test_an_override_drops_what_it_makes_idle_in_the_file_but_not_what_it_cannot_mean(run_yaml):
    path = run_yaml(FOUR + "lora: {rank: 8}\ntrain: {epochs: 2}\nmemory: {dtype: fp16}\n")
    config = load(path, "train.max_steps=20", "method=full")
    assert config.train.max_steps == 20 and "epochs" not in config.train.model_fields_set and config.lora.rank == 16
    assert faults(path, "memory.device=cpu") == [
        "run.yaml:7: memory.dtype: fp16 is not trained on memory.device: cpu; write auto or fp32"
    ]
    assert len(faults(path, "train.max_steps=20", "train.epochs=1")) == 1


@pytest.mark.parametrize(
    "overrides", [(), ("method=full",), ("data.held_out=0",), ("train.max_steps=5",), ("lora.continue_from=old",)]
)
def test_a_dumped_config_is_the_same_run_from_any_directory(run_yaml, monkeypatch, tmp_path, overrides):
    Path("chats.jsonl").touch()
    config = load(
        run_yaml(FOUR), *overrides, "lora.new_tokens=['2e-4', 'yes', '1:30']" if "method=full" not in overrides else "seed=0"
    )
    Path("resolved.yaml").write_text(dump(config))
    monkeypatch.chdir("/")
    again = load(tmp_path / "resolved.yaml")
    assert again.data.train[0].path == str(tmp_path / "chats.jsonl") and again.output == tmp_path / "runs/a"
    same = {"data": again.data, "output": again.output}
    assert config.model_copy(update=same) == again


TEXTS = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.lists(
        st.tuples(
            st.sampled_from(["model", "data", "method", "output", "lora", "train", "eval", "memory", "seed", "rank", "<<"]),
            st.sampled_from(
                [*"xX0-[{&*!|>%@`'\"#~?", "1e999", ".nan", "[a, {b: c}]", "{rank: 1e30, betas: [1]}", "2024-01-01", "\ud800"]
            )
            | st.text(max_size=12)
            | st.integers().map(str)
            | st.floats().map(str),
        ),
        max_size=6,
    ).map(lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs)),
    st.tuples(st.integers(0, len(FOUR)), st.text(max_size=6), st.integers(0, 9)).map(
        lambda m: FOUR[: m[0]] + m[1] + FOUR[m[0] + m[2] :]
    ),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=TEXTS, override=st.one_of(st.none(), st.text(max_size=20), st.text(max_size=8).map(lambda t: f"lora.targets={t}")))
def test_anything_at_all_is_a_config_or_a_config_error(tmp_path_factory, text, override):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        config = load(path, *([override] if override is not None else []))
    except ConfigError as fault:
        assert fault.what and str(fault).encode("utf-8"), "an error must be printable"
    else:
        assert isinstance(config, RunConfig) and load(_write(path, dump(config))).model == config.model


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
