"""Documents as raw text (html, pdf, docx) and spreadsheets (xlsx) as tables.

html and docx are read with the standard library, as they come. pdf needs pypdf and xlsx needs openpyxl (`tunesmith[documents]`).
A docx or xlsx is an archive from somebody: what it says of its sizes is checked before anything is unpacked, and XML that defines
entities is refused unread.
"""

from __future__ import annotations

import datetime
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tunesmith.data.columns import word_set
from tunesmith.errors import DataError

ZIP_MAX = 512 << 20  # bytes that an archive may unpack to
ZIP_RATIO, ZIP_RATIO_FROM = 200, 16 << 20  # XML of office files packs 5x to 40x
ZIP_FILES = 10_000
XML_DEPTH = 256  # of a Word document; tables in tables come to some 30
PDF_MAX = 512 << 20
PAGE_PIECES = 50_000  # of text on a PDF's page: pypdf's time grows with their square, 2 s for 32,000, 52 s for 262,000
LINE_MOST = 64 << 10  # a paragraph is handed on in lines no longer than this, so that a page without line breaks is cut too
EXTRA = "pip install 'tunesmith[documents]'"
TAG_MOST = 4 << 20  # characters of one tag or comment: pictures stand inside tags

Line = tuple[int, str]  # a line or page of the file, text with its line break


# ---- archives ------------------------------------------------------------------------------------------------------------------


def open_zip(path: Path) -> zipfile.ZipFile:
    """A checked archive. DataError for one that is damaged, locked, too large, or tells lies about itself."""
    kind = path.suffix.lower()
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as e:
        head = path.read_bytes()[:8] if path.stat().st_size < ZIP_MAX else b""
        if head.startswith(b"\xd0\xcf\x11\xe0"):  # an OLE file: the office programs' old form, and their encrypted one
            raise DataError(
                f"{path}: protected by a password, or in the old binary form", f"save it as {kind} without one"
            ) from None
        raise DataError(f"{path}: not a whole {kind} file ({e})", "save or download it again") from None
    infos = archive.infolist()
    size, packed = sum(i.file_size for i in infos), path.stat().st_size
    fault = ""
    if len(infos) > ZIP_FILES:
        fault = f"holds {len(infos):,} files; the limit is {ZIP_FILES:,}"
    elif size > ZIP_MAX or (size > ZIP_RATIO_FROM and size > ZIP_RATIO * packed):
        fault = f"unpacks to {size:,} bytes from {packed:,}; the limits are {ZIP_MAX >> 20} MB and {ZIP_RATIO} times its size"
    elif any(i.flag_bits & 1 for i in infos):
        fault = "is protected by a password"
    if fault:
        archive.close()
        raise DataError(f"{path}: {fault}", f"if you trust it, save it as {'.csv' if kind == '.xlsx' else '.txt'} and give that")
    try:
        for info in infos:
            if info.filename.lower().endswith((".xml", ".rels")):
                with archive.open(info) as f:
                    before = b""
                    while block := f.read(1 << 20):
                        text = before + block.replace(b"\0", b"")  # in UTF-16 there is a zero beside each letter
                        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
                            raise DataError(
                                f"{path}: {info.filename} inside defines XML entities",
                                "no office program writes that; save it again",
                            )
                        before = text[-16:]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as e:
        archive.close()
        raise DataError(f"{path}: not a whole {kind} file ({e})", "save or download it again") from None
    except DataError:
        archive.close()
        raise
    return archive


# ---- html ----------------------------------------------------------------------------------------------------------------------

_UNSEEN = frozenset(("script", "style", "noscript", "template", "head", "svg", "nav", "iframe", "object", "select", "button"))
_BLOCKS = word_set(
    """address article aside blockquote body br dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header
    hr li main ol p pre section summary table td th title tr ul"""
)
_HEADING = re.compile(r"h[1-6]")
_PARAGRAPHS = word_set("p h1 h2 h3 h4 h5 h6 pre blockquote table ul ol section article")


