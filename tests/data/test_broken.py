"""Broken files, each with what must be said of it and what becomes of its rows. Every one of them was written here, by hand or
by the few lines that make it."""
# ruff: noqa: E501 - a case a line

import datetime
import functools
import gzip
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tunesmith.config.schema import Data
from tunesmith.data import sources
from tunesmith.data.prepare import prepare
from tunesmith.data.render import build_renderer
from tunesmith.errors import DataError

ROW = {"question": "What is 2 + 2?", "answer": "4"}
LINE = json.dumps(ROW) + "\n"
U, A, S = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "system", "content": "Be brief."},
)
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]}
FILE = "file"  # no row is used: the whole file is refused with a fix


def chat(*messages, **more):
    return json.dumps({"messages": list(messages)} | more) + "\n"


def gz(content: bytes | str) -> bytes:
    return gzip.compress(content.encode() if isinstance(content, str) else content, mtime=0)


def zipped(parts: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in parts.items():
            z.writestr(name, content)
    return out.getvalue()


def docx(body: str, head: str = "") -> bytes:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    return zipped({"word/document.xml": f"{head}<w:document {space}><w:body>{body}</w:body></w:document>"})


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def xlsx(rows, merge: str = "") -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, out = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    if merge:
        book.active.merge_cells(merge)
    book.save(out)
    return out.getvalue()


def swollen_xlsx() -> bytes:
    whole = zipfile.ZipFile(io.BytesIO(xlsx([["question", "answer"], ["a", "b"]])))
    return zipped({i.filename: whole.read(i) for i in whole.infolist()} | {"xl/big.xml": b" " * (40 << 20)})


def pdf(password: str = "", text: bytes = b"") -> bytes:
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DictionaryObject, NameObject, StreamObject

    writer, out = pypdf.PdfWriter(), io.BytesIO()
    page = writer.add_blank_page(200, 200)
    if text:
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject()})
        stream = StreamObject()
        stream.set_data(text)
        page[NameObject("/Contents")] = writer._add_object(stream.flate_encode())
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def table(rows, names=None) -> bytes:
    out = io.BytesIO()
    made = pa.Table.from_pylist(rows)
    parquet.write_table(made.rename_columns(names) if names else made, out)
    return out.getvalue()


def export(nodes, last="a", **more) -> str:
    """A conversation of ChatGPT's export; a node is (name, parent, role, text)."""
    mapping = {
        name: {"parent": parent, "message": {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}}
        for name, parent, role, text in nodes
    }
    return json.dumps([{"mapping": mapping, "current_node": last, "create_time": 1} | more])


def bad_crc() -> bytes:
    packed = bytearray(gz(LINE * 5))
    packed[-8:-4] = zlib.crc32(b"other").to_bytes(4, "little")
    return bytes(packed)


def lying_size() -> bytes:
    return gz(LINE * 5)[:-4] + (7).to_bytes(4, "little")


def folder(files: dict[str, bytes | str]):
    def make(path: Path) -> None:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def links(path: Path) -> None:
    path.mkdir()
    (path / "rows.jsonl").write_text(LINE)
    for name, to in (("loop.jsonl", "loop.jsonl"), ("gone.jsonl", "nowhere"), ("back", str(path))):
        (path / name).symlink_to(to)
    os.mkfifo(path / "pipe.jsonl")


