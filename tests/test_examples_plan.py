"""Every shipped example goes through `plan`: the verb a person runs before anything is downloaded but a config.json."""

import shutil
from pathlib import Path

import pytest

from tunesmith import api

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.yaml"))
CONFIGS = {
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral_7b_v03.json",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3_1_8b.json",
    "microsoft/Phi-4-mini-instruct": "phi-4.json",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "smollm2_360m.json",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_plan_answers_for_it(path, tmp_path, request, monkeypatch):
    from tunesmith.config.load import load

    monkeypatch.chdir(path.parents[1])
    model = load(path).model
    if model != "embedded":
        shutil.copy(request.getfixturevalue("shared_data") / "configs" / CONFIGS[model], tmp_path / "config.json")
        model = str(tmp_path)
    wide = api.plan(path, f"model={model}", gpu="24GB")
    narrow = api.plan(path, f"model={model}", gpu="2GB")
    assert wide.fits and wide.verdict.startswith("fits") and wide.steps > 0
    assert wide.needs >= narrow.least and narrow.least > 0
    assert narrow.fits == (narrow.needs <= narrow.budget)
    if path.stem != "embedded-demo":
        assert not narrow.fits and narrow.advice, "2 GB hold none of these, and the plan says what to lower"
