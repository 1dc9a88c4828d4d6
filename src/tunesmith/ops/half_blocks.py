"""A decoder layer over a frozen base as two half-blocks with hand-written backwards, and what each keeps for them.

    attention half   mid = x + O(attention(rope(QKV(norm(x)))))
    MLP half         y = mid + Down(silu(gate) * up),  gate, up = GateUp(norm(mid))

Nothing of a frozen weight is trained, so neither norms' outputs nor projections' outputs are kept: silu(gate) * up is made again
from gate and up in a kernel that reads those anyway, and norm(x), which only dA asks for, is x times numbers that dA can be
multiplied with (`Group.gradients`). What is kept is the policy's choice
(`Policy`), 94,568 bytes a token and layer at Mistral-7B's shapes when nothing is computed twice. One autograd Function, `layer`,
strings the halves together, so that a checkpointed layer keeps x alone and computes mid once.

`reference` is the definition by autograd, and the half-blocks must equal it, forward and gradients, under every policy.

The linears come as groups that share an input (models/groups.py): `group.open()` gives the dense weights for as long as they are
needed, with each adapter's A as extra rows and B as extra columns, so that a base and its low-rank part are one GEMM. In FP8 they
are not: there a product is the base's alone, and `up` and `back` answer what is still to be added (`Low`; None in 16 bits), which
the kernel that reads the product next adds in registers. Inputs of such a product come as e4m3 from where they are made (`room`).

Shape letters: T tokens, L chosen rows, D model width, F MLP width, Q query heads, K key/value heads, H head width, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.levels import SAVED, WHOLE
from tunesmith.ops import attention, int8, low_rank, rms_norm, rotary, swiglu
from tunesmith.ops.fp8 import Rows
from tunesmith.ops.low_rank import Low


class Opened(Protocol):
    """A group's weights while they lie dense. N outputs, K inputs."""

    def low(self, x_TK: Tensor, out: Tensor | None = None) -> Tensor: ...  # scale A x  [T, R]
    def up(self, x_TKR: Tensor, out: Tensor, x8: Rows | None = None) -> Low | None: ...  # W x + B low + bias, from x and low
    def add(self, base_TN: Tensor, x_TK: Tensor, low_TR: Tensor, out: Tensor, x8: Rows | None = None) -> None: ...  # base + that
    def low_back(self, dy_TN: Tensor, out: Tensor | None = None) -> Tensor: ...  # B^T dy  [T, R]
    def back(self, dy_TNR: Tensor, out: Tensor, dy8: Rows | None = None) -> Low | None: ...  # W^T dy + (scale A)^T low_back


class Group(Protocol):
    outputs: int
    extra: int  # R: columns beside the inputs and beside the outputs' gradients; 0 without an adapter
    parameters: Sequence[Tensor]  # A, B of each adapter, in the order in which `gradients` answers

    def open(self, slot: int = 0) -> Opened: ...
    def room(self, x_TK: Tensor) -> Rows | None: ...  # where a producer puts e4m3 of x for the product; None if it is in 16 bits
    def gradients(self, x_TK: Tensor, dy_TNR: Tensor, low_TR: Tensor, into: list[Tensor] | None,
                  norm: tuple[Tensor, Tensor] | None = None) -> list[Tensor]: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """What one layer keeps (a key of SAVED), whether it waits in main memory, and how many tokens a tile of an MLP half has."""

    level: str = "keep"
    offload: bool = False
    tile: int = WHOLE


