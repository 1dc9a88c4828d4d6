"""One run from its file to its report: what `tunesmith.train` does, in order. The loop itself is train/loop.py."""

from __future__ import annotations

import datetime
import functools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import load_file
from torch import nn

from tunesmith import adapters, models
from tunesmith.config.schema import RunConfig
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render import Renderer, build_renderer
from tunesmith.devices import local_device
from tunesmith.errors import AdapterError, Interrupted, RunError, TunesmithError
from tunesmith.evaluate import heldout, report
from tunesmith.evaluate.statistics import paired_bootstrap
from tunesmith.files import write_atomic
from tunesmith.generate import generate
from tunesmith.hub import ResolvedModel, resolve_model
from tunesmith.models.place import Place, make_deterministic, place
from tunesmith.plan import Plan, make_plan
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import read_config, read_spec
from tunesmith.tokenizer import Tokenizer
from tunesmith.train import checkpoint, loop
from tunesmith.train.checkpoint import write_safetensors
from tunesmith.train.log import Log, Progress
from tunesmith.train.loop import Hooks, State
from tunesmith.train.optim import LossScale, Optimizer, learning_rate
from tunesmith.train.signals import graceful

EVALUATIONS = 10  # in a run, when eval.every_steps is auto
COMPARED = 24  # held-out prompts answered before and after for the report
BEST = "best.safetensors"


def tune(config: RunConfig, run: Run, *, resume: bool, console: Console) -> Run:
    """Train as `config` says and leave the result in `run`, whose lock the caller holds. A failure or a stop is in the run's status."""
    try:
        return _tune(config, run, resume=resume, console=console)
    except Interrupted as e:
        run.set_status("interrupted", message=e.what)
        raise
    except KeyboardInterrupt:
        run.set_status("interrupted", message="stopped at once by a second signal; the last checkpoint stands")
        raise
    except TunesmithError as e:
        run.set_status("failed", message=str(e))
        report.write(run.path)
        raise


def _tune(config: RunConfig, run: Run, *, resume: bool, console: Console) -> Run:
    if config.train.deterministic:
        make_deterministic()
    base = resolve_model(config.model)
    date = run.manifest.get("date") or datetime.date.today().isoformat()
    make_renderer = functools.partial(build_renderer, base.path, config.data, config.lora.new_tokens, date)
    renderer = make_renderer()
    console.print(f"[bold]model[/]  {escape(base.name)}   [dim]{escape(renderer.describe())}[/]")
    prepared = prepare(config.data, make_renderer, renderer=renderer, seed=config.seed, progress=console, model=base.path)
    _data_folder(run, prepared)
    base_print = base_fingerprint(base.path)
    if resume:
        run.refuse_if_changed(config, prepared.fingerprint, base_print)
    run.record(data=prepared.fingerprint, base=base_print, base_name=base.name, base_revision=base.revision, date=date,
               template=renderer.describe())  # fmt: skip
    where = place(config.memory)
    if where.note:
        console.print(f"[yellow]{escape(where.note)}[/]")
    plan = plan_for(config, base.path, prepared.train.lengths)
    console.print(f"[bold]plan[/]   {escape(plan.verdict)}")
    write_atomic(run.path / "plan.json", json.dumps(plan.as_dict(), indent=1))
    plan.require()
    model = build_model(config, base, where, plan, renderer.tokenizer)
    return _Session(config, run, base, prepared, renderer, where, plan, model, console).go(resume)


def plan_for(config: RunConfig, base: Path, lengths) -> Plan:
    """The memory plan of this run on this machine's device."""
    return make_plan(config, read_spec(base), lengths=lengths, device=local_device(config.memory.device))


def build_model(config: RunConfig, base: ResolvedModel, where: Place, plan: Plan, tokenizer: Tokenizer) -> nn.Module:
    """The base in its store with what is trained attached: an adapter, or every weight."""
    model = models.load(base.path, dtype=where.dtype, device=where.device, store="nf4" if config.method == "qlora" else "dense")
    model.checkpoint_layers = plan.activations == "checkpoint"
    if config.method == "full":
        model.requires_grad_(True)
    else:
        starts = adapters.token_starts(config.lora.new_tokens, tokenizer, Tokenizer.load(base.path))
        adapters.attach(model, config.lora, seed=config.seed, new_tokens=starts)
    return model


