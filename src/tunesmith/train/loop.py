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

from tunesmith.config.schema import Train
from tunesmith.data.pack import collate, micro_batches
from tunesmith.errors import DoesNotFit, Interrupted, TrainingFailed
from tunesmith.train.loss import batch_loss, neftune
from tunesmith.train.optim import LossScale, Optimizer, schedule
from tunesmith.types import Example

IN_A_ROW = 3  # steps with a nan or inf in a row before the run is stopped
STEP_DOWNS = 4  # times the micro-batch is halved after an out-of-memory before the run is stopped


@dataclass
class State:
    """Where a run is: all that a checkpoint needs besides weights and moments."""

    step: int = 0  # optimiser steps done
    micro_batch_tokens: int = 8192
    tokens: int = 0  # through the model so far
    best_loss: float = math.inf
    best_step: int = -1
    since_best: int = 0  # evaluations without a better held-out loss
    not_finite: int = 0  # steps in a row that were not applied
    step_downs: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to. `evaluate` returns the held-out loss in nats per trained token, None without held-out rows."""

    evaluate: Callable[[int], float | None]
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
    """Take `total - state.step` optimiser steps. Raises TrainingFailed rather than end a run that did not learn; Interrupted once saved."""
    if state.step == 0:
        hooks.evaluate(0)  # before: recorded, but no candidate for the best
    model.train()
    while state.step < total:
        started, step = time.monotonic(), state.step
        rate = peak * schedule(train.schedule, step, total, train.warmup_ratio)
        optimizer.set_rate(rate)
        examples = examples_of(step)
        loss, tokens = _gradient(model, optimizer, examples, state, hooks, step, seed, device, train.neftune_alpha)
        norm = optimizer.gradient_norm()
        if state.loss_scale.active and not math.isfinite(norm) and math.isfinite(loss) and state.loss_scale.overflowed():
            optimizer.clear()
            continue  # fp16 overflowed: the same step again at half the scale
        state.step += 1
        state.tokens += tokens
        if math.isfinite(loss) and math.isfinite(norm):
            _check_rates(optimizer, rate)
            optimizer.step(norm)
            state.loss_scale.went_well()
            state.not_finite = 0
        else:
            optimizer.clear()
            state.not_finite += 1
            _not_finite(model, examples, state, hooks, loss, norm, device)
        seconds = time.monotonic() - started
        hooks.record(state.step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=tokens, seconds=seconds)
        if state.step in (3, total) and len(still := optimizer.never_moved()) == len(optimizer.parameters):
            raise TrainingFailed(
                f"after {state.step} steps no trained weight has had a gradient ({', '.join(still[:3])} ...)",
                "nothing was learned and nothing is kept as a success; please report this with the run folder's manifest.json",
            )
        last = state.step == total
        if last or state.step % eval_every == 0:
            found = hooks.evaluate(state.step)
            model.train()
            if found is not None:
                better = found < state.best_loss
                state.since_best = 0 if better else state.since_best + 1
                if better:
                    state.best_loss, state.best_step = found, state.step
                    hooks.keep_best(state)
                if early_stop and state.since_best >= early_stop:
                    hooks.event(f"stopped early: {early_stop} evaluations without a better held-out loss", step=state.step)
                    total = state.step
        signal = hooks.stop()
        if signal or state.step >= total or state.step % save_every == 0:
            hooks.save(state)
        if signal and state.step < total:
            raise Interrupted(f"stopped by {signal} after step {state.step} of {total}; everything is saved", "go on with --resume")
    return state


def _gradient(model, optimizer, examples, state, hooks, step, seed, device, alpha) -> tuple[float, int]:
    """Add up the step's gradient over its micro-batches; (mean loss per trained token, tokens). Out of memory: halve them and begin again."""
    trained = sum(int(e.learn.sum()) for e in examples)
    while True:
        try:
            total, tokens = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32), 0
            for i, part in enumerate(micro_batches([len(e.ids) for e in examples], state.micro_batch_tokens)):
                batch = collate([examples[j] for j in part])
                draw = (seed * 1_000_003 + step) * 1_009 + i
                torch.manual_seed(draw)  # dropout: a resumed step draws what the unbroken one drew
                loss, rows = batch_loss(model, batch, device, neftune(alpha, draw))
                (loss * (state.loss_scale.value / trained)).backward()
                total += rows.sum()
                tokens += len(batch.tokens)
            if state.loss_scale.active:
                optimizer.scale_gradients(1 / state.loss_scale.value)
            return total.item() / trained, tokens
        except torch.OutOfMemoryError:
            longest = max(len(e.ids) for e in examples)
            optimizer.clear()
            if state.step_downs >= STEP_DOWNS or state.micro_batch_tokens <= longest:
                raise DoesNotFit(
                    f"step {step + 1} ran out of device memory with {state.micro_batch_tokens:,} tokens at once",
                    f"lower data.max_length (the longest example here has {longest:,} tokens), or set memory.activations: checkpoint",
                ) from None
        torch.cuda.empty_cache()
        state.step_downs += 1
        state.micro_batch_tokens = max(longest, state.micro_batch_tokens // 2)
        hooks.event("out of device memory: halved the micro-batch, same gradient", step=step, micro_batch_tokens=state.micro_batch_tokens)


def _check_rates(optimizer: Optimizer, scheduled: float) -> None:
    """A rate that is not the scheduled one is an invisible fault: a setting that does nothing, a group left out."""
    for rate in optimizer.rates():
        if not math.isclose(rate, scheduled, rel_tol=1e-9):
            raise TrainingFailed(f"the optimiser's learning rate is {rate:.3e}, the schedule says {scheduled:.3e}", "please report this")


def _not_finite(model, examples, state, hooks, loss, norm, device) -> None:
    """Name the rows that make the loss nan or inf; the third step in a row ends the run."""
    bad = []
    with torch.no_grad():
        for e in examples:
            if not torch.isfinite(batch_loss(model, collate([e]), device)[0]):
                bad.append(str(e.origin))
    rows = ", ".join(bad or [str(e.origin) for e in examples])
    hooks.event("step not applied: the loss or gradient is not finite", step=state.step, loss=loss, grad_norm=norm, rows=rows)
    if state.not_finite >= IN_A_ROW:
        raise TrainingFailed(
            f"{IN_A_ROW} steps in a row gave a loss or gradient that is nan or inf; the last at step {state.step}, rows {rows}",
            "look at those rows, lower train.learning_rate, or use memory.dtype: fp32; the last checkpoint holds weights from before",
        )
