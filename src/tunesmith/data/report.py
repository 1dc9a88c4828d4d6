"""The data doctor's report: what became of every row, how long the examples are, what is duplicated, and what will be trained.

Everything here is read from `Prepared`; nothing is computed twice. People's text is printed as text: markup in it is not obeyed,
and control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data import findings, mend
from tunesmith.data.prepare import Account, Prepared
from tunesmith.errors import DataError
from tunesmith.types import Example

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tunesmith.data.render import Renderer

LIMITS = (512, 1024, 2048, 4096, 8192)  # lengths for which the report says what they would cut
BAR = 40
SHOWN_HEAD, SHOWN_TAIL = 500, 150  # tokens of a longer example that are shown
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
TRAINED, UNTRAINED, SPECIAL = "bold green", "dim", "magenta"
STYLES = {"error": "bold red", "warning": "yellow", "note": ""}
FINDINGS_WHOLE = 6  # findings told with a place and the fix
OPEN, CLOSE = "▸", "◂"  # around trained tokens where there is no colour


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one example that are alike."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One example as coloured tokens."""

    title: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class CheckReport:
    """What `tunesmith check` says. `fault` is why training would be refused, None when it would not."""

    account: Account
    train: int  # examples, the held-out ones left out, as in the next two
    tokens: int
    trained: int
    lengths: np.ndarray  # tokens of every example, held-out ones too, int64 [N]
    last: np.ndarray  # position of each example's last trained token [N]
    max_length: int
    overlength: str
    held_out: str  # how the held-out rows were chosen
    shown: tuple[Shown, ...] = ()
    fault: DataError | None = None
    source: str = "run.yaml"  # what was checked, for the command that mends it
    _places: str = field(default="", repr=False)  # where the whole list of refused rows is

    @property
    def exit_code(self) -> int:
        """0 when this data can be trained on, else the error's."""
        return self.fault.exit_code if self.fault else 0

    def print(self, console: Console | None = None) -> None:
        """Everything, to a terminal or a file; without colour, trained tokens stand between ▸ and ◂."""
        from rich.console import Console

        console = console or Console()
        _classes(self, console)
        _lengths(self, console)
        _duplicates(self, console)
        _findings(self, console)
        for shown in self.shown:
            _tokens(shown, console)
        _verdict(self, console)
        _mending(self, console)


def check_report(prepared: Prepared, renderer: Renderer, show: int | None = None, source: str = "run.yaml") -> CheckReport:
    """The report on prepared data, with row `show` (counted from 1 over all sources) as tokens, or three rows spread over the data.

    Raises DataError when there is no row `show`.
    """
    account, data = prepared.account, prepared.data
    stores = (prepared.train, prepared.held_out)
    fault = None
    try:
        prepared.require(data.max_refused)
    except DataError as e:
        fault = e
    if isinstance(data.held_out, str):
        held = f"{account.held_out_rows:,} rows from {data.held_out}"
    elif account.held_out_rows:
        held = f"{account.held_out_rows:,} rows, by whole groups of near-equal rows"
    else:
        held = "no rows" if not data.held_out else "no rows: there are too few different ones to split"
    return CheckReport(
        account=account,
        train=len(prepared.train),
        tokens=int(prepared.train.lengths.sum()),
        trained=int(prepared.train.trained.sum()),
        lengths=np.concatenate([s.lengths for s in stores]),
        last=np.concatenate([s.column("last") for s in stores]).astype(np.int64),
        max_length=data.max_length,
        overlength=data.overlength,
        held_out=held,
        shown=tuple(_show(prepared, renderer, show)),
        fault=fault,
        source=source,
        _places=str(prepared.folder / "refused.jsonl"),
    )


def print_one_row(prepared: Prepared, renderer: Renderer, console: Console) -> None:
    """The shortest example with at least eight trained tokens, as coloured tokens: shown before a first run."""
    train = prepared.train
    if not len(train):
        return
    short = train.lengths + np.where(train.trained < 8, train.lengths.max(), 0)
    at = int(short.argmin())
    _tokens(Shown(f"what is learned, shown on {train.origin(at)}", _runs(train[at], renderer)), console)
    console.print(_text(_legend(console) + "; more rows: tunesmith check\n", "dim"))


# ---- which rows, and their tokens ----------------------------------------------------------------------------------------------


