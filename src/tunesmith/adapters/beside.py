"""What is trained beside the low-rank part: single rows of the vocabulary, and whole modules.

PEFT's trainable_token_indices and modules_to_save, under the names they have in its files.

Shape letters: K trained tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tunesmith.adapters.lora import Twin, is_linear
from tunesmith.models.linear import Linear, NF4Linear


class Tokens(Twin):
    """An embedding, or the vocabulary projection, of which the rows `ids` are replaced by `delta` [K, D], float32 masters.

    `tied` is the embedding's twin when the projection shares its matrix: then both use one `delta`, and the file holds it once.
    """

    def __init__(self, base: nn.Module, ids: Sequence[int], start_KD: Tensor, tied: Tokens | None = None):
        super().__init__(base)
        weight = base.weight
        self.ids = tuple(ids)
        self.register_buffer("index_K", torch.tensor(self.ids, device=weight.device), persistent=False)
        row_V = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)  # 0: not trained, k + 1: row k of delta
        row_V[self.index_K] = torch.arange(1, len(ids) + 1, dtype=torch.int32, device=weight.device)
        self.register_buffer("row_V", row_V, persistent=False)
        self._tied = (tied,)  # in a tuple, so that it is no submodule
        if tied is None:
            master = torch.promote_types(torch.float32, weight.dtype)
            self.delta = nn.Parameter(start_KD.detach().to(master, copy=True))

    @property
    def rows_KD(self) -> nn.Parameter:
        return self.delta if self._tied[0] is None else self._tied[0].delta

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        return self._project(x) if is_linear(self.base) else self._embed(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        out, row = self.base(tokens), self.row_V[tokens]
        rows = self.rows_KD.to(self.base.weight.dtype)
        table = torch.cat([torch.zeros_like(rows[:1]), rows])
        trained = F.embedding(row, table, padding_idx=0)  # the padding row, which all other tokens read, takes no gradient
        scale = getattr(self.base, "embed_scale", None)  # transformers' Gemma scales inside the module
        trained = trained if scale is None else trained * scale.to(trained.dtype)
        return torch.where((row > 0)[..., None], trained.to(out.dtype), out)

    def _project(self, x: Tensor) -> Tensor:
        bias = None if self.base.bias is None else self.base.bias[self.index_K]
        return self.base(x).index_copy(-1, self.index_K, F.linear(x, self.rows_KD.to(x.dtype), bias))

    @property
    def weight(self) -> Tensor:
        """The whole matrix [V, D] with the trained rows in it, differentiable."""
        base = self.base.weight
        return base.index_copy(0, self.index_K, self.rows_KD.to(base.dtype)) if self.enabled else base

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(dtype or self.base.weight.dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.delta} if self._tied[0] is None else {}

    @torch.no_grad()
    def folded(self, dtype: torch.dtype | None = None) -> nn.Module:
        weight = self.base.weight
        weight[self.index_K] = self.rows_KD.to(weight.dtype)  # in place, so that tied stays tied
        return self.base

    def extra_repr(self) -> str:
        return f"tokens={len(self.ids)}, tied={self._tied[0] is not None}"


class Saved(Twin):
    """A module trained whole: `copy` has float32 masters and computes in the base's dtype."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        plain = _dense_copy(base) if isinstance(base, NF4Linear) else base
        self.dtypes = {name: p.dtype for name, p in plain.named_parameters()}
        self.copy = copy.deepcopy(plain)
        for name, parameter in list(self.copy.named_parameters()):
            owner, _, last = name.rpartition(".")
            master = parameter.detach().to(torch.promote_types(torch.float32, parameter.dtype), copy=True)
            setattr(self.copy.get_submodule(owner), last, nn.Parameter(master))

    def _cast(self) -> dict[str, Tensor]:
        return {name: p.to(self.dtypes[name]) for name, p in self.copy.named_parameters()}

    def forward(self, *args, **kwargs):
        if not self.enabled:
            return self.base(*args, **kwargs)
        return functional_call(self.copy, self._cast(), args, kwargs)

    @property
    def weight(self) -> Tensor:
        return self._cast()["weight"] if self.enabled else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self._cast().get("bias") if self.enabled else getattr(self.base, "bias", None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.copy.named_parameters())

    @torch.no_grad()
    def folded(self, dtype: torch.dtype | None = None) -> nn.Module:
        for name, value in self._cast().items():
            owner, _, last = name.rpartition(".")
            setattr(self.copy.get_submodule(owner), last, nn.Parameter(value.to(dtype or value.dtype), requires_grad=False))
        return self.copy


def _dense_copy(base: NF4Linear) -> Linear:
    plain = Linear(base.in_features, base.out_features, base.bias is not None, dtype=base.dtype, device="meta")
    plain.set_weight("weight", base.dequantize())
    if base.bias is not None:
        plain.set_weight("bias", base.bias.detach().clone())
    return plain
