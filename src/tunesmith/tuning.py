"""One run from its file to its report: what `tunesmith.train` does, in order. The loop itself is train/loop.py.

Everything before the first step is looked at before anything is written over: a resume that is refused leaves the run as it was.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from tunesmith import adapters, models
from tunesmith.advice import Job, advise, answers_of
from tunesmith.config.schema import INSIDE, RunConfig
from tunesmith.data.pack import steps
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render import Renderer, build_renderer
from tunesmith.data.report import print_one_row
from tunesmith.devices import GIB, local_device
from tunesmith.errors import AdapterError, DataError, DoesNotFit, Interrupted, ModelError, RunError, TrainingFailed, TunesmithError
from tunesmith.evaluate import heldout, report
from tunesmith.evaluate.heldout import Losses
from tunesmith.evaluate.statistics import FEW_ROWS, paired_bootstrap
from tunesmith.files import finite, remove_folder, sha256, verify, write_atomic
from tunesmith.generate import context
from tunesmith.hub import ResolvedModel, licence_of, resolve_model
from tunesmith.models.fast import FastLayers, refusal
from tunesmith.models.place import Place, make_deterministic, place
from tunesmith.ops import backend, fp8
from tunesmith.ops.half_blocks import Policy
from tunesmith.plan import Plan, make_plan, rates
from tunesmith.plan.layers import WHOLE, Layers
from tunesmith.plan.parts import astray
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import plan_spec
from tunesmith.tokenizer import Tokenizer
from tunesmith.train import checkpoint, loop
from tunesmith.train.checkpoint import Found
from tunesmith.train.inside import Inside, optimizer_for
from tunesmith.train.log import TRACKERS, Log, Progress
from tunesmith.train.loop import Hooks, State, Stopped
from tunesmith.train.meter import Meter
from tunesmith.train.optim import LossScale, Optimizer, learning_rate
from tunesmith.train.signals import graceful
from tunesmith.train.warm import Warming
from tunesmith.wording import counted

EVALUATIONS, APART = 10, 3  # when eval.every_steps is auto: at most so many in a run, at least so many steps apart
FORWARD = 1 / 3  # of a step's time per token: what reading a held-out token costs
COMPARED = 24  # held-out prompts answered before and after for the report
LOSSES_BEFORE, BEFORE, AFTER = "losses_before.json", "before.json", "after.json"


def tune(config: RunConfig, run: Run, *, resume: bool, console: Console) -> Run:
    """Train as `config` says and leave the result in `run`, whose lock the caller holds.

    A failure or a stop is in the run's status and report. A resume that ends before it has begun changes neither.
    """
    begun = not resume
    try:
        session = _open(config, run, resume=resume, console=console)
        found = session.newest() if resume else None
        session.make_room()
        begun = True
        session.go(found, again=resume)
    except Interrupted as e:
        _last_word(run, begun, "interrupted", e.what)
        raise
    except KeyboardInterrupt:
        saved = any(run.checkpoints.glob("step-*"))
        when = "by a second signal; the last checkpoint stands" if saved else "before a checkpoint was written: begin again"
        _last_word(run, begun, "interrupted", f"stopped {when}")
        raise
    except TunesmithError as e:
        # A full disk or device says nothing against what was learned: the last checkpoint stands and can be gone on from.
        paused = isinstance(e, DoesNotFit) and run.status().state == "running"
        _last_word(run, begun, "interrupted" if paused else "failed", str(e))
        raise
    summary(console, run.path)
    return run


def _last_word(run: Run, begun: bool, state: Literal["interrupted", "failed"], message: str) -> None:
    if begun:
        with suppress(DoesNotFit):  # on a full disk the status stays `running`, which without a writer reads as `stopped`
            run.set_status(state, message=message)
            report.write(run.path)


def _open(config: RunConfig, run: Run, *, resume: bool, console: Console) -> _Session:
    """Data, base, plan and model, checked in the order of what they cost. A resume is refused before anything is written."""
    if resume:
        run.refuse_if_changed(config)
    for name in config.log.trackers:
        TRACKERS[name]  # an unknown one is told now
    if config.train.deterministic:
        make_deterministic()
    date = run.manifest.get("date") or datetime.date.today().isoformat()
    where = place(config.memory)
    base = resolve_model(config.model)
    make_renderer = functools.partial(build_renderer, base.path, config.data, config.lora.new_tokens, date)
    renderer = make_renderer()
    _line(console, "model", f"{base.name}, {config.method} on {where.describe()}")
    _line(console, "", renderer.describe(), style="dim")
    for note in (where.note, use_kernels(config.memory.kernels, where)):
        if note:
            _line(console, "", note, style="yellow")
    prepared = prepare(config.data, make_renderer, renderer=renderer, seed=config.seed, progress=console, model=base.path)
    if not prepared.epoch_size:
        raise DataError(
            "no row is drawn in an epoch: the weights in data.train are too small", "raise the weights; 1 takes every row once"
        )
    prints = {"data": prepared.fingerprint, "base": base_fingerprint(base.path)}
    if resume:
        run.refuse_if_changed(config, **prints)
    run.record(**prints, date=date, base_name=base.name, base_revision=base.revision, template=renderer.describe(),
               template_sha256=sha256(renderer.template), device=where.describe(), dtype=where.precision)  # fmt: skip
    _keep_account(run, prepared)
    _describe(prepared, renderer, console, show=not resume)
    if not resume:
        answers = answers_of(prepared.conversations()) if len(prepared.held_out) else ()
        for advice in advise(Job(config, prepared.epoch_size, plan_spec(base.path).dim, answers)):
            _line(console, "advice", str(advice))
    plan = plan_for(config, base.path, prepared.train.lengths)
    _line(console, "plan", plan.verdict)
    if plan.device.kind == "cuda" or plan.path == "half-blocks":
        _line(
            console, "", f"layers: {plan.path}{f' ({plan.path_why})' * bool(plan.path_why)}, activations: {plan.activations}", "dim"
        )
    if not resume or not (run.path / "plan.json").exists():
        write_atomic(run.path / "plan.json", json.dumps(plan.as_dict(), indent=1))
    plan.require()
    model = build_model(config, base, where, plan, renderer.tokenizer)
    if plan.path == "half-blocks" and model.fast is None:
        _line(console, "", f"layers run composed after all: {refusal(model)}", style="yellow")
    return _Session(config, run, base, prepared, renderer, where, plan, model, console)


def use_kernels(kernels: backend.Mode, where: Place) -> str:
    """`memory.kernels` from now on. Says so where auto does without Triton on a GPU; ModelError where triton cannot run."""
    reason = backend.obstacle(where.device)
    if kernels == "triton" and reason:
        raise ModelError(f"memory.kernels: triton cannot run here: {reason}", "set memory.kernels: auto")
    backend.set_mode(kernels)
    return backend.why() if kernels == "auto" and reason and where.device.type == "cuda" else ""


def plan_for(config: RunConfig, base: Path, lengths, *, half_blocks: bool = False) -> Plan:
    """The memory plan of this run on this machine's device. `half_blocks`: also on a CPU, for tests."""
    device = local_device(config.memory.device)
    spec, measured = plan_spec(base), rates.kept(device)
    return make_plan(config, spec, lengths=lengths, device=device, measured=measured, half_blocks=half_blocks)


