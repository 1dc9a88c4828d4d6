"""The index: what is read and what is not, incremental, hostile questions and names, killed while adding, other people's files."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data import sources
from tunesmith.errors import DataError, DoesNotFit, RunError
from tunesmith.retrieve import Index
from tunesmith.retrieve.search import STOP, asked, fuse
from tunesmith.retrieve.sqlite import driver


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "pump.md").write_text(
        "# Pump\n\nThe pump is reset by holding the red button for five seconds.\n\n# Valve\n\nThe valve opens."
    )
    (folder / "fox.txt").write_text("A fox jumped over the dog.\r\n\r\nThe dog slept on.")
    (folder / "page.html").write_text("<head><title>x</title></head><body><h2>Café &amp; bar</h2><p>Open at nine.</p></body>")
    (folder / ".hidden.md").write_text("hidden")
    (folder / "code.py").write_text("not = 'a document'")
    return folder


@pytest.fixture
def index(tmp_path, docs):
    with Index.create_or_open(tmp_path / "i.sqlite") as opened:
        opened.add(docs)
        yield opened


def test_finds_what_was_written_with_exact_offsets(index, docs):
    best = index.search("How do I reset the pump?")[0]
    assert best.document == "docs/pump.md" and "red button" in best.text and best.score > 0
    assert sources.document(docs / "pump.md")[best.start : best.end] == best.text
    page = index.search("cafe opening at nine")[0]  # without the accent
    assert page.context == "Café & bar" and page.text == "## Café & bar\n\nOpen at nine."
    assert index.documents == ["docs/fox.txt", "docs/page.html", "docs/pump.md"] and index.chunks == 3 and index.model is None
    assert index.search("zebra") == [] and len(index.search("pump dog nine", k=2)) == 2
    assert len(index.search("pump dog nine", k=10**30)) == 3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200), min_size=1, max_size=4), st.randoms())
def test_offsets_into_random_documents(tmp_path_factory, texts, rng):
    folder = tmp_path_factory.mktemp("random")
    for n, text in enumerate(texts):
        (folder / f"{n}.{rng.choice(['txt', 'md', 'html'])}").write_bytes(f"word {text}\n\n# {text}\n\n{text * 3}".encode())
    with Index.create_or_open(folder / "i.sqlite") as index:
        index.add(folder)
        found = index.search("word", k=50)
        assert found or not index.documents
        for passage in found:
            assert sources.document(folder / passage.document)[passage.start : passage.end] == passage.text


def test_only_what_changed_is_read_again(index, docs, monkeypatch):
    read = []
    real = sources.document
    monkeypatch.setattr(sources, "document", lambda p: read.append(p.name) or real(p))
    os.utime(docs / "fox.txt")  # touched, not changed
    (docs / "pump.md").write_text("The pump has a green lever now.")
    (docs / "page.html").unlink()
    (docs / "new.txt").write_text("A new zebra.")
    added = index.add(docs)
    assert (added.documents, added.chunks, added.unchanged, added.removed, added.unread) == (2, 2, 1, 1, [])
    assert sorted(read) == ["new.txt", "pump.md"]
    assert index.search("red button nine") == [] and index.search("green lever") and index.search("zebra")
    assert index.add(docs).unchanged == 3
    check(index.path)


def test_two_folders_one_file_and_a_move_of_all(tmp_path, docs):
    more = tmp_path / "more"
    more.mkdir()
    (more / "fox.txt").write_text("Another fox sings.")
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        index.add(docs)
        assert index.add(more).documents == 1 and len(index.documents) == 4, "another folder takes nothing away"
        assert index.add(docs / "fox.txt").unchanged == 1 and len(index.documents) == 4
    home = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(home)
    try:
        with Index.open(home / "i.sqlite") as index:
            assert index.add(home / "docs").unchanged == 3 and len(index.documents) == 4
    finally:
        home.rename(tmp_path)


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path, docs):
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (docs / "latin.txt").write_bytes("Grüße".encode("latin1"))
    (docs / "empty.md").write_text("")
    (docs / "blank.md").write_text(" \n \n")
    (docs / "nul.txt").write_bytes(b"a\0b")
    (docs / "fake.docx").write_bytes(b"PK\x03\x04 no")
    (docs / "old.doc").write_bytes(b"\xd0\xcf\x11\xe0")
    os.mkfifo(docs / "pipe.txt")
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        added = index.add(docs)
        assert added.documents == 3 and index.search("pump")
        named = {Path(path).name: reason for path, reason in added.unread}
        assert set(named) == {"broken.pdf", "latin.txt", "empty.md", "blank.md", "nul.txt", "fake.docx", "old.doc", "pipe.txt"}
        assert "iconv" in named["latin.txt"] and "no text" in named["blank.md"] and ".docx" in named["old.doc"]
        (docs / "pump.md").write_bytes(b"\xff\xfe")
        assert index.add(docs).removed == 1 and not index.search("pump"), "nothing is cited that its file no longer says"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_is_closed_for_now_keeps_its_documents(index, docs):
    (docs / "fox.txt").chmod(0)
    added = index.add(docs)
    assert added.removed == 0 and len(added.unread) == 1 and index.search("fox")


def test_a_file_that_cannot_be_opened_for_now_stays(index, docs, monkeypatch):
    from tunesmith.retrieve import index as module

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "sha256_file", fails)
    added = index.add(docs)
    assert added.removed == 0 and len(added.unread) == 3 and index.search("fox")


def test_links_are_not_followed(tmp_path, docs):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("the password is swordfish")
    (docs / "link.txt").symlink_to(secret / "key.txt")
    (docs / "inner").symlink_to(secret)
    (docs / "loop").symlink_to(docs)
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        added = index.add(docs)
        assert added.documents == 3 and {Path(p).name for p, why in added.unread if "link" in why} == {"link.txt", "inner", "loop"}
        assert index.search("swordfish") == []


def test_a_name_that_is_no_text(tmp_path, docs):
    try:
        Path(os.fsdecode(os.fsencode(docs) + b"/bad\xff.txt")).write_text("zebra")
    except OSError:
        pytest.skip("this file system refuses such names")
    (docs / "';drop table chunk;--.txt").write_text("giraffe")
    (docs / "a\nb.txt").write_text("okapi")
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        added = index.add(docs)
        assert added.documents == 5 and [why for _, why in added.unread] == ["its name is not UTF-8"]
        assert index.search("giraffe")[0].document == "docs/';drop table chunk;--.txt" and index.search("okapi")


HOSTILE = ['"', "'", "pump AND", "NEAR(pump dog", "pump*", "text:pump", "-pump", "^pump", "(((", "pump OR OR",
           "'; drop table chunk; --", "{pump}",
           "pump + dog", "NOT", "AND OR NOT NEAR", "\0pump", "", " ", "?", "the of", "pump " * 5000,
           "漢字", "\ud800 pump", "words:context"]  # fmt: skip


@pytest.mark.parametrize("question", HOSTILE)
def test_a_questions_syntax_is_only_words(index, question):
    found = index.search(question)
    assert bool(found) == ("pump" in question or question == "the of")
    check(index.path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(), max_size=60))
def test_any_question_is_answered(index, question):
    index.search(question)


def test_stop_words_go_unless_nothing_else_is_there():
    assert asked("What is the Pump of the pump?") == ["pump"] and asked("to be or not to be") == ["to", "be", "or", "not"]
    assert len(asked(" ".join(f"w{i}" for i in range(1000)))) == 64 and "pump" not in STOP


def test_a_large_index_drops_the_commonest_words_only(tmp_path, monkeypatch):
    from tunesmith.retrieve import sqlite
    from tunesmith.retrieve.chunks import Chunk

    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        with index.store.changes():
            for n in range(60):
                text = f"common {'half' if n % 2 else ''} {'rare' if n == 7 else ''} number{n}"
                index.store.replace(f"{n}", "", [Chunk(0, len(text), text)])
        every = index.search("common rare half", k=60)
        assert len(every) == 60 and "rare" in every[0].text
        monkeypatch.setattr(sqlite, "SMALL", 0)
        monkeypatch.setattr(sqlite, "POSTINGS", 40)
        some = index.search("common rare half generalisation", k=60)
        assert len(some) == 30 and some[0].id == every[0].id
        assert len(index.search("common", k=60)) == 60, "the rarest word is always asked for"
        assert index.search("nowhere", k=60) == []


def test_a_small_index_scores_as_lucene_does(tmp_path, monkeypatch):
    from tunesmith.retrieve import sqlite
    from tunesmith.retrieve.chunks import Chunk

    texts = ["pump pump pump valve", "pump red fox", "pump"]
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        with index.store.changes():
            for n, text in enumerate(texts):
                index.store.replace(f"{n}", "", [Chunk(0, len(text), text)])
        found = {p.document: p.score for p in index.search("pump valve")}
        average = sum(len(t.split()) for t in texts) / 3
        for n, text in enumerate(texts):
            expected = 0.0
            for word, holds in (("pump", 3), ("valve", 1)):
                tf = text.split().count(word)
                weight = math.log(1 + (3 - holds + 0.5) / (holds + 0.5))
                expected += weight * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(text.split()) / average))
            assert found[f"{n}"] == pytest.approx(expected)
        assert [p.document for p in index.search("pump")] == ["0", "2", "1"], (
            "all hold it; who says it more often and in less comes first"
        )
        rows = index.store.lexical(["fox"], 5)
        monkeypatch.setattr(sqlite, "SMALL", 0)
        assert [r for r, _ in index.store.lexical(["fox"], 5)] == [r for r, _ in rows]


def test_fuse_by_hand():
    assert fuse([[(1, 9.0), (2, 8.0)], [(2, 0.5), (3, 0.4)]], k=60) == [(2, 1 / 62 + 1 / 61), (1, 1 / 61), (3, 1 / 62)]
    assert fuse([[(1, 9.0)], [(2, 0.5), (1, 0.4)]], weights=(1.0, 0.5), k=60) == [(1, 1 / 61 + 0.5 / 62), (2, 0.5 / 61)]
    assert fuse([[], []]) == []


# ---- files that are no index of ours
def test_missing_empty_foreign_and_damaged_files(tmp_path, docs):
    with pytest.raises(DataError, match=r"no such index\nfix: make it: tunesmith docs add"):
        Index.open(tmp_path / "no.sqlite")
    Index.create_or_open(tmp_path / "empty.sqlite").close()
    with pytest.raises(DataError, match="the index is empty"):
        Index.open(tmp_path / "empty.sqlite")
    with Index.create_or_open(tmp_path / "empty.sqlite") as index, pytest.raises(DataError, match="the index is empty"):
        index.search("pump")
    (tmp_path / "text.sqlite").write_text("just text " * 100)
    other = driver.connect(tmp_path / "other.sqlite")
    other.execute("create table mine(x)")
    other.close()
    before = (tmp_path / "other.sqlite").read_bytes()
    for name, told in (("text.sqlite", "not an index"), ("other.sqlite", "no index of Tunesmith")):
        for how in (Index.open, Index.create_or_open):
            with pytest.raises(DataError, match=told):
                how(tmp_path / name)
    assert (tmp_path / "other.sqlite").read_bytes() == before
    with pytest.raises(DataError, match="there is no folder"):
        Index.create_or_open(tmp_path / "no" / "i.sqlite")
    with Index.create_or_open(tmp_path / "i.sqlite") as index:
        with pytest.raises(DataError, match="no such folder"):
            index.add(tmp_path / "nowhere")
        (tmp_path / "bare").mkdir()
        with pytest.raises(DataError, match="holds no document"):
            index.add(tmp_path / "bare")
        index.add(docs)
    data = bytearray((tmp_path / "i.sqlite").read_bytes())
    data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    (tmp_path / "i.sqlite").write_bytes(data)
    with pytest.raises(DataError, match=r"damaged .*\nfix: name another"), Index.open(tmp_path / "i.sqlite") as index:
        index.search("pump")


def test_another_writer_is_told_and_a_reader_goes_on(index, docs, monkeypatch):
    from tunesmith.retrieve import sqlite

    monkeypatch.setattr(sqlite, "WAIT_S", 0.05)
    (docs / "new.txt").write_text("zebra")
    with index.store.changes(), Index.open(index.path) as second:
        assert second.search("pump")
        with pytest.raises(RunError, match="another process writes"):
            second.add(docs)
    assert index.add(docs).documents == 1


def test_a_full_disk_keeps_what_was_there(index, docs):
    index.store._db.execute(f"pragma max_page_count = {index.store._one('pragma page_count') + 2}")
    (docs / "big.txt").write_text(" ".join(f"word{i}" for i in range(20_000)))
    with pytest.raises(DoesNotFit, match="the disk is full"):
        index.add(docs)
    assert index.search("pump") and len(index.documents) == 3
    index.store._db.execute("pragma max_page_count = 1000000")
    assert index.add(docs).documents == 1
    check(index.path)


# ---- killed
CHILD = """
import sys
from tunesmith.retrieve import Index, index
index.BATCH_CHUNKS = 8
with Index.create_or_open(sys.argv[1]) as opened:
    opened.add(sys.argv[2], lambda done, total, name: print(done, flush=True))