@dataclass(eq=False)
class Halves:
    """The frozen parts of one layer."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm_1: Tensor  # [D]
    norm_2: Tensor
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    norm_q: Tensor | None = None  # [H]: Qwen 3
    norm_k: Tensor | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(eq=False)
class Pass:
    """What all layers of one pass share: documents, rope tables, and where what waits for the backward is put."""

    layout: attention.Layout
    cos: Tensor  # [T, H / 2]
    sin: Tensor
    stash: Any  # models/stash.py: put(tensors, offload) -> ticket, take(ticket) -> tensors; handed: see `_hand_down`
    adds: bool = False  # a backward adds each layer's gradients to `.grad` itself, one launch a layer, and autograd gets none


def reference(x_TD: Tensor, halves: Halves, run: Pass, linear: Any) -> Tensor:
    """The definition, by autograd. `linear(name, x)` applies the linears of the group `name`, adapters included."""
    qkv = linear("qkv", rms_norm.reference(x_TD, halves.norm_1, halves.eps))
    q, k, v = qkv.unflatten(-1, (-1, halves.head_dim)).split([halves.heads, halves.kv_heads, halves.kv_heads], 1)
    if halves.norm_q is not None:
        q, k = rms_norm.reference(q, halves.norm_q, halves.eps), rms_norm.reference(k, halves.norm_k, halves.eps)
    q, k = rotary.reference(q, run.cos, run.sin), rotary.reference(k, run.cos, run.sin)
    mid = x_TD + linear("o", attention.reference(q, k, v, run.layout, halves.scale, halves.window).flatten(1))
    gate, up = linear("gate_up", rms_norm.reference(mid, halves.norm_2, halves.eps)).chunk(2, -1)
    return mid + linear("down", swiglu.reference(gate, up))


def layer(x_TD: Tensor, halves: Halves, run: Pass, policy: Policy, rows: Tensor | None = None) -> Tensor:
    """The layer's output [T, D], or its `rows` alone [L, D]: output projection and MLP then run on those only."""
    parameters = [p for group in halves.groups for p in group.parameters]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, *parameters))):
        return _forward(x_TD, halves, run, rows, None, policy.tile)
    return _Layer.apply(x_TD, halves, run, policy, rows, *parameters)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, halves, run, policy, rows, *parameters):
        kept: dict[str, Tensor] = {}
        y = _forward(x, halves, run, rows, kept, policy.tile, policy.level)
        ctx.ticket = run.stash.put({name: kept[name] for name in SAVED[policy.level] if name in kept}, policy.offload)
        ctx.halves, ctx.run, ctx.policy, ctx.rows = halves, run, policy, rows
        ctx.parameters = parameters if run.adds else ()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, ctx.ticket = ctx.run.stash.take(ctx.ticket), None
        halves, run = ctx.halves, ctx.run
        dx, found = _backward(dy, halves, run, ctx.rows, kept, ctx.policy.tile, ctx.needs_input_grad[0])
        if run.adds and found:  # none where only layers below have adapters
            torch._foreach_add_([p.grad for p in ctx.parameters], found)
            found = [None] * len(found)
        return dx, None, None, None, None, *found


# ---- forward -------------------------------------------------------------------------------------------------------------------


def _forward(x, halves, run, rows, kept, tile, level="keep") -> Tensor:
    """`kept` takes what the backward may want; None keeps nothing."""
    keep = kept if kept is not None else {}
    keep["x"] = x
    _attention_in(halves, run, keep, tile)
    if kept is None or "q" not in SAVED[level]:
        q, k, v = keep.pop("q"), keep.pop("k"), keep.pop("v")
    else:
        q, k, v = keep["q"], keep["k"], keep["v"]
    keep["out"], keep["lse"] = attention.forward(q, k, v, run.layout, halves.scale, halves.window)
    del q, k, v
    _attention_out(halves, rows, keep)
    if kept is None or "out" not in SAVED[level]:
        del keep["out"], keep["lse"]
    return _mlp(halves, keep, tile, level if kept is not None else "checkpoint")


def _attention_in(halves: Halves, run: Pass, keep: dict[str, Tensor], tile: int) -> None:
    """x -> q, k, v, normed and rotated as attention takes them."""
    x, h, group, width = keep["x"], halves.head_dim, halves.qkv, halves.norm_1.shape[0]
    q, k, v = (x.new_empty(len(x), n, h) for n in (halves.heads, halves.kv_heads, halves.kv_heads))
    ends = halves.heads * h, (halves.heads + halves.kv_heads) * h
    keep["rstd_1"], keep["low_qkv"] = _float(x, len(x)), x.new_empty(len(x), group.extra)
    weights = group.open()
    for at in _spans(len(x), tile):
        normed, qkv = x.new_empty(at.stop - at.start, width + group.extra), x.new_empty(at.stop - at.start, group.outputs)
        normed8 = group.room(normed[:, :width])
        _put(keep, "rstd_1", at, rms_norm.forward(x[at], halves.norm_1, halves.eps, normed[:, :width], normed8)[1])
        if group.extra:
            keep["low_qkv"][at] = weights.low(normed[:, :width], out=normed[:, width:])
        rest = weights.up(normed, out=qkv, x8=normed8)
        if halves.norm_q is not None:
            low_rank.add_(qkv, rest)
            rest = None
            for norm, part in ((halves.norm_q, qkv[:, : ends[0]]), (halves.norm_k, qkv[:, ends[0] : ends[1]])):
                part.copy_(rms_norm.forward(part.reshape(-1, h), norm, halves.eps)[0].view(part.shape))
        rotary.split(qkv, halves.heads, run.cos[at], run.sin[at], q[at], k[at], v[at], rest)
    keep["q"], keep["k"], keep["v"] = q, k, v


