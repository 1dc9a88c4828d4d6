"""The command line: light to start, every verb handed to its function, faults without traceback, no markup from anybody's data."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tunesmith
from tunesmith import api, cli
from tunesmith.errors import DoesNotFit, Interrupted, TrainingFailed

HEAVY = {"torch", "transformers", "pyarrow", "tokenizers", "numpy", "pydantic", "safetensors", "huggingface_hub", "jinja2", "yaml"}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import tunesmith", 40),
        ("from tunesmith.cli import main\nmain(['--help'])", 260),
        ("from tunesmith.cli import main\nmain(['nope'])", 260),
    ],
)
def test_starting_is_light(code, most):
    """Modules, not seconds: 0.1 s is about 150 of them here, and torch alone is 1,500."""
    before, after = modules_after("pass"), modules_after(code)
    assert not {m.split(".")[0] for m in after} & HEAVY
    assert len(after - before) < most, sorted(after - before)


def test_the_package_is_the_verbs():
    assert tunesmith.__all__ == api.__all__ and sorted(tunesmith.__all__) == tunesmith.__all__
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is getattr(api, name) and getattr(api, name).__doc__, name
    with pytest.raises(AttributeError, match="nope"):
        tunesmith.nope  # noqa: B018
    assert tunesmith.__version__[0].isdigit()


def test_a_room_with_a_verbs_name_does_not_take_its_place():
    import tunesmith.plan

    assert tunesmith.plan is api.plan
    assert sys.modules["tunesmith.plan"].__name__ == "tunesmith.plan"


@pytest.fixture
def calls(monkeypatch):
    """Each verb's function replaced by one that remembers; `answers` says what it returns, or raises."""
    made = SimpleNamespace(
        list=[],
        answers={
            "init": "model: embedded\n",
            "check": SimpleNamespace(print=lambda console: console.print("checked"), exit_code=1),
            "prepare": SimpleNamespace(print=lambda console: console.print("prepared")),
            "plan": SimpleNamespace(print=lambda console: console.print("planned"), fits=True),
            "sweep": SimpleNamespace(print=lambda console: console.print("swept")),
            "compare": SimpleNamespace(print=lambda console: console.print("compared")),
            "guard": SimpleNamespace(print=lambda console: console.print("guarded"), exit_code=1),
            "train": SimpleNamespace(path=Path("runs/a")),
            "generate": ["[bold]one[/bold]", "[/] two"],
            "merge": Path("out"),
            "export": [SimpleNamespace(exit_code=0), SimpleNamespace(exit_code=1)],
            "report": Path("runs/a/report.html"),
            "explain": "[b]text[/b]",
            "chat": None,
        },
    )

    def remember(name):
        def call(*args, **kwargs):
            kwargs.pop("console", None)
            made.list.append((name, args, kwargs))
            if isinstance(made.answers[name], BaseException):
                raise made.answers[name]
            return made.answers[name]

        return call

    for name in made.answers:
        monkeypatch.setattr(api, name, remember(name))
    monkeypatch.setattr(api, "advice", lambda *args: ["mind this"])
    return made


