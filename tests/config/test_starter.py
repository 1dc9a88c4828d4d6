"""A starter loads as it is, says what was seen, and says why where nothing could be."""

import re
from dataclasses import dataclass

import pytest

from tunesmith.config.load import load
from tunesmith.config.starter import look, starter
from tunesmith.errors import DataError


@dataclass
class Row:
    value: object


@dataclass
class Refused:
    origin: str
    reason: str


def detect(value):
    return "text" if isinstance(value, str) else "messages" if "messages" in value else None


def loaded(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    return load(tmp_path / "run.yaml")


def test_what_was_seen_is_written(tmp_path):
    chat = {"messages": [{"role": "user", "content": "x" * 10_000}, {"role": "assistant", "content": "y"}]}
    rows = [*[Row(chat)] * 40, Row({"foo": 1}), Refused("chats.jsonl:42", "not JSON:\n a comma")]
    text = starter(look("chats.jsonl", lambda _: rows, detect), "mistralai/Mistral-7B-v0.3", "runs/chats")
    assert "# Seen in the data: 41 rows, format messages" in text and "41 rows are few" in text and "train_on" in text
    assert "# 1 rows have no known format" in text and "# 1 rows cannot be read, first chats.jsonl:42: not JSON: a comma" in text
    config = loaded(text, tmp_path)
    assert (config.method, config.data.max_length, str(config.output)) == ("qlora", 4096, "runs/chats")


def test_its_commented_keys_are_keys_too(tmp_path):
    text = starter(look("chats.jsonl", lambda _: [Row({"messages": []})], detect))
    plain = loaded(text, tmp_path)
    switched_on = re.sub(r"^( *)# (lora|  rank|train_on|max_length|batch_size|learning_rate):", r"\1\2:", text, flags=re.M)
    config = loaded(switched_on, tmp_path)
    assert config == plain and config.lora.model_fields_set == {"rank"} and config.train.batch_size == 8


def test_a_look_is_a_look_and_not_a_reading(tmp_path):
    def endless(_):
        while True:
            yield Row("text")

    text = starter(look("big.txt", endless, detect))
    assert "the first 2,000 rows, format text" in text and loaded(text, tmp_path).method == "lora"
    assert "max_length" not in text


@pytest.mark.parametrize("path", ["a b: #c.jsonl", "é\u2028.jsonl", "- x", "x" * 300 + " y" * 60])
def test_any_path_gives_a_starter_that_loads(tmp_path, path):
    text = starter(path, model=path, output=path + "-run")
    assert "# Nobody has looked at the data yet" in text
    assert loaded(text, tmp_path).data.train[0].path == path


def test_data_that_cannot_be_read_is_said_at_once(tmp_path):
    def rows(path):
        raise DataError(f"{path}: no such file or folder")
        yield

    with pytest.raises(DataError, match="no such file"):
        look("chat", rows, detect)


def test_the_schema_line_stands_only_where_it_leads_somewhere(tmp_path):
    assert not starter("a.jsonl", file=str(tmp_path / "run.yaml")).startswith("# yaml-language-server")
