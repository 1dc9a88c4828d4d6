"""The data doctor's report: what became of every row, how long the examples are, what is duplicated, and what will be trained.

Everything here is read from `Prepared`; nothing is computed twice. People's text is printed as text: markup in it is not obeyed,
and control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.config.schema import Train
from tunesmith.data import findings, mend
from tunesmith.data.learned import Learned, bins, learned
from tunesmith.data.prepare import Account, Prepared
from tunesmith.data.store import ExampleStore
from tunesmith.errors import DataError
from tunesmith.types import Example
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tunesmith.data.render import Renderer

BAR = 40
SHOWN_HEAD, SHOWN_TAIL = 500, 150  # tokens of a longer example that are shown
BEFORE_TAIL = 8  # tokens read before the tail, so that it begins with a whole character
IN_TERMINAL = 2  # rows shown there where none is asked for
ASKED, ASKED_EXAMPLES = 12, 24  # rows that may be asked for, and how many of their examples are shown: a page stays small
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
TRAINED, UNTRAINED, SPECIAL = "bold green", "dim", "magenta"
STYLES = {"error": "bold red", "warning": "yellow", "note": ""}
FINDINGS_WHOLE = 6  # findings told with a place and the fix
WINDOWS = "raw text is cut into windows of data.max_length: a shorter one loses nothing of it"
OPEN, CLOSE = "▸", "◂"  # around trained tokens where there is no colour


@dataclass(frozen=True)
class Piece:
    """A token's text; of several tokens where only together they are a character. Without ids: words of ours, not of the row."""

    text: str
    trained: bool = False
    special: bool = False
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """One example as coloured tokens. `why` it is shown; `tokens` and `trained` are 0 of a row that was refused."""

    title: str
    why: str
    pieces: tuple[Piece, ...]
    tokens: int = 0
    trained: int = 0


@dataclass(frozen=True)
class CheckReport:
    """What `tunesmith check` says. `fault` is why training would be refused, None when it would not."""

    account: Account
    train: int  # examples, the held-out ones left out, as in the next two
    tokens: int
    trained: int
    lengths: np.ndarray  # tokens of every example, held-out ones too, int64 [N]
    max_length: int
    held_out: str  # how the held-out rows were chosen
    learned: Learned
    folder: Path  # holds account.json and the whole list of refused rows
    shown: tuple[Shown, ...] = ()
    in_terminal: int = 0  # so many of the first of `shown` are printed; the page has all
    fault: DataError | None = None
    source: str = "run.yaml"  # what was checked, for the command that mends it
    page: Path | None = None  # where the page was written

    @property
    def exit_code(self) -> int:
        """0 when this data can be trained on, else the error's."""
        return self.fault.exit_code if self.fault else 0

    @property
    def every_token(self) -> int:
        """Of all examples, held-out ones too, and of rows refused for their length."""
        return int(self.lengths.sum()) + sum(self.account.overlong)

    @property
    def mending(self) -> str:
        """The command that answers the findings; empty where no fix does."""
        found = self.account.findings or ()
        fixes = mend.answering(f["name"] for f in found if f["severity"] != findings.NOTE)
        return f"tunesmith prepare {shlex.quote(self.source)} --out mended --fix {','.join(fixes)}" if fixes else ""

    def print(self, console: Console | None = None) -> None:
        """Everything, to a terminal or a file; without colour, trained tokens stand between ▸ and ◂."""
        from rich.console import Console

        console = console or Console()
        _classes(self, console)
        _lengths(self, console)
        _learned(self, console)
        _duplicates(self, console)
        _findings(self, console)
        for shown in self.shown[: self.in_terminal]:
            _tokens(shown, console)
        _verdict(self, console)