class _Page(HTMLParser):
    """The text of a page, as lines. Tags that open a block break the line; a paragraph leaves a blank one."""

    def __init__(self, headings: bool = False) -> None:
        super().__init__(convert_charrefs=True)
        self.headings = headings
        self.lines: list[Line] = []
        self.words: list[str] = []
        self.size, self.pre, self.blank = 0, 0, True
        self.unseen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in _UNSEEN:
            if len(self.unseen) < 64:  # each end tag is looked for among them
                self.unseen.append(tag)
        elif tag in _BLOCKS:
            if tag == "body":
                self.unseen.clear()  # a head that nobody closed
            self.end_line(tag in _PARAGRAPHS)
            if self.headings and _HEADING.fullmatch(tag):
                self.words.append("#" * int(tag[1]) + " ")
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            del self.unseen[self.unseen.index(tag) :]
        elif tag in _BLOCKS:
            self.end_line(tag in _PARAGRAPHS)
        self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if self.pre:
            *whole, last = data.split("\n")
            for line in whole:
                self.words.append(line)
                self.end_line(False, keep=True)
            self.words.append(last)
        else:
            self.words.append(data)
        self.size += len(data)
        if self.size > LINE_MOST:
            self.end_line(False)

    def end_line(self, paragraph: bool, keep: bool = False) -> None:
        text = "".join(self.words)
        text = text.rstrip() if self.pre or keep else " ".join(text.split())
        self.words, self.size = [], 0
        if text:
            self.lines.append((self.getpos()[0], text + "\n"))
            self.blank = False
        if paragraph and not self.blank:
            self.lines.append((self.getpos()[0], "\n"))
            self.blank = True


def html(parts: Iterable[str], path: Path, headings: bool = False) -> Iterator[Line]:
    """The text of a page without scripts, styles, menus and the head. `headings` marks them as Markdown does: `## Title`."""
    page, held, size = _Page(headings), [], 0
    for part in (p[i : i + LINE_MOST] for p in parts for i in range(0, len(p), LINE_MOST)):
        held.append(part)
        size += len(part)
        if size < max(LINE_MOST, len(page.rawdata)):  # an open tag is searched from its beginning each time: so in doubling steps
            continue
        page.feed("".join(held))
        held, size = [], 0
        _check_open(page, path, TAG_MOST)
        yield from page.lines
        page.lines.clear()
    page.feed("".join(held))
    _check_open(page, path, LINE_MOST)  # beyond it, a last search for tags in what is open would take minutes
    page.close()
    page.end_line(False)
    yield from page.lines


def _check_open(page: _Page, path: Path, most: int) -> None:
    """Refuse a tag or comment that goes on and on; of a script only its end matters."""
    if len(page.rawdata) <= most:
        return
    if page.cdata_elem is None:
        line = page.getpos()[0]
        raise DataError(f"{path}: a tag or comment that opens in line {line} never ends", "close it, or give the text alone")
    page.rawdata = page.rawdata[-64:]


