"""`make demo`: tune the embedded model on the embedded data and show what changed. Needs no network and no GPU; uses a GPU where there is one."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
        "train": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-3},
        "eval": {"samples": 1, "sample_tokens": 96},
    }
    try:
        run = api.train(config, *args.overrides, console=console)
    except TunesmithError as e:
        console.print(f"error: {e}", style="red", markup=False)
        return e.exit_code
    show(console, run.path)
    return 0


def show(console: Console, run: Path) -> None:
    """Name the run folder, the loss before and after, and one prompt answered before and after."""
    found = json.loads((run / "comparison.json").read_text("utf-8"))
    loss = found["loss"]
    low, high = loss["interval"]
    console.print()
    console.print(f"[bold]held-out loss[/]  {loss['before']:.3f} before, {loss['after']:.3f} after   "
                  f"(difference {loss['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {loss['rows']} rows never trained on)")  # fmt: skip
    if found["rows"]:
        row = found["rows"][0]
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in (("prompt", row["prompt"]), ("before", row["before"]["answer"]), ("after", row["after"]["answer"])):
            table.add_row(name, escape(text))
        console.print(table)
    console.print(f"[bold]run folder[/]     {escape(str(run))}")
    console.print(f"[bold]report[/]         {escape(str(run / 'report.html'))}")
    console.print(f"[bold]talk to it[/]     tunesmith chat {escape(str(run))}")


if __name__ == "__main__":
    sys.exit(main())
