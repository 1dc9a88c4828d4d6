"""How far each export is from the live model: KL a token, the likeliest token, greedy answers, the loss, in each one's own runtime.

    python bench/export.py [--steps 60] [--out bench/results/export.jsonl] [--only gguf-q8_0,merged] [--runs FOLDER]

Tunes the embedded model on the embedded demo rows, once over 16 bits and once over 4, and exports both every way. K-quants are in
it where llama.cpp's quantiser is (llama-quantize on the PATH). Prints the table of docs/export.md. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from rich.console import Console

import tunesmith
from tunesmith.errors import TunesmithError
from tunesmith.export.gguf import K_QUANTS, OURS, quantiser

DATA = Path(tunesmith.__file__).parent / "assets" / "demo"
HEAD = "| run | export | KL a token | largest | likeliest token same | greedy answers same | loss, live | here | verdict |"
K_SHOWN = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m")


def cases(method: str) -> list[tuple[str, str, str]]:
    """(format, quant, onto)"""
    if method == "qlora":
        plain = [("merged", "", "auto"), ("merged", "", "dense"), ("adapter", "", "auto"), ("gguf-lora", "", "auto")]
        return [*plain, ("gguf", "f16", "auto"), ("gguf", "q8_0", "auto")]
    quants = [*OURS, *(k for k in K_SHOWN if k in K_QUANTS and quantiser())]
    return [("merged", "", "auto"), ("adapter", "", "auto"), ("gguf-lora", "", "auto"), *(("gguf", q, "auto") for q in quants)]


def train(method: str, out: Path, steps: int) -> Path:
    config = {
        "model": "embedded", "method": method, "output": str(out / method), "seed": 7, "lora": {"rank": 16, "alpha": 32},
        "data": {"train": str(DATA / "train.jsonl"), "held_out": str(DATA / "held_out.jsonl"), "max_length": 256, "workers": 1},
        "train": {"batch_size": 16, "max_steps": steps, "learning_rate": 0.002},
        "eval": {"samples": 0, "every_steps": steps}, "memory": {"device": "cpu", "budget_gb": 4},
    }  # fmt: skip
    return tunesmith.train(config, console=quiet()).path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def measure(run: Path, method: str, to: str, quant: str, onto: str, out: Path) -> dict[str, object]:
    label = f"{to}{'-' + quant if quant else ''}{' onto the 16-bit base' if onto == 'dense' else ''}"
    (done,) = tunesmith.export(run, to, quant=quant or "q8_0", onto=onto, out=out / label, force=True, console=quiet())
    row: dict[str, object] = {"run": method, "export": label, "state": done.parity.state, "reasons": done.parity.reasons}
    if not done.parity.measured:
        return row
    numbers, answers = done.parity.measured["numbers"], done.parity.measured["answers"]
    words = done.parity.measured["words"]
    return row | {
        "runtime": done.parity.runtime,
        **{k: float(f"{numbers[k]:.4g}") for k in ("kl_mean", "kl_max", "top1", "loss_live", "loss_artefact")},
        "positions": numbers["positions"],
        "answers_equal": answers["equal"],
        "answers": answers["count"],
        "conversations": words["conversations"],
        "conversations_different": len(words["different"]),
        "bytes": sum(p.stat().st_size for p in done.path.iterdir()),
    }


def line(row: dict[str, object]) -> str:
    """One row of the table."""
    if "kl_mean" not in row:
        return f"| {row['run']} | {row['export']} | {row['state']}: {row['reasons']} |"
    return (
        f"| {row['run']} | {row['export']} | {row['kl_mean']:.1e} | {row['kl_max']:.1e} | {row['top1']:.1%} | "
        f"{row['answers_equal']} of {row['answers']} | {row['loss_live']:.4f} | {row['loss_artefact']:.4f} | {row['state']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("bench/results/export.jsonl"))
    parser.add_argument("--only", default="", help="formats, as in the table, with commas between")
    parser.add_argument("--runs", type=Path, help="a folder with the runs lora and qlora of these rows: nothing is trained")
    given = parser.parse_args()
    only = set(filter(None, given.only.split(",")))
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lora", "qlora"):
            run = given.runs / method if given.runs else train(method, Path(folder), given.steps)
            for to, quant, onto in cases(method):
                if only and to not in only and f"{to}-{quant}" not in only:
                    continue
                try:
                    rows.append(measure(run, method, to, quant, onto, Path(folder) / f"{method}-exports"))
                except TunesmithError as fault:
                    rows.append({"run": method, "export": f"{to}-{quant}", "state": "failed", "reasons": [fault.what]})
                print(line(rows[-1]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
