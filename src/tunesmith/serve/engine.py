"""Continuous batching: one thread owns the model, and between two of its steps sequences join, leave, come back.

A step is one stream of tokens: one token for each sequence that is writing, and pieces of the prompts of those that have not begun,
at most `Limits.piece` tokens while others write, so that a long prompt does not hold them up. Sequences hold blocks of the cache
for the tokens that they have, not for those that they may get. When blocks run out the youngest sequence gives its own back and
waits; its tokens are computed again, and since a draw depends on the place alone, its answer stays the same.

On an NVIDIA GPU writing sequences and a few whole prompts are CUDA graphs (serve/recorded.py), and the next step is begun before
the last one's tokens are looked at (they stay on the card): text, stops and clients are dealt with while it computes. A sequence
that turns out to have ended has then computed one token for nothing.

Each row takes its own adapter (adapters/several.py): requests for different adapters share a step.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.adapters.several import Bank
from tunesmith.errors import AdapterError, ConfigError, DataError, DoesNotFit, ModelError, TunesmithError
from tunesmith.generate import context
from tunesmith.models import lean
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import linears
from tunesmith.models.paged import Part, Pass, Pool, bytes_per_block
from tunesmith.ops import backend
from tunesmith.ops.attention import to_device
from tunesmith.ops.paged import BLOCK
from tunesmith.serve.job import Busy, Chosen, Job, Missing, Piece, Reason
from tunesmith.serve.recorded import Graphs
from tunesmith.serve.sampling import Drawn, Row, nothing, sample

NAN = "the model's answers are nan: its weights are damaged, or its numbers too large for this dtype", "serve it in fp32"


MIN_PIECE = 32  # tokens of a prompt in a step, however slow the device


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch`: sequences at once. `queue`: how many more may wait. `piece`: tokens of prompts in a step in which others write,
    and fewer where a step would take longer than `pace` seconds; `prompts`: where nobody writes.
    `cache`: bytes of keys and values; None: what the device has left. `graphs`: record steps (GPU)."""

    batch: int = 64
    queue: int = 256
    piece: int = 2048
    prompts: int = 4096
    pace: float = 0.2
    cache: int | None = None
    graphs: bool = True

    @classmethod
    def on(cls, device: torch.device, **more: Any) -> Limits:
        """Defaults of a device."""
        return cls(**({"piece": 512, "prompts": 512} if device.type == "cpu" else {}) | more)


@dataclass(eq=False)
class Answer:
    """One answer on its way. `ids`: prompt and what is known of the answer; `held`: how many tokens the cache holds."""

    job: Job
    adapter: int
    room: int  # tokens the answer may have
    ids: list[int]
    held: int = 0
    blocks: list[int] = field(default_factory=list)
    made: int = 0
    ahead: bool = False  # its next token is computed, and known to the device alone
    place: int = 0  # of that token among the last step's
    ended: Reason | None = None
    text: Any = None
    unsaid: str = ""  # text that may turn out to begin a stop
    tokens: list[Chosen] = field(default_factory=list)  # whose text is in `unsaid`
    follower: Any = None
    row: int = -1  # in the engine's table of blocks
    long: bool = False  # what it holds was computed under longrope's long table
    cancelled: bool = False

    @property
    def pending(self) -> int:
        """Tokens that the cache lacks; with one `ahead`, that one."""
        return len(self.ids) + self.ahead - self.held


class Handle:
    """A client's hold on its answer."""

    def __init__(self, engine: Engine, sequence: Answer):
        self._engine, self._sequence = engine, sequence

    def cancel(self) -> None:
        """Ends it at the next step; its blocks are free then. Harmless when it has ended."""
        self._engine._cancel(self._sequence)


@dataclass(slots=True)
class _Step:
    """What was computed: the sequences whose next token it holds, in order."""

    sequences: list[Answer]
    drawn: Drawn
    device_tokens: Tensor
    begun: float  # by perf_counter
    tokens: int  # that went in
    writers: int  # of them


