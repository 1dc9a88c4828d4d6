"""One decoder for Llama, Mistral, Phi-3, Qwen 2 and 3, Gemma 1 to 3, built from a Spec. Parameter names are the checkpoint's own.

It works on one flat stream of documents without padding (ops/attention.py, Layout): no batch dimension, no attention mask.
Linears come from a factory passed in, so the decoder does not know how weights are stored. A layer is two half-blocks,
attention and MLP, each from residual stream to residual stream.

Shape letters: T tokens in the stream, L chosen rows, D model width, Q query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.models.cache import KVCache
from tunesmith.models.fast import FastLayers
from tunesmith.models.linear import Linear
from tunesmith.ops.attention import Layout, attention, to_device
from tunesmith.ops.rms_norm import rms_norm
from tunesmith.ops.rotary import regime, rotate, tables
from tunesmith.ops.swiglu import swiglu
from tunesmith.spec import Spec, has_bias

LinearFactory = Callable[[int, int, bool], nn.Module]  # (in_features, out_features, bias)
Attend = Callable[[int, Tensor, Tensor, Tensor, float, int | None, float | None], Tensor]  # layer, q, k, v, scale, window, softcap
Tables = tuple[Tensor, Tensor]  # cos, sin [T, R]


class RMSNorm(nn.Module):
    """See ops/rms_norm.py; `offset` 1 is Gemma's form."""

    def __init__(self, width: int, spec: Spec, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.eps, self.offset = spec.norm_eps, float(spec.unit_offset)
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class Attention(nn.Module):
    def __init__(self, spec: Spec, layer: int, linear: LinearFactory, **place: Any):
        super().__init__()
        self.spec, self.layer = spec, layer
        self.window = spec.window if spec.slides(layer) else None
        self.scale = spec.attention_scale or spec.head_dim**-0.5
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        bias = partial(has_bias, spec)
        if spec.fused:
            self.qkv_proj = linear(spec.dim, q + 2 * kv, bias("self_attn.qkv_proj"))
        else:
            self.q_proj = linear(spec.dim, q, bias("self_attn.q_proj"))
            self.k_proj = linear(spec.dim, kv, bias("self_attn.k_proj"))
            self.v_proj = linear(spec.dim, kv, bias("self_attn.v_proj"))
        self.o_proj = linear(q, spec.dim, bias("self_attn.o_proj"))
        if spec.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(spec.head_dim, spec, **place), RMSNorm(spec.head_dim, spec, **place)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Q, H], k and v [T, K, H], neither normed nor rotated."""
        s = self.spec
        if s.fused:
            q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
            parts = self.qkv_proj(x_TD).split([q, kv, kv], -1)
        else:
            parts = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        return tuple(y.unflatten(-1, (-1, s.head_dim)) for y in parts)

    def forward(self, x_TD: Tensor, rope: Tables, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """`rows`: only these rows of the output are computed."""
        q, k, v = self.project(x_TD)
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y_TQH = attend(self.layer, rotate(q, *rope), rotate(k, *rope), v, self.scale, self.window, self.spec.attention_softcap)
        return self.o_proj((y_TQH if rows is None else y_TQH[rows]).flatten(-2))


class MLP(nn.Module):
    def __init__(self, spec: Spec, linear: LinearFactory):
        super().__init__()
        self.spec, bias = spec, spec.mlp_bias
        if spec.fused:
            self.gate_up_proj = linear(spec.dim, 2 * spec.hidden, bias)
        else:
            self.gate_proj = linear(spec.dim, spec.hidden, bias)
            self.up_proj = linear(spec.dim, spec.hidden, bias)
        self.down_proj = linear(spec.hidden, spec.dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.spec.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(swiglu(gate, up, self.spec.activation))


class Block(nn.Module):
    """One layer: two half-blocks."""

    def __init__(self, spec: Spec, layer: int, linear: LinearFactory, **place: Any):
        super().__init__()
        self.self_attn, self.mlp = Attention(spec, layer, linear, **place), MLP(spec, linear)
        self.input_layernorm = RMSNorm(spec.dim, spec, **place)
        self.post_attention_layernorm = RMSNorm(spec.dim, spec, **place)
        self.sandwich = spec.sandwich
        if spec.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(spec.dim, spec, **place)
            self.post_feedforward_layernorm = RMSNorm(spec.dim, spec, **place)

    def attention_half(self, x_TD: Tensor, rope: Tables, attend: Attend, rows: Tensor | None = None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x_TD), rope, attend, rows)
        if self.sandwich:
            y = self.post_attention_layernorm(y)
        return (x_TD if rows is None else x_TD[rows]) + y

    def mlp_half(self, x_TD: Tensor) -> Tensor:
        if self.sandwich:
            return x_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD)))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))

    def forward(self, x_TD: Tensor, rope: Tables, attend: Attend, rows: Tensor | None = None) -> Tensor:
        return self.mlp_half(self.attention_half(x_TD, rope, attend, rows))


class Trunk(nn.Module):
    """Embedding, layers, final norm; the Decoder runs it."""

    def __init__(self, spec: Spec, linear: LinearFactory, **place: Any):
        super().__init__()
        values = torch.empty(spec.vocab, spec.dim, **place)
        self.embed_tokens = nn.Embedding(spec.vocab, spec.dim, _weight=values)
        if not values.is_meta:  # drawing numbers that are not there would import all of torch.compile: 1 to 8 s
            self.embed_tokens.reset_parameters()
        self.layers = nn.ModuleList(Block(spec, i, linear, **place) for i in range(spec.layers))
        self.norm = RMSNorm(spec.dim, spec, **place)


class Decoder(nn.Module):
    """Tokens to logits. `hidden` stops before the vocabulary, for losses that fuse the projection.

    `linear(in_features, out_features, bias)` makes the linears of the layers (default: dense); the head is always dense.
    `checkpoint_layers`: keep only each layer's input and compute the layer again in the backward; gradients stay the same.
    `fast`: the layers as half-blocks, set by whoever trains; they run where they can and there is no cache.
    """

    def __init__(self, spec: Spec, *, linear: LinearFactory | None = None, config: Mapping[str, Any] | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        linear = linear or (lambda i, o, bias: Linear(i, o, bias, **place))
        self.spec, self.config = spec, dict(config or {})
        self.checkpoint_layers = False
        self.fast: FastLayers | None = None
        self.model = Trunk(spec, linear, **place)
        self.lm_head = Linear(spec.dim, spec.vocab, False, **place)
        self.tie()

    def tie(self) -> None:
        """Let the head be the embedding where the Spec says so; again after the embedding's tensor was replaced."""
        if self.spec.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embedding_to_host(self) -> bool:
        """Keep the embedding's rows in main memory: a step reads a few thousand of them, the device holds V x D for nothing.

        False, and nothing moves, where the head is the same matrix or rows of it are trained.
        """
        if self.spec.tied or type(self.model.embed_tokens) is not nn.Embedding or self.model.embed_tokens.weight.requires_grad:
            return False
        self.model.embed_tokens.to("cpu")
        return True

    @property
    def device(self) -> torch.device:
        """Where the layers run."""
        return self.model.norm.weight.device

    @property
    def embedding_device(self) -> torch.device:
        """Where `hidden` looks its tokens up: tokens that are there already are not moved."""
        embedding = self.model.embed_tokens
        return getattr(embedding, "base", embedding).weight.device

    def embed(self, tokens_T: Tensor) -> Tensor:
        """What enters the layers [T, D], on their device: the tokens' rows, scaled where the family does."""
        there, device = self.embedding_device, self.device
        if there == device:
            x = self.model.embed_tokens(tokens_T)
        else:
            x = to_device(self.model.embed_tokens(tokens_T.to(there)), device)
        if self.spec.scale_embeddings:  # the factor is rounded to the model's dtype first: sqrt(3072) is 55.5 in bf16
            x = x * torch.tensor(self.spec.dim**0.5, dtype=x.dtype)
        return x

    @property
    def vocab(self) -> int:
        return self.spec.vocab

    def relieve(self) -> bool:
        """Give back what only saves time, decoded weights; True when there was some."""
        return self.fast is not None and self.fast.evict()

    def leaner(self) -> str:
        """Keep less for the backward from now on; says what is kept, empty when there is no less."""
        if self.fast is not None and self.fast.halves:
            return self.fast.leaner()
        if self.checkpoint_layers:
            return ""
        self.checkpoint_layers = True
        return "checkpoint"

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """For `batch` sequences of at most `capacity` tokens, prompt and answer together."""
        weight = self.model.norm.weight
        return KVCache(self.spec, batch, capacity, weight.dtype, weight.device)

    def plain_head(self) -> tuple[Tensor, float | None] | None:
        """(weight [V, D], softcap) where the head is one dense matrix, for losses that fuse it; None where it is wrapped."""
        return (self.lm_head.weight, self.spec.logit_softcap) if type(self.lm_head) is Linear else None

    def hidden(self, tokens_T: Tensor, layout: Layout, *, rows: Tensor | None = None, cache: KVCache | None = None,
               noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
        """The stream after the final norm [T, D], or its `rows` [L, D] alone: the last layer then runs its output projection, MLP
        and norm on those only. `noise` is applied to the embeddings. With a `cache`, document i continues its sequence i."""
        if cache is None:
            positions, lengths = layout.positions_T, layout.lengths

            def attend(_: int, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
                return attention(q, k, v, layout, *how)

        else:
            tokens_T, layout, new = cache.begin(tokens_T, layout)
            if new is not None:
                rows = new if rows is None else new[rows]
            positions = cache.positions(layout)
            lengths = [past + n for past, n in zip(cache.lengths, layout.lengths, strict=True)]

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
                return cache.attend(layer, q, k, v, layout, *how)

        x = self.embed(tokens_T)
        if noise is not None:
            x = noise(x)
        if cache is None and self.fast is not None and self.fast.renew(self):
            return self.fast_hidden(x, layout, rows)
        full, local = self._tables(positions, lengths, layout, x.dtype)
        last = len(self.model.layers) - 1
        for i, block in enumerate(self.model.layers):
            args = x, local if self.spec.slides(i) else full, attend, rows if i == last else None
            again = self.checkpoint_layers and torch.is_grad_enabled() and cache is None
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        if cache is not None:
            cache.advance(layout)
        return self.model.norm(x)

    def fast_hidden(self, x_TD: Tensor, layout: Layout, rows: Tensor | None, adds: bool = False) -> Tensor:
        """`hidden` from the embedded stream on, through the half-blocks. `adds`: as in `Pass`."""
        full, local = self._tables(layout.positions_T, layout.lengths, layout, x_TD.dtype)
        tables = [local if self.spec.slides(i) else full for i in range(self.spec.layers)]
        return self.model.norm(self.fast.run(x_TD, layout, tables, rows, adds))

    def rope_regime(self, lengths: Sequence[int]) -> frozenset[tuple[int, ...]]:
        """What of the documents' lengths the rope tables depend on: of one kind, the tables follow from positions alone."""
        s = self.spec
        ropes = [s.rope] if s.rope_local is None else [s.rope, s.rope_local]
        return frozenset(tuple(regime(rope, s.context, n) for rope in ropes) for n in lengths)

    def logits(self, x: Tensor) -> Tensor:
        """The vocabulary projection [..., V] and its softcap."""
        y, cap = self.lm_head(x), self.spec.logit_softcap
        return y if cap is None else cap * torch.tanh(y / cap)

    def forward(self, tokens_T: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits [T, V]; `layout` None: one document."""
        return self.logits(self.hidden(tokens_T, layout or Layout.of([len(tokens_T)], self.device)))

    def _tables(self, positions_T: Tensor, lengths: Sequence[int], layout: Layout, dtype: torch.dtype) -> tuple[Tables, Tables]:
        """Cosines and sines for full and for sliding layers, in float32, then in the model's dtype."""
        s = self.spec
        where = s.head_dim, s.context, positions_T, lengths, lambda: layout.documents_T, dtype
        full = tables(s.rope, *where)
        return full, full if s.rope_local is None else tables(s.rope_local, *where)
