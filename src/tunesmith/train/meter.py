"""What a run really holds of its device and how fast it really is: what the plan said is set beside it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from tunesmith.plan.sizes import CONTEXT

LEAST = 10.0  # seconds of steps that tell how fast a run is
EARLY = 3  # steps that compile, record and fill caches: they are not how fast a run is
OTHERS = 2 * CONTEXT["cuda"]  # what is used beyond it is another process's


class Meter:
    """From now on. `device` is where the layers run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens, self.seconds = [], []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif device.type == "cpu":
            with suppress(OSError):  # Linux: the most resident pages are counted anew
                Path("/proc/self/clear_refs").write_text("5")

    def step(self, tokens: float, seconds: float) -> None:
        self.tokens.append(tokens)
        self.seconds.append(seconds)

    @property
    def rate(self) -> float | None:
        """Tokens a second over the steps after the first EARLY; None where those took less than LEAST seconds."""
        tokens, seconds = sum(self.tokens[EARLY:]), sum(self.seconds[EARLY:])
        return tokens / seconds if seconds >= LEAST else None

    @property
    def held(self) -> int | None:
        """Bytes at most: what torch had reserved of a GPU, with CUDA's context; on Linux a CPU's resident pages. None elsewhere."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            context = total - free - torch.cuda.memory_reserved()
            return torch.cuda.max_memory_reserved() + (context if context < OTHERS else CONTEXT["cuda"])
        if self.device.type == "cpu":
            with suppress(OSError):
                found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
                return int(found[1]) << 10 if found else None
        return None