class Engine:
    """Serves `model`, a Decoder, alone and with adapters. `start` begins the thread, `close` ends it; a context manager.

    `base`: the name of the model without adapters. Raises ModelError for a model that has no blocks to cache in (transformers'),
    DoesNotFit where the cache has no room.
    """

    def __init__(self, model: nn.Module, *, base: str = "", limits: Limits | None = None, ahead: bool | None = None):
        if not isinstance(model, Decoder):
            raise ModelError("this model runs through transformers, which has no cache that requests could share",
                             "serve a native family (README, Limits), or this one with transformers serve or vLLM")  # fmt: skip
        self.model, self.device, self.base = model.eval().requires_grad_(False), model.device, base
        self.limits = limits or Limits.on(self.device)
        if not 1 <= self.limits.batch <= Graphs.SIZES[-1]:
            raise ConfigError(f"{self.limits.batch} sequences at once", f"from 1 to {Graphs.SIZES[-1]}")
        self.dtype = model.model.norm.weight.dtype
        self.switch = model.spec.rope.switch
        self.bank = Bank(model)
        self.lean: lean.Lean | None = None
        self.context = context(model)
        self.notes: list[str] = []
        self.ahead = self.device.type == "cuda" if ahead is None else ahead
        self._settle_path()
        self.pool = self._new_pool()
        self._reach = min(self.context or 1 << 30, self.pool.blocks.count * BLOCK)  # tokens of the longest sequence
        self._tables = np.zeros((self.limits.batch, -(-self._reach // BLOCK)), np.int32)
        self._rows = list(range(self.limits.batch))  # of the table that are free
        self._graphs = Graphs(self) if self._records() else None
        self._inbox: deque[Callable[[], None]] = deque()
        self._waiting: deque[Answer] = deque()
        self._live: list[Answer] = []
        self._last: _Step | None = None
        self._count = 0  # submitted and not ended
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), False
        self._thread: threading.Thread | None = None
        self._deaf = False  # the thread has looked into its inbox for the last time
        self._fault: BaseException | None = None
        self.steps = self.tokens = self.preempted = 0
        self._rate = 0.0  # seconds a token of the last steps with prompts in them
        self._came = 0.0  # when the last step's tokens came, by perf_counter

    # ---- for any thread

    def start(self) -> Engine:
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after its step; answers on their way end as cancelled."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def submit(self, *jobs: Job) -> list[Handle]:
        """All or none. Raises Busy beyond the queue; DataError for a prompt without a token or too long for context or cache."""
        sequences = [self._sequence(job) for job in jobs]
        with self._lock:
            self._hears()
            if self._count + len(jobs) > self.limits.batch + self.limits.queue:
                raise Busy(f"{self._count} requests are running or waiting, and no more may wait", self._patience())
            self._count += len(jobs)
            self._inbox.append(lambda: self._admit(sequences))
        self._wake.set()
        return [Handle(self, sequence) for sequence in sequences]

    def call(self, function: Callable[[], Any], timeout: float = 600.0) -> Any:
        """Run `function` on the engine's thread between two steps, and answer what it answers. The door for adapters."""
        if self._thread is None:
            return self._with_adapters(function)
        done, out = threading.Event(), {}

        def order() -> None:
            try:
                out["value"] = self._with_adapters(function)
            except Exception as e:  # noqa: BLE001 - it is raised where it was asked for
                out["error"] = e
            done.set()

        with self._lock:
            self._hears()
            self._inbox.append(order)
        self._wake.set()
        if not done.wait(timeout):
            raise ModelError("the engine did not answer", "see its log")
        if "error" in out:
            raise out["error"]
        return out["value"]

    def _hears(self) -> None:
        """With the lock held: whoever puts something into the inbox must know that the thread will still look into it."""
        if self._deaf or self._closing:
            raise ModelError(f"the engine has stopped: {'it was closed' if self._fault is None else type(self._fault).__name__}",
                             "start the server again; its log has more")  # fmt: skip

    def load(self, name: str, folder: Any) -> None:
        self.call(lambda: self.bank.load(name, folder))

    def adopt(self, name: str) -> None:
        """The adapter that is on the model already gets a name; before the first request."""
        self.call(lambda: self.bank.adopt(name))

    def drop(self, name: str) -> None:
        """Answers of this adapter that are on their way end as cancelled."""

        def work() -> None:
            number = self.bank.number(name)
            for sequence in [s for s in (*self._live, *self._waiting) if s.adapter == number]:
                self._end(sequence, "cancelled")
            self._sweep()
            self.bank.drop(name)

        self.call(work)

    @property
    def free(self) -> int:
        """Sequences that could join now without waiting; all of `limits.batch` when nothing runs."""
        return self.limits.batch - len(self._live)

    def state(self) -> dict[str, int]:
        """Numbers for /health and tests."""
        blocks = self.pool.blocks
        return {
            "alive": self._fault is None and not self._closing,
            "running": len(self._live),
            "waiting": len(self._waiting) + len(self._inbox),
            "blocks": blocks.count,
            "free_blocks": blocks.free,
            "steps": self.steps,
            "tokens": self.tokens,
            "preempted": self.preempted,
        }

    # ---- set-up

    def _settle_path(self) -> None:
        """The lean path where it can, the composed one elsewhere; called again when adapters come and go."""
        reason = lean.refusal(self.model) or ("" if self.bank.plain else "an adapter is more than a low-rank product")
        if reason:
            self.lean = self.lean if self.lean and self.bank.plain else None
            self.notes = [f"layers one operation at a time: {reason}"]
        else:
            self.notes = []
            if self.lean is None:
                self.lean = lean.Lean(self.model)
        if self.lean is not None:
            for block, groups in zip(self.model.model.layers, self.lean.groups, strict=True):
                for group, modules in zip(groups, linears(block), strict=True):
                    group.low = self.bank.stacked(modules, group.starts, group.outputs)

    def _records(self) -> bool:
        spec = self.model.spec
        one_table = spec.rope.kind not in ("longrope", "dynamic")
        return self.limits.graphs and self.device.type == "cuda" and one_table and not backend.obstacle(self.device)

    def _new_pool(self) -> Pool:
        block = bytes_per_block(self.model.spec, self.dtype)
        most = -(-(self.context or 1 << 15) // BLOCK) * self.limits.batch
        if (room := self.limits.cache) is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                free, total = torch.cuda.mem_get_info(self.device)
                room = int(free - 0.05 * total - (2 << 30))  # a piece's activations, recordings, scores over the vocabulary
            else:
                room = min(main_memory() // 4, 4 << 30)
        count = min(room // block, most + 1)
        if count < 1 + 256 // BLOCK:
            raise DoesNotFit(f"{room / 2**30:.2f} GiB are left for keys and values, too little for 256 tokens",
                             "serve a smaller model, in 16 bits, or give the cache more with --cache-gb")  # fmt: skip
        return Pool(self.model.spec, count, self.dtype, self.device)

    def _sequence(self, job: Job) -> Answer:
        try:
            adapter = 0 if job.model in ("", self.base) else self.bank.number(job.model)
        except AdapterError as e:
            raise Missing(e.what, e.fix) from None
        limit, vocab = self._reach, self.model.vocab
        if not job.prompt:
            raise DataError("the prompt has no token", "write something in it")
        if len(job.prompt) >= limit:
            what = "the model's context" if limit == self.context else "the cache"
            raise DataError(f"the prompt has {len(job.prompt):,} tokens, and {what} holds {limit:,} with the answer", "shorten it")
        for ids, what in (
            (job.prompt, "the prompt"),
            (job.bias, "logit_bias"),
        ):  # one such id would end the thread, and all answers
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                raise DataError(f"{what} has a token id that is not from 0 to {vocab - 1:,}, the model's vocabulary",
                                "use the ids of this model's tokenizer")  # fmt: skip
        room = min(limit - len(job.prompt), job.max_tokens if job.max_tokens is not None else limit)
        sequence = Answer(job, adapter, max(1, room), list(job.prompt), text=job.words.stream(not job.keep_special))
        if job.grammar is not None:
            sequence.follower = job.grammar()
        return sequence

    def _admit(self, sequences: Sequence[Answer]) -> None:
        """On the engine's thread: an adapter may have been dropped since they were made."""
        for s in sequences:
            if s.adapter and s.adapter not in self.bank.numbers:
                self._end(s, "cancelled")
            else:
                self._waiting.append(s)

    def _patience(self) -> int:
        """Seconds until a place in the queue is likely free: one for each batch that waits."""
        return max(1, min(60, self._count // max(1, self.limits.batch)))

    # ---- the thread

    def _run(self) -> None:
        try:
            self._warm()
            while not self._closing:
                if not self.step():
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as e:  # noqa: BLE001 - clients must not wait for ever for a thread that is gone
            self._fault = e
            traceback.print_exc()
        fault = None if self._fault is None else ModelError(f"the engine failed: {type(self._fault).__name__}", "see its log")
        for sequence in (*self._live, *self._waiting):
            self._end(sequence, "cancelled" if fault is None else "error", fault)
        self._sweep()
        with self._lock:
            self._deaf = True
        while self._inbox:
            self._inbox.popleft()()
        for sequence in list(self._waiting):
            self._end(sequence, "cancelled")

    @torch.no_grad()
    def step(self) -> bool:
        """One turn: orders, who joins, a pass, its tokens. False when there is nothing to do."""
        while self._inbox:
            self._inbox.popleft()()
        for sequence in (*self._live, *self._waiting):
            if sequence.cancelled:
                self._end(sequence, "cancelled")
        self._sweep()
        self._join()
        planned = self._plan()
        last, self._last = self._last, None
        step = self._launch(planned, last) if planned else None
        if last is not None:
            self._take(last)
        if step is not None and not self.ahead:
            self._take(step)
            step = None
        self._last = step
        self._sweep()
        return bool(planned or last or self._live or self._inbox)

    def _with_adapters(self, function: Callable[[], Any]) -> Any:
        """Nothing is under way while it runs. Where adapters have come or gone, steps are recorded again; before the thread runs,
        once for all of them, when it begins."""
        if self._last is not None:
            self._take(self._last)
            self._last = None
            self._sweep()
        before = self.bank.numbers
        with torch.no_grad():
            try:
                return function()
            finally:
                if self.bank.numbers != before:
                    self._settle_path()
                    if self._thread is not None:
                        self._warm()
                    elif self._graphs is not None:
                        self._graphs.forget()

    @torch.no_grad()
    def _warm(self) -> None:
        """Record what will be replayed, before anybody waits for it."""
        if self._graphs is None:
            return
        self._graphs.forget()
        try:
            self._graphs.warm()
        except Exception as e:  # noqa: BLE001 - a driver, a kernel's compiler, an operation that cannot be recorded: all go on without
            self._graphs = None
            reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else 'no reason'}"
            self.notes = [*self.notes, f"steps are not recorded: {reason}"]
            print(f"note    {self.notes[-1]}", file=sys.stderr, flush=True)

    def _join(self) -> None:
        """Those who wait, in their order, while there are places, and blocks for their prompts and one more each for all."""
        while self._waiting and len(self._live) < self.limits.batch:
            sequence = self._waiting[0]
            if self._live and self.pool.blocks.free < -(-len(sequence.ids) // BLOCK) + len(self._live) + 1:
                return
            sequence.row = self._rows.pop()
            self._live.append(self._waiting.popleft())

    def _plan(self) -> list[tuple[Answer, int]]:
        """Who gets how many tokens now: writers first, then pieces of prompts, in the order they joined."""
        for s in self._live:
            if self.switch is not None and s.held and not s.long and len(s.ids) > self.switch:
                self._release(s)  # it has grown past its first context: all of it again, under the long table
        planned = [(s, 1) for s in list(self._live) if s.pending == 1 and self._may_write(s) and self._grow(s, 1, writes=True)]
        room = self._piece(len(planned)) if planned else self.limits.prompts
        for s in list(self._live):
            n = min(s.pending, room)
            if s.pending > 1 and n > 1 and s.row >= 0 and self._grow(s, n, writes=False):
                planned.append((s, n))
                room -= n
        planned = [(s, n) for s, n in planned if s.row >= 0]  # a later one may have taken an earlier one's blocks
        assert planned or self._last is not None or not self._live, "sequences run and none can go on"
        return planned

    def _piece(self, writers: int) -> int:
        """Tokens of prompts beside those who write: what `pace` affords, but four for each who writes, or prompts wait too long."""
        if not self._rate:
            return self.limits.piece
        return min(self.limits.piece, max(MIN_PIECE, 4 * writers, int(self.limits.pace / self._rate)))

    def _may_write(self, s: Answer) -> bool:
        """Not where the token that the device alone knows may be the last one, or decides what comes next."""
        if not s.ahead:
            return True
        return s.follower is None and s.made + 1 < s.room and (self.switch is None or s.long or len(s.ids) < self.switch)

    def _grow(self, s: Answer, n: int, writes: bool) -> bool:
        """Blocks for n more tokens. Where there are none, younger sequences give theirs, the youngest first; the youngest of all
        gives its own, and waits, if it writes."""
        if s.row < 0:
            return False
        wanted = -(-(s.held + n) // BLOCK) - len(s.blocks)
        while wanted > 0 and (found := self.pool.blocks.take(wanted, s.blocks[-1] if s.blocks else None)) is None:
            younger = [o for o in self._live[self._live.index(s) + 1 :] if o.blocks and not o.ahead]
            if younger:
                self._put_back(younger[-1])
                continue
            if writes and not s.ahead and len(self._live) > 1:
                self._put_back(s)
            return False
        if wanted > 0:
            self._tables[s.row, len(s.blocks) : len(s.blocks) + wanted] = found
            s.blocks += found
        return True

    def _put_back(self, s: Answer) -> None:
        """It waits, first in the queue, and begins again with all the tokens it has."""
        self._leave(s)
        self._live.remove(s)
        self._waiting.appendleft(s)
        self.preempted += 1

    def _release(self, s: Answer) -> None:
        self.pool.blocks.give(s.blocks)
        s.blocks, s.held = [], 0

    def _leave(self, s: Answer) -> None:
        self._release(s)
        self._rows.append(s.row)
        s.row = -1

    # ---- a pass

    def _launch(self, planned: list[tuple[Answer, int]], last: _Step | None) -> _Step:
        self.steps += 1
        begun = time.perf_counter()
        writers = [s for s, n in planned if n == 1]
        others = [(s, n) for s, n in planned if n > 1]
        for s, n in planned:
            if not s.held:
                s.long = self.switch is not None and max(len(s.ids), n) > self.switch
        if self._graphs is not None and (self.bank.plain or not any(s.adapter for s in writers)):
            logits, done = [], []
            if writers:
                logits.append(self._graphs.run(writers, self._inputs(writers, last)))
                done += writers
            if others:
                recorded = self._graphs.takes(others)
                more, finished = self._graphs.prompts(others) if recorded else self._forward(others, None)
                logits += [more] if finished else []
                done += finished
        else:
            found, done = self._forward(planned, last)
            logits = [found]
        for s, n in planned:
            s.held += n
        size = begun, sum(n for _, n in planned), len(writers)
        if not done:
            drawn = nothing(self.device)
            return _Step([], drawn, drawn.tokens_L, *size)
        rows = [Row(s.job, s.made + s.ahead, self._allowed(s)) for s in done]
        drawn = sample(logits[0] if len(logits) == 1 else torch.cat(logits), rows)
        for place, s in enumerate(done):
            s.ahead, s.place = True, place
        return _Step(done, drawn.to_host(), drawn.tokens_L, *size)

    def _allowed(self, s: Answer) -> Tensor | None:
        try:
            return None if s.follower is None else s.follower.allowed()
        except Exception as e:  # noqa: BLE001 - it is this answer's alone
            self._fail(s, e)
            return None

    def _inputs(self, writers: Sequence[Answer], last: _Step | None) -> Tensor:
        """Each writer's newest token [n] on the device, wherever it is known."""
        known = torch.tensor([0 if s.ahead else s.ids[s.held] for s in writers])
        if not any(s.ahead for s in writers):
            return to_device(known, self.device)
        places = torch.tensor([s.place if s.ahead else 0 for s in writers])
        picked = last.device_tokens.index_select(0, to_device(places, self.device))
        if all(s.ahead for s in writers):
            return picked
        return torch.where(to_device(torch.tensor([s.ahead for s in writers]), self.device), picked, to_device(known, self.device))

    def _forward(self, planned: list[tuple[Answer, int]], last: _Step | None) -> tuple[Tensor, list[Answer]]:
        """(logits of those whose tokens are all computed now, who they are)."""
        writers = [s for s, n in planned if n == 1]
        pieces = [t for s, n in planned if n > 1 for t in s.ids[s.held : s.held + n]]
        parts = [torch.tensor(pieces)] if pieces else []
        tokens = torch.cat([self._inputs(writers, last), *(to_device(x, self.device) for x in parts)] if writers
                           else [to_device(parts[0], self.device)])  # fmt: skip
        where = Pass(self.pool, [Part(n, s.held, s.blocks, max(len(s.ids), s.held + n)) for s, n in planned])
        done = [s for s, n in planned if n == s.pending]
        ends = [end - 1 for (s, n), end in zip(planned, where.layout.bounds[1:], strict=True) if n == s.pending]
        rows = to_device(torch.tensor(ends, dtype=torch.int64), self.device)
        self.bank.choose([s.adapter for s, n in planned for _ in range(n)], rows)
        x = self.hidden(tokens, where, rows)
        return self.model.logits(x), done

    def hidden(self, tokens_T: Tensor, where: Pass, rows: Tensor | None) -> Tensor:
        """[L, D]: the stream's chosen rows after the final norm, by whichever path runs."""
        if self.lean is not None:
            return self.lean.hidden(tokens_T, where, rows)
        return self.model.hidden(tokens_T, where.layout, rows=rows, cache=where)

    # ---- what came out

    def _take(self, step: _Step) -> None:
        drawn = step.drawn
        drawn.wait()
        self._time(step)
        ids, largest = drawn.tokens_L.tolist(), drawn.largest_L.tolist()
        logprobs = None if drawn.logprob_L is None else drawn.logprob_L.tolist()
        top = None if drawn.top is None else [x.tolist() for x in drawn.top]
        for i, s in enumerate(step.sequences):
            s.ahead = s.held > len(s.ids)  # a step after this one has its next token
            if s.ended is not None:
                continue
            if math.isnan(largest[i]):
                self._end(s, "error", ModelError(*NAN))
                continue
            chosen = None
            if s.job.logprobs is not None:
                most = s.job.logprobs
                beside = () if top is None else zip(top[1][i][:most], top[0][i][:most], strict=True)
                beside = tuple(_chosen(s.job, t, p) for t, p in beside)
                chosen = _chosen(s.job, ids[i], logprobs[i], beside)
            self._append(s, ids[i], chosen)

    def _time(self, step: _Step) -> None:
        """`_rate` from a step that has just been waited for. Its own time begins where the one before it ended. A slower step
        counts a third, a faster one in full: kernels that compiled, or a busy machine, are forgotten at once."""
        begun, self._came = max(step.begun, self._came), time.perf_counter()
        if step.tokens > step.writers:
            rate = (self._came - begun) / step.tokens
            self._rate = min(rate, 0.7 * self._rate + 0.3 * rate) if self._rate else rate

    def _append(self, s: Answer, token: int, chosen: Chosen | None) -> None:
        self.tokens += 1
        s.ids.append(token)
        s.made += 1
        if token in s.job.stop_ids:
            self._end(s, "stop")
            return
        if chosen is not None:
            s.tokens.append(chosen)
        try:
            if s.follower is not None:
                s.follower.take(token)
            s.unsaid += s.text.push(token)
        except Exception as e:  # noqa: BLE001 - a grammar or a tokenizer that fails ends one answer, not all
            self._fail(s, e)
            return
        if self._stopped(s) or (s.follower is not None and s.follower.done):
            self._end(s, "stop")
        elif s.made >= s.room:
            self._end(s, "length")
        else:
            self._say(s)

    def _stopped(self, s: Answer) -> bool:
        """Cuts the text at the first stop in it."""
        found = [at for stop in s.job.stop if (at := s.unsaid.find(stop)) >= 0]
        if found:
            s.unsaid, s.text = s.unsaid[: min(found)], None
        return bool(found)

    def _say(self, s: Answer) -> None:
        """All but what may begin a stop."""
        most, unsaid = len(s.unsaid), s.unsaid
        keep = max((n for stop in s.job.stop for n in range(1, min(len(stop), most + 1)) if unsaid.endswith(stop[:n])), default=0)
        said = s.unsaid[: len(s.unsaid) - keep]
        if said or (s.tokens and not keep):
            s.unsaid = s.unsaid[len(said) :]
            tokens, s.tokens = tuple(s.tokens), []
            s.job.deliver(Piece(said, tokens, s.made))

    def _end(self, s: Answer, reason: Reason, error: TunesmithError | None = None) -> None:
        if s.ended is not None:
            return
        s.ended = reason
        text = s.unsaid
        if s.text is not None and reason in ("stop", "length"):
            s.unsaid += s.text.flush()
            self._stopped(s)
            text = s.unsaid
        with self._lock:
            self._count -= 1
        s.job.deliver(Piece(text, tuple(s.tokens), s.made, reason, error))

    def _fail(self, s: Answer, fault: Exception) -> None:
        if not isinstance(fault, TunesmithError):
            traceback.print_exception(fault)
            fault = ModelError(f"the answer failed: {type(fault).__name__}", "this is a bug in the server; its log has more")
        self._end(s, "error", fault)

    def _cancel(self, s: Answer) -> None:
        s.cancelled = True
        self._wake.set()

    def _sweep(self) -> None:
        """Those who have ended leave, and their blocks are free: what a pass under way writes there comes before any later one."""
        if any(s.ended for s in self._live):
            for s in self._live:
                if s.ended:
                    self._leave(s)
            self._live = [s for s in self._live if not s.ended]
        if any(s.ended for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if not s.ended)


def _chosen(job: Job, token: int, logprob: float, top: tuple[Chosen, ...] = ()) -> Chosen:
    text = job.words.decode([token])
    return Chosen(token, text, max(logprob, -9999.0), top)


def main_memory() -> int:
    """Bytes of main memory that are free; 8 GiB where nobody says."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 << 30
