"""The page of `tunesmith plan MODEL`: what the terminal says of a model alone, drawn. No torch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.evaluate.page import Markup, clip, el, page, stacked, swatch, table
from tunesmith.files import write_atomic
from tunesmith.fits import Fits, Use
from tunesmith.plan.page import gb, short, sizes_tables

BAR = 560
STYLES = {"weights": "a", "trained": "b", "activations": "c", "answers": "d", "overhead": "g"}  # of the style sheet


def write(fits: Fits, path: Path) -> Path:
    write_atomic(path, page(f"plan: {clip(fits.model, 80)}", _body(fits)), durable=False)
    return path


def _body(fits: Fits) -> Markup:
    said, more = fits.verdict
    sub = f"on {fits.device}, {fits.context:,} tokens; the checkpoint goes to {fits.reach:,}"
    head = el("header", el("p", "Tunesmith plan", class_="brand"), el("h1", clip(fits.model, 80)), el("p", sub, class_="sub"))
    verdict = el("section", el("p", said, class_="say"), el("p", more, class_="note") if more else None, aria_label="Verdict")
    foot = el("footer", "Made by Tunesmith from config.json. This page loads nothing and runs nothing.")
    return el("main", head, verdict, _bars(fits), _parts(fits), _cards(fits), foot)


def _bars(fits: Fits) -> Markup:
    """All to one scale, the card's memory first."""
    whole = max(fits.budget, *(use.needs for use in fits.uses))
    card = stacked("there are, GB", [("there are", fits.budget, "h")], total=whole, width=BAR)
    rows = [("there are", gb(fits.budget), card, ""), *(_bar(use, fits.holds(use), whole) for use in fits.uses)]
    legend = [el("li", swatch(style), part) for part, style in STYLES.items()]
    return el(
        "section", el("h2", "Against the memory there is"), table(("way", "GB", "", ""), rows, numbers=(1,)),
        el("ul", legend, class_="legend"),
    )  # fmt: skip


def _bar(use: Use, fits: bool, whole: float) -> tuple[str, str, Markup, str]:
    parts = [(part, size, STYLES[part]) for part, size in use.parts.items()]
    drawn = stacked(f"{use.way}, GB", parts, total=whole, width=BAR)
    return use.way, gb(use.needs), drawn, "fits" if fits else "does not fit"


def _parts(fits: Fits) -> Markup:
    ways = [use.way for use in fits.uses]
    rows = [(use.way, f"{use.tokens:,}", gb(use.least), use.activations or "-") for use in fits.uses]
    return el(
        "section", el("h2", "What it is made of"), table(("GB", *ways), fits.table, numbers=range(1, len(ways) + 1)),
        table(("way", "tokens at once", "GB at the least", "activations"), rows, numbers=(1, 2)),
    )  # fmt: skip


def _cards(fits: Fits) -> Markup:
    heads = [f"{size} GB" for size in fits.sizes]
    tables = [
        table((title, *heads), [(way, *map(short, sizes)) for way, sizes in found.items()], numbers=range(1, len(heads) + 1))
        for title, found in sizes_tables(fits)
    ]
    notes = el("ul", [el("li", note) for note in fits.notes], class_="plain note")
    return el("section", el("h2", "What fits on which card"), tables, notes)
