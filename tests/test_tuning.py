"""One run from its file to its folder: all that docs/architecture.md promises is there, and says what is so."""

import functools
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

import tunesmith
from tunesmith import adapters, models, tuning
from tunesmith.config.load import load
from tunesmith.config.schema import Memory
from tunesmith.data.render import build_renderer
from tunesmith.errors import AdapterError, ConfigError, DataError, DoesNotFit, ModelError, RunError, TrainingFailed
from tunesmith.evaluate import heldout
from tunesmith.ops import backend
from tunesmith.plan.layers import WHOLE, Layers
from tunesmith.run import Run
from tunesmith.train import log


def quiet(**how):
    return Console(file=io.StringIO(), width=100, **how)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run and what it said."""
    console = quiet()
    run = tunesmith.train(tiny.config(tmp_path_factory.mktemp("finished") / "run"), console=console)
    return SimpleNamespace(run=run, said=console.file.getvalue())


def test_the_run_folder_is_complete(finished, tiny):
    run = finished.run
    for name in (
        "run.yaml",
        "manifest.json",
        "status.json",
        "metrics.jsonl",
        "samples.jsonl",
        "plan.json",
        "comparison.json",
        "README.md",
        "report.html",
        "data/account.json",
        "data/refused.jsonl",
        "data/held_out.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/chat_template.jinja",
    ):
        assert (run.path / name).is_file(), name
    assert not (run.path / "best").exists() and not [p for p in run.path.rglob("*") if ".tmp" in p.name or ".old" in p.name]
    assert run.status().state == "finished" and (run.status().step, run.status().steps) == (12, 12)
    assert load(str(run.path / "run.yaml")) == run.config
    manifest = run.manifest
    for key in ("data", "base", "template_sha256", "date", "finished", "seconds", "tokens", "micro_batch_tokens", "base_name"):
        assert manifest[key], key
    assert manifest["device"] == "CPU in fp32" and manifest["out_of_memory"] == 0
    page = run.report.read_text()
    assert ">Few rows<" in page and "not that an answer is true" in page and not re.search(r"""(src|href)=["']https?:""", page)
    assert "held-out loss" in (run.path / "README.md").read_text()


def test_metrics_have_every_step_and_evaluation_once(finished):
    rows = finished.run.metrics()
    steps, evals = ([r for r in rows if r["kind"] == kind] for kind in ("step", "eval"))
    assert [r["step"] for r in steps] == list(range(1, 13)) and [r["step"] for r in evals] == [0, 4, 8, 12]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second"} <= steps[0].keys()
    assert finished.run.manifest["tokens"] == sum(r["tokens"] for r in steps)
    assert [(s["step"], s["index"]) for s in finished.run.samples()] == [(s, i) for s in (0, 4, 8, 12) for i in (0, 1)]