# name -> (text, bytes, or a function of the path that gives them or makes something else there; classes; what must be said)
BROKEN: dict[str, tuple] = {
    # ---- not what the name says
    "empty.jsonl": (b"", FILE, "the file is empty", "remove it"),
    "empty.csv": (b"", FILE, "the file is empty"),
    "empty.xlsx": (b"", FILE, "the file is empty"),
    "empty.jsonl.gz": (gz(""), FILE, "the file is empty"),
    "blank.jsonl": (b"\n \r\n\t\n", FILE, "the file holds no rows"),
    "zip.jsonl": (zipped({"a.jsonl": LINE}), FILE, "is a zip archive", "unpack it"),
    "gzip.jsonl": (gz(LINE), FILE, "packed with gzip", "add .gz to its name"),
    "twice.jsonl.gz": (gz(gz(LINE)), FILE, "packed with gzip", "packed twice"),
    "zstd.jsonl": (b"(\xb5/\xfd\x04X\x99", FILE, "packed with zstd", "zstd -d"),
    "parquet.jsonl": (lambda _: table([ROW]), FILE, "a parquet file", "name it .parquet"),
    "pdf.txt": (lambda _: pdf(), FILE, "the file is a PDF", "name it .pdf"),
    "old_excel.csv": (b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(600), FILE, "old binary form", "save it as .xlsx"),
    "sqlite.csv": (b"SQLite format 3\0" + bytes(84), FILE, "a SQLite database", "sqlite3"),
    "weights.bin": (b"\0\1", FILE, "files of type .bin are not read", ".jsonl"),
    "plain.jsonl.gz": (LINE, FILE, "not a whole gzip file", "drop .gz from its name"),
    # ---- gzip that lies
    "cut.jsonl.gz": (gz(LINE * 900)[:-30], FILE, "the gzip file is cut off", "download it again"),
    "crc.jsonl.gz": (lambda _: bad_crc(), FILE, "not a whole gzip file (CRC check failed"),
    "size.jsonl.gz": (lambda _: lying_size(), FILE, "not a whole gzip file (Incorrect length"),
    "tail.jsonl.gz": (gz(LINE) + b"and more", FILE, "not a whole gzip file"),
    "bomb.jsonl.gz": (lambda _: gz(b" " * (70 << 20)), FILE, "unpacks to more than", "unpack it yourself if you trust it"),
    # ---- encodings
    "utf16.jsonl": (LINE.encode("utf-16"), FILE, "not UTF-8 but utf16", "iconv -f utf16 -t utf8"),
    "utf16.csv": ("question,answer\na,b\n".encode("utf-16-le"), FILE, "not UTF-8 but utf-16le", "iconv -f utf-16le"),
    "utf32.txt": ("A text.\n".encode("utf-32"), FILE, "not UTF-8 but utf32"),
    "latin1.jsonl": ('{"text": "café"}\n'.encode("latin-1"), FILE, "not UTF-8 (line 1", "looks like latin1", "iconv -f latin1"),
    "windows.csv": ("question,answer\nWho?,“Me”\n".encode("cp1252"), FILE, "looks like windows-1252", "iconv -f windows-1252"),
    "latin1.html": ("<p>café</p>".encode("latin-1"), FILE, "looks like latin1"),
    "one_bad_byte.jsonl": ('{"text": "é'.encode() + b'\xff"}\n' + LINE.encode(), "1 used, 1 refused", ":1: not UTF-8 (byte 13"),
    "mark.jsonl": (b"\xef\xbb\xbf" + LINE.encode(), "1 used", "UTF-8 byte order mark passed over"),
    "mark_inside.jsonl": (LINE + "\ufeff" + LINE, "2 used", "UTF-8 byte order mark passed over"),
    "nul.jsonl": (LINE.encode() + b"\0" * 40 + b"\n", "1 used, 1 refused", ":2: zero bytes in the row"),
    "nul_inside.jsonl": (r'{"text": "a\u0000b"}', "1 refused", ":1: a zero character (NUL) in the text"),
    "nul.csv": (b"question,answer\na\0,b\nc,d\n", "1 used, 1 refused", ":2: a zero character (NUL)"),
    "nul.txt": (b"A text with\0zero.\n", "1 refused", ":1: a zero character (NUL)"),
    "surrogate.jsonl": (r'{"text": "a\ud800b"}', "1 refused", ":1: half of a surrogate pair"),
    "surrogate_in_a_string.jsonl": (
        json.dumps({"messages": r'[{"role": "user", "content": "\udfff"}]'}), "1 refused", ":1: messages is a string", "surrogate"
    ),
    # ---- line ends
    "mixed_ends.jsonl": (LINE[:-1] + "\r\n" + LINE + "\r\n\n" + LINE[:-1], "3 used"),
    "mac_ends.jsonl": (LINE[:-1] + "\r" + LINE[:-1] + "\r", "1 refused", ":1: behind the end of the row, in column 47"),
    "mac_ends.csv": ("question,answer\ra,b\rc,d\r", "2 used"),
    "no_last_end.csv": ("question,answer\r\na,b", "1 used"),
    # ---- JSON lines
    "cut.jsonl": (LINE + LINE[:25], "1 used, 1 refused", ":2: the JSON is cut off in the middle"),
    "pretty.jsonl": (json.dumps(ROW, indent=1) * 2, FILE, "runs over many lines, not one row a line", "jq -c ."),
    "array.jsonl": (json.dumps([ROW, ROW]), FILE, "one JSON array, not one row a line", "ends in .json"),
    "pretty_array.jsonl": (json.dumps([ROW, ROW], indent=1), FILE, "one JSON array", "ends in .json"),
    "joined.jsonl": (LINE[:-1] * 2, "1 refused", ":1: behind the end of the row", "a line holds one row"),
    "commas.jsonl": ((LINE[:-1] + ",\n") * 2, "2 refused", ":1: behind the end of the row", "stands ','"),
    "trailing_comma.jsonl": ('{"text": "a",}\n', "1 refused", ":1: not valid JSON (Expecting property name"),
    "python.jsonl": ("{'text': 'a'}\n", "1 refused", ":1: not valid JSON", "double quotes at column 2"),
    "nan.jsonl": ('{"text": NaN}\n' + LINE, "1 used, 1 refused", ":1: not valid JSON (NaN is not JSON)"),
    "infinity.jsonl": ('{"question": "a", "answer": -Infinity}\n', "1 refused", ":1: not valid JSON (-Infinity is not JSON)"),
    "beyond.jsonl": ('{"question": "a", "answer": 1e999}\n', "1 refused", ":1: answer is a number beyond what can be held"),
    "huge_integer.jsonl": ('{"text": ' + "9" * 5000 + "}\n", "1 refused", ":1: not valid JSON (Exceeds the limit"),
    "two_keys.jsonl": ('{"question": "a", "answer": "b", "answer": "c"}\n', "1 refused", ":1: not valid JSON (the key 'answer'", "twice"),
    "deep.jsonl": ('{"a": ' * 100_000 + "\n", "1 refused", ":1: nested deeper than 64 levels"),
    "deep_in_a_string.jsonl": (chat(U, A, tools="[" * 900 + "]" * 900), "1 refused", ":1: tools is a string", "deeper than 64"),
    "no_objects.jsonl": ('[1]\n5\nnull\n"a text"\n', "1 used, 3 refused", ":1: the row is a list", ":2: the row is a number", ":3: "),
    "garbage.jsonl": ("oops\n" + LINE, "1 used, 1 refused", ":1: not valid JSON"),
    # ---- JSON
    "cut.json": (json.dumps([ROW] * 3)[:-20], FILE, "ends in the middle of row 3: the file is cut off", "download it again"),
    "no_comma.json": ('[{"text": "a"} {"text": "b"}]', FILE, "after row 1: '{' stands where ',' belongs", "mend it there"),
    "last_comma.json": ('[{"text": "a"}, ]', "1 used", "comma behind the last row passed over"),
    "inner_comma.json": ('[{"text": "a",}, {"text": "b"}]', "1 used, 1 refused", ":1: not valid JSON (Expecting property name"),
    "tail.json": ('{"text": "a"}\n{"text": "b"\n}', "1 used, 2 refused", ":2: the JSON is cut off", ":3: "),
    "two_objects.json": (json.dumps(ROW, indent=1) * 2, FILE, "something stands behind the end of the JSON", "one row a line"),
    "two_lists.json": ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', FILE, "two lists of rows, 'train' and 'test'"),
    "two_keys.json": ('{"text": "a", "text": "b"}', FILE, "the key 'text' stands twice"),
    "deep.json": ("[" * 100_000, FILE, "row 1: the file is cut off"),
    "deep_object.json": ('{"a":' * 100_000 + "1" + "}" * 100_000, FILE, "nested deeper than 64 levels"),
    "empty_list.json": (b"[]", FILE, "the file holds no rows"),
    "by_column.json": ('{"question": {"0": "a"}, "answer": {"0": "b"}}', "1 refused", ":1: question is an object, not text"),
    # ---- tables
    "header.csv": ("question,answer\n", FILE, "the file holds no rows"),
    "same_names.csv": ("question,answer,Answer\na,b,c\n", FILE, "two columns have one name: 'answer' and 'Answer'", "rename one"),
    "ragged.csv": ("question,answer\na,b,c\nd\ne,f\n", "1 used, 2 refused", ":2: 3 columns, the header names 2", ":3: 1 columns"),
    "open_quote.csv": ('question,answer\na,b\n"c,d\ne,f\n', FILE, "the quotes opened in line 3 are never closed", "close them"),
    "stray_quote.csv": ('question,answer\n"a"b,c\nd,e\n', "1 used, 1 refused", ":2: not a valid record"),
    "semicolons.csv": ("question;answer\nWhat, you?;Yes\n", "1 used"),
    "no_header.csv": ("What is 2 + 2?,4\nWhat is 3 + 3?,6\n", FILE, "the first line looks like a row", "put a line with the names"),
    "joined.csv": ("question,answer\na,b\nquestion,answer\nc,d\n", "2 used, 1 refused", ":3: the names of the columns again"),
    "two_answers.csv": ("Frage,Antwort,Reply\nWho are you?,A man.,Me.\n", FILE, "several columns may be the answer", "columns: {prompt"),
    "numbers.csv": ("a,b\n1,2\n3,4\n", FILE, "cannot be told from their names or contents", "say which is which in the run file"),
    "ragged.tsv": ("question\tanswer\na b\n", "1 refused", ":2: 1 columns, the header names 2"),
    "empty_cells.csv": ("question,answer\na,\n,b\n", "2 refused", ":2: answer is empty", ":3: question is empty"),
    # ---- parquet
    "cut.parquet": (lambda _: table([ROW] * 9)[:-40], FILE, "not a whole parquet file", "download it again"),
    "text.parquet": (b"question,answer\n", FILE, "not a whole parquet file"),
    "none.parquet": (lambda _: table([ROW])[:0], FILE, "the file is empty"),
    "nested.parquet": (lambda _: table([{"text": {"a": [{"b": "c"}]}}]), "1 refused", ":1: text is an object"),
    "bytes.parquet": (lambda _: table([{"question": "a", "answer": b"\xff"}]), "1 refused", ":1: answer is bytes, not text"),
    "dates.parquet": (
        lambda _: table([{"question": "When?", "answer": datetime.date(2024, 1, 1)}]), "1 refused", ":1: answer is date, not text"
    ),
    "images.parquet": (lambda _: table([{"image": {"bytes": b"x"}, **ROW}]), "1 refused", ":1: the row has 'image'; only text"),
    "same_names.parquet": (
        lambda _: table([{"a": "1", "b": "2"}], ["text", "text"]), FILE, "two columns have one name: 'text'", "rename one of them"
    ),
    # ---- spreadsheets
    "cut.xlsx": (lambda _: xlsx([["question", "answer"], ["a", "b"]])[:-60], FILE, "not a whole .xlsx file", "again"),
    "text.xlsx": ("question,answer\n", FILE, "not a whole .xlsx file"),
    "merged.xlsx": (
        lambda _: xlsx([["question", "answer"], ["Who?", "Me."], [None, "You."]], "A2:A3"),
        "1 used, 1 refused", ":3: question is empty", "merged cells: only the first of them holds the value",
    ),
    "formulas.xlsx": (
        lambda _: xlsx([["question", "answer"], ["Who?", '="M"&"e"']]),
        "1 refused", ":2: answer is empty", "formula without a saved value read as empty",
    ),
    "errors.xlsx": (lambda _: xlsx([["question", "answer"], ["Who?", "#N/A"]]), "1 refused", "cell with #N/A read as empty", ":2: answer"),
    "bomb.xlsx": (lambda _: swollen_xlsx(), FILE, "unpacks to 4", "if you trust it, save it as .csv"),
    "header.xlsx": (lambda _: xlsx([["question", "answer"]]), FILE, "the file holds no rows"),
    "locked.xlsx": (b"\xd0\xcf\x11\xe0" + bytes(600), FILE, "protected by a password, or in the old binary form"),
    "packed.xlsx.gz": (gz("x"), FILE, "a .xlsx file is not read as .gz", "gzip -dk"),
    # ---- documents
    "entities.docx": (lambda _: docx(paragraph("&b;"), '<!DOCTYPE a [<!ENTITY b "bb">]>'), FILE, "defines XML entities"),
    "late_entities.docx": (
        lambda _: docx(paragraph("&b;"), f'<!-- {"x" * 9000} --><!DOCTYPE a [<!ENTITY b "bb">]>'), FILE, "defines XML entities"
    ),
    "deep.docx": (lambda _: docx("<w:tbl>" * 999 + "</w:tbl>" * 999), FILE, "nested deeper than 256 levels"),
    "cut.docx": (lambda _: docx(paragraph("text"))[:-30], FILE, "not a whole .docx file"),
    "broken_xml.docx": (lambda _: docx("<w:p>"), FILE, "not a whole .docx file (mismatched tag"),
    "other.docx": (zipped({"a.txt": "a"}), FILE, "not a Word document"),
    "scan.pdf": (lambda _: pdf(), FILE, "no text in its 1 pages: they are pictures", "ocrmypdf"),
    "locked.pdf": (lambda _: pdf("secret"), FILE, "protected by a password", "qpdf --decrypt"),
    "cut.pdf": (lambda _: pdf()[:90], FILE, "not a whole PDF", "download it again"),
    "bomb.pdf": (lambda _: pdf(text=b" " * (90 << 20)), FILE, "would unpack to more than pypdf allows", "if you trust it"),
    "endless_page.pdf": (
        lambda _: pdf(text=b"BT (a) Tj ET\n" * 60_000), FILE, "the file holds no rows"
    ),
    "text.pdf": ("just text", FILE, "not a whole PDF"),
    "open_comment.html": ("<p>a</p>\n<!-- " + "x" * 200_000, FILE, "a tag or comment that opens in line 2 never ends"),
    "script.html": ("<script>x</script>", FILE, "the file holds no rows"),
    # ---- dialogues
    "one_voice.txt": ("Anna: hello\n\nAnna: still here\n", "1 used"),
    "unknown_dates.txt": (
        "03/04/24, 14:05 - Anna: Hello?\n04/03/24, 14:06 - Ben: Hello!\n" * 3, "1 used", "read as a dialogue: 'ben' is the assistant"
    ),
    "nul_in_a_name.txt": ("[1.1.24, 1:00] A\0: a\n[1.1.24, 1:01] B: b\n[1.1.24, 1:02] C: c\n[1.1.24, 1:03] B: d\n", "1 refused", ":1: a zero character (NUL)"),
    "no_answer.txt": ("User: a\nAssistant:\nUser: b\nAssistant: c\n", "1 refused", ":1: the answer in message 2 is empty"),
    "lines_before.md": (
        "A title\n\n## User\nHello\n## Assistant\nHello!\n", "1 used", "line before the first speaker left out", "'assistant' is the"
    ),
    # ---- what rows say
    "no_turns.jsonl": (chat(), "1 refused", ":1: messages is empty"),
    "no_answer.jsonl": (chat(U), "1 refused", ":1: no assistant message: there is nothing to learn"),
    "only_answers.jsonl": (chat(A), "1 refused", ":1: only assistant messages"),
    "call_without_tools.jsonl": (chat(U, CALL, {"role": "tool", "content": "Noon."}, A), "1 refused", ":1: the template drops the tool calls of message 2"),
    "answer_first.jsonl": (chat(A, U, A), "1 used"),
    "two_systems.jsonl": (chat(S, S, U, A), "1 fixed", "merged"),
    "two_users.jsonl": (chat(U, U, A), "1 fixed", "merged"),
    "unknown_role.jsonl": (chat({"role": "wizard", "content": "x"}, A), "1 refused", ":1: unknown role 'wizard'; known: system"),
    "no_role.jsonl": (chat({"content": "x"}, A), "1 refused", ":1: message 1 has no role"),
    "no_content.jsonl": (chat(U, {"role": "assistant"}), "1 refused", ":1: the content of message 2 is missing or null"),
    "empty_answer.jsonl": (chat(U, A | {"content": " "}), "1 refused", ":1: the answer in message 2 is empty"),
    "parts.jsonl": (chat(U | {"content": [{"type": "text", "text": "Hello"}]}, A), "1 fixed", "content parts joined"),
    "image_part.jsonl": (chat(U | {"content": [{"type": "image_url"}]}, A), "1 refused", ":1: content of type 'image_url'; only text"),
    "images.jsonl": (chat(U, A, images=["a.jpg"]), "1 refused", ":1: the row has 'images'; only text is supported"),
    "weight.jsonl": (chat(U, A | {"weight": 0.5}), "1 refused", ":1: the weight of message 2 is 0.5; only 0 and 1"),
    "weight_of_user.jsonl": (chat(U | {"weight": 1}, A), "1 refused", ":1: message 1 is a user message with weight 1"),
    "all_weights_0.jsonl": (chat(U, A | {"weight": 0}), "1 refused", ":1: every assistant message has weight 0"),
    "pairs.jsonl": (json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), "1 refused", ":1: chosen and rejected belong to preference"),
    "ids.jsonl": ('{"input_ids": [1, 2]}', "1 refused", ":1: already tokenised; give the text"),
    "missing_key.jsonl": ('{"question": "a", "answer": null}', "1 refused", ":1: 'answer' is missing or null"),
    "unknown_keys.jsonl": ('{"foo": "a", "bar": "b"}', "1 refused", ":1: no known format has these keys: bar, foo"),
    "two_formats.jsonl": (chat(U, A, **ROW), "1 refused", ":1: keys of two formats at once"),
    "history.jsonl": ('{"instruction": "a", "output": "b", "history": 5}', "1 refused", ":1: history is not a list of [question, answer]"),
    "call_of_user.jsonl": (chat(U | {"tool_calls": [{"function": {"name": "f"}}]}, A), "1 refused", ":1: message 1 is a user message with"),
    "bad_call.jsonl": (
        chat(U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}),
        "1 refused", ":1: the argument text of a tool call is a string that is not JSON", "NaN is not JSON",
    ),
    "number.jsonl": ('{"question": "a", "answer": 4}', "1 fixed", "number read as text"),
    "too_long.jsonl": (json.dumps(ROW | {"answer": "long " * 2000}), "1 refused", ":1: ", "tokens"),
    # ---- exports
    "circle.json": (export([("q", "a", "user", "Hi"), ("a", "q", "assistant", "Hi!")]), "1 refused", ":1: the tree runs in a circle"),
    "lost_parent.json": (export([("a", "gone", "assistant", "Hi!")]), "1 refused", ":1: a parent names a node that is not in the mapping"),
    "no_tree.json": (export([], mapping=[1]), "1 refused", ":1: mapping is not an object of nodes"),
    "odd_type.json": (
        export([], mapping={"a": {"message": {"author": {"role": "user"}, "content": {"content_type": []}}}}),
        "1 refused", ":1: content of type '[]' in message 1",
    ),
    # ---- folders, links and the like
    "folder.jsonl": (lambda path: path.mkdir(), FILE, "the folder holds no file with rows"),
    "mixed": (
        folder({"a.jsonl": LINE, "b.csv": "question,answer\na\n", "README.md": "About", "x.bin": b"\0", ".hidden.jsonl": LINE}),
        "1 used, 1 refused", "README.md (text beside files with rows)", "x.bin (unknown type)", "b.csv:2: 1 columns",
    ),
    "two_bad": (
        folder({"a.jsonl": "", "b/c.csv": "a,a\n1,2\n", "d.jsonl": LINE}), FILE, "a.jsonl: the file is empty", "c.csv: two columns",
    ),
    "links": (links, "1 used", "loop.jsonl (a link that", "gone.jsonl (a link that", "back (a link to a folder)", "pipe.jsonl (a pipe"),
    "loop.jsonl": (lambda path: path.symlink_to(path), FILE, "cannot be read: Too many levels of symbolic links", "its links"),
    "gone.jsonl": (lambda path: path.symlink_to("nowhere"), FILE, "a link to nowhere, which is not there"),
    "pipe.jsonl": (os.mkfifo, FILE, "neither a file nor a folder (a pipe or a device)", "cat it"),
    "not_there.jsonl": (lambda path: None, FILE, "no such file or folder", "correct the path"),
    "long_name" * 60: (lambda path: None, FILE, "cannot be read: File name too long"),
}  # fmt: skip


