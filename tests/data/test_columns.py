"""Tables whose columns have any names: what is what is guessed, told and settable, an open question is an error with its fix."""

import csv
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunesmith.config.schema import Source
from tunesmith.data import columns, sources
from tunesmith.data.columns import ColumnsError, choose
from tunesmith.data.formats import FormatError, conversation
from tunesmith.data.prepare import find_all
from tunesmith.data.sources import Refused, chunks, find, parse, rows
from tunesmith.errors import DataError

ASKS = ["How do I reset my password?", "Where is my order?", "Can I return the shoes I bought?", "Do you ship to Norway?"]
SAYS = ["Choose 'Forgot password' below the form.", "It left us this morning.", "Yes, within 30 days.", "Yes; it takes a week."]
IDS = ["T-1", "T-2", "T-3", "T-4"]
DATES = ["2024-03-01 10:00", "2024-03-02 11:30", "2024-03-02 12:00", "2024-03-05 09:15"]


def table(header, *cols, mark=","):
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows([header, *zip(*cols, strict=True)])
    return out.getvalue()


def read(path, given=None):
    """(rows as said, notes)"""
    files = find(path, given)
    got = [r for c in chunks(files) for r in parse(c)]
    return got, dict(files.notes)


def write(tmp_path, text, name="a.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("header", "cols"),
    [
        (["Ticket-ID", "Datum", "Kundenfrage", "Antwort"], (IDS, DATES, ASKS, SAYS)),
        (["User Message", "Agent Reply", "created_at"], (ASKS, SAYS, DATES)),
        (["antwort_text", "frage_text"], (SAYS, ASKS)),
        (["userMessage", "botResponse", "responseTime"], (ASKS, SAYS, ["1.5", "2", "3", "0.4"])),
        (["Pregunta", "Respuesta"], (ASKS, SAYS)),
        (["Réponse", "Requête"], (SAYS, ASKS)),
        (["Question", "Reply", "Reply date"], (ASKS, SAYS, DATES)),
        (["Customer email", "Customer request", "Resolution"], ([f"a{i}@x.org" for i in range(4)], ASKS, SAYS)),
        (["Antwort", "Betreff"], (SAYS, ASKS)),  # the only other column of text
        (["Spalte 1", "Spalte 2"], (SAYS, ASKS)),  # question marks
        (["A", "B"], (ASKS, SAYS)),
        (["a", "q"], (SAYS, ASKS)),
    ],
)
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_question_and_answer_are_found_and_told(tmp_path, header, cols, mark):
    got, notes = read(write(tmp_path, table(header, *cols, mark=mark)))
    assert [(r.value["question"], r.value["answer"]) for r in got] == list(zip(ASKS, SAYS, strict=True))
    told = " ".join(notes)
    assert "read as the prompt (guessed from" in told and "read as the answer (guessed from" in told
    assert all(repr(h).lower() in told.lower() for h in header), "every column is told: used, or not"
    assert all(conversation(r).kind == "chat" for r in got)


def test_system_and_id_come_along(tmp_path):
    text = table(["ID", "System Prompt", "Frage", "Antwort"], IDS, ["Be brief."] * 3 + ["Be kind."], ASKS, SAYS)
    got, notes = read(write(tmp_path, text))
    assert got[0].value == {"question": ASKS[0], "answer": SAYS[0], "system": "Be brief.", "id": "T-1"}
    assert notes["column 'System Prompt' read as the system text (guessed from its name)"] == 1


def test_one_column_of_long_text_is_text(tmp_path):
    long = [f"Chapter {i}. " + "It was a dark night. " * 20 for i in range(4)]
    for header in (["Title", "Body"], ["nr", "Kapitel"]):
        got, notes = read(write(tmp_path, table(header, IDS, long)))
        assert [r.value for r in got] == [
            {"text": t, **({"id": i} if "nr" in header else {})} for t, i in zip(long, IDS, strict=True)
        ]
        assert f"column {header[1]!r} read as the text" in " ".join(notes)


