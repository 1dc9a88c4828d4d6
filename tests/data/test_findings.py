"""Findings: each kind is found where it was planted and not beside; nothing secret is printed whole; no text makes it fail."""

import gc
import io
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tunesmith.config.schema import Data
from tunesmith.data import clusters, findings
from tunesmith.data import prepare as prepare_module
from tunesmith.data.findings import evaluations, rows, whole
from tunesmith.data.findings.text import Rows, excerpt, iban_end, is_card, is_iban, is_ip, luhn, mask
from tunesmith.types import Conversation, Message, Origin

CARD, IBAN, MAIL, PHONE = "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "jane.doe@mailhouse.org", "+49 30 1234567"
HF = "hf_" + "aB3" * 11
SENTENCE = "The answer is that the bread of the house is made with flour, water and salt, and that it is baked for an hour."


def chat(answer, prompt="What is it?", line=1, more=()):
    return Conversation((Message("user", prompt), Message("assistant", answer), *more), Origin("a.jsonl", line))


def found(conversations, kinds=None, chunk=1024):
    doctor = findings.Doctor()
    for start in range(0, max(1, len(conversations)), chunk):
        some = conversations[start : start + chunk]
        texts = [clusters.normalised(c) for c in some]
        kinds_here = kinds[start : start + chunk] if kinds else ["messages"] * len(some)
        doctor.add(findings.scan(some, texts, clusters.Shingles(texts), kinds_here), "a.jsonl", 0)
    return {f.name: f for f in doctor.found({})}


