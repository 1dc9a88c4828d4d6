"""Files to rows: good rows come, bad rows are named with line and reason, bad files with the fix, and nothing is silent."""

import csv
import gzip
import json
import re
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunesmith.data import formats, json_rows, sources
from tunesmith.data.sources import Refused, Row, chunks, find, rows
from tunesmith.errors import DataError

GOOD = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(values):
    return "".join(json.dumps(v) + "\n" for v in values)


def values(path):
    return [r.value for r in rows(path)]


def as_csv(mark):
    head = mark.join(GOOD[0])
    return "\r\n".join([head] + [mark.join(f'"{v}"' for v in r.values()) for r in GOOD])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(GOOD)),
        ("crlf.jsonl", jsonl(GOOD).replace("\n", "\r\n")),
        ("blank.ndjson", "\n" + jsonl(GOOD).replace("\n", "\n\n").rstrip()),
        ("array.json", json.dumps(GOOD)),
        ("pretty.json", json.dumps(GOOD, indent=2)),
        ("wrapped.json", json.dumps({"version": 1, "data": GOOD, "more": {"a": [1]}}, indent=1)),
        ("one_line_wrapped.json", json.dumps({"data": GOOD})),
        ("lines.json", jsonl(GOOD)),
        ("a.csv", as_csv(",")),
        ("semicolons.csv", as_csv(";")),
        ("a.tsv", as_csv("\t")),
    ],
)
def test_every_kind_of_file_gives_its_rows(tmp_path, name, content, packed):
    raw = content.encode()
    path = write(tmp_path / (name + ".gz" * packed), gzip.compress(raw) if packed else raw)
    assert values(path) == GOOD


@pytest.mark.parametrize("packed", [False, True])
def test_parquet(tmp_path, packed):
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"messages": [{"role": "user", "content": f"é{i}"}], "n": i} for i in range(700)])
    parquet.write_table(table, path, row_group_size=100)
    if packed:
        path = write(tmp_path / "a.parquet.gz", gzip.compress(path.read_bytes()))
    found = list(rows(path))
    assert [r.value for r in found] == table.to_pylist()
    assert found[-1].origin.line == 700


def test_bom_is_passed_over_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(GOOD).encode())
    files = find(path)
    assert sum(len(c.items) for c in chunks(files)) == 5
    assert dict(files.notes) == {"UTF-8 byte order mark passed over": 1}


def test_one_object_is_one_row_and_bare_strings_are_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}], "tools": []}
    assert values(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
    assert values(write(tmp_path / "b.jsonl", '"one"\n"two"\n')) == ["one", "two"]
    assert values(write(tmp_path / "c.json", '["one", "two"]')) == ["one", "two"]


def test_raw_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 200 for i in range(400)]
    path = write(tmp_path / "book.txt", "\r\n\r\n".join(paragraphs))
    found = list(rows(path))
    assert len(found) > 4
    assert max(len(r.value) for r in found) <= 2 * sources.TEXT_PIECE + 2000
    assert [p for r in found for p in r.value.split("\n\n")] == paragraphs
    lines = path.read_text().splitlines()
    assert all(lines[r.origin.line - 1 :][0] in ("", r.value.split("\n")[0]) for r in found)


def deep(levels):
    return '{"a":' * levels + "1" + "}" * levels


