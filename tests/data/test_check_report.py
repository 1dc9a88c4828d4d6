"""The report: counts, lengths, what truncation cuts, coloured tokens; people's text can neither style nor control the terminal."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tunesmith.config import starter
from tunesmith.config.schema import Data
from tunesmith.data import formats, sources
from tunesmith.data import report as report_module
from tunesmith.data.prepare import prepare
from tunesmith.data.render import Rendered, RowRefused
from tunesmith.data.report import check_report
from tunesmith.errors import DataError
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
            ids, learn = ids + text, learn + [m.role == "assistant"] * len(text)
        if len(ids) > self.max_length:
            return RowRefused(f"{len(ids)} tokens, and data.max_length is {self.max_length}", tokens=len(ids))
        return Rendered((Example(np.array(ids, np.int32), np.array(learn), c.origin),))


def row(question, answer="an answer"):
    return {"question": question, "answer": answer}


def checked(tmp_path, rows, show=None, **data):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    p = prepare(Data(train=str(path), **data), TinyRenderer, seed=0, cache_dir=tmp_path / "c", strict=False, look=True)
    return check_report(p, TinyRenderer(), show)


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
    assert "duplicates: 1 rows repeat an earlier one word for word" in text
    trained = 31 * len("an answer|")
    assert f"31 examples to train on; {trained} of" in text.replace(",", "")


def test_refused_rows_set_the_exit_code_and_show_all_the_same(tmp_path):
    report = checked(tmp_path, [row("a b c"), {"foo": 1}])
    text = printed(report)
    assert report.exit_code == 2
    assert "error: 1 of 2 rows (50.0%) were refused" in text and "fix: " in text and "row 1, " in text
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
    assert table["1,024"][:3] == ["1", "1", f"{5000 - 1024:,}"]
    assert table["8,192"][:3] == ["0", "0", "0"]
    assert "the longest 550" in text and "(2 of them are refused" in text


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
        (shown,) = checked(tmp_path, rows, n, held_out=0.3).shown
        assert shown.title.startswith(f"row {n}, ") and f"a.jsonl:{n}, " in shown.title
        assert f"question {n - 1} " in "".join(r.text for r in shown.runs)
    (shown,) = checked(tmp_path, rows, 11).shown
    assert "refused: no known format" in shown.title and "bar" in shown.runs[0].text
    for n in (0, 12):
        with pytest.raises(DataError, match="there is no row"):
            checked(tmp_path, rows, n)
    assert len(checked(tmp_path, rows).shown) == 3


def test_a_long_example_is_shown_without_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "SHOWN_HEAD", 101)
    monkeypatch.setattr(report_module, "SHOWN_TAIL", 21)
    (shown,) = checked(tmp_path, [row("é" * 200, "ü" * 90)], held_out=0).shown
    assert [(r.text, r.trained) for r in shown.runs if "…" not in r.text] == [
        ("<|begin|>", False),
        ("é" * 50, False),
        ("ü" * 10, True),
        ("<|end|>", True),
    ]
    assert [r.text.strip() for r in shown.runs if "…" in r.text] == [f"… {1 + 401 + 181 - 122} tokens …"]


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
