"""Sources to examples on disk: read, render, account for every row, find duplicates, split, cache.

    files -> chunks of rows -> (here or in worker processes: parse, format, render, hash) -> one store, in the order of the files

Memory is flat: what there is of each row goes to disk as it comes, and what stays is some ten bytes a row. The result is the same
whatever the number of workers. The cache is found by content: the sha256 of every file, the renderer's fingerprint (template and
tokenizer), the settings that matter and the code itself. A cache that is damaged or half written is made again, never trusted;
beyond CACHE_BYTES what was used longest ago is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from tunesmith.config.schema import Data
from tunesmith.data import clusters, findings, formats, sources
from tunesmith.data.render import Rendered, RowRefused
from tunesmith.data.sources import Chunk, Files, Refused, Row, find, parse, raise_all
from tunesmith.data.store import INDEX, ExampleStore, Packed, StoreWriter
from tunesmith.data.workers import Tagged, no_collector, results, worker_count
from tunesmith.errors import DataError
from tunesmith.files import folder_atomic, remove_folder, sha256, sha256_file, verify, write_atomic
from tunesmith.types import Conversation, Example
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 6  # raise it when the same rows would be prepared differently
HELD_OUT_MOST = 500  # rows a held-out share takes at most
CACHE_BYTES = 20 << 30  # beyond it, what was used longest ago is removed
CACHE_GRACE = 3_600  # seconds for which an entry that was used stays in any case: another process may be about to open it
ENTRY = re.compile("[0-9a-f]{32}(-findings)?")  # a whole entry's name
LEFTOVER = re.compile(rf"\..*|{ENTRY.pattern}-[0-9a-f]{{8}}")  # one that is being made, or was left by a process that died
REASONS_KEPT, EXAMPLES_KEPT = 200, 3


class Renders(Protocol):
    """The part of data/render.py's Renderer that is used here."""

    @property
    def fingerprint(self) -> str: ...

    def examples_many(self, conversations: Sequence[Conversation]) -> Sequence[Rendered | RowRefused]: ...

    def close(self) -> None: ...


# ---- the account ---------------------------------------------------------------------------------------------------------------


@dataclass
class Refusals:
    """Rows refused for one reason: how many, the reason (numbers that differ are N), the first few places."""

    count: int
    reason: str
    places: list[str]


@dataclass
class SourceAccount:
    """What became of one source's rows: each is in exactly one of used, fixed, truncated and refused."""

    path: str
    held_out: bool = False
    rows: int = 0
    used: int = 0
    fixed: int = 0
    truncated: int = 0
    refused: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    fixes: dict[str, int] = field(default_factory=dict)  # how, of all rows that are not refused
    cuts: dict[str, int] = field(default_factory=dict)  # which part
    refusals: dict[str, Refusals] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # files of a folder that were not read
    notes: dict[str, int] = field(default_factory=dict)  # what was passed over in whole files


@dataclass
class Account:
    """What became of every row, what is duplicated, and how the held-out rows were chosen."""

    sources: list[SourceAccount]
    exact_duplicates: int = 0  # rows that repeat an earlier training row
    near_duplicates: int = 0  # rows that nearly do
    held_out_rows: int = 0
    overlap_exact: int = 0  # held-out rows (from a file) that also stand among the training rows
    overlap_near: int = 0
    overlong: list[int] = field(default_factory=list)  # tokens of rows refused for their length (at most 100,000 are kept)
    findings: list[dict[str, Any]] | None = None  # findings.Found.as_dict, the worst first; None: not looked for

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.sources)

    @property
    def refused(self) -> int:
        return sum(s.refused for s in self.sources)

    def counts(self) -> dict[str, int]:
        """Rows by class over all sources, for the model card; the classes sum to `rows`."""
        return {c: sum(getattr(s, c) for s in self.sources) for c in ("used", "fixed", "truncated", "refused")}

    def reasons(self) -> list[Refusals]:
        """Refusals of all sources by reason, the most frequent first."""
        merged: dict[str, Refusals] = {}
        for source in self.sources:
            for key, r in source.refusals.items():
                into = merged.setdefault(key, Refusals(0, r.reason, []))
                into.count += r.count
                into.reason = _shared(into.reason, r.reason)
                into.places = (into.places + r.places)[:EXAMPLES_KEPT]
        return sorted(merged.values(), key=lambda r: -r.count)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Account:
        value = json.loads(path.read_text())
        value["sources"] = [
            SourceAccount(**s | {"refusals": {k: Refusals(**r) for k, r in s["refusals"].items()}}) for s in value["sources"]
        ]
        return cls(**value)


