"""`make demo`: tune the embedded model on the embedded data and show what changed. No network, no GPU needed; a GPU is used.

The held-out questions are answered by the base model, by the base model with a system prompt that asks for the same style, and by
the tuned one; rules that a program checks (assets/demo/style.json) say what each keeps. The table ends the run and stands in its
report.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith import api
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.style import Scores, Style, score
from tunesmith.files import write_atomic
from tunesmith.run import Run

ANSWER = 80  # tokens of an answer: the longest in the data has 58
DATA = files("tunesmith") / "assets" / "demo"
COLUMNS = ("base", "with system prompt", "tuned")
NOTE = (
    "Style is every rule kept at once. An answer is from the manual when it holds the facts that were asked for: tuning on a few "
    "hundred rows teaches how to answer, hardly what. Facts belong in the prompt."
)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; any `key.path=value` goes to the run file, so `model=/some/checkpoint` tunes a larger one on the same data."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.demo", description=main.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    console = Console()
    output = str(next(p for n in count(1) if not (p := Path(f"runs/demo-{n}")).exists()))
    try:
        model = next((o.removeprefix("model=") for o in reversed(args.overrides) if o.startswith("model=")), "embedded")
        run = api.train(config(output, model), *args.overrides, console=console)
        if rows := questions(run):
            compare(run, rows, Style.load(Path(str(DATA / "style.json"))), console)
    except TunesmithError as e:
        console.print(f"error: {e}", style="red", markup=False)
        return e.exit_code
    path = os.path.relpath(run.path)
    for name, text in (("run", path), ("report", os.path.join(path, run.report.name)), ("talk", f"tunesmith chat {path}")):
        console.print(f"[bold]{name:<8}[/]{escape(text)}", soft_wrap=True, highlight=False)
    return 0


def config(output: str, model: str = "embedded") -> dict[str, Any]:
    """The demo's run file. Rank, rate and passes are the small model's (docs/hyperparameters.md, docs/log.md); a larger one
    gets the defaults, which are made for its size.
    """
    small = {"lora": {"rank": 64, "alpha": 128}, "train": {"epochs": 5, "batch_size": 8, "learning_rate": 1e-3}}
    return {
        "model": model,
        "data": {"train": str(DATA / "train.jsonl"), "held_out": str(DATA / "held_out.jsonl"), "max_length": 512},
        "method": "qlora",
        "output": output,
        # writing answers takes long on a CPU; held-out loss is lowest after two passes, style and redirects go on getting better
        "eval": {"samples": 1, "sample_tokens": 64, "every_steps": 100, "keep_best": False},
        **(small if model == "embedded" else {}),
    }


def questions(run: Run) -> list[dict[str, Any]]:
    """The held-out rows that say their topic; none where another file was named."""
    held_out = run.config.data.held_out
    if not isinstance(held_out, str) or not Path(held_out).is_file():
        return []
    with open(held_out, encoding="utf-8") as lines:
        return [row for line in lines if "topic" in (row := json.loads(line))]


def compare(run: Run, rows: Sequence[dict[str, Any]], style: Style, console: Console) -> None:
    """Answer all rows three ways, print the table, and put it into comparison.json and the report."""
    console.print(f"answering {len(rows)} held-out questions with the base model, with a system prompt, and tuned", style="dim")
    base, asked = run.config.model, style.system_prompt
    answered = {
        COLUMNS[0]: answers(run, base, rows),
        COLUMNS[1]: answers(run, base, rows, asked),
        COLUMNS[2]: answers(run, run.path, rows),
    }
    scores = [score(style, rows, answered[name]) for name in COLUMNS]
    path = run.path / "comparison.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": [], "loss": {}, "metrics": {}}
    table = lines(scores, found["loss"])
    found["table"] = {
        "title": f"{len(rows)} held-out questions, three ways",
        "head": ["", *COLUMNS],
        "rows": table,
        "note": NOTE,
    }
    write_atomic(path, json.dumps(found, ensure_ascii=False))
    kept = [
        {"prompt": row["messages"][-2]["content"], "topic": row["topic"], **{name: answered[name][i] for name in COLUMNS}}
        for i, row in enumerate(rows)
    ]
    write_atomic(run.path / "demo_answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    api.report(run.path)
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for i, head in enumerate(("", *COLUMNS)):
        shown.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for row in table:
        shown.add_row(*row)
    console.print(shown)
    console.print(NOTE, style="dim")


def answers(run: Run, model: str | Path, rows: Sequence[dict[str, Any]], system: str | None = None) -> list[str]:
    """The greedy answer to each row's question."""
    from tunesmith.chat import Talker

    talker = Talker.open(model, memory=run.config.memory)
    found = talker.answer([row["messages"][-2]["content"] for row in rows], system=system, max_tokens=ANSWER)
    del talker
    gc.collect()  # a large model leaves the device before the next comes
    return [answer.strip() for answer in found]


def lines(scores: Sequence[Scores], loss: dict[str, Any]) -> list[list[str]]:
    """The table's rows as text."""
    before, after = (f"{loss[key]:.2f}" if isinstance(loss.get(key), float) else "-" for key in ("before", "after"))
    return [
        ["keeps the house style", *(str(s.style) for s in scores)],
        ["off-topic requests redirected", *(str(s.redirected) for s in scores)],
        ["other questions redirected", *(str(s.turned_away) for s in scores)],
        ["answers from the manual", *(str(s.facts) for s in scores)],
        ["held-out loss", before, "-", after],
    ]


if __name__ == "__main__":
    sys.exit(main())
