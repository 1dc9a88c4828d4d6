"""A tokenizer as llama.cpp reads it: its tokens, how text splits into them, special ids, and the chat template.

Byte-level BPE needs the name of a pre-tokenizer that llama.cpp has built in, found by the pattern that splits words; the pieces
of a sentencepiece model need scores that give merges in the order that ours has them; Unigram carries its own.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from tunesmith.data.fields import RowRefused
from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.tokenizer import GPT2_WORDS, LLAMA3_WORDS, QWEN_WORDS, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # as sentencepiece numbers them
GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {  # (how words split, whether a word that is a token itself needs no merges) -> llama.cpp's name for it
    (GPT2_WORDS, False): "gpt-2",
    (QWEN_WORDS, False): "qwen2",
    (LLAMA3_WORDS, True): "llama-bpe",
    (LLAMA3_WORDS, False): "smaug-bpe",
    (GPT4O_WORDS, False): "gpt-4o",
    (TEKKEN_WORDS, True): "tekken",
}


def keys_of(renderer: Renderer, vocab: int) -> dict[str, Any]:
    """Every `tokenizer.*` key. `vocab`: rows of the embedding; ids past the tokenizer's are written as unused.

    Raises ModelError for a tokenizer that llama.cpp cannot be told of.
    """
    tokenizer = renderer.tokenizer
    spec = json.loads(tokenizer.backend.to_str())
    kind = spec["model"]["type"]
    if tokenizer.vocab_size > vocab:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the embedding {vocab:,} rows", "use the tokenizer of this model"
        )
    if kind == "BPE" and _byte_level(spec):
        found = _bpe(tokenizer, spec)
    elif kind == "BPE" and spec["model"].get("byte_fallback"):
        found = _sentencepiece(renderer, spec)
    elif kind == "Unigram":
        found = _unigram(renderer, spec)
    else:
        raise ModelError(f"the tokenizer is a {kind} that llama.cpp does not have", "export --to merged, and serve it with vLLM")
    tokens, types = _tokens(tokenizer, spec, vocab)
    keys: dict[str, Any] = {
        "ggml.model": found.pop("ggml.model"),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        **found,
        "ggml.add_bos_token": begins_with_bos(renderer),
        "ggml.add_eos_token": False,
    }
    if "ggml.scores" in keys:
        keys["ggml.scores"] = [*keys["ggml.scores"], *[-1e9] * (vocab - len(keys["ggml.scores"]))][:vocab]
    stops = renderer.stop_ids
    ids = {"bos": tokenizer.bos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    first, *others = [i for i in (tokenizer.eos_id,) if i is not None] + sorted(stops - {tokenizer.eos_id})
    ids["eos"] = first
    for name, index in zip(("eot", "eom"), others, strict=False):  # two more that end an answer
        ids[name] = index
    keys |= {f"ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    keys["chat_template"] = renderer.template
    named = {name: text for name, text in renderer.templates.items() if name != "default"}
    keys |= {f"chat_template.{name}": text for name, text in named.items()}
    if named:
        keys["chat_templates"] = sorted(named)
    return keys


def swallows_spaces(renderer: Renderer) -> bool:
    """Whether special tokens take the whitespace behind them, as Phi-3's do. GGUF has no word for it: llama.cpp does it for models
    that bear Phi-3's name, and so must ours."""
    tokenizer = renderer.tokenizer
    return any(tokenizer.added[i].rstrip for i in tokenizer.special_ids if i in tokenizer.added)


def begins_with_bos(renderer: Renderer) -> bool:
    """Whether conversations begin with BOS, which llama.cpp adds where its file says so and the template has not written it. The
    template decides, not the tokenizer: one that writes no BOS was trained without."""
    bos = renderer.tokenizer.bos_id
    if bos is None:
        return False
    try:
        return renderer.prompt([{"role": "user", "content": "a"}])[:1] == [bos]
    except RowRefused:  # a template that takes no such conversation
        return bos in renderer.tokenizer.prefix_ids


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if step is None else step.get(key, [step]) if step["type"] == "Sequence" else [step]


def _byte_level(spec: dict[str, Any]) -> bool:
    return any(p["type"] == "ByteLevel" for p in _parts(spec["pre_tokenizer"], "pretokenizers"))


