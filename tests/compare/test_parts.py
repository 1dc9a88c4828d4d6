"""What a comparison tells beside its verdict: who wins what, groups of rows; the page and the terminal have every part."""

import io
import json
import shutil

import pytest
from rich.console import Console

import tunesmith
from tunesmith.compare import contrast
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate import metrics
from tunesmith.run import Run

EVIL = "<script>alert(1)</script>"


def compare(run, out, **settings):
    base = {"max_tokens": 6, "arms": ["base", "tuned"], "forgetting": ["none"], "console": Console(file=io.StringIO(), width=160)}
    return tunesmith.compare(getattr(run, "path", run), out=out, **{**base, **settings})


@pytest.fixture(scope="module")
def marked(tiny, tmp_path_factory):
    """A finished run whose 24 held-out rows carry a topic, checks and sources."""
    root = tmp_path_factory.mktemp("marked")
    rows = [json.loads(line) for line in tiny.rows(root / "held.jsonl", 24, start=100).read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"topic": ("sum", f"{EVIL}")[i % 2], "expect": {"says": ["it is"]} if i % 3 else {}, "note": "x" * 5000, "n": i}
        row |= {"sources": ["one.txt"]} if i % 2 else {}
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tunesmith.train(tiny.config(root / "run", data={"held_out": str(root / "held.jsonl")}, train={"epochs": 1}),
                           console=Console(file=io.StringIO()))  # fmt: skip


def test_rows_keep_what_they_carry_through_training(marked):
    kept = [json.loads(line) for line in (marked.data / "held_out.jsonl").read_text("utf-8").splitlines()]
    assert kept[1]["fields"] == {"topic": EVIL, "expect": {"says": ["it is"]}, "n": 1, "sources": ["one.txt"]}  # no long text
    assert "messages" not in kept[0]["fields"]


def test_checks_of_rows_are_found_and_groups_are_told(marked, tmp_path):
    found = compare(marked, tmp_path / "c", by="topic").found
    assert found["metrics"][0]["name"] == "expect.says" and found["arms"][0]["metrics"]["expect.says"]["rows"] == 16
    by = found["groups"]
    assert by["by"] == "topic" and sorted(g["rows"] for g in by["groups"]) == [12, 12]
    for metric in found["metrics"]:
        name = metric["name"]
        for arm in found["arms"]:
            parts = [g["arms"][arm["name"]][name] for g in by["groups"]]
            whole = sum(p["value"] * p["rows"] for p in parts if p["rows"]) / sum(p["rows"] for p in parts)
            assert whole == pytest.approx(arm["metrics"][name]["value"])


def test_every_metric_has_its_winner(marked, tmp_path):
    found = compare(marked, tmp_path / "c").found
    assert [w["metric"] for w in found["winners"]] == [m["name"] for m in found["metrics"]]
    for w in found["winners"]:
        values = {arm["name"]: arm["metrics"][w["metric"]]["value"] for arm in found["arms"]}
        assert w["value"] == max(values.values()) == values[w["best"]] and w["says"].startswith(f"{w['metric']}: ")


def test_page_and_terminal_hold_every_part(marked, tmp_path, retrieval, server):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "one.txt").write_text("add 101 and 102")
    (docs / "two.txt").write_text("nothing of it")
    server.judge = lambda prompt: "Verdict: tie"
    out = Console(file=io.StringIO(), width=200)
    settings = {"arms": ["base", "retrieval", "tuned"], "docs": docs, "by": "topic", "judge": server.url, "judge_model": EVIL}
    made = compare(marked, tmp_path / "c", forgetting=[], **settings)
    made.print(out)
    page, shown = made.page.read_text("utf-8"), out.file.getvalue()
    for head in (
        "Which way wins what",
        "By topic",
        "What was forgotten",
        "Passages and citations",
        "What the judge says",
        "training",
    ):
        assert head in page, head
    for word in ("by topic (rows)", "citations, checked", "before and after tuning", "judge ", "training took", "hit@1"):
        assert word in shown, word
    assert EVIL not in page and "&lt;script&gt;" in page
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["citations"]["ranking"]["questions"] == 12


@pytest.mark.parametrize("width", [60, 100])
def test_narrow_terminals(marked, tmp_path, width):
    out = Console(file=io.StringIO(), width=width)
    compare(marked, tmp_path / "c", by="topic", forgetting=[]).print(out)
    assert "by topic" in out.file.getvalue()


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"by": "topik"}, "--by topik: no held-out row carries 'topik'", "expect, n, sources, topic"),
        ({"gold": "sources"}, "no way has passages", "add --docs"),
        ({"metrics": ["expect"], "rows": 4}, "concerns none of the 4 rows", "--rows"),
        ({"metrics": ["expect:topic"]}, "is no list of checks", "correct the rows"),
        ({"metrics": ["adherence"]}, "24 training rows ask something of their own, and a classifier needs 40", "leave it out"),
    ],
)
def test_what_rows_do_not_carry_is_said_with_what_they_do(marked, tmp_path, settings, what, fix):
    with pytest.raises(ConfigError) as e:
        compare(marked, tmp_path / "c", **settings)
    assert what in e.value.what and fix in e.value.fix


