"""The training loop, whole, on one page. It takes its model, data, optimiser, evaluation and log; it reaches for nothing.

A step is a number: the examples, the learning rate and every draw of step n follow from (seed, n), so a run that continues from a
checkpoint repeats exactly what an unbroken run does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tunesmith.config.schema import INSIDE, Train
from tunesmith.data.pack import collate, micro_batches
from tunesmith.errors import DoesNotFit, Interrupted, TrainingFailed
from tunesmith.train.loss import batch_loss, draw, neftune
from tunesmith.train.optim import LossScale, Optimizer, schedule
from tunesmith.train.replay import Passes
from tunesmith.types import Example

IN_A_ROW = 3  # steps with a nan or inf in a row before the run is stopped
STEP_DOWNS = 4  # times the micro-batch is halved after an out-of-memory before the run is stopped
MOVED_BY = 3  # steps after which every trained weight must have had a gradient: LoRA's A has its first in step 2
NAMED = 8  # rows or weights that a message names


class Stopped(Exception):
    """Raised by a hook that was asked to stop while it worked; what it did is dropped and done again after a resume."""


@dataclass
class State:
    """Where a run is: all that a checkpoint needs besides weights and moments."""

    step: int = 0  # optimiser steps done
    micro_batch_tokens: int = 8192
    tokens: int = 0  # through the model so far
    seconds: float = 0.0  # in steps so far
    evaluated: int = 0  # the step after which the held-out rows were last read
    best_loss: float = math.inf
    best_step: int = -1
    since_best: int = 0  # evaluations without a better held-out loss
    not_finite: int = 0  # steps in a row that were not applied
    step_downs: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to. `evaluate` returns the held-out loss in nats per trained token, None without held-out rows."""

    evaluate: Callable[[State], float | None]  # may raise Stopped
    keep_best: Callable[[State], None]
    save: Callable[[State], None]
    record: Callable[..., None]  # record(step, loss=..., ...): one line of metrics
    event: Callable[..., None]  # event(message, **values): something a person should see
    stop: Callable[[], str | None]  # the signal that asked to stop, if one did


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    examples_of: Callable[[int], Sequence[Example]],
    hooks: Hooks,
    *,
    train: Train,
    peak: float,
    total: int,
    eval_every: int,
    save_every: int,
    early_stop: int,
    seed: int,
    device: torch.device,
    state: State,
) -> State:
    """Steps from `state.step` to `total`. TrainingFailed rather than end one that did not learn; Interrupted once saved."""
    model.train()
    passes = Passes(model, optimizer, device, hooks.event)
    saved = state.step, state.evaluated
    while True:
        signal = hooks.stop()
        if not signal and state.evaluated < state.step and (state.step == total or state.step % eval_every == 0):
            try:
                _evaluate(state, hooks, early_stop, passes)
            except Stopped:
                signal = hooks.stop()
        done = state.step == total or bool(early_stop and state.since_best >= early_stop)
        if (state.step, state.evaluated) != saved and (signal or done or state.step % save_every == 0):
            hooks.save(state)
            saved = state.step, state.evaluated
        if signal:
            raise Interrupted(f"stopped by {signal} after step {state.step} of {total}; everything is saved", "go on with --resume")
        if done:
            return state

        started, step = time.monotonic(), state.step
        rate = peak * schedule(train.schedule, step, total, train.warmup_ratio)
        optimizer.set_rate(rate)
        examples = examples_of(step)
        total_loss, tokens = _gradient(passes, examples, state, hooks, step, seed, train.neftune_alpha)
        _check_rates(optimizer, rate)
        norm = optimizer.step(total_loss)  # does nothing where either is not finite; train/inside.py what it can
        loss, norm = total_loss.item(), norm.item()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if state.loss_scale.active and math.isfinite(loss) and not finite and state.loss_scale.overflowed():
            continue  # fp16 overflowed: the same step again at half the scale
        if finite:
            state.loss_scale.went_well()
        state.step += 1
        state.tokens += tokens
        state.not_finite = 0 if finite else state.not_finite + 1
        seconds = time.monotonic() - started
        state.seconds += seconds
        scale = {"loss_scale": state.loss_scale.value} if state.loss_scale.active else {}
        hooks.record(state.step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=tokens, seconds=seconds, **scale)
        if not finite:
            _not_finite(model, optimizer, examples, state, hooks, loss, norm, device)
        if state.step in (MOVED_BY, total):
            _check_moves(optimizer, state, hooks)


def _evaluate(state: State, hooks: Hooks, early_stop: int, passes: Passes) -> None:
    """The held-out loss, whether it is the best so far, and whether waiting for a better one has lasted long enough."""
    found = _held_out(state, hooks, passes)
    state.evaluated = state.step
    if found is None:
        return
    better = found < state.best_loss
    state.since_best = 0 if better else state.since_best + 1
    if better:
        state.best_loss, state.best_step = found, state.step
        hooks.keep_best(state)
    elif early_stop and state.since_best >= early_stop:
        hooks.event(f"stopped early: {early_stop} evaluations without a better held-out loss", step=state.step)