class _Session:
    """What the loop's hooks share while one run trains."""

    def __init__(self, config: RunConfig, run: Run, base: ResolvedModel, prepared: Prepared, renderer: Renderer, where: Place, plan: Plan,
                 model: nn.Module, console: Console):  # fmt: skip
        self.config, self.run, self.base, self.prepared, self.renderer = config, run, base, prepared, renderer
        self.where, self.plan, self.model, self.console = where, plan, model, console
        self.per_epoch = math.ceil(prepared.epoch_size / config.train.batch_size)
        self.total = config.train.max_steps or max(1, math.ceil(self.per_epoch * config.train.epochs))
        self.eval_every = config.eval.every_steps if config.eval.every_steps != "auto" else max(1, math.ceil(self.total / EVALUATIONS))
        self.save_every = config.checkpoint.every_steps if config.checkpoint.every_steps != "auto" else self.eval_every
        parameters = adapters.trainable(model) if config.method != "full" else dict(model.named_parameters())
        if not parameters:
            raise AdapterError("nothing is trained: no adapter, no token, no module", "set lora.targets")
        self.optimizer = Optimizer(parameters, config.train, fast=adapters.fast(model) if config.method != "full" else ())
        self.held_out = prepared.held_out
        longest = config.data.max_length
        self.questions = heldout.questions(prepared.conversations(), renderer, COMPARED, longest=longest) if len(self.held_out) else []
        self._order: tuple[int, list] = (-1, [])
        self.last: heldout.Losses | None = None  # of the weights as they are

    def go(self, resume: bool) -> Run:
        config, run = self.config, self.run
        state = State(micro_batch_tokens=self.plan.micro_batch_tokens, loss_scale=LossScale.of(self.where.dtype))
        if resume:
            state = self._resume(state)
        checkpoint.preflight(run.checkpoints, self.optimizer.state(), config.checkpoint.keep)
        run.set_status("running", step=state.step, steps=self.total)
        started = time.monotonic()
        with (
            graceful() as stop,
            Log(run, config.log.trackers, steps=self.total, start=state.step) as self.log,
            Progress(self.total, start=state.step) as self.progress,
        ):
            hooks = Hooks(self.evaluate, self.keep_best, self.save, self.record, self.event, lambda: stop.requested)
            if not (run.path / "before.json").exists():
                self._answers("before.json")
            state = loop.fit(
                self.model, self.optimizer, self.examples_of, hooks,
                train=config.train, peak=learning_rate(config.train, config.method), total=self.total,
                eval_every=self.eval_every, save_every=self.save_every, early_stop=config.eval.early_stop,
                seed=config.seed, device=self.where.device, state=state,
            )  # fmt: skip
            self._finish(state, time.monotonic() - started)
        return run

    # ---- what the loop calls ---------------------------------------------------------------------------------------------------

    def examples_of(self, step: int) -> list:
        """The examples of optimiser step `step`: epochs one after another, each shuffled anew; the last step of an epoch may hold fewer."""
        epoch, at = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.prepared.epoch(self.config.seed, epoch).tolist())
        size = self.config.train.batch_size
        return [self.prepared.train[i] for i in self._order[1][at * size : (at + 1) * size]]

    def evaluate(self, step: int) -> float | None:
        """Held-out loss, recorded; and a few sample answers."""
        if not len(self.held_out):
            return None
        found = self.last = self._losses()
        self.log.eval(step, loss=found.mean, tokens=int(found.trained.sum()))
        asked = self.questions[: self.config.eval.samples]
        for q, answer in zip(asked, self._answer(asked, self.config.eval.sample_tokens), strict=True):
            self.log.sample(step, index=q.index, prompt=q.shown, gold=q.gold, answer=answer)
        self.progress.say(f"step {step}: held-out loss {found.mean:.4f}")
        if step == 0:
            self._write("losses_before.json", {"total": found.total.tolist(), "trained": found.trained.tolist()})
        return found.mean

    def keep_best(self, state: State) -> None:
        if self.config.eval.keep_best:
            tensors = {n: m.detach() for n, m in self.optimizer.masters.items()}
            write_safetensors(self.run.path / f"{BEST}.new", tensors, {"step": str(state.step)})
            (self.run.path / f"{BEST}.new").replace(self.run.path / BEST)

    def save(self, state: State) -> None:
        self.log.sync()
        generators, numbers = checkpoint.rng_state()
        checkpoint.save(self.run.checkpoints, state.step, {**self.optimizer.state(), **generators}, {**asdict(state), "rng": numbers})
        checkpoint.prune(self.run.checkpoints, self.config.checkpoint.keep)
        self.run.set_status("running", step=state.step, steps=self.total)

    def record(self, step: int, **values) -> None:
        rate = values["tokens"] / max(values["seconds"], 1e-9)
        if step % self.config.log.every_steps == 0 or step == self.total:
            self.log.step(step, **values, tokens_per_second=rate)
        self.progress.update(step, loss=values["loss"], lr=values["learning_rate"], tokens_per_s=rate)

    def event(self, message: str, **values) -> None:
        self.log.event(message, **values)
        self.progress.say(f"note: {message}" + "".join(f"  {k}={v}" for k, v in values.items()))

    # ---- around it -------------------------------------------------------------------------------------------------------------

    def _resume(self, fresh: State) -> State:
        found, problems = checkpoint.newest_valid(self.run.checkpoints)
        for problem in problems:
            self.console.print(f"[yellow]damaged checkpoint passed over:[/] {escape(problem)}")
        if found is None:
            if problems:
                raise RunError(f"{self.run.path}: no checkpoint is whole", "start again with another `output`")
            self.run.rewind(-1)
            return fresh
        tensors, saved = checkpoint.load(found, self.where.device)
        self.optimizer.load(tensors)
        for line in checkpoint.restore_rng(tensors, saved.pop("rng")):
            self.console.print(f"[yellow]{escape(line)}[/]")
        saved.pop("format")
        state = State(**{**saved, "loss_scale": LossScale(**saved["loss_scale"])})
        moved = self.run.rewind(state.step)
        self.run.append("metrics", {"kind": "event", "step": state.step, "what": "resumed", "rows_superseded": moved})
        self.console.print(f"going on from step {state.step} of {self.total}")
        return state

    def _losses(self) -> heldout.Losses:
        return heldout.losses(self.model, self.held_out, micro_batch_tokens=self.plan.micro_batch_tokens, device=self.where.device)

    def _answer(self, questions, tokens: int) -> list[str]:
        ids = generate(self.model, [q.ids for q in questions], stop_ids=sorted(self.renderer.stop_ids), max_tokens=tokens)
        return [self.renderer.tokenizer.decode(a, skip_special=True).strip() for a in ids]

    def _answers(self, name: str) -> None:
        answers = self._answer(self.questions, self.config.eval.sample_tokens) if self.config.eval.samples else []
        self._write(name, answers)

    def _finish(self, state: State, seconds: float) -> None:
        """Take the best weights, write adapter or model, compare before with after, draw the report."""
        if self.config.eval.keep_best and (self.run.path / BEST).exists() and state.best_step != state.step:
            best = load_file(self.run.path / BEST, device=str(self.where.device))
            self.optimizer.put(best)
            self.event(f"kept the weights of step {state.best_step}, whose held-out loss was lowest", step=state.step)
            self.last = None
        self.progress.say("writing the result")
        if self.config.method == "full":
            models.save_checkpoint(self.model, self.run.model, dtype=self.where.dtype)
            self.renderer.tokenizer.save(self.run.model)
        else:
            adapters.save(self.model, self.run.adapter, base_name=self.base.name, revision=self.base.revision)
        self.renderer.tokenizer.save(self.run.tokenizer)
        before_after = self._compare()
        peak = torch.cuda.max_memory_allocated() if self.where.device.type == "cuda" else None
        self.run.record(finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), seconds=seconds, peak_bytes=peak,
                        steps=state.step, best_step=state.best_step, tokens=state.tokens)  # fmt: skip
        self.run.write_card(base=self.base.name, rows=self.prepared.account.counts(), losses=before_after, steps=state.step)
        self.run.set_status("finished", step=state.step, steps=state.step, message="")
        report.write(self.run.path)

    def _compare(self) -> dict[str, tuple[float, float]]:
        if not len(self.held_out):
            return {}
        before = json.loads((self.run.path / "losses_before.json").read_text())
        first = heldout.Losses(np.array(before["total"]), np.array(before["trained"]))
        self._answers("after.json")
        texts = [json.loads((self.run.path / n).read_text()) for n in ("before.json", "after.json")]
        self.last = self.last or self._losses()
        difference, low, high = paired_bootstrap(first.total, self.last.total, weights=first.trained, seed=self.config.seed)
        rows = [
            {"index": q.index, "prompt": q.shown, "gold": q.gold, "before": {"answer": b}, "after": {"answer": a}}
            for q, b, a in zip(self.questions, *texts, strict=False)
        ]
        loss = {"before": first.mean, "after": self.last.mean, "difference": difference, "interval": [low, high], "rows": len(first.total)}
        self._write("comparison.json", {"rows": rows, "loss": loss, "metrics": {}})
        return {"held-out loss (nats per trained token)": (first.mean, self.last.mean)}

    def _write(self, name: str, value) -> None:
        write_atomic(self.run.path / name, json.dumps(value, ensure_ascii=False))


def _data_folder(run: Run, prepared: Prepared) -> None:
    """Leave the account, the refused rows and the held-out rows beside the run: it must be readable when the cache is gone."""
    run.data.mkdir(exist_ok=True)
    for name in ("account.json", "refused.jsonl", "held_out.jsonl"):
        if (source := prepared.folder / name).is_file():
            write_atomic(run.data / name, source.read_bytes())
