"""Frozen linears that share an input, side by side with their adapters, as ops/half_blocks.py takes them.

A group opens as one dense matrix, its parts' outputs one below the other and room for the adapters around it:

    [ W        B  ]   N rows          forward   y  = [x, x (sA)^T]  [W, B]^T         one GEMM over K + R
    [ scale A     ]   R rows          backward  dx = [dy, dy B]     [W; sA]          one GEMM over N + R
      K columns  R                    dA = scale (dy B)^T x,  dB = dy^T (x (sA)^T)

so a base and all its low-rank parts are one product, rounded once. B is block-diagonal: a part's columns are zero in the rows of
the others. An NF4 base is decoded into a scratch buffer that all groups share and lies there only while it is used; a dense base
lives in such a matrix for good, its linears' weights being views of it, and so does an NF4 base that is cached.

With `fp8` both products of the base run in e4m3 (ops/fp8.py): the weight with one static scale an output for the forward, and once
more transposed with one an input for the backward, because the hardware wants the summed dimension contiguous on both sides;
activations and gradients with one scale a token. The adapters stay in 16 bits beside it, and their products are left to the kernels
that read those of the base (`OpenedFp8`).

Shape letters: T tokens, K inputs, N outputs of all parts, R their ranks added up and padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tunesmith.models.linear import Linear, NF4Linear
from tunesmith.ops import backend, fp8, nf4
from tunesmith.ops import low_rank as low_rank_op
from tunesmith.ops.low_rank import Low


def low_rank(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) of an adapted linear that answers it; None for a plain one or one whose adapter is switched off."""
    return module.low_rank() if hasattr(module, "low_rank") else None


def base_of(module: nn.Module) -> nn.Module:
    return module.base if hasattr(module, "low_rank") else module


def refusal(module: nn.Module) -> str:
    """Why this linear cannot be part of a group now; empty when it can."""
    base = base_of(module)
    if type(base) not in (Linear, NF4Linear):
        return f"{type(base).__name__} is neither dense nor NF4"
    if any(p.requires_grad for p in base.parameters()):
        return "its weight is trained"
    if base is not module and module.enabled and low_rank(module) is None:
        return f"{type(module).__name__.lower()} is more than a low-rank product" if not module.dropout else "it drops inputs"
    return ""


class Scratch:
    """Dense matrices while they are needed: one flat buffer a slot, grown to the largest that was asked for."""

    def __init__(self):
        self.buffers: dict[tuple, Tensor] = {}

    def take(self, slot: object, rows: int, columns: int, like: torch.dtype, device: torch.device) -> Tensor:
        key = slot, like, device
        if key not in self.buffers or self.buffers[key].numel() < rows * columns:
            self.buffers.pop(key, None)  # first, so that both never stand side by side
            self.buffers[key] = torch.empty(rows * columns, dtype=like, device=device)
        return self.buffers[key][: rows * columns].view(rows, columns)

    def clear(self) -> None:
        self.buffers.clear()