def _show(prepared: Prepared, renderer: Renderer, row: int | None) -> Iterator[Shown]:
    train = prepared.train
    if row is None:
        for at in sorted({int(i) for i in np.linspace(0, len(train) - 1, min(3, len(train)))} if len(train) else ()):
            yield Shown(f"row {int(train.column('row')[at]) + 1}, {train.origin(at)}", _runs(train[at], renderer))
        return
    if not 1 <= row <= prepared.account.rows:
        raise DataError(f"there is no row {row}", f"rows are counted from 1 to {prepared.account.rows:,}")
    for store, name in ((train, "trained"), (prepared.held_out, "held out")):
        for at in np.flatnonzero(store.column("row") == row - 1):
            yield Shown(f"row {row}, {store.origin(int(at))}, {name}", _runs(store[int(at)], renderer))
    with (prepared.folder / "refused.jsonl").open(encoding="utf-8") as f:
        for line in f:
            if (entry := json.loads(line))["row"] == row:
                title = f"row {row}, {entry['file']}:{entry['line']}, refused: {entry['reason']}"
                yield Shown(title, (Run(entry["begins"], False, False),))


def _runs(example: Example, renderer: Renderer) -> tuple[Run, ...]:
    """Tokens as text, neighbours of one kind joined; the middle of a long example is left out."""
    tokenizer = renderer.tokenizer
    stream = tokenizer.stream(skip_special=False)
    runs: list[Run] = []

    def add(text: str, trained: bool, special: bool) -> None:
        if runs and (runs[-1].trained, runs[-1].special) == (trained, special):
            text = runs.pop().text + text
        if text:
            runs.append(Run(text, trained, special))

    count = len(example.ids)
    for t, (token, learn) in enumerate(zip(example.ids.tolist(), example.learn.tolist(), strict=True)):
        text = stream.push(token)
        special = not tokenizer.decode([token], True) and bool(tokenizer.decode([token], False))
        if t < SHOWN_HEAD or t >= count - SHOWN_TAIL:
            add(text, learn, special)
        elif t == SHOWN_HEAD:
            add(f"\n… {count - SHOWN_HEAD - SHOWN_TAIL:,} tokens …\n", False, True)
    add(stream.flush(), bool(example.learn[-1]) if count else False, False)
    return tuple(runs)


# ---- printing ------------------------------------------------------------------------------------------------------------------


def _text(text: Any, style: str = "") -> Text:
    """A person's text for the terminal: no markup, and control characters as their escapes."""
    from rich.text import Text

    return Text(_CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), str(text)), style)


