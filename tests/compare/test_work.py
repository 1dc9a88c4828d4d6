"""compare/work.py: the same rows for every way, answers that are kept, and what is refused before a model is loaded."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import tunesmith
from tunesmith.chat import Talker
from tunesmith.compare import work
from tunesmith.config.load import load
from tunesmith.errors import ConfigError, DataError, MissingExtra, RunError
from tunesmith.run import Run

models = importlib.import_module("tunesmith.models")
CUT = {"max_tokens": 6}


def quiet():
    return Console(file=io.StringIO(), width=160)


def compare(source, out, console=None, **settings):
    return tunesmith.compare(
        getattr(source, "path", source), out=out, console=console or quiet(), **{**CUT, "guardrails": 0, **settings}
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


def answers(folder):
    return {(row["arm"], row["row"]): row["answer"] for row in lines(folder)}


@pytest.fixture
def no_model(monkeypatch):
    """From now on loading one fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def forbid():
        monkeypatch.setattr(models, "load", refuse)
        monkeypatch.setattr(Talker, "open", refuse)

    return forbid


def test_every_way_answers_the_same_rows_and_nothing_twice(run, tmp_path, no_model):
    first = compare(run, tmp_path / "c", system="Be brief.")
    names = [arm["name"] for arm in first.found["arms"]]
    assert names == ["base", "system", "few-shot", "tuned"]
    rows = {name: [row["row"] for row in lines(tmp_path / "c") if row["arm"] == name] for name in names}
    assert all(found == rows["base"] for found in rows.values()) and len(rows["base"]) == 24
    kept, page = (tmp_path / "c" / "answers.jsonl").read_bytes(), first.page.read_bytes()
    no_model()
    again = compare(run, tmp_path / "c", system="Be brief.")
    assert (tmp_path / "c" / "answers.jsonl").read_bytes() == kept and again.page.read_bytes() == page
    assert again.found == first.found


def test_answers_are_those_of_the_base_and_of_the_run(run, tmp_path):
    compare(run, tmp_path / "c", rows=4, arms=["base", "tuned"])
    found = answers(tmp_path / "c")
    rows = [work.arms.question_of(i, c) for i, c in enumerate(work._kept_rows(run.data / "held_out.jsonl"))]
    single = [q for q in rows if (("base", q.row) in found) and len(q.before) == 1]
    assert single
    for name, source in (("base", run.config.model), ("tuned", run.path)):
        wanted = Talker.open(source).answer([q.shown for q in single], **CUT)
        assert [found[name, q.row] for q in single] == [a.strip() for a in wanted]
    assert [found["base", q.row] for q in single] != [found["tuned", q.row] for q in single]


def test_one_model_is_loaded_at_a_time(run, tmp_path, monkeypatch):
    load_, seen = work._Work._load, []

    def watched(self, model):
        assert not [ref for ref in seen if ref() is not None], "another model is still there"
        talker = load_(self, model)
        seen.append(weakref.ref(talker.model))
        return talker

    monkeypatch.setattr(work._Work, "_load", watched)
    compare(run, tmp_path / "c", rows=3)
    assert len(seen) == 2


def test_killed_it_goes_on(run, tmp_path):
    """The real command, killed while it answers."""
    command = [sys.executable, "-m", "tunesmith.cli", "compare", str(run.path), "--out", str(tmp_path / "c"), "--max-tokens", "120"]
    command += ["--guardrails", "0"]
    path = tmp_path / "c" / "answers.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        while not path.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 0 < len(kept) < 72
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} are there already" in done.stdout
    assert path.read_bytes().startswith(b"".join(kept)) and len(lines(tmp_path / "c")) == 72


