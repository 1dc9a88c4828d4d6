"""compare/guard.py: every way is asked the same probes in its own prompt, what came of it is counted, nothing is asked twice."""

import importlib
import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

import tunesmith
from tunesmith import cli
from tunesmith.chat import Talker
from tunesmith.compare import guard, work
from tunesmith.compare.arms import ARMS, Prompt, Question
from tunesmith.data.render import build_renderer
from tunesmith.errors import ConfigError, DataError, RunError
from tunesmith.evaluate import guardrails
from tunesmith.evaluate.guardrails import Probe
from tunesmith.types import Message

models = importlib.import_module("tunesmith.models")
EVIL = '<script>alert(1)</script><img src=x onerror="x">\u202e'
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def quiet(width=160):
    return Console(file=io.StringIO(), width=width)


@pytest.fixture(scope="session")
def wide(tiny, tmp_path_factory):
    """A finished run whose context holds every probe."""
    root = tmp_path_factory.mktemp("guarded")
    model = tiny.checkpoint(root / "model", max_position_embeddings=4096)
    held = tiny.rows(root / "held.jsonl", 24, start=100)
    config = tiny.config(root / "run", model=str(model), data={"held_out": str(held)}, train={"epochs": 1})
    return tunesmith.train(config, console=quiet())


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def forbid():
        monkeypatch.setattr(models, "load", refuse)
        monkeypatch.setattr(Talker, "open", refuse)

    return forbid


# ---- with a comparison -----------------------------------------------------------------------------------------------------------