def test_the_comparison_is_right(finished, tiny):
    """Losses and answers of the untuned and of the tuned model, computed again from the folder alone."""
    run = finished.run
    found, config = json.loads((run.path / "comparison.json").read_text()), run.config
    renderer = build_renderer(run.tokenizer, config.data, date=run.manifest["date"], saved=True)
    rows = [json.loads(line)["messages"] for line in tiny.held.read_text().splitlines()]
    base, tuned = models.load(tiny.model), models.load(tiny.model)
    adapters.load(tuned, run.adapter)
    means = {}
    for name, model in (("before", base.eval()), ("after", tuned.eval())):
        totals, counts = [], []
        for i, turns in enumerate(rows):
            ids = torch.tensor(renderer.prompt(turns[:-1]))
            if len(turns) == 2:  # one answer: all that is learned comes after the prompt
                whole = torch.tensor(renderer.prompt(turns)[:-1])  # without the next turn's generation prompt
                losses = torch.nn.functional.cross_entropy(model(whole)[:-1], whole[1:], reduction="none")[len(ids) - 1 :]
                assert found["loss"]["each"][name][i] == pytest.approx(losses.mean().item(), rel=1e-5)
            asked = heldout.Asked(i, tuple(ids.tolist()), turns[-2]["content"], turns[-1]["content"])
            row = found["rows"][i]
            assert (row["prompt"], row["gold"]) == (asked.shown, asked.gold)
            assert row[name]["answer"] == heldout.answers(model, [asked], renderer, tokens=6)[0]
            totals.append(found["loss"]["each"][name][i])
            counts.append(tokens_learned(turns))
        means[name] = float(np.average(totals, weights=counts))
        assert found["loss"][name] == pytest.approx(means[name], rel=1e-6)
    assert any(r["before"]["answer"] != r["after"]["answer"] for r in found["rows"]) and found["loss"]["rows"] == len(rows)
    assert found["loss"]["difference"] == pytest.approx(means["after"] - means["before"], rel=1e-5)
    low, high = found["loss"]["interval"]
    assert low < found["loss"]["difference"] < high < 0
    change = np.array(found["loss"]["each"]["after"]) - found["loss"]["each"]["before"]
    weight = np.array([tokens_learned(t) for t in rows], float)
    draws = np.random.default_rng(1).integers(0, len(rows), (4000, len(rows)))
    means_N = (change[draws] * weight[draws]).sum(1) / weight[draws].sum(1)
    plain = np.quantile(means_N, [0.025, 0.975])
    assert low <= plain[0] + 1e-3 and high >= plain[1] - 1e-3, "wider than the plain percentiles: there are six rows"
    assert (high - low) < 2.5 * (plain[1] - plain[0])


def tokens_learned(turns):
    return sum(len(t["content"].encode()) + 1 for t in turns if t["role"] == "assistant")


def test_what_a_person_sees(finished):
    said = finished.said
    for line in (
        r"model   .*lora on CPU in fp32",
        r"learned: every assistant turn",
        r"data    30 rows used, 0 refused; 24 exa",
        r"6 held out; 553 of 967 tokens are learned",
        r"what is learned, shown on .*train.jsonl:\d+",
        r"▸it is 0<\|end\|>◂",
        r"plan    fits",
        r"held-out loss \d\.\d+ before",
        r"step 12/12",
        r"held-out loss \d\.\d+ after step 12",
        r"result  held-out loss 5\.798 before, 4\.\d+ after \(few rows: -1\.\d+, 95 % interval .* 6 rows never trained on\)",
        r"prompt +add 100 and 11",
        r"before +\S",
        r"after +\S",
    ):
        assert re.search(line, said), line
    assert said.index("▸") < said.index("plan") < said.index("step 1/12")
    assert "\x1b" not in said and "note:" not in said


def test_on_a_terminal_the_trained_tokens_are_coloured_and_text_is_no_markup(tiny, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"[red]{i}"}, {"role": "assistant", "content": "[/nope] [bold]x[/]"}]}
        for i in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    console = quiet(force_terminal=True, color_system="standard")
    data = {"train": str(tmp_path / "data.jsonl"), "held_out": str(tmp_path / "data.jsonl")}
    tunesmith.train(tiny.config(tmp_path / "run", data={**data, "held_out": str(tiny.held)}), console=console)
    said = console.file.getvalue()
    assert re.search(r"\x1b\[1;32m\[/nope\] \[bold\]x\[/\]", said) and "green tokens are trained" in said


def test_no_answer_controls_the_terminal():
    console = quiet(force_terminal=True)
    tuning._line(console, "x", "a\x1b[2Jb\u202ec")
    assert "\x1b[2J" not in console.file.getvalue() and "\u202e" not in console.file.getvalue()
    assert tuning._short("a\x1b]0;t\x07 \r\n b", 40) == "a�]0;t� b" and tuning._short("x" * 50, 10) == "x" * 9 + "…"


def test_without_held_out_rows_it_says_so(tiny, tmp_path):
    console, config = quiet(), tiny.config(tmp_path / "run", data={"held_out": 0})
    del config["eval"]
    run = tunesmith.train(config, console=console)
    assert run.status().state == "finished" and not (run.path / "comparison.json").exists()
    assert "no held-out rows" in console.file.getvalue() and "Not shown" in run.report.read_text()
    assert not [r for r in run.metrics() if r["kind"] == "eval"] and not run.samples()


