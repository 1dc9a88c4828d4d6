"""Documents as raw text and spreadsheets as tables: what is read, what is refused in words, and that an archive is not trusted."""

import datetime
import gzip
import sys
import time
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import documents, sources
from tunesmith.data.sources import Refused, chunks, find, parse
from tunesmith.errors import DataError

PAGE = """<!DOCTYPE html><html><head><title>Eggs</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a></nav><script>if (a < b) alert("x")</script>
<h1>Boiled   eggs</h1><p>Boil them for <b>seven</b>
minutes &amp; wait&hellip;</p><!-- not this --><ul><li>small</li><li>large</li></ul>
<pre>a
  b</pre></body></html>"""
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def read(path, columns=None):
    files = find(path, columns)
    return [r for c in chunks(files) for r in parse(c)], dict(files.notes)


def fault(path) -> DataError:
    with pytest.raises(DataError) as e:
        read(path)
    return e.value


def word(path, paragraphs, head='<?xml version="1.0"?>', name="word/document.xml"):
    body = "".join(f"<w:p><w:r>{p}</w:r></w:p>" for p in paragraphs)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, f"{head}<w:document {W}><w:body>{body}</w:body></w:document>")
    return path


def pdf(path, pages):
    """A PDF of lines of text, by hand: objects, a table of their places, a trailer."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        shown = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        font = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R {font} >>")
        objects.append(f"<< /Length {len(shown)} >>\nstream\n{shown}\nendstream")
    out, places = b"%PDF-1.4\n", []
    for i, o in enumerate(objects, 1):
        places.append(len(out))
        out += f"{i} 0 obj\n{o}\nendobj\n".encode()
    table = "".join(f"{p:010d} 00000 n \n" for p in places)
    out += (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\n"
        f"startxref\n{len(out)}\n%%EOF\n"
    ).encode()
    path.write_bytes(out)
    return path


TAGS = st.sampled_from(["<p>", "</p>", "<script>", "</script>", "<body>", "<!--", "-->", "<", ">", "&", "&#x;", "<pre>", "text"])

# ---- html ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.html.gz"])
def test_html_is_its_text(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(PAGE.encode()) if name.endswith("gz") else PAGE.encode())
    (row,), _ = read(path)
    assert row.value == "Boiled eggs\n\nBoil them for seven minutes & wait…\n\nsmall\nlarge\n\na\n  b"


def test_a_long_page_comes_in_pieces_with_their_lines(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<body>\n" + "<p>It was a dark night.</p>\n" * 20_000)
    got, _ = read(path)
    assert len(got) > 4 and all(len(r.value) < 3 * sources.TEXT_PIECE for r in got)
    assert sum(r.value.count("dark") for r in got) == 20_000
    assert [r.origin.line for r in got] == sorted({r.origin.line for r in got})


@pytest.mark.parametrize(
    "text",
    [
        "<p>a</p>" + "<div>" * 50_000,
        "<" * 300_000,
        "</" * 150_000,
        "&" * 300_000,
        "<a " * 100_000 + ">",
        "<script>" * 50_000,
        "x" * 999_999,
    ],
)
def test_html_made_to_hang_does_not(tmp_path, text):
    path = tmp_path / "a.html"
    path.write_text(text)
    start = time.perf_counter()
    try:
        read(path)
    except DataError as e:
        assert e.fix
    assert time.perf_counter() - start < 20


def test_a_long_script_is_passed_over_and_a_comment_without_an_end_is_an_error(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<body><p>before</p><script>" + "if (a < b) c;\n" * 300_000 + "</script><p>after</p>")
    assert [r.value for r in read(path)[0]] == ["before\n\nafter"]
    path.write_text("<p>a</p>\n<!-- " + "x" * 9_000_000)
    assert "a tag or comment that opens in line 2 never ends" in fault(path).what
    path.write_text("<html><head><title>t</title></head><body><script>x</script></body>")
    assert "the file holds no rows" in fault(path).what


@settings(max_examples=200, deadline=None)
@given(st.lists(TAGS | st.text(max_size=5)))
def test_fuzz_html(parts):
    text = "".join(parts)
    try:
        assert all(isinstance(n, int) and isinstance(t, str) for n, t in documents.html([text], "a.html"))
    except DataError as e:
        assert e.fix


# ---- docx ----------------------------------------------------------------------------------------------------------------------


def test_docx_is_its_paragraphs(tmp_path):
    path = word(
        tmp_path / "a.docx", ["<w:t>Boil &amp; wait</w:t>", "", "<w:t>one</w:t><w:tab/><w:t>two</w:t>", "<w:drawing/><w:t>x</w:t>"]
    )
    (row,), notes = read(path)
    assert row.value == "Boil & wait\n\n\n\none\ttwo\n\nx" and notes == {"picture in a document left out": 1}


ENTITIES = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]>'


def test_a_docx_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    path = tmp_path / "a.docx"
    good = word(path, ["<w:t>text</w:t>"] * 50).read_bytes()
    cases = [
        (b"", "the file is empty"),
        (b"just text", "not a whole .docx file"),
        (good[:-40], "not a whole .docx file"),
        (b"\xd0\xcf\x11\xe0" + bytes(600), "protected by a password, or in the old binary form"),
        (word(path, ["<w:t>&c;</w:t>"], ENTITIES).read_bytes(), "defines XML entities"),
        (word(path, ["<w:t>a</w:p>"]).read_bytes(), "not a whole .docx file (mismatched tag"),
        (word(path, ["<w:t>a</w:t>"], name="word/other.xml").read_bytes(), "not a Word document"),
        (word(path, []).read_bytes(), "the file holds no rows"),
        (word(path, ["<w:t>" + "a" * (40 << 20) + "</w:t>"]).read_bytes(), "unpacks to"),
    ]
    for content, what in cases:
        path.write_bytes(content)
        told = fault(path)
        assert what in told.what and told.fix, (what, told.what)
    packed = tmp_path / "b.docx.gz"
    packed.write_bytes(gzip.compress(good))
    assert "a .docx file is not read as .gz" in fault(packed).what
    monkeypatch.setattr(documents, "ZIP_FILES", 0)
    path.write_bytes(good)
    assert "holds 1 files; the limit is 0" in fault(path).what


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path):
    path = word(tmp_path / "a.docx", ["<w:t>" + "a" * 100_000 + "</w:t>"])
    with zipfile.ZipFile(path) as z:
        size = z.infolist()[0].file_size
    content = path.read_bytes().replace(size.to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(content)
    assert "not a whole .docx file" in fault(path).what


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzz_damaged_docx(tmp_path_factory, damage):
    path = word(tmp_path_factory.mktemp("w") / "a.docx", ["<w:t>text</w:t>"] * 20)
    content = bytearray(path.read_bytes())
    for where, byte in damage:
        content[int(where * len(content))] = byte
    path.write_bytes(content)
    try:
        assert read(path)[0]
    except DataError as e:
        assert e.fix


# ---- pdf -----------------------------------------------------------------------------------------------------------------------


def test_pdf_is_its_pages(tmp_path):
    pytest.importorskip("pypdf")
    (row,), notes = read(pdf(tmp_path / "a.pdf", ["Boil the egg.", "", "Then wait."]))
    assert row.value == "Boil the egg.\n\nThen wait." and notes == {"PDF page without text left out": 1}


def test_a_pdf_that_cannot_be_read_says_why(tmp_path):
    pytest.importorskip("pypdf")
    path = pdf(tmp_path / "a.pdf", ["", ""])
    assert "no text in its 2 pages: they are pictures" in fault(path).what and "ocrmypdf" in fault(path).fix
    for content in (b"just text", b"%PDF-1.4\n", path.read_bytes()[:100]):
        path.write_bytes(content)
        assert "not a whole PDF" in fault(path).what


def test_a_pdf_under_a_password_says_how_to_open_it(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    path = pdf(tmp_path / "a.pdf", ["Secret."])
    writer = pypdf.PdfWriter(clone_from=path)
    writer.encrypt("word", algorithm="RC4-128")
    writer.write(path)
    assert "protected by a password" in fault(path).what and "qpdf --decrypt" in fault(path).fix


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.xlsx", "openpyxl")])
def test_a_missing_extra_is_told_with_its_install_line(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    told = fault(tmp_path / name)
    assert f"needs {module}, which is not installed" in told.what and "pip install 'tunesmith[documents]'" in told.fix


# ---- xlsx ----------------------------------------------------------------------------------------------------------------------


def book(path, *sheets):
    openpyxl = pytest.importorskip("openpyxl")
    b = openpyxl.Workbook()
    b.remove(b.active)
    for name, cells in sheets:
        sheet = b.create_sheet(name)
        for row in cells:
            sheet.append(row)
    b.save(path)
    return path


def test_a_sheet_is_a_table_with_guessed_columns(tmp_path):
    day = datetime.datetime(2024, 3, 1, 10)
    head = ["Nr", "Datum", "Kundenfrage", "Antwort"]
    rows = [[1, day, "Wo ist mein Paket?", "Unterwegs."], [2, day, "Wie viel ist 3 plus 4?", 7.0], [3, None, "Und 1 durch 2?", 0.5]]
    got, notes = read(book(tmp_path / "a.xlsx", ("leer", []), ("Tickets", [head, *rows, [], [4, day, "Was?"]]), ("mehr", [["a"]])))
    assert [r.value for r in got] == [
        {"id": "1", "question": "Wo ist mein Paket?", "answer": "Unterwegs."},
        {"id": "2", "question": "Wie viel ist 3 plus 4?", "answer": "7"},
        {"id": "3", "question": "Und 1 durch 2?", "answer": "0.5"},
        {"id": "4", "question": "Was?", "answer": ""},
    ]
    assert [r.origin.line for r in got] == [2, 3, 4, 6]
    assert notes["column 'Datum' not used"] == 1 and notes["sheet 'mehr' not read (only the first, 'Tickets')"] == 1


def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path):
    got, _ = read(book(tmp_path / "a.xlsx", ("a", [["question", "answer"], ["a", "b", "c"], ["d", "e"]])))
    assert isinstance(got[0], Refused) and got[0].reason == "3 columns, the header names 2" and got[1].value["answer"] == "e"


def test_an_xlsx_that_cannot_be_read_says_why(tmp_path):
    path = book(tmp_path / "a.xlsx", ("a", [["Frage", "Antwort"], ["Wo ist es denn nur?", "Hier."]]))
    good = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        parts = {i.filename: z.read(i) for i in z.infolist()}

    def packed(**changed):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in (parts | {k.replace("__", "/") + ".xml": v for k, v in changed.items()}).items():
                z.writestr(name, content)
        return path.read_bytes()

    cases = [
        (b"", "the file is empty"),
        (b"Frage,Antwort\n", "not a whole .xlsx file"),
        (good[:-30], "not a whole .xlsx file"),
        (packed(xl__workbook=b"<a/>"), "no sheet holds a row"),
        (packed(xl__workbook=ENTITIES.encode() + parts["xl/workbook.xml"]), "defines XML entities"),
        (packed(xl__sharedStrings=b"<sst>" + b" " * (64 << 20) + b"</sst>"), "unpacks to"),
        (book(path, ("a", [])).read_bytes(), "no sheet holds a row"),
        (book(path, ("a", [["x", "y"], [1, 2]])).read_bytes(), "cannot be told from their names or contents"),
    ]
    for content, what in cases:
        path.write_bytes(content)
        told = fault(path)
        assert what in told.what and told.fix, (what, told.what)


def test_documents_of_a_folder_are_read_together(tmp_path):
    word(tmp_path / "a.docx", ["<w:t>from word</w:t>"])
    (tmp_path / "b.html").write_text("<p>from the web</p>")
    (tmp_path / "c.txt").write_text("from an editor\n")
    assert [r.value for r in read(tmp_path)[0]] == ["from word", "from the web", "from an editor"]
