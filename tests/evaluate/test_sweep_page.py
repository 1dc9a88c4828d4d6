"""The sweep's page: what came out of data stays text, a loss that ran away does not press the rest flat."""

import re
from xml.etree import ElementTree

from tunesmith.evaluate import sweep_page


def row(number, value, loss, **changes):
    made = {
        "number": number, "values": {"lora.rank": value}, "changes": {"lora.rank": value}, "baseline": number == 0,
        "state": "finished" if loss else "failed", "loss": loss, "losses": [loss], "tokens": [9], "seconds": 3.0,
        "stopped_at": None, "reason": "", "folders": [], "curves": [[[0, 5.0], [100, loss or 4.0]]],
        "ranked": bool(loss), "place": number + 1,
        "difference": None,
    }  # fmt: skip
    return made | changes


def found(*trials, values=("1", "8", "64")):
    axis = {"key": "lora.rank", "values": list(values), "low": 0.0, "high": 0.0, "log": False, "own": "8"}
    return {
        "model": "a/b", "method": "lora", "axes": [axis], "seeds": [0], "total": len(trials), "importance": None,
        "trials": list(trials), "verdict": ["best: <b>"],
    }  # fmt: skip


def circles(svg):
    return [
        (float(c.get("cx")), float(c.get("cy"))) for c in ElementTree.fromstring(svg).iter("circle") if c.get("class") != "ring"
    ]


def test_a_reason_from_elsewhere_stays_text(tmp_path):
    page = sweep_page.write(
        found(row(0, "8", 2.0), row(1, "64", None, reason="<script>x</script>")), tmp_path / "p.html"
    ).read_text()
    assert "&lt;script&gt;x" in page and "<script" not in page and "best: &lt;b&gt;" in page
    assert re.search(r"default-src 'none'", page.replace("&#x27;", "'"))


def test_a_wide_list_is_spread_by_its_logarithm_and_words_evenly():
    for values in (("1", "8", "64"), ("cosine", "wsd", "linear")):
        (axis,) = found(values=values)["axes"]
        a, b, c = circles(sweep_page.effect(axis, [row(i, value, 2.0) for i, value in enumerate(values)]))
        assert a[0] < b[0] and abs((b[0] - a[0]) - (c[0] - b[0])) < 0.2


def test_a_loss_that_ran_away_does_not_press_the_rest_flat():
    trials = [row(i, v, y) for i, (v, y) in enumerate((("1", 2.0), ("1", 2.1), ("8", 2.2), ("8", 2.15), ("64", 900.0)))]
    heights = [y for _, y in circles(sweep_page.effect(found()["axes"][0], trials))]
    assert max(heights) - min(heights[:4]) > 50 and min(heights) == heights[4] >= 0


def test_nothing_finished(tmp_path):
    page = sweep_page.write(found(row(0, "8", None, curves=[])), tmp_path / "p.html").read_text()
    assert "Nothing finished." in page and "nothing was recorded" in page