def test_without_samples_there_are_losses_and_no_answers(tiny, tmp_path):
    config = tiny.config(tmp_path / "run")
    config["eval"] = {"samples": 0}
    run = tunesmith.train(config, console=quiet())
    found = json.loads((run.path / "comparison.json").read_text())
    assert found["rows"] == [] and found["loss"]["after"] < found["loss"]["before"] and not run.samples()


def test_twenty_held_out_rows_are_enough_to_say_better(tiny, tmp_path):
    for rows, word in ((19, "few rows"), (20, "better")):
        held = tiny.rows(tmp_path / f"{rows}.jsonl", rows, start=200)
        console, config = quiet(), tiny.config(tmp_path / f"run{rows}", data={"held_out": str(held)})
        page = tunesmith.train({**config, "eval": {"samples": 0}}, console=console).report.read_text()
        assert f"({word}: -" in console.file.getvalue() and f">{word.capitalize()}<" in page


def test_best_weights_count_in_what_the_disk_must_hold(tiny, tmp_path, monkeypatch):
    """With room for the checkpoints alone a run is refused before its first step, and begins where no best weights are kept."""
    asked = []
    monkeypatch.setattr(tuning.checkpoint, "ensure_room", lambda folder, needed, what: asked.append(needed))
    for best in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(tuning.loop, "fit", lambda *a, **k: (_ for _ in ()).throw(TrainingFailed("enough", "")))
            with pytest.raises(TrainingFailed):
                tunesmith.train(tiny.config(tmp_path / str(best), eval={"keep_best": best}), console=quiet())
    without, with_best = asked
    assert without < with_best < 1.5 * without, "float32 weights beside weights and two averages"


def test_one_held_out_row_gives_no_interval(tiny, tmp_path):
    held = tiny.rows(tmp_path / "held.jsonl", 1, start=200)
    console = quiet()
    run = tunesmith.train(tiny.config(tmp_path / "run", data={"held_out": str(held)}), console=console)
    assert json.loads((run.path / "comparison.json").read_text())["loss"]["interval"] == [None, None]
    assert "too few rows" in console.file.getvalue() and "No verdict" in run.report.read_text()


@pytest.mark.parametrize(
    ("total", "step_tokens", "held", "wanted"),
    [(1, 100, 100, 1), (2, 100, 100, 2), (5, 100, 100, 3), (12, 100, 100, 3), (100, 100, 100, 10), (1000, 100, 0, 100),
     (100, 100, 9000, 30), (100, 100, 90_000, 100), (7, 8, 10**9, 7)],
)  # fmt: skip
def test_evaluating_on_auto_costs_no_more_than_training(total, step_tokens, held, wanted):
    assert tuning.every(total, step_tokens, held) == wanted


def test_trackers_get_every_number(tiny, tmp_path, monkeypatch):
    """The setting reaches the table; TensorBoard itself needs its package."""
    made = []

    class Fake:
        def __init__(self, folder, start):
            self.rows, self.closed = [], False
            made.append(self)

        def scalars(self, step, values):
            self.rows.append((step, values))

        def text(self, step, name, text): ...

        def close(self):
            self.closed = True

    monkeypatch.setitem(log.TRACKERS.table, "fake", Fake)
    config = tiny.config(tmp_path / "run", log={"trackers": ["fake"], "every_steps": 5})
    run = tunesmith.train(config, console=quiet())
    assert made[0].closed and [s for s, v in made[0].rows if "train/loss" in v] == [5, 10, 12]
    assert [s for s, v in made[0].rows if "eval/loss" in v] == [0, 4, 8, 12]
    assert [r["step"] for r in run.metrics() if r["kind"] == "step"] == [5, 10, 12]
    with pytest.raises(ConfigError, match="tensorbord"):
        tunesmith.train(tiny.config(tmp_path / "other", log={"trackers": ["tensorbord"]}), console=quiet())


