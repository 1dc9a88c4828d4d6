"""config.json of the small base model: Llama's shape, 9.7 M parameters, tied embeddings, 2,048 tokens of context.

    python recipes/base/make_config.py --out .cache/base/init

Six layers of width 384 (six query heads of 64 share two key/value heads, MLP 832): LoRA on 2 CPU cores sees the demo's 36 k tokens
of short dialogue in under a minute, and bf16 weights take 19.4 MB. Wider was better than deeper or a larger vocabulary at one size
(README.md has the table). Every linear is a multiple of 64 wide, NF4's block.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def config(*, vocab: int = 4096, dim: int = 384, layers: int = 6, heads: int = 6, kv_heads: int = 2, hidden: int = 832) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "intermediate_size": hidden,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


def parameters(c: dict) -> int:
    """Weights, the tied embedding counted once."""
    d, kv, hidden = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * hidden + 2 * d
    return c["vocab_size"] * d + c["num_hidden_layers"] * layer + d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/base/init"))
    for name, default in (("vocab", 4096), ("dim", 384), ("layers", 6), ("heads", 6), ("kv-heads", 2), ("hidden", 832)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    c = config(**args)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 256}, indent=1) + "\n"
    )
    print(f"{out}/config.json: {parameters(c):,} parameters")


if __name__ == "__main__":
    main()
