"""The template sandbox: what transformers' environment gives, bombs that die, escapes that do not get out."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.fields import SENTINEL
from tunesmith.data.template import Fault, Job, Sandbox, Texts
from tunesmith.errors import TemplateError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rendered(text: str, messages=TURNS, asked=((2, False),), tools=(), **settings):
    return Sandbox({"default": text}, {"eos_token": "</s>"}, **settings).render([Job(messages, list(asked), tools)])[0]


def test_what_templates_expect():
    text = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}U:{{ m.content }}{% continue %}{% endif %}A:{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% break %}{% endfor %}{% if add_generation_prompt %}P{% endif %}"
        "{{ tools | tojson }}{{ strftime_now('%d %b %Y') }}{{ nothing }}"
    )
    both = rendered(text, asked=((2, False), (1, True)), tools=({"a": "é<>"},), date=datetime.date(2026, 1, 2))
    assert both[0] == 'U:hiA:yo</s>[{"a": "é<>"}]02 Jan 2026'
    assert both[1] == 'U:hiP[{"a": "é<>"}]02 Jan 2026'
    assert both.shared(1) == (4, both[1][4:])
    assert rendered("{% if tools is none %}none{% endif %}")[0] == "none"
    assert rendered("{{ {'a': 1, 'b': [1, 2]} | tojson(indent=2) }}")[0] == '{\n  "a": 1,\n  "b": [\n    1,\n    2\n  ]\n}'


def test_many_jobs_keep_their_order():
    box = Sandbox({"default": "{{ messages[0].content }}", "tool_use": "tool"})
    jobs = [
        Job([{"role": "user", "content": str(k)}], [(1, False)], (), "tool_use" if k % 97 == 3 else "default") for k in range(700)
    ]
    assert [t[0] for t in box.render(jobs)] == ["tool" if k % 97 == 3 else str(k) for k in range(700)]


def test_faults_of_a_row_are_told_and_the_others_go_on():
    box = Sandbox(
        {"default": "{{ raise_exception('no ' + messages[0].content) if messages[0].content != 'x' else bos_token + 'a' }}"}
    )
    first, second = box.render(
        [Job([{"role": "user", "content": "y"}], [(1, False)]), Job([{"role": "user", "content": "x"}], [(1, False)])]
    )
    assert str(first) == "the template says: no y" and first.kind == "raised"
    assert second.kind == "fault" and "'bos_token' is undefined" in second.message
    with pytest.raises(TemplateError, match=r"TemplateSyntaxError.*\(line 2\)"):
        rendered("ok\n{% if %}")


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "string": "{{ 'a' * 10 ** 10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "list": "{{ [0] * 9999999999 }}",
    "format": "{{ '%0999999999d' % 1 }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "range": "{{ range(10 ** 9) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for a in range(99999) %}{% for b in range(999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "product": "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | batch(3) | list * 99999999 }}",
}


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel's limits are POSIX; the wall clock is tested below")
@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_dies(name):
    """With 0.3 s of CPU and 128 MB: an error within three renders, never a text, and this process does not grow."""
    box = Sandbox({"default": BOMBS[name]}, cpu=0.3, memory=128 << 20)
    before = os.times()
    try:
        answer = box.render([Job(TURNS, [(2, False)])])[0]
        assert isinstance(answer, Fault)
    except TemplateError as fault:
        assert "a render took more than 0.3 s of CPU time or 128 MB" in fault.what or "could not be compiled" in fault.what
        assert "data.template" in fault.fix
    box.close()
    after = os.times()
    child = after.children_user + after.children_system - before.children_user - before.children_system
    assert child < 3 * (0.3 + 1.0), "killed by its CPU time: at most three children, each with its start"


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel's limits are POSIX")
def test_a_row_that_bombs_is_refused_alone():
    text = "{% if 'boom' in messages[0].content %}" + BOMBS["loops"] + "{% endif %}{{ messages[0].content }}"
    box = Sandbox({"default": text}, cpu=0.3)
    answers = box.render([Job([{"role": "user", "content": c}], [(1, False)]) for c in ("a", "boom", "b")])
    assert [a[0] if not isinstance(a, Fault) else a.kind for a in answers] == ["a", "time", "b"]


def test_the_wall_clock_ends_it_where_nothing_else_does():
    with pytest.raises(TemplateError, match="took more"):
        Sandbox({"default": BOMBS["loops"]}, cpu=600, wall=0.7).render([Job(TURNS, [(2, False)])])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ messages.append({}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].__setitem__('a', 1) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__cl' + 'ass__}') | format(1) | attr('x') }}",
    "{{ ''|map(attribute='__class__')|list }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{{ [messages]|map('attr', '__class__')|list }}",
    "{{ messages|selectattr('__class__')|list }}",
    "{{ [1]|sum(attribute='__class__', start='') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ import_module('os') }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config.items() }}",
    "{{ (messages|tojson).__class__ }}",
    "{{ dict.__base__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__ }}",
    "{% set x = messages.__class__ %}{{ x.__bases__ }}",
    "{% macro f() %}{% endmacro %}{{ f.__call__.__func__.__globals__ }}",
    "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{{ (f for f in messages) }}",
    "{{ loop.__class__ }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ self.blocks.__class__ }}",
    "{{ messages.__reduce__() }}",
    "{{ messages.copy.__self__.__class__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ 1 .__class__ }}",
    "{{ true.__class__ }}",
    "{{ none.__class__ }}",
    "{{ undefined_thing.__class__ }}",
    "{{ messages|attr('__len__')() }}",
    "{{ messages|map('__class__')|list }}",
    "{{ '%s' | attr('__mod__') }}",
    "{{ environment.globals }}",
    "{{ tojson.__globals__ }}",
    "{{ messages|tojson(cls='x') }}",
    "{{ messages|tojson(default=raise_exception) }}",
    "{{ strftime_now.__call__.__class__ }}",
]
LEAKS = ("class '", "<function", "<built-in", "<module", "root:", "uid=", "globals", "subclasses", "object at 0x", "Environment")


def test_no_escape_gets_out():
    assert len(ESCAPES) >= 60
    box = Sandbox({str(k): text for k, text in enumerate(ESCAPES) if "{% import" not in text and "(f for" not in text}, cpu=1.0)
    names = list(box._first["templates"])
    for name, answer in zip(names, box.render([Job(TURNS, [(2, False)], (), name) for name in names]), strict=True):
        if not isinstance(answer, Fault):
            assert not any(leak in answer[0] for leak in LEAKS), (ESCAPES[int(name)], answer[0])
    assert isinstance(rendered("{% import 'os' as os %}"), Fault)
    with pytest.raises(TemplateError):
        rendered("{{ (f for f in messages) }}")


def test_the_child_sees_no_secrets_of_ours(monkeypatch):
    monkeypatch.setenv("TUNESMITH_TEST_SECRET", "x")
    box = Sandbox({"default": "{{ 1 }}"})
    box.render([Job(TURNS, [(2, False)])])
    path = f"/proc/{box._child.pid}/environ"
    if os.path.exists(path):
        with open(path, "rb") as file:
            assert b"TUNESMITH_TEST_SECRET" not in file.read()
    box.close()
    assert box.render([Job(TURNS, [(2, False)])])[0][0] == "1", "a closed sandbox starts again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_copy_does_not_end_its_parents_child():
    with contextlib.closing(Sandbox({"default": "{{ messages[0].content }}"})) as sandbox:
        job = Job([{"role": "user", "content": "Hi"}], [(1, False)])
        assert sandbox.render([job])[0][0] == "Hi"
        child = sandbox._child
        if (pid := os.fork()) == 0:
            sandbox.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert child.poll() is None and sandbox.render([job])[0][0] == "Hi" and sandbox._child is child


# ---- does a template look at what people wrote?

WHO = [{"role": role, "content": chr(SENTINEL + i)} for i, role in enumerate(("user", "assistant"))]
LOOP = "{% for m in messages %}BODY{% endfor %}"
BLIND = [
    "{{ m.content }}",
    "{{ m['content'] + eos_token + m.role }}",
    "{{ '<' + m.content + '>' }}",
    "{{ m.content if m.content else 'none' }}{{ m.content or 'none' }}{{ m.content | default('none', true) }}",
    "{% if m.content is string and m.content is defined and m.content is not none %}{{ m.content }}{% endif %}",
    "{% if m.content is iterable and m.content is sequence %}{{ m.content }}{% endif %}",
    "{% if m.content is not mapping %}{{ m.content }}{% endif %}",
    "{% set x = m.content %}{% set n = namespace(y=x) %}{{ n.y + '|' }}",
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
    "{{ m.content | trim }}",
    "{{ m.content.strip() + '|' }}",
    "{% if loop.first and m.role == 'user' %}{{ messages | length }}{% endif %}{{ m.content }}",
]
LOOKS = [
    "{{ m.content | upper }}",
    "{{ m.content | length }}",
    "{{ m.content ~ '' }}",
    "{{ m.content | string }}",
    "{{ m.content | tojson }}{{ m | tojson }}",
    "{{ messages }}",
    "{{ m }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}{{ m.content }}",
    "{{ messages | groupby('content') | length }}{{ m.content }}",
    "{{ messages | map(attribute='content') | unique | list | length }}{{ m.content }}",
    "{{ messages | sort(attribute='content') | length }}{{ m.content }}",
    "{{ '%s' % m.content }}",
    "{{ '{}'.format(m.content) }}",
    "{{ m.content[0] }}",
    "{{ m.content[:1] }}{{ m.content }}",
    "{{ m.content.split('x')[-1] }}",
    "{{ m.content.strip('x') }}",
    "{{ m.content.startswith }}{{ m.content }}",
    "{{ (m.content + 'x').strip() }}",
    "{{ 'yes' if m.content == 'a' else 'no' }}{{ m.content }}",
    "{{ 'yes' if 'a' != m.content else 'no' }}{{ m.content }}",
    "{{ 'yes' if m.content < 'b' else 'no' }}{{ m.content }}",
    "{{ 'yes' if 'a' in m.content else 'no' }}{{ m.content }}",
    "{{ 'yes' if m.content in 'abc' else 'no' }}{{ m.content }}",
    "{{ 'yes' if m.content in ['a', 'b'] else 'no' }}{{ m.content }}",
    "{{ 'yes' if m.content in {'a': 1} else 'no' }}{{ m.content }}",
    "{{ {'a': 1}[m.content] }}{{ m.content }}",
    "{{ messages[m.content] }}{{ m.content }}",
    "{{ m.content is lower }}{{ m.content }}",
    "{{ m.content is sameas 'a' }}{{ m.content }}",
    "{{ m.content is eq 'a' }}{{ m.content }}",
    "{{ m.content is in 'abc' }}{{ m.content }}",
    "{{ m.content | int }}{{ m.content }}",
    "{{ [m.content] | map('int') | list }}{{ m.content }}",
    "{{ [m.content, 'a'] | max }}",
    "{{ m.content * 2 }}",
    "{{ ('<b>' | safe) + m.content }}",
    "{{ m.content + ('<b>' | safe) }}",
    "{{ m.content | e }}",
    "{{ m.content | indent }}",
    "{{ m.content | replace('a', 'b') }}",
    "{{ 'abc' | replace(m.content, 'x') }}{{ m.content }}",
    "{% for letter in m.content %}{{ letter }}{% endfor %}",
    "{% set x %}{{ m.content }}{% endset %}{{ x | upper }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) | upper }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% for x in messages recursive %}{{ x.content }}{{ loop([]) }}{% endfor %}",
    "{% if m.content | trim %}x{% endif %}{{ m.content }}",
    "{% if m.content.strip() %}x{% endif %}{{ m.content }}",
    "{{ m.content | trim }}{{ m.content }}",
    "{{ loop.changed(m.content) }}{{ m.content }}",
    "{{ 'a' if lipsum() else 'b' }}{{ m.content }}",
    "{{ [1, 2, 3] | random }}{{ m.content }}",
    "{{ raise_exception(m.content) }}",
]


def blind(body: str) -> Texts | Fault:
    with contextlib.closing(Sandbox({"default": LOOP.replace("BODY", body)}, {"eos_token": "</s>"})) as box:
        return box.render([Job(WHO, [(2, False), (1, True)], (), "default", True)])[0]


def filled(text: str, contents: list[str], trimmed: str) -> str:
    for i, content in enumerate(contents):
        sentinel = chr(SENTINEL + i)
        text = text.replace(sentinel, content.strip() if sentinel in trimmed else content)
    return text


@pytest.mark.parametrize("body", BLIND)
def test_a_template_that_only_prints_texts_is_known_to(body):
    answer = blind(body)
    assert answer.trimmed == ("".join(m["content"] for m in WHO) if "trim" in body or "strip" in body else "")


@pytest.mark.parametrize("body", LOOKS)
def test_a_template_that_looks_at_texts_is_caught(body):
    """Whatever way it takes: then each row is rendered for itself."""
    answer = blind(body)
    assert isinstance(answer, Fault) or answer.trimmed is None


def test_only_those_who_ask_are_told():
    assert rendered("{{ messages[0].content }}", WHO).trimmed is None


PIECES = [*BLIND, *LOOKS, "{{ m.role }}", "{% if loop.last %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", " x\n"]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.lists(st.text(min_size=1), min_size=2, max_size=2))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_blind_means_that_filling_is_rendering(pieces, contents):
    """Of any template put together from these: where it does not look, a row's own rendering is the skeleton with its texts."""
    text = LOOP.replace("BODY", "".join(pieces))
    told = [m | {"content": c} for m, c in zip(WHO, contents, strict=True)]
    with contextlib.closing(Sandbox({"default": text}, {"eos_token": "</s>"}, cpu=1.0)) as box:
        try:
            skeleton, real = box.render([Job(WHO, [(2, False)], (), "default", True), Job(told, [(2, False)])])
        except TemplateError:
            return  # no template
        if isinstance(skeleton, Texts) and skeleton.trimmed is not None:
            assert isinstance(real, Texts) and real[0] == filled(skeleton[0], contents, skeleton.trimmed)
