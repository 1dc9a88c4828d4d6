"""vLLM, where it is installed: what a vLLM folder is for. It is no part of any extra: its pins and ours do not live together.

An adapter is loaded as `vllm serve BASE --lora-modules` loads it, with the tokenizer and generation_config.json that lie beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.export.runtimes import Answer, NotHere, Told, main

CACHE = 2 << 30  # bytes of keys and values: a row of LONGEST tokens of a Llama 2 13B in float32. vLLM's own: 0.92 of all memory
SHORTEST = 512  # tokens of context there are at least, where the model has them: for what is rendered


def answer(job: dict[str, Any], told: Told) -> Answer:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # nothing outlives this process, and its faults are told here
    import vllm
    from vllm import SamplingParams

    config = json.loads((Path(job["base"] or job["artefact"]) / "config.json").read_text("utf-8"))
    reach = min(SHORTEST, config.get("max_position_embeddings") or 0)  # vLLM refuses more than the model has
    longest = max(reach, *map(len, job["rows"]), *(len(prompt) + job["max_tokens"] for prompt in job["prompts"]))
    model, how = _loaded(job, config, longest)
    tokenizer = model.get_tokenizer()
    ids, logp = [], []
    one = SamplingParams(max_tokens=1, temperature=0, logprobs=min(job["top"], config["vocab_size"]), detokenize=False)
    for row, positions in zip(job["rows"], job["positions"], strict=True):
        asked = [{"prompt_token_ids": row[: position + 1]} for position in positions]
        for made in model.generate(asked, one, use_tqdm=False, **how):
            found = sorted(made.outputs[0].logprobs[0].items(), key=lambda item: -item[1].logprob)[: one.logprobs]
            ids.append([i for i, _ in found])
            logp.append([entry.logprob for _, entry in found])
        told(len(positions))
    long = SamplingParams(max_tokens=job["max_tokens"], temperature=0)
    outputs = []
    for prompt in job["prompts"]:
        (made,) = model.generate([{"prompt_token_ids": prompt}], long, use_tqdm=False, **how)
        outputs.append(made.outputs[0])
        told(1)
    ended = [o.finish_reason == "stop" for o in outputs]
    stops = model.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    render = _renderer(model, tokenizer, longest)
    facts = {
        "rendered": [render(asked) for asked in job["asked"]],
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


def _loaded(job: dict[str, Any], config: dict[str, Any], longest: int) -> tuple[Any, dict[str, Any]]:
    """(the engine, what each request says). Raises NotHere, and whatever vLLM raises at a model that it cannot load."""
    import torch
    from vllm import LLM
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise NotHere("vLLM finds no device that this build of it runs on")
    dtype = job.get("dtype") or config.get("dtype") or config["torch_dtype"]  # vLLM's `auto` makes bfloat16 of float32
    how: dict[str, Any] = {"dtype": dtype, "max_model_len": longest, "max_logprobs": min(job["top"], config["vocab_size"])}
    how |= {"kv_cache_memory_bytes": CACHE, "enforce_eager": True, "seed": 0}
    adapter = job["adapter"]
    request = {}
    if adapter:
        from vllm.lora.request import LoRARequest

        how |= {"tokenizer": adapter, "generation_config": adapter, "enable_lora": True, "max_lora_rank": job["max_lora_rank"]}
        request = {"lora_request": LoRARequest("adapter", 1, adapter)}
    try:
        return LLM(job["base"] if adapter else job["artefact"], **how), request
    except (MemoryError, torch.OutOfMemoryError) as fault:
        raise NotHere(str(fault)) from fault
    except ValueError as fault:
        if (
            type(fault) is ValueError and "memory" in str(fault).lower()
        ):  # "Free memory on device ... is less than desired", "to serve at least one request"
            raise NotHere(str(fault)) from fault
        raise


def _renderer(model: Any, tokenizer: Any, longest: int) -> Callable[[dict[str, Any]], list[int] | None]:
    """The ids that vLLM makes of a conversation; of one that is longer than the engine was opened for, its tokenizer's."""
    from vllm import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def render(asked: dict[str, Any]) -> list[int] | None:
        try:
            if "text" in asked:
                ids = tokenizer(asked["text"])["input_ids"]
                made = [] if len(ids) >= longest else model.generate([asked["text"]], one, use_tqdm=False)
            else:
                how = {"tools": asked.get("tools") or None, "add_generation_prompt": True}
                ids = tokenizer.apply_chat_template(asked["messages"], **how, return_dict=True)["input_ids"]
                made = [] if len(ids) >= longest else model.chat(asked["messages"], one, use_tqdm=False, **how)
        except Exception:  # noqa: BLE001 - a template refuses by raising whatever it likes
            return None
        return list(made[0].prompt_token_ids if made else ids)

    return render


if __name__ == "__main__":
    main(answer)
