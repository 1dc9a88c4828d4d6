"""A Spec as llama.cpp reads it: the architecture's keys, its names for our tensors, and what each tensor becomes on the way.

What differs from the checkpoint, by architecture:

    llama       rows of q and k are put in pairs, (0, H/2), (1, H/2 + 1) ..: it rotates neighbours, we rotate halves
    gemma*      norms are stored as 1 + weight; gemma 2 and 3 take their attention scale from the head's width, so the ratio to
                the checkpoint's own goes into q (or its norm)
    rope        Llama 3's frequencies become divisors, LongRoPE's two tables tensors
    windows     where the architecture has none in llama.cpp, the context ends at the window: up to there both are the same

What llama.cpp would compute otherwise is refused by name. Shape letters: H head width, Q heads, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.export.source import Weights
from tunesmith.ops.rotary import frequencies
from tunesmith.spec import Spec

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
                 "gemma2": "gemma2", "gemma3_text": "gemma3"}  # fmt: skip
PERMUTED = ("llama",)
PATTERNS = {"gemma2": 2, "gemma3": 6}  # every so manyth layer sees all
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B: there llama.cpp scales by the model's width over its heads
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Tensors:
    """`make()` gives the tensor [`shape`]; `role` is matrix, vocabulary (the two largest) or vector (norms, biases, rope)."""

    name: str
    shape: tuple[int, ...]
    role: str
    make: Callable[[], Tensor]


@dataclass
class Model:
    """Keys without the architecture's prefix, tensors in order, and what a person should know."""

    architecture: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensors] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def architecture_of(config: dict[str, Any]) -> str:
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"model_type {kind!r}: no GGUF is written for it ({', '.join(ARCHITECTURES)} are)",
            "export --to merged, and use llama.cpp's own convert_hf_to_gguf.py on that folder",
        )
    return ARCHITECTURES[kind]


def refusals(architecture: str, spec: Spec) -> list[str]:
    """What llama.cpp's architecture cannot do; empty where it can do all."""
    gemma = architecture.startswith("gemma")
    found = []
    if architecture in ("gemma", "gemma2") and not spec.tied:
        found.append("a vocabulary projection apart from the embedding")
    if (gemma or architecture == "qwen3") and (spec.qkv_bias or spec.out_bias):
        found.append("biases in attention")
    if architecture in PATTERNS:
        every = PATTERNS[architecture]
        if spec.window is not None and spec.sliding != tuple((i + 1) % every != 0 for i in range(spec.layers)):
            found.append(f"layers that slide otherwise than all but every {every}th")
        if spec.window is None:
            found.append("layers without a window")
    if architecture == "gemma2" and (spec.attention_softcap is None or spec.logit_softcap is None):
        found.append("scores that are not capped")
    if architecture == "gemma3" and spec.attention_softcap is not None:
        found.append("capped attention scores")
    if spec.rope.kind == "llama3" and architecture != "llama":
        found.append("Llama 3's rope scaling in this family")
    if spec.rope.kind == "longrope" and architecture != "phi3":
        found.append("LongRoPE in this family")
    if spec.rope.kind == "yarn" and dict(spec.rope.scaling)["truncate"] is False:
        found.append("YaRN without rounded bounds")
    if spec.rope_local is not None and spec.rope_local.kind != "default":
        found.append("scaled rotation of the sliding layers")
    return found


def model_of(weights: Weights) -> Model:
    """Raises ModelError for a family without a row, or a setting of one that llama.cpp does not have."""
    spec, architecture = weights.spec, architecture_of(weights.config)
    if why := refusals(architecture, spec):
        raise ModelError(f"llama.cpp's {architecture} has no {'; no '.join(why)}", "export --to merged, and serve it with vLLM")
    model = Model(architecture)
    model.keys = _keys(architecture, spec, model.notes)
    if spec.rope.kind == "longrope":
        model.notes.append(
            f"llama.cpp rotates as for long texts wherever the context that was opened is longer than {spec.rope.switch:,}, "
            f"training only in rows that are: open it with -c {spec.rope.switch} unless your texts are longer"
        )
    model.tensors = [*_tensors(architecture, spec, weights), *_rope_tensors(spec)]
    return model