@pytest.fixture(scope="module")
def renderer(tiny):
    make = functools.partial(build_renderer, tiny.model, Data(train="x", max_length=2000), (), "2026-01-01")
    made = make()
    yield make, made
    made.close()


def told(path: Path, renderer, cache: Path) -> tuple[str, str]:
    """What becomes of a source's rows, and all that is said of it."""
    make, made = renderer
    data = Data(train=str(path), max_length=2000, held_out=0, workers=1)
    try:
        prepared = prepare(data, make, renderer=made, seed=0, cache_dir=cache, strict=False)
    except DataError as e:
        assert e.fix
        return FILE, f"{e.what}\n{e.fix}"
    account = prepared.account
    refused = [json.loads(line) for line in (prepared.folder / "refused.jsonl").read_text().splitlines()]
    (source,) = account.sources
    assert len(refused) == account.refused and sum(account.counts().values()) == account.rows
    said = [*source.notes, *source.fixes, *source.skipped, *(f"{r['file']}:{r['line']}: {r['reason']}" for r in refused)]
    return ", ".join(f"{n} {c}" for c, n in account.counts().items() if n), "\n".join(said)


@pytest.mark.parametrize("name", BROKEN, ids=lambda name: name[:40])
def test_a_broken_file_is_told_in_words(tmp_path, renderer, name):
    content, classes, *phrases = BROKEN[name]
    path = tmp_path / name
    if callable(content):
        content = content(path)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    became, said = told(path, renderer, tmp_path / "cache")
    assert became == classes, said
    for phrase in phrases:
        assert phrase in said
    if classes == FILE:
        assert name in said


