"""Sources -> a folder of mended rows, with a record of every change. It appears whole or not at all.

    train.jsonl, held_out.jsonl   rows to learn from, and rows never to be learned
    refused.jsonl                 every row set aside: file, line, fix, reason, and the row
    changes.jsonl                 every row changed: file, line, fix, what, and the place before and after, masked
    record.json                   inputs with sha256, options, counts that add up
    run.yaml                      a run file for the two
    manifest.json                 sha256 of all of them

Two passes. In the first, rows are mended in worker processes, written to a file beside the result, and hashed; in between, what
needs all rows is decided; in the second, each goes where it belongs. In memory are some 60 bytes a row. The same inputs, options
and seed give the same bytes, however many workers there are.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.config.schema import Data
from tunesmith.data import clusters
from tunesmith.data.findings import whole
from tunesmith.data.mend import chunk, split
from tunesmith.data.prepare import bar, find_all, tagged
from tunesmith.data.sources import Files, raise_all
from tunesmith.data.workers import no_collector, results, worker_count
from tunesmith.errors import DataError
from tunesmith.files import folder_atomic, sha256_file
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

MADE_BY = "tunesmith prepare"
RECORD = "record.json"
TRAIN, HELD, TINY, LEAK, COPY, NEAR, UNDRAWN = range(7)  # what becomes of a row
WHY = {
    TINY: ("empty", "an answer of at most three characters among long ones"),
    LEAK: ("leakage", "repeats or nearly repeats the held-out row {}"),
    COPY: ("dedup", "equal to {}"),
    NEAR: ("near", "nearly equal to {}"),
    UNDRAWN: ("mix", "not drawn: its source has a weight below 1"),
}
COLUMNS = {"places": "<i8", "sizes": "<i8", "groups": "<i8", "tiny": "?", "files": "<u4", "sources": "<u2"}
BLOCK = 1 << 14


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    fixes: tuple[str, ...]
    size: float | int  # of the held-out part: a share, or rows
    by: split.By | None
    seed: int
    mix: bool
    model: Path | None  # whose tokens are counted; None: characters


@dataclass(frozen=True)
class Mended:
    """What `tunesmith prepare` made: the folder and its record."""

    folder: Path
    record: dict[str, Any]

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console

        console = console or Console()
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def lines(self) -> Iterator[str]:
        r = self.record
        rows, unit = r["rows"], r["unit"]
        read = counted(rows["read"], "row")
        yield f"{read}: {rows['train']:,} to train on, {rows['held_out']:,} held out, {rows['refused']:,} set aside"
        if not r["options"]["fix"]:
            yield "mended: nothing but what reading mends; --fix names more, `tunesmith check` says what is there"
        for name, done in r["fixes"].items():
            if any(done.values()):
                yield f"{name:<14} {done['changed']:>9,} changed {done['set_aside']:>9,} set aside"
        yield f"held out: {r['held_out']['how']}"
        if near := r["held_out"]["nearly_in_train"]:
            fix = "leakage" if r["held_out"]["file"] else "near"
            yield f"{counted(near, 'held-out row is', 'held-out rows are')} nearly equal to training rows: --fix {fix} parts them"
        if many := r["near_duplicates"]:
            yield f"{counted(many, 'row nearly repeats', 'rows nearly repeat')} an earlier one: --fix near sets them aside"
        if len(r["sources"]) > 1 or r["options"]["mix"]:
            for s in r["sources"]:
                yield f"{s['path']}: {counted(s['train_lines'], 'line')}, {s[unit]:,} {unit} to train on"
        for key, n in r["keys_left_out"].items():
            yield f"key {key!r} left out of {counted(n, 'row')}: with it they would be read as another kind of row"
        yield f"\nWritten to {self.folder}\nNext: tunesmith check {self.folder / 'run.yaml'}"


def prepare_folder(
    data: Data, out: Path, options: Options, run_yaml: Callable[[bool], str], *, overwrite: bool, console: Console | None
) -> Mended:
    """`run_yaml(held out there is)` is the text of the folder's run file. Raises DataError for bad inputs, a folder that is not
    ours, rows without a group, and when no row is left."""
    weights = {s.path: s.weight for s in data.train if s.weight != 1}
    if weights and not options.mix:
        told = ", ".join(f"{path}: {weight:g}" for path, weight in weights.items())
        raise DataError(
            f"sources with weights ({told}) cannot be written as one file without mixing", "add --mix, or set the weights to 1"
        )
    if options.by and isinstance(data.held_out, str):
        raise DataError("--split-by beside a held-out file: nothing is split", "drop --split-by, or add data.held_out=0.05")
    found = [replace(f, rest=True) for f in find_all(data)]
    _check_folder(out, found, overwrite)
    stamps = _stamps(found)
    inputs = [_input(f) for f in found]
    with folder_atomic(out) as temp, no_collector():
        record = _Job(temp, data, options, found, console).run()
        if _stamps(found) != stamps:
            raise DataError("a source changed while it was read", "run it again when nothing writes to the files")
        for told, source in zip(inputs, record["sources"], strict=True):
            source.update(told)
        (temp / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (temp / "run.yaml").write_text(run_yaml(record["rows"]["held_out"] > 0), "utf-8")
    return Mended(out, record)


def _check_folder(out: Path, found: Sequence[Files], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file", "name a folder with --out")
    if any(p.resolve().is_relative_to(out.resolve()) for f in found for p in f.paths):
        raise DataError(f"{out}: the rows to be read are in it", "name another folder with --out")
    if out.is_dir() and any(out.iterdir()):
        if not _is_ours(out):
            raise DataError(f"{out}: the folder is not empty, and `prepare` did not make it", "name another folder with --out")
        if not overwrite:
            raise DataError(f"{out}: is already there", "add --overwrite to make it anew, or name another folder with --out")


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / RECORD).read_text("utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stamps(found: Sequence[Files]) -> list[tuple[int, int]]:
    return [(s.st_size, s.st_mtime_ns) for f in found for s in (p.stat() for p in f.paths)]


def _input(files: Files) -> dict[str, Any]:
    told = [{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files.paths]
    return {"files": told, "not_read": list(files.skipped)}


class _Job:
    def __init__(self, temp: Path, data: Data, options: Options, found: list[Files], console: Console | None):
        self.temp, self.data, self.options, self.found, self.console = temp, data, options, found, console
        self.work = temp / "work"
        self.work.mkdir()
        self.held_source = len(data.train) if isinstance(data.held_out, str) else -1
        self.read, self.refused = Counter[int](), Counter[int]()  # rows of each source
        self.changed, self.aside, self.left_out = Counter[str](), Counter[str](), Counter[str]()
        self.changed_rows = 0
        self.whole = whole.Whole()
        self.names: list[str] = []  # of files

    def run(self) -> dict[str, Any]:
        finder = self._first()
        fate, of = self._decide(finder)
        copies = self._copies(fate)
        counts = self._second(fate, of, copies)
        shutil.rmtree(self.work)
        return self._record(counts)

    # ---- first pass --------------------------------------------------------------------------------------------------------

    def _first(self) -> clusters.Finder:
        o = self.options
        mender = chunk.Mender(o.fixes, o.by, o.model)
        make = functools.partial(chunk.Mender, o.fixes, o.by, o.model)
        finder = clusters.Finder(self.work / "clusters")
        faults: list[DataError] = []
        wrong, without = [], 0
        files = {name: (self.work / f"{name}.bin").open("wb") for name in COLUMNS}
        lines, changes = (self.work / "rows.jsonl").open("wb"), (self.temp / "changes.jsonl").open("wb")
        refused = (self.temp / "refused.jsonl").open("wb")
        workers = worker_count(self.data.workers, sum(f.size for f in self.found))
        done = 0
        with bar(self.found, self.console) as progress:
            for source, part, r in results(tagged(self.found, faults, False), mender, make, workers, chunk.process):
                if not self.names or self.names[-1] != part.file:
                    self.names.append(part.file)
                for line in r.lines:
                    lines.write(line)
                changes.writelines(r.changes)
                refused.writelines(r.refused)
                columns = {
                    "places": r.places, "sizes": r.sizes, "groups": r.groups, "tiny": r.tiny,
                    "files": np.full(len(r.lines), len(self.names) - 1), "sources": np.full(len(r.lines), source),
                }  # fmt: skip
                for name, column in columns.items():
                    files[name].write(column.astype(COLUMNS[name]).tobytes())
                finder.add(r.hashes, r.signatures)
                self.read[source] += r.rows
                self.refused[source] += len(r.refused)
                self.changed += r.changed
                self.changed_rows += r.changed_rows
                self.aside += r.reasons
                self.left_out += r.left_out
                if r.sketch is not None and source != self.held_source:
                    self.whole.add(r.sketch, part.file, source)
                if source != self.held_source:
                    without += len(r.no_group)
                    wrong += r.no_group[: 3 - len(wrong)]
                done += r.rows
                progress(part, done)
        for file in (*files.values(), lines, changes, refused):
            file.close()
        raise_all(faults)
        if o.by:
            o.by.require(wrong, without, done)
        return finder

    def _column(self, name: str) -> np.ndarray:
        return np.fromfile(self.work / f"{name}.bin", COLUMNS[name])

    # ---- what needs all rows -----------------------------------------------------------------------------------------------

    def _decide(self, finder: clusters.Finder) -> tuple[np.ndarray, np.ndarray]:
        """What becomes of each row, and of which row it is a copy."""
        o = self.options
        found = finder.clusters()
        near = found.near
        fate = np.zeros(len(near), np.uint8)
        of = np.zeros(len(near), np.uint32)
        fate[self._column("sources") == self.held_source] = HELD
        held = np.flatnonzero(fate == HELD)
        if "empty" in o.fixes and whole.tiny_answers(self.whole):
            fate[(fate == TRAIN) & self._column("tiny")] = TINY
        if "leakage" in o.fixes:
            labels, first = np.unique(near[held], return_index=True)
            at = np.flatnonzero((fate == TRAIN) & np.isin(near, labels))
            fate[at], of[at] = LEAK, held[first][np.searchsorted(labels, near[at])]
        if "dedup" in o.fixes:
            _later(fate, of, found.exact, COPY)
        if "near" in o.fixes:
            _later(fate, of, near, NEAR)
        at = np.flatnonzero(fate == TRAIN)
        if not len(held):
            labels = self._column("groups")[at] if o.by else near[at]
            fate[at[split.choose(labels, o.by, split.wanted(o.size, len(at)), o.seed)]] = HELD
        train, held = np.flatnonzero(fate == TRAIN), np.flatnonzero(fate == HELD)
        if not len(train):
            raise DataError(f"no row is left to train on\n{self._reasons()}", "name fewer fixes with --fix, or mend these rows")
        self.overlap = int(np.isin(near[held], near[train]).sum())
        self.near_left = len(train) - len(np.unique(near[train])) if "dedup" in o.fixes and "near" not in o.fixes else 0
        return fate, of

    def _reasons(self) -> str:
        """The commonest, of rows that were set aside one by one."""
        with (self.temp / "refused.jsonl").open("rb") as f:
            reasons = Counter("{fix}: {reason}".format(**json.loads(line)) for line in f)
        return "\n".join(f"  {n:,} of {counted(self.read.total(), 'row')}: {reason}" for reason, n in reasons.most_common(5))

    def _copies(self, fate: np.ndarray) -> np.ndarray:
        """How often each row is written, as its source's weight says; for a part of a weight, rows are drawn."""
        copies = (fate == TRAIN).astype(np.uint16)
        sources = self._column("sources")
        for number, source in enumerate(self.data.train if self.options.mix else ()):
            own = np.flatnonzero((fate == TRAIN) & (sources == number))
            copies[own] = int(source.weight)
            draw = np.random.default_rng([self.options.seed, number, 0x313])
            copies[draw.permutation(own)[: round((source.weight - int(source.weight)) * len(own))]] += 1
        fate[(fate == TRAIN) & (copies == 0)] = UNDRAWN
        if not copies.any():
            raise DataError("no row is left to train on: the weights draw none", "raise data.train[].weight")
        return copies

    # ---- second pass -------------------------------------------------------------------------------------------------------

    def _second(self, fate: np.ndarray, of: np.ndarray, copies: np.ndarray) -> dict[str, np.ndarray]:
        """Each row to its file; then, for each source, rows and sizes of what was written. Of a weight of 3 the whole source is
        written again and again: copies side by side would be one batch."""
        sources = len(self.found)
        counts = {
            k: np.zeros(sources, np.int64) for k in ("train", "train_lines", "held_out", "refused", "train_size", "held_out_size")
        }
        where = self._places(of[(fate == LEAK) | (fate == COPY) | (fate == NEAR)])
        with (
            (self.temp / "train.jsonl").open("wb") as train,
            (self.temp / "held_out.jsonl").open("wb") as held,
            (self.temp / "refused.jsonl").open("ab") as refused,
        ):
            for again in range(int(copies.max())):
                for row, line, file, place, source, size in self._rows():
                    end = fate[row]
                    if end == TRAIN:
                        if copies[row] > again:
                            train.write(line)
                            counts["train"][source] += not again
                            counts["train_lines"][source] += 1
                            counts["train_size"][source] += size
                    elif again:
                        continue
                    elif end == HELD:
                        held.write(line)
                        counts["held_out"][source] += 1
                        counts["held_out_size"][source] += size
                    else:
                        fix, why = WHY[int(end)]
                        reason = why.format(where.get(int(of[row]), ""))
                        refused.write(
                            chunk.as_line(
                                {"file": self.names[file], "line": place, "fix": fix, "reason": reason, "row": json.loads(line)}
                            )
                        )
                        counts["refused"][source] += 1
                        self.aside[fix] += 1
        return counts

    def _rows(self) -> Iterator[tuple[int, bytes, int, int, int, int]]:
        """Number, text, file, line, source and size of each row that the first pass kept."""
        names = ("files", "places", "sources", "sizes")
        opened = [(self.work / f"{name}.bin").open("rb") for name in names]
        row = 0
        with (self.work / "rows.jsonl").open("rb") as lines:
            while True:
                block = [np.fromfile(f, COLUMNS[name], BLOCK).tolist() for f, name in zip(opened, names, strict=True)]
                if not block[0]:
                    break
                for values in zip(*block, strict=True):
                    yield row, lines.readline(), *values
                    row += 1
        for f in opened:
            f.close()

    def _places(self, rows: np.ndarray) -> dict[int, str]:
        rows = np.unique(rows)
        if not len(rows):
            return {}
        file, line = (np.memmap(self.work / f"{n}.bin", COLUMNS[n], "r")[rows].tolist() for n in ("files", "places"))
        return {int(row): f"{self.names[f]}:{at}" for row, f, at in zip(rows, file, line, strict=True)}

    # ---- the record --------------------------------------------------------------------------------------------------------

    def _record(self, counts: dict[str, np.ndarray]) -> dict[str, Any]:
        o, unit = self.options, "tokens" if self.options.model else "characters"
        told = []
        for n, files in enumerate(self.found):
            held = n == self.held_source
            own = {k: int(v[n]) for k, v in counts.items()}
            refused = self.refused[n] + own["refused"]
            assert self.read[n] == own["train"] + own["held_out"] + refused, "a row is lost, or counted twice"
            told.append(
                {
                    "path": files.label,
                    **({"held_out_file": True} if held else {"weight": self.data.train[n].weight if o.mix else 1.0}),
                    "rows": self.read[n],
                    "train": own["train"],
                    "train_lines": own["train_lines"],
                    "held_out": own["held_out"],
                    "refused": refused,
                    unit: own["train_size"],
                    f"held_out_{unit}": own["held_out_size"],
                    "notes": dict(files.notes),
                }
            )
        total = {k: sum(s[k] for s in told) for k in ("train", "train_lines", "held_out", "refused")}
        names = (chunk.READING, *o.fixes, *(["mix"] if o.mix else []))
        return {
            "made_by": MADE_BY,
            "tunesmith": version("tunesmith"),
            "seed": o.seed,
            "options": {"fix": list(o.fixes), "split": o.size, "split_by": str(o.by) if o.by else "near-equal rows", "mix": o.mix},
            "rows": {"read": sum(s["rows"] for s in told), **total, "changed": self.changed_rows},
            "unit": unit,
            "fixes": {n: {"changed": self.changed[n], "set_aside": self.aside[n]} for n in names},
            "held_out": {"how": self._how(total["held_out"]), "file": self.held_source >= 0, "nearly_in_train": self.overlap},
            "near_duplicates": self.near_left,
            "keys_left_out": dict(self.left_out),
            "sources": told,
        }

    def _how(self, held: int) -> str:
        o = self.options
        if self.held_source >= 0:
            return f"{counted(held, 'row')} of {self.data.held_out}"
        if not held:
            return "no rows" + ("" if not o.size else ": there are too few different ones to split")
        if o.by is None:
            return f"{counted(held, 'row')}, by whole groups of near-equal rows"
        how = "the latest by" if o.by.date else "all or none of each"
        return f"{counted(held, 'row')}, {how} {o.by.key!r}"


def _later(fate: np.ndarray, of: np.ndarray, labels: np.ndarray, end: int) -> None:
    """Of the rows to train on with one label, all but the first."""
    at = np.flatnonzero(fate == TRAIN)
    first = at[split.firsts(labels[at])] if len(at) else at
    copies = at[first != at]
    fate[copies], of[copies] = end, first[first != at]