def _keys(architecture: str, spec: Spec, notes: list[str]) -> dict[str, Any]:
    reach = spec.reach if spec.rope.kind == "yarn" else spec.context
    windowed = architecture in PATTERNS
    if spec.window is not None and not windowed and spec.window < reach:
        notes.append(
            f"context {spec.window:,} instead of {reach:,}: llama.cpp has no sliding window for {architecture}, "
            "and past it the answers would differ"
        )
        reach = spec.window
    keys: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "context_length": reach,
        "embedding_length": spec.dim,
        "block_count": spec.layers,
        "feed_forward_length": spec.hidden,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": int(spec.head_dim * spec.rope.fraction),
        "rope.freq_base": float(spec.rope.theta),
    }
    if windowed:
        keys["attention.sliding_window"] = spec.window
    if architecture == "phi3":
        keys["attention.sliding_window"] = 0
    if spec.attention_softcap is not None:
        keys["attn_logit_softcapping"] = float(spec.attention_softcap)
    if spec.logit_softcap is not None:
        keys["final_logit_softcapping"] = float(spec.logit_softcap)
    if spec.rope_local is not None:
        keys["rope.freq_base_swa"] = float(spec.rope_local.theta)
    return keys | _rope_keys(spec)


def _rope_keys(spec: Spec) -> dict[str, Any]:
    scaling = dict(spec.rope.scaling)
    original = scaling.get("original_max_position_embeddings")
    match spec.rope.kind:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        case "yarn":
            factor = float(scaling["factor"] or spec.context / original)
            own = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0  # what llama.cpp multiplies by itself
            _, gain = frequencies(spec.rope, spec.head_dim, spec.context, original)
            keys = {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": int(original),
            }
            keys |= {f"rope.scaling.yarn_{k}": float(scaling[k]) for k in ("beta_fast", "beta_slow") if scaling[k]}
            return keys | ({"rope.scaling.attn_factor": gain / own} if abs(gain / own - 1) > 1e-6 else {})
        case "longrope":
            _, gain = frequencies(spec.rope, spec.head_dim, spec.context, original)
            return {"rope.scaling.original_context_length": int(original), "rope.scaling.attn_factor": float(gain)}
    return {}


def _rope_tensors(spec: Spec) -> Iterator[Tensors]:
    """Divisors of the frequencies."""
    scaling = dict(spec.rope.scaling)
    if spec.rope.kind == "longrope":
        for name in ("long", "short"):
            values = torch.tensor(scaling[f"{name}_factor"], dtype=torch.float32)
            yield Tensors(f"rope_factors_{name}.weight", tuple(values.shape), "vector", lambda values=values: values)
    if spec.rope.kind == "llama3":
        scaled, _ = frequencies(spec.rope, spec.head_dim, spec.context, spec.context)
        plain = 1.0 / spec.rope.theta ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
        yield Tensors("rope_freqs.weight", (spec.head_dim // 2,), "vector", lambda: plain / scaled)


def _tensors(architecture: str, spec: Spec, weights: Weights) -> Iterator[Tensors]:
    for name, shape in weights.shapes.items():
        role = (
            "vector" if len(shape) == 1 else "vocabulary" if name in ("model.embed_tokens.weight", "lm_head.weight") else "matrix"
        )
        yield Tensors(gguf_name(name, spec), shape, role, _maker(architecture, spec, weights, name))


def _maker(architecture: str, spec: Spec, weights: Weights, name: str) -> Callable[[], Tensor]:
    return lambda: changed(architecture, spec, name, weights.tensor(name))


def gguf_name(name: str, spec: Spec) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`"""
    path, _, leaf = name.rpartition(".")
    if path in WHOLE:
        return f"{WHOLE[path]}.{leaf}"
    layer, _, part = path.removeprefix("model.layers.").partition(".")
    known = "post_attention_norm" if part == "post_attention_layernorm" and spec.sandwich else LAYER[part]
    return f"blk.{layer}.{known}.{leaf}"


def changed(architecture: str, spec: Spec, name: str, tensor: Tensor) -> Tensor:
    """The tensor as llama.cpp multiplies by it."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    if architecture in PERMUTED and part in ("q_proj", "k_proj"):
        return paired(tensor, spec.heads if part == "q_proj" else spec.kv_heads)
    if spec.unit_offset and part.endswith("norm"):
        tensor = tensor.float() + 1
    ratio = scale_ratio(architecture, spec)
    if ratio != 1 and part == ("q_norm" if spec.qk_norm else "q_proj"):
        tensor = tensor.float() * ratio
    return tensor


def paired(rows: Tensor, heads: int) -> Tensor:
    """[heads * H, ...]: row i and row i + H/2 of each head become neighbours."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def scale_ratio(architecture: str, spec: Spec) -> float:
    """The checkpoint's attention scale over the one that llama.cpp takes."""
    if spec.attention_scale is None:
        return 1.0
    theirs = spec.head_dim**-0.5
    if LARGEST_GEMMA.get(architecture) == spec.layers:
        theirs = (spec.dim / spec.heads) ** -0.5
    ratio = spec.attention_scale / theirs
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio
