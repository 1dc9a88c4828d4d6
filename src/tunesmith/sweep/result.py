"""What came of a sweep: ranked against the run file's own values, as sweep.json, a page, best.yaml and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.load import load
from tunesmith.config.yaml12 import write
from tunesmith.errors import RunError, TrainingFailed
from tunesmith.evaluate import sweep_page
from tunesmith.evaluate.statistics import t_interval
from tunesmith.files import write_atomic
from tunesmith.run import Run
from tunesmith.sweep.space import overrides, own, words
from tunesmith.sweep.study import Sweep, suppress_experimental

if TYPE_CHECKING:
    from rich.console import Console

ENOUGH = 8  # finished settings below which no importance is told
SHOWN = 20  # rows of the table in the terminal


@dataclass(frozen=True)
class Result:
    """A sweep that has ended. `best` is the run file with the best values, None when nothing finished; `found` is sweep.json."""

    folder: Path
    found: Mapping[str, Any]

    @property
    def best(self) -> Path | None:
        path = self.folder / "best.yaml"
        return path if path.exists() else None

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Best first; those that did not finish come last."""
        return list(self.found["trials"])

    def print(self, console: Console | None = None) -> None:
        from rich.console import Console

        _print(self, console or Console())


def gather(sweep: Sweep) -> dict[str, Any]:
    """sweep.json: the settings ranked, each with its losses by seed, its curve and its folders."""
    mine = own(sweep.config, sweep.axes)
    rows = [_row(sweep, trial, mine) for trial in sweep.trials("COMPLETE", "PRUNED", "FAIL")]
    baseline = next((row for row in rows if row["baseline"]), None)
    measured = baseline["tokens"] if baseline and baseline["state"] == "finished" else None
    for row in rows:
        row["ranked"] = row["state"] == "finished" and (measured is None or row["tokens"] == measured)
        row["difference"] = _difference(row, baseline) if row["ranked"] and baseline and measured else None
    rows.sort(key=lambda r: (not r["ranked"], r["state"] != "finished", r["state"] != "pruned", r["loss"] or math.inf, r["number"]))
    for place, row in enumerate(rows, 1):
        row["place"] = place if row["ranked"] else None
    found = {
        "format": 1, "metric": "held-out loss", "model": sweep.config.model, "method": sweep.config.method,
        "axes": [{"key": a.key, "values": list(a.values), "low": a.low, "high": a.high, "log": a.log, "own": mine[a.key]}
                 for a in sweep.axes],
        "seeds": sweep.seeds, "halving": sweep.options.prune, "total": sweep.total,
        "importance": _importance(sweep), "trials": rows,
    }  # fmt: skip
    return found | {"verdict": verdict(found)}


def _row(sweep: Sweep, trial: Any, mine: Mapping[str, str]) -> dict[str, Any]:
    attrs = trial.user_attrs
    setting = {**mine, **attrs.get("setting", {})}
    folders = sorted((sweep.folder / "trials").glob(f"{trial.number:03d}*/run.yaml"))
    curves = [_curve(path.parent) for path in folders]
    state = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
    losses = attrs.get("losses", [])
    return {
        "number": trial.number, "values": setting, "changes": attrs.get("setting", {}), "baseline": bool(attrs.get("baseline")),
        "state": state, "loss": trial.value, "losses": losses, "tokens": attrs.get("tokens", []),
        "seconds": sum(attrs.get("seconds", [])), "stopped_at": attrs.get("pruned_at"), "reason": attrs.get("reason", ""),
        "folders": [str(path.parent.relative_to(sweep.folder)) for path in folders], "curves": curves,
    }  # fmt: skip


def _curve(folder: Path) -> list[list[float]]:
    """[percent of the run, held-out loss] of each evaluation."""
    try:
        run = Run.open(folder)
        rows, steps = run.metrics(), max(1, run.status().steps)
    except RunError:
        return []
    found = [[100 * row["step"] / steps, row["loss"]] for row in rows if row["kind"] == "eval"]
    return [[round(x, 2), y] for x, y in found if math.isfinite(y)]