# ---- docx ----------------------------------------------------------------------------------------------------------------------

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def docx(path: Path, notes: Counter[str]) -> Iterator[Line]:
    """The paragraphs of a document, with those of its tables, in order."""
    with open_zip(path) as archive:
        if "word/document.xml" not in archive.namelist():
            raise DataError(f"{path}: not a Word document (no word/document.xml inside)", "save it as .docx again")
        number, words, stack = 0, [], []
        try:
            with archive.open("word/document.xml") as f:
                for event, node in ElementTree.iterparse(f, ("start", "end")):
                    if event == "start":
                        stack.append(node)
                        if len(stack) > XML_DEPTH:
                            raise DataError(f"{path}: nested deeper than {XML_DEPTH} levels", "save it again, or as .txt")
                        continue
                    stack.pop()
                    if node.tag == _W + "t":
                        words.append(node.text or "")
                    elif node.tag in (_W + "tab", _W + "br", _W + "cr") and stack and stack[-1].tag == _W + "r":
                        words.append("\t" if node.tag == _W + "tab" else "\n")
                    elif node.tag == _W + "drawing":
                        notes["picture in a document left out"] += 1
                    elif node.tag == _W + "p":
                        number += 1
                        text = "".join(words).strip("\n")
                        words = []
                        yield number, text + "\n"
                        yield number, "\n"
                    if stack:
                        stack[-1].remove(node)  # what has been read need not be kept
        except (ElementTree.ParseError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
            raise DataError(f"{path}: not a whole .docx file ({e})", "save or download it again") from None


# ---- pdf -----------------------------------------------------------------------------------------------------------------------


_SHOWS = re.compile(rb"T[jJ]\b")


def pdf(path: Path, notes: Counter[str]) -> Iterator[Line]:
    """The text of a PDF, page by page; a page is a paragraph."""
    try:
        import pypdf
        from pypdf.errors import LimitReachedError
    except ImportError:
        raise DataError(f"{path}: reading .pdf needs pypdf, which is not installed", EXTRA) from None
    import logging

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells every oddity of a file on standard error
    if path.stat().st_size > PDF_MAX:
        raise DataError(f"{path}: larger than {PDF_MAX >> 20} MB", "split it, for example with qpdf --split-pages")
    empty = pages = 0
    try:
        with path.open("rb") as f:
            reader = pypdf.PdfReader(f)
            if reader.is_encrypted and not reader.decrypt(""):
                raise DataError(
                    f"{path}: protected by a password", f"qpdf --decrypt --password=... {path} open.pdf, and use open.pdf"
                )
            for pages, page in enumerate(reader.pages, 1):
                shown = page.get_contents()
                if shown is not None and len(_SHOWS.findall(shown.get_data())) > PAGE_PIECES:
                    notes[f"PDF page with more than {PAGE_PIECES:,} pieces of text left out"] += 1
                    continue
                text = page.extract_text() or ""
                if text.strip():
                    for line in text.splitlines():
                        yield pages, line + "\n"
                    yield pages, "\n"
                else:
                    empty += 1
    except (DataError, MemoryError):  # too little memory is no damage
        raise
    except LimitReachedError as e:
        fix = f"if you trust it: qpdf --object-streams=disable --recompress-flate {path} plain.pdf, or save its text as .txt"
        raise DataError(f"{path}: it would unpack to more than pypdf allows ({e})", fix) from None
    except Exception as e:  # noqa: BLE001 - a damaged file makes pypdf fail in every way there is
        told = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise DataError(f"{path}: not a whole PDF ({told})", "download it again, or save it as text") from None
    if empty == pages:
        raise DataError(f"{path}: no text in its {pages:,} pages: they are pictures", f"ocrmypdf {path} text.pdf, and use text.pdf")
    if empty:
        notes["PDF page without text left out"] += empty


# ---- xlsx ----------------------------------------------------------------------------------------------------------------------


def xlsx(path: Path, notes: Counter[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of the first sheet that has any, each with its number. The other sheets are told."""
    try:
        import openpyxl
    except ImportError:
        fix = f"{EXTRA}, or save the sheet as .csv"
        raise DataError(f"{path}: reading .xlsx needs openpyxl, which is not installed", fix) from None
    with open_zip(path) as archive:
        _count_lost_cells(archive, notes)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            read = ""
            for sheet in book.worksheets:
                if read:
                    notes[f"sheet {sheet.title!r} not read (only the first, {read!r})"] += 1
                    continue
                sheet.reset_dimensions()  # what the file says of its size may be wrong
                width = 0
                for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
                    cells = [_cell(v, notes) for v in row]
                    while cells and not cells[-1] and len(cells) > width:
                        cells.pop()
                    if not any(cells):
                        continue
                    if not read:
                        read, width = sheet.title, len(cells)
                    yield number, cells + [""] * (width - len(cells))
        finally:
            book.close()
    except (DataError, MemoryError):  # too little memory is no damage
        raise
    except Exception as e:  # noqa: BLE001 - a damaged file makes openpyxl fail in every way there is
        told = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise DataError(f"{path}: not a whole .xlsx file ({told})", "save it again, or as .csv") from None


_UNSAVED = re.compile(rb"</f>(?:<v\s*/>|<v></v>)?</c>|<f\s[^<>]*/></c>")  # a formula that no program has worked out
_MERGED = re.compile(rb"<mergeCell\s")
_ERRORS = frozenset(("#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A"))


def _count_lost_cells(archive: zipfile.ZipFile, notes: Counter[str]) -> None:
    """Cells that come empty though the sheet shows something in them."""
    for info in archive.infolist():
        if info.filename.startswith("xl/worksheets/") and info.filename.endswith(".xml"):
            with archive.open(info) as f:
                before = b""
                while block := f.read(1 << 20):
                    text = before + block
                    cut = max(text.rfind(b"</c>") + 4, len(before)) if len(block) == 1 << 20 else len(text)
                    whole, before = text[:cut], text[cut:]
                    if n := len(_UNSAVED.findall(whole)):
                        notes[
                            "formula without a saved value read as empty (open the sheet in Excel or LibreOffice and save it)"
                        ] += n
                    if n := len(_MERGED.findall(whole)):
                        notes["merged cells: only the first of them holds the value"] += n


def _cell(value: Any, notes: Counter[str]) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and value in _ERRORS:
        notes[f"cell with {value} read as empty"] += 1
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return str(value)
