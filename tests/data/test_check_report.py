"""The report: counts, lengths, what truncation cuts, coloured tokens; people's text can neither style nor control the terminal."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tunesmith.config import starter
from tunesmith.config.schema import Data, Train
from tunesmith.data import formats, learned, sources
from tunesmith.data import report as report_module
from tunesmith.data.prepare import prepare
from tunesmith.data.render import Rendered, RowRefused
from tunesmith.data.report import check_report
from tunesmith.errors import DataError
from tunesmith.evaluate import check_page
from tunesmith.types import Example

END, BEGIN = 300, 301  # special tokens of the tiny tokenizer below: bytes otherwise


NAMES = {END: "<|end|>", BEGIN: "<|begin|>"}


class TinyTokenizer:
    def decode(self, ids, skip_special=False):
        raw = b"".join(bytes([i]) if i < 256 else b"" if skip_special else NAMES[i].encode() for i in ids)
        return raw.decode(errors="replace")

    def stream(self, skip_special=True):
        from tunesmith.tokenizer import TextStream

        return TextStream(self, skip_special)


class TinyRenderer:
    fingerprint = "tiny"
    tokenizer = TinyTokenizer()
    max_length = 600

    def examples_many(self, conversations):
        return [self.one(c) for c in conversations]

    def one(self, c):
        ids, learn = [BEGIN], [False]
        for m in c.messages:
            text = [*m.content.encode(), END]
            ids, learn = ids + text, learn + [m.role in ("assistant", "text")] * len(text)
        if len(ids) > self.max_length:
            return RowRefused(f"{len(ids)} tokens, and data.max_length is {self.max_length}", tokens=len(ids))
        return Rendered((Example(np.array(ids, np.int32), np.array(learn), c.origin),))


def row(question, answer="an answer"):
    return {"question": question, "answer": answer}


def prepared(tmp_path, rows, **data):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return prepare(Data(train=str(path), **data), TinyRenderer, seed=0, cache_dir=tmp_path / "c", strict=False, look=True)


def checked(tmp_path, rows, show=(), **data):
    return check_report(prepared(tmp_path, rows, **data), TinyRenderer(), show)


def printed(report, colour=False):
    out = io.StringIO()
    report.print(
        Console(file=out, width=200, force_terminal=colour, color_system="standard" if colour else None, no_color=not colour)
    )
    return out.getvalue()


def test_the_account_and_the_verdict(tmp_path):
    rows = [row(f"question {i} {'x' * i}") for i in range(30)]
    report = checked(tmp_path, [*rows, rows[0], {"foo": 1}, row("q", "a" * 900)], held_out=0, max_refused=0.2)
    text = printed(report)
    assert report.exit_code == 0
    (line,) = [line for line in text.splitlines() if "a.jsonl  " in line]
    assert line.split()[1:6] == ["33", "31", "0", "0", "2"]
    assert "formats: 32 question_answer" in text
    assert re.search(r"1 row refused: no known format has these keys: foo \(\S*a.jsonl:32\)", text)
    assert re.search(r"1 row refused: 904 tokens, and data.max_length is \d+ \(\S*a.jsonl:33\)", text)
    assert "duplicates: 1 row repeats an earlier one to the letter, 0 more nearly do" in text
    trained = 31 * len("an answer|")
    assert f"31 examples to train on; {trained} of" in text.replace(",", "")


@pytest.mark.parametrize("rows", [[row("a b c")], [{"foo": 1}], [row("a b c")] * 2 + [row("a b d")]])
def test_one_is_no_plural(tmp_path, rows):
    """Of one row, one refused row, and one that repeats another: in the terminal and on the page."""
    report = checked(tmp_path, rows, held_out=0)
    check_page.write(report, tmp_path / "check.html")
    page = re.sub(r"<[^>]+>", " ", (tmp_path / "check.html").read_text())
    for text in (printed(report), page):
        assert not re.findall(r"(?<![\d.,])1 (?:rows|examples|epochs|steps|more reasons|held-out rows)\b", text)


def test_refused_rows_set_the_exit_code_and_show_all_the_same(tmp_path):
    report = checked(tmp_path, [row("a b c"), {"foo": 1}])
    text = printed(report)
    assert report.exit_code == 2
    assert "error: 1 of 2 rows (50.0%) was refused" in text and "fix: " in text and "row 1, " in text
    nothing = checked(tmp_path, [{"foo": 1}])
    assert nothing.exit_code == 2 and "foo" in printed(nothing)


def test_what_truncation_would_cut(tmp_path):
    sizes = [100, 300, 550, 900, 5000]  # tokens in all; the answer is the last 10
    rows = [row(str(i) * (n - 12)) for i, n in enumerate(sizes)]
    text = printed(checked(tmp_path, rows, max_refused=0.5, held_out=0))
    table = {
        c[0]: c[1:]
        for c in (line.split() for line in text.splitlines())
        if c and c[0] in ("512", "1,024", "2,048", "4,096", "8,192")
    }
    assert table["512"][:2] == ["3", "3"]
    assert table["512"][2] == f"{(550 - 512) + (900 - 512) + (5000 - 512):,}"
    assert table["512"][4:] == ["10", "(33.3%)"], "the whole answer of the only long row that is not refused"
    assert table["1,024"][:3] == ["1", "1", f"{5000 - 1024:,}"]
    assert table["8,192"][:3] == ["0", "0", "0"]
    assert "the longest 550" in text and "(2 of them are refused" in text


def test_each_source_its_part_of_an_epoch_and_the_steps(tmp_path):
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row(f"{name} question {i}", "four")) + "\n" for i in range(count))
        )
    train = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, {"path": str(tmp_path / "b.jsonl"), "weight": 0.5}]
    p = prepare(Data(train=train, held_out=0), TinyRenderer, seed=0, cache_dir=tmp_path / "c", look=True)
    report = check_report(p, TinyRenderer(), train=Train(epochs=2, batch_size=4), at_once=64)
    a, b = report.learned.shares
    assert (a.examples, a.trained, b.examples, b.trained) == (30, 150, 10, 50) and a.tokens + b.tokens == report.tokens
    assert a.share == pytest.approx(300 / 325) and a.share + b.share == pytest.approx(1)
    assert (report.learned.epoch_size, report.learned.steps) == (65, 2 * 17)
    text = printed(report)
    assert re.search(r"b\.jsonl +0\.5 +10 +\d+ +50 +7\.7%", text)
    assert "steps: 34, which is 2 epochs of 65 examples, 4 a step" in text
    short = check_report(p, TinyRenderer(), train=Train(max_steps=34, batch_size=4)).learned
    assert short.steps == 34 and short.epochs == 2


def test_how_full_the_micro_batches_are(tmp_path):
    """Two examples a step, so that the numbers can be told by hand: 21 and 61 tokens, 100 at once."""
    rows = [row("q" * n, "a" * 10) for n in (8, 48)]
    report = checked(tmp_path, rows, held_out=0)
    packed = learned.learned(prepared(tmp_path, rows, held_out=0), Train(batch_size=2), 0, 100).packing
    assert (packed.parts, packed.filled, packed.padding) == (1, pytest.approx(82 / 100), pytest.approx(1 - 82 / 122))
    assert report.learned.packing.at_once == learned.AT_ONCE


def test_raw_text_loses_nothing_to_a_shorter_length(tmp_path):
    report = checked(tmp_path, [{"text": f"{i} " + "word " * 100} for i in range(20)], held_out=0)
    assert report.learned.cuts == () and "raw text is cut into windows" in printed(report)


def test_tables_keep_their_numbers_whole_on_a_narrow_terminal(tmp_path):
    """At 80 columns, with a long path and a second source."""
    folder = tmp_path / ("a" * 60)
    folder.mkdir()
    report = checked(folder, [row(f"question {i}") for i in range(30)], held_out=0)
    out = io.StringIO()
    report.account.sources[0].rows = 1_234_567
    report.print(Console(file=out, width=80, force_terminal=False))
    head = next(line for line in out.getvalue().splitlines() if line.startswith("source"))
    assert head.split() == ["source", "rows", "used", "fixed", "truncated", "refused"] and len(head) <= 80
    assert re.search(r"1,234,567 +30 +0 +0 +0$", out.getvalue(), re.M)


def test_the_first_limit_that_cuts_nothing_is_the_last_one_told(tmp_path):
    text = printed(checked(tmp_path, [row(f"question {i} {'x' * 500}") for i in range(9)], held_out=0))
    assert [line.split()[0] for line in text.splitlines() if re.match(r" *[\d,]+ .*%\)$", line)] == ["512", "1,024"]


def test_tokens_without_colour_are_marked(tmp_path):
    text = printed(checked(tmp_path, [row("2 + 2?", "four")], held_out=0))
    assert "<|begin|>2 + 2?<|end|>▸four<|end|>◂" in text
    assert "\x1b" not in text


def test_tokens_with_colour_are_green_where_trained(tmp_path):
    text = printed(checked(tmp_path, [row("2 + 2?", "four")], held_out=0), colour=True)
    assert "\x1b[2m2 + 2?\x1b[0m" in text  # dim
    assert "\x1b[1;32mfour\x1b[0m" in text  # bold green
    assert "\x1b[35m<|begin|>\x1b[0m" in text  # magenta
    assert "▸" not in text


def test_show_picks_a_row_whatever_became_of_it(tmp_path):
    rows = [row(f"question {i} {'abcdefghij'[i] * 9}") for i in range(10)] + [{"foo": "bar"}]
    for n in range(1, 11):
        report = checked(tmp_path, rows, [n], held_out=0.3)
        assert report.in_terminal == 1
        shown = report.shown[0]
        assert shown.title.startswith(f"row {n}, ") and f"a.jsonl:{n}, " in shown.title
        assert f"question {n - 1} " in "".join(p.text for p in shown.pieces)
    report = checked(tmp_path, rows, [11, 2, 11])
    assert report.in_terminal == 2 and report.shown[1].title.startswith("row 2, ")
    assert "refused: no known format" in report.shown[0].title and "bar" in report.shown[0].pieces[0].text
    for n in (0, 12):
        with pytest.raises(DataError, match=f"there is no row {n}"):
            checked(tmp_path, rows, [3, n])
    with pytest.raises(DataError, match="13 rows to show"):
        checked(tmp_path, rows, range(1, 14))


def test_unasked_the_first_a_typical_the_longest_and_some_at_random_are_shown(tmp_path):
    rows = [row(f"question {i} {'x' * i}") for i in range(51)]
    report = checked(tmp_path, rows, held_out=0)
    whys = {shown.why: shown.title.split(",")[0] for shown in report.shown}
    assert whys["the first"] == "row 1" and whys["of typical length"] == "row 26" and whys["the longest"] == "row 51"
    assert 4 <= len(report.shown) <= 6 and len({shown.title for shown in report.shown}) == len(report.shown)
    assert printed(report).count("\nrow ") == 2
    assert checked(tmp_path, rows, held_out=0).shown == report.shown, "drawn by the seed"
    assert len(checked(tmp_path, rows[:1], held_out=0).shown) == 1


def test_a_long_example_is_shown_without_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "SHOWN_HEAD", 101)
    monkeypatch.setattr(report_module, "SHOWN_TAIL", 21)
    (shown,) = checked(tmp_path, [row("é" * 200, "ü" * 90)], held_out=0).shown
    (gap,) = [i for i, p in enumerate(shown.pieces) if not p.ids]
    assert shown.pieces[gap].text.strip() == f"… {1 + 401 + 181 - 122} tokens …"
    head, tail = shown.pieces[:gap], shown.pieces[gap + 1 :]
    assert [(p.text, p.trained) for p in head] == [("<|begin|>", False)] + [("é", False)] * 50
    assert [(p.text, p.trained) for p in tail] == [("ü", True)] * 10 + [("<|end|>", True)]
    assert all(len(p.ids) == 2 for p in head[1:]) and tail[-1].special and (shown.tokens, shown.trained) == (583, 181)


def test_a_cut_through_a_character_shows_no_half_of_it(tmp_path, monkeypatch):
    for head, tail in ((100, 21), (101, 20), (100, 20)):
        monkeypatch.setattr(report_module, "SHOWN_HEAD", head)
        monkeypatch.setattr(report_module, "SHOWN_TAIL", tail)
        (shown,) = checked(tmp_path, [row("é" * 200, "ü" * 90)], held_out=0).shown
        assert "\ufffd" not in "".join(p.text for p in shown.pieces)


def test_markup_and_control_characters_in_peoples_text_are_shown_not_obeyed(tmp_path):
    evil = "[bold red]hi[/] [link=x]y[/link] \x1b[2J\x1b]0;owned\x07 \u202eabc [/nothing]"
    report = checked(tmp_path, [row(evil, evil), {"[red]" + "\x1b[31m": 1}], max_refused=0.6, held_out=0)
    for colour in (False, True):
        text = printed(report, colour)
        assert "[bold red]hi[/] [link=x]y[/link] \\x1b[2J\\x1b]0;owned\\x07 \\u202eabc [/nothing]" in text
        assert (
            "\x1b[2J" not in text
            and "\x07" not in text
            and "\u202e" not in text
            and "\x1b[31m" not in text.replace("\x1b[1;31m", "")
        )
    assert "[red]\\x1b[31m" in printed(report)


def test_look_names_formats_and_faults(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("q")) + "\n{cut\n")
    seen = starter.look(path, sources.rows, formats.detect)
    assert dict(seen.formats) == {"question_answer": 1} and len(seen.refused) == 1


def test_rows_of_a_few_tokens_have_a_histogram(tmp_path):
    report = checked(tmp_path, [row(f"{i}", f"{2 * i}") for i in range(12)], held_out=0)
    assert "up to 16" in printed(report)
