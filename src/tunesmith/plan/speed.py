"""How long a run takes: arithmetic, decoding of 4-bit weights, the link to main memory, and what happens beside training."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from tunesmith.plan.layers import Layers
from tunesmith.plan.parts import Policy
from tunesmith.plan.sizes import Sized
from tunesmith.spec import parameters

EFFICIENCY = {"cuda": 0.35, "mps": 0.30, "cpu": 0.50}  # share of the device's rate in GEMMs, attention and all else together
LAYER_SECONDS = {
    "cuda": 600e-6,
    "mps": 1e-3,
    "cpu": 200e-6,
}  # Python and launches of one layer's forward: a floor under small batches
FP32_SHARE = 1 / 8  # of a GPU's 16-bit rate without TensorFloat-32
CPU_BF16_SHARE = 0.25  # of a CPU's float32 rate, where no AMX or AVX512-BF16 helps
BANDWIDTH_SHARE = 0.7  # of the printed memory bandwidth that a plain copy reaches
HALF_EFFICIENCY = 0.55  # of the card's rate over everything a step does: 0.54 to 0.55 at every level, 2,048 and 8,192 tokens long
FP8_GAIN = 1.4  # of the products of the base in e4m3
DECODE_BYTES = {"bf16": 2.6, "fp8": 1.6}  # of memory traffic a weight: codes and scales read, the dense weight written
TILE_TAX, OFFLOAD_TAX = 1.005, 1.03  # of time, more than was measured: neither is to be taken for nothing
UNHIDDEN = 0.03  # of what the link takes, even where a layer takes longer: at the ends, and in the device's own bandwidth
DECODE_TRAFFIC = (
    24  # bytes of memory traffic a weight and decode: codes, gathered values, scaling, the dense result and its reading
)


class Timed(Sized):
    """A job's seconds."""

    @property
    def trained_tokens(self) -> float:
        return self.epochs * self.rows.total

    def seconds(self, policy: Policy, tokens: int) -> float:
        """Of the whole run on the composed path."""
        passes = 3 if policy == "checkpoint" else 2  # forward, backward, and the forward again
        step = self.batch_size * self.rows.mean
        parts = max(1.0, step / tokens)  # micro-batches a step, on average
        training = self._compute(self.trained_tokens, self.flops(policy)) + self.steps * parts * self._weights(passes)
        training = max(training, self.steps * parts * self.spec.layers * passes * LAYER_SECONDS[self.device.kind])
        return training + self._beside

    @cached_property
    def _beside(self) -> float:
        """Seconds of held-out losses and sample answers."""
        work = self.held_out * self.rows.mean, self.flops("forward")
        seconds = self._compute(*work) + self._weights(1) if self.composed_because else work[0] * work[1] / self._half_rate
        held = self.evaluations * seconds
        stored = sum(c.bytes for c in self.weights())
        token = max(
            self._weights(1) + stored / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE),
            self.spec.layers * LAYER_SECONDS[self.device.kind],
        )
        return held + self.evaluations * token * self.sample_tokens * bool(self.samples)

    def flops(self, phase: str) -> float:
        """A token's: 2 a weight forward, 2 more for the gradient of x, 2 more for a weight's own, 2 to recompute; and attention."""
        s, count = self.spec, parameters(self.spec)
        attention = 4 * s.layers * s.heads * s.head_dim * self.seen
        head = s.vocab * s.dim
        if phase == "forward":
            return 2 * count.linear + 2 * head + attention
        passes = 6 if self.method == "full" else 4
        again = phase == "checkpoint"
        return (passes + 2 * again) * count.linear + passes * head + (3.5 + again) * attention + 6 * self.adapter_parameters

    @property
    def seen(self) -> float:
        """Keys that a query meets, on average over tokens and layers."""
        s = self.spec
        if not s.sliding:
            return min(self.rows.squares / 2, s.window or math.inf)
        return (
            sum(min(self.rows.squares / 2, s.window) if s.slides(i) else self.rows.squares / 2 for i in range(s.layers)) / s.layers
        )

    def _compute(self, tokens: float, flops: float) -> float:
        kind, share = self.device.kind, self.measured.efficiency if self.measured else EFFICIENCY[self.device.kind]
        if kind == "cuda" and self.dtype == "fp32":
            share *= FP32_SHARE
        if kind == "cpu" and self.dtype != "fp32":
            share *= CPU_BF16_SHARE
        return tokens * flops / (self.device.tflops * 1e12 * share)

    def _weights(self, passes: int) -> float:
        """Seconds that decoding the 4-bit weights takes in so many passes over the model."""
        traffic = DECODE_TRAFFIC * parameters(self.spec).linear * passes if self.method == "qlora" else 0
        return traffic / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE)

    # -- the layers as half-blocks --

    def half_seconds(self, low: Layers, high: Layers, n_high, tokens: int, cached: bool) -> Any:
        """Of the whole run: all arithmetic at one rate, the link where it is slower."""
        s, shape, n_low = self.spec, self.shape, self.spec.layers - n_high
        linear, head, gain = parameters(s).linear, s.vocab * s.dim, FP8_GAIN if self.fp8 else 1.0
        attention = 4 * s.heads * s.head_dim * self.seen  # a layer's forward
        forward = 2 * linear / gain + 2 * head + s.layers * attention
        backward = 2 * linear / gain + 2 * head + 2.5 * s.layers * attention + 6 * self.adapter_parameters
        again = [shape.again(part.level, attention) for part in (low, high)]
        backward = backward + sum(
            n * (product / gain + attend) for n, (product, attend) in zip((n_low, n_high), again, strict=True)
        )
        moved = sum(n * part.offload * shape.kept(part.level) for n, part in ((n_low, low), (n_high, high)))
        moved = moved / (self.device.link * 1e9) if self.device.link else 0.0
        token = np.maximum(forward / self._half_rate, moved) + np.maximum(backward / self._half_rate, moved)
        token = token + 2 * UNHIDDEN * moved
        tax = np.where(moved > 0, OFFLOAD_TAX, 1.0) * (TILE_TAX if tokens > low.tile else 1.0)
        parts = self.steps * max(1.0, self.batch_size * self.rows.mean / tokens)  # micro-batches
        decoded = 0.0
        if self.fp8 or (self.method == "qlora" and not cached):
            decoded = (n_low * shape.decodes(low.level) + n_high * shape.decodes(high.level)) * self._decode_second
        return tax * (self.trained_tokens * token + parts * decoded) + self._beside

    @property
    def _decode_second(self) -> float:
        return DECODE_BYTES["fp8" if self.fp8 else "bf16"] / (self.device.bandwidth * 1e9 * BANDWIDTH_SHARE)

    @property
    def _half_rate(self) -> float:
        return self.device.tflops * 1e12 * (self.measured.efficiency if self.measured else HALF_EFFICIENCY)
