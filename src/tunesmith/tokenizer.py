"""The checkpoint's tokenizer: text <-> token ids, its special tokens and its chat template. No torch, no transformers.

Three kinds of folder are read, in this order: `tokenizer.json`; a sentencepiece `tokenizer.model`; `vocab.json` + `merges.txt`.
Whatever the kind, the backend is the `tokenizers` library, and text is encoded through a second view of the same model that
knows no added tokens, so no special token can be recognised in anybody's text.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tunesmith.errors import ModelError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that configs call by name and templates may read."""
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
"""Whitespace as the `tokenizers` library sees it (Unicode White_Space); `str.strip()` would also take \\x1c-\\x1f."""
MARKER = re.compile(r"[<\[{]\S.*[>\]}]|<\S*|\S*>", re.DOTALL)
"""An added token that looks like markup (`<think>`, `[REF]`): never recognised in a user's text. Others are plain text."""
SPECIAL_PIECE = re.compile(r"\[/?[A-Z][A-Z_0-9]*\]|<\|.*\|>|<(start|end)_of_turn>")
"""Sentencepiece user-defined pieces that are control tokens in all but type."""
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
WORD_PATTERNS = (GPT2_WORDS, QWEN_WORDS, LLAMA3_WORDS)
WHERE = ("tokenizer.json", "tokenizer.model", "vocab.json + merges.txt")