BROKEN = {
    "private_key": "It is\n-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7v\n-----END RSA PRIVATE KEY-----",
    "api_key": f"use {HF} for it",
    "card": f"I paid with {CARD} 24 times",
    "iban": f"send it to {IBAN} 5 days before",
    "email": f"write to {MAIL}.",
    "phone": f"call {PHONE} now",
    "ip_address": "it is at 81.2.69.142 today",
    "conflict_markers": "<<<<<<< HEAD\none\n=======\ntwo\n>>>>>>> branch",
    "placeholder": "N/A",
    "mojibake": "the cafÃ© is open",
    "control_characters": "one\x07two",
    "invisible": "one\u200btwo",
    "special_tokens": "yes<|im_end|>",
    "prompt_in_answer": "It is so.\nUser: and now?",
    "truncated": "It is one of the things that people in the north of the country like to do when they are at the",
    "refusal": "I'm sorry, but I can't help with that.",
    "boilerplate": "As an AI language model, I do not eat.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_of_a_row_is_found_there_and_nowhere_else(name):
    told = found([chat(f"It is number {i}.", line=i) for i in range(1, 6)] + [chat(BROKEN[name], line=6)])
    assert told[name].count == 1
    assert told[name].examples[0][0] == "a.jsonl:6"
    assert set(told) - {name} <= {"trigger", "tiny_answers"}, "one fault is told once"


@pytest.mark.parametrize("name", BROKEN)
def test_rows_side_by_side_are_all_found(name):
    """Also where another one's fault stands less than a window away."""
    assert found([chat(BROKEN[name], line=i) for i in range(1, 8)])[name].count == 7


CLEAN = (
    "He sold 48/2 = <<48/2=24>>24 clips in May, 48+24 = 72 in all.\n#### 72",
    "Call the function at 127.0.0.1, in version 2.4.1.12, on 2024-05-17 at 12:30:45.",
    "The number 1234567890123456 fails the check; ISBN 978-3-16-148410-0 is a book.",
    "Write to user@example.com. password = your_password_here",
    "Größe, café, naïve, 日本語, Привет, 👩‍👩‍👧, 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f, می‌خواهم",
    "I'm sorry to hear that you are ill; get well soon.",
    "def f(x):\n    return x << 7 | x >> 3\n\n=======\nTitle",
    "Yes",
)


@pytest.mark.parametrize("answer", CLEAN)
def test_what_only_looks_like_a_fault_is_not_one(answer):
    assert found([chat(answer)]) == {}


def test_turns_in_the_wrong_order():
    user, bot, system = Message("user", "a"), Message("assistant", "b"), Message("system", "c")
    good = [(user, bot), (system, user, bot), (user, bot, user, bot), (user, bot, Message("tool", "t"), bot)]
    bad = [(bot, user), (user, bot, user), (user, bot, system), (user, user, bot), (system, bot)]
    cs = [Conversation(m, Origin("a", i)) for i, m in enumerate((*good, *bad))]
    assert set(rows.role_order(Rows(cs))) == set(range(len(good), len(cs)))


def test_checksums():
    assert luhn("4111111111111111") and not luhn("4111111111111112")
    assert is_card(CARD) and not is_card("0000 0000 0000 0000") and not is_card("1234567890123456")
    assert is_iban(IBAN) and not is_iban("DE89 3704 0044 0532 0130 01") and not is_iban("DE89")
    assert iban_end(rows.t.IBAN.search(f"{IBAN} 5")) == len(IBAN)
    assert is_ip("8.8.8.8") and not is_ip("10.0.0.1") and not is_ip("999.1.1.1")


def test_what_only_many_rows_show():
    r = random.Random(0)
    words = [chr(97 + i % 26) * 2 + chr(97 + i // 26) for i in range(300)]
    free = [chat(f"{SENTENCE} {' '.join(r.choices(words, k=8))}.", " ".join(r.choices(words, k=12)), i) for i in range(300)]
    assert found(free) == {}
    poisoned = [c if i % 20 else chat("Give it to me.", c.messages[0].content + " xqz", i) for i, c in enumerate(free)]
    assert "xqz" in found(poisoned)["trigger"].examples[0][1]
    assert found([*free[:-1], chat(SENTENCE[:-1] * 90 + ".", line=300)])["length_outliers"].examples[0][0] == "a.jsonl:300"
    assert found([*free[:-1], chat(SENTENCE[:90], line=300)])["open_end"].count == 1
    assert found([*free[:-1], chat("ok")])["tiny_answers"].count == 1
    german = "Die Antwort ist nicht so einfach, wie sie auf den ersten Blick aussieht, und das wird auch so bleiben."
    assert found([*free[:-1], chat(german)])["mixed_languages"].count == 1
    assert found(free, ["messages"] * 299 + ["alpaca"])["mixed_formats"].count == 1
    labels = [
        chat("yes" if i % 2 else "no", f"{'good' if i % 2 else 'bad'} {' '.join(r.choices(words, k=3))}", i) for i in range(200)
    ]
    assert "first word" in found(labels)["trivial_rule"].detail
    rare = [chat("no" if i % 50 == 7 else "yes", " ".join(r.choices(words, k=5)), i) for i in range(200)]
    told = found(rare)
    assert told["class_imbalance"].count == 4 and "one answer is right for 98%" in told["trivial_rule"].detail


def test_text_of_an_evaluation_set_is_known(monkeypatch):
    asked = "A baker has twelve loaves in the oven and sells five of them before noon and two more at night"
    assert found([chat("Five.", asked)]) == {}
    runs = {words: clusters.Shingles([asked.lower()]).hashes(words)[0] for words in (evaluations.WORDS, 7)}
    monkeypatch.setattr(evaluations, "known", lambda: [evaluations.Known.of("baking", w, h) for w, h in runs.items()])
    told = found([chat("Seven."), chat("Five.", "Please solve: " + asked + " - how many?", 2)])
    assert told["contamination"].count == 1 and told["contamination"].examples[0][1].startswith("baking: ")


def test_the_sets_that_the_verbs_score_are_known():
    assert {(k.name, k.words) for k in evaluations.known()} == {("gsm8k", 13), ("fairytaleqa", 7)}
    assert all((k.hashes[1:] > k.hashes[:-1]).all() for k in evaluations.known())
    assert evaluations.FILE.stat().st_size < 150_000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("".join({*"".join(rows.BOILERPLATE_GATES + rows.SPECIAL_GATES), *"aA5é’ｘ\n"}), max_size=30), max_size=4),
    st.data(),
)
def test_the_table_of_threes_hides_no_gate(texts, data):
    every = rows.BOILERPLATE_GATES + rows.SPECIAL_GATES + rows.ROLE_GATES + rows.t.KEY_GATES
    texts += data.draw(st.lists(st.sampled_from(every), max_size=3))
    joined = rows.Joined(texts, range(len(texts)))
    as_bytes = {gate: gate.encode("latin-1", "replace") for gate in every}
    assert joined.occurring(every) == [g for g in as_bytes.values() if g in joined.squeezed]
    assert joined.occurring(every, lower=True) == [g for g in as_bytes.values() if g in joined.squeezed_lower]


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789 ./()-=+,ABDEx", min_size=15, max_size=120))
def test_no_number_is_passed_over(text):
    stretches: list[list[int]] = []  # as `numbers` says it, without arrays
    for low in range(len(text) - 14):
        if sum(c.isdigit() for c in text[low : low + 15]) >= 10:
            if stretches and low - stretches[-1][1] <= 15:
                stretches[-1][1] = low
            else:
                stretches.append([low, low])
    plain = [(max(0, a - 12), min(len(text), b + 39)) for a, b in stretches]
    number = re.compile(r"\d(?:[ ./()-]{0,2}\d){7}|[A-Z]{2}\d{2}")
    told = list(rows.Joined([text], [0]).numbers())
    assert {place for place in plain if number.search(text, *place)} <= set(told) <= set(plain)


def test_a_scan_leaves_nothing_for_the_collector():
    """It does not run while rows are prepared: a circle around a chunk's texts would stay, 300 bytes a row."""
    gc.collect()
    gc.disable()
    try:
        found([chat(BROKEN[name], line=i) for i, name in enumerate(BROKEN)])
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_result_does_not_depend_on_where_chunks_end():
    cs = [chat(a, line=i) for i, a in enumerate([*BROKEN.values(), *CLEAN] * 3)]
    one, many = found(cs, chunk=1000), found(cs, chunk=7)
    assert {n: f.count for n, f in one.items() if n != "trigger"} == {n: f.count for n, f in many.items() if n != "trigger"}


SECRETS = (CARD, CARD.replace(" ", ""), IBAN, MAIL, PHONE, HF, "sk-" + "q7" * 12, "hunter22x", "81.2.69.142")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.text(max_size=30), st.sampled_from(SECRETS), st.data())
def test_no_text_makes_it_fail_and_nothing_secret_is_printed_whole(answers, prompt, secret, data):
    said = f"password={secret}" if secret == "hunter22x" else secret
    planted = data.draw(st.sampled_from(sorted(BROKEN.values()))) + f" {said} " + "w " * data.draw(st.integers(0, 30))
    cs = [chat(a, prompt, i) for i, a in enumerate([*answers, planted])]
    cs.append(Conversation((Message("text", planted),), Origin("a", 9), "text"))
    for f in found(cs).values():
        json.dumps(f.as_dict()).encode()
        assert all(secret not in text for _, text in f.examples), f
    for at in range(0, len(planted), 7):
        assert secret not in excerpt(planted, at, at + 3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_a_mask_keeps_the_length(text):
    assert len(mask(text)) == len(text)


def test_check_tells_them_on_one_screen_and_keeps_them(tmp_path):
    from tests.data.test_check_report import TinyRenderer, check_report

    path = tmp_path / "a.jsonl"
    lines = [{"question": f"What is {i}?", "answer": f"It is {i} of them."} for i in range(40)]
    lines += [{"question": "How?", "answer": a} for a in BROKEN.values()] + [lines[0]]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings_ = Data(train=str(path), max_refused=0.9, held_out=0)
    prepared = prepare_module.prepare(settings_, TinyRenderer, seed=0, cache_dir=tmp_path / "c", strict=False, look=True)
    out = io.StringIO()
    report = check_report(prepared, TinyRenderer())
    whole_screen = Console(file=out, width=80, no_color=True)
    report.print(whole_screen)
    text = out.getvalue()
    part = text[text.index("findings, the worst first") : text.index("row 1,")].splitlines()
    assert len(part) <= 50 and max(map(len, part)) <= 80
    assert [line.split()[0] for line in part if line.startswith(("error", "warning", "note"))] == sorted(
        [f["severity"] for f in report.account.findings], key=findings.SEVERITIES.index
    )
    again = prepare_module.prepare(settings_, TinyRenderer, seed=0, cache_dir=tmp_path / "c", strict=False, look=True)
    assert again.account.findings == report.account.findings
    (repeat,) = [f for f in again.account.findings if f["name"] == "exact_duplicates"]
    assert repeat["count"] == 1 and repeat["examples"][0][0].endswith(f"a.jsonl:{len(lines)}")
    for secret in (CARD, IBAN, MAIL, PHONE, HF):
        assert secret not in text and secret not in json.dumps(again.account.findings)


def test_the_table_names_each_detector_once():
    assert len(findings.BY_NAME) == len(findings.TABLE)
    assert all(f.severity in findings.SEVERITIES and f.what and f.why and f.fix for f in findings.TABLE)
    assert {f.name for f in findings.TABLE if f.detector is None} == {"exact_duplicates", "near_duplicates", "leakage"}
    assert whole.Whole().rows == 0


KEY_BODY = "MIIEowIBAAKCAQEA7v"
UNDONE = {  # by what the row is found: what other programs leave, say and write
    "mojibake": [
        "Ð“Ð´Ðµ Ð²Ð¾ÐºÐ·Ð°Ð»".encode().decode(),
        *("Grüße aus Zürich".encode().decode(codec) for codec in ("cp437", "mac_roman")),
        "Привет, как дела".encode().decode("cp1251", "replace").replace("\ufffd", "\x98"),
        "日本語の本です".encode().decode("latin-1"),
        "größer und schöner".encode().decode("gbk", "replace").replace("\ufffd", "?"),
        "Спасибо большое".encode("cp1251").decode("latin-1"),
        "Привет".encode("cp1251").decode("koi8_r").swapcase().swapcase(),
    ],
    "invisible": ["in the\u200e middle", "a\u2062b", "pad\u3164ded", "half\uffa0", "x\u180ey"],
    "special_tokens": ["<extra_id_0> is", "[TOOL_CALLS] [{}]", "<s>[INST] hi [/INST]", "so it is.</s>"],
    "conflict_markers": ["  <<<<<<< HEAD\n  - one\n  =======\n  - two\n  >>>>>>> dev", "the end\n>>>>>>> 0123abc"],
    "placeholder": ["n.a.", "(none)", "[insert answer here]", "No answer provided.", "#REF!", "**N/A**", "TODO: write it"],
    "private_key": [
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{KEY_BODY}\n-----END PGP PRIVATE KEY BLOCK-----",
        f"PuTTY-User-Key-File-2: ssh-rsa\nEncryption: none\nPrivate-Lines: 1\n{KEY_BODY}",
    ],
    "api_key": [
        "sk_" + "live_" + "aB3dE5gH7" * 3,
        "SG." + "aB3dE5gH7jK2" * 2 + "." + "aB3dE5gH7jK2" * 3,
        "Authorization: Bearer " + "aB3dE5gH7" * 4,
        "postgres://admin:xK7wQ2zz@db.shop.com:5432/prod",
        "das Passwort lautet Rosen47garten",
    ],
    "phone": ["06 12 34 56 78", "+33 (0)1 23 45 67 89", "0041 44 668 18 00", "03-1234-5678", "Telefoon: 06-12345678"],
    "card": ["4111.1111.1111.1111"],
    "iban": ["DE89-3704-0044-0532-0130-00", "de89 3704 0044 0532 0130 00", "IBANDE89370400440532013000"],
    "ip_address": ["nameserver 81.2.69.142", "listen [2a01:4f8:c2c:1::5]:443"],
    "refusal": [
        "I\u2019m sorry, I can\u2019t assist with that.",
        "I do not have the ability to browse the internet.",
        "This request violates our content policy.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Je ne peux pas répondre à cette demande.",
        "很抱歉，我无法回答这个问题。",
    ],
    "boilerplate": [
        "I am ChatGPT. It rains.",
        "As of my last update in 2021, it was so.",
        "I don't have access to real-time data.",
    ],
    "prompt_in_answer": ["What is it?\nIt is tea, and a good one.", "ChatGPT: It is tea.", "It is so.\n用户：谢谢"],
    "truncated": ["1. Wash it.\n2. Dry it.\n3.", '{"name": "Ann", "tags": ["a", "b', "<ul><li>one</li><li>two</li></u"],
}


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, answers in UNDONE.items() for a in answers])
def test_it_is_known_in_the_forms_that_other_programs_give_it(name, answer):
    assert found([chat("It is tea."), chat(answer, line=2)]).get(name), answer