def test_deterministic_is_asked_of_torch(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        tunesmith.train(tiny.config(tmp_path / "run", train={"deterministic": True}), console=quiet())
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_new_tokens_that_never_appear_are_told(tiny, tmp_path):
    """Of an untied model the head's rows learn from every token, the embedding's from none: a person should know."""
    run = tunesmith.train(tiny.config(tmp_path / "run", lora={"new_tokens": ["<note>"]}), console=quiet())
    told = [r for r in run.metrics() if r["kind"] == "event"]
    assert told and all("embed_tokens" in r["weights"] and "lora_" not in r["weights"] for r in told)


def test_a_prompt_longer_than_the_context_is_not_asked(tiny, tmp_path):
    """Held-out rows may be as long as data.max_length says; an answer needs room in the model's context."""
    base = tiny.checkpoint(tmp_path / "base", max_position_embeddings=100)
    long = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"messages": long}) + "\n" + tiny.held.read_text())
    run = tunesmith.train(tiny.config(tmp_path / "run", model=str(base), data={"held_out": str(held)}), console=quiet())
    assert [r["index"] for r in json.loads((run.path / "comparison.json").read_text())["rows"]] == [1, 2, 3, 4, 5, 6]


def test_continuing_from_an_adapter_compares_with_that_adapter(finished, tiny, tmp_path):
    """Before is what the run began with: the adapter it goes on from."""
    first = json.loads((finished.run.path / "comparison.json").read_text())["loss"]["after"]
    config = tiny.config(tmp_path / "run", lora={"continue_from": str(finished.run.adapter)})
    config["lora"] = {"continue_from": str(finished.run.adapter)}
    run = tunesmith.train(config, console=quiet())
    loss = json.loads((run.path / "comparison.json").read_text())["loss"]
    assert loss["before"] == pytest.approx(first, rel=1e-6) and loss["after"] < loss["before"]


def test_a_template_file_goes_with_the_run(tiny, tmp_path):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (tmp_path / "mine.jinja").write_text(text)
    run = tunesmith.train(tiny.config(tmp_path / "run", data={"template": str(tmp_path / "mine.jinja")}), console=quiet())
    assert (run.tokenizer / "chat_template.jinja").read_text() == text


def test_checkpointed_activations_change_no_bit(tiny, tmp_path):
    runs = [
        tunesmith.train(
            tiny.config(tmp_path / how, lora={"dropout": 0.1}, memory={"activations": how, "micro_batch_tokens": 128}),
            console=quiet(),
        )
        for how in ("keep", "checkpoint")
    ]
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in runs)
    assert all(np.array_equal(one[n], other[n]) for n in one)


# ---- half-blocks, which the plan chooses on a GPU --------------------------------------------------------------------------------


@pytest.fixture
def half_blocks(monkeypatch):
    """The plan chooses them on this CPU too; `half_blocks` are the layers' policies of each run."""
    from tunesmith import tuning

    seen, build = [], tuning.build_model

    def spy(*args):
        model = build(*args)
        seen.append(model.fast and model.fast.policies)
        return model

    monkeypatch.setattr(tuning, "plan_for", functools.partial(tuning.plan_for, half_blocks=True))
    monkeypatch.setattr(tuning, "build_model", spy)
    return seen


def _losses(run) -> list[float]:
    return [m["loss"] for m in run.metrics() if m["kind"] in ("step", "eval")]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_as_half_blocks_has_the_composed_paths_losses(tiny, tmp_path, method, request):
    composed = tunesmith.train(tiny.config(tmp_path / "composed", method=method), console=quiet())
    seen = request.getfixturevalue("half_blocks")
    for level in ("keep", "recompute", "checkpoint"):
        run = tunesmith.train(tiny.config(tmp_path / level, method=method, memory={"activations": level}), console=quiet())
        assert [p.level for p in seen[-1]] == [level] * 2
        found, wanted = _losses(run), _losses(composed)
        assert len(found) == len(wanted) and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5
        planned = json.loads((run.path / "plan.json").read_text())
        assert (planned["path"], planned["layers"][0]["level"], planned["activations"]) == ("half-blocks", level, level)


