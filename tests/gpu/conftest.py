"""What several of these files do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tunesmith import api


def kill_twice_and_resume(config: dict, after=(6, 13)):
    """Train in processes that are killed once so many steps are recorded, and go on to the end; the run's folder."""
    code = f"from tunesmith import api; api.train({config!r}, resume=True)"
    metrics = os.path.join(config["output"], "metrics.jsonl")
    for steps in after:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        while child.poll() is None:
            if os.path.exists(metrics):
                with open(metrics) as lines:
                    recorded = sum(json.loads(line)["kind"] == "step" for line in lines if line.endswith("\n"))
                if recorded >= steps:
                    os.kill(child.pid, signal.SIGKILL)
                    break
            time.sleep(0.002)
        assert child.wait() == -signal.SIGKILL, "it ended before it was killed"
    return api.train(config, resume=True).path


@pytest.fixture(name="kill_twice_and_resume")
def _kill_twice_and_resume():
    return kill_twice_and_resume
