"""The GPU bench's results as a table in docs/performance.md and a picture, docs/performance.svg."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from gpu_limits import Rates, Shapes, peak_gib, tokens_per_s
from gpu_rows import CONFIGS, ROWS, Row

START, END = "<!-- gpu-bench: written by bench/gpu.py --table -->", "<!-- gpu-bench: end -->"
COLOURS = {"ours": "#0b6e4f", "ours-fp8": "#3fae7f", "unsloth": "#c05a1f", "unsloth-padded": "#e0a06f", "hf": "#8a8f98",
           "liger": "#5b6fb0", "axolotl": "#9a6fb0"}  # fmt: skip
HALO = 'paint-order="stroke" stroke="#fff" stroke-width="3"'
Record = dict[str, Any]


def chosen(records: list[Record], row: str, card: str) -> dict[str, Record]:
    """Arm -> its record: of the newest call that timed both ours and the baseline, then the newest of each other arm."""
    mine = [r for r in records if r["row"] == row and r["card"] == card and not r.get("tiny")]
    good = [r for r in mine if "error" not in r]
    calls = {c: {r["arm"] for r in good if r["call"] == c} for c in dict.fromkeys(r["call"] for r in good)}
    both = [c for c, arms in calls.items() if {"ours", ROWS[row].baseline} <= arms]
    out = {r["arm"]: r for r in (*mine, *good)}
    return out | {r["arm"]: r for r in good if both and r["call"] == both[-1]}


def limits(row: Row, record: Record) -> tuple[float, float, float]:
    """(tokens/s in bf16, with FP8, least GiB) that this card allows at the rates of the record's call."""
    shapes, rates = Shapes.of(CONFIGS[row.model]), Rates.of(record["rates"], row.seq)
    kept = row.policy == "keep"
    speed = [
        tokens_per_s(shapes, rates, "keep" if kept else "ckpt", row.batch, row.seq, fp8=fp8, store=row.store)
        for fp8 in (False, True)
    ]
    return *speed, peak_gib(shapes, "keep" if kept else "budget", row.batch * row.seq, store=row.store)


def cell(row: Row, r: Record | None) -> str:
    if r is None:
        return ""
    if "error" in r:
        return "failed: " + ("out of memory" if "OutOfMemory" in r["error"] else escape(r["error"].split(":")[0][:40]))
    if row.name == "start":
        return f"{r['first_step_s']:.1f} s"
    speed = f"{r['examples_per_s']:.1f} ex/s" if row.data == "gsm8k" else f"{r['tokens_per_s']:,.0f}"
    return f"{speed}, {r['peak_GiB']:.2f} GiB"


def table(records: list[Record], card: str) -> list[str]:
    arms = [a for a in (*COLOURS, "read") if any(r["arm"] == a and r["card"] == card for r in records)]
    lines = [
        f"| row | {' | '.join(arms)} | ours / baseline | with FP8 | limit bf16 / FP8, tok/s; GiB |",
        "|" + "---|" * (len(arms) + 4),
    ]
    for name, row in ROWS.items():
        found = chosen(records, name, card)
        if not found:
            continue
        base = found.get(row.baseline, {})
        ratios = []
        for arm in ("ours", "ours-fp8"):
            r = found.get(arm, {})
            key = "first_step_s" if name == "start" else "tokens_per_s"
            if key not in r or key not in base:
                ratios.append("")
                continue
            ratio = base[key] / r[key] if name == "start" else r[key] / base[key]
            ratios.append(f"{ratio:.2f}x" + ("" if r["call"] == base["call"] else " (two calls)"))
        limit = ""
        if row.data == "full" and name not in ("start", "full"):
            bf16, fp8, least = limits(row, next(iter(found.values())))
            limit = f"{bf16:,.0f} / {fp8:,.0f}; {least:.2f}"
        lines.append(f"| {name} | {' | '.join(cell(row, found.get(a)) for a in arms)} | {ratios[0]} | {ratios[1]} | {limit} |")
    return lines


def first_losses(records: list[Record], card: str) -> list[str]:
    """Each row's first loss and how far its arms lie apart."""
    out = []
    for name in ROWS:
        losses = {a: r["loss_first"] for a, r in chosen(records, name, card).items() if "loss_first" in r}
        if "ours" in losses:
            out.append(f"{name} {losses['ours']:.4f} ({max(losses.values()) - min(losses.values()):.4f} apart, {len(losses)} arms)")
    return out


