"""Training steps of ours and of peers on one GPU, row by row of docs/performance.md; resumable, each arm in a process of its own.

    python bench/gpu.py --make-gsm8k FILE            the tokens of the row gsm8k, from ../shared/data; no GPU
    python bench/gpu.py --site SITE --gsm8k FILE     time what is not in the results yet; --rows a,b and --arms a,b choose
    python bench/gpu.py --profile 4x2048-keep        where our step spends its time; --link: the host link
    python bench/gpu.py --table                      results -> docs/performance.md and docs/performance.svg
    python bench/gpu.py --tiny --out FOLDER          a dry run on a CPU: a tiny Llama, ours and transformers + PEFT

Only a ratio from one call counts, so whenever an arm of ours is timed, the row's baseline is timed again in the same call. Each
finished (row, arm) is appended to gpu.jsonl at once, failures too, with the card, its own rates, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_limits import Shapes
from gpu_rows import ARMS, CONFIGS, OURS, ROWS, make_gsm8k

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHARED = HERE.parents[1] / "shared" / "data"
UNSLOTH_PEAK = 6.35  # GiB of Unsloth's 4 x 2048 step, where this call has not measured it
SPARE = 5  # seconds that a call keeps for its own end


class Bench:
    """One call: its options, its card, and the time it has left."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.monotonic() + args.limit
        self.call = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.out = args.out or RESULTS
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
        self.card: dict[str, Any] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic() - SPARE

    def child(self, peer: bool = False, cold: bool = False, **task: Any) -> dict[str, Any]:
        """Run one task in a process of its own; its result, or {"error": ...}. A peer sees the site folder, and no one else does.
        `cold`: with empty caches of compiled kernels."""
        file, result = self.work / "task.json", self.work / "result.json"
        result.unlink(missing_ok=True)
        paths = [str(self.args.site.resolve())] if peer and self.args.site else [str(HERE.parent / "src")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
        cwd = Path(tempfile.mkdtemp(dir=self.work)) if cold else self.work  # Unsloth keeps what it compiles in its working folder
        if cold:
            env |= {"TRITON_CACHE_DIR": str(cwd / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cwd / "inductor")}
        file.write_text(
            json.dumps(
                {"tiny": self.args.tiny, "gsm8k": self._path(self.args.gsm8k), "rates": self.card} | task | {"born": time.time()}
            )
        )
        limit = max(1.0, min(self.args.child_limit, self.left))
        log = self.work / "log"
        with log.open("w") as sink:
            process = subprocess.Popen([sys.executable, str(HERE / "gpu_arms.py"), str(file), str(result)], cwd=cwd, env=env,
                                       stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                there = json.loads(result.read_text()) if result.exists() else {}  # rows that were finished before
                found = there | {"error": f"stopped after {limit:.0f} s", "stopped": True}
            else:
                found = (
                    json.loads(result.read_text())
                    if result.exists()
                    else {"error": f"exit {process.returncode}: {_last_line(log)}"}
                )
        if "error" in found:
            with (self.out / "gpu-errors.txt").open("a") as errors:
                errors.write(f"==== {self.call} {task}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]) + "\n")
        return found

    @staticmethod
    def _path(path: Path | None) -> str | None:
        return str(path.resolve()) if path else None

    def checkpoint(self, model: str) -> str:
        """The folder of a model's random checkpoint, made where it is missing; others of the bench make room for it."""
        root = self.args.checkpoint or (Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir()))
        root = self.work if self.args.tiny else root
        shapes = Shapes.of(CONFIGS[model])
        size = 2 * (shapes.layers * shapes.layer_weights + shapes.head_weights * (1 if shapes.tied else 2)) * 1.02
        roots, name = (root, Path(tempfile.gettempdir())), f"tunesmith-bench-{model}"
        for folder in (r / name for r in roots):
            if (folder / "made_by_the_gpu_bench").exists():
                return str(folder)
        for root in roots:
            root.mkdir(parents=True, exist_ok=True)
            for old in root.glob("tunesmith-bench-*"):
                if shutil.disk_usage(root).free < size:
                    shutil.rmtree(old)
            if shutil.disk_usage(root).free > size:
                break
        folder = root / name
        start = time.monotonic()
        made = self.child(task="checkpoint", model=model, checkpoint=str(folder))
        if "error" in made:
            raise SystemExit(f"the checkpoint {model} could not be made in {folder}: {made['error']}")
        print(f"made {folder}: {made['bytes'] / 1e9:.1f} GB in {time.monotonic() - start:.0f} s", flush=True)
        return str(folder)

    def look(self) -> None:
        """The card's name and rates."""
        if self.args.tiny:
            self.card = {"card": "CPU"}
            return
        self.card = self.child(task="rates")
        if "error" in self.card:
            raise SystemExit(f"the card could not be measured: {self.card['error']}")
        self.card.pop("versions")
        print("card: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in self.card.items()), flush=True)

    def record(self, name: str, found: dict[str, Any], **more: Any) -> dict[str, Any]:
        line = {"card": self.card["card"], "call": self.call, "commit": _commit(), "rates": self.card} | more | found
        with (self.out / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def rows(self) -> None:
        """Time what is wanted and not there yet."""
        self.look()
        done = [r for r in load(self.out, RESULTS) if r["card"] == self.card["card"] and (not self.args.retry or "error" not in r)]
        jobs: dict[tuple, list[tuple[str, str]]] = {}  # what shares a process, and with it a loaded model
        for name in self.args.rows:
            row, arms = ROWS[name], [a for a in self.args.arms if a in ROWS[name].arms]
            have = {r["arm"] for r in done if r["row"] == name}
            todo = plan(arms, have if not self.args.again else set(), row.baseline, label=self.label)
            if name == "gsm8k" and todo and not self.args.gsm8k:
                print("gsm8k is left out: give its tokens with --gsm8k FILE", flush=True)
                continue
            for arm in todo:
                peer = arm not in OURS
                alone = name if name == "start" or (arm == "unsloth" and row.data == "gsm8k") else ""
                key = row.model, row.store, row.full, arm if peer else "ours", peer and row.policy == "keep", alone
                jobs.setdefault(key, []).append((name, arm))
        for (model, *_), pairs in jobs.items():
            if self.left < 30:
                print(f"no time left for {', '.join(f'{n} {a}' for n, a in pairs)}; call again to go on", flush=True)
                continue
            folder = self.checkpoint("tiny" if self.args.tiny else model)
            knobs = self.args.knobs if pairs[0][1] in OURS else {}
            found = self.child(
                task="step", peer=pairs[0][1] not in (*OURS, "read"), cold=pairs[0][0] == "start", rows=pairs, checkpoint=folder,
                steps=self.args.steps, knobs=knobs, budget_gib=UNSLOTH_PEAK,
            )  # fmt: skip
            there = found.get("rows", [])
            if len(there) < len(pairs) and "error" in found:
                there = [*there, {"error": found["error"]}]
            for (name, arm), one in zip(pairs, there, strict=False):
                one = {"versions": found.get("versions"), **one}
                self.show(
                    self.record("gpu.jsonl", one, row=name, arm=self.label(arm), policy=ROWS[name].policy, tiny=self.args.tiny)
                )
        for name in self.args.rows:
            self.compare(name)

    def label(self, arm: str) -> str:
        """An arm of ours under other knobs is another arm."""
        changed = ",".join(f"{k}={v}" for k, v in self.args.knobs.items())
        return f"{arm}[{changed}]" if changed and arm in OURS else arm

    def show(self, r: dict[str, Any]) -> None:
        if "error" in r:
            print(f"{r['row']:14} {r['arm']:16} FAILED {r['error']}", flush=True)
        elif "ms" not in r:
            print(f"{r['row']:14} {r['arm']:16} {r['first_step_s']} s", flush=True)
        else:
            peak = f"{r['peak_GiB']:7.2f} GiB, {r['reserved_GiB']:.2f} reserved" if r["peak_GiB"] else ""
            speed = f"{r['tokens_per_s']:9,.0f} tok/s {r['examples_per_s']:7.1f} ex/s {r['ms']:9.1f} ms {peak}"
            losses = f"loss {r['loss_first']:.4f} -> {r['loss_last']:.4f}"
            print(f"{r['row']:14} {r['arm']:16} {speed}  {losses}  first step {r.get('first_step_s', '-')} s", flush=True)

    def compare(self, name: str) -> None:
        """The losses of a row's arms on the same first step, beside each other."""
        found = {
            r["arm"]: r["loss_first"] for r in load(self.out) if (r["row"], r["call"]) == (name, self.call) and "loss_first" in r
        }
        if len(found) > 1:
            apart = max(found.values()) - min(found.values())
            verdict = "agree" if apart <= 1e-2 else "DO NOT AGREE"
            print(
                f"{name:14} first losses {verdict} ({apart:.1e} apart): " + ", ".join(f"{a} {x:.4f}" for a, x in found.items()),
                flush=True,
            )

    def probe(self) -> None:
        """The host link, and the profiles that are asked for."""
        self.look()
        if self.args.link:
            found = self.child(task="link")
            self.record("gpu-link.jsonl", found)
            for name, values in found.get("link", {"failed": found}).items():
                print(f"{name:24} {values}", flush=True)
        for name in self.args.profile:
            for arm in [a for a in self.args.arms if a in OURS and a in ROWS[name].arms]:
                folder = self.checkpoint("tiny" if self.args.tiny else ROWS[name].model)
                found = self.child(
                    task="profile", row=name, arm=arm, checkpoint=folder, knobs=self.args.knobs, budget_gib=UNSLOTH_PEAK
                )
                self.record("gpu-profile.jsonl", {k: v for k, v in found.items() if k != "text"}, row=name, arm=self.label(arm))
                print(f"---- {name} {arm}\n{found.get('text', found)}", flush=True)


def plan(arms: list[str], have: set[str], baseline: str, label: Any = str) -> list[str]:
    """The arms of a row to time: what is missing, and ours together with the baseline, since only a ratio from one call counts."""
    todo = {a for a in arms if label(a) not in have}
    if baseline in arms:
        if todo & set(OURS):
            todo.add(baseline)
        elif baseline in todo:
            todo |= set(arms) & {"ours"}
    return [a for a in arms if a in todo]


def load(*folders: Path) -> list[dict[str, Any]]:
    """All records, oldest first."""
    files = dict.fromkeys((folder / "gpu.jsonl").resolve() for folder in folders)
    return [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines() if line.strip()]


def _commit() -> str | None:
    """The checkout's commit, where git and its folder are there."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def names(known: Any, prefixes: bool = False) -> Any:
    """A parser of a comma-separated list; `phi-keep` means every row that begins so."""

    def parse(text: str) -> list[str]:
        out = []
        for word in filter(None, text.split(",")):
            found = [n for n in known if n == word or (prefixes and n.startswith(f"{word}-"))]
            if not found:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
            out += found
        return list(dict.fromkeys(out))

    return parse


def knob(text: str) -> dict[str, Any]:
    """`activations=int8,micro_batch_tokens=4096`: values as JSON where they are JSON, else words."""
    out = {}
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=names(ROWS, True), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--arms", type=names(ARMS), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=9, help="optimiser steps; the median of those after the third counts")
    parser.add_argument(
        "--knobs", type=knob, default={}, help="of our arms: activations=int8,micro_batch_tokens=4096 (see prepare_model)"
    )
    parser.add_argument("--checkpoint", type=Path, help="where the random checkpoints lie or are made (default /dev/shm)")
    parser.add_argument("--site", type=Path, help="the unpacked peers; only their processes see it")
    parser.add_argument("--gsm8k", type=Path, help="the tokens of the row gsm8k")
    parser.add_argument("--out", type=Path, help="folder for gpu.jsonl (default bench/results)")
    parser.add_argument("--again", action="store_true", help="time also what is there")
    parser.add_argument("--retry", action="store_true", help="time again what failed")
    parser.add_argument("--limit", type=float, default=570, help="seconds for the whole call")
    parser.add_argument("--child-limit", type=float, default=240, help="seconds for one arm on one row")
    parser.add_argument("--tiny", action="store_true", help="dry run on a CPU")
    parser.add_argument("--profile", type=names(ROWS, True), default=[], metavar="ROW")
    parser.add_argument("--link", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--make-gsm8k", type=Path, metavar="FILE")
    parser.add_argument("--shared", type=Path, default=SHARED, help="the folder of real data that --make-gsm8k reads")
    args = parser.parse_args()
    if args.make_gsm8k:
        return print(
            make_gsm8k(
                args.make_gsm8k, args.shared / "sft" / "gsm8k" / "train.jsonl", args.shared / "tokenizers" / "Mistral-7B-v0.1"
            )
        )
    if args.table:
        from gpu_report import write

        return print(write(load(args.out or RESULTS), HERE.parent / "docs"))
    if args.tiny:
        args.arms = [a for a in args.arms if a in ("ours", "hf", "read")]
        if not args.out:
            parser.error("--tiny needs --out: a dry run is no result")
    bench = Bench(args)
    try:
        if args.link or args.profile:
            bench.probe()
        else:
            bench.rows()
    finally:
        shutil.rmtree(bench.work, ignore_errors=True)


if __name__ == "__main__":
    main()
