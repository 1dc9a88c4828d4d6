"""What we save, transformers reads to the same ids; what it reads from a checkpoint, we do; and its chat rendering is ours."""

from __future__ import annotations

import json

import pytest
import transformers

from tunesmith.data.render import Renderer
from tunesmith.tokenizer import Tokenizer

TEXTS = ["Hello  world", " a\n\n\tb", "¿Qué? 漢字 🦙", "", "x = 1  # ok\n" * 3, "<think>no</think>"]
CONFIGS = {
    "gpt2": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"},
    "Mistral-7B-v0.1": {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"},
    "Qwen2.5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_transformers_reads_what_we_save(shared_data, tmp_path, name):
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "tokenizer.json").symlink_to(shared_data / "tokenizers" / name / "tokenizer.json")
    (source / "tokenizer_config.json").write_text(json.dumps(CONFIGS[name]))
    ours = Tokenizer.load(source)
    ours.add_tokens(["<note>", "ACME"])
    template = (shared_data / "templates/Qwen-Qwen2.5-7B-Instruct.jinja").read_text(encoding="utf-8")
    ours.save(saved, template)
    model_type = {"gpt2": "gpt2", "Mistral-7B-v0.1": "mistral", "Qwen2.5": "qwen2"}[name]
    (saved / "config.json").write_text(json.dumps({"model_type": model_type}))  # as in an exported folder
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    for text in [*TEXTS, "ACME <note>", f"a{ours.eos_token}b"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, special=True), text
        assert theirs.encode(text) == [*ours.prefix_ids, *ours.encode(text, special=True)], text
        ids = ours.encode(text, special=True)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (ours.bos_token, ours.eos_token, ours.pad_token)
    assert set(theirs.all_special_ids) <= ours.special_ids and len(theirs) == ours.vocab_size
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why  so?"},
        {"role": "assistant", "content": "So."},
    ]
    theirs.chat_template = theirs.chat_template.replace("<|im_end|>", ours.eos_token)  # a stop this vocabulary has
    (tmp_path / "template.jinja").write_text(theirs.chat_template)
    renderer = Renderer(ours, str(tmp_path / "template.jinja"))
    assert renderer.text(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert renderer.prompt(messages[:2]) == theirs.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert again_equal(ours, Tokenizer.load(saved))


def again_equal(one: Tokenizer, other: Tokenizer) -> bool:
    return one.encode_batch(TEXTS) == other.encode_batch(TEXTS) and one.vocab_size == other.vocab_size and one.named == other.named


def test_a_sentencepiece_folder_saved_for_transformers(shared_data, tmp_path):
    """transformers reads our tokenizer.json of a folder that had only tokenizer.model, spaces included."""
    (tmp_path / "tokenizer.model").write_bytes((shared_data / "tokenizers/mistral-common/tokenizer.model.v1").read_bytes())
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, *(f"a{' ' * n}b" for n in range(25))]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.encode("a") == [1, *ours.encode("a")]
    assert theirs.decode(ours.encode("Hello  world")) == "Hello  world"