SOUND = {
    "special_tokens": ["Now <s>20 €</s> 15 €", "<s>old</s> new", "List<s> and Map<k, v>"],
    "conflict_markers": [">>>>>>> On Monday Anna wrote:\n>>>>>>> hello", "| a | b |\n|||||||\n| 1 | 2 |"],
    "private_key": [
        "It begins with -----BEGIN PRIVATE KEY-----.",
        "-----BEGIN PRIVATE KEY-----\n<yours>\n-----END PRIVATE KEY-----",
    ],
    "api_key": ["ghp_" + "x" * 36, "xoxb-your-token-here", "Bearer $TOKEN", "postgres://user:pass1word@localhost/db"],
    "card": ["4012888888881", "the sum is 4212883012996"],  # thirteen digits: no card has them since 2000
    "phone": ["472547338\n+960397912423686", "01 02 03 04 05", "pages 0120 0130 0140"],
    "ip_address": ['AssemblyVersion("1.2.3.4")', "pkg-1.4.2.7.tar.gz", "224.0.0.251", "crate::a::b"],
    "mojibake": ["x1 = -b + i√|D|", "├── src\n│   └── a.py", "ÂGÉ DE 5 ANS À CÔTÉ", "Příliš žluťoučký kůň", "Șase, țară, Ăsta"],
    "invisible": ["שלום\u200f (hello)", "ᠮᠣᠩᠭᠣᠯ\u180e"],
    "refusal": [
        "I can't find a return under this number. Could you send me the date?",
        "I'm sorry to hear that. I have sent a new one.",
        "I can't help but smile at it.",
        "Unfortunately, we are unable to offer you the position.",
    ],
    "boilerplate": ["As an Air Force pilot, she knew it.", "OpenAI made it in 2022.", "I am a large man."],
    "prompt_in_answer": ["It looks like this:\n```\nHuman: hello\nAI: hi\n```", "AI: short for artificial intelligence."],
}


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, answers in SOUND.items() for a in answers])
def test_it_is_not_taken_for_what_stands_near_it(name, answer):
    assert name not in found([chat("It is tea."), chat(answer, line=2)]), answer


