"""A trainer without torch: it keeps a run folder as the real one does, with a loss that follows from the settings, in a second."""

import json
import sys
from pathlib import Path
from textwrap import dedent

import pytest

TRAINER = """
import json, math, os, sys, time
from pathlib import Path
from tunesmith.config.load import load
from tunesmith.errors import TunesmithError
from tunesmith.run import Run
from tunesmith.train.signals import graceful

config = load(*[a for a in sys.argv[1:] if a != "--resume"])
resume = "--resume" in sys.argv
there = resume and (Path(config.output) / "run.yaml").exists()
run = Run.open(config.output) if there else Run.create(config.output, config, command=[])
pace = float(os.environ.get("PACE", "0"))
with run.lock(), graceful() as stop, open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({"folder": Path(config.output).name, "resume": resume, "threads": os.environ.get("OMP_NUM_THREADS"),
                            "budget": config.memory.budget_gb, "began": time.monotonic()}) + "\\n")
    calls.flush()
    done = max([row["step"] for row in run.metrics()], default=0)
    rate, rank = config.train.rate(config.method), config.lora.rank
    if rank == 13:
        run.set_status("failed", message="out of memory\\nfix: less")
        sys.exit(2)
    if rank == 17:
        os.kill(os.getpid(), 9)
    run.set_status("running", step=done, steps=10)
    final = 1 + abs(math.log10(rate / 0.01)) + 0.01 * abs(rank - 8) + 0.001 * (config.seed % 5)
    tokens = 100 if config.data.max_length > 64 else 50
    for step in range(done + 1 if done else 0, 11):
        loss = final + (10 - step) * 0.1
        if step:
            run.append("metrics", {"kind": "step", "step": step, "loss": loss})
        run.append("metrics", {"kind": "eval", "step": step, "loss": loss, "tokens": tokens})
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        time.sleep(pace)
        if stop.requested:
            run.set_status("interrupted", step=step, message="stopped")
            sys.exit(130)
    after = None if rank == 19 else final
    (run.path / "comparison.json").write_text(json.dumps({"loss": {"before": 9.0, "after": after}}))
    run.record(seconds=1.5)
    run.set_status("finished", step=10, steps=10)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Puts the trainer in the place of `tunesmith train`; called, it says what was started: dicts in order."""
    from tunesmith.sweep import job

    path, calls = tmp_path / "trainer.py", tmp_path / "calls.jsonl"
    path.write_text(dedent(TRAINER))
    monkeypatch.setattr(job, "TRAIN", (sys.executable, str(path)))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if Path(calls).exists() else []
