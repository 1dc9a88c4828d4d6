"""Tokens a second and time to the first token at 1, 8 and 64 streams, beside transformers' continuous batching, in one run.

    python bench/serve.py --out OUT --limit 300             what this machine can: a GPU the large models, a CPU the embedded one
    python bench/serve.py --out OUT --models mistral-7b --streams 64 --arms tunesmith,transformers
    python bench/serve.py --out OUT --http --peer PYTHON    both as servers, over HTTP; PYTHON has transformers[serving]
    python bench/serve.py --table                           results -> the table of docs/serving.md

A stream asks its next question when it has its last answer. Prompts have 20 to 1,000 tokens and answers 16 to 256, drawn once:
both arms get the same, greedy, and no answer ends early (in process; over HTTP both say the same text, and what they said counts).
Without --http both engines run in this process, from token ids to token ids, no text made. `transformers` is its
ContinuousBatchingManager with its own defaults, which is what `transformers serve --continuous-batching` runs; without that flag it
answers one request at a time. Large models have random weights of the published shape, made on the device. A row is
appended to OUT/serve.jsonl at once, failures too; a second call does what is missing. Each (model, arm) is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STREAMS = (64, 8, 1)
COUNT = {64: 192, 8: 48, 1: 8}  # requests of a row
COUNT_CPU = {64: 96, 8: 24, 1: 6}
COUNT_TINY = {64: 8, 8: 3, 1: 2}  # the model of the tests
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
    "mistral-7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "hidden_act": "silu",
    },
    "tiny": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu",
    },
}  # fmt: skip
PEER_BLOCKS, PEER_TOKENS = 448, 768  # on a CPU, where transformers would take nearly all main memory: room for 64 long sequences
ARMS = ("tunesmith", "transformers")


def work(count: int, vocab: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens of the answer): lengths even on a log scale, as questions and answers are."""
    rng = random.Random(seed)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    return [([rng.randrange(3, vocab) for _ in range(length(20, 1000))], length(16, 256)) for _ in range(count)]


