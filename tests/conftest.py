"""Shared fixtures. `shared_data` is the folder of real tokenizers, templates and datasets that may lie beside the checkout;
tests that need it skip without it."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter; a kernel is bound to it when its module is imported, so this comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Started behind `&` or nohup, a shell hands down signals that are ignored; tests that send them would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items) -> None:
    """Tests marked `gpu` run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real test data (../shared/data) is not here")
    return folder


# ---- a model and data so small that a training step takes milliseconds, made where a test runs ----------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": None, "eos_token_id": 257,
}  # fmt: skip


def tiny_tokenizer(folder: Path) -> None:
    """256 bytes and four special tokens, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: k for k, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<|{n}|>", special=True) for n in ("pad", "end", "user", "assistant")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|end|>",
                "pad_token": "<|pad|>",
                "chat_template": TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        )
    )


def tiny_checkpoint(folder: Path, *, seed: int = 0, **changes) -> Path:
    """A Hugging Face folder of 25,000 random float32 weights; `changes` go to config.json."""
    from tunesmith import models
    from tunesmith.models.decoder import Decoder
    from tunesmith.spec import read_config, read_spec

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    tiny_tokenizer(folder)
    model = Decoder(read_spec(folder), config=read_config(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                1 + 0.1 * torch.randn(p.shape, generator=generator)
                if "norm" in name
                else 0.1 * torch.randn(p.shape, generator=generator)
            )
    models.save_checkpoint(model, folder)
    tiny_tokenizer(folder)
    return folder


def tiny_rows(path: Path, count: int, start: int = 0) -> Path:
    """Chats of 10 to 50 tokens, one in four with two turns."""
    with path.open("w", encoding="utf-8") as f:
        for i in range(start, start + count):
            turns = [("user", f"add {i} and {i * 7 % 13}"), ("assistant", f"it is {i + i * 7 % 13}" + " for sure" * (i % 4))]
            if i % 4 == 3:
                turns += [("user", f"and {i * 3}?"), ("assistant", "no")]
            f.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """`tiny.model`: a checkpoint folder; `tiny.config(output, section={...})`: a run of twelve steps of it in milliseconds;
    `tiny.checkpoint(folder, **config)` and `tiny.rows(path, count)` make others.
    """
    root = tmp_path_factory.mktemp("tiny")
    train, held = tiny_rows(root / "train.jsonl", 24), tiny_rows(root / "held_out.jsonl", 6, start=100)
    model = tiny_checkpoint(root / "model")

    def config(output, **changes):
        base = {
            "model": str(model), "method": "lora", "output": str(output), "seed": 7, "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(train), "held_out": str(held), "max_length": 128, "workers": 1},
            "train": {"batch_size": 4, "epochs": 2, "learning_rate": 0.01, "warmup_ratio": 0.2},
            "eval": {"samples": 2, "sample_tokens": 6, "every_steps": 4}, "memory": {"device": "cpu", "budget_gb": 4},
        }  # fmt: skip
        for key, value in changes.items():
            base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        return base

    return SimpleNamespace(
        root=root, model=model, train=train, held=held, config=config, checkpoint=tiny_checkpoint, rows=tiny_rows
    )


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Prepared data of tests goes with them, not into the person's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
