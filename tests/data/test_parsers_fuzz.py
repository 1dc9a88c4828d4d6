"""Whatever a file holds, a reader gives rows that add up or a DataError that names the file; and what was written well is read
exactly. TUNESMITH_FUZZ=100 runs a hundred times as many cases, other ones each time."""
# ruff: noqa: E501 - lists of pieces

import csv
import gzip
import io
import json
import os
import signal
import zipfile
from contextlib import contextmanager

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunesmith.data.formats import FormatError, conversation
from tunesmith.data.sources import Refused, Row, chunks, find, parse
from tunesmith.errors import DataError

TIMES = int(os.environ.get("TUNESMITH_FUZZ", "1"))
SECONDS = 5  # for one file of some kB; the slowest of them takes 0.1


def cases(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@contextmanager
def no_longer_than(seconds: int):
    def stop(*_):
        raise AssertionError(f"a hang: more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path) -> list[Row | Refused] | DataError:
    """What the file gives. Anything else than rows with a place and a reason, or a DataError that names the file, fails."""
    got: list[Row | Refused] = []
    with no_longer_than(SECONDS):
        try:
            for chunk in chunks(find(path)):
                some = parse(chunk)
                assert len(some) == len(chunk.lines) > 0
                got += some
        except DataError as e:
            assert str(path) in e.what and e.fix and "\n" not in e.what
            return e
        assert got, "a file was read in silence"
        assert [r.origin.line for r in got] == sorted(r.origin.line for r in got)
        for row in got:
            assert row.origin.file == str(path)
            if isinstance(row, Refused):
                assert row.reason
                continue
            try:
                c = conversation(row)
            except FormatError as e:
                assert e.reason
            else:
                for m in c.messages:
                    (m.content + repr(m.extra) + json.dumps(c.tools, ensure_ascii=False)).encode()  # no half of a surrogate pair
                    assert "\0" not in m.content
    return got


# ---- files as they should be -----------------------------------------------------------------------------------------------------

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"It is „{i + 1}“."}]}
    for i in range(6)
]
PAIRS = [{"question": f"What, {i}?", "answer": f'The "{i}"\nth.'} for i in range(6)]


def as_csv(mark: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, PAIRS[0], delimiter=mark)
    writer.writeheader()
    writer.writerows(PAIRS)
    return out.getvalue().encode()


def as_parquet(rows) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def as_xlsx() -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, out = openpyxl.Workbook(), io.BytesIO()
    for row in (list(PAIRS[0]), *(list(r.values()) for r in PAIRS)):
        book.active.append(row)
    book.save(out)
    return out.getvalue()


def as_docx() -> bytes:
    space, out = "http://schemas.openxmlformats.org/wordprocessingml/2006/main", io.BytesIO()
    body = "".join(f"<w:p><w:r><w:t>Line {i}.</w:t><w:tab/></w:r></w:p>" for i in range(9))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("word/document.xml", f'<w:document xmlns:w="{space}"><w:body>{body}</w:body></w:document>')
    return out.getvalue()


def as_pdf() -> bytes:
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DictionaryObject, NameObject, StreamObject

    writer, out, name = pypdf.PdfWriter(), io.BytesIO(), NameObject
    page = writer.add_blank_page(200, 200)
    font = DictionaryObject({name("/Type"): name("/Font"), name("/Subtype"): name("/Type1"), name("/BaseFont"): name("/Helvetica")})
    page[name("/Resources")] = DictionaryObject({name("/Font"): DictionaryObject({name("/F1"): font})})
    stream = StreamObject()
    stream.set_data(b"BT /F1 12 Tf 72 700 Td (Boil the egg.) Tj ET")
    page[name("/Contents")] = writer._add_object(stream)
    writer.write(out)
    return out.getvalue()


EXPORT = [
    {
        "mapping": {
            "r": {"parent": None, "message": None},
            "q": {"parent": "r", "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}}},
            "a": {"parent": "q", "message": {"author": {"role": "assistant"}, "content": {"parts": ["Hi【1†a】!"]}}},
        },
        "current_node": "a",
        "create_time": 1.5,
    }
] * 2
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in CHATS).encode()
WHOLE = {
    "a.jsonl": lambda: LINES,
    "a.json": lambda: json.dumps(CHATS, indent=1).encode(),
    "object.json": lambda: json.dumps({"version": 1, "data": PAIRS}).encode(),
    "conversations.json": lambda: json.dumps(EXPORT).encode(),
    "a.csv": lambda: as_csv(","),
    "semicolons.csv": lambda: as_csv(";"),
    "a.tsv": lambda: as_csv("\t"),
    "a.parquet": lambda: as_parquet(CHATS),
    "a.xlsx": as_xlsx,
    "a.docx": as_docx,
    "a.pdf": as_pdf,
    "a.html": lambda: b"<html><head><title>t</title></head><body><h1>Eggs</h1><p>Boil <b>them</b> &amp; wait.</p><pre>a\n b</pre>",
    "a.txt": lambda: b"User: How long?\nAssistant: Seven minutes.\n\nUser: Thanks!\nAssistant: Enjoy.\n",
    "chat.txt": lambda: b"[12.03.24, 14:05] Anna: Hello\n[12.03.24, 14:06] Ben: Hi\n[13.03.24, 9:00] Anna: Eggs?\n" * 3,
    "a.md": lambda: b"# Eggs\n\n## User\nHow long?\n## Assistant\nSeven minutes.\n",
    "a.jsonl.gz": lambda: gzip.compress(LINES, mtime=0),
    "a.csv.gz": lambda: gzip.compress(as_csv(","), mtime=0),
    "a.parquet.gz": lambda: gzip.compress(as_parquet(PAIRS), mtime=0),
}
FEW = {"a.xlsx": 20, "a.pdf": 20}  # slow readers: 10 ms a file