def test_numbers_and_labels_may_be_answers(tmp_path):
    sums = [f"What is {i} plus {i}?" for i in range(20)]
    got, _ = read(write(tmp_path, table(["Frage", "Antwort"], sums, [str(2 * i) for i in range(20)])))
    assert got[3].value == {"question": "What is 3 plus 3?", "answer": "6"}
    got, _ = read(write(tmp_path, table(["Customer text", "Reply"], sums, ["yes", "no"] * 10)))
    assert got[1].value == {"question": sums[1], "answer": "no"}


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({"prompt": "B", "answer": "A"}, {"question": SAYS[0], "answer": ASKS[0]}),
        ({"answer": "a"}, {"question": SAYS[0], "answer": ASKS[0]}),  # the rest is guessed
        ({"text": "A"}, {"text": ASKS[0]}),
        ({"prompt": "A", "answer": "B", "id": "C"}, {"question": ASKS[0], "answer": SAYS[0], "id": "T-1"}),
    ],
)
def test_what_the_person_writes_wins(tmp_path, given, first):
    got, notes = read(write(tmp_path, table(["A", "B", "C"], ASKS, SAYS, IDS)), given)
    assert got[0].value == first
    role, column = next(iter(given.items()))
    assert any(f"column {column.upper()!r} read as the {role}" in n and "as you wrote" in n for n in notes)


def test_known_names_are_still_read_as_they_were_unless_the_person_says_otherwise(tmp_path):
    path = write(tmp_path, table(["question", "answer", "note"], ASKS, SAYS, IDS))
    got, notes = read(path)
    assert got[0].value == {"question": ASKS[0], "answer": SAYS[0], "note": "T-1"} and not notes
    assert read(path, {"prompt": "answer", "answer": "question"})[0][0].value == {"question": SAYS[0], "answer": ASKS[0]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_keys_of_json_and_parquet_can_be_named(tmp_path, name):
    path = tmp_path / name
    values = [{"Q": q, "R": r, "x": 1} for q, r in zip(ASKS, SAYS, strict=True)]
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(values), path)
    else:
        path.write_text(json.dumps(values) if name == "a.json" else "\n".join(map(json.dumps, values)))
    got, _ = read(path, {"prompt": "Q", "answer": "R"})
    assert [r.value for r in got] == [{"question": q, "answer": r} for q, r in zip(ASKS, SAYS, strict=True)]
    got, _ = read(path, {"prompt": "Q", "answer": "S"})
    assert all(isinstance(r, Refused) and "'S', the answer by data.train[].columns, is missing or null" in r.reason for r in got)


@pytest.mark.parametrize(
    ("text", "given", "what", "fix"),
    [
        (
            table(["Frage", "Anfrage", "Antwort"], ASKS, ASKS, SAYS),
            {},
            "several columns may be the prompt: 'Frage', 'Anfrage'",
            "columns:",
        ),
        (
            table(["Agent", "Antwort", "Frage"], SAYS, SAYS, ASKS),
            {},
            "several columns may be the answer",
            "'Agent', 'Antwort', 'Frage'",
        ),
        (
            table(["Antwort", "X", "Y"], SAYS, ASKS, SAYS),
            {},
            "the prompt's column cannot be told: several may be: 'X', 'Y'",
            "columns:",
        ),
        (table(["Frage", "n"], ASKS, ["1", "2", "3", "4"]), {}, "no column looks like the answer", "columns:"),
        (table(["First", "Last"], ["Ann", "Bob", "Cy", "Di"], ["Ay", "Be", "Ce", "De"]), {}, "cannot be told from", "{text: NAME}"),
        (table(["x", "y", "z"], ASKS, SAYS, SAYS), {}, "cannot be told from their names or contents", "'x', 'y', 'z'"),
        (table(["n", "m"], ["1", "2", "3", "4"], DATES), {}, "cannot be told from their names or contents", "columns:"),
        ("When?,Now.\nWhere?,Here.\n", {}, "the first line looks like a row", "question,answer"),
        (table(["A", "B"], ASKS, SAYS), {"prompt": "Q"}, "data.train[].columns names 'Q', which is no column", "'A', 'B'"),
        (table(["A", "B", " b "], ASKS, SAYS, SAYS), {"prompt": "-b"}, "names '-b', which is no column", "columns:"),
        ("A,B\n", {}, "cannot be told from their names or contents", "columns:"),
        ("Frage,Frage\na,b\n", {}, "two columns have one name", "rename one"),
        ('Frage,Antwort\n"a,b\n', {}, "the quotes opened in line 2 are never closed", "close them"),
    ],
)
def test_an_open_question_is_an_error_with_the_fix(tmp_path, text, given, what, fix):
    with pytest.raises(DataError) as e:
        read(write(tmp_path, text), given)
    assert what in e.value.what and fix in e.value.fix


