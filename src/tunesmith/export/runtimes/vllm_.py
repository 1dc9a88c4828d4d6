"""vLLM, where it is installed: what a vLLM folder is for. It is no part of any extra: its pins and ours do not live together."""

from __future__ import annotations

from typing import Any

import numpy as np

from tunesmith.export.runtimes import Answer, Told, main


def answer(job: dict[str, Any], told: Told) -> Answer:
    import vllm
    from vllm import LLM, SamplingParams

    top = min(job["top"], 1024)
    longest = max(map(len, [*job["rows"], *job["prompts"]])) + job["max_tokens"] + 8
    model = LLM(job["artefact"], max_model_len=longest, max_logprobs=top, enforce_eager=True, seed=0)
    tokenizer = model.get_tokenizer()
    ids, logp = [], []
    one = SamplingParams(max_tokens=1, temperature=0, logprobs=top)
    for row, positions in zip(job["rows"], job["positions"], strict=True):
        asked = [{"prompt_token_ids": row[: position + 1]} for position in positions]
        for made in model.generate(asked, one, use_tqdm=False):
            found = sorted(made.outputs[0].logprobs[0].items(), key=lambda item: -item[1].logprob)[:top]
            ids.append([i for i, _ in found])
            logp.append([entry.logprob for _, entry in found])
        told(len(positions))
    long = SamplingParams(max_tokens=job["max_tokens"], temperature=0)
    made = model.generate([{"prompt_token_ids": p} for p in job["prompts"]], long, use_tqdm=False)
    outputs = [m.outputs[0] for m in made]
    ended = [o.finish_reason == "stop" for o in outputs]
    generation = model.llm_engine.model_config.try_get_generation_config()
    stops = generation.get("eos_token_id")
    facts = {
        "rendered": [_rendered(tokenizer, asked) for asked in job["asked"]],
        "answers": [list(o.token_ids)[: len(o.token_ids) - e] for o, e in zip(outputs, ended, strict=True)],
        "texts": [o.text for o in outputs],
        "ended": ended,
        "template": tokenizer.chat_template,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "stops": sorted(set(stops if isinstance(stops, list) else [stops]) - {None}) or None,
        "adds_bos": None,
        "runtime": f"vLLM {vllm.__version__}",
        "notes": [],
    }
    width = min(map(len, ids))
    return np.array([i[:width] for i in ids]), np.array([p[:width] for p in logp]), facts


def _rendered(tokenizer: Any, asked: dict[str, Any]) -> list[int] | None:
    if "text" in asked:
        return tokenizer(asked["text"])["input_ids"]
    try:
        return list(tokenizer.apply_chat_template(asked["messages"], tools=asked.get("tools") or None, add_generation_prompt=True))
    except Exception:  # noqa: BLE001 - a template refuses by raising whatever it likes
        return None


if __name__ == "__main__":
    main(answer)