def test_a_resumed_run_takes_the_policies_of_its_checkpoint(tiny, tmp_path, half_blocks):
    """Also those that an out-of-memory has lowered: what goes on is what was left, whatever a new plan would say."""
    run = tunesmith.train(tiny.config(tmp_path / "run", memory={"activations": "recompute"}), console=quiet())
    states = [json.loads(p.read_text()) for p in sorted(run.checkpoints.glob("step-*/state.json"))]
    assert all(s["activations"] == [[2, "recompute", False, WHOLE]] for s in states)
    model = SimpleNamespace(fast=SimpleNamespace(policies=()), checkpoint_layers=False)
    mixed = [[1, "checkpoint", True, 4096], [1, "keep", False, WHOLE]]
    tuning.set_layers(model, [Layers(*part) for part in mixed])
    assert [p.level for p in model.fast.policies] == ["checkpoint", "keep"] and tuning.layers_of(model, 2) == mixed


def test_what_the_adapter_forbids_runs_composed(tiny, tmp_path, half_blocks):
    tunesmith.train(tiny.config(tmp_path / "run", lora={"dropout": 0.1}), console=quiet())
    assert half_blocks == [None]


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter runs them on a CPU")
def test_kernels_that_cannot_run_are_refused():
    here = tuning.place(Memory(device="cpu"))
    with pytest.raises(ModelError, match=r"memory\.kernels: triton cannot run here"):
        tuning.use_kernels("triton", here)
    assert tuning.use_kernels("auto", here) == "", "a notice is for those who have a GPU"


# ---- merging: what it refuses (its numbers are in oracle/test_training_oracle.py) ----------------------------------------------


def test_what_merge_refuses(finished, tiny, tmp_path, monkeypatch):
    run, out = finished.run.path, tmp_path / "out"
    with pytest.raises(RunError, match="--onto bf16"):
        tunesmith.merge(run, out, onto="bf16")
    for place, what in ((tmp_path, "not empty"), (tiny.train, "a file")):
        (tmp_path / "some").touch()
        with pytest.raises(RunError, match=what):
            tunesmith.merge(run, place)
    base = tiny.checkpoint(tmp_path / "base")
    other = tunesmith.train(tiny.config(tmp_path / "other", model=str(base)), console=quiet())
    tiny.checkpoint(base, seed=5)
    with pytest.raises(RunError, match="not the base this run was trained on"):
        tunesmith.merge(other.path, out)
    config = tiny.config(tmp_path / "full", method="full")
    del config["lora"]
    full = tunesmith.train(config, console=quiet())
    with pytest.raises(RunError, match="no adapter to merge"):
        tunesmith.merge(full.path, out)
    monkeypatch.setattr(tuning.loop, "fit", lambda *a, **k: (_ for _ in ()).throw(TrainingFailed("no", "")))
    with pytest.raises(TrainingFailed):
        tunesmith.train(tiny.config(tmp_path / "failed"), console=quiet())
    with pytest.raises(RunError, match="no adapter yet, its state is failed"):
        tunesmith.merge(tmp_path / "failed", out)
    assert not out.exists()


def test_a_full_run_is_a_checkpoint_itself(tiny, tmp_path):
    config = tiny.config(tmp_path / "run", method="full")
    del config["lora"]
    run = tunesmith.train(config, console=quiet())
    model = models.load(run.model)
    found = heldout.losses(
        model, tuning.prepare(run.config.data, lambda: None, renderer=build_renderer(run.model, run.config.data), seed=7).held_out,
        micro_batch_tokens=128, device=torch.device("cpu"),
    )  # fmt: skip
    assert found.mean == pytest.approx(json.loads((run.path / "comparison.json").read_text())["loss"]["after"], rel=1e-6)


def test_a_base_that_cannot_be_loaded_leaves_a_failed_run(tiny, tmp_path):
    with pytest.raises(ModelError):
        tunesmith.train(tiny.config(tmp_path / "run", model=str(tmp_path)), console=quiet())
    assert Run.open(tmp_path / "run").status().state == "failed" and (tmp_path / "run/report.html").exists()


