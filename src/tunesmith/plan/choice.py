"""The choice: of all that `memory` leaves open and the budget holds the fastest, and of the nearly fastest the leanest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tunesmith.devices import GIB
from tunesmith.plan.layers import TILES, WHOLE, Layers, Level, describe, pinned
from tunesmith.plan.parts import Choice, Component
from tunesmith.plan.sizes import DECODE_BATCH, pinnable
from tunesmith.plan.speed import Timed

WORTH = 0.002  # of its time that a plan may give away for a GiB less: near ties go to the leaner one
MICRO_CAP = {"cuda": 1 << 17, "mps": 1 << 14, "cpu": 1 << 12}  # tokens at once beyond which nothing is gained
SLACK = 1.03  # of plans within this factor of the fastest, the one that takes least memory


class Open(Timed):
    """A job and all that may be chosen of it; a variant is `replace(job, ...)`."""

    def _token_sizes(self) -> list[int]:
        """A row is never cut: fewer tokens at once than the longest row has are not possible."""
        longest = self.rows.longest
        if self.inside:
            return [self.fullest]
        if self.tokens is not None:
            return [max(longest, self.tokens)]
        top = max(longest, min(MICRO_CAP[self.device.kind], self.batch_size * longest))
        return [longest, *(1 << k for k in range(6, 18) if longest < 1 << k <= top)]

    def candidates(self) -> list[Way]:
        """All that `memory` leaves open on the composed path."""
        layers = self.spec.layers
        return [Way(self, (Layers(layers, policy),), size) for policy in self.policies for size in self._token_sizes()]

    @cached_property
    def table(self) -> tuple[list[tuple[Layers, Layers, int, bool]], np.ndarray, np.ndarray]:
        """All that is open to half-blocks: (low, high, tokens, cached) for each row, and GiB and minutes with 0 .. layers `high`
        ones; infinite where main memory cannot hold what is offloaded. No plan has more than two kinds of layers."""
        counts = self.spec.layers + 1 if not self.mix else 1
        rows, needs, minutes = [], [], []
        for low, high, tokens, cached, n_high, size in self._sized():
            time = self.half_seconds(low, high, n_high, tokens, cached) / 60
            pad = (0, counts - len(n_high))
            rows.append((low, high, tokens, cached))
            needs.append(np.pad(size, pad, constant_values=np.inf))
            minutes.append(np.pad(np.broadcast_to(time, n_high.shape), pad, constant_values=np.inf))
        return rows, np.array(needs), np.array(minutes)

    def _sized(self, caching: bool = True) -> Iterator[tuple[Layers, Layers, int, bool, np.ndarray, np.ndarray]]:
        """The table's rows as (low, high, tokens, cached, n_high, GiB); without `caching` no decoded weights are kept."""
        kinds = [(level, off) for off in self.offloads for level in self.levels]
        pairs = [(low, high) for low in kinds for high in kinds if low == high or _richer(high, low)]
        counts = np.arange(self.spec.layers + 1)
        if self.mix:
            below, above = self.mix[0], self.mix[-1]
            pairs = [((below.level, below.offload), (above.level, above.offload))]
            counts = np.array([above.count if len(self.mix) > 1 else 0])
        caches = (False, True) if caching and self.method == "qlora" and not self.fp8 and self.device.kind == "cuda" else (False,)
        fixed = sum(c.bytes for c in self.fixed() if c.where == "device")
        for tokens in self._token_sizes():
            waits = {kind: kind[1] * pinned(self.shape, kind[0], tokens) for kind in {kind for pair in pairs for kind in pair}}
            for tile in TILES if tokens > min(TILES) else (WHOLE,):
                for below, above in pairs:
                    low, high = Layers(0, *below, tile), Layers(0, *above, tile)
                    n_high = counts if below != above or self.mix else counts[:1]
                    pin = waits[below], waits[above]
                    over = (self.spec.layers - n_high) * pin[0] + n_high * pin[1] > pinnable(self.device)
                    for cached in caches:
                        size = sum(self.sizes(low, high, n_high, tokens, cached)) + fixed + cached * self.cache_of_weights
                        offloads = (low.offload & (n_high < self.spec.layers)) | (high.offload & (n_high > 0))
                        size = size - offloads * self.embedding_bytes
                        yield low, high, tokens, cached, n_high, np.where(over, np.inf, size / GIB)

    def _way(self, at: int) -> Way:
        rows, needs, _ = self.table
        row, n = divmod(int(at), needs.shape[1])
        low, high, tokens, cached = rows[row]
        n_high = n if not self.mix else self.mix[1].count if len(self.mix) > 1 else 0
        parts = (replace(low, count=self.spec.layers - n_high), replace(high, count=n_high))
        return Way(self, tuple(part for part in parts if part.count), tokens, cached)

    def best(self, budget: float) -> Way:
        """Of those that fit the fastest; of near ties the leanest. When none fits, the leanest of all.

        More budget never makes the choice slower: what is added takes more memory, so it is taken only where it is faster.
        Composed: the leanest within SLACK of the fastest. Half-blocks, whose sizes are many: the least time x (1 + WORTH a GiB).
        """
        if not self.composed_because:
            _, needs, minutes = self.table
            if not (needs <= budget).any():
                return self.leanest
            return self._way(np.where(needs <= budget, minutes * (1 + WORTH * np.minimum(needs, 1e6)), np.inf).argmin())
        ways = self.candidates()
        fitting = [way for way in ways if way.needs <= budget]
        if not fitting:
            return min(ways, key=lambda way: way.needs)
        quickest = min(way.minutes for way in fitting)
        return min((way for way in fitting if way.minutes <= SLACK * quickest), key=lambda way: (way.needs, way.minutes))

    @cached_property
    def leanest(self) -> Way:
        """With one kind of layers: what is said of a run that does not fit."""
        if not self.composed_because:
            needs = self.table[1] if self.mix else self.table[1][:, :1]
            return self._way(needs.argmin() * self.table[1].shape[1])
        return min(self.candidates(), key=lambda way: way.needs)

    @property
    def least(self) -> float:
        if self.composed_because:
            return self.leanest.needs
        return min(float(size.min()) for *_, size in self._sized(caching=False))


