"""What each knob would change: the plan as chosen, with that one thing turned and all else left where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunesmith.config.schema import INSIDE
from tunesmith.plan.choice import MICRO_CAP, Open, Way
from tunesmith.plan.layers import LEVELS, Layers
from tunesmith.plan.page import gb

SAME = 0.005, 0.005  # GiB and share of speed: what changes neither by more is not worth a line


@dataclass(frozen=True, slots=True)
class Knob:
    """One setting turned. `memory`: GiB more (or less) on the device; `speed`: share of tokens a second more (or less)."""

    key: str
    value: str
    memory: float
    speed: float
    fits: bool
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.key}: {self.value} {self.amount} GB, {self.pace}{'' if self.fits else ', does not fit'}{note}"

    @property
    def amount(self) -> str:
        size = gb(abs(self.memory))
        return size if abs(self.memory) < SAME[0] else f"{'+' if self.memory > 0 else '-'}{size.removeprefix('<')}"

    @property
    def pace(self) -> str:
        """`18 % faster`, `as fast`"""
        share = round(100 * abs(self.speed))
        return f"{share} % {'faster' if self.speed > 0 else 'slower'}" if share else "as fast"


def turn(job: Open, best: Way, budget: float) -> Iterator[Knob]:
    """Each knob alone against `best`, in the order of the schema's sections."""
    for key, value, way, note in _turned(job, best):
        memory, speed = way.needs - best.needs, way.speed / best.speed - 1
        if abs(memory) > SAME[0] or abs(speed) > SAME[1]:
            yield Knob(key, value, memory, speed, way.needs <= budget, note)


def _turned(job: Open, best: Way) -> Iterator[tuple[str, str, Way, str]]:
    """(key, value, the plan with it, what it costs beside memory and time)."""
    yield from _activations(job, best)
    yield from _tokens(job, best)
    if not job.composed_because:
        if job.device.fp8:
            yield "memory.compute", "bf16" if job.fp8 else "fp8", _with(best, fp8=not job.fp8, cached=False), _FP8[job.fp8]
        if job.method == "qlora" and not job.fp8 and job.device.kind == "cuda":
            yield "decoded 4-bit weights", "not kept" if best.cached else "kept", replace(best, cached=not best.cached), ""
    yield from _optimizers(job, best)
    if job.method != "full":
        for rank in (job.lora.rank // 2, job.lora.rank * 2):
            if rank:
                lora = job.lora.model_copy(update={"rank": rank, "rank_pattern": {}})
                yield "lora.rank", str(rank), _with(best, lora=lora), ""
        for method, note in (("lora", "16-bit base"), ("qlora", "4-bit base")):
            if method != job.method:
                yield "method", method, _with(best, method=method, cached=False), note
    longest, mean = job.rows.longest, job.rows.mean
    if longest >= 256 and not job.inside:
        half = longest // 2
        rows = replace(job.rows, longest=half, mean=min(mean, half), squares=min(job.rows.squares, half))
        tokens = max(half, best.tokens // 2) if best.tokens <= longest else best.tokens
        most, note = job.batch_size * half, "longer rows are refused, or cut if you say so"
        yield (
            "data.max_length",
            f"{half:,}",
            _with(best, rows=rows, fullest=min(job.fullest, most), likely=min(job.likely, most), tokens=tokens),
            note,
        )


_FP8 = {False: "products of the frozen weights in 8 bits: not exact", True: "exact"}


def _activations(job: Open, best: Way) -> Iterator[tuple[str, str, Way, str]]:
    """All layers a level richer than the richest, a level leaner than the leanest, and in or out of main memory."""
    composed = bool(job.composed_because)
    levels = ("keep", "checkpoint") if composed else LEVELS
    there = [levels.index(part.level) for part in best.layers if part.level in levels]
    offload = any(part.offload for part in best.layers)
    if there:
        richest, leanest = min(there), max(there)
        richer = richest if len(best.layers) > 1 and richest != leanest else richest - 1
        leaner = leanest if len(best.layers) > 1 and richest != leanest else leanest + 1
        for at in (richer, leaner):
            if 0 <= at < len(levels):
                yield "memory.activations", levels[at], _all(best, levels[at], offload), ""
    if not composed and job.device.link:
        whole = best.layers if len(best.layers) == 1 else ()
        for wanted in (False, True):
            if (whole and whole[0].offload != wanted) or (not whole and offload != wanted):
                parts = tuple(replace(part, offload=wanted) for part in best.layers)
                yield "memory.offload", str(wanted).lower(), replace(best, layers=parts), ""


def _all(best: Way, level: str, offload: bool) -> Way:
    return replace(best, layers=(Layers(best.job.spec.layers, level, offload, best.layers[0].tile),))


def _tokens(job: Open, best: Way) -> Iterator[tuple[str, str, Way, str]]:
    if job.inside:  # a step is one micro-batch there
        for batch in (job.batch_size // 2, job.batch_size * 2):
            if batch:
                share = batch / job.batch_size
                tokens = round(best.tokens * share)
                changed = _with(
                    best,
                    batch_size=batch,
                    steps=max(1, round(job.steps / share)),
                    fullest=tokens,
                    likely=round(job.likely * share),
                    tokens=tokens,
                )
                yield "train.batch_size", str(batch), changed, "another learning rate may be wanted"
        return
    whole = job.batch_size * job.rows.longest
    for tokens in (best.tokens // 2, best.tokens * 2):
        tokens = max(tokens, job.rows.longest)
        if tokens != best.tokens and tokens <= max(job.rows.longest, min(2 * whole, MICRO_CAP[job.device.kind])):
            yield "memory.micro_batch_tokens", f"{tokens:,}", replace(best, tokens=tokens), "same result"


def _optimizers(job: Open, best: Way) -> Iterator[tuple[str, str, Way, str]]:
    if job.device.kind != "cuda":
        return
    if job.optimizer != "adamw":
        yield "train.optimizer", "adamw", _with(best, optimizer="adamw"), ""
    else:
        yield "train.optimizer", "adamw_8bit", _with(best, optimizer="adamw_8bit"), "averages in 8 bits"
    if job.method == "full" and not job.inside and job.dtype != "fp16":
        inside = _with(best, optimizer=INSIDE, fullest=job.fullest, tokens=job.fullest)
        yield "train.optimizer", INSIDE, inside, "a step is one micro-batch, nothing is clipped"


def _with(best: Way, *, tokens: int | None = None, cached: bool | None = None, **changes: object) -> Way:
    """The same choice for a job with other numbers."""
    job = replace(best.job, **changes)
    if "method" in changes:
        job = best.job.by(changes["method"])
    return replace(best, job=job, tokens=tokens or best.tokens, cached=best.cached if cached is None else cached)