def _tokens(tokenizer: Tokenizer, spec: dict[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    plain = spec["model"]["vocab"]
    unigram = isinstance(plain, list)
    by_id = {i: piece for i, (piece, _) in enumerate(plain)} if unigram else {i: piece for piece, i in plain.items()}
    bytes_ = {f"<0x{b:02X}>" for b in range(256)} if spec["model"].get("byte_fallback") else set()
    tokens, types = [], []
    for i in range(vocab):
        added = tokenizer.added.get(i)
        if i == tokenizer.unk_id and not _byte_level(spec):
            text, kind = tokenizer.token(i), UNKNOWN
        elif added is not None:
            text, kind = added.content, CONTROL if i in tokenizer.special_ids else USER_DEFINED
        elif i in by_id:
            text, kind = by_id[i], BYTE if by_id[i] in bytes_ else NORMAL
        else:
            text, kind = f"[PAD{i}]", UNUSED
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _bpe(tokenizer: Tokenizer, spec: dict[str, Any]) -> dict[str, Any]:
    parts = _parts(spec["pre_tokenizer"], "pretokenizers")
    pattern = GPT2_WORDS if parts[-1].get("use_regex") else None
    patterns = [p["pattern"].get("Regex") for p in parts if p["type"] == "Split"]
    if len(patterns) == 1 and pattern is None:
        pattern = patterns[0]
    whole = bool(spec["model"].get("ignore_merges"))
    name = WORDS.get((pattern, whole)) or WORDS.get((pattern, not whole))
    if name is None or len(parts) > 2 or parts[-1].get("add_prefix_space"):
        raise ModelError(
            f"llama.cpp has no pre-tokenizer that splits words as this tokenizer does ({pattern!r})",
            "export --to merged, and serve it with vLLM; or tell us of the model",
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    never = ["\u2603 \u2603"]  # an empty list has no type in GGUF; these characters are none that bytes are written as
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": merges or never}


def _sentencepiece(renderer: Renderer, spec: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp merges the pair whose piece scores highest. Ours has an order of merges: the first that makes a piece gives its
    rank. A piece that no merge makes must not be made there either, or ids would differ: none is known of in real vocabularies."""
    vocab = spec["model"]["vocab"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(spec["model"]["merges"]):
        piece = "".join(merge) if not isinstance(merge, str) else merge.replace(" ", "")
        ranks.setdefault(piece, rank)
    last = len(ranks) + len(spec["model"]["merges"])
    scores = [0.0] * (max(vocab.values(), default=-1) + 1)
    for piece, i in vocab.items():
        scores[i] = -float(ranks.get(piece, last))
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": _space_prefix(renderer, spec),
    }


def _unigram(renderer: Renderer, spec: dict[str, Any]) -> dict[str, Any]:
    steps = _parts(spec["normalizer"], "normalizers")
    found = {
        "ggml.model": "t5",
        "ggml.scores": [float(score) for _, score in spec["model"]["vocab"]],
        "ggml.add_space_prefix": _space_prefix(renderer, spec),
        "ggml.remove_extra_whitespaces": any(s["type"] in ("Strip",) or " {2,}" in str(s.get("pattern")) for s in steps),
    }
    if charsmap := next((s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"), None):
        found["ggml.precompiled_charsmap"] = list(base64.b64decode(charsmap))
    return found


def _space_prefix(renderer: Renderer, spec: dict[str, Any]) -> bool:
    """Whether a text, and what follows a special token, gets a space put before it. llama.cpp does both or neither; a tokenizer
    that prefixes the first word alone never does behind the special token that a template begins with."""
    if any(s["type"] == "Prepend" for s in _parts(spec["normalizer"], "normalizers")):
        return True
    schemes = [p.get("prepend_scheme") for p in _parts(spec["pre_tokenizer"], "pretokenizers") if p["type"] == "Metaspace"]
    if not schemes or schemes[0] == "never":
        return False
    if schemes[0] == "always":
        return True
    ids = renderer.prompt([{"role": "user", "content": "a"}])
    return not (ids and ids[0] in renderer.tokenizer.special_ids)