def check_report(
    prepared: Prepared,
    renderer: Renderer,
    show: Sequence[int] = (),
    *,
    train: Train | None = None,
    seed: int = 0,
    at_once: int | str = "auto",
    source: str = "run.yaml",
) -> CheckReport:
    """The report on prepared data. The rows of `show` (counted from 1 over all sources) come first among those shown as tokens.

    train, seed, at_once: the run's `train` section, its seed and memory.micro_batch_tokens, for steps and packing.
    Raises DataError when there is no such row.
    """
    account, data = prepared.account, prepared.data
    stores = (prepared.train, prepared.held_out)
    fault = None
    try:
        prepared.require(data.max_refused)
    except DataError as e:
        fault = e
    if isinstance(data.held_out, str):
        held = f"{counted(account.held_out_rows, 'row')} from {data.held_out}"
    elif account.held_out_rows:
        held = f"{counted(account.held_out_rows, 'row')}, by whole groups of near-equal rows"
    else:
        held = "no rows" if not data.held_out else "no rows: there are too few different ones to split"
    asked = _asked(prepared, renderer, show)
    usual = [_example(prepared.train, at, renderer, why=why) for at, why in _usual(prepared.train, seed)]
    return CheckReport(
        account=account,
        train=len(prepared.train),
        tokens=int(prepared.train.lengths.sum()),
        trained=int(prepared.train.trained.sum()),
        lengths=np.concatenate([s.lengths for s in stores]),
        max_length=data.max_length,
        held_out=held,
        learned=learned(prepared, train or Train(), seed, at_once),
        folder=prepared.folder,
        shown=(*asked, *usual),
        in_terminal=len(asked) if show else IN_TERMINAL,
        fault=fault,
        source=source,
    )


def print_one_row(prepared: Prepared, renderer: Renderer, console: Console) -> None:
    """The shortest example with at least eight trained tokens, as coloured tokens: shown before a first run."""
    train = prepared.train
    if not len(train):
        return
    short = train.lengths + np.where(train.trained < 8, train.lengths.max(), 0)
    at = int(short.argmin())
    _tokens(Shown(f"what is learned, shown on {train.origin(at)}", "", _pieces(train[at], renderer)), console)
    console.print(_text(_legend(console) + "; more rows: tunesmith check\n", "dim"))


# ---- which rows, and their tokens ----------------------------------------------------------------------------------------------


def _usual(train: ExampleStore, seed: int) -> Iterator[tuple[int, str]]:
    """Examples to look at, and why: the first, a typical one, three drawn at random, the longest; each once."""
    if not len(train):
        return
    lengths = train.lengths
    drawn = np.random.default_rng([seed, 0x5409]).choice(len(train), min(3, len(train)), replace=False).tolist()
    picks = [(0, "the first"), (int(np.abs(lengths - np.median(lengths)).argmin()), "of typical length")]
    picks += [*((at, "drawn at random") for at in drawn), (int(lengths.argmax()), "the longest")]
    seen: set[int] = set()
    for at, why in picks:
        if at not in seen:
            yield at, why
        seen.add(at)


def _asked(prepared: Prepared, renderer: Renderer, rows: Sequence[int]) -> list[Shown]:
    """What became of these rows: their examples, or what a refused one begins with."""
    if len(rows) > ASKED:
        raise DataError(f"{len(rows)} rows to show", f"ask for at most {ASKED} at once")
    refused: dict[int, dict[str, Any]] = {}
    for row in rows:
        if not 1 <= row <= prepared.account.rows:
            raise DataError(f"there is no row {row}", f"rows are counted from 1 to {prepared.account.rows:,}")
    if rows:
        with (prepared.folder / "refused.jsonl").open(encoding="utf-8") as f:
            refused = {entry["row"]: entry for entry in map(json.loads, f) if entry["row"] in rows}
    out: list[Shown] = []
    for row in dict.fromkeys(rows):
        for store, name in ((prepared.train, "trained"), (prepared.held_out, "held out")):
            for at in np.flatnonzero(store.column("row") == row - 1)[: ASKED_EXAMPLES - len(out)].tolist():
                out.append(_example(store, at, renderer, f", {name}", "asked for"))
        if entry := refused.get(row):
            title = f"row {row}, {entry['file']}:{entry['line']}, refused: {entry['reason']}"
            out.append(Shown(title, "asked for", (Piece(entry["begins"]),)))
    return out


def _example(store: ExampleStore, at: int, renderer: Renderer, became: str = "", why: str = "") -> Shown:
    example, row = store[at], int(store.column("row")[at]) + 1
    title = f"row {row}, {example.origin}{became}"
    return Shown(title, why, _pieces(example, renderer), len(example.ids), int(example.learn.sum()))


