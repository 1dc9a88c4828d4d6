"""Preparation: every row in one class, the same result whatever the workers, splits by cluster, caches that are honest."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tunesmith.config.schema import Data
from tunesmith.data import prepare as prepare_module
from tunesmith.data import workers
from tunesmith.data.prepare import Prepared, cached_lengths, prepare
from tunesmith.errors import DataError

# A renderer in a file of its own, so that worker processes can import it: one token a byte, answers learned.
STUB = """
import numpy as np
from tunesmith.data.render import Rendered, RowRefused
from tunesmith.types import Example

class Stub:
    def __init__(self, max_length=300, overlength="refuse", learn=True):
        self.max_length, self.overlength, self.learn = max_length, overlength, learn
        self.fingerprint = f"stub {max_length} {overlength} {learn}"

    def close(self):
        pass

    def examples_many(self, conversations):
        return [self.one(c) for c in conversations]

    def one(self, c):
        ids, learn, notes = [256], [False], ()
        for m in c.messages:
            text = m.content.encode() + b"\\n"
            if "crash" in m.content:
                import os; os._exit(1)
            if "unrenderable" in m.content:
                return RowRefused("the template has no such role", "name another template")
            if "merge" in m.content:
                notes = ("merged same-role turns",)
            ids += text
            learn += [self.learn and m.role in ("assistant", "completion", "text")] * len(text)
        cut = ""
        if len(ids) > self.max_length:
            if self.overlength == "refuse":
                return RowRefused(f"{len(ids)} tokens, and data.max_length is {self.max_length}", tokens=len(ids))
            ids, learn, cut = ids[: self.max_length], learn[: self.max_length], "the end of the answer"
        both = Example(np.array(ids, np.int32), np.array(learn), c.origin)
        return Rendered((both, both) if "twice" in c.messages[0].content else (both,), notes, cut)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stub_for_prepare.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    from stub_for_prepare import Stub

    yield Stub
    import sys

    del sys.modules["stub_for_prepare"]


def rows(n, seed=0, start=0):
    draw = np.random.default_rng(seed)
    return [{"question": f"{start + i}? " + " ".join(draw.choice(WORDS, 12)), "answer": f"a{start + i}"} for i in range(n)]


WORDS = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "nrst"]


def write(path: Path, values, tail="") -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values) + tail)
    return str(path)


def run(tmp_path, stub, train, cache="cache", strict=True, **data) -> Prepared:
    return prepare(Data(train=train, **data), stub, seed=data.pop("seed", 0), cache_dir=tmp_path / cache, strict=strict)


def content(p: Prepared):
    return {
        str(f.relative_to(p.folder)): f.read_bytes()
        for f in sorted(p.folder.rglob("*"))
        if f.is_file() and f.name != "manifest.json"
    }


def test_every_row_is_in_one_class(tmp_path, stub):
    good = rows(20)
    bad = [{"question": "unrenderable", "answer": "a"}, {"foo": 1}, {"question": "q", "answer": "x" * 400}]
    fixed = [{"question": "merge this", "answer": 1}]
    path = write(tmp_path / "a.jsonl", good + bad + fixed, '{"cut\n[1]\n')
    p = run(tmp_path, stub, path, strict=False, held_out=0)
    (s,) = p.account.sources
    assert (s.rows, s.used, s.fixed, s.truncated, s.refused) == (26, 20, 1, 0, 5)
    assert p.account.counts() == {"used": 20, "fixed": 1, "truncated": 0, "refused": 5}
    assert s.fixes == {"number read as text": 1, "merged same-role turns": 1}
    assert s.formats["question_answer"] == 23
    refused = [json.loads(line) for line in (p.folder / "refused.jsonl").read_text().splitlines()]
    assert [(r["row"], r["line"]) for r in refused] == [(21, 21), (22, 22), (23, 23), (25, 25), (26, 26)]
    assert "no such role; name another template" in refused[0]["reason"] and "unrenderable" in refused[0]["begins"]
    assert p.account.overlong == [404]
    p = run(tmp_path, lambda: stub(overlength="truncate"), path, strict=False, held_out=0)
    (s,) = p.account.sources
    assert (s.used, s.fixed, s.truncated, s.refused, s.cuts) == (20, 1, 1, 4, {"the end of the answer": 1})


