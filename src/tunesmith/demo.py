"""`make demo`: tune the embedded model on the embedded data and show what changed. No network, no GPU needed; a GPU is used."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.resources import files
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tunesmith import api
from tunesmith.errors import TunesmithError


def main(argv: list[str] | None = None) -> int:
    """Run the demo; any `key.path=value` goes to the run file, so `model=/some/checkpoint` tunes a larger one on the same data."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.demo", description=main.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    console = Console()
    data = files("tunesmith") / "assets" / "demo"
    config = {
        "model": "embedded",
        "data": {"train": str(data / "train.jsonl"), "held_out": str(data / "held_out.jsonl"), "max_length": 512},
        "method": "qlora",
        "output": str(next(p for n in count(1) if not (p := Path(f"runs/demo-{n}")).exists())),
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 2e-3},  # a third epoch gains 0.02
        "eval": {"samples": 1, "sample_tokens": 64, "every_steps": 20},  # writing answers is half of the time on a CPU
    }
    try:
        run = api.train(config, *args.overrides, console=console)
    except TunesmithError as e:
        console.print(f"error: {e}", style="red", markup=False)
        return e.exit_code
    path = os.path.relpath(run.path)
    for name, text in (("run", path), ("report", os.path.join(path, run.report.name)), ("talk", f"tunesmith chat {path}")):
        console.print(f"[bold]{name:<8}[/]{escape(text)}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
