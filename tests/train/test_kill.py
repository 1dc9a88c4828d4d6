"""kill -9 at random moments, over and over: the run that was killed and resumed equals the unbroken one, bit for bit, with no help.

A tiny net with dropout stands for the model (the whole trainer is killed elsewhere); run folder, log, checkpoints and generators
are the real ones. Children are forked, so that a kill costs milliseconds.
"""

import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from tunesmith.config.schema import RunConfig
from tunesmith.run import Run
from tunesmith.train import checkpoint
from tunesmith.train.log import Log

STEPS, SAVE_EVERY = 36, 3


def train(path):
    """Start, or go on, and finish."""
    run = Run.open(path)
    with run.lock(), Log(run, steps=STEPS) as log:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        opt.zero_grad(), sum(p.sum() * 0 for p in net.parameters()).backward(), opt.step()  # makes the moments exist
        step = 0
        found, problems = checkpoint.newest_valid(run.checkpoints)
        assert not problems, problems
        if found:
            tensors, state = checkpoint.load(found)
            step = state["step"]
            net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net/")})
            saved = opt.state_dict()
            for i, moments in saved["state"].items():
                saved["state"][i] = {k: tensors[f"opt/{i}/{k}"] for k in moments}
            opt.load_state_dict(saved)
            assert checkpoint.restore_rng(tensors, state["rng"]) == []
        run.rewind(step)
        while step < STEPS:
            loss = net(torch.randn(4, 6)).square().mean() * random.random()
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            log.step(step, loss=loss.item())
            if step % SAVE_EVERY == 0:
                log.sync()
                generators, numbers = checkpoint.rng_state()
                weights = {f"net/{k}": v for k, v in net.state_dict().items()}
                moments = {f"opt/{i}/{k}": v for i, m in opt.state_dict()["state"].items() for k, v in m.items()}
                checkpoint.save(run.checkpoints, step, {**weights, **moments, **generators}, {"rng": numbers})
                checkpoint.prune(run.checkpoints, 2)
        run.set_status("finished", step=step, steps=STEPS)


def forked(path):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            random.seed(3)
            train(path)
            code = 0
        finally:
            os._exit(code)
    return pid


def fresh(path):
    config = RunConfig.model_validate({"model": "owner/name", "data": "x.jsonl", "method": "lora", "output": str(path)})
    return Run.create(path, config, command=["tunesmith", "train"])


def campaign(tmp_path, kills, seed):
    warm = nn.Linear(1, 1)
    warm(torch.ones(1)).backward()
    torch.optim.AdamW(warm.parameters()).step()  # what torch imports at its first step, the children inherit
    whole = fresh(tmp_path / "whole")
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(forked(whole.path), 0)[1]) == 0
    takes = time.monotonic() - began
    want = [(r["step"], r["loss"].hex()) for r in whole.metrics()]
    assert [s for s, _ in want] == list(range(1, STEPS + 1))

    g, killed, round_ = random.Random(seed), 0, 0
    while killed < kills:
        run = fresh(tmp_path / f"killed-{round_}")
        round_ += 1
        finished = False
        while not finished:
            pid = forked(run.path)
            time.sleep(g.uniform(0, takes * 0.4))
            if killed < kills:
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            finished = code == 0
            assert run.status().state in ("preparing", "stopped", "finished")
        with run.lock():  # clears what a kill after the last save left
            pass
        assert [(r["step"], r["loss"].hex()) for r in run.metrics()] == want
        ends = [checkpoint.load(checkpoint.newest_valid(r.checkpoints)[0])[0] for r in (whole, run)]
        assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
        names = sorted(p.name for p in run.checkpoints.iterdir())
        assert names[-2:] == ["step-00000033", "step-00000036"]  # older ones too, when it died before or in the last prune
        assert [checkpoint.verify(run.checkpoints / name) for name in names] == [[]] * len(names)
    return killed


def test_thirty_kills(tmp_path):
    assert campaign(tmp_path, 30, seed=1) == 30


@pytest.mark.soak
def test_a_thousand_kills(tmp_path):
    assert campaign(tmp_path, 1000, seed=2) == 1000
