"""llama.cpp's own server, in-process through the prebuilt xllamacpp wheel, on a loopback port with a key that lives as long.

The server gives the likeliest tokens of the last position only, so a row costs a request a position; what came before is cached.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from tunesmith.export.runtimes import Answer, Told, main


class Server:
    def __init__(self, job: dict[str, Any]):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = job["artefact"]
        longest = max(map(len, [*job["rows"], *job["prompts"], [0]])) + job["max_tokens"] + 8
        params.n_ctx = max(256, longest)
        params.n_parallel, params.warmup, params.verbosity, params.fit_params = 1, False, -1, False
        params.endpoint_props, params.endpoint_slots, params.ui = True, False, False
        self.key = secrets.token_hex(16)
        params.api_keys = [self.key]
        if job["adapter"]:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = job["adapter"], 1.0
            params.lora_adapters = [adapter]
        self.server = xllamacpp.Server(params)
        self.version = xllamacpp.__version__
        self.door = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is not for what stays here

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer as JSON; an error of the server as its text."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with self.door.open(urllib.request.Request(self.server.listening_address + path, data, headers)) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"llama.cpp's server answered {e.code} to {path}: {e.read()[:500]!r}") from None


def answer(job: dict[str, Any], told: Told) -> Answer:
    server = Server(job)
    ids, logp = [], []
    # Where the token drawn ends the answer, or is half a character, the server gives no list. A bias draws a plain one always; the
    # list is made before biases.
    plain = server.ask("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    for row, positions in zip(job["rows"], job["positions"], strict=True):
        for position in positions:
            body = {"prompt": row[: position + 1], "n_predict": 1, "n_probs": job["top"], "temperature": 0, "cache_prompt": True}
            body["logit_bias"] = [[plain, 1000.0]]
            found = server.ask("/completion", body)["completion_probabilities"][0]["top_logprobs"]
            found.sort(key=lambda one: -one["logprob"])
            ids.append([one["id"] for one in found])
            logp.append([one["logprob"] if one["logprob"] is not None else -np.inf for one in found])
            told(1)
    answers, texts, ended = [], [], []
    for prompt in job["prompts"]:
        body = {"prompt": prompt, "n_predict": job["max_tokens"], "temperature": 0, "return_tokens": True, "cache_prompt": True}
        made = server.ask("/completion", body)
        ended.append(made["stop_type"] == "eos")
        tokens = made["tokens"]
        answers.append(tokens[: made["tokens_predicted"] - ended[-1]])
        texts.append(made["content"])
        told(1)
    props = server.ask("/props")
    facts = {
        "rendered": [_rendered(server, asked) for asked in job["asked"]],
        "answers": answers,
        "texts": texts,
        "ended": ended,
        "template": props.get("chat_template"),
        "bos": _id(server, props["bos_token"]),
        "eos": _id(server, props["eos_token"]),
        "stops": None,
        "adds_bos": server.ask("/tokenize", {"content": "a", "add_special": True})["tokens"]
        != server.ask("/tokenize", {"content": "a", "add_special": False})["tokens"],
        "runtime": f"llama.cpp (xllamacpp {server.version})",
        "notes": [],
    }
    width = min(map(len, ids))
    return np.array([i[:width] for i in ids]), np.array([p[:width] for p in logp]), facts


def _id(server: Server, token: str) -> int | None:
    """The id of a special token's text; None where it is none of one token."""
    found = server.ask("/tokenize", {"content": token, "add_special": False, "parse_special": True})["tokens"] if token else []
    return found[0] if len(found) == 1 else None


def _rendered(server: Server, asked: dict[str, Any]) -> list[int] | None:
    if "text" in asked:
        return server.ask("/tokenize", {"content": asked["text"], "add_special": True, "parse_special": True})["tokens"]
    body = {"messages": asked["messages"]} | ({"tools": asked["tools"]} if asked.get("tools") else {})
    try:
        text = server.ask("/apply-template", body)["prompt"]
    except RuntimeError:
        return None
    return server.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


if __name__ == "__main__":
    main(answer)
