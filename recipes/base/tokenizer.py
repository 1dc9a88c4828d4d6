"""A byte-level BPE tokenizer of 4,096 tokens, as a standard Hugging Face folder with a chat template.

    python recipes/base/tokenizer.py --text .cache/base/train --out .cache/base/init
    python recipes/base/tokenizer.py --text .cache/base/train --held-out .cache/base/held_out --compare 2048 4096 8192

Why 4,096: at a width of 384 the tied embedding is 1.6 M of 9.7 M parameters; 8,192 would take 3.1 M of them (README.md has
the bytes per token of each). Digits stand alone, so a number is read digit by digit. Words are split by Qwen 2's pattern, which
llama.cpp knows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MEGABYTES = {
    "storybooks": 8,
    "childrens": 12,
    "factbook": 3,
    "openstax": 8,
    "books": 12,
}  # read per source; small ones are read again
CONTEXT = 2048
# A role, what was said, the one stop token. No BOS: the role token opens every conversation.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('this template knows the roles system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def mixture(folder: Path) -> Iterator[str]:
    """Text of the sources in MEGABYTES' proportions; a source not named there gives up to 4 MB."""
    for path in sorted(folder.glob("*.jsonl")):
        left = MEGABYTES.get(path.stem, 4) * 1_000_000
        for _ in range(4):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    yield text
                    left -= len(text)
                    if left <= 0:
                        break
            if left <= 0:
                break


def build(texts: Iterator[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    special = {"eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")


def bytes_per_token(tokenizer: Tokenizer, held_out: Path) -> dict[str, float]:
    rates = {}
    for path in sorted(held_out.glob("*.jsonl")):
        if path.stem == "sample":
            continue
        with path.open(encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        rates[path.stem] = sum(len(t.encode()) for t in texts) / sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of jsonl files with a `text` key")
    parser.add_argument("--out", type=Path, default=Path(".cache/base/init"))
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--held-out", type=Path, help="print bytes per token on these documents")
    parser.add_argument("--compare", type=int, nargs="*", help="train these sizes, print bytes per token, save nothing")
    args = parser.parse_args()
    for vocab in args.compare or [args.vocab]:
        tokenizer = build(mixture(args.text), vocab)
        if not args.compare:
            save(tokenizer, args.out)
            size = (args.out / "tokenizer.json").stat().st_size
            print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens, tokenizer.json {size / 1000:.0f} kB")
        if args.held_out:
            rates = bytes_per_token(tokenizer, args.held_out)
            print(f"{vocab:,} tokens, bytes per token:", "  ".join(f"{k} {v:.2f}" for k, v in rates.items()))


if __name__ == "__main__":
    main()