BAD_ROWS = {
    "truncated": (b'{"question": "a", "answ', "cut off"),
    "cut string": (b'{"question": "abc', "cut off"),
    "garbage": (b"\x80\xff\x00\x13garbage", "not UTF-8"),
    "plain garbage": (b"oops", "not valid JSON"),
    "zero bytes": (b"\0\0\0\0", "zero bytes"),
    "escaped NUL": (rb'{"text": "a\u0000b"}', "zero character"),
    "lone surrogate": (rb'{"text": "a\ud800b"}', "surrogate"),
    "damaged UTF-8": ('{"text": "é'.encode() + b'\xc3"}', "not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"a": -Infinity}', "Infinity is not JSON"),
    "list": (b"[1, 2]", "a list, not an object"),
    "number": (b"17", "a number, not an object"),
    "null": (b"null", "null, not an object"),
    "true": (b"true", "true or false, not an object"),
    "deep": (deep(65).encode(), "deeper than 64"),
    "very deep": (b"[" * 100_000, "deeper than 64"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "two values": (b'{"a": 1} {"b": 2}', "a line holds one row"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_the_rest_is_read(tmp_path, name):
    bad, reason = BAD_ROWS[name]
    path = write(tmp_path / "a.jsonl", jsonl(GOOD[:2]).encode() + bad + b"\n" + jsonl(GOOD[2:]).encode())
    found = list(rows(path))
    assert [r.value for r in found if isinstance(r, Row)] == GOOD
    (refused,) = [r for r in found if isinstance(r, Refused)]
    assert reason in refused.reason
    assert str(refused.origin) == f"{path}:3"


@pytest.mark.parametrize(
    "name", ["NaN", "lone surrogate", "escaped NUL", "list", "number", "deep", "plain garbage", "huge integer"]
)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_bad_element_of_an_array_is_refused_and_the_rest_is_read(tmp_path, name, at):
    bad, reason = BAD_ROWS[name]
    parts = [json.dumps(r).encode() for r in GOOD]
    path = write(tmp_path / "a.json", b"[" + b",\n".join([*parts[:at], bad, *parts[at:]]) + b"]")
    found = list(rows(path))
    assert [r.value for r in found if isinstance(r, Row)] == GOOD
    assert [(reason in r.reason, r.origin.line) for r in found if isinstance(r, Refused)] == [(True, at + 1)]


def test_deep_but_allowed_and_brackets_in_text_are_read(tmp_path):
    path = write(
        tmp_path / "a.jsonl", deep(64) + "\n" + json.dumps({"text": "[{" * 100}) + "\n" + json.dumps({"text": "\\ud800 \\u0000"})
    )
    assert all(isinstance(r, Row) for r in rows(path))


def test_a_row_over_the_limit_is_refused(tmp_path, monkeypatch):
    for module in (sources, json_rows):
        monkeypatch.setattr(module, "MAX_ROW", 1000)
    path = write(tmp_path / "a.jsonl", jsonl([GOOD[0], {"text": "x" * 5000}, GOOD[1]]))
    kinds = [type(r) for r in rows(path)]
    assert kinds == [Row, Refused, Row]


@pytest.mark.parametrize(
    ("name", "content", "what", "fix"),
    [
        ("latin.jsonl", jsonl(GOOD).encode() + '{"text": "café"}\n'.encode("latin1"), "line 6", "iconv -f latin1 -t utf8"),
        ("windows.jsonl", '{"text": "“a”"}\n'.encode("cp1252"), "line 1", "iconv -f windows-1252"),
        ("latin.json", '[{"text": "café"}]'.encode("latin1"), "not UTF-8", "iconv -f latin1"),
        ("latin.csv", "text\ncafé\n".encode("latin1"), "not UTF-8", "iconv -f latin1"),
        ("latin.txt", "café\n".encode("latin1"), "not UTF-8", "iconv -f latin1"),
        ("utf16.jsonl", jsonl(GOOD).encode("utf-16"), "utf16", "iconv -f utf16"),
        ("no_mark.jsonl", jsonl(GOOD).encode("utf-16-le"), "utf-16le", "iconv -f utf-16le"),
        ("big.jsonl", jsonl(GOOD).encode("utf-16-be"), "utf-16be", "iconv -f utf-16be"),
        ("utf32.jsonl", jsonl(GOOD).encode("utf-32"), "utf32", "iconv -f utf32"),
        ("empty.jsonl", b"", "empty", "remove it"),
        ("empty.parquet", b"", "empty", "remove it"),
        ("white.jsonl", b"\n \n", "no rows", "remove it"),
        ("white.txt", b"\n \n", "no rows", "remove it"),
        ("array.json", b"[]", "no rows", "remove it"),
        ("header.csv", b"question,answer\n", "no rows", "remove it"),
        ("cut.json", json.dumps(GOOD).encode()[:-30], "cut off", "copy or download it again"),
        ("cut_between.json", b'[{"a": 1},', "cut off", "copy or download"),
        ("no_comma.json", b'[{"a": 1} {"a": 2}]', "',' belongs", "mend it"),
        ("tail.json", b"[{}] and more", "behind the end", "one row a line"),
        ("two.json", b'{"a": [{}], "b": [{}]}', "two lists", "keep one"),
        ("quotes.csv", b'a,b\n"1,2\n3,4\n', "never closed", "close them"),
        ("twice.csv", b"a,a\n1,2\n", "one name", "rename"),
        ("bad.gz.jsonl.gz", b"plain text", "not a whole gzip", "drop .gz"),
        ("cut.jsonl.gz", gzip.compress(jsonl(GOOD * 50).encode())[:-20], "cut off", "download it again"),
        ("damaged.parquet", b"PAR1" + b"x" * 100, "not a whole parquet", "download it again"),
        ("model.bin", b"x", "files of type .bin", ".jsonl"),
    ],
)
def test_a_bad_file_is_one_line_and_a_fix(tmp_path, name, content, what, fix):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as e:
        list(rows(path))
    assert "\n" not in e.value.what
    assert name in e.value.what and what in e.value.what
    assert fix in e.value.fix


def test_missing_path_names_what_is_there(tmp_path):
    write(tmp_path / "chats.jsonl", jsonl(GOOD))
    with pytest.raises(DataError, match="no such file") as e:
        find(tmp_path / "chat.jsonl")
    assert "chats.jsonl" in e.value.fix


def test_all_bad_files_of_a_folder_are_named_and_good_rows_come(tmp_path):
    write(tmp_path / "a.jsonl", b"")
    write(tmp_path / "b.jsonl", jsonl(GOOD))
    write(tmp_path / "c.jsonl.gz", b"nothing packed")
    write(tmp_path / "d.csv", "text\ncafé\n".encode("latin1"))
    found = []
    with pytest.raises(DataError) as e:
        for r in rows(tmp_path):
            found.append(r.value)
    assert found == GOOD
    assert [line.split("/")[-1].split(":")[0] for line in e.value.what.splitlines()] == ["a.jsonl", "c.jsonl.gz", "d.csv"]


def test_a_folder_is_walked_in_order_and_what_is_left_aside_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("sub/z.jsonl", "b.csv", "README.md", "dataset_info.json", "x.bin", ".hidden.jsonl", ".git/a.jsonl"):
        write(tmp_path / name, "question,answer\n1,2\n" if name == "b.csv" else jsonl(GOOD[:1]))
    files = find(tmp_path)
    assert [p.name for p in files.paths] == ["b.csv", "z.jsonl"]
    assert sorted(s.rsplit("/", 1)[-1] for s in files.skipped) == [
        "README.md (text beside files with rows)",
        "dataset_info.json (metadata)",
        "x.bin (unknown type)",
    ]
    for name in ("sub/z.jsonl", "b.csv", "dataset_info.json"):
        (tmp_path / name).unlink()
    assert [p.name for p in find(tmp_path).paths] == ["README.md"]
    (tmp_path / "README.md").unlink()
    with pytest.raises(DataError, match="no file with rows"):
        find(tmp_path)


def test_a_run_folder_among_the_data_is_passed_over(tmp_path):
    """`output` inside the data's folder: its held-out rows and its samples must not be trained on next time."""
    write(tmp_path / "a.jsonl", jsonl(GOOD[:1]))
    for name in ("run.yaml", "manifest.json", "status.json", "samples.jsonl", "data/held_out.jsonl"):
        (tmp_path / "runs/first" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "runs/first" / name, jsonl(GOOD[:1]))
    files = find(tmp_path)
    assert [p.name for p in files.paths] == ["a.jsonl"]
    assert files.skipped == (f"{tmp_path / 'runs/first'} (a run folder)",)
    assert [p.name for p in find(tmp_path / "runs/first/data").paths] == ["held_out.jsonl"]  # asked for by name


def test_gzip_bomb_stops_at_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BOMB_FROM", 1 << 20)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "' + b"x" * (8 << 20) + b'"}\n'))
    with pytest.raises(DataError, match="unpacks to more than"):
        list(rows(path))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.csv", " Question ,\ufeffANSWER\u00a0, Note "),
        ("a.csv", '\ufeff"\ufeffquestion", Answer,Note'),
        ("a.csv", "QUESTION;answer\t;Note"),
        ("a.tsv.gz", "Question\tAnswer \t Note"),
    ],
)
def test_columns_are_known_by_name_however_they_are_written(tmp_path, name, header):
    mark = "\t" if ".tsv" in name else ";" if ";" in header else ","
    content = f"{header}\n{mark.join('QAN')}\n".encode()
    files = find(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    (chunk,) = chunks(files)
    assert [r.value for r in sources.parse(chunk)] == [
        {"question": "Q", "answer": "A", "Note": "N"}
    ]  # not a known one: as it stands
    told = [note for note in files.notes if note.startswith("column")]
    assert told and all(note.endswith(("'question'", "'answer'", "'Note'")) for note in told)


def test_columns_as_they_should_be_are_not_noted(tmp_path):
    files = find(write(tmp_path / "a.csv", "question,answer,Note\n1,2,3\n"))
    assert len(list(chunks(files))) == 1 and not files.notes


@pytest.mark.parametrize(
    ("header", "both"),
    [
        ("Question,answer,question ", "'Question' and 'question '"),
        ("answer,\ufeffAnswer", "'answer' and '\\ufeffAnswer'"),
        ("Foo, Foo", "'Foo' and ' Foo'"),
        ("question,question", "'question' and 'question'"),
    ],
)
def test_two_columns_that_become_one_are_an_error_that_names_both(tmp_path, header, both):
    path = write(tmp_path / "a.csv", f"{header}\n1,2,3\n")
    with pytest.raises(DataError) as e:
        list(rows(path))
    assert e.value.what.startswith(f"{path}: ") and both in e.value.what and "rename one of them" in e.value.fix


def test_other_columns_may_differ_in_case_alone(tmp_path):
    assert values(write(tmp_path / "a.csv", "text,Foo,foo\n1,2,3\n")) == [{"text": "1", "Foo": "2", "foo": "3"}]


def test_every_key_that_a_format_reads_is_a_known_column():
    source = Path(formats.__file__).read_text()
    read = set(re.findall(r"""(?:value\.get\(|value\[|get\("tools", value\.get\()"(\w+)\"""", source))
    read -= {"file", "line", "kind", "fields"}  # of a run's own held_out.jsonl
    first = {k for names in re.findall(r"_first\(value((?:, \"\w+\")+)\)", source) for k in re.findall(r"\w+", names)}
    groups = [group for f in formats.FORMATS.values() for group in f.keys] + [group for group, _ in formats.REFUSED_KEYS]
    assert len(read) > 8 and len(first) > 4
    assert read | first | set(formats.MEDIA).union(*groups) <= sources.COLUMNS


def test_csv_records_keep_their_first_line_number(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer\n"two\nlines",1\nb,2,3\n"x"y,4\nc,5\n')
    found = list(rows(path))
    assert [(r.origin.line, type(r)) for r in found] == [(2, Row), (4, Refused), (5, Refused), (6, Row)]


def test_a_large_array_is_read_in_pieces(tmp_path, monkeypatch):
    for module in (sources, json_rows):  # every boundary falls somewhere inside a row
        monkeypatch.setattr(module, "BLOCK", 64)
    many = [{"text": f'tricky "]}},{{[ \\" é {i}', "n": [i, {"a": -1.5e3}]} for i in range(200)]
    assert values(write(tmp_path / "a.json", json.dumps(many, ensure_ascii=False, indent=1))) == many
    assert values(write(tmp_path / "b.json", json.dumps({"k": {"z": [1]}, "rows": many}))) == many


# ---- fuzz: whatever the bytes, only DataError, and every line is accounted for ---------------------------------------------------

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
PIECES = st.sampled_from(
    [jsonl(GOOD[:1]).encode(), *(b for b, _ in BAD_ROWS.values() if len(b) < 500), b"\n", b"\r\n", b",", b'"', b"[", b"]}"]
)


@FUZZ
@given(st.lists(PIECES | st.binary(max_size=12), max_size=12), st.integers(0, 3))
def test_fuzz_lines(tmp_path, parts, mode):
    content = (b"\n" if mode else b"").join(parts)
    path = write(tmp_path / "f.jsonl", content)
    lines = content.split(b"\n")
    wanted = [i for i, line in enumerate(lines, 1) if line and not line.isspace()]
    if content.startswith(b"\xef\xbb\xbf"):
        return
    try:
        assert [r.origin.line for r in rows(path)] == wanted
    except DataError as e:
        assert str(path) in e.what and e.fix


@FUZZ
@given(
    st.lists(PIECES | st.binary(max_size=12), max_size=12), st.sampled_from(["f.json", "f.csv", "f.txt", "f.jsonl.gz", "f.parquet"])
)
def test_fuzz_other_files(tmp_path, parts, name):
    content = b"".join(parts)
    if name == "f.json":
        content = b"[" + content
    if name.endswith(".gz"):
        content = bytearray(gzip.compress(content, mtime=0))
        content[len(content) // 2] ^= parts[0][0] if parts and parts[0] else 0
    path = write(tmp_path / name, bytes(content))
    try:
        assert list(rows(path))  # a file is read to the end, or named
    except DataError as e:
        assert str(path) in e.what and e.fix


@FUZZ
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), st.binary(min_size=1, max_size=6))
def test_fuzz_damaged_parquet(tmp_path, places, junk):
    path = tmp_path / "f.parquet"
    if not path.exists():
        parquet.write_table(pa.Table.from_pylist(GOOD * 20), tmp_path / "whole.parquet")
    raw = bytearray((tmp_path / "whole.parquet").read_bytes())
    for place in places:
        raw[place % len(raw) : place % len(raw) + len(junk)] = junk
    write(path, bytes(raw))
    try:
        assert list(rows(path))
    except DataError as e:
        assert str(path) in e.what and e.fix


def test_gzip_members_and_crc(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(GOOD[:2]).encode()) + gzip.compress(jsonl(GOOD[2:]).encode()))
    assert values(path) == GOOD
    raw = bytearray(gzip.compress(jsonl(GOOD).encode()))
    raw[-8:-4] = zlib.crc32(b"other").to_bytes(4, "little")
    with pytest.raises(DataError, match="not a whole gzip"):
        list(rows(write(tmp_path / "b.jsonl.gz", bytes(raw))))


def test_csv_field_limit_does_not_stay_small(tmp_path):
    csv.field_size_limit(100)
    assert len(values(write(tmp_path / "a.csv", f'text\n"{"x" * 500}"\n'))) == 1
