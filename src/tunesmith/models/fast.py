"""The decoder's layers as half-blocks (ops/half_blocks.py), where its family and its adapters allow it.

`refusal` says why not: Gemma's norms and activation, attention caps, adapters that are more than a low-rank product, trained bases.
Such a model takes the composed path of models/decoder.py, which is also the definition that the half-blocks are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from tunesmith.levels import WHOLE
from tunesmith.models import groups
from tunesmith.models.groups import Group, Scratch
from tunesmith.models.stash import Pool, Stash
from tunesmith.ops.attention import Layout
from tunesmith.ops.half_blocks import Halves, Pass, Policy, layer
from tunesmith.spec import half_blocks_refusal

LESS = {"keep": "recompute", "int8": "recompute", "recompute": "attention", "attention": "checkpoint"}
SMALL_TILE = 2048  # tokens of an MLP tile when nothing else is left to save


def linears(block: nn.Module) -> list[list[nn.Module]]:
    """The block's linears by group: qkv, o, gate_up, down."""
    at, mlp = block.self_attn, block.mlp
    qkv = [at.qkv_proj] if hasattr(at, "qkv_proj") else [at.q_proj, at.k_proj, at.v_proj]
    gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    return [qkv, [at.o_proj], gate_up, [mlp.down_proj]]


def refusal(model: nn.Module) -> str:
    """Why this decoder cannot run as half-blocks now; empty when it can."""
    if reason := half_blocks_refusal(model.spec):
        return reason
    for i, block in enumerate(model.model.layers):
        if any(hasattr(module, "base") for module in (block, getattr(block, "self_attn", None), getattr(block, "mlp", None))):
            return f"layer {i}: a module of several linears is trained whole"
        for module in (m for group in linears(block) for m in group):
            if reason := groups.refusal(module):
                return f"layer {i}: {reason}"
        if any(p.requires_grad for name, p in block.named_parameters() if "norm" in name):
            return f"layer {i}: its norms are trained"
    return ""


class FastLayers:
    """All layers of a decoder as half-blocks, and the policy of each. Made again when an adapter comes, goes or is switched off."""

    def __init__(self, model: nn.Module, policies: Sequence[Policy], *, fp8: bool = False):
        self.policies, self.scratch, self.pool = tuple(policies), Scratch(), Pool()
        self.signature: tuple[list, list] = [], []
        self.runs = False
        self.fp8 = fp8
        self.halves: list[Halves] = []
        self.renew(model)

    def renew(self, model: nn.Module) -> bool:
        """Follow the adapters as they are now. False, and nothing of it runs, while `refusal` has a reason."""
        modules = [m for block in model.model.layers for group in linears(block) for m in group]
        there, state = (
            [id(m) for m in modules],
            [(getattr(m, "enabled", True), bool(getattr(m, "dropout", 0)) and m.training) for m in modules],
        )
        if (there, state) != self.signature:
            self.runs = not refusal(model)
            if self.runs and (not self.halves or there != self.signature[0]):
                self.halves = [self._halves(model.spec, i, b) for i, b in enumerate(model.model.layers)]
                for group in sorted((g for halves in self.halves for g in halves.groups), key=lambda g: -g.matrix_bytes):
                    group.reserve()
            for group in (g for halves in self.halves for g in halves.groups):
                group.refresh()
            self.signature = there, state
        return self.runs

    def _halves(self, spec, index: int, block: nn.Module) -> Halves:
        at, dtype = block.self_attn, block.input_layernorm.weight.dtype
        qkv, o, gate_up, down = (Group(modules, self.scratch, dtype, self.fp8) for modules in linears(block))
        norms = [at.q_norm.weight, at.k_norm.weight] if spec.qk_norm else [None, None]
        return Halves(
            qkv, o, gate_up, down, block.input_layernorm.weight, block.post_attention_layernorm.weight, spec.norm_eps,
            spec.heads, spec.kv_heads, spec.head_dim, at.scale, at.window, *norms,
        )  # fmt: skip

    def run(self, x_TD: Tensor, layout: Layout, tables: Sequence[tuple[Tensor, Tensor]], rows: Tensor | None,
            adds: bool = False) -> Tensor:  # fmt: skip
        """`tables`: cosines and sines for each layer. `rows`: only these rows come out of the last layer. `adds`: as in `Pass`."""
        stash, last = Stash(self.pool), len(self.halves) - 1
        for i, (halves, (cos, sin), policy) in enumerate(zip(self.halves, tables, self.policies, strict=True)):
            x_TD = layer(x_TD, halves, Pass(layout, cos, sin, stash, adds), policy, rows if i == last else None)
        return x_TD

    def state(self) -> tuple:
        """What a recorded pass rests on: it must be recorded again once this has changed."""
        kept = tuple(group.kept is not None for halves in self.halves for group in halves.groups)
        places = tuple(buffer.data_ptr() for buffer in self.scratch.buffers.values())
        return self, self.policies, self.signature, kept, places  # itself, not its id: another may come to lie where it was

    def cache(self, budget: int) -> int:
        """Keep decoded NF4 weights, group by group, while they fit `budget` bytes; returns what they take."""
        taken = 0
        for group in (g for halves in self.halves for g in halves.groups if g.kept is None):
            if taken + group.matrix_bytes > budget:
                break
            group.cache()
            taken += group.matrix_bytes
        return taken

    def leaner(self) -> str:
        """Every layer keeps one level less; after the last one all wait in main memory, the MLP in tiles. Says it, or ''."""
        now = tuple(replace(p, level=LESS.get(p.level, p.level)) for p in self.policies)
        if now == self.policies and self.halves and self.halves[0].qkv.device.type == "cuda":
            now = tuple(replace(p, offload=True, tile=min(p.tile, SMALL_TILE)) for p in now)
        if now == self.policies:
            return ""
        self.policies = now
        return ", ".join(sorted({p.level + ", offloaded" * p.offload for p in now}))

    def evict(self) -> bool:
        """Give all cached weights back; True when there were any."""
        found = [group.evict() for halves in self.halves for group in halves.groups]
        self.scratch.clear()
        return any(found)


def policies(count: int, level: str = "keep", *, offload: bool = False, tile: int = WHOLE) -> tuple[Policy, ...]:
    """The same policy for all layers."""
    return (Policy(level, offload, tile),) * count
