"""The tokenizer against other people's ids: sentencepiece, llama.cpp's golden files, the `tokenizers` library; and its own
promises."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tunesmith.errors import ModelError
from tunesmith.hub import resolve_model
from tunesmith.tokenizer import Tokenizer

SENTENCEPIECE = [
    *("tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3"),
    *("mistral_instruct_tokenizer_241114.model.v7", "mistral_instruct_tokenizer_241114.model.v7m1"),
]
GOLDEN = {  # llama.cpp's vocabulary -> the folder with the same one
    "gpt-2": "gpt2",
    "llama-bpe": "Llama-3.1",
    "llama-spm": "ort/phi-3-mini",
    "phi-3": "ort/phi-3-mini",
    "qwen2": "Qwen2.5",
}
NAMES = {
    "gpt2": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    "Mistral-7B-v0.1": {"eos_token": "</s>", "bos_token": "<s>"},
    "Qwen2.5": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>", "special": True}},
    "Llama-3.1": {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"},
    "ort/phi-3-mini": {"eos_token": "<|endoftext|>", "bos_token": "<s>"},
}
TEXTS = [
    *(
        "",
        " ",
        "   ",
        "\n",
        "\t\n x",
        "Hello world",
        "Hello  world",
        " leading",
        "trailing  ",
        "a\u00a0b",
        "¿Qué? 漢字 テスト",
        "🦙👩‍👩‍👧‍👦",
        "e\u0301é",
    ),
    *(f"a{' ' * n}b" for n in range(40)),
    *(" " * n for n in range(30)),
    *("\n" * n + "x" for n in range(12)),
    *(
        "=" * 77,
        "-" * 50 + " " * 9,
        "aaaa" * 9,
        "def f(x):\n        return x_1 ** 2  # ok\n\n\n",
        "▁▁x",
        "<0x0A>",
        "\x00\x01\x1c\x7f",
        "x" * 300,
    ),
    *("<s>[INST] x [/INST]</s>", "<|im_end|>", "<|endoftext|>", "<unk><pad>", "</s></s>", "[INST][/INST]"),
]


@pytest.fixture(scope="module")
def loaded(shared_data, tmp_path_factory):
    """name -> Tokenizer of a folder with that tokenizer.json, made once."""
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            (folder / "tokenizer.json").symlink_to(shared_data / "tokenizers" / name / "tokenizer.json")
            (folder / "tokenizer_config.json").write_text(json.dumps(NAMES[name]))
            made[name] = Tokenizer.load(folder)
        return made[name]

    return get


def prose(shared: Path, count: int) -> list[str]:
    with open(shared / "sft/gsm8k/test.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]


# ---- ids


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_folder_with_sentencepiece_only(shared_data, tmp_path, name):
    file = shared_data / "tokenizers/mistral-common" / name
    shutil.copy(file, tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = TEXTS + prose(shared_data, 150)
    assert len(texts) > 250
    assert [ours.encode(t) for t in texts] == theirs.encode(texts)
    for text in prose(shared_data, 20):
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.prefix_ids) == (1, 2, 0, (1,))
    assert ours.vocab_size == theirs.vocab_size()


def test_a_unigram_sentencepiece_folder(shared_data, tmp_path):
    file = shared_data / "sft/fixtures/torchtune/m.model"
    shutil.copy(file, tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = [t for t in TEXTS + prose(shared_data, 150) if "<unk>" not in t]  # spelled letter by letter, where theirs makes words
    assert [ours.encode(t) for t in texts] == theirs.encode(texts)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_llama_cpp_golden_ids(shared_data, loaded, name):
    folder = shared_data / "tokenizers/golden"
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    rows = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    tokenizer = loaded(GOLDEN[name])
    wanted = [[int(i) for i in row.split()] for row in rows]
    assert len(texts) == len(wanted) > 40
    assert [tokenizer.encode(t) for t in texts] == wanted


@pytest.mark.parametrize("name", ["gpt2", "Qwen2.5", "Mistral-7B-v0.1"])
def test_remembered_words_equal_the_library(shared_data, loaded, name):
    tokenizer = loaded(name)
    assert tokenizer._words is not None, "these vocabularies have words that no merge crosses"
    draw = random.Random(name)
    letters = (
        [chr(c) for c in (*range(0x260), *range(0x2000, 0x2075))]
        + [*"'sStTdDmMlLvVeErR'''     \n\n\r\t"] * 8
        + ["漢", "e\u0301", "🦙"]
    )
    texts = TEXTS + prose(shared_data, 60) + ["".join(draw.choices(letters, k=draw.randint(1, 50))) for _ in range(1500)]
    for where in ("lead", "rest", "bare"):
        assert tokenizer.encode_batch(texts, where) == tokenizer._encode_batch(texts, where)
    assert sum(tokenizer._words.encode(t, "lead") is not None for t in prose(shared_data, 60)) > 50, "prose goes the fast way"


def test_vocab_and_merges_equal_tokenizer_json(shared_data, tmp_path, loaded):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizers/gpt2" / name, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    texts = TEXTS + prose(shared_data, 50)
    assert tokenizer.encode_batch(texts) == loaded("gpt2").encode_batch(texts)
    assert tokenizer.eos_id == 50256


def test_special_tokens_in_text_are_text(loaded):
    """As a user's text none is recognised; with special=True (the template's own text) they are."""
    tokenizer = loaded("Qwen2.5")
    text = "a<|im_end|>b<tool_call>c"
    assert not {*tokenizer.special_ids, *tokenizer.markers} & {*tokenizer.encode(text)}
    assert {151645, 151657} <= {*tokenizer.encode(text, special=True)}
    assert tokenizer.decode(tokenizer.encode(text)) == text


PIECES = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "[INST]",
    "<tool_call>",
    "<|assistant|>",
    "<|",
    "|>",
    "<",
    "s",
    ">",
    "▁",
]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=4).filter(lambda t: t.isprintable()), max_size=8))
def test_no_typed_special_token_is_recognised(loaded, words, parts):
    text = "".join(parts)
    for tokenizer in (loaded("gpt2"), loaded("Mistral-7B-v0.1"), loaded("Qwen2.5"), words):
        ids = tokenizer.encode(text)
        assert not ({*tokenizer.special_ids, *tokenizer.markers} - {tokenizer.unk_id}) & {*ids}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A Unigram vocabulary that holds its special tokens as words, which Unigram would choose."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "<s/>▁abc"), ("▁a", -2.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def test_a_vocabulary_with_special_words(words):
    assert [words.token(i) for i in words.encode("a</s>b")] == ["▁a", "<", "/", "s", ">", "b"]
    assert [words.token(i) for i in words.encode_batch(["a"], "rest")[0]] == ["a"], (
        "the first word's space goes before a text's start only"
    )


# ---- decoding


def test_bytes_that_become_no_character_do_not_pile_up():
    """Random and lone bytes join to the text of all of them, and what is looked at for each token stays short: 8,192 lone bytes
    took 14 s, in which a server's other answers waited."""
    tokenizer = Tokenizer.load(resolve_model("embedded").path)
    single = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
    rng = random.Random(0)
    letters = [*tokenizer.encode("aé漢😀 "), *single]
    for ids in ([single[0]] * 300, [rng.choice(single) for _ in range(400)], [rng.choice(letters) for _ in range(400)]):
        stream, looked = tokenizer.stream(), []
        decode = stream._decode
        stream._decode = lambda ids, decode=decode, looked=looked: looked.append(len(ids)) or decode(ids)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids, skip_special=True)
        assert max(looked) < 80, max(looked)


