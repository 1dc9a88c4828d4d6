"""check.html: what `check` found on one page: what is there, what is wrong, what will be trained, and rows token by token.

It says what the terminal says, with all findings and more rows. What was left out for length is counted. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.data.learned import bins
from tunesmith.data.report import WINDOWS, CheckReport, Piece, Shown, epochs, overlapping, packing, steps
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.page import (
    Markup,
    bin_chart,
    clip,
    el,
    facts_list,
    fold,
    join,
    page,
    stacked,
    swatch,
    table,
)
from tunesmith.evaluate.report import classes, findings_table, refusals_table
from tunesmith.files import write_atomic
from tunesmith.wording import counted

SOURCES, NOTES = 60, 40  # rows of a table of sources, lines of a list
OPEN_ROWS = 2  # rows that are unfolded


def place(path: str | Path) -> Path:
    """Where the page goes, when somebody says so. Raises TunesmithError for what can be no page, before it costs any work."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):  # a slip must not overwrite the data
        raise TunesmithError(f"{path}: the page is an HTML file", "name one that ends in .html, such as --page check.html")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise TunesmithError(f"{path}: {what}", "name a file in a folder that is there, such as --page check.html")
    return path


def write(report: CheckReport, path: Path) -> Path:
    write_atomic(path, page(f"check: {_name(report)}", _body(report)), durable=False)
    return path


def _body(report: CheckReport) -> Markup:
    sections = (_head, _banner, _hero, _facts, _there, _wrong, _trained, _rows)
    foot = el("footer", "Made by Tunesmith from the prepared data. This page loads nothing and runs nothing.")
    return el("main", [section(report) for section in sections], foot)


def _name(report: CheckReport) -> str:
    paths = [s.path for s in report.account.sources if not s.held_out]
    return clip(paths[0].rstrip("/").rsplit("/", 1)[-1], 80) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _head(report: CheckReport) -> Markup:
    rows = report.account.rows
    sub = f"{counted(rows, 'row')}, as this run would read, mend and train {'it' if rows == 1 else 'them'}"
    return el("header", el("p", "Tunesmith check", class_="brand"), el("h1", _name(report)), el("p", sub, class_="sub"))


def _banner(report: CheckReport) -> Markup | None:
    if report.fault is None:
        return None
    lines = [el("p", clip(line, 600)) for line in report.fault.what.splitlines()[1:]]
    first = el("p", el("strong", clip(report.fault.what.splitlines()[0], 600)))
    return el("div", first, lines, el("p", f"Fix: {clip(report.fault.fix, 600)}"), class_="banner", role="status")


def _hero(report: CheckReport) -> Markup:
    errors = any(f["severity"] == "error" for f in report.account.findings or ())
    if report.fault:
        tone, word = "bad", "Cannot train yet"
    elif errors:
        tone, word = "open", "Look first"
    else:
        tone, word = "good", "Ready to train"
    say = f"{counted(report.train, 'example')} to train on; {report.trained:,} of {report.tokens:,} tokens are learned."
    small = "Some of what is wrong below would do harm as it stands." if errors else ""
    words = el("div", el("p", word, class_="word"), el("p", say, class_="say"), el("p", small, class_="note") if small else None)
    parts = (("learned", report.trained, "b"), ("read only", report.tokens - report.trained, "g"))
    legend = [el("li", swatch(style), f"{name}: {n:,} ({n / max(1, report.tokens):.0%})") for name, n, style in parts]
    return el(
        "section", words, el("figure", stacked("Tokens", parts), el("ul", legend, class_="legend")), class_=f"hero {tone}",
        aria_label="Verdict",
    )  # fmt: skip


def _facts(report: CheckReport) -> Markup:
    a, found, findings = report.account, report.learned, report.account.findings or ()
    overlap = a.overlap_exact + a.overlap_near
    errors = sum(f["severity"] == "error" for f in findings)
    facts = [
        ("rows", f"{a.rows:,}", f"{a.refused:,} refused" if a.refused else "none refused"),
        (
            "held out",
            f"{a.held_out_rows:,}",
            ("row" if a.held_out_rows == 1 else "rows") + ("" if overlap else ", never trained on"),
        ),
        ("repeated rows", f"{a.exact_duplicates:,}", f"{a.near_duplicates:,} more nearly"),
        ("findings", f"{len(findings):,}", f"{errors} of them errors" if errors else "no errors"),
        (
            "steps",
            f"{found.steps:,}",
            f"{epochs(found.epochs)}, {counted(found.batch_size, 'example')} a step",
        ),
    ]
    if len(report.lengths):
        facts.append(("longest", f"{int(report.lengths.max()):,}", f"tokens, of at most {report.max_length:,}"))
    return facts_list(facts)


def _there(report: CheckReport) -> Markup:
    a = report.account
    sources = [asdict(s) for s in a.sources]
    body = [
        (_source(s), ", ".join(f"{name} {n:,}" for name, n in list(s["formats"].items())[:NOTES]),
         *(f"{s[c]:,}" for c in ("rows", "used", "fixed", "truncated", "refused")))
        for s in sources[:SOURCES]
    ]  # fmt: skip
    head = ("source", "kinds of rows", "rows", "used", "fixed", "truncated", "refused")
    notes = []
    for s in sources:
        of = f"{clip(s['path'], 80)}: " if len(sources) > 1 else ""
        for title, counts in (("fixed: ", s["fixes"]), ("truncated: ", s["cuts"]), ("", s["notes"])):
            notes += [f"{of}{title}{_counted(what, n)}" for what, n in counts.items()]
        notes += [f"{of}not read: {name}" for name in s["skipped"]]
    notes += [f"held out: {report.held_out}"]
    if any(s["held_out"] for s in sources):
        notes.append(overlapping(a.overlap_exact, a.overlap_near))
    return el("section", el("h2", "What is there"), classes(sources), table(head, body, numbers=range(2, 7)),
              _more(len(sources), SOURCES, "sources"), _list(notes))  # fmt: skip