def test_the_store_holds_what_the_renderer_gave_in_the_order_of_the_files(tmp_path, stub):
    a, b = rows(5), [{"question": "twice", "answer": "b"}, *rows(3, 1)]
    p = run(tmp_path, stub, [write(tmp_path / "b.jsonl", b), write(tmp_path / "a.jsonl", a)], held_out=0)
    texts = [bytes(e.ids[1:].astype(np.uint8)).decode() for e in p.train]
    assert texts == [f"{r['question']}\n{r['answer']}\n" for r in [b[0], *b, *a]]
    assert [e.learn.sum() for e in p.train] == [len(r["answer"]) + 1 for r in [b[0], *b, *a]]
    assert [(Path(e.origin.file).name, e.origin.line) for e in p.train][:6] == [("b.jsonl", 1)] * 2 + [
        ("b.jsonl", 2),
        ("b.jsonl", 3),
        ("b.jsonl", 4),
        ("a.jsonl", 1),
    ]
    assert p.train.column("source").tolist() == [0] * 5 + [1] * 5


def test_too_many_refused_rows_stop_with_reasons_counts_and_places(tmp_path, stub):
    path = write(
        tmp_path / "a.jsonl", rows(90) + [{"question": "x" * (400 + i), "answer": "a"} for i in range(8)] + [{"foo": 1}] * 2
    )
    with pytest.raises(DataError) as e:
        run(tmp_path, stub, path)
    assert "10 of 100 rows (10.0%) were refused; data.max_refused is 0.01" in e.value.what
    assert f"8 rows: N tokens, and data.max_length is 300 ({path}:91, {path}:92, {path}:93)" in e.value.what
    assert "2 rows: no known format has these keys: foo" in e.value.what
    assert "data.max_refused: 0.1" in e.value.fix and "refused.jsonl" in e.value.fix
    assert len(run(tmp_path, stub, path, max_refused=0.1).train) == 90 - 4  # 5 % of 90 are held out


def test_nothing_to_train_is_an_error(tmp_path, stub):
    path = write(tmp_path / "a.jsonl", rows(3))
    with pytest.raises(DataError, match="no token of it is trained"):
        run(tmp_path, lambda: stub(learn=False), path)
    p = run(tmp_path, stub, path, held_out=0)
    assert p.require(0.0) is p


def test_all_faults_of_all_sources_at_once(tmp_path, stub):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin1"))
    good = write(tmp_path / "good.jsonl", rows(3))
    with pytest.raises(DataError) as e:
        run(tmp_path, stub, [str(tmp_path / "empty.jsonl"), good, str(tmp_path / "latin.csv")])
    assert len(e.value.what.splitlines()) == 2 and "empty" in e.value.what and "latin1" in e.value.fix
    with pytest.raises(DataError) as e:
        run(tmp_path, stub, ["nowhere.jsonl", "nothing.csv"])
    assert len(e.value.what.splitlines()) == 2
    assert not [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir()]  # nothing half made stays


