"""Large and hostile inputs, each read in a process of its own: how much memory it takes at most, and how long.

The ones marked `soak` make files of 50 MB and more that are as they should be; what they measured stands in docs/data.md."""

# ruff: noqa: E501 - a case a line

import gzip
import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CODE = """
import sys, time
from tunesmith.data.formats import FormatError, conversation
from tunesmith.data.sources import Row, chunks, find, parse
from tunesmith.errors import DataError

def peak():  # not ru_maxrss: that begins at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

import pyarrow.parquet
if "xlsx" in sys.argv[1]: import openpyxl
if "pdf" in sys.argv[1]: import pypdf
before, start, rows, refused, fault = peak(), time.perf_counter(), 0, {}, ""
try:
    for chunk in chunks(find(sys.argv[1])):
        for row in parse(chunk):
            rows += 1
            reason = "" if isinstance(row, Row) else row.reason
            try:
                conversation(row) if not reason else None
            except FormatError as e:
                reason = e.reason
            if reason:
                refused[reason] = refused.get(reason, 0) + 1
except DataError as e:
    fault = e.what
import json
print(json.dumps([peak() - before, time.perf_counter() - start, rows, list(refused), fault]))
"""


def measured(path: Path) -> tuple[float, float, int, list[str], str]:
    """MB more than the process had before, seconds, rows, reasons, the fault."""
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    more, seconds, rows, refused, fault = json.loads(done.stdout)
    size = path.stat().st_size / 2**20
    print(f"\n{path.name}: {size:.1f} MB, at most {more:.0f} MB more, {seconds:.1f} s, {rows:,} rows, {refused} {fault}")
    return more, seconds, rows, refused, fault


def words(count: int, seed: int = 0) -> str:
    r = random.Random(seed)
    return " ".join(f"w{r.randrange(50_000)}" for _ in range(count))


TURN = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'