# ---- the result ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Everything training reads of the data. `folder` holds account.json, refused.jsonl, held_out.jsonl and store/."""

    folder: Path
    fingerprint: str
    train: ExampleStore
    held_out: ExampleStore
    account: Account
    data: Data  # the settings it was prepared with

    def conversations(self) -> Iterator[Conversation]:
        """The held-out rows as they were said, in the order of `held_out`, for questions before and after."""
        with (self.folder / "held_out.jsonl").open(encoding="utf-8") as f:
            for line in f:
                yield formats.from_dict(json.loads(line))

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each training source."""
        return tuple(s.weight for s in self.data.train)

    @property
    def epoch_size(self) -> int:
        """Examples in an epoch, the same in each."""
        counts = np.bincount(self.train.column("source"), minlength=len(self.weights))
        return int(sum(int(w) * n + _part(w, n) for w, n in zip(self.weights, counts.tolist(), strict=True)))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch (positions in `train`, int64), shuffled. A source of weight 2.5 comes twice, and half of it
        again; which half is drawn anew each epoch. Follows from (seed, epoch) alone.
        """
        draw = np.random.default_rng([seed, epoch, 0xE70C])
        chosen = []
        for source, weight in enumerate(self.weights):
            own = np.flatnonzero(self.train.column("source") == source)
            chosen += [own] * int(weight) + [draw.permutation(own)[: _part(weight, len(own))]]
        return draw.permutation(np.concatenate(chosen))

    def require(self, max_refused: float) -> Prepared:
        """Itself, or DataError when more than `max_refused` of the rows were refused or when there is nothing to train."""
        account = self.account
        if account.refused > max_refused * account.rows:
            share = account.refused / account.rows
            top = [f"  {counted(r.count, 'row')}: {r.reason} ({', '.join(r.places)})" for r in account.reasons()[:5]]
            were = "was" if account.refused == 1 else "were"
            raise DataError(
                f"{account.refused:,} of {counted(account.rows, 'row')} ({share:.1%}) {were} refused;"
                f" data.max_refused is {max_refused}\n" + "\n".join(top),
                f"mend these rows (all are listed in {self.folder / 'refused.jsonl'})"
                + (f", or set data.max_refused: {np.ceil(share * 1000) / 1000:.3g} to go on without them" if share < 0.999 else ""),
            )
        if sum(s.trained for s in account.sources) == self.held_out.trained.sum():
            raise DataError(
                f"no token to train on in {counted(account.rows, 'row')}", "look at what each row became: tunesmith check"
            )
        return self


