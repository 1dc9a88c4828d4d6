"""docs/planning.svg and the tables of docs/planning.md, from what bench/plan.py measured: planned beside held and measured.

    python bench/plan_report.py

The picture is of plan.jsonl, an H200's rows; plan_h100.jsonl has an H100's.

What was foretold is the plan as it was written before its row ran, by the rates of the card's own probe. Beside it the plan is made
anew by this checkout for the same layers and micro-batches: a constant that is changed must still hold for these rows.
"""

from __future__ import annotations

import html
import json
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_rows import CONFIGS
from plan import GIB, SETS, Row, config_of, lengths_of

HERE = Path(__file__).resolve().parent
SIZE, MARGIN = 420, 52
COLOURS = {"qlora": "#3366aa", "lora": "#2a8a57", "full": "#b3541e", "full32": "#b3541e"}


@dataclass(frozen=True)
class Point:
    row: Row
    held: float
    foretold: float
    planned: float
    speed: float
    foretold_speed: float
    planned_speed: float


def points(file: Path) -> list[Point]:
    from tunesmith.devices import parse_device
    from tunesmith.plan.choice import Open, Way
    from tunesmith.plan.rates import Rates
    from tunesmith.spec import spec_of

    known, out = {r.name: r for rows in SETS for r in rows}, []
    first, *records = map(json.loads, file.read_text().splitlines())
    device = replace(parse_device(first["card"].split()[1].lower()), host=120 * GIB)  # NVIDIA H100 80GB HBM3
    rates = Rates(**{f.name: first["rates"][f.name] for f in fields(Rates)})
    for record in records:
        if "held" not in record or record.get("uncapped"):
            continue
        row, ran = known[record["row"]], record["plan"]
        spec = spec_of(CONFIGS[row.family])
        job = Open.of(config_of(row, ran["budget"]), spec, lengths_of(row.lengths), device, rates)
        layers = layers_of(ran["activations"], spec.layers, ran["tile"])
        way = Way(job, layers, ran["micro_batch_tokens"], bool(ran["weight_cache"]))
        memory, speed = (record["held"], ran["needs"], way.needs), (record["tokens_per_s"], ran["tokens_per_s"], way.speed)
        out.append(Point(row, *memory, *speed))
    return out


def layers_of(words: str, count: int, tile: int | None) -> tuple:
    """The layers, from the bottom, that plan.layers.describe put into these words."""
    from tunesmith.plan.layers import WHOLE, Layers

    found = re.findall(r"(\w+) (\d+)(?: layers)?( offloaded)?", words)
    if not found:
        return (Layers(count, words.split(",")[0], "offloaded" in words, tile or WHOLE),)
    return tuple(Layers(int(n), level, bool(moved), tile or WHOLE) for level, n, moved in reversed(found))


def panel(title: str, pairs: list[tuple[float, float, str, str]], band: float, at: int) -> str:
    """A scatter on logarithmic axes: measured to the right, planned upwards, the band within which a plan should lie."""
    low, high = min(min(a, b) for a, b, *_ in pairs) / 1.15, max(max(a, b) for a, b, *_ in pairs) * 1.15

    def place(value: float) -> float:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) * (SIZE - 2 * MARGIN)

    def xy(a: float, b: float) -> str:
        return f"{at + MARGIN + place(a):.1f},{SIZE - MARGIN - place(b):.1f}"

    parts = [f'<text x="{at + SIZE / 2}" y="24" text-anchor="middle" font-weight="600">{html.escape(title)}</text>']
    ends = (low * 1.2, high / 1.2)
    corners = [xy(ends[0], ends[0] * (1 + band)), xy(ends[1], ends[1] * (1 + band)), xy(ends[1], ends[1] * (1 - band)),
               xy(ends[0], ends[0] * (1 - band))]  # fmt: skip
    parts.append(f'<polygon points="{" ".join(corners)}" fill="#8884" stroke="none"/>')
    step = [t * 10**k for k in range(6) for t in (1, 2, 5)]
    for tick in (t for t in step if low < t < high):
        x, y = at + MARGIN + place(tick), SIZE - MARGIN - place(tick)
        parts.append(f'<text x="{x:.1f}" y="{SIZE - MARGIN + 18}" text-anchor="middle">{tick:,}</text>')
        parts.append(f'<text x="{at + MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,}</text>')
    parts.append(
        f'<rect x="{at + MARGIN}" y="{MARGIN}" width="{SIZE - 2 * MARGIN}" height="{SIZE - 2 * MARGIN}" fill="none" stroke="#888"/>'
    )
    for a, b, colour, name in pairs:
        x, y = xy(a, b).split(",")
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.75"><title>{html.escape(name)}</title></circle>'
        )
    parts.append(f'<text x="{at + SIZE / 2}" y="{SIZE - 8}" text-anchor="middle">measured; planned upwards</text>')
    return "".join(parts)


def picture(found: list[Point]) -> str:
    memory = [(p.held, p.foretold, COLOURS[p.row.method], p.row.name) for p in found]
    speed = [(p.speed, p.foretold_speed, COLOURS[p.row.method], p.row.name) for p in found]
    legend = ""
    for i, method in enumerate(("qlora", "lora", "full")):
        x = SIZE + 60 + 110 * i
        legend += f'<circle cx="{x}" cy="{SIZE + 12}" r="5" fill="{COLOURS[method]}"/>'
        legend += f'<text x="{x + 12}" y="{SIZE + 16}">{method}</text>'
    body = panel("GiB held, band 5 %", memory, 0.05, 0) + panel("tokens a second, band 15 %", speed, 0.15, SIZE) + legend
    style = 'font-family="system-ui,sans-serif" font-size="12" fill="#888"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * SIZE} {SIZE + 30}" {style}>{body}</svg>\n'


def summary(found: list[Point]) -> str:
    lines = ["| | rows | memory foretold over held | speed foretold over measured |", "|---|---|---|---|"]

    def said(values: list[float], most: float) -> str:
        inside = sum(abs(v) <= most for v in values)
        return f"{min(values):+.1%} to {max(values):+.1%}, {inside} of {len(values)} within {most:.0%}"

    groups = {m: [p for p in found if p.row.method.startswith(m)] for m in ("qlora", "lora", "full")} | {"all": found}
    for name, some in groups.items():
        memory, speed = [p.foretold / p.held - 1 for p in some], [p.foretold_speed / p.speed - 1 for p in some]
        lines.append(f"| {name} | {len(some)} | {said(memory, 0.05)} | {said(speed, 0.15)} |")
    return "\n".join(lines)


def main() -> None:
    h200, h100 = (points(HERE / "results" / file) for file in ("plan.jsonl", "plan_h100.jsonl"))
    (HERE.parent / "docs" / "planning.svg").write_text(picture(h200))
    print(f"one H200\n\n{summary(h200)}\n\none H100\n\n{summary(h100)}")


if __name__ == "__main__":
    main()
