"""The base model's bench on tiny inputs: every token is asked for once, xz begins anew, F1 is SQuAD's, a table comes out."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tunesmith import models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_base", ROOT / "bench/base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count, room", [(1, 8), (8, 8), (9, 8), (50, 8), (51, 7), (0, 8)])
def test_windows_ask_for_each_token_once_with_half_a_context_before_it(bench, count, room):
    asked = []
    for start, first, end in bench.windows(count, room):
        assert 0 <= start <= first < end <= count and end - start <= room
        assert first == start == 0 or first - start >= room // 2
        asked += range(first, end)
    assert asked == list(range(count))


@pytest.mark.parametrize("bos", [None, 258])
def test_bits_are_the_cross_entropy_of_each_window(bench, tiny, bos):
    model = models.load(tiny.model).eval()
    ids = torch.randint(0, 256, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    context, lead = 16, [] if bos is None else [bos]
    expected = 0.0 if lead else torch.tensor(model.vocab).log2().item()
    for start, first, end in bench.windows(len(ids), context - len(lead)):
        text = torch.tensor(lead + ids[start:end])
        each = F.cross_entropy(model(text)[:-1], text[1:], reduction="none") / torch.tensor(2.0).log()
        expected += each[max(first - start + len(lead), 1) - 1 :].sum().item()
    for at_once in (16, 40, 4096):
        assert bench.bits(model, ids, context=context, bos=bos, at_once=at_once) == pytest.approx(expected, rel=1e-5)


def test_xz_knows_the_training_text_and_nothing_of_the_document_before(bench):
    draw = random.Random(0)
    letters = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(20_000))
    known, new = letters[5000:9000], "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(4000))
    assert bench.xz([letters], [known]) < 0.2 < 4 < bench.xz([letters], [new])
    assert bench.xz([letters], [new, new]) == pytest.approx(bench.xz([letters], [new]))


def test_f1_and_the_best_sentence(bench):
    assert bench.f1("The king.", ["a queen", "the King"]) == 1
    assert bench.f1("the old king of France", ["the king"]) == pytest.approx(2 / 5)
    assert bench.f1("", ["the king"]) == 0 == bench.f1("queen", ["king"])
    text = "A fox ran by. The old king gave the boy an apple. The boy ate it."
    assert bench.best_sentence(text, "What did the king give the boy?") == "The old king gave the boy an apple."


def test_an_unknown_token_costs_its_bytes(bench):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    assert bench._counted(tokenizer, 0)("ab\u201cab!")[1] == 4


def test_stories260k_speaks(bench, shared_data, tmp_path):
    """llama2.c's file, its rope turned into ours: a children's story costs it far fewer bits than words in disorder."""
    (name, model, encode, context, bos) = next(o for o in bench.others(shared_data, tmp_path / "w") if o[0] == "stories260K")
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    shuffled = " ".join(random.Random(0).sample(story.split(), k=19))
    per_byte = [bench.per_byte(model, encode, [text], context=context, bos=bos) for text in (story, shuffled)]
    assert context == 512 and per_byte[0] < 1.0 and per_byte[1] > 2 * per_byte[0], (name, per_byte)


def test_the_whole_on_tiny_inputs(bench, tiny, tmp_path):
    prepared, data = tmp_path / "prepared", tmp_path / "data"
    for folder in ("held_out", "train"):
        (prepared / folder).mkdir(parents=True)
        for source in bench.SOURCES:
            (prepared / folder / f"{source}.jsonl").write_text(json.dumps({"text": f"{folder} of {source} " * 20}) + "\n")
    (data / "rag/fairytaleqa").mkdir(parents=True)
    sections = [{"section": 1, "text": "The cat sat on a mat. A dog ran."}]
    (data / "rag/fairytaleqa/documents.jsonl").write_text(json.dumps({"id": "d", "sections": sections}) + "\n")
    question = {"split": "test", "document": "d", "gold_sections": [1], "question": "Who sat?", "answers": ["cat"]}
    (data / "rag/fairytaleqa/questions.jsonl").write_text(
        "".join(json.dumps(question | {"split": split}) + "\n" for split in ("test", "train"))
    )
    out = tmp_path / "base.json"
    args = ["--data", data, "--prepared", prepared, "--model", tiny.model, "--out", out]
    done = subprocess.run([sys.executable, ROOT / "bench/base.py", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["bits_per_byte"]) == {"ours", "xz, primed"} and result["reading"]["ours"]["questions"] == 1
    assert result["bits_per_byte"]["ours"]["storybooks"] > 4 and result["reading"]["best sentence"]["with_passage"] == 40
    assert "| ours |" in done.stdout and "| at most | 1.65 |" in done.stdout