METHODS = [
    pytest.param("fork", marks=pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")),
    "spawn",
]


@pytest.mark.parametrize("method", METHODS)
def test_workers_change_nothing(tmp_path, stub, monkeypatch, method):
    monkeypatch.setattr(workers, "_start_method", lambda: method)
    monkeypatch.setattr(workers, "INLINE_ROWS", 100)
    monkeypatch.setattr(prepare_module.sources, "CHUNK_ROWS", 40)
    bad = [{"foo": 1}, {"question": "merge", "answer": "x"}, {"question": "twice", "answer": "z"}]
    train = [write(tmp_path / "a.jsonl", rows(150) + bad), write(tmp_path / "b.jsonl", rows(150, 1, 500) + bad, "junk\n")]
    one = run(tmp_path, stub, train, "one", workers=1, max_refused=0.5)
    started = []
    real = multiprocessing.get_context(method).Process.start
    monkeypatch.setattr(multiprocessing.get_context(method).Process, "start", lambda self: started.append(1) or real(self))
    two = run(tmp_path, stub, train, "two", workers=2, max_refused=0.5)
    assert len(started) == 2
    assert one.fingerprint == two.fingerprint and content(one) == content(two)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_worker_has_the_renderer_with_all_it_has_seen(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(workers, "_start_method", lambda: "fork")
    monkeypatch.setattr(workers, "INLINE_ROWS", 10)
    monkeypatch.setattr(prepare_module.sources, "CHUNK_ROWS", 10)
    made = []
    prepare(
        Data(train=write(tmp_path / "a.jsonl", rows(100)), workers=2),
        lambda: made.append(1) or stub(),  # cannot be pickled
        seed=0,
        cache_dir=tmp_path / "c",
    )
    assert made == [1]


def test_workers_are_forked_only_where_that_is_safe(monkeypatch):
    import threading

    monkeypatch.setattr(workers.threading, "active_count", lambda: 1)
    for system, method in (("linux", "fork"), ("darwin", "spawn"), ("win32", "spawn")):
        monkeypatch.setattr(workers.sys, "platform", system)
        assert workers._start_method() == method
    monkeypatch.undo()
    monkeypatch.setattr(workers.sys, "platform", "linux")
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert workers._start_method() == "spawn"
    end.set()
    thread.join()


def test_auto_gives_each_worker_enough_to_be_worth_its_start(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for method, some in (("fork", 4), ("spawn", 1)):
        monkeypatch.setattr(workers, "_start_method", lambda method=method: method)
        sizes = (0, 900_000, 4_200_000, 1 << 40)
        assert [workers.worker_count("auto", size) for size in sizes] == [1, 1, some, workers.MAX_WORKERS]
        assert workers.worker_count(0, 1 << 40) == 1 and workers.worker_count(3, 0) == 3


def test_the_bar_starts_no_thread_so_that_workers_can_be_forked(tmp_path, stub, monkeypatch):
    import io
    import threading

    from rich.console import Console

    seen, real = [], prepare_module._process
    monkeypatch.setattr(prepare_module, "_process", lambda *a: seen.append(threading.active_count()) or real(*a))
    out, before = io.StringIO(), threading.active_count()
    path = write(tmp_path / "a.jsonl", rows(30))
    prepare(Data(train=path), stub, seed=0, cache_dir=tmp_path / "c", progress=Console(file=out, force_terminal=True))
    assert seen == [before] and "preparing 30 rows" in out.getvalue()


ORPHANS = """
import os, sys, time
from pathlib import Path
from stub_for_prepare import Stub
from tunesmith.config.schema import Data
from tunesmith.data import prepare as p, workers

def slow(chunk, renderer, real=p._process):
    print(os.getpid(), flush=True)
    time.sleep(0.2)
    return real(chunk, renderer)

workers._start_method, workers.INLINE_ROWS, p.sources.CHUNK_ROWS = lambda: "fork", 10, 10
p._process = slow
p.prepare(Data(train=sys.argv[1], workers=2), Stub, seed=0, cache_dir=Path(sys.argv[2]))
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_workers_end_with_a_parent_that_is_killed(tmp_path, stub):
    import subprocess
    import sys

    path = write(tmp_path / "a.jsonl", rows(5_000))
    paths = os.pathsep.join([str(tmp_path / "lib"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, path, str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    pids: set[str] = set()
    while len(pids) < 3:  # the parent's own, then those of both workers
        pids.add(process.stdout.readline())
    process.kill()
    process.stdout.read()  # comes to its end only when nobody has the pipe open any more
    process.wait()


def test_a_worker_that_dies_is_an_error_with_a_fix(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(workers, "INLINE_ROWS", 10)
    monkeypatch.setattr(prepare_module.sources, "CHUNK_ROWS", 10)
    path = write(tmp_path / "a.jsonl", [*rows(30), {"question": "crash", "answer": "a"}])
    with pytest.raises(DataError, match="has died") as e:
        run(tmp_path, stub, path, workers=2)
    assert "data.workers: 1" in e.value.fix


def test_the_held_out_share_never_shares_a_cluster_with_training(tmp_path, stub):
    base = rows(60)
    path = write(tmp_path / "a.jsonl", [r for r in base for _ in range(3)])
    seen = set()
    for seed in range(3):
        p = prepare(Data(train=path, held_out=0.1), stub, seed=seed, cache_dir=tmp_path / "c")
        train, held = ({bytes(e.ids) for e in s} for s in (p.train, p.held_out))
        assert not train & held
        assert (len(p.train), len(p.held_out), p.account.held_out_rows) == (162, 18, 18)
        assert (p.account.exact_duplicates, p.account.near_duplicates) == (120, 0)
        said = [c.messages[0].content + "\n" + c.messages[1].content + "\n" for c in p.conversations()]
        assert said == [bytes(e.ids[1:].astype(np.uint8)).decode() for e in p.held_out]
        seen.add(tuple(sorted(held)))
    assert len(seen) == 3


def test_held_out_is_at_most_500_rows_at_least_one_and_none_for_zero(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(prepare_module, "HELD_OUT_MOST", 7)
    path = write(tmp_path / "a.jsonl", rows(40))
    assert len(run(tmp_path, stub, path, held_out=0.5).held_out) == 7
    assert len(run(tmp_path, stub, path, held_out=0.001).held_out) == 1
    assert len(run(tmp_path, stub, path, held_out=0).held_out) == 0
    one = write(tmp_path / "one.jsonl", rows(1))
    assert (len(run(tmp_path, stub, one).train), len(run(tmp_path, stub, one).held_out)) == (1, 0)


def test_a_held_out_file_reports_its_overlap(tmp_path, stub):
    train, own = rows(50), rows(10, 7, 900)
    train[3]["question"] = " ".join(np.random.default_rng(5).choice(WORDS, 48))
    near = dict(train[3], answer="another")
    held = write(tmp_path / "held.jsonl", [*own, train[0], train[1], near, own[0]])
    p = run(tmp_path, stub, write(tmp_path / "a.jsonl", train), held_out=held)
    assert (len(p.train), len(p.held_out)) == (50, 14)
    assert (p.account.overlap_exact, p.account.overlap_near, p.account.exact_duplicates) == (2, 1, 0)
    assert [s.held_out for s in p.account.sources] == [False, True]
    assert len(list(p.conversations())) == 14


def test_epochs_follow_the_weights_and_the_seed(tmp_path, stub):
    train = [
        {"path": write(tmp_path / "a.jsonl", rows(20)), "weight": 0.5},
        {"path": write(tmp_path / "b.jsonl", rows(10, 1)), "weight": 2},
        {"path": write(tmp_path / "c.jsonl", rows(4, 2)), "weight": 1},
    ]
    p = run(tmp_path, stub, train, held_out=0)
    epochs = [p.epoch(0, n) for n in range(3)]
    for order in epochs:
        counts = np.bincount(order, minlength=34)
        assert counts[:20].sum() == 10 and counts[:20].max() == 1
        assert (counts[20:30] == 2).all() and (counts[30:] == 1).all()
        assert len(order) == p.epoch_size == 34
    assert epochs[0].tolist() == p.epoch(0, 0).tolist() != epochs[1].tolist() != p.epoch(1, 1).tolist()
    assert set(epochs[0][epochs[0] < 20]) != set(epochs[1][epochs[1] < 20])


def test_the_cache_is_found_by_content(tmp_path, stub, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(30))
    made = []
    real = prepare_module._fill
    monkeypatch.setattr(prepare_module, "_fill", lambda *a: made.append(1) or real(*a))

    def count(stub=stub, seed=0, **data):
        before = len(made)
        prepare(Data(**{"train": path} | data), stub, seed=seed, cache_dir=tmp_path / "c")
        return len(made) - before

    assert count() == 1
    # nothing that matters changed
    os.utime(path, (1, 1))
    assert count() == 0
    assert count(workers=1, max_refused=0.5, train=[{"path": path, "weight": 3}]) == 0
    # one byte changed, size and time kept
    stat, raw = os.stat(path), Path(path).read_bytes()
    Path(path).write_bytes(raw.replace(b"a7", b"a8", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert count() == 1
    Path(path).write_bytes(raw)
    assert count() == 0
    # what does matter
    assert count(seed=1) == 1
    assert count(held_out=0.2) == 1
    assert count(lambda: stub(max_length=299)) == 1
    assert count(train=[path, path]) == 1
    assert count(held_out=0) == 1
    assert count(held_out=0, seed=5) == 0  # nothing is drawn
    monkeypatch.setattr(prepare_module, "VERSION", 10**6)
    assert count() == 1
    monkeypatch.setattr(prepare_module, "_code", lambda: "other code")
    assert count() == 1


def test_the_code_in_the_key_is_every_file_that_prepares():
    before = prepare_module._code()
    prepare_module._code.cache_clear()
    assert prepare_module._code() == before
    names = {f.name for f in Path(prepare_module.__file__).parent.rglob("*.py")}
    assert {"prepare.py", "render.py", "clusters.py", "rows.py", "whole.py"} <= names


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path, stub, harm):
    path = write(tmp_path / "a.jsonl", rows(30))
    p = run(tmp_path, stub, path)
    before = content(p)
    target = p.folder / ("manifest.json" if harm == "manifest" else "store/ids.bin")
    raw = target.read_bytes()
    if harm == "flip":
        target.write_bytes(raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
    elif harm == "missing":
        target.unlink()
    elif harm == "empty":
        shutil.rmtree(p.folder)
        p.folder.mkdir()
    else:
        target.write_bytes(raw[: len(raw) // 2])
    assert content(run(tmp_path, stub, path)) == before


def test_a_crash_leaves_nothing_that_is_trusted(tmp_path, stub, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(30))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_choose", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stub, path)
    monkeypatch.undo()
    assert not [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir() and not f.name.startswith(".")]


KILLED = """
import sys, time
from pathlib import Path
from stub_for_prepare import Stub
from tunesmith.config.schema import Data
from tunesmith.data import prepare as p

calls, where = [], sys.argv[3]
def stop(*a, real=getattr(p.os if where == "rename" else p, where)):
    calls.append(a)
    if len(calls) < (3 if where == "_process" else 1):
        return real(*a)
    print("here", flush=True)
    time.sleep(60)

setattr(p.os if where == "rename" else p, where, stop)
p.sources.CHUNK_ROWS = 10
p.prepare(Data(train=sys.argv[1], workers=1), Stub, seed=0, cache_dir=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("where", ["_process", "_choose", "_write_conversations", "rename"])
def test_what_a_killed_process_left_is_not_believed(tmp_path, stub, where):
    """SIGKILL, so that nothing is tidied up: while rows are read, before and after the split, and before the move to the last name
    (the first `rename` is the one inside folder_atomic)."""
    import subprocess
    import sys

    path = write(tmp_path / "a.jsonl", rows(60))
    paths = os.pathsep.join([str(tmp_path / "lib"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, str(tmp_path / "killed"), where],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout.readline() == b"here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    root = tmp_path / "killed" / "prepared"
    assert any(root.iterdir()) and not any(prepare_module.ENTRY.fullmatch(f.name) for f in root.iterdir())
    assert content(run(tmp_path, stub, path, cache="killed")) == content(run(tmp_path, stub, path))
    for left in root.iterdir():
        os.utime(left, (1, 1))
    run(tmp_path, stub, write(tmp_path / "b.jsonl", rows(30, 1)), cache="killed")
    assert all(f.suffix == ".json" or prepare_module.ENTRY.fullmatch(f.name) for f in root.iterdir()), "what is left goes in a day"
    assert len([f for f in root.iterdir() if f.is_dir()]) == 2, "and no entry with it"


@pytest.fixture
def cache(tmp_path, stub, monkeypatch):
    """`make(n)` prepares the n-th data set; `age` moves its last use into the past; `kept` tells which are there."""
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 40_000)

    class Cache:
        root, folders = tmp_path / "c" / "prepared", {}

        def make(self, n, console=None, look=False):
            path = write(tmp_path / f"{n}.jsonl", rows(30, n))
            p = prepare(Data(train=path), stub, seed=0, cache_dir=tmp_path / "c", model=f"m{n}", progress=console, look=look)
            self.folders[p.folder.name] = n
            return p

        def age(self, *prepared):
            for days, p in enumerate(reversed(prepared), 1):
                os.utime(p.folder, (1e9 - 86_400 * days,) * 2)

        def kept(self):
            return sorted(self.folders[f.name] for f in self.root.iterdir() if f.is_dir())

    return Cache()


def size_of(p):
    return sum(f.stat().st_size for f in p.folder.rglob("*"))


def test_a_full_cache_loses_what_was_used_longest_ago_and_says_so(cache, monkeypatch, capsys):
    import gc

    from rich.console import Console

    first, second, third = (cache.make(n) for n in range(3))
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", int(3.5 * size_of(first)))
    cache.age(first, second, third)
    cache.make(0)  # taken from the cache: this is a use
    del first, second, third
    gc.collect()
    cache.make(3, Console(width=300))
    assert cache.kept() == [0, 2, 3]
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "removed the 1 prepared data set used longest ago" in told and str(cache.root) in told
    cache.make(4, Console(width=300))
    assert cache.kept() == [0, 3, 4] and "removed the 1" in capsys.readouterr().out
    cache.make(3, Console(width=300))
    assert not capsys.readouterr().out


def test_what_is_in_use_is_not_pruned(cache, monkeypatch):
    """Here, and in another process."""
    import subprocess
    import sys

    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 0)
    monkeypatch.setattr(prepare_module, "CACHE_GRACE", 0)
    used, other = cache.make(0), cache.make(1)
    theirs = other.folder
    code = (
        "import sys; from pathlib import Path; from tunesmith.config.schema import Data; from tunesmith.data import prepare\n"
        "p = prepare._load(Path(sys.argv[1]), Data(train='x')); print(len(p.train), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert int(process.stdout.readline()) == 28
    cache.age(used, other)
    del other
    made = cache.make(2)
    assert cache.kept() == [0, 1, 2]  # the last one is what was just made
    assert [len(p.train[0].ids) > 0 for p in (used, made)] == [True, True]
    process.communicate(b"")
    del used
    cache.make(3)
    assert cache.kept() == [2, 3]


def test_what_was_used_within_the_hour_is_not_pruned(cache, monkeypatch):
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 0)
    for n in range(3):
        cache.make(n)
    assert cache.kept() == [0, 1, 2]


def test_what_was_looked_at_is_an_entry_like_any_other(cache, monkeypatch):
    """Not something left behind by a process that died: it stays after a day, and goes when the cache is full."""
    looked = cache.make(0, look=True)
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 10 * size_of(looked))
    cache.age(looked)
    cache.make(1)
    assert cache.kept() == [0, 1]
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", size_of(looked))
    del looked
    cache.make(2)
    assert cache.kept() == [1, 2]


def test_a_damaged_entry_is_pruned_too(cache, monkeypatch):
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 0)
    damaged = cache.make(0)
    (damaged.folder / "manifest.json").unlink()
    cache.age(damaged)
    cache.make(1)
    assert cache.kept() == [1]


def test_a_crash_while_pruning_leaves_no_half_entry(cache, monkeypatch):
    import tunesmith.files

    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 0)
    cache.age(cache.make(0))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tunesmith.files.os, "rmdir", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.make(1)
    monkeypatch.undo()
    monkeypatch.setattr(prepare_module, "CACHE_BYTES", 0)
    visible = [f for f in cache.root.iterdir() if f.is_dir() and not f.name.startswith(".")]
    assert len(visible) == 1 and not prepare_module.verify(visible[0])
    assert len(cache.make(0).train) == 28  # made again


def test_lengths_are_read_without_a_tokenizer(tmp_path, stub):
    path = write(tmp_path / "a.jsonl", rows(30))
    data = Data(train=path)
    assert cached_lengths(data, "models/m", 0, tmp_path / "c") is None
    p = prepare(data, stub, seed=0, cache_dir=tmp_path / "c", model="models/m")
    assert cached_lengths(data, "models/m", 0, tmp_path / "c").tolist() == p.train.lengths.tolist()
    assert cached_lengths(data, "models/other", 0, tmp_path / "c") is None
    assert cached_lengths(Data(train=path, max_length=99), "models/m", 0, tmp_path / "c") is None
    index = p.folder / "store/index.bin"
    whole = index.read_bytes()
    index.write_bytes(whole[:-32] + bytes(32))  # as a power failure may leave what was not synced
    assert cached_lengths(data, "models/m", 0, tmp_path / "c") is None
    again = prepare(data, stub, seed=0, cache_dir=tmp_path / "c", model="models/m")
    assert (again.folder / "store/index.bin").read_bytes() == whole
    shutil.rmtree(p.folder)
    assert cached_lengths(data, "models/m", 0, tmp_path / "c") is None


def test_memory_does_not_grow_with_the_rows(tmp_path, stub, monkeypatch):
    """What stays in memory is the split's arrays, some hundred bytes a row at the peak; tokens and signatures are on disk."""
    import tracemalloc

    monkeypatch.setattr(prepare_module.sources, "CHUNK_ROWS", 32)
    sizes = {}
    for n in (500, 2_500):
        path = write(tmp_path / f"{n}.jsonl", rows(n))
        tracemalloc.start()
        run(tmp_path, stub, path, workers=1)
        sizes[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (sizes[2_500] - sizes[500]) / 2_000 < 500


def test_no_torch():
    import subprocess
    import sys

    code = "import sys, tunesmith.data.prepare, tunesmith.data.report; print([m for m in ['torch'] if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