def test_bad_records_of_a_guessed_table_are_refused_at_their_line(tmp_path):
    got, _ = read(write(tmp_path, 'sep=;\r\nFrage;Antwort\r\nWie geht es dir?;Gut so, danke.\r\na;b;c\r\n"x"y;z\r\nWo?;Hier.\r\n'))
    assert [(r.origin.line, getattr(r, "reason", "")) for r in got] == [
        (3, ""),
        (4, "3 columns, the header names 2"),
        (5, "not a valid record (';' expected after '\"')"),
        (6, ""),
    ]


def test_rows_of_other_kinds_keep_their_own_refusal(tmp_path):
    (row,) = rows(write(tmp_path, "chosen,rejected,Frage,Antwort\na,b,c,d\n"))
    with pytest.raises(FormatError, match="preference tuning"):
        conversation(row)


def test_the_look_at_the_contents_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE_CHARS", 100)
    seen = []
    monkeypatch.setattr(sources, "choose", lambda n, sample, g: (seen.append(len(sample)), choose(n, sample, g))[1])
    got, _ = read(write(tmp_path, table(["Frage", "Antwort"], ASKS * 50, SAYS * 50)))
    assert seen == [2] and len(got) == 200


def test_a_held_out_file_has_the_columns_of_the_training_rows(tmp_path):
    path = write(tmp_path, table(["A", "B"], ASKS, SAYS))
    data = type("D", (), {"train": [Source(path=str(path), columns={"prompt": "B", "answer": "A"})], "held_out": str(path)})
    assert [f.columns for f in find_all(data)] == [{"prompt": "B", "answer": "A"}] * 2


cell = st.sampled_from(
    ["", " ", "a", "7", "Why is it so?", "It is so because it is.", "2024-01-01", "x@y.org", "\0", '"', ";"]
) | st.text(max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["Frage", "answer", "Text", "a", "b", "id", "Reply date", "", "?"]) | st.text(max_size=6), max_size=4),
    st.lists(st.lists(cell, max_size=4), max_size=12),
    st.dictionaries(st.sampled_from(sorted(columns.KEYS)), st.sampled_from(["a", "b", "Frage"]), max_size=2),
)
def test_fuzz_any_table_is_a_choice_or_a_reason(header, sample, given):
    try:
        chosen, notes = choose(header, sample, given)
    except ColumnsError as e:
        assert e.what and e.fix
        return
    assert set(chosen.values()) <= set(header) and ({"prompt", "answer"} <= chosen.keys() or "text" in chosen)
    assert len(notes) == len(chosen) + sum(n not in chosen.values() for n in header)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(cell, min_size=1, max_size=3), max_size=10), st.sampled_from([",", ";", "\t"]))
def test_fuzz_no_record_is_lost(tmp_path_factory, records, mark):
    records = [[c.replace("\r", "").replace("\n", " ") for c in r] for r in records]
    out = io.StringIO()
    csv.writer(out, delimiter=mark, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["Frage", "Antwort"], *records])
    path = tmp_path_factory.mktemp("t") / "a.csv"
    try:
        path.write_text(out.getvalue(), newline="")
        got, _ = read(path)
    except (DataError, UnicodeEncodeError):
        return
    assert len(got) == sum(r != [""] for r in records)