def _difference(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Against the run file's own values, seed by seed: the mean, and with two seeds or more its 95 % interval (Student's t)."""
    pairs = [a - b for a, b in zip(row["losses"], baseline["losses"], strict=True)]
    mean, low, high = t_interval(pairs)
    return {"mean": mean, "interval": [low, high] if len(pairs) > 1 and row is not baseline else None}


def _importance(sweep: Sweep) -> dict[str, float] | None:
    """PED-ANOVA (Watanabe, Bansal and Hutter 2023): each setting's part in what sets the best fifth apart."""
    done = [t for t in sweep.trials("COMPLETE") if t.params]
    if len(done) < ENOUGH or len(sweep.axes) < 2 or len({t.value for t in done}) < 2:
        return None
    optuna = sweep.optuna
    with suppress_experimental():
        try:
            found = optuna.importance.get_param_importances(
                sweep.study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.2),
                params=[a.key for a in sweep.axes],
            )  # fmt: skip
        except (ValueError, RuntimeError):  # a setting with one value among those that finished has no say
            return None
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def verdict(found: Mapping[str, Any]) -> list[str]:
    """In words: what won, by how much, and whether that is more than luck."""
    ranked = [row for row in found["trials"] if row["ranked"]]
    if not ranked:
        return ["no setting finished: nothing can be ranked"]
    best, seeds = ranked[0], len(found["seeds"])
    baseline = next((row for row in ranked if row["baseline"]), None)
    one_seed = "one seed each: a small difference may be luck; --seeds 3 in a new --out tells"
    if baseline is None:
        return [f"best: {words(best['changes'])}, loss {best['loss']:.4f}; the run file's own values did not finish"]
    if best is baseline:
        return [f"nothing beat the run file's own values: loss {best['loss']:.4f}", *([one_seed] if seeds == 1 else [])]
    mean, interval = best["difference"]["mean"], best["difference"]["interval"]
    ours, theirs = f"{best['loss']:.4f}", f"{baseline['loss']:.4f}"
    line = f"best: {words(best['changes'])}: loss {ours} against {theirs} of the run file's own values ({mean:+.4f})"
    if interval is None:
        return [line, one_seed]
    low, high = interval
    sure = "beyond the noise of seeds" if high < 0 else "within the noise of seeds: no better is shown"
    return [line, f"{sure}: 95 % interval {low:+.4f} to {high:+.4f} over {seeds} seeds, for the best of {len(ranked)}"]


def finish(sweep: Sweep) -> Result:
    """Write sweep.json, sweep.html and best.yaml."""
    found = gather(sweep)
    write_atomic(sweep.folder / "sweep.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    sweep_page.write(found, sweep.folder / "sweep.html")
    ranked = [row for row in found["trials"] if row["ranked"]]
    if ranked:
        best = load(sweep.config, *overrides(ranked[0]["changes"]))
        tree = best.model_dump(mode="json", exclude_unset=True)
        tree["output"] = f"{sweep.config.output}-best"
        said = words(ranked[0]["changes"]) or "the run file's own values"
        head = f"# The best of {len(ranked)} settings: {said} (held-out loss {ranked[0]['loss']:.4f}). Made by tunesmith sweep.\n"
        write_atomic(sweep.folder / "best.yaml", head + write(tree))
    return Result(sweep.folder, found)


def require_one(result: Result) -> Result:
    """Itself when a setting finished; else TrainingFailed with the first reason."""
    if any(row["ranked"] for row in result.trials):
        return result
    reason = next((row["reason"] for row in result.trials if row["reason"]), "every one was stopped early")
    raise TrainingFailed(f"all {len(result.trials)} settings failed; the first: {reason}", f"look into {result.folder / 'logs'}")


def _print(result: Result, console: Console) -> None:
    from rich.table import Table

    found = result.found
    keys = [axis["key"] for axis in found["axes"]]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("", "trial", *sweep_page.short(keys), "held-out loss", "difference"):
        shown.add_column(head, justify="right" if head in ("trial", "held-out loss", "difference") else "left", no_wrap=True)
    shown.add_column("", overflow="fold")
    for row in result.trials[:SHOWN]:
        shown.add_row(*cells(row, keys))
    console.print(shown)
    if len(result.trials) > SHOWN:
        console.print(f"{len(result.trials) - SHOWN} more in sweep.json", style="dim")
    if found["importance"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in found["importance"].items())
        console.print(f"what mattered  {shares}", highlight=False, markup=False, soft_wrap=True)
    for line in found["verdict"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nPage   {result.folder / 'sweep.html'}", highlight=False, markup=False, soft_wrap=True)
    if result.best:
        console.print(f"Train  tunesmith train {result.best}", highlight=False, markup=False, soft_wrap=True)


def cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """A row of the table: place, trial, values, loss, difference, a word."""
    loss = "-" if row["loss"] is None or row["state"] != "finished" else f"{row['loss']:.4f}"
    difference = "-" if row["difference"] is None or row["baseline"] else f"{row['difference']['mean']:+.4f}"
    return [
        str(row["place"] or "-"),
        str(row["number"]),
        *(str(row["values"][key]) for key in keys),
        loss,
        difference,
        sweep_page.word(row),
    ]
