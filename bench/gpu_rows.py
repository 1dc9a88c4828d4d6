"""The rows of the GPU bench: shapes, what each arm trains, and the data of a step. No torch here."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

RANK, ALPHA, RATE, WARM = 16, 16, 1e-4, 3
EXAMPLES = 8  # of gsm8k in a step
TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}\
 {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
LOWEST_ID = 3  # ids below are special
OURS = ("ours", "ours-fp8")
ARMS = (*OURS, "unsloth", "unsloth-padded", "hf", "liger", "axolotl", "read")

# config.json of the shapes that are timed; weights are random, so the values that only matter for text are left out
CONFIGS = {
    "mistral": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        rope_theta=1e6, rms_norm_eps=1e-5, hidden_act="silu", sliding_window=None, tie_word_embeddings=False,
    ),
    "llama": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rope_theta=5e5, rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
    ),
    "phi": dict(
        model_type="phi3", architectures=["Phi3ForCausalLM"], vocab_size=200064, hidden_size=3072, intermediate_size=8192,
        num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_theta=1e4, partial_rotary_factor=0.75, rms_norm_eps=1e-5, hidden_act="silu",
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}, sliding_window=262144,
        attention_bias=False, tie_word_embeddings=True, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
    ),
    "tiny": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=512, hidden_size=64, intermediate_size=160,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        rope_theta=1e4, rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
    ),
}  # fmt: skip
for _config in CONFIGS.values():
    _config |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, torch_dtype="bfloat16")


@dataclass(frozen=True)
class Row:
    """`policy`: keep | ckpt | budget (ours inside Unsloth's own peak). `store`: nf4 | dense. `data`: full (random ids) | gsm8k."""

    name: str
    model: str
    batch: int
    seq: int
    policy: str
    arms: tuple[str, ...]
    store: str = "nf4"
    data: str = "full"
    full: bool = False  # every weight is trained
    steps: int | None = None  # where another number than --steps is meant
    baseline: str = "unsloth"


PAIR = ("ours", "ours-fp8", "unsloth")
PEERS = ("hf", "liger", "axolotl")
ROWS = {
    row.name: row
    for row in (
        Row("4x2048-keep", "mistral", 4, 2048, "keep", (*PAIR, *PEERS)),
        Row("4x2048-budget", "mistral", 4, 2048, "budget", (*PAIR, *PEERS)),
        Row("1x2048-ckpt", "mistral", 1, 2048, "ckpt", (*PAIR, *PEERS)),
        Row("1x8192-ckpt", "mistral", 1, 8192, "ckpt", PAIR),
        Row("1x8192-keep", "mistral", 1, 8192, "keep", PAIR),
        Row("1x32768-ckpt", "mistral", 1, 32768, "ckpt", PAIR, steps=6),
        Row("gsm8k", "mistral", EXAMPLES, 198, "keep", (*PAIR, "unsloth-padded", "hf"), data="gsm8k", steps=32),
        Row("llama-keep", "llama", 4, 2048, "keep", PAIR),
        Row("llama-ckpt", "llama", 4, 2048, "ckpt", PAIR),
        Row("phi-keep-bf16", "phi", 4, 2048, "keep", PAIR, store="dense"),
        Row("phi-keep-nf4", "phi", 4, 2048, "keep", PAIR),
        Row("full", "mistral", 1, 2048, "ckpt", ("ours", "liger", "hf"), store="dense", full=True, baseline="liger"),
        Row("start", "mistral", 1, 2048, "ckpt", ("read", "ours", "unsloth", "hf"), steps=1),
    )
}


def tiny(row: Row) -> Row:
    """The row's dry run on a CPU: a model and sequences so small that a step takes milliseconds."""
    return replace(row, model="tiny", batch=min(row.batch, 2) if row.data == "full" else row.batch, seq=24, store="dense")


@dataclass(frozen=True)
class Step:
    """Documents of one optimiser step; `learn[t]` means token t is a target."""

    ids: list[np.ndarray]
    learn: list[np.ndarray]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def trained(self) -> int:
        return sum(int(x.sum()) for x in self.learn)

    def padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, labels (-100: not learned) and mask [documents, longest], padded on the right."""
        shape = len(self.ids), max(map(len, self.ids))
        ids, labels, mask = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
        for i, (x, learn) in enumerate(zip(self.ids, self.learn, strict=True)):
            ids[i, : len(x)], mask[i, : len(x)] = x, 1
            labels[i, : len(x)] = np.where(learn, x, -100)
        return ids, labels, mask


def data(row: Row, steps: int, gsm8k: Path | None, vocab: int) -> list[Step]:
    """The same for every arm: random full-length documents that learn all but their first token, or gsm8k's rows in file order."""
    if row.data == "gsm8k":
        return _gsm8k(gsm8k, steps, vocab, row.seq if row.model == "tiny" else None)
    generator, learn = np.random.default_rng(0), np.arange(row.seq) > 0
    out = []
    for _ in range(steps):
        ids = generator.integers(LOWEST_ID, min(vocab, 32000), (row.batch, row.seq), dtype=np.int64)
        out.append(Step(list(ids), [learn] * row.batch))
    return out


def _gsm8k(file: Path | None, steps: int, vocab: int, longest: int | None) -> list[Step]:
    if file is None or not file.exists():
        raise SystemExit(f"the row gsm8k needs its tokens: python bench/gpu.py --make-gsm8k {file}")
    with np.load(file) as found:
        ids, learn, lengths = found["ids"].astype(np.int64) % vocab, found["learn"], found["lengths"]
    ends = np.cumsum(lengths)[: steps * EXAMPLES]
    assert len(ends) == steps * EXAMPLES, f"{file} holds {len(lengths)} rows, {steps * EXAMPLES} are needed"
    spans = [slice(end - min(n, longest or n), end) for end, n in zip(ends, lengths[: len(ends)], strict=True)]
    rows = [(ids[span], learn[span]) for span in spans]
    rows = [(x, y & (np.arange(len(y)) > 0)) for x, y in rows]
    return [Step(*map(list, zip(*rows[i : i + EXAMPLES], strict=True))) for i in range(0, len(rows), EXAMPLES)]


def make_gsm8k(out: Path, source: Path, tokenizer: Path, count: int = 256) -> str:
    """gsm8k's first rows as chats rendered by us, answers learned, into a small .npz."""
    from tunesmith.data.render import Renderer
    from tunesmith.tokenizer import Tokenizer
    from tunesmith.types import Conversation, Message, Origin

    with tempfile.TemporaryDirectory() as folder:
        (template := Path(folder) / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
        renderer = Renderer(Tokenizer.load(tokenizer), template=str(template))
    examples = []
    with source.open(encoding="utf-8") as lines:
        for n, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            talk = Conversation((Message("user", row["question"]), Message("assistant", row["answer"])), Origin(source.name, n + 1))
            examples += renderer.examples(talk).examples
    lengths = np.array([len(e.ids) for e in examples], np.int32)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, ids=np.concatenate([e.ids for e in examples]).astype(np.uint16),
                        learn=np.concatenate([e.learn for e in examples]), lengths=lengths)  # fmt: skip
    return f"{out}: {len(lengths)} rows, mean {lengths.mean():.0f} tokens, {out.stat().st_size >> 10} KiB"