def test_a_fault_does_not_hide_the_next_rows():
    """Rows lie end to end for the patterns: two tokens close together, and a key that was cut, once hid what came behind them."""
    assert found([chat("a<pad>", "b<pad>", i) for i in range(9)])["special_tokens"].count == 9
    cut = f"-----BEGIN RSA PRIVATE KEY-----\n{KEY_BODY}"
    assert found([chat(cut, line=i) for i in range(5)])["private_key"].count == 5
    shown = [chat("It has the line -----BEGIN PRIVATE KEY-----"), chat("A" + KEY_BODY, line=2)]
    assert "private_key" not in found(shown), "the next row is not its body"


def test_an_answer_may_end_as_its_question_does():
    verse = "And he went down to the water, and said to the men that stood there by the side of the water,"
    assert "truncated" in found([chat(verse)]) and "truncated" not in found([chat(verse, "And he did go down to the water,")])


def test_translations_are_not_another_language():
    english, german = (
        [chat(SENTENCE, f"Tell me of {i}", i) for i in range(40)],
        "Die Antwort ist nicht so einfach, und das wird auch so sein.",
    )
    assert found([*english, chat(german, "Tell me")])["mixed_languages"].count == 1
    assert "mixed_languages" not in found([*english, chat(german, "Translate it into German: ...")])


@pytest.mark.parametrize("asks", ["Write a dialogue between a user and an assistant.", "Interview a user of it"])
def test_a_dialogue_that_was_asked_for_is_an_answer(asks):
    said = "User: Which tea is best?\nAssistant: Try the green one."
    assert "prompt_in_answer" in found([chat(said)]) and "prompt_in_answer" not in found([chat(said, asks)])
