"""The page of `tunesmith plan run.yaml`: what the terminal says of a run's plan, drawn. No torch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.devices import GIB
from tunesmith.evaluate.page import Markup, clip, el, page, stacked, swatch, table
from tunesmith.files import write_atomic
from tunesmith.plan import Plan
from tunesmith.plan.page import calibration, duration, gb

BAR = 560


def write(plan: Plan, path: Path) -> Path:
    write_atomic(path, page(f"plan: {clip(plan.model, 80)}", _body(plan)), durable=False)
    return path


def _body(plan: Plan) -> Markup:
    sub = f"{plan.method}, {plan.dtype}, on {plan.device}"
    head = el("header", el("p", "Tunesmith plan", class_="brand"), el("h1", clip(plan.model, 80)), el("p", sub, class_="sub"))
    steps = f"{plan.steps:,} steps, {plan.tokens:,} tokens at about {plan.speed:,.0f} a second, at most "
    steps += f"{plan.micro_batch_tokens:,} tokens at once. Layers: {plan.path}; activations: {plan.activations}."
    verdict = el(
        "section", el("p", plan.verdict, class_="say"), el("p", steps, class_="note"), el("p", calibration(plan), class_="note"),
        aria_label="Verdict",
    )  # fmt: skip
    foot = el("footer", "Made by Tunesmith from config.json. This page loads nothing and runs nothing.")
    return el("main", head, verdict, _memory(plan), _knobs(plan), _methods(plan), _lower(plan), _notes(plan), foot)


def _memory(plan: Plan) -> Markup:
    device = [c for c in plan.components if c.where == "device" and c.bytes]
    bar = [(c.name, round(c.bytes / GIB, 3), "abcdefgh"[i % 8]) for i, c in enumerate(device)]
    rows = [(c.name, gb(c.bytes / GIB, 2), c.why) for c in device]
    rows.append(("in all", gb(plan.needs, 2), f"of {gb(plan.budget)} GB the run may use; at the least {gb(plan.least)} GB"))
    places = {"host": "main memory", "disk": "disk"}
    beside = [
        (f"{places[c.where]}: {c.name}", gb(c.bytes / GIB, 2), c.why) for c in plan.components if c.where in places and c.bytes
    ]
    return el(
        "section", el("h2", "Memory"), stacked("on the device, GB", bar, total=max(plan.budget, plan.needs), width=BAR),
        el("ul", [el("li", swatch(style), f"{name} {size:.2g} GB") for name, size, style in bar], class_="legend"),
        table(("on the device", "GB", "why"), rows, numbers=(1,)), table(("beside it", "GB", "why"), beside, numbers=(1,)),
    )  # fmt: skip


def _knobs(plan: Plan) -> Markup | None:
    rows = [(k.key, k.value, k.amount, k.pace, "fits" if k.fits else "does not fit", k.note) for k in plan.knobs]
    said = el("p", "Each turned alone, all else as planned.", class_="note")
    heads = ("setting", "value", "GB", "speed", "", "")
    return el("section", el("h2", "What each knob would change"), said, table(heads, rows, numbers=(2, 3))) if rows else None


def _methods(plan: Plan) -> Markup:
    rows = [
        (c.method, gb(c.needs), duration(c.minutes).removeprefix("about ") if c.fits else "-", f"{c.micro_batch_tokens:,}",
         c.activations, "fits" if c.fits else "does not fit")
        for c in plan.choices
    ]  # fmt: skip
    heads = ("method", "GB", "time", "tokens at once", "activations", "")
    return el("section", el("h2", "The methods side by side"), table(heads, rows, numbers=(1, 2, 3)))


def _lower(plan: Plan) -> Markup | None:
    if not plan.advice:
        return None
    return el("section", el("h2", "What to lower"), el("ul", [el("li", str(a)) for a in plan.advice], class_="plain"))


def _notes(plan: Plan) -> Markup | None:
    notes = [el("li", note) for note in plan.notes]
    return el("section", el("h2", "To know"), el("ul", notes, class_="plain note")) if notes else None