def build_model(config: RunConfig, base: ResolvedModel, where: Place, plan: Plan, tokenizer: Tokenizer) -> nn.Module:
    """The base in its store with what is trained attached, an adapter or every weight, and its layers as the plan has them."""
    if plan.compute == "fp8" and (reason := fp8.supported(where.device)):
        raise ModelError(f"memory.compute: fp8 cannot run here: {reason}", "set memory.compute: auto")
    warming = None
    if plan.path == "half-blocks" and config.method != "full":
        kinds = {"dtype": where.dtype, "nf4": config.method == "qlora", "fp8": plan.compute == "fp8"}
        warming = Warming(plan_spec(base.path), config.lora, _policies(plan.layers), where.device, **kinds)
    try:
        model = models.load(base.path, dtype=where.dtype, device=where.device, store="nf4" if config.method == "qlora" else "dense")
        if config.method == "full":
            model.requires_grad_(True)
        else:
            starts = adapters.token_starts(config.lora.new_tokens, tokenizer, Tokenizer.load(base.path))
            adapters.attach(model, config.lora, seed=config.seed, new_tokens=starts)
    finally:
        if warming:
            warming.end()
    lay_out(model, plan)
    return model


def lay_out(model: nn.Module, plan: Plan) -> None:
    """The layers, decoded weights and embedding as the plan has them; the layers composed where the model refuses half-blocks."""
    if plan.path == "half-blocks" and not refusal(model):
        model.fast = FastLayers(model, _policies(plan.layers), fp8=plan.compute == "fp8")
        model.fast.cache(plan.weight_cache)
        if plan.embedding == "host":
            model.embedding_to_host()
    set_layers(model, plan.layers)


