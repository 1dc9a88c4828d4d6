"""The key/value cache: prompts of different lengths prefilled side by side in one flat stream, then one token a sequence and step.

Document i of the stream continues sequence i. Keys are kept rotated. Memory: 2 x layers x batch x kv_heads x capacity x head_dim
numbers, taken once; a sliding layer keeps all of them and looks at its window only.

Shape letters: T tokens in the stream, N sequences, C capacity, Q query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.ops.attention import Layout, attention, capped, visible
from tunesmith.spec import Spec


class KVCache:
    """Keys and values of `batch` sequences of at most `capacity` tokens each; `lengths[i]` is what sequence i holds."""

    def __init__(self, spec: Spec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        shape = (spec.layers, batch, spec.kv_heads, capacity, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # not empty: a hidden key weighs 0, and 0 x nan is nan
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * batch
        self.lengths_N = torch.zeros(batch, dtype=torch.int64, device=device)
        self._masks: dict[int | None, Tensor | None] = {}  # of this step, by window
        self._switch = spec.rope.switch
        if self._switch is not None:  # longrope: the tokens too, for the one step at which its table changes
            self._tokens = torch.empty((batch, capacity), dtype=torch.int64, device=device)

    def begin(self, tokens_T: Tensor, layout: Layout) -> tuple[Tensor, Layout, Tensor | None]:
        """The stream to compute for these new tokens, and where they lie in it (None: it is they alone).

        A longrope sequence that grows past its first context changes tables: all it holds was computed under the short one, so it
        is computed again from its first token, once, as transformers does for Phi-3. Everything else is kept as it is.
        """
        assert len(layout.lengths) == len(self.lengths), "one document for each sequence in the cache"
        total = [past + new for past, new in zip(self.lengths, layout.lengths, strict=True)]
        assert max(total) <= self.capacity, "the cache is full"
        self._masks.clear()
        if self._switch is None:
            return tokens_T, layout, None
        positions = layout.positions_T + self.lengths_N[layout.documents_T]
        self._tokens[layout.documents_T, positions] = tokens_T
        again = [0 < past <= self._switch < n for past, n in zip(self.lengths, total, strict=True)]
        if not any(again):
            return tokens_T, layout, None
        whole = Layout.of([n if a else new for n, a, new in zip(total, again, layout.lengths, strict=True)], tokens_T.device)
        for i, restart in enumerate(again):
            if restart:
                self.lengths[i] = 0
                self.lengths_N[i] = 0
        past = self.lengths_N[whole.documents_T]
        tokens = self._tokens[whole.documents_T, whole.positions_T + past]
        ends = zip(whole.bounds[1:], layout.lengths, strict=True)
        return tokens, whole, torch.cat([torch.arange(end - new, end, device=tokens.device) for end, new in ends])

    def positions(self, layout: Layout) -> Tensor:
        """Each new token's position in its sequence [T]."""
        if layout.longest == 1:
            return self.lengths_N
        return layout.positions_T + self.lengths_N[layout.documents_T]

    def attend(self, layer: int, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout, scale: float,
               window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """Appends this layer's keys and values and attends to all the sequence holds. Returns [T, Q, H]."""
        keys, values = self.keys[layer], self.values[layer]
        documents = layout.documents_T
        positions = self.positions(layout)
        keys[documents, :, positions], values[documents, :, positions] = k_TKH, v_TKH
        if not any(self.lengths):
            return attention(q_TQH, k_TKH, v_TKH, layout, scale, window, softcap)
        if layout.longest == 1:
            return self._one_token(keys, values, q_TQH, scale, window, softcap)
        parts = []
        for i, q in enumerate(q_TQH.split(layout.lengths)):
            past, end = self.lengths[i], self.lengths[i] + len(q)
            mask = visible(range(past, end), range(end), window, q.device)
            k, v = keys[i : i + 1, :, :end], values[i : i + 1, :, :end]
            parts.append(_attend(q.transpose(0, 1)[None], k, v, mask, scale, softcap))
        return torch.cat([y[0].transpose(0, 1) for y in parts])

    def advance(self, layout: Layout) -> None:
        """After the last layer: what was appended is now held."""
        self.lengths = [past + new for past, new in zip(self.lengths, layout.lengths, strict=True)]
        self.lengths_N = self.lengths_N + layout.cu_seqlens.diff()

    def keep(self, indices: Sequence[int]) -> None:
        """Drops all other sequences; those kept are renumbered in the order given."""
        at = torch.tensor(list(indices), device=self.keys.device)
        used = max(self.lengths)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old[:, : len(indices)]  # in place: no second cache
            for layer in range(old.shape[0]):
                new[layer, :, :, :used] = old[layer, :, :, :used].index_select(0, at)
            setattr(self, name, new)
        self.lengths = [self.lengths[i] for i in indices]
        self.lengths_N = self.lengths_N[at]
        if self._switch is not None:
            self._tokens = self._tokens[at]

    def _one_token(self, keys: Tensor, values: Tensor, q_NQH: Tensor, scale: float,
                   window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """All sequences in one call. Query heads that share a key head are rows of one query, so nothing is expanded."""
        n, heads, width = q_NQH.shape
        end = max(self.lengths) + 1
        if window is not None and window >= end:
            window = None
        if window not in self._masks:
            at, last = torch.arange(end, device=q_NQH.device), self.lengths_N[:, None]
            mask = (at <= last) if window is None else (at <= last) & (at > last - window)
            ragged = window is not None or min(self.lengths) < max(self.lengths)
            self._masks[window] = mask[:, None, None] if ragged else None
        q = q_NQH.view(n, keys.shape[1], -1, width)
        return _attend(q, keys[:, :, :end], values[:, :, :end], self._masks[window], scale, softcap).reshape(n, heads, width)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        return capped(q, k, v, mask, scale, softcap)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
