"""Random weights for a Llama config.json, seeded, as model.safetensors: the start of a `method: full` run from nothing.

    python recipes/base/init_weights.py --model .cache/base/init --seed 0

Normal with the config's initializer_range; the two matrices that write into the residual stream (o_proj, down_proj) are divided by
sqrt(2 * layers), as GPT-2 does, so that its variance does not grow with depth. Norms start at one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def weights(c: dict, seed: int) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor [out, in], in the checkpoint's own names; the head is tied and not stored."""
    draw = torch.Generator().manual_seed(seed)
    d, kv, hidden = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    std = c["initializer_range"]
    quiet = std / (2 * c["num_hidden_layers"]) ** 0.5

    def normal(rows: int, columns: int, scale: float = std) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * scale

    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}"
        tensors |= {
            f"{name}.input_layernorm.weight": torch.ones(d),
            f"{name}.self_attn.q_proj.weight": normal(q, d),
            f"{name}.self_attn.k_proj.weight": normal(kv, d),
            f"{name}.self_attn.v_proj.weight": normal(kv, d),
            f"{name}.self_attn.o_proj.weight": normal(d, q, quiet),
            f"{name}.post_attention_layernorm.weight": torch.ones(d),
            f"{name}.mlp.gate_proj.weight": normal(hidden, d),
            f"{name}.mlp.up_proj.weight": normal(hidden, d),
            f"{name}.mlp.down_proj.weight": normal(d, hidden, quiet),
        }
    tensors["model.norm.weight"] = torch.ones(d)
    if not c.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = normal(c["vocab_size"], d)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path(".cache/base/init"), help="folder with config.json; model.safetensors goes there"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tensors = weights(json.loads((args.model / "config.json").read_text()), args.seed)
    path = args.model / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{path}: {sum(t.numel() for t in tensors.values()):,} parameters, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
