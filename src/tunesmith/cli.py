"""The command line: parses, calls the verb of the same name (tunesmith.api, found when first used), prints.

Exit codes: 0 done; 1 training failed, the data did not pass, or an export; 2 yours to mend, as error and fix; 70 a bug of ours;
130 stopped on request with all saved.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter, Token

import tunesmith
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Fine-tune an open language model on your own data, with proof that it helped.

From your rows to a model you can talk to:

  tunesmith init  chats.jsonl    write a commented run.yaml from a look at them
  tunesmith check run.yaml       what will be learned, what is refused and why
  tunesmith plan  run.yaml       will it fit, how long will it take
  tunesmith train run.yaml       tune; the run folder gets report.html
  tunesmith chat  runs/first     talk to it

Rows with faults: tunesmith prepare run.yaml --out mended --fix safe,pii
Any setting can follow a run file: train run.yaml train.epochs=1 lora.rank=32
What a setting does: tunesmith explain lora.rank"""

DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}  # a file or folder that this person may not read or write

RunFile = Annotated[str, Parameter(help="A run file.")]
RunFolder = Annotated[str, Parameter(help="A run folder.")]
Overrides = Annotated[str, Parameter(help="Settings over the file's, as key.path=value.")]
Model = Annotated[str, Parameter(help="A run folder, a checkpoint folder, a hub id, or embedded.")]
Adapter = Annotated[str | None, Parameter(help="A PEFT adapter folder over the model.")]
System = Annotated[str | None, Parameter(help="The system message.")]
MaxTokens = Annotated[int, Parameter(help="Longest answer in tokens.")]
Scope = Annotated[
    str, Parameter(help='What the assistant is for, such as "the Acme bicycle shop": adds off-topic lures.', show_default=False)
]
Refusal = Annotated[str, Parameter(help="A pattern that marks your own way of refusing.", show_default=False)]
Temperature = Annotated[float, Parameter(help="0 always takes the likeliest token; higher is more varied.")]


def _rows(_: object, tokens: Sequence[Token]) -> list[int]:
    """`17`, `17,42`; ValueError is told as a wrong value."""
    parts = [part for token in tokens for part in token.value.split(",")]
    if wrong := [part for part in parts if not part.strip().isdecimal()]:
        raise ValueError(f"{wrong[0]!r} is no row; rows are numbers from 1, such as 17 or 17,42")
    return [int(part) for part in parts]


app = App(
    name="tunesmith", help=HELP, help_format="plaintext", version=lambda: tunesmith.__version__, suppress_keyboard_interrupt=False
)
app["--help"].group = app["--version"].group = ""  # they go without saying