def row_of(found: list[dict[str, float]], seconds: float, processor: float = 0.0) -> dict[str, Any]:
    """The numbers of a row from each request's `first` (seconds until its first token) and `tokens`; `processor`: seconds of it."""
    first, tokens = sorted(f["first"] for f in found), sum(f["tokens"] for f in found)
    return {
        "requests": len(found), "tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_processor_s": round(tokens / processor, 1) if processor else None,
        "ttft_p50": round(first[len(first) // 2], 4), "ttft_p95": round(first[int(len(first) * 0.95)], 4),
    }  # fmt: skip


# ---- in process


class Silent:
    """A tokenizer that says a letter for each token: neither arm makes text."""

    def stream(self, skip_special: bool = True) -> Silent:
        return self

    def push(self, token: int) -> str:
        return "."

    def flush(self) -> str:
        return ""

    def decode(self, ids: Any, skip_special: bool = False) -> str:
        return "." * len(ids)


class Ours:
    def __init__(self, model: str, cuda: bool, kernels: str):
        import torch

        sys.path.insert(0, str(ROOT / "src"))
        from tunesmith import models
        from tunesmith.hub import resolve_model
        from tunesmith.models.decoder import Decoder
        from tunesmith.ops import backend
        from tunesmith.serve.engine import Engine, Limits
        from tunesmith.spec import spec_of

        device = torch.device("cuda" if cuda else "cpu")
        if model == "embedded":
            built = models.load(resolve_model("embedded").path, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
        else:
            built = Decoder(spec_of(SHAPES[model]), dtype=torch.bfloat16 if cuda else torch.float32, device=device)
        backend.set_mode(kernels)
        limits = Limits.on(device, cache=None if cuda else 1 << 30, graphs=kernels != "reference")
        self.vocab = built.vocab
        self.engine = Engine(built, limits=limits).start()
        self.note = "; ".join(self.engine.notes) or "lean path" + (", CUDA graphs" if self.engine._graphs else "")

    def run(self, asked: list[tuple[list[int], int]], streams: int) -> tuple[list[dict[str, float]], float]:
        from tunesmith.serve.job import Job

        left, found, done = list(asked)[::-1], [], threading.Event()
        lock = threading.Lock()

        def next_one() -> None:
            with lock:
                if not left:
                    return
                prompt, tokens = left.pop()
            record = {"start": time.perf_counter(), "first": 0.0, "tokens": 0}

            def deliver(piece: Any) -> None:
                record["first"] = record["first"] or time.perf_counter() - record["start"]
                if piece.reason is not None:
                    record["tokens"] = piece.made
                    assert piece.reason == "length", (piece.reason, piece.error)
                    found.append(record)
                    if len(found) == len(asked):
                        done.set()
                    next_one()

            self.engine.submit(Job(prompt, Silent(), deliver, max_tokens=tokens))

        start = time.perf_counter()
        for _ in range(streams):
            next_one()
        done.wait()
        return found, time.perf_counter() - start

    def close(self) -> None:
        self.engine.close()


class Theirs:
    def __init__(self, model: str, cuda: bool, kernels: str):
        import torch
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        transformers.logging.set_verbosity_error()
        dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
        if model == "embedded":
            built = AutoModelForCausalLM.from_pretrained(ROOT / "src" / "tunesmith" / "assets" / "embedded", dtype=dtype).to(device)
        else:
            settings = dict(SHAPES[model])
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            with torch.device(device):
                built = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.vocab, self.model = built.config.vocab_size, built.eval()
        how: dict[str, Any] = {"generation_config": GenerationConfig(do_sample=False, eos_token_id=-1)}
        if not cuda:
            sizes = {"num_blocks": PEER_BLOCKS, "max_batch_tokens": PEER_TOKENS}
            how["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**sizes)
        self.manager = built.init_continuous_batching(**how)
        self.manager.start()
        self.note = f"attention: {built.config._attn_implementation}"

    def run(self, asked: list[tuple[list[int], int]], streams: int) -> tuple[list[dict[str, float]], float]:
        left, found, open_ = list(asked)[::-1], [], {}

        def next_one() -> None:
            if left:
                prompt, tokens = left.pop()
                name = self.manager.add_request(prompt, max_new_tokens=tokens, streaming=True)
                open_[name] = {"start": time.perf_counter(), "first": 0.0, "tokens": 0, "wanted": tokens}

        start = time.perf_counter()
        for _ in range(streams):
            next_one()
        while open_:
            out = self.manager.get_result(timeout=120)
            if out is None:
                raise RuntimeError(f"no token within 120 s: {getattr(self.manager, 'background_thread_status', None)}")
            if out.error:
                raise RuntimeError(out.error)
            record = open_.get(out.request_id)
            if record is None:
                continue
            record["first"] = record["first"] or time.perf_counter() - record["start"]
            if out.is_finished():
                record["tokens"] = len(out.generated_tokens)
                assert record["tokens"] == record["wanted"], (record, "an answer ended early")
                found.append(open_.pop(out.request_id))
                next_one()
        return found, time.perf_counter() - start

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


def child(task: dict[str, Any]) -> None:
    """One (model, arm): its rows, each told on a line of its own."""
    import torch

    cuda = torch.cuda.is_available() and not task["cpu"]
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    start = time.perf_counter()
    arm = (Ours if task["arm"] == "tunesmith" else Theirs)(task["model"], cuda, task["kernels"])
    counts = COUNT_TINY if task["model"] == "tiny" else COUNT if cuda else COUNT_CPU
    try:
        arm.run(work(min(4, counts[8]), arm.vocab, seed=99), 4)  # kernels compile, caches fill
        arm.run(work(min(64, counts[64]), arm.vocab, seed=98)[: 64 if cuda else 8], 64 if cuda else 8)
        ready = time.perf_counter() - start
        for streams in task["streams"]:
            before = time.process_time()
            found, seconds = arm.run(work(counts[streams], arm.vocab), streams)
            spent = 0.0 if cuda else time.process_time() - before
            memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
            row = row_of(found, seconds, spent) | {"ready_s": round(ready, 1), "note": arm.note, "peak_gib": round(memory, 2)}
            print("ROW " + json.dumps({"streams": streams, **row}), flush=True)
        arm.close()
    except BaseException:  # noqa: BLE001 - told, and this process ends whatever threads an arm has left
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


# ---- over HTTP


def texts(count: int) -> list[tuple[str, int]]:
    """Prompts of the embedded model's own kind of text, 20 to 1,000 tokens, and how long the answer may be."""
    sys.path.insert(0, str(ROOT / "src"))
    from tunesmith.hub import resolve_model
    from tunesmith.tokenizer import Tokenizer

    words = Tokenizer.load(resolve_model("embedded").path)
    source = (ROOT / "src" / "tunesmith" / "assets" / "demo" / "manual.md").read_text("utf-8")
    ids, rng = words.encode(source), random.Random(5)
    out = []
    for prompt, tokens in work(count, 100):
        at = rng.randrange(max(1, len(ids) - len(prompt)))
        out.append((words.decode(ids[at : at + len(prompt)]), tokens))
    return out


async def ask(port: int, path: str, head: str, body: dict[str, Any]) -> tuple[float, str]:
    """(seconds to the first text, all of it) of one streamed completion."""
    start, first, parts = time.perf_counter(), 0.0, []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{head}content-type: application/json\r\n"
                 f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)  # fmt: skip
    status = (await reader.readline()).decode()
    if " 200 " not in status:
        raise RuntimeError(status + (await reader.read(2000)).decode(errors="replace"))
    async for line in reader:
        if line.startswith(b"data: {"):
            value = json.loads(line[6:])
            if "error" in value:
                raise RuntimeError(str(value))
            text = (value["choices"] or [{}])[0].get("text") or ""
            if text:
                first = first or time.perf_counter() - start
                parts.append(text)
    writer.close()
    return first or time.perf_counter() - start, "".join(parts)


async def load(port: int, head: str, model: str, asked: list[tuple[str, int]], streams: int) -> tuple[list[dict[str, Any]], float]:
    left, found = list(asked)[::-1], []

    async def stream() -> None:
        while left:
            prompt, tokens = left.pop()
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            first, text = await ask(port, "/v1/completions", head, body)
            found.append({"first": first, "text": text})

    start = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return found, time.perf_counter() - start


def over_http(task: dict[str, Any]) -> None:
    """One server in a process of its own, this one its clients."""
    import tempfile

    import httpx

    sys.path.insert(0, str(ROOT / "src"))
    from tunesmith.hub import resolve_model
    from tunesmith.serve.start import listen
    from tunesmith.tokenizer import Tokenizer

    folder = str(resolve_model("embedded").path)
    words = Tokenizer.load(folder)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    token = Path(tempfile.mkdtemp()) / "token"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    if task["arm"] == "tunesmith":
        command = [sys.executable, "-m", "tunesmith.cli", "serve", folder, "--port", str(port), "--token-file", str(token)]
    else:
        env.pop("PYTHONPATH")
        command = [task["peer"], "-m", "transformers.cli.transformers", "serve", folder, "--port", str(port), "--dtype", "float32",
                   *(["--continuous-batching", "--cb-num-blocks", str(PEER_BLOCKS), "--cb-max-batch-tokens", str(PEER_TOKENS)]
                     if task["arm"] == "transformers" else [])]  # fmt: skip
    log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        head, model = "", folder
        while True:
            if server.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError("the server did not start: " + log.read().decode(errors="replace")[-2000:])
            try:
                if task["arm"] == "tunesmith":
                    head, model = f"authorization: Bearer {token.read_text().strip()}\r\n", Path(folder).name
                headers = dict(line.split(": ") for line in head.splitlines())
                if httpx.get(f"http://127.0.0.1:{port}/health", headers=headers).status_code == 200:
                    break
            except (OSError, httpx.HTTPError):
                pass
            time.sleep(0.2)
        asyncio.run(load(port, head, model, texts(4), 2))
        for streams in task["streams"]:
            found, seconds = asyncio.run(load(port, head, model, texts(COUNT_CPU[streams]), streams))
            for f in found:
                f["tokens"] = len(words.encode(f.pop("text")))
            print("ROW " + json.dumps({"streams": streams, **row_of(found, seconds), "note": "over HTTP"}), flush=True)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


# ---- the run


def card(args: argparse.Namespace) -> str:
    if not args.cpu:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    threads = args.threads or os.cpu_count()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'} of {os.cpu_count()} cores"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for this call")
    parser.add_argument("--models", help="of embedded, llama-3.2-1b, mistral-7b, tiny")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)))
    parser.add_argument("--arms", help="of tunesmith, transformers; with --http also transformers-plain, one request at a time")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU, for each arm; on a busy machine more than one are slower")
    parser.add_argument("--kernels", default="auto", help="of ours: auto, or reference, plain PyTorch without CUDA graphs")
    parser.add_argument("--cpu", action="store_true", help="the CPU, though there is a GPU")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--peer", default=sys.executable, help="the Python of transformers serve")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        return over_http(task) if task["http"] else child(task)
    if args.table:
        return table(args.out)
    end, device = time.monotonic() + args.limit, card(args)
    models = (args.models or ("embedded" if device.startswith("CPU") or args.http else "llama-3.2-1b,mistral-7b")).split(",")
    arms = (args.arms or ",".join(ARMS)).split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "serve.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    mode, call = "HTTP" if args.http else "in process", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    done = {(r["model"], r["arm"], r["streams"], r["mode"], r["device"]) for r in there if "error" not in r}
    for model in models:
        for arm in arms:
            left = [s for s in map(int, args.streams.split(",")) if args.again or (model, arm, s, mode, device) not in done]
            if not left:
                continue
            if end - time.monotonic() < 20:
                print(f"no time for {model} {arm}; the same command goes on", flush=True)
                continue
            common = {"call": call, "mode": mode, "model": model, "arm": arm, "device": device, "python": platform.python_version(),
                      "torch": installed("torch"), "transformers": installed("transformers")}  # fmt: skip
            print(f"{model} {arm} ({mode}) at {', '.join(map(str, left))} streams", flush=True)
            one(args, common, left, file, end - time.monotonic() - 5)
    table(args.out)


