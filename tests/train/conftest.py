"""What the tests of the loop share: an adapted tiny model, examples, and hooks that remember."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tunesmith import adapters, models
from tunesmith.config import schema
from tunesmith.train import loop
from tunesmith.train.optim import Optimizer
from tunesmith.train.replay import Passes
from tunesmith.types import Example, Origin


def example(ids, learn_from=2, name="rows.jsonl", line=1):
    ids = np.asarray(ids, np.int32)
    learn = np.zeros(len(ids), bool)
    learn[learn_from:] = True
    return Example(ids, learn, Origin(name, line))


def examples(count, seed=0, low=4, high=20):
    draw = np.random.default_rng(seed)
    return [
        example(draw.integers(0, 250, n := int(draw.integers(low, high))), int(draw.integers(1, n - 1)), line=i + 1)
        for i in range(count)
    ]


class Recorder:
    """Hooks for `loop.fit` that remember what they were called with. `losses` are handed out as held-out losses."""

    def __init__(self, losses=(), stop_after=math.inf):
        self.losses, self.stop_after = list(losses), stop_after
        self.steps, self.events, self.evaluated, self.best, self.saved = [], [], [], [], []

    def evaluate(self, state):
        self.evaluated.append(state.step)
        return self.losses[min(len(self.evaluated), len(self.losses)) - 1] if self.losses else None

    def hooks(self):
        return loop.Hooks(
            evaluate=self.evaluate,
            keep_best=lambda state: self.best.append(state.step),
            save=lambda state: self.saved.append(state.step),
            record=lambda step, **values: self.steps.append({"step": step, **values}),
            event=lambda message, **values: self.events.append((message, values)),
            stop=lambda: "SIGTERM" if len(self.steps) >= self.stop_after else None,
        )


@pytest.fixture
def bench(tiny):
    """`bench.model(...)` an adapted tiny model, `bench.fit(model, examples, ...)` the loop over it."""

    def model(method="lora", dtype=torch.float32, seed=3, **lora):
        made = models.load(tiny.model, dtype=dtype, store="nf4" if method == "qlora" else "dense")
        if method == "full":
            return made.requires_grad_(True)
        adapters.attach(made, schema.Lora(**{"rank": 4, "alpha": 8.0, **lora}), seed=seed)
        return made

    def parameters(made):
        return adapters.trainable(made) if adapters.twins(made) else dict(made.named_parameters())

    def warm(made, size=0.05):
        """B away from zero, so that every gradient is."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in parameters(made).values():
                p += size * torch.randn(p.shape, generator=generator).to(p.dtype)
        return made

    def fit(made, examples_of, *, recorder=None, total=6, state=None, train=None, optimizer=None, **changes):
        train = train or schema.Train(batch_size=4, learning_rate=0.01)
        fast = adapters.fast(made) if adapters.twins(made) else ()
        optimizer = optimizer or Optimizer(parameters(made), train, fast)
        recorder = recorder or Recorder()
        how = {"eval_every": 100, "save_every": 100, "early_stop": 0, "seed": 5, **changes}
        end = loop.fit(
            made, optimizer, examples_of, recorder.hooks(), train=train, peak=0.01, total=total, device=torch.device("cpu"),
            state=state or loop.State(micro_batch_tokens=40), **how,
        )  # fmt: skip
        return SimpleNamespace(state=end, recorder=recorder, optimizer=optimizer)

    def gradient(made, rows, *, tokens=10_000, alpha=0.0, step=0, state=None, recorder=None, optimizer=None):
        """(loss, gradients by name) of one optimiser step over `rows`, as the loop takes it."""
        optimizer = optimizer or Optimizer(parameters(made), schema.Train())
        optimizer.clear()
        state = state or loop.State(micro_batch_tokens=tokens)
        hooks = (recorder or Recorder()).hooks()
        passes = Passes(made, optimizer, torch.device("cpu"))
        loss, _ = loop._gradient(passes, rows, state, hooks, step, 5, alpha)
        return loss.item(), {n: None if m.grad is None else m.grad.clone() for n, m in optimizer.masters.items()}

    return SimpleNamespace(
        model=model,
        parameters=parameters,
        warm=warm,
        fit=fit,
        gradient=gradient,
        example=example,
        examples=examples,
        Recorder=Recorder,
    )
