"""Every example is a run file that a person can use as it stands."""

from pathlib import Path

import pytest

from tunesmith.config.load import dump, load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MODELS = {
    "mistral-7b-qlora": ("mistralai/Mistral-7B-Instruct-v0.3", "qlora"),
    "llama-3.1-8b-qlora": ("meta-llama/Llama-3.1-8B-Instruct", "qlora"),
    "phi-4-mini-lora": ("microsoft/Phi-4-mini-instruct", "lora"),
    "smollm2-360m-full": ("HuggingFaceTB/SmolLM2-360M-Instruct", "full"),
    "embedded-demo": ("embedded", "lora"),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_loads_and_is_what_it_says(path):
    config = load(path)
    assert (config.model, config.method) == MODELS[path.stem]
    assert config == load(path, f"model={config.model}") and "model:" in dump(config)
    # The commands in its head name the file and the run folder that are there.
    head = "".join(line for line in path.read_text("utf-8").splitlines(keepends=True) if line.startswith("#"))
    assert f"tunesmith train examples/{path.name}" in head
    if "tunesmith chat" in head:
        assert f"tunesmith chat  {config.output}" in head


def test_every_example_is_known():
    assert {p.stem for p in EXAMPLES} == set(MODELS)


def test_the_embedded_example_reads_rows_that_are_in_the_package():
    config = load(ROOT / "examples" / "embedded-demo.yaml")
    for path in (config.data.train[0].path, config.data.held_out):
        assert (ROOT / str(path)).is_file(), path
