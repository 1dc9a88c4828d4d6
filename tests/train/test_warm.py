"""The layer that compiles kernels ahead is one of the model's own, and takes nothing from the run's random numbers."""

import subprocess
import sys
from importlib.resources import files

import pytest
import torch

from tunesmith.config.schema import Lora
from tunesmith.models.fast import policies
from tunesmith.ops.half_blocks import Policy
from tunesmith.spec import plan_spec
from tunesmith.train import replay, warm
from tunesmith.train.warm import SIZES, Warming

BASE = files("tunesmith") / "assets" / "embedded"


@pytest.mark.parametrize("nf4", [True, False])
def test_a_layer_for_each_policy_takes_both_passes(nf4, monkeypatch):
    kept = (*policies(2), *policies(3, "recompute"), Policy("checkpoint", tile=64))
    warming = Warming(plan_spec(BASE), Lora(rank=4), kept, torch.device("cpu"), dtype=torch.float32, nf4=nf4, fp8=False)
    assert not warming.thread.ident  # there is nothing to compile on a CPU
    passed = []
    monkeypatch.setattr(
        warm, "plain", lambda model, batch, *rest: passed.append((model, batch)) or replay.plain(model, batch, *rest)
    )
    before = torch.get_rng_state()
    warming.passes()
    warming.end()
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch.tokens) for _, batch in passed] == list(SIZES)
    model = passed[0][0]
    assert len(model.model.layers) == 3 and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_error_is_left_to_the_model():
    Warming(
        plan_spec(BASE), Lora(targets=("nowhere",)), policies(1), torch.device("cpu"), dtype=torch.float32, nf4=True, fp8=False
    )._run()


def test_nothing_before_the_first_step_imports_torch_compile():
    """Its import takes 1 s, 8 s where no bytecode is kept: a fifth of the time to the first step of a Mistral-7B."""
    code = f"""
import sys, torch
before = set(sys.modules)
import numpy as np
from tunesmith import adapters, models
from tunesmith.config.schema import Lora, Train
from tunesmith.data.pack import collate
from tunesmith.models.fast import FastLayers, policies
from tunesmith.spec import plan_spec
from tunesmith.train.optim import Optimizer
from tunesmith.train.replay import Passes
from tunesmith.train.warm import Warming
from tunesmith.types import Example, Origin
where = torch.device("cpu")
warming = Warming(plan_spec({str(BASE)!r}), Lora(rank=4), policies(2), where, dtype=torch.float32, nf4=True, fp8=False)
warming.passes()
model = models.load({str(BASE)!r}, device=where, store="nf4")
adapters.attach(model, Lora(rank=4), seed=0)
model.fast = FastLayers(model.train(), policies(model.spec.layers))
optimizer = Optimizer(adapters.trainable(model), Train())
optimizer.set_rate(1e-3)
Passes(model, optimizer, where)(collate([Example(np.arange(50, dtype=np.int32), np.arange(50) > 9, Origin("", 0))]), 1.0)
optimizer.step()
print([m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules and m not in before])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]", found.stdout