def _part(weight: float, n: int) -> int:
    return round((weight - int(weight)) * n)


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where prepared data is kept: TUNESMITH_CACHE, or ~/.cache/tunesmith."""
    return (cache_dir or Path(os.environ.get("TUNESMITH_CACHE") or "~/.cache/tunesmith").expanduser()) / "prepared"


def cached_lengths(data: Data, model: str | Path, seed: int = 0, cache_dir: Path | None = None) -> np.ndarray | None:
    """Tokens of each training example, int64 [N], when this data has been prepared for this model before; None otherwise.

    A quick look for an estimate, without a tokenizer: it does not read the sources again, so it may be older than they are.
    """
    root = cache_folder(cache_dir)
    try:
        name = json.loads((root / f"latest-{_question(data, model, seed)}.json").read_text())["folder"]
        lengths = _load(root / str(name), data).train.lengths
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return lengths if lengths.all() else None  # zeros: the machine died before they were on the disk


def prepare(
    data: Data,
    make_renderer: Callable[[], Renders],
    *,
    seed: int,
    renderer: Renders | None = None,
    cache_dir: Path | None = None,
    progress: Console | None = None,
    model: str | Path = "",
    strict: bool = True,
    look: bool = False,
) -> Prepared:
    """Read, render and split the data, or take it from the cache.

    make_renderer: picklable (functools.partial of an imported function), as each worker process builds its own renderer with it.
    renderer: one that `make_renderer` made already, so that it is not made again here.
    progress: where a bar is shown if it is a terminal, and a line told when old entries of the cache are removed.
    model: the checkpoint's folder, under which `cached_lengths` finds the result.
    look: look for faults in the rows (data/findings), for a fifth more time; what was looked at once serves a run too.
    strict: raise when too many rows are refused or nothing is trained (`Prepared.require`); `check` says False.
    Raises DataError with all faults of all files at once.
    """
    renderer = renderer or make_renderer()
    found = find_all(data)
    key = _fingerprint(data, renderer.fingerprint, seed, found)
    root = cache_folder(cache_dir)
    name = sha256(key + _code())[:32]  # the fingerprint is without the code: a run goes on under one that prepares the same
    folder = root / f"{name}-findings"
    if not look and not folder.is_dir():
        folder = root / name
    with suppress(FileNotFoundError, PermissionError):
        os.utime(folder)  # used now: `_prune` of another process leaves it alone while it is verified
    if built := not (folder.is_dir() and not verify(folder)):
        with bar(found, progress) as report:
            _build(folder, data, renderer, seed, found, report, make_renderer, look)
    prepared = _load(folder, data, key)
    if built:
        _prune(root, progress)
    if model:
        write_atomic(root / f"latest-{_question(data, model, seed)}.json", json.dumps({"folder": folder.name}), durable=False)
    return prepared.require(data.max_refused) if strict else prepared


def find_all(data: Data) -> list[Files]:
    """The files of every training source, then those of the held-out file if there is one."""
    found, faults = [], []
    wanted = [(s.path, s.columns) for s in data.train]
    if isinstance(data.held_out, str):  # it is like the training rows: where those agree on the columns, so are its
        same = all(columns == wanted[0][1] for _, columns in wanted)
        wanted.append((data.held_out, wanted[0][1] if same else {}))
    for path, columns in wanted:
        try:
            found.append(find(path, columns))
        except DataError as e:
            faults.append(e)
    raise_all(faults)
    return found


def _settings(data: Data) -> dict[str, Any]:
    """The settings that change what is stored."""
    return data.model_dump(mode="json", exclude={"train", "max_refused", "workers"})


def _question(data: Data, model: str | Path, seed: int) -> str:
    """Names the newest result for these settings, whatever the files hold now."""
    return sha256(
        json.dumps([_settings(data), [[s.path, s.columns] for s in data.train], os.path.abspath(model), seed], sort_keys=True)
    )[:32]


def _fingerprint(data: Data, renderer: str, seed: int, found: list[Files]) -> str:
    files = [[f.label, [[str(p), sha256_file(p)] for p in f.paths], f.skipped, dict(f.columns)] for f in found]
    drawn = seed if not isinstance(data.held_out, str) and data.held_out else 0
    return sha256(json.dumps([VERSION, renderer, drawn, _settings(data), files], sort_keys=True))


@cache
def _code() -> str:
    """sha256 of all that reads, renders and looks at rows: what other code prepared is not found, even if nobody raised VERSION."""
    here = Path(__file__).parent
    files = sorted(f for f in (*here.rglob("*"), here.with_name("tokenizer.py")) if f.suffix in (".py", ".bin"))
    return sha256("".join(map(sha256_file, files)))


def _load(folder: Path, data: Data, fingerprint: str = "") -> Prepared:
    store = ExampleStore(folder / "store")
    held = np.load(folder / "held_out.npy", allow_pickle=False)
    is_held = np.zeros(len(store), bool)
    is_held[held] = True
    account = Account.load(folder / "account.json")
    prepared = Prepared(folder, fingerprint, store.subset(np.flatnonzero(~is_held)), store.subset(held), account, data)
    _hold(prepared)
    return prepared


# ---- the cache's size ----------------------------------------------------------------------------------------------------------


def _hold(prepared: Prepared) -> None:
    """Keep its entry from being pruned for as long as `prepared` lives: a lock that users share, freed however a process ends.
    Windows needs none: there a folder with open or mapped files cannot be renamed.
    """
    if fcntl is not None:
        fd = os.open(prepared.folder / "manifest.json", os.O_RDONLY)
        weakref.finalize(prepared, os.close, fd)
        with suppress(OSError):  # a file system without locks: `_free` never takes one there either, and nothing is pruned
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def _free(entry: Path) -> Iterator[bool]:
    """Whether nobody uses the entry, and nobody can begin to inside."""
    if fcntl is None:
        yield True
        return
    try:
        fd = os.open(entry / "manifest.json", os.O_RDONLY)
    except FileNotFoundError:  # damaged, so nobody could use it, or another process was quicker
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(fd)


def _prune(root: Path, console: Console | None) -> None:
    """Remove the entries used longest ago until the cache holds at most CACHE_BYTES; none that is in use or was within CACHE_GRACE.

    A crash leaves an entry whole or hidden under another name, which `_clear_leftovers` removes.
    """
    entries = []
    for path in root.iterdir():
        if ENTRY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another process was quicker
                entries.append((path.stat().st_mtime, sum(p.stat().st_size for p in path.rglob("*")), path))
    excess, removed = sum(size for _, size, _ in entries) - CACHE_BYTES, []
    for used, size, path in sorted(entries):
        if excess <= 0 or time.time() - used < CACHE_GRACE:
            break
        with _free(path) as free:
            if free:
                with suppress(FileNotFoundError, PermissionError):  # gone already; in use (Windows)
                    remove_folder(path)
                    excess -= size
                    removed.append(size)
    if removed and console is not None:
        sets = counted(len(removed), "prepared data set")
        limit = f"more than {CACHE_BYTES / 1e9:.3g} GB were kept"
        console.print(f"cache: removed the {sets} used longest ago ({sum(removed) / 1e9:.3g} GB) from {root}: {limit}")


# ---- one chunk -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Result:
    """What one chunk of rows became. Row numbers count from the chunk's first row."""

    rows: int
    refused: list[tuple[int, Refused]]
    fixed: int
    truncated: int
    fixes: Counter[str]
    cuts: Counter[str]
    formats: Counter[str]
    packed: Packed
    used: np.ndarray  # row numbers that are not refused
    hashes: np.ndarray
    signatures: np.ndarray
    overlong: list[int]
    scan: findings.Scan | None  # where faults are looked for