@pytest.mark.parametrize(
    ("line", "call", "code"),
    [
        (
            "check run.yaml train.epochs=1 --show 3 --model m",
            ("check", ("run.yaml", "train.epochs=1"), {"show": [3], "model": "m", "page": None}),
            1,
        ),
        (
            "check run.yaml --show 17,42 --show 5 a.b=1 --page c.html",
            ("check", ("run.yaml", "a.b=1"), {"show": [17, 42, 5], "model": None, "page": "c.html"}),
            1,
        ),
        (
            "prepare chats data.workers=2 --out made --fix pii,dedup --split-by customer --mix",
            (
                "prepare",
                ("chats", "data.workers=2"),
                {
                    "out": Path("made"),
                    "fix": "pii,dedup",
                    "split": None,
                    "split_by": "customer",
                    "seed": None,
                    "mix": True,
                    "model": None,
                    "overwrite": False,
                },
            ),
            0,
        ),
        (
            "plan run.yaml lora.rank=8 --gpu 4090",
            ("plan", ("run.yaml", "lora.rank=8"), {"gpu": "4090", "context": None, "page": None, "probe": False}),
            0,
        ),
        (
            "plan o/m --context 4096 --page p.html",
            ("plan", ("o/m",), {"gpu": None, "context": 4096, "page": "p.html", "probe": False}),
            0,
        ),
        (
            "sweep run.yaml lora.rank=8,16 train.epochs=1..3:int --trials 9 --jobs 2 --no-prune --out o",
            (
                "sweep",
                ("run.yaml", "lora.rank=8,16", "train.epochs=1..3:int"),
                {"trials": 9, "jobs": 2, "seeds": 1, "prune": False, "out": Path("o")},
            ),
            0,
        ),
        (
            "compare runs/a --docs manuals --system Be --arms base,tuned --metric f1 --metric regex:x,y --endpoint http://a/v1 "
            "--endpoint-model m --rows 9 --shots 2 --max-tokens 30 --out o --seed 4 "
            "--by topic --gold sources --forgetting a.jsonl --forgetting b.txt --judge http://b/v1 --judge-model n --judge-rows 7",
            (
                "compare",
                ("runs/a",),
                {
                    "docs": Path("manuals"),
                    "system": "Be",
                    "shots": 2,
                    "passages": 4,
                    "rows": 9,
                    "arms": ["base", "tuned"],
                    "endpoint": "http://a/v1",
                    "endpoint_model": "m",
                    "metrics": ["f1", "regex:x,y"],
                    "max_tokens": 30,
                    "temperature": 0.0,
                    "seed": 4,
                    "guardrails": 60,
                    "scope": "",
                    "refusal": "",
                    "by": "topic",
                    "gold": "sources",
                    "forgetting": ["a.jsonl", "b.txt"],
                    "judge": "http://b/v1",
                    "judge_model": "n",
                    "judge_rows": 7,
                    "out": Path("o"),
                },
            ),
            0,
        ),
        (
            "guard runs/a --base --scope shop --probes p.csv --limit 9 --min-pass 0.9 --min-pass leak=1 --min-pass a=b=0.5",
            (
                "guard",
                ("runs/a",),
                {
                    "probes": Path("p.csv"),
                    "docs": None,
                    "base": True,
                    "system": "",
                    "scope": "shop",
                    "refusal": "",
                    "limit": 9,
                    "min_pass": {"": 0.9, "leak": 1.0, "a=b": 0.5},
                    "max_tokens": 96,
                    "seed": 0,
                    "out": None,
                },
            ),
            1,
        ),
        ("train run.yaml a.b=-1 c.d=[x] --resume", ("train", ("run.yaml", "a.b=-1", "c.d=[x]"), {"resume": True}), 0),
        ("merge runs/a out --onto dense", ("merge", ("runs/a", "out"), {"onto": "dense"}), 0),
        (
            "export runs/a --to gguf,merged --quant q4_0 --out o --push me/x",
            (
                "export",
                ("runs/a", "gguf,merged"),
                {"quant": "q4_0", "onto": "auto", "out": Path("o"), "force": False, "push": "me/x"},
            ),
            1,
        ),
        ("report runs/a", ("report", ("runs/a",), {}), 0),
        ("explain", ("explain", ("",), {}), 0),
        ("explain lora.rank", ("explain", ("lora.rank",), {}), 0),
        (
            "chat runs/a --system Be --temperature 0",
            ("chat", ("runs/a",), {"adapter": None, "system": "Be", "max_tokens": 512, "temperature": 0.0}),
            0,
        ),
    ],
)
def test_verbs_pass_on_what_was_said(calls, line, call, code):
    assert cli.main(line.split()) == code
    assert calls.list == [call]


def test_plan_says_advice_after_the_plan(calls, capsys):
    assert cli.main(["plan", "run.yaml"]) == 0
    assert capsys.readouterr().out == "planned\nadvice  mind this\n"