# ---- any bytes, and whole files with damage ----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b"\r", b"\r\n", b"\t", b";", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\\ud800",
     b"\\u0000", b"NaN", b"1e999", b'{"text": "a"}', b'{"question": "a", "answer": ', b"null", b"User: ", b"Assistant: ", b"# ", b"[1.1.24, 1:00] A: ",
     b"<p>", b"<!--", b"<script>", b"&#", b"PK\x03\x04", b"PAR1", b"%PDF-1.4\n", b"\x1f\x8b\x08", b"sep=;\n", b"a,b\n", b" " * 300]
)  # fmt: skip
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "twice", "splice", "drop"]), st.floats(0, 1), st.floats(0, 1), st.integers(0, 255), PIECES),
    min_size=1,
    max_size=5,
)  # fmt: skip


def damaged(content: bytes, damage) -> bytes:
    for how, here, there, byte, piece in damage:
        a, b = sorted((int(here * len(content)), int(there * len(content))))
        if how == "flip":
            content = content[:a] + bytes([byte]) + content[a + 1 :]
        elif how == "cut":
            content = content[:b]
        elif how == "twice":
            content = content[:b] + content[a:b] + content[b:]
        elif how == "splice":
            content = content[:a] + piece + content[a:]
        else:
            content = content[:a] + content[b:]
    return content


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(WHOLE[name]())
    got = read(path)
    assert isinstance(got, list) and all(isinstance(r, Row) for r in got)


@pytest.mark.parametrize("name", WHOLE)
def test_any_bytes_are_rows_or_a_fault_in_words(tmp_path, name):
    path = tmp_path / name

    @cases(25)
    @given(st.lists(PIECES | st.binary(max_size=9), max_size=14))
    def run(parts):
        content = b"".join(parts)
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        read(path)

    run()


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_rows_or_a_fault_in_words(tmp_path, name):
    path, whole = tmp_path / name, WHOLE[name]()

    @cases(FEW.get(name, 60))
    @given(DAMAGE)
    def run(damage):
        path.write_bytes(damaged(whole, damage))
        read(path)

    run()


@cases(40)
@given(DAMAGE)
def test_damage_inside_a_gzip_that_is_whole(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(damaged(LINES, damage), mtime=0))
    read(path)


@pytest.mark.parametrize(("name", "part"), [("a.docx", "word/document.xml"), ("a.xlsx", "xl/worksheets/sheet1.xml")])
def test_damage_inside_an_archive_that_is_whole(tmp_path, name, part):
    """Damage to the packed bytes is nearly always found by their checksum: this reaches what is behind it."""
    path, parts = tmp_path / name, {}
    with zipfile.ZipFile(io.BytesIO(WHOLE[name]())) as z:
        parts = {i.filename: z.read(i) for i in z.infolist()}

    @cases(20)
    @given(DAMAGE)
    def run(damage):
        with zipfile.ZipFile(path, "w") as z:
            for inner, content in parts.items():
                z.writestr(inner, damaged(content, damage) if inner == part else content)
        read(path)

    run()


# ---- any values ------------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["messages", "conversations", "conversation", "mapping", "current_node", "create_time", "instruction", "input", "output", "history",
     "system", "question", "answer", "prompt", "completion", "text", "tools", "role", "content", "from", "value", "type", "weight",
     "tool_calls", "function", "name", "arguments", "message", "author", "parts", "content_type", "parent", "metadata", "label"]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False, width=16) | st.text(max_size=3)
    | st.sampled_from(["user", "assistant", "system", "tool", "a", "[]", "{}", "[5]", '{"a": NaN}', r'"\ud800"', '[{"role": "user"}]', "text"])
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4), max_leaves=20)


@cases(150)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_row_is_a_conversation_or_a_reason(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(value) + "\n")
    assert len(read(path)) == 1


# ---- what was written well is read exactly ---------------------------------------------------------------------------------------

TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
).filter(lambda t: not t.isspace())  # fmt: skip
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["a.jsonl", "ascii.jsonl", "a.json", "pretty.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_chats_survive(tmp_path, name):
    path = tmp_path / name

    @cases(25)
    @given(st.lists(TURNS, min_size=1, max_size=4))
    def run(chats):
        rows = [{"messages": [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]}
                for turns in chats]  # fmt: skip
        if name.endswith(".parquet"):
            content = as_parquet(rows)
        elif name.endswith((".csv", ".tsv")):
            out = io.StringIO()
            writer = csv.writer(out, delimiter="," if name.endswith(".csv") else "\t")
            writer.writerows([["messages"], *([json.dumps(r["messages"], ensure_ascii=False)] for r in rows)])
            content = out.getvalue().encode()
        elif name.endswith(".json"):
            content = json.dumps(rows, indent=1 if name == "pretty.json" else None).encode()
        else:
            content = "".join(json.dumps(r, ensure_ascii=name == "ascii.jsonl") + "\n" for r in rows).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        said = [[{"role": m.role, "content": m.content} for m in conversation(r).messages] for r in read(path)]
        assert said == [r["messages"] for r in rows]

    run()


@cases(40)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_tables_survive(tmp_path, pairs):
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *pairs])
    assert [(r.value["question"], r.value["answer"]) for r in read(path)] == pairs