def _counted(what: str, n: int) -> str:
    return f"{what} ({n:,})" if n > 1 else what


def _source(source: Mapping[str, Any]) -> str:
    return clip(source["path"], 160) + (" (held out)" if source["held_out"] else "")


def _list(lines: list[str]) -> Markup:
    return join(
        [
            el("ul", [el("li", clip(line, 300)) for line in lines[:NOTES]], class_="plain note"),
            _more(len(lines), NOTES, "lines"),
        ]
    )


def _more(count: int, most: int, what: str) -> Markup | None:
    return el("p", f"{count - most:,} more {what} are in account.json.", class_="note") if count > most else None


def _wrong(report: CheckReport) -> Markup:
    found = findings_table(report.account.findings or ())
    note = "Nothing was changed. Secrets and personal data are masked here." if found else "Nothing was found in the rows."
    mending = el("p", "Mend what was found: ", el("code", report.mending)) if report.mending else None
    refused = refusals_table([asdict(s) for s in report.account.sources])
    where = el("p", f"Every refused row: {report.folder / 'refused.jsonl'}", class_="note") if refused else None
    return el("section", el("h2", "What is wrong"), el("p", note, class_="note"), found, mending, refused, where)


def _trained(report: CheckReport) -> Markup | None:
    found = report.learned
    if not len(report.lengths):
        return None
    body = [
        (clip(s.path, 160), f"{s.weight:g}", f"{s.examples:,}", f"{s.tokens:,}", f"{s.trained:,}", f"{s.share:.1%}")
        for s in found.shares[:SOURCES]
    ]
    head = ("source", "weight", "examples", "tokens", "learned", "of what an epoch learns")
    parts: list[Any] = [el("h2", "What will be trained"), el("p", "Held-out rows are left out.", class_="note")]
    parts += [table(head, body, numbers=range(1, 6)), _more(len(found.shares), SOURCES, "sources")]
    if found.packing:
        parts.append(_list([steps(found), packing(found)]))
    return el("section", *parts, *_lengths(report))


def _lengths(report: CheckReport) -> list[Any]:
    overlong, found = report.account.overlong, report.learned
    bars = [(f"to {high:,}", kept, refused) for high, kept, refused in bins(report.lengths, overlong)]
    title = "Examples by length in tokens"
    parts: list[Any] = [el("h3", title)]
    parts += [bin_chart(title, bars, width=width, style=style) for width, style in ((920, "wide"), (380, "narrow"))]
    if overlong:
        key = (("a", "within data.max_length"), ("e", f"refused: longer than data.max_length {report.max_length:,}"))
        parts.append(el("ul", [el("li", swatch(style), name) for style, name in key], class_="legend"))
    if found.windows:
        parts.append(el("p", f"{WINDOWS[0].upper()}{WINDOWS[1:]}.", class_="note"))
    if found.cuts:
        every, learned = report.every_token, max(1, sum(s.trained for s in report.account.sources))
        body = [
            (f"{c.limit:,}", f"{c.rows:,}", f"{c.answers:,}", f"{c.tokens:,} ({c.tokens / every:.1%})",
             f"{c.trained:,} ({c.trained / learned:.1%})")
            for c in found.cuts
        ]  # fmt: skip
        head = ("tokens", "rows cut", "answers cut", "tokens lost", "learned ones lost")
        parts += [el("h3", "What cutting all rows at a length would lose"), table(head, body, numbers=range(1, 5))]
        if overlong:
            parts.append(el("p", "Of refused rows it is not known which tokens would be learned: the last column is without them.",
                            class_="note"))  # fmt: skip
    return parts


def _rows(report: CheckReport) -> Markup | None:
    if not report.shown:
        return None
    note = (
        "Rows as the model sees them, as they stand: nothing is masked here, so keep this page as you keep the data. "
        "A faint line begins each token; its number shows where you point."
    )
    key = [
        _token(Piece("learned", trained=True, ids=(0,))),
        _token(Piece("read only", ids=(0,))),
        _token(Piece("special token", special=True, ids=(0,))),
    ]
    folds = [_row(shown, i < OPEN_ROWS) for i, shown in enumerate(report.shown)]
    return el("section", el("h2", "Token by token"), el("p", note, class_="note"), el("ul", [el("li", k) for k in key],
              class_="legend"), folds)  # fmt: skip


def _row(shown: Shown, open_: bool) -> Markup:
    counts = f" · {shown.tokens:,} tokens, {shown.trained:,} learned" if shown.tokens else ""
    tokens = el("p", [_token(piece) for piece in shown.pieces], class_="tokens", dir="auto")
    return fold(clip(f"{shown.why}: {shown.title}", 300) + counts, tokens, open_=open_)


def _token(piece: Piece) -> Markup:
    if not piece.ids:
        return el("span", piece.text, class_="ours")
    words = (("learned", piece.trained), ("special", piece.special), ("breaks", piece.text.startswith("\n")))
    return el(
        "span",
        piece.text,
        class_=" ".join(["token", *(name for name, is_so in words if is_so)]),
        title=" ".join(map(str, piece.ids)),
    )