@dataclass(frozen=True)
class Way:
    """A job with the policy of its layers and its micro-batch chosen. `cached`: decoded weights are kept."""

    job: Open
    layers: tuple[Layers, ...]  # from the bottom
    tokens: int
    cached: bool = False

    @property
    def activations(self) -> str:
        return describe(self.layers)

    @property
    def lifted(self) -> int:
        """Bytes of the embedding where it is in main memory: where layers wait there too."""
        return self.job.embedding_bytes if any(part.offload for part in self.layers) else 0

    @cached_property
    def components(self) -> tuple[Component, ...]:
        job = self.job
        fixed = [replace(c, bytes=c.bytes - self.lifted) if c.name.startswith("embedding") else c for c in job.fixed()]
        rest = tuple(job.working(self.layers[0].level, self.tokens) if job.composed_because else self._half_blocks())
        return (*(self._overlapped(c, rest) if c.name == "gradients" else c for c in fixed), *rest)

    def _overlapped(self, gradients: Component, rest: tuple[Component, ...]) -> Component:
        """Of a full fine-tuning's gradients what stands beside the fullest instant. In a step of one micro-batch they come as
        activations go; inside the backward a tied head's is counted with the head's own."""
        job, size = self.job, {c.name: c.bytes for c in rest}
        if job.method != "full" or (not job.inside and self.tokens < job.fullest):
            return gradients
        if job.inside:
            left = gradients.bytes - size["largest transient"]
        else:
            left = gradients.bytes - size["activations"]
        return replace(gradients, bytes=max(0, left), why=f"{gradients.why}; they come as activations go")

    def _half_blocks(self) -> Iterator[Component]:
        job, low, high = self.job, self.layers[0], self.layers[-1]
        n_high = high.count if len(self.layers) > 1 else 0
        kept_bytes, transient, beyond, overhead = (round(float(x)) for x in job.sizes(low, high, n_high, self.tokens, self.cached))
        levels = dict.fromkeys(part.level for part in reversed(self.layers))
        each = ", ".join(f"{job.shape.kept(level):,} bytes a token and layer for {level}" for level in levels)
        waits = " (waits in main memory where it is offloaded)" if low.offload or high.offload else ""
        yield Component("activations", kept_bytes, "device", f"{self.tokens:,} tokens at once; {each}{waits}")
        tiled = f", the MLP in tiles of {low.tile:,}" if self.tokens > low.tile else ""
        yield Component(
            "largest transient", transient, "device", f"a layer's backward and a dense weight, or a chunk of logits{tiled}"
        )
        if self.cached:
            yield Component("decoded weights", job.cache_of_weights, "device", "kept while there is room: nothing is decoded again")
        if job.samples:
            count = min(job.samples, DECODE_BATCH)
            yield Component("sample answers", beyond, "device", f"to answer {count} prompts, beyond what training leaves again")
        yield Component("context, allocator", overhead, "device", "CUDA's context, cuBLAS's workspaces, fragments")

    @cached_property
    def needs(self) -> float:
        return sum(c.bytes for c in self.components if c.where == "device") / GIB

    @cached_property
    def minutes(self) -> float:
        job, low, high = self.job, self.layers[0], self.layers[-1]
        if job.composed_because:
            return job.seconds(low.level, self.tokens) / 60
        return float(job.half_seconds(low, high, high.count if len(self.layers) > 1 else 0, self.tokens, self.cached)) / 60

    @cached_property
    def speed(self) -> float:
        """Tokens a second in training alone, held-out losses and answers left out."""
        return self.job.trained_tokens / max(60 * self.minutes - self.job._beside, 1e-9)

    def choice(self, budget: float) -> Choice:
        return Choice(self.job.method, self.activations, self.tokens, self.needs, self.minutes, self.needs <= budget)


def _richer(a: tuple[Level, bool], b: tuple[Level, bool]) -> bool:
    """Whether layers of kind `a` may lie on layers of kind `b`: they keep more, or as much where `b` is offloaded."""
    size = ("checkpoint", "attention", "recompute", "int8", "keep").index
    return (size(a[0]), b[1]) > (size(b[0]), a[1]) and a[1] <= b[1]
