"""Runs of the small models in cases.py, trained once a session."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from tests.export.cases import FAMILIES, lively, quiet

import tunesmith
from tunesmith.export import parity


@pytest.fixture
def here(monkeypatch):
    """The runtimes themselves, in this process: a second one that imports transformers takes five seconds."""

    def ask(runtime, job, tell=None):
        module = import_module(f"tunesmith.export.runtimes.{parity.RUNTIMES[runtime][0]}")
        ids, logp, facts = module.answer(json.loads(json.dumps(job)), lambda done: None)
        return ids, logp, json.loads(json.dumps(facts))

    monkeypatch.setattr(parity, "ask", ask)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """`trained(name, model config, **run file)`: a run folder, trained once a session for each pair."""
    made: dict[str, Path] = {}

    def train(name: str, model: dict | None = None, **changes) -> Path:
        key = repr((name, model, sorted(changes.items(), key=str)))
        if key not in made:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            base = lively(tiny, root / "model", **(FAMILIES[name] if model is None else model))
            run = tiny.config(root / "run", model=str(base), **changes)
            run["train"] |= {"epochs": 6, "learning_rate": 0.02} | changes.get("train", {})
            if run["method"] == "full":
                del run["lora"]
            run["eval"] = {"samples": 0, "every_steps": 1000}
            made[key] = tunesmith.train(run, console=quiet()).path
        return made[key]

    return train
