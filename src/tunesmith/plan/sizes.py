"""What a run takes: bytes by component, on the device, in main memory and on disk.

What is on the device when it is fullest, a backward of the largest micro-batch: on the composed path from `kept`, the one table of
what autograd keeps of each token and layer; as half-blocks from layers.py. Constants are what was not counted from the code.

Shape letters: T tokens at once, D model width, F MLP width, Q query heads, K key/value heads, H head width, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.config.schema import INSIDE
from tunesmith.devices import GIB, Device
from tunesmith.levels import RECORDED
from tunesmith.plan.job import Job
from tunesmith.plan.layers import Layers, Level, pinned
from tunesmith.plan.page import gb
from tunesmith.plan.parts import Component, Method, Policy
from tunesmith.spec import Spec, linear_shapes, parameters

if TYPE_CHECKING:
    from tunesmith.plan.choice import Way

# ---- what is not counted from the code -------------------------------------------------------------------------------------------
CONTEXT = {"cuda": 845 << 20, "mps": 400 << 20, "cpu": 450 << 20}  # CUDA context (an H200: 0.73 to 0.78 GiB) | torch's own pages
FRAGMENTS = {"cuda": 0.03, "mps": 0.10, "cpu": 0.10}  # of activations and transients: blocks the allocator holds and cannot reuse
HOST = {"cuda": 3 * GIB, "mps": 0, "cpu": 0}  # main memory of a process that drives a GPU; on a CPU all is counted as device
WORKSPACES = 100 << 20  # cuBLAS's: 32 MiB for each of the threads that multiply, and its light version's
RECORDINGS = 280 << 20  # a second set of them, and the graphs' nodes: 0.2 to 0.4 GiB more than unrecorded passes had reserved
HALF_FRAGMENTS = 0.01, 0.095  # of what is kept, of what comes and goes
MOVED_FRAGMENTS = 0.4  # of what a layer moves away: its blocks come back only when the copy is seen to be done
RESERVE = {"cuda": 0.02, "mps": 0.0, "cpu": 0.0}  # of a budget: no plan was further below what was held (docs/planning.md)
HOST_SHARE = 0.5  # of main memory that may be pinned

# ---- counted from the code -----------------------------------------------------------------------------------------------------
DECODE_SCRATCH = 10  # bytes a weight while ops/nf4.py decodes, beyond the result ...
DECODE_CHUNK = {"cuda": 1 << 26, "mps": 1 << 26, "cpu": 1 << 18}  # ... of this many weights at a time
LOGIT_BYTES = 64 << 20  # float32 logits of one chunk (ops/linear_ce.py) ...
LOGIT_COPIES = 2.5  # ... with their 16-bit form before and after
SOFTCAP_ROWS = 512  # query rows whose scores are written out at once (ops/attention.py)
MASTER, GRADIENT = 4, 4  # the float32 master, its float32 gradient: bytes a trained parameter
EIGHT = 2 + 8 / 256  # two averages of 8 bits, each with a float32 for 256
MOMENTS = {"adamw": 8, "adamw_8bit": EIGHT, "paged_adamw_8bit": EIGHT, INSIDE: EIGHT}
GGUF = 4.84 / 8  # bytes a weight of Q4_K_M, the usual choice (the table in llama.cpp's quantize/README.md)
DECODE_BATCH = 32  # prompts answered at once


def kept(
    spec: Spec,
    method: Method,
    adapted: set[str],
    *,
    width: int,
    device: str,
    rank: int = 16,
    variant: str = "lora",
    dropout: bool = False,
) -> list[tuple[str, float, str]]:
    """(what, bytes a token and layer, why) that autograd keeps for the backward when nothing is recomputed: the one table.

    Counted from ops/ (rms_norm keeps its input and a number, rotate nothing, swiglu gate and up) and adapters/lora.py (x and A x; a
    frozen base keeps nothing). `adapted` are names inside a layer (`mlp.up_proj`) that train: adapters, or all of them for full.
    """
    q, kv, w = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, width
    last = {name.rpartition(".")[2] for name in adapted}
    whole = method == "full"
    shared = whole or not dropout  # with dropout each adapter keeps an input of its own instead of the one they share
    qkv, gate_up = last & {"q_proj", "k_proj", "v_proj", "qkv_proj"}, last & {"gate_proj", "up_proj", "gate_up_proj"}
    shapes = {name.rpartition(".")[2]: shape for name, shape in linear_shapes(spec).items()}
    rows = [
        ("layer input", spec.dim * w + 4, "the first norm's backward, with one float32 a row"),
        ("first norm's output", spec.dim * w * bool(qkv and shared), "the gradient of what stands beside q, k, v"),
        ("q, k, v", (q + 2 * kv) * w, "attention's backward, after the rotation"),
        ("fused q, k", (q + kv) * w * spec.fused, "v is a view of one fused product, which keeps all of it alive"),
        ("q, k before their norm", ((q + kv) * w + 4 * (spec.heads + spec.kv_heads)) * spec.qk_norm, "the norms of q and k"),
        ("attention output", q * w + 4 * spec.heads, "attention's backward and o_proj's input, with the log-sum of each row"),
        (
            "attention output joined",
            q * w * (device != "cuda" and "o_proj" in last and shared),
            "one call a document, then one stream",
        ),
        ("after attention", spec.dim * w + 4, "the second norm's backward"),
        ("second norm's output", spec.dim * w * bool(gate_up and shared), "the gradient of what stands beside gate and up"),
        ("gate, up", 2 * spec.hidden * w, "swiglu's backward; the activation is computed again"),
        ("down's input", spec.hidden * w * ("down_proj" in last and shared), "the gradient of what stands beside down"),
        ("branch outputs", 2 * (spec.dim * w + 4) * spec.sandwich, "the norms after attention and MLP (Gemma 2, 3)"),
        ("A x", 0 if whole else rank * w * len(last), "the gradient of B"),
    ]
    if variant == "dora" and not whole:
        rows.append(("DoRA's parts", 2 * w * sum(shapes[n][0] for n in last), "the gradient of the magnitudes: W x and B A x"))
    if not shared:
        mask = 1 if device == "cuda" else w
        rows.append(("dropped inputs", (w + mask) * sum(shapes[n][1] for n in last), "each adapter's own input and its mask"))
    return [row for row in rows if row[1]]


class Sized(Job):
    """A job's bytes."""

    @cached_property
    def kept_bytes(self) -> float:
        """Bytes a token and layer that autograd keeps under `keep`."""
        ranks = list(self.adapted.values())
        mean = sum(ranks) / len(ranks) if ranks else 0
        table = kept(self.spec, self.method, set(self.adapted), width=self.width, device=self.device.kind, rank=mean,
                     variant=self.lora.variant, dropout=self.lora.dropout > 0)  # fmt: skip
        return sum(size for _, size, _ in table)

    # -- memory --

    def weights(self) -> Iterator[Component]:
        """The model itself."""
        count, w = parameters(self.spec), self.width
        dense = count.total - count.linear
        if self.method == "qlora":
            stored = self.spec.layers * sum(nf4_bytes(o * i) for o, i in linear_shapes(self.spec).values())
            yield Component(
                "linear weights", stored, "device", f"{count.linear:,} weights in 4 bits with their scales, 0.516 bytes each"
            )
        else:
            yield Component("linear weights", count.linear * w, "device", f"{count.linear:,} weights in {self.dtype}")
        yield Component("embedding, head, norms", dense * w, "device", f"{dense:,} parameters in {self.dtype}, never quantised")

    def fixed(self) -> Iterator[Component]:
        """What does not depend on how many tokens go through at once."""
        count, w = parameters(self.spec), self.width
        yield from self.weights()
        n = self.adapter_parameters
        if self.method != "full":
            copies = 0 if w == 4 or not self.composed_because else w  # half-blocks round them where they lay them beside a weight
            yield Component(
                "adapter", n * (MASTER + copies), "device", f"{n:,} float32 masters{' and their 16-bit copies' if copies else ''}"
            )
        else:
            n = count.total
        if self.method == "full" and w != 4 and not self.inside:
            yield Component("masters", n * MASTER, "device", "a float32 master of every weight: a 16-bit one loses small updates")
        if not self.inside:
            yield Component("gradients", n * GRADIENT, "device", "float32, so that micro-batches add up without rounding")
        elif self.spec.tied:
            shared = self.spec.vocab * self.spec.dim * w
            yield Component("gradients", shared, "device", "the head's waits for the embedding's: they are one weight")
        words = "in float32" if self.optimizer == "adamw" else "in 8 bits, with a scale for 256"
        paged = self.optimizer.startswith("paged")
        where = f"AdamW's two averages {words}{', which the driver moves off a full device' if paged else ''}"
        yield Component("optimiser", round(n * MOMENTS[self.optimizer]), "host" if paged else "device", where)
        if not self.composed_because and self.method == "lora":
            yield Component(
                "room for adapters",
                self.spec.layers * self.shape.room,
                "device",
                "around the weights, so that one product serves both",
            )

    def working(self, policy: Policy, tokens: int) -> Iterator[Component]:
        """What depends on `tokens`, those that go through at once."""
        s, w, tokens = self.spec, self.width, self._filled(tokens)
        layer = self.kept_bytes
        ends = (
            tokens * (2 * s.dim * w + 8) + tokens * 2 * s.head_dim * w
        )  # final norm's input, labelled rows, their gradient; rope tables
        if policy == "keep":
            activations = s.layers * layer * tokens + self._scores(tokens)[0]
            why = f"{layer:,.0f} bytes a token and layer, nothing is recomputed"
        else:
            activations = s.layers * s.dim * w * tokens
            why = f"{s.dim * w:,} bytes a token and layer: only each layer's input is kept"
        activations += ends
        yield Component("activations", round(activations), "device", f"{tokens:,} tokens at once; {why}")
        transient, reason = self.transient(policy, tokens)
        yield Component("largest transient", round(transient), "device", reason)
        cache, count = self.cache_bytes(), min(self.samples, DECODE_BATCH)
        beyond = max(0, cache - round(activations + transient))
        if self.samples:
            why = f"{gb(cache / GIB, 2)} GB to answer {count} prompts" + (
                "" if beyond else ", less than training's activations leave again"
            )
            yield Component("sample answers", beyond, "device", why)
        yield self._overhead(activations + transient + beyond)

    def _filled(self, tokens: int) -> int:
        """Of so many tokens that may go through at once, those that will in the fullest step. Recorded streams are filled up."""
        return min(tokens, max(self.rows.longest, self.likely + self.likely // 32))

    def _overhead(self, moving: float) -> Component:
        kind = self.device.kind
        what = {"cuda": "CUDA's context and workspaces", "cpu": "Python and torch themselves"}.get(kind, "the runtime itself")
        why = f"{what}; {FRAGMENTS[kind]:.0%} of what moves for fragments"
        return Component("context, allocator", CONTEXT[kind] + round(FRAGMENTS[kind] * moving), "device", why)

    def transient(self, policy: Policy, tokens: int) -> tuple[float, str]:
        """The fullest instant beyond what is kept: the top layer's backward, or the loss of a chunk of logits."""
        s, w, kind = self.spec, self.width, self.device.kind
        if self.method == "qlora":
            weight = self.largest * w + DECODE_SCRATCH * min(self.largest, DECODE_CHUNK[kind])
            what = "a dequantised weight"
        elif self.method == "full":
            weight = max(self.largest, s.vocab * s.dim) * w
            what = "one weight's gradient"
        else:
            weight, what = 0, "gradients in flight"
        flight = tokens * (2 * s.dim * w + max(4 * s.hidden * w, 16 * s.dim))  # swiglu's four, or a norm's four in float32
        again = tokens * self.kept_bytes + self._scores(tokens)[0] / s.layers if policy == "checkpoint" else 0
        backward = weight + flight + again + self._scores(tokens)[1]
        logits = min(LOGIT_BYTES, 4 * s.vocab * tokens) * LOGIT_COPIES + ((4 + w) * s.vocab * s.dim if self._head_trains else 0)
        if logits > backward:
            return logits, "one chunk of logits" + (", and the head's gradient in float32" if self._head_trains else "")
        return backward, f"the top layer's backward: {what}, its gradients" + (", and its activations made again" if again else "")

    @property
    def _head_trains(self) -> bool:
        return self.method == "full" or "lm_head" in self.saved

    def _scores(self, tokens: int) -> tuple[float, float]:
        """(kept, transient) bytes of attention scores that a softcap writes out (Gemma 2); none elsewhere."""
        if self.spec.attention_softcap is None:
            return 0.0, 0.0
        row = self.spec.heads * (8 + self.width % 4) + 1  # float32 tanh and softmax, its 16-bit cast; a mask for all heads
        near = min(self.rows.longest, SOFTCAP_ROWS)  # of longer documents nothing is kept: CHUNK rows at a time are made again
        far = self.rows.longest if self.rows.longest > SOFTCAP_ROWS else 0
        return self.spec.layers * row * near * tokens, 2 * row * SOFTCAP_ROWS * far

    def cache_bytes(self) -> int:
        """Keys and values of the sample answers, and the widest activations of reading their prompts."""
        count, longest = min(self.samples, DECODE_BATCH), self.rows.longest
        return self._cached(count * (longest + self.sample_tokens)) + self._read(count * longest)

    def _cached(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        s = self.spec
        return tokens * s.layers * 2 * s.kv_heads * s.head_dim * self.width

    def _read(self, tokens: int) -> int:
        """Bytes of the widest activations while so many tokens of prompts are read at once."""
        return tokens * (3 * self.spec.hidden + 4 * self.spec.dim) * self.width

    def answering(self, count: int) -> Iterator[Component]:
        """To answer so many prompts at once, each with its answer as long as the longest row: nothing is trained."""
        tokens, s = count * self.rows.longest, self.spec
        yield from self.weights()
        cache, logits = self._cached(tokens), count * s.vocab * (4 + self.width)
        reading = round(self._read(tokens) + self._scores(tokens)[1]) + logits
        each = self._cached(1)
        yield Component("KV cache", cache, "device", f"{tokens:,} tokens of {each:,} bytes: keys and values of every layer")
        yield Component(
            "reading, logits", reading, "device", f"the widest layer over {tokens:,} tokens at once, the last one's logits"
        )
        yield self._overhead(cache + reading)
        yield from self._process()

    @cached_property
    def embedding_bytes(self) -> int:
        """Of an embedding that can wait in main memory, where layers do: neither the head's matrix too nor trained. 0 of others."""
        trained = self.method == "full" or self.lora.new_tokens
        trained = trained or "model.embed_tokens" in self.saved
        return 0 if self.composed_because or self.spec.tied or trained else self.spec.vocab * self.spec.dim * self.width

    def host(self, way: Way) -> Iterator[Component]:
        if way.lifted:
            yield Component("embedding", way.lifted, "host", "a step reads a few thousand of its rows")
        if size := self._pinned(way.layers, way.tokens):
            yield Component("offloaded", size, "host", "pinned: what waits there for the backward")
        yield from self._process()

    def _process(self) -> Iterator[Component]:
        if base := HOST[self.device.kind]:
            largest = max(self.largest, self.spec.vocab * self.spec.dim) * 4
            yield Component("process", base, "host", "Python, torch and CUDA's host side")
            yield Component("loading", largest, "host", "the largest tensor: weights stream in one at a time")

    def disk(self) -> Iterator[Component]:
        count = parameters(self.spec)
        n = count.total if self.method == "full" else self.adapter_parameters
        whole = count.total * 2
        yield Component(
            "checkpoints",
            round((self.keep + 1) * n * ((self.width if self.inside else MASTER) + MOMENTS[self.optimizer])),
            "disk",
            f"{self.keep} kept and one being written",
        )
        if self.method == "full":
            yield Component(
                "model", whole * (1 + self.keep_best), "disk", f"16-bit weights{', the best so far too' if self.keep_best else ''}"
            )
        else:
            yield Component(
                "adapter file", n * 4 * (1 + self.keep_best), "disk", f"float32{', the best so far too' if self.keep_best else ''}"
            )
            yield Component("merged export", whole, "disk", "only if you merge: the whole model in 16 bits")
        yield Component("GGUF export", round(count.total * GGUF), "disk", "only if you convert it for llama.cpp: Q4_K_M")

    # -- the layers as half-blocks: `low` layers at the bottom, `high` ones on them; n_high may be an array --

    @property
    def cache_of_weights(self) -> int:
        """Bytes of all layers' decoded weights."""
        return self.spec.layers * sum(self.shape.matrices.values())

    def sizes(self, low: Layers, high: Layers, n_high, tokens: int, cached: bool) -> tuple[Any, Any, Any, Any]:
        """Bytes: kept on the device, what comes and goes beside it at the fullest instant, sample answers beyond both, overhead.

        The backward begins at the top: what the `high` layers keep is gone when the `low` ones, whose backward takes more, begin.
        Of what is offloaded two layers' sets are on the device (the next is fetched while one is used), in the forward three (two
        leave while the next is made).
        """
        n_low, recorded, tokens = self.spec.layers - n_high, tokens <= RECORDED, self._filled(tokens)
        (sets_0, stay_0, back_0, ahead_0), (sets_1, stay_1, back_1, ahead_1) = (
            self._layer(part.level, part.offload, part.tile, tokens, cached) for part in (low, high)
        )
        resident = n_low * stay_0 + n_high * stay_1
        top = resident + np.maximum(back_1 + max(2 * sets_1, sets_0 + sets_1), ahead_1)
        bottom = n_low * stay_0 + max(back_0 + 2 * sets_0, ahead_0)
        peak = resident + self._loss(tokens, low.tile, cached) + 2 * max(sets_0, sets_1)
        peak = np.maximum(peak, np.where(n_high > 0, top, 0))
        peak = np.maximum(peak, np.where(n_low > 0, bottom, 0))
        kept_bytes = resident + tokens * (self.spec.head_dim * self.width + 40)  # rope tables, ids, rows, labels
        transient = peak - resident
        answers = self.cache_bytes() + bool(self.samples) * self._decode_scratch
        beyond = np.maximum(0, answers - kept_bytes - transient)
        share = HALF_FRAGMENTS[0] * kept_bytes + HALF_FRAGMENTS[1] * (transient + beyond) + MOVED_FRAGMENTS * max(sets_0, sets_1)
        workspaces = WORKSPACES + RECORDINGS * (recorded and self.device.kind == "cuda")
        return kept_bytes, transient, beyond, np.rint(share) + CONTEXT[self.device.kind] + workspaces

    def _layer(self, level: Level, offload: bool, tile: int, tokens: int, cached: bool) -> tuple[int, int, int, int]:
        """Bytes of one layer: what it keeps that is moved away, that stays; what its backward holds; its forward if it moves."""
        key = level, offload, tile, tokens, cached
        if key not in self._known:
            own, shape = self.shape.kept(level) * tokens, self.shape
            ahead = 3 * own + shape.forward(level, tokens, tile, cached) if offload else 0
            self._known[key] = offload * own, (not offload) * own, shape.backward(level, tokens, tile, cached), ahead
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Level, bool, int, int, bool], tuple[int, int, int, int]]:
        return {}  # many plans are made of the same few layers

    def _loss(self, tokens: int, tile: int, cached: bool) -> float:
        if not self._head_trains:
            return self.shape.loss(tokens, tile, cached)
        return self.shape.loss(tokens, tile, cached) + 4 * self.spec.vocab * self.spec.dim + LOGIT_BYTES * LOGIT_COPIES

    @property
    def _decode_scratch(self) -> int:
        """Sample answers go through the composed path, which decodes a weight at a time in plain PyTorch."""
        least = self.largest * self.width + DECODE_SCRATCH * min(self.largest, DECODE_CHUNK[self.device.kind])
        return least if self.method == "qlora" else 0

    def _pinned(self, layers: tuple[Layers, ...], tokens: int) -> int:
        return sum(part.count * pinned(self.shape, part.level, tokens) for part in layers if part.offload)


def usable(gib: float, device: Device) -> float:
    """GiB of a card, or of a budget, that a plan may fill: it may be as much too small."""
    return gib * (1 - RESERVE[device.kind])


def pinnable(device: Device) -> float:
    """Bytes of main memory that may be pinned. A machine that is not here is taken to have 16 GiB, or its card's size."""
    return HOST_SHARE * (device.host or max(16 * GIB, device.total))


def nf4_bytes(weights: int) -> int:
    """Bytes of one NF4 weight with double quantisation (ops/nf4.py): 0.5159 a weight."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 1024 + 4


def usual_full_bytes(spec: Spec) -> int:
    """What full fine-tuning takes elsewhere before activations: 16-bit weights and gradients, float32 masters and two averages."""
    return parameters(spec).total * (2 + 2 + 4 + 8)
