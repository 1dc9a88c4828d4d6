"""The model card's Python runs as it stands, with transformers and PEFT, and answers as the run folder does."""

import io
import re
from contextlib import redirect_stdout

import pytest
from rich.console import Console

import tunesmith


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_cards_snippet_answers_as_the_run_does(tiny, tmp_path, monkeypatch, method):
    """On the embedded base, which has no name on the hub. Greedy, in float32 on both sides."""
    config = {
        "model": "embedded", "method": method, "output": str(tmp_path / "run"),
        "data": {"train": str(tiny.rows(tmp_path / "rows.jsonl", 24)), "held_out": 0, "workers": 1},
        "train": {"max_steps": 4, "learning_rate": 1e-3}, "memory": {"device": "cpu"},
    }  # fmt: skip
    run = tunesmith.train(config, console=Console(file=io.StringIO()))
    card = (run.path / "README.md").read_text("utf-8")
    assert "16-bit" not in card and f"in {run.manifest['dtype']} |" in card and run.manifest["dtype"] == "fp32"
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    assert str(tmp_path) not in card, "a path of this machine does not travel"
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue().strip() == tunesmith.generate(run.path, ["Your question"], max_tokens=100)[0].strip() != ""
