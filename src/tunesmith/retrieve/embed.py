"""Vectors of texts, by an encoder from a Hugging Face folder (BERT and its like), loaded offline and without code from the folder.

What sentence-transformers keeps beside the weights is followed where it is there: mean or CLS pooling, the longest input, the
prompts before queries and documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import MissingExtra, ModelError, install
from tunesmith.files import sha256_file
from tunesmith.hub import resolve_model

BESIDE = ("1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
BATCH = 32
LONGEST = 512  # tokens, where the folder does not say


class Embedder:
    """`Embedder(name)(texts)` -> float32 [texts, width], each of length 1. `identity` tells one model from another,
    `name` finds it again. `offline`: a hub id is not asked of the hub.

    ModelError: no such model, no encoder, needs code from its folder; MissingExtra: transformers is not installed.
    """

    def __init__(self, name: str | Path, *, offline: bool = False):
        found = resolve_model(name, beside=BESIDE, offline=offline)
        folder = found.path
        try:
            import torch
            from tokenizers import Tokenizer
            from transformers import AutoModel, logging
        except ImportError:
            raise MissingExtra("an embedding model needs transformers, which is not installed", install("retrieve")) from None
        self._torch = torch
        self.name = f"{found.name}@{found.revision}" if found.revision else str(folder.absolute())
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{name}: no tokenizer.json in it", "name an encoder with a fast tokenizer, such as all-MiniLM-L6-v2")
        logging.disable_progress_bar()  # a bar for 0.1 s
        try:
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            told = (str(e).splitlines() or [type(e).__name__])[0][:200]
            fix = "name the folder of an encoder with safetensors that transformers knows by itself"
            raise ModelError(f"{name}: cannot be loaded as an encoder ({told})", fix) from None
        config = self._model.config
        if getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
            raise ModelError(f"{name}: no encoder", "name an embedding model, such as sentence-transformers/all-MiniLM-L6-v2")
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._cls = _pooling(folder, name)
        said = _json(folder / "sentence_bert_config.json").get("max_seq_length")
        most = min(said or LONGEST, getattr(config, "max_position_embeddings", LONGEST))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(most)
        self._tokenizer.no_padding()
        prompts = _json(folder / "config_sentence_transformers.json").get("prompts") or {}
        self._prompts = {True: str(prompts.get("query", "")), False: str(prompts.get("document", prompts.get("passage", "")))}
        self.width = int(config.hidden_size)
        weights = sorted(folder.glob("*.safetensors"))
        about = json.dumps([self._cls, most, [self._prompts[q] for q in (True, False)], [sha256_file(w) for w in weights]])
        self.identity = hashlib.sha256(about.encode()).hexdigest()[:16]

    def __call__(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        torch, out = self._torch, np.empty((len(texts), self.width), np.float32)
        ids = [e.ids for e in self._tokenizer.encode_batch([self._prompts[query] + t for t in texts])]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            width = max(len(ids[i]) for i in rows) or 1
            tokens = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in rows])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in rows])
            with torch.inference_mode():
                tokens, mask = tokens.to(self._model.device), mask.to(self._model.device)
                hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
                if self._cls:
                    pooled = hidden[:, 0]
                else:
                    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
                out[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return out


def _pooling(folder: Path, name: str | Path) -> bool:
    """Whether the first token's vector stands for the text; else the mean of all."""
    modes = {k for k, v in _json(folder / "1_Pooling" / "config.json").items() if k.startswith("pooling_mode_") and v is True}
    if modes - {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} or len(modes) > 1:
        raise ModelError(f"{name}: pools by {', '.join(sorted(modes))}", "name a model that pools by mean or CLS")
    return "pooling_mode_cls_token" in modes


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
