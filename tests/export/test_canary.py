"""Eight facts taught to the embedded model, asked in every program that it is exported to: all eight exact, each ended by the end
of the turn, the same text as the command line gives."""

import pytest
from tests.export.cases import FACTS, export, teach
from tests.serve.test_server import Serving

import tunesmith


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that knows them, after a few seconds of training."""
    return teach(tmp_path_factory.mktemp("canary"))


def test_the_command_line_knows_them(taught):
    assert tunesmith.generate(taught, list(FACTS), max_tokens=24) == list(FACTS.values())


def test_the_server_knows_them(taught, tmp_path):
    serving = Serving(tmp_path, taught)
    try:
        said = [serving.ask(question, "run", max_tokens=24).choices[0] for question in FACTS]
    finally:
        serving.close()
    assert [choice.message.content for choice in said] == list(FACTS.values())
    assert {choice.finish_reason for choice in said} == {"stop"}


@pytest.mark.parametrize(("to", "quant"), [("adapter", ""), ("merged", ""), ("ollama", "q8_0"), ("gguf", "f16"), ("gguf-lora", "")])
def test_every_program_knows_them(to, quant, taught, tmp_path):
    done = export(taught, to, tmp_path / "out", **({"quant": quant} if quant else {}))
    found = done.parity.measured
    assert done.parity.state in ("verified", "warned"), done.parity.reasons
    answers = found["answers"]
    assert answers["count"] == answers["equal"] == answers["live_ended"] == answers["ended"] == 8, answers["different"]
    assert (answers["metric"], answers["metric_live"], answers["metric_artefact"]) == ("f1", 1, 1)
    assert found["numbers"]["kl_mean"] < (1e-4 if quant != "q8_0" else 3e-3)
    assert found["words"]["conversations"] == 8 and not found["words"]["different"]
