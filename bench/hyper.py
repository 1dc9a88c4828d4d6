"""What each setting does to the demo: the runs behind docs/hyperparameters.md, and its pictures and tables.

    python bench/hyper.py run [--only lora.rank,train.epochs] [--seeds 3] [--jobs 4] [--seconds 500] [key.path=value ...]
    python bench/hyper.py draw

`run` trains the embedded model on the embedded rows as `make demo` does, with one setting changed at a time, each in its own
process, and appends a line a run to results/hyper.jsonl; what is there already is not run again, so it may be stopped and called
again. --seconds starts nothing after so many. `draw` reads that file alone and writes docs/hyper/*.svg and what stands between the
marks in docs/hyperparameters.md.

A run ends with its last weights, not its best (eval.keep_best: false), so that too long a run shows. lora.rank moves lora.alpha
with it (alpha = 2 x rank), so that the update's size stays. data.max_length cuts the training rows and is then measured on whole
held-out rows, by a second run that only reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.yaml12 import write
from tunesmith.demo import config as demo_config
from tunesmith.evaluate.page import number, ticks
from tunesmith.evaluate.statistics import t_interval
from tunesmith.run import Run
from tunesmith.sweep.job import Job

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "results" / "hyper.jsonl"
ALWAYS = ("eval.samples=0", "eval.keep_best=false", "eval.every_steps=auto")
WHOLE = 512  # data.max_length of the demo: no row is cut
ATTENTION, MLP = "q_proj, k_proj, v_proj, o_proj", "gate_proj, up_proj, down_proj"


@dataclass(frozen=True)
class Setting:
    """`values`: as shown -> overrides; the first is the demo's own, without any."""

    key: str
    values: dict[str, tuple[str, ...]]
    words: bool = False  # values are words: side by side, not on a scale


def _numbers(key: str, own: str, *values: str) -> Setting:
    return Setting(key, {own: (), **{value: (f"{key}={value}",) for value in values}})


SETTINGS = (
    Setting("lora.rank", {"64": (), **{r: (f"lora.rank={r}", f"lora.alpha={2 * int(r)}") for r in ("4", "16", "128")}}),
    _numbers("lora.alpha", "128", "32", "256"),
    Setting(
        "lora.targets",
        {
            "all-linear": (),
            "q, v": ("lora.targets=[q_proj, v_proj]",),
            "attention": (f"lora.targets=[{ATTENTION}]",),
            "mlp": (f"lora.targets=[{MLP}]",),
        },
        words=True,
    ),
    _numbers("train.learning_rate", "1e-3", "1e-4", "3e-4", "3e-3", "1e-2"),
    _numbers("train.batch_size", "8", "2", "32", "128"),
    _numbers("train.epochs", "5", "1", "2", "10"),
    _numbers("lora.dropout", "0", "0.1", "0.3"),
    Setting(
        "data.max_length",
        {
            str(WHOLE): (),
            **{n: (f"data.max_length={n}", "data.overlength=truncate", "data.max_refused=0.99") for n in ("64", "48")},
        },
    ),
    Setting("train.schedule", {"cosine": (), **{s: (f"train.schedule={s}",) for s in ("linear", "constant", "wsd")}}, words=True),
    _numbers("train.warmup_ratio", "0.03", "0", "0.3"),
)
BY_KEY = {setting.key: setting for setting in SETTINGS}
OWN = "demo"  # stands for every setting's own value in the results


@dataclass
class Point:
    """One run: of `key` the value shown as `value`, with `seed`; `reads` is the run that measures it, where that is another."""

    key: str
    value: str
    seed: int
    overrides: tuple[str, ...]
    job: Job | None = None
    reads: Job | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{self.key}-{self.value}")
        return f"{words}-seed-{self.seed}"


# ---- the runs --------------------------------------------------------------------------------------------------------------------


def points(only: Sequence[str], seeds: int) -> Iterator[Point]:
    """Seed by seed, so that a run that is stopped has whole rounds."""
    for seed in range(seeds):
        yield Point(OWN, OWN, seed, ())
        for key in only:
            for value, overrides in BY_KEY[key].values.items():
                if overrides:
                    yield Point(key, value, seed, overrides)