def test_a_bar_on_a_terminal(run, tmp_path):
    out = Console(file=io.StringIO(), width=100, force_terminal=True)
    compare(run, tmp_path / "c", console=out, rows=8, arms=["base", "tuned"])
    assert "16/16" in out.file.getvalue() and "tuned" in out.file.getvalue()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stopped_and_torn_it_goes_on_and_ends_the_same(run, tmp_path, monkeypatch, temperature):
    settings = {"arms": ["base", "tuned"], "temperature": temperature, "seed": 3}
    compare(run, tmp_path / "whole", **settings)
    add, left = work.Answers.add, [29]

    def stop(self, found):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        add(self, found)

    monkeypatch.setattr(work.Answers, "add", stop)
    with pytest.raises(Stopped):
        compare(run, tmp_path / "c", **settings)
    monkeypatch.setattr(work.Answers, "add", add)
    path = tmp_path / "c" / "answers.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept[:-20])  # the last line is torn
    compare(run, tmp_path / "c", **settings)
    assert path.read_bytes().startswith(b"".join(kept.splitlines(keepends=True)[:-1]))
    assert len(lines(tmp_path / "c")) == 48
    assert answers(tmp_path / "c") == answers(tmp_path / "whole")


def test_a_changed_prompt_is_asked_anew_and_no_other(run, tmp_path):
    compare(run, tmp_path / "c", rows=5, arms=["base", "system"], system="One.")
    compare(run, tmp_path / "c", rows=5, arms=["base", "system"], system="Two.")
    counts = {name: sum(row["arm"] == name for row in lines(tmp_path / "c")) for name in ("base", "system")}
    assert counts == {"base": 5, "system": 10}


def test_examples_come_from_the_training_rows_alone(run, tmp_path):
    compare(run, tmp_path / "c", arms=["few-shot"], shots=1, rows=6)
    for row in lines(tmp_path / "c"):
        assert len(row["shots"]) == 1 and "train.jsonl" in row["shots"][0]
        assert len(row["prompt"]) >= 3


