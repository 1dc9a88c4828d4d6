"""A tiny decoder over bytes, its renderer, adapters on disk, and an engine that is stepped by hand."""

from types import SimpleNamespace

import pytest
import torch

from tunesmith import adapters, models
from tunesmith.config import schema
from tunesmith.data.render import build_renderer
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.job import Job


def write_adapter(folder, checkpoint, seed, **lora):
    """A PEFT folder whose low-rank part moves the answers."""
    model = models.load(checkpoint)
    ids = lora.pop("ids", None)
    settings = schema.Lora(**({"rank": 4, "alpha": 8} | lora))
    adapters.attach(model, settings, seed=seed, new_tokens=ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapters.trainable(model).items():
            if not name.endswith("lora_A.weight"):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    adapters.save(model, folder, base_name=str(checkpoint))
    return folder


@pytest.fixture(scope="session")
def place(tiny, tmp_path_factory):
    """`place.model`: a checkpoint; `place.adapters`: name -> folder, of each kind; `place.renderer`."""
    root = tmp_path_factory.mktemp("serve")
    model = tiny.checkpoint(root / "model", seed=5)
    kinds = {
        "plain": {}, "wide": {"rank": 7, "alpha": 20, "variant": "rslora"}, "dora": {"variant": "dora"},
        "some": {"targets": ["q_proj", "down_proj"]}, "whole": {"modules_to_save": ["lm_head"]},
        "tokens": {"new_tokens": ["<|user|>"], "ids": {258: None}},
    }  # fmt: skip
    found = {name: write_adapter(root / name, model, seed, **kind) for seed, (name, kind) in enumerate(kinds.items(), 1)}
    return SimpleNamespace(root=root, model=model, adapters=found, renderer=build_renderer(model))


class Answers:
    """Engines and the jobs of a test, with what came back."""

    def __init__(self, place):
        self.place, self.words = place, place.renderer.tokenizer

    def engine(self, model=None, *, cache=1 << 21, ahead=False, **limits):
        model = models.load(self.place.model) if model is None else model
        settings = {"piece": 16, "prompts": 32, "batch": 8, "queue": 64, "cache": cache} | limits
        return Engine(model, base="base", limits=Limits(**settings), ahead=ahead)

    def ask(self, engine, prompt, **job):
        """A job's record: .text, .ids, .reason ... filled as the engine is stepped."""
        record = SimpleNamespace(text="", reason=None, error=None, made=0, tokens=[], pieces=0, handle=None)

        def deliver(piece):
            assert record.reason is None, "a piece after the last one"
            record.text += piece.text
            record.pieces += 1
            record.tokens += piece.tokens
            record.reason, record.error, record.made = piece.reason, piece.error, piece.made

        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        record.job = Job(**({"prompt": ids, "words": self.words, "deliver": deliver, "max_tokens": 20, "logprobs": 0} | job))
        (record.handle,) = engine.submit(record.job)
        return record

    @staticmethod
    def run(engine, turns=5000):
        for _ in range(turns):
            if not engine.step():
                state = engine.state()
                assert state["free_blocks"] == state["blocks"] and not state["running"], "blocks were lost"
                return
        raise AssertionError("the engine does not come to an end")


@pytest.fixture
def answers(place):
    return Answers(place)
