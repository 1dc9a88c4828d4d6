"""Dialogues as text files: who speaks is found, who is the assistant is told and settable, and prose stays prose."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import dialogues, sources
from tunesmith.data.formats import FormatError, conversation
from tunesmith.data.sources import Refused, chunks, find, parse
from tunesmith.errors import DataError

TALK = [
    ("user", "How long does an egg boil?"),
    ("assistant", "Seven minutes.\nEight if it is large."),
    ("user", "Thanks!"),
    ("assistant", "Enjoy."),
]


def read(path, columns=None):
    files = find(path, columns)
    return [r for c in chunks(files) for r in parse(c)], dict(files.notes)


def write(path, text):
    path.write_text(text, newline="")
    return path


def said(row):
    return [(m["role"], m["content"]) for m in row.value["messages"]]


def talk(user, assistant, turn="{}: {}\n"):
    return "".join(turn.format({"user": user, "assistant": assistant}[r], t) for r, t in TALK)


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (talk("User", "Assistant"), "'assistant' is the assistant (by the name)"),
        (talk("Human", "AI", "{}: {}\n\n"), "'ai' is the assistant (by the name)"),
        (talk("user", "assistant", "{}:\n{}\n\n"), "'assistant'"),
        (talk("Kunde", "Berater").replace("\n", "\r\n"), "'berater'"),
        (talk("Customer", "Anna"), "'anna' is the assistant (guessed: the other is the user by the name)"),
        (talk("Ben", "Anna"), "'anna' is the assistant (guessed: the second to speak)"),
        (talk("Ben", "Anna", "**{}:** {}\n"), "'anna' is the assistant (guessed"),
        (talk("Ben", "Anna", "**{}**: {}\n\n"), "'anna' is the assistant (guessed"),
        (talk("User", "Assistant", "## {}\n\n{}\n\n"), "'assistant' is the assistant (by the name)"),
        (talk("You", "ChatGPT", "#### {} said:\n{}\n\n"), "'chatgpt said' is the assistant (by the name)"),
        (talk("Ben", "Anna Lang", "[12.03.24, 14:05:33] {}: {}\n"), "'anna lang' is the assistant (guessed: the second to speak)"),
        (talk("Ben", "Anna", "12/03/2024, 14:05 - {}: {}\n"), "'anna' is the assistant (guessed"),
        (talk("Ben", "Anna", "\u200e[3/12/24, 2:05:33\u202fPM] ~ {}: {}\n"), "'anna' is the assistant (guessed"),
        (talk("Ben", "Anna", "[2024-03-12 14:05] {}: {}\n"), "'anna' is the assistant (guessed"),
        (talk("B", "A", "{}: {}\n").replace("B:", "X:"), "'a' is the assistant (guessed: the second to speak)"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_dialogue_is_read_and_the_guess_is_told(tmp_path, text, who, name):
    (row,), notes = read(write(tmp_path / name, text))
    assert said(row) == TALK
    assert any(who in n and n.startswith("read as a dialogue: ") for n in notes), notes
    assert conversation(row).kind == "chat"


def test_questions_and_answers_are_a_row_each(tmp_path):
    text = "FAQ of the shop\n\nQ: Where?\nA: Here.\n\nQ: When?\nA: Now,\nor later.\n"
    got, notes = read(write(tmp_path / "faq.md", text))
    assert [said(r) for r in got] == [
        [("user", "Where?"), ("assistant", "Here.")],
        [("user", "When?"), ("assistant", "Now,\nor later.")],
    ]
    assert [r.origin.line for r in got] == [3, 6]
    assert notes == {
        "read as a dialogue: 'a' is the assistant (by the name)": 1,
        "line before the first speaker left out": 1,
        "dialogue cut into rows after each answer": 1,
    }


def test_a_folder_tells_who_answers_in_most_files(tmp_path):
    for i, name in enumerate(("Ben", "Cora", "Dan")):
        first, second = (name, "Anna") if i else ("Anna", name)
        write(tmp_path / f"{i}.txt", f"{first}: Hello.\n{second}: Hello to you.\n" * 2)
    got, notes = read(tmp_path)
    assert [said(r)[0][0] for r in got] == ["assistant", "user", "user"]
    assert notes == {"read as a dialogue: 'anna' is the assistant (guessed: in more of the files than the others)": 3}


def test_the_person_says_who_is_the_assistant(tmp_path):
    path = write(tmp_path / "a.txt", talk("Ben", "Anna"))
    (row,), notes = read(path, {"answer": "Ben"})
    assert said(row)[0] == ("assistant", TALK[0][1]) and "read as a dialogue: 'ben' is the assistant (as you wrote)" in notes
    (row,), _ = read(path, {"prompt": "anna"})
    assert said(row)[0][0] == "assistant"
    (row,), notes = read(path, {"text": "*"})
    assert row.value == path.read_text().rstrip("\n") and not notes


def test_a_chat_of_three_keeps_the_names_of_those_who_ask(tmp_path):
    text = "".join(
        f"[01.02.24, 10:0{i}] {who}: {t}\n"
        for i, (who, t) in enumerate([("Ben", "Hi"), ("Anna", "Hello"), ("Cora", "Hey"), ("Anna", "Oh")])
    )
    (row,), _ = read(write(tmp_path / "chat.txt", text), {"answer": "Anna"})
    assert said(row) == [("user", "ben: Hi"), ("assistant", "Hello"), ("user", "cora: Hey"), ("assistant", "Oh")]


def test_a_chat_of_days_is_cut_where_the_day_changes_and_a_new_one_begins_with_the_other(tmp_path):
    text = (
        "[01.02.24, 10:00] Messages and calls are end-to-end encrypted. No one outside of this chat can read them\n"
        "[01.02.24, 10:00] Ben: Hi\n[01.02.24, 10:01] Anna: Hello\n[01.02.24, 10:02] Ben: <Media omitted>\n"
        "[02.02.24, 10:00] Anna: Are you there?\n[02.02.24, 10:00] Ben: Yes:\nhere\n[02.02.24, 10:02] Anna: Good\n"
        "[03.02.24, 10:00] Ben: See https://x.org: nice\n[03.02.24, 10:02] Anna: So it is\n"
    )
    got, notes = read(write(tmp_path / "chat.txt", text))
    assert [len(said(r)) for r in got] == [3, 2, 2]
    assert said(got[1]) == [("user", "Yes:\nhere"), ("assistant", "Good")] and said(got[2])[0][1] == "See https://x.org: nice"
    assert notes["dialogue cut into rows where the day changes"] == 2
    assert notes["message without its picture, film or sound left out"] == 1
    assert notes["line without a speaker left out"] == 1


def test_several_conversations_in_one_file_between_lines_of_dashes(tmp_path):
    one = "System: Be brief.\nUser: a\nAssistant: b\n\n---\n\nstill b\n"
    got, notes = read(write(tmp_path / "a.md", one + "\n---\n" + one))
    assert [said(r) for r in got] == [[("system", "Be brief."), ("user", "a"), ("assistant", "b\n\n---\n\nstill b")]] * 2
    assert notes["dialogue cut into rows at a line of dashes"] == 1


def test_code_between_fences_has_no_speakers(tmp_path):
    (row,), _ = read(
        write(tmp_path / "a.md", "User: yaml?\nAssistant: so:\n```\nUser: ann\n---\nAssistant: b\n```\nUser: ok\nAssistant: c\n")
    )
    assert [r for r, _ in said(row)] == ["user", "assistant", "user", "assistant"]
    assert "User: ann\n---\nAssistant: b" in said(row)[1][1]


def test_other_lines_with_colons_are_text(tmp_path):
    (row,), _ = read(
        write(tmp_path / "a.txt", "User: How?\nAssistant: Like this.\nNote: not that.\nIngredients: eggs\nUser: Oh\nAssistant: Yes")
    )
    assert said(row)[1] == ("assistant", "Like this.\nNote: not that.\nIngredients: eggs")


@pytest.mark.parametrize(
    "text",
    [
        "ROMEO:\nO!\n\nJULIET:\nAy me!\n\nNURSE:\nMadam!\n\nROMEO:\nLady.\n\nJULIET:\nNurse!\n",
        "Title: On eggs\nAuthor: Ann\n\nEggs boil for seven minutes.\n",
        "Eggs boil.\nNote: seven minutes.\nNote: or eight.\nWarning: hot.\nNote: wait.\n",
        "User: this file has one voice only\nand more text\n",
        "The meeting began at [10:00].\n12.03.24 was a Tuesday: cold.\n",
        "# Answer\n\nForty-two.\n",
        "Step one: boil.\nStep two: peel.\n",
        "Berlin: 3.6\nHamburg: 1.8\n",
        "http://a.org: x\nhttps://b.org: y\nhttp://a.org: x\nhttps://b.org: y\n",
    ],
)
def test_prose_stays_raw_text(tmp_path, text):
    got, notes = read(write(tmp_path / "a.txt", text))
    assert [r.value for r in got] == [text.strip("\n")] and not notes


@pytest.mark.parametrize(
    ("text", "columns", "what"),
    [
        (talk("Ben", "Anna"), {"answer": "Cora"}, "'Cora', the answer by data.train[].columns, does not speak; ben, anna do"),
        (talk("Ben", "Anna"), {"prompt": "Cora"}, "'Cora', the prompt by data.train[].columns, does not speak"),
        ("Only prose.\n", {"answer": "Anna"}, "no lines of speakers are found"),
        ("", {}, "the file is empty"),
        ("User: a\nAssistant: b\xff\n".encode("latin1"), {}, "not UTF-8"),
        ("User: a\nAssistant: b\n".encode("utf16"), {}, "not UTF-8 but utf16"),
        (gzip.compress(talk("User", "Assistant").encode())[:-12], {}, "the gzip file is cut off"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, text, columns, what):
    path = tmp_path / ("a.txt.gz" if text[:2] == b"\x1f\x8b" else "a.txt")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as e:
        read(path, columns)
    assert what in e.value.what and e.value.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("User: a\nAssistant:\nUser: b\nAssistant: c\n", "the answer in message 2 is empty"),
        ("User:\nAssistant: b\n", "message 1 (user) is empty"),
        ("[01.02.24, 10:00] Ben: a\n[01.02.24, 10:01] Anna: \n", "the answer in message 2 is empty"),
    ],
)
def test_an_empty_turn_refuses_the_row(tmp_path, text, why):
    (row,), _ = read(write(tmp_path / "a.txt", text))
    with pytest.raises(FormatError) as e:
        conversation(row)
    assert why in e.value.reason


def test_a_zero_character_refuses_its_row_alone(tmp_path):
    got, _ = read(write(tmp_path / "a.txt", "Q: a\nA: b\nQ: c\0\nA: d\nQ: e\nA: f\n"))
    assert [isinstance(r, Refused) for r in got] == [False, True, False] and "zero character" in got[1].reason


def test_a_million_turns_and_a_turn_of_megabytes_take_bounded_rows(tmp_path):
    path = write(
        tmp_path / "a.txt",
        "User: a\nAssistant: b\n" * 100_000 + "User: c\nAssistant: " + ("x" * 99 + "\n") * 60_000 + "User: d\nAssistant: e\n",
    )
    got, notes = read(path)
    good = [r for r in got if not isinstance(r, Refused)]
    assert max(len(r.value["messages"]) for r in good) <= dialogues.ROW_TURNS + 1
    assert [r.reason for r in got if isinstance(r, Refused)] == ["a turn longer than 4 MB"]
    assert notes["dialogue cut into rows for its length"] == len(got) - 1
    one_sided = write(tmp_path / "b.txt", talk("User", "Assistant") + "User: a\n" * 20_000)
    assert max(len(r.value["messages"]) for r in read(one_sided)[0]) <= dialogues.MOST_TURNS


LINES = """User: a|Assistant: b|Ben: c|Anna:|**Ben:** x|## User|---|```||text|Note: y|\0|System: s|Q: a|A: b
[02.02.24, 10:00] Ben left|[01.02.24, 10:00] Ben: hi|[02.02.24, 10:00] Anna: ho"""
lines = st.sampled_from(LINES.replace("\n", "|").split("|")) | st.text(max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(lines, max_size=30), st.sampled_from([{}, {"answer": "Ben"}, {"prompt": "User"}, {"system": "Anna"}]))
def test_fuzz_every_line_is_in_a_row_or_counted(tmp_path_factory, parts, columns):
    text = "\n".join(parts)
    try:
        path = write(tmp_path_factory.mktemp("d") / "a.txt", text)
        got, notes = read(path, columns)
    except (DataError, UnicodeEncodeError) as e:
        assert str(e)
        return
    if not any(n.startswith("read as") for n in notes):
        return
    kept = "".join(str(r.value) if not isinstance(r, Refused) else "\0" for r in got)
    for word in ("text", "Note"):
        if word in parts and "line before the first speaker left out" not in notes and "\0" not in kept:
            assert word in kept
    assert sources.MAX_ROW and all(r.origin.line >= 1 for r in got)