# ---- what a reviewer broke ------------------------------------------------------------------------------------------------------


def short(tiny, output, **changes):
    """Two steps, no sample answers."""
    config = tiny.config(output, **changes)
    return {**config, "train": {"batch_size": 4, "max_steps": 2, "learning_rate": 0.01}, "eval": {"samples": 0}}


def test_held_out_rows_that_are_trained_on_too_are_no_proof(tiny, tmp_path, capsys):
    again = tmp_path / "again.jsonl"
    again.write_bytes(tiny.train.read_bytes())
    run = tunesmith.train(short(tiny, tmp_path / "run", data={"held_out": str(again)}))
    found = json.loads((run.path / "comparison.json").read_text())["loss"]
    assert found["overlap"] == found["rows"] == 24
    said = " ".join(capsys.readouterr().out.split())
    assert "24 of the 24 held-out rows are trained on too" in said and "better" not in said and "proves nothing" in said
    page = (run.path / "report.html").read_text()
    assert "trained on too" in page and "never trained on" not in page and ">Better<" not in page


def test_one_held_out_row_that_is_trained_on_too_does_not_hide_what_the_others_show(tiny, tmp_path):
    """Which it is is not known at the end: it must hold without the row that gained most."""
    held = tiny.rows(tmp_path / "held.jsonl", 24, start=100)
    held.write_text(held.read_text() + tiny.train.read_text().splitlines()[0] + "\n")
    console = quiet()
    run = tunesmith.train(tiny.config(tmp_path / "run", data={"held_out": str(held)}), console=console)
    found = json.loads((run.path / "comparison.json").read_text())["loss"]
    gains = (np.array(found["each"]["after"]) - found["each"]["before"]).tolist()
    low, high = found["interval_of_the_rest"]
    assert found["overlap"] == 1 and high < 0 and low > min(gains)
    page = run.report.read_text()
    assert (
        ">Better<" in page
        and "1 of the 25 held-out rows are trained on too" in page
        and "Without as many of those that gained most" in page
    )
    assert "better: " in console.file.getvalue() and "1 of the 25 held-out rows" in console.file.getvalue()


def test_weights_that_draw_no_row_are_refused_before_the_model_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(DataError, match="no row is drawn"):
        tunesmith.train(short(tiny, tmp_path / "run", data={"train": [{"path": str(tiny.train), "weight": 0.001}]}))


def test_a_run_that_failed_before_its_first_step_is_begun_again(tiny, tmp_path):
    with pytest.raises(DoesNotFit):
        tunesmith.train(short(tiny, tmp_path / "run", memory={"budget_gb": 0.01}))
    assert tunesmith.train(short(tiny, tmp_path / "run")).status().state == "finished"
    with pytest.raises(RunError, match="holds a run already"):
        tunesmith.train(short(tiny, tmp_path / "run"))


def test_a_pattern_that_matches_nothing_is_an_error(tiny, tmp_path):
    lora = {"rank_pattern": {"zzz": 3}, "alpha_pattern": {"/q_proj/": 2.0}}
    with pytest.raises(AdapterError, match=r"rank_pattern: 'zzz' matches none.*\n.*alpha_pattern: '/q_proj/'"):
        tunesmith.train(short(tiny, tmp_path / "run", lora=lora))


def test_continuing_an_adapter_with_tokens_needs_their_names(tiny, tmp_path):
    first = tunesmith.train(short(tiny, tmp_path / "first", lora={"new_tokens": ["<cool>"]}))
    config = short(tiny, tmp_path / "second") | {"lora": {"continue_from": str(first.adapter)}}
    with pytest.raises(AdapterError, match=r"lora\.new_tokens names none"):
        tunesmith.train(config)
    config["lora"]["new_tokens"], config["output"] = ["<cool>"], str(tmp_path / "third")
    assert tunesmith.train(config).status().state == "finished"