def test_no_held_out_row_is_an_example_where_a_share_of_one_file_is_held_out(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows.jsonl", 40)
    with rows.open("a") as f:  # the same questions again, with other answers
        f.write("".join(line.replace("it is", "no") + "\n" for line in rows.read_text().splitlines()))
    config = tiny.config(tmp_path / "none", data={"train": str(rows), "held_out": 0.3})
    compare(config, tmp_path / "c", arms=["few-shot"], shots=3)
    found = lines(tmp_path / "c")
    asked = {work.arms.same_question(row["question"]) for row in found}
    origins = {
        f"{row['file']}:{row['line']}"
        for path in Path(os.environ["TUNESMITH_CACHE"]).glob("prepared/*/held_out.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        if row["file"] == str(rows)
    }
    assert len(origins) >= len(found) > 5
    for row in found:
        shown = [m["content"] for m in row["prompt"] if m["role"] == "user"][:3]
        assert len(row["shots"]) == 3 and not origins & set(row["shots"])
        assert not asked & set(map(work.arms.same_question, shown))


def test_examples_that_do_not_fit_are_left_out(run, tmp_path):
    out = quiet()
    compare(run, tmp_path / "c", console=out, arms=["few-shot"], shots=20, rows=3)
    assert "took fewer examples or passages: the model's context holds 256 tokens" in out.file.getvalue()
    talker = Talker.open(run.config.model)
    for row in lines(tmp_path / "c"):
        assert 1 <= len(row["shots"]) < 20 and row["prompt_tokens"] + CUT["max_tokens"] <= talker.context


def test_a_question_that_is_too_long_is_left_out_for_every_way(run, tmp_path, tiny):
    held = tiny.rows(tmp_path / "held.jsonl", 3, start=200)
    with held.open("a") as f:
        f.write(json.dumps({"messages": [{"role": "user", "content": "x" * 252}, {"role": "assistant", "content": "y"}]}) + "\n")
    config = tiny.config(tmp_path / "none", data={"held_out": str(held), "max_length": 400, "overlength": "truncate"})
    found = compare(config, tmp_path / "c").found
    assert found["left_out"] == 1 and found["rows"] == 3


# ---- retrieval -------------------------------------------------------------------------------------------------------------------


def test_retrieval(run, tmp_path, retrieval):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("to add 100 and 10 look here")
    (docs / "b.txt").write_text("nothing")
    found = compare(run, tmp_path / "c", docs=docs, rows=3, passages=1).found
    assert [arm["name"] for arm in found["arms"]] == ["base", "few-shot", "retrieval", "tuned", "tuned+retrieval"]
    assert retrieval.added == [docs] and retrieval.indexes[0].parent == tmp_path / "c"
    first = next(row for row in lines(tmp_path / "c") if row["arm"] == "retrieval")
    assert first["passages"] == [{"id": "a.txt#0", "document": "a.txt"}]
    assert "[1] a.txt\nto add 100 and 10 look here\n\nadd 100" in first["prompt"][-1]["content"]
    assert list(found["citations"]["arms"]) == ["retrieval", "tuned+retrieval"]


def test_other_documents_have_an_index_of_their_own(run, tmp_path, retrieval):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"add {name}")
        compare(run, tmp_path / "c", docs=tmp_path / name, rows=2, arms=["retrieval"])
    assert len(set(retrieval.indexes)) == 2
    assert len(lines(tmp_path / "c")) == 4  # other passages, so other prompts


def test_retrieval_from_an_index(run, tmp_path, retrieval):
    index = tmp_path / "index.sqlite"
    index.write_text('[["a", "to add"]]')
    compare(run, tmp_path / "c", docs=index, rows=2, arms=["retrieval"])
    assert not retrieval.added and len(lines(tmp_path / "c")) == 2


def test_documents_that_are_not_there_or_say_nothing(run, tmp_path, retrieval, no_model):
    no_model()
    (tmp_path / "empty" / "in").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder is empty"):
        compare(run, tmp_path / "c", docs=tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        compare(run, tmp_path / "c", docs=tmp_path / "nowhere")
    (tmp_path / "empty" / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="no passage was found for any question"):
        compare(run, tmp_path / "c", docs=tmp_path / "empty")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError):
        compare(run, tmp_path / "c", docs=Path(tmp_path / "a.txt") / "x")


def test_without_retrieval_installed(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tunesmith.retrieve", None)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a")
    with pytest.raises(MissingExtra, match="--docs needs retrieval"):
        compare(run, tmp_path / "c", docs=tmp_path / "docs")


# ---- an endpoint -----------------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_fails_midway_is_gone_on_with(run, tmp_path, server, monkeypatch):
    monkeypatch.setenv("TUNESMITH_API_KEY", "local-77aa88bb99")
    settings = {"arms": ["base", "endpoint"], "endpoint": server.url, "endpoint_model": "m", "rows": 12}
    server.fail_from = 7
    with pytest.raises(RunError) as e:
        compare(run, tmp_path / "c", **settings)
    assert "HTTP 400: no more" in e.value.what and "endpoint: 6 of 12 rows are answered and kept" in e.value.what
    assert "the same command goes on" in e.value.fix and "--arms base" in e.value.fix
    server.fail_from, asked = None, len(server.asked)
    found = compare(run, tmp_path / "c", **settings).found
    assert len(server.asked) - asked == 6 and len(lines(tmp_path / "c")) == 24
    arm = found["arms"][1]
    assert arm["prompt_tokens"] == 5 and arm["answer_tokens"] == 3 and arm["seconds"] > 0
    assert found["recommended"] != "endpoint"
    everything = b"".join(p.read_bytes() for p in (tmp_path / "c").iterdir() if p.is_file())
    assert b"local-77aa88bb99" not in everything


def test_an_endpoint_alone_needs_no_weights(run, tmp_path, server, no_model):
    no_model()
    settings = {"arms": ["endpoint", "endpoint+few-shot"], "endpoint": server.url, "endpoint_model": "m", "rows": 3}
    found = compare(run, tmp_path / "c", **settings).found
    assert found["best"] in ("endpoint", "endpoint+few-shot")
    assert {len(body["messages"]) for body in server.asked} >= {1, 9}


# ---- what is refused -------------------------------------------------------------------------------------------------------------


def test_a_run_file_without_a_run(tiny, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config(tmp_path / "later")))
    found = compare(path, tmp_path / "c").found
    assert [arm["name"] for arm in found["arms"]] == ["base", "few-shot"] and found["rows"] == 6 and found["recommended"] is None
    with pytest.raises(ConfigError, match="nothing has been trained yet in"):
        compare(path, tmp_path / "d", arms=["tuned"])