class Group:
    """`modules`: linears or adapted twins with the same input, in the order of their outputs. All of `refusal` are empty."""

    def __init__(self, modules: Sequence[nn.Module], scratch: Scratch, dtype: torch.dtype, fp8: bool = False):
        self.modules, self.bases = list(modules), [base_of(m) for m in modules]
        self.scratch, self.dtype = scratch, dtype
        self.device = self.bases[0].weight.device
        self.inputs, sizes = self.bases[0].in_features, [b.out_features for b in self.bases]
        ranks = [m.rank if hasattr(m, "low_rank") else 0 for m in modules]
        self.rows, self.columns = _spans(sizes), _spans(ranks)  # of each part
        self.outputs, self.rank = sum(sizes), sum(ranks)
        unit = 64 if self.inputs >= 1024 else 8  # a GEMM reads 64 columns at once anyway; small models should not pay for that
        self.extra = -(-self.rank // unit) * unit
        self.opened: dict[object, tuple] = {}  # by slot: where everything lay, the opened weights, what fills them
        self.refresh()
        biases = [b.bias for b in self.bases]
        self.bias = None
        if any(b is not None for b in biases):
            self.bias = torch.cat([torch.zeros(n, dtype=dtype, device=self.device) if b is None else b.detach().to(dtype)
                                   for b, n in zip(biases, sizes, strict=True)])  # fmt: skip
        self.kept: Tensor | None = None  # the matrix, for a dense or cached base
        self.fp8 = _Fp8(self) if fp8 else None
        self.fused = _fuse(self.bases)
        if all(isinstance(b, Linear) for b in self.bases):
            self._adopt()

    def refresh(self) -> None:
        """Follow adapters that were switched on or off."""
        found = [low_rank(m) for m in self.modules]
        self.scales = [a[2] if a else 1.0 for a in found]
        self.adapters = [a[:2] if a else None for a in found]
        self.parameters = tuple(t for a in self.adapters if a for t in a)
        self.opened.clear()

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the dense matrix."""
        return (self.outputs + self.extra) * (self.inputs + self.extra) * self.dtype.itemsize

    def cache(self) -> None:
        """Keep the dense matrix of an NF4 base from now on: no decoding any more, for 2 bytes a weight."""
        if self.kept is None:
            self.kept = self._decoded(torch.empty(self._shape, dtype=self.dtype, device=self.device))

    def evict(self) -> bool:
        """Give a cached matrix back; True when there was one."""
        cached = self.kept is not None and not all(isinstance(b, Linear) for b in self.bases)
        if cached:
            self.kept = None
            self.opened.clear()  # what was opened of it holds it too
        return cached

    def reserve(self) -> None:
        """Take this group's scratch now. The largest group first: a buffer that grows later leaves the small one in use until all
        that was opened in it is opened again.
        """
        if self.fp8 is not None:
            for key in ((0, False), (0, True)):
                self.scratch.take(key, self.outputs, self.inputs, fp8.E4M3, self.device)
            shape = self.extra, self.inputs + self.outputs
            self.scratch.take(("low", self.inputs, self.outputs), *shape, self.dtype, self.device)
        elif self.kept is None:
            self.scratch.take(0, *self._shape, self.dtype, self.device)

    def open(self, slot: int = 0) -> Opened:
        """The dense matrix with the adapters as they are now; valid until the same slot is opened again."""
        if self.fp8 is not None:
            if slot not in self.opened:
                self.opened[slot] = (OpenedFp8(self, slot),)
            return self.opened[slot][0].again()
        matrix = self.kept if self.kept is not None else self.scratch.take(slot, *self._shape, self.dtype, self.device)
        place = matrix.data_ptr(), *(p.data_ptr() for p in self.parameters)
        if slot not in self.opened or self.opened[slot][0] != place:
            self.opened[slot] = place, Opened(self, matrix), self._recorded(matrix)
        _, opened, fill = self.opened[slot]
        fill()
        return opened

    def _recorded(self, matrix: Tensor) -> Callable[[], object]:
        """What brings weights and adapters into `matrix`."""
        n, k, decoded = self.outputs, self.inputs, matrix is self.kept

        def fill() -> None:
            if not decoded:
                self._decoded(matrix)
            if self.extra:
                self._place(matrix[n:, :k], matrix[:n, k:])

        return backend.Recorded(fill) if backend.triton_for(matrix) and matrix.is_cuda else fill

    def room(self, x_TK: Tensor) -> fp8.Rows | None:
        """Where a producer puts e4m3 of what this group's product reads; None where that is in 16 bits."""
        return None if self.fp8 is None else fp8.empty_rows(x_TK)

    def gradients(self, x_TK: Tensor, dy_TNR: Tensor, low_TR: Tensor, into: list[Tensor] | None,
                  norm: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:  # fmt: skip
        """Gradients of A and B of each part, float32, in the order of `parameters`; added to `into` where it is given.

        With `norm`, a norm's 1 / rms [T] and gain [K], the linears' input was norm(x): dA = (dy B / rms)^T x, times the gain. That
        spares making norm(x) again, 45 us for 8,192 x 4,096 on an H100. fp16 cannot: 1 / rms of an embedding is in the hundreds,
        and the gradient beside it carries the loss scale.
        """
        n, found = self.outputs, []
        back_TR = dy_TNR[:, n : n + self.rank]
        if norm is not None and x_TK.dtype is torch.float16:
            x_TK = torch.mul(x_TK, norm[0][:, None], out=torch.empty_like(x_TK))
        elif norm is not None:
            back_TR = torch.mul(back_TR, norm[0][:, None], out=torch.empty_like(back_TR, memory_format=torch.contiguous_format))
        da_RK = wide_mm(back_TR.t(), x_TK)
        if norm is not None:
            da_RK.mul_(norm[1])
        db_NR = wide_mm(
            dy_TNR[:, :n].t(), low_TR[:, : self.rank]
        )  # all parts at once: each takes its block, the rest is not asked for
        for adapter, scale, rows, columns in zip(self.adapters, self.scales, self.rows, self.columns, strict=True):
            if adapter is None:
                continue
            da = da_RK[columns]
            if scale != 1.0:
                da.mul_(scale)
            found += [da, db_NR[rows, columns]]
        if into is None:
            return found
        for whole, part in zip(into, found, strict=True):
            whole += part
        return into

    @property
    def _shape(self) -> tuple[int, int]:
        return self.outputs + self.extra, self.inputs + self.extra

    def _place(self, a_RK: Tensor, b_NR: Tensor) -> None:
        """The adapters as they are now."""
        found = zip(self.adapters, self.scales, self.rows, self.columns, strict=True)
        low_rank_op.place([(*(t.detach() for t in a), scale, rows, columns) for a, scale, rows, columns in found if a], a_RK, b_NR)

    def stored(self) -> list[tuple[nf4.NF4 | nn.Module, slice]]:
        """What lies in the store and the outputs it is: all parts as one NF4 weight where they lie so."""
        if self.fused is not None:
            return [(self.fused, slice(0, self.outputs))]
        found = (b.quantised() if isinstance(b, NF4Linear) else b for b in self.bases)
        return list(zip(found, self.rows, strict=True))

    def _decoded(self, matrix: Tensor) -> Tensor:
        for part, rows in self.stored():
            at = matrix[rows, : self.inputs]
            if isinstance(part, nf4.NF4):
                nf4.decode(part, at)
            else:
                at.copy_(part.weight)
        return matrix

    def _adopt(self) -> None:
        """Move dense weights into one matrix and leave views of it in their place: nothing is held twice."""
        matrix = torch.empty(self._shape, dtype=self.dtype, device=self.device)
        for base, rows in zip(self.bases, self.rows, strict=True):
            view = matrix[rows, : self.inputs]
            with torch.no_grad():
                view.copy_(base.weight)
            base.weight = nn.Parameter(view, requires_grad=False)
        self.kept = matrix


class Opened:
    """A group's matrix while it lies dense. See ops/half_blocks.py for what each asks."""

    def __init__(self, group: Group, matrix: Tensor):
        n, k = group.outputs, group.inputs
        self.group, self.matrix = group, matrix
        self.a_RK, self.b_NR, self.w_NK = matrix[n:, :k], matrix[:n, k:], matrix[:n, :k]

    def low(self, x_TK: Tensor, out: Tensor | None = None) -> Tensor:
        """x (scale A)^T [T, R]"""
        if not self.group.extra:
            return x_TK.new_empty(len(x_TK), 0)
        return torch.mm(x_TK, self.a_RK.t(), out=out)

    def up(self, x_TKR: Tensor, out: Tensor, x8: None = None) -> None:
        """out = x W^T + low B^T + bias, x and low side by side."""
        weight = self.matrix[: self.group.outputs].t()
        if self.group.bias is None:
            torch.mm(x_TKR, weight, out=out)
        else:
            torch.addmm(self.group.bias, x_TKR, weight, out=out)

    def add(self, base_TN: Tensor, x_TK: Tensor, low_TR: Tensor, out: Tensor, x8: None = None) -> None:
        """out = base + x W^T + low B^T; a new tensor, base stays."""
        if self.group.extra:  # the low-rank product brings the residual along: no pass more than copying it would take
            low_rank_op.residual(base_TN, low_TR, self.b_NR, out)
            out.addmm_(x_TK, self.w_NK.t())
        else:
            torch.addmm(base_TN, x_TK, self.w_NK.t(), out=out)
        if self.group.bias is not None:
            out.add_(self.group.bias)

    def low_back(self, dy_TN: Tensor, out: Tensor | None = None) -> Tensor:
        """dy B [T, R]"""
        return torch.mm(dy_TN, self.b_NR, out=out)

    def back(self, dy_TNR: Tensor, out: Tensor, dy8: None = None) -> None:
        """out = dy W + low_back (scale A), both side by side."""
        torch.mm(dy_TNR, self.matrix[:, : self.group.inputs], out=out)


class _Fp8:
    """The static scales of a group's weight: the largest value of a row of W, or of W^T, becomes e4m3's largest, 448."""

    def __init__(self, group: Group):
        found = [_extremes(base) for base in group.bases]
        self.of_N = torch.cat([rows for rows, _ in found]).div_(fp8.LARGEST).clamp_(min=fp8.TINY)
        self.of_K = torch.stack([columns for _, columns in found]).amax(0).div_(fp8.LARGEST).clamp_(min=fp8.TINY)


def _extremes(base: nn.Module) -> tuple[Tensor, Tensor]:
    """max |w| of each row [N] and of each column [K], float32."""
    if isinstance(base, NF4Linear):
        return nf4.absmax_rows_columns(base.quantised())
    size = base.weight.detach().abs()
    return size.amax(1).float(), size.amax(0).float()


class OpenedFp8:
    """As Opened, its products of the base in e4m3. W or W^T is decoded when it is asked for.

    `up` and `back` leave the low-rank part out and answer it; `add` brings it along. `x8`, `dy8`: what a producer put into `room`.
    """

    def __init__(self, group: Group, slot: int):
        self.group, self.slot = group, slot
        self.fills: dict[object, tuple[tuple, Callable[[], object]]] = {}  # by what is filled: where everything lies, and how
        self.decoded: dict[bool, Tensor] = {}

    def again(self) -> OpenedFp8:
        """The adapters as they are now; nothing decoded yet."""
        group = self.group
        # a place for each shape: what one group left to add is added when the next is open already
        shape = group.extra, group.inputs + group.outputs
        flat = group.scratch.take(("low", group.inputs, group.outputs), *shape, group.dtype, group.device).view(-1)
        self.a_RK = flat[: group.extra * group.inputs].view(group.extra, group.inputs)
        self.b_NR = flat[group.extra * group.inputs :].view(group.outputs, group.extra)
        self.decoded = {}
        if group.extra:
            self._fill("low", flat, lambda: group._place(self.a_RK, self.b_NR), *group.parameters)
        return self

    def _fill(self, name: object, into: Tensor, body: Callable[[], object], *read: Tensor) -> None:
        place = into.data_ptr(), *(t.data_ptr() for t in read)
        if name not in self.fills or self.fills[name][0] != place:
            recorded = into.is_cuda and bool(backend.triton_for(into))
            self.fills[name] = place, backend.Recorded(body) if recorded else body
        self.fills[name][1]()

    low, low_back = Opened.low, Opened.low_back

    def up(self, x_TKR: Tensor, out: Tensor, x8: fp8.Rows | None = None) -> Low | None:
        """out = x W^T + bias; left to add: low B^T"""
        k, group = self.group.inputs, self.group
        fp8.matmul(*(x8 or fp8.quantise_rows(x_TKR[:, :k])), self._decoded(False), group.fp8.of_N, out=out)
        if group.bias is not None:
            out.add_(group.bias)
        return (x_TKR[:, k : k + group.rank], self.b_NR[:, : group.rank]) if group.rank else None

    def add(self, base_TN: Tensor, x_TK: Tensor, low_TR: Tensor, out: Tensor, x8: fp8.Rows | None = None) -> None:
        """out = base + x W^T + low B^T"""
        group = self.group
        y = fp8.matmul(*(x8 or fp8.quantise_rows(x_TK)), self._decoded(False), group.fp8.of_N, out_dtype=out.dtype)
        if group.extra:
            low_rank_op.residual(base_TN, low_TR, self.b_NR, out, extra=y)
        else:
            torch.add(base_TN, y, out=out)
        if group.bias is not None:
            out.add_(group.bias)

    def back(self, dy_TNR: Tensor, out: Tensor, dy8: fp8.Rows | None = None) -> Low | None:
        """out = dy W; left to add: low_back (scale A)"""
        n, group = self.group.outputs, self.group
        fp8.matmul(*(dy8 or fp8.quantise_rows(dy_TNR[:, :n])), self._decoded(True), group.fp8.of_K, out=out)
        return (dy_TNR[:, n : n + group.rank], self.a_RK[: group.rank].t()) if group.rank else None

    def _decoded(self, turned: bool) -> Tensor:
        """W [N, K], or turned W^T [K, N]; each once."""
        if turned not in self.decoded:
            group, n, k = self.group, self.group.outputs, self.group.inputs
            weight = group.scratch.take((self.slot, turned), *((k, n) if turned else (n, k)), fp8.E4M3, group.device)
            self._fill(turned, weight, lambda: _decode_fp8(group, turned, weight))
            self.decoded[turned] = weight
        return self.decoded[turned]


def _decode_fp8(group: Group, turned: bool, weight: Tensor) -> None:
    for part, rows in group.stored():
        at, scale = (weight[:, rows], group.fp8.of_K) if turned else (weight[rows], group.fp8.of_N[rows])
        if isinstance(part, nf4.NF4):
            (nf4.decode_fp8_transposed if turned else nf4.decode_fp8)(part, scale, at)
        else:
            fp8.cast(part.weight, scale, at, turned)


def _fuse(bases: Sequence[nn.Module]) -> nf4.NF4 | None:
    """The bases' NF4 stores one behind the other as one weight, each quantised on its own; their buffers become views of it. None
    where there is but one, or where a store does not end with a whole nested block (16,384 weights): each is decoded by itself.
    """
    parts = [b.quantised() for b in bases if isinstance(b, NF4Linear)]
    if len(parts) < 2 or len(parts) < len(bases) or len({(p.block, p.nested_block, p.nested_absmax is None) for p in parts}) > 1:
        return None
    first = parts[0]
    if first.nested_absmax is None or any(p.numel % (p.block * p.nested_block) for p in parts[:-1]):
        return None
    maps = [p.nested_map for p in parts]
    if any(not torch.equal(m, maps[0]) for m in maps[1:]):
        return None
    whole = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "absmax", "nested_absmax")}
    offset = torch.cat([p.offset.reshape(-1).expand(len(p.nested_absmax)) for p in parts])
    for name, attribute in (("codes", "weight"), ("absmax", "absmax"), ("nested_absmax", "nested_absmax")):
        for base, view in zip(bases, whole[name].split([len(getattr(p, name)) for p in parts]), strict=True):
            setattr(base, attribute, view)
    shape = (sum(p.shape[0] for p in parts), first.shape[1])
    return nf4.NF4(
        **whole, nested_map=first.nested_map, offset=offset, shape=shape, block=first.block, nested_block=first.nested_block
    )


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32: what a GEMM has added up is not rounded to 16 bits again."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _spans(sizes: Sequence[int]) -> list[slice]:
    out, at = [], 0
    for size in sizes:
        out.append(slice(at, at + size))
        at += size
    return out
