"""config.json -> Spec: what a decoder is, as numbers. FAMILIES at the foot is the list of native families; no torch.

Only the keys read here decide anything: nothing in a config.json can name code to run, and `auto_map` is ignored.
Keys that are absent take the value transformers gives them. Three states, said plainly by `support`: native (models/decoder.py),
fallback (models/fallback.py through transformers), refused (with the reason and the fix).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import ModelError, install

Config = Mapping[str, Any]
Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "longrope", "yarn"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. `scaling` holds the numbers its kind reads, under the checkpoint's own keys; None where one is absent."""

    theta: float = 10_000.0
    fraction: float = 1.0  # share of the head that is rotated
    kind: RopeKind = "default"
    scaling: tuple[tuple[str, Any], ...] = ()

    @property
    def switch(self) -> int | None:
        """Documents longer than this many tokens use longrope's long table; None where one table serves all lengths."""
        return dict(self.scaling)["original_max_position_embeddings"] if self.kind == "longrope" else None


@dataclass(frozen=True, slots=True)
class Spec:
    """One decoder. Every flag's default is off, and each is on in some shipped family."""

    vocab: int
    dim: int
    hidden: int  # width inside the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  # tokens it was made for
    norm_eps: float
    rope: Rope = Rope()
    rope_local: Rope | None = None  # sliding layers rotate with this one (Gemma 3)
    window: int | None = None  # a token sees this many, itself included
    sliding: tuple[bool, ...] = ()  # which layers slide; empty: all, where there is a window
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # norm each head's query and key (Qwen 3, Gemma 3)
    sandwich: bool = False  # also norm each branch's output (Gemma 2, 3)
    unit_offset: bool = False  # norms multiply by 1 + weight (Gemma)
    fused: bool = False  # qkv_proj and gate_up_proj are one matrix each (Phi-3)
    scale_embeddings: bool = False  # by sqrt(dim) (Gemma)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False  # the vocabulary projection is the embedding
    foreign: bool = False  # sizes alone, of a model that runs through transformers

    @property
    def reach(self) -> int:
        """Tokens that a document may have: two kinds of rotation stretch what the config calls its context."""
        scaling = dict(self.rope.scaling)
        if self.rope.kind == "dynamic":
            return int(self.context * scaling["factor"])
        if self.rope.kind == "yarn" and scaling["factor"]:
            return max(self.context, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
        return self.context

    def slides(self, layer: int) -> bool:
        """Whether this layer sees only `window` tokens back."""
        return self.window is not None and (not self.sliding or self.sliding[layer])


@dataclass(frozen=True, slots=True)
class Support:
    """How a checkpoint can be run, and why."""

    state: Literal["native", "fallback", "refused"]
    reason: str
    fix: str = ""
    notes: tuple[str, ...] = ()  # what was seen and ignored
    quantization: Literal["nf4"] | None = None  # how the stored weights are quantised


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters each group holds. A tied head counts once, as embedding."""

    embedding: int
    head: int
    attention: int  # matrices of q, k, v, o
    mlp: int  # matrices of gate, up, down
    biases: int
    norms: int

    @property
    def linear(self) -> int:
        """Weights that NF4 stores in 4 bits and that adapters stand beside."""
        return self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.linear + self.biases + self.norms


# ------------------------------------------------------------------ reading
def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises ModelError where there is none or it is not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "name the folder of a Hugging Face checkpoint (config.json beside its *.safetensors)"
        raise ModelError(f"{path}: no such file", fix) from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror}", "check the folder and its permissions") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: not JSON: {e}", "download the checkpoint again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__} where an object belongs", "download the checkpoint again")
    return config


def read_spec(folder: str | Path) -> Spec:
    """The Spec of a checkpoint folder. Raises ModelError where it is not native."""
    return spec_of(read_config(folder))


def spec_of(config: Config) -> Spec:
    """The Spec of a config. Raises ModelError where it is not native."""
    found = support(config)
    if found.state != "native":
        raise ModelError(found.reason, found.fix)
    return FAMILIES[config["model_type"]](config)


# What a fallback family may call its sizes, in transformers' configs.
SYNONYMS = {
    "dim": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
}


def plan_spec(folder: str | Path) -> Spec:
    """The Spec for a plan: a native checkpoint's own, or for a fallback one the sizes its config.json gives.

    Those are read as a gated MLP of their width, which counts a plain MLP half as large again: such a plan is rather too large.
    Raises ModelError where the checkpoint is refused or names no sizes.
    """
    config = read_config(folder)
    if support(config).state != "fallback":
        return spec_of(config)
    found = {name: next((config[k] for k in keys if _number(config.get(k))), None) for name, keys in SYNONYMS.items()}
    if missing := [name for name in ("dim", "layers") if found[name] is None] + ["vocab"] * (not _number(config.get("vocab_size"))):
        keys = ", ".join(k for name in missing for k in SYNONYMS.get(name, ("vocab_size",)))
        raise ModelError(f"{folder}/config.json: says nothing of its size (none of {keys})", "use a checkpoint of a language model")
    dim = found["dim"]
    heads = found["heads"] or max(1, dim // 64)
    kv_heads = config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads)
    return Spec(
        vocab=config["vocab_size"], dim=dim, hidden=found["hidden"] or 4 * dim, layers=found["layers"], heads=heads,
        kv_heads=kv_heads, head_dim=config.get("head_dim") or dim // heads, context=found["context"] or 2048, norm_eps=1e-5,
        tied=bool(config.get("tie_word_embeddings", True)), foreign=True,
    )  # fmt: skip


def support(config: Config) -> Support:
    """native, fallback or refused, with the reason. All faults of a native family's config are listed at once."""
    kind = config.get("model_type")
    notes = ("auto_map: code from a checkpoint is never run",) if config.get("auto_map") else ()
    if not isinstance(kind, str) or not kind:
        return Support("refused", "config.json has no model_type", "use a checkpoint in Hugging Face's format")
    try:
        quantization = checkpoint_quantization(config)
    except ModelError as e:
        return Support("refused", e.what, e.fix, notes)
    if kind in REMOTE_CODE:
        reason = f"model_type {kind!r} exists only as code inside the checkpoint, which is never run"
        return Support("refused", reason, REMOTE_CODE[kind], notes)
    if config.get("is_encoder_decoder"):
        reason = f"model_type {kind!r} is an encoder-decoder; only decoders are trained here"
        return Support("refused", reason, "use a causal language model", notes)
    if any(isinstance(config.get(key), Mapping) for key in TOWERS):
        fix = "use a text-only checkpoint of the family, such as one with model_type 'gemma3_text'"
        return Support("refused", f"model_type {kind!r} holds more than text (vision or audio)", fix, notes)
    if other := _not_causal(config):
        fix = "use a causal language model: its config.json says ...ForCausalLM under architectures"
        return Support("refused", f"{other}, not a causal language model", fix, notes)
    if kind not in FAMILIES:
        reason = f"model_type {kind!r} has no native family ({', '.join(FAMILIES)}); it runs through transformers, slower"
        return Support("fallback", reason, install("fallback"), notes, quantization)
    if faults := _faults(config):
        return Support("refused", "config.json: " + "; ".join(faults), "download the checkpoint's config.json again", notes)
    try:
        FAMILIES[kind](config)
    except _NotNative as e:
        reason = f"model_type {kind!r} is native, but not with {e}; it runs through transformers, slower"
        return Support("fallback", reason, install("fallback"), notes, quantization)
    except _Wrong as e:
        return Support("refused", f"config.json: {e}", "download the checkpoint's config.json again", notes)
    return Support("native", f"model_type {kind!r}", "", notes, quantization)


def _not_causal(config: Config) -> str:
    """What a checkpoint is that does not write text from left to right; empty for one that does, or does not say."""
    kind, named = config["model_type"], config.get("architectures")
    named = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    if named and not any(n.endswith("ForCausalLM") or "For" not in n for n in named):
        return f"model_type {kind!r} is a {', '.join(named)}"
    return f"model_type {kind!r} is an encoder" if kind in ENCODERS and not config.get("is_decoder") else ""


def checkpoint_quantization(config: Config) -> Literal["nf4"] | None:
    """How the checkpoint's weights are stored: bitsandbytes NF4, or not quantised (None). Raises ModelError for any other."""
    block = config.get("quantization_config")
    if not block:
        return None
    fix = "use the 16-bit checkpoint it was made from (method: qlora quantises it on the way in)"
    if not isinstance(block, Mapping):
        raise ModelError("config.json: quantization_config is not an object", fix)
    method = block.get("quant_method")
    if method is None and (block.get("load_in_4bit") or block.get("load_in_8bit")):
        method = "bitsandbytes"
    if method != "bitsandbytes":
        raise ModelError(f"the weights are quantised with {method!r}; only bitsandbytes' nf4 can be trained on", fix)
    if not (block.get("load_in_4bit") or block.get("_load_in_4bit")):
        raise ModelError("the weights are quantised with bitsandbytes in 8 bits; only its nf4 can be trained on", fix)
    if (kind := block.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise ModelError(f"the weights are quantised with bitsandbytes' {kind}; only its nf4 can be trained on", fix)
    return "nf4"


# ------------------------------------------------------------------ what a Spec implies
def linear_shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear inside one layer, by its name in the layer, in the checkpoint's order of use."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.fused:
        return {
            "self_attn.qkv_proj": (q + 2 * kv, spec.dim),
            "self_attn.o_proj": (spec.dim, q),
            "mlp.gate_up_proj": (2 * spec.hidden, spec.dim),
            "mlp.down_proj": (spec.dim, spec.hidden),
        }
    return {
        "self_attn.q_proj": (q, spec.dim),
        "self_attn.k_proj": (kv, spec.dim),
        "self_attn.v_proj": (kv, spec.dim),
        "self_attn.o_proj": (spec.dim, q),
        "mlp.gate_proj": (spec.hidden, spec.dim),
        "mlp.up_proj": (spec.hidden, spec.dim),
        "mlp.down_proj": (spec.dim, spec.hidden),
    }


def half_blocks_refusal(spec: Spec) -> str:
    """Why a decoder of this Spec cannot run as half-blocks (ops/half_blocks.py); empty when it can."""
    reasons = {
        "it runs through transformers": spec.foreign,
        "norms around each branch": spec.sandwich,
        "norms of 1 + weight": spec.unit_offset,
        f"the activation {spec.activation}": spec.activation != "silu",
        "capped attention scores": spec.attention_softcap is not None,
    }
    return ", ".join(what for what, there in reasons.items() if there)


def has_bias(spec: Spec, linear: str) -> bool:
    """Whether the linear of this name (`self_attn.q_proj`) has a bias."""
    part, _, name = linear.rpartition(".")
    return spec.mlp_bias if part.endswith("mlp") else spec.out_bias if name == "o_proj" else spec.qkv_bias


def norm_shapes(spec: Spec) -> dict[str, int]:
    """Width of each norm inside one layer, by its name in the layer."""
    norms = {"input_layernorm": spec.dim, "post_attention_layernorm": spec.dim}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    if spec.sandwich:
        norms |= {"pre_feedforward_layernorm": spec.dim, "post_feedforward_layernorm": spec.dim}
    return norms


def tensor_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, dense, in file order. A tied head is not among them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, spec.dim)}
    for layer in range(spec.layers):
        at = f"model.layers.{layer}."
        for name, shape in linear_shapes(spec).items():
            shapes[f"{at}{name}.weight"] = shape
            if has_bias(spec, name):
                shapes[f"{at}{name}.bias"] = shape[:1]
        shapes |= {f"{at}{name}.weight": (width,) for name, width in norm_shapes(spec).items()}
    shapes["model.norm.weight"] = (spec.dim,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab, spec.dim)
    return shapes


