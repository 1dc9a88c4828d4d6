"""The report page: says the truth at the top, escapes everything, stands missing and damaged parts, stays small, runs nothing."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.errors import RunError
from tunesmith.evaluate import page, report
from tunesmith.evaluate.page import Line, chart, el, number, signed, thin, ticks

TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "div", "p", "h1", "h2", "h3",
    "h4", "span", "small",
    "strong", "ul", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "pre", "code", "figure",
    "svg", "desc", "line", "text", "polyline", "circle", "rect",
}  # fmt: skip
VOID = {"meta", "br", "hr"}


class Reader(HTMLParser):
    """Reads a page strictly: every tag closed in order, only known tags and attributes; collects the text."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.style, self.policy = [], [], "", ""
        self.feed(source)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, f"<{tag}>"
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "src", "style", "srcdoc", "action", "xlink:href"), (
                tag,
                name,
                value,
            )
        found = dict(attributes)
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def read(folder: Path) -> Reader:
    return Reader(report.write(folder).read_text("utf-8"))


def make_run(folder: Path, *, state="finished", say=lambda words: words) -> Path:
    """A whole run folder with every part the page reads; `say` may change every text in it."""
    parts = {
        "status.json": {"state": state, "step": 60, "steps": 60, "message": say("a last word"), "pid": 1, "updated": ""},
        "manifest.json": {
            "versions": {"tunesmith": say("0.1.0")}, "command": [say("tunesmith train run.yaml")], "base_name": say("some/model"),
            "finished": "2026-08-20T10:02:11+00:00", "seconds": 700.0, "peak_bytes": 5 << 30,
        },
        "plan.json": {
            "needs": 4.0, "budget": 24.0, "minutes": 10.0, "dtype": say("bf16"), "activations": say("keep"),
            "micro_batch_tokens": 2048,
            "device": {"name": say("RTX 4090")}, "components": [{"name": say("linear weights"), "bytes": 3 << 30,
            "where": "device", "why": ""}],
        },
        "data/account.json": {
            "sources": [{"path": say("chats.jsonl"), "rows": 100, "used": 90, "fixed": 5, "truncated": 2, "refused": 3,
            "tokens": 9000, "trained": 4000,
                         "fixes": {say("merged turns"): 5}, "cuts": {say("the answer"): 2},
                         "refusals": {"k": {"count": 3, "reason": say("not JSON"), "places": [say("chats.jsonl:7")]}}}],
            "held_out_rows": 10, "exact_duplicates": 2, "near_duplicates": 1, "overlap_exact": 0, "overlap_near": 0,
        },
        "comparison.json": {
            "rows": [{"index": i, "prompt": say(f"question {i}"), "gold": say("gold"), "before": {"answer": say("old"),
            "loss": 2.5},
                      "after": {"answer": say("new"), "loss": 1.5}} for i in range(3)],
            "loss": {"before": 2.91, "after": 1.84, "interval": [-1.2, -0.9], "rows": 40},
            "metrics": {say("exact match"): {"before": 0.1, "after": 0.3, "interval": [-0.1, 0.4]}},
        },
    }  # fmt: skip
    lines = {
        "metrics.jsonl": [
            *(
                {
                    "kind": "step",
                    "step": s,
                    "loss": 2 - s / 60,
                    "learning_rate": 1e-4,
                    "grad_norm": 0.5,
                    "tokens": 500,
                    "seconds": 1.0,
                }
                for s in range(1, 61)
            ),
            *({"kind": "eval", "step": s, "loss": 2.9 - s / 60} for s in range(0, 61, 20)),
            {"kind": "event", "step": 30, "what": say("something happened"), "rows": say("chats.jsonl:3")},
        ],
        "samples.jsonl": [
            {"step": s, "index": 0, "prompt": say("question 0"), "gold": say("gold"), "answer": say(f"at {s}")}
            for s in range(0, 61, 20)
        ],
        "data/refused.jsonl": [{"file": say("chats.jsonl"), "line": 7, "reason": say("not JSON"), "row": say("{broken")}],
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "adapter").mkdir(exist_ok=True)
    config = {
        "model": say("some/model"),
        "method": "lora",
        "output": say("runs/x"),
        "data": {"train": [{"path": say("chats.jsonl")}]},
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    for name, value in parts.items():
        (folder / name).write_text(json.dumps(value))
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- what it says --------------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_every_part(tmp_path):
    found = read(make_run(tmp_path / "run"))
    for words in (
        "Better", "Held-out loss 2.91 → 1.84; 95 % interval of the difference −1.2 to −0.9.", "40 held-out rows",
        "exact match", "no difference shown",
        "question 0", "gold", "old", "new", "at 40", "chats.jsonl:7", "not JSON", "merged turns (5 rows)", "{broken",
        "something happened",
        "5.0 GB", "1.25×", "12 min", "1.17×", "linear weights", "tunesmith chat runs/x", "tunesmith merge runs/x",
        "PeftModel", "best 1.9, step 60",
    ):  # fmt: skip
        assert words in found.text, words


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        ({"before": 2.9, "after": 1.8, "interval": [-1.2, -1.0]}, "Better"),
        ({"before": 2.9, "after": 1.8, "interval": [-1.2, -1.0], "rows": 19}, "Few rows"),
        ({"before": 2.9, "after": 1.8, "interval": [-1.2, -1.0], "rows": 20}, "Better"),
        ({"before": 1.8, "after": 2.9, "interval": [1.0, 1.2]}, "Worse"),
        ({"before": 2.0, "after": 1.99, "interval": [-0.05, 0.03]}, "No difference shown"),
        ({"before": 2.0, "after": 1.9, "interval": [-0.2, 0.0]}, "No difference shown"),
        ({"before": 2.0, "after": 1.0, "interval": [-math.inf, math.inf]}, "No verdict"),
        ({"before": 2.0, "after": 1.0, "interval": ["-inf", "inf"]}, "No verdict"),
        ({"before": 2.0, "after": 1.0}, "No verdict"),
        ({"before": 2.0, "after": 1.0, "interval": [-1.2, -0.8], "overlap": 3}, "No verdict"),
        ({"before": 2.0, "after": 1.0, "interval": [-1.2, -0.8], "overlap": 3, "interval_of_the_rest": [-0.2, 0.1]}, "No verdict"),
        ({"before": 2.0, "after": 1.0, "interval": [-1.2, -0.8], "overlap": 3, "interval_of_the_rest": [-0.9, -0.5]}, "Better"),
        ({"before": 1.0, "after": 2.0, "interval": [0.8, 1.2], "overlap": 3, "interval_of_the_rest": [0.9, 1.3]}, "Worse"),
        ({}, "Not compared"),
    ],
)
def test_the_verdict_follows_the_interval(tmp_path, loss, word):
    folder = make_run(tmp_path / "run")
    (folder / "comparison.json").write_text(json.dumps({"rows": [], "loss": loss, "metrics": {}}))
    source = report.write(folder).read_text("utf-8")
    assert re.search(r'<p class="word">([^<]*)</p>', source)[1] == word and f"<title>run: {word}</title>" in source
    if word != "Better":
        assert 'class="hero good"' not in source


def test_a_metric_knows_which_way_is_better(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = {
        "errors": {"before": 5, "after": 1, "interval": [-5, -3], "better": "lower"},
        "score": {"before": 5, "after": 1, "interval": [-5, -3]},
    }
    (folder / "comparison.json").write_text(json.dumps({"rows": [], "loss": {}, "metrics": metrics}))
    text = read(folder).text
    assert re.search(r"errors.*?(better|worse).*?score.*?(better|worse)", text).groups() == ("better", "worse")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("failed", "This run failed at step 60"),
        ("interrupted", "stopped on request at step 60"),
        ("running", "stopped unexpectedly"),
        ("finished", ""),
    ],
)
def test_a_run_that_did_not_finish_says_so_before_anything_else(tmp_path, state, words):
    """`running` without a writer is a run that died: nobody holds the lock here."""
    found = read(make_run(tmp_path / "run", state=state))
    if words:
        assert found.text.index(words) < found.text.index("How it learned")
        assert "a last word" in found.text or state == "running"
    else:
        assert "This run" not in found.text
    assert ("Better" in found.text) == (state != "failed")


def test_losses_that_are_not_finite_are_said_and_not_drawn(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"kind": "step", "step": 61, "loss": "nan", "grad_norm": "inf"}) + "\n")
        f.write('{"kind": "step", "step": 62, "loss": NaN}\n')
    source = report.write(folder).read_text("utf-8")
    assert "2 steps had a loss that is not finite" in source and not re.search(r'points="[^"]*(nan|inf)', source)


# ---- nothing in it can run -----------------------------------------------------------------------------------------------------

PAYLOADS = [
    template.format(js=js)
    for js in ("alert(1)", "fetch('//e')", "document.write(1)", "eval(name)")
    for template in (
        "<script>{js}</script>", "<img src=x onerror={js}>", "<svg onload={js}>",
        '"><script>{js}</script>', "'><img src=x onerror={js}>",
        "</title><script>{js}</script>", "</style><script>{js}</script>", "</pre></code><script>{js}</script>",
        "<a href=javascript:{js}>x</a>",
        "<iframe srcdoc='<script>{js}</script>'>", "<body onload={js}>", "<details open ontoggle={js}>",
        "<math><mi xlink:href='javascript:{js}'>",
        "<!--><script>{js}</script>-->", "<![CDATA[<script>{js}</script>]]>", "&lt;script&gt;{js}&lt;/script&gt;",
        "\" onmouseover=\"{js}\" x=\"",
        "' onfocus='{js}' autofocus='", "<meta http-equiv=refresh content='0;url=javascript:{js}'>",
        "<style>@import 'javascript:{js}'</style>",
        "<base href=//evil><form action=javascript:{js}>", "\u202e<script>{js}</script>", "<scr\x00ipt>{js}</scr\x00ipt>",
        "<ſcript>{js}</ſcript>",
        "{{{{{js}}}}}", "${{{js}}}",
    )
]  # fmt: skip


def test_a_hundred_payloads_in_every_text_stay_text(tmp_path):
    """Four payloads a run, in every text of every file: only our tags and attributes come out, and the words are still there."""
    assert len(set(PAYLOADS)) >= 100
    folder = tmp_path / "run"
    for i in range(0, len(PAYLOADS), 4):
        payload = " ".join(PAYLOADS[i : i + 4])
        found = read(make_run(folder, say=lambda words, payload=payload: f"{payload} {words}"))
        shown = " ".join(page.INVISIBLE.sub(lambda m: f"\\u{ord(m[0]):04x}", payload).split())
        assert f"{shown} question 0" in found.text and f"{shown} old" in found.text


def test_a_runs_name_is_text_too(tmp_path):
    found = read(make_run(tmp_path / "<script>alert(1)<"))
    assert "<script>alert(1)<" in found.text


def test_the_policy_allows_one_style_sheet_and_nothing_else(tmp_path):
    source = report.write(make_run(tmp_path / "run")).read_text("utf-8")
    found = Reader(source)
    digest = base64.b64encode(hashlib.sha256(found.style.encode()).digest()).decode()
    assert found.policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert source.index("Content-Security-Policy") < source.index("<style>") < source.index("<body>")
    assert not re.search(r"https?://|//[a-z]|url\(|@import|javascript:", source)
    assert set(re.findall(r'class="([^"]*)"', source))  # classes, not inline styles


def test_every_picture_and_table_says_what_it_is(tmp_path):
    source = report.write(make_run(tmp_path / "run")).read_text("utf-8")
    assert '<html lang="en">' in source and "width=device-width" in source
    for svg in re.findall(r"<svg[^>]*>", source):
        assert 'aria-hidden="true"' in svg or ('role="img"' in svg and "aria-label=" in svg)
    assert source.count("<th") > 20 and all("scope=" in th for th in re.findall(r"<th[ >][^>]*>?", source))
    assert "prefers-color-scheme:dark" in source and "@media print" in source


# ---- missing, damaged, large ---------------------------------------------------------------------------------------------------

FILES = ("run.yaml", "status.json", "manifest.json", "plan.json", "comparison.json", "metrics.jsonl", "samples.jsonl",
         "data/account.json", "data/refused.jsonl")  # fmt: skip


@pytest.mark.parametrize("gone", [*FILES, "all"])
def test_any_part_may_be_missing(tmp_path, gone):
    folder = make_run(tmp_path / "run")
    for name in FILES if gone == "all" else [gone]:
        (folder / name).unlink()
    found = read(folder)
    assert ("This run is" in found.text) == (gone in ("run.yaml", "status.json", "all")) or gone == "run.yaml"
    assert "How to use it" in found.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"3", b'{"a": 1}\n{"kind', b"[" * 5000, b"\n\n{}\n"]
)
def test_any_part_may_be_damaged(tmp_path, name, content):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=6) | st.just("inf"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wrong_types_anywhere_are_survived(tmp_path, data):
    """One value somewhere in one file becomes something else entirely."""
    folder = make_run(tmp_path / "run")
    name = data.draw(st.sampled_from([f for f in FILES if f != "run.yaml"]))
    lines = (folder / name).read_text().splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[at])
    place, keys = value, list(value)
    while True:
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            place, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            continue
        place[key] = data.draw(JSON)
        break
    lines[at] = json.dumps(value)
    (folder / name).write_text("\n".join(lines) + "\n")
    read(folder)