def optimizer_of(model: nn.Module, config: RunConfig) -> Optimizer | Inside:
    """Over all that is trained. AdapterError when that is nothing."""
    parameters = adapters.trainable(model) if config.method != "full" else dict(model.named_parameters())
    if not parameters:
        raise AdapterError("nothing is trained: no adapter, no token, no module", "set lora.targets")
    fast = adapters.fast(model) if config.method != "full" else ()
    return optimizer_for(parameters, config.train, fast=fast, seed=config.seed)


def set_layers(model: nn.Module, layers: Sequence[Layers]) -> None:
    """What each layer keeps for the backward. The composed path knows keep and checkpoint alone."""
    if getattr(model, "fast", None) is not None:
        model.fast.policies = _policies(layers)
    model.checkpoint_layers = any(part.level != "keep" for part in layers)


def layers_of(model: nn.Module, count: int) -> list[list[Any]]:
    """What each layer keeps now, an out-of-memory may have lowered it: [count, level, offload, tile] from the bottom, for JSON."""
    if getattr(model, "fast", None) is None:
        return [[count, "checkpoint" if model.checkpoint_layers else "keep", False, WHOLE]]
    return [[len([*same]), p.level, p.offload, p.tile] for p, same in itertools.groupby(model.fast.policies)]


def _policies(layers: Sequence[Layers]) -> tuple[Policy, ...]:
    return tuple(Policy(part.level, part.offload, part.tile) for part in layers for _ in range(part.count))


def every(total: int, step_tokens: float, held_out_tokens: int) -> int:
    """Steps between evaluations when the run file says auto: ten evaluations in a run, fewer in a short one, and reading the
    held-out rows takes no longer than the steps between."""
    cost = FORWARD * held_out_tokens / max(1.0, step_tokens)
    return min(total, max(APART, math.ceil(total / EVALUATIONS), math.ceil(cost)))


class _Session:
    """What the loop's hooks share while one run trains."""

    def __init__(self, config: RunConfig, run: Run, base: ResolvedModel, prepared: Prepared, renderer: Renderer, where: Place,
                 plan: Plan, model: nn.Module, console: Console):  # fmt: skip
        self.config, self.run, self.base, self.prepared, self.renderer = config, run, base, prepared, renderer
        self.where, self.plan, self.model, self.console = where, plan, model, console
        self.per_epoch = math.ceil(prepared.epoch_size / config.train.batch_size)
        self.total = config.train.steps(prepared.epoch_size)
        self.held_out, ev = prepared.held_out, config.eval
        step_tokens = prepared.train.lengths.mean() * config.train.batch_size
        auto = every(self.total, step_tokens, int(self.held_out.lengths.sum()))
        self.eval_every = auto if ev.every_steps == "auto" else ev.every_steps
        self.save_every = self.eval_every if config.checkpoint.every_steps == "auto" else config.checkpoint.every_steps
        self.keeps_best = ev.keep_best and len(self.held_out) > 0
        self.optimizer = optimizer_of(model, config)
        limit = context(model) or math.inf
        if (most := max(int(rows.lengths.max()) for rows in (prepared.train, self.held_out) if len(rows))) > limit:
            what = f"the longest row has {most:,} tokens, and this model was made for {limit:,}"
            if model.spec is None:  # a table of positions ends there: it would fail at the first long row, hours from now
                raise DataError(what, f"set data.max_length: {limit}")
            _line(console, "", what, style="yellow")
        longest = min(config.data.max_length, limit - 1)  # an answer needs room for a token
        rows = prepared.account.held_out_rows if ev.samples else 0
        self.questions = heldout.questions(prepared.conversations(), renderer, COMPARED, rows=rows, longest=longest) if rows else []
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.read: dict[int, Losses] = {}  # held-out losses by step: of the best and of the newest

    def newest(self) -> Found | None:
        """The checkpoint to go on from; None: nothing was saved, so from the start. RunError when some were and none is whole."""
        found, problems = checkpoint.newest_valid(self.run.checkpoints)
        for problem in problems:
            _line(self.console, "", f"damaged checkpoint passed over: {problem}", style="yellow")
        if found is None and problems:
            raise RunError(f"{self.run.path}: no checkpoint is whole\n" + "\n".join(problems), "start again with another `output`")
        return found

    def make_room(self) -> None:
        """DoesNotFit when the disk cannot hold the checkpoints, in which AdamW's two moments are as large as the weights, and
        beside each of them the best weights as they were then.
        """
        masters = self._masters()
        moments = {f"{key}/{name}": m for key in ("exp_avg", "exp_avg_sq") for name, m in masters.items()}
        whole = self.optimizer.state() if self.config.train.optimizer == INSIDE else {**masters, **moments}
        kept = {self.run.checkpoints: whole} | ({self.run.path / "best": masters} if self.keeps_best else {})
        checkpoint.preflight(kept, self.config.checkpoint.keep)

    def go(self, found: Found | None, *, again: bool) -> None:
        """Train to the end and write the result. `again`: the run was begun before; it goes on from `found`, or from the start."""
        config, run = self.config, self.run
        start = found.step if found else 0
        if again:
            moved = run.rewind(start if found else -1)
            run.append("metrics", {"kind": "event", "step": start, "what": "resumed", "rows_superseded": moved})
            _line(self.console, "resume", f"from step {start} of {self.total}")
        run.set_status("running", step=start, steps=self.total)
        self.meter = Meter(self.where.device)
        with (
            graceful() as self.stop,
            Log(run, config.log.trackers, steps=self.total, start=start) as self.log,
            Progress(self.total, start=start, file=self.console.file) as self.progress,
        ):
            try:
                self._before(found)
            except Stopped:
                raise Interrupted(
                    f"stopped by {self.stop.requested} before a step was taken", "begin again with --resume"
                ) from None
            state = self._restore(found) if found else State(
                micro_batch_tokens=self.plan.micro_batch_tokens, loss_scale=LossScale.of(self.where.dtype)
            )  # fmt: skip
            state = loop.fit(
                self.model, self.optimizer, self.examples_of,
                Hooks(self.evaluate, self.keep_best, self.save, self.record, self.event, lambda: self.stop.requested),
                train=config.train, peak=learning_rate(config.train, config.method), total=self.total,
                eval_every=self.eval_every, save_every=self.save_every, early_stop=config.eval.early_stop,
                seed=config.seed, device=self.where.device, state=state,
            )  # fmt: skip
            self._beside_the_plan(state.step)
            try:
                self._finish(state)
            except Stopped:
                what = f"stopped by {self.stop.requested} after the last step; everything is saved"
                raise Interrupted(what, "write the result with --resume") from None

    def _beside_the_plan(self, step: int) -> None:
        """What the run held and how fast it was, into metrics and manifest; a line for what is too far from the plan."""
        held, rate, plan = self.meter.held, self.meter.rate, self.plan
        gib = None if held is None else held / GIB
        self.run.record(held_bytes=held, tokens_per_second=rate)
        self.run.append("metrics", {"kind": "plan", "step": step, "planned_gib": plan.needs, "held_gib": gib,
                                    "planned_tokens_per_second": plan.speed, "tokens_per_second": rate})  # fmt: skip
        own = gib if plan.device.kind == "cuda" else None  # a CPU's resident pages are also the program's and its libraries'
        for said in astray(plan.needs, own, plan.speed, rate):
            self.progress.say(f"note: {said}")

    # ---- what the loop calls ---------------------------------------------------------------------------------------------------

    def examples_of(self, step: int) -> list:
        """The examples of optimiser step `step`: epoch after epoch, each shuffled anew and spread evenly over its steps."""
        epoch, at = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, steps(self.prepared.epoch(self.config.seed, epoch), self.config.train.batch_size)
        return [self.prepared.train[i] for i in self._epoch[1][at]]

    def evaluate(self, state: State) -> float | None:
        """Held-out loss and a few sample answers, recorded. Nothing is recorded of an evaluation that was stopped."""
        if not len(self.held_out):
            return None
        self._refuse_nan()
        found = self._losses(state.micro_batch_tokens)
        asked = self.questions[: self.config.eval.samples]
        self._record_evaluation(state.step, found, asked, self._answers(asked))
        self.read = {step: kept for step, kept in self.read.items() if step == state.best_step} | {state.step: found}
        if not math.isfinite(found.mean):
            rows = [str(self.held_out.origin(int(i))) for i in np.flatnonzero(~np.isfinite(found.total))[:8]]
            self.event("the held-out loss is not finite", step=state.step, rows=", ".join(rows))
        return found.mean

    def keep_best(self, state: State) -> None:
        """Weights alone, with checksums. At the last step the model itself holds them."""
        if self.keeps_best and state.step < self.total:
            self._refuse_nan()
            checkpoint.save(self.run.path / "best", state.step, self._masters(), {})

    def save(self, state: State) -> None:
        self._refuse_nan()
        self.log.sync()
        generators, numbers = checkpoint.rng_state()
        kept = {**asdict(state), "rng": numbers, "activations": layers_of(self.model, sum(part.count for part in self.plan.layers))}
        checkpoint.save(self.run.checkpoints, state.step, {**self.optimizer.state(), **generators}, kept)
        checkpoint.prune(self.run.checkpoints, self.config.checkpoint.keep)
        self._forget_bests(state)
        self.run.set_status("running", step=state.step, steps=self.total)

    def record(self, step: int, **values: float) -> None:
        rate = values["tokens"] / max(values["seconds"], 1e-9)
        self.meter.step(values["tokens"], values["seconds"])
        if step % self.config.log.every_steps == 0 or step == self.total:
            self.log.step(step, **values, tokens_per_second=rate)
        self.progress.update(step, loss=values["loss"], lr=values["learning_rate"], tokens_per_s=rate)

    def event(self, message: str, **values: Any) -> None:
        self.log.event(message, **values)
        self.progress.say(f"note: {message}" + "".join(f"; {k.replace('_', ' ')}: {v}" for k, v in values.items()))

    # ---- before, after, and the way back ---------------------------------------------------------------------------------------

    def _before(self, found: Found | None) -> None:
        """Losses and answers of the untuned model: before a step is taken, or a checkpoint put into it."""
        if not len(self.held_out) or (found and self._kept()):
            return
        which = "untuned model" if self.config.lora.continue_from == "none" else "model as it was before this run"
        self.progress.say(f"reading the held-out rows with the {which}")
        losses, answers = self._losses(self.plan.micro_batch_tokens), self._answers(self.questions)
        self._write(LOSSES_BEFORE, {"total": losses.total.tolist(), "trained": losses.trained.tolist()})
        self._write(BEFORE, answers)
        if not found:
            self._record_evaluation(0, losses, self.questions[: self.config.eval.samples], answers)

    def _kept(self) -> tuple[Losses, list[str]] | None:
        """What `_before` wrote; None where it is lost or damaged, and has to be found again."""
        try:
            found, answers = (json.loads((self.run.path / name).read_text("utf-8")) for name in (LOSSES_BEFORE, BEFORE))
            losses = Losses(np.array(found["total"], float), np.array(found["trained"], int))
            sound = losses.total.shape == losses.trained.shape == (len(self.held_out),) and all(isinstance(a, str) for a in answers)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return (losses, answers) if sound else None

    def _restore(self, found: Found) -> State:
        tensors, saved = checkpoint.load(found)  # in main memory: a second set would not fit the device
        self.optimizer.load(tensors)
        for line in checkpoint.restore_rng(tensors, saved.pop("rng")):
            self.event(line, step=found.step)
        set_layers(self.model, [Layers(*part) for part in saved.pop("activations")])
        saved.pop("format")
        state = State(**{**saved, "loss_scale": LossScale(**saved["loss_scale"])})
        if self.keeps_best and state.best_step >= 0 and (faults := verify(self._best(state))):
            if state.best_step == state.step:
                self.keep_best(state)
            else:
                self.event("the best weights so far are lost, a new best is looked for", step=state.step, damage="; ".join(faults))
                state.best_loss, state.best_step, state.since_best = math.inf, -1, 0
        return state

    def _finish(self, state: State) -> None:
        """Take the best weights, compare them with the untuned ones, write adapter or model, draw the report."""
        step = state.step
        if self.keeps_best and 0 <= state.best_step < step:
            best, _ = checkpoint.load(self._best(state))
            self.optimizer.put(best)
            step = state.best_step
            self.event(f"ending with the weights of step {step}, whose held-out loss was the lowest", step=state.step)
        self._refuse_nan()
        losses = self._compare(step, state.micro_batch_tokens) if len(self.held_out) else {}
        run = self.run
        if self.config.method == "full":
            models.save_checkpoint(self.model, run.model, dtype=self.where.dtype)
            self.renderer.save(run.model)
        else:
            adapters.save(self.model, run.adapter, base_name=self.base.name, revision=self.base.revision)
        self.renderer.save(run.tokenizer)
        peak = torch.cuda.max_memory_allocated() if self.where.device.type == "cuda" else None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run.record(finished=now, seconds=state.seconds, peak_bytes=peak, steps=state.step, weights_of_step=step,
                   best_step=state.best_step, tokens=state.tokens, micro_batch_tokens=state.micro_batch_tokens,
                   out_of_memory=state.step_downs)  # fmt: skip
        licence = licence_of(self.base.path)
        run.write_card(base=self.base.name, rows=self.prepared.account.counts(), losses=losses, licence=licence, steps=step)
        run.set_status("finished", step=state.step, steps=state.step, message="")
        if (run.path / "best").exists():  # the result is written: no resume will ask for it
            remove_folder(run.path / "best")
        report.write(run.path)

    def _compare(self, step: int, micro_batch_tokens: int) -> dict[str, tuple[float, float]]:
        """comparison.json: the same rows before and after, the loss of each, and how sure the difference is."""
        kept = self._kept()
        if kept is None:  # `_before` has just written or found them
            raise RunError(f"{self.run.path}: {LOSSES_BEFORE} or {BEFORE} was changed while it trained", "go on with --resume")
        first, before = kept
        last, after = self.read.get(step) or self._losses(micro_batch_tokens), self._answers(self.questions)
        self._write(AFTER, after)
        difference, low, high = paired_bootstrap(first.each, last.each, weights=first.trained, seed=self.config.seed)
        account, count = self.prepared.account, len(first.total)
        seen = min(count, (account.overlap_exact + account.overlap_near) * math.ceil(count / max(1, account.held_out_rows)))
        loss = {
            "before": first.mean, "after": last.mean, "difference": difference, "interval": [low, high], "rows": len(first.total),
            "overlap": seen,
            "each": {"before": first.each.tolist(), "after": last.each.tolist()},
        }  # fmt: skip
        if seen:  # which rows they are is not kept, so it must hold without as many of those that gained most
            rest = np.argsort((last.each - first.each) * first.trained)[seen:]
            _, low, high = paired_bootstrap(first.each[rest], last.each[rest], weights=first.trained[rest], seed=self.config.seed)
            loss["interval_of_the_rest"] = [low, high]
        rows = [
            {"index": q.index, "prompt": q.shown, "gold": q.gold, "before": {"answer": b}, "after": {"answer": a}}
            for q, b, a in zip(self.questions, before, after, strict=False)  # none where answers were not asked for at the start
        ]
        self._write("comparison.json", {"rows": rows, "loss": loss, "metrics": {}})
        return {"held-out loss (nats per trained token)": (first.mean, last.mean)}

    # ---- small things ----------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.stop.requested:
            raise Stopped

    def _losses(self, micro_batch_tokens: int) -> Losses:
        device = self.where.device
        return heldout.losses(self.model, self.held_out, micro_batch_tokens=micro_batch_tokens, device=device, check=self._check)

    def _answers(self, asked: list[heldout.Asked]) -> list[str]:
        return heldout.answers(self.model, asked, self.renderer, tokens=self.config.eval.sample_tokens, check=self._check)

    def _record_evaluation(self, step: int, losses: Losses, asked: list[heldout.Asked], answers: list[str]) -> None:
        self.log.eval(step, loss=losses.mean, tokens=int(losses.trained.sum()))
        for q, answer in zip(asked, answers, strict=False):
            self.log.sample(step, index=q.index, prompt=q.shown, gold=q.gold, answer=answer)
        self.progress.say(f"held-out loss {losses.mean:.4f} {f'after step {step}' if step else 'before'}")
        if asked:
            self.progress.say(f"        {_short(asked[0].shown, 24)} -> {_short(answers[0], 44) or '(nothing)'}")

    def _masters(self) -> dict[str, torch.Tensor]:
        return {name: master.detach() for name, master in self.optimizer.masters.items()}

    def _refuse_nan(self) -> None:
        """Nothing that is not finite reaches the disk."""
        if bad := [name for name, master in self._masters().items() if not bool(torch.isfinite(master).all())]:
            raise TrainingFailed(
                f"trained weights are nan or inf: {', '.join(bad[:4])}; they are not saved",
                "lower train.learning_rate; the last checkpoint holds weights from before",
            )

    def _best(self, state: State) -> Path:
        return self.run.path / "best" / f"step-{state.best_step:08d}"

    def _forget_bests(self, state: State) -> None:
        """Remove best weights that neither this run nor a checkpoint it may fall back to asks for."""
        steps = {state.best_step}
        for path in self.run.checkpoints.glob(f"step-*/{checkpoint.STATE}"):
            with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one is never gone on from
                steps.add(json.loads(path.read_text("utf-8"))["best_step"])
        wanted = {f"step-{step:08d}" for step in steps if step >= 0}
        for path in (self.run.path / "best").glob("step-*"):
            if path.name not in wanted:
                remove_folder(path)

    def _write(self, name: str, value: Any) -> None:
        write_atomic(self.run.path / name, json.dumps(finite(value), ensure_ascii=False, allow_nan=False))