def section(records: list[Record], picture: bool) -> str:
    """The whole part between the markers: a table a card, with versions, rates and dates."""
    lines = [START]
    for card in dict.fromkeys(r["card"] for r in records if not r.get("tiny")):
        mine = [r for r in records if r["card"] == card and not r.get("tiny")]
        newest, rates = mine[-1], mine[-1]["rates"]
        found = {k: v for r in mine for k, v in (r.get("versions") or {}).items()}
        measured = ", ".join(f"{k} {v:.4g}" for k, v in rates.items() if isinstance(v, float))
        when = f"{mine[0]['call'][:10]} to {newest['call'][:10]}"
        lines += ["", f"### {card}", "", *table(records, card), ""]
        lines += [f"tokens/s and the allocator's peak; {when}; the card in the last call: {measured}."]
        lines += [f"Versions: {', '.join(f'{k} {v}' for k, v in sorted(found.items()))}."]
        lines += ["", f"Loss of the first step, the same data and weights for all arms: {'; '.join(first_losses(records, card))}."]
    if len(lines) == 1:
        lines += ["", "Not measured yet."]
    elif picture:
        lines += ["", "![tokens/s and peak memory of each row against the card's limit](performance.svg)"]
    return "\n".join([*lines, "", END])


def svg(records: list[Record], card: str) -> str:
    """Bars of tokens/s and of the peak, a row a group; a dark line is the card's limit (bf16; dashed: FP8)."""
    groups = [(row, chosen(records, name, card)) for name, row in ROWS.items() if row.data == "full" and name not in ("start",)]
    groups = [(row, {a: found[a] for a in COLOURS if "tokens_per_s" in found.get(a, {})}) for row, found in groups]
    groups = [(row, found) for row, found in groups if found]
    bars = sum(len(found) for _, found in groups)
    left, wide, gap, high = 130, 380, 190, 15
    height = 64 + bars * high + len(groups) * 16
    size = f'width="{left + 2 * wide + gap + 70}" height="{height}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="11" fill="#20242a">']
    out.append('<rect width="100%" height="100%" fill="#fff"/>')
    x = 14
    for arm, colour in COLOURS.items():
        if any(arm in found for _, found in groups):
            out.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{colour}"/><text x="{x + 14}" y="19">{arm}</text>')
            x += 34 + 7 * len(arm)
    out.append(f'<text x="{x + 10}" y="19">| the card\'s limit (dashed: FP8)</text>')
    at = (left, left + wide + gap)
    for title, x in zip((f"tokens/s, {card}", "peak GiB"), at, strict=True):
        out.append(f'<text x="{x}" y="44" font-weight="600">{escape(title)}</text>')
    limit = {row.name: limits(row, next(iter(found.values()))) for row, found in groups if not row.full}
    for column, (key, x0) in enumerate(zip(("tokens_per_s", "peak_GiB"), at, strict=True)):
        marks = {name: three[:2] if not column else three[2:] for name, three in limit.items()}
        most = max([r[key] for _, found in groups for r in found.values()] + [m for ms in marks.values() for m in ms])
        scale, y = wide / most, 56
        for row, found in groups:
            tall = len(found) * high
            if not column:
                out.append(f'<text x="{left - 10}" y="{y + tall / 2 + 4}" text-anchor="end">{row.name}</text>')
            texts = []
            for n, (arm, r) in enumerate(found.items()):
                width, top = r[key] * scale, y + n * high
                out.append(f'<rect x="{x0}" y="{top}" width="{width:.1f}" height="{high - 3}" fill="{COLOURS[arm]}"/>')
                text = f"{r[key]:,.0f}" if not column else f"{r[key]:.2f}"
                texts.append(f'<text x="{x0 + width + 5:.1f}" y="{top + 10}" {HALO}>{text}</text>')
            for value, dash in zip(marks.get(row.name, ()), ("", ' stroke-dasharray="3 2"'), strict=False):
                at_x = f"{x0 + value * scale:.1f}"
                out.append(f'<line x1="{at_x}" x2="{at_x}" y1="{y - 3}" y2="{y + tall}" stroke="#20242a"{dash}/>')
            out += texts  # over the lines
            y += tall + 16
    return "\n".join([*out, "</svg>\n"])


def write(records: list[Record], docs: Path) -> str:
    """Put the table between its markers and draw the picture; returns what was written."""
    records = [r for r in records if not r.get("tiny")]
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    assert found and END in rest, f"{page} lacks the markers {START} and {END}"
    cards = Counter(r["card"] for r in records if "tokens_per_s" in r)
    page.write_text(before + section(records, bool(cards)) + rest.partition(END)[2], encoding="utf-8")
    if cards:
        (docs / "performance.svg").write_text(svg(records, max(cards, key=cards.get)), encoding="utf-8")
    return f"{page} from {len(records)} records" + (", performance.svg" if cards else "; no picture without a timed row")