def _attention_out(halves: Halves, rows: Tensor | None, keep: dict[str, Tensor]) -> None:
    """Attention's output and x -> mid [L, D]."""
    x, out, weights = keep["x"], keep["out"].flatten(1), halves.o.open()
    if rows is not None:
        x, out = x[rows], out[rows]
    mid = torch.empty_like(x)
    keep["low_o"] = weights.low(out)
    weights.add(x, out, keep["low_o"], out=mid)
    keep["mid"] = mid


def _mlp(halves: Halves, keep: dict[str, Tensor], tile: int, level: str) -> Tensor:
    """mid -> y [L, D]. gate and up are kept whole (`keep`), as int8 (`int8`), or a tile at a time."""
    mid, up, down = keep["mid"], halves.gate_up, halves.down
    count, hidden, spans = len(mid), halves.gate_up.outputs // 2, list(_spans(len(mid), tile))
    y, several = torch.empty_like(mid), len(spans) > 1
    keep["rstd_2"] = _float(mid, count)
    keep["low_gate_up"], keep["low_down"] = mid.new_empty(count, up.extra), mid.new_empty(count, down.extra)
    if level == "keep":  # room for the backward's B^T dy beside it
        keep["gate_up"] = mid.new_empty(count, up.outputs + up.extra)
    codes = []
    opened = (up.open(0), down.open(1)) if several else None
    for at in spans:
        n, weights = at.stop - at.start, opened[0] if opened else up.open()
        gate_up = keep["gate_up"][at, : up.outputs] if level == "keep" else mid.new_empty(n, up.outputs)
        rest = _gate_up(halves, weights, mid[at], keep, at, gate_up)
        act = mid.new_empty(n, hidden)
        swiglu.forward(gate_up, act, low=rest, quantised=(act8 := down.room(act)))
        if level == "int8":
            codes.append(int8.quantise_groups(gate_up))
        del gate_up, rest
        weights = opened[1] if opened else down.open()
        _put(keep, "low_down", at, weights.low(act))
        weights.add(mid[at], act, keep["low_down"][at], out=y[at], x8=act8)
    if codes:
        keep["codes"], keep["scales"] = (torch.cat(parts) if several else parts[0] for parts in zip(*codes, strict=True))
    return y


def _gate_up(halves: Halves, weights: Opened, mid: Tensor, keep: dict[str, Tensor], at: slice, out: Tensor) -> Low | None:
    """One tile's gate and up into `out`; returns what `out` still lacks."""
    width, group = mid.shape[1], halves.gate_up
    normed = mid.new_empty(len(mid), width + group.extra)
    normed8 = group.room(normed[:, :width])
    _put(keep, "rstd_2", at, rms_norm.forward(mid, halves.norm_2, halves.eps, normed[:, :width], normed8)[1])
    if group.extra:
        keep["low_gate_up"][at] = weights.low(normed[:, :width], out=normed[:, width:])
    return weights.up(normed, out=out, x8=normed8)


# ---- backward ------------------------------------------------------------------------------------------------------------------


def _backward(dy, halves, run, rows, keep, tile, need_x) -> tuple[Tensor | None, list[Tensor]]:
    """(dx [T, D] or None, gradients of all groups' parameters, in order). What `keep` lacks is made again first."""
    if "mid" not in keep:
        if "out" not in keep:
            _attention_in(halves, run, keep, tile)
            keep["out"], keep["lse"] = attention.forward(keep["q"], keep["k"], keep["v"], run.layout, halves.scale, halves.window)
        _attention_out(halves, rows, keep)
    of_gate_up, of_down = _mlp_backward(dy, halves, run, keep, tile)
    dx, of_qkv, of_o = _attention_backward(halves, run, rows, keep, tile, need_x)
    return dx, [*of_qkv, *of_o, *of_gate_up, *of_down]


