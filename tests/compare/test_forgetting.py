"""compare/forgetting.py: what both models are measured on, how, and what is said of it."""

import importlib
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import tunesmith
from tunesmith.chat import Talker
from tunesmith.compare import forgetting
from tunesmith.compare.forgetting import Document, Task
from tunesmith.errors import ConfigError, DataError, MissingExtra

CUT = {"max_tokens": 6, "rows": 3, "arms": ["base", "tuned"]}


def compare(run, out, **settings):
    return tunesmith.compare(run.path, out=out, console=Console(file=io.StringIO(), width=160), **{**CUT, **settings})


@pytest.fixture(scope="module")
def talker(tiny):
    return Talker.open(tiny.model)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# ---- what is read ----------------------------------------------------------------------------------------------------------------


def test_the_neutral_text_is_ours_of_several_kinds_and_not_the_demos():
    task = forgetting.neutral()
    groups = {d.group for d in task.documents}
    words = [w for d in task.documents for w in d.text.split()]
    assert groups == {"narrative", "facts", "instructions", "arithmetic", "code", "talk"} and 3000 < len(words) < 6000
    assert len({d.text for d in task.documents}) == len(task.documents) == 48
    assert not any("Pottlewick" in d.text or "dear grower" in d.text for d in task.documents)


def test_files_of_texts_and_of_questions(tmp_path):
    (tmp_path / "note.txt").write_text("A plain note.", "utf-8")
    write(tmp_path / "texts.jsonl", [{"text": "one", "kind": "a"}, {"text": " "}, {"text": "two"}])
    write(tmp_path / "asked.jsonl", [{"question": "who?", "answer": "she", "context": "She did."}])
    _, texts, asked = forgetting.tasks([str(tmp_path)])
    assert [d.text for d in texts.documents] == ["A plain note.", "one", "two"] and texts.kind == "text"
    assert asked.documents == (Document("She did.", "who?", ("she",)),) and asked.kind == "answers"
    assert asked.documents[0].prompt == "She did.\n\nQuestion: who?\nAnswer in a few words."


def test_questions_find_the_sections_they_are_about(tmp_path):
    sections = [{"section": 1, "text": "first"}, {"section": 2, "text": "second"}]
    write(tmp_path / "documents.jsonl", [{"id": "tale", "sections": sections}])
    rows = [{"question": "q", "answers": ["a", "b"], "document": "tale", "gold_sections": [2], "attribute": "action"}]
    path = write(tmp_path / "questions.jsonl", rows)
    for named in (tmp_path, path):  # documents.jsonl lies beside the file
        [asked] = forgetting.tasks([str(named)])[1:]
        assert asked.documents == (Document("second", "q", ("a", "b"), "action"),)


def test_fairytaleqa_reads_as_it_lies(shared_data):
    folder = shared_data / "rag" / "fairytaleqa"
    if not folder.is_dir():
        pytest.skip("fairytaleqa is not here")
    [asked] = forgetting.tasks([str(folder)])[1:]
    assert asked.of > 10_000 and len(asked.documents) == forgetting.MOST and all(d.text and d.answers for d in asked.documents)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("no.jsonl", None, "there is no such file"),
        ("empty.jsonl", "", "is empty"),
        ("table.csv", "a,b", "holds nothing that can be read"),
        ("bad.jsonl", "{", "bad.jsonl:1: no JSON"),
        ("list.jsonl", "[1]", "list.jsonl:1: is no JSON object"),
        ("other.jsonl", '{"x": 1}', "other.jsonl:1: neither `text` nor `question`"),
        ("half.jsonl", '{"question": "q"}', "half.jsonl:1: lacks a text as `question` and as `answer`"),
        ("none.jsonl", '{"question": "q", "answers": []}', "none.jsonl:1: lacks"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, name, content, what):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(DataError) as e:
        forgetting.tasks([str(path)])
    assert what in e.value.what and e.value.fix


