"""check.html: it says what the terminal says and more, stays small, masks what findings mask, and nothing in it can run."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.test_check_report import TinyRenderer, checked, prepared, row
from tests.evaluate.test_report import PAYLOADS, Reader

from tunesmith.config.schema import Data, Train
from tunesmith.data import report as report_module
from tunesmith.data.prepare import prepare
from tunesmith.data.report import check_report
from tunesmith.evaluate import check_page, page

SIZE = 2 << 20


def source(report, tmp_path):
    return check_page.write(report, tmp_path / "check.html").read_text("utf-8")


def visible(words):
    """As the page shows it: what cannot be seen by its number, blanks of any length as one."""
    return " ".join(page.INVISIBLE.sub(lambda m: f"\\u{ord(m[0]):04x}", words.replace("\r\n", "\n").replace("\r", "\n")).split())


def test_what_is_there_what_is_wrong_and_what_will_be_trained(tmp_path):
    rows = [row(f"question {i} {'x' * i}") for i in range(30)]
    rows += [rows[0], {"foo": 1}, row("q", "a" * 900), row("mail", "write to jane.doe@mailhouse.org.")]
    report = checked(tmp_path, rows, [32, 3], held_out=0, max_refused=0.2)
    html = source(report, tmp_path)
    found = Reader(html)
    for words in (
        "Every one of 34 rows ended in one of these classes",
        "question_answer 33",
        "e-mail addresses",
        "replace them by a placeholder such as [email]",
        "Mend what was found: tunesmith prepare run.yaml --out mended --fix ",
        "no known format has these keys: foo",
        f"{report.trained:,} of {report.tokens:,} tokens are learned",
        "steps: 12, which is 3 epochs of 32 examples, 8 a step",
        "no padding",
        "What cutting all rows at a length would lose",
        "refused: longer than data.max_length",
        "asked for: row 32, ",
        "asked for: row 3, ",
        "the first: row 1, ",
        "the longest: row 30, ",
        "nothing is masked here",
    ):
        assert words in found.text, words
    assert html.count("<details") == len(report.shown) and html.count("<details open>") == check_page.OPEN_ROWS
    assert '<span class="token learned special" title="300">&lt;|end|&gt;</span>' in html
    assert '<span class="token" title="113">q</span>' in html
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html and "style=" not in html


def test_each_source_with_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("Kundenfrage;Antwort;Datum\n" + "".join(f"Was ist {i}?;Das ist {i}.;1\n" for i in range(30)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row(f"b {i}")) + "\n" for i in range(10)))
    train = [{"path": str(tmp_path / "a.csv"), "weight": 2}, str(tmp_path / "b.jsonl")]
    p = prepare(Data(train=train, held_out=0), TinyRenderer, seed=0, cache_dir=tmp_path / "c", look=True)
    report = check_report(p, TinyRenderer(), train=Train(max_steps=5))
    text = Reader(source(report, tmp_path)).text
    assert "column 'Kundenfrage' read as the prompt (guessed from its name)" in text and "column 'Datum' not used" in text
    for s in report.learned.shares:
        assert f"{s.weight:g}{s.examples:,}{s.tokens:,}{s.trained:,}{s.share:.1%}" in text
    assert "a.csv and 1 more" in text and "steps: 5, which is" in text


def test_data_that_cannot_be_trained_says_so_at_the_top(tmp_path):
    text = Reader(source(checked(tmp_path, [row("a b c"), {"foo": 1}]), tmp_path)).text
    assert text.index("1 of 2 rows (50.0%) was refused") < text.index("Cannot train yet") < text.index("What is there")
    nothing = Reader(source(checked(tmp_path, [{"foo": 1}]), tmp_path)).text
    assert "Cannot train yet" in nothing and "What will be trained" not in nothing


def test_what_findings_mask_stands_on_the_page_only_where_its_row_is_shown(tmp_path):
    key, mail = "hf_" + "aB3" * 11, "jane.doe@mailhouse.org"
    rows = [row(f"question {i} {'x' * (i % 9)}") for i in range(60)]
    probe = checked(tmp_path, rows, held_out=0)
    hidden = next(n for n in range(2, 60) if not any(s.title.startswith(f"row {n},") for s in probe.shown))
    rows[hidden - 1] = row(rows[hidden - 1]["question"], f"{key} {mail}"[: len("an answer") + 60])
    report = checked(tmp_path, [*rows, *[row("q " * 60)] * 1], held_out=0)
    assert not any(s.title.startswith(f"row {hidden},") for s in report.shown), "another draw; choose another row"
    text = Reader(source(report, tmp_path)).text
    assert "API keys" in text and "e-mail addresses" in text and f":{hidden} " in text
    assert key not in text and mail not in text
    assert key in Reader(source(checked(tmp_path, rows, [hidden], held_out=0), tmp_path)).text


HARD = st.one_of(
    st.sampled_from(PAYLOADS),
    st.text(min_size=1, max_size=40),
    st.text(st.characters(categories=("Cc", "Cf", "Zs", "Sm", "Po")), min_size=1, max_size=20),
    st.sampled_from(["\u202e\u2066abc\u2069", "\x1b[31m\x00\x07", "]]>--><!--", "\"'`<>&", "\u061c\ufeff\u200f"]),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=HARD, answer=HARD, key=HARD)
def test_no_text_of_a_row_becomes_markup(tmp_path, question, answer, key):
    """In a row that is shown, in the keys of a refused one and in a finding: the page reads as ours alone, the words are there."""
    rows = [row(f"the {question}", f"N/A {answer} jane.doe@mailhouse.org"), {key + "?": 1, "<b>": 2}, row("n", "N/A")]
    report = checked(tmp_path, rows, [1, 2], held_out=0, max_refused=0.5)
    html = source(report, tmp_path)
    found = Reader(html)
    if report.shown[0].tokens:  # else it is refused for a zero character, and its line is shown as it stands in the file
        assert visible(f"the {question}") in found.text and visible(answer) in found.text
    assert not page.INVISIBLE.search(html)


def test_a_sources_name_and_columns_are_text_too(tmp_path):
    name = '<img src=x onerror=alert(1)>"\u202e.csv'
    head = '"<script>alert(1)</script> question";answer;"<svg onload=x>"\n'
    (tmp_path / name).write_text(head + "".join(f"what is {i}?;it is {i};z\n" for i in range(30)))
    p = prepare(Data(train=str(tmp_path / name), held_out=0), TinyRenderer, seed=0, cache_dir=tmp_path / "c", look=True)
    text = Reader(source(check_report(p, TinyRenderer()), tmp_path)).text
    assert "<script>alert(1)</script> question" in text and visible(name) in text


def test_the_page_stays_small(tmp_path, monkeypatch):
    """A long row, twelve rows asked for, hundreds of reasons to refuse with long texts in them."""
    monkeypatch.setattr(TinyRenderer, "max_length", 10**8)
    rows = [row("<" * (256 << 10), "&" * (128 << 10))] + [row("<\u202e" * 2000, '"' * 4000) for _ in range(12)]
    rows += [{"k" * 5000 + str(i) * 9: "v" * 9000} for i in range(300)]
    report = checked(tmp_path, rows, range(1, 13), max_refused=0.99, held_out=0)
    html = source(report, tmp_path)
    assert len(html.encode()) < SIZE
    found = Reader(html)
    assert f"… {3 * (128 << 10) + 3 - report_module.SHOWN_HEAD - report_module.SHOWN_TAIL:,} tokens …" in found.text


def test_a_row_of_many_examples_fills_no_page(tmp_path, monkeypatch):
    """As a template makes them that rewrites earlier turns: one for each answer."""
    one = TinyRenderer.one

    def many(self, c):
        rendered = one(self, c)
        return type(rendered)(rendered.examples * 200)

    monkeypatch.setattr(TinyRenderer, "one", many)
    report = check_report(prepared(tmp_path, [row("a"), row("b")], held_out=0), TinyRenderer(), [1, 2])
    assert report.in_terminal == report_module.ASKED_EXAMPLES


@pytest.mark.parametrize("name", ["chats.jsonl", "check", "no/such/check.html", "folder.html"])
def test_a_page_goes_where_a_page_can_be(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(check_page.TunesmithError, match=re.escape(name.split("/")[-1])) as e:
        check_page.place(tmp_path / name)
    assert "--page check.html" in e.value.fix
    assert check_page.place(tmp_path / "a.HTML") == tmp_path / "a.HTML"