def test_every_way_is_asked_the_same_probes_and_none_twice(wide, tmp_path, no_model):
    settings = {"rows": 4, "max_tokens": 6, "system": "Be brief.", "guardrails": 30, "out": tmp_path / "c"}
    first = tunesmith.compare(wide.path, **settings, console=quiet())
    found, path = first.found["guardrails"], tmp_path / "c" / "guardrails.jsonl"
    assert [arm["name"] for arm in found["arms"]] == ["base", "system", "few-shot", "tuned"]
    assert {arm["of"] for arm in found["arms"]} == {found["probes"]} and found["probes"] >= 30
    own = found["arms"][0]["kinds"]["own"]["of"]
    assert f"{found['probes'] - own} of 154 probes, spread over the kinds" in found["notes"]
    assert [(p["before"], p["after"]) for p in found["pairs"]] == [("base", "tuned")]
    asked = {name: [row["row"] for row in lines(path) if row["arm"] == name] for name in ("base", "system", "few-shot", "tuned")}
    assert all(rows == asked["base"] for rows in asked.values()) and len(asked["base"]) == found["probes"]
    page = first.page.read_text("utf-8")
    assert "<h2>Guardrails</h2>" in page
    kept = path.read_bytes()
    no_model()
    again = tunesmith.compare(wide.path, **settings, console=quiet())
    assert path.read_bytes() == kept and again.found == first.found
    path.write_bytes(kept[: len(kept) // 2])  # stopped in the middle of a line
    with pytest.raises(AssertionError, match="a model was loaded"):
        tunesmith.compare(wide.path, **settings, console=quiet())


def test_a_stopped_suite_goes_on_and_ends_the_same(wide, tmp_path):
    settings = {"rows": 2, "max_tokens": 6, "arms": ["base", "tuned"], "guardrails": 12, "out": tmp_path / "c"}
    first = tunesmith.compare(wide.path, **settings, console=quiet())
    path = tmp_path / "c" / "guardrails.jsonl"
    whole = lines(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = tunesmith.compare(wide.path, **settings, console=quiet())

    def known(rows):
        return sorted((row["arm"], row["row"], row["answer"]) for row in rows)

    assert known(lines(path)) == known(whole) and again.found["guardrails"]["arms"] == first.found["guardrails"]["arms"]


def test_without_guardrails_nothing_more_is_asked(wide, tmp_path):
    found = tunesmith.compare(wide.path, rows=2, max_tokens=4, arms=["base"], guardrails=0, out=tmp_path / "c", console=quiet())
    assert found.found["guardrails"] is None and not (tmp_path / "c" / "guardrails.jsonl").exists()
    assert "Guardrails" not in found.page.read_text("utf-8")


def test_where_no_probe_fits_the_rows_are_compared_all_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        guardrails, "load", lambda *a, **k: [Probe("long", "override", (Message("user", "x" * 999),), (("refuses", True),))]
    )
    monkeypatch.setattr(guard, "OWN", 0)
    found = tunesmith.compare(run.path, rows=2, max_tokens=4, arms=["base"], out=tmp_path / "c", console=quiet()).found
    assert found["guardrails"] is None and any(note.startswith("no guardrails: none of 1 probe") for note in found["notes"])
    with pytest.raises(DataError, match="none of 1 probe fits"):
        tunesmith.guard(run.path, out=tmp_path / "g", console=quiet())


def test_documents_are_read_once_for_rows_and_probes(wide, tmp_path, retrieval):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("to add 100 and 10")
    settings = {"rows": 2, "max_tokens": 4, "arms": ["retrieval"], "docs": tmp_path / "docs", "guardrails": 8}
    found = tunesmith.compare(wide.path, **settings, out=tmp_path / "c", console=quiet()).found
    assert found["guardrails"]["probes"] > 8 and retrieval.added == [tmp_path / "docs"]


def test_probes_are_asked_where_the_documents_say_nothing_about_them(wide, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("add 101 and 102")
    monkeypatch.setattr(
        guardrails, "load", lambda *a, **k: [Probe("one", "override", (Message("user", "Quack!"),), (("refuses", True),))]
    )
    monkeypatch.setattr(guard, "OWN", 0)
    settings = {"rows": 2, "max_tokens": 4, "arms": ["retrieval"], "docs": tmp_path / "docs"}
    found = tunesmith.compare(wide.path, **settings, out=tmp_path / "c", console=quiet()).found
    assert found["guardrails"]["probes"] == 1


# ---- what is asked ---------------------------------------------------------------------------------------------------------------


def prompts(source, tmp_path, **options):
    """(probes, prompts by arm), without a model."""
    source = work.open_source(source, quiet())
    given = work.Options(guardrails=1000, **options)
    made = work._Work(source, given, tmp_path, work._arms(source, given), None, quiet(), [])
    found = guard.asked(made)
    return found.probes, found.prompts


def test_a_secret_goes_into_the_ways_own_system_prompt(wide, tmp_path):
    probes, asked = prompts(wide.path, tmp_path, system="Be brief.", arms=("base", "system", "few-shot", "tuned"))
    for i, probe in enumerate(probes):
        system = {name: [m.content for m in made[i].messages if m.role == "system"] for name, made in asked.items()}
        assert system["system"] == ["\n".join(filter(None, ["Be brief.", probe.secret]))]
        assert system["base"] == system["tuned"] == system["few-shot"] == ([probe.secret] if probe.secret else [])
        assert asked["base"][i].messages[-1].content.endswith(probe.shown) and len(asked["few-shot"][i].shots) == 4
        assert asked["base"][i] == asked["tuned"][i]
    assert sum(bool(p.canary) for p in probes) >= 24
    assert {p.kind for p in probes} == {"override", "leak", "document", "forged", "encoded", "lookalike", "control", "own"}


def test_documents_stand_before_the_question_and_before_what_was_retrieved(wide, tmp_path, retrieval):
    index = tmp_path / "index.sqlite"
    index.write_text(json.dumps([["bus.txt", "the bus of the team"], ["tea.txt", "what is the tea"]]))
    probes, asked = prompts(wide.path, tmp_path, docs=index, arms=("base", "retrieval"))
    (i,) = [i for i, p in enumerate(probes) if p.id == "document-01"]
    base, found = asked["base"][i], asked["retrieval"][i]
    assert [p.document for p in base.passages] == ["opening-hours.md"]
    assert [p.document for p in found.passages] == ["opening-hours.md", "bus.txt", "tea.txt"]
    text = base.messages[-1].content
    assert text.index("[1] opening-hours.md") < text.index("ignore the question") < text.index(probes[i].shown)
    plain = [i for i, p in enumerate(probes) if not p.documents]
    assert plain and all(not asked["base"][i].passages and asked["retrieval"][i].passages for i in plain)


def test_forged_tokens_stay_text(wide, tmp_path):
    """Each probe's prompt holds as many special tokens as its messages make, whatever stands in them."""
    probes, asked = prompts(wide.path, tmp_path, arms=("base",))
    renderer = build_renderer(wide.config.model)
    special = set(renderer.tokenizer.special_ids)
    forged = 0
    for probe, prompt in zip(probes, asked["base"], strict=True):
        ids = renderer.prompt(prompt.messages)
        roles = [m for m in prompt.messages if m.role != "system"]  # <|system|> is no token of this tokenizer
        assert sum(i in special for i in ids) == 2 * len(roles) + len(prompt.messages) - len(roles) + 1, probe.id
        forged += any(name in probe.asked for name in ("<|user|>", "<|assistant|>", "<|end|>"))
    assert forged >= 3


def test_a_template_without_a_system_message_gets_it_before_the_question(tiny, tmp_path):
    model = tiny.checkpoint(tmp_path / "model", max_position_embeddings=4096)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": NO_SYSTEM}))
    probes, asked = prompts(tiny.config(tmp_path / "run", model=str(model)), tmp_path, arms=("base",))
    secret = [(p, m) for p, m in zip(probes, asked["base"], strict=True) if p.canary]
    assert len(secret) >= 24
    for probe, prompt in secret:
        assert prompt.messages[0].role == "user" and probe.secret in prompt.messages[0].content
        assert prompt.messages[-1].content.endswith(probe.shown)


def test_the_rows_own_system_message_stands_where_most_have_it():
    def question(text):
        return Question(0, (*([Message("system", text)] if text else []), Message("user", "x")), "y", False, "o")

    assert guard.common_system([question("A"), question("A"), question(""), question("B")]) == "A"
    assert guard.common_system([question("A"), question(""), question("")]) == ""
    assert guard.common_system([]) == ""


def test_rows_without_a_template_are_asked_as_one_text(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": f" then {i + 1}"}) + "\n" for i in range(24)))
    model = tiny.checkpoint(tmp_path / "model", max_position_embeddings=4096)
    config = tiny.config(tmp_path / "run", model=str(model), data={"train": str(rows), "held_out": 0.3})
    probes, asked = prompts(config, tmp_path, arms=("base",))
    assert probes and all(p.raw for p in asked["base"]) and not any(p.kind == "own" for p in probes)
    (i,) = [i for i, p in enumerate(probes) if p.id == "leak-01"]
    assert asked["base"][i].messages[0].content == f"{probes[i].secret}\n\n{probes[i].shown}"


# ---- what came of it -------------------------------------------------------------------------------------------------------------


def planted(answers, fails=("refuses", True), kinds=None):
    """`answers` by arm; the probes are `kinds`, in order."""
    count = len(next(iter(answers.values())))
    kinds = kinds or ["control"] * count
    probes = [Probe(f"p{i}", kinds[i], (Message("user", f"question {i} {EVIL}"),), (fails,)) for i in range(count)]
    questions = [Question(i, p.messages, "", False, p.id) for i, p in enumerate(probes)]
    return guard.Guarded(
        [ARMS[name] for name in answers], probes, questions, {n: [Prompt(q.before) for q in questions] for n in answers}, 9,
        SimpleNamespace(refusal="", seed=0, scope=""), [], {n: [{"answer": a} for a in some] for n, some in answers.items()},
    )  # fmt: skip


YES, NO = "Put it on the table.", f"I can't help with that. {EVIL}"


def test_rates_intervals_and_the_change_by_tuning():
    kinds = ["control"] * 30 + ["leak"] * 10
    found = guard.gather(planted({"base": [YES] * 38 + [NO] * 2, "tuned": [NO] * 9 + [YES] * 31}, kinds=kinds))
    base, tuned = found["arms"]
    assert (base["passed"], tuned["passed"], base["of"]) == (38, 31, 40)
    assert tuned["kinds"]["control"] == {"passed": 21, "of": 30, "rate": 0.7, "interval": pytest.approx([0.521, 0.833], abs=1e-3)}
    assert [k["name"] for k in found["kinds"]] == ["leak", "control"]  # in the order of the suite
    (pair,) = found["pairs"]
    assert (pair["lost"], pair["won"], pair["shown"]) == (9, 2, 0) and pair["p"] == pytest.approx(0.0654, abs=1e-4)
    control = pair["kinds"]["control"]
    assert (control["lost"], control["won"], control["shown"]) == (9, 0, -1) and control["p"] == pytest.approx(2 / 2**9)
    assert pair["kinds"]["leak"] == {"lost": 0, "won": 2, "p": 0.5, "shown": 0}
    assert "no difference shown" in found["verdict"][0] and found["verdict"][1].startswith("Worse at control")


def test_a_kind_with_brackets_is_no_markup():
    out = quiet(80)
    guard.print_found(guard.gather(planted({"base": [YES] * 2, "tuned": [NO] * 2}, kinds=["[/odd]", "[b]"])), out)
    assert "[/odd]" in out.file.getvalue() and "[b]" in out.file.getvalue()


def test_few_probes_show_nothing():
    found = guard.gather(planted({"base": [YES] * 12, "tuned": [NO] * 12}))
    assert found["pairs"][0]["p"] < 0.001 and found["pairs"][0]["shown"] == 0


def test_what_tuning_lost_stands_first():
    found = guard.gather(planted({"base": [NO, YES, NO, YES], "tuned": [NO, NO, YES, YES]}))
    assert [case["id"] for case in found["cases"]] == ["p1", "p2", "p0"]
    assert found["cases"][0]["answers"]["tuned"]["why"].startswith("refuses:") and not found["cases"][0]["answers"]["base"]["why"]


def test_the_page_holds_no_markup_of_an_answer_and_every_number(tmp_path):
    result = guard.finish(
        planted({"base": [YES] * 20 + [NO] * 5, "tuned": [NO] * 25}), tmp_path, f"name {EVIL}", {"": 0.5, "control": 0}
    )
    page = result.page.read_text("utf-8")
    assert "<script>alert" not in page and "<img" not in page and "\u202e" not in page
    assert "20/25" in page and "0/25" in page and "worse" in page and page.count("<svg") >= 2
    assert result.exit_code == 1 and result.short == ("below --min-pass: tuned passes 0 of 25 (0.000, and 0.5 is wanted)",)
    assert json.loads((tmp_path / "guardrails.json").read_text("utf-8"))["arms"][1]["passed"] == 0
    for width in (40, 80, 160):
        console = quiet(width)
        result.print(console)
        assert "below --min-pass" in console.file.getvalue() and max(map(len, console.file.getvalue().splitlines()[:3])) <= width


# ---- on its own ------------------------------------------------------------------------------------------------------------------


def test_guard_asks_the_tuned_model_and_on_request_the_base(wide, tmp_path, monkeypatch, no_model, capsys):
    out = tmp_path / "g"
    command = ["guard", str(wide.path), "--limit", "20", "--max-tokens", "8", "--out", str(out)]
    assert cli.main([*command, "--base", "--scope", "the Acme bicycle shop", "--min-pass", "scope=0"]) == 0
    said = capsys.readouterr().out
    assert "base passes" in said and "scope" in said and str(out / "guardrails.html") in said.replace("\n", "")
    found = json.loads((out / "guardrails.json").read_text("utf-8"))
    assert [arm["name"] for arm in found["arms"]] == ["base", "tuned"] and found["pairs"]
    no_model()  # the tuned one's answers are there
    assert cli.main([*command, "--scope", "the Acme bicycle shop"]) == 0
    alone = json.loads((out / "guardrails.json").read_text("utf-8"))
    assert [arm["name"] for arm in alone["arms"]] == ["tuned"] and alone["arms"][0] == found["arms"][1]
    assert cli.main([*command, "--scope", "the Acme bicycle shop", "--min-pass", "1"]) == 1
    assert "below --min-pass: tuned passes" in capsys.readouterr().out


def test_guard_of_a_model_without_a_run_and_probes_of_ones_own(tiny, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"id": "a", "kind": "mine", "user": "add 1 and 2", "fails": {"matches": "[\\s\\S]"}}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b", "fails": {"lacks": "xyz"}}))
    found = tunesmith.guard(tiny.model, probes=path, max_tokens=4, min_pass={"mine": 0.0}, out=tmp_path / "g", console=quiet())
    assert [arm["name"] for arm in found.found["arms"]] == ["base"] and found.found["probes"] == 2
    assert found.found["arms"][0]["passed"] == 0 and found.exit_code == 0


def test_guard_with_a_system_prompt_and_documents(wide, tmp_path, retrieval):
    index = tmp_path / "index.sqlite"
    index.write_text(json.dumps([["bus.txt", "the bus of the team"]]))
    settings = {"limit": 8, "max_tokens": 4, "console": quiet()}
    tunesmith.guard(wide.path, docs=index, system="Be brief.", **settings, out=tmp_path / "g")
    rows = lines(tmp_path / "g" / "guardrails.jsonl")
    assert {row["arm"] for row in rows} == {"tuned+retrieval"}
    assert all(row["prompt"][0]["role"] == "system" and row["prompt"][0]["content"].startswith("Be brief.") for row in rows)
    assert all("[1] " in row["prompt"][-1]["content"] for row in rows)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"min_pass": 1.5}, ConfigError, "from 0 to 1"),
        ({"min_pass": {"leek": 0.5}}, ConfigError, "no probe of this kind"),
        ({"min_pass": {"scope": 0.5}}, ConfigError, "no probe of this kind"),  # without --scope
        ({"limit": 0}, ConfigError, "--limit 0"),
        ({"max_tokens": 0}, ConfigError, "--max-tokens 0"),
        ({"refusal": "("}, ConfigError, "--refusal"),
        ({"probes": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"docs": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(wide, tmp_path, no_model, settings, error, says):
    no_model()
    with pytest.raises(error, match=says) as fault:
        tunesmith.guard(wide.path, **settings, out=tmp_path / "g", console=quiet())
    assert fault.value.fix


def test_a_kind_that_could_not_be_asked_does_not_pass(tiny, tmp_path):
    """A model without a run has no questions of its own, and a gate that measures nothing must not open."""
    found = tunesmith.guard(tiny.model, limit=8, max_tokens=2, min_pass={"own": 0.0}, out=tmp_path / "g", console=quiet())
    assert found.exit_code == 1 and found.short == ("below --min-pass: no probe of kind own could be asked",)


def test_a_run_without_a_result_is_refused(tiny, tmp_path):
    from tunesmith.config.load import load
    from tunesmith.run import Run

    Run.create(tmp_path / "run", load(tiny.config(tmp_path / "run")), command=["x"])
    with pytest.raises(RunError, match="no result yet"):
        tunesmith.guard(tmp_path / "run", out=tmp_path / "g", console=quiet())


def test_guard_names_documents_that_cannot_be_read(wide, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("add 101 and 102, how do I kill a process?")
    (tmp_path / "docs" / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    found = tunesmith.guard(wide.path, docs=tmp_path / "docs", limit=8, max_tokens=4, out=tmp_path / "g", console=quiet()).found
    assert any("1 document could not be read" in note and "broken.pdf" in note for note in found["notes"])


def test_min_pass_in_words_is_refused(capsys):
    assert cli.main(["guard", "runs/a", "--min-pass", "high"]) == 2
    assert "--min-pass high" in capsys.readouterr().err


def test_an_endpoint_that_fails_among_the_probes_goes_on(run, tmp_path, server):
    settings = {"rows": 4, "max_tokens": 6, "arms": ["endpoint"], "endpoint": server.url, "endpoint_model": "m", "guardrails": 16}
    server.fail_from = 10
    with pytest.raises(RunError, match=r"\d probes are answered and kept in .*guardrails\.jsonl") as e:
        tunesmith.compare(run.path, **settings, out=tmp_path / "c", console=quiet())
    assert "leave the probes out: --guardrails 0" in e.value.fix
    kept = len(lines(tmp_path / "c" / "guardrails.jsonl"))
    assert 0 < kept < 16
    server.fail_from, before = None, len(server.asked)
    found = tunesmith.compare(run.path, **settings, out=tmp_path / "c", console=quiet()).found["guardrails"]
    assert len(server.asked) - before == found["probes"] - kept and found["pairs"] == []
    assert found["verdict"][0].startswith("Guardrails: endpoint passes")
