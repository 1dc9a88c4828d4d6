"""The process in which chat templates run: jinja's immutable sandbox under kernel limits. Started by template.py, never imported.

Needs the standard library and jinja2 only. Speaks in frames (4 bytes of length, big-endian, then JSON) on stdin and stdout:

    first    {"templates": {name: text}, "variables": {...}, "now": [y, m, d], "cpu": seconds, "memory": bytes}
    reply    {"errors": {name: message}}                                  templates that do not compile
    then     [[name, messages, tools, [[n, generation_prompt], ...], blind], ...]
    reply    [[text, [same, rest], ..., trimmed] | {"error": kind, "message": text}, ...]

A job renders `messages[:n]` once per pair. The first text comes whole, each further one as the length it shares with the first and
the rest, which is nearly always empty. `trimmed` is null unless a `blind` job, whose contents are all sentinels, has shown that the
template does not look at them (see StandIn): then it names the sentinels of those that are printed trimmed.

The CPU limit is a timer whose signal kills the process even inside C code; no new file can be opened, written or process started
once the templates are compiled.
"""

import json
import struct
import sys

sys.path.append(sys.argv[1])  # where the parent found jinja2

import datetime
import functools
import re
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


class Looked(Exception):
    """A template did more with a message's text than to print it."""


TRIMMED = "\U000fcfff"  # printed behind a sentinel whose text is trimmed; both are in the range that no row may use (render.py)
SENTINEL = re.compile("[\U000f1000-\U000f4fff]")
PRINTED = re.compile(f"({SENTINEL.pattern}){TRIMMED}*")


class StandIn:
    """Stands for the text of a message, which is not empty, or for such texts joined with others.

    A template can print it, join it with `+`, trim it, and ask whether it is there and whether it is text. All else depends on what
    the text is and raises Looked, or a TypeError where a function of C wants a real str. A template that renders so writes the same
    around every text: a row's own rendering is this one with the texts filled in.
    """

    __slots__ = ("_shown",)
    _looked = False  # any of them, since it was last set: a template's tests swallow exceptions

    def __init__(self, shown: str):
        self._shown = shown

    def __add__(self, other):
        if isinstance(other, StandIn):
            return StandIn(self._shown + other._shown)
        return StandIn(self._shown + other) if type(other) is str else NotImplemented  # Markup would escape the text

    def __radd__(self, other):
        return StandIn(other + self._shown) if type(other) is str else NotImplemented

    def __bool__(self):
        if TRIMMED in self._shown:
            self._look()  # there may be nothing left of it
        return True

    def strip(self, chars=None):
        if chars is not None or PRINTED.fullmatch(self._shown) is None:
            self._look()
        return StandIn(self._shown[0] + TRIMMED)

    def _look(self, *_, **__):
        StandIn._looked = True
        raise Looked

    __str__ = __repr__ = __format__ = __len__ = __iter__ = __contains__ = __getitem__ = __hash__ = _look
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __complex__ = __index__ = __mod__ = __rmod__ = _look


HOLDS = {"defined": True, "undefined": False, "none": False, "string": True, "iterable": True, "sequence": True, "mapping": False,
         "number": False, "boolean": False, "callable": False}  # fmt: skip
"""Tests that are the same for every text."""
CAPTURES = ("Macro", "CallBlock", "FilterBlock", "AssignBlock", "Block", "Include", "Import", "FromImport", "Extends")
"""Statements that make a str of what is printed, which could be looked at later."""


def blindfolded(env: jinja2.Environment) -> jinja2.Environment:
    """`env`, which renders stand-ins. Filters and tests that are not known to be the same for every text get none."""

    def closed(function, same=None):
        @functools.wraps(function)
        def call(*args, **named):
            if any(isinstance(a, StandIn) for a in (*args, *named.values())):
                if same is not None and len(args) == 1:
                    return same
                StandIn._look(None)
            return function(*args, **named)

        return call

    trim, default = env.filters["trim"], env.filters["default"]
    env.tests = {name: closed(test, HOLDS.get(name)) for name, test in env.tests.items()}
    env.filters = {name: closed(filter_) for name, filter_ in env.filters.items()}
    env.filters["trim"] = lambda value, chars=None: value.strip(chars) if isinstance(value, StandIn) else trim(value, chars)
    env.filters["default"] = env.filters["d"] = default
    env.filters["random"] = env.globals["lipsum"] = functools.partial(StandIn._look, None)  # another text each time
    env.finalize = lambda value: value._shown if isinstance(value, StandIn) else value
    return env


def can_be_blind(env: jinja2.Environment, text: str) -> bool:
    """Whether all that a template prints goes straight to its output."""
    tree = env.parse(text)
    kinds = tuple(getattr(jinja2.nodes, name) for name in CAPTURES)
    return next(tree.find_all(kinds), None) is None and not any(loop.recursive for loop in tree.find_all(jinja2.nodes.For))


def blind(message: dict) -> dict:
    """The message with stand-ins for those texts that are sentinels."""
    texts = {k: message[k] for k in ("content", "reasoning_content") if isinstance(message.get(k), str)}
    return message | {k: StandIn(text) for k, text in texts.items() if SENTINEL.fullmatch(text)}


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

    compiled, errors, unseeing = {}, {}, {}
    blindfold = blindfolded(environment(now))
    for name, text in start["templates"].items():
        clock(start["cpu"])
        try:
            compiled[name] = env.from_string(text)
            if can_be_blind(env, text):
                unseeing[name] = blindfold.from_string(text)
        except (*FAULTS, MemoryError, SyntaxError) as fault:
            line = getattr(fault, "lineno", None)
            errors[name] = f"{type(fault).__name__}: {fault}" + (f" (line {line})" if line else "")
    clock(0)
    send({"errors": errors})
    variables = start["variables"]

    def render(template, messages, tools, asked):
        for n, generation in asked:
            clock(start["cpu"])
            some = messages if n == len(messages) else messages[:n]
            yield template.render(variables, messages=some, tools=tools, documents=None, add_generation_prompt=generation)

    def trimmed(name, messages, tools, asked, answer):
        """Sentinels that are printed trimmed, when the template does not look at the texts they stand for; else None."""
        StandIn._looked, how = False, {}
        try:
            seen = render(unseeing[name], [blind(m) for m in messages], tools, asked)
            for (same, rest), text in zip([(0, answer[0]), *answer[1:]], seen, strict=True):
                for match in PRINTED.finditer(text):
                    how.setdefault(match[1], set()).add(match.end() > match.start() + 1)
                if text.replace(TRIMMED, "") != answer[0][:same] + rest:
                    return None
        except (*FAULTS, Looked, MemoryError):
            return None
        if StandIn._looked or any(len(ways) > 1 for ways in how.values()):
            return None
        return "".join(sentinel for sentinel, ways in how.items() if True in ways)

    def job(name, messages, tools, asked, blind):
        answer = []
        for text in render(compiled[name], messages, tools, asked):
            same = shared(answer[0], text) if answer else 0
            answer.append([same, text[same:]] if answer else text)
        return [*answer, trimmed(name, messages, tools, asked, answer) if blind and name in unseeing else None]

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