def summary(console: Console, run: Path) -> None:
    """What came of it: held-out loss before and after with its interval, and one prompt answered before and after."""
    path = run / "comparison.json"
    if not path.is_file():
        _line(console, "result", "no held-out rows, so nothing shows whether it helped")
        return
    found = json.loads(path.read_text("utf-8"))
    loss = found["loss"]
    low, high = loss["interval"]
    sure = "too few rows to say how sure"
    seen, rest = loss.get("overlap", 0), loss.get("interval_of_the_rest", [None, None])[1]
    if low is not None and high is not None:
        proof = not seen or (rest is not None and rest < 0)
        word = ("better" if proof else "lower, which proves nothing") if high < 0 else "worse" if low > 0 else "no difference shown"
        word = "few rows" if loss["rows"] < FEW_ROWS else word
        sure = f"{word}: {loss['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    before, after = ("not finite" if loss[k] is None else f"{loss[k]:.3f}" for k in ("before", "after"))
    rows = f"{seen} of the {loss['rows']} held-out rows are trained on too" if seen else f"{loss['rows']} rows never trained on"
    _line(console, "result", f"held-out loss {before} before, {after} after ({sure}; {rows})")
    if found["rows"]:
        row = found["rows"][0]
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=8)
        table.add_column(overflow="fold")
        for name, text in (("prompt", row["prompt"]), ("before", row["before"]["answer"]), ("after", row["after"]["answer"])):
            table.add_row(name, Text(_short(text, 400) or "(nothing)"))
        console.print(table)


