"""ollama: a merged GGUF and a Modelfile. Ollama refuses ADAPTER lines since 0.34 and quantises nothing on import, so we do both.

Since 0.30 it takes the chat template out of the GGUF; a TEMPLATE line, in Go's own language, would win over it and is left out.
"""

from __future__ import annotations

import json

from tunesmith.data.render import Renderer

CONTEXT = 8192  # a longer one takes memory for its cache from the first word on


def modelfile(gguf: str, renderer: Renderer, reach: int) -> str:
    """FROM, what ends an answer as text, and the context. `reach`: tokens the model was made for."""
    token = renderer.tokenizer.token
    stops = [text for i in sorted(renderer.stop_ids) if (text := token(i))]
    lines = [
        "# ollama create NAME -f Modelfile && ollama run NAME",
        "# The chat template is the GGUF's own, which Ollama takes since 0.30.",
        f"FROM ./{gguf}",
        *(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops),
        f"PARAMETER num_ctx {min(reach, CONTEXT)}",
    ]
    if reach > CONTEXT:
        lines.append(f"# the model was made for {reach:,} tokens; each takes memory")
    return "\n".join(lines) + "\n"


def read_modelfile(text: str) -> tuple[str, list[str], int | None]:
    """(what FROM names, the stops, num_ctx) of a Modelfile as it is written here."""
    origin, stops, context = "", [], None
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            origin = rest
        elif word == "PARAMETER":
            name, _, value = rest.partition(" ")
            if name == "stop":
                stops.append(json.loads(value))
            elif name == "num_ctx":
                context = int(value)
    return origin, stops, context
