"""Answers from a run folder, a checkpoint, or a checkpoint and an adapter: what chat, generate and the server share."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text
from torch import nn

from tunesmith import adapters, models
from tunesmith.config.schema import Memory
from tunesmith.data.render import Renderer, build_renderer
from tunesmith.errors import ConfigError, DataError, ModelError, RunError
from tunesmith.generate import Sampling, context, generate
from tunesmith.generate import stream as stream_ids
from tunesmith.hub import resolve_model
from tunesmith.models.place import place
from tunesmith.run import Run
from tunesmith.types import Message

try:
    import readline  # the arrow keys and earlier lines; Windows has its own
except ImportError:
    readline = None

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves, Ctrl-C ends an answer"
ADAPTER = "adapter_config.json"

Turn = Mapping[str, Any]  # {"role": ..., "content": ...}


@dataclass
class Talker:
    """A model with the renderer it was trained with."""

    model: nn.Module
    renderer: Renderer
    name: str
    ended: Literal["stop", "length", "context"] = "stop"
    """Why the last streamed answer ended: the model stopped, `max_tokens` were made, or its context was full."""

    @classmethod
    def open(cls, source: str | Path, *, adapter: str | Path | None = None, memory: Memory | None = None) -> Talker:
        """Load `source`: a run folder (base, store, template, weights as trained), a checkpoint folder, a hub id or `embedded`.

        `adapter` is a PEFT folder over a checkpoint; a tokenizer in it wins over the checkpoint's, and that of a run folder which
        it belongs to, template and all. Raises RunError for a run
        that has no result, ModelError and AdapterError as the loaders do.
        """
        folder = Path(source)
        if (folder / "run.yaml").is_file():
            if adapter is not None:
                raise RunError(f"{folder}: a run has its own adapter", "leave out --adapter, or name the base model, not the run")
            return cls._of_run(Run.open(folder), memory)
        if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
            base = adapters.storage.read_config(folder).get("base_model_name_or_path") or "its base model"
            raise ModelError(f"{folder}: an adapter, not a model", f"name the model it was trained on: {base} --adapter {folder}")
        try:
            base = resolve_model(source)
        except ModelError as e:
            near = "" if folder.exists() else Run.near(folder)
            raise ModelError(e.what, "; ".join(filter(None, (near, e.fix)))) from None
        where = place(memory or Memory())
        model = models.load(base.path, dtype=where.dtype, device=where.device)
        words = base.path
        if adapter is not None:
            adapters.load(model, Path(adapter))
            words = Path(adapter) if (Path(adapter) / "tokenizer.json").is_file() else base.path
            if words == base.path and (Path(adapter).parent / "run.yaml").is_file():
                return cls(model.eval(), renderer_of(Run.open(Path(adapter).parent)), base.name)
        return cls(model.eval(), build_renderer(words), base.name)

    @classmethod
    def _of_run(cls, run: Run, memory: Memory | None) -> Talker:
        config = run.config
        result = run.model / "config.json" if config.method == "full" else run.adapter / ADAPTER
        if not result.is_file():
            state = run.status().state
            fix = "wait until it has finished" if state == "running" else "finish it: tunesmith train RUN.yaml --resume"
            raise RunError(f"{run.path}: this run has no result yet, its state is {state}", fix)
        where = place(memory or config.memory)
        if config.method == "full":
            model = models.load(run.model, dtype=where.dtype, device=where.device)
        else:
            store = "nf4" if config.method == "qlora" else "dense"
            model = models.load(resolve_model(config.model).path, dtype=where.dtype, device=where.device, store=store)
            adapters.load(model, run.adapter)
        return cls(model.eval(), renderer_of(run), run.path.name)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None: no end."""
        return context(self.model)

    def raw(self, text: str) -> list[int]:
        """Ids of a text to be continued as it stands (`Renderer.continued`)."""
        return self.renderer.continued(text)

    def answer(self, prompts: Sequence[str], *, system: str | None = None, max_tokens: int = 256, temperature: float = 0.0,
               top_p: float = 1.0, top_k: int = 0, seed: int = 0, raw: bool = False) -> list[str]:  # fmt: skip
        """One answer a prompt, batched."""
        if raw and system:
            raise ConfigError("a raw prompt has no system message", "write it into the prompt, or leave out --raw")
        ids = [self.raw(p) if raw else self.renderer.prompt(_turns(p, system)) for p in prompts]
        sampling = Sampling(temperature, top_k, top_p, seed)
        found = generate(self.model, ids, stop_ids=sorted(self.renderer.stop_ids), max_tokens=max_tokens, sampling=sampling)
        return [self.renderer.tokenizer.decode(a, skip_special=True) for a in found]

    def stream(self, messages: Sequence[Turn], *, max_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0,
               top_k: int = 0, seed: int = 0) -> Iterator[str]:  # fmt: skip
        """The answer to a conversation, in pieces of whole characters that join to the decoded answer."""
        prompt = self.renderer.prompt(_messages(messages))
        text, stop = self.renderer.tokenizer.stream(), self.renderer.stop_ids
        sampling = Sampling(temperature, top_k, top_p, seed)
        made, self.ended = 0, "context"
        for _, token in stream_ids(self.model, [prompt], stop_ids=sorted(stop), max_tokens=max_tokens, sampling=sampling):
            made += 1
            if token in stop:
                self.ended = "stop"
            elif piece := text.push(token):
                yield piece
        if self.ended != "stop" and made >= max_tokens:
            self.ended = "length"
        if rest := text.flush():
            yield rest

    def fit(self, messages: Sequence[Turn], max_tokens: int) -> tuple[list[Turn], int]:
        """(the conversation without its oldest turns, how many went) so that an answer has room in the context: `max_tokens`, or a
        quarter of the context where that is less. System messages and the last question stay. Raises DataError where they alone
        are too long."""
        first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        system, turns, dropped = list(messages[:first]), list(messages[first:]), 0
        while (limit := self.context) is not None:
            length = len(self.renderer.prompt(_messages([*system, *turns])))
            if length + min(max_tokens, limit // 4) <= limit:
                break
            later = [i for i, m in enumerate(turns) if i and m["role"] == "user"]
            if later:
                turns, dropped = turns[later[0] :], dropped + 1
            elif length < limit:
                break  # a shorter answer
            else:
                what = f"the question has {length:,} tokens with its template, and the model's context holds {limit:,}"
                raise DataError(what, "ask something shorter")
        return [*system, *turns], dropped


def renderer_of(run: Run) -> Renderer:
    """What a run was trained with: its tokenizer and template, its date."""
    return build_renderer(run.tokenizer, run.config.data, date=run.manifest.get("date"), saved=True)


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [Message(m["role"], m["content"]) for m in turns]


def _turns(prompt: str, system: str | None) -> list[Message]:
    return [*([Message("system", system)] if system else []), Message("user", prompt)]


# ------------------------------------------------------------------ the terminal
def converse(talker: Talker, *, system: str | None, max_tokens: int, temperature: float, top_p: float, console: Console) -> None:
    """The terminal conversation. Ctrl-C ends an answer; at the prompt a second one in a row, Ctrl-D or /exit leaves."""
    history: list[Turn] = [{"role": "system", "content": system}] if system else []

    def note(text: str) -> None:
        console.print(Text(text, "dim"))

    note(f"Talking to {talker.name}\n{HELP}")
    for line in getattr(talker.model, "notes", ()):
        note(f"note: {line}")
    turn, leaving = 0, False
    while True:
        try:
            line = _ask(console)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            if readline is not None and readline.get_line_buffer():
                continue  # it took back what was typed
            if leaving:
                return
            leaving = True
            note("Ctrl-C again or /exit leaves")
            continue
        leaving, text = False, line.strip()
        if not text:
            continue
        if line.startswith("/"):
            command, _, rest = text.partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command == "/reset":
                history = [m for m in history if m["role"] == "system"]
                note("the conversation is forgotten")
            elif command == "/system":
                others = [m for m in history if m["role"] != "system"]
                history = [*([{"role": "system", "content": rest.strip()}] if rest.strip() else []), *others]
                note("the system message is set" if rest.strip() else "there is no system message now")
            else:
                note(f"{HELP}; put a space before a / that belongs to your text")
            continue
        turn += 1
        try:
            history, dropped = talker.fit([*history, {"role": "user", "content": text}], max_tokens)
            if dropped:
                turns = "turn no longer fits" if dropped == 1 else f"{dropped} turns no longer fit"
                note(f"the oldest {turns} in the model's context of {talker.context:,} tokens: forgotten")
            settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": turn}
            answer = _show(talker, talker.stream(history, **settings), max_tokens, console)
        except (DataError, ModelError) as e:
            console.print(Text(f"\n{e}", "red"), soft_wrap=True)
            if history and history[-1]["role"] == "user":
                history = history[:-1]
            continue
        if answer.strip():
            history = [*history, {"role": "assistant", "content": answer}]
        else:
            history = history[:-1]  # templates refuse an empty turn
            note("no answer; the question is forgotten")


def _show(talker: Talker, pieces: Iterator[str], max_tokens: int, console: Console) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it."""
    answer = ""
    console.print(Text.assemble(("model", "bold green"), "  "), end="")
    why = ""
    try:
        for piece in pieces:
            shown = piece if answer.strip() else piece.lstrip()
            answer += piece
            console.print(Text(_printable(shown)), end="", soft_wrap=True)
        if talker.ended == "length":
            why = f"stopped after {max_tokens:,} tokens; --max-tokens allows more"
        elif talker.ended == "context":
            why = f"stopped: the model's context of {talker.context:,} tokens is full"
    except KeyboardInterrupt:
        why = "stopped"
    console.print(Text(f" ({why})" if why else "", "dim"), soft_wrap=True)
    return answer


def _ask(console: Console) -> str:
    """A line from the person. readline must know the prompt's width, so it is given the colours in its own marks."""
    if readline is None or not console.is_terminal or console.no_color or "libedit" in (readline.__doc__ or ""):
        return console.input("[bold cyan]you[/]  ")
    return input("\001\033[1;36m\002you\001\033[0m\002  ")


def _printable(text: str) -> str:
    """A model may answer control characters, which would command the terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