class Tokenizer:
    """Text to ids and back. `Tokenizer.load(folder)`; damaged or missing files raise ModelError with the fix."""

    def __init__(
        self,
        backend: Backend,
        config: dict[str, Any] | None = None,
        *,
        stops: Iterable[int] = (),
        ids: dict[str, int] | None = None,
    ):
        """`config` is tokenizer_config.json as read; `stops` further ids that end an answer (generation_config.json); `ids` the
        bos_token_id, eos_token_id ... of config.json, used for tokens that `config` does not name."""
        self.backend, self.config = backend, dict(config or {})
        backend.no_truncation()
        backend.no_padding()
        self.templates = _templates(self.config.pop("chat_template", None))
        _add_declared(backend, self.config.pop("added_tokens_decoder", None) or {})
        self._name_tokens(ids or {})
        self._stops = tuple(stops)
        self._adapt()

    # ---- reading

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder", "name a checkpoint folder")
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        for name, token in _read_json(folder / "special_tokens_map.json").items():
            if name in NAMED and config.get(name) is None:
                config[name] = token
        if extra := _read_json(folder / "added_tokens.json"):
            declared = config.setdefault("added_tokens_decoder", {})
            for content, index in extra.items():
                declared.setdefault(str(index), {"content": content, "special": content in _contents(config)})
        if templates := _template_files(folder):
            config["chat_template"] = templates
        generation = _read_json(folder / "generation_config.json")
        stops = generation.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops] if isinstance(stops, int) else []
        backend = _backend(folder, config, model)
        ids = {}
        for name in ("bos", "eos", "pad"):
            for source in (model, generation):
                value = source.get(f"{name}_token_id")
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int):
                    ids.setdefault(f"{name}_token", value)
        return cls(backend, config, stops=stops, ids=ids)

    def _name_tokens(self, ids: dict[str, int]) -> None:
        """Settle bos_token, eos_token ...: the config's name, else config.json's id. Unknown ones are dropped."""
        self.named: dict[str, str] = {}
        for name in NAMED:
            token = self.config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None and name in ids and name != "pad_token":
                token = self.backend.id_to_token(ids[name])
            if isinstance(token, str) and token and self.backend.token_to_id(token) is not None:
                self.named[name] = token
            self.config.pop(name, None)
        for token in self.named.values():
            if self.backend.token_to_id(token) not in self.backend.get_added_tokens_decoder():
                self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])

    def _adapt(self) -> None:
        """Everything derived from the backend's vocabulary. Called again after tokens are added."""
        backend = self.backend
        self.added: dict[int, AddedToken] = dict(sorted(backend.get_added_tokens_decoder().items()))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the highest id."""
        named = {backend.token_to_id(token) for token in self.named.values()}
        self.special_ids = frozenset({i for i, token in self.added.items() if token.special} | named)
        self.markers = {i: t for i, t in self.added.items() if i not in self.special_ids and MARKER.fullmatch(t.content)}
        """Added tokens that are not special but look like markup: matched in markup and in assistant content only."""
        words = [t for i, t in self.added.items() if i not in self.special_ids and i not in self.markers]
        self._lead, self._rest, self._bare = (self._view(kind, words) for kind in ("lead", "rest", "bare"))
        self._remap = {}
        for token in words:
            if (ours := self._lead.token_to_id(token.content)) != (real := backend.token_to_id(token.content)):
                self._remap[ours] = real
        self._forbidden = np.zeros(self.vocab_size, bool)
        self._forbidden[[i for i in (*self.special_ids, *self.markers) if i != self.unk_id]] = True
        ends = backend.encode("a", add_special_tokens=True).ids, backend.encode("a", add_special_tokens=False).ids
        at = next((k for k in range(len(ends[0])) if ends[0][k : k + len(ends[1])] == ends[1]), 0)
        self._prefix, self._suffix = ends[0][:at], ends[0][at + len(ends[1]) :]
        if (wish := self.config.get("add_bos_token")) is not None and self.bos_id is not None:
            self._prefix = [self.bos_id] if wish else [i for i in self._prefix if i != self.bos_id]
        for name in ("fingerprint", "marker_pattern", "markup_pattern"):
            self.__dict__.pop(name, None)
        self._words = None if words else _Words.of(self)

    def _view(self, kind: str, words: list[AddedToken]) -> Backend:
        """The same model without markup tokens. `lead` begins a text, `rest` follows a special token, `bare` continues a word:
        they differ in the space that sentencepiece puts before a text."""
        view = Backend(self.backend.model)
        if self.backend.normalizer is not None:
            view.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            view.pre_tokenizer = self.backend.pre_tokenizer
        if kind != "lead":
            view = _without_prefix(view, always=kind == "bare")
        if words:
            view.add_tokens(words)
        return view

    # ---- facts

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.named[name]) if name in self.named else None

    bos_token = property(lambda self: self.named.get("bos_token"))
    eos_token = property(lambda self: self.named.get("eos_token"))
    pad_token = property(lambda self: self.named.get("pad_token"))
    unk_token = property(lambda self: self.named.get("unk_token"))
    bos_id = property(lambda self: self._named_id("bos_token"))
    eos_id = property(lambda self: self._named_id("eos_token"))
    pad_id = property(lambda self: self._named_id("pad_token"))
    unk_id = property(lambda self: self._named_id("unk_token"))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer as the checkpoint's files say: EOS and generation_config.json's eos_token_id."""
        return frozenset(i for i in (self.eos_id, *self._stops) if i is not None)

    @property
    def template(self) -> str | None:
        """The chat template used without tools; None for a base model."""
        return self.templates.get("default")

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text (BOS, or nothing)."""
        return tuple(self._prefix)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides ids and templates; equal after `save` and `load`."""
        facts = [self.backend.to_str(), self.named, self.templates, list(self._prefix), sorted(self.stop_ids)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def token(self, index: int) -> str | None:
        """The token's own spelling (`▁the`, `Ġthe`, `<|im_end|>`); None for an id without a token."""
        return self.backend.id_to_token(int(index))

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    # ---- encoding

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, no BOS or EOS added. `special=False`: no special token is recognised, whatever the text holds."""
        if special:
            return self.backend.encode(text, add_special_tokens=False).ids
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], where: str = "lead") -> list[list[int]]:
        """Ids of each text, no special token recognised. `where`: `lead` as a text of its own, `rest` right after a special token,
        `bare` as the continuation of what stands before it (no space is put in front)."""
        if self._words is None:
            return self._encode_batch(texts, where)
        rows = [self._words.encode(text, where) for text in texts]
        if left := [k for k, ids in enumerate(rows) if ids is None]:
            for k, ids in zip(left, self._encode_batch([texts[k] for k in left], where), strict=True):
                rows[k] = ids
        return rows

    def _encode_batch(self, texts: Sequence[str], where: str) -> list[list[int]]:
        """`encode_batch` without the memory of words."""
        view = {"lead": self._lead, "rest": self._rest, "bare": self._bare}[where]
        rows = [encoding.ids for encoding in view.encode_batch_fast(texts, add_special_tokens=False)]
        for k, ids in enumerate(rows):
            if self._remap:
                rows[k] = ids = [self._remap.get(i, i) for i in ids]
            if self._forbidden[ids].any() or (self.unk_token is not None and self.unk_token in texts[k]):
                rows[k] = self._spell(view, texts[k])
        return rows

    def _spell(self, view: Backend, text: str) -> list[int]:
        """Encode a text whose plain encoding may make a special token (a Unigram or WordLevel vocabulary holds them as words): each
        such token's text is written character by character."""
        encoding = view.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for ours, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            index = self._remap.get(ours, ours)
            if not self._forbidden[index] and (self.unk_token is None or self.unk_token not in text[start:end]):
                ids.append(index)
                continue
            for character in text[start:end]:
                letters = self._bare.encode(character, add_special_tokens=False).ids
                ids += [i for i in letters if not self._forbidden[i] and (i != self.unk_id or ids[-1:] != [i])]
        return ids

    @cached_property
    def marker_pattern(self) -> re.Pattern[str] | None:
        """Matches the non-special markup tokens (`<think>`), longest first; None when there are none."""
        return _pattern(self.markers.values())

    @cached_property
    def markup_pattern(self) -> re.Pattern[str] | None:
        """Matches every added token that is recognised in a template's own text."""
        return _pattern(t for i, t in self.added.items() if i in self.special_ids or i in self.markers)

    # ---- decoding

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. `skip_special` leaves out special tokens. Ids without a token give nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for one answer as it is made: `push(id) -> str`, and `flush()` at its end."""
        return TextStream(self, skip_special)

    # ---- changing and saving

    def add_tokens(self, tokens: Sequence[str], special: bool = False) -> list[int]:
        """Add tokens that are new to the vocabulary; returns the id of each of `tokens`, new or known. The model's embedding must
        have `vocab_size` rows afterwards. One that looks like markup (`<note>`) is recognised in templates and assistant content
        only; one that looks like a word, everywhere."""
        bad = [t for t in tokens if not isinstance(t, str) or not t.strip()]
        if bad:
            raise ModelError(f"tokens to add must not be empty: {bad!r}", "give each new token a visible text")
        self.backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in tokens])
        self._adapt()
        return [self.backend.token_to_id(t) for t in tokens]

    def save(self, folder: str | Path, template: str | Mapping[str, str] | None = None) -> list[Path]:
        """Write the standard files (tokenizer.json, tokenizer_config.json, chat_template.jinja ...): this class and transformers'
        AutoTokenizer read the same ids from them. `template` replaces the chat template, such as a run's `plain`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        templates = self.templates if template is None else {"default": template} if isinstance(template, str) else dict(template)
        config = {
            k: v for k, v in self.config.items() if k not in ("auto_map", "additional_special_tokens", "extra_special_tokens")
        }
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.named}
        config["added_tokens_decoder"] = {str(i): _token_dict(t, special=i in self.special_ids) for i, t in self.added.items()}
        files = {"tokenizer.json": self.backend.to_str(pretty=False), "special_tokens_map.json": _dump(self.named)}
        if set(templates) == {"default"}:
            files["chat_template.jinja"] = templates["default"]
        elif templates:
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        if self._stops:
            files["generation_config.json"] = _dump({"eos_token_id": list(self._stops)})
        files["tokenizer_config.json"] = _dump(config)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")
        return [folder / name for name in files]


