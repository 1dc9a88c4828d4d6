"""Answers held to JSON or a JSON schema: before each token, which tokens may come. llguidance (the `serve` extra) knows.

Numbers of a grammar are the tokenizer's own; a model's vocabulary may be padded beyond them, and those rows never come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import DataError, MissingExtra, install
from tunesmith.tokenizer import Tokenizer

ANY = {"type": "object"}  # response_format json_object


class Grammars:
    """The schemas of one tokenizer. `stops`: tokens that end an answer once its JSON is whole."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[int]):
        try:
            import llguidance
        except ImportError:
            raise MissingExtra("answers in JSON need llguidance", install("serve")) from None
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer.backend.to_str(), eos_token=sorted(stops))

    def compile(self, schema: Mapping[str, Any]) -> str:
        """The grammar of a schema. Raises DataError with the reason where the schema is none, or holds what is not supported."""
        matcher = self._library.LLMatcher
        try:
            text = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
            fault = matcher.validate_grammar(text, self._tokenizer)
        except (ValueError, RecursionError, TypeError) as e:
            fault = str(e)
        if fault:
            raise DataError(f"the JSON schema cannot be followed: {_first(fault)}", "write it with fewer keywords, or leave it out")
        return text

    def follow(self, grammar: str) -> Follower:
        return Follower(self._library.LLMatcher(self._tokenizer, grammar), self._tokenizer.vocab_size)


class Follower:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, width: int):
        self._matcher, self._width = matcher, width

    def allowed(self) -> Tensor:
        """bool [V]: what may come next. Raises DataError where the grammar has failed (too large, a limit)."""
        mask = self._matcher.compute_bitmask()
        self._check()
        bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
        return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: self._width].bool()

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def done(self) -> bool:
        """Whether nothing more may come."""
        return self._matcher.is_stopped()

    @property
    def whole(self) -> bool:
        """Whether what was taken is a whole value."""
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"the JSON schema stopped working: {_first(self._matcher.get_error())}", "write a simpler one")


def _first(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason was given"