def test_a_large_run_makes_a_small_page(tmp_path):
    folder = make_run(tmp_path / "run")
    long = "word <b> " * 20_000
    row = {"index": 0, "prompt": long, "gold": long, "before": {"answer": long}, "after": {"answer": long}}
    (folder / "comparison.json").write_text(
        json.dumps({"rows": [row] * 60, "loss": {"before": 2, "after": 1, "interval": [-2, -1]}, "metrics": {}})
    )
    with (folder / "metrics.jsonl").open("w") as f:
        for s in range(10_000):
            f.write(f'{{"kind": "step", "step": {s}, "loss": {2 + math.sin(s)}, "learning_rate": 1e-4, "grad_norm": 1}}\n')
        for s in range(0, 10_000, 20):
            f.write(f'{{"kind": "eval", "step": {s}, "loss": 2}}\n{{"kind": "event", "step": {s}, "what": "{"w" * 500}"}}\n')
    (folder / "data/refused.jsonl").write_text(
        "".join(json.dumps({"file": "f", "line": i, "reason": long, "row": long}) + "\n" for i in range(100))
    )
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps({"step": s, "index": s % 9, "prompt": long, "answer": long}) + "\n" for s in range(99))
    )
    source = report.write(folder).read_text("utf-8")
    assert len(source) < 6_000_000  # of 60 MB read
    text = Reader(source).text
    assert (
        "36 more are in comparison.json" in text and "more characters are not shown" in text and "more are in metrics.jsonl" in text
    )


def test_writing_twice_gives_the_same_page_and_no_folder_is_an_error(tmp_path):
    folder = make_run(tmp_path / "run")
    first = report.write(folder).read_bytes()
    assert report.write(str(folder)).read_bytes() == first
    with pytest.raises(RunError, match="no such folder"):
        report.write(tmp_path / "nothing")


def test_no_torch_is_needed():
    code = "import sys; import tunesmith.evaluate.report, tunesmith.evaluate.statistics; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


# ---- the pieces ----------------------------------------------------------------------------------------------------------------


def test_elements_escape_what_is_not_an_element():
    assert el("p", "a < b", None, False, el("b", "&"), class_='x"y') == '<p class="x&quot;y">a &lt; b<b>&amp;</b></p>'
    assert el("td", "\u202eabc\x00") == "<td>\\u202eabc\\u0000</td>"


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(2, 8))
def test_ticks_enclose_and_are_round(lo, span, count):
    found = ticks(lo, lo + span, count)
    if lo + span > lo:
        near = 1e-9 * span + 1e-11 + 4 * math.ulp(max(abs(lo), abs(lo + span)))  # a span of a few ulps cannot be met more closely
        assert found[0] <= lo + near and found[-1] >= lo + span - near and len(found) <= 2 * count + 3
    assert all(a < b for a, b in pairwise(found))


def test_thinning_keeps_every_spike():
    points = [(s, 1.0) for s in range(100_000)]
    points[54_321] = (54_321, 99.0)
    kept = thin(points)
    assert len(kept) <= 2 * page.POINTS and (54_321, 99.0) in kept and kept == sorted(kept)
    assert thin([(0, math.nan), (1, 2.0), (2, math.inf)]) == [(1.0, 2.0)]


def test_a_chart_draws_its_points_inside_its_frame():
    drawn = chart("t", "d", [Line([(0, 5.0), (10, -3.0), (20, 1.0)], "train")], width=400, height=200)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', drawn)[1].split()]
    assert len(points) == 3 and all(52 <= x <= 386 and 12 <= y <= 170 for x, y in points)
    assert points[0][1] < points[2][1] < points[1][1]  # higher values lie higher
    assert "nothing was recorded" in chart("t", "d", [Line([], "train")], width=400, height=200)


@pytest.mark.parametrize(
    ("value", "words"), [(0.0002, "2e-4"), (1500, "1,500"), (0.35, "0.35"), (3.0, "3"), (math.nan, "not finite"), (2e-7, "2e-7")]
)
def test_numbers_read_well(value, words):
    assert number(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(-1.0739, "−1.074"), (0.1, "+0.1"), (0, "0"), (-0.00012, "−1.2e-04"), (math.inf, "unknown")]
)
def test_differences_show_their_sign(value, words):
    assert signed(value) == words


def test_a_table_from_outside_is_text_on_the_page_whatever_it_holds(tmp_path):
    folder = make_run(tmp_path / "run")

    def page_with(extra):
        (folder / "comparison.json").write_text(json.dumps({"rows": [], "loss": {}, "metrics": {}, "table": extra}))
        return read(folder).text

    rows = [["style <b>", "95 %"], ["torn"], "no row"]
    text = page_with({"title": "Three ways", "head": ["", "base"], "rows": rows, "note": "a & b"})
    assert all(word in text for word in ("Three ways", "style <b>", "95 %", "a & b")) and "torn" not in text
    for damaged in ({}, {"title": "Three ways", "head": ["a"]}, {"title": "Three ways", "head": "a", "rows": 3}, []):
        assert "Three ways" not in page_with(damaged)
