"""The recipe of the small base model: streamed data, test text kept apart, a tokenizer that loads equal, a start of known size."""

import hashlib
import importlib
import json
import lzma
import math
import random
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest
import yaml

from tunesmith.config.schema import RunConfig
from tunesmith.tokenizer import Tokenizer as OurTokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/base"
WORDS = re.findall(r"\w+", "the cat sat on a mat and saw two red birds fly over old trees near 14 small ponds while rain fell")
ODD = [
    "",
    " ",
    "a  b\n\n\tc",
    "It's 2,048 tokens!",
    "naïve café — “quotes”",
    "日本語 и русский 🌱",
    "x" * 300,
    "<|end|> typed",
    "\r\n \x00 end",
]


@pytest.fixture(scope="module")
def recipe():
    """The scripts as modules; their folder is on the path only while they load (as when run), so their names do not stay behind."""
    names = ("prepare", "drills", "tokenizer", "make_config", "init_weights", "instruct", "gist", "average")
    assert not [name for name in names if name in sys.modules]
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


def story(draw, words):
    text = [draw.choice(WORDS) for _ in range(words)]
    return "\n\n".join(" ".join(text[i : i + 40]) + "." for i in range(0, words, 40))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of the recipe's shape with made-up text; one book and one storybook quote a test story."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "pretrain").mkdir()
    (folder / "rag/fairytaleqa").mkdir(parents=True)
    tales = {split: story(draw, 120) for split in ("train", "val", "test")}
    for file, count, words in (
        ("storybooks_ccby", 60, 60),
        ("childrens_books", 20, 2000),
        ("factbook_cc0", 30, 300),
        ("openstax_ccby", 60, 900),
        ("books", 40, 6000),
    ):
        with lzma.open(folder / f"pretrain/{file}.jsonl.xz", "wt") as out:
            for i in range(count):
                text = story(draw, words)
                if file == "factbook_cc0":
                    letter = chr(65 + i % 26)
                    lines = f"Location: Northern shore, between the sea and the hills\nCapital\nname: Port {letter}x\n"
                    text = f"Land{letter}\n\n{lines}{text}"
                if file == "books" and i >= 30:
                    text = re.sub("cat|mat", "quixotic", text)
                if file in ("storybooks_ccby", "books"):  # every document, whichever are held out
                    text += "\n\n" + tales["test"]
                out.write(json.dumps({"text": text, "title": f"Title {i // 2}", "path": f"p/{i}.md"}) + "\n")
    with (folder / "rag/fairytaleqa/documents.jsonl").open("w") as out:
        for split, text in tales.items():
            for n in range(4):
                sections = [{"section": 1, "text": text if n == 0 else story(draw, 40)}, {"section": 2, "text": story(draw, 30)}]
                out.write(json.dumps({"id": f"{split}{n}", "split": split, "title": "t", "sections": sections}) + "\n")
    with (folder / "rag/fairytaleqa/questions.jsonl").open("w") as out:
        for split in tales:
            for n in range(100):
                row = {
                    "id": f"{split}{n % 4}#{n}",
                    "split": split,
                    "document": f"{split}{n % 4}",
                    "gold_sections": [1],
                    "answers": ["the cat"],
                }
                out.write(json.dumps(row | {"question": f"Who in {split} sat on mat {n}?"}) + "\n")
    (folder / "sft/medquad").mkdir(parents=True)
    (folder / "sft/gsm8k").mkdir()
    (folder / "sft/customer_support/banking77").mkdir(parents=True)
    health = {"instruction": "What is (are) gout ?", "output": "Gout is a kind of arthritis that comes and goes. More."}
    (folder / "sft/medquad/medquad.jsonl").write_text(json.dumps(health) + "\n")
    (folder / "sft/gsm8k/train.jsonl").write_text(json.dumps({"question": "What is 2 and 2?", "answer": "#### 4"}) + "\n")
    (folder / "sft/customer_support/banking77/train.csv").write_text('text,category\n"Where, then, is my card?",card_arrival\n')
    (folder / "sft/rasbt").mkdir(parents=True)
    (folder / "sft/gpteacher").mkdir()
    (folder / "sft/rasbt/instruction-data.json").write_text(
        json.dumps(
            [
                {"instruction": "Name a color.", "input": "", "output": "Blue."},
                {"instruction": "Mend this.", "input": "he go", "output": "He goes."},
                {"instruction": "Show code.", "input": "", "output": "`print(1)` {x}"},
            ]
        )
    )
    (folder / "sft/gpteacher/roleplay.json").write_text(
        json.dumps([{"instruction": "Speak.", "input": "", "response": "word " * 80}])
    )
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_preparing_keeps_held_out_documents_apart_and_is_repeatable(recipe, data, tmp_path):
    prepare = recipe["prepare"]
    first, again = (prepare.write(data, tmp_path / name, 1_500_000) for name in ("a", "b"))
    assert first == again
    for path in sorted((tmp_path / "a").rglob("*.jsonl")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    for source, n in first.items():
        trained = "\n\n".join(row["text"] for row in rows(tmp_path / f"a/train/{source}.jsonl"))
        held = [row["text"] for row in rows(tmp_path / f"a/held_out/{source}.jsonl")]
        assert n["held_out_documents"] == len(held) >= 2
        assert not [p for text in held for p in text.split("\n\n")[:-4] if len(p) > 120 and p in trained]  # [:-4]: the quoted tale
    assert first["storybooks"]["documents"] + first["storybooks"]["held_out_documents"] == 60
    assert first["storybooks"]["held_out_documents"] % 2 == 0  # two printings of a title stay on one side
    assert 1.2e6 < sum(n["bytes"] for n in first.values()) <= 1.5e6


def test_small_sources_are_whole_and_simple_books_come_first(recipe, data, tmp_path):
    account = recipe["prepare"].write(data, tmp_path, 1_000_000)
    assert all(account[s]["documents"] + account[s]["held_out_documents"] == n for s, n in (("childrens", 20), ("factbook", 30)))
    assert 0 < account["books"]["documents"] < 30
    assert not [row for row in rows(tmp_path / "train/books.jsonl") if "quixotic" in row["text"]]


def test_test_stories_are_not_trained_on(recipe, data, tmp_path):
    prepare = recipe["prepare"]
    account = prepare.write(data, tmp_path, 1_500_000)
    runs = prepare.test_runs(data)
    for source in ("storybooks", "books"):
        assert account[source]["paragraphs_left_out"] >= account[source]["documents"]
        words = [prepare.WORD.findall(row["text"].lower()) for row in rows(tmp_path / f"train/{source}.jsonl")]
        long = prepare.RUN + prepare.STRIDE - 1
        shared = [
            w
            for w in words
            for i in range(len(w) - long + 1)
            if all(" ".join(w[j : j + prepare.RUN]) in runs for j in range(i, i + prepare.STRIDE))
        ]
        assert not shared
    assert runs == prepare.test_runs(data) and not prepare.shares_run("a line of ten words that no tale has in it at all", runs)


def test_memory_does_not_grow_with_the_number_of_documents(recipe, tmp_path):
    prepare = recipe["prepare"]
    text = ("word and word again " * 20 + "\n\n") * 75  # 30 kB
    peaks = []
    for count in (10, 50):
        folder = tmp_path / str(count)
        (folder / "pretrain").mkdir(parents=True)
        for file in prepare.SOURCES:
            with lzma.open(folder / f"pretrain/{file}.jsonl.xz", "wt", preset=0) as out:
                for i in range(count):
                    out.write(json.dumps({"text": text, "title": f"t{i}", "path": f"{i}"}) + "\n")
        tracemalloc.start()
        prepare.write(folder, folder / "out", 30_000_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks  # the texts are 1.5 and 7.5 MB


def test_pieces_join_to_the_text(recipe):
    draw = random.Random(1)
    text = "\n\n".join("p" * draw.randint(1, 90) for _ in range(200))
    cut = list(recipe["prepare"].pieces(text, 100))
    assert "\n\n".join(cut) == text and len(cut) > 50 and all(len(p) <= 100 for p in cut)


@pytest.fixture(scope="module")
def folder(recipe, data, tmp_path_factory):
    """A tokenizer folder of 400 tokens trained on made-up text."""
    out = tmp_path_factory.mktemp("tok")
    draw = random.Random(2)
    recipe["tokenizer"].save(recipe["tokenizer"].build((story(draw, 200) for _ in range(20)), 400), out)
    return out


def test_tokenizer_round_trip_equals_transformers_and_ours(recipe, folder):
    transformers = pytest.importorskip("transformers")
    theirs, ours, raw = transformers.AutoTokenizer.from_pretrained(folder), OurTokenizer.load(folder), recipe["tokenizer"]
    backend = raw.Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw = random.Random(3)
    texts = [
        *ODD,
        *(story(draw, 50) for _ in range(20)),
        "".join(chr(draw.choice([32, 65, 0xE9, 0x3042, 0x1F331, 10])) for _ in range(200)),
    ]
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == ids
        assert backend.decode(ids, skip_special_tokens=False) == text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        if "<|" not in text:
            assert list(ours.encode(text)) == ids
    assert [backend.token_to_id(token) for token in raw.SPECIAL] == [0, 1, 2, 3, 4]
    assert len(theirs("20481")["input_ids"]) == 5
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|end|>", "<|pad|>", None)


def test_template_has_one_stop_a_turn_and_refuses_unknown_roles(folder):
    transformers = pytest.importorskip("transformers")
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello.\nYes"},
        {"role": "user", "content": "Why?"},
    ]
    whole = "<|system|>Be kind.<|end|><|user|> Hi <|end|><|assistant|>Hello.\nYes<|end|><|user|>Why?<|end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == whole
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == whole + "<|assistant|>"
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == len(messages) and ids[0] == 2
    with pytest.raises(jinja2.exceptions.TemplateError, match="roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_start_is_the_llama_transformers_builds(recipe, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = recipe["make_config"].config()
    assert 9e6 < recipe["make_config"].parameters(config) < 10e6
    tensors = recipe["init_weights"].weights(config, 0)
    same, other = recipe["init_weights"].weights(config, 0), recipe["init_weights"].weights(config, 1)
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert not torch.equal(tensors["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (
        model.num_parameters()
        == recipe["make_config"].parameters(config)
        == sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    )
    ids = torch.randint(0, config["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(0))
    assert abs(model(ids, labels=ids).loss.item() - math.log(config["vocab_size"])) < 0.1  # knows nothing yet


def test_instruction_rows_are_short_plain_and_never_from_the_test_split(recipe, data):
    instruct = recipe["instruct"]
    assert [row["messages"][1]["content"] for row in instruct.instructions(data)] == ["Blue.", "He goes."]
    facts = list(instruct.facts(data, random.Random(0)))
    held = recipe["prepare"].held_out_keys("factbook", {f"p/{i}.md" for i in range(30)})
    assert len(facts) == 2 * (30 - len(held))
    assert any(row["messages"][1]["content"] == "The capital of LandA is Port Ax." for row in facts)
    reading = list(instruct.reading(data, "train", random.Random(0), mixed=True))
    answers = [row["messages"][-1]["content"] for row in reading]
    assert len(reading) == 100 and "test" not in "".join(re.findall(r"Who in (\w+)", json.dumps(reading)))
    cited = [a for a in answers if re.search(r" \[[123]\]$", a)]
    without = [a for a in answers if a in instruct.NO_ANSWER]
    drawn = [row for seed in range(10) for row in instruct.reading(data, "train", random.Random(seed), mixed=True)]
    assert 3 <= sum(row["messages"][-1]["content"] in instruct.NO_ANSWER for row in drawn) <= 25  # one in 100 of 1,000
    assert 5 <= len(cited) <= 25 and sum(a in ("Cat.", "A cat.", "The cat.") for a in answers) == 100 - len(cited) - len(without)
    golds = [story["sections"][0]["text"] for story in rows(data / "rag/fairytaleqa/documents.jsonl")[:4]]
    for row, answer in zip(reading, answers, strict=True):
        prompt = row["messages"][0]["content"]
        gold = golds[int(re.search(r"on mat (\d+)", prompt)[1]) % 4]
        assert (gold in prompt) == (answer not in instruct.NO_ANSWER)
        if found := re.search(r" \[([123])\]$", answer):
            assert f"[{found[1]}] {gold}" in prompt


def test_drills_ask_what_the_passage_answers(recipe):
    drills = recipe["drills"]
    passage = (
        "The old woman gave the boy a golden apple. When the king fell ill, the queen sent for a doctor. "
        "The miller stayed at home because he was afraid of the wolf. The fox was very hungry. "
        '"I will go to the sea," said the fisherman. The hare lived in the forest.'
    )
    assert dict(drills.of_passage(passage)) == {
        "Who gave the boy a golden apple?": "The old woman.",
        "What did the old woman give?": "The boy a golden apple.",
        "What happened when the king fell ill?": "The queen sent for a doctor.",
        "Why did the miller stay at home?": "He was afraid of the wolf.",
        "Who stayed at home because he was afraid of the wolf?": "The miller.",
        "What did the miller do?": "Stayed at home because he was afraid of the wolf.",
        "Who was very hungry?": "The fox.",
        "How was the fox?": "Very hungry.",
        "What did the fisherman say?": "I will go to the sea.",
        'Who said "I will go to the sea"?': "The fisherman.",
        "Who lived in the forest?": "The hare.",
        "Where did the hare live?": "In the forest.",
    }
    entry = "Landia\n\nLocation: Northern shore\nPopulation: 5,000 (2020 est.)"
    assert drills.of_entry(entry, "Landia") == [
        ("What is the location of Landia?", "Northern shore."),
        ("What is the population of Landia?", "5,000."),
    ]
    verbs = "walked/walk loved/love cried/cry stopped/stop danced/dance wanted/want asked/ask opened/open used/use went/go"
    assert [drills.base(pair.split("/")[0]) for pair in verbs.split()] == [pair.split("/")[1] for pair in verbs.split()]


def test_drills_are_of_the_passage_or_say_that_it_holds_no_answer(recipe):
    drills, draw = recipe["drills"], random.Random(0)
    passage, other = "The boy found a golden key. The king was very sad.", "A hen laid an egg."
    pairs = drills.of_passage(passage)
    for _ in range(200):
        turns = [m["content"] for m in drills.as_chat(passage, pairs, [other], draw)["messages"]]
        if turns[1] in drills.NO_ANSWER:
            assert other in turns[0] and passage not in turns[0]
        elif cited := re.search(r" \[([12])\]$", turns[1]):
            assert f"[{cited[1]}] {passage}" in turns[0]
        else:
            assert passage in turns[0] and len(turns) == 4 and (turns[2], turns[3]) == pairs[1]
    for text in (drills.as_text(passage, pairs, draw) for _ in range(20)):
        assert passage in text and f"Question: {pairs[0][0]}" in text and f"Answer: {pairs[0][1]}" in text
    cut = list(drills.passages("\n\n".join("w " * n for n in (50, 30, 300, 40, 40, 10)), 60, 100))
    assert [len(p.split()) for p in cut] == [80, 90]


def test_scope_rows_say_what_a_question_is_about_and_keep_to_a_subject(recipe, data):
    instruct = recipe["instruct"]
    asked = instruct.subjects(data, random.Random(0))
    assert asked["money and banks"] == ["Where, then, is my card?"] and asked["health"] == ["What is (are) gout?"]
    assert all("Who in train" in q for q in asked["stories"]) and len(asked["stories"]) == 100
    of = {q: name for name, questions in asked.items() for q in questions}
    kept = turned = 0
    for row in instruct.scope(data, random.Random(0), 400):
        *before, question, answer = (m["content"] for m in row["messages"])
        about = next(name for q, name in of.items() if q in question)
        assert about in answer
        if before:  # a system message names the subject
            same = about in before[0]
            kept, turned = kept + same, turned + (not same)
            assert same == ("can help" in answer or "can help with that" in answer)
    assert kept > 60 and turned > 60
    (row,) = instruct.health(data)
    assert row["messages"][1]["content"] == "Gout is a kind of arthritis that comes and goes."


def test_gist_rows_name_what_a_text_is_about_and_begin_as_they_are_told(recipe, data, tmp_path):
    gist, folder = recipe["gist"], tmp_path / "data"
    shutil.copytree(data, folder)
    own = {
        "the stars": "Planets turn around their star in long and quiet years {}.",
        "trade": "Prices rise when many want what few sell {}.",
    }
    with lzma.open(folder / "pretrain/openstax_ccby.jsonl.xz", "wt", encoding="utf-8") as out:
        for title, subject in (("Astronomy 2e", "the stars"), ("Principles of Economics 3e", "trade")):
            for i in range(60):
                text = (
                    f"About OpenStax\n\nAbout {title}" if i == 0 else "\n".join(own[subject].format(f"{i} {n}") for n in range(3))
                )
                out.write(json.dumps({"text": text, "path": f"{subject}/{i}"}) + "\n")
    sentences = gist.textbook_sentences(folder)
    assert set(sentences) == set(own) and all(text.startswith(own[s][:9]) for s, texts in sentences.items() for text in texts)
    held_out = recipe["prepare"].held_out_keys("openstax", {f"{s}/{i}" for s in own for i in range(60)})
    kept = {s: sum(f"{s}/{i}" not in held_out for i in range(1, 60)) for s in own}
    assert {s: len(texts) for s, texts in sentences.items()} == {s: 3 * n for s, n in kept.items()}
    begins = {"same": 0, "other": 0}
    for row in gist.rows(folder, random.Random(0), 600):
        *before, text, answer = (m["content"] for m in row["messages"])
        subject = next((s for s in own if own[s][:9] in text), None)
        if "Group A" in text:
            of = {letter: re.search(rf"Group {letter}: (.{{9}})", text)[1] for letter in "AB"}
            asked = re.search(r"(?:belong\?\n|group: )(.{9})", text)[1]
            assert of[answer[0]] == asked or asked not in of.values()
        elif "words" in text and ", " in answer:
            assert all(word in text.lower() for word in answer.split(", "))
        elif subject and before and (told := re.search(r'"([^"]+)".*"([^"]+)"', before[0])):
            same = subject in before[0]
            begins["same" if same else "other"] += 1
            assert answer.lower().startswith(told[1 if same else 2].lower() + ",") and subject in answer
        elif subject:
            assert subject in answer.lower()
    assert min(begins.values()) > 5, begins


@pytest.mark.parametrize("name", ["pretrain", "instruct", "reading"])
def test_run_files_are_valid_and_follow_each_other(recipe, name):
    config = RunConfig.model_validate(yaml.safe_load((RECIPE / f"{name}.yaml").read_text()))
    texts = [*recipe["prepare"].SOURCES.values(), "drills"]
    made = {f".cache/base/train/{source}.jsonl" for source in texts}
    made |= {f".cache/base/{rows}.jsonl" for rows in ("instruct", "drills", "scope", "gist", "tales", "reading")}
    assert config.method == "full" and {source.path for source in config.data.train} <= made
    before = {"pretrain": ".cache/base/init", "instruct": "runs/base-1-pretrain/model", "reading": "runs/base-2-instruct/model"}
    assert config.model == before[name]


def test_readme_names_the_files_we_have(shared_data):
    listed = re.findall(r"^\| (\S+\.(?:xz|jsonl?|csv)) \|.*\| ([0-9a-f]{64}) \|$", (RECIPE / "README.md").read_text(), re.MULTILINE)
    assert len(listed) == 12
    for name, sha256 in listed:
        with (shared_data / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256, name


@pytest.mark.parametrize(("answer", "said"), [
    ("It was delightfully cold.", "delightfully cold"),  # as the sentence has it
    ("The broken rake", "broken rake"),
    ("He had a triangular hat", ""),  # nothing is near enough: as it was
    ("Old rake", "an old broken rake"),
    ("His mouth had a grin.", ""),  # `His mouth`, near enough by F1, says nothing
])  # fmt: skip
def test_answers_take_the_words_of_their_passage(recipe, answer, said):
    passage = '"It is so delightfully cold," said the Snow Man. His mouth was made of an old broken rake, and had teeth! He sang.'
    assert recipe["instruct"].in_its_words(passage, answer) == (said or answer)


def test_text_that_stands_in_a_held_out_document_is_not_trained_on(recipe, data, tmp_path):
    held = recipe["prepare"].held_out_keys(
        "childrens", {key for key, _ in recipe["prepare"].documents(data / "pretrain/childrens_books.jsonl.xz")}
    )
    texts = [text for key, text in recipe["prepare"].documents(data / "pretrain/childrens_books.jsonl.xz") if key in held]
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    with lzma.open(copy / "pretrain/books.jsonl.xz", "at", encoding="utf-8") as out:
        out.write(json.dumps({"path": "the same again", "text": texts[0]}) + "\n")
    recipe["prepare"].write(copy, tmp_path / "out", 10**9)
    runs = set(recipe["prepare"].runs_of(texts[0]))
    rows = [json.loads(line)["text"] for path in (tmp_path / "out/train").glob("*.jsonl") for line in path.open(encoding="utf-8")]
    assert runs and not any(recipe["prepare"].shares_run(row, runs) for row in rows)


def test_the_mean_of_checkpoints(recipe, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    for name, value, size in (("a", 1.0, 3), ("b", 4.0, 3), ("c", 4.0, 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        save_file({"w": torch.full((size,), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    recipe["average"].average(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    assert found.dtype is torch.bfloat16 and found.tolist() == [2.5] * 3 and (tmp_path / "out/config.json").read_text() == "a"
    with pytest.raises(ValueError, match="other weights"):
        recipe["average"].average(tmp_path / "out", [tmp_path / "a", tmp_path / "c"])
