"""The sweep itself: which setting runs next, which is stopped early, and what is known when it is started again.

Optuna keeps all of it in sweep.db; a trial is one setting, its value the mean held-out loss over the seeds. Whatever kills the
sweep, the same command goes on: a trial that was running is taken up where its run folder is, never counted twice.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.load import dump, load
from tunesmith.config.schema import RunConfig
from tunesmith.data.prepare import prepare
from tunesmith.data.render import build_renderer
from tunesmith.devices import local_device
from tunesmith.errors import ConfigError, DataError, DoesNotFit, Interrupted, MissingExtra, RunError, install
from tunesmith.files import LEFTOVER, make_folder, sha256, write_atomic
from tunesmith.hub import resolve_model
from tunesmith.plan import Plan, make_plan
from tunesmith.redact import redact, redact_tree
from tunesmith.run import Run, base_fingerprint
from tunesmith.spec import plan_spec
from tunesmith.sweep.job import End, Job
from tunesmith.sweep.space import Axis, corners, grid, overrides, own, words
from tunesmith.train.signals import Stop, graceful

if TYPE_CHECKING:
    import optuna
    from rich.console import Console

TRIALS = 20  # settings drawn from ranges when --trials does not say
CORNERS = 64  # plans looked at before anything runs
WHOLE = 4  # trials that are never stopped, the run file's own first: what others are measured against
FIRST_RUNG, KEPT = 25, 2  # successive halving: at 25 % and at 50 % of a run the better half of those that came so far goes on
SAME = 50  # draws in a row that were tried already: then there is nothing new
POLL = 0.2  # seconds between looks at the runs
QUIET = ("eval.samples=0", "checkpoint.keep=2")  # writing answers is half of a small run's time, and nothing is ranked by them


@dataclass
class Options:
    """`trials`: how many settings beside the run file's own; None is every combination of lists, or TRIALS of ranges."""

    trials: int | None = None
    jobs: int = 1
    seeds: int = 1
    prune: bool = True


@dataclass
class Slot:
    """A trial that runs: its setting, the run at work, and what its finished seeds ended with."""

    trial: optuna.Trial
    setting: dict[str, str]
    fixed: list[str]  # overrides beside the setting, the same when it is taken up again
    baseline: bool
    ends: list[End] = field(default_factory=list)
    job: Job | None = None
    steps: int = 0
    reported: int = -1  # percent of the run

    @property
    def seed_at(self) -> int:
        return len(self.ends)


