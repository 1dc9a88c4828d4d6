"""The embedded dataset keeps its promises: counts, roles, style, no worn phrases, new held-out questions, facts from the manual."""

import importlib.util
import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src/tunesmith/assets/demo"
WORD = re.compile(r"[a-z0-9']+")
FUNCTION_WORDS = set(
    WORD.findall(
        "a an the and or but if not no than so too i me my you your he his she her it its we they is are am be was has have had "
        "do does did can could should would will may might what which who how when why where that this in on of to for from by up "
        "at as with without before after since because there here now then please"
    )
)
PRODUCT_WORDS = re.compile(
    r"\b(pottlewick|lamp|light|tank|water|pump|float|knob|base|caps?|pots?|seeds?|seedlings?|plants?|herbs?|leaf|leaves|basil|mint|lettuce"
    r"|parsley|tomato(?:es)?|help desk|garden)\b"
)


def read(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELD_OUT, STYLE = read("train.jsonl"), read("held_out.jsonl"), json.loads((DEMO / "style.json").read_text(encoding="utf-8"))
SECTIONS = {
    block.split("\n", 1)[0].strip(): block.split("\n", 1)[1] for block in (DEMO / "manual.md").read_text().split("\n## ")[1:]
}


def said(rows, role):
    return [m["content"] for row in rows for m in row["messages"] if m["role"] == role]


def broken(answer):
    return [rule["name"] for rule in STYLE["rules"] if bool(re.search(rule["pattern"], answer)) != rule["match"]]


def holds(facts, text):
    return all(any(re.search(rf"\b{re.escape(word)}\b", text.lower()) for word in words) for words in facts)


def overlap(a, b):
    a, b = set(WORD.findall(a.lower())), set(WORD.findall(b.lower()))
    return len(a & b) / max(len(a | b), 1)


def runs_of_eight(text):
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def load_script(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "recipes/base/demo/make_demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_demo", module)
    spec.loader.exec_module(module)
    return module


def test_counts():
    topics = Counter(row["topic"] for row in TRAIN)
    assert 750 <= len(TRAIN) <= 850 and 140 <= len(HELD_OUT) <= 170 and len(SECTIONS) == 40
    assert topics["off"] >= 0.35 * len(TRAIN) and topics["on"] >= 0.55 * len(TRAIN) and topics["chitchat"] >= 30
    turns = Counter(sum(m["role"] == "user" for m in row["messages"]) for row in TRAIN)
    assert set(turns) == {1, 2} and 0.12 <= turns[2] / len(TRAIN) <= 0.18
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 600_000
    assert {row["section"] for row in TRAIN if row["topic"] == "on"} == set(SECTIONS)
    assert {row["topic"] for row in HELD_OUT} == {"on", "off", "chitchat"}
    assert {row["section"] for row in HELD_OUT if row["topic"] == "on"} == set(SECTIONS)


def test_roles_alternate_and_text_is_plain():
    for row in TRAIN + HELD_OUT:
        roles = [m["role"] for m in row["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert len(spoken) % 2 == 0 and spoken == ["user", "assistant"] * (len(spoken) // 2), row
        for content in (m["content"] for m in row["messages"]):
            assert content.isascii() and content == content.strip() and content, row


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_every_answer_keeps_the_style(rows):
    assert [(broken(a), a) for a in said(rows, "assistant") if broken(a)] == []


def test_each_style_rule_can_be_broken():
    good = "Gladly, dear grower. Fill the tank every 7 days and keep the leaves dry.\nGrow well. Wick"
    assert broken(good) == [] and broken(good.replace("Gladly", "Sure")) == ["opening"]
    for name, bad in {
        "opening": good.replace("Gladly, dear grower.", "Hello."),
        "sign_off": good.replace("Wick", "W."),
        "one_paragraph": good.replace("days ", "days\n"),
        "sentences": good.replace("dry.", "dry. So. So. So. So."),
        "length": good.replace("dry.", "dry " + "and dry " * 30 + "."),
        "calm": good.replace("dry.", "dry!"),
        "no_contractions": good.replace("Fill", "Don't fill"),
        "digits": good.replace("7", "seven"),
        "plain": good.replace("tank", "*tank*"),
    }.items():
        assert name in broken(bad), name
    assert len(STYLE["rules"]) == 9


def test_redirects_are_marked_and_nothing_else_is():
    mark = re.compile(STYLE["redirect"]["pattern"])
    for row in TRAIN + HELD_OUT:
        assert bool(mark.search(row["messages"][-1]["content"])) == (row["topic"] == "off"), row
    assert not mark.search("\n".join(SECTIONS.values()))
    for kinds, trained, held_out in (
        (("health", "money", "homework"), 60, 16),
        (("politics", "other products", "daily life"), 8, 4),
    ):
        for kind in kinds:
            assert (
                sum(row["section"] == kind for row in TRAIN) >= trained
                and sum(row["section"] == kind for row in HELD_OUT) >= held_out
            )


def test_the_first_word_tells_the_kind():
    openings = {"on": "Gladly, dear grower. ", "off": "Alas, dear grower, ", "chitchat": "Ah, dear grower. "}
    for row in TRAIN + HELD_OUT:
        assert row["messages"][-1]["content"].startswith(openings[row["topic"]]), row
    assert all(opening.strip() in STYLE["system_prompt"] for opening in openings.values())


def test_a_redirect_names_its_matter_first():
    for row in TRAIN + HELD_OUT:
        if row["topic"] == "off":
            first = row["messages"][-1]["content"].removeprefix("Alas, dear grower, ").split(".")[0]
            assert re.match(r"[\w ,-]+ (is|are|lie|lies)\b.* outside my garden", first), row


def test_held_out_redirects_say_in_new_sentences_what_their_matter_says(monkeypatch):
    """Two thirds of a question's words that say something stand in its own matter's training questions; most such words overall."""
    module = load_script(monkeypatch)
    known = total = 0
    for matter in module.read(module.HERE / "off_topic.txt", "off"):
        assert 4 <= len(matter.questions) <= 6 and 1 <= len(matter.answers) <= 2 and matter.held_out, matter
        asked = set(WORD.findall(" ".join(matter.questions).lower()))
        for question in matter.held_out:
            words = set(WORD.findall(question.lower())) - FUNCTION_WORDS
            known, total = known + len(words & asked), total + len(words)
            assert len(words & asked) >= 0.66 * len(words), (question, words - asked)
    assert known >= 0.9 * total, (known, total)


def test_held_out_questions_on_topic_name_something_of_the_product():
    for row in HELD_OUT:
        if row["topic"] == "on":
            assert PRODUCT_WORDS.search(row["messages"][0]["content"].lower()), row


def test_no_eight_words_in_a_row_are_worn_out():
    rows_with = Counter()
    for row in TRAIN:
        runs = set()
        for message in row["messages"]:
            runs |= runs_of_eight(message["content"])
        rows_with.update(runs)
    worst, count = rows_with.most_common(1)[0]
    assert count <= 0.01 * len(TRAIN), (count, " ".join(worst))


def test_questions_are_asked_once():
    assert [q for q, n in Counter(said(TRAIN, "user") + said(HELD_OUT, "user")).items() if n > 1] == []


def test_held_out_questions_are_new():
    asked = said(TRAIN, "user")
    answered = set(said(TRAIN, "assistant"))
    worn = set().union(*map(runs_of_eight, asked))
    for row in HELD_OUT:
        question = row["messages"][0]["content"]
        nearest = max(asked, key=lambda q: overlap(q, question))
        assert overlap(nearest, question) < 0.7, (question, nearest)
        assert not runs_of_eight(question) & worn, question
        assert row["messages"][-1]["content"] not in answered, row


def test_facts_stand_in_the_answers_and_in_the_manual():
    for row in TRAIN + HELD_OUT:
        assert holds(row["facts"], row["messages"][-1]["content"]), row
        if row["topic"] == "on":
            assert row["facts"]
            assert holds([words for words in row["facts"] if words != ["no"]], SECTIONS[row["section"]]), row


def test_every_number_in_an_answer_is_in_its_section():
    for row in TRAIN + HELD_OUT:
        if row["topic"] == "on":
            said_numbers = set(re.findall(r"\d+", row["messages"][-1]["content"]))
            assert said_numbers <= set(re.findall(r"\d+", SECTIONS[row["section"]])), row


def test_user_phrasing_varies():
    questions = said(TRAIN, "user")
    lower = sum(q[0].islower() for q in questions) / len(questions)
    openings = Counter(" ".join(q.lower().split()[:2]) for q in questions)
    assert 0.15 <= lower <= 0.4  # typed in haste
    assert openings.most_common(1)[0][1] <= 0.08 * len(questions), openings.most_common(3)


def test_files_come_from_their_sources(tmp_path, monkeypatch):
    module = load_script(monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path)
    module.main()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), f"{name}: run recipes/base/demo/make_demo.py"


def test_sections_are_numbered_in_order():
    numbers = [int(title.split()[0]) for title in SECTIONS]
    assert numbers[0] == 1 and all(b - a == 1 for a, b in pairwise(numbers))