@pytest.mark.parametrize("name", ["gpt2", "Mistral-7B-v0.1", "Qwen2.5"])
def test_a_stream_gives_whole_characters_and_all_of_them(loaded, name):
    tokenizer = loaded(name)
    for text in ["Hello  world, it's é!", "🦙👩‍👩‍👧‍👦 and 漢字", "\n\n  x", "naïve\u2028", "a"]:
        ids, stream = tokenizer.encode(text), tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    broken = tokenizer.encode("🦙")[:1]
    stream = tokenizer.stream()
    assert stream.push(broken[0]) == "" or name == "Qwen2.5"
    draw = random.Random(1)
    for _ in range(50):
        ids = [draw.randrange(3, 30000) for _ in range(draw.randint(1, 12))]
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids, skip_special=True)


# ---- files


def test_saved_and_loaded_again(loaded, tmp_path):
    for name in ("gpt2", "Mistral-7B-v0.1"):
        tokenizer = loaded(name)
        tokenizer.save(tmp_path / name, template="{{ messages }}")
        again = Tokenizer.load(tmp_path / name)
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (again.bos_id, again.eos_id, again.stop_ids, again.prefix_ids) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.stop_ids,
            tokenizer.prefix_ids,
        )
        assert again.template == "{{ messages }}"
        again.save(tmp_path / f"{name}2")
        assert Tokenizer.load(tmp_path / f"{name}2").fingerprint == again.fingerprint != tokenizer.fingerprint


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A byte-level folder of 258 tokens that needs no other file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: k for k, c in enumerate(alphabet)} | {"he": 256, "hell": 257}
    backend = Backend(models.BPE({**vocab, "ll": 258}, [("h", "e"), ("l", "l"), ("he", "ll")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return tmp_path


def test_names_come_from_the_config_files(tiny):
    (tiny / "config.json").write_text(json.dumps({"bos_token_id": 260, "eos_token_id": 7}))
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 3]}))
    tokenizer = Tokenizer.load(tiny)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_id) == ("<eos>", "<bos>", None), (
        "tokenizer_config wins over config"
    )
    assert tokenizer.stop_ids == {259, 3}
    assert tokenizer.vocab_size == 261
    (tiny / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<bos>"}}))
    (tiny / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<bos>", "add_bos_token": True}))
    tokenizer = Tokenizer.load(tiny)
    assert tokenizer.pad_id == 260 and tokenizer.prefix_ids == (260,)


def test_where_templates_stand(tiny):
    config = {"eos_token": "<eos>", "chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]}
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tiny).templates == {"default": "A", "tool_use": "B"}
    (tiny / "chat_template.json").write_text(json.dumps({"chat_template": "C"}))
    assert Tokenizer.load(tiny).template == "C"
    (tiny / "chat_template.jinja").write_text("D")
    assert Tokenizer.load(tiny).template == "D"


def test_declared_and_new_tokens(tiny):
    config = {"eos_token": "<eos>", "added_tokens_decoder": {"261": {"content": "<think>", "special": False}}}
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tiny)
    assert tokenizer.token(261) == "<think>" and 261 in tokenizer.markers and 261 not in tokenizer.special_ids
    before = tokenizer.encode("ACME hello")
    assert tokenizer.add_tokens(["ACME", "<note>", "<eos>"]) == [262, 263, 259]
    assert tokenizer.vocab_size == 264
    assert tokenizer.encode("ACME hello")[0] == 262 and len(tokenizer.encode("ACME hello")) < len(before), (
        "a word is recognised anywhere"
    )
    assert 263 not in tokenizer.encode("<note>"), "markup is not"
    assert tokenizer.decode([262, 263]) == "ACME<note>"
    config["added_tokens_decoder"] = {"300": {"content": "<late>"}}
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="declared as 300 but would get 261"):
        Tokenizer.load(tiny)


