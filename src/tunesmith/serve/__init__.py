"""An OpenAI-shaped server over runs and checkpoints.

    schema.py    requests and errors: strict parsing, OpenAI's shapes; no torch
    sse.py       the event stream; no torch
    http.py      routes, who may ask, how long a body may be; no torch
    tools.py     tool calls in a model's text; no torch
    service.py   a request to jobs for the engine and back: prompts, passages, answers; no torch
    grammar.py   answers held to a JSON schema (llguidance)
    sampling.py  the next token of each row
    engine.py    continuous batching: one thread that owns the model
    shelf.py     the runs that are served: names, adapters, renderers
    start.py     the token, the address, the server

Starlette and uvicorn are the `serve` extra. The engine needs neither.
"""
