"""Answers held to JSON or a JSON schema: before each token, which tokens may come. llguidance (the `serve` extra) knows.

Numbers of a grammar are the tokenizer's own; a model's vocabulary may be padded beyond them, and those rows never come.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import DataError, MissingExtra, install
from tunesmith.tokenizer import Tokenizer

ANY = {"type": "object"}  # response_format json_object
SYMBOLS = 50_000  # of a grammar: 5,000 properties; ten times as many are half a second to build and half a second a mask
HOLD, GAIN = 0.1, 0.005  # seconds that a question's masks may take at once, and what each of them earns again; most take 0.1 ms
STARVED = 1.0  # seconds by the clock, where a busy machine lets them work less than that


class Grammars:
    """The schemas of one tokenizer. `stops`: tokens that end an answer once its JSON is whole."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[int]):
        try:
            import llguidance
        except ImportError:
            raise MissingExtra("answers in JSON need llguidance", install("serve")) from None
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer.backend.to_str(), eos_token=sorted(stops))
        self._limits = llguidance.LLParserLimits(max_grammar_size=SYMBOLS)

    def compile(self, schema: Mapping[str, Any]) -> Any:
        """The grammar of a schema, for `follow`. Raises DataError with the reason where the schema is none, or holds what is not
        supported. Its first mask is made here, where nobody but its own client waits."""
        library = self._library
        try:
            text = library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
            matcher = library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
            if not matcher.is_error():
                matcher.compute_bitmask()
            fault = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RecursionError, TypeError) as e:
            fault = str(e)
        if fault:
            raise DataError(f"the JSON schema cannot be followed: {_first(fault)}", "write it with fewer keywords, or leave it out")
        return matcher

    def follow(self, grammar: Any, patience: Patience | None = None) -> Follower:
        """`patience`: shared by the answers to one question; the copy costs 0.1 ms and has the first mask."""
        return Follower(grammar.deep_copy(), self._tokenizer.vocab_size, patience or Patience())


class Patience:
    """What the answers to one question share: the processor time that their masks may still take, and the matcher's own lock, which
    a copy of it has too. Processor time, because a thread on a busy machine may wait for its turn longer than it works."""

    def __init__(self):
        self.left, self.lock = HOLD, threading.Lock()
        self._work: tuple[int, float] | None = None  # the clock of the thread that works for one of them now, and when it began

    @contextmanager
    def working(self) -> Iterator[None]:
        """The body is one mask: no other of this question's is made meanwhile, and what it takes is counted."""
        with self.lock:
            self.check()  # who came after the end need not begin
            start = time.thread_time()
            if hasattr(time, "pthread_getcpuclockid"):  # else by `STARVED` alone
                self._work = time.pthread_getcpuclockid(threading.get_ident()), start
            try:
                yield
            finally:
                self._work = None
                self.left = min(HOLD, self.left - (time.thread_time() - start) + GAIN)

    def wait(self, come: Callable[[float], bool]) -> None:
        """Until `come(seconds)`, which waits so long at most, is true. Raises as `check`."""
        self.check()
        end = time.perf_counter() + STARVED
        while not come(HOLD / 5):
            if self._worked() >= self.left or time.perf_counter() > end:
                self.left = -math.inf
            self.check()

    def check(self) -> None:
        """Raises DataError where patience is at an end."""
        if self.left <= 0:
            raise DataError("the JSON schema stopped working: it takes too long to find out what may come next",
                            "write it with fewer alternatives and optional properties")  # fmt: skip

    def _worked(self) -> float:
        work = self._work
        return 0.0 if work is None else time.clock_gettime(work[0]) - work[1]


class Follower:
    """One answer on its way through a grammar. What may come next is found on a thread of its own, from the moment that a token is
    taken: with a schema made for it that takes half a second, and the engine's thread waits for HOLD at most, once a question."""

    def __init__(self, matcher: Any, width: int, patience: Patience):
        self._matcher, self._width, self._patience = matcher, width, patience
        self.done = self.whole = False  # whether nothing more may come; whether what was taken is a whole value
        self._begin()

    def _begin(self) -> None:
        self._mask: Future[Tensor] = _threads().submit(self._find)

    def _find(self) -> Tensor:
        with self._patience.working():
            mask = self._matcher.compute_bitmask()  # without Python's lock
            self._check()
        bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
        return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: self._width].bool()

    def _come(self, seconds: float) -> bool:
        try:
            self._mask.exception(seconds)
        except TimeoutError:
            return False
        return True

    def allowed(self) -> Tensor:
        """bool [V]: what may come next. Raises DataError where the grammar has failed (too large, a limit), and where its masks
        take too long."""
        self._patience.wait(self._come)
        self._patience.check()
        return self._mask.result()

    def take(self, token: int) -> None:
        """Raises as `allowed`."""
        lock = self._patience.lock  # which an answer beside this one may have
        self._patience.wait(lambda seconds: lock.acquire(timeout=seconds))
        try:
            self._matcher.consume_token(token)
            self._check()
            self.done, self.whole = self._matcher.is_stopped(), self._matcher.is_accepting()
        finally:
            lock.release()
        if not self.done:
            self._begin()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"the JSON schema stopped working: {_first(self._matcher.get_error())}", "write a simpler one")


@cache
def _threads() -> ThreadPoolExecutor:
    """One for each answer that is being written, so that a slow schema waits for itself alone."""
    return ThreadPoolExecutor(256, "tunesmith-mask")


def _first(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason was given"