def rowgroups(path: Path) -> None:
    """10 MB of text, once in the file's dictionary and a thousand times in its rows."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * (10 << 20)]))
    parquet.write_table(pa.table({"text": column.cast(pa.dictionary(pa.int32(), pa.large_string()))}), path, compression="zstd")


def write(content: str | bytes):
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


# The bar: 512 MB and twice the largest row (32 MB here), above what the process has anyway; a parquet batch holds 32 rows.
# The seconds are those of a busy machine, and there so that a square would be seen.
# name -> (what makes it, MB at most, seconds at most, rows, a word of what is said)
HOSTILE = {
    "row_of_30_MB.jsonl": (lambda p: write('{"text": "' + "word " * (6 << 20) + '"}\n')(p), 250, 60, 1, ""),
    "row_of_30_MB.json": (lambda p: write('[{"text": "' + "word " * (6 << 20) + '"}]')(p), 350, 60, 1, ""),
    "row_of_40_MB.jsonl": (lambda p: write('{"text": "' + "word " * (8 << 20) + '"}\n')(p), 150, 60, 1, "longer than 32 MB"),
    "million_turns.jsonl": (lambda p: write('{"messages": [' + ", ".join([TURN] * 430_000) + "]}\n")(p), 600, 120, 1, ""),
    "million_turns.json": (lambda p: write('[{"messages": [' + ", ".join([TURN] * 430_000) + "]}]")(p), 700, 120, 1, ""),
    "braces.jsonl": (lambda p: write('{"text": [' + "{}," * 10_000_000 + "{}]}\n")(p), 200, 60, 1, "more than 1,000,000 objects"),
    "braces.json": (lambda p: write('[{"text": [' + "{}," * 10_000_000 + "{}]}]")(p), 400, 60, 0, "more than 1,000,000 objects"),
    "deep.jsonl": (lambda p: write("[" * 100_000 + "\n" + '{"a":' * 100_000 + "\n")(p), 50, 60, 2, "nested deeper than 64"),
    "deep.json": (lambda p: write('[{"text": ' + "[" * 100_000 + "]" * 100_000 + "}]")(p), 50, 60, 1, "nested deeper than 64"),
    "many_keys.json": (lambda p: write("{" + ",".join(f'"k{i}": 12345' for i in range(3_000_000)) + "}")(p), 600, 200, 0, "longer than 32 MB"),
    "bomb.jsonl.gz": (lambda p: write(gzip.compress(b'{"text": "' + b"x" * (300 << 20) + b'"}\n'))(p), 250, 60, 0, "unpacks to more than"),
    "field_of_100_MB.csv": (lambda p: write("text\n" + "x" * (100 << 20) + "\n")(p), 400, 60, 0, "longer than 32 MB"),
    "open_quote.csv": (lambda p: write('text\n"' + "some text\n" * (10 << 20))(p), 400, 60, 0, "longer than 32 MB"),
    "small_fields.csv": (lambda p: write('text\n"' + 'b","a\n' * (16 << 20))(p), 900, 60, 0, "longer than 32 MB"),
    "no_breaks.txt": (lambda p: write("word " * (20 << 20))(p), 150, 60, 25, ""),
    "million_rows.jsonl": (lambda p: write('{"text": "a"}\n' * 1_000_000)(p), 50, 200, 1_000_000, ""),
    "dictionary.parquet": (rowgroups, 1500, 120, 1000, ""),
}  # fmt: skip


SLOW = (
    "million",
    "braces",
    "many_keys",
    "open_quote",
    "small_fields",
    "dictionary",
    "bomb",
    "row_of_30_MB.json",
)  # the others take a second each


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] if n.startswith(SLOW) else []) for n in HOSTILE])
def test_hostile_inputs_take_a_bounded_share(tmp_path, name):
    make, most, seconds_most, rows_wanted, said = HOSTILE[name]
    make(tmp_path / name)
    more, seconds, rows, refused, fault = measured(tmp_path / name)
    assert rows == rows_wanted and said in (" ".join(refused) + fault)
    assert more < most and seconds < seconds_most


# ---- large files as they should be ----------------------------------------------------------------------------------------------


def sheet(path: Path, rows: int, shared: bool) -> None:
    """A workbook as Excel writes it (texts in a table of their own) or as small programs do (in the cells)."""
    openpyxl = pytest.importorskip("openpyxl")
    book, out = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["question", "answer"])
    book.save(out)
    lines, texts = [], []
    for i in range(rows + 1):
        cells = []
        for k, column in enumerate("AB"):
            text = words(20, 2 * i + k) if i else ("question", "answer")[k]
            inside = f't="s"><v>{len(texts)}</v>' if shared else f't="inlineStr"><is><t>{text}</t></is>'
            cells.append(f'<c r="{column}{i + 1}" {inside}</c>')
            texts.append(text)
        lines.append(f'<row r="{i + 1}">{"".join(cells)}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(out) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename == "xl/worksheets/sheet1.xml":
                content = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>".encode()
            elif info.filename == "[Content_Types].xml":
                kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
                part = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'
                content = content.replace(b"</Types>", part.encode() if shared else b"</Types>")
            new.writestr(info.filename, content)
        if shared:
            new.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(f'<si><t>{t}</t></si>' for t in texts)}</sst>")


def word(path: Path, body) -> None:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open("word/document.xml", "w") as f:
        f.write(f"<w:document {space}><w:body>".encode())
        for part in body:
            f.write(part.encode())
        f.write(b"</w:body></w:document>")


def pages(path: Path, count: int) -> None:
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DictionaryObject, NameObject, StreamObject

    writer, name = pypdf.PdfWriter(), NameObject
    font = DictionaryObject({name("/Type"): name("/Font"), name("/Subtype"): name("/Type1"), name("/BaseFont"): name("/Helvetica")})
    for n in range(count):
        page, stream = writer.add_blank_page(600, 800), StreamObject()
        page[name("/Resources")] = DictionaryObject({name("/Font"): DictionaryObject({name("/F1"): font})})
        text = "".join(f"({words(10, 40 * n + k)}) Tj 0 -14 Td " for k in range(40))
        stream.set_data(f"BT /F1 12 Tf 72 700 Td {text} ET".encode())
        page[name("/Contents")] = writer._add_object(stream.flate_encode())
    writer.write(path)


def export(path: Path, conversations: int, turns: int) -> None:
    with path.open("w") as f:
        for c in range(conversations):
            nodes = {
                str(i): {
                    "parent": str(i - 1) if i else None,
                    "message": {
                        "author": {"role": ("user", "assistant")[i % 2]},
                        "content": {"content_type": "text", "parts": [words(60, i)]},
                    },
                }
                for i in range(turns)
            }
            row = json.dumps({"mapping": nodes, "current_node": str(turns - 1), "create_time": 1})
            f.write(("," if c else "[") + row)
        f.write("]")


PARAGRAPH = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>"
# name -> (what makes it, MB at most)
LARGE = {
    "table.xlsx": (lambda p: sheet(p, 100_000, shared=True), 400),
    "cells.xlsx": (lambda p: sheet(p, 100_000, shared=False), 100),
    "book.docx": (lambda p: word(p, (PARAGRAPH.format(words(60, i)) for i in range(100_000))), 100),
    "empty_tags.docx": (lambda p: word(p, ["<w:x/>" * 1000] * 2_000 + [PARAGRAPH.format(words(300_000))]), 150),
    "pages.pdf": (lambda p: pages(p, 1_000), 250),
    "pages.html": (lambda p: write("<body>" + "".join(f"<p>{words(60, i)}</p>\n" for i in range(100_000)))(p), 100),
    "conversations.json": (lambda p: export(p, 2_000, 60), 100),
    "one.json": (lambda p: export(p, 1, 60_000), 350),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGE)
def test_large_files_take_a_bounded_share(tmp_path, name):
    make, most = LARGE[name]
    make(tmp_path / name)
    more, _, rows, refused, fault = measured(tmp_path / name)
    assert rows and not refused and not fault
    assert more < most
