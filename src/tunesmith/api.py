"""Every verb as a plain function, for a notebook or a script; the command line only parses and prints.

    import tunesmith
    tunesmith.check("run.yaml").print()
    tunesmith.plan("run.yaml", gpu="4090").print()
    run = tunesmith.train("run.yaml", "train.epochs=1")
    tunesmith.generate(run.path, ["What is the capital of France?"])

`config` is a run file, a dict of its keys, or a RunConfig; overrides are `key.path=value`. torch is imported only by verbs that
compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.advice import Advice
    from tunesmith.compare.guard import Result as Guarded
    from tunesmith.compare.result import Result as Compared
    from tunesmith.data.mend.folder import Mended
    from tunesmith.data.report import CheckReport
    from tunesmith.devices import Device
    from tunesmith.diagnosis import Diagnosis
    from tunesmith.export import Exported
    from tunesmith.fits import Fits
    from tunesmith.plan import Plan
    from tunesmith.run import Run
    from tunesmith.sweep.result import Result

Config = str | Path | dict[str, Any] | RunConfig


def _load(config: Config, overrides: Sequence[str] = ()) -> RunConfig:
    from tunesmith.config.load import load

    return load(config, *overrides)


def _no_run_file(config: Config) -> bool:
    """Whether it is the rows themselves, or a model, and no run file."""
    is_path = isinstance(config, (str, Path))
    return is_path and not (Path(config).suffix in (".yaml", ".yml") or (Path(config) / "run.yaml").is_file())


def _load_or_data(config: Config, overrides: Sequence[str]) -> RunConfig:
    if _no_run_file(config):
        config = {"model": "embedded", "data": str(config), "method": "lora", "output": "runs/first"}
    return _load(config, overrides)


def _console(console: Console | None) -> Console:
    from rich.console import Console

    return console or Console(stderr=False)


def init(data: str | Path, *, model: str = "embedded", output: str = "runs/first", from_: str | Path | None = None) -> str:
    """A commented run file made from a look at `data`, or from an Axolotl or LLaMA-Factory YAML (`from_`). Returns its text.

    Raises DataError when the data cannot be read, ConfigError when the other tool's file cannot be.
    """
    if from_ is not None:
        from tunesmith.config.importers import from_file

        return from_file(from_).text
    from tunesmith.config.starter import look, starter
    from tunesmith.data.formats import detect
    from tunesmith.data.sources import rows

    return starter(look(data, rows, detect), model, output)


def explain(key: str = "") -> str:
    """What a setting does, what too high and too low look like, its name in Axolotl, TRL and Unsloth.

    ConfigError names the near key.
    """
    from tunesmith.config.explain import explain

    return explain(key)


def doctor() -> Diagnosis:
    """What this machine can do and which kernels a run takes, each with its reason: lines, `.print(console)` and `.healthy`."""
    from tunesmith.diagnosis import diagnose

    return diagnose()


def check(
    config: Config,
    *overrides: str,
    show: int | Sequence[int] | None = None,
    model: str | None = None,
    page: str | Path | None = None,
    console: Console | None = None,
) -> CheckReport:
    """What is in the data, what is wrong with it, what will be trained, and which rows were refused and why. Nothing is trained.

    `config` may be the data itself (a file or folder); `model` then names whose tokenizer and template to use. `show` picks rows to
    show as coloured tokens. `page` names the .html file with all of it; without it the page lies beside the prepared data.
    Returns a report with `.print(console)`, `.exit_code` and `.page`.
    """
    import datetime
    import functools

    from tunesmith.data.prepare import prepare
    from tunesmith.data.render import build_renderer
    from tunesmith.data.report import check_report
    from tunesmith.evaluate import check_page
    from tunesmith.hub import resolve_model

    target = check_page.place(page) if page else None  # before the rows are read: a slip of the pen is answered at once
    settings = _load_or_data(config, [*overrides, *([f"model={model}"] if model else [])])
    base = resolve_model(settings.model, weights=False)
    make = functools.partial(build_renderer, base.path, settings.data, settings.lora.new_tokens, datetime.date.today().isoformat())
    renderer = make()
    prepared = prepare(
        settings.data,
        make,
        renderer=renderer,
        seed=settings.seed,
        progress=_console(console),
        model=base.path,
        strict=False,
        look=True,
    )
    source = str(config) if isinstance(config, (str, Path)) else "run.yaml"
    rows = [show] if isinstance(show, int) else show or ()
    train, at_once = settings.train, settings.memory.micro_batch_tokens
    report = check_report(prepared, renderer, rows, train=train, seed=settings.seed, at_once=at_once, source=source)
    return replace(report, page=check_page.write(report, target or prepared.folder / "check.html"))


def prepare(
    config: Config,
    *overrides: str,
    out: str | Path,
    fix: str | Sequence[str] = (),
    split: str | None = None,
    split_by: str | None = None,
    seed: int | None = None,
    mix: bool = False,
    model: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Mended:
    """Write the rows mended and split into the folder `out`, with a record of every change; nothing is lost.

    `config` may be the data itself. `fix` names fixes (tunesmith.data.mend.FIXES; `safe`, `all`); without it nothing is mended but
    what reading mends. `split` is a share (`5%`) or a number of rows, `split_by` a key whose rows stay together or `date:KEY`.
    `mix` applies the sources' weights. Tokens are counted for a run file's model or `model`, else characters. Returns the folder
    and its record, with `.print(console)`.
    """
    from tunesmith.config.yaml12 import write
    from tunesmith.data import mend
    from tunesmith.data.mend.folder import Options, prepare_folder
    from tunesmith.data.mend.split import By, share_or_rows
    from tunesmith.hub import resolve_model

    settings, out = _load_or_data(config, [*overrides, *([f"model={model}"] if model else [])]), Path(out)
    size = settings.data.held_out if split is None else share_or_rows(split)
    has_file = isinstance(settings.data.held_out, str)
    if has_file and split is not None:
        raise ConfigError("--split beside a held-out file: nothing is split", "drop --split, or add data.held_out=0.05")
    options = Options(
        fixes=mend.chosen(fix, has_file),
        size=0 if isinstance(size, str) else size,
        by=By.parse(split_by) if split_by else None,
        seed=settings.seed if seed is None else seed,
        mix=mix,
        model=None if _no_run_file(config) and not model else resolve_model(settings.model, weights=False).path,
    )

    def run_yaml(held_out: bool) -> str:
        tree = settings.model_dump(mode="json", exclude_unset=True)
        rest = {k: v for k, v in tree["data"].items() if k not in ("train", "held_out")}
        tree["data"] = {"train": str(out / "train.jsonl"), "held_out": str(out / "held_out.jsonl") if held_out else 0, **rest}
        return f"# Made by tunesmith prepare. Next: tunesmith check {out / 'run.yaml'}\n{write(tree)}"

    return prepare_folder(settings.data, out, options, run_yaml, overwrite=overwrite, console=_console(console))


def plan(
    config: Config,
    *overrides: str,
    gpu: str | None = None,
    context: int | None = None,
    page: str | Path | None = None,
    probe: bool = False,
) -> Plan | Fits:
    """Will it fit, how long will it take, what to lower: memory per component from config.json alone, without torch or weights.

    `gpu` is a card's name, `24GB` or `cpu`; this machine's device without it. Row lengths come from `check`'s cache if any.
    `config` may be a model (a checkpoint folder, a folder with a config.json, a hub id): then each way to use it is planned for
    rows of `context` tokens (2,048, or the checkpoint's end). `page` names an .html file with the same. `probe` measures this
    machine's device first, which takes torch and a few seconds; its rates are kept, and every later plan here is made of them.
    """
    if probe and gpu:
        raise ConfigError("--probe measures this machine, --gpu plans for another card", "drop one of the two")
    if _no_run_file(config):
        if probe:
            raise ConfigError("--probe goes with a run file, not with a model", "name a run file")
        return _what_fits(str(config), overrides, gpu, context, page)
    from tunesmith.data.prepare import cached_lengths
    from tunesmith.devices import local_device, parse_device
    from tunesmith.hub import resolve_model
    from tunesmith.plan import make_plan, rates
    from tunesmith.spec import plan_spec

    if context is not None:
        raise ConfigError("--context goes with a model, not with a run file", "drop it, or set data.max_length")
    target = _page_at(page)
    settings = _load(config, overrides)
    base = resolve_model(settings.model, weights=False)
    device = parse_device(gpu) if gpu else local_device(settings.memory.device)
    if probe:
        _probe(settings, device)
    lengths = cached_lengths(settings.data, base.path, settings.seed)
    planned = make_plan(settings, plan_spec(base.path), lengths=lengths, device=device, measured=rates.kept(device))
    if target is None:
        return planned
    from tunesmith.evaluate import plan_page

    return replace(planned, page=plan_page.write(planned, target))


def _probe(settings: RunConfig, device: Device) -> None:
    """Measure the device and keep its rates."""
    from tunesmith.models.place import place
    from tunesmith.plan import rates
    from tunesmith.train.probe import measure

    rates.keep(measure(device, place(settings.memory)), device)


def _page_at(page: str | Path | None) -> Path | None:
    """Where a page may be written; ConfigError before any work where it may not."""
    from tunesmith.evaluate import check_page

    return check_page.place(page) if page is not None else None


def advice(config: Config, *overrides: str) -> list[Advice]:
    """What is questionable in a run file for its rows, with reasons and sources; empty for a model alone. At most three."""
    from tunesmith.advice import Job, advise
    from tunesmith.data.prepare import cached_lengths
    from tunesmith.hub import resolve_model
    from tunesmith.spec import plan_spec

    if _no_run_file(config):
        return []
    settings = _load(config, overrides)
    base = resolve_model(settings.model, weights=False)
    lengths = cached_lengths(settings.data, base.path, settings.seed)
    return advise(Job(settings, None if lengths is None else len(lengths), plan_spec(base.path).dim))


def _what_fits(model: str, overrides: Sequence[str], gpu: str | None, context: int | None, page: str | Path | None) -> Fits:
    from tunesmith.devices import local_device, parse_device
    from tunesmith.fits import what_fits
    from tunesmith.hub import resolve_model
    from tunesmith.spec import plan_spec

    settings = _load({"model": model, "data": "rows.jsonl", "method": "qlora", "output": "runs/first"}, overrides)
    device = parse_device(gpu) if gpu else local_device(settings.memory.device)
    found = what_fits(settings, plan_spec(resolve_model(model, weights=False, words=False).path), device, context)
    if (target := _page_at(page)) is None:
        return found
    from tunesmith.evaluate import fits_page

    return replace(found, page=fits_page.write(found, target))


def train(config: Config, *overrides: str, resume: bool = False, console: Console | None = None) -> Run:
    """Tune as the run file says; the result is a run folder: adapter (or model), metrics, checkpoints, report.html.

    `resume` goes on from the newest whole checkpoint, bit for bit on a CPU and in the GPU's deterministic mode. Raises DataError,
    ModelError, DoesNotFit before anything is trained; TrainingFailed rather than end a run that did not learn; Interrupted once all
    is saved.
    """
    settings = _load(config, overrides)  # before torch is imported: a slip of the pen is answered at once
    from tunesmith.run import Run
    from tunesmith.tuning import tune

    screen = _console(console)
    if resume and (Path(settings.output) / "run.yaml").exists():
        run = Run.open(settings.output)
        if run.status().state == "finished":
            raise RunError(
                f"{settings.output}: this run has finished", "name another `output` for a new run, or look at its report.html"
            )
    else:
        run = Run.create(settings.output, settings, command=sys.argv)
        if resume:
            screen.print(
                f"resume  there is no run in {settings.output} yet: this begins one", markup=False, highlight=False, soft_wrap=True
            )
        resume = False
    with run.lock():
        return tune(settings, run, resume=resume, console=screen)


def sweep(
    config: Config,
    *settings: str,
    trials: int | None = None,
    jobs: int = 1,
    seeds: int = 1,
    prune: bool = True,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Result:
    """Train with many settings and rank them by held-out loss: `lora.rank=8,16,64`, `train.learning_rate=1e-4..1e-3`.

    Lists alone: every combination; with a range, `trials` settings (20) that Optuna draws, beside the run file's own, which come
    first. `prune` stops at 25 and at 50 % of a run what is among the worse half there. `seeds` repeats each setting, `jobs` run at
    once. Each trial is a run folder in `out` (`<output>-sweep`). The same call goes on with a sweep that was stopped or killed.
    Returns the result: `.trials` best first, `.best` (a run file), `.print(console)`. Raises as `train` does; Interrupted once all
    is saved; TrainingFailed when every setting failed. Needs the `sweep` extra.
    """
    from tunesmith.sweep.result import finish, require_one
    from tunesmith.sweep.space import space
    from tunesmith.sweep.study import Options, Sweep, own_folder

    for name, value in (("trials", trials), ("jobs", jobs), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more", f"write --{name} 1, or drop it")
    found, axes = space(_load(config), settings)
    folder = Path(out) if out else Path(f"{found.output}-sweep")
    work = Sweep(found, axes, folder, Options(trials, jobs, seeds, prune), _console(console))
    work.check()
    with own_folder(folder):
        work.open()
        try:
            work.go()
        finally:
            result = finish(work)
    return require_one(result)


def compare(
    run: Config,
    *,
    docs: str | Path | None = None,
    system: str = "",
    shots: int = 4,
    passages: int = 4,
    rows: int = 100,
    arms: Sequence[str] = (),
    endpoint: str = "",
    endpoint_model: str = "",
    metrics: Sequence[str] = (),
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    guardrails: int = 60,
    scope: str = "",
    refusal: str = "",
    by: str = "",
    gold: str = "",
    forgetting: Sequence[str] = (),
    judge: str = "",
    judge_model: str = "",
    judge_rows: int = 50,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Compared:
    """Ask the same held-out questions of the base model, with a system prompt, with examples, with retrieved passages (`docs`), of
    the tuned one, and say which way is worth it. `run` is a run folder, or a run file (without a run nothing is tuned yet).

    `by` is a field of the rows that tables are made by; `gold` one that says which passages are right. `forgetting`: files or
    folders of texts or questions, or lm-eval:TASK, that the base and the tuned model are measured on beside the neutral text.
    `judge`: an address (with `judge_model`), a run or checkpoint folder, or a hub id; its preferences are told beside the metrics.

    `arms` empty: all that can be had. `metrics` empty: those that fit the rows; the first decides. `max_tokens` None: half as many
    again as the longest written answer has, 32 to 512. `guardrails` probes (0: none) are asked of every way too; `guard`
    says what they, `scope` and `refusal` are. Answers are kept in `out` (`compare` in the run folder) as they come; the same call
    goes on after a stop. Returns the result: `.recommended`, `.found` (compare.json), `.page`, `.print(console)`.
    """
    from tunesmith.compare.result import finish
    from tunesmith.compare.work import Options, open_source
    from tunesmith.compare.work import compare as ask

    options = Options(
        docs=Path(docs) if docs is not None else None, system=system, shots=shots, passages=passages, rows=rows, arms=tuple(arms),
        endpoint=endpoint, endpoint_model=endpoint_model, metrics=tuple(metrics), max_tokens=max_tokens, temperature=temperature,
        seed=seed, guardrails=guardrails, scope=scope, refusal=refusal, by=by, gold=gold,
        forgetting=tuple(map(str, forgetting)), judge=str(judge), judge_model=judge_model, judge_rows=judge_rows,
    )  # fmt: skip
    screen = _console(console)
    source = open_source(run, screen)
    return finish(ask(source, options, Path(out) if out is not None else source.folder, screen))


def guard(
    source: Config,
    *,
    probes: str | Path | None = None,
    docs: str | Path | None = None,
    base: bool = False,
    system: str = "",
    scope: str = "",
    refusal: str = "",
    limit: int | None = None,
    min_pass: float | Mapping[str, float] | None = None,
    max_tokens: int = 96,
    seed: int = 0,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Guarded:
    """Ask a model probes that try to lead it away from its instructions, and harmless ones that it must answer; say what it passes.

    `source` is a run folder (the tuned model; with `base` the one before tuning too), a run file, a checkpoint folder, a hub id or
    `embedded`. `probes`: our own suite, a .jsonl of yours, XSTest's or HarmBench's .csv, BIPIA's folder. `docs`: passages from an
    index or folder stand in every prompt. `scope` says what the assistant is for ("the Acme bicycle shop"): then off-topic lures
    are asked too. `refusal` is a pattern of your own way to refuse. `min_pass` is the least pass rate of all, or of kinds by name
    ('' is all); what falls below makes `.exit_code` 1. Raises as `compare` does. Returns the result: `.found` (guardrails.json),
    `.page`, `.print(console)`.
    """
    from tunesmith.compare.guard import finish
    from tunesmith.compare.work import Options, ask_probes, open_source
    from tunesmith.evaluate import guardrails

    minima = {"": min_pass} if isinstance(min_pass, (int, float)) else dict(min_pass or {})
    suite = Path(probes) if probes is not None else None
    there = {p.kind for p in guardrails.load(suite, seed=seed, scope=scope)} | ({"own"} if suite is None else set())
    guardrails.check_minima(minima, there)
    for name, value in (("limit", limit), ("max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more", f"write --{name} 1, or drop it")
    screen = _console(console)
    named = isinstance(source, (str, Path)) and _no_run_file(source)
    given = {"model": str(source), "data": "rows.jsonl", "method": "lora", "output": f"{Path(source).name}"} if named else source
    opened = open_source(_load(given) if named else source, screen, rows=not named)
    before, after = ("retrieval", "tuned+retrieval") if docs is not None else ("base", "tuned")
    names = [before] if opened.run is None else [before, after] if base else [after]
    options = Options(
        docs=Path(docs) if docs is not None else None, system=system, arms=tuple(names), seed=seed,
        guardrails=limit or 1_000_000, probes=suite, scope=scope, refusal=refusal,
    )  # fmt: skip
    folder = Path(out) if out is not None else opened.run.path / "guard" if opened.run else Path(f"{opened.name}-guard")
    found = ask_probes(opened, options, folder, screen, max_tokens)
    return finish(found, folder, opened.name, minima)


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    adapter: str | Path | None = None,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    raw: bool = False,
) -> list[str]:
    """Answer each prompt. `model` is a run folder, a checkpoint folder, a hub id or `embedded`; `adapter` a PEFT folder over it.

    A prompt is one user turn in the chat template; with `raw` it is continued as it stands. Temperature 0 is greedy.
    """
    from tunesmith.chat import Talker

    talker = Talker.open(model, adapter=adapter)
    return talker.answer(
        prompts, system=system, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, raw=raw
    )


def chat(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    console: Console | None = None,
) -> None:
    """Talk to a run folder, a checkpoint, or a checkpoint and an adapter, until /exit. The answer comes as it is made."""
    from tunesmith.chat import Talker, converse

    converse(
        Talker.open(model, adapter=adapter),
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        console=_console(console),
    )


def merge(run: str | Path, out: str | Path, *, onto: str = "auto") -> Path:
    """Write a standard Hugging Face folder with the adapter folded in. A QLoRA run is merged onto the dequantised 4-bit base it was
    trained over (`auto`, `nf4`), or onto the original weights (`dense`), which answers a little differently than what was trained.
    """
    from tunesmith.export.merged import merge_run

    return merge_run(Path(run), Path(out), onto=onto)


def export(
    run: str | Path,
    to: str | Sequence[str],
    *,
    quant: str = "q8_0",
    onto: str = "auto",
    out: str | Path | None = None,
    force: bool = False,
    push: str = "",
    console: Console | None = None,
) -> list[Exported]:
    """Write the run as other programs load it, and hold each against the live model in the program it is for.

    `to`: adapter, merged, gguf, gguf-lora, ollama, vllm, one or several. `quant` is that of GGUF files, `onto` the base as in
    `merge`. `out`: the folder (of several exports, the folder of their folders); `export` in the run folder without it. `push`:
    a hub repository for the one export. Returns one result each: `.path`, `.parity` (also parity.json), `.exit_code`. Raises
    ExportRefused for what is not what was trained, unless `force`, ExportFailed where some of several could not be written. Needs
    the `export` extra; without it nothing is verified.
    """
    from tunesmith.export import Options, export_run

    formats = [name.strip() for name in to.split(",") if name.strip()] if isinstance(to, str) else list(to)
    where = Path(out) if out is not None else None
    options = Options(quant=quant.lower(), onto=onto)
    return export_run(Path(run), to=formats, options=options, out=where, force=force, push=push, console=_console(console))


def report(run: str | Path) -> Path:
    """Draw report.html of a run folder again; returns its path."""
    from tunesmith.evaluate.report import write
    from tunesmith.run import Run

    return write(Run.open(run).path)


def serve(
    models: Sequence[str | Path] | str | Path,
    *,
    docs: str | Path | None = None,
    passages: int = 4,
    adapters: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | Path | None = None,
    allow_hosts: Sequence[str] = (),
    limits: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Answer over HTTP as OpenAI's API does, until it is stopped. The first of `models` is a run folder, a checkpoint, a hub id or
    `embedded`; others are runs or PEFT folders over the same base. `adapters`: a folder of such, loaded and dropped by name.

    `docs` is an index (`tunesmith docs add`): answers cite its passages. Open to this machine alone, with a token in a file that
    only its owner may read; another `host` needs `token_file`. `limits`: `batch`, `queue`, `cache` (bytes) ... of
    serve/engine.py. Raises as the loaders do; ConfigError for an address or token that cannot be; needs the `serve` extra.
    """
    from tunesmith.serve.start import library, run

    library()
    memory = None
    if (device, dtype) != ("auto", "auto"):
        memory = _load({"model": "embedded", "data": "-", "output": "-", "memory": {"device": device, "dtype": dtype}}).memory
    run(
        [models] if isinstance(models, (str, Path)) else models,
        docs=None if docs is None else Path(docs),
        passages=passages,
        adapters=None if adapters is None else Path(adapters),
        host=host,
        port=port,
        token=None if token_file is None else Path(token_file),
        allow_hosts=allow_hosts,
        limits=limits,
        memory=memory,
        kernels=kernels,
        say=say,
    )


def stream(model: str | Path, prompt: str, **settings: Any) -> Iterator[str]:
    """One answer, piece by piece. Settings are those of `generate`."""
    from tunesmith.chat import Talker

    adapter = settings.pop("adapter", None)
    yield from Talker.open(model, adapter=adapter).stream([{"role": "user", "content": prompt}], **settings)


__all__ = [
    "chat",
    "check",
    "compare",
    "doctor",
    "explain",
    "export",
    "generate",
    "guard",
    "init",
    "merge",
    "plan",
    "prepare",
    "report",
    "serve",
    "stream",
    "sweep",
    "train",
]