def test_a_run_file_whose_run_is_there(run, tmp_path, tiny):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny.model), "data": str(tiny.train), "method": "lora", "output": str(run.path)}))
    assert [a["name"] for a in compare(path, tmp_path / "c", rows=2, arms=["tuned"]).found["arms"]] == ["tuned"]


def test_a_run_without_a_result(tiny, tmp_path):
    begun = Run.create(tmp_path / "begun", load(tiny.config(tmp_path / "begun")), command=[])
    with pytest.raises(RunError, match="no result yet, its state is stopped") as e:
        compare(begun, tmp_path / "c")
    assert "--arms base,few-shot" in e.value.fix
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", [None, ""])
def test_no_held_out_rows(run, tmp_path, monkeypatch, content, no_model):
    no_model()
    monkeypatch.setattr(work, "_kept_rows", lambda path: [])
    with pytest.raises(DataError, match="no held-out rows to compare on") as e:
        compare(run, tmp_path / "c")
    assert "data.held_out" in e.value.fix


def test_held_out_rows_that_were_damaged(tiny, tmp_path):
    begun = Run.create(tmp_path / "begun", load(tiny.config(tmp_path / "begun")), command=[])
    begun.data.mkdir()
    (begun.data / "held_out.jsonl").write_bytes(tiny.held.read_bytes())
    with pytest.raises(RunError, match=r"held_out.jsonl:1: not a held-out row as training wrote it \(KeyError: 'file'\)"):
        compare(begun, tmp_path / "c")


def test_rows_of_plain_text_ask_nothing(run, tmp_path, monkeypatch):
    text = work.formats.from_dict({"kind": "text", "messages": [{"role": "text", "content": "a"}], "file": "f", "line": 1})
    monkeypatch.setattr(work, "_kept_rows", lambda path: [text])
    with pytest.raises(DataError, match="none of the 1 held-out rows ends in an answer"):
        compare(run, tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"arms": ["tune"]}, "tune: there is no such arm", "did you mean 'tuned'?"),
        ({"arms": ["system", "retrieval"]}, "--arms retrieval: it has nothing to go with", "add --system TEXT; add --docs FOLDER"),
        ({"arms": ["endpoint"]}, "--arms endpoint", "add --endpoint URL"),
        ({"arms": ["few-shot"], "shots": 0}, "--arms few-shot", "--shots 1"),
        ({"endpoint": "http://a/v1"}, "--endpoint-model NAME is missing", ""),
        ({"rows": 0, "max_tokens": 0, "shots": -1, "temperature": -1.0}, "--rows 0: must be 1 or more", ""),
        ({"metrics": ["accuracy"]}, "accuracy does not fit these rows", "these fit: exact_match, f1"),
        ({"metrics": ["json"]}, "json does not fit these rows: 0% of the written answers are a JSON", "these fit"),
    ],
)
def test_bad_settings_before_any_model(run, tmp_path, settings, what, fix, no_model):
    no_model()
    with pytest.raises(ConfigError) as e:
        compare(run, tmp_path / "c", **settings)
    assert what in e.value.what and fix in e.value.fix


def test_a_folder_that_is_not_ours(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds no comparison"):
        compare(run, tmp_path)


def test_two_at_once(run, tmp_path):
    with work.own_folder(tmp_path / "c"), pytest.raises(RunError, match="another process is comparing here"):
        compare(run, tmp_path / "c", rows=1)


def test_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        compare(tmp_path, tmp_path / "c")
