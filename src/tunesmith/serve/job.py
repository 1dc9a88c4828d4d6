"""What the engine is asked and what it answers: the face between it and whoever speaks to clients. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tunesmith.errors import TunesmithError

Reason = Literal["stop", "length", "cancelled", "error"]


class Busy(TunesmithError):
    """More wait than may; `after`: seconds until it is worth asking again."""

    def __init__(self, what: str, after: int):
        super().__init__(what, f"ask again in {after} s")
        self.after = after


class Missing(TunesmithError):
    """A name that is not among those served."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, what it says, ln of its probability, and the likeliest ones beside it."""

    id: int
    text: str
    logprob: float
    top: tuple[Chosen, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in an answer. The last one has a `reason`, and `error` where that is "error"."""

    text: str = ""
    tokens: tuple[Chosen, ...] = ()
    made: int = 0  # tokens so far
    reason: Reason | None = None
    error: TunesmithError | None = None


class Words(Protocol):
    """What the engine asks of a tokenizer."""

    def decode(self, ids: Any, skip_special: bool = False) -> str: ...

    def stream(self, skip_special: bool = True) -> Any: ...


class Follower(Protocol):
    """A grammar on its way through an answer."""

    def allowed(self) -> Any: ...  # bool [V], or None: anything

    def take(self, token: int) -> None: ...

    @property
    def done(self) -> bool: ...


@dataclass(slots=True)
class Job:
    """One answer to make. `deliver` is called on the engine's thread, must not wait, and gets the last piece exactly once."""

    prompt: list[int]
    words: Words
    deliver: Callable[[Piece], None]
    model: str = ""  # a name that the engine serves
    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0  # of several answers to one question
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many of the likeliest to tell; 0: the chosen one alone
    grammar: Callable[[], Follower] | None = None
    keep_special: bool = False  # special tokens are part of the text (tool calls)
    bias: dict[int, float] = field(default_factory=dict)  # added to the scores of these tokens


class Ticket(Protocol):
    def cancel(self) -> None: ...


class Engine(Protocol):
    """What the service asks of an engine."""

    context: int | None

    def submit(self, *jobs: Job) -> list[Ticket]:
        """All or none. Raises Busy beyond the queue, DataError for a prompt that can have no answer."""
        ...

    def state(self) -> dict[str, Any]:
        """Numbers for /health: `alive`, `running`, `waiting` ..."""
        ...