def test_there_are_enough_of_them():
    """docs/data.md names the number."""
    count = len(BROKEN)
    assert f"{count} broken files" in (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert {Path(n.removesuffix(".gz")).suffix for n in BROKEN} >= {*sources.ROWS_SUFFIXES, *sources.TEXT_SUFFIXES}


def test_a_file_that_cannot_be_opened_is_named_before_anything_is_read(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(LINE)
    real = Path.open

    def locked(path, *args, **more):
        if path.name in ("a.jsonl", "c.jsonl"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)

    monkeypatch.setattr(Path, "open", locked)  # not by its mode: who runs as root may open it all the same
    with pytest.raises(DataError) as e:
        sources.find(tmp_path)
    assert [line.rpartition("/")[2] for line in e.value.what.splitlines()] == [
        f"{n}.jsonl: cannot be read: Permission denied" for n in "ac"
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.jsonl").write_text(LINE)
    real = os.scandir

    def locked(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match="inner: cannot be read: Permission denied"):
        sources.find(tmp_path)


@pytest.mark.parametrize("change", ["grows", "is cut", "is replaced", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text(LINE * 60_000)
    files = sources.find(path)
    reading = sources.chunks(files)
    next(reading)
    if change == "grows":
        with path.open("a") as f:
            f.write(LINE)
    elif change == "is cut":
        os.truncate(path, 100)
    elif change == "is replaced":
        (tmp_path / "b").write_text(LINE.replace("4", "5") * 60_000)
        os.utime(tmp_path / "b", (1, 1))
        (tmp_path / "b").replace(path)
    else:
        path.unlink()
    with pytest.raises(DataError) as e:
        list(reading)
    assert str(path) in e.value.what and ("changed while it was read" in e.value.what or change == "vanishes")


def test_too_little_memory_is_not_told_as_damage(tmp_path, monkeypatch):
    """pypdf, openpyxl and pyarrow raise it from within; "not a whole file, download it again" would be wrong."""
    from tunesmith.data import documents

    def starved(*_, **__):
        raise MemoryError

    openpyxl, pypdf = pytest.importorskip("openpyxl"), pytest.importorskip("pypdf")
    monkeypatch.setattr(openpyxl, "load_workbook", starved)
    monkeypatch.setattr(pypdf, "PdfReader", starved)
    monkeypatch.setattr(parquet, "ParquetFile", starved)
    monkeypatch.setattr(documents.ElementTree, "iterparse", starved)
    (tmp_path / "a.xlsx").write_bytes(xlsx([["question", "answer"], ["a", "b"]]))
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "c.docx").write_bytes(docx(paragraph("a")))
    (tmp_path / "d.parquet").write_bytes(table([ROW]))
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="memory is too small to read it"):
            list(sources.rows(path))