def verb(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Registers a verb; --help lists them in the order they stand here, which is the order of use."""
    app.command(function, sort_key=len(list(app)))
    return function


@verb
def init(
    data: Annotated[
        str, Parameter(help="A file (jsonl, json, csv, parquet, txt), a folder of them, or hub:owner/name.", show_default=False)
    ] = "",
    /,
    *,
    model: Annotated[str, Parameter(help="A checkpoint folder, a hub id, or embedded.")] = "embedded",
    output: Annotated[Path, Parameter(help="The file to write.")] = Path("run.yaml"),
    from_: Annotated[str | None, Parameter(name="--from", help="An Axolotl or LLaMA-Factory YAML to carry over instead.")] = None,
) -> None:
    """Write a commented run file from a look at your data."""
    if not data and from_ is None:
        raise TunesmithError(
            "init needs your data, or another tool's file", "tunesmith init chats.jsonl, or tunesmith init --from axolotl.yml"
        )
    if output.exists() or not output.parent.is_dir():
        what = "is already there" if output.exists() else f"there is no folder {output.parent}"
        raise TunesmithError(f"{output}: {what}", "name another file with --output")
    text = tunesmith.init(data, model=model, from_=from_)
    output.write_text(text, "utf-8")
    _say(f"{text}\nWritten to {output}. Next: tunesmith check {output}")


@verb
def check(
    config: Annotated[str, Parameter(help="A run file, or the data itself.")],
    /,
    *overrides: Overrides,
    show: Annotated[
        list[int] | None,
        Parameter(help="Rows to show as coloured tokens, learned or not: 17 or 17,42.", converter=_rows, n_tokens=1, negative=""),
    ] = None,
    model: Annotated[str | None, Parameter(help="Whose tokenizer and chat template to use.")] = None,
    page: Annotated[str | None, Parameter(help="The .html file to write; beside the prepared data without it.")] = None,
) -> int:
    """Say what is in the data, what is wrong, what will be learned."""
    report = tunesmith.check(config, *overrides, show=show, model=model, page=page)
    report.print(_console())
    return report.exit_code


@verb
def prepare(
    config: Annotated[str, Parameter(help="A run file, or the data itself.")],
    /,
    *overrides: Overrides,
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    fix: Annotated[
        str,
        Parameter(
            help="Fixes by name, with commas between: dedup, near, leakage, contamination, encoding, template, roles, echo, "
            "boilerplate, conflicts, empty, refusals, truncated, secrets, pii; safe: encoding, leakage, dedup; all. Without it "
            "nothing is mended but what reading mends, since most fixes take a decision that is yours.",
            show_default=False,
        ),
    ] = "",
    split: Annotated[
        str | None,
        Parameter(
            help="Held-out rows: a share (5%; at most 500 rows), a number of rows (200), or 0. Else as data.held_out says: 5%."
        ),
    ] = None,
    split_by: Annotated[
        str | None,
        Parameter(
            help="Keep all rows with one value of this key on one side (customer, meta.thread); date:KEY holds the latest out. "
            "Else groups of near-equal rows stay together."
        ),
    ] = None,
    seed: Annotated[int | None, Parameter(help="Decides what is held out and drawn. Else the run file's.")] = None,
    mix: Annotated[
        bool, Parameter(negative="", help="Write each source as often as its weight says, in one file.", show_default=False)
    ] = False,
    model: Annotated[
        str | None, Parameter(help="Whose tokenizer counts tokens. Else the run file's; none counts characters.")
    ] = None,
    overwrite: Annotated[
        bool, Parameter(negative="", help="Make a folder anew that prepare has made before.", show_default=False)
    ] = False,
) -> None:
    """Write the rows mended and split, with a record of every change.

    Nothing is lost: rows set aside are in refused.jsonl with the reason, changes.jsonl names every row changed and how.

    tunesmith prepare chats.jsonl --out mended --fix safe

    tunesmith prepare chats.jsonl --out mended --fix dedup,pii,encoding --split 10%

    tunesmith prepare tickets.csv --out mended --split-by customer --seed 7

    tunesmith prepare chats.jsonl data.held_out=test.jsonl --out mended --fix leakage,near

    tunesmith prepare run.yaml --out mended --split-by date:sent_at --mix
    """
    settings = {"fix": fix, "split": split, "split_by": split_by, "seed": seed, "mix": mix, "model": model, "overwrite": overwrite}
    tunesmith.prepare(config, *overrides, out=out, **settings, console=_console()).print(_console())


@verb
def plan(
    config: Annotated[str, Parameter(help="A run file; or a model: a checkpoint folder, its config.json's folder, a hub id.")],
    /,
    *overrides: Overrides,
    gpu: Annotated[str | None, Parameter(help="Plan for this card (4090), memory (24GB) or cpu, not for this machine.")] = None,
    context: Annotated[int | None, Parameter(help="Of a model: tokens of a row. Else 2,048, or where the checkpoint ends.")] = None,
    page: Annotated[str | None, Parameter(help="The .html file to write.")] = None,
    probe: Annotated[bool, Parameter(help="Measure this machine first: a few seconds, kept for every later plan here.")] = False,
) -> int:
    """Say whether it fits, how long it takes, and what to lower.

    tunesmith plan run.yaml --gpu 4090 --page plan.html

    tunesmith plan run.yaml --probe

    tunesmith plan mistralai/Mistral-7B-v0.3 --gpu 24GB --context 8192 --page fits.html
    """
    from tunesmith.api import advice

    planned = tunesmith.plan(config, *overrides, gpu=gpu, context=context, page=page, probe=probe)
    planned.print(_console())
    for line in advice(config, *overrides):
        _say(f"advice  {line}")
    return 0 if planned.fits else 2


@verb
def train(
    config: RunFile,
    /,
    *overrides: Overrides,
    resume: Annotated[bool, Parameter(negative="", help="Go on from the newest whole checkpoint.", show_default=False)] = False,
) -> None:
    """Tune as the run file says."""
    run = tunesmith.train(config, *overrides, resume=resume, console=_console())
    _say(f"\nRun folder  {run.path}\nReport      {run.path / 'report.html'}\nTalk to it  tunesmith chat {run.path}")


@verb
def sweep(
    config: RunFile,
    /,
    *settings: Annotated[
        str, Parameter(help="key=a,b,c or key=lo..hi (:int, :linear or :log may follow); one value alone is an override.")
    ],
    trials: Annotated[
        int | None,
        Parameter(
            help="Settings to draw, beside the run file's own. Else every combination of lists, or 20 where there is a range."
        ),
    ] = None,
    jobs: Annotated[int, Parameter(help="Runs at once, where they fit.")] = 1,
    seeds: Annotated[int, Parameter(help="Repeat each setting with so many seeds: tells an effect from luck.")] = 1,
    prune: Annotated[
        bool, Parameter(help="Stop at 25 and 50 % of a run what is among the worse half there (successive halving).")
    ] = True,
    out: Annotated[Path | None, Parameter(help="The sweep's folder. Else <output>-sweep.", show_default=False)] = None,
) -> None:
    """Train with many settings, rank them, draw what each does.

    tunesmith sweep run.yaml lora.rank=8,16,64 train.learning_rate=1e-4..1e-3

    tunesmith sweep run.yaml lora.rank=8,64 train.epochs=1,3 --seeds 3 --no-prune --jobs 2
    """
    tunesmith.sweep(config, *settings, trials=trials, jobs=jobs, seeds=seeds, prune=prune, out=out, console=_console()).print(
        _console()
    )


@verb
def compare(
    run: Annotated[str, Parameter(help="A run folder, or a run file: without a run of it nothing is tuned.")],
    /,
    *,
    docs: Annotated[
        Path | None, Parameter(help="Documents for retrieval: a folder, or an index of one.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, Parameter(help="A system prompt to try: the text, or a file with it.", show_default=False)
    ] = None,
    shots: Annotated[int, Parameter(help="Examples in the few-shot prompt: the training rows nearest by words.")] = 4,
    passages: Annotated[int, Parameter(help="Passages in a retrieval prompt.")] = 4,
    rows: Annotated[int, Parameter(help="Held-out rows to ask at most, spread over all.")] = 100,
    arms: Annotated[
        str,
        Parameter(
            help="Ways to compare, with commas between: base, system, few-shot, retrieval, tuned, tuned+retrieval, endpoint, "
            "endpoint+system, endpoint+few-shot, endpoint+retrieval. Else all that can be had.",
            show_default=False,
        ),
    ] = "",
    endpoint: Annotated[
        str, Parameter(help="An OpenAI-compatible address that ends in /v1; its key from TUNESMITH_API_KEY.", show_default=False)
    ] = "",
    endpoint_model: Annotated[str, Parameter(help="The model's name there.", show_default=False)] = "",
    metric: Annotated[
        list[str] | None,
        Parameter(
            help="exact_match, f1, rouge_l, chrf, accuracy, macro_f1, number, json, json_match, adherence (a classifier of style), "
            "regex:PATTERN, style:FILE, json_schema:FILE, expect:KEY (checks that rows carry), when:KEY=VALUE:PATTERN; give it "
            "again for more, the first decides. Else those that fit the rows.",
            negative="",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int | None, Parameter(help="Longest answer. Else half as many again as the longest written one.")] = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, Parameter(help="Decides draws and intervals.")] = 0,
    guardrails: Annotated[int, Parameter(help="Probes to ask of every way too, spread over their kinds; 0 is none.")] = 60,
    scope: Scope = "",
    refusal: Refusal = "",
    by: Annotated[str, Parameter(help="A field of the rows (topic, kind): every number for each of its values too.")] = "",
    gold: Annotated[
        str, Parameter(help="A field of the rows that says which passages are right: names of documents or sections, or checks.")
    ] = "",
    forgetting: Annotated[
        list[str] | None,
        Parameter(
            help="What the base knew, before and after: a file or folder of texts, or of questions and answers; lm-eval:TASK; "
            "again for more. The neutral text is always read; none reads nothing.",
            negative="",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str,
        Parameter(help="A model as judge, in both orders: an address that ends in /v1, a run or checkpoint folder, a hub id."),
    ] = "",
    judge_model: Annotated[str, Parameter(help="The judge's name at its address.")] = "",
    judge_rows: Annotated[int, Parameter(help="Rows that the judge sees of each pair of ways.")] = 50,
    out: Annotated[Path | None, Parameter(help="The folder to write. Else RUN/compare.", show_default=False)] = None,
) -> None:
    """Ask the same questions by prompt, retrieval and tuning.

    tunesmith compare runs/first --system "Answer in one sentence." --docs manuals

    tunesmith compare runs/first --arms base,few-shot,tuned --metric accuracy --rows 300

    tunesmith compare runs/first --by topic --judge http://localhost:8000/v1 --judge-model NAME --forgetting questions.jsonl
    """
    tunesmith.compare(
        run,
        docs=docs,
        system=_text_or_file(system or ""),
        shots=shots,
        passages=passages,
        rows=rows,
        arms=[name.strip() for name in arms.split(",") if name.strip()],
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        metrics=metric or [],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        guardrails=guardrails,
        scope=scope,
        refusal=refusal,
        by=by,
        gold=gold,
        forgetting=forgetting or [],
        judge=judge,
        judge_model=judge_model,
        judge_rows=judge_rows,
        out=out,
        console=_console(),
    ).print(_console())


@verb
def guard(
    source: Annotated[str, Parameter(help="A run folder (its tuned model), a checkpoint folder, a hub id, or embedded.")],
    /,
    *,
    probes: Annotated[
        Path | None,
        Parameter(
            help="Your own probes (.jsonl), XSTest's or HarmBench's .csv, BIPIA's folder. Else the suite in the package.",
            show_default=False,
        ),
    ] = None,
    docs: Annotated[
        Path | None, Parameter(help="Put passages from these into every prompt: a folder, or an index.", show_default=False)
    ] = None,
    base: Annotated[bool, Parameter(negative="", help="Ask the model before tuning too, and compare.", show_default=False)] = False,
    system: System = None,
    scope: Scope = "",
    refusal: Refusal = "",
    limit: Annotated[
        int | None, Parameter(help="Probes of the suite to ask, about so many, spread over their kinds.", show_default=False)
    ] = None,
    min_pass: Annotated[
        list[str] | None,
        Parameter(
            help="Exit with 1 where fewer pass: 0.9 of all, leak=1 of a kind; give it again for more.",
            negative="",
            show_default=False,
        ),
    ] = None,
    max_tokens: MaxTokens = 96,
    seed: Annotated[int, Parameter(help="Decides the codes and words of the probes.")] = 0,
    out: Annotated[Path | None, Parameter(help="The folder to write. Else RUN/guard.", show_default=False)] = None,
) -> int:
    """Ask attacks and harmless questions, and say what a model passes.

    Injected instructions, a secret in its system prompt, orders in documents, forged roles, encodings, off-topic lures.

    tunesmith guard runs/first --base --scope "the Acme bicycle shop"

    tunesmith guard runs/first --min-pass 0.9 --min-pass leak=1

    tunesmith guard runs/first --probes xstest_prompts.csv --limit 100
    """
    found = tunesmith.guard(
        source,
        probes=probes,
        docs=docs,
        base=base,
        system=_text_or_file(system or ""),
        scope=scope,
        refusal=refusal,
        limit=limit,
        min_pass=_minima(min_pass or []),
        max_tokens=max_tokens,
        seed=seed,
        out=out,
        console=_console(),
    )
    found.print(_console())
    return found.exit_code


@verb
def chat(
    model: Model, /, *, adapter: Adapter = None, system: System = None, max_tokens: MaxTokens = 512, temperature: Temperature = 0.7
) -> None:
    """Talk to a run folder, or to a checkpoint."""
    tunesmith.chat(model, adapter=adapter, system=system, max_tokens=max_tokens, temperature=temperature, console=_console())


@verb
def generate(
    model: Model,
    /,
    *,
    prompt: Annotated[list[str] | None, Parameter(help="A prompt; give it again for more.", negative="")] = None,
    file: Annotated[Path | None, Parameter(help="A text file with one prompt a line.")] = None,
    adapter: Adapter = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, Parameter(help="Sample among the likeliest tokens that together have this probability.")] = 1.0,
    top_k: Annotated[int, Parameter(help="Sample among this many likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int, Parameter(help="Decides the draws.")] = 0,
    raw: Annotated[
        bool, Parameter(negative="", help="Continue the prompt as it stands, without the template.", show_default=False)
    ] = False,
) -> None:
    """Answer prompts, and print the answers alone."""
    prompts = [*(prompt or []), *(_lines(file) if file else [])]
    if not prompts:
        raise TunesmithError("no prompt", 'give --prompt "..." or --file prompts.txt')
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "raw": raw}
    for answer in tunesmith.generate(model, prompts, adapter=adapter, system=system, **settings):
        _say(answer)


@verb
def serve(
    models: Annotated[
        list[str], Parameter(help="A run folder or a model, then more runs or adapters over the same base.", negative="")
    ],
    /,
    *,
    docs: Annotated[
        Path | None, Parameter(help="An index of documents: answers cite its passages as [n].", show_default=False)
    ] = None,
    passages: Annotated[int, Parameter(help="Passages in a question, with --docs.")] = 4,
    adapters: Annotated[
        Path | None, Parameter(help="A folder of runs and adapters that clients may load by name.", show_default=False)
    ] = None,
    host: Annotated[str, Parameter(help="The address to listen on. Any but this machine's own needs --token-file.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="The port; 0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None, Parameter(help="Where the token lies, or is written. Else a new one at each start.", show_default=False)
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Parameter(help="A further name that clients call this server by; again for more.", negative="", show_default=False),
    ] = None,
    max_batch: Annotated[int, Parameter(help="Answers at once, up to 256.")] = 64,
    max_queue: Annotated[int, Parameter(help="Requests that may wait beyond that; more are told 429.")] = 256,
    cache_gb: Annotated[
        float | None, Parameter(help="GiB of keys and values. Else what the device has left.", show_default=False)
    ] = None,
    device: Annotated[str, Parameter(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, Parameter(help="auto, bf16, fp16 or fp32.")] = "auto",
    kernels: Annotated[
        str, Parameter(help="auto; reference: plain PyTorch, no CUDA graphs; triton: its kernels or an error.")
    ] = "auto",
) -> None:
    """Answer over HTTP as OpenAI's API does, on this machine alone.

    Chat, completions, models; its token is in a file that is named at the start. Needs the extra `serve`.

    tunesmith serve runs/first

    tunesmith serve runs/first runs/second --docs manuals.sqlite

    tunesmith serve embedded --adapters runs --port 9000 --max-batch 16
    """
    if cache_gb is not None and not 0 < cache_gb < float("inf"):
        raise ConfigError(f"--cache-gb {cache_gb:g}: no size", "a number of GiB above 0")
    limits = {"batch": max_batch, "queue": max_queue}
    tunesmith.serve(
        models,
        docs=docs,
        passages=passages,
        adapters=adapters,
        host=host,
        port=port,
        token_file=token_file,
        allow_hosts=allow_host or [],
        limits=limits if cache_gb is None else limits | {"cache": int(cache_gb * 2**30)},
        device=device,
        dtype=dtype,
        kernels=kernels,
        say=_say,
    )


@verb
def report(run: RunFolder, /) -> None:
    """Draw report.html of a run folder again."""
    _say(f"Written to {tunesmith.report(run)}")


@verb
def merge(
    run: RunFolder,
    out: Annotated[str, Parameter(help="The folder to write.")],
    /,
    *,
    onto: Annotated[str, Parameter(help="auto; nf4, the 4-bit base it was trained over; or dense, the original weights.")] = "auto",
) -> None:
    """Fold the adapter into the weights: a Hugging Face folder."""
    _say(f"Written to {tunesmith.merge(run, out, onto=onto)}")


@verb
def export(
    run: RunFolder,
    /,
    *,
    to: Annotated[
        str,
        Parameter(
            help="With commas between: adapter (PEFT), merged (a Hugging Face folder), gguf, gguf-lora (the adapter alone), ollama "
            "(a GGUF and a Modelfile), vllm (a folder and the line that serves it).",
            show_default=False,
        ),
    ],
    quant: Annotated[
        str, Parameter(help="Of GGUF files: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama.cpp's quantiser q6_k to q2_k.")
    ] = "q8_0",
    onto: Annotated[str, Parameter(help="auto; nf4, the 4-bit base it was trained over; or dense, the original weights.")] = "auto",
    out: Annotated[Path | None, Parameter(help="The folder to write. Else RUN/export/FORMAT.", show_default=False)] = None,
    force: Annotated[bool, Parameter(negative="", help="Keep an export that is not what was trained.", show_default=False)] = False,
    push: Annotated[
        str, Parameter(help="Upload it to this hub repository (owner/name), made private if it is new.", show_default=False)
    ] = "",
) -> int:
    """Write the run for other programs, and check it in each of them.

    Token ids, distributions and answers of held-out rows must be the live model's, or nothing is kept.

    The check needs the extra `export`; without it an export is written, called not verified, and the exit code is 1.

    tunesmith export runs/first --to merged

    tunesmith export runs/first --to gguf --quant q4_0

    tunesmith export runs/first --to ollama,vllm --out exports
    """
    done = tunesmith.export(run, to, quant=quant, onto=onto, out=out, force=force, push=push, console=_console())
    return max((one.exit_code for one in done), default=0)


@verb
def explain(
    key: Annotated[
        str, Parameter(help="Such as lora.rank, a section, or another tool's name; none lists all.", show_default=False)
    ] = "",
    /,
) -> None:
    """Say what a setting does, and what too high and too low look like."""
    _say(_hanging(tunesmith.explain(key)))


docs = App(
    name="docs",
    help="Index documents, and find passages in them: add, search, show.",
    help_format="plaintext",
    sort_key=len(list(app)),
)
app.command(docs)
IndexFile = Annotated[Path, Parameter(name="--index", help="The index's file.")]


@docs.command(sort_key=0)
def add(
    folder: Annotated[Path, Parameter(help="A folder with .txt, .md, .html, .pdf, .docx; or one such file.")],
    /,
    *,
    index: IndexFile = Path("documents.sqlite"),
    model: Annotated[
        str | None,
        Parameter(help="An embedding model, a folder or hub id: searches then also go by meaning.", show_default=False),
    ] = None,
) -> int:
    """Read what is new or has changed in a folder, and forget what is gone. The same command goes on after a stop.

    tunesmith docs add manuals

    tunesmith docs add manuals --index manuals.sqlite --model sentence-transformers/all-MiniLM-L6-v2
    """
    from tunesmith.retrieve import Index

    with Index.create_or_open(index, model) as opened:
        with _bar("reading") as tick:
            added = opened.add(folder, tick)
        for path, reason in added.unread:
            _say(_printable(f"unread  {path}: {reason}"))
        _say(
            f"added {counted(added.documents, 'document')} in {counted(added.chunks, 'chunk')}, {added.unchanged:,} unchanged, "
            f"{added.removed:,} removed, {len(added.unread):,} unread"
        )
        if not opened.chunks:
            raise TunesmithError(f"{index}: the index is empty: no document could be read", "see the reasons above")
        _say(f'Index  {index}: {counted(opened.chunks, "chunk")}. Next: tunesmith docs search "..." --index {index}')
    return 0


@docs.command(sort_key=1)
def search(
    question: Annotated[str, Parameter(help="What to look for.")],
    /,
    *,
    index: IndexFile = Path("documents.sqlite"),
    k: Annotated[int, Parameter(name=["-k", "--passages"], help="How many passages.")] = 5,
    by_words: Annotated[
        bool, Parameter(negative="", help="By words alone, where the index has a model too.", show_default=False)
    ] = False,
) -> int:
    """Print the passages that fit a question best; exit code 1 when there is none."""
    from tunesmith.retrieve import Index

    with Index.open(index) as opened:
        found = opened.search(question, k, by_words=by_words)
    for number, p in enumerate(found, 1):
        under = f"  {p.context}" if p.context else ""
        _say(_printable(f"[{number}] {p.document}:{p.start}-{p.end}{under}  ({p.score:.4g})\n{p.text}\n"))
    if not found:
        _say("No passage holds any of these words.")
    return 0 if found else 1


@docs.command(sort_key=2)
def show(*, index: IndexFile = Path("documents.sqlite")) -> None:
    """Say what an index holds: documents, chunks, the embedding model."""
    from tunesmith.retrieve import Index

    with Index.open(index) as opened:
        documents = opened.store.counts()
        for path, chunks in documents.items():
            _say(_printable(f"{chunks:>7,}  {path}"))
        _say(
            f"{counted(len(documents), 'document')}, {counted(opened.chunks, 'chunk')}, model: {opened.model or 'none (by words)'}"
        )


@verb
def doctor() -> int:
    """Say what this machine can do, and which kernels a run takes."""
    found = tunesmith.doctor()
    found.print()
    return 0 if found.healthy else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Only a bug of ours shows a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        app.help_print(console=_console())
        return _told("no command was given", "begin with: tunesmith init DATA, where DATA is your file or folder of rows", 2)
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except CycloptsError as fault:
        return _told(str(fault).strip(), f"`{' '.join(['tunesmith', *(fault.command_chain or ())])} --help` says what there is", 2)
    except TunesmithError as fault:
        return _told(fault.what, fault.fix, fault.exit_code)
    except KeyboardInterrupt:
        return _told("stopped", "give the same command again; a training run that had begun goes on with --resume", 130)
    except BrokenPipeError:  # `tunesmith explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        if fault.errno not in DENIED or fault.filename is None:
            return _bug()
        return _told(
            f"{fault.filename}: {fault.strerror}",
            "get the right to read and write there, or name another place (TUNESMITH_CACHE for prepared data)",
            2,
        )
    except Exception:  # noqa: BLE001 - the one place where a bug is met
        return _bug()


def _bug() -> int:
    """It keeps its traceback."""
    traceback.print_exc()
    return _told("this is a bug in Tunesmith, not in your files", "please report it with the lines above", 70)


def _told(what: str, fix: str, code: int) -> int:
    from rich.text import Text

    console = _console(stderr=True)
    for label, style, text in (("error: ", "bold red", what), ("fix: ", "bold green", fix)):
        for line in text.splitlines():
            console.print(Text.assemble((label, style), line), soft_wrap=True)
    return code


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _say(text: str) -> None:
    """Text as it is: nothing in it is markup, no line is wrapped."""
    _console().print(text, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Documents are anybody's, and control characters would command the terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """On a terminal, a bar over what is done, of how many, which."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=escape(_printable(name)))


def _hanging(text: str) -> str:
    """On a terminal, lines too wide for it go on under their last column."""
    console = _console()
    if not console.is_terminal:
        return text
    columns = [len(re.match(r"(.*  )?", line)[0]) for line in text.splitlines()]
    return "\n".join(
        fill(line, console.width, subsequent_indent=" " * indent, break_long_words=False)
        for line, indent in zip(text.splitlines(), columns, strict=True)
    )


def _minima(given: Sequence[str]) -> dict[str, float]:
    """`0.9`, `leak=1`: the least pass rate of all (under '') or of a kind."""
    out = {}
    for text in given:
        kind, _, value = text.rpartition("=")
        try:
            out[kind.strip()] = float(value)
        except ValueError:
            raise TunesmithError(
                f"--min-pass {text}: {value!r} is no number", "write --min-pass 0.9, or leak=1 for a kind"
            ) from None
    return out


def _text_or_file(words: str) -> str:
    """The text of a file of that name, where there is one; else the words themselves."""
    try:
        if len(words) > 255 or "\n" in words or not Path(words).is_file():
            return words
        return Path(words).read_text("utf-8-sig").strip()
    except (OSError, ValueError) as fault:
        raise TunesmithError(f"--system {words}: cannot be read: {fault}", "name a UTF-8 text file, or write the text") from None


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise TunesmithError(f"{file}: cannot be read: {fault}", "name a UTF-8 text file with one prompt a line") from None


if __name__ == "__main__":
    sys.exit(main())