def test_generate_takes_prompts_from_both_and_prints_answers_as_they_are(calls, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("third\n\nfourth\n")
    assert cli.main(["generate", "m", "--prompt", "first", "--prompt", "second", "--file", str(tmp_path / "p.txt"), "--raw"]) == 0
    ((_, args, kwargs),) = calls.list
    assert args == ("m", ["first", "second", "third", "fourth"]) and kwargs["raw"] is True and kwargs["max_tokens"] == 256
    assert capsys.readouterr().out == "[bold]one[/bold]\n[/] two\n"


def test_init_writes_the_file_once(calls, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "chats.jsonl", "--model", "a/b"]) == 0
    assert Path("run.yaml").read_text() == "model: embedded\n" and "tunesmith check run.yaml" in capsys.readouterr().out
    assert calls.list == [("init", ("chats.jsonl",), {"model": "a/b", "from_": None})]
    assert cli.main(["init", "chats.jsonl"]) == 2 and "already there" in capsys.readouterr().err
    assert cli.main(["init", "--from", "ax.yml", "--output", "b.yaml"]) == 0 and calls.list[-1][2]["from_"] == "ax.yml"
    assert cli.main(["init"]) == 2 and cli.main(["init", "x", "--output", "no/such/run.yaml"]) == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trian run.yaml", 'Did you mean "train"?'),
        ("plan run.yaml --gup 4090", "Did you mean --gpu?"),
        ("train", "CONFIG"),
        ("merge runs/a", "OUT"),
        ("check run.yaml --show many", "'many' is no row"),
        ("check run.yaml --show 3,,4", "'' is no row"),
        ("check run.yaml --page chats.jsonl", "the page is an HTML file"),
        ("check run.yaml --page no/such/check.html", "there is no folder no/such"),
        ("generate m", 'give --prompt "..."'),
        ("generate m --file nope.txt", "nope.txt: cannot be read"),
    ],
)
def test_wrong_lines_say_what_was_meant_and_exit_2(line, told, capsys):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and "\nfix: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (DoesNotFit("[red]needs[/red] 30 GB\nand disk", "lower [x]"), 2),
        (TrainingFailed("nan", "lower it"), 1),
        (Interrupted("saved", "--resume"), 130),
    ],
)
def test_faults_are_said_as_error_and_fix_line_by_line(calls, capsys, fault, code):
    calls.answers["train"] = fault
    assert cli.main(["train", "run.yaml"]) == code
    err = capsys.readouterr().err
    assert err == "".join(f"error: {line}\n" for line in fault.what.splitlines()) + f"fix: {fault.fix}\n"


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(calls, capsys):
    calls.answers["train"] = KeyboardInterrupt()
    assert cli.main(["train", "run.yaml"]) == 130
    assert capsys.readouterr().err.startswith("error: stopped\nfix: give the same command again")
    calls.answers["train"] = ZeroDivisionError("ours")
    assert cli.main(["train", "run.yaml"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: ours" in err and "please report it" in err


def test_nothing_said_gets_the_help_and_a_beginning(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr()
    assert "From your rows to a model you can talk to" in told.out
    assert told.err.startswith("error: no command was given\nfix: begin with: tunesmith init DATA")


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.EIO, 70)])
def test_a_place_one_may_not_write_is_the_persons_to_mend(calls, capsys, number, code):
    calls.answers["train"] = OSError(number, os.strerror(number), "/some/folder")
    assert cli.main(["train", "run.yaml"]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (code == 70)
    if code == 2:
        assert err.startswith(f"error: /some/folder: {os.strerror(number)}\nfix: ")


def test_what_is_explained_hangs_under_its_column_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["explain", "lora.rank"]) == 0
    plain = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) > 60, "in a file lines stay whole"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["explain", "lora.rank"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  too high  "))
    assert max(map(len, lines)) <= 60 and re.match(r" {12}\S", lines[at + 1])


def test_a_wrong_run_file_from_the_shell(tmp_path):
    """The real program, through its real functions."""
    (tmp_path / "run.yaml").write_text("model: embedded\ndata: a.jsonl\nmethod: lora\noutput: runs/a\nlora: {rankk: 8}\n")
    done = subprocess.run([sys.executable, "-m", "tunesmith.cli", "plan", "run.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: run.yaml:5: lora.rankk: unknown key; did you mean 'rank'?\nfix: "
    )
    done = subprocess.run([sys.executable, "-m", "tunesmith.cli", "explain", "lora.rank"], capture_output=True, text=True)
    assert done.returncode == 0 and "Axolotl   lora_r" in done.stdout


def test_help_lists_every_verb_in_one_screen(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in set(tunesmith.__all__) - {"stream"})
    assert len(out.splitlines()) <= 40


def test_a_system_prompt_may_be_a_file(calls, tmp_path, monkeypatch):
    (tmp_path / "system.txt").write_text("\ufeffBe kind.\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    for said in ("system.txt", "Be kind.", "x" * 5000):
        assert cli.main(["compare", "runs/a", "--system", said]) == 0
    assert [kwargs["system"] for _, _, kwargs in calls.list] == ["Be kind.", "Be kind.", "x" * 5000]


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_cache_of_no_size_is_told(size, capsys):
    assert cli.main(["serve", "embedded", "--cache-gb", size]) == 2
    assert f"--cache-gb {size}: no size" in capsys.readouterr().err
