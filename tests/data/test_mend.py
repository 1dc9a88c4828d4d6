"""`tunesmith prepare`: each fix mends what was planted and nothing beside it; rows add up; the same seed gives the same bytes."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import tunesmith
from tunesmith import cli
from tunesmith.data import clusters, findings, formats, mend, workers
from tunesmith.data import prepare as prepare_module
from tunesmith.data.findings.text import Rows
from tunesmith.data.mend import rows as mend_rows
from tunesmith.data.mend import split, text
from tunesmith.data.sources import Row
from tunesmith.errors import ConfigError, DataError, TunesmithError
from tunesmith.files import verify
from tunesmith.types import Conversation, Message, Origin

QUIET = Console(file=io.StringIO())
WORDS = "house bread river stone cloud paper light garden winter engine letter bridge market window forest silver"
WORDS = WORDS.split(" ")
CUT = "It is one of the things that people in the north of the country like to do when they are at the"
HF = "hf_" + "aB3" * 11


def words(seed, n=14):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randrange(999)) for _ in range(n))


def row(i, answer=None, **more):
    return {"question": f"What of {words(i)}?", "answer": answer or f"It is {words(i + 10_000)}.", "id": i, **more}


def write(path, rows, *raw):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "".join(raw), "utf-8")
    return str(path)


def prepare(tmp_path, config, *overrides, out="out", **settings):
    return tunesmith.prepare(config, *overrides, out=tmp_path / out, console=QUIET, **settings)


def read(folder, name):
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text("utf-8").splitlines()]


def answers(folder, name="train"):
    return {r["id"]: r["messages"][-1]["content"] for r in read(folder, name)}


def one(tmp_path, answer, fix, out="out", **more):
    """What becomes of a row with this answer: what is written, or None and why."""
    data = write(tmp_path / f"{out}.jsonl", [*(row(i) for i in range(1, 60)), row(0, answer, **more)])
    made = prepare(tmp_path, data, fix=fix, split="0", out=out)
    for r in read(made.folder, "train"):
        if r["id"] == 0:
            return r, ""
    (refused,) = read(made.folder, "refused")
    return None, f"{refused['fix']}: {refused['reason']}"


def test_every_finding_has_a_fix_or_a_reason_why_it_needs_a_person():
    answered = {a for f in mend.FIXES for a in f.answers}
    assert answered | mend.PERSON.keys() == {f.name for f in findings.TABLE}
    assert not answered & mend.PERSON.keys()
    assert all(f.mend is not None for f in mend.FIXES if f.how == mend.ROW)


# ---- each fix ------------------------------------------------------------------------------------------------------------------

MENDED = [  # fix, before, after
    ("encoding", "the cafÃ© is â€œopenâ€\x9d, itâ€™s 5 â‚¬ ðŸ˜€", "the café is “open”, it’s 5 € 😀"),
    ("encoding", "twice: cafÃƒÂ©", "twice: café"),
    ("encoding", "one\x07two \x1b[31mred\x1b[0m \x93so\x94\x0bon", "onetwo red “so”\non"),
    ("encoding", "zero\u200bwidth, soft\u00adhyphen, hid\u200dden, \ufeffmark", "zerowidth, softhyphen, hidden, mark"),
    ("encoding", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
    ("pii", "Write to jane.doe@mailhouse.org.", "Write to [EMAIL]."),
    ("pii", "message['From'] = 'jane.o'hara@mailhouse.org'", "message['From'] = '[EMAIL]'"),
    ("pii", "jane@mailhouse.org, bob@firm.de, JANE@mailhouse.org", "[EMAIL], [EMAIL_2], [EMAIL]"),
    ("pii", "call +49 30 1234567 or (212) 555-0123", "call [PHONE] or [PHONE_2]"),
    ("pii", "pay DE89 3704 0044 0532 0130 00 or 4111 1111 1111 1111", "pay [IBAN] or [CARD]"),
    ("pii", "the host 81.2.69.142 and 2001:4860:4860:0:0:0:0:8888", "the host [IP] and [IP_2]"),
    ("pii", f"use {HF} here", "use [KEY] here"),
    ("pii", "[EMAIL] wrote to jane@mailhouse.org", "[EMAIL] wrote to [EMAIL_2]"),
    ("template", "<|im_start|>assistant\nHello there.<|im_end|>", "Hello there."),
    ("template", "Hello there.</s>", "Hello there."),
    ("echo", "It is so.\nUser: and now?", "It is so."),
    ("echo", "### Response: It is so.", "It is so."),
    ("boilerplate", "As an AI language model, I do not eat. Bread is good.", "Bread is good."),
    ("boilerplate", "As an AI, I do not eat. However, bread is good. But it is late.", "Bread is good. But it is late."),
    ("boilerplate", "Bread is good.\nI hope this email finds you well!\nIt is late.", "Bread is good.\n\nIt is late."),
]


@pytest.mark.parametrize(("fix", "before", "after"), MENDED)
def test_a_fix_mends(tmp_path, fix, before, after):
    made, why = one(tmp_path, before, fix)
    assert made and made["messages"][-1]["content"] == after, why
    (change,) = read(tmp_path / "out", "changes")
    assert change["file"].endswith("out.jsonl") and change["line"] == 60 and change["fix"] == fix and change["what"]
    assert change["before"] != change["after"]


ASIDE = [
    ("encoding", "lost: caf\ufffd is open"),
    ("encoding", "mojibake is when cafÃ© stands for café"),
    ("template", "Hello.<|im_end|>\n<|im_start|>user\nAnd now?"),
    ("conflicts", "<<<<<<< HEAD\none\n=======\ntwo\n>>>>>>> branch"),
    ("empty", "N/A"),
    ("empty", "ok"),
    ("refusals", "I'm sorry, but I can't help with that."),
    ("boilerplate", "As an AI language model, I cannot eat, but here is a recipe for bread."),
    ("boilerplate", "As an AI language model, I do not eat."),
    ("truncated", CUT),
    ("secrets", f"use {HF} here"),
    ("secrets", "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7v\n-----END RSA PRIVATE KEY-----"),
]


@pytest.mark.parametrize(("fix", "answer"), ASIDE)
def test_a_fix_sets_aside(tmp_path, fix, answer):
    made, why = one(tmp_path, answer, fix)
    assert made is None and why.startswith(f"{fix}: ")
    (refused,) = read(tmp_path / "out", "refused")
    assert refused["line"] == 60 and "row" in refused
    assert HF not in (tmp_path / "out" / "refused.jsonl").read_text() and "MIIE" not in json.dumps(refused)
    if fix != "secrets":
        assert answer in json.dumps(refused, ensure_ascii=False) or answer in refused["row"].get(
            "answer", refused["row"].get("messages", [{}])[-1]
        )


UNTOUCHED = (
    "order 0815-4711-123, invoice no. 212-555-0123, ticket #030/1234567",
    "It sends 0101 0011 0110 1001 and 0100-110-1011 to them.",
    "He sold 48/2 = <<48/2=24>>24 clips in May, 48+24 = 72 in all.",
    "It is at 127.0.0.1 and 192.168.0.7, in version 2.4.1.12, on 2024-05-17 at 12:30:45.",
    "The number 1234567890123456 fails the check; ISBN 978-3-16-148410-0 is a book.",
    "Write to user@example.com. password = your_password_here",
    "Größe, café, naïve, São Paulo, 日本語, Привет, Ærø, Île, «É»",
    "👩‍👩‍👧 and ❤️ and 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "می‌خواهم, क्‍ष, สวัสดี\u200bครับ",
    "שלום \u2067abc\u2069 עולם",
    "I'm sorry to hear that you are ill; get well soon.",
    "def f(x):\n    return x << 7 | x >> 3\n\n=======\nTitle",
    "```\nfor i in range(3):\n\tprint(i)\n```",
)


@pytest.mark.parametrize("answer", UNTOUCHED)
def test_no_fix_touches_what_only_looks_like_a_fault(tmp_path, answer):
    made, why = one(tmp_path, answer, "all")
    assert made and made["messages"][-1]["content"] == answer, why
    assert not read(tmp_path / "out", "changes")


def chat(*turns):
    return Conversation(tuple(Message(*turn) for turn in turns), Origin("a", 1))


@pytest.mark.parametrize(
    ("turns", "after"),
    [
        ("u1 s1 a1", "s1 u1 a1"),
        ("u1 u2 a1", "u1+u2 a1"),
        ("u1 a1 a2", "u1 a1+a2"),
        ("u1 a1 u2", "u1 a1"),
        ("s1 u1 a1", "s1 u1 a1"),
    ],
)
def test_roles_are_put_in_order(turns, after):
    names = {"u": "user", "a": "assistant", "s": "system"}
    made = mend_rows.roles(chat(*((names[t[0]], t) for t in turns.split())), Counter())
    assert [m.content.replace("\n\n", "+") for m in made.messages] == after.split()
    assert not findings.rows.role_order(Rows([made]))


def test_an_order_of_roles_that_cannot_be_told_is_set_aside(tmp_path):
    turns = [{"role": r, "content": words(k)} for k, r in enumerate(("assistant", "user", "assistant"))]
    made = prepare(
        tmp_path, write(tmp_path / "a.jsonl", [{"messages": turns}, *(row(i) for i in range(9))]), fix="roles", split="0"
    )
    (refused,) = read(made.folder, "refused")
    assert refused["fix"] == "roles" and refused["row"] == {"messages": turns}


def test_personal_data_goes_from_every_part_of_a_row(tmp_path):
    call = {"type": "function", "function": {"name": "send", "arguments": {"to": "jane@mailhouse.org"}}}
    value = {
        "messages": [
            {"role": "user", "content": "Tell jane@mailhouse.org and bob@firm.de"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sent to bob@firm.de"},
            {"role": "assistant", "content": "Done."},
        ],
        "customer": {"mail": "jane@mailhouse.org", "password": "swordfish", "card": 4111111111111111, "age": 41},
    }
    made = prepare(tmp_path, write(tmp_path / "a.jsonl", [value, *(row(i) for i in range(9))]), fix="pii", split="0")
    first = read(made.folder, "train")[0]
    assert first["messages"][0]["content"] == "Tell [EMAIL] and [EMAIL_2]"
    assert first["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"to": "[EMAIL]"}
    assert first["messages"][2]["content"] == "sent to [EMAIL_2]"
    assert first["customer"] == {"mail": "[EMAIL]", "password": "[KEY]", "card": "[CARD]", "age": 41}
    every = "".join(p.read_text() for p in made.folder.iterdir())
    assert "mailhouse" not in every and "swordfish" not in every and "4111" not in every


def test_rows_set_aside_are_masked_as_the_fixes_say(tmp_path):
    rows = [row(0, "I'm sorry, but I can't help jane@mailhouse.org."), *(row(i) for i in range(1, 9))]
    data = write(tmp_path / "a.jsonl", rows, '{"answer": "jane@mailhouse.org"\n')
    both = prepare(tmp_path, data, fix="refusals,pii", split="0")
    assert "mailhouse" not in (both.folder / "refused.jsonl").read_text()
    assert [r["masked"] for r in read(both.folder, "refused")] == ["1 e-mail address"] * 2
    alone = prepare(tmp_path, data, fix="refusals", split="0", out="alone")
    assert read(alone.folder, "refused")[0]["row"] == rows[0] and "masked" not in read(alone.folder, "refused")[0]
    assert read(alone.folder, "refused")[1]["text"] == '{"answer": "jane@mailhouse.org"\n'


def test_without_fixes_nothing_but_reading_is_mended(tmp_path):
    turns = [{"role": "human", "content": "Who?"}, {"role": "bot", "content": f"jane@mailhouse.org, cafÃ©, {CUT}"}]
    made = prepare(tmp_path, write(tmp_path / "a.jsonl", [{"messages": turns}, row(1), row(1)]), split="0")
    first = read(made.folder, "train")[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"] and first[1]["content"] == turns[1]["content"]
    assert {c["fix"] for c in read(made.folder, "changes")} == {"reading"} and made.record["rows"]["train"] == 3
    assert "nothing but what reading mends" in "\n".join(made.lines())


def test_copies_near_copies_and_rows_of_the_held_out_file(tmp_path, monkeypatch):
    long = [row(i, f"It is {words(i + 10_000, 60)}.") for i in range(40)]
    near = {**long[3], "id": 100, "answer": long[3]["answer"].replace("It is", "This was")}
    signs = {**long[4], "id": 101, "answer": long[4]["answer"].replace("It is", "It is:")}
    train = write(tmp_path / "a.jsonl", [*long, {**long[2], "id": 102}, near, signs, {**long[7], "id": 103}])
    test = write(tmp_path / "test.jsonl", [long[7], row(500)])
    made = prepare(tmp_path, train, f"data.held_out={test}", fix="leakage,dedup,near")
    told = {r["row"].get("id"): (r["fix"], r["reason"]) for r in read(made.folder, "refused")}
    assert told == {
        102: ("dedup", f"equal to {train}:3"),
        100: ("near", f"nearly equal to {train}:4"),
        101: ("near", f"nearly equal to {train}:5"),
        7: ("leakage", f"repeats or nearly repeats the held-out row {test}:1"),
        103: ("leakage", f"repeats or nearly repeats the held-out row {test}:1"),
    }
    assert sorted(answers(made.folder, "held_out")) == [7, 500] and made.record["held_out"]["nearly_in_train"] == 0
    alone = prepare(tmp_path, train, fix="dedup", split="0", out="alone")
    assert alone.record["rows"]["refused"] == 2 and alone.record["near_duplicates"] == 2
    assert "2 rows nearly repeat an earlier one: --fix near" in "\n".join(alone.lines())
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    account = tunesmith.check(train, "data.held_out=0", console=QUIET).account
    assert (account.exact_duplicates, account.near_duplicates) == (2, 2), "what check counts is what the fixes set aside"


# ---- the round trip ------------------------------------------------------------------------------------------------------------


def planted(count=400):
    rows = [row(i, f"It is {words(i + 10_000, 30)}.") for i in range(count)]
    faults = [before for _, before, _ in MENDED] + [before for _, before in ASIDE]
    for k, fault in enumerate(faults):
        rows[k * 9]["answer"] = fault
    rows[380] = {
        "messages": [
            {"role": "user", "content": words(1)},
            {"role": "user", "content": words(2)},
            {"role": "assistant", "content": "So."},
        ]
    }
    return [*rows, *rows[381:390], {**rows[391], "answer": rows[391]["answer"].replace("It is", "This was")}]


def test_check_finds_none_of_what_was_mended(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "a.jsonl", planted())
    found = {f["name"] for f in tunesmith.check(data, console=QUIET).account.findings}
    fixed = {a for f in mend.FIXES for a in f.answers}
    assert len(found & fixed) > 17
    out = io.StringIO()
    tunesmith.check(data, console=QUIET).print(Console(file=out, width=400))
    assert f"mend what was found: tunesmith prepare {data} --out mended --fix encoding," in out.getvalue()
    made = prepare(tmp_path, data, fix="all")
    again = tunesmith.check(made.folder / "train.jsonl", console=QUIET)
    assert not {f["name"] for f in again.account.findings} & fixed
    whole = tunesmith.check(made.folder / "run.yaml", console=QUIET)
    assert whole.exit_code == 0 and whole.account.refused == 0
    assert whole.account.overlap_near == whole.account.overlap_exact == 0


def test_every_format_comes_back_as_the_same_conversation(tmp_path):
    for name, f in formats.FORMATS.items():
        data = write(tmp_path / f"{name}.jsonl", [{**f.doc_example, "lang": "en"}])
        made = prepare(tmp_path, data, split="0", out=name)
        (written,) = read(made.folder, "train")
        a, b = (formats.conversation(Row(v, Origin("a", 1))) for v in (f.doc_example, written))
        assert (a.kind, a.messages, a.tools) == (b.kind, b.messages, b.tools) and written["lang"] == "en"


def test_other_keys_stay_but_for_those_that_would_make_another_kind_of_row(tmp_path):
    rows = [{**row(1), "when": float("inf"), "text": "rendered", "context": "c", "label": "x", "none": None}, row(2)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r).replace("Infinity", "1.5") + "\n" for r in rows))
    made = prepare(tmp_path, str(path), split="0")
    first = read(made.folder, "train")[0]
    assert {k: first[k] for k in first if k != "messages"} == {"id": 1, "when": 1.5, "context": "c", "label": "x"}
    assert made.record["keys_left_out"] == {"text": 1}


def test_columns_of_a_table_that_are_not_used_stay_and_can_split(tmp_path):
    lines = [f"{i % 9},What of {words(i)}?,It is {words(i + 999)}." for i in range(90)]
    (tmp_path / "t.csv").write_text("Kunde,Kundenfrage,Antwort\n" + "\n".join(lines) + "\n")
    made = prepare(tmp_path, str(tmp_path / "t.csv"), split_by="Kunde", split="10")
    held, train = ({r["Kunde"] for r in read(made.folder, n)} for n in ("held_out", "train"))
    assert len(held) == 1 and not held & train


# ---- splits --------------------------------------------------------------------------------------------------------------------


def test_near_equal_rows_stay_on_one_side(tmp_path):
    base = [f"It is {words(i + 10_000, 60)}." for i in range(60)]
    rows = [
        row(i, base[i % 60].replace("It is", w)) | {"question": f"What of {words(i % 60)}?"}
        for i, w in enumerate(["It is", "So is", "Is it"] * 60)
    ]
    made = prepare(tmp_path, write(tmp_path / "a.jsonl", rows), split="20%")
    groups = [{i % 60 for i in answers(made.folder, n)} for n in ("train", "held_out")]
    assert len(groups[1]) >= 10 and not groups[0] & groups[1] and made.record["held_out"]["nearly_in_train"] == 0


@given(st.lists(st.integers(0, 30), min_size=3, max_size=200), st.integers(1, 60), st.integers(0, 9))
def test_no_group_straddles_the_split(groups, number, seed):
    import numpy as np

    labels = np.array(groups, np.int64)
    for by in (split.By("k"), split.By("k", True)):
        try:
            held = split.choose(labels, by, number, seed)
        except DataError:
            continue
        inside = np.isin(np.arange(len(labels)), held)
        assert 0 < len(held) < len(labels) and not set(labels[inside]) & set(labels[~inside])
        if by.date:
            assert labels[inside].min() > labels[~inside].max()


def test_a_split_by_a_key_inside_another(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(i, meta={"customer": f"c{i % 13}"}) for i in range(130)])
    made = prepare(tmp_path, data, split_by="meta.customer", split="20")
    sides = [{r["meta"]["customer"] for r in read(made.folder, n)} for n in ("train", "held_out")]
    assert len(sides[1]) == 2 and not sides[0] & sides[1]
    assert [
        r["id"] for r in read(prepare(tmp_path, data, split_by="meta.customer", split="20", seed=5, out="b").folder, "held_out")
    ] != [r["id"] for r in read(made.folder, "held_out")]


def test_the_latest_rows_are_held_out(tmp_path):
    rows = [row(i, sent=f"2024-{i % 12 + 1:02}-05") for i in range(120)]
    made = prepare(tmp_path, write(tmp_path / "a.jsonl", rows), split_by="date:sent", split="25")
    assert {r["sent"] for r in read(made.folder, "held_out")} == {"2024-11-05", "2024-12-05"}
    assert made.record["held_out"]["how"] == "20 rows, the latest by 'sent'"


def test_rows_without_a_group_are_named(tmp_path):
    rows = [row(i, **({"customer": "c"} if i not in (2, 5) else {})) for i in range(9)]
    data = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as e:
        prepare(tmp_path, data, split_by="customer")
    assert f"2 of 9 rows have no 'customer' ({data}:3, {data}:6)" in e.value.what
    with pytest.raises(DataError) as e:
        prepare(
            tmp_path,
            write(tmp_path / "b.jsonl", [row(i, sent="05/06/2024" if i == 3 else "2024-05-17") for i in range(9)]),
            split_by="date:sent",
        )
    assert "1 of 9 rows" in e.value.what and ":4: '05/06/2024'" in e.value.what and "2024-05-17" in e.value.fix
    with pytest.raises(DataError, match="1 group, the smallest of 9 of 9 rows"):
        prepare(tmp_path, write(tmp_path / "c.jsonl", [row(i, customer="c") for i in range(9)]), split_by="customer")
    assert not [p for p in tmp_path.iterdir() if p.is_dir()], "nothing half made stays"


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2024-05-17", 17), ("2024-05-17T01:00:00Z", 17), ("2024-05-17T23:00:00-05:00", 18), ("17.05.2024", 17),
        ("2024/05/17 12:30", 17),
        (1715904000, 17), (1715904000000, 17), ("1715904000", 17), ("05/06/2024", None), ("soon", None), (17, None), (True, None),
        ("2024-13-45", None),
    ],
)  # fmt: skip
def test_dates(value, day):
    import datetime

    when = split.moment(value)
    assert when == day or datetime.datetime.fromtimestamp(when / 1e6, datetime.UTC).date() == datetime.date(2024, 5, day)


def test_sizes_of_a_split():
    assert [split.share_or_rows(t) for t in ("5%", "0.05", "200", "0", "0%")] == [0.05, 0.05, 200, 0, 0]
    for wrong in ("100%", "1.5", "-3", "many", "", "5 %x"):
        with pytest.raises(ConfigError, match="--split"):
            split.share_or_rows(wrong)
    assert split.wanted(0.5, 10_000) == 500 and split.wanted(2_000, 10_000) == 2_000 and split.wanted(9, 5) == 4


# ---- mixing --------------------------------------------------------------------------------------------------------------------


def test_weights_are_applied_when_mixing(tmp_path):
    a = write(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    b = write(tmp_path / "b.jsonl", [row(i) for i in range(100, 140)])
    config = {"model": "embedded", "method": "lora", "output": str(tmp_path / "run"), "seed": 3}
    config["data"] = {"train": [{"path": a, "weight": 0.5}, {"path": b, "weight": 2.25}], "held_out": 0}
    with pytest.raises(DataError, match=r"0\.5.*2\.25.*mixing"):
        prepare(tmp_path, config)
    made = prepare(tmp_path, config, mix=True)
    ids = Counter(r["id"] for r in read(made.folder, "train"))
    assert sum(i < 100 for i in ids) == 50 and sorted(Counter(n for i, n in ids.items() if i >= 100).items()) == [(2, 30), (3, 10)]
    assert {(r["fix"], r["row"]["id"]) for r in read(made.folder, "refused")} == {("mix", i) for i in range(100) if i not in ids}
    first, second = made.record["sources"]
    assert (first["train"], first["train_lines"], second["train"], second["train_lines"]) == (50, 50, 40, 90)
    assert made.record["unit"] == "tokens" and 0 < first["tokens"] < second["tokens"]
    again = prepare(tmp_path, config, mix=True, out="again")
    assert (again.folder / "train.jsonl").read_bytes() == (made.folder / "train.jsonl").read_bytes()
    other = prepare(tmp_path, config, mix=True, out="other", seed=4)
    assert (other.folder / "train.jsonl").read_bytes() != (made.folder / "train.jsonl").read_bytes()


# ---- nothing is lost, and the same comes out -----------------------------------------------------------------------------------

LINE = st.one_of(
    st.builds(lambda i: json.dumps(row(i % 40)), st.integers(0, 60)),
    st.builds(lambda a: json.dumps(row(7, a or "x")), st.text(max_size=60)),
    st.sampled_from([json.dumps(row(k, a)) for k, a in enumerate([before for _, before, _ in MENDED] + [b for _, b in ASIDE])]),
    st.sampled_from(
        ["{bad", "3", '{"foo": 1}', '{"question": "a?", "answer": ""}', json.dumps("a bare text"), '{"text": "one\\u200btwo"}']
    ),
)


@given(
    st.lists(LINE, min_size=1, max_size=40),
    st.sampled_from(["", "safe", "all", "pii,dedup", "near,encoding"]),
    st.sampled_from(["0", "20%", "3"]),
)
@settings(max_examples=60, deadline=None)
def test_counts_add_up_and_every_row_is_somewhere(tmp_path_factory, lines, fix, size):
    tmp_path = tmp_path_factory.mktemp("mend")
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps(row(1000))]) + "\n", "utf-8")
    made = prepare(tmp_path, str(tmp_path / "a.jsonl"), fix=fix, split=size)
    rows = made.record["rows"]
    assert rows["read"] == len(lines) + 1 == rows["train"] + rows["held_out"] + rows["refused"]
    assert len(read(made.folder, "train")) == rows["train"] and len(read(made.folder, "held_out")) == rows["held_out"]
    refused = read(made.folder, "refused")
    assert len(refused) == rows["refused"] and all(
        r["reason"] and r["line"] and ("row" in r or "text" in r or "begins" in r) for r in refused
    )
    assert len({r["line"] for r in refused}) == len(refused)
    assert len({c["line"] for c in read(made.folder, "changes")}) == rows["changed"]
    assert sum(f["set_aside"] for f in made.record["fixes"].values()) == rows["refused"]
    written = [formats.conversation(Row(r, Origin("a", 1))) for n in ("train", "held_out") for r in read(made.folder, n)]
    for f in (mend.BY_NAME[name] for name in made.record["options"]["fix"]):
        for name in f.answers:
            detector = findings.BY_NAME[name].detector
            if detector is not None and detector.__module__ == findings.rows.__name__:
                assert not detector(Rows(written)), name
    assert not verify(made.folder)


@given(st.lists(st.text(max_size=80), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_mending_text_twice_changes_nothing_more(texts):
    seen = Counter()
    once = [text.clean(t, seen) for t in texts]
    if not any(findings.rows.MOJIBAKE.search(t) for t in once):
        assert [text.clean(t, Counter()) for t in once] == once
    hidden = text.anonymous(texts, tuple(text.SAID), seen)
    assert text.anonymous(hidden, tuple(text.SAID), Counter()) == hidden


def test_the_same_bytes_with_one_process_and_two(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "INLINE_ROWS", 50)
    monkeypatch.setattr(prepare_module.sources, "CHUNK_ROWS", 40)
    data = write(tmp_path / "a.jsonl", planted(), "{bad\n")
    one, two, three = (
        prepare(tmp_path, data, f"data.workers={n}", fix="all", split_by=None, seed=seed, out=out)
        for out, n, seed in (("one", 1, 1), ("two", 2, 1), ("three", 1, 2))
    )
    names = ("train.jsonl", "held_out.jsonl", "refused.jsonl", "changes.jsonl", "record.json")
    assert all((one.folder / n).read_bytes() == (two.folder / n).read_bytes() for n in names)
    assert (one.folder / "held_out.jsonl").read_bytes() != (three.folder / "held_out.jsonl").read_bytes()


KILLED = """
import os, signal, sys
from tunesmith.data.mend import folder
import tunesmith
real = folder._Job._second
def second(*a):
    real(*a)
    os.kill(os.getpid(), signal.SIGKILL)
