"""What each knob would change, and what a person should know beside the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunesmith.config.schema import INSIDE, RunConfig
from tunesmith.devices import GIB
from tunesmith.plan.choice import Open, Way
from tunesmith.plan.layers import LEVELS
from tunesmith.plan.page import gb
from tunesmith.plan.parts import METHODS
from tunesmith.plan.sizes import GRADIENT, MASTER, MOMENTS, usual_full_bytes
from tunesmith.spec import parameters


@dataclass(frozen=True, slots=True)
class Advice:
    """A knob and what it saves. `enough`: with this alone the run fits."""

    key: str
    value: str
    gain: float  # GiB
    enough: bool
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.key}: {self.value} saves {gb(self.gain)} GB{', enough by itself' if self.enough else ''}{note}"


def advise(job: Open, best: Way, budget: float) -> Iterator[Advice]:
    """Each knob alone against the plan as chosen, dearest first; nothing when the plan fits with a tenth to spare."""
    if best.needs <= 0.9 * budget:
        return
    found = []
    for key, value, changed, note in _knobs(job, best):
        needs = changed.leanest.needs
        if best.needs - needs > 0.01 * best.needs:
            found.append(Advice(key, value, best.needs - needs, needs <= budget < best.needs, note))
    yield from sorted(found, key=lambda a: (not a.enough, -a.gain))


def _knobs(job: Open, best: Way) -> Iterator[tuple[str, str, Open, str]]:
    """(key, value, the job with it, what it costs). Knobs of `memory` stay where the plan has put them."""
    top = best.layers[-1]
    if len(best.layers) > 1:
        here = replace(job, mix=best.layers, tokens=best.tokens)
    else:
        here = replace(job, levels=(top.level,), tokens=best.tokens)
        here = here if job.composed_because else replace(here, offloads=(top.offload,))
    for method, note in (("lora", "trains an adapter, not every weight"), ("qlora", "4-bit base, some slower")):
        if METHODS.index(method) < METHODS.index(job.method):
            yield "method", method, here.by(method), note
    lean = replace(here, levels=("checkpoint",), mix=())
    if any(part.level != "checkpoint" for part in best.layers):
        yield "memory.activations", "checkpoint", lean, "about a third more time"
    if not job.composed_because and job.device.link and True not in job.offloads:
        yield "memory.offload", "true", replace(here, offloads=(True,), mix=()), "as fast where the link keeps up"
    longest = job.rows.longest
    if len(job.levels) == 1 and job.tokens is not None and top.level == "keep" and best.tokens > longest:
        lean = replace(here, levels=LEVELS, offloads=job.offloads, mix=(), tokens=longest)
        yield "memory.activations and memory.micro_batch_tokens", "auto", lean, "same result, some slower"
    if job.inside and job.batch_size > 1:
        alone = replace(here, batch_size=1, fullest=longest, likely=longest, tokens=None)
        yield "train.batch_size", "1", alone, "noisier steps, which want a lower learning rate"
    elif best.tokens > longest:
        yield "memory.micro_batch_tokens", str(longest), replace(here, tokens=longest), "same result, some slower"
    if longest >= 256:
        half = longest // 2
        rows = replace(job.rows, longest=half, mean=min(job.rows.mean, half), squares=min(job.rows.squares, half))
        most = job.batch_size * half
        short = replace(here, rows=rows, tokens=half, fullest=min(job.fullest, most), likely=min(job.likely, most))
        yield "data.max_length", str(half), short, "longer rows are refused, or cut if you say so"
    if job.method != "full":
        if job.lora.rank > 8:
            yield (
                "lora.rank",
                "8",
                replace(here, lora=job.lora.model_copy(update={"rank": 8, "rank_pattern": {}})),
                "a narrower update",
            )
        if job.lora.targets == "all-linear" and not job.spec.fused:
            few = job.lora.model_copy(update={"targets": ("q_proj", "v_proj")})
            yield "lora.targets", "[q_proj, v_proj]", replace(here, lora=few), "learns clearly less"
        if job.lora.modules_to_save:
            yield (
                "lora.modules_to_save",
                "[]",
                replace(here, lora=job.lora.model_copy(update={"modules_to_save": ()})),
                "new_tokens is the cheap way",
            )
    if job.samples and next(c.bytes for c in best.components if c.name == "sample answers"):
        yield "eval.samples", "0", replace(here, samples=0), "no answers to read"
    if job.dtype == "fp32" and job.device.kind == "cuda":
        low = "bf16" if job.device.bf16 else "fp16"
        yield "memory.dtype", low, replace(here, dtype=low), "half the bytes"


def remarks(job: Open, config: RunConfig) -> Iterator[str]:
    rows, s = job.rows, job.spec
    if rows.assumed:
        yield (
            f"row lengths are not known yet: {rows.count:,} rows of {rows.mean:,.0f} tokens, the longest {rows.longest:,}, "
            "are assumed; `tunesmith check` reads yours"
        )
    if job.tokens is not None and job.tokens < rows.longest:
        yield f"memory.micro_batch_tokens: {job.tokens:,} is less than the longest row; {rows.longest:,} go through at once"
    if rows.longest > s.context:
        yield f"the longest row has {rows.longest:,} tokens, the model was made for {s.context:,}"
    if job.device.guessed:
        yield f"the speed of {job.device.name} is a guess"
    if job.device.kind == "mps":
        yield "Apple GPUs run the reference operations; nobody has tested them"
    if job.method == "full":
        total, usual = parameters(s).total, usual_full_bytes(s) / GIB
        inside = total * (job.width + MOMENTS[INSIDE])
        ours = inside if job.inside else total * ((job.width if job.width == 2 else 0) + MASTER + GRADIENT + MOMENTS[job.optimizer])
        line = f"full holds {gb(ours / GIB)} GB before activations; the usual mixed-precision recipe {gb(usual)} GB"
        if job.inside:
            yield line
            yield f"train.optimizer: {INSIDE} takes a step in one micro-batch, of up to {job.fullest:,} tokens, and clips nothing"
        else:
            cheaper = job.device.kind == "cuda" and job.dtype != "fp16"
            yield line + f"; train.optimizer: {INSIDE} {gb(inside / GIB)} GB" * cheaper
    if job.method != "full" and config.lora.continue_from != "none":
        yield "the adapter in lora.continue_from decides rank and targets; the defaults are counted here"
    if s.attention_softcap is not None:
        yield "attention scores are written out (softcap): no fused kernel serves this model"