def test_damaged_and_missing_files(tiny, tmp_path_factory, shared_data):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ModelError, match=r"no tokenizer: looked for tokenizer\.json"):
        Tokenizer.load(empty)
    with pytest.raises(ModelError, match="no such folder"):
        Tokenizer.load(empty / "nowhere")
    text = (tiny / "tokenizer.json").read_text(encoding="utf-8")
    for damage in (text[: len(text) // 2], "", "[]", "{}"):
        (tiny / "tokenizer.json").write_text(damage, encoding="utf-8")
        with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
            Tokenizer.load(tiny)
    (tiny / "tokenizer.json").write_text(text, encoding="utf-8")
    (tiny / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON"):
        Tokenizer.load(tiny)
    (tiny / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not readable as JSON"):
        Tokenizer.load(tiny)
    for wrong in (3, ["{{ x }}"], [{"nam": "default", "template": "x"}], {"default": None}):
        (tiny / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(ModelError, match="chat_template: neither"):
            Tokenizer.load(tiny)
    (tiny / "tokenizer_config.json").unlink()
    (tiny / "tokenizer.json").unlink()
    model = (shared_data / "tokenizers/mistral-common/tokenizer.model.v1").read_bytes()
    tiktoken = (shared_data / "sft/fixtures/torchtune/tiktoken_small.model").read_bytes()
    for damage in (model[:1000], b"", b"\xff" * 64, tiktoken, model[:-7]):
        (tiny / "tokenizer.model").write_bytes(damage)
        with pytest.raises(ModelError, match="not a sentencepiece model"):
            Tokenizer.load(tiny)
    (tiny / "tokenizer.model").unlink()
    (tiny / "vocab.json").write_text('{"a": 0}')
    (tiny / "merges.txt").write_text("b c\n")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer.load(tiny)
    (tiny / "merges.txt").write_text("")
    (tiny / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(ModelError, match="cannot build a"):
        Tokenizer.load(tiny)