def test_adherence_is_learned_from_training_rows_and_kept(tiny, tmp_path):
    train = tiny.rows(tmp_path / "train.jsonl", 60)
    config = tiny.config(tmp_path / "run", data={"train": str(train)}, train={"epochs": 1})
    run = tunesmith.train(config, console=Console(file=io.StringIO()))
    screen = Console(file=io.StringIO(), width=160, force_terminal=True)
    settings = {"metrics": ["adherence", "rouge_l"], "guardrails": 0}
    found = compare(run, tmp_path / "c", console=screen, **settings).found
    heard = found["adherence"]
    assert heard["rows"] == 60 and heard["others"]["of"] == 120 and heard["measured"] and heard["others"]["accuracy"] > 0.9
    assert found["metrics"][0]["name"] == "adherence" and found["metrics"][0]["form"]
    rows = [json.loads(line) for line in (tmp_path / "c" / "answers.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row["arm"] == "base (training rows)"]
    assert f"{len(rows)}/{len(rows)}" in screen.file.getvalue()  # the bar counts the training rows too
    assert len(asked) == 60 and not {row["question"] for row in asked} & {row["question"] for row in rows if row not in asked}
    size = (tmp_path / "c" / "answers.jsonl").stat().st_size
    assert compare(Run.open(run.path), tmp_path / "c", **settings).found["adherence"] == heard
    assert (tmp_path / "c" / "answers.jsonl").stat().st_size == size


def test_text_without_training_rows_for_adherence_says_so(marked, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SHORT_WORDS", 0)  # the answers are text then
    monkeypatch.setattr(contrast, "LEAST_ROWS", 10_000)
    found = compare(marked, tmp_path / "c", guardrails=0).found
    assert "rouge_l" in [m["name"] for m in found["metrics"]] and found["adherence"] is None
    assert any(note.startswith("adherence is not measured: ") for note in found["notes"])


def test_documents_that_cannot_be_read_are_named_and_the_rest_is_searched(marked, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "one.md").write_text("# Sums\nadd 101 and 102 it is")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (docs / "old.doc").write_bytes(b"x")
    found = compare(marked, tmp_path / "c", arms=["base", "retrieval"], docs=docs, rows=4).found
    assert "expect.says" not in [m["name"] for m in found["metrics"]]  # none of these rows carries checks
    [told] = [note for note in found["notes"] if "could not be read" in note]
    assert told.startswith("2 documents could not be read, the rest is searched") and "broken.pdf" in told and "old.doc" in told


def test_documents_none_of_which_can_be_read_are_named_in_the_error(marked, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(DataError) as e:
        compare(marked, tmp_path / "c", arms=["base", "retrieval"], docs=tmp_path / "docs")
    assert "none of its documents can be read" in e.value.what and "broken.pdf" in e.value.what


def test_one_document_is_enough(marked, tmp_path):
    (tmp_path / "one.md").write_text("# Sums\nadd 101 and 102 it is")
    found = compare(marked, tmp_path / "c", arms=["base", "retrieval"], docs=tmp_path / "one.md").found
    assert found["citations"]["ranking"]["questions"] == 12


def test_a_copied_comparison_finds_no_passage_twice(marked, tmp_path):
    """Its index names documents by their way from it, and the documents stay where they are: all are new there, the old ones go."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("# Sums\nadd 101 and 102 it is")
    settings = {"arms": ["base", "retrieval"], "docs": tmp_path / "docs", "rows": 4}
    compare(marked, tmp_path / "c", **settings)
    shutil.copytree(tmp_path / "c", tmp_path / "deeper" / "c")
    compare(marked, tmp_path / "deeper" / "c", **settings)
    lines = (tmp_path / "deeper" / "c" / "answers.jsonl").read_text("utf-8").splitlines()
    found = [row["passages"] for row in map(json.loads, lines) if row["arm"] == "retrieval"]
    assert len(found) == 4 and all(len(passages) == 1 for passages in found)  # and nothing is asked anew


def test_a_row_that_no_metric_concerns_counts_for_none(marked, tmp_path):
    """Rows without checks are neither won nor lost."""
    cases = compare(marked, tmp_path / "c").found["cases"]
    assert cases["won"] + cases["lost"] + cases["same"] == 16
