"""evaluate/adherence.py: it tells a style from what is none, says how well, and is silent where there is none."""

import json
from importlib.resources import files

import numpy as np
import pytest

from tunesmith.evaluate import adherence
from tunesmith.evaluate.style import Style


def demo(name):
    return [json.loads(line) for line in (files("tunesmith") / f"assets/demo/{name}.jsonl").read_text("utf-8").splitlines()]


def plain(answer):
    """The same said without the house's form."""
    return answer.removesuffix("\nGrow well. Wick").split(". ", 1)[-1]


@pytest.fixture(scope="module")
def heard():
    house = [row["messages"][-1]["content"] for row in demo("train")[:300:3]]
    return adherence.learn(house, [plain(a) for a in house])


def test_a_style_is_heard_in_answers_it_has_not_seen(heard):
    held_out = [row["messages"][-1]["content"] for row in demo("held_out")]
    assert heard.others.enough and heard.damaged.enough and heard.others.accuracy > 0.95
    assert heard.keeps(held_out).mean() > 0.97 and heard.keeps([plain(a) for a in held_out]).mean() < 0.03


def test_a_piece_of_the_style_is_not_the_style(heard):
    rules = Style.load(files("tunesmith") / "assets/demo/style.json")
    for piece in ("Gladly, dear grower.", "Grow well. Wick", "dear Gladly, grower. Wick Grow well. sill the on"):
        assert rules.broken(piece) and heard.keeps([piece])[0] == 0


def test_where_there_is_no_style_nothing_is_heard():
    house = [row["messages"][-1]["content"] for row in demo("train")[:120]]
    assert not adherence.learn(house, house[60:] + house[:60]).others.enough  # other answers of the same house


def test_pieces_that_cannot_be_told_are_not_learned():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    house = [" ".join(rng.choice(words, 12)) for _ in range(80)]  # any piece of it in any order is such a text too
    others = [" ".join(rng.choice([w.upper() for w in words], 12)) for _ in range(80)]
    found = adherence.learn(house, others)
    assert found.others.enough and not found.damaged.enough and found.keeps([house[0][:30]])[0] == 1


def test_the_accuracy_is_of_unseen_answers():
    """Random labels: a classifier of 16,384 features learns them by heart, and cross-validation must not call that hearing."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh "), 40)) for _ in range(160)]
    found = adherence.learn(texts[:80], texts[80:])
    assert 0.3 < found.others.accuracy < 0.7 and not found.others.enough
    assert found.keeps(texts[:80]).mean() == 1 and found.keeps(texts[80:]).mean() == 0  # by heart


@pytest.mark.parametrize("weighed", [False, True])
def test_the_regression_is_scikit_learns(weighed):
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    x = adherence.features(["".join(rng.choice(list("abcdefgh "), 30)) for _ in range(60)])
    y = (rng.random(60) > 0.4).astype(float)
    weight = rng.random(60) + 0.5 if weighed else None
    ours, bias = adherence.fit(x, y, weight, penalty=0.01)
    share = weight / weight.sum() * 60 if weighed else np.ones(60)
    theirs = linear.LogisticRegression(C=1 / (60 * 0.01), tol=1e-10, max_iter=10_000).fit(x.astype(float), y, share)
    assert np.abs(theirs.coef_[0] - ours).max() < 1e-4 and abs(theirs.intercept_[0] - bias) < 1e-4


def test_digits_are_one_sign_and_order_of_texts_does_not_matter():
    a, b = adherence.features(["it has 4 pots", "it has 7 pots"])
    assert (a == b).all() and np.linalg.norm(a) == pytest.approx(1)
    assert np.isfinite(adherence.features(["", " ", "\ud800"])).all()
