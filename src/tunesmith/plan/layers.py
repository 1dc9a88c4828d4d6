"""Layers as half-blocks, in numbers: what each level keeps of a token, what a backward holds beside it, what it computes twice.

The tables follow ops/half_blocks.py (a test holds the bytes against what a pass really puts aside) and models/groups.py. plan.py
chooses from them. No torch.

Shape letters: T tokens at once, t tokens of an MLP tile, D model width, F MLP width, Q query heads x head width, K that of keys,
R ranks of a group added up and padded, N outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tunesmith.levels import SAVED, WHOLE, Level
from tunesmith.spec import Spec

LEVELS: tuple[Level, ...] = (
    "keep",
    "recompute",
    "attention",
    "checkpoint",
)  # exact, richest first; int8 only where it is asked for
TILES = (WHOLE, 4096)  # on an H200 tiles of 4,096 tokens cost no time that could be measured
AGAIN: dict[Level, tuple[str, ...]] = {  # products that a backward computes once more, never down; checkpoint also attends again
    "keep": (), "int8": (), "recompute": ("gate_up",), "attention": ("qkv", "o", "gate_up"), "checkpoint": ("qkv", "o", "gate_up"),
}  # fmt: skip
LOGIT_BYTES, GPU_ROWS = 64 << 20, 512  # a chunk of logits (ops/linear_ce.py): so many bytes of 16-bit ones, at least so many rows


@dataclass(frozen=True, slots=True)
class Layers:
    """So many layers side by side and what each keeps: the fields of ops/half_blocks.Policy. On the composed path only keep and
    checkpoint, never offloaded."""

    count: int
    level: Level
    offload: bool = False
    tile: int = WHOLE


def describe(layers: Sequence[Layers]) -> str:
    """`keep`, `checkpoint, offloaded`, `keep 20 layers, recompute 12 offloaded`: top layers first."""
    top = [part for part in reversed(layers) if part.count]
    if len(top) == 1:
        return top[0].level + ", offloaded" * top[0].offload
    words = [f"{p.level} {p.count}{' layers' if i == 0 else ''}{' offloaded' if p.offload else ''}" for i, p in enumerate(top)]
    return ", ".join(words)


@dataclass(frozen=True)
class Shape:
    """What the tables need of a Spec and its adapters. Sizes are bytes a token where nothing else is said."""

    spec: Spec
    ranks: Mapping[str, int]  # by last name (`q_proj`); absent without an adapter
    width: int  # bytes of a number
    store: str  # nf4 | dense
    fp8: bool = False

    @cached_property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """(outputs, inputs, R) of each group."""
        s = self.spec
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        parts = {
            "qkv": (q + 2 * kv, s.dim, ("qkv_proj",) if s.fused else ("q_proj", "k_proj", "v_proj")),
            "o": (s.dim, q, ("o_proj",)),
            "gate_up": (2 * s.hidden, s.dim, ("gate_up_proj",) if s.fused else ("gate_proj", "up_proj")),
            "down": (s.dim, s.hidden, ("down_proj",)),
        }
        return {name: (n, k, _padded(sum(self.ranks.get(p, 0) for p in linears), k)) for name, (n, k, linears) in parts.items()}

    @cached_property
    def saved(self) -> dict[str, int]:
        """Bytes a token of everything that a level may keep."""
        s, w = self.spec, self.width
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        low = {f"low_{name}": r * w for name, (_, _, r) in self.groups.items()}
        return low | {
            "x": s.dim * w, "rstd_1": 4, "q": q * w, "k": kv * w, "v": kv * w, "out": q * w, "lse": 4 * s.heads, "mid": s.dim * w,
            "rstd_2": 4, "gate_up": (2 * s.hidden + self.groups["gate_up"][2]) * w,  # with room for B^T dy beside it
            "codes": 2 * s.hidden, "scales": 2 * -(-2 * s.hidden // 64),
        }  # fmt: skip

    def kept(self, level: Level) -> int:
        """Bytes a token and layer."""
        return sum(self.saved[name] for name in SAVED[level])

    # -- weights --

    @cached_property
    def matrices(self) -> dict[str, int]:
        """Bytes of each group's dense matrix, adapters around it."""
        return {name: (n + r) * (k + r) * self.width for name, (n, k, r) in self.groups.items()}

    @property
    def room(self) -> int:
        """Bytes a layer that a dense base takes for the adapters around its matrices."""
        return sum(self.matrices.values()) - sum(n * k * self.width for n, k, _ in self.groups.values())

    def scratch(self, several: bool, cached: bool) -> int:
        """Bytes of the dense matrices that are made to be used once: one, and down's beside it where the MLP runs in tiles."""
        if self.fp8:  # W and W^T in e4m3, and the adapters apart
            size = {name: 2 * n * k + r * (n + k) * self.width for name, (n, k, r) in self.groups.items()}
        else:
            size = dict.fromkeys(self.groups, 0) if cached or self.store == "dense" else self.matrices
        if not several:
            return max(size.values())
        return max(v for name, v in size.items() if name != "down") + size["down"]

    # -- what a backward holds beside what is kept --

    def loss(self, tokens: int, tile: int, cached: bool) -> int:
        """With a chunk of logits: the final norm's input and output, the gradient, this chunk and half of the one before."""
        s, w = self.spec, self.width
        rows = max(GPU_ROWS, LOGIT_BYTES // (w * s.vocab) // 128 * 128)
        logits = min(tokens, 3 * rows // 2) * s.vocab * w
        return 3 * tokens * s.dim * w + logits + self.scratch(tokens > tile, cached)

    def forward(self, level: Level, tokens: int, tile: int, cached: bool) -> int:
        """While the MLP runs, beside what the layer keeps: its output, a tile's norm, gate and up, activation."""
        s, w, several, t = self.spec, self.width, tokens > tile, min(tokens, tile)
        gate_up = 0 if level == "keep" else 2 * s.hidden * w
        mid = 0 if "mid" in SAVED[level] else s.dim * w
        return tokens * (s.dim * w + mid) + t * (s.dim * w + gate_up + s.hidden * w) + self.scratch(several, cached)

    def backward(self, level: Level, tokens: int, tile: int, cached: bool) -> int:
        """The fuller of the MLP's and attention's backward in one layer, in bytes."""
        s, w, save = self.spec, self.width, self.saved
        several, t = tokens > tile, min(tokens, tile)
        d, f, q, kv = s.dim * w, s.hidden * w, s.heads * s.head_dim * w, s.kv_heads * s.head_dim * w
        r = {name: extra * w for name, (_, _, extra) in self.groups.items()}
        again = "gate_up" in AGAIN[level]
        qkv = save["q"] + save["k"] + save["v"]
        made = {  # made again before the MLP's backward, and there until attention's
            "attention": save["mid"] + save["low_o"],
            "checkpoint": qkv + save["out"] + save["lse"] + save["mid"] + save["low_o"] + save["low_qkv"],
        }.get(level, 0)
        inside = (d + r["down"]) + f + again * (d + r["gate_up"])  # dout, dact, norm(mid)
        after = 2 * d + r["gate_up"]  # norm(mid) and its gradient
        if self.fp8:
            inside, after = inside + s.dim, after + 2 * s.hidden  # gradients in e4m3
        own = 0 if level == "keep" else save["gate_up"] * (1 + several)  # a tile's gate and up; the tile before still holds its own
        mlp = tokens * (2 * d + r["o"] + made) + t * (own + max(inside, after) + several * d)
        there = {
            "keep": save["gate_up"] + save["mid"],
            "int8": save["codes"] + save["scales"] + save["mid"],
            "recompute": save["mid"],
        }
        needed = {"attention": qkv + save["low_qkv"], "checkpoint": qkv + save["out"] + save["lse"]}
        # dy, dmid twice (rows chosen at the top), dout twice, dq dk dv; the kernel's float32 dq and its dk, dv for all query heads
        attention = tokens * (
            3 * d + r["o"] + 2 * q + (q + 2 * kv) + (4 * q // w + 2 * q) + needed.get(level, 0) - there.get(level, 0)
        )
        return max(mlp, attention) + self.scratch(several, cached)

    # -- what is computed twice --

    def again(self, level: Level, attention: float) -> tuple[float, float]:
        """FLOPs a token and layer beyond forward and backward once: in products, in attention (whose forward's are given)."""
        return sum(2.0 * self.groups[g][0] * self.groups[g][1] for g in AGAIN[level]), attention * (level == "checkpoint")

    def decodes(self, level: Level) -> int:
        """Weights a layer and pass that are decoded: forward and backward each once; gate_up's second product finds it decoded."""
        size = {name: n * k for name, (n, k, _) in self.groups.items()}
        return 2 * sum(size.values()) + sum(size[g] for g in AGAIN[level] if g != "gate_up")


def pinned(shape: Shape, level: Level, tokens: int) -> int:
    """Bytes of main memory that one layer's kept tensors take: torch gives pinned memory in powers of two."""
    return sum(1 << (max(4096, shape.saved[name] * tokens) - 1).bit_length() for name in SAVED[level] if shape.saved[name])


def _padded(rank: int, inputs: int) -> int:
    unit = 64 if inputs >= 1024 else 8
    return -(-rank // unit) * unit