class _Words(dict[str, tuple[int, ...]]):
    """Words and their ids, so that text seen before is not tokenised again: the library's own ids, 4-6 times faster on prose.

    Possible where a text splits into words that no merge can cross. Byte-level BPE says by a pattern where words end; its classes
    of letters and digits are written out here for the characters of PROSE, and a text with others goes the library's way. A
    sentencepiece BPE splits before each run of spaces if none of its pieces has a space behind another character.
    """

    def __init__(self, tokenizer: Tokenizer, pattern: str, prefix: str | None):
        super().__init__()
        self._find = re.compile(pattern).findall
        self._tokenize = tokenizer.backend.model.tokenize
        self._prefix = prefix  # ▁ or nothing for sentencepiece; None for byte-level
        self._forbidden = tokenizer._forbidden

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Words | None:
        """None where words cannot be told apart for sure, or the ids of a sample are not the library's."""
        shell = Backend(models.BPE())
        for name in ("normalizer", "pre_tokenizer"):
            if (part := getattr(tokenizer._lead, name)) is not None:
                setattr(shell, name, part)
        spec = json.loads(shell.to_str())
        splits, normal = spec["pre_tokenizer"], spec["normalizer"]
        if not isinstance(tokenizer.backend.model, models.BPE) or tokenizer.backend.model.dropout:
            return None
        if splits is None and tokenizer.backend.model.byte_fallback:
            steps = normal["normalizers"] if normal and normal["type"] == "Sequence" else [normal]
            kinds = [step and step["type"] for step in steps]
            spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            prefixed = kinds[0] == "Prepend" and steps[0]["prepend"] == "▁"
            vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
            crossing = any("▁" in piece.lstrip("▁") for piece in vocab)
            if (
                steps[-1] != spaces
                or len(steps) != 1 + prefixed
                or crossing
                or any(f"<0x{b:02X}>" not in vocab for b in range(256))
            ):
                return None
            words = cls(tokenizer, "▁*[^▁]+|▁+", "▁" if prefixed else "")
        else:
            pattern = _word_pattern(splits)
            if pattern is None or (normal is not None and normal["type"] != "NFC"):
                return None
            words = cls(tokenizer, pattern, None)
        for where in ("lead", "rest", "bare"):
            if [words.encode(text, where) for text in SAMPLE] != tokenizer._encode_batch(SAMPLE, where):
                return None
        return words

    def encode(self, text: str, where: str) -> list[int] | None:
        """Ids of a text, or None if it must go the library's way."""
        if self._prefix is None:
            if not text.isascii() and PROSE.fullmatch(text) is None:
                return None
        elif text:
            text = ("" if where == "bare" else self._prefix) + text.replace(" ", "▁")
        try:
            return list(chain.from_iterable(map(self.__getitem__, self._find(text))))
        except LookupError:
            return None

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= WORDS:
            self.clear()
        ids = tuple(
            t.id for t in self._tokenize(word if self._prefix is not None else word.encode().decode("latin-1").translate(BYTES))
        )
        if self._forbidden[list(ids)].any():
            raise LookupError(word)
        if len(word) <= 64:
            self[word] = ids
        return ids


