"""How long a run takes: products, attention, what is read and written between them, decoding, the link, launches, the optimiser.

Each kind of work goes at the device's own rate for it (rates.py). The bytes between products are counted from the kernels of ops/;
the constants below are all that was fitted (docs/planning.md says on what, and how far a plan was off).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from tunesmith.levels import RECORDED
from tunesmith.plan.layers import GPU_ROWS, LOGIT_BYTES, Layers, Level
from tunesmith.plan.parts import Policy
from tunesmith.plan.rates import Rates, assumed
from tunesmith.plan.sizes import Sized
from tunesmith.spec import linear_shapes, parameters

SUSTAINED = {  # of a product's own rate, in a step: a hot card clocks down, shapes are uneven
    "16bit": 0.90,
    "fp8": 0.82,
    "fp32": 0.90,
}
CPU_SUSTAINED = 0.8
DECODE_BYTES = {
    "bf16": 2.6,
    "fp8": 1.6,
}  # of memory traffic a weight where a kernel decodes: codes and scales read, the weight written
TILE_TAX, OFFLOAD_TAX = 1.005, 1.03  # of time, more than was measured: neither is to be taken for nothing
BESIDE = 0.5  # of what layers have to move, as much hides behind others that move nothing: two layers' copies may be under way
UNHIDDEN = 0.03  # of what the link takes, even where a layer takes longer: at the ends, and in the device's own bandwidth
PASS_SECONDS = {"cuda": 2e-3, "mps": 5e-3, "cpu": 1e-3}  # of a micro-batch: packing it, copying it in, starting it
STEP_SECONDS = {"cuda": 5e-3, "mps": 5e-3, "cpu": 1e-3}  # of a step: waiting for its loss, writing its line
UPDATE_BYTES = 28  # a trained parameter: itself, its gradient and two averages read, three of them written
GRADIENT_BYTES = (
    40,
    15,
)  # a weight of a full fine-tuning and micro-batch: its gradient made, widened, added, let go; or used at once
COMPOSED_BACKWARD = 2.2  # of the forward's bytes between products
LAUNCHES = 3.0  # a backward's, of a forward's
BARE = 0.6  # of a composed layer's launches, what is left without adapters


class Timed(Sized):
    """A job's seconds."""

    @cached_property
    def rates(self) -> Rates:
        return self.measured or assumed(self.device)

    @property
    def trained_tokens(self) -> float:
        return self.epochs * self.rows.total

    @cached_property
    def seen(self) -> float:
        """Keys that a query meets, on average over tokens and layers."""
        s, half = self.spec, self.rows.squares / 2
        if not s.sliding:
            return min(half, s.window or math.inf)
        return sum(min(half, s.window) if s.slides(i) else half for i in range(s.layers)) / s.layers

    def _micro(self, tokens: int) -> tuple[float, float]:
        """(micro-batches of a step, tokens of one), on average."""
        step = self.batch_size * self.rows.mean
        parts = float(math.ceil(max(1.0, step / tokens)))
        return parts, step / parts

    def _product_rate(self, tokens: float, precision: str = "") -> float:
        """FLOP/s of a layer's products in a step."""
        precision = precision or ("fp32" if self.dtype == "fp32" else "16bit")
        share = SUSTAINED[precision] if self.device.kind != "cpu" else CPU_SUSTAINED
        return share * self.rates.product(precision, tokens, self.spec.dim)

    @cached_property
    def _attention(self) -> tuple[float, float]:
        """Seconds a token and layer of attention's forward and backward."""
        s, flops = self.spec, 4 * self.spec.heads * self.spec.head_dim * self.seen
        forward, backward = self.rates.attend(s.head_dim, self.rows.squares)
        return flops / forward, 2.5 * flops / backward

    def _head(self, tokens: float, training: bool = True) -> float:
        """Seconds a token of the vocabulary's projection and the loss; a chunk's gradient is made in the forward."""
        s, passes = self.spec, (3 if self._head_trains else 2) if training else 1
        token = (
            2 * passes * s.vocab * s.dim / self._product_rate(tokens) + (5 * passes) * s.vocab * self.width / 2 / self.rates.copy
        )
        if passes == 3:  # each chunk's part of the head's gradient is added to the whole of it, in float32
            token += 12 * s.vocab * s.dim / max(GPU_ROWS, LOGIT_BYTES // (self.width * s.vocab)) / self.rates.copy
        return token

    @property
    def _update(self) -> float:
        """Seconds of an optimiser's step."""
        trained = parameters(self.spec).total if self.method == "full" else self.adapter_parameters
        return trained * UPDATE_BYTES / self.rates.copy

    def factor(self, path: str) -> float:
        """What real layers took over what is computed. They had adapters: on a GPU, where what these read and write is most of
        what is computed too high on the composed path, it does not hold without them."""
        if path == "composed" and self.method == "full" and self.device.kind == "cuda":
            return 1.0
        return self.rates.factors.get(path, 1.0)

    # -- composed layers --

    @cached_property
    def _composed_bytes(self) -> float:
        """Read and written between the products of one layer's forward, a token."""
        s, w = self.spec, self.width
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        beside = 0.0
        if self.method != "full":
            shapes = linear_shapes(s)
            beside = sum(3 * shapes[n][0] + shapes[n][1] for n in self.adapted)
        return w * (10 * s.dim + 2 * (q + 2 * kv) + 3 * s.hidden + beside)

    def seconds(self, policy: Policy, tokens: int) -> float:
        """Of the whole run on the composed path."""
        parts, micro = self._micro(tokens)
        again = policy == "checkpoint"
        return (
            self.steps * (parts * self._composed_pass(micro, again) + self._update + STEP_SECONDS[self.device.kind]) + self._beside
        )

    def _composed_pass(self, micro: float, again: bool) -> float:
        """Seconds of a micro-batch of so many tokens, forward and backward."""
        s, per = self.spec, parameters(self.spec).linear / self.spec.layers
        forward, backward = self._attention
        rate = self._product_rate(micro)
        trained = 2.0 if self.method == "full" else 1.0
        between = self._composed_bytes / self.rates.copy
        token = (
            (1 + again) * (2 * per / rate + forward + between) + trained * 2 * per / rate + backward + COMPOSED_BACKWARD * between
        )
        decoded = (2 + again) * self._decoded * per
        gradients = (
            per * GRADIENT_BYTES[self.inside] / self.rates.copy if self.method == "full" else 0.0
        )  # each moves to its master
        compute = micro * token + decoded + gradients
        launches = (1 + again + LAUNCHES) * self.rates.launch * (BARE if self.method == "full" else 1.0)
        layer = compute + launches if self.device.kind == "cpu" else max(compute, launches)  # a GPU computes while it is told more
        return self.factor("composed") * (s.layers * layer + micro * self._head(micro)) + PASS_SECONDS[self.device.kind]

    @cached_property
    def _decoded(self) -> float:
        """Seconds a weight that the composed path decodes."""
        return 1 / self.rates.decode if self.method == "qlora" else 0.0

    @cached_property
    def _beside(self) -> float:
        """Seconds of held-out losses and sample answers."""
        s, (forward, _) = self.spec, self._attention
        tokens = self.held_out * self.rows.mean
        linear = parameters(s).linear
        rate = self._product_rate(max(1.0, min(tokens, 4096)))
        read = tokens * (
            2 * linear / rate + s.layers * (forward + self._composed_bytes / self.rates.copy) + self._head(4096, False)
        )
        read += self._decoded * linear + s.layers * self.rates.launch
        stored = sum(c.bytes for c in self.weights())
        token = max(self._decoded * linear + stored / self.rates.copy, s.layers * self.rates.launch)
        return self.evaluations * (read * bool(self.held_out) + token * self.sample_tokens * bool(self.samples))

    # -- the layers as half-blocks --

    def half_seconds(self, low: Layers, high: Layers, n_high, tokens: int, cached: bool) -> Any:
        """Of the whole run."""
        parts, micro = self._micro(tokens)
        each = self._half_pass(low, high, n_high, micro, tokens, cached)
        return self.steps * (parts * each + self._update + STEP_SECONDS[self.device.kind]) + self._beside

    def _half_pass(self, low: Layers, high: Layers, n_high, micro: float, tokens: int, cached: bool) -> Any:
        """Seconds of a micro-batch of `micro` tokens where up to `tokens` go at once; the link where it is slower than a layer."""
        n_low = self.spec.layers - n_high
        (f_0, b_0), (f_1, b_1) = (self._layer_seconds(part.level, micro) for part in (low, high))
        moved_0, moved_1 = (
            n * part.offload * self.shape.kept(part.level) / self.rates.link if self.device.link else 0.0
            for n, part in ((n_low, low), (n_high, high))
        )
        moved, token = moved_0 + moved_1, 0.0
        for t_0, t_1 in ((f_0, f_1), (b_0, b_1)):
            apart = np.maximum(n_low * t_0, moved_0) + np.maximum(n_high * t_1, moved_1)
            hidden = np.maximum(n_low * t_0 + n_high * t_1, moved)
            token = token + BESIDE * hidden + (1 - BESIDE) * apart
        token = token + 2 * UNHIDDEN * moved
        tax = np.where(moved > 0, OFFLOAD_TAX, 1.0) * (TILE_TAX if tokens > low.tile else 1.0)
        decoded = 0.0
        if self.fp8 or (self.method == "qlora" and not cached):
            shape, second = self.shape, DECODE_BYTES["fp8" if self.fp8 else "bf16"] / self.rates.copy
            decoded = (n_low * shape.decodes(low.level) + n_high * shape.decodes(high.level)) * second
        each = tax * (micro * (token + self._head(micro)) + decoded) * self.factor("half-blocks")
        if tokens > RECORDED:  # not recorded: a layer's launches are a floor
            each = np.maximum(each, self.spec.layers * (1 + LAUNCHES) * self.rates.launch)
        return each + PASS_SECONDS[self.device.kind]

    def _layer_seconds(self, level: Level, micro: float) -> tuple[float, float]:
        """Seconds a token of one layer's forward and backward."""
        s, w, shape = self.spec, self.width, self.shape
        key = level, micro
        if key in self._timed:
            return self._timed[key]
        rate = self._product_rate(micro, "fp8" if self.fp8 else "")
        attend, attend_back = self._attention
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        norms, swiglu, rope = 2 * 4 * s.dim * w, 3 * s.hidden * w, 2 * (q + kv) * w
        low = sum(k * w for _, k, r in shape.groups.values() if r)  # x A^T reads the inputs; dA and dB read both sides, dy B one
        low_back = sum((2 * n + k) * w for n, k, r in shape.groups.values() if r)
        sum_of = sum(n * k for n, k, _ in shape.groups.values())
        products, attends = shape.again(level, 1.0)
        bytes_0 = norms + swiglu + rope + low
        bytes_1 = 1.5 * norms + 2 * swiglu + rope + low_back
        bytes_1 += {"keep": 0, "int8": swiglu, "recompute": swiglu + norms / 2}.get(level, bytes_0)
        if self.fp8:  # quantising what the products read
            bytes_0, bytes_1 = bytes_0 + 1.5 * q * w, bytes_1 + 2 * (3 * s.dim + q + 2 * kv + s.hidden) * w
        copy = self.rates.copy
        forward = 2 * sum_of / rate + attend + bytes_0 / copy
        backward = (2 * sum_of + products) / rate + attend_back + attends * attend + bytes_1 / copy
        self._timed[key] = forward, backward
        return forward, backward

    @cached_property
    def _timed(self) -> dict[tuple[Level, float], tuple[float, float]]:
        return {}