def _process(chunk: Chunk, renderer: Renders) -> _Result:
    """Parse, format, render and hash the rows of a chunk."""
    parsed = parse(chunk)
    refused: list[tuple[int, Refused]] = []
    told: list[Conversation] = []
    numbers: list[int] = []
    kind_of: list[str] = []
    for i, row in enumerate(parsed):
        if isinstance(row, Refused):
            refused.append((i, row))
            continue
        try:
            told.append(formats.conversation(row))
            numbers.append(i)
            kind_of.append(formats.detect(row.value) or "")
        except formats.FormatError as e:
            refused.append((i, Refused(row.origin, e.reason, _preview(row))))
    examples: list[Example] = []
    rows_of: list[int] = []
    used: list[int] = []
    kept: list[int] = []  # positions in `told`
    fixes: Counter[str] = Counter()
    cuts: Counter[str] = Counter()
    fixed, overlong = 0, []
    for k, (i, c, rendered) in enumerate(zip(numbers, told, renderer.examples_many(told), strict=True)):
        if isinstance(rendered, RowRefused):
            reason = "; ".join(filter(None, (rendered.what, rendered.fix)))
            refused.append((i, Refused(c.origin, reason, _preview(parsed[i]))))
            if rendered.tokens:
                overlong.append(rendered.tokens)
            continue
        if not any(e.learn.any() for e in rendered.examples):
            refused.append((i, Refused(c.origin, "no token of it is trained", _preview(parsed[i]))))
            continue
        used.append(i)
        kept.append(k)
        mended = dict.fromkeys(c.fixes + rendered.notes)
        fixes.update(list(mended))
        if rendered.truncated:
            cuts[rendered.truncated] += 1
        elif mended:
            fixed += 1
        for e in rendered.examples:
            examples.append(e)
            rows_of.append(i)
    refused.sort(key=lambda r: r[0])
    if not chunk.look:
        told, kept, kind_of_kept = [told[k] for k in kept], list(range(len(kept))), []
    else:
        kind_of_kept = kind_of
    texts = [clusters.normalised(c) for c in told]  # findings are told of refused rows too: they will be mended
    shingles = clusters.Shingles(texts)
    return _Result(
        rows=len(parsed),
        refused=refused,
        fixed=fixed,
        truncated=sum(cuts.values()),
        fixes=fixes,
        cuts=cuts,
        formats=Counter(kind_of),
        packed=Packed.of(examples, rows_of),
        used=np.array(used, np.int64),
        hashes=clusters.text_hashes([clusters.letters(told[k]) for k in kept]),
        signatures=clusters.signatures(shingles)[kept],
        overlong=overlong,
        scan=findings.scan(told, texts, shingles, kind_of_kept) if chunk.look else None,
    )