"""


def check(path):
    """SQLite's and FTS5's own checks, and that no chunk is without its document, its words or its neighbours."""
    db = driver.connect(path)
    assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
    db.execute("insert into words(words, rank) values ('integrity-check', 1)")
    assert db.execute("select count(*) from chunk where document not in (select id from document)").fetchone() == (0,)
    assert db.execute("select count(*) from document where id not in (select document from chunk)").fetchone() == (0,)
    db.close()


def test_sigkill_while_adding_leaves_a_whole_index_and_adding_goes_on(tmp_path):
    folder, path, rng = tmp_path / "docs", tmp_path / "i.sqlite", random.Random(1)
    folder.mkdir()
    for n in range(300):
        (folder / f"{n}.md").write_text(
            "\n\n".join(f"only{n} " + " ".join(f"w{rng.randrange(5000)}" for _ in range(150)) for _ in range(6))
        )
    reached = []
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(folder)], stdout=subprocess.PIPE)
        for _ in range((reached[-1] if reached else 0) + rng.randrange(5, 40)):
            child.stdout.readline()  # one for each document, also for those that are there already
        time.sleep(rng.uniform(0, 0.01))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        check(path)
        with Index.create_or_open(path) as index:
            counts = index.store.counts()
            assert set(counts.values()) <= {6}, "a document is there whole or not at all"
            reached.append(len(counts))
    assert reached == sorted(reached) and 0 < reached[-1] < 300, "it goes on from where it was, kill by kill"
    with Index.create_or_open(path) as index:
        added = index.add(folder)
        assert added.unchanged + added.documents == 300 and index.chunks == 1800
        assert {p.document for p in index.search("only299", k=10)} == {"docs/299.md"}
    check(path)
