"""What a card allows: FLOPs and bytes of a LoRA step from a model's shapes, and the time each class of work takes at full rate.

Every term runs at its rate back to back: nothing overlaps, no launch gaps. Only what a frozen base needs is counted: the forward
and dX of each linear, what the policy recomputes, and the traffic of fused kernels. No torch here.

T: tokens in a micro-batch, S: tokens of one document (causal attention).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: the code, its block's absmax in 8 bit, the nested absmax
SHARE_8BIT = 1 + 4 / 256  # bytes of one 8-bit moment with its block's scale
LOGIT_ROWS = 1024  # rows of float32 logits alive at once


@dataclass(frozen=True)
class Rates:
    """Measured in the same call as the steps; FLOP/s and bytes/s."""

    bf16: float = 717e12
    fp8: float = 1400e12
    copy: float = 4.16e12
    attention_forward: float = 436e12
    attention_backward: float = 344e12

    @classmethod
    def of(cls, card: dict, seq: int) -> Rates:
        """From a record's `rates`; what was not measured takes the default above."""
        at = "8192" if seq >= 4096 else "2048"
        found = {
            "bf16": card.get("layer_bf16_tflops") or card.get("gemm_bf16_tflops"),
            "fp8": card.get("layer_fp8_tflops"),
            "copy": card.get("copy_tbs"),
            "attention_forward": card.get(f"attention_{at}_forward_tflops"),
            "attention_backward": card.get(f"attention_{at}_backward_tflops"),
        }
        return cls(**{key: value * 1e12 for key, value in found.items() if value})


@dataclass(frozen=True)
class Shapes:
    dim: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    rank: int = 16
    tied: bool = False

    @classmethod
    def of(cls, config: dict) -> Shapes:
        """From a checkpoint's config.json."""
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        return cls(dim, config["num_hidden_layers"], config["intermediate_size"], heads, config["num_key_value_heads"],
                   config["vocab_size"], config.get("head_dim") or dim // heads, tied=config["tie_word_embeddings"])  # fmt: skip

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven of a layer: q k v o gate up down."""
        d, h = self.dim, self.hidden
        return (d, self.q), (d, self.kv), (d, self.kv), (self.q, d), (d, h), (d, h), (h, d)

    @property
    def layer_weights(self) -> int:
        return sum(i * o for i, o in self.linears)

    @property
    def adapter_weights(self) -> int:
        return self.layers * self.rank * sum(i + o for i, o in self.linears)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.dim


def recomputed(s: Shapes, policy: str) -> tuple[float, float]:
    """Shares of a forward's linears and attention that a policy runs again. Checkpointing never needs `down` or the last layer."""
    if policy == "keep":
        return 0.0, 0.0
    share = 1 - s.dim * s.hidden / s.layer_weights
    return share * (s.layers - 1) / s.layers, (s.layers - 1) / s.layers


def classes(
    s: Shapes, rates: Rates, policy: str, tokens: int, seq: int, *, fp8: bool = False, store: str = "nf4"
) -> dict[str, float]:
    """Seconds of each class of work in one step of `tokens` tokens; the classes are those of `--profile`."""
    again, attention_again = recomputed(s, policy)
    per_layer = s.layers * tokens / rates.copy
    attention = 2 * seq * s.q * s.layers * tokens  # causal: half of 4 S d
    d, h, q, kv = s.dim, s.hidden, s.q, s.kv
    decoded = NF4 + (1 if fp8 else 2) if store == "nf4" else 0.0
    norm_bytes = 2 * 4 * d  # residual and norm in one kernel: two reads, two writes of 16 bit
    lora_forward, lora_backward = 2 * q, 2 * (2 * (q + 2 * kv) + 4 * d + d + q + d + 3 * h)
    fp8_bytes = (3 * q * (1 + again) + 6 * d + 3 * (q + 2 * kv) + 2 * h) if fp8 else 0
    return {
        "GEMM": 2 * s.layers * s.layer_weights * tokens * (2 + again) / (rates.fp8 if fp8 else rates.bf16)
        + 4 * s.head_weights * tokens / rates.bf16,
        "attention": attention * (1 + attention_again) / rates.attention_forward + 2.5 * attention / rates.attention_backward,
        "decode": 2 * s.layers * s.layer_weights * decoded / rates.copy,
        "norm": per_layer * 2 * norm_bytes * (1 + again / 2),
        "swiglu": per_layer * 2 * (3 * h * (1 + again) + 6 * h),
        "rope": per_layer * 2 * 2 * (q + kv) * (1 + again / 2),
        "LoRA": per_layer * (lora_forward * (1 + again) + lora_backward),
        "cross-entropy": 10 * s.vocab * tokens / rates.copy,
        "quantise": per_layer * fp8_bytes,
        "optimiser": s.adapter_weights * 28 / rates.copy,  # read p, g, m, v; write p, m, v
    }


def tokens_per_s(s: Shapes, rates: Rates, policy: str, batch: int, seq: int, *, fp8: bool = False, store: str = "nf4") -> float:
    return batch * seq / sum(classes(s, rates, policy, batch * seq, seq, fp8=fp8, store=store).values())


def kept_bytes(s: Shapes, policy: str) -> int:
    """Bytes that a token leaves behind in a layer: everything a frozen base's backward needs, or the layer's input alone."""
    if policy != "keep":
        return 2 * s.dim if policy == "ckpt" else 0
    return 2 * s.dim * 2 + 2 * (s.q + 2 * s.kv) + 2 * s.q + 4 * s.heads + 4 * s.hidden + 2 * 7 * s.rank + 8


def peak_gib(s: Shapes, policy: str, tokens: int, *, store: str = "nf4") -> float:
    """The least a step can hold, in GiB: weights, embedding and head, adapter with gradient and 8-bit moments, one decoded gate-up,
    what is kept, and the larger of the loss and one layer's backward. `budget` offloads layer inputs and tiles the backward."""
    weights = s.layers * s.layer_weights * (NF4 if store == "nf4" else 2) + 2 * s.head_weights * (1 if s.tied else 2)
    fixed = weights + s.adapter_weights * (8 + 2 * SHARE_8BIT) + (4 * s.hidden * s.dim if store == "nf4" else 0)
    layer = 2 * (2 * s.dim + s.hidden)
    if policy == "ckpt":
        layer += kept_bytes(s, "keep") - 2 * s.dim
    elif policy != "keep":
        layer = 2 * (2 * s.dim + 2 * (s.q + 2 * s.kv) + 3 * s.q)
    loss = tokens * 4 * s.dim + min(LOGIT_ROWS, tokens) * s.vocab * 4
    return (fixed + s.layers * tokens * kept_bytes(s, policy) + max(loss, tokens * layer)) / GIB