def _preview(row: Row | Refused) -> str:
    if isinstance(row, Refused):
        return row.preview
    return row.value[:300] if isinstance(row.value, str) else json.dumps(row.value, ensure_ascii=False, default=str)[:300]


# ---- all of it -----------------------------------------------------------------------------------------------------------------


def tagged(found: list[Files], faults: list[DataError], look: bool) -> Iterator[Tagged]:
    """The chunks of every source; faults are collected, so that one bad source does not hide another's."""
    for number, files in enumerate(found):
        try:
            for chunk in sources.chunks(files):
                yield number, replace(chunk, look=look, rest=files.rest)
        except DataError as e:
            faults.append(e)


def _build(
    folder: Path,
    data: Data,
    renderer: Renders,
    seed: int,
    found: list[Files],
    report: Callable[[Chunk, int], None],
    make_renderer: Callable[[], Renders],
    look: bool,
) -> None:
    """Fill `folder`, at once or not at all. Two processes may build it at the same time: the first to finish wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder.parent)
    own = folder.with_name(f"{folder.name}-{token_hex(4)}")
    sums: dict[str, str] = {}
    with folder_atomic(own, durable=False, known=sums) as temp, no_collector():  # `prepare` verifies it whenever it is used again
        sums |= _fill(temp, data, renderer, seed, found, report, make_renderer, look)
    if folder.exists():
        if not verify(folder):
            remove_folder(own)
            return
        remove_folder(folder)
    try:
        os.rename(own, folder)
    except OSError:
        if verify(folder):  # not because another process was quicker
            raise
        remove_folder(own)


def _clear_leftovers(root: Path) -> None:
    """Remove what a process that died left here, once it is a day old."""
    for path in root.iterdir():
        if path.is_dir() and LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > 86_400:
            shutil.rmtree(path, ignore_errors=True)


def _fill(
    temp: Path, data: Data, renderer: Renders, seed: int, found: list[Files], report, make_renderer, look: bool
) -> dict[str, str]:
    """Everything that a prepared folder holds. Returns the sha256 of the store's files by their names in it."""
    held_source = len(data.train) if isinstance(data.held_out, str) else -1
    account = Account([SourceAccount(f.label, n == held_source, skipped=list(f.skipped)) for n, f in enumerate(found)])
    faults: list[DataError] = []
    writer, done = StoreWriter(temp / "store"), 0
    workers = worker_count(data.workers, sum(f.size for f in found))
    doctor = findings.Doctor()
    finder, used_path = clusters.Finder(temp / "clusters"), temp / "clusters" / "used.bin"  # used: their row numbers, uint32
    with (temp / "refused.jsonl").open("w", encoding="utf-8") as refused_file, used_path.open("wb") as used_file:
        for number, chunk, result in results(tagged(found, faults, look), renderer, make_renderer, workers, _process):
            _book(account.sources[number], result, chunk.file)
            for i, r in result.refused:
                place = {"row": done + i + 1, "file": r.origin.file, "line": r.origin.line}
                entry = {**place, "reason": r.reason, "begins": r.preview}
                refused_file.write(json.dumps(entry) + "\n")
            account.overlong += result.overlong[: 100_000 - len(account.overlong)]
            writer.append(result.packed, file=chunk.file, source=number, row=done)
            finder.add(result.hashes, result.signatures)
            if result.scan is not None:
                doctor.add(result.scan, chunk.file, number)
            used_file.write((result.used + done).astype(np.uint32).tobytes())
            done += result.rows
            report(chunk, done)
    raise_all(faults)
    writer.close()
    for source, files in zip(account.sources, found, strict=True):
        source.notes = dict(files.notes)
        assert source.rows == source.used + source.fixed + source.truncated + source.refused, "a row is in no class, or in two"

    chosen, repeats = _choose(account, data, seed, finder, workers)
    held = np.memmap(used_path, np.uint32, "r")[chosen] if len(chosen) else np.zeros(0, np.uint32)
    if look:
        account.findings = [f.as_dict() for f in doctor.found(_places(temp / "store", used_path, repeats))]
    shutil.rmtree(temp / "clusters")
    np.save(temp / "held_out.npy", _examples_of(temp / "store", held), allow_pickle=False)
    _write_conversations(temp / "held_out.jsonl", found, held)
    account.held_out_rows = len(held)
    account.save(temp / "account.json")
    return {f"store/{name}": digest for name, digest in writer.sums.items()}