def _pieces(example: Example, renderer: Renderer) -> tuple[Piece, ...]:
    """Each token's text; the middle of a long example is left out."""
    count = len(example.ids)
    if count <= SHOWN_HEAD + SHOWN_TAIL:
        return tuple(piece for _, piece in _read(example, renderer, 0, count))
    tail = count - SHOWN_TAIL
    head = [piece for _, piece in _read(example, renderer, 0, SHOWN_HEAD)]
    rest = [piece for at, piece in _read(example, renderer, max(SHOWN_HEAD, tail - BEFORE_TAIL), count) if at >= tail]
    return *head, Piece(f"\n… {tail - SHOWN_HEAD:,} tokens …\n"), *rest


def _read(example: Example, renderer: Renderer, begin: int, end: int) -> Iterator[tuple[int, Piece]]:
    """(position of its last token, piece) of the tokens begin..end - 1; a character that goes on behind them is left out."""
    tokenizer = renderer.tokenizer
    stream, ids = tokenizer.stream(skip_special=False), list[int]()
    for at, (token, learn) in enumerate(
        zip(example.ids[begin:end].tolist(), example.learn[begin:end].tolist(), strict=True), begin
    ):
        ids.append(token)
        if text := stream.push(token):
            special = not tokenizer.decode([token], True) and bool(tokenizer.decode([token], False))
            yield at, Piece(text, learn, special, tuple(ids))
            ids = []
    if ids and end == len(example.ids):
        yield end - 1, Piece(stream.flush(), bool(example.learn[-1]), False, tuple(ids))


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
        for title, counts in (("fixed", s.fixes), ("truncated", s.cuts), ("files", s.notes)):
            for what, n in counts.items():
                _line(console, _text(f"{title}{of}: {n:,} {what}"))
        for name in s.skipped:
            _line(console, _text(f"not read{of}: {name}", "yellow"))
    reasons = report.account.reasons()
    for r in reasons[:12]:
        _line(
            console,
            _text(f"{counted(r.count, 'row')} refused: {r.reason}") + _text(f" ({', '.join(r.places)})", "dim"),
        )
    if reasons:
        more = f"{counted(len(reasons) - 12, 'more reason')}; " if len(reasons) > 12 else ""
        _line(console, _text(f"{more}every refused row: {report.folder / 'refused.jsonl'}"))


def _lengths(report: CheckReport, console: Console) -> None:
    lengths = report.lengths
    if not len(lengths):
        return
    middle, late, most = (int(np.quantile(lengths, q)) for q in (0.5, 0.95, 1.0))
    _line(console, _text(f"\nlengths in tokens: half up to {middle:,}, 95 % up to {late:,}, the longest {most:,}", "bold"))
    counted = [(high, kept + refused) for high, kept, refused in bins(lengths, report.account.overlong)]
    most = max(n for _, n in counted)
    for high, n in counted:
        bar = "█" * round(BAR * n / most) or ("▏" if n else "")
        console.print(_text(f"{'up to ' + format(high, ','):>14} {n:>9,} {bar}"))
    if report.account.overlong:
        n = len(report.account.overlong)
        told = f"({n:,} of them {'is' if n == 1 else 'are'} refused: longer than data.max_length {report.max_length:,})"
        _line(console, _text(told))
    if report.learned.windows:
        _line(console, _text(WINDOWS))
    if report.learned.cuts:
        every, trained = report.every_token, max(1, sum(s.trained for s in report.account.sources))
        table = _table("cut at", "rows cut", "answers cut", "tokens lost", "trained ones lost")
        for c in report.learned.cuts:
            lost = f"{c.tokens:,} ({c.tokens / every:.1%})", f"{c.trained:,} ({c.trained / trained:.1%})"
            table.add_row(f"{c.limit:,}", f"{c.rows:,}", f"{c.answers:,}", *lost)
        console.print()
        console.print(table)


def _learned(report: CheckReport, console: Console) -> None:
    """Each source's part where there are several; the steps; how full the micro-batches are."""
    found = report.learned
    if len(found.shares) > 1:
        console.print()
        table = _table("to train on", "weight", "examples", "tokens", "trained", "of an epoch")
        for s in found.shares:
            table.add_row(_text(s.path), f"{s.weight:g}", f"{s.examples:,}", f"{s.tokens:,}", f"{s.trained:,}", f"{s.share:.1%}")
        console.print(table)
    if found.packing is None:
        return
    _line(console, _text(f"\n{steps(found)}\n{packing(found)}"))