def _mlp_backward(dy: Tensor, halves: Halves, run: Pass, keep: dict[str, Tensor], tile: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of gate_up's parameters and of down's; into `keep` that of mid, with room for o's B^T dy beside it [L, D + R], and
    its e4m3. It overwrites what the layer above handed down.
    """
    mid, width, up, down = keep.pop("mid"), halves.norm_2.shape[0], halves.gate_up, halves.down
    spans, hidden = list(_spans(len(mid), tile)), up.outputs // 2
    dout_DR = _handed_down(dy, run, down.extra)
    in_place = dout_DR is not None and down.extra == halves.o.extra
    dmid = dout_DR if in_place else mid.new_empty(len(mid), width + halves.o.extra)
    dmid8 = halves.o.room(dmid[:, :width])
    of_up, of_down = None, None
    opened = (up.open(0), down.open(1)) if len(spans) > 1 else None
    again = "gate_up" not in keep and "codes" not in keep
    if "rstd_2" not in keep or again:
        keep["rstd_2"], keep["low_gate_up"] = _float(mid, len(mid)), mid.new_empty(len(mid), up.extra)
    whole = keep.pop("gate_up", None)
    for at in spans:
        n, weights = at.stop - at.start, opened[1] if opened else down.open()
        dout = mid.new_empty(n, width + down.extra) if dout_DR is None else dout_DR[at]
        dact = mid.new_empty(n, hidden)
        if dout_DR is None:
            dout[:, :width] = dy[at]
        if down.extra:
            weights.low_back(dout[:, :width], out=dout[:, width:])
        rest_dact = weights.back(dout, out=dact)
        weights = opened[0] if opened else up.open()
        gate_up = whole[at] if whole is not None else mid.new_empty(n, up.outputs + up.extra)
        both, rest = gate_up[:, : up.outputs], None
        if again:
            rest = _gate_up(halves, weights, mid[at], keep, at, both)
        elif whole is None:
            int8.dequantise_groups(keep["codes"][at], keep["scales"][at], both)
        both8 = up.room(both)
        swiglu.backward_(dact, both, low=rest, low_da=rest_dact, quantised=both8)
        # dact is silu(gate) * up now, both is their gradients
        if down.parameters:
            of_down = down.gradients(dact, dout, keep["low_down"][at], of_down)
        del dout, dact, rest, rest_dact
        if up.extra:
            weights.low_back(both, out=gate_up[:, up.outputs :])
        if up.parameters:
            of_up = up.gradients(mid[at], gate_up, keep["low_gate_up"][at], of_up, (keep["rstd_2"][at], halves.norm_2))
        dnormed = mid.new_empty(n, width)
        low_rank.add_(dnormed, weights.back(gate_up, out=dnormed, dy8=both8))
        of_tile = None if dmid8 is None else (dmid8[0][at], dmid8[1][at])
        rms_norm.backward(dnormed, mid[at], halves.norm_2, keep["rstd_2"][at], dy[at], dmid[at, :width], of_tile)
        del gate_up, both, both8, dnormed  # before the next tile takes its own
    keep["dmid"], keep["dmid8"] = dmid, dmid8
    return of_up or [], of_down or []


def _attention_backward(halves, run, rows, keep, tile, need_x) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """(dx or None, gradients of qkv's parameters, of o's)."""
    x, group, width, dmid_DR, dmid8 = keep["x"], halves.qkv, halves.norm_1.shape[0], keep.pop("dmid"), keep.pop("dmid8")
    out, weights = keep.pop("out"), halves.o.open()
    flat = out.flatten(1) if rows is None else out.flatten(1)[rows]
    dmid = dmid_DR[:, :width]
    if halves.o.extra:
        weights.low_back(dmid, out=dmid_DR[:, width:])
    dout = torch.empty_like(flat)
    low_rank.add_(dout, weights.back(dmid_DR, out=dout, dy8=dmid8))
    of_o = halves.o.gradients(flat, dmid_DR, keep["low_o"], None) if halves.o.parameters else []
    del flat, dmid8
    if rows is not None:
        dout = torch.zeros_like(out).flatten(1).index_copy_(0, rows, dout)
        dmid = torch.zeros_like(x).index_copy_(0, rows, dmid)
    del dmid_DR
    if "q" not in keep:
        _attention_in(halves, run, keep, tile)
    q, k, v = keep.pop("q"), keep.pop("k"), keep.pop("v")
    grads = attention.backward(dout.view(q.shape), q, k, v, out, keep.pop("lse"), run.layout, halves.scale, halves.window)
    del out, dout, q, k, v
    if not (need_x or group.parameters):
        return None, [], of_o
    dx, of_qkv, weights = _hand_down(x, run, halves.down.extra) if need_x else None, None, group.open()
    for at in _spans(len(x), tile):
        n = at.stop - at.start
        dqkv, normed = x.new_empty(n, group.outputs + group.extra), None
        if halves.norm_q is not None:
            normed = x.new_empty(n, width + group.extra)
            rms_norm.forward(x[at], halves.norm_1, halves.eps, out=normed[:, :width])
        _back_to_qkv(grads, halves, run, at, weights, normed, keep, dqkv)
        if group.extra:
            weights.low_back(dqkv[:, : group.outputs], out=dqkv[:, group.outputs :])
        if group.parameters:
            of_qkv = group.gradients(x[at], dqkv, keep["low_qkv"][at], of_qkv, (keep["rstd_1"][at], halves.norm_1))
        if need_x:
            dnormed = x.new_empty(n, width)
            low_rank.add_(dnormed, weights.back(dqkv, out=dnormed))
            rms_norm.backward(dnormed, x[at], halves.norm_1, keep["rstd_1"][at], dmid[at], out=dx[at])
    return dx, of_qkv or [], of_o


def _hand_down(x: Tensor, run: Pass, extra: int) -> Tensor:
    """Room for x's gradient in rows with `extra` columns beside it, where the layer below puts its B^T dy: it need not copy."""
    run.stash.handed = x.new_empty(len(x), x.shape[1] + extra)
    return run.stash.handed[:, : x.shape[1]]


def _handed_down(dy: Tensor, run: Pass, extra: int) -> Tensor | None:
    """The wider rows [T, D + extra] that `dy` lies in, if the layer above made them and nothing has come between."""
    wide, run.stash.handed = run.stash.handed, None
    same = wide is not None and wide.data_ptr() == dy.data_ptr() and len(wide) == len(dy)
    return wide if same and wide.shape[1] == dy.shape[1] + extra else None


def _back_to_qkv(grads, halves, run, at, weights, normed, keep, out) -> None:
    """Gradients of what attention took -> gradients of the projection's output, into the columns of `out`."""
    h, ends = halves.head_dim, (halves.heads * halves.head_dim, (halves.heads + halves.kv_heads) * halves.head_dim)
    raw = None
    if halves.norm_q is not None:  # their norms' backward needs what went in: the projection again, no policy keeps it
        raw = out.new_empty(len(out), halves.qkv.outputs)
        if halves.qkv.extra:
            normed[:, halves.norm_1.shape[0] :] = keep["low_qkv"][at]
        low_rank.add_(raw, weights.up(normed, out=raw))
    rotary.join(*(g[at] for g in grads), run.cos[at], run.sin[at], out[:, : halves.qkv.outputs])
    if raw is not None:
        for norm, columns in ((halves.norm_q, slice(0, ends[0])), (halves.norm_k, slice(*ends))):
            place, before = out[:, columns], raw[:, columns].reshape(-1, h)
            rstd = rms_norm.forward(before, norm, halves.eps)[1]
            place.copy_(rms_norm.backward(place.reshape(-1, h), before, norm, rstd).view(place.shape))


def _put(keep: dict[str, Tensor], name: str, at: slice, value: Tensor) -> None:
    """A tile's part of what is kept; all of it where there is but one tile."""
    if len(value) == len(keep[name]):
        keep[name] = value
    else:
        keep[name][at] = value


def _float(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _spans(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))