def parameters(spec: Spec) -> Parameters:
    """Counts by group, from the Spec alone."""
    linears = linear_shapes(spec)
    size = {part: sum(o * i for n, (o, i) in linears.items() if n.startswith(part)) for part in ("self_attn", "mlp")}
    return Parameters(
        embedding=spec.vocab * spec.dim,
        head=0 if spec.tied else spec.vocab * spec.dim,
        attention=spec.layers * size["self_attn"],
        mlp=spec.layers * size["mlp"],
        biases=spec.layers * sum(o for n, (o, _) in linears.items() if has_bias(spec, n)),
        norms=spec.layers * sum(norm_shapes(spec).values()) + spec.dim,
    )


# ------------------------------------------------------------------ checks
class _NotNative(Exception):
    """The family is native, this setting of it is not."""


class _Wrong(Exception):
    """The config contradicts itself."""


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
POSITIVE = (*SIZES, "num_key_value_heads", "head_dim", "sliding_window", "query_pre_attn_scalar", "rms_norm_eps", "rope_theta",
            "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq")  # fmt: skip
MOST_LAYERS = 10_000
WHOLE = (*SIZES, "num_key_value_heads", "head_dim", "sliding_window")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _faults(c: Config) -> list[str]:
    faults = [f"{key} is missing" for key in SIZES if c.get(key) is None]
    for key in POSITIVE:
        value = c.get(key)
        if value is not None and (not _number(value) or (key in WHOLE and not isinstance(value, int))):
            faults.append(f"{key} is {value!r} where a positive {'whole number' if key in WHOLE else 'number'} belongs")
    if not faults:
        if c["num_hidden_layers"] > MOST_LAYERS:  # each has names in memory before a weight is looked for
            faults.append(f"num_hidden_layers is {c['num_hidden_layers']:,}; {MOST_LAYERS:,} is the most")
        heads, kv = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
        if heads % kv:
            faults.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv}")
        if not c.get("head_dim") and c["hidden_size"] % heads:
            faults.append(f"hidden_size {c['hidden_size']} is no multiple of num_attention_heads {heads}")
    return faults