def steps(found: Learned) -> str:
    return (
        f"steps: {found.steps:,}, which is {epochs(found.epochs)} of {counted(found.epoch_size, 'example')},"
        f" {found.batch_size:,} a step"
    )


def packing(found: Learned) -> str:
    p = found.packing
    assert p is not None, "nothing to train on"
    parts = "one micro-batch" if p.parts == 1 else f"{p.parts:.1f} micro-batches"
    return (
        f"packing: no padding, where examples padded to the longest of their step would be {p.padding:.0%} padding; "
        f"at {p.at_once:,} tokens at once a step is {parts}, {p.filled:.0%} full"
    )


def epochs(n: float) -> str:
    return f"{n:.3g} {'epoch' if n == 1 else 'epochs'}"


def repeated(exact: int, near: int) -> str:
    """How many rows repeat an earlier one, to the letter or nearly."""
    told = f"{counted(exact, 'row repeats', 'rows repeat')} an earlier one to the letter"
    return f"{told}, {near:,} more nearly {'does' if near == 1 else 'do'}"


def overlapping(exact: int, near: int) -> str:
    """How many rows of the held-out file stand among the training rows."""
    told = counted(exact, "held-out row is also a training row", "held-out rows are also training rows")
    return f"{told} to the letter, {near:,} more nearly {'is' if near == 1 else 'are'}"


def _duplicates(report: CheckReport, console: Console) -> None:
    a = report.account
    told = repeated(a.exact_duplicates, a.near_duplicates)
    _line(console, _text(f"\nduplicates: {told if a.exact_duplicates or a.near_duplicates else 'none'}"))
    _line(console, _text(f"held out: {report.held_out}"))
    if any(s.held_out for s in a.sources):
        style = "yellow" if a.overlap_exact + a.overlap_near else ""
        _line(console, _text(f"overlap: {overlapping(a.overlap_exact, a.overlap_near)}", style))


def _findings(report: CheckReport, console: Console) -> None:
    """The worst first: FINDINGS_WHOLE of them with a place and the fix, the others in a line each, so that it stays one screen."""
    found = report.account.findings
    if not found:
        _line(console, _text("\nfindings: none"))
        return
    counts = {severity: sum(f["severity"] == severity for f in found) for severity in STYLES}
    told = ", ".join(counted(n, name) for name, n in counts.items() if n)
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
        where = "on the page" if report.page else "account.json beside the list of refused rows"
        _line(console, _text(f"all of them with places and fixes: {where}", "dim"))


def _tokens(shown: Shown, console: Console) -> None:
    coloured = console.is_terminal and not console.no_color
    told = _text("\n")
    told.append_text(_text(shown.title, "bold"))
    told.append("\n")
    inside = False
    for (trained, special), pieces in groupby(shown.pieces, lambda p: (p.trained, p.special)):
        if trained != inside and not coloured:
            told.append(OPEN if trained else CLOSE)
        inside = trained
        style = TRAINED if trained else SPECIAL if special else UNTRAINED
        told.append_text(_text("".join(p.text for p in pieces), style + (" underline" if special and trained else "")))
    if inside and not coloured:
        told.append(CLOSE)
    console.print(told, soft_wrap=True)


def _legend(console: Console) -> str:
    coloured = console.is_terminal and not console.no_color
    return "green tokens are trained, dim ones are read only" if coloured else f"tokens between {OPEN} and {CLOSE} are trained"


def _verdict(report: CheckReport, console: Console) -> None:
    if report.in_terminal and report.shown:
        _line(console, _text(f"\n({_legend(console)})\n"))
    if report.fault is not None:
        _line(console, _text(f"error: {report.fault.what}", "bold red"))
        _line(console, _text(f"fix: {report.fault.fix}"))
    else:
        share = f"{report.trained / max(1, report.tokens):.0%}"
        told = f"{report.trained:,} of {report.tokens:,} tokens ({share}) are trained"
        _line(console, _text(f"{counted(report.train, 'example')} to train on; {told}", "bold"))
    if report.mending:  # whole, to be copied: the terminal wraps it
        console.print(_text(f"mend what was found: {report.mending}"), soft_wrap=True)
    if report.page:
        _line(console, _text(f"all of it on one page: {report.page}"))
