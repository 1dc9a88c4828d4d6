"""Every verb as a plain function, one after another on one tiny model, as a notebook would call them."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

import tunesmith
from tunesmith.errors import ConfigError, DataError, ModelError, RunError
from tunesmith.run import Run


def quiet():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return tunesmith.train(tiny.config(tmp_path_factory.mktemp("api") / "run"), console=quiet())


def test_from_rows_to_a_model_one_can_talk_to(tiny, tmp_path):
    """init, check, plan, train, generate, report, merge: what README promises in that order."""
    text = tunesmith.init(tiny.train, model=str(tiny.model), output=str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(text)
    overrides = ("data.held_out=0.2", "train.max_steps=3", "eval.samples=1", "eval.sample_tokens=4", "memory.device=cpu")
    checked, console = tunesmith.check(tmp_path / "run.yaml", *overrides), quiet()
    checked.print(console)
    assert checked.exit_code == 0 and "24" in console.file.getvalue()
    assert checked.page.read_text("utf-8").startswith("<!doctype html>") and (checked.page.parent / "account.json").is_file()
    assert console.file.getvalue().endswith(f"all of it on one page: {checked.page}\n")
    other = tunesmith.check(tmp_path / "run.yaml", *overrides, show=3, page=tmp_path / "check.html", console=quiet())
    assert other.page == tmp_path / "check.html" and "asked for: row 3, " in other.page.read_text("utf-8")
    assert tunesmith.plan(tmp_path / "run.yaml", *overrides).fits
    assert tunesmith.plan(tmp_path / "run.yaml", *overrides, gpu="4090").device.kind == "cuda"
    run = tunesmith.train(tmp_path / "run.yaml", *overrides, console=quiet())
    assert isinstance(run, Run) and run.status().state == "finished" and run.config.train.max_steps == 3
    answers = tunesmith.generate(run.path, ["add 1 and 2", "add 3 and 4"], max_tokens=5)
    assert len(answers) == 2 and all(isinstance(a, str) for a in answers)
    assert "".join(tunesmith.stream(run.path, "add 1 and 2", max_tokens=5)) == answers[0]
    run.report.unlink()
    assert tunesmith.report(run.path) == run.report and run.report.is_file()
    merged = tunesmith.merge(run.path, tmp_path / "merged")
    assert tunesmith.generate(merged, ["add 1 and 2"], max_tokens=5) == answers[:1]


def test_a_run_answers_as_it_did_when_it_was_compared(run):
    found = json.loads((run.path / "comparison.json").read_text())["rows"][:3]
    answers = tunesmith.generate(run.path, [r["prompt"] for r in found], max_tokens=6)
    assert [a.strip() for a in answers] == [r["after"]["answer"] for r in found]


def test_the_command_is_kept(run):
    assert run.manifest["command"] == list(sys.argv)


def test_a_slip_of_the_pen_is_answered_before_anything_is_made(tiny, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        tunesmith.train(tiny.config(tmp_path / "run", lora={"rankk": 3}))
    assert not (tmp_path / "run").exists()


def test_a_resume_of_what_never_began_begins(tiny, tmp_path):
    console = quiet()
    run = tunesmith.train(tiny.config(tmp_path / "run"), "train.max_steps=1", resume=True, console=console)
    assert run.status().state == "finished"
    assert console.file.getvalue().startswith("resume  there is no run in ") and "this begins one" in console.file.getvalue()


def test_another_folder_is_not_trained_into(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"):
        tunesmith.train(tiny.config(tmp_path), console=quiet())
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "run.yaml").exists()


def test_data_that_cannot_be_read_leaves_a_failed_run_that_says_why(tiny, tmp_path):
    with pytest.raises(DataError):
        tunesmith.train(tiny.config(tmp_path / "run", data={"train": str(tmp_path / "none.jsonl")}), console=quiet())
    status = Run.open(tmp_path / "run").status()
    assert status.state == "failed" and "none.jsonl" in status.message


def test_init_answers_a_slip_in_the_datas_name_and_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        tunesmith.init(tmp_path / "chat")
    with pytest.raises(DataError, match="holds no file with rows"):
        tunesmith.init(tmp_path)


def test_a_model_that_is_no_folder_is_answered_with_the_runs_there_are(run, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    for name in ("runs/rum", "./rum"):
        with pytest.raises(ModelError, match=rf"^{name}: no such folder\nfix: run folders here: .*run") as e:
            tunesmith.generate(name, ["hello"])
        assert "owner/name" in e.value.fix


@pytest.mark.parametrize("path", ["nothing", "."])
def test_verbs_over_a_run_name_what_is_no_run(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: tunesmith.report(path), lambda: tunesmith.merge(path, tmp_path / "out")):
        with pytest.raises(RunError):
            call()


def test_the_demo_names_run_losses_and_one_prompt(tiny, tmp_path, capsys, monkeypatch):
    """The demo on the tiny model and a few of its own rows."""
    from tunesmith import demo

    monkeypatch.chdir(tmp_path)
    code = demo.main(
        [
            f"model={tiny.model}",
            "train.max_steps=2",
            "train.batch_size=2",
            "eval.sample_tokens=4",
            "data.max_length=2000",
            "eval.every_steps=100",
            f"data.held_out={tiny.held}",
        ]
    )
    said = capsys.readouterr().out
    assert code == 0 and "runs/demo-1" in said and "tunesmith chat" in said
    assert "held-out loss" in said and "95 % interval" in said
    assert all(any(line.startswith(word) for line in said.splitlines()) for word in ("result", "prompt", "before", "after"))
    assert demo.main(["model=nowhere/at/all"]) == 2


def test_a_larger_model_takes_the_defaults_in_the_demo_and_nothing_else_changes():
    from tunesmith import demo
    from tunesmith.config.load import load

    small, large = load(demo.config("o")), load(demo.config("o", "some/model"))
    assert (small.lora.rank, small.train.epochs, large.model) == (64, 5, "some/model")
    assert (large.lora, large.train) == (type(large.lora)(), type(large.train)())
    assert (small.data, small.method) == (large.data, large.method) and small.eval == large.eval


def test_the_demo_ends_with_its_table_on_the_page_too(tiny, tmp_path, capsys, monkeypatch):
    """The base, the base with a system prompt and the tuned model answer rows that say their topic."""
    from tunesmith import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ANSWER", 4)
    asked = [("on", [["pot"]]), ("off", []), ("chitchat", [])]
    rows = [
        {
            "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a pot"}],
            "topic": topic,
            "facts": facts,
        }
        for i, (topic, facts) in enumerate(asked)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.checkpoint(tmp_path / "model", max_position_embeddings=2048)
    args = ["train.max_steps=1", "train.batch_size=2", "eval.samples=0", "data.max_length=2000", "memory.device=cpu"]
    assert demo.main([f"model={model}", f"data.train={tiny.train}", "data.held_out=held.jsonl", *args]) == 0
    said, run = capsys.readouterr().out, tmp_path / "runs/demo-1"
    page, table = (run / "report.html").read_text("utf-8"), json.loads((run / "comparison.json").read_text("utf-8"))["table"]
    assert table["head"] == ["", *demo.COLUMNS] and len(table["rows"]) == 5
    for name in [*demo.COLUMNS, *(row[0] for row in table["rows"])]:
        assert name in said and name in page
    assert len((run / "demo_answers.jsonl").read_text("utf-8").splitlines()) == 3
    assert [row[1:] for row in table["rows"] if row[0] == "keeps the house style"] == [["0 %"] * 3]


@pytest.mark.parametrize(
    ("now", "load", "spin"),
    [("1/80", 99.0, "20000"), (f"{1 + os.cpu_count()}/80", 0.0, "None"), (None, 0.2, "20000"), (None, 99.0, "None")],
)
def test_threads_spin_a_little_only_where_the_cores_are_idle(now, load, spin, tmp_path):
    """By the programs that run now (a file of Linux), where nobody says by the load."""
    (tmp_path / "loadavg").write_text(f"9 9 9 {now} 7")
    there = str(tmp_path / ("loadavg" if now else "none"))
    code = (
        f"import builtins, os; os.getloadavg = lambda: ({load}, 0, 0); real = open\n"
        f"builtins.open = lambda f, *a, **k: real({there!r} if f == '/proc/loadavg' else f, *a, **k)\n"
        "import tunesmith; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == spin