# ------------------------------------------------------------------ parts of families
ROPE_KEYS: dict[str, tuple[str, ...]] = {  # first those it must have
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor", "attention_factor"),
    "yarn": ("original_max_position_embeddings", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
}  # fmt: skip
REQUIRED = {"linear": 1, "dynamic": 1, "llama3": 4, "longrope": 3, "yarn": 1, "default": 0}


def _rope(c: Config, head_dim: int, *, block: Config | None = None, theta: float | None = None,
          fraction: float = 1.0, renamed: Mapping[str, str] = {}, original: int | None = None) -> Rope:  # fmt: skip
    """Both spellings: `rope_parameters` (new) and `rope_theta` + `rope_scaling` (old)."""
    block = c.get("rope_scaling") or c.get("rope_parameters") or {} if block is None else block
    if not isinstance(block, Mapping):
        raise _Wrong("rope_scaling is not an object")
    if "full_attention" in block:
        raise _NotNative("a rotary embedding for each kind of layer")
    kind = block.get("rope_type") or block.get("type") or "default"
    kind = renamed.get(kind, kind)
    if kind not in ROPE_KEYS:
        raise _NotNative(f"rope_type {kind!r}")
    values = {k: tuple(v) if isinstance(v := block.get(k), list) else v for k in ROPE_KEYS[kind]}
    if "original_max_position_embeddings" in values:  # transformers: the config's own key first, then the block's
        found = c.get("original_max_position_embeddings") or original or values["original_max_position_embeddings"]
        values["original_max_position_embeddings"] = found or c["max_position_embeddings"]
    rotated = int(head_dim * fraction)
    for i, (key, value) in enumerate(values.items()):
        wrong = not (value is None and i >= REQUIRED[kind]) and not _number(value)
        if key in ("short_factor", "long_factor"):
            wrong = not isinstance(value, tuple) or len(value) != rotated // 2 or not all(map(_number, value))
        if key == "truncate":
            wrong = value not in (None, True, False)
        if wrong:
            wanted = f"{rotated // 2} positive numbers" if key in ("short_factor", "long_factor") else "a positive number"
            raise _Wrong(
                f"rope_scaling of type {kind!r}: {key} is {value!r} where {wanted} belong{'' if wanted.endswith('s') else 's'}"
            )
    if rotated % 2 or rotated < 2:
        raise _Wrong(f"{rotated} of {head_dim} numbers of a head are rotated, not an even number")
    found = block.get("rope_theta") or theta or c.get("rope_theta") or 10_000.0
    if not _number(found):
        raise _Wrong(f"rope_theta is {found!r}")
    return Rope(float(found), fraction, kind, tuple(values.items()))


def _activation(c: Config, key: str, names: Mapping[str, Activation], absent: str) -> Activation:
    name = c.get(key) or absent
    if name not in names:
        raise _NotNative(f"{key} {name!r}")
    return names[name]


def _layer_kinds(c: Config, absent: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers slide."""
    kinds, n = c.get("layer_types"), c["num_hidden_layers"]
    if kinds is None:
        return tuple(absent(i) for i in range(n))
    if not isinstance(kinds, list) or len(kinds) != n:
        raise _Wrong(f"layer_types does not name {n} layers")
    if strange := sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"}):
        raise _NotNative(f"layer_types {', '.join(strange)}")
    return tuple(k == "sliding_attention" for k in kinds)


def _base(c: Config, *, head_dim: int | None = None, **family: Any) -> Spec:
    """What all families share. `head_dim` is the family's own where the key is absent."""
    if c.get("partial_rotary_factor") not in (None, 1, 1.0) and "rope" not in family:
        raise _NotNative("a partial rotary embedding")
    if c.get("use_bidirectional_attention"):
        raise _NotNative("bidirectional attention")
    heads = c["num_attention_heads"]
    width = c.get("head_dim") or head_dim or c["hidden_size"] // heads
    values = {
        "vocab": c["vocab_size"], "dim": c["hidden_size"], "hidden": c["intermediate_size"],
        "layers": c["num_hidden_layers"], "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": width,
        "context": c["max_position_embeddings"], "norm_eps": float(c.get("rms_norm_eps") or 1e-6),
        "tied": bool(c.get("tie_word_embeddings", False)),
        **family,
    }  # fmt: skip
    if "rope" not in values:
        values["rope"] = _rope(c, width)
    if "activation" not in values:
        values["activation"] = _activation(c, "hidden_act", {"silu": "silu", "swish": "silu"}, "silu")
    return Spec(**values)


def _needs_kv_heads(c: Config) -> None:
    """Families whose default in transformers is a fixed number, not the number of heads: guessing it would be wrong."""
    if c.get("num_key_value_heads") is None:
        raise _Wrong("num_key_value_heads is missing")


# ------------------------------------------------------------------ families
def llama(c: Config) -> Spec:
    bias = bool(c.get("attention_bias", False))
    return _base(c, qkv_bias=bias, out_bias=bias, mlp_bias=bool(c.get("mlp_bias", False)))


def mistral(c: Config) -> Spec:
    """Without the key, transformers slides over 4,096 tokens; null is no window."""
    _needs_kv_heads(c)
    return _base(c, window=c.get("sliding_window", 4096))


def _qwen(c: Config, **family: Any) -> Spec:
    _needs_kv_heads(c)
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    full = c.get("max_window_layers", 28)
    sliding = _layer_kinds(c, lambda i: window is not None and i >= full)
    return _base(c, window=window if any(sliding) else None, sliding=sliding if window and any(sliding) else (), **family)


def qwen2(c: Config) -> Spec:
    return _qwen(c, qkv_bias=True)


def qwen3(c: Config) -> Spec:
    bias = bool(c.get("attention_bias", False))
    return _qwen(c, head_dim=128, qk_norm=True, qkv_bias=bias, out_bias=bias)


def phi3(c: Config) -> Spec:
    """Phi-3, 3.5 and 4-mini. `su` and `yarn` are old names of its longrope; without its key the first context is 4,096."""
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    block = c.get("rope_scaling") or c.get("rope_parameters") or {}
    fraction = (block.get("partial_rotary_factor") if isinstance(block, Mapping) else None) or c.get("partial_rotary_factor") or 1.0
    if not _number(fraction) or fraction > 1:
        raise _Wrong(f"partial_rotary_factor is {fraction!r}")
    original = None if isinstance(block, Mapping) and block.get("original_max_position_embeddings") else 4096
    rope = _rope(c, width, fraction=float(fraction), renamed={"su": "longrope", "yarn": "longrope"}, original=original)
    if rope.kind not in ("default", "longrope"):
        raise _NotNative(f"rope_type {rope.kind!r}")
    return _base(c, fused=True, window=c.get("sliding_window"), rope=rope, norm_eps=float(c.get("rms_norm_eps") or 1e-5))


def gemma(c: Config, **family: Any) -> Spec:
    """Its first configs say `gelu` and mean the tanh form."""
    _needs_kv_heads(c)
    bias = bool(c.get("attention_bias", False))
    gelu: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
    return _base(c, **{
        "head_dim": 256, "unit_offset": True, "scale_embeddings": True, "qkv_bias": bias, "out_bias": bias,
        "tied": bool(c.get("tie_word_embeddings", True)),
        "activation": _activation(c, "hidden_act", gelu, "gelu_pytorch_tanh") if "activation" not in family else "gelu_tanh",
        **family,
    })  # fmt: skip


def gemma2(c: Config, **family: Any) -> Spec:
    return gemma(c, **{
        "sandwich": True, "window": c.get("sliding_window", 4096), "sliding": _layer_kinds(c, lambda i: (i + 1) % 2 != 0),
        "activation": _activation(c, "hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh"),
        "attention_scale": c.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": c.get("attn_logit_softcapping", 50.0), "logit_softcap": c.get("final_logit_softcapping", 30.0),
        **family,
    })  # fmt: skip


def gemma3(c: Config) -> Spec:
    """Five sliding layers to a full one, each kind with its own theta; scaling is the full layers'. No softcap in attention."""
    every = c.get("sliding_window_pattern", 6)
    if not isinstance(every, int) or every < 1:
        raise _Wrong(f"sliding_window_pattern is {every!r}")
    both = c.get("rope_parameters") or {}
    if not isinstance(both, Mapping):
        raise _Wrong("rope_parameters is not an object")
    width = c.get("head_dim") or 256
    full = {**(both.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    return gemma2(
        c,
        qk_norm=True,
        sliding=_layer_kinds(c, lambda i: (i + 1) % every != 0),
        attention_softcap=None,
        logit_softcap=c.get("final_logit_softcapping"),
        rope=_rope(c, width, block=full, theta=c.get("rope_theta", 1_000_000.0)),
        rope_local=_rope(c, width, block=both.get("sliding_attention") or {}, theta=c.get("rope_local_base_freq", 10_000.0)),
    )


TOWERS = ("text_config", "vision_config", "audio_config", "thinker_config")

ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
REMOTE_CODE = {  # types that transformers does not know: their code lies in the checkpoint
    "phi-msft": "use the phi checkpoint (model_type 'phi', the same weights under transformers' own names)",
    "phi3small": "use Phi-3 mini or medium, or Phi-4-mini",
    "qwen": "use a Qwen 2 or Qwen 3 checkpoint",
    "baichuan": "use a checkpoint of another family, or one converted to llama's names",
    "internlm": "use a checkpoint converted to llama's names",
    "internlm2": "use a checkpoint converted to llama's names",
    "chatglm": "use a glm or glm4 checkpoint",
    "aquila": "use a checkpoint of another family",
    "xverse": "use a checkpoint converted to llama's names",
}

FAMILIES: dict[str, Callable[[Config], Spec]] = {
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}