def test_all_faults_at_once_and_none_alone(tmp_path):
    with pytest.raises(DataError) as e:
        forgetting.tasks([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert "a.txt" in e.value.what and "b.txt" in e.value.what
    assert forgetting.tasks(["none"]) == []
    with pytest.raises(ConfigError, match="stands beside other tasks"):
        forgetting.tasks(["none", "x.txt"])


def test_the_harness_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra) as e:
        forgetting.tasks(["lm-eval:piqa"])
    assert "[harness]" in e.value.fix


# ---- what is measured ------------------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_cross_entropy_over_the_texts_bytes(talker):
    """Beside plain PyTorch; a text longer than the context is read in windows, each token once."""
    text = "The ferry was late again: é, 雨. "
    task = Task("t", "text", (Document(text), Document(text * 30)), 2)
    short, long = (value for _, value in forgetting.read_texts(talker, task, [0, 1]))
    ids = torch.tensor(talker.renderer.tokenizer.encode(text))
    logits = talker.model(ids).float()
    assert short["nats"] == pytest.approx(F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item(), rel=1e-4)
    assert short["bytes"] == len(text.encode()) - 1  # nothing stands before the first byte: no BOS here
    assert long["tokens"] == 30 * len(ids) - 1 and long["bytes"] == 30 * len(text.encode()) - 1
    assert len(ids) * 30 > talker.context


def test_answers_are_measured_by_the_nearest_written_one(talker, monkeypatch):
    task = Task("q", "answers", (Document("", "who?", ("nobody", "the old man")), Document("x " * 900, "why?", ("so",))), 2)
    said = talker.renderer.tokenizer.encode("The old man.\nMore.")
    seen = []

    def generate(model, prompts, **settings):
        seen.extend(prompts)
        return [said] * len(prompts)

    monkeypatch.setattr(importlib.import_module("tunesmith.generate"), "generate", generate)
    first, second = (value for _, value in forgetting.answer_questions(talker, task, [0, 1]))
    assert first["f1"] == 1 and second["f1"] == 0 and first["answer"] == "The old man.\nMore."
    assert all(len(ids) + forgetting.ANSWER <= talker.context for ids in seen)  # the passage lost its end


def test_a_comparison_measures_both_models_once(run, tmp_path, monkeypatch):
    first = compare(run, tmp_path / "c").found["forgetting"]
    [entry] = first["tasks"]
    assert entry["documents"] == 48 and entry["before"] > 4 and len(entry["groups"]) == 6  # a random model: about 8 bits a byte
    assert sum(g["documents"] for g in entry["groups"]) == 48
    assert entry["difference"] == pytest.approx(entry["after"] - entry["before"])
    lines = (tmp_path / "c" / "forgetting.jsonl").read_text().splitlines()
    assert len(lines) == 96
    monkeypatch.setattr(forgetting, "read_texts", None)
    assert compare(run, tmp_path / "c").found["forgetting"] == first
    (tmp_path / "c" / "forgetting.jsonl").write_text("\n".join(lines[:90]) + "\n" + lines[90][:20])  # torn
    monkeypatch.undo()
    [again] = compare(run, tmp_path / "c").found["forgetting"]["tasks"]
    assert again["after"] == pytest.approx(entry["after"], rel=1e-5)


def test_it_is_measured_only_where_both_models_are(run, tmp_path):
    assert compare(run, tmp_path / "a", arms=["base", "few-shot"]).found["forgetting"] is None
    assert compare(run, tmp_path / "b", forgetting=["none"]).found["forgetting"] is None
    with pytest.raises(ConfigError, match="lacks one of them"):
        compare(run, tmp_path / "d", arms=["tuned"], forgetting=["x.txt"])


def test_questions_and_texts_of_ones_own_stand_beside_the_neutral_text(run, tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(25)])
    found = compare(run, tmp_path / "c", forgetting=[str(path)]).found["forgetting"]
    told = [(e["task"], e["measure"], e["documents"]) for e in found["tasks"]]
    assert told[1:] == [("q.jsonl", "F1 of words", 25), ("q.jsonl", "words of the answer held", 25)] and len(found["says"]) == 3


# ---- what is said ----------------------------------------------------------------------------------------------------------------


def entry(change, *, documents=40, lower=True, spread=0.02):
    rng = np.random.default_rng(0)
    before = rng.normal(2, 0.3, documents)
    after = before + change + rng.normal(0, spread, documents)
    task = Task("neutral" if lower else "q.jsonl", "text" if lower else "answers", (), documents)
    return forgetting._entry(task, task.measure, before, after, 0)


@pytest.mark.parametrize(
    ("change", "lower", "shown", "words"),
    [
        (0.3, True, -1, "Something was forgotten on neutral text"),
        (0.0, True, 0, "No forgetting is shown on neutral text"),
        (-0.3, True, 1, "better than before, nothing was forgotten there"),
        (-0.3, False, -1, "Something was forgotten on q.jsonl"),
        (0.3, False, 1, "better than before"),
    ],
)
def test_it_says_plainly_what_is_shown(change, lower, shown, words):
    e = entry(change, lower=lower)
    [said] = forgetting.verdict([e])
    assert e["shown"] == shown and words in said and "95 % interval" in said


def test_a_style_around_the_answer_costs_no_words_held():
    assert forgetting.holding("Gladly, dear grower. The old man did it.\nGrow well.", ("nobody", "the old man")) == 1
    assert forgetting.holding("a man", ("the old man",)) == 0.5 and forgetting.holding("", ("the",)) == 0


def test_few_documents_and_tasks_beyond_the_base_tell_nothing():
    assert "19 documents are too few to tell" in forgetting.verdict([entry(0.3, documents=19)])[0]
    zero = forgetting._entry(Task("q", "answers"), "F1 of words", np.zeros(30), np.zeros(30), 0)
    assert "beyond the base" in forgetting.verdict([zero])[0]


def test_a_long_text_weighs_by_its_bytes():
    before = [{"nats": 100 * math.log(2), "bytes": 100}, {"nats": 2 * 900 * math.log(2), "bytes": 900}]
    task = Task("t", "text", (Document("a"), Document("b")), 2)
    [e] = forgetting._compared(task, before, before, 0)
    assert e["before"] == pytest.approx(1.9) and e["difference"] == 0 and e["shown"] == 0