def run(only: Sequence[str], seeds: int, jobs: int, seconds: float, more: Sequence[str], results: Path, folder: Path) -> int:
    """How many runs failed."""
    done = {(row["key"], row["value"], row["seed"]) for row in read(results)}
    queue = [p for p in points(only, seeds) if (p.key, p.value, p.seed) not in done]
    print(f"{len(queue)} runs to go, {len(done)} are there")
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    base = folder / "run.yaml"
    base.write_text(write(demo_config(str(folder / "unused"))), "utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    began, running, failed = time.monotonic(), [], 0
    while queue or running:
        while queue and len(running) < jobs and time.monotonic() - began < seconds:
            point = queue.pop(0)
            point.job = _job(point.name, [*ALWAYS, *point.overrides, *more], point.seed, base, folder, env)
            point.began = time.monotonic()
            point.job.start()
            running.append(point)
        if not running:
            break
        time.sleep(0.1)
        for point in list(running):
            end = (point.reads or point.job).end()
            if end is None:
                continue
            if end.how == "finished" and point.key == "data.max_length" and point.reads is None:
                adapter = json.dumps(str(point.job.folder / "adapter"))
                point.reads = _job(f"{point.name}-read", [*ALWAYS, f"lora.continue_from={adapter}", "train.max_steps=1"],
                                   point.seed, base, folder, env)  # fmt: skip
                point.reads.start()
                continue
            running.remove(point)
            if end.how != "finished":
                failed += 1
                print(f"failed: {point.name}: {end.reason}")
                continue
            row = _row(point)
            with results.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            for job in (point.job, point.reads):
                if job:
                    job.make_small(keep_one=False)
            print(f"{point.name:<40} loss {row['loss']:.4f}  {row['wall']:.0f} s", flush=True)
    if queue:
        print(f"{len(queue)} runs are left: call it again")
    return failed


def _job(name: str, overrides: Sequence[str], seed: int, base: Path, folder: Path, env: dict[str, str]) -> Job:
    out = folder / "trials" / name
    command = [str(base), *overrides, f"seed={seed}", f"output={json.dumps(str(out))}"]
    return Job(out, folder / "logs" / f"{name}.log", command, env)


def _row(point: Point) -> dict[str, Any]:
    trained = Run.open(point.job.folder)
    rows = trained.metrics()
    steps = [row["loss"] for row in rows if row["kind"] == "step"]
    curve = [[row["step"], row["loss"]] for row in rows if row["kind"] == "eval"]
    if point.reads:  # the adapter as it came, before the one step
        first = next(row for row in Run.open(point.reads.folder).metrics() if row["kind"] == "eval")
        loss, tokens = first["loss"], first["tokens"]
    else:
        loss, tokens = curve[-1][1], next(row["tokens"] for row in reversed(rows) if row["kind"] == "eval")
    tenth = steps[-max(1, len(steps) // 10) :]
    return {
        "key": point.key, "value": point.value, "seed": point.seed, "loss": loss, "tokens": tokens,
        "lowest": min(y for _, y in curve), "before": curve[0][1], "training_loss": statistics.fmean(tenth), "steps": len(steps),
        "seconds": trained.manifest.get("seconds"), "wall": round(time.monotonic() - point.began, 1),
        "device": trained.manifest.get("device"), "curve": curve,
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


# ---- the pictures and tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A value's runs: losses by seed, the mean, and the difference to the demo's own value over the same seeds."""

    value: str
    own: bool
    losses: list[float]
    training: list[float]
    seconds: float
    difference: tuple[float, float, float] | None  # mean, 95 % interval; the interval is infinite with one seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def tells(self) -> bool:
        """Whether the difference is beyond the noise of the seeds."""
        return self.difference is not None and not self.difference[1] <= 0 <= self.difference[2]


def measured(key: str, rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """In the order of the values; words as they stand in SETTINGS."""
    own = {row["seed"]: row for row in rows if row["key"] == OWN}
    found = []
    for value, overrides in BY_KEY[key].values.items():
        mine = {row["seed"]: row for row in rows if (row["key"], row["value"]) == (key, value)} if overrides else own
        if not mine:
            continue
        both = sorted(mine.keys() & own.keys())
        pairs = [mine[s]["loss"] - own[s]["loss"] for s in both]
        losses, training = ([mine[s][name] for s in sorted(mine)] for name in ("loss", "training_loss"))
        seconds = statistics.fmean(row["seconds"] for row in mine.values())
        difference = t_interval(pairs) if overrides and pairs else None
        found.append(Measured(value, not overrides, losses, training, seconds, difference))
    return found if BY_KEY[key].words else sorted(found, key=lambda m: float(m.value))


def draw(results: Path, docs: Path) -> None:
    rows = read(results)
    if not rows:
        sys.exit(f"{results}: holds no runs; python bench/hyper.py run makes them")
    (docs / "hyper").mkdir(exist_ok=True)
    guide = docs / "hyperparameters.md"
    text = guide.read_text("utf-8")
    for setting in SETTINGS:
        found = measured(setting.key, rows)
        if len(found) < 2:
            continue
        (docs / "hyper" / f"{setting.key}.svg").write_text(picture(setting.key, found), "utf-8")
        text = put(text, setting.key, block(setting.key, found))
    guide.write_text(put(text, OWN, about(rows)), "utf-8")


def put(text: str, name: str, what: str) -> str:
    """`text` with what stands between the marks of `name` replaced."""
    head, tail = f"<!-- measured: {name} -->\n", f"<!-- end: {name} -->"
    before, found, rest = text.partition(head)
    assert found and tail in rest, f"docs/hyperparameters.md has no marks for {name}"
    return before + head + what + tail + rest.partition(tail)[2]


def about(rows: Sequence[dict[str, Any]]) -> str:
    own = [row for row in rows if row["key"] == OWN]
    losses = [row["loss"] for row in own]
    devices = sorted({row["device"] for row in rows})
    seeds = f", {min(losses):.3f} to {max(losses):.3f} over {len(losses)} seeds" if len(losses) > 1 else ""
    means = {key: [m.mean for m in found] for key in BY_KEY if len(found := measured(key, rows)) > 1}
    order = sorted(means, key=lambda key: min(means[key]) - max(means[key]))
    apart = ", ".join(f"{key} {max(means[key]) - min(means[key]):.2f}" for key in order)
    said = (
        f"{len(rows)} runs on {' and '.join(devices)}. The demo as it is: held-out loss {own[0]['before']:.3f} before, "
        f"{statistics.fmean(losses):.3f} after {own[0]['steps']} steps{seeds}. "
        f"The best and the worst value tried lie apart by: {apart}."
    )
    return _filled(said)


def block(key: str, found: Sequence[Measured]) -> str:
    """The picture, its numbers, and what they say, in words that follow from the numbers."""
    best, own = min(found, key=lambda m: m.mean), next((m for m in found if m.own), None)
    lines = [f"![{key}: held-out loss](hyper/{key}.svg)", "", f"| {key} | held-out loss | to the demo's | training loss | s |",
             "|---|---|---|---|---|"]  # fmt: skip
    for m in found:
        value = f"**{m.value}**" if m.own else m.value
        lines.append(f"| {value} | {m.mean:.3f} | {_difference(m)} | {statistics.fmean(m.training):.3f} | {m.seconds:.0f} |")
    worse = [m.value for m in found if m.tells and m.difference[0] > 0]
    better = [m.value for m in found if m.tells and m.difference[0] < 0]
    same = [m.value for m in found if not m.own and not m.tells]
    said = [f"lowest at {best.value}"]
    said += [f"better than the demo's {own.value} beyond the noise of seeds: {'; '.join(better)}"] if own and better else []
    said += [f"worse: {'; '.join(worse)}"] if worse else []
    said += [f"no difference shown: {'; '.join(same)}"] if same else []
    seeds = min(len(m.losses) for m in found)
    words = ". ".join(part[0].upper() + part[1:] for part in said)
    again = f"Made by `python bench/hyper.py run --only {key}` and `python bench/hyper.py draw`."
    return "\n".join([*lines, "", _filled(f"Measured, {seeds} seed{'s' * (seeds != 1)}: {words}. {again}")])


def _filled(text: str) -> str:
    return textwrap.fill(text, 138, break_long_words=False, break_on_hyphens=False) + "\n"


def _difference(m: Measured) -> str:
    if m.difference is None:
        return "-"
    mean, low, high = m.difference
    return f"{mean:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if math.isfinite(low) else "")


INK, SOFT, GRID, HELD, TRAIN = "#20242a", "#5f6670", "#e2e5ea", "#0b6e4f", "#7d97bd"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 250, 56, 40, 36
LEAST = 0.1  # of loss an axis spans, so that noise does not look like an effect


def picture(key: str, found: Sequence[Measured]) -> str:
    """Held-out loss by value: a point a seed, a line through the means; training loss as a thin line. Values stand side by side."""
    cut = key == "data.max_length"  # loss on cut rows is of another task
    highest = _ceiling([m.mean for m in found])
    drawn = [m for m in found if m.mean <= highest]
    shown = [y for m in drawn for y in (*m.losses, *([] if cut else [statistics.fmean(m.training)]))]
    middle, half = (max(shown) + min(shown)) / 2, max(max(shown) - min(shown), LEAST) / 2
    levels = ticks(middle - half, middle + half, 4)
    low, high = levels[0], levels[-1]

    def x(i: int) -> float:
        return round(LEFT + (i + 0.5) / len(found) * (WIDTH - LEFT - 14), 1)

    def y(loss: float) -> float:
        return round(TOP + (high - min(loss, high)) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<title>{key}: held-out loss by value</title><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-weight="600">{key}</text>',
        f'<circle cx="{WIDTH - 262}" cy="14" r="4" fill="{HELD}"/><text x="{WIDTH - 253}" y="18" fill="{SOFT}">'
        "held-out loss, a seed each</text>",
    ]
    if not cut:
        out.append(f'<line x1="{WIDTH - 78}" x2="{WIDTH - 62}" y1="14" y2="14" stroke="{TRAIN}" stroke-width="2"/>'
                   f'<text x="{WIDTH - 56}" y="18" fill="{SOFT}">training</text>')  # fmt: skip
    for level in levels:
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - 14}" y1="{y(level)}" y2="{y(level)}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(level) + 4}" text-anchor="end" fill="{SOFT}">{number(level)}</text>')
    if not cut:
        out.append(_line([(x(i), y(statistics.fmean(m.training))) for i, m in enumerate(found)], TRAIN, 1.5))
    out.append(_line([(x(i), y(m.mean)) for i, m in enumerate(found)], HELD, 2))
    for i, m in enumerate(found):
        out += [f'<circle cx="{x(i)}" cy="{y(loss)}" r="3.5" fill="{HELD}" fill-opacity=".6"/>' for loss in m.losses]
        if m.own:
            out.append(f'<circle cx="{x(i)}" cy="{y(m.mean)}" r="9" fill="none" stroke="{INK}"/>')
        if m.mean > high:
            out.append(f'<text x="{x(i)}" y="{TOP - 6}" text-anchor="middle">{m.mean:.2f} ↑</text>')
        weight = ' font-weight="600"' if m.own else ""
        out.append(f'<text x="{x(i)}" y="{HEIGHT - 12}" text-anchor="middle"{weight}>{m.value}</text>')
    return "\n".join([*out, "</svg>", ""])


def _ceiling(means: Sequence[float]) -> float:
    """The highest mean drawn to scale: one that diverged must not press the others into a line."""
    middle, low = statistics.median(means), min(means)
    return max(m for m in means if m <= middle + 4 * max(middle - low, 0.05 * low))


def _line(places: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    points = " ".join(f"{a},{b}" for a, b in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("more", nargs="*", metavar="key.path=value", help="for every run, such as memory.device=cpu")
    parser.add_argument("--only", default=",".join(BY_KEY), help="settings, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/hyper"), help="for the run folders")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_intermixed_args()
    only = args.only.split(",")
    if strange := [key for key in only if key not in BY_KEY]:
        parser.error(f"--only {strange[0]}: known are {', '.join(BY_KEY)}")
    if args.what == "draw":
        draw(args.results, args.docs)
        return 0
    return int(run(only, args.seeds, args.jobs, args.seconds, args.more, args.results, args.folder.absolute()) > 0)


if __name__ == "__main__":
    sys.exit(main())