WORDS = 100_000  # words remembered; about 20 MB
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
BYTES = {b: chr(256 + k) for k, b in enumerate(_HIDDEN)}
"""The characters that byte-level BPE writes for bytes that are not visible ones."""
_PROSE = [c for c in map(chr, (*range(0x250), *range(0x2002, 0x2070), 0x20AC, 0x2122)) if c != "\u017f"]
PROSE = re.compile(f"[{re.escape(''.join(_PROSE))}]*")
"""Texts of Latin letters, digits and common punctuation: characters whose class no Unicode version changed, all of them in NFC. (ſ
is left out: it matches s without case.)"""
SAMPLE = (
    "Hello  world, it's 2024-05-01; I'LL pay $3.50\u2014\u201cor\u201d \u20ac12\u00bd!\n\n\tdef f(x):\n        return x_1\r\n   \n",
    " a\n b \t\t c...  !!?(['\"]) caf\u00e9 na\u00efve \u0142\u00f3d\u017a 1234567 x\u00a0y\u2009z \x00\x1c\x85 <s>[INST]</s>   ",
    "",
)


def _word_pattern(splits: dict[str, Any] | None) -> str | None:
    """The word pattern of a byte-level pre-tokenizer for Python's `re`, its classes written out for the characters of PROSE."""
    if splits is None:
        return None
    parts = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(parts) == 1 and last["use_regex"]:
        source = GPT2_WORDS
    elif len(parts) == 2 and not last["use_regex"] and parts[0]["type"] == "Split" and parts[0]["behavior"] == "Isolated":
        source = parts[0]["pattern"].get("Regex")
    else:
        return None
    if source not in WORD_PATTERNS:
        return None
    letters, digits = ("".join(c for c in _PROSE if unicodedata.category(c)[0] == kind) for kind in "LN")
    classes = {r"\p{L}": letters, r"\p{N}": digits, r"\s": "".join(c for c in _PROSE if c in SPACE)}

    def expand(match: re.Match[str]) -> str:
        text = match[0]
        for name, members in classes.items():
            text = text.replace(name, re.escape(members) if match[0].startswith("[") else f"[{re.escape(members)}]")
        return text

    spaces = re.escape(classes[r"\s"])
    return re.sub(r"\[[^\]]*\]|\\p\{[LN]\}|\\s", expand, source).replace(r"\S", f"[^{spaces}]")