def _held_out(state: State, hooks: Hooks, passes: Passes) -> float | None:
    """Where memory is short once more without recordings: the plan lets answers have what training leaves, and they hold it."""
    try:
        return hooks.evaluate(state)
    except torch.OutOfMemoryError:
        if not passes.recordings:
            raise
    passes.clear()  # out here the failed evaluation's tensors are gone
    return hooks.evaluate(state)


def _gradient(passes: Passes, examples, state, hooks, step, seed, alpha) -> tuple[torch.Tensor, int]:
    """Add up the gradient over micro-batches: (mean loss per trained token, a scalar on the device; tokens).

    Out of memory: give back what only saves time, else halve the micro-batch, else keep less for the backward; then begin again.
    Recordings go first: beside a pass that is too long to be recorded they hold what the plan counts once.
    """
    trained, lengths, device = sum(int(e.learn.sum()) for e in examples), [len(e.ids) for e in examples], passes.device
    while True:
        try:
            total, tokens = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32), 0
            parts = micro_batches(lengths, state.micro_batch_tokens)
            passes.optimizer.begin(len(parts))
            for i, part in enumerate(parts):
                batch = collate([examples[j] for j in part])
                torch.manual_seed(draw(seed, step, i))  # dropout: a resumed step draws what the unbroken one drew
                noise = neftune(alpha, batch, [draw(seed, step, j, 1) for j in part])
                total += passes(batch, state.loss_scale.value / trained, noise)  # forward and backward
                tokens += len(batch.tokens)
            if state.loss_scale.active:
                passes.optimizer.scale_gradients(1 / state.loss_scale.value)
            return total / trained, tokens
        except torch.OutOfMemoryError:
            passes.optimizer.clear()
        gave = passes.relieve()
        torch.cuda.empty_cache()  # out here the failed pass and its tensors are gone
        if gave:
            hooks.event("out of device memory: gave back recorded passes, same gradient", step=step + 1)
            continue
        least = sum(lengths) if passes.optimizer.train.optimizer == INSIDE else max(lengths)  # a step that cannot be halved
        _make_room(passes.model, state, hooks, step, least, min(state.micro_batch_tokens, sum(lengths)))


def _make_room(model, state: State, hooks: Hooks, step: int, longest: int, at_once: int) -> None:
    """After an out-of-memory with `at_once` tokens: the cheapest way to need less, told as an event; else DoesNotFit."""
    if model.relieve():
        torch.cuda.empty_cache()
        hooks.event("out of device memory: gave back decoded weights, same gradient", step=step + 1)
    elif at_once > longest and state.step_downs < STEP_DOWNS:
        state.step_downs += 1
        state.micro_batch_tokens = max(longest, at_once // 2)
        hooks.event("out of device memory: halved the micro-batch, same gradient",
                    step=step + 1, micro_batch_tokens=state.micro_batch_tokens)  # fmt: skip
    elif at_once <= longest and (kept := model.leaner()):
        hooks.event("out of device memory: keeps less for the backward", step=step + 1, activations=kept)
    else:
        raise DoesNotFit(
            f"step {step + 1} ran out of device memory with {at_once:,} tokens at once, {state.step_downs} times halved",
            f"lower data.max_length (the longest row here has {longest:,} tokens), or set memory.activations: checkpoint",
        )


def _check_rates(optimizer: Optimizer, scheduled: float) -> None:
    """A rate that is not the scheduled one is an invisible fault: a setting that does nothing, a group left out."""
    for rate in optimizer.rates():
        if not math.isclose(rate, scheduled, rel_tol=1e-9):
            raise TrainingFailed(
                f"the optimiser's learning rate is {rate:.3e}, the schedule says {scheduled:.3e}", "please report this"
            )


def _check_moves(optimizer: Optimizer, state: State, hooks: Hooks) -> None:
    """What never has a gradient learns nothing: all of it ends the run, a part of it is told."""
    still = optimizer.never_moved()
    if len(still) == len(optimizer.parameters):
        raise TrainingFailed(
            f"after {state.step} steps no trained weight has had a gradient ({_some(still)})",
            "nothing was learned and nothing is kept as a success; please report this with the run folder's manifest.json",
        )
    if still and state.step >= MOVED_BY:
        hooks.event(f"{len(still)} trained weights have had no gradient so far", step=state.step, weights=_some(still))


def _not_finite(model, optimizer, examples, state, hooks, loss, norm, device) -> None:
    """Name the rows whose loss or gradient is nan or inf; the third step in a row ends the run."""
    bad, outcome = [], optimizer.outcome()
    for e in examples:
        alone, _ = batch_loss(model, collate([e]), device)
        alone.backward()
        if not (torch.isfinite(alone) and torch.isfinite(optimizer.gradient_norm())):
            bad.append(str(e.origin))
        optimizer.clear()
    rows = _some(bad or [str(e.origin) for e in examples])
    hooks.event(f"{outcome}: its loss or gradient is not finite", step=state.step, loss=loss, grad_norm=norm, rows=rows)
    if state.not_finite >= IN_A_ROW:
        raise TrainingFailed(
            f"{IN_A_ROW} steps in a row gave a loss or gradient that is nan or inf; the last was step {state.step}, rows {rows}",
            "look at those rows, lower train.learning_rate, or use memory.dtype: fp32; the last checkpoint is from before",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