def _places(store: Path, used: Path, repeats: dict[str, tuple[int, np.ndarray]]) -> dict[str, tuple[int, list[str]]]:
    """Findings that the clusters tell, with the places of their first rows."""
    out: dict[str, tuple[int, list[str]]] = {}
    for name, (count, first) in repeats.items():
        if count:
            rows = np.memmap(used, np.uint32, "r")[first]
            opened = ExampleStore(store)
            at = _examples_of(store, rows)
            places = dict.fromkeys(str(opened.origin(int(i))) for i in at.tolist())  # a row may have several examples
            out[name] = count, list(places)[:EXAMPLES_KEPT]
    return out


def _examples_of(store: Path, rows: np.ndarray) -> np.ndarray:
    """Positions of the examples of these rows. The index is read, not mapped: mapped pages would count as memory."""
    at, found = 0, [np.zeros(0, np.int64)]
    with (store / "index.bin").open("rb") as f:
        while len(index := np.fromfile(f, INDEX, 1 << 16)):
            found.append(at + np.flatnonzero(np.isin(index["row"], rows)))
            at += len(index)
    return np.concatenate(found)


def _book(source: SourceAccount, result: _Result, file: str) -> None:
    """Add a chunk's counts to its source's account."""
    refused = len(result.refused)
    source.rows += result.rows
    source.refused += refused
    source.truncated += result.truncated
    source.fixed += result.fixed
    source.used += len(result.used) - result.truncated - result.fixed
    source.examples += len(result.packed.index)
    source.tokens += len(result.packed.ids)
    source.trained += int(result.packed.learn.sum())
    for into, new in ((source.fixes, result.fixes), (source.cuts, result.cuts), (source.formats, result.formats)):
        for name, count in new.items():
            into[name] = into.get(name, 0) + count
    for _, r in result.refused:
        key = re.sub(r"\d[\d,.]*", "#", r.reason)
        if key not in source.refusals and len(source.refusals) >= REASONS_KEPT:
            key = "other reasons"
        entry = source.refusals.setdefault(key, Refusals(0, r.reason if key != "other reasons" else key, []))
        entry.count += 1
        if entry.reason != key:
            entry.reason = _shared(entry.reason, r.reason)
        if len(entry.places) < EXAMPLES_KEPT:
            entry.places.append(str(r.origin))