class TextStream:
    """Turns ids into text piece by piece, only at whole characters: what was pushed joins to `decode` of all ids.

    A token may hold part of a character (byte fallback, byte-level BPE) and some decoders look at the token before, so each step
    decodes a short window and gives what is new in it. Bytes that never become a character are given out, all but the last four
    tokens, or the window would grow with the answer.
    """

    LONGEST = 16  # tokens without a whole character; four bytes are the longest one

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._ids: list[int] = []
        self._from = self._read = 0  # the window begins at _from; text up to _read was given out

    def push(self, index: int) -> str:
        """The text that `index` completes; empty while a character is incomplete."""
        self._ids.append(int(index))
        given, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        end = len(self._ids)
        if len(now) <= len(given) or now.endswith("\ufffd"):
            if end - self._read < self.LONGEST:
                return ""
            found = ((e, self._decode(self._ids[self._from : e])) for e in range(end - 4, end - 8, -1))
            end, now = next(((e, text) for e, text in found if now.startswith(text) and len(text) > len(given)), (0, ""))
            if not end:
                return ""
        self._from, self._read = self._read, end
        return now[len(given) :]

    def flush(self) -> str:
        """What is left: a character that was never completed shows as U+FFFD."""
        given, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        self._ids, self._from, self._read = [], 0, 0
        return now[len(given) :]


# ---- small parts


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Leftmost-longest match of the tokens' texts, as the `tokenizers` library finds them."""
    parts = []
    for token in sorted(tokens, key=lambda t: len(t.content), reverse=True):
        text = re.escape(token.content)
        parts.append(rf"(?<!\w){text}(?!\w)" if token.single_word else text)
    return re.compile("|".join(parts)) if parts else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise ModelError(
            f"{path}: not readable as JSON ({fault})", "download the file again: it is damaged or cut short"
        ) from fault
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not an object", "download the file again")
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _contents(config: dict[str, Any]) -> set[str]:
    """Texts of the tokens a config names."""
    named = [config.get(name) for name in NAMED] + list(config.get("additional_special_tokens") or [])
    return {t["content"] if isinstance(t, dict) else t for t in named if t}


def _token_dict(token: AddedToken, special: bool) -> dict[str, Any]:
    flags = {name: getattr(token, name) for name in ("lstrip", "normalized", "rstrip", "single_word")}
    return {"content": token.content, **flags, "special": special}


