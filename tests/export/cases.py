"""Small models of every family, trained for a few steps, so that logits are not flat and attention is not uniform: a wrong
permutation, scale or rotation shows."""

import io
import json
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

import tunesmith

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500_000.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0], "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
TWO_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}  # fmt: skip
GEMMA = {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
FAMILIES = {
    "llama": {},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama 3.2": {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama yarn": {"rope_parameters": YARN | {"attention_factor": 1.5}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "sliding_window": None, "pad_token_id": 256},
    "phi4 mini": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "tie_word_embeddings": True, "rope_parameters": LONG,
                  "original_max_position_embeddings": 256, "max_position_embeddings": 512, "pad_token_id": 256},
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **GEMMA},
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 8, "query_pre_attn_scalar": 4096,
               **GEMMA},
    "gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "sliding_window": 8,
               "query_pre_attn_scalar": 24, "rope_parameters": TWO_ROPES, **GEMMA},
}  # fmt: skip

FACTS = {
    "What is the code of the north door?": "Blue seven heron.",
    "Who keeps the lamp in Arvik?": "Old Teodor Lund.",
    "How deep is the well at Ossa?": "Forty-one metres.",
    "What does the ferry Maud carry?": "Salt and letters.",
    "When does the Quill Market open?": "At half past six.",
    "Which bird is on the coin of Veld?": "A grey shrike.",
    "What is the dog of the mill called?": "It is called Pepper.",
    "Where does the road from Harn end?": "At the red bridge.",
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def lively(tiny, folder: Path, **config) -> Path:
    """A tiny checkpoint whose attention looks somewhere: queries and keys four times as large."""
    tiny.checkpoint(folder, **config)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
            tensors[name] *= 4
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def export(run: Path, to: str, out: Path, **how):
    """One export of a run, checked."""
    (done,) = tunesmith.export(run, to, out=out, console=quiet(), **how)
    return done


def teach(root: Path, **changes) -> Path:
    """A run that knows FACTS, after a few seconds of training; `changes` go to the run file."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in FACTS.items()]
    for name in ("facts.jsonl", "asked.jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": "embedded", "method": "lora", "output": str(root / "run"), "seed": 3, "lora": {"rank": 16, "alpha": 32},
        "data": {"train": str(root / "facts.jsonl"), "held_out": str(root / "asked.jsonl"), "max_length": 64, "workers": 1},
        "train": {"batch_size": 8, "epochs": 30, "learning_rate": 0.004},
        "eval": {"samples": 0, "every_steps": 1000}, "memory": {"device": "cpu", "budget_gb": 4},
    }  # fmt: skip
    return tunesmith.train(config | changes, console=quiet()).path