def _describe(prepared: Prepared, renderer: Renderer, console: Console, *, show: bool) -> None:
    """What is learned from, in one line; on a first run also one short row as coloured tokens."""
    account, lengths, trained = prepared.account, prepared.train.lengths, prepared.train.trained
    rows = sum(n for name, n in account.counts().items() if name != "refused")
    rest = f"{len(prepared.held_out):,} held out; {trained.sum():,} of {lengths.sum():,} tokens are learned"
    used = f"{counted(rows, 'row')} used, {account.refused:,} refused"
    _line(console, "data", f"{used}; {counted(len(lengths), 'example')} to train on, {rest}")
    for source in account.sources:
        for how, n in (*source.fixes.items(), *source.cuts.items()):
            _line(console, "", f"{counted(n, 'row')}: {how}", style="dim")
    if account.overlap_exact:
        _line(
            console,
            "",
            f"{counted(account.overlap_exact, 'held-out row is also a training row', 'held-out rows are also training rows')}",
            style="yellow",
        )
    if show:
        print_one_row(prepared, renderer, console)


def _line(console: Console, name: str, text: str, style: str = "") -> None:
    """A named line; on a terminal it wraps beside its name, in a file it stays one line."""
    if not console.is_terminal:
        console.print(f"{name:<8}{_plain(text)}", soft_wrap=True, highlight=False, markup=False)
        return
    grid = Table.grid()
    grid.add_column(style="bold", width=8)
    grid.add_column(overflow="fold")
    grid.add_row(name, Text(_plain(text), style))
    console.print(grid)


def _short(text: str, most: int) -> str:
    line = _plain(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _plain(text: str) -> str:
    """A model's or a person's text must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _keep_account(run: Run, prepared: Prepared) -> None:
    """Leave the account, the refused rows and the held-out rows beside the run: it must be readable when the cache is gone."""
    run.data.mkdir(exist_ok=True)
    for name in ("account.json", "refused.jsonl", "held_out.jsonl"):
        if (source := prepared.folder / name).is_file():
            write_atomic(run.data / name, source.read_bytes())
