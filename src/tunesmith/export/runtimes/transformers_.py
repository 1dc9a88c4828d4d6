"""transformers, and PEFT for an adapter: what a merged folder and an adapter are loaded with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tunesmith.export.runtimes import Answer, Told, main


def answer(job: dict[str, Any], told: Told) -> Answer:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    notes: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"] or job["artefact"], trust_remote_code=False)
    model = _model(job, torch, AutoModelForCausalLM, notes)
    if job.get("nf4"):
        try:
            with torch.no_grad():
                model.eval()(torch.tensor([job["rows"][0][:2]], device=next(model.parameters()).device))
        except RuntimeError as fault:  # bitsandbytes on a CPU needs widths that 64 divides
            job["nf4"] = False
            notes[:] = [f"over the 16-bit base: bitsandbytes cannot run it in 4 bits here ({fault})"]
            del model  # else both are in memory
            model = _model(job, torch, AutoModelForCausalLM, notes)
    model.eval()
    if torch.cuda.is_available() and not job.get("nf4"):
        if _fits(model, torch):
            model.to("cuda")
        else:  # a run over 4 bits may have been trained on a card that has no room for it in 16
            notes.append("run on the CPU: the GPU has no room for it")
    device = next(model.parameters()).device
    ids, logp = [], []
    with torch.no_grad():
        for row, positions in zip(job["rows"], job["positions"], strict=True):
            logits = model(torch.tensor([row], device=device), use_cache=False).logits[0]
            found = logits[torch.tensor(positions, device=device)].float().log_softmax(-1)
            best = found.topk(min(job["top"], found.shape[-1]))
            ids.append(best.indices.cpu().numpy())
            logp.append(best.values.cpu().numpy())
            told(len(positions))
        stops = _stops(model)
        answers, ended = [], []
        for prompt in job["prompts"]:
            whole = torch.tensor([prompt], device=device)
            made = model.generate(
                whole, attention_mask=torch.ones_like(whole), max_new_tokens=job["max_tokens"], do_sample=False, num_beams=1
            )[0, len(prompt) :].tolist()
            ended.append(bool(made) and made[-1] in stops)
            answers.append(made[:-1] if ended[-1] else made)
            told(1)
    facts = {
        "rendered": [_rendered(tokenizer, asked) for asked in job["asked"]],
        "answers": answers,
        "texts": [tokenizer.decode(a, skip_special_tokens=True) for a in answers],
        "ended": ended,
        "template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else _default(tokenizer.chat_template),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "stops": sorted(stops),
        "adds_bos": None,
        "runtime": f"transformers {transformers.__version__}" + (_peft() if job["adapter"] else ""),
        "notes": notes,
    }
    return np.concatenate(ids), np.concatenate(logp), facts


def _model(job: dict[str, Any], torch: Any, auto: Any, notes: list[str]) -> Any:
    if not job["adapter"]:
        return auto.from_pretrained(job["artefact"], dtype="auto", trust_remote_code=False)
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    dtype = getattr(torch, job["dtype"])
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if job.get("nf4"):
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        notes.append("the base in 4 bits by bitsandbytes")
    base = auto.from_pretrained(job["base"], **how)
    rows = getattr(PeftConfig.from_pretrained(job["adapter"]), "trainable_token_indices", None) or {}
    need = 1 + max((i for ids in (rows.values() if isinstance(rows, dict) else [rows]) for i in ids), default=-1)
    if need > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(need)
    alone = _stops(base)
    base.generation_config = GenerationConfig.from_pretrained(job["adapter"])
    if alone != (ours := _stops(base)):
        notes.append(
            f"its answers end at {sorted(ours)}, the base's at {sorted(alone)}: generate with this folder's generation_config.json"
        )
    return PeftModel.from_pretrained(base, job["adapter"])


def _fits(model: Any, torch: Any) -> bool:
    """Whether the GPU has room for the weights, and for what is computed with them: a fifth of them and 2 GiB."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights * 1.2 + 2 * 2**30 < torch.cuda.mem_get_info()[0]


def _peft() -> str:
    import peft

    return f", PEFT {peft.__version__}"


def _stops(model: Any) -> set[int]:
    """What `generate` ends at: generation_config.json's, which transformers reads from a model's folder; for an adapter it must be
    told, since PEFT reads none."""
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [found]) - {None}


def _default(templates: Any) -> str | None:
    return (templates or {}).get("default") if isinstance(templates, dict) else None


def _rendered(tokenizer: Any, asked: dict[str, Any]) -> list[int] | None:
    if "text" in asked:
        return tokenizer(asked["text"])["input_ids"]
    try:
        found = tokenizer.apply_chat_template(
            asked["messages"], tools=asked.get("tools") or None, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception:  # noqa: BLE001 - a template refuses by raising whatever it likes
        return None
    return list(found["input_ids"])


if __name__ == "__main__":
    main(answer)