folder._Job._second = second
tunesmith.prepare(sys.argv[1], out=sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_killed_prepare_leaves_no_folder_that_looks_whole(tmp_path, before):
    data, out = write(tmp_path / "a.jsonl", planted()), tmp_path / "out"
    if before:
        prepare(tmp_path, data, fix="pii")
    was = {p.name: p.read_bytes() for p in out.iterdir()} if before else {}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, data, str(out)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".out.tmp-")]
    assert ({p.name: p.read_bytes() for p in out.iterdir()} if before else out.exists()) == (was or False)
    prepare(tmp_path, data, overwrite=True)
    assert not verify(out) and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_prepare_killed_at_any_time(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(i) for i in range(4_000)])
    code = "import sys, tunesmith; print(1, flush=True); tunesmith.prepare(sys.argv[1], out=sys.argv[2], fix='all')"
    for wait in (0.05, 0.4, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-c", code, data, str(tmp_path / "out")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "out").exists() or not verify(tmp_path / "out")


# ---- folders and the command line ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    data, out = write(tmp_path / "a.jsonl", [row(i) for i in range(9)]), tmp_path / "out"
    out.mkdir()
    prepare(tmp_path, data)  # an empty one will do
    with pytest.raises(DataError, match="already there") as e:
        prepare(tmp_path, data)
    assert "--overwrite" in e.value.fix
    prepare(tmp_path, data, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="did not make it"):
        prepare(tmp_path, data, out="mine", overwrite=True)
    with pytest.raises(DataError, match="rows to be read are in it"):
        prepare(tmp_path, str(out / "train.jsonl"), overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        prepare(tmp_path, data, out="a.jsonl")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"fix": "dedupe"}, "did you mean 'dedup'"),
        ({"fix": "leakage"}, "no held-out file"),
        ({"split": "half"}, "--split half"),
        ({"split_by": "date:"}, "no key is named"),
        ({"fix": "refusals", "split": "0"}, "1 of 1 row: refusals: refusals"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, settings, what):
    data = write(tmp_path / "a.jsonl", [row(0, "I'm sorry, but I can't help with that.")])
    with pytest.raises(TunesmithError, match=what):
        prepare(tmp_path, data, **settings)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", [row(i) for i in range(9)])
    real = clusters.Finder.clusters
    monkeypatch.setattr(clusters.Finder, "clusters", lambda self: Path(data).write_text("x") and real(self))
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(tmp_path, data)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), planted())
    assert cli.main(["prepare", "a.jsonl", "--out", "made", "--fix", "dedup,pii,encoding", "--split", "10%", "--seed", "4"]) == 0
    said = capsys.readouterr().out
    record = json.loads(Path("made/record.json").read_text())
    assert record["options"]["fix"] == ["encoding", "pii", "dedup"] and record["seed"] == 4
    assert f"{record['rows']['train']:,} to train on" in said and "tunesmith check made/run.yaml" in said
    assert cli.main(["prepare", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in told for name in (*mend.BY_NAME, *mend.ALIASES))
    assert "encoding, leakage, dedup" in told and mend.ALIASES["safe"] == ("encoding", "leakage", "dedup")


def test_the_docs_name_every_fix_and_what_needs_a_person():
    told = (Path(__file__).parents[2] / "docs" / "data.md").read_text().partition("## Mending")[2].partition("\n## ")[0]
    for f in mend.FIXES:
        assert f"| `{f.name}` |" in told
    for name in mend.PERSON:
        assert findings.BY_NAME[name].what in told


@pytest.mark.parametrize("answer", ["\x1b", "\u200b \x07"])
def test_what_is_empty_once_mended_is_set_aside(tmp_path, answer):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in (row(1, answer), row(2))) + "\n", "utf-8")
    made = prepare(tmp_path, str(tmp_path / "a.jsonl"), fix="encoding", split="0")
    (aside,) = read(made.folder, "refused")
    assert made.record["rows"]["train"] == 1 and aside["reason"] == "once mended, the answer in message 2 is empty"
    assert aside["row"] == row(1, answer)