def one(args: argparse.Namespace, common: dict[str, Any], left: list[int], file: Path, limit: float) -> None:
    """A child for one (model, arm); its rows go into the file as they come."""
    task = {"model": common["model"], "arm": common["arm"], "streams": left, "cpu": args.cpu, "http": args.http, "peer": args.peer,
            "threads": args.threads, "kernels": args.kernels}  # fmt: skip
    command = [sys.executable, str(HERE / "serve.py"), "--task", json.dumps(task)]
    env = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    tail: list[str] = []

    def put(row: dict[str, Any]) -> None:
        with file.open("a") as f:
            f.write(json.dumps(common | row) + "\n")
        print("   ", json.dumps(row), flush=True)

    missing = list(left)
    for line in process.stdout:
        if line.startswith("ROW "):
            row = json.loads(line[4:])
            missing.remove(row["streams"])
            put(row)
        else:
            tail = [*tail, line.rstrip()][-25:]
    process.wait()
    timer.cancel()
    if missing:
        why = f"stopped after {limit:.0f} s" if process.returncode == -9 else f"exit {process.returncode}: {(tail or [''])[-1]}"
        print("\n".join(tail), flush=True)
        for streams in missing:
            put({"streams": streams, "error": why[:300]})


def table(out: Path) -> None:
    """The newest good row of each (device, mode, model, streams, arm), as markdown."""
    file = out / "serve.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    newest = {(r["device"], r["mode"], r["model"], r["streams"], r["arm"]): r for r in rows if "error" not in r}
    arms = sorted({k[-1] for k in newest}, key=[*ARMS, "transformers-plain"].index)
    told = "tokens/s, first token p50 / p95"
    lines = ["| device | how | model | streams | " + " | ".join(f"{a}: {told}" for a in arms) + " | ratio | of processor time |"]
    lines += ["|" + "---|" * (6 + len(arms))]
    for key in dict.fromkeys(k[:-1] for k in newest):
        found = [newest.get((*key, arm)) for arm in arms]
        cells = [f"{r['tokens_per_s']:,.0f}, {r['ttft_p50']:.2f} / {r['ttft_p95']:.2f} s" if r else "" for r in found]
        ours, theirs = newest.get((*key, "tunesmith")), newest.get((*key, "transformers"))
        for name in ("tokens_per_s", "tokens_per_processor_s"):
            both = ours and theirs and ours.get(name) and theirs.get(name)
            cells.append(f"{ours[name] / theirs[name]:.2f}" if both else "")
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
