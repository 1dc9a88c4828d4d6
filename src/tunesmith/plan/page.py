"""What `tunesmith plan` prints: bars for each component, the methods side by side, what to lower, one line of verdict.

Of a model alone: a stacked bar for each way to use it, what they are made of, what fits on cards of each size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.devices import GIB
from tunesmith.plan.parts import UNCALIBRATED

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_blue", "bright_cyan", "white")
BAR = 30
STACK = 40
FILLS = {"weights": ("█", "blue"), "trained": ("▓", "magenta"), "activations": ("▒", "green"), "answers": ("░", "yellow"),
         "overhead": ("■", "white")}  # fmt: skip


def print_plan(plan: Any, console: Console) -> None:
    """`plan` is a plan.Plan, whose room lies above this one."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    device = [c for c in plan.components if c.where == "device" and c.bytes]
    scale = BAR / max(plan.needs, plan.budget)
    console.print(f"[bold]{escape(plan.model)}[/bold], {plan.method}, {plan.dtype} on {escape(str(plan.device))}")
    console.print(
        f"{plan.steps:,} steps, {plan.tokens:,} tokens; at most {plan.micro_batch_tokens:,} tokens at once, "
        f"activations: {plan.activations}"
    )
    why = f" ({plan.path_why})" if plan.path_why else ""
    console.print(f"[dim]layers: {plan.path}{escape(why)}{', products in fp8' if plan.compute == 'fp8' else ''}[/dim]\n")
    console.print("[dim]memory in GB[/dim]")
    bars = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    bars.add_column(no_wrap=True)
    bars.add_column(justify="right", no_wrap=True)
    bars.add_column(no_wrap=True, width=BAR)
    roomy = console.width >= 110  # on a narrow terminal the reasons would wrap under the bars
    if roomy:
        bars.add_column(style="dim")
    start = 0.0
    for component, colour in zip(device, COLOURS * 2, strict=False):
        size = component.bytes / GIB
        bars.add_row(
            component.name, gb(size, 2), Text(_bar(start * scale, (start + size) * scale), style=colour), *[component.why][:roomy]
        )
        start += size
    edge = Text(
        "".join("│" if i == min(BAR - 1, round(plan.budget * scale) - 1) else "█" if i < start * scale else "·" for i in range(BAR))
    )
    bars.add_row(
        "[bold]in all[/bold]", f"[bold]{gb(plan.needs, 2)}[/bold]", edge, *[f"of {gb(plan.budget)} GB the run may use"][:roomy]
    )
    console.print(bars)
    beside = [f"{where} {gb(size, 2)} GB" for where, size in (("main memory", plan.host), ("disk", plan.disk)) if size]
    console.print(f"[dim]beside it: {', '.join(beside)}[/dim]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in ("method", "needs", "time", "tokens at once", "activations", ""):
        table.add_column(name, justify="right" if name in ("needs", "time", "tokens at once") else "left", no_wrap=True)
    for c in plan.choices:
        fits = "[green]fits[/green]" if c.fits else "[red]does not fit[/red]"
        style = "bold" if c.method == plan.method else ""
        table.add_row(c.method, f"{gb(c.needs)} GB", duration(c.minutes).removeprefix("about ") if c.fits else "-",
                      f"{c.micro_batch_tokens:,}", c.activations, fits, style=style)  # fmt: skip
    console.print(table)
    console.print()
    if plan.fits and plan.knobs:
        _print_knobs(plan.knobs, console)
    if not plan.fits or plan.needs > 0.9 * plan.budget:
        for a in plan.advice[:6]:
            console.print(f"  lower {escape(str(a))}")
    if not plan.fits:
        console.print(f"  the floor with these settings is {gb(plan.least)} GB")
    for note in plan.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")
    console.print(f"[dim]note: {escape(calibration(plan))}[/dim]")
    console.print(f"[bold {'green' if plan.fits else 'red'}]{escape(plan.verdict)}[/]", highlight=False)
    if plan.page:
        console.print(f"Written to {escape(str(plan.page))}", highlight=False, soft_wrap=True)


def calibration(plan: Any) -> str:
    """Whether the device was measured, and how far a plan may be off."""
    if plan.measured:
        return f"calibrated: rates measured on {plan.measured}"
    ask = "; `tunesmith plan RUN.yaml --probe` measures it in a few seconds" if plan.device.local else ""
    return UNCALIBRATED + ask


def _print_knobs(knobs: Sequence[Any], console: Console) -> None:
    """What each would change, those that fit first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for i, name in enumerate(("turned alone", "", "GB", "speed", "")):
        table.add_column(name, justify="right" if i in (2, 3) else "left", no_wrap=i < 4)
    roomy = console.width >= 110
    for knob in knobs:
        said = [] if knob.fits else ["does not fit"]
        said += [knob.note] if knob.note and roomy else []
        table.add_row(knob.key, knob.value, knob.amount, knob.pace, ", ".join(said), style="" if knob.fits else "dim")
    console.print(table)
    console.print()


def print_fits(fits: Any, console: Console) -> None:
    """`fits` is a fits.Fits, whose room lies above this one."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    def table(first: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        shown = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        for i, name in enumerate((first, *names)):
            shown.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()

    end = f"the checkpoint goes to {fits.reach:,}"
    console.print(f"[bold]{escape(fits.model)}[/bold] on {escape(str(fits.device))}, {fits.context:,} tokens ({end})\n")
    bars = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    whole = stack_end(fits)
    for use in fits.uses:
        verdict = "[green]fits[/green]" if fits.holds(use) else "[red]does not fit[/red]"
        bars.add_row(use.way, f"{gb(use.needs)} GB", Text.assemble(*_stack(use.parts, fits.budget, whole)), verdict)
    console.print(bars)
    legend = [(f"{fill} {part}  ", colour) for part, (fill, colour) in FILLS.items()]
    console.print(Text.assemble(*legend, f"│ {gb(fits.budget)} GB"))
    console.print()
    table("GB", [use.way for use in fits.uses], fits.table)
    at_once = [(use.way, f"{use.tokens:,}", gb(use.least), use.activations or "-") for use in fits.uses]
    table("way", ["tokens at once", "GB at the least", "activations"], at_once)
    for title, found in sizes_tables(fits):
        table(title, [f"{size} GB" for size in fits.sizes], [(way, *map(short, sizes)) for way, sizes in found.items()])
    for note in fits.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")
    said, more = fits.verdict
    console.print(f"[bold {'green' if fits.fits else 'red'}]{escape(said)}[/]", highlight=False)
    if more:
        console.print(escape(more), highlight=False)
    if fits.page:
        console.print(f"Written to {escape(str(fits.page))}", highlight=False, soft_wrap=True)


def stack_end(fits: Any) -> float:
    """GiB at the right end of the bars: what does not fit goes at most half a card beyond it."""
    return min(max(fits.budget, *(use.needs for use in fits.uses)), 1.5 * fits.budget)


def sizes_tables(fits: Any) -> tuple[tuple[str, Mapping[str, tuple[int, ...]]], ...]:
    """(title, what fits on each size for each way); 0 is nothing."""
    return ("longest row", fits.longest), (f"rows of {short(fits.rows)}", fits.micro_batch)


def short(tokens: int) -> str:
    """`960`, `2.5k`, `32k`, where k is 1,024; `-` for none."""
    return f"{tokens / 1024:.4g}k" if tokens >= 1024 else f"{tokens or '-'}"


def _stack(parts: Mapping[str, float], budget: float, whole: float) -> list[tuple[str, str]]:
    """A bar's cells, each with its colour: parts one after another, the card's end, and » where it goes on."""
    edges, total = [], 0.0
    for part, size in parts.items():
        total += size
        edges.append((total, FILLS[part]))
    cells = []
    for i in range(STACK):
        middle = (i + 0.5) / STACK * whole
        cells.append(next((fill for edge, fill in edges if middle < edge), ("·", "dim")))
    cells[min(STACK - 1, round(budget / whole * STACK) - 1)] = ("│", "bold")
    return [*cells, ("»" if total > whole else " ", "red")]


def _bar(start: float, end: float) -> str:
    """A bar from `start` to `end` in cells of eighths; the least there is still shows."""
    first, eighths = int(start), " ▏▎▍▌▋▊▉█"
    full, rest = divmod(max(end - first, 0.13), 1)
    return (" " * first + "█" * int(full) + eighths[int(rest * 8)])[:BAR].rstrip() if first < BAR else " " * (BAR - 1) + "▏"


def gb(gib: float, digits: int = 1) -> str:
    if 0 < gib < 0.5 * 10**-digits:
        return f"<{10**-digits:g}"
    return f"{gib:.{digits}f}".removesuffix("." + "0" * digits)


def duration(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    if minutes < 90:
        return f"about {minutes:.0f} min"
    return f"about {minutes / 60:.1f} h" if minutes < 48 * 60 else f"about {minutes / 1440:.0f} days"