def _shared(a: str, b: str) -> str:
    """Two reasons that differ in their numbers as one: `536 tokens, the limit is 512` and `600 tokens ...` -> `N tokens ...`."""
    if a == b:
        return a
    left, right = (re.split(r"(\d[\d,.]*|\bN\b)", t) for t in (a, b))
    return "".join(x if x == y else "N" for x, y in zip(left, right, strict=False)) if len(left) == len(right) else a


def _choose(
    account: Account, data: Data, seed: int, finder: clusters.Finder, threads: int
) -> tuple[np.ndarray, dict[str, tuple[int, np.ndarray]]]:
    """Count duplicates and choose the held-out rows: which of the rows that are used, sorted. Then, for each finding of this kind,
    its count and its first rows."""
    found = finder.clusters(threads)
    train = sum(s.rows - s.refused for s in account.sources if not s.held_out)  # rows of the held-out file come behind them
    among = found.among(train)
    account.exact_duplicates, account.near_duplicates = among.exact_duplicates, among.near_duplicates
    repeats = {
        "exact_duplicates": (among.exact_duplicates, among.repeats(EXAMPLES_KEPT)[0]),
        "near_duplicates": (among.near_duplicates, among.repeats(EXAMPLES_KEPT)[1]),
    }
    if isinstance(data.held_out, str):
        exact, near = found.exact[train:] < train, found.near[train:] < train
        account.overlap_exact, account.overlap_near = int(exact.sum()), int((near & ~exact).sum())
        repeats["leakage"] = int((exact | near).sum()), train + np.flatnonzero(exact | near)[:EXAMPLES_KEPT]
        return np.arange(train, finder.rows), repeats
    wanted = min(HELD_OUT_MOST, max(1, round(data.held_out * train))) if data.held_out else 0
    return clusters.held_out_rows(found.near, wanted, seed), repeats


def _write_conversations(path: Path, found: list[Files], held: np.ndarray) -> None:
    """The held-out rows again, as conversations: a second reading of as much of the files as it takes."""
    wanted, start = set(held.tolist()), 0
    with path.open("w", encoding="utf-8") as f:
        for _, chunk in tagged(found, [], False):
            if not wanted:
                return
            here = [i for i in range(len(chunk.lines)) if start + i in wanted]
            start += len(chunk.lines)
            some = replace(chunk, lines=[chunk.lines[i] for i in here], items=[chunk.items[i] for i in here])
            for row in parse(some):
                if isinstance(row, Refused):
                    raise DataError(f"{chunk.file}: changed while it was read", "run it again when nothing writes to the file")
                said = replace(formats.conversation(row), fields=formats.fields(row))
                f.write(json.dumps(formats.to_dict(said), ensure_ascii=False, default=str) + "\n")
            wanted -= {start - len(chunk.lines) + i for i in here}


@contextmanager
def bar(found: list[Files], console: Console | None) -> Iterator[Callable[[Chunk, int], None]]:
    """A bar on a terminal; yields what is to be called after each chunk with the rows done so far."""
    if console is None or not console.is_terminal:
        yield lambda chunk, rows: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    sizes = {str(p): p.stat().st_size for f in found for p in f.paths}
    read: dict[str, int] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:  # no thread: see _start_method
        task = progress.add_task("preparing", total=max(1, sum(sizes.values())))

        def report(chunk: Chunk, rows: int) -> None:
            read[chunk.file] = chunk.position
            progress.update(task, completed=sum(read.values()), description=f"preparing {counted(rows, 'row')}", refresh=True)

        yield report
