"""The process in which chat templates run: jinja's immutable sandbox under kernel limits. Started by template.py, never imported.

Needs the standard library and jinja2 only. Speaks in frames (4 bytes of length, big-endian, then JSON) on stdin and stdout:

    first    {"templates": {name: text}, "variables": {...}, "now": [y, m, d], "cpu": seconds, "memory": bytes}
    reply    {"errors": {name: message}}                                  templates that do not compile
    then     [[name, messages, tools, [[n, generation_prompt], ...]], ...]
    reply    [[text, [same, rest], ...] | {"error": kind, "message": text}, ...]

A job renders `messages[:n]` once per pair. The first text comes whole, each further one as the length it shares with the first and
the rest, which is nearly always empty. The CPU limit is a timer whose signal kills the process even inside C code; no new file can
be opened, written or process started once the templates are compiled.
"""

import json
import struct
import sys

sys.path.append(sys.argv[1])  # where the parent found jinja2

import datetime
import signal

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows: the parent's wall clock is the limit
    resource = None

FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Raised(jinja2.TemplateError):
    """The template's own raise_exception."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for trainers that need to be told; here its body is rendered as it stands."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment(now: datetime.datetime) -> jinja2.Environment:
    """The environment chat templates are written for (transformers'), with the clock stopped at `now`."""

    def raise_exception(message):
        raise Raised(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = now.strftime
    return env


def shared(text: str, other: str) -> int:
    """Length of the common prefix."""
    if text.startswith(other):
        return len(other)
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def limit(name: str, value: int) -> None:
    """Lower one limit of this process where the platform has it."""
    kind = getattr(resource, name, None)
    if kind is not None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            return  # this platform does not take it (macOS and RLIMIT_AS); the parent's clock still holds


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer

    def receive():
        head = source.read(4)
        return json.loads(source.read(struct.unpack(">I", head)[0])) if len(head) == 4 else None

    def send(value) -> None:
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        sink.write(struct.pack(">I", len(data)) + data)
        sink.flush()

    start = receive()
    if start is None:
        return
    timer = getattr(signal, "setitimer", None)
    now = datetime.datetime(*start["now"])
    env = environment(now)
    for text in ("{{ '\\n' + 1 }}", "{% if"):  # what jinja2 and Python import on a fault must be here before files are closed
        try:
            env.from_string(text).render()
        except FAULTS as fault:
            str(fault)
    now.strftime("%A %d %B %Y")
    limit("RLIMIT_AS", start["memory"])
    limit("RLIMIT_FSIZE", 0)
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_NPROC", 0)
    limit("RLIMIT_NOFILE", 3)

    def clock(seconds: float) -> None:
        if timer is not None:
            timer(signal.ITIMER_PROF, seconds)  # SIGPROF's default action ends the process, whatever it is doing

    compiled, errors = {}, {}
    for name, text in start["templates"].items():
        clock(start["cpu"])
        try:
            compiled[name] = env.from_string(text)
        except (*FAULTS, MemoryError, SyntaxError) as fault:
            line = getattr(fault, "lineno", None)
            errors[name] = f"{type(fault).__name__}: {fault}" + (f" (line {line})" if line else "")
    clock(0)
    send({"errors": errors})
    variables = start["variables"]

    def job(name, messages, tools, asked):
        template, first, answer = compiled[name], None, []
        for n, generation in asked:
            clock(start["cpu"])
            some = messages if n == len(messages) else messages[:n]
            text = template.render(variables, messages=some, tools=tools, documents=None, add_generation_prompt=generation)
            if first is None:
                first = text
                answer.append(text)
            else:
                same = shared(first, text)
                answer.append([same, text[same:]])
        return answer

    while (jobs := receive()) is not None:
        answers = []
        for one in jobs:
            try:
                answers.append(job(*one))
            except Raised as fault:
                answers.append({"error": "raised", "message": str(fault)})
            except MemoryError:
                answers.append({"error": "memory", "message": "out of memory"})
            except jinja2.exceptions.SecurityError as fault:
                answers.append({"error": "security", "message": str(fault)})
            except FAULTS as fault:
                answers.append({"error": "fault", "message": f"{type(fault).__name__}: {fault}"[:500]})
        clock(0)
        try:
            send(answers)
        except MemoryError:
            answers = None
            send([{"error": "memory", "message": "out of memory"}] * len(jobs))


if __name__ == "__main__":
    main()
