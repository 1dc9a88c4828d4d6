"""Exports: a run as other programs load it, each held against the live model in the program it is for before it counts as done.

    export_run(run, to=["merged", "gguf"], quant="q8_0", ...) -> [Exported]

    source.py                    a checked run, its weights tensor by tensor
    adapter.py, merged.py, vllm.py, ollama.py
    gguf.py                      the file, its quantisations, a LoRA adapter; gguf_model.py, gguf_words.py: what goes into it
    gguf_read.py                 a reader that trusts no size
    parity.py, runtimes/         the gate
    card.py, push.py             the model card, the hub

Torch is loaded with `export_run`, not with this module's import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ConfigError, ExportFailed, ExportRefused, Interrupted, RunError, TunesmithError
from tunesmith.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.export.parity import Live, Parity
    from tunesmith.export.source import Source


@dataclass(frozen=True)
class Options:
    """`quant` of GGUF files, `onto` the base the adapter is folded into (auto, nf4, dense), `stays`: nobody else is to get it."""

    quant: str = "q8_0"
    onto: str = "auto"
    stays: bool = True


@dataclass
class Artefact:
    """What an exporter wrote: how the gate loads it, and what a person should know of it."""

    job: dict[str, Any]
    runtime: str
    quant: str = ""  # '' for 16 and 32 bits of safetensors
    stops: list[int] | None = None  # what ends an answer, where the runtime cannot say
    notes: list[str] = field(default_factory=list)
    hints: Callable[[Path, str], list[str]] = lambda out, base: []  # commands that load it from `out`, over `base`
    aside: list[Path] = field(default_factory=list)  # made for the gate alone


@dataclass(frozen=True)
class Exporter:
    """A row of EXPORTERS. `write(source, folder, options)` fills `folder`."""

    write: Callable[[Source, Path, Options], Artefact]
    says: str


@dataclass(frozen=True)
class Exported:
    """One finished export. `exit_code` is 0 where it was verified, or kept by force."""

    to: str
    path: Path
    parity: Parity
    hints: tuple[str, ...] = ()
    forced: bool = False

    @property
    def exit_code(self) -> int:
        return 0 if self.parity.state in ("verified", "warned") or self.forced else 1


# ---- the exporters ---------------------------------------------------------------------------------------------------------------


def _adapter(source: Source, folder: Path, options: Options) -> Artefact:
    from importlib.util import find_spec

    from tunesmith.adapters import storage
    from tunesmith.export import adapter, vllm

    adapter.write(source, folder, stays=options.stays)
    config = json.loads((folder / storage.CONFIG).read_text("utf-8"))
    nf4 = source.run.config.method == "qlora" and find_spec("bitsandbytes") is not None
    job = {"adapter": str(folder), "base": str(source.base.path), "artefact": None, "nf4": nf4, "dtype": _word(source)}
    notes = []
    if source.run.config.method == "qlora" and not nf4:
        notes.append("loaded over the 16-bit base: bitsandbytes is not here, and the adapter was trained over 4 bits")
    if not source.hub_name and options.stays:
        notes.append("adapter_config.json names the base's folder on this machine; with --push it names none, and the card which")
    if faults := vllm.adapter_refusals(config):
        notes.append(f"vLLM serves no adapter with {', '.join(faults)}: export --to vllm, which folds it into the weights")
        return Artefact(job, "peft", notes=notes)
    if source.run.config.method == "qlora":
        notes.append(
            "vLLM's line lays it over the base's own weights, another model than was trained; --to vllm folds it into those it "
            "learned beside"
        )
    dtype = _word(source)
    return Artefact(job, "peft", notes=notes, hints=lambda out, base: [vllm.adapter_line(source.name, base, out, config, dtype)])


def _merged(source: Source, folder: Path, options: Options) -> Artefact:
    from tunesmith.export import merged

    merged.write(source, folder, options.onto)
    return Artefact({"artefact": str(folder)}, "transformers", hints=lambda out, base: [f"tunesmith chat {quote(str(out))}"])


def _vllm(source: Source, folder: Path, options: Options) -> Artefact:
    from tunesmith.export import parity
    from tunesmith.export.vllm import serve_options

    found = _merged(source, folder, options)
    serving = serve_options(source.name, folder)
    found.hints = lambda out, base: [f"vllm serve {quote(str(out))} {serving}"]
    if parity.missing("vllm"):
        found.notes.append("vLLM is not installed: checked in transformers, which loads the same files")
    else:
        found.runtime = "vllm"
    (folder / "serve.sh").write_text(f'vllm serve "$(dirname "$0")" {serving} "$@"\n', "utf-8")
    return found


def _gguf(source: Source, folder: Path, options: Options) -> Artefact:
    from tunesmith.export import gguf
    from tunesmith.export.gguf_read import read_gguf

    path = folder / f"{source.name}-{options.quant}{gguf.SUFFIX}"
    notes = gguf.write(source, path, options.quant, options.onto)
    keys = read_gguf(path).keys
    names = ("eos", "eot", "eom")
    stops = [keys[key] for name in names if (key := f"tokenizer.ggml.{name}_token_id") in keys]
    job = {"artefact": str(path)}
    hints = lambda out, base: [f"llama-server -m {quote(str(out / path.name))} --jinja"]  # noqa: E731
    return Artefact(job, "llama.cpp", options.quant, stops, notes, hints)


def _gguf_lora(source: Source, folder: Path, options: Options) -> Artefact:
    from tunesmith.export import gguf
    from tunesmith.export.gguf_read import read_gguf

    path = folder / f"{source.name}-lora{gguf.SUFFIX}"
    notes = gguf.write_adapter(source, path)
    base = folder / f".base{gguf.SUFFIX}"
    kind = "bf16" if _word(source) == "bfloat16" else "f16"
    gguf.write(source, base, kind, "dense" if options.onto == "auto" else options.onto, adapter=False)
    keys = read_gguf(base).keys
    stops = [keys[key] for name in ("eos", "eot", "eom") if (key := f"tokenizer.ggml.{name}_token_id") in keys]
    notes.append(f"it holds no words: tokenizer and template come from the base's GGUF; checked over one in {kind} with this run's")
    if source.run.config.method == "qlora":
        notes.append("this run learned over 4 bits, and a base's GGUF holds the original weights: --to gguf is closer")
    job = {"artefact": str(base), "adapter": str(path)}
    hints = lambda out, base: [f"llama-server -m BASE.gguf --lora {quote(str(out / path.name))} --jinja"]  # noqa: E731
    return Artefact(job, "llama.cpp", stops=stops, notes=notes, hints=hints, aside=[base])


def _ollama(source: Source, folder: Path, options: Options) -> Artefact:
    from tunesmith.export.gguf_read import read_gguf
    from tunesmith.export.ollama import modelfile

    found = _gguf(source, folder, options)
    path = Path(found.job["artefact"])
    keys = read_gguf(path).keys
    reach = keys[f"{keys['general.architecture']}.context_length"]
    (folder / "Modelfile").write_text(modelfile(path.name, source.renderer, reach), "utf-8")
    name = re.sub(r"[^\w.-]+", "-", source.name, flags=re.ASCII)
    found.hints = lambda out, base: [f"ollama create {name} -f {quote(str(out / 'Modelfile'))}", f"ollama run {name}"]
    found.notes.append("checked in llama.cpp, which Ollama runs; Ollama itself was not started")
    return found


def _word(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.")


EXPORTERS = Registry(
    "--to",
    {
        "adapter": Exporter(_adapter, "the PEFT adapter with tokenizer and template, checked in PEFT"),
        "merged": Exporter(_merged, "a Hugging Face folder, checked in transformers"),
        "gguf": Exporter(_gguf, "one GGUF file, checked in llama.cpp"),
        "gguf-lora": Exporter(_gguf_lora, "the adapter as a GGUF, checked in llama.cpp over its base"),
        "ollama": Exporter(_ollama, "a GGUF and a Modelfile, checked in llama.cpp"),
        "vllm": Exporter(_vllm, "a Hugging Face folder and the line that serves it, checked in vLLM where it is installed"),
    },
    group="exporters",
    error=RunError,
)
FOLDED = {"merged", "vllm", "gguf", "ollama"}  # formats with the adapter in the weights


# ---- the verb --------------------------------------------------------------------------------------------------------------------


def export_run(
    path: Path,
    *,
    to: Sequence[str],
    options: Options = Options(),
    out: Path | None = None,
    force: bool = False,
    push: str = "",
    console: Console,
) -> list[Exported]:
    """Write each format, hold it against the live model, keep it or not.

    `out`: the folder of one export; of several, the folder that gets one each. None: `export` in the run folder. A refused
    export is not kept and raises ExportRefused, once all have been tried, unless `force`. Raises RunError for a run without a
    result, ModelError for a model that a format cannot hold (of several formats ExportFailed, once all have been tried),
    MissingExtra for a format whose writer is not installed, ConfigError for a setting that a format does not take.
    """
    from tunesmith.export import parity
    from tunesmith.export.gguf import check_quant, the_package
    from tunesmith.export.push import check_login, check_name
    from tunesmith.export.source import open_run

    rows = [(name, EXPORTERS[name]) for name in dict.fromkeys(to)]
    if not rows:
        raise RunError("--to names no format", f"write one or several of {', '.join(EXPORTERS)}")
    if push:
        check_name(push)
        if len(rows) > 1:
            raise RunError("--push with several formats: a repository holds one", "export and push one at a time")
        check_login(push)
    names = {name for name, _ in rows}
    if options.quant != Options.quant and not names & {"gguf", "ollama"}:
        raise RunError(
            f"--quant {options.quant}: --to {', '.join(sorted(names))} is not quantised", "leave it out, or export --to gguf"
        )
    if options.onto != Options.onto and "adapter" in names:
        raise ConfigError(
            f"--onto {options.onto}: --to adapter is folded into no base", "leave --onto out, or export the adapter by itself"
        )
    options = replace(options, stays=not push)
    check_quant(options.quant)
    if names & {"gguf", "gguf-lora", "ollama"}:
        the_package()
    source = open_run(path)
    source.store(options.onto)
    if source.full and (none := names & {"adapter", "gguf-lora"}):
        raise RunError(f"{path}: method full has no adapter for --to {', '.join(sorted(none))}", "export --to merged or gguf")
    places = [_place(source, name, options, out, alone=len(rows) == 1) for name, _ in rows]
    console.print(f"live    {source.name}, as tunesmith chat loads it", markup=False, highlight=False, soft_wrap=True)
    with _bar(console, "asking the live model"):
        found = parity.live(source)
    other = None
    if names & FOLDED and source.run.config.method == "qlora":
        with _bar(console, "asking it over the other base"):
            other = _other_base(source, found, options.onto)
    done, refused, failed = [], [], []
    for (name, exporter), place in zip(rows, places, strict=True):
        try:
            result = _one(source, name, exporter, place, options, found, other, force, console)
        except Interrupted:
            raise
        except TunesmithError as fault:
            if len(rows) == 1:
                raise
            console.print(f"not written: {fault.what}", markup=False, highlight=False, soft_wrap=True)
            failed.append((name, fault))
        else:
            (done if result.parity.state != "refused" or force else refused).append(result)
    if push and done and done[0].parity.state not in ("verified", "warned"):
        console.print(f"kept, not pushed: it is {done[0].parity.state}", markup=False, soft_wrap=True)
    elif push and done:
        from tunesmith.export.push import push as upload

        console.print(f"pushed  {upload(done[0].path, push, what=f'{source.name} as {rows[0][0]}')}", markup=False, soft_wrap=True)
    why = [f"{r.to}: not what was trained: {'; '.join(r.parity.reasons)}" for r in refused]
    why += [f"{name}: {fault.what}" for name, fault in failed]
    fix = ["the files were not kept; --force keeps them all the same, with parity.json beside them"] if refused else []
    fix += dict.fromkeys(f"{name}: {fault.fix}" for name, fault in failed if fault.fix)
    if why:
        raise (ExportFailed if failed else ExportRefused)("\n".join(why), "; ".join(fix))
    return done


def _place(source: Source, name: str, options: Options, out: Path | None, *, alone: bool) -> Path:
    """Where it will lie: where nothing is, or an earlier export and nothing else. RunError elsewhere."""
    from tunesmith.export.merged import free_place, usable_place

    label = f"{name}-{options.quant}" if name in ("gguf", "ollama") else name
    place = usable_place(source.run.path / "export" / label if out is None else out if alone else out / label)
    if not (place / "parity.json").is_file():
        return free_place(place)
    try:
        written = json.loads((place / "manifest.json").read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return free_place(place)
    found = (p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir())
    if others := sorted(name for name in found if name not in written and name != "manifest.json"):
        raise RunError(f"{place}: beside an earlier export it holds {others[0]}", "move that away, or name a new folder")
    return place


def _one(source: Source, name: str, exporter: Exporter, place: Path, options: Options, found: Live,
         other: dict[str, Any] | None, force: bool, console: Console) -> Exported:  # fmt: skip
    from tunesmith.export import parity
    from tunesmith.export.card import card
    from tunesmith.files import folder_atomic
    from tunesmith.hub import licence_of

    class Refused(Exception):
        """Ends the folder that is being written."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    result = None
    try:
        with folder_atomic(place) as temp:
            say(f"\n{name}  {place}")
            with _bar(console, "writing") as source.tell:
                artefact = exporter.write(source, temp, options)
            with _bar(console, f"asking {artefact.runtime}") as tell:
                verdict = parity.check(
                    name, artefact.quant, artefact.runtime, found, source, artefact.job, stops=artefact.stops, tell=tell
                )
            for path in artefact.aside:
                path.unlink()
            verdict.notes += artefact.notes
            if other is not None and name in FOLDED:
                verdict.measured["other_base"] = other
                verdict.notes.append(
                    f"KL a token of the live model to the same adapter over {other['onto']}: {other['kl_mean']:.2g}"
                )
            verdict.print(console)
            base = source.hub_name or str(source.base.path)
            result = Exported(name, place, verdict, tuple(artefact.hints(place, base)), forced=force)
            if verdict.state == "refused" and not force:
                raise Refused
            verdict.save(temp)
            portable = artefact.hints(Path(place.name), source.hub_name or source.base.path.name)  # no path of this machine
            (temp / "README.md").write_text(card(source, name, verdict, portable, licence_of(source.origin)), "utf-8")
    except Refused:
        return result
    for hint in result.hints:
        say(f"next    {hint}")
    return result


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int | None], None]]:
    """On a terminal, what is being done, how far it is and how long it has taken; it goes when it ends."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _other_base(source: Source, found: Live, onto: str) -> dict[str, Any] | None:
    """How far the adapter of a QLoRA run over the base that it is not folded into is from the live model; None where that model has
    no room here. Measured with our own decoder: nothing is written for it.
    """
    import torch

    from tunesmith import adapters, models
    from tunesmith.chat import Talker
    from tunesmith.devices import local_device
    from tunesmith.export import parity
    from tunesmith.models.place import place

    store = "dense" if source.store(onto) == "nf4" else "nf4"
    where = place(source.run.config.memory)
    if where.device.type == "cpu" and store == "dense" and source.native:  # no error there: the system would end the export
        with source.opened(store) as weights:
            needed = sum(map(prod, weights.shapes.values())) * where.dtype.itemsize
        if needed > local_device("cpu").free:
            return None
    try:
        model = models.load(source.base.path, dtype=where.dtype, device=where.device, store=store)
        adapters.load(model, source.run.adapter)
        kl = parity.divergence_of_models(found, Talker(model.eval(), source.renderer, source.name))
    except torch.OutOfMemoryError:
        return None
    words = {"dense": "the original weights (--onto dense)", "nf4": "the 4-bit base (--onto nf4)"}
    return {"onto": words[store], "kl_mean": kl}