def _templates(value: Any) -> dict[str, str]:
    """`chat_template` of a config: one text, or a list of named ones, as {name: text}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise ModelError("chat_template: neither a text nor a list of named texts", "download tokenizer_config.json again")
    return value


def _template_files(folder: Path) -> dict[str, str]:
    """Chat templates that stand in files of their own: they win over tokenizer_config.json."""
    found = {}
    try:
        if (path := folder / "chat_template.jinja").is_file():
            found["default"] = path.read_text(encoding="utf-8")
        elif "chat_template" in (value := _read_json(folder / "chat_template.json")):
            found |= _templates(value["chat_template"])
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ModelError(f"{folder}: a chat template is not UTF-8 ({fault})", "save it as UTF-8") from fault
    return found


def _add_declared(backend: Backend, declared: dict[str, Any]) -> None:
    """Add the tokens of added_tokens_decoder that the backend lacks; each must get the id it declares."""
    known, wrong = backend.get_added_tokens_decoder(), []
    for index, token in sorted(((int(i), t) for i, t in declared.items()), key=lambda item: item[0]):
        token = token if isinstance(token, dict) else {"content": str(token)}
        if index in known and known[index].content == token["content"]:
            continue
        flags = {k: bool(token[k]) for k in ("lstrip", "rstrip", "single_word", "special") if k in token}
        backend.add_tokens([AddedToken(token["content"], normalized=bool(token.get("normalized", False)), **flags)])
        if (got := backend.token_to_id(token["content"])) != index:
            wrong.append(f"added token {token['content']!r} is declared as {index} but would get {got}")
    if wrong:
        raise ModelError(
            "\n".join(wrong), "tokenizer_config.json belongs to another vocabulary: take both files from one checkpoint"
        )


def _without_prefix(view: Backend, always: bool) -> Backend:
    """The view without the space put in front of a text's first word (`always`: nor of any run's)."""
    spec = json.loads(Backend(models.BPE()).to_str())
    parts = Backend(models.BPE())
    for name in ("normalizer", "pre_tokenizer"):
        if (part := getattr(view, name)) is not None:
            setattr(parts, name, part)
    spec = json.loads(parts.to_str())

    def edit(part: Any) -> Any:
        if part is None:
            return None
        for key in ("normalizers", "pretokenizers"):
            if key in part:
                part[key] = [e for e in map(edit, part[key]) if e is not None]
        if part["type"] == "Metaspace" and (always or part.get("prepend_scheme") == "first"):
            part |= {"prepend_scheme": "never"}
        if always and part["type"] == "Prepend":
            return None
        if always and part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        return part

    parts = Backend.from_str(json.dumps(spec | {name: edit(spec[name]) for name in ("normalizer", "pre_tokenizer")}))
    fresh = Backend(view.model)
    for name in ("normalizer", "pre_tokenizer"):
        if (part := getattr(parts, name)) is not None:
            setattr(fresh, name, part)
    return fresh


def _backend(folder: Path, config: dict[str, Any], model: dict[str, Any]) -> Backend:
    """Build the `tokenizers` object from whichever files the folder has."""
    if (path := folder / "tokenizer.json").is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as fault:  # the library raises bare Exception
            raise ModelError(
                f"{path}: not a readable tokenizer ({fault})", "download the file again: it is damaged or cut short"
            ) from fault
    if (path := folder / "tokenizer.model").is_file():
        return _from_sentencepiece(path, config)
    if (vocab := folder / "vocab.json").is_file() and (merges := folder / "merges.txt").is_file():
        return _from_merges(vocab, merges, config, model)
    raise ModelError(
        f"{folder}: no tokenizer: looked for {', '.join(WHERE)}", "copy the tokenizer files of the base model into the folder"
    )


def _from_merges(vocab: Path, merges: Path, config: dict[str, Any], model: dict[str, Any]) -> Backend:
    """Byte-level BPE: GPT-2's words, or Qwen's. Other families need a tokenizer.json: these files do not say how words split."""
    kind = str(config.get("tokenizer_class") or model.get("model_type") or "gpt2").lower()
    try:
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as fault:  # the library raises bare Exception
        raise ModelError(f"{vocab.parent}: vocab.json or merges.txt is damaged ({fault})", "download both again") from fault
    space = bool(config.get("add_prefix_space", False))
    if kind.startswith("qwen"):
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif kind.startswith("gpt"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    else:
        raise ModelError(
            f"{vocab.parent}: cannot build a {config.get('tokenizer_class', kind)} from vocab.json and merges.txt",
            "add the checkpoint's tokenizer.json (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    backend.decoder = decoders.ByteLevel()
    if kind.startswith("gpt") and backend.token_to_id("<|endoftext|>") is not None:
        for name in ("bos_token", "eos_token", "unk_token"):
            config.setdefault(name, "<|endoftext|>")
    return backend


# ---- sentencepiece without sentencepiece: a reader for the few fields of its protobuf that decide ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: varints as int, length-delimited as bytes, 4 and 8 byte values as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
            if shift > 63:
                raise ValueError("varint too long")

    at = 0
    while at < len(data):
        tag, at = varint(at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = varint(at)
        elif wire in (1, 2, 5):
            size, at = varint(at) if wire == 2 else (8 if wire == 1 else 4, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("cut short")
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def _from_sentencepiece(path: Path, config: dict[str, Any]) -> Backend:
    """A `tokenizers` object with sentencepiece's own ids: BPE merges ordered by the pieces' scores, byte fallback, and the text's
    spaces as ▁. (Ordering merges by id, as one popular loader does, gives wrong ids for every run of spaces.)"""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normal: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normal = dict(_fields(value))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as fault:
        raise ModelError(
            f"{path}: not a sentencepiece model ({fault or type(fault).__name__})",
            "download the file again; a tiktoken file needs the checkpoint's tokenizer.json instead",
        ) from fault
    kinds = {piece: kind for piece, _, kind in pieces}
    if UNKNOWN not in kinds.values() or len(kinds) != len(pieces):
        raise ModelError(f"{path}: not a sentencepiece model (no unknown piece, or a piece twice)", "download the file again")
    unk = next(piece for piece, _, kind in pieces if kind == UNKNOWN)
    fallback = BYTE in kinds.values()
    dummy, squeeze, escape = (bool(normal.get(k, 1)) for k in (3, 4, 5))
    charsmap = normal.get(2, b"")
    model_type = trainer.get(3, 1)
    if not escape or trainer.get(24, 0) or model_type not in (1, 2):
        raise ModelError(
            f"{path}: a kind of sentencepiece model that is not supported (type {model_type})",
            "add the checkpoint's tokenizer.json",
        )
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    if model_type == 2:
        merges = _merges([(p, score) for p, score, kind in pieces if kind in (NORMAL, UNUSED)], kinds)
        backend = Backend(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback))
    else:
        backend = Backend(models.Unigram([(p, score) for p, score, _ in pieces], unk_id=vocab[unk], byte_fallback=fallback))
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if squeeze:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if dummy:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    tail = [decoders.Strip(" ", 1, 0)] if dummy else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    for index, (piece, _, kind) in enumerate(pieces):
        special = kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and SPECIAL_PIECE.fullmatch(piece) is not None)
        if special or kind == USER_DEFINED:
            known = (config.get("added_tokens_decoder") or {}).get(str(index), {})
            flags = {k: bool(known[k]) for k in ("lstrip", "rstrip", "single_word") if k in known}
            backend.add_tokens([AddedToken(piece, normalized=False, special=bool(known.get("special", special)), **flags)])
    for name, field, default in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2)):
        index = trainer.get(field, default)
        if index < len(pieces) and pieces[index][2] in (CONTROL, UNKNOWN):
            config.setdefault(name, pieces[index][0])
    if config.get("add_bos_token", True) and isinstance(config.get("bos_token"), (str, dict)):
        bos = config["bos_token"] if isinstance(config["bos_token"], str) else config["bos_token"]["content"]
        if bos in vocab:
            backend.post_processor = processors.TemplateProcessing(
                f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1", [(bos, vocab[bos])]
            )
    return backend


def _merges(scored: list[tuple[str, float]], kinds: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges in sentencepiece's order: the pair whose joint piece scores highest goes first; of two ways to make one piece,
    the one with the longer left half, which is what its leftmost-first rule comes to in runs of spaces."""
    merges = []
    for piece, score in scored:
        cuts = ((piece[:k], piece[k:]) for k in range(len(piece) - 1, 0, -1))
        merges += [(-score, (a, b)) for a, b in cuts if kinds.get(a) in (NORMAL, UNUSED) and kinds.get(b) in (NORMAL, UNUSED)]
    merges.sort(key=lambda merge: merge[0])  # stable: longer left halves stay first
    return [pair for _, pair in merges]