def _table(*columns: str) -> Any:
    """Two blanks between columns; where that is too wide the first one folds, numbers never do."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    return table


def _line(console: Console, text: Text) -> None:
    """On a terminal a long line wraps between words; in a file it stays one line."""
    console.print(text, soft_wrap=not console.is_terminal)


def _classes(report: CheckReport, console: Console) -> None:
    table = _table("source", "rows", "used", "fixed", "truncated", "refused")
    total = [0] * 5
    for s in report.account.sources:
        numbers = [s.rows, s.used, s.fixed, s.truncated, s.refused]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        table.add_row(_text(s.path + (" (held out)" if s.held_out else "")), *(f"{n:,}" for n in numbers))
    if len(report.account.sources) > 1:
        table.add_row("all", *(f"{n:,}" for n in total), style="bold")
    console.print(table)
    console.print()
    for s in report.account.sources:
        of = f" of {s.path}" if len(report.account.sources) > 1 else ""
        if s.formats:
            _line(console, _text(f"formats{of}: " + ", ".join(f"{n:,} {name}" for name, n in s.formats.items())))
        if of:  # of all together the last line tells
            _line(console, _text(f"examples{of}: {s.examples:,}; {s.trained:,} of {s.tokens:,} tokens are trained"))
        for title, counts in (("fixed", s.fixes), ("truncated", s.cuts), ("files", s.notes)):
            for what, n in counts.items():
                _line(console, _text(f"{title}{of}: {n:,} {what}"))
        for name in s.skipped:
            _line(console, _text(f"not read{of}: {name}", "yellow"))
    reasons = report.account.reasons()
    for r in reasons[:12]:
        _line(
            console,
            _text(f"{r.count:,} {'row' if r.count == 1 else 'rows'} refused: {r.reason}")
            + _text(f" ({', '.join(r.places)})", "dim"),
        )
    if reasons:
        more = f"{len(reasons) - 12} more reasons; " if len(reasons) > 12 else ""
        _line(console, _text(f"{more}every refused row: {report._places}"))


def _lengths(report: CheckReport, console: Console) -> None:
    lengths = report.lengths
    if not len(lengths):
        return
    middle, late, most = (int(np.quantile(lengths, q)) for q in (0.5, 0.95, 1.0))
    _line(console, _text(f"\nlengths in tokens: half up to {middle:,}, 95 % up to {late:,}, the longest {most:,}", "bold"))
    every = np.concatenate([lengths, np.array(report.account.overlong, np.int64)])
    edges = [0, *(2**k for k in range(4, 40) if 2**k < max(2 * every.max(), 17))]  # at least one bin
    counts = [int(((every > a) & (every <= b)).sum()) for a, b in pairwise(edges)]
    first, end = next(i for i, n in enumerate(counts) if n), len(counts)
    for high, n in zip(edges[first + 1 : end + 1], counts[first:], strict=True):
        bar = "█" * round(BAR * n / max(counts)) or ("▏" if n else "")
        console.print(_text(f"{'up to ' + format(high, ','):>14} {n:>9,} {bar}"))
    if report.account.overlong:
        told = f"({len(report.account.overlong):,} of them are refused: longer than data.max_length {report.max_length:,})"
        _line(console, _text(told))
    table = _table("data.max_length", "examples cut", "answers cut", "tokens cut")
    known = [n for n in LIMITS if report.overlength == "refuse" or n < report.max_length]  # cut rows no longer tell their length
    for limit in known:  # the first one that cuts nothing is the last to be told
        over = every > limit
        answers = int((report.last >= limit).sum()) + sum(n > limit for n in report.account.overlong)
        cut = int((every[over] - limit).sum())
        table.add_row(f"{limit:,}", f"{int(over.sum()):,}", f"{answers:,}", f"{cut:,} ({cut / every.sum():.1%})")
        if not over.any():
            break
    if known:
        console.print()
        console.print(table)


def _duplicates(report: CheckReport, console: Console) -> None:
    a = report.account
    told = f"{a.exact_duplicates:,} rows repeat an earlier one word for word, {a.near_duplicates:,} more nearly do"
    _line(console, _text(f"\nduplicates: {told if a.exact_duplicates or a.near_duplicates else 'none'}"))
    _line(console, _text(f"held out: {report.held_out}"))
    if any(s.held_out for s in a.sources):
        style = "yellow" if a.overlap_exact + a.overlap_near else ""
        told = (
            f"overlap: {a.overlap_exact:,} held-out rows are also training rows word for word, {a.overlap_near:,} more nearly are"
        )
        _line(console, _text(told, style))


def _findings(report: CheckReport, console: Console) -> None:
    """The worst first: FINDINGS_WHOLE of them with a place and the fix, the others in a line each, so that it stays one screen."""
    found = report.account.findings
    if not found:
        _line(console, _text("\nfindings: none"))
        return
    counts = {severity: sum(f["severity"] == severity for f in found) for severity in STYLES}
    told = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n)
    _line(console, _text(f"\nfindings, the worst first: {told}", "bold"))
    for k, f in enumerate(found):
        line = _text(f"{f['severity']:<8}", STYLES[f["severity"]]) + _text(f"{f['count']:>7,}  {f['what']}")
        console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
        if k >= FINDINGS_WHOLE:
            continue
        place, words = f["examples"][0] if f["examples"] else ("", "")
        place = place if len(place) <= 30 else "…/" + place.rsplit("/", 1)[-1]
        below = [" ".join(filter(None, (place, words))), f["detail"], f"fix: {f['fix']}"]
        for words in filter(None, below):
            console.print(_text(" " * 17 + words, "dim"), no_wrap=True, overflow="ellipsis", crop=True)
    if len(found) > FINDINGS_WHOLE:
        _line(console, _text("all of them with places and fixes: account.json beside the list of refused rows", "dim"))


def _tokens(shown: Shown, console: Console) -> None:
    coloured = console.is_terminal and not console.no_color
    told = _text("\n")
    told.append_text(_text(shown.title, "bold"))
    told.append("\n")
    for before, run, after in zip((None, *shown.runs), shown.runs, (*shown.runs[1:], None), strict=False):
        style = TRAINED if run.trained else SPECIAL if run.special else UNTRAINED
        text = _text(run.text, style + (" underline" if run.special and run.trained else ""))
        if run.trained and not coloured:
            opened, closed = before is not None and before.trained, after is not None and after.trained
            text = _text("" if opened else OPEN) + text + _text("" if closed else CLOSE)
        told.append_text(text)
    console.print(told, soft_wrap=True)


def _legend(console: Console) -> str:
    coloured = console.is_terminal and not console.no_color
    return "green tokens are trained, dim ones are read only" if coloured else f"tokens between {OPEN} and {CLOSE} are trained"


def _mending(report: CheckReport, console: Console) -> None:
    """The command that answers the findings."""
    found = report.account.findings or ()
    if fixes := mend.answering(f["name"] for f in found if f["severity"] != findings.NOTE):
        _line(console, _text(f"mend them: tunesmith prepare {shlex.quote(report.source)} --out mended --fix {','.join(fixes)}"))


def _verdict(report: CheckReport, console: Console) -> None:
    if any(shown.runs for shown in report.shown):
        _line(console, _text(f"\n({_legend(console)})\n"))
    if report.fault is not None:
        _line(console, _text(f"error: {report.fault.what}", "bold red"))
        _line(console, _text(f"fix: {report.fault.fix}"))
        return
    share = f"{report.trained / max(1, report.tokens):.0%}"
    told = f"{report.train:,} examples to train on; {report.trained:,} of their {report.tokens:,} tokens ({share}) are trained"
    _line(console, _text(told, "bold"))