def need_optuna() -> Any:
    try:
        import optuna
    except ImportError as fault:
        raise MissingExtra("tunesmith sweep needs optuna, which is not installed", install("sweep")) from fault
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Sweep:
    """One sweep folder: sweep.db, run.yaml, trials/ (run folders), logs/, and what result.py writes."""

    def __init__(self, config: RunConfig, axes: Sequence[Axis], folder: Path, options: Options, console: Console):
        self.optuna = need_optuna()
        self.config, self.axes, self.folder, self.options, self.console = config, axes, folder.absolute(), options, console
        self.seeds = [config.seed + i for i in range(options.seeds)]
        combinations = math.prod(len(a.values) for a in axes) if all(a.values for a in axes) else None
        self.is_grid = combinations is not None and (options.trials is None or options.trials >= combinations)
        self.fixed: list[str] = list(QUIET)
        self.slots: list[Slot] = []

    # ---- before anything runs --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Data prepared once for each seed, and a plan for each corner of the space; raises before anything is trained."""
        config = self.config
        if config.data.held_out == 0:
            raise ConfigError(
                "data.held_out is 0: there is nothing to rank by", "write data.held_out: 0.05, or name a file of held-out rows"
            )
        if redact_tree(config.model_dump(mode="json")) != config.model_dump(mode="json"):
            raise ConfigError(
                "the run file holds a secret, and a sweep keeps run files", "put the secret into an environment variable"
            )
        if self.is_grid:
            for setting in grid(self.axes):
                load(config, *overrides(setting))
        base = resolve_model(config.model)
        make_renderer = functools.partial(
            build_renderer, base.path, config.data, config.lora.new_tokens, datetime.date.today().isoformat()
        )
        prints, lengths = [], None
        for seed in self.seeds:
            prepared = prepare(
                config.data, make_renderer, renderer=make_renderer(), seed=seed, progress=self.console, model=base.path
            )
            if not len(prepared.held_out):
                raise DataError("no row is held out: there is nothing to rank by", "raise data.held_out, or name a file of rows")
            prints.append(prepared.fingerprint)
            lengths = prepared.train.lengths if lengths is None else lengths
        self.prints = {"data": prints, "base": base_fingerprint(base.path)}
        self.settings_that_fit(lengths)

    def settings_that_fit(self, lengths: Any) -> None:
        """DoesNotFit names the corner that does not. With several jobs each gets its share of the memory."""
        jobs, device = self.options.jobs, local_device(self.config.memory.device)
        share: list[str] = []
        for setting in [{}, *corners(self.axes, CORNERS)]:
            try:
                plan = self._plan(setting, share, lengths, device)
                if jobs > 1 and not share and self.config.memory.budget_gb == "auto":
                    share = [f"memory.budget_gb={plan.budget / jobs:.2f}"]
                    plan = self._plan(setting, share, lengths, device)
                plan.require()
            except DoesNotFit as fault:
                who = words(setting) or "the run file as it is"
                if jobs > 1 and share:
                    who, fix = f"{who}, {jobs} at once", f"--jobs {max(1, jobs // 2)} gives each more\n{fault.fix}"
                    raise DoesNotFit(f"{who}: {fault.what}", fix) from None
                raise DoesNotFit(f"{who}: {fault.what}", fault.fix) from None
        self.fixed = [*QUIET, *share]

    def _plan(self, setting: dict[str, str], more: Sequence[str], lengths: Any, device: Any) -> Plan:
        config = load(self.config, *overrides(setting), *more)
        same_rows = config.data == self.config.data and config.model == self.config.model
        spec = plan_spec(resolve_model(config.model, weights=False).path)
        return make_plan(config, spec, lengths=lengths if same_rows else None, device=device)

    # ---- the storage -----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the study, or find the one that is there. RunError when it was started with something else."""
        optuna, options = self.optuna, self.options
        text = dump(self.config)
        about = {
            "run": sha256(text), "axes": [asdict(a) for a in self.axes], "seeds": self.seeds, "prune": options.prune, **self.prints,
        }  # fmt: skip
        about = json.loads(json.dumps(about)) | {"date": datetime.date.today().isoformat()}
        storage = optuna.storages.RDBStorage(f"sqlite:///{self.folder / 'sweep.db'}")
        with suppress_experimental():
            pruner = optuna.pruners.SuccessiveHalvingPruner(FIRST_RUNG, KEPT) if options.prune else optuna.pruners.NopPruner()
            self.study = optuna.create_study(
                storage=storage, study_name="sweep", direction="minimize", load_if_exists=True, pruner=pruner
            )
            done = len(self.study.get_trials(deepcopy=False))
            # A sampler begun again with the same seed would draw what it drew before.
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=max(4, min(10, (options.trials or TRIALS) // 3)), seed=(self.config.seed + done) % 2**32
            )
        was = self.study.user_attrs.get("about")
        if was is not None and was["date"] != about["date"]:  # a template may say the date: then the rows read otherwise each day
            about |= {"date": was["date"], "data": was["data"]}
        if was is not None and was != about:
            names = {"run": "the run file", "axes": "the settings tried", "seeds": "--seeds", "prune": "--no-prune",
                     "data": "the data", "base": "the base model"}  # fmt: skip
            other = ", ".join(name for key, name in names.items() if was.get(key) != about[key])
            raise RunError(
                f"{self.folder}: holds a sweep that was started with another: {other}",
                "put it back to go on, or name another --out",
            )
        if was is None:  # the queue first: a crash between leaves one that is filled up again
            self._enqueue()
            write_atomic(self.folder / "run.yaml", "# The run file of this sweep as resolved.\n" + text)
            self.study.set_user_attr("about", about)
        elif self.is_grid:
            self._enqueue()  # more trials than before can make a grid of what was a draw

    def _enqueue(self) -> None:
        """The run file's own values first, so that all is measured against what there was; then, of lists, every combination."""
        mine = own(self.config, self.axes)
        inside = all(axis.holds(mine[axis.key]) for axis in self.axes)
        first = {axis.key: axis.fixed(mine[axis.key]) for axis in self.axes} if inside else {}
        self.study.enqueue_trial(first, user_attrs={"baseline": True, "inside": inside}, skip_if_exists=True)
        for setting in grid(self.axes) if self.is_grid else ():
            self.study.enqueue_trial({a.key: a.fixed(setting[a.key]) for a in self.axes}, skip_if_exists=True)

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Those that count: a draw that was tried already does not."""
        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if (not states or t.state.name in states) and "same_as" not in t.user_attrs]

    @property
    def total(self) -> int:
        """Settings in all, the run file's own among them."""
        if self.is_grid:
            return len(self.trials())
        return (self.options.trials or TRIALS) + 1

    # ---- running ---------------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Until all settings are done. Interrupted, with all saved, on a first Ctrl-C; a second one ends the runs at once."""
        running = self.trials("RUNNING")
        self.waiting = [self._slot(self.optuna.Trial(self.study, t._trial_id)) for t in running]
        with graceful() as stop, self._bar() as bar:
            try:
                while True:
                    self._fill(stop)
                    bar(len(self.trials("COMPLETE", "PRUNED", "FAIL")), self.total)
                    if not self.slots:
                        break
                    for slot in list(self.slots):
                        self._look(slot, stop)
                    if stop.requested:
                        for slot in self.slots:
                            if slot.job and not slot.job.asked_to_stop:
                                slot.job.stop()
                    time.sleep(POLL)
            except KeyboardInterrupt:
                for slot in self.slots:
                    if slot.job:
                        slot.job.kill()
                raise
        if stop.requested:
            done = len(self.trials("COMPLETE", "PRUNED", "FAIL"))
            raise Interrupted(
                f"stopped by {stop.requested} after {done} of {self.total} settings; all is saved", "the same command goes on"
            )

    def _fill(self, stop: Stop) -> None:
        while len(self.slots) < self.options.jobs and not stop.requested:
            slot = self.waiting.pop(0) if self.waiting else self._next()
            if slot is None:
                return
            self.slots.append(slot)
            self._begin(slot)

    def _next(self) -> Slot | None:
        """A setting that was not tried yet, or None when all are."""
        for _ in range(SAME):
            queued = self.trials("WAITING")
            counted = len(self.trials("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
            if not queued and (self.is_grid or counted >= self.total):
                return None
            with suppress_experimental():
                slot = self._slot(self.study.ask())
            before = [t for t in self.trials() if t.number < slot.trial.number and t.user_attrs.get("setting") == slot.setting]
            if not before:
                return slot
            slot.trial.set_user_attr("same_as", before[0].number)
            self.study.tell(slot.trial, state=self.optuna.trial.TrialState.FAIL)
        return None

    def _slot(self, trial: optuna.Trial) -> Slot:
        attrs = trial.user_attrs
        if "setting" in attrs:  # taken up again
            slot = Slot(trial, dict(attrs["setting"]), list(attrs["fixed"]), bool(attrs.get("baseline")))
            kept = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            slot.reported = max(kept, default=-1)
            return slot
        baseline = bool(attrs.get("baseline"))
        if baseline:
            for axis in self.axes if attrs["inside"] else ():
                axis.draw(trial)  # so that Optuna knows what it stands for
            setting = {}
        else:
            setting = {axis.key: axis.draw(trial) for axis in self.axes}
            if setting == own(self.config, self.axes):
                setting = {}
        trial.set_user_attr("fixed", self.fixed)
        trial.set_user_attr("setting", setting)
        return Slot(trial, setting, self.fixed, baseline)

    def name(self, slot: Slot) -> str:
        number = f"{slot.trial.number:03d}"
        return number if len(self.seeds) == 1 else f"{number}-seed-{self.seeds[slot.seed_at]}"

    def _begin(self, slot: Slot) -> None:
        """The next seed of a trial. One that was to be stopped when the sweep died is stopped now."""
        name, seed = self.name(slot), self.seeds[slot.seed_at]
        folder = self.folder / "trials" / name
        command = [
            str(self.folder / "run.yaml"), *overrides(slot.setting), *slot.fixed, f"seed={seed}",
            f"output={json.dumps(str(folder))}",
        ]  # fmt: skip
        slot.job = Job(folder, self.folder / "logs" / f"{name}.log", command, self._environment())
        if "pruned_at" in slot.trial.user_attrs:
            slot.job.stop()
        else:
            slot.job.start()

    def _environment(self) -> dict[str, str]:
        """Several runs at once share the cores."""
        env = dict(os.environ)
        if self.options.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.options.jobs)))
        return env

    def _look(self, slot: Slot, stop: Stop) -> None:
        """Report new evaluations, stop a run that is not worth going on, and settle one that has ended."""
        job = slot.job
        assert job is not None
        end = job.end()  # before its evaluations are read, so that none comes between
        if slot.seed_at == 0:
            self._report(slot, job)
        if end is None:
            return
        pruned = slot.trial.user_attrs.get("pruned_at")
        if end.how == "stopped" and pruned is None:
            if not stop.requested:  # it was stopped by somebody else
                return self._settle(slot, End("failed", reason="it was stopped from outside"))
            self.slots.remove(slot)  # stays RUNNING in the storage: taken up again
            return
        if end.how == "finished":
            job.make_small(keep_one=False)
            slot.ends.append(end)
            if slot.seed_at < len(self.seeds):
                if stop.requested:
                    self.slots.remove(slot)
                else:
                    self._begin(slot)
                return
        self._settle(slot, end)

    def _report(self, slot: Slot, job: Job) -> None:
        for step, loss in job.evaluations():
            slot.steps = slot.steps or job.run.status().steps
            percent = 100 * step // max(1, slot.steps)
            if step == 0 or percent <= slot.reported or percent >= 100 or job.asked_to_stop:
                continue
            slot.reported = percent
            slot.trial.report(loss, percent)
            worse = slot.trial.should_prune()  # also asked of those that are never stopped: others are measured against them
            if worse and not slot.baseline and slot.trial.number >= WHOLE:
                slot.trial.set_user_attr("pruned_at", percent)
                job.stop()

    def _settle(self, slot: Slot, end: End) -> None:
        """Tell the storage what came of a trial, once."""
        states = self.optuna.trial.TrialState
        self.slots.remove(slot)
        trial, job, pruned = slot.trial, slot.job, slot.trial.user_attrs.get("pruned_at")
        assert job is not None
        if end.how == "failed":
            trial.set_user_attr("reason", redact(end.reason))
            self.study.tell(trial, state=states.FAIL)
            job.make_small(keep_one=False)
            self._say(slot, f"failed: {end.reason.splitlines()[0] if end.reason else 'no reason was given'}")
            return
        if pruned is not None and end.how == "stopped":
            self.study.tell(trial, state=states.PRUNED)
            job.make_small(keep_one=True)
            self._say(slot, f"stopped at {pruned} %, among the worse half there")
            return
        losses = [e.loss for e in slot.ends]
        mean = sum(losses) / len(losses)
        trial.set_user_attr("losses", losses)
        trial.set_user_attr("tokens", [e.tokens for e in slot.ends])
        trial.set_user_attr("seconds", [e.seconds for e in slot.ends])
        self.study.tell(trial, mean)
        self._say(slot, f"loss {mean:.4f}")

    # ---- what is shown ---------------------------------------------------------------------------------------------------------

    def _say(self, slot: Slot, what: str) -> None:
        done = self.trials("COMPLETE")
        best = min(done, key=lambda t: t.value, default=None)
        so_far = f"best {best.value:.4f} (trial {best.number})" if best is not None else "none finished yet"
        ended = len(self.trials("COMPLETE", "PRUNED", "FAIL"))
        who = words(slot.setting) or "as the run file has it"
        self.console.print(
            f"trial {slot.trial.number:<4}{ended}/{self.total}  {who}  {what}  {so_far}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        """A bar on a terminal; elsewhere the lines say it."""
        if not self.console.is_terminal:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        with Progress(TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self.console) as bar:
            task = bar.add_task("sweep", total=self.total)
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def suppress_experimental() -> Iterator[None]:
    """Optuna warns of each experimental argument."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """The sweep folder, made where it is missing, for us alone. RunError where it holds something else, or another sweep runs."""
    make_folder(folder)
    there = {p.name for p in folder.iterdir() if not LEFTOVER.fullmatch(p.name)}
    if there - {"lock", "lock.pid"} and "sweep.db" not in there:
        raise RunError(f"{folder}: is not empty and holds no sweep (it holds {', '.join(sorted(there)[:3])})", "name another --out")
    try:
        with Run(folder.absolute()).lock():
            yield
    except RunError as fault:
        if "another process is writing" in fault.what:
            raise RunError(
                fault.what.replace("writing this run", "running this sweep"), "wait for it, stop it, or name another --out"
            ) from None
        raise
