"""What `tunesmith plan` prints: bars for each component, the methods side by side, what to lower, one line of verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.devices import GIB

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_blue", "bright_cyan", "white")
BAR = 30


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
    if not plan.fits or plan.needs > 0.9 * plan.budget:
        for a in plan.advice[:6]:
            console.print(f"  lower {escape(str(a))}")
    for note in plan.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]")
    why = (
        f"measured on {escape(plan.measured)}"
        if plan.measured
        else "uncalibrated: memory is counted from config.json, without the weights; time may be off by a factor of two"
    )
    console.print(f"[dim]note: {why}[/dim]")
    console.print(f"[bold {'green' if plan.fits else 'red'}]{escape(plan.verdict)}[/]", highlight=False)


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
